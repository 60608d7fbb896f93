"""Means of groups of cells, and how each group differs from all other cells."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from cisformer.evaluation.matrices import Matrix, dense, divide, matrix_blocks, take


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
