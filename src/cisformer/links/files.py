"""Links on disk: one matrix per cell type, one tidy table, the number of cells used.

    cisformer_link/
        <cell type>_<distance>kbp_correlation_matrix.h5ad   genes × cCREs of the whole reference, sparse
        links.tsv.gz                                        one row per cell type and link
        cell_num.pkl, cell_num.json                         cell type → number of cells

Pickles are written, because the documented output has one, and never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pickle
import re
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.data.genome import region_names, tss
from cisformer.data.h5ad import storable, storable_frame
from cisformer.data.reference import Reference
from cisformer.data.sources import open_rows
from cisformer.errors import InputError
from cisformer.links.formats import FORMATS, TABLE, FormatName, strongest, text_writer, write_format
from cisformer.runtime.files import atomic_path
from cisformer.runtime.provenance import provenance

if TYPE_CHECKING:
    import h5py

logger = logging.getLogger(__name__)

FOLDER = "cisformer_link"
CELL_NUM, CELL_NUM_PICKLE = "cell_num.json", "cell_num.pkl"
FORMAT, FORMAT_VERSION = "cisformer-links", 2
COMPONENTS = (
    "score_fdr",
    "prior",
    "association",
    "coupling",
    "expression",
    "power",
    "specificity",
    "specificity_se",
    "attention",
    "effect",
    "activity_contact",
    "p_value",
    "fdr",
    "n_open",
)
"""Layers of a matrix and columns of the table, beside `score` and `distance`."""
BROWSER_LINKS_PER_GENE = 5
COMPRESSION = {"compression": "gzip", "compression_opts": 1}
CHUNK_ROWS = 16_384
"""Names of cCREs that are compressed together."""
_ROWS = 50_000


@dataclass(frozen=True)
class TypeLinks:
    """The links of one cell type.

    Attributes
    ----------
    cell_type, n_cells
        Name, and the number of cells that the links are from.
    gene, ccre
        Reference rows, sorted by gene, then cCRE; int64 [L].
    distance
        Signed distance from TSS to the middle of the cCRE in bp, negative upstream; int64 [L].
    evidence
        `score` and each of `COMPONENTS`; float32 [L] each.
    """

    cell_type: str
    n_cells: int
    gene: np.ndarray
    ccre: np.ndarray
    distance: np.ndarray
    evidence: dict[str, np.ndarray]

    def table(self, reference: Reference) -> pd.DataFrame:
        """Return one row per link, as in `links.tsv.gz`."""
        genes = reference.genes.iloc[self.gene]
        columns = {
            "gene_id": genes["gene_id"].to_numpy(),
            "gene_name": genes["gene_name"].to_numpy(),
            "tss": tss(genes),
            "strand": genes["strand"].to_numpy(),
            "ccre": region_names(reference.ccres.iloc[self.ccre]),
            "cell_type": self.cell_type,
            "distance": self.distance,
            "score": self.evidence["score"],
            **{name: self.evidence[name] for name in COMPONENTS},
        }
        return pd.DataFrame(columns).astype({"n_open": np.int64})


@dataclass(frozen=True)
class Links:
    """Links of several cell types, and what they were made of.

    Attributes
    ----------
    reference
        What `gene` and `ccre` of the types count in.
    window_bp
        How far from a gene body links were looked for.
    types
        One per cell type that has cells, sorted by name.
    cell_num
        Cell type → number of cells used, 0 for a type that has none.
    """

    reference: Reference
    window_bp: int
    types: list[TypeLinks]
    cell_num: dict[str, int]

    def __getitem__(self, cell_type: str) -> TypeLinks:
        for links in self.types:
            if links.cell_type == cell_type:
                return links
        raise KeyError(cell_type)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per cell type and link, as in `links.tsv.gz`."""
        tables = [links.table(self.reference) for links in self.types]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()

    def write(self, folder: str | Path, formats: Iterable[FormatName] = ()) -> None:
        """Write all files into `folder`, as `cisformer atac2rna_link` does."""
        with LinkWriter(folder, self.reference, self.window_bp, formats) as writer:
            for links in self.types:
                writer.add(links)
            writer.finish(self.cell_num)


def kbp(window_bp: int) -> str:
    """Return a distance as file names have it: 250000 → '250kbp'."""
    return f"{window_bp / 1000:g}kbp"


def safe_name(name: str, taken: Iterable[str] = ()) -> str:
    """Return `name` as a part of a file name that every system takes.

    Letters, digits, spaces and ``._+()-`` stay; others become ``_``. A name that had to change, or that
    differs from a `taken` one by case at most, gets a few digits of its hash, so that no two are the same.
    """
    kept = re.sub(r"[^\w .+()\-]", "_", name).strip(" .")
    kept = kept.encode()[:120].decode(errors="ignore").strip(" .")
    folded = {_folded(other) for other in taken}
    if kept and kept == name and _folded(kept) not in folded:
        return kept
    digits = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
    names = (f"{kept or 'type'}-{digits[:length]}" for length in range(8, len(digits) + 1))
    return next(one for one in names if _folded(one) not in folded)


def _folded(name: str) -> str:
    """Return what a file system may take a name for: some know no case, some write letters in one way only."""
    return unicodedata.normalize("NFC", name.casefold())


class LinkWriter:
    """Write links type by type, so that only one type is in memory.

    Parameters
    ----------
    folder
        An existing or new folder; files in it of the same names are replaced.
    reference, window_bp
        See `Links`.
    formats
        Genome browser files to write beside, of the strongest links of each gene.
    record
        What to note in every file of how the links were made.
    """

    def __init__(
        self,
        folder: str | Path,
        reference: Reference,
        window_bp: int,
        formats: Iterable[FormatName] = (),
        record: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.reference, self.window_bp = Path(folder), reference, window_bp
        self.formats = list(formats)
        self.record = {"format": FORMAT, "format_version": FORMAT_VERSION, **provenance(**(record or {}))}
        self._names: dict[str, str] = {}
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> LinkWriter:
        self._table = self._exit.enter_context(text_writer(self.folder / TABLE))
        return self

    def __exit__(self, *error: Any) -> None:
        self._exit.__exit__(*error)

    def add(self, links: TypeLinks) -> None:
        """Write the matrix, the rows of the table and the browser files of one cell type."""
        name = safe_name(links.cell_type, self._names.values())
        stem = f"{name}_{kbp(self.window_bp)}"
        matrix = self.folder / f"{stem}_correlation_matrix.h5ad"
        write_matrix(matrix, links, self.reference, self._record(links))
        table = links.table(self.reference)
        write_table(table, self._table, header=not self._names)
        self._names[links.cell_type] = name
        best = strongest(table, top_per_gene=BROWSER_LINKS_PER_GENE) if self.formats else table
        for form in self.formats:
            write_format(best, self.folder / f"{stem}_links{FORMATS[form]}", form)

    def finish(self, cell_num: dict[str, int]) -> None:
        """Write the numbers of cells; to be called last."""
        with atomic_path(self.folder / CELL_NUM) as path:
            path.write_text(json.dumps(cell_num, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with atomic_path(self.folder / CELL_NUM_PICKLE) as path:
            path.write_bytes(pickle.dumps(cell_num))

    def _record(self, links: TypeLinks) -> dict[str, Any]:
        return self.record | {
            "cell_type": links.cell_type,
            "n_cells": links.n_cells,
            "window_bp": self.window_bp,
            "reference": self.reference.name,
            "genome": self.reference.genome,
            "reference_fingerprint": self.reference.fingerprint,
        }


def write_matrix(path: Path, links: TypeLinks, reference: Reference, record: dict[str, Any]) -> None:
    """Write genes × cCREs as h5ad: `X` is the score, layers are the components and the distance.

    Layers share the places of their entries with `X`, and names of cCREs have a fixed length, so that they are
    compressed and some of them can be read alone.
    """
    import h5py
    from anndata.io import write_elem

    shape = (reference.n_genes, reference.n_ccres)
    indptr = np.searchsorted(links.gene, np.arange(shape[0] + 1))
    score = sp.csr_matrix((links.evidence["score"], links.ccre.astype(np.int32), indptr), shape=shape)
    obs = reference.genes.set_index(pd.Index(reference.gene_labels, name=None))
    elements = {
        "X": score,
        "obs": storable_frame(obs),
        "uns": storable({"cisformer": record}),
        **{name: {} for name in ("layers", "obsm", "varm", "obsp", "varp")},
    }
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, value in elements.items():
            write_elem(file, name, value, dataset_kwargs=COMPRESSION)
        for name in COMPONENTS:
            _write_layer(file, name, links.evidence[name])
        _write_layer(file, "distance", links.distance)
        _write_ccres(file.create_group("var"), reference)


def _write_layer(file: h5py.File, name: str, values: np.ndarray) -> None:
    """Write a layer whose entries stand where those of `X` do."""
    layer = file["layers"].create_group(name)
    layer.attrs.update(file["X"].attrs)
    layer["indices"], layer["indptr"] = file["X/indices"], file["X/indptr"]
    layer.create_dataset("data", data=values.astype(np.float32), shuffle=True, **COMPRESSION)


def _write_ccres(group: h5py.Group, reference: Reference) -> None:
    """Write the table of cCREs: their names, which say all there is."""
    names = [label.encode("utf-8", "surrogatepass") for label in reference.ccre_labels]
    length = max(map(len, names), default=1)
    chunks = (min(CHUNK_ROWS, max(len(names), 1)),)
    index = group.create_dataset(
        "_index", data=np.array(names, f"S{length}"), shuffle=True, chunks=chunks, **COMPRESSION
    )
    index.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
    group.attrs["column-order"] = np.array([], "S1")


def write_table(table: pd.DataFrame, handle: IO[str], *, header: bool) -> None:
    """Append rows to an open tidy table: as `to_csv` does, with five digits, five times faster."""
    if header:
        handle.write("\t".join(table.columns) + "\n")
    for start in range(0, len(table), _ROWS):
        part = table.iloc[start : start + _ROWS]
        columns = [_texts(part[name]) for name in part.columns]
        handle.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))


def _texts(column: pd.Series) -> list[str]:
    """Return the entries as they are written: nothing for NaN."""
    values = column.tolist()
    if column.dtype.kind == "f":
        return ["" if value != value else f"{value:.5g}" for value in values]
    if column.dtype.kind == "i":
        return list(map(str, values))
    quoted = {value: _quoted(str(value)) for value in set(values)}
    return [quoted[value] for value in values]


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if set(text) & set('\t\n\r"') else text


def read_cell_types(path: str | Path) -> pd.Series:
    """Read the cell type of each barcode.

    Parameters
    ----------
    path
        A tab-separated table without header: barcode, cell type. Or ``FILE:COLUMN``: a column of `obs` of an h5ad or
        any other file of cells, such as ``rna.h5ad:cell_type``.

    Returns
    -------
    Cell type (str) by barcode, in the order of the file.

    Raises
    ------
    InputError
        If the file is missing or not such a table, or gives a barcode two types.
    """
    file, _, column = str(path).rpartition(":")
    if file and Path(file).exists() and not Path(path).exists():
        return _types_of_obs(file, column)
    path = Path(path)
    try:
        table = pd.read_csv(
            path, sep="\t", header=None, dtype=str, keep_default_na=False, encoding="utf-8-sig"
        )
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot read cell types from {path}: {str(error).strip()}",
            hint="give a tab-separated file without header: barcode, cell type; or FILE:COLUMN, such as "
            "rna.h5ad:cell_type",
        ) from None
    if table.shape[1] < 2:
        raise InputError(
            f"{path} has one column ({table.iloc[0, 0]!r} in line 1), wanted barcode and cell type",
            hint="separate the two columns by a tab",
        )
    return check_cell_types(pd.Series(table[1].to_numpy(), index=table[0].to_numpy()), str(path))


def _types_of_obs(file: str, column: str) -> pd.Series:
    """Read cell types out of a column of `obs`."""
    with open_rows(file, "rna", strict=False) as source:
        obs = source.obs
    if column not in obs:
        raise InputError(
            f"{file} has no column {column!r} in obs", hint=f"it has {', '.join(obs.columns[:10]) or 'none'}"
        )
    return check_cell_types(obs[column], f"{file}:{column}")


def check_cell_types(types: pd.Series, source: str) -> pd.Series:
    """Return `types` as str by barcode, repeats dropped; raise `InputError` where a barcode has two types.

    Cells whose type is missing (NaN, None) are left out, and it is said.
    """
    if not isinstance(types, pd.Series):
        raise InputError(
            f"{source} is a {type(types).__name__}, wanted a pandas Series indexed by barcode",
            hint='give a column of obs, such as adata.obs["cell_type"], or the path of a table',
        )
    missing = int(types.isna().sum())
    if missing == len(types):
        raise InputError(
            f"{source}: no cell has a type", hint="give a type to each cell, or name another column"
        )
    if missing:
        logger.warning("%s: %d of %d cells have no type, and are left out", source, missing, len(types))
    types = types.dropna()
    types = types.astype(str).str.split().str.join(" ")  # blanks at the ends, line breaks within
    types.index = types.index.astype(str)
    empty = np.flatnonzero(types.str.strip() == "")
    if len(empty):
        raise InputError(
            f"{source}: barcode {types.index[empty[0]]} has no cell type", hint="name it, or drop it"
        )
    once = types[~pd.MultiIndex.from_arrays([types.index, types]).duplicated()]
    twice = once.index[once.index.duplicated()]
    if len(twice):
        raise InputError(
            f"{source}: barcode {twice[0]} has two cell types, {' and '.join(map(repr, once[twice[0]]))}",
            hint="give each barcode once",
        )
    return once
