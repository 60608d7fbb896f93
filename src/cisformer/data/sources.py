"""Open what users hold - h5ad, h5mu, 10x h5, AnnData - as one modality that is read in blocks of cells.

Files are opened, not loaded: only `obs` and `var` come into memory, and of the matrix the row pointer. CSC
matrices are the exception: they are stored by feature, not by cell, and are loaded once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.config import Modality
from cisformer.data.hdf5 import check_claims, damaged, kind_of, open_hdf5
from cisformer.data.matrices import Reader, describe_values, first_bad, row_reader, sample_values
from cisformer.errors import CisformerError, InputError

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

logger = logging.getLogger(__name__)

Kind = Literal["h5ad", "h5mu", "10x h5", "AnnData"]

FEATURE_TYPES = {
    "rna": {"gene expression", "gex", "rna"},
    "atac": {"peaks", "atac", "chromatin accessibility"},
}
"""What feature types and the modalities of an h5mu are called, in lower case."""

FEATURE_TYPE_COLUMNS = ("feature_types", "feature_type", "modality")
"""Columns of `var` that may tell genes from peaks."""

SLOTS = ("layers/counts", "raw/X", "X")
"""Where counts may be, in the order in which they are looked for."""

_CONTROL = r"[\x00-\x1f\x7f\ud800-\udfff]"
"""What no line of a text file can hold."""


@dataclass(frozen=True, eq=False)
class Source:
    """One modality of a file or AnnData.

    Parameters
    ----------
    label
        What to call it in messages: the path.
    kind
        What the file is.
    modality
        Which modality it is read as.
    obs, var
        Annotation of all cells, and of the features of this modality.
    slot
        Which of `SLOTS` is read.
    layout
        How it is stored: ``csr``, ``csc`` or ``dense``.
    holds
        What `describe_values` says of the first values.
    check
        Raises `InputError` where the file was written to since it was opened.
    """

    label: str
    kind: Kind
    modality: Modality
    obs: pd.DataFrame
    var: pd.DataFrame
    slot: str
    layout: str
    holds: str
    _read: Reader
    _columns: NDArray[np.int64] | None
    check: Callable[[], None] = lambda: None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.obs)

    def rows(self, start: int, end: int) -> sp.csr_matrix:
        """Return cells `start` to `end` [n, len(var)], checked: nothing negative or NaN, RNA whole numbers.

        Raises
        ------
        InputError
            Naming a cell with such a value, or where the file is damaged.
        """
        block = self.read(start, end)
        self._check_counts(block, start)
        return block

    def read(self, start: int, end: int) -> sp.csr_matrix:
        """Return cells as `rows` does, unchecked."""
        try:
            block = self._read(start, end)
        except MemoryError:
            raise
        except Exception as error:  # HDF5 and scipy raise whatever they come upon in a damaged file
            raise damaged(self.label, error) from error
        if block.indices.size and not 0 <= block.indices.min() <= block.indices.max() < block.shape[1]:
            raise damaged(self.label, f"its matrix holds features outside 0 to {block.shape[1] - 1}")
        return block if self._columns is None else sp.csr_matrix(block[:, self._columns])

    def blocks(self, n_rows: int) -> Iterator[sp.csr_matrix]:
        """Yield all cells in blocks of `n_rows`, each as from `rows`."""
        for start in range(0, self.n_cells, n_rows):
            yield self.rows(start, min(start + n_rows, self.n_cells))

    def _check_counts(self, block: sp.csr_matrix, start: int) -> None:
        what, bad = first_bad(block.data, whole=self.modality == "rna")
        if not what:
            return
        cell = self.obs.index[start + int(np.searchsorted(block.indptr, bad, side="right")) - 1]
        raise InputError(
            f"{self.label}: {self.slot} of cell {cell} holds {block.data[bad]}, {what}; wanted counts",
            hint="give raw counts in X, raw or layers['counts']",
        )


@contextlib.contextmanager
def open_rows(
    data: str | Path | AnnData, modality: Modality, label: str = "", *, strict: bool = True
) -> Iterator[Source]:
    """Open one modality of a file or AnnData, to be read in blocks of cells.

    Parameters
    ----------
    data
        Path of an ``.h5ad``, an ``.h5mu`` (the modality ``rna`` or ``atac`` of it), or a 10x
        ``filtered_feature_bc_matrix.h5`` (its Gene Expression or Peaks); the 10x folder of that name, loaded
        whole; or an AnnData. Names do not matter, contents do. Where an h5ad or AnnData holds both
        modalities, ``var["feature_types"]`` tells them apart.
    modality
        Which modality to read.
    label
        What to call an AnnData in messages.
    strict
        Whether RNA that is not in counts is refused.

    Raises
    ------
    InputError
        If the file is missing, damaged, or of another kind; if it lacks the modality; if barcodes repeat; if
        RNA is in no slot as counts.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(data, str | Path) and Path(data).is_dir():
            source = _of_anndata(_read_mtx(Path(data)), modality, str(data), strict)
        elif isinstance(data, str | Path):
            file, check = stack.enter_context(open_hdf5(data))
            source = replace(_of_file(file, modality, str(data), strict), check=check)
        else:
            source = _of_anndata(data, modality, label or f"the {modality.upper()} AnnData", strict)
        if strict:
            _announce(source)
        yield source


def _announce(source: Source) -> None:
    """Log what was chosen where there was a choice."""
    if source.slot != "X":
        logger.info("%s: reading the counts in %s", source.label, source.slot)
    if source.modality == "atac" and source.holds != "binary":
        logger.info("%s: peaks hold %s; any value above 0 is taken as open", source.label, source.holds)


def _of_file(file: h5py.File, modality: Modality, label: str, strict: bool) -> Source:
    try:
        kind = kind_of(file, label)
        check_claims(file, label)
        if kind == "10x h5":
            return _of_10x(file["matrix"], modality, label, strict)
        group = _modality_group(file, modality, label) if kind == "h5mu" else file
        return _of_group(group, kind, modality, label, strict)
    except (CisformerError, MemoryError):
        raise
    except Exception as error:  # of a damaged file, h5py and anndata raise whatever they come upon
        raise damaged(label, error) from error


def is_10x_folder(folder: Path) -> bool:
    """Tell whether `folder` holds a 10x matrix in text form."""
    return any((folder / name).is_file() for name in ("matrix.mtx.gz", "matrix.mtx"))


def _read_mtx(folder: Path) -> AnnData:
    """Load a 10x folder of matrix.mtx, features.tsv and barcodes.tsv, all features."""
    if not is_10x_folder(folder):
        raise InputError(
            f"{folder} is a folder without matrix.mtx; wanted an .h5ad, .h5mu or 10x .h5 file",
            hint="give the file in it",
        )
    try:
        import scanpy
    except ImportError as error:
        raise InputError(
            f"reading the 10x folder {folder} takes scanpy, which is not installed",
            hint='pip install "cisformer[io]", or give the .h5 file that Cell Ranger writes beside it',
        ) from error
    logger.info("%s: a 10x folder, loaded whole", folder)
    try:
        return scanpy.read_10x_mtx(folder, gex_only=False)
    except Exception as error:  # pandas, scipy and gzip raise whatever they come upon
        raise damaged(str(folder), error) from error


def _modality_group(file: h5py.File, modality: Modality, label: str) -> h5py.Group:
    found = [name for name in file["mod"] if name.lower() in FEATURE_TYPES[modality]]
    if not found:
        raise InputError(
            f"{label} has no {modality.upper()} modality: it holds {', '.join(file['mod'])}",
            hint="name its modalities 'rna' and 'atac'",
        )
    return file["mod"][found[0]]


def _of_group(group: h5py.Group, kind: Kind, modality: Modality, label: str, strict: bool) -> Source:
    """Open an AnnData on disk: a whole h5ad, or a modality of an h5mu."""
    from anndata.io import read_elem

    if "encoding-type" not in group["obs"].attrs:
        return _of_old_h5ad(group, modality, label, strict)
    nodes = {name: group[name] for name in SLOTS if name in group}
    slot, values = _choose_slot(nodes, modality, label, strict)
    obs, var = read_elem(group["obs"]), read_elem(group["raw/var" if slot == "raw/X" else "var"])
    if kind == "h5mu":
        obs = _with_shared_obs(obs, read_elem(group.file["obs"]))
    return _source(label, kind, modality, obs, var, slot, nodes[slot], values)


def _of_old_h5ad(group: h5py.Group, modality: Modality, label: str, strict: bool) -> Source:
    """Load an h5ad of before anndata 0.7, whose tables are encoded otherwise."""
    import anndata

    logger.warning("%s is of an old anndata format and is loaded whole; write it anew to save memory", label)
    return _of_anndata(anndata.read_h5ad(group.file.filename), modality, label, strict)


def _with_shared_obs(obs: pd.DataFrame, shared: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of a MuData's common `obs` that the modality lacks; its copies are named ``rna:…``."""
    new = [name for name in shared.columns if name not in obs and ":" not in name]
    return obs.join(shared[new])


def _of_anndata(adata: AnnData, modality: Modality, label: str, strict: bool) -> Source:
    adata = adata.to_memory() if adata.isbacked else adata
    raw = adata.raw
    nodes = {
        "layers/counts": adata.layers.get("counts"),
        "raw/X": None if raw is None else raw.X,
        "X": adata.X,
    }
    nodes = {name: node for name, node in nodes.items() if node is not None}
    slot, values = _choose_slot(nodes, modality, label, strict)
    var = raw.var if slot == "raw/X" else adata.var
    return _source(label, "AnnData", modality, adata.obs, var, slot, nodes[slot], values)


def _of_10x(matrix: h5py.Group, modality: Modality, label: str, strict: bool) -> Source:
    """Open a 10x matrix, whose columns are cells: CSC of features x cells is CSR of cells x features."""
    if "features" not in matrix:
        raise InputError(f"{label} is of Cell Ranger 2 or older", hint="convert it with scanpy.read_10x_h5")
    columns = {"id": "gene_ids", "feature_type": "feature_types", "genome": "genome", "interval": "interval"}
    features = matrix["features"]
    var = pd.DataFrame(
        {new: features[old].asstr()[:] for old, new in columns.items() if old in features},
        index=features["name"].asstr()[:],
    )
    obs = pd.DataFrame(index=matrix["barcodes"].asstr()[:])
    slot, values = _choose_slot({"X": matrix}, modality, label, strict)
    return _source(label, "10x h5", modality, obs, var, slot, matrix, values)


def _source(
    label: str,
    kind: Kind,
    modality: Modality,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    slot: str,
    node: Any,
    values: str,
) -> Source:
    """Make a `Source` of checked barcodes and of this modality's features only."""
    obs, var = _plain_columns(obs), _plain_columns(var)
    obs = obs.set_axis(obs.index.astype(str))
    unfit = obs.index[obs.index.str.contains(_CONTROL) | (obs.index == "")]
    if len(unfit):
        raise InputError(
            f"{label} has {len(unfit):,} barcodes that are empty or hold control characters, such as {unfit[0]!r}",
            hint="rename these cells",
        )
    repeated = obs.index[obs.index.duplicated()].unique()
    if len(repeated):
        raise InputError(
            f"{label} has {len(repeated):,} barcodes more than once, such as {', '.join(repeated[:3])}",
            hint="make them unique, for instance by adding the sample to each, in RNA and ATAC alike",
        )
    columns = _columns_of(var, modality, label)
    chosen = var if columns is None else var.iloc[columns]
    if not len(obs) or not len(chosen):
        raise InputError(
            f"{label} holds {len(obs):,} cells and {len(chosen):,} features", hint="give another file"
        )
    layout, read = row_reader(node, (len(obs), len(var)), label)
    return Source(label, kind, modality, obs, chosen, slot, layout, values, read, columns)


def _plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return an annotation with text for column names, each once: of several of a name, the first."""
    named = table.set_axis(table.columns.astype(str), axis=1)
    return named.loc[:, ~named.columns.duplicated()]


def _columns_of(var: pd.DataFrame, modality: Modality, label: str) -> NDArray[np.int64] | None:
    """Return which features are of this modality; `None` for all."""
    name = next((name for name in FEATURE_TYPE_COLUMNS if name in var), None)
    if name is None:
        return None
    types = var[name].astype(str).str.lower()
    mine = types.isin(FEATURE_TYPES[modality]).to_numpy()
    if mine.all() or not types.isin(set.union(*FEATURE_TYPES.values())).any():
        return None
    if not mine.any():
        raise InputError(
            f"{label} has no {modality.upper()} features: {name} holds {', '.join(map(str, var[name].unique()[:3]))}",
            hint="give the RNA file with -r and the ATAC file with -a",
        )
    return np.flatnonzero(mine)


def _choose_slot(nodes: dict[str, Any], modality: Modality, label: str, strict: bool) -> tuple[str, str]:
    """Return the first slot that holds counts and what it holds; ATAC may do with other values in X."""
    found = {name: describe_values(sample_values(nodes[name])) for name in SLOTS if name in nodes}
    found = {name: values for name, values in found.items() if values}
    for slot, values in found.items():
        if values in ("binary", "counts"):
            return slot, values
    if found.get("X", "unreadable") != "unreadable" and (modality == "atac" or not strict):
        return "X", found["X"]
    looks = ", ".join(f"{values} values in {slot}" for slot, values in found.items()) or "no matrix"
    raise InputError(
        f"{label}: no {modality.upper()} counts; wanted whole numbers in layers['counts'], raw or X, found {looks}",
        hint="store the raw counts in layers['counts']",
    )
