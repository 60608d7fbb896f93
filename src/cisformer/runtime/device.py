"""Which device computes, and in which precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def best_device() -> str:
    """Return where to compute unless told otherwise: an NVIDIA GPU where there is one, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 matrices faster than float32 ones."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    detect = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and detect is not None and bool(detect())


def fastest_precision(device: torch.device) -> str:
    """Return what `device` multiplies fastest, in Accelerate's words: "bf16", "fp16", or "no" for float32."""
    if multiplies_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "no"
