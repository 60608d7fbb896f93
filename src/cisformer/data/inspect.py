"""Describe files before any work is done with them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cisformer.config import Modality
from cisformer.data.alignment import are_genes, describe_genes, map_genes, map_peaks
from cisformer.data.containers import is_cells_folder, is_fragments_file
from cisformer.data.features import gene_identity, peak_regions
from cisformer.data.fragments import first_fragments
from cisformer.data.genome import CCRE_COLUMNS, parse_regions
from cisformer.data.hdf5 import open_hdf5
from cisformer.data.known_genomes import GENOMES, coverage, guess_genome
from cisformer.data.reference import BUILT_IN, Reference, load_reference
from cisformer.data.sources import Source, open_rows
from cisformer.data.store import CellStore
from cisformer.data.tables import FEATURE_TYPE_COLUMNS
from cisformer.errors import CheckpointError, InputError
from cisformer.runtime.archive import is_archive, read_card, unpacked
from cisformer.runtime.files import read_json, sha256_file

OWN_MANIFESTS = {
    "manifest.json": "preprocessed cells",
    "checkpoint.json": "checkpoint",
    "reference.json": "reference",
}
"""Files that tell what a folder of ours is."""

CHECKPOINT_SUMS = {"model.safetensors": "sha256", "config.yaml": "config_sha256"}
"""Files of a checkpoint, and under which key its `checkpoint.json` has their checksums."""

OWN_SUFFIXES = (".pt", ".json", ".yaml", ".safetensors")
OWN_KEYS = (
    "direction",
    "split",
    "n_cells",
    "format_version",
    "metrics",
    "datapreprocess",
    "seed",
    "split_by",
)

CARD_KEYS = (
    "format_version",
    "direction",
    "architecture",
    "license",
    "data",
    "n_training_cells",
    "n_validation_cells",
    "n_inputs_seen",
    "n_targets_seen",
    "validation_loss",
    "matrices",
)
"""What of a model card is shown as it is."""

_SAMPLE_CELLS = 500

Record = dict[str, Any]


def inspect(
    paths: str | Path | Sequence[str | Path], *, reference: str | Path | None = None, verify: bool = False
) -> dict[str, list[Record]]:
    """Describe files.

    Parameters
    ----------
    paths
        A file, or several: files of cells as `open_rows` reads them, fragments, data sets, checkpoints, packed models
        and references of cisformer, or a folder of such.
    reference
        Reference in which genes and peaks are counted; by default the built-in one that fits the genome.
    verify
        Compare the files of data sets, checkpoints and references with their checksums.

    Returns
    -------
    dict of str to list of dict
        ``files``: one record per file and modality, or per data set, checkpoint or reference;
        ``shared_barcodes``: one record per pair of RNA and ATAC. All of plain types, as JSON has them.

    Raises
    ------
    InputError, StoreError, CheckpointError
        If a file is missing, damaged, or of none of these kinds.
    """
    records: list[Record] = []
    barcodes: dict[tuple[str, Modality], set[str]] = {}
    wanted = None if reference is None else load_reference(reference)
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if is_archive(path):
            records.append(_describe_packed(path, verify))
            continue
        own = _own_folders(path)
        records += [_describe_own(folder, name, verify) for folder, name in own]
        if own:
            continue
        if is_fragments_file(path):
            records.append(_describe_fragments(path))
            continue
        for source in _modalities(path):
            records.append(_describe_source(source, wanted) | _written_by_us(path))
            barcodes[source.label, source.modality] = set(source.obs.index)
    return {"files": records, "shared_barcodes": list(_shared(barcodes))}


def _own_folders(path: Path) -> list[tuple[Path, str]]:
    """Return each data set, checkpoint or reference that `path` is, is in, or holds, and its manifest."""
    if is_cells_folder(path) or not (path.is_dir() or (path.is_file() and path.suffix in OWN_SUFFIXES)):
        return []
    folder = path if path.is_dir() else path.parent
    own = next(((path, name) for name in OWN_MANIFESTS if (folder / name).is_file()), None)
    if own is not None or path.is_file():
        return [own] if own else []
    inside = [
        (child, name)
        for child in sorted(path.iterdir())
        if not child.name.startswith(".")  # what a killed command left
        for name in OWN_MANIFESTS
        if (child / name).is_file()
    ]
    if not inside:
        raise InputError(
            f"{path} is a folder without {', '.join(OWN_MANIFESTS.values())}",
            hint="give a file, or one of these folders; `cisformer browse` shows links",
        )
    return inside


def _describe_packed(path: Path, verify: bool) -> Record:
    """Return the card of a packed model."""
    try:
        card = json.loads(read_card(path))
        reference, version = card["reference"], card["provenance"]["version"]
        record: Record = {"path": str(path), "kind": "packed model"}
        record |= {key: card[key] for key in CARD_KEYS} | {"package_version": version}
        record |= {"reference": reference["name"]} | {
            key: reference[key] for key in ("genome", "n_genes", "n_ccres", "fingerprint")
        }
        scores = card["scores"]
        if scores:
            record |= {"verdict": scores["verdict"], "test_cells": scores["test_cells"]}
            record["scores"] = {name: values["model"] for name, values in scores["values"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the card in {path} is damaged: {error!r}", hint="copy it again") from None
    if verify:
        with unpacked(path) as folder:
            _verify(folder, folder, "checkpoint.json", read_json(folder / "checkpoint.json"))
        record["checksums"] = "agree"
    return record


def _describe_own(path: Path, name: str, verify: bool) -> Record:
    folder = path if path.is_dir() else path.parent
    try:
        manifest = read_json(folder / name)
        reference = manifest.get("reference", manifest)
        record: Record = {"path": str(path), "kind": OWN_MANIFESTS[name]}
        record |= {key: manifest[key] for key in OWN_KEYS if manifest.get(key) is not None}
        record["package_version"] = manifest.get("provenance", {}).get(
            "version", manifest.get("package_version")
        )
        record["reference"] = reference["name"]
        record |= {key: reference[key] for key in ("genome", "n_genes", "n_ccres", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / name} is damaged: {error}", hint="make it again") from error
    if name == "manifest.json":
        store = CellStore.open(path)
        record |= {"n_cells": store.n_cells, "n_shards": len(manifest["shards"])}
    if verify:
        _verify(path, folder, name, manifest)
        record["checksums"] = "agree"
    if (folder / "config.yaml").is_file():
        record["config"] = (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    return record


def _verify(path: Path, folder: Path, name: str, manifest: dict[str, Any]) -> None:
    """Compare the files of a folder of ours with what was noted when they were written."""
    if name == "manifest.json":
        CellStore.open(path).verify()
    for file, key in CHECKPOINT_SUMS.items() if name == "checkpoint.json" else ():
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing", hint="copy the folder again")
        if manifest.get(key, "") not in ("", sha256_file(folder / file)):
            raise InputError(
                f"{folder / file} is damaged: its checksum differs from that in {name}",
                hint="copy the folder again",
            )
    own = folder if name == "reference.json" else folder / "reference"
    if own.is_dir():
        load_reference(own)  # which compares its fingerprint


def _modalities(path: Path) -> Iterator[Source]:
    """Yield each modality that a file holds; the last error where it holds none."""
    error: InputError | None = None
    found = 0
    modalities: tuple[Modality, Modality] = ("rna", "atac")
    for modality in modalities:
        try:
            with open_rows(path, modality, strict=False) as source:
                if _holds(source):
                    found += 1
                    yield source
        except InputError as problem:
            error = problem
    if not found and error is not None:
        raise error


def _holds(source: Source) -> bool:
    """Tell whether the features are of the modality that they were opened as."""
    var = source.var
    if source.kind == "h5mu" or any(name in var for name in FEATURE_TYPE_COLUMNS):
        return True
    try:
        parse_regions(var.index[:10])
        looks: Modality = "atac"
    except InputError:
        in_columns = "interval" in var or set(CCRE_COLUMNS) <= set(var.columns)
        genes = any(are_genes(var, load_reference(name)) for name in BUILT_IN)
        looks = "atac" if in_columns and not genes else "rna"
    return source.modality == looks


def _describe_source(source: Source, wanted: Reference | None) -> Record:
    """Describe one modality; values are looked at in the first 500 cells."""
    n_looked = min(source.n_cells, _SAMPLE_CELLS)
    sample = source.read(0, n_looked)
    stored = np.diff(sample.indptr)
    species, genome, named_by = _guess(source)
    reference = wanted or load_reference(species or "human")
    find = map_genes if source.modality == "rna" else map_peaks
    found = find(source.var, reference)
    return {
        "path": source.label,
        "kind": source.kind,
        "modality": source.modality,
        "n_cells": source.n_cells,
        "n_features": len(source.var),
        "named_by": named_by,
        "species": species,
        "genome": genome,
        "matrix": source.slot,
        "layout": source.layout,
        "values": source.holds,
        "features_per_cell": float(np.median(stored)),
        "share_nonzero": round(float(stored.mean()) / len(source.var), 6),
        "reference": reference.name,
        "n_found": found.n_found,
        "share_found": round(found.share_found, 4),
        "barcodes": source.obs.index[:3].tolist(),
        "obs": source.obs.columns.astype(str).tolist(),
    }


def _describe_fragments(path: Path) -> Record:
    """Describe a fragments file by its first fragments: reading all of one takes minutes."""
    sample = first_fragments(path)
    insertions = sample[CCRE_COLUMNS].assign(end=sample["start"] + 1)
    genome = guess_genome(insertions)
    species = GENOMES.get(genome, "")
    record = {
        "path": str(path),
        "kind": "fragments",
        "modality": "atac",
        "n_looked_at": len(sample),
        "species": species,
        "genome": genome,
        "values": "fragments",
        "barcodes": sample["barcode"].unique()[:3].tolist(),
    }
    if species:
        share, _ = coverage(insertions, load_reference(species).ccres)
        record |= {"reference": species, "share_found": round(share, 4)}
    return record


def _guess(source: Source) -> tuple[str, str, str]:
    """Return species, genome and naming; the species of peaks is that of the genome they fit."""
    if source.modality == "rna":
        named_by, species = describe_genes(gene_identity(source.var)["gene_id"])
        return species, "", named_by
    genome = guess_genome(peak_regions(source.var))
    return GENOMES.get(genome, ""), genome, "regions"


def _written_by_us(path: Path) -> Record:
    """Return what an h5ad that cisformer wrote says of itself."""
    import h5py
    from anndata.io import read_elem

    if path.is_dir() or not h5py.is_hdf5(path):
        return {}
    with open_hdf5(path) as (file, _):
        if "uns" not in file or "cisformer" not in file["uns"]:
            return {}
        return {"written_by_cisformer": json.loads(json.dumps(read_elem(file["uns/cisformer"]), default=str))}


def _shared(barcodes: dict[tuple[str, Modality], set[str]]) -> Iterator[Record]:
    for (first, mine), (second, other) in itertools.combinations(barcodes, 2):
        if {mine, other} == {"rna", "atac"}:
            n_shared = len(barcodes[first, mine] & barcodes[second, other])
            yield {mine: first, other: second, "n_shared": n_shared}


def as_text(report: dict[str, list[Record]]) -> str:
    """Return the answer of `inspect` for people: a paragraph per record."""
    lines: list[str] = []
    for record in report["files"]:
        lines.append(record["path"])
        lines += [f"  {key.replace('_', ' '):<18} {_text(key, entry)}" for key, entry in _shown(record)]
    for pair in report["shared_barcodes"]:
        lines.append(f"{pair['n_shared']:,} barcodes shared by {pair['rna']} (RNA) and {pair['atac']} (ATAC)")
    return "\n".join(lines)


def _shown(record: Record) -> Iterator[tuple[str, Any]]:
    for key, entry in record.items():
        if key == "genome" and not entry and record.get("modality") == "atac":
            entry = f"none of {', '.join(GENOMES)}"
        if key != "path" and entry not in ("", None, []):
            yield key, entry


def _text(key: str, value: Any) -> str:
    if key.startswith("share_"):
        return f"{value:.1%}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).strip().replace("\n", "\n" + " " * 21)
