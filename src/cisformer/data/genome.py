"""Regions of a genome, transcription start sites, and the gene-cCRE window join.

Coordinates are 0-based and half-open everywhere in cisformer: the first 100 bases of chromosome 1 are
``chrom="chr1", start=0, end=100``, written ``chr1:0-100``. Unknown is ``chrom="", start=end=-1``.
"""

from __future__ import annotations

import csv
import io
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

_REGION = re.compile(r"^([^\s\x00\ud800-\udfff]+)[:_-]([0-9]{1,12})[_-]([0-9]{1,12})$", re.MULTILINE)
_STRIDE = 1 << 40  # more than any chromosome is long: position + code * _STRIDE orders a whole genome


def parse_regions(names: Iterable[str]) -> pd.DataFrame:
    """Read regions from their text form.

    Parameters
    ----------
    names
        ``chrom:start-end``; ``chrom-start-end`` and ``chrom_start_end`` are understood too.

    Returns
    -------
    Columns ``chrom`` (str), ``start`` and ``end`` (int64), one row per name, in order.

    Raises
    ------
    InputError
        Naming the first text that is not a region, or whose end is not behind its start.

    Examples
    --------
    >>> parse_regions(["chr1:10-20", "GL000194.1-5-9"])
            chrom  start  end
    0        chr1     10   20
    1  GL000194.1      5    9
    """
    names = [str(name) for name in names]
    table, n_regions = _REGION.subn(r"\1\t\2\t\3", "\n".join(names))
    if n_regions != len(names):
        raise _bad_region(
            next((name for name in names if not _REGION.fullmatch(name)), "a name with a line break")
        )
    frame = pd.read_csv(
        io.StringIO(table),
        sep="\t",
        names=["chrom", "start", "end"],
        dtype={"chrom": str, "start": np.int64, "end": np.int64},
        keep_default_na=False,
        quoting=csv.QUOTE_NONE,
    )
    backward = np.flatnonzero(frame["end"].to_numpy() <= frame["start"].to_numpy())
    if len(backward):
        raise _bad_region(names[backward[0]])
    return frame


def _bad_region(name: str) -> InputError:
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
    whose strand is unknown is taken to be on ``+``.
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


def rename_chroms(chrom: pd.Series, known: Iterable[str]) -> pd.Series:
    """Spell chromosomes as `known` does, where only the prefix differs: ``1``, ``chr1``; ``MT``, ``chrM``.

    Names without a counterpart in `known` stay as they are.
    """
    known = set(known)
    spelling = {}
    for name in pd.unique(chrom):
        bare = name.removeprefix("chr")
        bare = "M" if bare == "MT" else bare
        options = (name, bare, f"chr{bare}", "MT" if bare == "M" else name)
        spelling[name] = next((option for option in options if option in known), name)
    return chrom.map(spelling)
