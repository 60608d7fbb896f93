"""The record in a checkpoint's folder, `checkpoint.json`: read and checked, and the files that it vouches for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from cisformer.config import Direction
from cisformer.errors import CheckpointError, brief, first_complaint
from cisformer.runtime.files import read_json, sha256_file

FORMAT = "cisformer-checkpoint"
FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"


def folder_of(path: Path) -> Path:
    """Return the checkpoint's folder that a user's path means."""
    folder = path if path.is_dir() else path.parent
    if not (folder / MANIFEST).is_file() and (folder / "best" / MANIFEST).is_file():
        folder = folder / "best"
    if not path.exists():
        raise CheckpointError(
            f"checkpoint {path} does not exist", hint="give -m the folder that training printed"
        )
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} is not a cisformer checkpoint: {MANIFEST} is not in {folder}",
            hint="give -m the folder that training printed, such as save/<date>_<name>/best",
        )
    return folder


class _ReferenceRecord(BaseModel):
    """The reference in a `checkpoint.json`."""

    name: str
    fingerprint: str


class _Manifest(BaseModel):
    """What is relied on in a `checkpoint.json`; it holds more."""

    model_config = ConfigDict(strict=True)

    direction: Direction
    reference: _ReferenceRecord
    sha256: str
    config_sha256: str = ""
    linear_rank: NonNegativeInt
    metrics: dict[str, Any]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a `checkpoint.json`, checked."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError) as error:
        raise damaged(folder / MANIFEST, str(error)) from None
    found = manifest.get("format"), manifest.get("format_version")
    if found[0] != FORMAT or not isinstance(found[1], int) or found[1] > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} is of format {brief(found[0])} {brief(found[1])}, this version reads {FORMAT} "
            f"{FORMAT_VERSION}",
            hint="update cisformer",
        )
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise damaged(folder / MANIFEST, first_complaint(error)) from None
    return manifest


def damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}", hint="copy the checkpoint again")


def check_sum(path: Path, sha256: str | None) -> None:
    """Raise `CheckpointError` unless a file has its checksum; early versions noted none of the configuration."""
    try:
        found = sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="copy the checkpoint again") from None
    if sha256 and found != sha256:
        raise CheckpointError(f"{path} does not match its checksum", hint="copy the checkpoint again")
