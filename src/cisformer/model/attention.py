"""Attention: latents over ragged tokens, latents among themselves, and a softmax over ragged segments.

Shapes: B cells, L latents, N tokens of all cells, T of the longest cell, P distinct ones, E edges, S segments,
H heads, D head width, Q queries, R width of a token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.data.batches import rows_of


def segment_softmax(score_EH: Tensor, segment_E: Tensor, n_segments: int, null_H: Tensor) -> Tensor:
    """Return the softmax of edge scores within each segment and head, beside a null slot; float [E, H].

    The weights of a segment sum to less than 1: the null slot of score `null_H` has the rest, so that attending to
    nothing is possible. Any order of edges is accepted.
    """
    top_SH = _segment_max(score_EH.detach(), segment_E, null_H.detach().expand(n_segments, -1).clone())
    exp_EH = (score_EH - rows_of(top_SH, segment_E)).exp_()
    total_SH = (null_H - top_SH).exp().index_add(0, segment_E, exp_EH)
    return exp_EH / rows_of(total_SH, segment_E)


def _segment_max(score_EH: Tensor, segment_E: Tensor, least_SH: Tensor) -> Tensor:
    """Return the largest score of each segment and head, at least `least_SH`, which is overwritten."""
    index_EH = segment_E[:, None].expand_as(score_EH)
    if score_EH.device.type != "cpu" or score_EH.dtype != torch.float32:
        return least_SH.scatter_reduce_(0, index_EH, score_EH, "amax")
    n_heads = score_EH.shape[1]
    place = (index_EH * n_heads + torch.arange(n_heads)).flatten()
    np.maximum.at(
        least_SH.numpy().reshape(-1), place.numpy(), score_EH.flatten().numpy()
    )  # three times as fast
    return least_SH


class LatentPool(nn.Module):
    """Learned latents attend to the tokens of a cell, keys and values being the tokens themselves.

    Keys' and values' projections are folded into the queries and the output: with tokens of width R far below
    heads × head width this is the same family of functions at a fraction of the products.
    """

    def __init__(self, width: int, dim: int, n_latents: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_LHR = nn.Parameter(torch.empty(n_latents, heads, width).normal_(std=width**-0.25))
        self.out = nn.Linear(heads * width, dim)
        self.dropout = dropout

    def forward(self, token_PR: Tensor, slot_N: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
        """Pool each cell's tokens.

        Parameters
        ----------
        token_PR
            Tokens, of which cells may share some.
        slot_N, indptr
            Which of them the cells have, cell by cell (int64 [N], int64 [B + 1]).

        Returns
        -------
        float [B, L, dim] and float [B, R]
            The latents, and the mean token; a cell without tokens gives the output's bias, and zeros.
        """
        n_latents, heads, width = self.query_LHR.shape
        if self.training and self.dropout:  # hiding tokens is dropout on attention
            seen = torch.rand(len(slot_N), device=slot_N.device) >= self.dropout
            indptr, slot_N = rows_of(F.pad(torch.cumsum(seen, 0), (1, 0)), indptr), slot_N[seen]
        query_QR = self.query_LHR.flatten(0, 1) * width**-0.5
        pooled_BQR, mean_BR = ragged_attention(query_QR, token_PR, slot_N, indptr)
        return self.out(pooled_BQR.reshape(-1, n_latents, heads * width)), mean_BR


def ragged_attention(
    query_QR: Tensor, token_PR: Tensor, slot_N: Tensor, indptr: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what every cell's queries find in its tokens, which are keys and values, and the mean token.

        out[b, q] = Σ_n softmax_n(<query[q], token[slot[n]]>) token[slot[n]]    over the tokens n of cell b

    Float [B, Q, R] and [B, R], in single precision at least; zeros for a cell without tokens.
    """
    query_QR, token_PR = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query_QR, token_PR))
    lengths = indptr.diff()
    places = torch.arange(max(1, int(lengths.max())), device=lengths.device)
    real_BT = places < lengths[:, None]
    slot_BT = slot_N.new_zeros(real_BT.shape)
    slot_BT[real_BT] = slot_N
    if len(token_PR) == 0:  # no cell has a token: there is padding alone
        token_PR = F.pad(token_PR, (0, 0, 0, 1))
    token_BTR = rows_of(token_PR, slot_BT.flatten()).view(*slot_BT.shape, -1) * real_BT[..., None]
    # A cell without tokens looks at its padding, which is zeros: no mask may hide everything.
    seen_BT = real_BT | (lengths == 0)[:, None]
    # With a dimension for heads torch takes its fast kernel, which never holds all scores at once.
    key_B1TR, query_B1QR = token_BTR[:, None], query_QR.expand(len(lengths), 1, *query_QR.shape)
    with torch.autocast(token_PR.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            query_B1QR, key_B1TR, key_B1TR, attn_mask=seen_BT[:, None, None], scale=1.0
        )
    return out.squeeze(1), token_BTR.sum(dim=1) / lengths.clamp(min=1)[:, None]


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
