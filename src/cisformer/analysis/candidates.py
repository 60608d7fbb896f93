"""Pairs of genes and cCREs out of a table of links, ours or another tool's, found in a reference."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.analysis.stored import StoredLinks, open_links
from cisformer.data.features import strip_versions
from cisformer.data.genome import region_names, rename_chroms
from cisformer.data.reference import Reference
from cisformer.errors import InputError
from cisformer.links.formats import (
    CELL_TYPE_NAMES,
    GENE_ID_NAMES,
    GENE_NAMES,
    SCORE_NAMES,
    TABLE,
    first_column,
    places_of,
    read_any_table,
    regions_of,
)
from cisformer.links.statistics import Pairs

logger = logging.getLogger(__name__)


def read_candidates(
    links: str | Path, *, min_score: float = 0.0, cell_types: Sequence[str] = ()
) -> pd.DataFrame:
    """Read links of any tool.

    Parameters
    ----------
    links
        The `cisformer_link` folder, its `links.tsv.gz`, or another table with a header: a column for the gene, one
        for the cCRE (or chrom, start, end), and if it has them, cell type and score.
    min_score
        Leave out links of a lower score, where there is a score.
    cell_types
        Read these types of a folder only.

    Returns
    -------
    Columns chrom, start, end, gene_id, gene_name, cell_type ("" where the table has none), score (NaN likewise); one
    row per link.

    Raises
    ------
    InputError
        If the file is missing or lacks genes or cCREs, or no link is left.
    """
    path = Path(links)
    if path.is_dir() or path.name == TABLE:
        kept, n_all = _stored_candidates(open_links(path), min_score, cell_types)
    else:
        found = _table_candidates(path)
        kept, n_all = found[~(found["score"] < min_score)], len(found)
    if n_all == 0:
        raise InputError(f"{path} holds no links", hint="give a table with links in it")
    if kept.empty:
        raise InputError(
            f"none of the {n_all:,} links in {path} has a score of at least {min_score:g}",
            hint="lower --min_score",
        )
    return kept.reset_index(drop=True)


def _stored_candidates(
    stored: StoredLinks, min_score: float, cell_types: Sequence[str]
) -> tuple[pd.DataFrame, int]:
    """Read our own links, one cell type at a time; hold only those that score enough, and count all."""
    parts, n_all = [], 0
    for name in stored.cell_types:
        if cell_types and name not in cell_types:
            continue
        table = stored.of_type(name)
        n_all += len(table)
        table = table[~(table["score"] < min_score)]
        genes = stored.genes.iloc[table["gene"]].reset_index(drop=True)
        regions = stored.ccres.iloc[table["ccre"]].reset_index(drop=True)
        about = genes[["gene_id", "gene_name"]].assign(cell_type=name, score=table["score"].to_numpy())
        parts.append(pd.concat([regions, about], axis=1))
    if not parts:
        raise InputError(
            f"the links of {stored.source} have no cell type {' or '.join(map(repr, cell_types))}",
            hint=f"they are of: {', '.join(stored.cell_types[:10])}",
        )
    return pd.concat(parts, ignore_index=True), n_all


def _table_candidates(path: Path) -> pd.DataFrame:
    table = read_any_table(path)
    places = places_of(table)
    found = regions_of(table, places, path)
    gene_id, gene = first_column(places, GENE_ID_NAMES), first_column(places, GENE_NAMES)
    if gene is None and gene_id is None:
        raise InputError(
            f"{path} has no column for a gene; it has {', '.join(map(str, table.columns[:12]))}",
            hint=f"name it one of: {', '.join(GENE_NAMES)}",
        )
    found["gene_name"] = table[gene or gene_id].astype(str)
    found["gene_id"] = table[gene_id or gene].astype(str)
    cell_type, score = first_column(places, CELL_TYPE_NAMES), first_column(places, SCORE_NAMES)
    found["cell_type"] = "" if cell_type is None else table[cell_type].astype(str)
    found["score"] = np.nan if score is None else pd.to_numeric(table[score], errors="coerce")
    return found


@dataclass(frozen=True)
class PlacedPairs:
    """Pairs of a reference's genes and cCREs.

    Attributes
    ----------
    genes, ccres
        Reference rows of the genes and cCREs that occur, ascending; int64 [G], [P].
    pairs
        Which of these genes with which of these cCREs.
    """

    genes: np.ndarray
    ccres: np.ndarray
    pairs: Pairs


def place_pairs(
    candidates: pd.DataFrame, reference: Reference, cell_types: Sequence[str] = ()
) -> PlacedPairs:
    """Find the genes and cCREs of candidate links in a reference; those that it lacks are counted in a warning.

    Parameters
    ----------
    candidates
        As `read_candidates` returns them.
    reference
        Genes are looked up by id, then by name; cCREs by their coordinates.
    cell_types
        Only links of these types, where the candidates say types.

    Raises
    ------
    InputError
        If none is found.
    """
    if cell_types and (candidates["cell_type"] != "").any():
        candidates = candidates[candidates["cell_type"].isin(cell_types)]
    once = candidates.drop_duplicates(["gene_id", "gene_name", "chrom", "start", "end"])
    gene = _rows_of(reference.genes["gene_id"], strip_versions(once["gene_id"]))
    by_name = _rows_of(reference.genes["gene_name"], once["gene_name"])
    gene = np.where(gene < 0, by_name, gene)
    regions = once.assign(chrom=rename_chroms(once["chrom"], reference.ccres["chrom"].unique()))
    ccre = pd.Index(region_names(reference.ccres)).get_indexer(region_names(regions))
    known = (gene >= 0) & (ccre >= 0)
    if not known.any():
        raise InputError(
            f"none of the {len(once):,} links is of a gene and a cCRE of the cells' reference",
            hint="give the cells that the links were made from, or links made from these cells",
        )
    if not known.all():
        logger.warning("%d of %d links are not in the cells' reference", (~known).sum(), len(once))
    both = np.unique(np.stack([gene[known], ccre[known]], axis=1), axis=0).astype(np.int64)
    genes, gene_number = np.unique(both[:, 0], return_inverse=True)
    ccres, ccre_number = np.unique(both[:, 1], return_inverse=True)
    from cisformer.data.genome import signed_distance

    distance = signed_distance(reference.genes, reference.ccres, both[:, 0], both[:, 1])
    return PlacedPairs(genes, ccres, Pairs(gene_number, ccre_number, distance))


def _rows_of(known: pd.Series, wanted: pd.Series) -> np.ndarray:
    """Return the first row of `known` that holds each text, −1 where none does."""
    first = known.drop_duplicates()
    place = pd.Index(first).get_indexer(pd.Index(wanted))
    return np.where(place < 0, -1, first.index.to_numpy(np.int64)[place])
