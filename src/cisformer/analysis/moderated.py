"""Compare two groups of estimates of known precision, many pairs at once, with few donors.

Each estimate is of one donor and group, with a variance v known up to a factor s² of the pair; s² is estimated from
what donors leave and drawn to what all pairs say, as in limma (Smyth, Stat Appl Genet Mol Biol 2004,
doi:10.2202/1544-6115.1027). Without donors, s² is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special, stats


@dataclass(frozen=True)
class Difference:
    """Of each pair, how two groups differ.

    Attributes
    ----------
    mean_a, mean_b
        Weighted means of the groups; [E].
    effect, error
        Of group A less group B, and its standard error; [E].
    p_value
        Two-sided; NaN where untested; [E].
    n_a, n_b
        Estimates that entered; [E].
    spread, prior_df
        Variance between donors over that which cells would give, of all pairs; and how many degrees of freedom that
        is worth for each. 1 and infinity without donors.
    """

    mean_a: np.ndarray
    mean_b: np.ndarray
    effect: np.ndarray
    error: np.ndarray
    p_value: np.ndarray
    n_a: np.ndarray
    n_b: np.ndarray
    spread: float = 1.0
    prior_df: float = np.inf


def compare_cells(estimate: np.ndarray, variance: np.ndarray, tested: np.ndarray) -> Difference:
    """Compare one estimate per group by its own variance; rows of `estimate` and `variance` [2, E] are A and B."""
    error = np.sqrt(variance.sum(axis=0))
    effect = estimate[0] - estimate[1]
    p = np.full(len(effect), np.nan)
    p[tested] = 2 * stats.norm.sf(np.abs(effect[tested]) / error[tested])
    one = np.isfinite(variance).astype(np.int64)
    return Difference(estimate[0], estimate[1], effect, error, p, one[0], one[1])


def compare_donors(
    estimate: np.ndarray, variance: np.ndarray, in_a: np.ndarray, tested: np.ndarray
) -> Difference:
    """Compare groups whose donors differ.

    Parameters
    ----------
    estimate, variance
        One row per donor and group; infinite variance where a donor says nothing of a pair; [U, E].
    in_a
        Which rows are of group A; bool [U].
    tested
        Pairs to test; bool [E]. Those with fewer than two donors in a group are not.
    """
    weight = np.where(np.isfinite(variance), 1 / variance, 0.0)
    estimate = np.where(weight > 0, estimate, 0.0)
    sums, means, left, counts = [], [], np.zeros(weight.shape[1]), []
    for rows in (in_a, ~in_a):
        total = weight[rows].sum(axis=0)
        mean = _over((weight[rows] * estimate[rows]).sum(axis=0), total)
        left = left + (weight[rows] * np.square(estimate[rows] - mean)).sum(axis=0)
        sums.append(total)
        means.append(mean)
        counts.append((weight[rows] > 0).sum(axis=0))
    free = counts[0] + counts[1] - 2
    enough = tested & (counts[0] >= 2) & (counts[1] >= 2)
    unit = np.sqrt(_over(1.0, sums[0]) + _over(1.0, sums[1]))
    residual, effect = (left, free), means[0] - means[1]
    return _moderated((means[0], means[1]), effect, unit, residual, enough, (counts[0], counts[1]))


def compare_pairs(
    estimate: np.ndarray, variance: np.ndarray, in_a: np.ndarray, tested: np.ndarray, fewest: int
) -> Difference:
    """Compare groups within donors; rows of A and of B are of the same donors in the same order.

    Parameters
    ----------
    estimate, variance, in_a, tested
        See `compare_donors`.
    fewest
        A pair is tested if at least so many donors say something of it in both groups.
    """
    both = variance[in_a] + variance[~in_a]
    weight = np.where(np.isfinite(both), 1 / both, 0.0)
    known = weight > 0
    a, b = (np.where(known, estimate[rows], 0.0) for rows in (in_a, ~in_a))
    total = weight.sum(axis=0)
    effect = _over((weight * (a - b)).sum(axis=0), total)
    left = (weight * np.square(a - b - effect)).sum(axis=0)
    number = known.sum(axis=0)
    means = _over((weight * a).sum(axis=0), total), _over((weight * b).sum(axis=0), total)
    unit = np.sqrt(_over(1.0, total))
    residual, enough = (left, number - 1), tested & (number >= fewest)
    return _moderated(means, effect, unit, residual, enough, (number, number))


def _over(top: np.ndarray | float, bottom: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(top, bottom, out=np.full(bottom.shape, np.nan), where=bottom > 0)
    return ratio


def _moderated(
    means: tuple[np.ndarray, np.ndarray],
    effect: np.ndarray,
    unit: np.ndarray,
    residual: tuple[np.ndarray, np.ndarray],
    tested: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray],
) -> Difference:
    """Test effects whose standard error is `unit` times an unknown s.

    `residual` are s² times its degrees of freedom (the residual sum of squares), and these.
    """
    left, free = residual
    p, error = np.full(len(effect), np.nan), np.full(len(effect), np.nan)
    if not tested.any():
        return Difference(*means, effect, error, p, *counts)
    own, df = left[tested] / free[tested], free[tested].astype(np.float64)
    prior, prior_df = fit_scaled_f(own, df)
    if np.isinf(prior_df):
        variance, total_df = np.full(len(own), prior), np.full(len(own), df.sum())
    else:
        variance = (prior_df * prior + df * own) / (prior_df + df)
        total_df = np.minimum(prior_df + df, df.sum())
    error[tested] = unit[tested] * np.sqrt(variance)
    p[tested] = 2 * stats.t.sf(np.abs(effect[tested]) / error[tested], total_df)
    return Difference(*means, effect, error, p, *counts, spread=prior, prior_df=prior_df)


def fit_scaled_f(variance: np.ndarray, df: np.ndarray) -> tuple[float, float]:
    """Return s₀² and d₀ of a scaled F distribution of variances with `df` degrees of freedom; by moments of the log.

    d₀ is infinite where variances differ no more than their degrees of freedom make them, and 0 for one variance.
    Smyth 2004, section 6.2.
    """
    floor = 1e-5 * max(float(np.median(variance)), 1e-12)
    log = np.log(np.maximum(variance, floor)) - special.digamma(df / 2) + np.log(df / 2)
    if len(log) < 2:
        return float(variance.mean()), 0.0
    excess = float(log.var(ddof=1) - special.polygamma(1, df / 2).mean())
    if excess <= 0:
        return float(np.exp(log.mean())), np.inf
    half = _trigamma_inverse(excess)
    return float(np.exp(log.mean() + special.digamma(half) - np.log(half))), 2 * half


def _trigamma_inverse(value: float) -> float:
    """Return x with trigamma(x) = value; by Newton's method on its inverse."""
    if value < 1e-6:
        return 1 / value
    x = 0.5 + 1 / value
    for _ in range(50):
        tri = float(special.polygamma(1, x))
        step = tri * (1 - tri / value) / float(special.polygamma(2, x))
        x += step
        if -step / x < 1e-8:
            break
    return x
