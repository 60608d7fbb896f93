"""Read ids, names and coordinates of genes and peaks from the `var` of an AnnData."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cisformer.data.genome import CCRE_COLUMNS, parse_regions, strip_genome
from cisformer.errors import InputError

NAME_COLUMNS = (
    "gene_name", "gene_names", "gene_symbol", "gene_symbols", "feature_name", "symbol", "symbols", "name",
    "hgnc_symbol", "mgi_symbol", "external_gene_name", "gene_short_name", "genename", "gene",
)  # fmt: skip
"""Columns of `var` that may hold gene names, in lower case."""
ID_COLUMNS = (
    "gene_id",
    "gene_ids",
    "geneid",
    "ensembl_id",
    "ensembl_gene_id",
    "ensembl",
    "feature_id",
    "index",
    "_index",
)
"""Columns that may hold gene ids other than Ensembl's, or names, where the index holds row numbers."""
STRANDS = {"+": "+", "-": "-", "1": "+", "-1": "-", "1.0": "+", "-1.0": "-", "+1": "+"}
ENSEMBL = r"^(ENS[A-Z]*G\d{11})(?:\.\d+)?(?:_PAR_Y)?$"

_WITHIN = r"(?i:(?<![A-Z])ENS[A-Z]{0,6}G[0-9]{11}(?![0-9]))"
_GENOME_FIRST = r"(?i:(?:GRC[hm]|hg|mm)[0-9]+_)"

_ZERO_BASED = {
    "chrom": ("chrom", "chr", "chromosome", "seqname", "contig", "#chrom", "peak_chrom"),
    "start": ("start", "chromstart", "peak_start"),
    "end": ("end", "chromend", "stop", "peak_end"),
}
"""Columns of `var` that may hold a region counted from 0, in lower case, the likeliest first."""
_ONE_BASED = {
    "chrom": ("seqnames", "seqid", "chromosome_name"),
    "start": ("start", "start_position"),
    "end": ("end", "end_position"),
}
"""The same of GRanges (R, ArchR, Signac) and BioMart, which count from 1 and include the end."""


def strip_versions(ids: pd.Series) -> pd.Series:
    """Strip the version of Ensembl gene ids (``ENSG00000223972.6``); other names stay as they are.

    The pseudoautosomal copy on chrY (``…_PAR_Y``) gets the id of its gene, so that counts of both are summed.
    """
    return ids.astype(str).str.replace(ENSEMBL, r"\1", regex=True)


def gene_identity(var: pd.DataFrame, species: str = "") -> pd.DataFrame:
    """Find ids and names of genes in an AnnData's `var`.

    Parameters
    ----------
    var
        Annotation of the genes.
    species
        Whose genes are wanted, ``"human"`` or ``"mouse"``: of a reference of several genomes, genes of others keep
        the genome's name before theirs (``mm10_Actb``).

    Returns
    -------
    Columns ``gene_id`` (Ensembl id without version where the index or a column of `var` has one, else the
    name) and ``gene_name`` (a column of `NAME_COLUMNS` where the index holds ids, else the index); one row
    per feature. An index of row numbers counts for nothing where a column holds names.
    """
    index = _clean(var.index, species)
    columns = {str(name).lower(): _clean(var[name], species) for name in var.columns[::-1]}
    named = next((columns[name] for name in NAME_COLUMNS if name in columns), None)
    if are_row_numbers(var.index):
        stated = next((columns[name] for name in ID_COLUMNS if name in columns), None)
        index = next((given for given in (named, stated) if given is not None), index)
    if _are_ensembl(index):
        return _identity(index, index if named is None else named)
    ids = next((values for values in reversed(columns.values()) if _are_ensembl(values)), None)
    return _identity(index if ids is None else ids.where(ids.str.match(ENSEMBL), index), index)


def _clean(names: pd.Series | pd.Index, species: str) -> pd.Series:
    """Return names as text, without quotes, genomes and versions; Ensembl ids out of ``ENSG…_NAME``, ``gene:ENSG…``."""
    text = pd.Series(np.asarray(names, dtype=object)).astype(str).str.strip(" \t\r\n\"'")
    text = strip_versions(strip_genome(text, species))
    if text.str.contains(_WITHIN, regex=True).mean() > 0.5:
        within = text.str.extract(f"({_WITHIN})", expand=False).str.upper()
        plain = within.notna() & ~text.str.match(_GENOME_FIRST)
        text = within.where(plain, text)
    return text


def _are_ensembl(names: pd.Series) -> bool:
    return bool(names.str.match(ENSEMBL).mean() > 0.5)


def _identity(gene_id: pd.Series, gene_name: pd.Series) -> pd.DataFrame:
    return pd.DataFrame({"gene_id": gene_id.to_numpy(object), "gene_name": gene_name.to_numpy(object)})


def are_row_numbers(names: pd.Index) -> bool:
    """Tell whether names only count rows: ``0, 1, 2, …`` or ``1, 2, 3, …``, as a table without an index has them."""
    text = names.astype(str)
    if len(text) < 2 or text[0] not in ("0", "1"):
        return False
    first = int(text[0])
    return text.equals(pd.Index(map(str, range(first, first + len(text)))))


def peak_regions(var: pd.DataFrame) -> pd.DataFrame:
    """Find the regions of peaks in `var`: its index, or 10x ``interval``, or columns such as ``chrom, start, end``.

    Raises
    ------
    InputError
        Naming a peak that is no region and has no coordinates, or one that starts below 0.
    """
    try:
        parse_regions(var.index[:1])  # which tells soon whether names are regions
        return parse_regions(var.index)
    except InputError as error:
        if "starts before" in error.message:
            raise
        found = stated_coordinates(var)[CCRE_COLUMNS]
        if (found["start"] < 0).any():
            raise
        return found


def are_tiles(peaks: pd.DataFrame) -> bool:
    """Tell whether regions tile the genome (SnapATAC2, ArchR): all of one width, starting at its multiples."""
    width = (peaks["end"] - peaks["start"]).mode()
    if not len(width) or len(peaks) < 20 or width[0] < 100:
        return False
    whole = (peaks["start"] % width[0] == 0) & (peaks["end"] - peaks["start"] <= width[0])
    return bool(whole.mean() > 0.99)


def stated_coordinates(var: pd.DataFrame) -> pd.DataFrame:
    """Read the coordinates that columns of `var` state: ``chrom, start, end, strand`` by any name, or ``interval``.

    Columns of GRanges (``seqnames``) and BioMart (``chromosome_name``) are read as counted from 1, others from 0.

    Returns
    -------
    ``chrom, start, end, strand``, one row per feature; ``"", -1, -1, ""`` where `var` does not say, and ``""``
    for strands other than ``+, -, 1, -1``.
    """
    columns = {str(name).lower(): name for name in var.columns[::-1]}
    named, first_base = _region_columns(columns)
    if named:
        chrom, start, end = (pd.Series(var[name].to_numpy()) for name in named)
    else:
        text = var[columns["interval"]] if "interval" in columns else pd.Series("", var.index)
        parts = pd.Series(text.to_numpy()).astype(str).str.extract(r"^(.+):(\d+)-(\d+)$")
        chrom, start, end = (parts[column] for column in parts)
    start = pd.to_numeric(start, errors="coerce") - first_base
    end = pd.to_numeric(end, errors="coerce")
    known = chrom.notna() & (chrom.astype(str) != "") & (start >= 0) & (end > start)
    strand = (
        pd.Series(var[columns["strand"]].to_numpy()) if "strand" in columns else pd.Series("", start.index)
    )
    strand = strand.astype(str).map(STRANDS).fillna("")
    return pd.DataFrame(
        {
            "chrom": chrom.astype(str).where(known, ""),
            "start": start.where(known, -1).astype(np.int64),
            "end": end.where(known, -1).astype(np.int64),
            "strand": np.where(known, strand, "").astype(object),
        }
    )


def _region_columns(columns: dict[str, str]) -> tuple[list[str], int]:
    """Return the columns that hold chromosome, start and end, none where one is missing; and the first base."""
    for spelling, first_base in ((_ZERO_BASED, 0), (_ONE_BASED, 1)):
        found = [
            next((columns[name] for name in spelling[part] if name in columns), None) for part in CCRE_COLUMNS
        ]
        if None not in found:
            return [name for name in found if name is not None], first_base
    return [], 0
