"""Which motifs mark the cCREs that are open in a cell type, beyond what GC, length and accessibility explain.

Each cCRE's accessibility in a type is compared with that of similar cCREs (`strata`). A motif is active where cCREs
that have it are more open than similar ones. Its p-value is that of permutations within strata, by their exact mean
and variance (the stratified score test). Above the mean of relative accessibility, the number of matches over that of
similar cCREs grows exponentially; the excess is the share of matches through which the factor acts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy import stats

from cisformer.links.statistics import false_discovery_rate

PER_STRATUM = 30
MOST_BINS = 8
EDGES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5)
"""Of bins of relative accessibility, in s.d."""


@dataclass(frozen=True)
class Activity:
    """Of T factors in K cell types.

    Attributes
    ----------
    z, p_value, fdr
        Are cCREs with the motif more open in the type than similar ones? Benjamini–Hochberg over factors and types.
        NaN for motifs that nothing or everything has; [T, K] each.
    slope
        Growth of the log of matches over those of similar cCREs, per s.d. of relative accessibility, times the chance
        that the factor is active (1 − fdr); at least 0; [T, K].
    relative
        Accessibility of each cCRE in each type relative to cCREs alike, in s.d.; [P, K].
    """

    z: np.ndarray
    p_value: np.ndarray
    fdr: np.ndarray
    slope: np.ndarray
    relative: np.ndarray

    def site(self, row: np.ndarray, factor: np.ndarray, number: int) -> np.ndarray:
        """Return the chance that matches work in a type: the share of them beyond what similar cCREs have.

        Parameters
        ----------
        row, factor
            cCRE and factor of each match; [H].
        number
            Of the type.
        """
        gain = self.slope[factor, number] * np.maximum(self.relative[row, number], 0)
        share: np.ndarray = -np.expm1(-gain)
        return share


def strata(*values: np.ndarray) -> np.ndarray:
    """Number cCREs by quantiles of some properties, so that each number has some `PER_STRATUM` of them; int64 [P]."""
    n_bins = int(np.clip((len(values[0]) / PER_STRATUM) ** (1 / len(values)), 1, MOST_BINS))
    number = np.zeros(len(values[0]), np.int64)
    for value in values:
        rank = stats.rankdata(value, method="average") - 0.5
        number = number * n_bins + np.minimum((rank / len(value) * n_bins).astype(np.int64), n_bins - 1)
    return np.unique(number, return_inverse=True)[1]


def relative_accessibility(n_open: np.ndarray, *alike: np.ndarray) -> np.ndarray:
    """Return by how much each cCRE is more open in each type than its total and the type's would make it.

    Residuals of Poisson counts, as normal scores within each type, less their regression on properties that should
    not count (cubic in the properties' normal scores). With one type, of the counts themselves.

    Parameters
    ----------
    n_open
        Cells of each type in which each cCRE is open; [P, K].
    alike
        Properties of cCREs, such as GC; [P] each.
    """
    total = max(n_open.sum(), 1.0)
    expected = n_open.sum(axis=1, keepdims=True) * n_open.sum(axis=0, keepdims=True) / total
    if n_open.shape[1] == 1:
        residual = n_open.astype(np.float64)
    else:
        residual = (n_open - expected) / np.sqrt(np.maximum(expected, 1e-9))
    scores = _normal_scores(residual)
    powers = [_normal_scores(value) ** power for value in alike for power in (1, 2, 3)]
    design = np.column_stack([np.ones(len(scores)), *powers])
    left: np.ndarray = scores - design @ np.linalg.lstsq(design, scores, rcond=None)[0]
    return left


def _normal_scores(values: np.ndarray) -> np.ndarray:
    scores: np.ndarray = stats.norm.ppf((stats.rankdata(values, axis=0) - 0.5) / len(values))
    return scores


def measure_activity(matches: sp.csr_matrix, relative: np.ndarray, stratum: np.ndarray) -> Activity:
    """Test every factor in every type.

    Parameters
    ----------
    matches
        1 where a cCRE has a factor's motif; [P, T].
    relative
        As `relative_accessibility` returns it; [P, K].
    stratum
        As `strata` returns it; [P].
    """
    n = np.bincount(stratum).astype(np.float64)
    member = sp.csr_matrix((np.ones(len(stratum)), (stratum, np.arange(len(stratum)))))
    centred = relative - (np.asarray(member @ relative) / n[:, None])[stratum]
    spread = np.asarray(member @ np.square(centred))
    number = np.asarray((member @ matches).todense())
    left = number * (1 - number / n[:, None])
    score = np.asarray(matches.T @ centred)
    variance = left.T @ (spread / np.maximum(n - 1, 1)[:, None])
    z = np.divide(score, np.sqrt(variance), out=np.full(score.shape, np.nan), where=variance > 1e-9)
    p_value = 2 * stats.norm.sf(np.abs(z))
    fdr = false_discovery_rate(p_value.ravel()).reshape(z.shape)
    slope = np.stack(
        [_growth(matches, centred[:, k], stratum, number / n[:, None]) for k in range(z.shape[1])], axis=1
    )
    return Activity(z, p_value, fdr, np.nan_to_num(slope * (1 - fdr)), centred)


def _growth(
    matches: sp.csr_matrix, relative: np.ndarray, stratum: np.ndarray, rate: np.ndarray
) -> np.ndarray:
    """Return β ≥ 0 of each factor, where matches are exp(α + β max(relative, 0)) times those of similar cCREs.

    Poisson regression over bins of relative accessibility, with a normal prior of s.d. 1 on β; [T].

    Parameters
    ----------
    matches, relative, stratum
        As for `measure_activity`, of one type.
    rate
        Share of each stratum that has a factor's motif; [S, T].
    """
    scale = max(float(relative.std()), 1e-9)
    bins = np.digitize(relative / scale, EDGES)
    member = sp.csr_matrix((np.ones(len(bins)), (bins, np.arange(len(bins)))), (len(EDGES) + 1, len(bins)))
    in_stratum = sp.csr_matrix((np.ones(len(bins)), (bins, stratum)), (len(EDGES) + 1, len(rate)))
    observed, expected = np.asarray((member @ matches).todense(), np.float64), np.asarray(in_stratum @ rate)
    size = np.maximum(np.bincount(bins, minlength=len(EDGES) + 1), 1)
    height = np.bincount(bins, np.maximum(relative, 0), len(EDGES) + 1)[:, None] / size[:, None]
    alpha, beta = np.zeros(observed.shape[1]), np.zeros(observed.shape[1])
    for _ in range(25):
        fitted = expected * np.exp(alpha + beta * height)
        off = observed - fitted
        gradient = off.sum(axis=0), (height * off).sum(axis=0) - beta
        aa, ab = fitted.sum(axis=0) + 1e-9, (height * fitted).sum(axis=0)
        bb = (np.square(height) * fitted).sum(axis=0) + 1
        determinant = aa * bb - ab * ab
        alpha = np.clip(alpha + (bb * gradient[0] - ab * gradient[1]) / determinant, -3, 3)
        beta = np.clip(beta + (aa * gradient[1] - ab * gradient[0]) / determinant, 0, 5)
    return beta


def agreement(activity: np.ndarray, expression: np.ndarray) -> np.ndarray:
    """Return how well each factor's expression follows its activity over types: their correlation, at least 0; [T].

    It tells factors that share a motif apart. 1 where there is one type, or nothing is known of expression. Factors
    that close chromatin where they are expressed get 0.

    Parameters
    ----------
    activity, expression
        z and log expression of factors in types; [T, K] each.
    """
    if activity.shape[1] == 1 or not np.ptp(expression):
        return np.ones(len(activity))
    parts = [values - values.mean(axis=1, keepdims=True) for values in (np.nan_to_num(activity), expression)]
    length = np.sqrt(np.square(parts[0]).sum(axis=1) * np.square(parts[1]).sum(axis=1))
    product = (parts[0] * parts[1]).sum(axis=1)
    share: np.ndarray = np.divide(product, length, out=np.zeros_like(product), where=length > 1e-9)
    at_least: np.ndarray = np.maximum(share, 0)
    return at_least
