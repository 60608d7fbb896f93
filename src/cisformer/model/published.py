"""The layout of published checkpoints: names of tensors, reading, and checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from cisformer.config import Direction
from cisformer.errors import CheckpointError

_PLACES = {
    "atac2rna": ("enc.iConv_enc", "dec.gene_emb", ("self_attention", "cross_attention", "feed_forward")),
    "rna2atac": ("enc.gene_emb", "dec.iConv_enc", ("cross_attention", "feed_forward")),
}
"""Names of the context's and the queries' embedding, and order of the sublayers, in published checkpoints."""


def published_name(name: str, direction: Direction) -> str:
    """Return what published checkpoints call a parameter of `FullModel`.

    >>> published_name("layers.0.feed_forward.w1.bias", "rna2atac")
    'dec.block.net.layers.0.1.fn.fn.w1.bias'
    """
    module, _, leaf = name.rpartition(".")
    context, query, sublayers = _PLACES[direction]
    if module.startswith("layers."):
        _, layer, sublayer, part = module.split(".")
        inner = {"norm": "norm", "w1": "fn.fn.w1", "w2": "fn.fn.w2"}.get(part, f"fn.{part}")
        return f"dec.block.net.layers.{layer}.{sublayers.index(sublayer)}.{inner}.{leaf}"
    outside = {
        "context_embedding": context,
        "query_embedding": query,
        "value_embedding": "enc.value_emb",
        "context_norm": "enc.norm",
        "norm": "dec.norm",
        "to_out": "dec.to_out",
    }
    return f"{outside[module]}.{leaf}"


def config_keys(name: str) -> str:
    """Return which configuration keys decide the shape, or the presence, of a published tensor."""
    for part, keys in (
        ("iConv_enc", "dim / 7"),
        ("gene_emb", "total_gene + 1, dim"),
        ("value_emb", "max_express + 1, dim"),
        ("dec.to_out", "max_express + 1, dim"),
        ("norm", "dim"),
        (".w1", "dim × dec_ff_mult, dim"),
        (".w2", "dim, dim × dec_ff_mult"),
        (".to_out", "dim, dec_heads × dec_dim_head"),
        (".to_", "dec_heads × dec_dim_head, dim"),
    ):
        if part in name:
            return keys
    return "dim"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name; nothing in it is run."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, not read: a tensor cannot claim more memory than the file has.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", hint="give the file of weights") from None
    except UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path} holds more than weights: {reason}", hint="it is not loaded, because it may run code"
        ) from None
    except Exception as error:  # damaged archives raise whatever torch, zipfile or pickle come upon
        raise CheckpointError(
            f"{path} cannot be read: {' '.join(str(error).split())}", hint="copy it again"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise CheckpointError(f"{path} is not a mapping of names to tensors", hint="give pytorch_model.bin")
    return content


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Raise `CheckpointError` naming what is missing, unexpected or mis-shaped, and the config keys."""
    missing = [f"{name} is missing ({_presence(name)})" for name in wanted if name not in found]
    unexpected = [f"{name} is unexpected ({_presence(name)})" for name in found if name not in wanted]
    other_shape = [
        f"{name} is {_shape(found[name])}, the config asks for {_shape(tensor)} ({config_keys(name)})"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems := [line for kind in (missing, unexpected, other_shape) for line in _first(kind)]:
        raise CheckpointError(
            f"{path} does not fit its config: {'; '.join(problems)}",
            hint="give the configuration and the direction that it was trained with",
        )


def _first(problems: list[str], n: int = 3) -> list[str]:
    return problems[:n] + [f"and {len(problems) - n} more such"] * (len(problems) > n)


def _presence(name: str) -> str:
    return "dec_depth" if ".layers." in name else "direction"


def _shape(tensor: Tensor) -> str:
    return " × ".join(map(str, tensor.shape))
