"""Checkpoints: a folder with weights, configuration, features, reference and metrics.

    model.safetensors   weights, and the reference rows of known features
    config.yaml         the resolved configuration
    checkpoint.json     format, version, direction, reference, sizes, metrics, sha256 of weights and configuration
    reference/          the reference, where it is not a built-in one

`pack_model` puts such a folder into one zip, which is read like the folder.

Loading runs no code, and takes no more memory than the file of weights says by its size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch.overrides import TorchFunctionMode

from cisformer.config import Config, Direction, dump_config, load_config
from cisformer.data.batches import Layout
from cisformer.data.reference import BUILT_IN, Reference, load_reference, save_reference
from cisformer.errors import CheckpointError, CisformerError, ReferenceMismatchError, brief, first_complaint
from cisformer.model.cis import CisModel
from cisformer.model.closed_form_cis import Windows
from cisformer.model.documented import export_published, load_published
from cisformer.model.documented_task import FullTask
from cisformer.model.link_function import LINK_VERSION
from cisformer.runtime.archive import is_archive, unpacked
from cisformer.runtime.files import atomic_folder, read_json, sha256_file
from cisformer.runtime.provenance import occasion, provenance

FORMAT = "cisformer-checkpoint"
FORMAT_VERSION = 1
WEIGHTS, CONFIG, MANIFEST, REFERENCE = "model.safetensors", "config.yaml", "checkpoint.json", "reference"


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
    _check_sum(folder / WEIGHTS, manifest["sha256"])
    _check_sum(folder / CONFIG, manifest.get("config_sha256"))
    saved = load_config(folder / CONFIG, manifest["direction"])
    if config is not None:
        _check_config(saved, config, folder)
    own_reference = _load_reference(manifest, folder)
    if reference is not None:
        check_reference(own_reference, reference, f"checkpoint {folder}")
    model = _load_model(folder, manifest, saved, own_reference)
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
        raise _damaged(folder / MANIFEST, str(error)) from None
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
        raise _damaged(folder / MANIFEST, first_complaint(error)) from None
    return manifest


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {what}", hint="copy the checkpoint again")


def _check_sum(path: Path, sha256: str | None) -> None:
    """Raise `CheckpointError` unless a file has its checksum; early versions noted none of the configuration."""
    try:
        found = sha256_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint="copy the checkpoint again") from None
    if sha256 and found != sha256:
        raise CheckpointError(f"{path} does not match its checksum", hint="copy the checkpoint again")


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


def _load_model(
    folder: Path, manifest: dict[str, Any], config: Config, reference: Reference
) -> CisModel | FullTask:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / WEIGHTS} cannot be read: {error}", hint="copy the checkpoint again"
        ) from None
    tensors = {  # `pack_model` may have stored matrices as float16
        name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()
    }
    layout = _layout(manifest["direction"], reference, tensors, folder / WEIGHTS)
    windows = None
    if config.model.architecture == "cis" and layout.direction == "atac2rna":
        windows = Windows.of(reference, layout, config.model.cis_window)
    try:
        with (
            torch.device("meta"),
            _NoDraws(),
        ):  # shapes first: a configuration may ask for any amount of memory
            model = _new_model(config, layout, manifest["linear_rank"], windows)
        wanted = model.state_dict()
        tensors |= _of_earlier_versions(tensors, wanted)
        _check_names(folder, tensors, wanted)
        _check_link(folder, tensors)
        _check_shapes(tensors, wanted)
        if any(buffer.is_meta for name, buffer in model.named_buffers() if name not in wanted):
            model = _new_model(config, layout, manifest["linear_rank"], windows)
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} does not fit its own config: {reason}", hint="copy it again"
        ) from None
    return model.eval()


def _of_earlier_versions(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what a checkpoint of an earlier version does not say: NaN of its cells, and the first link.

    A version before there were groups of training cells has the rarities of one group.
    """
    missing = wanted.keys() - found.keys()
    unknown = [name for name in missing if name.startswith(("likeness.", "interval_90"))]
    earlier = {name: torch.full(wanted[name].shape, torch.nan) for name in unknown}
    rarity = found.get("likeness.rarity")
    if rarity is not None and rarity.ndim == 1:
        shape = wanted["likeness.centres"].shape
        earlier["likeness.centres"] = torch.zeros(shape)
        earlier["likeness.rarity"] = rarity.half()[:, None].repeat(1, shape[0])
    return earlier | ({"link_version": torch.tensor(1)} if "link_version" in missing else {})


class _NoDraws(TorchFunctionMode):
    """Leave out random starting values: drawing millions takes seconds, and the file holds what counts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.normal_, torch.nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _check_names(folder: Path, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` where weights are missing or unknown: the file is whole, by its checksum."""
    names = {"lacks": wanted.keys() - found.keys(), "holds": found.keys() - wanted.keys()}
    differing = [f"{verb} {brief(sorted(some))}" for verb, some in names.items() if some]
    if differing:
        raise CheckpointError(
            f"{folder} was made by another version of cisformer, whose model differs: it {' and '.join(differing)}",
            hint="train the model again, or use the version that made it",
        )


def _check_link(folder: Path, found: dict[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` where a later version made the weights: they would mean other probabilities."""
    version = int(found["link_version"]) if "link_version" in found else LINK_VERSION
    if version not in (1, LINK_VERSION):
        raise CheckpointError(
            f"{folder} has version {version} of the link function, this version of cisformer knows {LINK_VERSION}",
            hint="update cisformer",
        )


def _check_shapes(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            shapes = tuple(tensor.shape), tuple(wanted[name].shape)
            raise ValueError(f"tensor {name} has shape {shapes[0]}, the config asks for {shapes[1]}")


def _new_model(config: Config, layout: Layout, rank: int, windows: Windows | None) -> CisModel | FullTask:
    if config.model.architecture == "full":
        return FullTask(config, layout)
    return CisModel(config, layout, rank, windows)


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


def _layout(
    direction: Direction, reference: Reference, tensors: dict[str, torch.Tensor], path: Path
) -> Layout:
    """Take the layout out of the tensors of a checkpoint; `CheckpointError` where it does not fit the reference."""
    sizes = (reference.n_ccres, reference.n_genes)
    n_input, n_target = sizes if direction == "atac2rna" else sizes[::-1]
    index = []
    for name, size in (("input", n_input), ("target", n_target)):
        rows = tensors.pop(f"layout.{name}_index", torch.zeros(0))
        ascending = rows.dtype == torch.int64 and rows.dim() == 1 and bool((rows.diff() > 0).all())
        if not (ascending and len(rows) and rows[0] >= 0 and rows[-1] < size):
            raise _damaged(path, f"layout.{name}_index does not list features among {size:,}")
        index.append(rows.numpy())
    return Layout(direction, index[0], index[1], n_input, n_target)
