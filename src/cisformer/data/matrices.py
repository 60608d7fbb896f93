"""Matrices of cells x features, CSR, CSC or dense, on disk or in memory: read by rows, and what their values are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.data.hdf5 import damaged
from cisformer.errors import InputError

if TYPE_CHECKING:
    import h5py

logger = logging.getLogger(__name__)

Reader = Callable[[int, int], sp.csr_matrix]
"""First cell and the one behind the last → these cells."""

MAX_COUNT = 1 << 24
"""No gene is counted more often in a cell; float32, in which counts are summed, holds whole numbers up to here."""

_SAMPLE = 200_000  # values looked at to tell counts from other values


def first_bad(values: NDArray, *, whole: bool) -> tuple[str, int]:
    """Return what is wrong with the first value that is not a count, and its position; ``""`` if none is."""
    if not len(values):
        return "", 0
    if not 0 <= values.min() <= values.max() < np.inf:
        return "negative, infinite or not a number", int(np.argmin((values >= 0) & (values < np.inf)))
    if whole and values.dtype.kind == "f":
        fractional = ~_are_whole(values)
        if fractional.any():
            return "not a whole number", int(np.argmax(fractional))
    if whole and values.max() > MAX_COUNT:
        return "more than any gene is counted", int(np.argmax(values))
    return "", 0


def _are_whole(values: NDArray) -> NDArray[np.bool_]:
    """Tell which values are whole numbers, but for the rounding of who normalised counts and turned them back."""
    nearest = np.rint(values)
    return np.abs(values - nearest) <= np.minimum(1e-5 * np.maximum(nearest, 1), 0.01)


def describe_values(values: NDArray | None) -> str:
    """Say what matrix values look like.

    Returns
    -------
    ``empty`` (nothing above 0), ``binary``, ``counts``, ``log-normalised``, ``normalised``, ``scaled`` (some are
    negative), ``missing`` (some are NaN or infinite) or ``unreadable`` (no numbers); ``""`` for `None`.
    """
    if values is None:
        return ""
    if values.dtype.kind not in "buif":
        return "unreadable"
    if not np.isfinite(values).all():
        return "missing"
    if not values.any():
        return "empty"
    if values.max() <= 1.01 and values.min() >= 0 and _are_whole(values).all():
        return "binary"
    if _are_whole(values).all():
        return "counts"
    if values.min() < 0:
        return "scaled"
    return "log-normalised" if values.max() < 20 else "normalised"


def sample_values(node: Any) -> NDArray | None:
    """Return some of the values of a matrix, on disk or in memory; `None` of an empty slot."""
    if _is_sparse(node):
        return np.asarray(node.data[:_SAMPLE] if sp.issparse(node) else node["data"][:_SAMPLE])
    if len(getattr(node, "shape", ())) != 2:
        return None
    return np.asarray(node[: max(1, _SAMPLE // max(node.shape[1], 1))]).ravel()


def share_above_zero(node: Any) -> float:
    """Return the share of entries above 0, of a sample; of a sparse matrix all stored ones count."""
    if not _is_sparse(node):
        return float((np.asarray(sample_values(node)) > 0).mean())
    n_stored = node.nnz if sp.issparse(node) else node["data"].shape[0]
    n_rows, n_columns = (int(size) for size in _shape(node))
    return n_stored / max(n_rows * n_columns, 1)


def _shape(node: Any) -> Any:
    """Return the shape of a sparse matrix; 10x files have it as a dataset, in features x cells."""
    if sp.issparse(node):
        return node.shape
    stated = node.attrs.get("shape", node.attrs.get("h5sparse_shape"))
    return node["shape"][:] if stated is None else stated


def _is_sparse(node: Any) -> bool:
    return sp.issparse(node) or (hasattr(node, "attrs") and not hasattr(node, "shape") and "indptr" in node)


class Transposed:
    """A dense matrix of features x cells on disk, read as cells x features.

    Parameters
    ----------
    stored
        The matrix [n_features, n_cells].
    """

    def __init__(self, stored: h5py.Dataset) -> None:
        self._stored = stored
        self.shape = stored.shape[::-1]

    def __getitem__(self, cells: slice) -> NDArray:
        return self._stored[:, cells].T


def row_reader(node: Any, shape: tuple[int, int], label: str) -> tuple[str, Reader]:
    """Return the layout of a matrix [n_cells, n_features], and how to read rows `start` to `end` of it."""
    if not _is_sparse(node):
        if tuple(node.shape) != shape:
            raise damaged(label, f"a matrix of {node.shape} for {shape[0]:,} cells and {shape[1]:,} features")
        return "dense", lambda start, end: sp.csr_matrix(_numbers(node[start:end]))
    layout = node.format if sp.issparse(node) else _layout_on_disk(node)
    if sp.issparse(node) and node.shape != shape:
        raise damaged(label, f"a matrix of {node.shape} for {shape[0]:,} cells and {shape[1]:,} features")
    if layout not in ("csr", "csc"):
        raise InputError(f"{label}: the matrix is stored as {layout!r}; wanted csr, csc or dense")
    if sp.issparse(node):
        by_row = node.tocsr()
        return layout, lambda start, end: by_row[start:end]
    _check_sparse(node, shape[layout == "csc"], label)
    if layout == "csr":
        return "csr", _csr_reader(node, shape)
    logger.info("%s: the matrix is stored by feature (CSC) and is loaded whole", label)
    whole = _numbers(node["data"][:]), node["indices"][:], node["indptr"][:]
    if len(whole[1]) and not 0 <= whole[1].min() <= whole[1].max() < shape[0]:
        raise damaged(label, f"its matrix holds cells outside 0 to {shape[0] - 1}")
    transposed = sp.csc_matrix(whole, shape=shape).tocsr()
    return "csc", lambda start, end: transposed[start:end]


def _check_sparse(node: h5py.Group, n_lines: int, label: str) -> None:
    """Raise `InputError` unless the three arrays of a sparse matrix fit each other and `n_lines` rows or columns."""
    sizes = {name: node[name].shape for name in ("indptr", "indices", "data")}
    if sizes["indptr"] != (n_lines + 1,) or sizes["indices"] != sizes["data"]:
        raise damaged(label, f"its sparse matrix of {n_lines:,} lines has arrays of {sizes}")
    indptr = node["indptr"][:]
    if indptr[0] != 0 or indptr[-1] != sizes["data"][0] or (indptr[1:] < indptr[:-1]).any():
        raise damaged(label, f"the index pointer does not lead through {sizes['data'][0]:,} entries")


def _numbers(values: NDArray) -> NDArray:
    """Return matrix values in a type that scipy's sparse matrices take."""
    if values.dtype.kind not in "buif":
        raise ValueError(f"its matrix holds {values.dtype}, not numbers")
    if values.dtype in (np.bool_, np.float16):
        return values.astype(np.float32)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _layout_on_disk(node: h5py.Group) -> str:
    """Return ``csr`` or ``csc``; 10x files hold features x cells in CSC, which is CSR as we read it."""
    layout = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "csr"))
    return (layout.decode() if isinstance(layout, bytes) else str(layout)).removesuffix("_matrix")


def _csr_reader(node: h5py.Group, shape: tuple[int, int]) -> Reader:
    indptr, indices, data = node["indptr"][:], node["indices"], node["data"]

    def read(start: int, end: int) -> sp.csr_matrix:
        low, high = int(indptr[start]), int(indptr[end])
        index = indices[low:high]
        pointer = indptr[start : end + 1].astype(np.int64) - low
        return sp.csr_matrix((_numbers(data[low:high]), index, pointer), (end - start, shape[1]))

    return read
