"""Regions of a genome, transcription start sites, and the gene-cCRE window join.

Coordinates are 0-based and half-open everywhere in cisformer: the first 100 bases of chromosome 1 are
``chrom="chr1", start=0, end=100``, written ``chr1:0-100``. Unknown is ``chrom="", start=end=-1``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cisformer.errors import InputError

GENE_COLUMNS = ["gene_id", "gene_name", "chrom", "start", "end", "strand"]
"""Columns of a table of genes."""

CCRE_COLUMNS = ["chrom", "start", "end"]
"""Columns of a table of cCREs."""

_PLAIN = re.compile(r"^([A-Za-z0-9]+):([0-9]{1,12})-([0-9]{1,12})$")  # nearly all: a quick first look
_REGION = re.compile(
    r"^([^\s\x00\ud800-\udfff]*[^\s:_\x00\ud800-\udfff-])[:_-]([0-9]{1,12})[_-]([0-9]{1,12})(?::[*+.-])?$"
)
_CUT_NAME = re.compile(
    r"^[^:*]+:[0-9]+$"
)  # of chr1:10-20-1, a name made unique: what _REGION takes for the chromosome
_MADE_UNIQUE = re.compile(r"^([^\s:]+):([0-9]{1,12})-([0-9]{1,12})-[0-9]{1,6}$")
_DOTTED = re.compile(r"^(chr[^\s:.]+|[0-9XY]{1,2}|MT)\.([0-9]{1,12})\.([0-9]{1,12})$")
_LONG_NUMBERS = re.compile(
    r"^(\S*[^\s:_-])[:_-]([0-9][0-9,.]*(?:e[+]?[0-9]+)?)[_-]([0-9][0-9,.]*(?:e[+]?[0-9]+)?)$"
)
_ANY_MARKS = re.compile(
    r"""^["']?([^\s:|"']*[^\s:|"'_.-])(?:\s+|[:|_-])([0-9]{1,12})(?:\.\.|\s+|[:|_-])([0-9]{1,12})["']?$"""
)
_GENOME_PREFIX = re.compile(r"^(GRCh3[78]|GRCm3[89]|hg19|hg38|mm10|mm39)[_.-]+(?=.)", re.IGNORECASE)
_STRIDE = 1 << 40  # more than any chromosome is long: position + code * _STRIDE orders a whole genome


def parse_regions(names: Iterable[str]) -> pd.DataFrame:
    """Read regions from their text form.

    Parameters
    ----------
    names
        ``chrom:start-end``; ``chrom-start-end`` and ``chrom_start_end`` are understood too, and what R and
        `var_names_make_unique` make of them: ``chr1.10.20``, ``chr1-1e+05-100500``, ``chr1:10,000-10,500``,
        ``chr1:10-20:*``, ``chr1:10-20-1``; and other marks between the three: ``chr1:10..20``, ``chr1|10|20``, blanks.

    Returns
    -------
    Columns ``chrom`` (str), ``start`` and ``end`` (int64), one row per name, in order.

    Raises
    ------
    InputError
        Naming the first text that is not a region, or whose end is not behind its start.

    Examples
    --------
    >>> parse_regions(["chr1:10-20", "GL000194.1-5-9", "chr1.10.20"])
            chrom  start  end
    0        chr1     10   20
    1  GL000194.1      5    9
    2        chr1     10   20
    """
    text = [str(name) for name in names]
    read = [_parts(name) for name in text]
    chrom, start, end = zip(*read, strict=True) if read else ((), (), ())
    regions = pd.DataFrame({"chrom": np.array(chrom, dtype=object), "start": start, "end": end})
    regions = regions.astype({"start": np.int64, "end": np.int64})
    backward = np.flatnonzero(regions["end"].to_numpy() <= regions["start"].to_numpy())
    if len(backward):
        raise _bad_region(text[backward[0]])
    return regions


def _parts(name: str) -> tuple[str, int, int]:
    """Return chromosome, start and end out of the text form of a region."""
    found = _PLAIN.match(name)
    if found is not None:
        return found[1], int(found[2]), int(found[3])
    found = _REGION.match(name)
    if found is None or _CUT_NAME.match(found[1]):
        return _odd_region(name)
    return found[1], int(found[2]), int(found[3])


def _odd_region(name: str) -> tuple[str, int, int]:
    """Read a region as R, pandas or a spreadsheet may spell it; `InputError` where it is none."""
    stripped = name.strip()
    plain = _MADE_UNIQUE.match(stripped) or _DOTTED.match(stripped) or _ANY_MARKS.match(stripped)
    if plain:
        return plain[1], int(plain[2]), int(plain[3])
    numbers = _LONG_NUMBERS.match(stripped)
    if numbers is None:
        raise _bad_region(name)
    try:
        start, end = (float(number.replace(",", "")) for number in numbers.group(2, 3))
    except ValueError:
        raise _bad_region(name) from None
    if not (start.is_integer() and end.is_integer() and max(start, end) < 1e12):
        raise _bad_region(name)
    return numbers[1], int(start), int(end)


def _bad_region(name: str) -> InputError:
    if re.search(r"[:_-]-[0-9]+[_-][0-9]+$", name):
        return InputError(
            f"peak {name!r} starts before its chromosome does",
            hint="cut such peaks at 0 (or at 1 where positions count from 1), in the file that names them",
        )
    return InputError(
        f"{name!r} is not a region: wanted chrom:start-end with start < end",
        hint="name peaks like chr1:181117-181803; chr1-181117-181803 and chr1_181117_181803 are read too",
    )


def region_names(frame: pd.DataFrame) -> NDArray[np.object_]:
    """Return the text form ``chrom:start-end`` of each row of `frame`, as an array of str."""
    rows = zip(frame["chrom"].tolist(), frame["start"].tolist(), frame["end"].tolist(), strict=True)
    return np.array([f"{chrom}:{start}-{end}" for chrom, start, end in rows], dtype=object)


def tss(genes: pd.DataFrame) -> NDArray[np.int64]:
    """Return the transcription start site of each gene, in bp; -1 where its coordinates are unknown.

    The first base of the gene body as its strand reads it: ``start`` on ``+``, ``end - 1`` on ``-``. A gene
    whose strand is unknown is taken to be on ``+``; whoever makes such genes says so (`gene_table`).
    """
    start, end = genes["start"].to_numpy(np.int64), genes["end"].to_numpy(np.int64)
    return np.where((genes["strand"].to_numpy() == "-") & (end > 0), end - 1, start)


def overlap_pairs(left: pd.DataFrame, right: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find every pair of regions that share at least one base.

    Parameters
    ----------
    left, right
        Regions in any order, overlapping or not; rows with unknown coordinates have no pair.

    Returns
    -------
    Rows of `left` and rows of `right`, one entry per pair, sorted by left row, then right row.
    """
    left_code, right_code = _shared_codes(left["chrom"], right["chrom"])
    order, starts, ends = _sorted_positions(right, right_code)
    left_start = left_code * _STRIDE + np.maximum(left["start"].to_numpy(np.int64), 0)
    left_end = left_code * _STRIDE + left["end"].to_numpy(np.int64)
    # Candidates lie between the first region that may still reach left_start (running maximum of ends) and
    # the last that starts before left_end; those in between that end too early are filtered out exactly.
    low = np.searchsorted(np.maximum.accumulate(ends), left_start, side="right")
    high = np.searchsorted(starts, left_end, side="left")
    count = np.where(left["end"].to_numpy() > 0, np.maximum(high - low, 0), 0)
    left_row = np.repeat(np.arange(len(left)), count)
    offset = np.arange(len(left_row)) - np.repeat(np.cumsum(count) - count, count)
    candidate = np.repeat(low, count) + offset
    kept = ends[candidate] > left_start[left_row]
    left_row, right_row = left_row[kept], order[candidate[kept]]
    if np.all(order[1:] > order[:-1]):
        return left_row, right_row
    by_row = np.lexsort((right_row, left_row))
    return left_row[by_row], right_row[by_row]


def overlaps_any(left: pd.DataFrame, right: pd.DataFrame) -> NDArray[np.bool_]:
    """Tell which regions of `left` share a base with one of `right`, however many these are.

    As many regions of `right` as start before the end of one, and do not end before its start, overlap it.
    """
    left_code, right_code = _shared_codes(left["chrom"], right["chrom"])
    known = right["end"].to_numpy() > 0
    offset = right_code[known] * _STRIDE
    starts = np.sort(offset + right["start"].to_numpy(np.int64)[known])
    ends = np.sort(offset + right["end"].to_numpy(np.int64)[known])
    start = left_code * _STRIDE + np.maximum(left["start"].to_numpy(np.int64), 0)
    end = left_code * _STRIDE + left["end"].to_numpy(np.int64)
    n = np.searchsorted(starts, end, side="left") - np.searchsorted(ends, start, side="right")
    return (left["end"].to_numpy() > 0) & (n > 0)


def _shared_codes(left: pd.Series, right: pd.Series) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the chromosomes of both alike; those that only `left` has get a code above all of `right`."""
    right_code, names = pd.factorize(right)
    left_code = pd.Index(names).get_indexer(pd.Index(left))
    return np.where(left_code < 0, len(names), left_code).astype(np.int64), right_code.astype(np.int64)


def _sorted_positions(
    regions: pd.DataFrame, code: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the row order by genome position, and the genome-wide starts and ends in that order."""
    known = np.flatnonzero(regions["end"].to_numpy() > 0)
    starts = (code * _STRIDE + regions["start"].to_numpy(np.int64))[known]
    ends = (code * _STRIDE + regions["end"].to_numpy(np.int64))[known]
    order = np.argsort(starts, kind="stable")
    return known[order], starts[order], ends[order]


def window_pairs(
    genes: pd.DataFrame, ccres: pd.DataFrame, window_bp: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find every cCRE within `window_bp` of a gene body.

    Parameters
    ----------
    genes
        Columns ``chrom, start, end``; genes with unknown coordinates have no pair.
    ccres
        Columns ``chrom, start, end``.
    window_bp
        Bases by which each gene body is extended on both sides.

    Returns
    -------
    Gene rows and cCRE rows, one entry per pair that shares at least one base, sorted by gene, then cCRE.
    """
    known = genes["end"].to_numpy() > 0
    windows = pd.DataFrame(
        {
            "chrom": genes["chrom"].to_numpy(),
            "start": np.where(known, np.maximum(genes["start"] - window_bp, 0), -1),
            "end": np.where(known, genes["end"] + window_bp, -1),
        }
    )
    return overlap_pairs(windows, ccres)


def signed_distance(
    genes: pd.DataFrame,
    ccres: pd.DataFrame,
    gene_row: NDArray[np.int64],
    ccre_row: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the distance from the gene's TSS to the cCRE's midpoint, in bp, for each pair of rows.

    Negative is upstream, as the gene's strand reads. Both must lie on one chromosome.
    """
    middle = (ccres["start"].to_numpy(np.int64) + ccres["end"].to_numpy(np.int64)) // 2
    distance = middle[ccre_row] - tss(genes)[gene_row]
    return np.where(genes["strand"].to_numpy()[gene_row] == "-", -distance, distance)


def nearest_tss(regions: pd.DataFrame, genes: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the gene whose TSS is nearest to the middle of each region.

    Parameters
    ----------
    regions
        Columns ``chrom, start, end``.
    genes
        Columns ``chrom, start, end, strand``; those with unknown coordinates are nearest to nothing.

    Returns
    -------
    Gene rows, -1 where a chromosome has no gene; and signed distances as `signed_distance` gives them, 0 there.
    """
    known = np.flatnonzero(genes["end"].to_numpy() > 0)
    region_code, gene_code = _shared_codes(regions["chrom"], genes["chrom"].iloc[known])
    site = gene_code * _STRIDE + tss(genes)[known]
    order = np.argsort(site, kind="stable")
    site, known, gene_code = site[order], known[order], gene_code[order]
    middle = (regions["start"].to_numpy(np.int64) + regions["end"].to_numpy(np.int64)) // 2
    place = region_code * _STRIDE + middle
    row = np.full(len(regions), -1, dtype=np.int64)
    if len(known) == 0:
        return row, np.zeros(len(regions), dtype=np.int64)
    after = np.searchsorted(site, place)
    best = np.full(len(regions), np.inf)
    for candidate in (np.maximum(after - 1, 0), np.minimum(after, len(site) - 1)):
        apart = np.where(gene_code[candidate] == region_code, np.abs(site[candidate] - place), np.inf)
        row = np.where(apart < best, known[candidate], row)
        best = np.minimum(apart, best)
    distance = signed_distance(genes, regions, np.maximum(row, 0), np.arange(len(regions)))
    return row, np.where(row >= 0, distance, 0)


def rename_chroms(chrom: pd.Series, known: Iterable[str], genome: str = "") -> pd.Series:
    """Spell chromosomes as `known` does, where only the spelling differs.

    That is ``1``, ``chr1`` and ``CHR1``; ``MT`` and ``chrM``; ``GRCh38_chr1`` (Cell Ranger with several genomes);
    ``NC-000001.11`` (Seurat, which allows no ``_``). Names without a counterpart in `known` stay as they are.

    Parameters
    ----------
    chrom
        Names to spell anew.
    known
        Names to spell them like.
    genome
        The genome of `known`: chromosomes that say they are of another species stay as they are.
    """
    known = set(known)
    dashed = {name.replace("_", "-"): name for name in known}
    spelling = {}
    for name, plain in _without_genome(pd.unique(chrom), species_of(genome)).items():
        bare = re.sub(r"^chr", "", plain, flags=re.IGNORECASE)
        bare = "M" if bare == "MT" else bare
        options = (name, plain, bare, f"chr{bare}", "MT" if bare == "M" else name)
        close = dashed.get(name.replace("_", "-"), name)
        spelling[name] = next((option for option in options if option in known), close)
    return chrom.map(spelling)


def strip_genome(names: pd.Series, species: str = "") -> pd.Series:
    """Strip the name of the genome that Cell Ranger puts before features of a reference of several genomes.

    Where there are several species, only those of `species` lose it: ``mm10_Actb`` is no human gene.
    """
    return names.map(_without_genome(pd.unique(names), species))


def species_of(genome: str) -> str:
    """Return ``"human"`` or ``"mouse"``, or ``""`` of another genome, by its name."""
    name = genome.lower()
    return "human" if name.startswith(("grch", "hg")) else "mouse" if name.startswith(("grcm", "mm")) else ""


def _without_genome(names: Iterable[str], species: str) -> dict[str, str]:
    """Return each name without the genome before it, where that is of `species`, or of the only species named."""
    found = {name: _GENOME_PREFIX.match(name) for name in names}
    named = {species_of(match[1]) for match in found.values() if match}
    mine = {species} if species else named if len(named) == 1 else set()
    return {
        name: name[match.end() :] if match and species_of(match[1]) in mine else name
        for name, match in found.items()
    }
