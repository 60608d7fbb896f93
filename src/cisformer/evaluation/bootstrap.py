"""Bootstrap over cells: draws that all methods share, and what scores become in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cisformer.evaluation.matrices import divide


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; `n` is how many cells, features or types it is the mean of."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, value: float, draws: np.ndarray, n: int) -> Interval:
        """Return value ± 1.96 standard errors, the standard error being the s.d. of the bootstrap `draws`."""
        half = 1.96 * float(np.std(draws, ddof=1)) if len(draws) > 1 else float("nan")
        return cls(float(value), float(value) - half, float(value) + half, int(n))


def resample_cells(n_cells: int, n_draws: int, rng: np.random.Generator) -> np.ndarray:
    """Return how often each cell is drawn when as many cells are drawn with replacement [draws × cells]."""
    return rng.multinomial(n_cells, np.full(n_cells, 1 / n_cells), size=n_draws)


def resampled_mean(
    values: np.ndarray, counts: np.ndarray, weights: np.ndarray | None = None
) -> tuple[float, np.ndarray]:
    """Return the mean over cells, and the mean in each bootstrap draw [draws].

    Parameters
    ----------
    values
        One per cell; NaNs are left out.
    counts
        What `resample_cells` gives.
    weights
        If given, sum(values) / sum(weights) in place of the mean.
    """
    weights = np.ones(len(values)) if weights is None else weights
    keep = np.isfinite(values)
    sums = np.where(keep, [values, weights], 0.0)
    value = divide(sums[0].sum(), sums[1].sum())
    return float(value), divide(counts @ sums[0], counts @ sums[1])


def resampled_correlation(left: np.ndarray, right: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the Pearson correlation of every column in every bootstrap draw [draws × features].

    Parameters
    ----------
    left, right
        Values [cells × features]; ranks for a Spearman correlation whose ranks stay those of all cells.
    counts
        What `resample_cells` gives [draws × cells].
    """
    left, right = left - left.mean(axis=0), right - right.mean(axis=0)
    weight = counts / counts.sum(axis=1, keepdims=True)
    mean_left, mean_right = weight @ left, weight @ right
    covariance = weight @ (left * right) - mean_left * mean_right
    variances = (weight @ left**2 - mean_left**2, weight @ right**2 - mean_right**2)
    scale = np.sqrt(np.prod(np.maximum(variances, 0), axis=0))
    return np.where(variances[1] > 1e-12, np.nan_to_num(divide(covariance, scale)), np.nan)
