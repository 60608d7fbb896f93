"""The latent transformer that reads a cell's tokens: expressed genes with their values, or open cCREs.

Shapes: B cells, N tokens, P distinct tokens, L latents, C their width, R embedding width, K states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cisformer.config import Model
from cisformer.data.batches import Batch, places, ragged_rows, rows_of, table_rows
from cisformer.model.attention import Block, LatentPool


@dataclass(frozen=True)
class Tokens:
    """The distinct inputs of a batch, which its cells share.

    Attributes
    ----------
    number
        Their input numbers, ascending; int64 [P].
    place
        Which of them each input number is, or −1; int64 [n_input].
    embedding
        Their embeddings; float [P, R].
    table
        The embeddings of all inputs; float [n_input, R].
    """

    number: Tensor
    place: Tensor
    embedding: Tensor
    table: Tensor


class CellEncoder(nn.Module):
    """Tokens of a cell and its z → h [B, R]; the last layer starts at zero."""

    def __init__(self, n_input: int, rank: int, has_values: bool, model: Model) -> None:
        super().__init__()
        width, dim = model.emb_rank, model.dim
        self.n_bins = model.max_express
        self.token = nn.Embedding(n_input, width)
        self.sparse_gradient = False
        self.value = nn.Embedding(model.max_express + 1, width) if has_values else None
        self.token_norm = nn.LayerNorm(width)
        self.token_dropout = nn.Dropout(model.dec_emb_dropout)
        self.pool = LatentPool(width, dim, model.num_latents, model.dec_heads, model.dec_attn_dropout)
        self.latent = nn.Parameter(torch.empty(model.num_latents, dim).normal_(std=dim**-0.5))
        self.sum = nn.Linear(width, dim)
        self.state = nn.Linear(rank, dim)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                model.dec_heads,
                model.dec_dim_head,
                model.dec_ff_mult,
                model.dec_attn_dropout,
                model.dec_ff_dropout,
            )
            for _ in range(model.dec_depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, width)
        nn.init.normal_(self.token.weight, std=1.0)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def tokens(self, batch: Batch) -> Tokens:
        """Return the distinct inputs of a batch and their embeddings."""
        number, place = distinct(batch.index, self.token.num_embeddings)
        table = self.token.weight
        embedding = table_rows(table, number, sparse_gradient=self.sparse_gradient)
        return Tokens(number, place, embedding, table)

    def forward(self, batch: Batch, z_BK: Tensor, tokens: Tokens) -> Tensor:
        """Return h, float [B, R]."""
        index, value, indptr = attended_tokens(batch)
        slot_N = rows_of(tokens.place, index)
        token_PR = tokens.embedding
        if self.value is not None:  # an input at another value is another token
            token_PR = rows_of(token_PR, slot_N) + rows_of(self.value.weight, self.value_bins(value, indptr))
            slot_N = torch.arange(len(index), device=index.device)
        token_PR = self.token_dropout(self.token_norm(token_PR))
        pooled_BLC, mean_BR = self.pool(token_PR, slot_N, indptr)
        whole_BC = self.sum(mean_BR) + self.state(z_BK)
        latent_BLC = pooled_BLC + self.latent + whole_BC[:, None]
        for block in self.blocks:
            latent_BLC = block(latent_BLC)
        return self.out(self.norm(latent_BLC).mean(dim=1))

    def value_bins(self, value: Tensor, indptr: Tensor) -> Tensor:
        """Return 1..max_express: equal-width bins of expression relative to the cell's maximum; int64 [N]."""
        cell = ragged_rows(indptr, len(value))
        top = value.new_zeros(len(indptr) - 1).scatter_reduce(0, cell, value, "amax")
        return (value / rows_of(top, cell).clamp(min=1e-9) * self.n_bins).ceil().long().clamp(1, self.n_bins)


def attended_tokens(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return index, value and indptr of the tokens that attention sees."""
    if batch.token is None:
        return batch.index, batch.value, batch.indptr
    assert batch.token_indptr is not None
    return batch.index[batch.token], batch.value[batch.token], batch.token_indptr


def distinct(number: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the distinct values of `number` (each < n), ascending, and the `places` of 0 … n − 1 among them."""
    present = torch.zeros(n, dtype=torch.bool, device=number.device)
    present[number] = True
    found = present.nonzero().squeeze(1)
    return found, places(found, n)
