"""How good probabilities of being open are: log-loss, Brier score, calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from cisformer.evaluation.matrices import Matrix, check_shapes, divide, matrix_blocks, take

PROBABILITY_FLOOR = 1e-4
"""Probabilities are read as at least this and at most one minus this, where a logarithm is taken."""

RELIABILITY_EDGES = np.array([0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *np.arange(0.1, 1.01, 0.1)])
"""Bins of the reliability curve: most cCREs are closed in most cells, so the low end is cut finer."""


@dataclass(frozen=True)
class ProbabilityScores:
    """How good probabilities are, per cell and per bin of predicted probability.

    Attributes
    ----------
    log_loss, brier
        Mean over features, one per cell; the logarithm is natural.
    expected_open
        Sum of the probabilities of each cell.
    edges
        Bounds of the bins of predicted probability.
    bin_sums
        Entries, summed predictions and open entries of each bin and cell [3 × cells × bins].
    """

    log_loss: np.ndarray
    brier: np.ndarray
    expected_open: np.ndarray
    edges: np.ndarray
    bin_sums: np.ndarray

    @property
    def reliability(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Number of entries, their mean prediction, and the share of them that is open, of each bin."""
        count, predicted, observed = self.bin_sums.sum(axis=1)
        return count, divide(predicted, count), divide(observed, count)

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over entries of |predicted − observed| of their bin."""
        return float(calibration_error(self.bin_sums.sum(axis=1)))


def calibration_error(bin_sums: np.ndarray) -> np.ndarray:
    """Return the expected calibration error of sums over cells [3 × … × bins]."""
    return np.abs(bin_sums[1] - bin_sums[2]).sum(axis=-1) / bin_sums[0].sum(axis=-1)


def probability_scores(
    predicted: Matrix,
    truth: Matrix,
    *,
    floor: float = PROBABILITY_FLOOR,
    edges: np.ndarray = RELIABILITY_EDGES,
) -> ProbabilityScores:
    """Score probabilities [cells × features] against 0/1 truth: log-loss, Brier, calibration.

    For the logarithm probabilities are clipped to [`floor`, 1 − `floor`]; a sparse prediction's missing
    entries are probabilities of zero and are clipped like the others.
    """
    check_shapes(predicted, truth)
    n_cells, n_features = predicted.shape
    open_ = sp.csr_matrix(truth)
    loss, brier, expected = np.zeros(n_cells), np.zeros(n_cells), np.zeros(n_cells)
    bins = np.zeros((3, n_cells, len(edges) - 1))
    for part in matrix_blocks(predicted, 1):
        block = take(predicted, part, 1)
        values, row, rest = _stored_rows(block)
        cells = part.stop - part.start
        at_open, open_row = _at_positives(block, open_[part])
        loss[part] = _closed_loss(values, row, rest, cells, floor) + _open_loss(
            at_open, open_row, cells, floor
        )
        brier[part] = np.bincount(row, values**2, cells) + np.bincount(open_row, 1 - 2 * at_open, cells)
        expected[part] = np.bincount(row, values, cells)
        bins[:, part] = _bin_sums(values, row, at_open, open_row, cells, edges)
        bins[0, part, 0] += rest
    return ProbabilityScores(loss / n_features, brier / n_features, expected, edges, bins)


def _stored_rows(block: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stored values of a row block (float64), the row of each, and how many entries each row leaves out."""
    n_rows, n_columns = block.shape
    if sp.issparse(block):
        block = block.tocsr()
        n_stored = np.diff(block.indptr)
        return block.data.astype(float), np.repeat(np.arange(n_rows), n_stored), n_columns - n_stored
    values = np.asarray(block, dtype=float).ravel()
    return values, np.repeat(np.arange(n_rows), n_columns), np.zeros(n_rows, dtype=int)


def _at_positives(block: Any, open_: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return the predictions where the truth is open, and their rows."""
    coordinates = open_.tocoo()
    keep = coordinates.data != 0
    row, column = coordinates.row[keep], coordinates.col[keep]
    values = block[row, column] if len(row) else np.zeros(0)
    return np.asarray(values, dtype=float).ravel(), row


def _closed_loss(
    values: np.ndarray, row: np.ndarray, rest: np.ndarray, n_rows: int, floor: float
) -> np.ndarray:
    """Loss of each row as if all of it were closed."""
    return np.bincount(row, -np.log1p(-np.clip(values, floor, 1 - floor)), n_rows) - rest * np.log1p(-floor)


def _open_loss(values: np.ndarray, row: np.ndarray, n_rows: int, floor: float) -> np.ndarray:
    """What the open entries add to the loss of each row."""
    clipped = np.clip(values, floor, 1 - floor)
    return np.bincount(row, np.log1p(-clipped) - np.log(clipped), n_rows)


def _bin_sums(
    values: np.ndarray,
    row: np.ndarray,
    at_open: np.ndarray,
    open_row: np.ndarray,
    n_rows: int,
    edges: np.ndarray,
) -> np.ndarray:
    """Stored entries, summed predictions and open entries of each row and bin [3 × rows × bins]."""
    n_bins = len(edges) - 1
    index = np.searchsorted(edges[1:-1], values, "right") + row * n_bins
    open_index = np.searchsorted(edges[1:-1], at_open, "right") + open_row * n_bins
    size = n_rows * n_bins
    sums = [
        np.bincount(index, minlength=size),
        np.bincount(index, values, size),
        np.bincount(open_index, minlength=size),
    ]
    return np.stack(sums).reshape(3, n_rows, n_bins).astype(float)
