"""Read gene annotations (GTF) and lists of regions (BED), plain or gzipped."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import logging
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from cisformer.data.features import strip_versions
from cisformer.data.genome import CCRE_COLUMNS, GENE_COLUMNS
from cisformer.errors import InputError

logger = logging.getLogger(__name__)

_POSITION = re.compile("[0-9]{1,12}")
_HEADER = re.compile(r"(chrom_?|peak_?)?start\t(chrom_?|peak_?)?end", re.IGNORECASE)
_GENE_ID = re.compile(r'(?<!\w)gene_id "?([^";]+)')
_GENE_NAME = re.compile(r'(?<!\w)gene(?:_name)? "?([^";]+)')
_TRANSCRIPT = re.compile(r'(?<!\w)transcript_id "?([^";]+)')
_CONTIG = r"^(?!NC[_-]).*[_.]|^GL|^KI"
_SAME_LOCUS_BP = 100_000
"""Transcripts of a gene that are further apart than this are copies of it."""


def read_bed(path: str | Path) -> pd.DataFrame:
    """Read the regions of a BED file, plain or gzipped: ``chrom, start, end``; duplicates kept once.

    A first line that names the columns is passed over.
    """
    rows = []
    with open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            fields = line.split()
            if not fields or fields[0] in ("browser", "track") or fields[0].startswith("#"):
                continue
            if number == 1 and _HEADER.fullmatch("\t".join(fields[1:3])):
                continue
            numeric = len(fields) >= 3 and all(_POSITION.fullmatch(field) for field in fields[1:3])
            if not numeric or int(fields[1]) >= int(fields[2]):
                raise InputError(
                    f"{path} line {number} is not a BED region: {line.strip()[:60]!r}",
                    hint="wanted: chrom, start, end, separated by tabs, with start < end",
                )
            rows.append((fields[0], int(fields[1]), int(fields[2])))
    return pd.DataFrame(rows, columns=CCRE_COLUMNS).drop_duplicates(ignore_index=True)


def read_gtf(path: str | Path) -> pd.DataFrame:
    """Read the genes of a GTF file, plain or gzipped.

    The extent of a gene is its ``gene`` line; without such lines, that of its transcripts. A gene with several
    loci, as UCSC's tables have them, keeps one: on a whole chromosome before contigs, on chrX before chrY, then the
    one with most lines, then the first of the file. It is said which genes that were.

    Returns
    -------
    Columns ``gene_id`` (Ensembl versions stripped), ``gene_name``, ``chrom, start, end`` (0-based,
    half-open), ``strand``; in file order, each gene id once, pseudoautosomal copies on chrY left out.

    Raises
    ------
    InputError
        If the file cannot be read, or is no GTF.
    """
    lines = pd.DataFrame(_gtf_lines(path), columns=["feature", "transcript", *GENE_COLUMNS])
    if not len(lines):
        raise _no_gtf(path)
    lines = lines[~lines["gene_id"].str.endswith("_PAR_Y")]
    lines["gene_id"] = strip_versions(lines["gene_id"])
    for feature in ("gene", "transcript"):
        chosen = lines["feature"] == feature
        if chosen.any():
            lines = lines[chosen]
            break
    else:
        extent = dict.fromkeys(GENE_COLUMNS, "first") | {"start": "min", "end": "max"}
        lines = lines.groupby(["gene_id", "transcript", "chrom", "strand"], sort=False).agg(extent)
    return one_locus(lines[GENE_COLUMNS].reset_index(drop=True), str(path))


def one_locus(lines: pd.DataFrame, label: str) -> pd.DataFrame:
    """Merge lines of each gene that lie within 100 kb on one strand; of several loci keep one, and say so."""
    ordered = lines.assign(order=np.arange(len(lines))).sort_values(["gene_id", "chrom", "strand", "start"])
    place = ordered.groupby(["gene_id", "chrom", "strand"], sort=False)
    reached = place["end"].cummax().shift(fill_value=0)
    first = ~ordered.duplicated(["gene_id", "chrom", "strand"])
    ordered["locus"] = (first | (ordered["start"] > reached + _SAME_LOCUS_BP)).cumsum()
    extent = dict.fromkeys(GENE_COLUMNS, "first") | {"start": "min", "end": "max", "order": "min"}
    loci = ordered.groupby("locus").agg(extent)
    loci["lines"] = ordered.groupby("locus").size()
    loci["contig"] = loci["chrom"].str.contains(_CONTIG)
    loci["on_y"] = loci["chrom"].isin(("chrY", "Y"))
    loci = loci.sort_values(["contig", "on_y", "lines", "order"], ascending=[True, True, False, True])
    several = loci[loci.duplicated("gene_id", keep=False)]
    if len(several):
        names = several["gene_name"].drop_duplicates()
        logger.warning(
            "%s: %d genes have several loci, such as %s; one is kept, on a main chromosome if there is one",
            label, len(names), ", ".join(names[:3]),
        )  # fmt: skip
    kept = loci.drop_duplicates("gene_id").sort_values("order")
    return kept[GENE_COLUMNS].reset_index(drop=True)


def _no_gtf(path: str | Path) -> InputError:
    """Return the error of a file without a GTF line, with the reason where it can be seen."""
    with open_text(path) as handle:
        lines = [line for line in itertools.islice(handle, 1000) if line.strip() and not line.startswith("#")]
    first = lines[0] if lines else ""
    gff3 = bool(re.search(r"\t(ID|Parent)=", first)) or str(path).removesuffix(".gz").endswith(
        (".gff3", ".gff")
    )
    if gff3:
        hint = f"convert it: gffread {path} -T -o genes.gtf"
    elif "gene_id" in first:
        hint = "its columns are not separated by tabs; write them with tabs"
    else:
        hint = "give a gene annotation in GTF, such as GENCODE's or Ensembl's"
    return InputError(
        f"{path} has no GTF line with a gene_id{' (it looks like GFF3)' if gff3 else ''}", hint=hint
    )


def _gtf_lines(path: str | Path) -> Iterator[tuple[str, str, str, str, str, int, int, str]]:
    genes_are_lines = False
    with open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            fields = line.rstrip("\r\n").split("\t")
            if line.startswith("#") or len(fields) < 9 or (genes_are_lines and fields[2] != "gene"):
                continue
            identity = _GENE_ID.search(fields[8])
            if identity is None:
                continue
            genes_are_lines = genes_are_lines or fields[2] == "gene"
            name, transcript = _GENE_NAME.search(fields[8]), _TRANSCRIPT.search(fields[8])
            strand = fields[6] if fields[6] in ("+", "-") else ""
            if not (_POSITION.fullmatch(fields[3]) and _POSITION.fullmatch(fields[4])):
                raise InputError(
                    f"{path} line {number} has no positions: {line.strip()[:60]!r}",
                    hint="wanted: GTF, with start and end in columns 4 and 5",
                )
            yield (
                fields[2], transcript[1] if transcript else "", identity[1], (name or identity)[1], fields[0],
                int(fields[3]) - 1, int(fields[4]), strand,
            )  # fmt: skip


@contextlib.contextmanager
def open_text(path: str | Path) -> Iterator[IO[str]]:
    """Open a plain or gzipped text file, whatever its name; `InputError` where it is neither."""
    try:
        with open(path, "rb") as handle:
            packed = handle.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8") as text:
            yield text
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(
            f"cannot read {path}: {error}", hint="check the path, or copy the file again"
        ) from error
