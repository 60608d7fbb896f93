"""Open HDF5 files: find their kind, whether they are complete, and whether they change during reading."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cisformer.errors import CisformerError, InputError

if TYPE_CHECKING:
    import h5py

_SMALL_BYTES = 1 << 26
_NOT_READ = {"obsm", "varm", "obsp", "varp", "uns"}
_LOCKED = {errno.EAGAIN, errno.EWOULDBLOCK}
_OTHER_HDF5 = (
    ({"assays", "cell.names"}, "a SeuratDisk file", 'in R: SeuratDisk::Convert("{path}", dest = "h5ad")'),
    (
        {"Class", "Metadata"},
        "an ArchR Arrow file",
        "give the fragments.tsv.gz that it was made from, or the peak matrix of the project; in R: "
        'm <- ArchR::getMatrixFromProject(proj, "PeakMatrix")',
    ),
    (
        {"anndatas"},
        "a SnapATAC2 data set of several files",
        'in Python: snapatac2.read_dataset("{path}").to_adata().write_h5ad("atac.h5ad")',
    ),
    (
        {"assays", "colData"},
        "an HDF5 SummarizedExperiment",
        'in R: zellkonverter::writeH5AD(x, "cells.h5ad")',
    ),
)
"""HDF5 files that are not read: what they hold, what they are, and what converts them."""
_MOST_PACKED = 20_000
"""What a compressed table may hold per byte of the file; gzip reaches 1,032, zstd more."""


@contextlib.contextmanager
def open_hdf5(path: str | Path, label: str = "") -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Open an HDF5 file for reading.

    Parameters
    ----------
    path
        The file.
    label
        What to call it in messages, where that is not its path.

    Yields
    ------
    The file, and a function that raises where it was written to since; which is looked at once more in the end.

    Raises
    ------
    InputError
        If the file is missing, damaged, something else, open elsewhere, or changes.
    """
    import h5py

    with contextlib.suppress(ImportError):  # registers filters: zstd, blosc
        import hdf5plugin  # noqa: F401

    path, label = Path(path), label or str(path)
    if not path.is_file():
        raise InputError(
            f"{label} does not exist; wanted an .h5ad, .h5mu or 10x .h5 file", hint="check the path"
        )
    check = partial(_refuse_changed, path, path.stat())
    try:
        if not h5py.is_hdf5(path):
            raise InputError(
                f"{label} is not an HDF5 file; wanted .h5ad, .h5mu or 10x .h5",
                hint="convert it, for instance scanpy.read(…).write_h5ad(…)",
            )
        file = h5py.File(path, "r")
    except OSError as error:
        if error.errno in _LOCKED or "unable to lock file" in str(error):
            raise InputError(
                f"{label} is open for writing in another program, such as a notebook that holds it in backed mode",
                hint="close it there (adata.file.close()), and run the command again",
            ) from error
        raise damaged(label, error) from error
    with file:
        yield file, check
    check()


def open_zarr(folder: Path) -> Any:
    """Open an AnnData or MuData in zarr form for reading; a group that is used as one of HDF5 is.

    Raises
    ------
    InputError
        If zarr is not installed, or the folder is damaged.
    """
    try:
        import zarr
    except ImportError as error:
        raise InputError(
            f"reading {folder} needs zarr, which is not installed", hint='pip install "cisformer-links[io]"'
        ) from error
    with told_as_damage(str(folder)):
        return zarr.open_group(str(folder), mode="r")


def _refuse_changed(path: Path, before: os.stat_result) -> None:
    """Raise `InputError` where the file at `path` is no longer what it was.

    A new file of that name does no harm, the old one was read to its end; a change within it does.
    """
    after = path.stat() if path.exists() else before
    if after.st_ino == before.st_ino and _state(after) != _state(before):
        raise InputError(
            f"{path} changed while it was read", hint="run the command again when the file is complete"
        )


def _state(found: os.stat_result) -> tuple[int, int]:
    return found.st_mtime_ns, found.st_size


def kind_of(file: h5py.File, label: str) -> Literal["h5ad", "h5mu", "10x h5", "loom"]:
    """Tell what an HDF5 file is by its content."""
    if "mod" in file:
        return "h5mu"
    if "obs" in file and "var" in file:
        return "h5ad"
    if "matrix" in file and "row_attrs" in file and "col_attrs" in file:
        return "loom"
    if any(
        not hasattr(file[name], "shape") and "barcodes" in file[name] and "indptr" in file[name]
        for name in file
    ):
        return "10x h5"
    for names, what, how in _OTHER_HDF5:
        if names <= set(file):
            raise InputError(
                f"{label} is {what}; wanted .h5ad, .h5mu, .loom or 10x .h5", hint=how.replace("{path}", label)
            )
    raise InputError(
        f"{label} is HDF5, but not h5ad, h5mu, loom or 10x h5: it holds {', '.join(list(file)[:5]) or 'nothing'}",
        hint="give an AnnData or MuData file, or filtered_feature_bc_matrix.h5 of Cell Ranger",
    )


def check_claims(file: Any, label: str) -> None:
    """Check the sizes that all tables state before they are read.

    Raises
    ------
    InputError
        Where one claims to hold far more than the file can: it would be read into memory; or where one is compressed
        in a way that needs a library.
    """
    import h5py

    def look(name: str, node: h5py.Group | h5py.Dataset) -> None:
        if not isinstance(node, h5py.Dataset) or not _NOT_READ.isdisjoint(name.split("/")):
            return
        _require_filters(name, node, label)
        if node.shape is None or node.nbytes <= _SMALL_BYTES or node.is_virtual or node.external:
            return
        if node.nbytes > _MOST_PACKED * node.id.get_storage_size():
            raise InputError(
                f"{label} is damaged: {name} claims {node.nbytes:,} bytes, of which the file holds "
                f"{node.id.get_storage_size():,}",
                hint="copy or make the file again",
            )

    if isinstance(file, h5py.Group):
        file.visititems(look)


def _require_filters(name: str, node: h5py.Dataset, label: str) -> None:
    """Raise `InputError` where a table is compressed by a filter that is not there, such as zstd."""
    import h5py

    made = node.id.get_create_plist()
    for number in range(made.get_nfilters()):
        code, _, _, called = made.get_filter(number)
        if not h5py.h5z.filter_avail(code):
            called = called.decode(errors="replace") or f"filter {code}"
            raise InputError(
                f"{label} is compressed with {called} ({name}), which needs hdf5plugin; that is not installed",
                hint='pip install "cisformer-links[io]"',
            )


@contextlib.contextmanager
def told_as_damage(label: str, wanted: str = "") -> Iterator[None]:
    """Report any error during reading as damage to the file.

    h5py, anndata, zarr and pandas raise whatever they come upon in a damaged file. Errors of ours, of memory and of
    an installation (a library that cannot be imported) are none of the file's and pass through.

    Parameters
    ----------
    label
        What to call the file.
    wanted
        Hint in place of "copy or make the file again".

    Raises
    ------
    InputError
    """
    try:
        yield
    except (CisformerError, MemoryError, ImportError):
        raise
    except Exception as error:
        told = damaged(label, error)
        raise InputError(told.message, hint=wanted or told.hint) from error


def damaged(label: str, error: Exception | str) -> InputError:
    """Return the error that says that a file is cut short or damaged, and by what that was found."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(f"{label} is cut short or damaged: {reason}", hint="copy or make the file again")
