"""Compact predictions: the accessibility of every cCRE as a product of two small matrices.

The logits of the default model are low-rank but for a fixed curve. For cell i and cCRE f,

    logit p[i, f] = prior[f] + link(intercept[f] + <state[i], loadings[f]>)

A compact file keeps the factors in place of their product, some 0.3 kB a cell in place of 4 MB, and loses nothing:
every probability can be computed from it on demand.

    obsm["X_cisformer"]  states [n_cells, R]; distances between states are those inside the link
    varm["cisformer"]    loadings [n_ccres, R], orthonormal columns
    var["prior"]         logit of the mean; minus infinity where training saw no open cell: probability 0
    var["intercept"]     what a cell in state 0 has inside the link
    var["link_version"]  of `link_function.change_of_log_odds`; earlier files have link 1, and not this column
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from cisformer.data.annotation import read_bed
from cisformer.data.batches import row_blocks
from cisformer.data.genome import CCRE_COLUMNS, overlap_pairs, parse_regions, rename_chroms
from cisformer.data.h5ad import H5adWriter, MatrixLayout, load_h5ad
from cisformer.errors import InputError
from cisformer.model.link_function import LINK_VERSION, change_of_log_odds
from cisformer.runtime.files import refuse_existing
from cisformer.runtime.progress import progress
from cisformer.runtime.provenance import provenance

if TYPE_CHECKING:
    from anndata import AnnData

    from cisformer.model.cis import CisModel

STATES, LOADINGS, INTERCEPT, PRIOR = "X_cisformer", "cisformer", "intercept", "prior"
LINK = "link_version"
COMPACT_FORMAT, COMPACT_VERSION = "cisformer-compact-prediction", 2
SMALLEST_LENGTH = 1e-6
"""Directions of the loadings that are shorter than this share of the longest are left out: rounding noise."""
BLOCK_VALUES = 1 << 24
"""Probabilities computed at once; bounds memory."""


@dataclass(frozen=True)
class LowRank:
    """The logits of a model as a product.

    Attributes
    ----------
    prior, intercept
        Logit of each known target's mean, and what state 0 adds inside the link; float32 [F] each.
    loadings
        float32 [F, R], columns of unit length at right angles.
    rotation
        What turns a state of the model into one of this space; float32 [width, R].
    link_version
        Of `change_of_log_odds`.
    """

    prior: torch.Tensor
    intercept: torch.Tensor
    loadings: torch.Tensor
    rotation: torch.Tensor
    link_version: int

    @classmethod
    def of(cls, model: CisModel) -> LowRank:
        """Take a model apart. The rotation makes distances between states those between logits."""
        intercept, loadings = model.low_rank()
        squares, axes = torch.linalg.eigh((loadings.T @ loadings).double())
        length = squares.clamp(min=0).sqrt().flip(0)
        kept = length > SMALLEST_LENGTH * length.max()
        axes = axes.flip(1)[:, kept]
        unit = (loadings.double() @ (axes / length[kept])).float()
        version = int(model.link_version) if model.cis is None else LINK_VERSION
        return cls(model.prior, intercept, unit, (axes * length[kept]).float(), version)

    def states(self, place: torch.Tensor) -> torch.Tensor:
        """Return the states [B, R] of cells from their places [B, width] in the model."""
        return place @ self.rotation


@dataclass(frozen=True, eq=False)
class CompactPrediction:
    """Predicted accessibility of cells, computed when it is needed.

    Attributes
    ----------
    obs, var
        Annotation of cells and cCREs, indexed by name.
    states
        float32 [n_cells, R].
    loadings
        float32 [n_ccres, R].
    record
        What the file says of its origin.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    states: NDArray[np.float32]
    loadings: NDArray[np.float32]
    record: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of cCREs."""
        return len(self.obs), len(self.var)

    def __getitem__(self, key: tuple[slice, slice]) -> NDArray[np.float32]:
        """Return probabilities of a run of cells and a run of cCREs: `prediction[10:20, :1000]`."""
        rows, columns = key
        prior, intercept = (
            torch.from_numpy(self.var[name].to_numpy(np.float32)[columns]) for name in (PRIOR, INTERCEPT)
        )
        inner = torch.from_numpy(self.states[rows]) @ torch.from_numpy(self.loadings[columns]).T
        change = change_of_log_odds(inner.add_(intercept), prior, self.link_version)
        return change.add_(prior).sigmoid_().numpy()

    @property
    def link_version(self) -> int:
        """Of `change_of_log_odds`."""
        return LINK_VERSION if LINK in self.var else 1

    def toarray(self) -> NDArray[np.float32]:
        """Return all probabilities, float32 [n_cells, n_ccres]."""
        return self[:, :]

    def select(
        self,
        *,
        region: str | None = None,
        ccres: str | Path | pd.DataFrame | None = None,
        cells: str | Path | Sequence[str] | None = None,
    ) -> CompactPrediction:
        """Return a part of the prediction.

        Parameters
        ----------
        region
            cCREs that overlap this region, ``chrom:start-end`` or ``chrom``.
        ccres
            cCREs that overlap a region of this BED file, or of a table with ``chrom, start, end``.
        cells
            Barcodes, or a text file with one a line.

        Returns
        -------
        CompactPrediction
            In the order of this one.

        Raises
        ------
        InputError
            Nothing is left.
        """
        part = self
        if region is not None:
            part = part._overlapping(_region(region), region)
        if ccres is not None:
            table = ccres if isinstance(ccres, pd.DataFrame) else read_bed(ccres)
            part = part._overlapping(table, "the table of regions" if table is ccres else str(ccres))
        return part if cells is None else part._with_cells(cells)

    def _overlapping(self, regions: pd.DataFrame, label: str) -> CompactPrediction:
        known = self.var["chrom"].unique()
        regions = regions.assign(chrom=rename_chroms(regions["chrom"], known))
        rows = np.unique(overlap_pairs(self.var[CCRE_COLUMNS], regions)[0])
        if not len(rows):
            some = ", ".join(self.var.index[:3])
            raise InputError(
                f"no cCRE of the prediction overlaps {label}; it holds {len(self.var)}, such as {some}",
                hint="check chromosome names and genome",
            )
        return replace(self, var=self.var.iloc[rows], loadings=self.loadings[rows])

    def _with_cells(self, cells: str | Path | Sequence[str]) -> CompactPrediction:
        if isinstance(cells, str | Path):
            label = str(cells)
            try:
                names = Path(cells).read_text(encoding="utf-8").split()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(
                    f"{cells} cannot be read: {error}", hint="give a text file of barcodes, one a line"
                ) from None
        else:
            label, names = "the list of cells", list(cells)
        known = self.obs.index.isin(names)
        if not known.any():
            raise InputError(
                f"none of the {len(names)} barcodes in {label} is in the prediction: "
                f"{', '.join(map(str, names[:3]))} against {', '.join(self.obs.index[:3])}",
                hint="give barcodes as the prediction's obs_names have them",
            )
        missing = pd.Index(names).difference(self.obs.index)
        if len(missing):
            raise InputError(
                f"{len(missing)} of {len(names)} barcodes in {label} are not in the prediction: "
                f"{', '.join(missing[:3])}",
                hint="remove them from the list",
            )
        return replace(self, obs=self.obs[known], states=self.states[known])

    def expand(self, *, groupby: str | None = None, min_prob: float = 0.0, top: int | None = None) -> AnnData:
        """Return the probabilities as an AnnData.

        Parameters
        ----------
        groupby
            A column of `obs`: one row per group, the mean probability over its cells.
        min_prob
            Leave out probabilities below.
        top
            Keep only this many cCREs of each row: the most probable.

        Returns
        -------
        AnnData
            Cells or groups × cCREs. `X` is float32, CSR where `min_prob` or `top` leaves values out, else dense.

        Raises
        ------
        InputError
            No such column, or a limit out of range.
        """
        from anndata import AnnData

        obs, blocks = self._blocks(groupby, min_prob, top)
        parts = list(blocks)
        sparse = min_prob > 0 or top is not None
        matrix = sp.vstack(parts, format="csr") if sparse else np.concatenate(parts)
        return AnnData(matrix, obs=obs.copy(), var=self.var.copy(), uns={"cisformer": self._origin(groupby)})

    def write(
        self,
        path: str | Path,
        *,
        groupby: str | None = None,
        min_prob: float = 0.0,
        top: int | None = None,
        force: bool = False,
    ) -> Path:
        """Write what `expand` returns to an `.h5ad`, in blocks of cells, and return its path."""
        refuse_existing(path, force=force)
        obs, blocks = self._blocks(groupby, min_prob, top)
        uns = {"cisformer": self._origin(groupby)}
        layout: MatrixLayout = "csr" if min_prob > 0 or top is not None else "dense"
        with H5adWriter(path, obs, self.var, uns, layout=layout, force=force) as writer:
            for block in progress(blocks, desc="expanding", unit="blocks"):
                writer.append(block)
        return Path(path)

    def _blocks(
        self, groupby: str | None, min_prob: float, top: int | None
    ) -> tuple[pd.DataFrame, Iterator[Any]]:
        """Return the annotation of the rows, and the rows in blocks: dense, or CSR where values are left out."""
        if not 0 <= min_prob < 1:
            raise InputError(f"min_prob is {min_prob}", hint="it is a probability: at least 0, below 1")
        if top is not None and top < 1:
            raise InputError(f"top is {top}", hint="keep at least 1 cCRE")
        if groupby is None:
            obs, dense = self.obs, self._dense_blocks()
        else:
            obs, means = self.group_means(groupby)
            dense = iter([means])
        if min_prob == 0 and top is None:
            return obs, dense
        return obs, (_thinned(block, min_prob, top) for block in dense)

    def _dense_blocks(self) -> Iterator[NDArray[np.float32]]:
        size = max(1, BLOCK_VALUES // max(1, len(self.var)))
        for start in range(0, len(self.obs), size):
            yield self[start : start + size, :]

    def group_means(self, column: str) -> tuple[pd.DataFrame, NDArray[np.float32]]:
        """Return each group's number of cells, and the mean probability of each cCRE [n_groups, n_ccres].

        Groups are the values of a column of `obs`, sorted by name; cells without a value are left out.
        """
        groups = group_rows(self.obs, column)
        means = np.zeros((len(groups), len(self.var)), np.float32)
        for mean, rows in zip(means, groups.values(), strict=True):
            total = np.zeros(len(self.var))
            for part in row_blocks(rows, max(1, BLOCK_VALUES // max(1, len(self.var)))):
                total += replace(self, states=self.states[part]).toarray().sum(axis=0, dtype=np.float64)
            mean[:] = total / len(rows)
        return group_table(groups), means

    def to_dask(self, cells_per_chunk: int | None = None) -> Any:
        """Return all probabilities as a lazy dask array; each chunk is computed when it is needed.

        Raises
        ------
        InputError
            dask is not installed.
        """
        try:
            import dask.array as da
        except ImportError:
            raise InputError("to_dask needs dask, which is not installed", hint="pip install dask") from None
        size = cells_per_chunk or max(1, BLOCK_VALUES // max(1, len(self.var)))
        sizes = [min(size, len(self.obs) - start) for start in range(0, len(self.obs), size)]
        states = da.from_array(self.states, chunks=(size, -1))
        return states.map_blocks(
            lambda part: replace(self, states=part).toarray(),
            dtype=np.float32,
            chunks=(tuple(sizes), (len(self.var),)),
        )

    def _origin(self, groupby: str | None) -> dict[str, Any]:
        made = {"format": "cisformer-prediction", "groupby": groupby, **provenance()}
        return {key: value for key, value in (self.record | made).items() if value is not None}


def open_prediction(path: str | Path) -> CompactPrediction:
    """Open a compact prediction.

    Parameters
    ----------
    path
        A file that ``rna2atac_predict --compact`` wrote.

    Returns
    -------
    CompactPrediction
        The two factors in memory; probabilities are computed when they are needed.

    Raises
    ------
    InputError
        It is no compact prediction, or of a later format.
    """
    adata = load_h5ad(path)
    if not is_compact(adata):
        raise InputError(
            f"{path} is no compact prediction: it has no obsm['{STATES}'] and varm['{LOADINGS}']",
            hint="give a file of rna2atac_predict --compact; a full matrix is read by anndata.read_h5ad",
        )
    return compact_of(adata, str(path))


def is_compact(adata: AnnData) -> bool:
    """Tell whether an AnnData is a compact prediction."""
    return (
        adata.X is None
        and STATES in adata.obsm
        and LOADINGS in adata.varm
        and {INTERCEPT, PRIOR} <= set(adata.var)
    )


def compact_of(adata: AnnData, label: str) -> CompactPrediction:
    """Return the compact prediction that an AnnData holds."""
    record = dict(adata.uns.get("cisformer", {}))
    if int(record.get("format_version", 1)) > COMPACT_VERSION:
        raise InputError(
            f"{label} is of format version {record['format_version']}, this program reads {COMPACT_VERSION}",
            hint="update cisformer",
        )
    states, loadings = (np.asarray(x, np.float32) for x in (adata.obsm[STATES], adata.varm[LOADINGS]))
    if states.shape[1:] != loadings.shape[1:]:
        raise InputError(
            f"{label}: states have {states.shape[1]} columns, loadings {loadings.shape[1]}",
            hint="predict again",
        )
    return CompactPrediction(adata.obs, adata.var, states, loadings, record)


def group_rows(obs: pd.DataFrame, column: str) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each value of a column, sorted by name; cells without a value are left out.

    Raises
    ------
    InputError
        There is no such column, or no cell has a value.
    """
    if column not in obs:
        raise InputError(
            f"there is no column {column!r} in obs",
            hint=f"there are: {', '.join(map(str, obs.columns)) or 'none'}",
        )
    values = obs[column]
    names = values[values.notna()].astype(str)
    if not len(names):
        raise InputError(f"no cell has a value in obs column {column!r}", hint="choose another column")
    place = np.flatnonzero(values.notna().to_numpy())
    found = names.reset_index(drop=True).groupby(names.to_numpy(), sort=True).indices
    return {str(name): place[rows] for name, rows in found.items()}


def group_table(groups: dict[str, NDArray[np.int64]]) -> pd.DataFrame:
    """Return the annotation of groups: `n_cells`, indexed by name."""
    return pd.DataFrame({"n_cells": [len(rows) for rows in groups.values()]}, index=pd.Index(list(groups)))


def _region(text: str) -> pd.DataFrame:
    """Return one region as a table; a chromosome alone is all of it."""
    if not any(sign in text for sign in ":-"):
        return pd.DataFrame([[text, 0, 1 << 38]], columns=CCRE_COLUMNS)
    return parse_regions([text.replace(",", "")])


def _thinned(block: NDArray[np.float32], min_prob: float, top: int | None) -> sp.csr_matrix:
    """Return a dense block as CSR: each row's `top` largest values, none below `min_prob`, no zeros."""
    kept = block >= min_prob if min_prob > 0 else block > 0
    if top is not None and top < block.shape[1]:
        largest = np.argpartition(-block, top - 1, axis=1)[:, :top]
        among = np.zeros_like(kept)
        np.put_along_axis(among, largest, True, axis=1)
        kept &= among
    columns = [np.flatnonzero(row) for row in kept]
    values = [row[c] for row, c in zip(block, columns, strict=True)]
    indptr = np.cumsum([0, *map(len, columns)])
    return sp.csr_matrix((np.concatenate(values), np.concatenate(columns), indptr), shape=block.shape)
