"""Safe writes: a file or folder appears whole or not at all, and a full disk gives one clear error."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cisformer.errors import CisformerError, InputError, OutputExistsError, WriteError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_path(path: str | Path, *, force: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it onto `path`.

    A reader sees the old file or the whole new one, never a part. On any exception the temporary file is removed.
    The temporary name keeps the suffixes of `path`, since writers choose their format by them.

    Raises
    ------
    WriteError
        The disk is full or cannot be written to.
    OutputExistsError
        Without `force`, if `path` appeared in the meantime.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")
    try:
        with write_errors(path, temporary):
            yield temporary
            _flush(temporary)
            refuse_existing(path, force=force)
            os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success flush its files and rename it onto `path`.

    Raises
    ------
    OutputExistsError
        If `path` exists with content, now or at the end, and `force` is not given. Nothing has changed then.
    WriteError
        The disk is full or cannot be written to.
    """
    with atomic_folders([Path(path)], force=force) as (temporary,):
        yield temporary


@contextlib.contextmanager
def atomic_folders(paths: Sequence[Path], *, force: bool = False) -> Iterator[list[Path]]:
    """Yield a temporary folder beside each path; on success rename all of them, in this order.

    Raises as `atomic_folder` does.
    """
    for path in paths:
        refuse_existing(path, force=force)
        make_folder(path.parent)
    new = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in paths}
    try:
        together = paths[0] if len(paths) == 1 else paths[0].parent
        with write_errors(together, paths[0].parent):
            for temporary in new.values():
                temporary.mkdir()
            yield list(new.values())
            for temporary in new.values():
                _flush_folder(temporary)
        for path, temporary in new.items():
            with write_errors(path, temporary):
                _place_folder(temporary, path, force=force)
    finally:
        for temporary in new.values():
            _remove(temporary)


def _place_folder(new: Path, path: Path, *, force: bool) -> None:
    """Rename `new` onto `path`; with `force`, the folder that was there moves to `new`.

    A kill between the two renames leaves the old folder under a hidden name that ends in `.old`.
    """
    if not path.exists():
        os.replace(new, path)
        return
    if not force:
        with contextlib.suppress(OSError):  # an empty folder makes way, one that another run filled does not
            path.rmdir()
        refuse_existing(path, force=False)
        os.rename(new, path)
        return
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    os.replace(old, new)


def _remove(path: Path) -> None:
    """Remove a file or folder as far as possible; errors are ignored, so that an earlier one is reported."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(
            f"cannot make the output folder {folder}: {error.strerror}",
            hint="choose a folder you may write to",
        ) from error


_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "it would be larger than files may be here",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
}


_TORCH_CANNOT_WRITE = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos")
"""What `torch.save` raises if writing fails; it does not give the reason."""


@contextlib.contextmanager
def write_errors(path: Path, temporary: Path) -> Iterator[None]:
    """Turn any error of a full or read-only disk into one `WriteError` that names `path`."""
    try:
        yield
    except Exception as error:
        reason = _disk_reason(error, temporary)
        if reason is None or (isinstance(error, CisformerError) and not isinstance(error, WriteError)):
            raise
        raise WriteError(
            f"cannot write {path}: {reason}; nothing was changed there",
            hint="free disk space, or choose another folder, and run the command again",
        ) from error


def _disk_reason(error: BaseException | None, temporary: Path) -> str | None:
    """Return the disk's reason from an error or one of its causes; some libraries give it in their text only."""
    while error is not None:
        text = str(error)
        told = re.search(r"errno = (\d+)|os error (\d+)", text)
        number = getattr(error, "errno", None) or (int(told[1] or told[2]) if told else None)
        if number is None and _TORCH_CANNOT_WRITE.search(text):
            number = errno.ENOSPC
        denied = number in (errno.EACCES, errno.EPERM)
        if number in _DISK and (not denied or str(temporary) in text):
            return _DISK[number]
        error = error.__cause__ or error.__context__
    return None


def _flush_folder(folder: Path) -> None:
    """Force what was written to the files of a folder onto the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            _flush(file)


def _flush(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def refuse_existing(path: str | Path, *, force: bool) -> None:
    """Raise `OutputExistsError` if `path` is a file, or a folder with something in it, unless `force`."""
    path = Path(path)
    occupied = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if occupied and not force:
        raise OutputExistsError(
            f"{path} exists already", hint="choose another output, or overwrite it with --force"
        )


def refuse_file_name(folder: str | Path) -> None:
    """Raise `InputError` if the name of an output folder is a file, or ends like one."""
    if Path(folder).is_file() or re.search(r"\.(?:tsv|csv|txt|json|html)(?:\.gz)?$", str(folder)):
        raise InputError(f"{folder} is the name of a file", hint="give a folder; several files go into it")


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a file that holds one JSON object; `ValueError` where it holds anything else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, wanted an object")
    return content
