"""What baselines see of cells: principal components of the input, depth and labels; and what they learn and predict.

Units: accessibility as probabilities in [1e-4, 1 − 1e-4]; expression as log1p(counts / total × 10,000).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from cisformer.config import Direction
from cisformer.evaluation.matrices import dense
from cisformer.evaluation.probabilities import PROBABILITY_FLOOR

N_COMPONENTS = 50
TUNING_SHARE = 0.1
MOST_TUNING_CELLS = 500
MOST_TUNING_FEATURES = 4000


def log_normalise(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Return log1p(counts / total × 10,000) of each cell; a cell without counts stays zero."""
    return _log_scaled(counts, np.ones(counts.shape[1]))


def tf_idf(open_: sp.csr_matrix, n_open: np.ndarray, n_cells: int) -> sp.csr_matrix:
    """Return log1p(tf × idf × 10,000): tf = share of the cell's cCREs, idf = log(1 + n_cells / n_open).

    Parameters
    ----------
    open_
        0/1 [cells × cCREs].
    n_open, n_cells
        In how many of how many training cells each cCRE is open; one that is open in none has idf 0.
    """
    return _log_scaled(open_, np.log1p(n_cells / np.maximum(n_open, 1)) * (n_open > 0))


def _log_scaled(matrix: sp.csr_matrix, weight: np.ndarray) -> sp.csr_matrix:
    result = sp.csr_matrix(matrix, dtype=np.float32, copy=True)
    total = np.asarray(result.sum(axis=1), dtype=float).ravel()
    scale = np.divide(1e4, total, out=np.zeros_like(total), where=total > 0)
    result.data *= np.repeat(scale, np.diff(result.indptr)).astype(np.float32)
    result.data = np.log1p(result.data * weight[result.indices].astype(np.float32))
    return result


@dataclass(frozen=True)
class Product:
    """A prediction `left @ right + offset`, clipped to [`low`, `high`], made where it is sliced.

    Attributes
    ----------
    left
        [cells × k], dense or sparse.
    right
        [k × features], dense or sparse.
    offset, low
        One value per feature.
    high
        Upper bound.
    """

    left: Any
    right: Any
    offset: np.ndarray
    low: np.ndarray
    high: float = np.inf

    @property
    def shape(self) -> tuple[int, int]:
        """Cells × features."""
        return self.left.shape[0], self.right.shape[1]

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        rows, columns = key
        block = dense(self.left[rows] @ self.right[:, columns], np.float32) + self.offset[columns]
        return np.clip(block, self.low[columns], self.high).astype(np.float32)

    def toarray(self) -> np.ndarray:
        """Return the whole prediction, float32."""
        return self[:, :]


@dataclass(frozen=True)
class CellsToPredict:
    """What a baseline sees of cells: principal components of the input, log depth, and labels or None."""

    components: np.ndarray
    depth: np.ndarray
    labels: np.ndarray | None

    def __getitem__(self, rows: np.ndarray) -> CellsToPredict:
        return CellsToPredict(
            self.components[rows], self.depth[rows], None if self.labels is None else self.labels[rows]
        )


@dataclass(frozen=True)
class InputSpace:
    """Leading principal components of one modality, fitted on training cells."""

    modality: str
    n_open: np.ndarray
    n_cells: int
    pca: Any

    @classmethod
    def fit(cls, train: sp.csr_matrix, modality: str, *, seed: int = 0) -> InputSpace:
        """Fit on raw counts ("rna") or 0/1 accessibility ("atac") [cells × features]."""
        from sklearn.decomposition import PCA

        n_open = np.asarray((train != 0).sum(axis=0)).ravel()
        pca = PCA(min(N_COMPONENTS, min(train.shape) - 1), svd_solver="arpack", random_state=seed)
        space = cls(modality, n_open, train.shape[0], pca)
        pca.fit(space._normalise(train))
        return space

    def _normalise(self, matrix: sp.csr_matrix) -> sp.csr_matrix:
        if self.modality == "rna":
            return log_normalise(matrix)
        return tf_idf(matrix, self.n_open, self.n_cells)

    def read(self, matrix: sp.csr_matrix, labels: np.ndarray | None = None) -> CellsToPredict:
        """Return cells [cells × input features] as baselines see them."""
        depth = np.log1p(np.asarray(matrix.sum(axis=1), dtype=float).ravel())
        labels = None if labels is None else np.asarray(labels, dtype=object)
        return CellsToPredict(self.pca.transform(self._normalise(matrix)), depth, labels)


@dataclass(frozen=True)
class TrainingCells:
    """Paired training cells: what is seen of them, and the target in the units of the task."""

    direction: Direction
    cells: CellsToPredict
    target: sp.csr_matrix

    @property
    def mean(self) -> np.ndarray:
        """Mean profile; for accessibility smoothed with one cell of average accessibility."""
        n_cells = self.target.shape[0]
        sums = np.asarray(self.target.sum(axis=0), dtype=float).ravel()
        if self.direction == "atac2rna":
            return sums / n_cells
        return (sums + sums.mean() / n_cells) / (n_cells + 1)

    def split(self, seed: int) -> tuple[TrainingCells, TrainingCells]:
        """Return (cells to fit, cells to tune on), both with a sample of the target features."""
        rng = np.random.default_rng(seed)
        n_cells, n_features = self.target.shape
        n_tuning = min(max(1, round(TUNING_SHARE * n_cells)), MOST_TUNING_CELLS)
        order = rng.permutation(n_cells)
        features = np.sort(rng.permutation(n_features)[:MOST_TUNING_FEATURES])
        target = self.target[:, features]
        rows = np.sort(order[n_tuning:]), np.sort(order[:n_tuning])
        fit, tune = (TrainingCells(self.direction, self.cells[r], target[r]) for r in rows)
        return fit, tune

    def loss(self, predicted: Product) -> float:
        """Mean loss of a prediction of these cells: log-loss (accessibility) or squared error."""
        truth, values = dense(self.target), predicted.toarray()
        if self.direction == "atac2rna":
            return float(((values - truth) ** 2).mean())
        return float(-np.log(np.where(truth > 0, values, 1 - values)).mean())

    def product(self, left: Any, right: Any, offset: np.ndarray) -> Product:
        """Return a prediction, kept within the bounds of the task."""
        if self.direction == "atac2rna":
            return Product(left, right, offset.astype(np.float32), np.zeros(len(offset), dtype=np.float32))
        low = np.maximum(PROBABILITY_FLOOR, self.mean / 10).astype(np.float32)
        return Product(left, right, offset.astype(np.float32), low, 1 - PROBABILITY_FLOOR)
