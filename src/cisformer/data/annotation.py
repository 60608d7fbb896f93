"""Read gene annotations (GTF) and lists of regions (BED), plain or gzipped."""

from __future__ import annotations

import contextlib
import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pandas as pd

from cisformer.data.features import strip_versions
from cisformer.data.genome import CCRE_COLUMNS, GENE_COLUMNS
from cisformer.errors import InputError

_POSITION = re.compile("[0-9]{1,12}")


def read_bed(path: str | Path) -> pd.DataFrame:
    """Read the regions of a BED file, plain or gzipped: ``chrom, start, end``; duplicates kept once."""
    rows = []
    with _open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            fields = line.split()
            if not fields or fields[0] in ("browser", "track") or fields[0].startswith("#"):
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

    Returns
    -------
    Columns ``gene_id`` (Ensembl versions stripped), ``gene_name``, ``chrom, start, end`` (0-based,
    half-open), ``strand``; in file order, each gene id once, pseudoautosomal copies on chrY left out.
    """
    lines = pd.DataFrame(_gtf_lines(path), columns=["feature", *GENE_COLUMNS])
    if not len(lines):
        raise InputError(
            f"{path} has no GTF line with a gene_id", hint="give a gene annotation in GTF, not GFF3"
        )
    genes = lines[lines["feature"] == "gene"]
    if not len(genes):
        extent = dict.fromkeys(GENE_COLUMNS, "first") | {"start": "min", "end": "max"}
        genes = lines.groupby("gene_id", sort=False).agg(extent)
    genes = genes[~genes["gene_id"].str.endswith("_PAR_Y")]
    genes = genes.assign(gene_id=strip_versions(genes["gene_id"]))
    return genes.drop_duplicates("gene_id").reset_index(drop=True)[GENE_COLUMNS]


def _gtf_lines(path: str | Path) -> Iterator[tuple[str, str, str, str, int, int, str]]:
    gene_id = re.compile(r'gene_id "([^"]*)"')
    gene_name = re.compile(r'gene_name "([^"]*)"|(?<!\w)gene "([^"]*)"')
    with _open_text(path) as handle:
        for number, line in enumerate(handle, start=1):
            fields = line.split("\t")
            identity = gene_id.search(fields[8]) if len(fields) >= 9 else None
            if line.startswith("#") or identity is None:
                continue
            name = gene_name.search(fields[8])
            label = (name.group(1) or name.group(2)) if name else identity.group(1)
            strand = fields[6] if fields[6] in "+-" else ""
            if not (_POSITION.fullmatch(fields[3]) and _POSITION.fullmatch(fields[4])):
                raise InputError(
                    f"{path} line {number} has no positions: {line.strip()[:60]!r}",
                    hint="wanted: GTF, with start and end in columns 4 and 5",
                )
            yield fields[2], identity.group(1), label, fields[0], int(fields[3]) - 1, int(fields[4]), strand


@contextlib.contextmanager
def _open_text(path: str | Path) -> Iterator[IO[str]]:
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
