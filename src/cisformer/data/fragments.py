"""Count the insertions of a fragments file (10x, SnapATAC2, sinto, chromap) on regions, in flat memory.

The file is read once, in blocks of lines. Pairs (cell, region) go into a temporary file as sorted runs, from which
cells are read back. Fragments are 0-based and half-open; both of their ends are insertions.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import logging
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.data.barcodes import translate
from cisformer.data.genome import rename_chroms
from cisformer.data.hdf5 import damaged
from cisformer.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

MIN_FRAGMENTS = 1000
"""Barcodes with fewer fragments are no cells, where nothing else says which are."""

_BLOCK_BYTES = 4 << 20  # of text parsed at once
_RUN = 1 << 21  # pairs sorted at once
_MOST_PAIRS = 1 << 20  # pairs of the cells that are read back at once
_CHECKED = 2_000_000  # insertions that tell whether the genome is the reference's
_STRIDE = 1 << 40  # as in genome.py: more than any chromosome is long
_COLUMNS = ("chrom", "start", "end", "barcode", "count", "strand")
_NAMES = [
    ["chrom", "start", "end"],
    ["chr", "start", "end"],
    ["chromosome", "start", "end"],
    ["seqnames", "start", "end"],
]
"""How columns are called where the first line names them."""


@dataclass(frozen=True, eq=False)
class FragmentOptions:
    """What fragments are counted on, and of which cells.

    Attributes
    ----------
    ccres
        The regions: columns ``chrom, start, end``.
    barcodes
        The cells wanted, in any order; `None` for those with enough fragments.
    min_fragments
        How many are enough.
    genome
        Of the regions: chromosomes that say they are of another species are left out.
    """

    ccres: pd.DataFrame
    barcodes: pd.Index | None = None
    min_fragments: int = MIN_FRAGMENTS
    genome: str = ""


class Pieces:
    """Disjoint pieces of regions, found by position; regions that overlap are cut at each other's ends."""

    def __init__(self, regions: pd.DataFrame) -> None:
        code, names = pd.factorize(regions["chrom"])
        self.chroms = [str(name) for name in names]
        start = code * _STRIDE + regions["start"].to_numpy(np.int64)
        end = code * _STRIDE + regions["end"].to_numpy(np.int64)
        self.starts, self.ends = _disjoint(start, end)

    def __len__(self) -> int:
        return len(self.starts)

    def table(self) -> pd.DataFrame:
        """Return ``chrom, start, end`` of the pieces."""
        chrom = np.array(self.chroms, dtype=object)[self.starts // _STRIDE]
        return pd.DataFrame({"chrom": chrom, "start": self.starts % _STRIDE, "end": self.ends % _STRIDE})

    def find(self, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the piece that holds each genome-wide position, -1 where none does."""
        piece = np.searchsorted(self.starts, position, side="right") - 1
        return np.where((piece >= 0) & (position < self.ends[piece]), piece, -1)


def _disjoint(
    start: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    edges = _sorted_once(np.concatenate([start, end]))
    depth = np.bincount(np.searchsorted(edges, start), minlength=len(edges)) - np.bincount(
        np.searchsorted(edges, end), minlength=len(edges)
    )
    covered = np.flatnonzero(np.cumsum(depth)[:-1] > 0)
    return edges[covered], edges[covered + 1]


def _sorted_once(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sort numbers in place and return each once; faster than `np.unique`, which hashes them first."""
    keys.sort()
    return keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys


class PairFile:
    """Pairs (cell, piece) in an unnamed file, in sorted runs without repeats.

    Parameters
    ----------
    files
        What closes the file.
    n_pieces
        One more than the highest piece.
    """

    def __init__(self, files: contextlib.ExitStack, n_pieces: int) -> None:
        self._file = files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._n_pieces = n_pieces
        self._ends = [0]
        self._waiting: list[NDArray[np.int64]] = []
        self._n_waiting = 0

    @property
    def n_pairs(self) -> int:
        """Number of pairs written; a pair counts once per run that has it."""
        return self._ends[-1]

    def add(self, cell: NDArray[np.int64], piece: NDArray[np.int64]) -> None:
        """Add pairs in any order."""
        self._waiting.append(cell * self._n_pieces + piece)
        self._n_waiting += len(cell)
        if self._n_waiting >= _RUN:
            self.flush()

    def flush(self) -> None:
        """Write the pairs in memory as a sorted run."""
        if self._n_waiting:
            keys = _sorted_once(np.concatenate(self._waiting))
            self._file.write(keys.data)
            self._file.flush()
            self._ends.append(self._ends[-1] + len(keys))
        self._waiting, self._n_waiting = [], 0

    def cells(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the pairs of cells `first` to `last`, sorted by cell, then piece; each once."""
        if not self.n_pairs:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        keys = np.memmap(self._file, np.int64, "r", shape=(self.n_pairs,))
        bounds = [first * self._n_pieces, last * self._n_pieces]
        parts = []
        for start, end in itertools.pairwise(self._ends):
            low, high = np.searchsorted(keys[start:end], bounds)
            parts.append(keys[start + low : start + high])
        found = _sorted_once(np.concatenate(parts))
        return found // self._n_pieces, found % self._n_pieces


class FragmentCells:
    """The cells of a fragments file, counted: which pieces each has an insertion in.

    Attributes
    ----------
    barcodes
        The cells kept, in the order in which the file names them first.
    n_fragments
        Fragments of each.
    pieces
        What they are counted on.
    """

    def __init__(self, path: Path, options: FragmentOptions, files: contextlib.ExitStack) -> None:
        self.pieces = Pieces(options.ccres)
        self._pairs = PairFile(files, len(self.pieces))
        self._known: dict[str, int] = {}
        self._wanted, self._genome = options.barcodes, options.genome
        self._counts = np.zeros(0, np.int64)
        self._chroms: dict[str, int] = {}
        self._read(path)
        enough = 1 if self._wanted is not None else options.min_fragments
        self._kept = np.flatnonzero(self._counts >= enough)
        names = np.array(list(self._known), dtype=object)
        self.barcodes = pd.Index(names[self._kept])
        self.n_fragments = self._counts[self._kept]
        per_cell = self._pairs.n_pairs / max(len(self._counts), 1)
        self._step = max(1, int(_MOST_PAIRS / max(per_cell, 1)))
        self._cached: tuple[int, sp.csr_matrix] = (-1, sp.csr_matrix((0, len(self.pieces))))

    @property
    def chroms(self) -> list[str]:
        """Chromosomes of the file, as it names them."""
        return list(self._chroms)

    @property
    def knows_chroms(self) -> bool:
        """Whether the regions have one of them."""
        return any(number >= 0 for number in self._chroms.values())

    def _read(self, path: Path) -> None:
        import pyarrow as pa

        wanted = None if self._wanted is None else pa.array(self._wanted.astype(str), pa.string())
        if self._wanted is not None:
            self._known = {str(barcode): number for number, barcode in enumerate(self._wanted)}
        self._counts = np.zeros(len(self._known), np.int64)
        chroms = self._chroms
        n_checked = n_hit = n_moved = 0
        for batch in _batches(path):
            cell = self._cell_codes(batch.column(3), wanted)
            chrom = self._chrom_codes(batch.column(0), chroms)
            kept = np.flatnonzero((cell >= 0) & (chrom >= 0))
            cell, offset = cell[kept], chrom[kept] * _STRIDE
            added = np.bincount(cell, minlength=len(self._known))
            self._counts = added + np.pad(self._counts, (0, len(added) - len(self._counts)))
            start, end = (batch.column(i).to_numpy(zero_copy_only=False)[kept] for i in (1, 2))
            if len(kept) and (start.min() < 0 or (end <= start).any()):
                raise damaged(str(path), "a fragment ends before it starts")
            for position in (offset + start, offset + end - 1):
                piece = self.pieces.find(position)
                hit = piece >= 0
                self._pairs.add(cell[hit], piece[hit])
                if n_checked < _CHECKED:
                    n_checked += len(position)
                    n_hit += int(hit.sum())
                    n_moved += int((self.pieces.find(position + 20_000) >= 0).sum())
        self._pairs.flush()
        if n_checked >= 10_000 and n_hit < 1.25 * n_moved:
            raise InputError(
                f"{path}: {n_hit / n_checked:.0%} of its insertions lie in the reference's cCREs, "
                f"{n_moved / n_checked:.0%} when moved by 20 kb: they are of another genome",
                hint="use a reference of the fragments' genome; `cisformer build_reference` makes one",
            )

    def _cell_codes(self, barcodes: pa.DictionaryArray, wanted: pa.Array | None) -> NDArray[np.int64]:
        """Return the number of each fragment's cell, -1 where it is not wanted."""
        import pyarrow.compute as pc

        if wanted is not None:
            code = pc.fill_null(pc.index_in(barcodes.dictionary, value_set=wanted), -1).to_numpy()
        else:
            known = self._known
            code = np.array([known.setdefault(name, len(known)) for name in barcodes.dictionary.to_pylist()])
        return code.astype(np.int64)[barcodes.indices.to_numpy()]

    def _chrom_codes(self, chroms: pa.DictionaryArray, known: dict[str, int]) -> NDArray[np.int64]:
        """Return the number of each fragment's chromosome among those of the regions, -1 where they lack it."""
        names = chroms.dictionary.to_pylist()
        new = pd.Series([name for name in names if name not in known], dtype=object)
        place = {name: number for number, name in enumerate(self.pieces.chroms)}
        spelt = rename_chroms(new, self.pieces.chroms, self._genome)
        known.update({name: place.get(spelling, -1) for name, spelling in zip(new, spelt, strict=True)})
        return np.array([known[name] for name in names], np.int64)[chroms.indices.to_numpy()]

    def rows(self, start: int, end: int) -> sp.csr_matrix:
        """Return cells `start` to `end` [n, len(pieces)]: 1 where a cell has an insertion."""
        if end <= start:
            return sp.csr_matrix((0, len(self.pieces)), dtype=np.float32)
        numbers = range(start // self._step, (end - 1) // self._step + 1)
        first = numbers[0] * self._step
        return sp.vstack([self._block(number) for number in numbers], format="csr")[
            start - first : end - first
        ]

    def _block(self, number: int) -> sp.csr_matrix:
        if self._cached[0] != number:
            kept = self._kept[number * self._step : (number + 1) * self._step]
            cell, piece = self._pairs.cells(int(kept[0]), int(kept[-1]) + 1)
            row = np.searchsorted(kept, cell)
            mine = kept[row] == cell
            ones = np.ones(int(mine.sum()), np.float32)
            shape = (len(kept), len(self.pieces))
            self._cached = number, sp.csr_matrix((ones, (row[mine], piece[mine])), shape)
        return self._cached[1]


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield ``chrom, start, end, barcode`` of blocks of fragments; chrom and barcode as dictionaries."""
    import pyarrow as pa
    from pyarrow import csv

    start = _start(path)
    names = list(_COLUMNS[: len(first_fields(path, start))])
    text = pa.dictionary(pa.int32(), pa.string())
    types = {"chrom": text, "barcode": text, "start": pa.int32(), "end": pa.int32()}
    try:
        with pa.input_stream(path, compression=_compression(start)) as stream:
            yield from csv.open_csv(
                stream,
                csv.ReadOptions(
                    column_names=names, block_size=_BLOCK_BYTES, skip_rows=_n_heading(path, start)
                ),
                csv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=_skip_comment),
                csv.ConvertOptions(include_columns=names[:4], column_types=types, strings_can_be_null=False),
            )
    except (pa.ArrowException, OSError) as error:
        raise damaged(str(path), error) from error


def _start(path: Path) -> bytes:
    with open(path, "rb") as handle:
        return handle.read(8)


def _compression(start: bytes) -> str | None:
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    return "zstd" if start.startswith(b"\x28\xb5\x2f\xfd") else None


def _head(path: Path, start: bytes) -> Iterator[str]:
    """Yield the first lines of a text file, plain, gzipped or zstd; none of a file that is no text."""
    if _compression(start) == "zstd":
        pyarrow = require_pyarrow(path)
        with pyarrow.input_stream(path, compression="zstd") as stream:
            yield from stream.read(1 << 16).decode("utf-8", "replace").split("\n")[:-1]
        return
    opener: Any = gzip.open if _compression(start) == "gzip" else open
    no_text = (OSError, EOFError, UnicodeDecodeError, zlib.error)
    with contextlib.suppress(*no_text), opener(path, "rt", encoding="utf-8") as handle:
        for _ in range(1000):
            line = handle.readline(1 << 14)
            if not line:
                return
            yield line.rstrip("\r\n")


def first_fields(path: Path, start: bytes) -> list[str]:
    """Return the fields of the first line that is no heading; none where there is no such line of text."""
    line = next((line for line in _head(path, start) if not _is_heading(line)), "")
    return line.split("\t") if line else []


def _is_heading(line: str) -> bool:
    """Tell a comment, an empty line and the names of columns from a fragment."""
    line = line.removeprefix("\ufeff").strip()
    return not line or line.startswith("#") or line.lower().split("\t")[:3] in _NAMES


def _n_heading(path: Path, start: bytes) -> int:
    return sum(1 for _ in itertools.takewhile(_is_heading, _head(path, start)))


def _skip_comment(row: Any) -> str:
    """Leave out comments between fragments, which concatenated files have."""
    return "skip" if row.text is not None and row.text.startswith("#") else "error"


def require_pyarrow(path: Path) -> Any:
    """Return the module pyarrow; `InputError` that says how to install it."""
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(
            f"reading the fragments in {path} needs pyarrow, which is not installed",
            hint='pip install "cisformer-links[io]"',
        ) from error
    return pyarrow


def count_fragments(path: Path, options: FragmentOptions, files: contextlib.ExitStack) -> FragmentCells:
    """Count the insertions of a file on regions, in one reading.

    Raises
    ------
    InputError
        If the file is damaged, shares no chromosome or no barcode with what is wanted, or has no cell with enough
        fragments.
    """
    require_pyarrow(path)
    cells = FragmentCells(path, _spelt_as_in(path, options), files)
    if not len(cells.barcodes):
        if options.barcodes is None:
            raise InputError(
                f"{path} has no barcode with {options.min_fragments:,} fragments on the reference's chromosomes",
                hint="lower --min_fragments",
            )
        if not cells.knows_chroms:
            raise InputError(
                f"{path} has no fragment on a chromosome of the reference: it has {', '.join(cells.chroms[:3])}, the "
                f"reference has {', '.join(cells.pieces.chroms[:3])}",
                hint="give fragments and a reference of the same genome",
            )
        raise InputError(
            f"{path} shares no barcode with the RNA: it has {', '.join(example_barcodes(path))}, the RNA has "
            f"{', '.join(map(str, options.barcodes[:3]))}",
            hint="give the fragments of the same cells",
        )
    logger.info("%s: %d fragments of %d cells counted", path, cells.n_fragments.sum(), len(cells.barcodes))
    return cells


def _spelt_as_in(path: Path, options: FragmentOptions) -> FragmentOptions:
    """Return the options; for all barcodes, where the file spells those wanted in another way."""
    if options.barcodes is None:
        return options
    sample = barcode_sample(path)
    if options.barcodes.isin(sample).any() or not translate(options.barcodes, sample).how:
        return options
    return replace(options, barcodes=None)


def example_barcodes(path: Path, n_lines: int = 1000) -> list[str]:
    """Return three barcodes of the first lines of a fragments file."""
    return list(barcode_sample(path, n_lines)[:3])


def first_fragments(path: Path, n: int = 200_000) -> pd.DataFrame:
    """Return the first fragments of a file: ``chrom, start, end, barcode``."""
    require_pyarrow(path)
    blocks, n_read = [], 0
    for batch in _batches(path):
        blocks.append(batch.to_pandas().astype({"chrom": str, "barcode": str}))
        n_read += batch.num_rows
        if n_read >= n:
            break
    return (
        pd.concat(blocks, ignore_index=True).head(n) if blocks else pd.DataFrame(columns=list(_COLUMNS[:4]))
    )


def barcode_sample(path: Path, n_lines: int = 200_000) -> pd.Index:
    """Return the barcodes of the first fragments of a file, each once."""
    names: list[str] = []
    for batch in _batches(path):
        names += batch.column(3).dictionary.to_pylist()
        n_lines -= batch.num_rows
        if n_lines <= 0:
            break
    return pd.Index(names).unique()
