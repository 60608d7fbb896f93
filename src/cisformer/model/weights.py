"""The weights in a checkpoint's folder: a file of tensors becomes a model of known shapes.

Loading runs no code, and takes no more memory than the file of weights says by its size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cisformer.config import Config, Direction
from cisformer.data.batches import Layout
from cisformer.data.reference import Reference
from cisformer.errors import CheckpointError, brief
from cisformer.model.checkpoint_manifest import damaged
from cisformer.model.cis import CisModel
from cisformer.model.closed_form_cis import Windows
from cisformer.model.documented_task import FullTask
from cisformer.model.link_function import LINK_VERSION

WEIGHTS = "model.safetensors"


def load_weights(
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
        earlier["likeness.rarity"] = rarity[:, None].repeat(1, shape[0])
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
            raise damaged(path, f"layout.{name}_index does not list features among {size:,}")
        index.append(rows.numpy())
    return Layout(direction, index[0], index[1], n_input, n_target)
