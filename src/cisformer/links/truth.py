"""True links as a table of pairs, read from any of their formats, and matched with the pairs of a tool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.data.genome import overlap_pairs, rename_chroms
from cisformer.errors import InputError
from cisformer.links.formats import (
    GENE_ID_NAMES,
    GENE_NAMES,
    first_column,
    is_bedpe,
    places_of,
    read_any_table,
    read_bedpe,
    regions_of,
)

LABEL_NAMES = ("regulated", "significant", "label", "truth", "is_link", "positive")
DISTANCE_NAMES = ("distance", "distancetotss", "distance_to_tss")
ACTIVITY_NAMES = ("activity", "dhs.rpm", "atac.rpm", "h3k27ac.rpm")
EQTL_PIP = 0.5


@dataclass(frozen=True)
class TruePairs:
    """Pairs of an element and a gene, and which of them are links.

    Attributes
    ----------
    table
        Columns chrom, start, end, gene, is_link, distance (bp, absolute; NaN where unknown), and activity and
        gene_id where known. One row per pair.
    is_open
        Whether the pairs are positives only, every other pair of the same genes being counted as no link.
    source
        Where they come from.
    """

    table: pd.DataFrame
    is_open: bool
    source: str


def read_truth(path: str | Path) -> TruePairs:
    """Read true links.

    Parameters
    ----------
    path
        One of, told apart by their columns:

        - tested pairs, such as the CRISPRi benchmark of Gschwind et al.: chrom, chromStart, chromEnd (or
          start, end), a gene, and Regulated (or significant, label, …); distance and DHS.RPM are used;
        - fine-mapped eQTL: chrom, pos (or variant_id chr_pos_ref_alt), a gene, and pip: 0.5 is a link;
        - links only: BEDPE, or a table with a cCRE and a gene such as the true_links.tsv of `simulate`. All
          other pairs of the same genes in the evaluated table then count as no link.

    Raises
    ------
    InputError
        If the file is missing or none of these.
    """
    path = Path(path)
    if is_bedpe(path):
        return TruePairs(read_bedpe(path).assign(is_link=True, distance=np.nan), True, str(path))
    table = read_any_table(path)
    places = places_of(table)
    gene = first_column(places, GENE_NAMES)
    if gene is None:
        raise InputError(f"{path} has no column for a gene", hint=f"name it one of: {', '.join(GENE_NAMES)}")
    pairs = _variants(table, places) if "pip" in places else regions_of(table, places, path)
    pairs["gene"] = table[gene].astype(str)
    if (name := first_column(places, GENE_ID_NAMES)) is not None:
        pairs["gene_id"] = table[name].astype(str)
    pairs["distance"] = np.nan
    if (name := first_column(places, DISTANCE_NAMES)) is not None:
        pairs["distance"] = pd.to_numeric(table[name], errors="coerce").abs()
    if (name := first_column(places, ACTIVITY_NAMES)) is not None:
        pairs["activity"] = pd.to_numeric(table[name], errors="coerce").fillna(0)
    label = first_column(places, LABEL_NAMES)
    if "pip" in places:
        pairs["is_link"] = pd.to_numeric(table[places["pip"]], errors="coerce") >= EQTL_PIP
    elif label is not None:
        pairs["is_link"] = _booleans(table[label], f"{path}, column {label}")
    else:
        pairs["is_link"] = True
    return TruePairs(pairs, bool(pairs["is_link"].all()), str(path))


def _variants(table: pd.DataFrame, places: Mapping[str, str]) -> pd.DataFrame:
    """Return the single base of each variant as a region."""
    if "variant_id" in places and "pos" not in places:
        parts = table[places["variant_id"]].astype(str).str.extract(r"^(\w+?)[_:](\d+)")
        chrom, position = parts[0], pd.to_numeric(parts[1])
    else:
        chrom = table[first_column(places, ("chrom", "chr")) or "chrom"].astype(str)
        position = pd.to_numeric(table[places["pos"]])
    chrom = chrom.where(chrom.str.startswith("chr"), "chr" + chrom)
    return pd.DataFrame({"chrom": chrom, "start": position - 1, "end": position}).astype(
        {"start": np.int64, "end": np.int64}
    )


def _booleans(column: pd.Series, what: str) -> np.ndarray:
    text = column.astype(str).str.strip().str.lower()
    known = text.isin(["true", "1", "1.0", "yes", "false", "0", "0.0", "no"])
    if not known.all():
        raise InputError(f"{what} holds {column[~known].iloc[0]!r}", hint="wanted: TRUE or FALSE, 1 or 0")
    truth: np.ndarray = text.isin(["true", "1", "1.0", "yes"]).to_numpy()
    return truth


def match_scores(pairs: pd.DataFrame, predicted: pd.DataFrame) -> np.ndarray:
    """Return the highest score of predicted elements that overlap a pair's, for its gene; NaN if none."""
    left, right = same_pairs(pairs, predicted)
    best = np.full(len(pairs), -np.inf)
    values = predicted["score"].to_numpy(np.float64)[right]
    np.fmax.at(best, left, values)
    return np.where(np.isneginf(best), np.nan, best)


def gene_keys(names: pd.Series) -> pd.Series:
    """Return gene names or ids as they are compared: in one case, what stands before `|`, ids without version.

    Examples
    --------
    >>> gene_keys(pd.Series(["Gata1", "ENSG00000102145.15", "TAL1|chr1:47681961"])).tolist()
    ['gata1', 'ensg00000102145', 'tal1']
    """
    plain = names.astype(str).str.strip().str.split("|").str[0].str.casefold()
    return plain.str.replace(r"^(ens[a-z]*\d+)\.\d+$", r"\1", regex=True)


def same_genes(left: pd.DataFrame, right: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the genes of two tables, spelled alike; by ids or names, whichever more rows have in common."""
    columns = ("gene_id", "gene")
    keys = [{name: gene_keys(table[name]) for name in columns if name in table} for table in (left, right)]
    best = max(
        ((a, b) for a in keys[0].values() for b in keys[1].values()),
        key=lambda pair: int(pair[0].isin(pair[1]).sum()),
    )
    return best[0].to_numpy(), best[1].to_numpy()


def same_pairs(left: pd.DataFrame, right: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of `left` and `right` that are the same gene and overlapping elements."""
    genes = same_genes(left, right)
    chroms = (
        left["chrom"].astype(str),
        rename_chroms(right["chrom"].astype(str), left["chrom"].astype(str).unique()),
    )
    code, _ = pd.factorize(np.concatenate(genes))

    def keyed(table: pd.DataFrame, chrom: pd.Series, codes: np.ndarray) -> pd.DataFrame:
        both = [f"{chrom}\t{gene}" for chrom, gene in zip(chrom, codes, strict=True)]
        return pd.DataFrame(
            {"chrom": both, "start": table["start"].to_numpy(), "end": table["end"].to_numpy()}
        )

    return overlap_pairs(
        keyed(left, chroms[0], code[: len(left)]), keyed(right, chroms[1], code[len(left) :])
    )
