"""Matrices of cells × features that scores are computed from, and how they are read in blocks.

A million cCREs need no dense matrix: a prediction may be a numpy array, a sparse matrix (what it does not store is
zero) or anything else with `shape` and slicing, `predicted[a:b, :]` and `predicted[:, a:b]`, such as a compact
prediction. `axis=0` scores each feature across cells, `axis=1` each cell across features. A score that is not defined
(no positive, no negative, a constant truth) is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import scipy.sparse as sp

Axis = Literal[0, 1]

BLOCK_VALUES = 1 << 23
"""How many stored values a block holds at most, about: 64 MB of sorting keys."""


class Matrix(Protocol):
    """What can be scored: numpy arrays, scipy sparse matrices, and lazy products."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, key: Any, /) -> Any: ...


@dataclass(frozen=True)
class Part:
    """Some rows and columns of a matrix, read from it where they are sliced.

    Attributes
    ----------
    matrix
        Anything that can be scored.
    rows, columns
        Which of its rows and columns, in this order.
    """

    matrix: Matrix
    rows: np.ndarray
    columns: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return len(self.rows), len(self.columns)

    def __getitem__(self, key: tuple[Any, Any]) -> Any:
        return self.matrix[self.rows[key[0]], self.columns[key[1]]]


def select(matrix: Matrix, *, rows: np.ndarray | None = None, columns: np.ndarray | None = None) -> Matrix:
    """Return the `rows` and `columns` (positions) of a matrix; of one that is computed on demand, still on demand."""
    if isinstance(matrix, np.ndarray) or sp.issparse(matrix):
        matrix = matrix if rows is None else matrix[rows]
        return matrix if columns is None else matrix[:, columns]
    every = (np.arange(length) for length in matrix.shape)
    return Part(
        matrix, *(all_ if some is None else some for some, all_ in zip((rows, columns), every, strict=True))
    )


def matrix_blocks(matrix: Matrix, axis: Axis, budget: int = BLOCK_VALUES) -> Iterator[slice]:
    """Yield slices along rows (`axis=1`) or columns (`axis=0`) with about `budget` stored values each."""
    n_rows, n_columns = matrix.shape
    length = n_columns if axis == 0 else n_rows
    n_stored = getattr(matrix, "nnz", n_rows * n_columns)
    width = max(1, int(length * budget / max(n_stored, budget)))
    for start in range(0, length, width):
        yield slice(start, min(start + width, length))


def take(matrix: Matrix, part: slice, axis: Axis) -> Any:
    """Return the columns (`axis=0`) or rows (`axis=1`) of `part`, sparse if `matrix` is."""
    return matrix[:, part] if axis == 0 else matrix[part, :]


def dense(block: Any, dtype: Any = None) -> np.ndarray:
    """Return a block as a numpy array."""
    return np.asarray(block.toarray() if sp.issparse(block) else block, dtype=dtype)


def divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Divide, NaN where `bottom` is zero."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def check_shapes(predicted: Matrix, truth: Matrix) -> None:
    """Refuse a prediction and a truth of different shapes."""
    if predicted.shape != truth.shape:
        raise ValueError(f"prediction and truth differ in shape: {predicted.shape} and {truth.shape}")
