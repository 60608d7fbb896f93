"""Attention: latents over ragged tokens, latents among themselves, and a softmax over ragged segments.

Shapes: B cells, L latents, N tokens of all cells, T of the longest cell, P distinct ones, E edges, S segments,
H heads, D head width, Q queries, R width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
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
    total_SH = segment_sum(exp_EH, segment_E, n_segments) + (null_H - top_SH).exp()
    return exp_EH / rows_of(total_SH, segment_E)


def segment_sum(x_EH: Tensor, segment_E: Tensor, n_segments: int) -> Tensor:
    """Return the sums of the rows of each segment; float [n_segments, H]."""
    if x_EH.requires_grad or x_EH.device.type != "cpu":
        return x_EH.new_zeros(n_segments, x_EH.shape[1]).index_add(0, segment_E, x_EH)
    x, segment = x_EH.numpy(), segment_E.numpy().astype(np.int32)
    whole = np.ones(len(x), x.dtype), segment, np.arange(len(x) + 1, dtype=np.int32)
    return torch.from_numpy(sp.csc_matrix(whole, (n_segments, len(x))) @ x)  # twice as fast


def _segment_max(score_EH: Tensor, segment_E: Tensor, least_SH: Tensor) -> Tensor:
    """Return the largest score of each segment and head, at least `least_SH`, which is overwritten."""
    if score_EH.device.type != "cpu" or score_EH.dtype != torch.float32:
        return least_SH.scatter_reduce_(0, segment_E[:, None].expand_as(score_EH), score_EH, "amax")
    for least_S, score_E in zip(least_SH.numpy().T, score_EH.numpy().T, strict=True):
        np.maximum.at(least_S, segment_E.numpy(), score_E)  # five times as fast
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
    attend = _attend_by_cell if token_PR.device.type == "cpu" else _attend_padded
    with torch.autocast(token_PR.device.type, enabled=False):
        out_BQR, sum_BR = attend(query_QR, token_PR, slot_N, lengths)
    return out_BQR, sum_BR / lengths.clamp(min=1)[:, None]


def _attend_by_cell(
    query_QR: Tensor, token_PR: Tensor, slot_N: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what queries find in each cell's tokens, and the sum of these; a CPU gains nothing from padding."""
    if torch.is_grad_enabled():  # one gradient for the tokens of all cells
        cells: Iterable[Tensor] = rows_of(token_PR, slot_N).split(lengths.tolist())
    else:  # those of one cell stay in the cache
        cells = (rows_of(token_PR, slot_T) for slot_T in slot_N.split(lengths.tolist()))
    found, total = [], []
    for token_TR in cells:
        seen_TR = token_TR if len(token_TR) else F.pad(token_TR, (0, 0, 0, 1))  # none: it looks at zeros
        found.append(_attend(query_QR[None], seen_TR[None]))
        total.append(token_TR.sum(dim=0))
    return torch.cat(found), torch.stack(total)


def _attend_padded(
    query_QR: Tensor, token_PR: Tensor, slot_N: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the same, all cells at once."""
    real_BT = torch.arange(max(1, int(lengths.max())), device=lengths.device) < lengths[:, None]
    token_BTR = token_PR.new_zeros(*real_BT.shape, token_PR.shape[1])
    token_BTR[real_BT] = rows_of(token_PR, slot_N)
    # No mask may hide everything: here as well, a cell without tokens looks at zeros.
    seen_BT = real_BT | (lengths == 0)[:, None]
    out_BQR = _attend(query_QR.expand(len(lengths), -1, -1), token_BTR, seen_BT[:, None, None])
    return out_BQR, token_BTR.sum(dim=1)


def _attend(query_BQR: Tensor, token_BTR: Tensor, seen_B11T: Tensor | None = None) -> Tensor:
    """Return what queries find in tokens, which are keys and values; float [B, Q, R].

    With a dimension for heads torch takes its fast kernel, which never holds all scores at once.
    """
    key_B1TR = token_BTR[:, None]
    return F.scaled_dot_product_attention(
        query_BQR[:, None], key_B1TR, key_B1TR, attn_mask=seen_B11T, scale=1.0
    ).squeeze(1)


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
