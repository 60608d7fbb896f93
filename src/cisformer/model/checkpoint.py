"""Checkpoints: a folder with weights, configuration, features, reference and metrics.

    model.safetensors   weights, and the reference rows of known features
    config.yaml         the resolved configuration
    checkpoint.json     format, version, direction, reference, sizes, metrics, sha256 of weights and configuration
    reference/          the reference, where it is not a built-in one

`pack_model` puts such a folder into one zip, which is read like the folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cisformer.config import Config, Direction, dump_config, load_config
from cisformer.data.batches import Layout
from cisformer.data.reference import BUILT_IN, Reference, load_reference, save_reference
from cisformer.errors import CheckpointError, CisformerError, ReferenceMismatchError
from cisformer.model.checkpoint_manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    check_sum,
    folder_of,
    read_manifest,
)
from cisformer.model.cis import CisModel
from cisformer.model.documented import export_published, load_published
from cisformer.model.documented_task import FullTask
from cisformer.model.weights import WEIGHTS, load_weights
from cisformer.runtime.archive import is_archive, unpacked
from cisformer.runtime.files import atomic_folder, sha256_file
from cisformer.runtime.provenance import occasion, provenance

CONFIG, REFERENCE = "config.yaml", "reference"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model with everything that is needed to use it.

    Attributes
    ----------
    model
        The module, in eval mode.
    config, direction, reference
        What it was trained with.
    metrics
        Validation losses: of this epoch (`val_loss`), of the linear start and of the mean profile.
    folder
        Where it was loaded from or saved to, or the zip that it was loaded from; `None` for one that was never on disk.
    """

    model: CisModel | FullTask
    config: Config
    reference: Reference
    metrics: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def __repr__(self) -> str:
        """One line: what it predicts, of how many features, and where it is."""
        kind = self.config.model.architecture
        epoch = self.metrics.get("epoch")
        return (
            f"Checkpoint({self.direction}, {kind}, {len(self.layout.input_index):,} → "
            f"{len(self.layout.target_index):,} features, reference {self.reference.name!r}, epoch {epoch}, "
            f"folder {str(self.folder)!r})"
        )

    @property
    def layout(self) -> Layout:
        """The features that the model knows."""
        return self.model.layout

    @property
    def direction(self) -> Direction:
        """Which modality it reads and which it predicts."""
        return self.model.layout.direction


def save_checkpoint(checkpoint: Checkpoint, folder: str | Path, *, force: bool = True) -> Path:
    """Write a checkpoint folder, atomically."""
    from safetensors.torch import save_file

    layout = checkpoint.layout
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.model.state_dict().items()
    }
    tensors["layout.input_index"] = torch.from_numpy(layout.input_index)
    tensors["layout.target_index"] = torch.from_numpy(layout.target_index)
    with atomic_folder(folder, force=force) as temporary:
        save_file(tensors, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(dump_config(checkpoint.config), encoding="utf-8")
        if not checkpoint.reference.is_built_in:
            save_reference(checkpoint.reference, temporary / REFERENCE)
        manifest = _manifest(checkpoint, *(sha256_file(temporary / name) for name in (WEIGHTS, CONFIG)))
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return Path(folder)


def _manifest(checkpoint: Checkpoint, sha256: str, config_sha256: str) -> dict[str, Any]:
    reference = checkpoint.reference
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "direction": checkpoint.direction,
        "reference": {
            "name": reference.name,
            "genome": reference.genome,
            "fingerprint": reference.fingerprint,
            "n_genes": reference.n_genes,
            "n_ccres": reference.n_ccres,
        },
        "linear_rank": checkpoint.model.rank,
        "sha256": sha256,
        "config_sha256": config_sha256,
        "metrics": checkpoint.metrics,
        "provenance": provenance(seed=checkpoint.config.training.SEED, **occasion()),
    }


def load_checkpoint(
    path: str | Path,
    direction: Direction | None = None,
    *,
    config: Config | None = None,
    reference: Reference | None = None,
) -> Checkpoint:
    """Read a checkpoint; the model comes in eval mode, on the CPU.

    Parameters
    ----------
    path
        The folder, a file in it, or a training run's folder (its `best` is taken); a zip that `pack_model` wrote;
        or published weights (`pytorch_model.bin`), which need `direction` and `config`.
    direction, config, reference
        If given, the checkpoint has to agree with them.

    Returns
    -------
    Checkpoint
        Model, configuration, reference and metrics.

    Raises
    ------
    CheckpointError
        Missing, damaged, of another format, direction or model configuration.
    ReferenceMismatchError
        Made with another reference.
    """
    if Path(path).suffix in (".bin", ".safetensors") and not (Path(path).parent / MANIFEST).is_file():
        return _load_published(Path(path), direction, config, reference)
    if is_archive(path):
        return _load_packed(Path(path), direction, config, reference)
    folder = folder_of(Path(path))
    manifest = read_manifest(folder)
    _check_direction(manifest, direction, folder)
    check_sum(folder / WEIGHTS, manifest["sha256"])
    check_sum(folder / CONFIG, manifest.get("config_sha256"))
    saved = load_config(folder / CONFIG, manifest["direction"])
    if config is not None:
        _check_config(saved, config, folder)
    own_reference = _load_reference(manifest, folder)
    if reference is not None:
        check_reference(own_reference, reference, f"checkpoint {folder}")
    model = load_weights(folder, manifest, saved, own_reference)
    return Checkpoint(model, saved, own_reference, manifest["metrics"], folder)


def _load_packed(
    path: Path, direction: Direction | None, config: Config | None, reference: Reference | None
) -> Checkpoint:
    """Load a zip that `pack_model` wrote; messages name the zip, not the folder it was unpacked to."""
    with unpacked(path) as folder:
        try:
            found = load_checkpoint(folder, direction, config=config, reference=reference)
        except CisformerError as error:
            told = (text.replace(str(folder), str(path)) for text in (error.message, error.hint))
            raise type(error)(next(told), hint=next(told)) from None
    return replace(found, folder=path)


def export_checkpoint(checkpoint: Checkpoint, path: str | Path) -> Path:
    """Write the weights of a model of architecture full in the published layout.

    Parameters
    ----------
    checkpoint
        The model.
    path
        `pytorch_model.bin`, or a `.safetensors` file.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    CheckpointError
        The model is of another architecture.
    """
    if not isinstance(checkpoint.model, FullTask):
        raise CheckpointError(
            "only models of architecture full have a published layout; this one is of architecture "
            f"{checkpoint.config.model.architecture}",
            hint="train with `architecture: full` in the config",
        )
    return export_published(checkpoint.model.network, path)


def check_reference(found: Reference, wanted: Reference, what: str) -> None:
    """Raise `ReferenceMismatchError` unless the two references are the same."""
    if found.fingerprint == wanted.fingerprint:
        return
    raise ReferenceMismatchError(
        f"{what} was made with reference {_describe(found)}, the data with {_describe(wanted)}",
        hint="preprocess the data with the same --reference as the training data",
    )


def _describe(reference: Reference) -> str:
    return f"'{reference.name}' ({reference.n_genes} genes, {reference.n_ccres} cCREs)"


def _check_direction(manifest: dict[str, Any], direction: Direction | None, folder: Path) -> None:
    if direction is not None and manifest["direction"] != direction:
        raise CheckpointError(
            f"checkpoint {folder} predicts {manifest['direction']}, this command needs {direction}",
            hint=f"use cisformer {manifest['direction']}_predict, or another checkpoint",
        )


def _check_config(saved: Config, wanted: Config, folder: Path) -> None:
    """Compare the model sections: the shape must agree, the training may differ."""
    for key, value in saved.model:
        other = getattr(wanted.model, key)
        if key != "total_gene" and value != other:
            raise CheckpointError(
                f"checkpoint {folder} has model.{key} = {value}, the config says {other}",
                hint=f"use {folder / CONFIG} as the config, or leave the config out",
            )


def _load_reference(manifest: dict[str, Any], folder: Path) -> Reference:
    name = manifest["reference"]["name"]
    own = folder / REFERENCE  # a user may call a reference human
    reference = load_reference(own if own.is_dir() or name not in BUILT_IN else name)
    if reference.fingerprint != manifest["reference"]["fingerprint"]:
        raise ReferenceMismatchError(
            f"checkpoint {folder} was made with another version of reference '{name}'",
            hint="install the cisformer version that made it (see checkpoint.json)",
        )
    return reference


def _load_published(
    path: Path, direction: Direction | None, config: Config | None, reference: Reference | None
) -> Checkpoint:
    """Make a checkpoint of published weights: of all features, with nothing known of their training."""
    if direction is None or config is None:
        raise CheckpointError(
            f"{path} holds weights alone, which say neither their direction nor their configuration",
            hint="give the config.yaml it was trained with (-c)",
        )
    reference = reference or load_reference("human")
    if config.model.total_gene != reference.n_genes:
        raise ReferenceMismatchError(
            f"{path} was trained with {config.model.total_gene} genes, reference '{reference.name}' has "
            f"{reference.n_genes}",
            hint="give the configuration and the reference that it was trained with",
        )
    network = load_published(path, config.model.model_dump(), direction, config.model.mask_padding)
    config = config.model_copy(update={"model": config.model.model_copy(update={"architecture": "full"})})
    model = FullTask.from_published(config, network, reference.n_genes, reference.n_ccres)
    return Checkpoint(model.eval(), config, reference, {}, path.parent)
