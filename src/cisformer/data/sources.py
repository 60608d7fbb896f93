"""Open h5ad, h5mu, 10x h5, zarr, loom, fragments or AnnData as one modality that is read in blocks of cells.

Files are opened, not loaded: only `obs` and `var` come into memory, and of the matrix the row pointer. CSC
matrices are the exception: they are stored by feature, not by cell, and are loaded once; so are matrices in text form.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.config import Modality
from cisformer.data.containers import locate, read_mtx
from cisformer.data.fragments import FragmentOptions, count_fragments
from cisformer.data.hdf5 import check_claims, damaged, kind_of, open_hdf5, open_zarr, told_as_damage
from cisformer.data.matrices import Reader, Transposed, first_bad, row_reader
from cisformer.data.slots import Slot, choose_slot, slot_names
from cisformer.data.tables import (
    FEATURE_TYPE_COLUMNS,
    FEATURE_TYPES,
    check_barcodes,
    check_orientation,
    columns_of,
    plain_columns,
    refuse_peaks,
    with_barcodes,
)
from cisformer.errors import InputError

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

logger = logging.getLogger(__name__)

Kind = Literal["h5ad", "h5mu", "10x h5", "loom", "zarr", "mtx", "fragments", "AnnData", "MuData"]

_MODALITY_WORDS = {
    "rna": re.compile(r"rna|gex|gene|expression", re.IGNORECASE),
    "atac": re.compile(r"atac|peak|chromatin|accessib", re.IGNORECASE),
}


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
        Which matrix is read: ``X``, ``raw/X`` or ``layers/…``.
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
        if self.modality == "rna" and block.data.dtype.kind == "f":
            block.data = np.rint(block.data)
        return block

    def read(self, start: int, end: int) -> sp.csr_matrix:
        """Return cells as `rows` does, unchecked."""
        with told_as_damage(self.label):
            block = self._read(start, end)
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
    data: str | Path | AnnData,
    modality: Modality,
    label: str = "",
    *,
    strict: bool = True,
    fragments: FragmentOptions | None = None,
) -> Iterator[Source]:
    """Open one modality of a file or AnnData, to be read in blocks of cells.

    Parameters
    ----------
    data
        Path of a file or folder, as docs/formats.md lists them: h5ad, h5mu (the modality ``rna`` or ``atac`` of
        it), 10x h5, zarr, loom, a ``matrix.mtx`` folder, ``fragments.tsv.gz``, or the output folder of Cell
        Ranger; or an AnnData or MuData. Names do not matter, contents do. Where an h5ad or AnnData holds both
        modalities,
        ``var["feature_types"]`` tells them apart.
    modality
        Which modality to read.
    label
        What to call an AnnData in messages.
    strict
        Whether RNA that is not in counts, and ATAC that is imputed, is refused.
    fragments
        What fragments are counted on; without, a fragments file is refused.

    Raises
    ------
    InputError
        If the file is missing, damaged, or of another kind; if it lacks the modality; if barcodes repeat; if
        RNA is in no slot as counts.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(data, str | Path):
            source = _of_path(data, modality, strict, fragments, stack)
        elif not (hasattr(data, "obs") and hasattr(data, "var_names")):
            raise InputError(
                f"{modality.upper()} is given as {type(data).__name__}; wanted a path, an AnnData or a MuData",
                hint="make an AnnData of a table of cells x features: anndata.AnnData(table)",
            )
        elif hasattr(data, "mod"):
            name = modality_name(list(data.mod), modality, label or "the MuData")
            shared = _with_shared_obs(data.mod[name].obs, data.obs)
            adata = data.mod[name].copy()
            adata.obs = shared
            source = replace(_of_anndata(adata, modality, label or "the MuData", strict), kind="MuData")
        else:
            source = _of_anndata(data, modality, label or f"the {modality.upper()} AnnData", strict)
        if strict:
            _announce(source)
        yield source


def _of_path(
    path: str | Path,
    modality: Modality,
    strict: bool,
    options: FragmentOptions | None,
    stack: contextlib.ExitStack,
) -> Source:
    label = str(path)
    place, container = stack.enter_context(locate(path, modality, fragments=options is not None))
    if container == "mtx":
        return replace(_of_anndata(read_mtx(place), modality, label, strict), kind="mtx")
    if container == "fragments":
        return _of_fragments(place, modality, label, options, stack)
    if container == "zarr":
        return replace(_of_file(open_zarr(place), modality, label, strict), kind="zarr")
    file, check = stack.enter_context(open_hdf5(place, label))
    return replace(_of_file(file, modality, label, strict), check=check)


def _of_fragments(
    path: Path, modality: Modality, label: str, options: FragmentOptions | None, stack: contextlib.ExitStack
) -> Source:
    if modality == "rna":
        raise InputError(f"{label} holds ATAC fragments; wanted RNA counts", hint="give it with -a or -d")
    if options is None:
        raise InputError(
            f"{label} holds fragments, but nothing says on which cCREs to count them",
            hint="use --reference human, mouse, or a folder of `cisformer build_reference`; or give a peak matrix",
        )
    cells = count_fragments(path, options, stack)
    pieces = cells.pieces.table()
    obs = pd.DataFrame({"n_fragments": cells.n_fragments}, index=cells.barcodes)
    slot = Slot("fragments", None, "binary")
    return Source(label, "fragments", modality, obs, pieces, slot.name, "csr", slot.holds, cells.rows, None)


def _announce(source: Source) -> None:
    """Log what was chosen where there was a choice."""
    if source.slot not in ("X", "fragments"):
        logger.info("%s: reading the counts in %s", source.label, source.slot)
    if source.modality == "atac" and source.holds in ("counts", "normalised", "log-normalised"):
        logger.info("%s: peaks hold %s; any value above 0 is taken as open", source.label, source.holds)


def _of_file(file: h5py.File, modality: Modality, label: str, strict: bool) -> Source:
    """Open an HDF5 file, or a zarr group, whose AnnData is laid out in the same way."""
    import anndata  # noqa: F401  # here, so that what its import raises is not told as damage

    with told_as_damage(label):
        kind = kind_of(file, label)
        check_claims(file, label)
        if kind == "10x h5":
            return _of_10x(file, modality, label, strict)
        if kind == "loom":
            return _of_loom(file, modality, label, strict)
        group = file["mod"][modality_name(list(file["mod"]), modality, label)] if kind == "h5mu" else file
        return _of_group(group, kind, modality, label, strict)


def modality_name(names: list[str], modality: Modality, label: str) -> str:
    """Return which of the modalities of a MuData is the RNA or the ATAC: by its name, or a part of it.

    Raises
    ------
    InputError
        If none is called so, or several could be meant.
    """
    found = [name for name in names if name.lower() in FEATURE_TYPES[modality]]
    found = found or [name for name in names if _MODALITY_WORDS[modality].search(name)]
    if len(found) == 1 or (found and found[0].lower() == modality):
        return found[0]
    problem = (
        f"has several that may be {modality.upper()}" if found else f"has no {modality.upper()} modality"
    )
    raise InputError(
        f"{label} {problem}: it holds {', '.join(names)}",
        hint="name its modalities 'rna' and 'atac'",
    )


def _of_group(group: h5py.Group, kind: Kind, modality: Modality, label: str, strict: bool) -> Source:
    """Open an AnnData on disk: a whole h5ad, or a modality of an h5mu."""
    from anndata.io import read_elem

    if "encoding-type" not in group["obs"].attrs:
        return _of_old_h5ad(group, modality, label, strict)
    names = slot_names(group.get("layers", ()))
    nodes = {name: group[name] for name in names if name in group}
    obs, var = read_elem(group["obs"]), read_elem(group["var"])
    if strict:
        refuse_peaks(var, modality, label)
    slot = choose_slot(nodes, modality, label, strict, _others(group.get("layers", ()), names))
    if slot.name == "raw/X":
        var = _raw_var(read_elem(group["raw/var"]), var)
    if kind == "h5mu":
        obs = _with_shared_obs(obs, read_elem(group.file["obs"]))
    return _source(label, kind, modality, obs, var, slot)


def _others(layers: Iterable[str], names: list[str]) -> tuple[str, ...]:
    """Return the layers that are not looked at, for messages."""
    return tuple(f"layers/{name}" for name in layers if f"layers/{name}" not in names)


def _raw_var(raw: pd.DataFrame, var: pd.DataFrame) -> pd.DataFrame:
    """Return the features of `raw`, with the types of features that only `var` has."""
    missing = [name for name in FEATURE_TYPE_COLUMNS if name in var and name not in raw]
    return raw.join(var[missing]) if missing and raw.index.is_unique and var.index.is_unique else raw


def _of_old_h5ad(group: h5py.Group, modality: Modality, label: str, strict: bool) -> Source:
    """Load an h5ad of before anndata 0.7, whose tables are encoded otherwise."""
    import anndata

    logger.warning(
        "%s is in an old anndata format and is loaded whole; read and write it again to save memory", label
    )
    return _of_anndata(anndata.read_h5ad(group.file.filename), modality, label, strict)


def _with_shared_obs(obs: pd.DataFrame, shared: pd.DataFrame) -> pd.DataFrame:
    """Add the columns of a MuData's common `obs` that the modality lacks; its copies are named ``rna:…``."""
    new = [name for name in shared.columns if name not in obs and ":" not in name]
    return obs.join(shared[new])


def _of_anndata(adata: AnnData, modality: Modality, label: str, strict: bool) -> Source:
    adata = adata.to_memory() if adata.isbacked else adata
    raw = adata.raw
    stored = {f"layers/{name}": layer for name, layer in adata.layers.items()}
    stored |= {"raw/X": None if raw is None else raw.X, "X": adata.X}
    names = slot_names(adata.layers.keys())
    nodes = {name: stored[name] for name in names if stored.get(name) is not None}
    if strict:
        refuse_peaks(adata.var, modality, label)
    slot = choose_slot(nodes, modality, label, strict, _others(adata.layers, names))
    var = _raw_var(raw.var, adata.var) if slot.name == "raw/X" else adata.var
    return _source(label, "AnnData", modality, adata.obs, var, slot)


def _of_10x(file: h5py.File, modality: Modality, label: str, strict: bool) -> Source:
    """Open a 10x matrix, whose columns are cells: CSC of features x cells is CSR of cells x features.

    Since Cell Ranger 3 it is called ``matrix``, before by the genome.
    """
    groups = [name for name in file if "barcodes" in file[name] and "indptr" in file[name]]
    if len(groups) > 1:
        raise InputError(
            f"{label} holds a matrix of each genome: {', '.join(groups)}",
            hint='write the one wanted: scanpy.read_10x_h5(path, genome="…").write_h5ad("rna.h5ad")',
        )
    matrix = file[groups[0]]
    features = matrix.get("features", matrix)
    names = "name" if "name" in features else "gene_names"
    columns = {
        "id": "gene_ids", "genes": "gene_ids", "feature_type": "feature_types", "genome": "genome",
        "interval": "interval",
    }  # fmt: skip
    var = pd.DataFrame(
        {new: features[old].asstr()[:] for old, new in columns.items() if old in features},
        index=features[names].asstr()[:],
    )
    obs = pd.DataFrame(index=matrix["barcodes"].asstr()[:])
    return _source(label, "10x h5", modality, obs, var, choose_slot({"X": matrix}, modality, label, strict))


def _of_loom(file: h5py.File, modality: Modality, label: str, strict: bool) -> Source:
    """Open a loom file: a dense matrix of features x cells, read by columns."""
    obs = _loom_table(file["col_attrs"], ("CellID", "obs_names", "cell_names", "barcode", "barcodes"), label)
    var = _loom_table(file["row_attrs"], ("Gene", "var_names", "gene_names", "Accession"), label)
    slot = choose_slot({"X": Transposed(file["matrix"])}, modality, label, strict)
    return _source(label, "loom", modality, obs, var, slot)


def _loom_table(attributes: h5py.Group, names: tuple[str, ...], label: str) -> pd.DataFrame:
    columns = {
        name: values.asstr()[:] if values.dtype.kind in "OS" else values[:]
        for name, values in attributes.items()
        if len(values.shape) == 1
    }
    index = next((columns[name] for name in names if name in columns), None)
    if index is None:
        raise InputError(
            f"{label} names its {attributes.name[1:]} by none of {', '.join(names)}",
            hint="convert it: scanpy.read_loom(path, obs_names=…, var_names=…).write_h5ad(…)",
        )
    return pd.DataFrame(columns, index=pd.Index(index))


def _source(
    label: str, kind: Kind, modality: Modality, obs: pd.DataFrame, var: pd.DataFrame, slot: Slot
) -> Source:
    """Make a `Source` of checked barcodes and of this modality's features only."""
    obs, var = plain_columns(obs), plain_columns(var)
    obs = with_barcodes(obs.set_axis(obs.index.astype(str)), label)
    check_barcodes(obs, label)
    check_orientation(obs, var, label)
    columns = columns_of(var, modality, label)
    chosen = var if columns is None else var.iloc[columns]
    if not len(obs) or not len(chosen):
        raise InputError(
            f"{label} holds {len(obs):,} cells and {len(chosen):,} features",
            hint="give another file; of a SnapATAC2 file without a matrix, give the fragments.tsv.gz"
            if modality == "atac"
            else "give another file",
        )
    layout, read = row_reader(slot.node, (len(obs), len(var)), label)
    return Source(label, kind, modality, obs, chosen, slot.name, layout, slot.holds, read, columns)
