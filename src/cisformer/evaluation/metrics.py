"""Scores of a prediction: exact, vectorised, and in blocks, so that a million cCREs need no dense matrix.

Every function takes `predicted` and `truth` as cells × features. A prediction may be a numpy array, a
sparse matrix (what it does not store is zero) or anything else with `shape` and slicing, `predicted[a:b,
:]` and `predicted[:, a:b]`, such as a compact prediction. `axis=0` scores each feature
across cells, `axis=1` each cell across features. A score that is not defined (no positive, no negative, a
constant truth) is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

Axis = Literal[0, 1]

BLOCK_VALUES = 1 << 23
"""How many stored values a block holds at most, about: 64 MB of sorting keys."""

PROBABILITY_FLOOR = 1e-4
"""Probabilities are read as at least this and at most one minus this, where a logarithm is taken."""

RELIABILITY_EDGES = np.array([0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, *np.arange(0.1, 1.01, 0.1)])
"""Bins of the reliability curve: most cCREs are closed in most cells, so the low end is cut finer."""


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


# ---------------------------------------------------------------------------------------------- blocks


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


def rank_among_cells(predicted: Matrix, columns: np.ndarray) -> np.ndarray:
    """Return each prediction's rank among the cells, ties shared, as a share of them; float32 [cells × columns].

    What a prediction says of a cell, and not of the cCRE: nothing for a mean profile, or whatever is made of one. Log
    odds less those of the mean do not do that: 300 cells drawn at random score 0.59 by them, the mean to the power of
    1.2 scores 0.73 (benchmarks/RESULTS.md), since seldom open cCREs end up below.
    """
    ranks = np.empty((predicted.shape[0], len(columns)), np.float32)
    for part in matrix_blocks(ranks, 0):
        ranks[:, part] = rankdata(dense(predicted[:, columns[part]]), axis=0) / len(ranks)
    return ranks


def dense(block: Any, dtype: Any = None) -> np.ndarray:
    """Return a block as a numpy array."""
    return np.asarray(block.toarray() if sp.issparse(block) else block, dtype=dtype)


# ---------------------------------------------------------------------------------------------- ranking


@dataclass(frozen=True)
class Ranking:
    """Areas under the curves, one per feature or cell; NaN where there is no positive or no negative."""

    auroc: np.ndarray
    auprc: np.ndarray
    n_positive: np.ndarray


def ranking_scores(predicted: Matrix, truth: Matrix, *, axis: Axis = 0) -> Ranking:
    """Return AUROC and average precision of every column (`axis=0`) or row (`axis=1`), ties exact.

    Parameters
    ----------
    predicted
        Scores [cells × features], higher meaning more likely open.
    truth
        The same shape; an entry that is not zero is a positive.
    axis
        0 for a score per feature, 1 for a score per cell.

    Notes
    -----
    Equal to `sklearn.metrics.roc_auc_score` and `average_precision_score`. Both are sums over the positives
    alone: AUROC is their mid-ranks (Mann–Whitney), average precision is the mean over positives of the
    precision at their own score. So one sort of the scores and one search per positive suffice, and zeros
    that a sparse prediction does not store are counted, never made.
    """
    _check_shapes(predicted, truth)
    columns = _as_csc(truth) if axis == 0 else _as_csc(sp.csr_matrix(truth).T)
    parts = []
    for part in matrix_blocks(predicted, axis):
        block = take(predicted, part, axis)
        block = block if axis == 0 else block.T
        parts.append(_rank_columns(block, columns[:, part]))
    n_positive = np.diff(columns.indptr)
    auroc, auprc = (np.concatenate(scores) for scores in zip(*parts, strict=True))
    return Ranking(auroc, auprc, n_positive)


_SortedScores = tuple[np.ndarray, np.ndarray, np.ndarray, np.uint32]


def _rank_columns(block: Any, truth: sp.csc_matrix) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision of each column of `block`, sparse or dense [members × groups]."""
    n_members, n_groups = truth.shape
    group = np.repeat(np.arange(n_groups, dtype=np.uint64), np.diff(truth.indptr))
    sort = _sorted_sparse if sp.issparse(block) else _sorted_dense
    keys, n_stored, code, zero = sort(block, truth, group)

    query = np.sort(group << np.uint64(32) | code)
    code = query.astype(np.uint32)
    start = np.cumsum(n_stored) - n_stored
    implicit = (n_members - n_stored)[group]
    lower = np.searchsorted(keys, query, "left") - start[group] + implicit * (code > zero)
    upto = np.searchsorted(keys, query, "right") - start[group] + implicit * (code >= zero)

    n_positive = np.diff(truth.indptr).astype(np.int64)
    rank_sum = np.bincount(group, weights=(lower + upto + 1) / 2, minlength=n_groups)
    true_above = np.cumsum(n_positive)[group] - np.searchsorted(query, query, "left")
    precision = np.bincount(group, weights=true_above / (n_members - lower), minlength=n_groups)
    n_pairs = n_positive * (n_members - n_positive).astype(float)
    auroc = divide(rank_sum - n_positive * (n_positive + 1) / 2, n_pairs)
    return auroc, np.where(n_pairs > 0, divide(precision, n_positive), np.nan)


def _sorted_dense(block: Any, truth: sp.csc_matrix, group: np.ndarray) -> _SortedScores:
    """Sorted keys (group, score) of all members, members per group, codes of the positives, the code of 0."""
    codes, zero = _codes(np.ascontiguousarray(np.asarray(block).T))
    code = codes[group.astype(np.int64), truth.indices]
    codes.sort(axis=1)
    n_groups, n_members = codes.shape
    keys = codes.astype(np.uint64)
    keys |= np.arange(n_groups, dtype=np.uint64)[:, None] << np.uint64(32)
    return keys.ravel(), np.full(n_groups, n_members), code, zero


def _sorted_sparse(block: Any, truth: sp.csc_matrix, group: np.ndarray) -> _SortedScores:
    """Sorted keys of the stored members, how many per group, codes of the positives, the code of 0."""
    block = _as_csc(block)
    n_members = block.shape[0]
    n_stored = np.diff(block.indptr).astype(np.int64)
    codes, zero = _codes(block.data)
    stored_group = np.repeat(np.arange(len(n_stored), dtype=np.uint64), n_stored)
    place = stored_group.astype(np.int64) * n_members + block.indices
    wanted = group.astype(np.int64) * n_members + truth.indices
    found = np.searchsorted(place, wanted)
    hit = found < len(place)
    hit[hit] = place[found[hit]] == wanted[hit]
    code = np.full(len(wanted), zero, dtype=np.uint32)
    code[hit] = codes[found[hit]]
    keys = stored_group << np.uint64(32) | codes
    keys.sort()
    return keys, n_stored, code, zero


def _codes(values: np.ndarray) -> tuple[np.ndarray, np.uint32]:
    """Return integers in the order of `values`, equal where the values are equal, and the integer of 0."""
    if np.isnan(values).any():
        raise ValueError("a prediction holds NaN and cannot be ranked")
    if values.dtype != np.float32:
        inverse = np.unique(np.append(values.ravel(), 0), return_inverse=True)[1]
        codes = inverse.astype(np.uint32)
        return codes[:-1].reshape(values.shape), codes[-1]
    bits = (values + np.float32(0)).view(np.uint32)  # adding zero makes -0 and 0 the same
    sign = np.uint32(1 << 31)
    return np.where(bits & sign, ~bits, bits | sign), sign


def _as_csc(matrix: Any) -> sp.csc_matrix:
    """Return a CSC matrix with sorted indices and, for truths, no stored zeros."""
    result = sp.csc_matrix(matrix)
    if result.nnz and not result.data.all():
        result = result.copy()
        result.eliminate_zeros()
    result.sort_indices()
    return result


# ---------------------------------------------------------------------------------------------- probabilities


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
    _check_shapes(predicted, truth)
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


# ---------------------------------------------------------------------------------------------- correlation


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
    _check_shapes(predicted, truth)
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
    _check_shapes(predicted, truth)
    n_cells = predicted.shape[0]
    error, error_of_mean = np.zeros(n_cells), np.zeros(n_cells)
    for part in matrix_blocks(np.broadcast_to(0.0, predicted.shape), 1):
        target = dense(take(truth, part, 1), float)
        error[part] = ((dense(take(predicted, part, 1), float) - target) ** 2).sum(axis=1)
        error_of_mean[part] = ((mean - target) ** 2).sum(axis=1)
    return error, error_of_mean


# ---------------------------------------------------------------------------------------------- pseudobulk


def pseudobulk(
    matrix: Matrix, group: np.ndarray, n_groups: int, *, weights: np.ndarray | None = None
) -> np.ndarray:
    """Return the mean of each feature over the cells of each group [groups × features].

    Parameters
    ----------
    matrix
        Values [cells × features].
    group
        Each cell's group from 0 to `n_groups` − 1, or −1 for none. An empty group is NaN.
    n_groups
        Number of groups.
    weights
        How often each cell counts; once unless given.
    """
    inside = np.flatnonzero(group >= 0)
    weight = np.ones(len(inside)) if weights is None else weights[inside].astype(float)
    members = sp.csr_matrix((weight, (group[inside], inside)), shape=(n_groups, len(group)))
    sums = np.zeros((n_groups, matrix.shape[1]))
    for part in matrix_blocks(matrix, 0):
        sums[:, part] = dense(members @ take(matrix, part, 0))
    sizes = np.asarray(members.sum(axis=1))
    return divide(sums, np.broadcast_to(sizes, sums.shape))


def log_fold_changes(means: np.ndarray, sizes: np.ndarray, offset: float | None) -> np.ndarray:
    """Return each group against all other cells [groups × features].

    Parameters
    ----------
    means
        Mean of each group [groups × features].
    sizes
        Cells in each group.
    offset
        Added before log2 (accessibility: 0.01); None for values that are logarithms already (plain
        difference).
    """
    total = sizes @ means
    rest = (total - sizes[:, None] * means) / (sizes.sum() - sizes)[:, None]
    return means - rest if offset is None else np.log2((means + offset) / (rest + offset))


def divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Divide, NaN where `bottom` is zero."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def _check_shapes(predicted: Matrix, truth: Matrix) -> None:
    if predicted.shape != truth.shape:
        raise ValueError(f"prediction and truth differ in shape: {predicted.shape} and {truth.shape}")
