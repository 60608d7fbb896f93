"""What links are made from: checked options, the cells of each type, covariates, donors, the genes to link."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pandas as pd

from cisformer.data.genome import parse_regions, tss
from cisformer.data.reference import Reference
from cisformer.data.store import CellStore
from cisformer.errors import InputError

logger = logging.getLogger(__name__)
WINDOW_BP = 250_000
MOST_CATEGORIES = 10
"""An integer column with at most so many values is a category; with more it is a number."""
FEWEST_DONORS = 3
BACKGROUND_GENES = 500
"""Where some genes are linked only, so many others help to estimate the weights of the evidence."""
HEADER = re.compile(r"(cell[ _.-]?)?(types?|labels?|annotations?|clusters?)", re.IGNORECASE)
"""What a column of cell types is called."""


@dataclass(frozen=True)
class LinkOptions:
    """How links are scored: the options of `score_links` and `link`. Checks itself.

    Attributes
    ----------
    window_bp
        Largest distance between gene body and cCRE in bp.
    max_cells
        Maximum number of cells per type, drawn by `seed`; `None` for all.
    covariates
        Columns of the store's `cell_info` to adjust p-values and coupling for, beside depth. Text, booleans and
        integers with at most 10 values are categories.
    donor
        Column of `cell_info` that names the donor of each cell: p-values are then of a t-test over donors. `None` to
        take cells as replicates.
    genes
        Names or ids of the genes to link; all where empty.
    region
        Link genes whose TSS lies here (chrom:start-end); `None` for all.
    seed
        Random seed of the choice of cells.
    """

    window_bp: int = WINDOW_BP
    max_cells: int | None = None
    covariates: Sequence[str] = ()
    donor: str | None = None
    genes: Sequence[str] = ()
    region: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("distance", self.window_bp), ("number of cells", self.max_cells)):
            if value is not None and value < 1:
                raise InputError(f"the {name} is {value}", hint="give a number above 0")
        for what, names in (("genes", self.genes), ("covariates", self.covariates)):
            if isinstance(names, str):
                raise InputError(f"{what} is the text {names!r}", hint=f"give a list: {what}=[{names!r}]")
        if self.donor is not None and self.donor in self.covariates:
            raise InputError(
                f"{self.donor!r} is both donor and covariate",
                hint="name it as the donor only: tests are within donors",
            )
        if self.region is not None:
            parse_regions([self.region])


class LinkKeywords(TypedDict, total=False):
    """The fields of `LinkOptions` as keywords, so that editors and type checkers know them."""

    window_bp: int
    max_cells: int | None
    covariates: Sequence[str]
    donor: str | None
    genes: Sequence[str]
    region: str | None
    seed: int


def read_genes(names: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Return gene names from a file with one name a line, from a text with commas, or from a sequence."""
    if not isinstance(names, str | Path):
        return tuple(names)
    text = Path(names).read_text(encoding="utf-8") if Path(names).is_file() else str(names).replace(",", "\n")
    return tuple(dict.fromkeys(line.strip() for line in text.split("\n") if line.strip()))


def choose_cells(
    barcodes: np.ndarray, types: pd.Series, source: str, max_cells: int | None, seed: int
) -> dict[str, np.ndarray]:
    """Return the ascending rows of each type's cells, types sorted by name.

    Cells and types are joined by barcode. Which cells of a large type are drawn depends on them and `seed`
    alone, not on the order of `types` or on other types.
    """
    row = pd.Index(barcodes).get_indexer(types.index)
    known = row >= 0
    if not known.any():
        raise InputError(
            f"none of the {len(types)} barcodes in {source} is in the data: "
            f"{_some(types.index)} against {_some(barcodes)}",
            hint="give the barcodes as in the data set's barcodes.txt",
        )
    once = len(types) > 1 and (types == types.iloc[0]).sum() == 1
    if not known[0] and once and (known[1:].all() or HEADER.fullmatch(types.iloc[0])):
        raise InputError(
            f"line 1 of {source} looks like a header: {types.index[0]!r}, {types.iloc[0]!r}",
            hint="remove it: the table has no header",
        )
    if not known.all():
        logger.info("%d of %d barcodes in %s are not in this data", (~known).sum(), len(types), source)
    if (unnamed := len(barcodes) - known.sum()) > 0:
        logger.info("%d of %d cells have no type in %s and are left out", unnamed, len(barcodes), source)
    members = {}
    for name in sorted(types.unique()):
        rows = np.sort(row[known & (types == name).to_numpy()])
        if len(rows) == 0:
            logger.warning("cell type %r has no cells in this data: no links are written for it", name)
        if max_cells is not None and len(rows) > max_cells:
            rows = np.sort(np.random.default_rng(seed).choice(rows, max_cells, replace=False))
        members[name] = rows
    return members


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:3])


def find_column(store: CellStore, name: str) -> pd.Series:
    """Return a column of `cell_info`, by its name with or without the modality; `InputError` where there is none."""
    info = store.cell_info
    found = next((c for c in (name, f"{name}_rna", f"{name}_atac") if c in info.columns), None)
    if found is None:
        raise InputError(
            f"there is no column {name!r} in the cell_info.tsv of {store.path}",
            hint=f"there are: {', '.join(map(str, info.columns)) or 'none'}",
        )
    return info[found]


def cell_column(store: CellStore, name: str) -> pd.Series:
    """Return a column of `cell_info`, one entry per cell; raise `InputError` where there is none, or a gap in it."""
    column = find_column(store, name)
    missing = int(column.isna().sum())
    if missing:
        raise InputError(
            f"column {name!r} has no value for {missing} of {len(column)} cells",
            hint="fill it in, drop these cells, or leave the column out",
        )
    return column


def design_of(store: CellStore, names: Sequence[str]) -> np.ndarray:
    """Return columns of `cell_info` as numbers; float64 [n_cells, k].

    Text, booleans and integers with at most `MOST_CATEGORIES` values become one column per value but one.

    Raises
    ------
    InputError
        If a column is missing, has a gap, or is a category with a value of its own for each cell.
    """
    columns = [np.zeros((store.n_cells, 0))]
    for name in names:
        column = cell_column(store, name)
        n_values = column.nunique()
        whole = pd.api.types.is_bool_dtype(column) or pd.api.types.is_integer_dtype(column)
        if pd.api.types.is_numeric_dtype(column) and not (whole and n_values <= MOST_CATEGORIES):
            columns.append(column.to_numpy(np.float64)[:, None])
            continue
        if n_values == len(column) > 1 or n_values > len(column) / 2:
            raise InputError(
                f"column {name!r} has {n_values} values in {len(column)} cells: nothing would be left to test",
                hint="name a column that cells share, such as donor or batch",
            )
        columns.append(pd.get_dummies(column.astype(str), drop_first=True).to_numpy(np.float64))
    return np.hstack(columns)


def check_design(design: np.ndarray, members: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """Refuse covariates that leave nothing to test in any type, and name the types in which they do.

    Parameters
    ----------
    design
        Covariates; [n_cells, k].
    members
        Cell type → rows of its cells.
    names
        Of the covariates.
    """
    if design.shape[1] == 0:
        return
    free = {
        name: len(rows) - 4 - np.linalg.matrix_rank(design[rows])
        for name, rows in members.items()
        if len(rows)
    }
    if free and max(free.values()) < 1:
        raise InputError(
            f"{', '.join(map(repr, names))} take {design.shape[1]} columns: no cell type has enough cells",
            hint="adjust for fewer columns, or for columns with fewer values",
        )
    for name, left in free.items():
        if left < 1:
            logger.warning(
                "cell type %r has too few cells for these covariates: its p-values are empty", name
            )


def donors_of(store: CellStore, name: str) -> np.ndarray:
    """Return the donor of each cell as a number; int64 [n_cells]."""
    number, names = pd.factorize(cell_column(store, name).astype(str), sort=True)
    if len(names) < FEWEST_DONORS:
        raise InputError(
            f"column {name!r} names {len(names)} donor{'s' * (len(names) != 1)}; "
            f"donors as replicates need {FEWEST_DONORS}",
            hint=f"leave --donor out and adjust with --covariates {name}",
        )
    return number.astype(np.int64)


def chosen_genes(reference: Reference, options: LinkOptions) -> np.ndarray | None:
    """Return which genes of the reference are to be linked, bool [n_genes]; `None` for all.

    Raises
    ------
    InputError
        If a name is unknown, or no gene is left.
    """
    if not options.genes and options.region is None:
        return None
    genes = reference.genes
    chosen = np.ones(len(genes), dtype=bool)
    if options.genes:
        chosen = np.isin(np.arange(len(genes)), _gene_rows(genes, options.genes))
    if options.region is not None:
        region = parse_regions([options.region]).iloc[0]
        site = tss(genes)
        chosen &= (
            (genes["chrom"] == region["chrom"]).to_numpy()
            & (site >= region["start"])
            & (site < region["end"])
        )
    if not chosen.any():
        raise InputError(
            f"no gene to link has its TSS in {options.region}",
            hint="give a wider region, or genes that lie in it",
        )
    return chosen


def _gene_rows(genes: pd.DataFrame, wanted: Sequence[str]) -> list[int]:
    """Return the row of each gene, by name or id, its case ignored where that is needed."""
    row: dict[str, int] = {}
    for column in ("gene_name", "gene_id"):
        names = genes[column].astype(str).tolist()
        for number, name in enumerate(names):
            row.setdefault(name, number)
    folded: dict[str, int] = {}
    for name, number in row.items():
        folded.setdefault(name.casefold(), number)
    for name in wanted:
        if name not in row and name.casefold() not in folded:
            near = difflib.get_close_matches(name.upper(), genes["gene_name"].astype(str), n=3)
            raise InputError(
                f"there is no gene {name!r} in the reference",
                hint=f"did you mean {', '.join(near)}?" if near else "give names or ids of genes",
            )
    return [row.get(name, folded.get(name.casefold(), 0)) for name in wanted]


def with_background(chosen: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
    """Add `BACKGROUND_GENES` random ones of the `known` genes to those chosen; bool [n_genes].

    Parameters
    ----------
    chosen
        Genes to link; bool [n_genes].
    known
        Rows of the genes that the model knows.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.choice(known, min(BACKGROUND_GENES, len(known)), replace=False)
    wanted = chosen.copy()
    wanted[drawn] = True
    return wanted
