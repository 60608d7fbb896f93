"""Attention: latents over ragged tokens, latents among themselves, and a softmax over ragged segments.

Shapes: B cells, L latents, N tokens of all cells, P distinct ones, E edges, S segments, H heads, D head width,
Q queries, K blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cisformer.data.batches import ragged_rows, rows_of

BLOCK = 256
"""Tokens of a cell that are taken together; the last block of a cell is filled up with nothing."""
BLOCKS_AT_ONCE = {"cpu": 8, "gpu": 4096}
"""Few enough for a processor's cache, enough to fill a GPU."""


def segment_softmax(score_EH: Tensor, segment_E: Tensor, n_segments: int, null_H: Tensor) -> Tensor:
    """Return the softmax of edge scores within each segment and head, beside a null slot; float [E, H].

    The weights of a segment sum to less than 1: the null slot of score `null_H` has the rest, so that attending to
    nothing is possible. Any order of edges is accepted.
    """
    index_EH = segment_E[:, None].expand_as(score_EH)
    with torch.no_grad():
        top_SH = null_H.detach().expand(n_segments, -1).clone()
        top_SH.scatter_reduce_(0, index_EH, score_EH.detach(), "amax")
    exp_EH = (score_EH - rows_of(top_SH, segment_E)).exp()
    total_SH = (null_H - top_SH).exp().index_add(0, segment_E, exp_EH)
    return exp_EH / rows_of(total_SH, segment_E)


class Dropout(nn.Dropout):
    """Dropout whose draws take 16 random bits each on a CPU: twice as fast as torch's, which takes a float."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share p of its numbers 0 and the others 1 / (1 − p) times as large; as it is in eval mode."""
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        if not self.training or not dropped or x.device.type != "cpu":
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        draw = words.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (draw >= dropped - 2**15) * (1 / (1 - dropped / 2**16))


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
    with torch.autocast(token_PR.device.type, enabled=False):
        return _RaggedAttention.apply(query_QR, token_PR, Blocks.of(slot_N, indptr))


@dataclass(frozen=True)
class Blocks:
    """Ragged tokens cut into blocks of one cell each.

    Attributes
    ----------
    slot
        The token at each place, cell by cell; 0 where a cell's last block has nothing; int64 [K, BLOCK].
    empty
        The places of these, numbered through; int64, ascending.
    cell, lengths
        The cell of each block (int64 [K]), and the number of tokens of each cell (int64 [B]).
    """

    slot: Tensor
    empty: Tensor
    cell: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, slot_N: Tensor, indptr: Tensor) -> Blocks:
        """Cut the tokens of cells that lie one behind the other."""
        lengths = indptr.diff()
        per_cell = (lengths + BLOCK - 1) // BLOCK
        first = torch.cumsum(per_cell, 0) - per_cell
        shift = rows_of(first * BLOCK - indptr[:-1], ragged_rows(indptr, len(slot_N)))
        cell = torch.repeat_interleave(per_cell)
        slot = slot_N.new_full((len(cell) * BLOCK,), -1)
        slot[torch.arange(len(slot_N), device=slot_N.device) + shift] = slot_N
        empty = (slot < 0).nonzero().squeeze(1)
        return cls(slot.clamp_(min=0).view(-1, BLOCK), empty, cell, lengths)

    def steps(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield a few blocks at a time: which, their tokens (flat), and their empty places."""
        size = BLOCKS_AT_ONCE["cpu" if self.slot.device.type == "cpu" else "gpu"]
        starts = range(0, len(self.slot), size)
        bounds = torch.searchsorted(
            self.empty.cpu(), torch.tensor([*starts, len(self.slot)]) * BLOCK
        ).tolist()
        for start, low, high in zip(starts, bounds, bounds[1:], strict=False):
            at = slice(start, start + size)
            yield at, self.slot[at].flatten(), self.empty[low:high] - start * BLOCK


class _RaggedAttention(torch.autograd.Function):
    """Attention in blocks of one cell's tokens, without padding beyond a block, its scores never all at once.

    As in FlashAttention (Dao et al. 2022), the sums of a block are taken beside its own largest score and joined
    afterwards; the backward pass computes scores again. With P = exp(score − log-sum), δ = Σ out · d_out of a row,

        dS = P ∘ (token d_outᵀ − δ)     d_token = P d_out + dS query     d_query = dSᵀ token
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, token: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        n_blocks, n_cells, (n_queries, width) = len(blocks.slot), len(blocks.lengths), query.shape
        top, total = token.new_empty(2, n_blocks, n_queries)
        part, plain = token.new_empty(n_blocks, n_queries, width), token.new_empty(n_blocks, width)
        for at, slot, empty in blocks.steps():
            rows = rows_of(token, slot).index_fill_(0, empty, 0.0)
            score = (rows @ query.T).index_fill_(0, empty, -torch.inf).view(-1, BLOCK, n_queries)
            rows = rows.view(-1, BLOCK, width)
            torch.amax(score, dim=1, out=top[at])
            weight = score.sub_(top[at][:, None]).exp_()
            torch.sum(weight, dim=1, out=total[at])
            torch.bmm(weight.mT, rows, out=part[at])
            torch.sum(rows, dim=1, out=plain[at])
        of_cells = lambda x: x.new_zeros(n_cells, *x.shape[1:]).index_add_(0, blocks.cell, x)  # noqa: E731
        highest = top.new_full((n_cells, n_queries), -torch.inf)
        highest.scatter_reduce_(0, blocks.cell[:, None].expand_as(top), top, "amax")
        share = (top - rows_of(highest, blocks.cell)).exp_()
        sums = of_cells(total * share).clamp_(min=torch.finfo(total.dtype).tiny)  # of a cell without blocks
        out = of_cells(part.mul_(share[..., None])) / sums[..., None]
        ctx.blocks = blocks
        ctx.save_for_backward(query, token, highest + sums.log(), out)
        return out, of_cells(plain) / blocks.lengths.clamp(min=1)[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_mean: Tensor) -> tuple[Tensor, Tensor, None]:
        with torch.autocast(d_out.device.type, enabled=False):
            return *_RaggedAttention._gradients(ctx, d_out, d_mean), None

    @staticmethod
    def _gradients(ctx: Any, d_out: Tensor, d_mean: Tensor) -> tuple[Tensor, Tensor]:
        query, token, log_sum, out = ctx.saved_tensors
        blocks, (n_queries, width) = ctx.blocks, query.shape
        delta = (out * d_out).sum(dim=-1)
        d_plain = d_mean / blocks.lengths.clamp(min=1)[:, None]
        d_query, d_token = torch.zeros_like(query), torch.zeros_like(token)
        for at, slot, empty in blocks.steps():
            rows, cell = rows_of(token, slot), blocks.cell[at]
            d_part = rows_of(d_out, cell)
            p = (rows @ query.T).index_fill_(0, empty, -torch.inf).view(-1, BLOCK, n_queries)
            p.sub_(rows_of(log_sum, cell)[:, None]).exp_()
            d_score = torch.baddbmm(
                -rows_of(delta, cell)[:, None], rows.view(-1, BLOCK, width), d_part.mT
            ).mul_(p)
            d_rows = torch.baddbmm(rows_of(d_plain, cell)[:, None], p, d_part).view(-1, width)
            flat = d_score.view(-1, n_queries)
            d_query.addmm_(flat.T, rows)
            d_token.index_add_(0, slot, d_rows.addmm_(flat, query).index_fill_(0, empty, 0.0))
        return d_query, d_token


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
            nn.Linear(dim, ff_mult * dim), nn.GELU(), Dropout(ff_dropout), nn.Linear(ff_mult * dim, dim)
        )

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Return [B, L, dim]."""
        x_BLC = x_BLC + self.attn(self.attn_norm(x_BLC))
        return x_BLC + self.ff(self.ff_norm(x_BLC))
