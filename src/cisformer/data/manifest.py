"""Read and check the `manifest.json` of a split folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from cisformer.config import Direction
from cisformer.data.reference import Reference
from cisformer.errors import StoreError, brief, first_complaint
from cisformer.runtime.files import read_json

FORMAT = "cisformer-cells"
FORMAT_VERSION = 1
MANIFEST, BARCODES, CELL_INFO = "manifest.json", "barcodes.txt", "cell_info.tsv"


class _ShardRecord(BaseModel):
    """A shard in a manifest. Its name is one that we give, so that it cannot lead out of the folder."""

    file: Annotated[str, Field(pattern=r"^(atac2rna|rna2atac)_[0-9]+\.pt$")]
    n_cells: NonNegativeInt
    rna_nnz: NonNegativeInt
    atac_nnz: NonNegativeInt
    bytes: NonNegativeInt
    sha256: str


class _OwnRecord(BaseModel):
    """A reference that stands in the folder itself."""

    name: str
    built_in: Literal[False]
    n_genes: PositiveInt
    n_ccres: PositiveInt
    fingerprint: str


class _BuiltInRecord(_OwnRecord):
    """A reference of the package: its name is looked up, and leads nowhere else."""

    name: Literal["human", "mouse"]
    built_in: Literal[True]  # type: ignore[assignment]


class _Manifest(BaseModel):
    """What is relied on in a `manifest.json`; it holds more."""

    model_config = ConfigDict(strict=True)

    direction: Direction
    n_cells: NonNegativeInt
    reference: _BuiltInRecord | _OwnRecord
    shards: list[_ShardRecord]
    files: dict[Literal["barcodes.txt", "cell_info.tsv"], str] = {}
    text_columns: list[str] = []


def read_manifest(path: Path, folder: Path) -> dict[str, Any]:
    """Return the manifest of `folder`, checked; `path` is what the user gave.

    Raises
    ------
    StoreError
        If there is none, or it is damaged or of a later format.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except OSError as error:
        splits = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
        raise StoreError(
            f"{path} is not a data set made by `cisformer data_preprocess`: no {MANIFEST} in {folder}",
            hint=f"give one of its folders: {', '.join(splits)}" if splits else "run data_preprocess first",
        ) from error
    except ValueError as error:
        raise StoreError(f"{folder / MANIFEST} is damaged: {error}", hint="preprocess again") from error
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"{folder / MANIFEST} does not describe preprocessed cells", hint="give another folder"
        )
    version = manifest.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(
            f"{folder} has format version {brief(version)}; wanted {FORMAT_VERSION} or lower",
            hint="upgrade cisformer",
        )
    _check_manifest(manifest, folder)
    return manifest


def _check_manifest(manifest: dict[str, Any], folder: Path) -> None:
    """Raise `StoreError` naming the first entry of a manifest that is not as it has to be."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        raise StoreError(
            f"{folder / MANIFEST} is damaged: {first_complaint(error)}",
            hint="restore it, or preprocess the data again",
        ) from None
    if sum(shard["n_cells"] for shard in manifest["shards"]) != manifest["n_cells"]:
        raise StoreError(
            f"{folder / MANIFEST} is damaged: its shards do not hold {manifest['n_cells']:,} cells",
            hint="restore it, or preprocess the data again",
        )


def new_manifest(
    direction: Direction, reference: Reference, shards: list[dict[str, Any]], files: dict[str, str]
) -> dict[str, Any]:
    """Return the manifest of a split.

    Parameters
    ----------
    direction, reference
        What the cells were preprocessed for, and what they are counted in.
    shards
        ``file, n_cells, rna_nnz, atac_nnz, bytes, sha256`` of each shard.
    files
        Checksums of the other files.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "direction": direction,
        "n_cells": sum(shard["n_cells"] for shard in shards),
        "reference": {
            "name": reference.name,
            "genome": reference.genome,
            "built_in": reference.is_built_in,
            "n_genes": reference.n_genes,
            "n_ccres": reference.n_ccres,
            "fingerprint": reference.fingerprint,
        },
        "shards": shards,
        "files": files,
    }
