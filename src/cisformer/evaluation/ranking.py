"""How well a prediction ranks open above closed: areas under curves, exact also with ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from cisformer.evaluation.matrices import Axis, Matrix, check_shapes, divide, matrix_blocks, take


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
    check_shapes(predicted, truth)
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
