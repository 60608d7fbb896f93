"""Open HDF5 files of users: what they are, whether they are whole, and whether they change while they are read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cisformer.errors import InputError

if TYPE_CHECKING:
    import h5py

_SMALL_BYTES = 1 << 26
_NOT_READ = {"obsm", "varm", "obsp", "varp", "uns"}
_MOST_PACKED = 20_000
"""What a compressed table may hold per byte of the file; gzip reaches 1,032, zstd more."""


@contextlib.contextmanager
def open_hdf5(path: str | Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Open an HDF5 file for reading.

    Yields
    ------
    The file, and a function that raises where it was written to since; which is looked at once more in the end.

    Raises
    ------
    InputError
        If the file is missing, damaged, something else, or changes.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} does not exist; wanted an .h5ad, .h5mu or 10x .h5 file", hint="check the path"
        )
    if not h5py.is_hdf5(path):
        raise InputError(
            f"{path} is not an HDF5 file; wanted .h5ad, .h5mu or 10x .h5",
            hint="convert it, for instance scanpy.read(…).write_h5ad(…)",
        )
    check = partial(_refuse_changed, path, path.stat())
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise damaged(str(path), error) from error
    with file:
        yield file, check
    check()


def _refuse_changed(path: Path, before: os.stat_result) -> None:
    """Raise `InputError` where the file at `path` is no longer what it was.

    A new file of that name does no harm, the old one was read to its end; a change within it does.
    """
    after = path.stat() if path.exists() else before
    if after.st_ino == before.st_ino and _state(after) != _state(before):
        raise InputError(f"{path} changed while it was read", hint="run the command again when it is whole")


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_mtime_ns, found.st_size


def kind_of(file: h5py.File, label: str) -> Literal["h5ad", "h5mu", "10x h5"]:
    """Tell what an HDF5 file is by its content."""
    if "mod" in file:
        return "h5mu"
    if "obs" in file and "var" in file:
        return "h5ad"
    if "matrix" in file and "barcodes" in file["matrix"]:
        return "10x h5"
    raise InputError(
        f"{label} is HDF5, but not h5ad, h5mu or 10x h5: it holds {', '.join(list(file)[:5]) or 'nothing'}",
        hint="give an AnnData or MuData file, or 10x filtered_feature_bc_matrix.h5 of Cell Ranger 3 or later",
    )


def check_claims(file: h5py.File, label: str) -> None:
    """Raise `InputError` where a table claims to hold far more than the file can: it would be read into memory."""
    import h5py

    def claim(name: str, node: h5py.Group | h5py.Dataset) -> None:
        if not isinstance(node, h5py.Dataset) or node.shape is None or node.nbytes <= _SMALL_BYTES:
            return
        if node.is_virtual or node.external or not _NOT_READ.isdisjoint(name.split("/")):
            return
        if node.nbytes > _MOST_PACKED * node.id.get_storage_size():
            raise InputError(
                f"{label} is damaged: {name} claims {node.nbytes:,} bytes, of which the file holds "
                f"{node.id.get_storage_size():,}",
                hint="copy or make the file again",
            )

    file.visititems(claim)


def damaged(label: str, error: Exception | str) -> InputError:
    """Return the error that says that a file is cut short or damaged, and by what that was found."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"{label} is cut short or damaged: {reason}", hint="copy or make the file again")
