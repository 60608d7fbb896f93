"""Correlations of prediction and truth, and squared errors beside those of the mean."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from cisformer.evaluation.matrices import Axis, Matrix, check_shapes, dense, divide, matrix_blocks, take


def correlation(
    predicted: Matrix, truth: Matrix, *, axis: Axis = 0, ranks: bool = False, minus: np.ndarray | None = None
) -> np.ndarray:
    """Return the Pearson (or, with `ranks`, Spearman) correlation of every column or row.

    A constant prediction of something that varies knows nothing: 0. A constant truth cannot be scored: NaN.

    Parameters
    ----------
    predicted, truth
        Values [cells × features].
    axis
        0 for a score per feature, 1 for a score per cell.
    ranks
        Spearman in place of Pearson; ties share their mean rank.
    minus
        One value per feature, taken off both sides first: what is left of a cell beyond the mean profile.
    """
    check_shapes(predicted, truth)
    scores = []
    for part in matrix_blocks(np.broadcast_to(0.0, predicted.shape), axis):
        left, right = (dense(take(matrix, part, axis), float) for matrix in (predicted, truth))
        if minus is not None:
            shift = (minus[part] if axis == 0 else minus).astype(np.float32)  # the mean itself leaves zero
            left, right = left - shift, right - shift
        scores.append(_correlate(left, right, axis, ranks))
    return np.concatenate(scores)


def _correlate(left: np.ndarray, right: np.ndarray, axis: Axis, ranks: bool) -> np.ndarray:
    flat = np.ptp(left, axis=axis) == 0
    undefined = np.ptp(right, axis=axis) == 0
    if ranks:
        left, right = rankdata(left, axis=axis), rankdata(right, axis=axis)
    left = left - left.mean(axis=axis, keepdims=True)
    right = right - right.mean(axis=axis, keepdims=True)
    scale = np.sqrt((left**2).sum(axis=axis) * (right**2).sum(axis=axis))
    result = divide((left * right).sum(axis=axis), scale)
    result[flat] = 0.0
    result[undefined] = np.nan
    return result


def squared_errors(predicted: Matrix, truth: Matrix, mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each cell's squared error of the prediction and of `mean` [features]: R² = 1 − sum / sum."""
    check_shapes(predicted, truth)
    n_cells = predicted.shape[0]
    error, error_of_mean = np.zeros(n_cells), np.zeros(n_cells)
    for part in matrix_blocks(np.broadcast_to(0.0, predicted.shape), 1):
        target = dense(take(truth, part, 1), float)
        error[part] = ((dense(take(predicted, part, 1), float) - target) ** 2).sum(axis=1)
        error_of_mean[part] = ((mean - target) ** 2).sum(axis=1)
    return error, error_of_mean
