"""The links of one gene, out of all: from memory, or from the matrices on disk, of which little is read."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cisformer.data.genome import parse_regions, tss
from cisformer.errors import InputError
from cisformer.links.files import COMPONENTS, FOLDER, Links

if TYPE_CHECKING:
    import h5py


@dataclass(frozen=True)
class GeneLinks:
    """The links of one gene, and where it lies.

    Attributes
    ----------
    gene, gene_id, chrom, start, end, tss
        The gene.
    tables
        Cell type → links: chrom, start, end of the cCRE, `score` and each of `COMPONENTS`.
    n_cells
        Cell type → number of cells.
    genes
        All genes of the reference, with coordinates.
    """

    gene: str
    gene_id: str
    chrom: str
    start: int
    end: int
    tss: int
    tables: dict[str, pd.DataFrame]
    n_cells: dict[str, int]
    genes: pd.DataFrame

    def select(self, cell_types: Sequence[str]) -> GeneLinks:
        """Return the links of some types, in this order; of all, if none is named."""
        for name in cell_types:
            if name not in self.tables:
                raise InputError(
                    f"there are no links of cell type {name!r}", hint=f"there are: {', '.join(self.tables)}"
                )
        return (
            self if not cell_types else replace(self, tables={name: self.tables[name] for name in cell_types})
        )


def gene_links(links: Links, gene: str) -> GeneLinks:
    """Return the links of one gene, by name or id; raise `InputError` if there is no such gene."""
    genes = links.reference.genes
    row = find_gene(genes, gene)
    tables: dict[str, pd.DataFrame] = {}
    n_cells: dict[str, int] = {}
    for part in links.types:
        rows = slice(*np.searchsorted(part.gene, [row, row + 1]))
        table = links.reference.ccres.iloc[part.ccre[rows]].reset_index(drop=True)
        tables[part.cell_type] = table.assign(**{name: value[rows] for name, value in part.evidence.items()})
        n_cells[part.cell_type] = part.n_cells
    return _gene_links(genes, row, tables, n_cells)


def read_gene_links(folder: str | Path, gene: str) -> GeneLinks:
    """Read the links of one gene out of the matrices of a `cisformer_link` folder; little of them is read.

    Raises
    ------
    InputError
        If the folder holds no links, or they have no such gene.
    """
    import h5py

    folder = Path(folder)
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    files = sorted(folder.glob("*_correlation_matrix.h5ad"))
    if not files:
        raise InputError(
            f"{folder} holds no links", hint="give the folder that cisformer atac2rna_link wrote"
        )
    tables: dict[str, pd.DataFrame] = {}
    n_cells: dict[str, int] = {}
    genes, row = pd.DataFrame(), 0
    for path in files:
        with h5py.File(path, "r") as file:
            if not tables:
                genes = _read_elem(file["obs"]).reset_index(drop=True)
                row = find_gene(genes, gene)
            record = _read_elem(file["uns/cisformer"])
            tables[str(record["cell_type"])] = _read_row(file, row)
            n_cells[str(record["cell_type"])] = int(record["n_cells"])
    names = sorted(tables)
    return _gene_links(genes, row, {name: tables[name] for name in names}, n_cells)


def _read_elem(group: h5py.Group) -> Any:
    from anndata.io import read_elem

    return read_elem(group)


def _read_row(file: h5py.File, row: int) -> pd.DataFrame:
    """Return one gene's links from an open matrix file; of each array, its entries alone are read."""
    start, stop = file["X/indptr"][row : row + 2]
    ccre = file["X/indices"][start:stop]
    columns: dict[str, np.ndarray] = {"score": file["X/data"][start:stop]}
    columns |= {
        name: file[f"layers/{name}/data"][start:stop] for name in COMPONENTS if name in file["layers"]
    }
    return _regions(file["var"], ccre).assign(**columns)


def _regions(var: h5py.Group, ccre: np.ndarray) -> pd.DataFrame:
    """Return the regions of some cCREs, in ascending order of rows."""
    if len(ccre) == 0:
        return parse_regions([])
    first, last = int(ccre.min()), int(ccre.max()) + 1
    return parse_regions(var[var.attrs["_index"]].asstr()[first:last][ccre - first])


def find_gene(genes: pd.DataFrame, gene: str) -> int:
    """Return the row of a gene by name or id, its case ignored where that is clear.

    Raises
    ------
    InputError
        If there is none, or it has no coordinates.
    """
    for fold in (str, str.casefold):
        for column in ("gene_name", "gene_id"):
            rows = np.flatnonzero(genes[column].astype(str).map(fold) == fold(gene))
            if len(rows) and genes["start"].iloc[rows[0]] >= 0:
                return int(rows[0])
            if len(rows):
                raise InputError(f"gene {gene!r} has no coordinates", hint="choose another gene")
    near = difflib.get_close_matches(gene.upper(), genes["gene_name"].astype(str), n=3)
    raise InputError(
        f"there is no gene {gene!r}",
        hint=f"did you mean {', '.join(near)}?" if near else "give its name or id",
    )


def _gene_links(
    genes: pd.DataFrame, row: int, tables: dict[str, pd.DataFrame], n_cells: dict[str, int]
) -> GeneLinks:
    about = genes.iloc[row]
    return GeneLinks(
        gene=str(about["gene_name"]),
        gene_id=str(about["gene_id"]),
        chrom=str(about["chrom"]),
        start=int(about["start"]),
        end=int(about["end"]),
        tss=int(tss(genes.iloc[[row]])[0]),
        tables=tables,
        n_cells=n_cells,
        genes=genes,
    )
