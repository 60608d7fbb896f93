"""Keep aligned cells in a temporary file, then write any selection of them to `.pt` shards, in flat memory.

Cells are read in the order of the input and wanted in another: paired, split, sorted or shuffled. A `RowFile`
takes them as they come; `write_shard` fetches rows in any order. Neither holds more than a few megabytes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

_CHUNK = 1 << 21  # elements held at once
_DIRECTORY_ENTRY = struct.Struct(
    "<28xHHH12x"
)  # of the directory of a zip archive: name, extra field, comment follow
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: its name and extra field follow, then its bytes


class RowFile:
    """Sparse cells of one modality in temporary files, each cell readable by its row, by several threads at once.

    Parameters
    ----------
    folder
        Where the files live; they have no name there and vanish with the context that this object opens.
    with_values
        Whether values are kept as integers beside the indices; without, all are 1.
    """

    def __init__(self, folder: Path, *, with_values: bool) -> None:
        self._files = contextlib.ExitStack()
        self._indices = self._open(folder)
        self._values = self._open(folder) if with_values else None
        self._lengths: list[NDArray[np.int64]] = []
        self._reading = threading.Lock()
        self.max_value = 1

    def _open(self, folder: Path) -> BufferedRandom:
        return self._files.enter_context(tempfile.TemporaryFile(dir=folder))

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *raised: object) -> None:
        self._files.close()

    def append(self, cells: sp.csr_matrix) -> None:
        """Add cells [n_cells, n_features] with sorted indices."""
        self._indices.write(cells.indices.astype(np.int32, copy=False).data)
        if self._values is not None:
            self._values.write(cells.data.astype(np.int32).data)
            self.max_value = max(self.max_value, int(cells.data.max(initial=0)))
        self._lengths.append(np.diff(cells.indptr).astype(np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Stored entries of each cell, in the order they were added."""
        self._lengths = [np.concatenate([np.zeros(0, np.int64), *self._lengths])]
        return self._lengths[0]

    def indices(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int32]]:
        """Yield the indices of the given cells, one behind the other, in parts."""
        return self._rows(self._indices, rows)

    def values(self, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int32]]:
        """Yield the values of the given cells likewise."""
        if self._values is None:
            raise ValueError("this file keeps no values")
        return self._rows(self._values, rows)

    def _rows(self, file: BufferedRandom, rows: NDArray[np.int64]) -> Iterator[NDArray[np.int32]]:
        """Yield the int32 entries of `rows` in parts."""
        size = self.lengths[rows]
        starts = (np.cumsum(self.lengths) - self.lengths)[rows]
        part = (np.cumsum(size) - size) // _CHUNK
        for first, last in _runs(np.flatnonzero(np.diff(part)) + 1, len(rows)):
            with self._reading:
                buffer = _read(file, starts[first:last], size[first:last])
            yield buffer


@dataclass(frozen=True, eq=False)
class UnsortedCells:
    """Cells in two row files: which row of each is which cell, and what is known of the cells."""

    rna: RowFile
    atac: RowFile
    rna_rows: NDArray[np.int64]
    atac_rows: NDArray[np.int64]
    obs: pd.DataFrame

    def take(self, cells: NDArray[np.int64]) -> UnsortedCells:
        """Return some of the cells, in the given order."""
        return UnsortedCells(
            self.rna, self.atac, self.rna_rows[cells], self.atac_rows[cells], self.obs.iloc[cells]
        )


def _read(file: BufferedRandom, starts: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return `size` int32 entries from each of `starts`; neighbours in the file are read in one go."""
    buffer = np.empty(int(size.sum()), np.int32)
    view, done = buffer.view(np.uint8).data, 0
    for low, high in _runs(np.flatnonzero(starts[1:] != starts[:-1] + size[:-1]) + 1, len(starts)):
        wanted = 4 * int(size[low:high].sum())
        file.seek(4 * int(starts[low]))
        if file.readinto(view[done : done + wanted]) != wanted:
            raise OSError("a temporary file is shorter than what was written to it")
        done += wanted
    return buffer


def _runs(breaks: NDArray[np.int64], n: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of the runs that `breaks` cut `n` items into."""
    edges = [0, *breaks.tolist(), n] if n else [0]
    return itertools.pairwise(edges)


def write_shard(
    path: Path, rna: RowFile, atac: RowFile, rna_rows: NDArray[np.int64], atac_rows: NDArray[np.int64]
) -> dict[str, int]:
    """Write cells to one `.pt` shard.

    Parameters
    ----------
    path
        The file to write, under its final name, which the format repeats inside.
    rna, atac
        The cells of both modalities.
    rna_rows, atac_rows
        Which cell of each file is the shard's first, second, …

    Returns
    -------
    ``n_cells, rna_nnz, atac_nnz``.
    """
    import torch

    rna_indptr, atac_indptr = _indptr(rna, rna_rows), _indptr(atac, atac_rows)
    rna_nnz, atac_nnz = int(rna_indptr[-1]), int(atac_indptr[-1])
    counts = torch.int16 if rna.max_value <= np.iinfo(np.int16).max else torch.int32
    narrow = np.int16 if counts == torch.int16 else np.int32
    tensors = {
        "rna_indptr": torch.empty(len(rna_indptr), dtype=torch.int64),
        "rna_indices": torch.empty(rna_nnz, dtype=torch.int32),
        "rna_values": torch.empty(rna_nnz, dtype=counts),
        "atac_indptr": torch.empty(len(atac_indptr), dtype=torch.int64),
        "atac_indices": torch.empty(atac_nnz, dtype=torch.int32),
        "atac_values": torch.empty(1, dtype=torch.uint8).expand(atac_nnz),  # all 1: one byte on disk
    }
    contents: list[Iterator[NDArray]] = [
        iter([rna_indptr]),
        rna.indices(rna_rows),
        (part.astype(narrow) for part in rna.values(rna_rows)),
        iter([atac_indptr]),
        atac.indices(atac_rows),
        iter([np.ones(1, np.uint8)]),
    ]
    write_tensors(path, tensors, contents)
    return {"n_cells": len(rna_rows), "rna_nnz": rna_nnz, "atac_nnz": atac_nnz}


def _indptr(rows_in: RowFile, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(rows_in.lengths[rows])]).astype(np.int64)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], contents: list[Iterator[NDArray]]) -> None:
    """Write what `torch.save(tensors, path)` writes, with the values streamed from `contents`.

    `torch` lays the file out and leaves room for the storages (`torch.serialization.skip_data`); the memory
    of the tensors is never touched, so that they may be larger than the machine's.

    Parameters
    ----------
    path
        The file to write.
    tensors
        Shapes and types; each with a storage of its own.
    contents
        The bytes of each storage, in the order of `tensors`, in parts.
    """
    import torch

    with torch.serialization.skip_data():
        torch.save(tensors, path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        directory = archive.start_dir
    place = {member.filename.partition("/")[2]: number for number, member in enumerate(members)}
    checksums = {}
    with open(path, "r+b") as file:
        for number, parts in enumerate(contents):
            member = members[place[f"data/{number}"]]
            file.seek(member.header_offset)
            name_len, extra_len = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            file.seek(name_len + extra_len, os.SEEK_CUR)
            written = checksum = 0
            for part in parts:
                written += file.write(part.data)
                checksum = zlib.crc32(part.data, checksum)
            if written != member.file_size:
                raise ValueError(f"{written} bytes for a storage of {member.file_size} in {path.name}")
            checksums[place[f"data/{number}"]] = checksum
        _write_checksums(file, members, directory, checksums)


def _write_checksums(
    file: BinaryIO, members: list[zipfile.ZipInfo], directory: int, checksums: dict[int, int]
) -> None:
    """Put CRC-32 checksums of members, by their number, where a zip archive has them.

    That is the local header, the descriptor behind the bytes where there is one, and the directory at the end.
    """
    entry = directory
    for number, member in enumerate(members):
        file.seek(entry)
        name_len, extra_len, comment_len = _DIRECTORY_ENTRY.unpack(file.read(_DIRECTORY_ENTRY.size))
        if number in checksums:
            crc = checksums[number].to_bytes(4, "little")
            places = [entry + 16, member.header_offset + 14]
            if member.flag_bits & 8:
                file.seek(member.header_offset)
                places.append(
                    member.header_offset
                    + 30
                    + sum(_LOCAL_HEADER.unpack(file.read(30)))
                    + member.file_size
                    + 4
                )
            for position in places:
                file.seek(position)
                file.write(crc)
        entry += _DIRECTORY_ENTRY.size + name_len + extra_len + comment_len
