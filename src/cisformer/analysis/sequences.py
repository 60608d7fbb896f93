"""Cut the sequences of regions out of a FASTA file that is read once, in pieces; no index is needed or made."""

from __future__ import annotations

import contextlib
import gzip
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd

from cisformer.data.genome import rename_chroms
from cisformer.errors import InputError

logger = logging.getLogger(__name__)
PIECE_BYTES = 1 << 20
GZIP = b"\x1f\x8b"


def read_sequences(fasta: str | Path, regions: pd.DataFrame, genome: str = "") -> Iterator[tuple[int, bytes]]:
    """Yield the sequence of each region, in the order of the FASTA.

    Parameters
    ----------
    fasta
        Genome, plain or compressed with gzip or bgzip. Chromosomes may be spelled `1` or `chr1`.
    regions
        Columns chrom, start, end.
    genome
        What the regions are on, for messages.

    Yields
    ------
    Row of the region, and its sequence in capital letters as bytes. Regions on chromosomes that the FASTA lacks are
    counted in a warning.

    Raises
    ------
    InputError
        If the file is missing or no FASTA, a region reaches beyond the end of its chromosome, or no chromosome of the
        regions is in the FASTA.
    """
    by_chrom = {str(name): part for name, part in regions.reset_index(drop=True).groupby("chrom", sort=False)}
    left, cutter, seen = set(by_chrom), None, []
    for name, piece in _pieces(Path(fasta)):
        if piece is None:
            if cutter is not None:
                cutter.finish(fasta, genome)
            seen.append(name)
            ours = str(rename_chroms(pd.Series([name]), left).iloc[0])
            cutter = _Cutter(ours, by_chrom[ours]) if ours in left else None
            left.discard(ours)
        elif cutter is not None:
            yield from cutter.cut(piece)
    if cutter is not None:
        cutter.finish(fasta, genome)
    n_lost = sum(len(by_chrom[name]) for name in left)
    if n_lost == len(regions):
        raise InputError(
            f"no chromosome of the links is in {fasta}: {', '.join(sorted(left)[:3])} against {', '.join(seen[:3])}",
            hint=f"give the genome that the links are on{f', {genome}' if genome else ''}",
        )
    if n_lost:
        logger.warning(
            "%d of %d cCREs are left out: they are on chromosomes that %s lacks, such as %s",
            n_lost, len(regions), fasta, sorted(left)[0],
        )  # fmt: skip


class _Cutter:
    """Cuts the regions of one chromosome out of its pieces; regions may overlap."""

    def __init__(self, chrom: str, regions: pd.DataFrame) -> None:
        regions = regions.sort_values("start", kind="stable")
        self.chrom, self.rows = chrom, regions.index.to_numpy()
        self.starts, self.ends = regions["start"].to_numpy(np.int64), regions["end"].to_numpy(np.int64)
        self.position, self.next = 0, 0
        self.begun: dict[int, bytes] = {}

    def cut(self, piece: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield the regions that end in the next piece."""
        end = self.position + len(piece)
        while self.next < len(self.starts) and self.starts[self.next] < end:
            self.begun[self.next] = b""
            self.next += 1
        for number, had in list(self.begun.items()):
            first = max(int(self.starts[number]) - self.position, 0)
            had += piece[first : int(self.ends[number]) - self.position]
            if self.ends[number] > end:
                self.begun[number] = had
                continue
            del self.begun[number]
            yield int(self.rows[number]), had.upper()
        self.position = end

    def finish(self, fasta: str | Path, genome: str) -> None:
        """Raise `InputError` where regions reach beyond the end."""
        if not self.begun and self.next == len(self.starts):
            return
        number = int(np.argmax(self.ends))
        raise InputError(
            f"cCRE {self.chrom}:{self.starts[number]}-{self.ends[number]} reaches beyond the end of {self.chrom} in "
            f"{fasta}, which has {self.position:,} bases",
            hint=f"that FASTA is of another genome than the links{f', which are on {genome}' if genome else ''}",
        )


def _pieces(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """Yield the name of each record with `None`, then its sequence in pieces without line ends."""
    try:
        with _opened(path) as handle:
            name, header, in_header = "", b"", False
            while block := handle.read(PIECE_BYTES):
                while block:
                    if in_header:
                        line, found, block = block.partition(b"\n")
                        header += line
                        if found:
                            name, in_header = (header.split() or [b""])[0].decode(errors="replace"), False
                            yield name, None
                        continue
                    sequence, found, block = block.partition(b">")
                    sequence = sequence.translate(None, b"\r\n\t ")
                    if sequence and not name:
                        raise InputError(
                            f"{path} is no FASTA: it does not begin with >", hint="give a genome's FASTA"
                        )
                    if sequence:
                        yield name, sequence
                    if found:
                        header, in_header = b"", True
            if not name:
                raise InputError(f"{path} has no sequence in it", hint="give a genome's FASTA")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot read {path}: {str(error).strip()}", hint="give a genome's FASTA, plain or .gz"
        ) from None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        if not packed:
            yield raw
            return
        with gzip.open(raw) as handle:
            yield handle  # type: ignore[misc]  # of bgzip, too: it is gzip in blocks
