"""Which device computes, in which precision, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of `mallopt`, as in glibc's malloc.h."""
LARGEST_KEPT_BYTES, MOST_KEPT_BYTES = (1 << 26, 1 << 25), 1 << 28
"""Of a block, the second where glibc refuses the first, as older ones do; and of the end of the heap."""


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


def keep_freed_memory() -> None:
    """Let the memory of freed tensors serve the next ones; changes nothing where malloc is not glibc's.

    By itself glibc keeps some 20 to 60 MB and gives the rest back to the system, from which it comes anew page by page,
    in every step. Blocks of more than 64 MB (older glibc: 32) are still given back, and of the end of the heap all but
    256 MB.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    if any(libc.mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_KEPT_BYTES):
        libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT_BYTES)  # alone it would fix the other at 128 kB
