"""Mean accessibility of groups of cells, from measured, predicted or compact accessibility."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.data.features import peak_regions
from cisformer.data.h5ad import load_h5ad
from cisformer.errors import InputError
from cisformer.prediction.compact import compact_of, group_rows, group_table, is_compact

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK_CELLS = 2_000


@dataclass(frozen=True, eq=False)
class GroupAccessibility:
    """Accessibility of groups of cells.

    Attributes
    ----------
    groups
        Number of cells of each group, `n_cells`, indexed by name.
    regions
        ``chrom, start, end`` of each cCRE or peak.
    accessibility
        float32 [n_groups, n_regions]: the share of cells in which a region is open, or the mean probability.
    genome
        Assembly, where the data says it; else "".
    """

    groups: pd.DataFrame
    regions: pd.DataFrame
    accessibility: NDArray[np.float32]
    genome: str


def group_accessibility(data: str | Path | AnnData, groupby: str) -> GroupAccessibility:
    """Return the mean accessibility of groups of cells.

    Parameters
    ----------
    data
        ATAC cells, a prediction, or a compact prediction: a file (`.h5ad`) or an AnnData. Whole numbers count as
        open where they are above 0; values between 0 and 1 are probabilities.
    groupby
        Column of `obs`; cells without a value are left out.

    Returns
    -------
    GroupAccessibility
        Groups sorted by name.

    Raises
    ------
    InputError
        No such file or column, or values that are neither counts nor probabilities.
    """
    adata, label = load_h5ad(data, backed=True), str(data) if isinstance(data, str | Path) else "the AnnData"
    regions = peak_regions(adata.var)[["chrom", "start", "end"]].reset_index(drop=True)
    genome = str(dict(adata.uns.get("cisformer", {})).get("genome", ""))
    if is_compact(adata):
        groups, means = compact_of(adata, label).group_means(groupby)
        return GroupAccessibility(groups, regions, means, genome)
    rows = group_rows(adata.obs, groupby)
    member = np.full(adata.n_obs, -1)
    for number, cells in enumerate(rows.values()):
        member[cells] = number
    totals = np.zeros((len(rows), adata.n_vars))
    for start, block in _blocks(adata, label):
        here = member[start : start + block.shape[0]]
        of_group = sp.csr_matrix((np.ones((here >= 0).sum()), (here[here >= 0], np.flatnonzero(here >= 0))),
                                 shape=(len(rows), len(here)))  # fmt: skip
        total = of_group @ block
        totals += total.toarray() if sp.issparse(total) else total
    table = group_table(rows)
    values = totals / table["n_cells"].to_numpy()[:, None]
    return GroupAccessibility(table, regions, values.astype(np.float32), genome)


def _blocks(adata: AnnData, label: str) -> Iterator[tuple[int, Any]]:
    """Yield first row and openness (0/1, or probabilities) of blocks of cells."""
    if adata.X is None:
        raise InputError(f"{label} has no matrix X", hint="give ATAC cells, or a prediction")
    for start in range(0, adata.n_obs, BLOCK_CELLS):
        block = adata.X[start : start + BLOCK_CELLS]
        values = block.data if sp.issparse(block) else np.asarray(block)
        if not np.isfinite(values).all() or values.min(initial=0) < 0:
            raise InputError(f"{label} holds negative or missing values", hint="give counts or probabilities")
        if (values == np.round(values)).all():
            yield start, block.sign() if sp.issparse(block) else np.sign(block)
        elif values.max() <= 1:
            yield start, block
        else:
            raise InputError(
                f"{label} holds {values.max():.4g}, which is neither a count nor a probability",
                hint="give the matrix before normalisation",
            )
