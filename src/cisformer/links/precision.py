"""Average precision with its interval, and enrichment."""

from __future__ import annotations

import numpy as np

RECALLS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def average_precision(is_link: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the precision-recall curve by steps, ties being one; NaN without a link."""
    return _average_precision(is_link.astype(np.float64), *_order(score), np.ones(len(is_link)))


def _order(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of falling scores, and where in it each group of ties ends."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return order, last


def _average_precision(is_link: np.ndarray, order: np.ndarray, last: np.ndarray, weight: np.ndarray) -> float:
    found = np.cumsum((is_link * weight)[order])[last]
    called = np.cumsum(weight[order])[last]
    if len(found) == 0 or found[-1] == 0:
        return float("nan")
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return float(np.sum(np.diff(found, prepend=0) * precision) / found[-1])


def bootstrap_interval(
    is_link: np.ndarray, score: np.ndarray, gene: np.ndarray, n_draws: int, seed: int
) -> tuple[float, float]:
    """Return the 95 % interval of the average precision when genes, with all their pairs, are drawn anew."""
    if not is_link.any() or n_draws == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    order, last = _order(score)
    _, gene = np.unique(gene, return_inverse=True)
    n_genes = int(gene.max()) + 1
    truth = is_link.astype(np.float64)
    areas = []
    for _ in range(n_draws):
        times_drawn = np.bincount(rng.integers(0, n_genes, n_genes), minlength=n_genes)
        areas.append(_average_precision(truth, order, last, times_drawn[gene]))
    low, high = np.nanpercentile(areas, [2.5, 97.5])
    return float(low), float(high)


def enrichment(is_link: np.ndarray, score: np.ndarray) -> list[float]:
    """Return precision over the share of links, at the first threshold that reaches each of `RECALLS`."""
    order, last = _order(score)
    found, called = np.cumsum(is_link[order])[last], last + 1
    at = np.searchsorted(found, np.array(RECALLS) * is_link.sum() - 1e-9)
    return [float(value) for value in found[at] / called[at] / is_link.mean()]
