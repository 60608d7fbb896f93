"""What every command needs from the machine: safe writes, progress, provenance, threads and seeds."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cisformer.errors import InputError, OutputExistsError

logger = logging.getLogger(__name__)
T = TypeVar("T")
LOG_EVERY_S = 10.0


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it onto `path`.

    A reader sees the old file or the whole new one, never a part. On any exception the temporary file is removed.
    The temporary name keeps the suffixes of `path`, since writers choose their format by them.
    """
    path = Path(path)
    _make_folder(path.parent)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success flush its files and rename it onto `path`.

    Raises
    ------
    OutputExistsError
        If `path` exists with content and `force` is not given. Nothing has been written then.
    """
    path = Path(path)
    refuse_existing(path, force=force)
    _make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        _swap_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap_folder(new: Path, path: Path) -> None:
    """Rename `new` onto `path`, moving an existing folder aside first so that it can be put back."""
    if not path.exists():
        os.replace(new, path)
        return
    old = path.with_name(f".{path.name}.old{os.getpid()}")
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make the output folder {folder}: {error.strerror}",
            hint="choose a folder you may write to",
        ) from error


def _flush(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def best_device() -> str:
    """Return where to compute unless told otherwise: an NVIDIA GPU where there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def refuse_existing(path: str | Path, *, force: bool) -> None:
    """Raise `OutputExistsError` if `path` is a file, or a folder with something in it, unless `force`."""
    path = Path(path)
    occupied = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if occupied and not force:
        raise OutputExistsError(
            f"{path} exists already", hint="choose another output, or overwrite it with --force"
        )


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def package_version() -> str:
    """Return the version of the installed package."""
    from cisformer import __version__

    return __version__


def provenance(**extra: Any) -> dict[str, Any]:
    """Return what every file we write carries: package, version, time, command, and `extra`."""
    return {
        "package": "cisformer",
        "version": package_version(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **extra,
    }


def progress(
    items: Iterable[T],
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "it",
    size: Callable[[T], int] = lambda item: 1,
) -> Iterator[T]:
    """Yield `items`, showing progress: a bar in a terminal or notebook, elsewhere a log line per 10 %.

    Lines come at least `LOG_EVERY_S` apart, so that what is soon over says nothing. `total` counts in `unit`;
    `size` says how many of them an item is.
    """
    total = total if total is not None else _length(items)
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=desc, unit=unit, leave=False) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    yield from _logged(items, total, desc, unit, size)


def _length(items: Iterable[Any]) -> int | None:
    try:
        return len(items)  # type: ignore[arg-type]
    except TypeError:
        return None


def _logged(
    items: Iterable[T], total: int | None, desc: str, unit: str, size: Callable[[T], int]
) -> Iterator[T]:
    tenths = done = 0
    start = said = time.monotonic()
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if total and done * 10 // total > tenths and now - said >= LOG_EVERY_S:
            tenths, said = done * 10 // total, now
            rate = done / (now - start)
            left = (total - done) / rate
            logger.info("%s: %d of %d %s, %.3g a second, %.0f s left", desc, done, total, unit, rate, left)
