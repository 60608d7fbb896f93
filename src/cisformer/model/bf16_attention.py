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

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 32
"""Numbers of bfloat16 in a row of an AMX tile: head widths are filled up to a multiple."""
KEY_BLOCK = 512
"""Keys that a backward pass takes together: enough for fast products, few enough to stay in cache."""


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
    return F.pad(x, (0, -x.shape[-1] % TILE)) if x.shape[-1] % TILE else x


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
        scale, delta = q.shape[-1] ** -0.5, (out * d_out).sum(dim=-1, dtype=torch.float32)
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        wide_q, wide_d, wide_k, wide_v = (_room(x) for x in (q, d_out, k, v))
        work = q.new_empty(2, KEY_BLOCK, q.shape[-2])
        for at in itertools.product(range(q.shape[0]), range(q.shape[1])):
            _fill(wide_q, q[at], -log_sum[at], scale)
            _fill(wide_d, d_out[at], -delta[at])
            _fill(wide_k, k[at], 1.0)
            _fill(wide_v, v[at], 1.0)
            head = _backward_head((wide_q, wide_d, wide_k, wide_v), d_k[at], d_v[at], work)
            d_q[at] = head.mul_(scale)
        return d_q, d_k, d_v


def _room(x: Tensor) -> Tensor:
    """Return zeros [L, D'] with room for D columns and two more, in whole tiles."""
    return x.new_zeros(x.shape[-2], -(-(x.shape[-1] + 2) // TILE) * TILE)


def _fill(wide: Tensor, x: Tensor, column: Tensor | float, scale: float = 1.0) -> None:
    """Write x · scale [L, D] into `wide`, behind it `column`, and behind that what bfloat16 rounds off it."""
    width = x.shape[-1]
    torch.mul(x, scale, out=wide[:, :width])
    wide[:, width] = column
    wide[:, width + 1] = column - wide[:, width].float() if isinstance(column, Tensor) else column


def _backward_head(wide: tuple[Tensor, ...], d_k: Tensor, d_v: Tensor, work: Tensor) -> Tensor:
    """Write the gradients of one head's keys and values and return that of its queries, float32 [L, D].

    `wide` are q, d_out, k and v with the extra columns; `work` is memory for two blocks of scores.
    """
    q, d_out, k, v = wide
    width = d_k.shape[1]
    sum_q = torch.zeros(len(q), width)
    for keys, values, d_keys, d_values in zip(*(x.split(KEY_BLOCK) for x in (k, v, d_k, d_v)), strict=True):
        p = torch.mm(keys, q.T, out=work[0, : len(keys)]).exp_()
        d_s = torch.mm(values, d_out.T, out=work[1, : len(keys)]).mul_(p)
        d_values.copy_(p @ d_out[:, :width])
        d_keys.copy_(d_s @ q[:, :width])
        sum_q += d_s.T @ keys[:, :width]
    return sum_q
