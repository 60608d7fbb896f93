"""Attention: latents over ragged tokens, latents among themselves, and a softmax over ragged segments.

Shapes: B cells, L latents, T padded tokens, N tokens of all cells, E edges, S segments, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.data.batches import ragged_rows


def pad_ragged(flat: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Return ragged rows [N, D] padded with zeros to [B, T, D], and a mask [B, T] that is true at tokens.

    T is at least 1, so that a cell without tokens stays a row.
    """
    lengths = indptr.diff()
    n_cells, longest = len(lengths), max(1, int(lengths.max()))
    row = ragged_rows(indptr, len(flat))
    column = torch.arange(len(flat), device=flat.device) - indptr[row]
    padded = flat.new_zeros(n_cells, longest, flat.shape[1])
    padded = padded.index_put((row, column), flat)
    mask = torch.arange(longest, device=flat.device) < lengths[:, None]
    return padded, mask


def segment_softmax(score_EH: Tensor, segment_E: Tensor, n_segments: int, null_H: Tensor) -> Tensor:
    """Return the softmax of edge scores within each segment and head, beside a null slot; float [E, H].

    The weights of a segment sum to less than 1: the null slot of score `null_H` has the rest, so that attending to
    nothing is possible. Any order of edges is accepted.
    """
    index_EH = segment_E[:, None].expand_as(score_EH)
    with torch.no_grad():
        top_SH = null_H.detach().expand(n_segments, -1).clone()
        top_SH.scatter_reduce_(0, index_EH, score_EH.detach(), "amax")
    exp_EH = (score_EH - top_SH[segment_E]).exp()
    total_SH = (null_H - top_SH).exp().index_add(0, segment_E, exp_EH)
    return exp_EH / total_SH[segment_E]


class LatentPool(nn.Module):
    """Learned latents attend to the tokens of a cell, keys and values being the tokens themselves.

    Keys' and values' projections are folded into the queries and the output: with tokens of width R far below
    heads × head width this is the same family of functions at a fraction of the products.
    """

    def __init__(self, width: int, dim: int, n_latents: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_LHR = nn.Parameter(torch.randn(n_latents, heads, width) * width**-0.25)
        self.out = nn.Linear(heads * width, dim)
        self.dropout = dropout

    def forward(self, token_BTR: Tensor, mask_BT: Tensor) -> Tensor:
        """Return [B, L, dim]; a cell without tokens gives the bias."""
        n_cells = len(token_BTR)
        n_latents, heads, width = self.query_LHR.shape
        query = self.query_LHR.reshape(1, 1, n_latents * heads, width).expand(n_cells, -1, -1, -1)
        if self.training and self.dropout:
            # Hiding tokens is dropout on attention that keeps the fused kernel.
            mask_BT = mask_BT & (torch.rand_like(token_BTR[..., 0]) >= self.dropout)
        # A row with nothing to attend to would be NaN: it may look at its (zero) first slot.
        mask = mask_BT | ~mask_BT.any(dim=1, keepdim=True)
        pooled = F.scaled_dot_product_attention(
            query.to(token_BTR.dtype),
            token_BTR[:, None],
            token_BTR[:, None],
            attn_mask=mask[:, None, None],
        )
        return self.out(pooled.reshape(n_cells, n_latents, heads * width))


class SelfAttention(nn.Module):
    """Multi-head self-attention over latents."""

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return [B, L, dim]."""
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x_BLC).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm self-attention and feed-forward, each added to its input."""

    def __init__(
        self, dim: int, heads: int, head_dim: int, ff_mult: int, attn_dropout: float, ff_dropout: float
    ) -> None:
        super().__init__()
        self.attn_norm, self.ff_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads, head_dim, attn_dropout)
        self.ff = nn.Sequential(
            nn.Linear(dim, ff_mult * dim), nn.GELU(), nn.Dropout(ff_dropout), nn.Linear(ff_mult * dim, dim)
        )

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return [B, L, dim]."""
        x_BLC = x_BLC + self.attn(self.attn_norm(x_BLC))
        return x_BLC + self.ff(self.ff_norm(x_BLC))
