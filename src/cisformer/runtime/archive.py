"""Packed models: a zip of known files with their checksums. Reading one trusts nothing in it and runs nothing.

Files are stored without compression: the same files give the same bytes, and a small zip cannot become a large
folder. Names outside the list are refused, so that nothing is written elsewhere and no pickle is read.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from cisformer.errors import CheckpointError
from cisformer.runtime.files import atomic_path, sha256_file

SUFFIX = ".zip"
CARD, README, LICENSE, SUMS = "card.json", "README.md", "LICENSE", "SHA256SUMS"
REQUIRED = (README, CARD, "checkpoint.json", "config.yaml", "model.safetensors")
OPTIONAL = (LICENSE, "reference/reference.json", "reference/genes.tsv.gz", "reference/ccres.bed.gz")
MOST_PACKED = 100
"""Maximum size of an unpacked table per byte of its gzip; tables of real genomes have 3 to 6."""
_BLOCK = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)


def is_archive(path: str | Path) -> bool:
    """Return whether `path` has the suffix of packed models."""
    return Path(path).suffix == SUFFIX


def write_archive(folder: Path, path: str | Path, *, force: bool = False) -> Path:
    """Put the files of a folder, and `SHA256SUMS` of them, into a zip, atomically; the same files, the same bytes."""
    names = [name for name in (*REQUIRED, *OPTIONAL) if (folder / name).is_file()]
    sums = "".join(f"{sha256_file(folder / name)}  {name}\n" for name in names)
    (folder / SUMS).write_text(sums, encoding="utf-8", newline="\n")
    with atomic_path(path, force=force) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in (*names, SUMS):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            entry.file_size = (folder / name).stat().st_size
            with open(folder / name, "rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, _BLOCK)
    return Path(path)


@contextlib.contextmanager
def unpacked(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder with the files of a packed model, each compared with its checksum.

    The folder is removed afterwards, unless the system keeps files that are still mapped into memory.

    Raises
    ------
    CheckpointError
        No such file, no zip, or one that holds anything but what `write_archive` puts there.
    """
    with tempfile.TemporaryDirectory(prefix="cisformer-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with _opened(path) as (archive, sums):
            for member, wanted in sums.items():
                _extract(archive, member, folder / member, wanted)
        yield folder


def read_card(path: str | Path) -> bytes:
    """Return the model card of a packed model, compared with its checksum; raises as `unpacked` does."""
    with _opened(path) as (archive, sums):
        content = archive.read(CARD)
        if hashlib.sha256(content).hexdigest() != sums[CARD]:
            raise ValueError(f"{CARD} does not match its checksum")
    return content


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, str]]]:
    """Open and check a zip; yield it with the checksum of each file. Raises `CheckpointError` as `unpacked` does."""
    if not Path(path).is_file():
        raise CheckpointError(f"model {path} does not exist", hint="check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_entries(archive, Path(path).stat().st_size)
            yield archive, _read_sums(archive)
    except (ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{path} is not a packed model, or damaged: {error}",
            hint="copy it again, or make it with `cisformer pack_model`",
        ) from None


def _check_entries(archive: zipfile.ZipFile, n_bytes: int) -> None:
    """Raise `ValueError` unless the entries are the files of a packed model, stored as they are."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    known = {*REQUIRED, *OPTIONAL, SUMS}
    for entry in entries:
        if entry.filename not in known:
            raise ValueError(f"it holds {entry.filename[:80]!r}, which no packed model has")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise ValueError(
                f"{entry.filename} is compressed or encrypted; wanted files stored as they are, uncompressed"
            )
    if len(names) > len(set(names)):
        raise ValueError("it holds a file twice")
    if missing := {*REQUIRED, SUMS}.difference(names):
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > n_bytes:
        raise ValueError("its list of files claims more bytes than the zip has")


def _read_sums(archive: zipfile.ZipFile) -> dict[str, str]:
    lines = [line.partition("  ") for line in archive.read(SUMS).decode().splitlines()]
    sums = {name: sha256 for sha256, _, name in lines}
    if set(sums) != set(archive.namelist()) - {SUMS}:
        raise ValueError(f"{SUMS} does not list its files")
    return sums


def _extract(archive: zipfile.ZipFile, member: str, target: Path, sha256: str) -> None:
    target.parent.mkdir(exist_ok=True)
    with archive.open(member) as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, _BLOCK)
    if sha256_file(target) != sha256:
        raise ValueError(f"{member} does not match its checksum")
    if member.endswith(".gz"):
        _refuse_bomb(target, member)


def _refuse_bomb(path: Path, member: str) -> None:
    """Raise `ValueError` if a gzip unpacks to far more bytes than a table of a reference can have."""
    left = MOST_PACKED * path.stat().st_size
    with gzip.open(path) as table:
        while block := table.read(_BLOCK):
            left -= len(block)
            if left < 0:
                raise ValueError(f"{member} holds more than {MOST_PACKED} times its size")
