"""Scaled dot-product attention, with what the CPU kernel of torch lacks: a fast backward pass in bfloat16.

Elsewhere (CUDA, MPS, float32, no gradient) this is `torch.nn.functional.scaled_dot_product_attention`.

On a CPU that multiplies bfloat16 matrices (AMX, AVX512-BF16) torch's own backward pass reaches a quarter of
the rate of a matrix product. Here it is matrix products and two elementwise passes per block: with l the log
of a row's softmax sum and δ = Σ out · d_out of a row, both kept from the forward pass,

    P = exp(K Qᵀ − l)     dS = P ∘ (V d_outᵀ − δ)     dV = P d_out     dK = dS Q     dQ = dSᵀ K

and l and δ cost no pass of their own: they ride along as two more columns of Q and d_out (the number in
bfloat16, and what that leaves of it) against columns of ones in K and V.

Shapes: B cells, H heads, L queries, T keys, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 32
"""Numbers of bfloat16 in a row of an AMX tile: head widths are filled up to a multiple."""
KEY_BLOCK = 512
"""Keys that a backward pass takes together: enough for fast products, few enough to stay in cache."""


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    detect = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and detect is not None and detect()


def attention(q_BHLD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q kᵀ / √D) v, [B, H, L, D]; `mask` (bool [B, 1, 1, T]) is true at keys to look at."""
    if q_BHLD.device.type != "cpu" or q_BHLD.dtype != torch.bfloat16 or mask is not None:
        return F.scaled_dot_product_attention(q_BHLD, k_BHTD, v_BHTD, attn_mask=mask)
    if torch.is_grad_enabled() and (q_BHLD.requires_grad or k_BHTD.requires_grad or v_BHTD.requires_grad):
        return _Bf16Attention.apply(q_BHLD, k_BHTD, v_BHTD)
    width = q_BHLD.shape[-1]
    q_BHLD, k_BHTD, v_BHTD = (_fill_tiles(x) for x in (q_BHLD, k_BHTD, v_BHTD))
    return F.scaled_dot_product_attention(q_BHLD, k_BHTD, v_BHTD, scale=width**-0.5)[..., :width]


def _fill_tiles(x: Tensor) -> Tensor:
    """Return [..., D'] with zeros up to whole tiles."""
    return F.pad(x, (0, -x.shape[-1] % TILE))


class _Bf16Attention(torch.autograd.Function):
    """The forward pass of torch, kept with its log-sums, and the backward pass of this module's heading."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[-1]
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _fill_tiles(q), _fill_tiles(k), _fill_tiles(v), 0.0, False, scale=width**-0.5
        )
        out = out[..., :width]
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, log_sum = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        delta = (out.float() * d_out.float()).sum(dim=-1)
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        for cell in range(q.shape[0]):
            for head in range(q.shape[1]):
                at = (cell, head)
                with_sums = _with_columns(q[at] * scale, -log_sum[at])
                with_deltas = _with_columns(d_out[at], -delta[at])
                keys, values = _with_columns(k[at], 1.0), _with_columns(v[at], 1.0)
                _backward_head(with_sums, with_deltas, keys, values, d_q[at], d_k[at], d_v[at])
        return d_q.mul_(scale), d_k, d_v


def _with_columns(x: Tensor, column: Tensor | float) -> Tensor:
    """Return [L, D'] with `column` behind x, and behind that what bfloat16 rounded off it."""
    width = x.shape[-1]
    wide = F.pad(x, (0, TILE - width % TILE if (width + 1) % TILE else TILE + 1))
    wide[:, width] = column
    wide[:, width + 1] = column - wide[:, width].float() if isinstance(column, Tensor) else column
    return wide


def _backward_head(
    q: Tensor, d_out: Tensor, k: Tensor, v: Tensor, d_q: Tensor, d_k: Tensor, d_v: Tensor
) -> None:
    """Write the gradients of one head, [L or T, D]; arguments carry the extra columns."""
    width = d_q.shape[1]
    p_all, d_s_all = q.new_empty(2, KEY_BLOCK, len(q))
    sum_q = torch.zeros(d_q.shape)
    for keys, values, d_keys, d_values in zip(*(x.split(KEY_BLOCK) for x in (k, v, d_k, d_v)), strict=True):
        p = torch.mm(keys, q.T, out=p_all[: len(keys)]).exp_()
        d_s = torch.mm(values, d_out.T, out=d_s_all[: len(keys)]).mul_(p)
        torch.mm(p, d_out[:, :width], out=d_values)
        torch.mm(d_s, q[:, :width], out=d_keys)
        sum_q += d_s.T @ keys[:, :width]
    d_q.copy_(sum_q)
