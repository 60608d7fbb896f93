"""The default architecture: a linear model, a latent transformer and cis attention, added on the link scale.

    eta[i, f] = prior[f] / scale[f] + link(pace[f] (bias[f] + <z[i] + h[i], B[f]> + cis[i, f]))

The link is the identity for ATAC→RNA, `closed_form.change_of_log_odds` for RNA→ATAC. z are fixed states of the cell
(`projection`), B starts in closed form in their columns, h comes from latents that attend to the cell's tokens and
moves the cell in the same space, and cis (ATAC→RNA only) comes from the open cCREs near each gene: a weight per pair,
started in closed form, and attention. h and the attention start at exactly zero: the untrained model *is* the closed
form. The pace, fixed, is how far training may move a target: `closed_form.pace_of`.

Shapes: B cells, N tokens, P distinct tokens, L latents, R embedding width, K components, F targets, E edges, H heads,
D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.config import Config, Model
from cisformer.data.batches import Batch, Layout, dense_targets, places, ragged_rows, rows_of
from cisformer.model.attention import Block, Dropout, LatentPool, segment_softmax
from cisformer.model.closed_form import LinearStart, change_of_log_odds, link_loss, pace_of
from cisformer.model.closed_form_cis import DISTANCE_EDGES_BP, LocalStart, Windows
from cisformer.model.projection import Projection
from cisformer.model.target_states import TargetStates

LOADING_STD = 0.05
"""Of loadings beyond the linear start, where only h reaches them."""
MOST_LEVERAGE = 0.5
"""Of a training cell in the closed form of a cCRE."""
CELL_KEY_DIM = 16
"""Width in which a cell's state meets the cCREs; narrow, since every open cCRE of a batch carries it."""
PAIRS_AT_ONCE = 200_000
"""Gene–cCRE pairs whose embeddings are multiplied in one go outside training; bounds memory."""


@dataclass(frozen=True)
class CisAttention:
    """What genes of some cells make of the open cCREs near them, edge by edge.

    Attributes
    ----------
    cell, gene, ccre, pair
        Batch row, target number, input number, and number within `Windows` of each edge; int64 [E].
    weight, value
        Attention weight and what it multiplies; float [E, H]. Weights of a (cell, gene, head) sum to less than 1.
    local
        The closed-form-started weight of the pair; float [E].
    """

    cell: Tensor
    gene: Tensor
    ccre: Tensor
    pair: Tensor
    weight: Tensor
    value: Tensor
    local: Tensor

    @property
    def contribution(self) -> Tensor:
        """What each edge adds to its gene's eta; float [E]."""
        return (self.weight * self.value).sum(dim=1) + self.local

    @property
    def effect(self) -> Tensor:
        """Change of the gene's eta if this one cCRE closed, its attention going to the rest; float [E].

        Exact without another pass: per head, out' = (out − w·v) / (1 − w), so out' − out = w (out − v) / (1 − w).
        """
        n_genes = 1 + int(self.gene.max()) if len(self.gene) else 1
        _, segment = torch.unique(self.cell * n_genes + self.gene, return_inverse=True)
        out = self.weight.new_zeros(len(segment), self.weight.shape[1])
        out = out.index_add(0, segment, self.weight * self.value)
        rest = (1 - self.weight).clamp(min=1e-6)
        return (self.weight * (out[segment] - self.value) / rest).sum(dim=1) - self.local


@dataclass(frozen=True)
class Tokens:
    """The distinct inputs of a batch, which its cells share.

    Attributes
    ----------
    place
        Which of them each input number is, if it is among them; int64 [n_input].
    embedding
        Their embeddings; float [P, R].
    table
        The embeddings of all inputs; float [n_input, R].
    """

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
        self.value = nn.Embedding(model.max_express + 1, width) if has_values else None
        self.token_norm = nn.LayerNorm(width)
        self.token_dropout = Dropout(model.dec_emb_dropout)
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
        return Tokens(place, rows_of(self.token.weight, number), self.token.weight)

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


class CisPath(nn.Module):
    """What the open cCREs near a gene add to it.

    Two terms: a sum of one weight per (gene, cCRE) pair over the open ones, started in closed form (`local`), and
    attention of the gene to them, its values started at zero. Per head h,

        score[i, g, p] = <a_h, gene[g] * ccre[p]> + <q_h(cell i), K ccre[p]> + bias_h[signed distance bin]
        value[g, p]    = <b_h, gene[g] * ccre[p]>

    and a null slot takes the attention that no open cCRE deserves. What depends on the pair alone is computed once
    per distinct pair of a batch (in eval mode: once), so that an edge costs only its softmax.
    """

    def __init__(self, n_target: int, windows: Windows, model: Model) -> None:
        super().__init__()
        width, heads = model.emb_rank, model.dec_heads
        self.heads = heads
        self.gene = nn.Embedding(n_target, width)
        self.pair_score = nn.Linear(width, heads, bias=False)
        self.pair_value = nn.Linear(width, heads, bias=False)
        self.cell_query = nn.Linear(width, heads * CELL_KEY_DIM, bias=False)
        self.cell_key = nn.Linear(width, CELL_KEY_DIM, bias=False)
        self.distance_bias = nn.Embedding(2 * len(DISTANCE_EDGES_BP) + 1, heads)
        self.null = nn.Parameter(torch.zeros(heads))
        self.pair_weight = nn.Parameter(torch.zeros(len(windows.gene)))
        self.window_indptr: Tensor
        self.window_gene: Tensor
        self.window_ccre: Tensor
        self.window_bin: Tensor
        for name in ("indptr", "gene", "ccre", "distance_bin"):
            array = torch.from_numpy(getattr(windows, name))
            self.register_buffer(f"window_{name.removeprefix('distance_')}", array, persistent=False)
        self._all_pairs: tuple[tuple[Any, ...], Tensor] | None = None
        nn.init.zeros_(self.distance_bias.weight)
        nn.init.zeros_(self.pair_value.weight)

    def train(self, mode: bool = True) -> CisPath:
        """Switch between training and eval mode; forgets what was computed for all pairs."""
        self._all_pairs = None
        return super().train(mode)

    def forward(self, batch: Batch, h_BR: Tensor, tokens: Tokens, column: Tensor | None) -> Tensor:
        """Return cis, float [B, S]; `column` [F] gives the place of each target among the drawn ones, or −1."""
        edges = self.edges(batch, h_BR, tokens, column)
        place, n_columns = self._places(edges.gene, column)
        out = edges.local.new_zeros(batch.n_cells * n_columns)
        out = out.index_add(0, edges.cell * n_columns + place, edges.contribution)
        return out.reshape(batch.n_cells, n_columns)

    def _places(self, gene_E: Tensor, column: Tensor | None) -> tuple[Tensor, int]:
        """Return the place of each edge's gene among the drawn ones, and the number of these."""
        if column is None:
            return gene_E, len(self.gene.weight)
        return rows_of(column, gene_E), int(column.max()) + 1

    def edges(self, batch: Batch, h_BR: Tensor, tokens: Tokens, column: Tensor | None) -> CisAttention:
        """Return the attention of every (cell, gene, open cCRE) edge whose gene is drawn."""
        token_E, pair_E = self._window_edges(batch, column)
        cell_E = rows_of(ragged_rows(batch.indptr, len(batch.index)), token_E)
        gene_E = rows_of(self.window_gene, pair_E)
        place_E, n_columns = self._places(gene_E, column)
        term_WX, slot_E = self._pair_terms(pair_E, tokens)
        score_EH, value_EH = rows_of(term_WX, slot_E).split(self.heads, dim=1)
        weight_EH = segment_softmax(
            score_EH + self._cell_scores(batch, h_BR, tokens, token_E),
            cell_E * n_columns + place_E,
            batch.n_cells * n_columns,
            self.null,
        )
        return CisAttention(
            cell_E,
            gene_E,
            rows_of(batch.index, token_E),
            pair_E,
            weight_EH,
            value_EH,
            rows_of(self.pair_weight, pair_E),
        )

    def _window_edges(self, batch: Batch, column: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return token number and pair number of every (open cCRE, drawn gene near it); int64 [E] each."""
        start = rows_of(self.window_indptr, batch.index)
        stop = rows_of(self.window_indptr, batch.index + 1)
        drawn_pairs = None
        if column is not None:
            is_drawn = rows_of(column, self.window_gene) >= 0
            drawn_pairs = is_drawn.nonzero().squeeze(1)
            before = F.pad(torch.cumsum(is_drawn, 0), (1, 0))
            start, stop = rows_of(before, start), rows_of(before, stop)
        count = stop - start
        total = int(count.sum())
        token = torch.repeat_interleave(
            torch.arange(len(count), device=count.device), count, output_size=total
        )
        first = torch.cumsum(count, 0) - count
        pair = torch.arange(total, device=count.device) + rows_of(start - first, token)
        return token, pair if drawn_pairs is None else rows_of(drawn_pairs, pair)

    def _cell_scores(self, batch: Batch, h_BR: Tensor, tokens: Tokens, token_E: Tensor) -> Tensor:
        """Return the share of each edge's scores that depends on the cell, float [E, H]."""
        query_BHK = self.cell_query(h_BR).unflatten(-1, (self.heads, -1)) * CELL_KEY_DIM**-0.5
        near_M, place_N = distinct(token_E, len(batch.index))  # tokens with a gene in reach
        ccre_M = rows_of(tokens.place, rows_of(batch.index, near_M))
        of_cells = rows_of(self.cell_key(tokens.embedding), ccre_M).split(
            torch.searchsorted(near_M, batch.indptr).diff().tolist()
        )
        score_MH = torch.cat(
            [key_TK @ query_HK.T for key_TK, query_HK in zip(of_cells, query_BHK, strict=True)]
        )
        return rows_of(score_MH, rows_of(place_N, token_E))

    def _pair_terms(self, pair_E: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Return score and value of distinct pairs, float [W, 2 H], and which of them each edge is."""
        if torch.is_grad_enabled() or self.training:
            pair_W, place = distinct(pair_E, len(self.pair_weight))
            slot_W = rows_of(tokens.place, rows_of(self.window_ccre, pair_W))
            return self._score_pairs(pair_W, rows_of(tokens.embedding, slot_W)), rows_of(place, pair_E)
        weights = (
            tokens.table,
            *(m.weight for m in (self.gene, self.pair_score, self.pair_value, self.distance_bias)),
        )
        state = tuple((w.data_ptr(), w._version, w.device) for w in weights)
        if self._all_pairs is None or self._all_pairs[0] != state:
            self._all_pairs = state, self._all_pair_terms(tokens.table)
        return self._all_pairs[1], pair_E

    def _all_pair_terms(self, table: Tensor) -> Tensor:
        everything = torch.arange(len(self.pair_weight), device=table.device)
        parts = [
            self._score_pairs(part, rows_of(table, rows_of(self.window_ccre, part)))
            for part in everything.split(PAIRS_AT_ONCE)
        ]
        return torch.cat([table.new_zeros(0, 2 * self.heads), *parts])

    def _score_pairs(self, pair_W: Tensor, ccre_WR: Tensor) -> Tensor:
        product_WR = rows_of(self.gene.weight, rows_of(self.window_gene, pair_W)) * ccre_WR
        distance = F.pad(self.distance_bias.weight, (0, self.heads))  # adds to scores alone
        both = torch.cat([self.pair_score.weight, self.pair_value.weight])
        return F.linear(product_WR, both) + rows_of(distance, rows_of(self.window_bin, pair_W))


def drawn(x: Tensor, batch: Batch) -> Tensor:
    """Return what `x`, [F, …], has for the targets drawn for a batch, or all of it; [S, …]."""
    return x if batch.columns is None else rows_of(x, batch.columns)


def distinct(number: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the distinct values of `number` (each < n), ascending, and the place of each among them, int64 [n]."""
    present = torch.zeros(n, dtype=torch.bool, device=number.device)
    present[number] = True
    return present.nonzero().squeeze(1), torch.cumsum(present, 0) - 1


def _place(z_BK: Tensor, h_BR: Tensor) -> Tensor:
    """Return z + h, the narrower one filled with zeros; float [B, max(K, R)]."""
    more = z_BK.shape[1] - h_BR.shape[1]
    return F.pad(h_BR, (0, max(more, 0))) + F.pad(z_BK, (0, max(-more, 0)))


class CisModel(nn.Module):
    """The default model of both directions.

    `forward(batch)` gives the loss of each cell, `predict(batch)` what the user gets.
    """

    def __init__(self, config: Config, layout: Layout, rank: int, windows: Windows | None) -> None:
        super().__init__()
        model = config.model
        n_input, n_target = len(layout.input_index), len(layout.target_index)
        self.layout = layout
        self.projection = Projection(n_input, rank, layout.input_modality)
        self.prior: Tensor
        self.scale: Tensor
        self.pace: Tensor
        self.register_buffer("prior", torch.zeros(n_target))
        self.register_buffer("scale", torch.ones(n_target))
        self.register_buffer("pace", torch.ones(n_target))
        self.validation_r: Tensor
        self.n_validation: Tensor
        self.register_buffer("validation_r", torch.full((n_target,), torch.nan))
        self.register_buffer("n_validation", torch.zeros((), dtype=torch.int64))
        self.hat_basis: Tensor
        self.hat_values: Tensor
        self.hat_ridge: Tensor
        if windows is None:
            self.register_buffer("hat_basis", torch.zeros(rank, rank))
            self.register_buffer("hat_values", torch.ones(rank))
            self.register_buffer("hat_ridge", torch.ones(n_target))
        self.target_axes: Tensor
        self.readout: Tensor
        self.leverage: Tensor
        if windows is not None:
            self.register_buffer("target_axes", torch.zeros(n_target, rank))
            self.register_buffer("readout", torch.zeros(rank, rank))
            self.register_buffer("leverage", torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(n_target))
        width = max(model.emb_rank, rank)
        self.loadings = nn.Parameter(torch.empty(n_target, width).normal_(std=LOADING_STD))
        self.encoder = CellEncoder(n_input, rank, layout.input_modality == "rna", model)
        self.cis = None if windows is None else CisPath(n_target, windows, model)

    @classmethod
    def from_start(
        cls,
        config: Config,
        layout: Layout,
        start: LinearStart,
        windows: Windows | None,
        local: LocalStart | None,
    ) -> CisModel:
        """Build a model that gives the closed-form model's predictions."""
        rank = start.loadings.shape[1]
        model = cls(config, layout, rank, windows)
        model.projection.load_state_dict(start.projection.state_dict())
        with torch.no_grad():
            model.prior.copy_(torch.from_numpy(start.prior))
            model.scale.copy_(torch.from_numpy(start.scale))
            model.pace.copy_(torch.from_numpy(pace_of(start.loadings)))
            model.loadings[:, :rank] = torch.from_numpy(start.loadings) / model.pace[:, None]
            if start.hat is not None:
                for name in ("basis", "values", "ridge"):
                    getattr(model, f"hat_{name}").copy_(torch.from_numpy(getattr(start.hat, name)))
            if start.target_states is not None:
                model.set_target_states(start.target_states)
            if model.cis is not None and local is not None:
                model.add_to_loadings(local.loadings)
                model.bias.copy_(torch.from_numpy(local.bias) / model.pace)
                pace_W = model.pace[model.cis.window_gene]
                model.cis.pair_weight.copy_(torch.from_numpy(local.weight) / pace_W)
        return model

    @property
    def rank(self) -> int:
        """States of the linear path, K."""
        return self.projection.rank

    @torch.no_grad()
    def set_target_states(self, found: TargetStates) -> None:
        """Keep what `held_out_states` and folding in need; zero columns for principal components."""
        own = self.rank - found.axes.shape[1]
        self.target_axes[:, own:] = torch.from_numpy(found.axes)
        self.readout[:, own:] = torch.from_numpy(found.readout)
        self.leverage.fill_(found.leverage)

    @torch.no_grad()
    def held_out_states(self, batch: Batch, z_BK: Tensor) -> Tensor:
        """Return what the states of training cells would be, had the closed form not been fitted to them.

        See `cisformer.model.target_states`; float [B, K].
        """
        assert batch.target_index is not None
        assert batch.target_indptr is not None
        u_BK = F.embedding_bag(
            batch.target_index, self.target_axes / self.scale[:, None], batch.target_indptr[:-1], mode="sum",
            per_sample_weights=batch.target_value,
        ) - (self.prior / self.scale) @ self.target_axes  # fmt: skip
        unit = self.readout.diagonal()
        change = (z_BK @ self.readout - u_BK) * self.leverage / (1 - self.leverage)
        return z_BK + torch.where(unit > 0, change / unit.clamp(min=1e-12), 0.0)

    @torch.no_grad()
    def held_out_change(self, batch: Batch, z_BK: Tensor) -> Tensor:
        """Return what the linear path would say of training cells had it not been fitted to them, less what it says.

        RNA→ATAC; exact for ridge regression: (x − h t) / (1 − h) − x, with t the cell's own target and h its leverage
        (Allen 1974); float [B, S].
        """
        ridge, prior, pace, loadings = (
            drawn(x, batch) for x in (self.hat_ridge, self.prior, self.pace, self.loadings[:, : self.rank])
        )
        p = prior.sigmoid()
        own_BS = (dense_targets(batch, len(self.prior)) - p) / (p * (1 - p))
        share_BK = (z_BK @ self.hat_basis).square()
        leverage_BS = share_BK @ (1 / (self.hat_values[:, None] + ridge))
        leverage_BS = leverage_BS.clamp(max=MOST_LEVERAGE)
        linear_BS = (z_BK @ loadings.T) * pace
        return (linear_BS - own_BS) * leverage_BS / (1 - leverage_BS)

    @torch.no_grad()
    def state_loadings(self) -> Tensor:
        """Return what eta changes by with each of the cell's states; float [F, K]."""
        return self.loadings[:, : self.rank] * self.pace[:, None]

    @torch.no_grad()
    def add_to_loadings(self, change: np.ndarray) -> None:
        """Add to `state_loadings`; float32 [F, ≤ K]."""
        step = torch.from_numpy(change).to(self.pace.device) / self.pace[:, None]
        self.loadings[:, : change.shape[1]] += step

    @torch.no_grad()
    def pair_weights(self) -> Tensor:
        """Return what eta of a gene changes by with each open cCRE near it; float [W], as `Windows` lists pairs."""
        assert self.cis is not None
        return self.cis.pair_weight * self.pace[self.cis.window_gene]

    def validation_error(self) -> Tensor:
        """Return the standard error of `validation_r`, by its large-sample formula; float32 [F]."""
        return ((1 - self.validation_r.square()) / (self.n_validation - 2).clamp(min=1)).sqrt()

    def cell_states(self, batch: Batch) -> Tensor:
        """Return z, the states of the cells; float [B, K]."""
        return self.projection(batch)

    def compile_blocks(self) -> None:
        """Compile the attention blocks with torch.compile; names and values of the weights stay."""
        for block in self.encoder.blocks:
            block.compile()

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, Tokens]:
        """Return z [B, K], h [B, R] and the batch's distinct inputs."""
        z_BK, tokens = self.projection(batch), self.encoder.tokens(batch)
        if self.training and self.cis is not None and batch.target_index is not None:
            z_BK = self.held_out_states(batch, z_BK)
        return z_BK, self.encoder(batch, z_BK, tokens), tokens

    def eta(self, batch: Batch) -> Tensor:
        """Return the link-scale prediction of the drawn targets, or of all; float [B, S]."""
        z_BK, h_BR, tokens = self.encode(batch)
        with torch.autocast(h_BR.device.type, enabled=False):
            return self._move(batch, z_BK, h_BR.float(), tokens)

    def _move(self, batch: Batch, z_BK: Tensor, h_BR: Tensor, tokens: Tokens) -> Tensor:
        """Return the prediction of cells in these states, in single precision."""
        place_BR = _place(z_BK, h_BR)
        bias, loadings, prior, pace = (
            drawn(x, batch) for x in (self.bias, self.loadings, self.prior / self.scale, self.pace)
        )
        moved_BS = torch.addmm(bias, place_BR, loadings.T)
        if self.cis is not None:
            column = None if batch.columns is None else places(batch.columns, len(self.prior))
            moved_BS += self.cis(batch, h_BR, tokens, column)
        moved_BS = moved_BS.mul_(pace)  # in place: with all cCREs of a batch, memory is what costs
        if self.training and self.cis is None and batch.target_index is not None:
            moved_BS = moved_BS + self.held_out_change(batch, z_BK)
        return (change_of_log_odds(moved_BS) if self.cis is None else moved_BS).add_(prior)

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each cell, float [B]; see `closed_form.link_loss`."""
        target_BS = dense_targets(batch, len(self.prior))
        return link_loss(self.eta(batch), target_BS, drawn(self.scale, batch), self.layout.direction)

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the loss of each cell under the mean profile alone, float [B]."""
        prior_BF = (self.prior / self.scale).expand(batch.n_cells, -1)
        return link_loss(prior_BF, dense_targets(batch, len(self.prior)), self.scale, self.layout.direction)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Return probabilities, or log1p-normalised expression ≥ 0, of all known targets; float [B, F]."""
        return self.predict_with_place(batch)[0]

    @torch.no_grad()
    def predict_with_place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what `predict` returns, and the cells' places in the space of the loadings; float [B, R]."""
        z_BK, h_BR, tokens = self.encode(batch)
        with torch.autocast(h_BR.device.type, enabled=False):
            eta_BF = self._move(batch, z_BK, h_BR.float(), tokens)
        rna2atac = self.layout.direction == "rna2atac"
        predicted_BF = eta_BF.sigmoid_() if rna2atac else (eta_BF * self.scale).clamp_(min=0)
        return predicted_BF, _place(z_BK, h_BR.float())

    @torch.no_grad()
    def place(self, batch: Batch) -> Tensor:
        """Return the cells' places in the space of the loadings, z + h; float [B, R]."""
        z_BK, h_BR, _ = self.encode(batch)
        return _place(z_BK, h_BR.float())

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return intercept [F] and loadings [F, R]: eta is prior + link(intercept + place @ loadingsᵀ).

        Without the cis path; the link of RNA→ATAC is `change_of_log_odds`.
        """
        return self.pace * self.bias, self.loadings * self.pace[:, None]

    @torch.no_grad()
    def cis_attention(self, batch: Batch) -> CisAttention:
        """Return each edge's attention and value (in units of `scale`); ATAC→RNA only."""
        assert self.cis is not None
        _, h_BR, tokens = self.encode(batch)
        with torch.autocast(h_BR.device.type, enabled=False):
            edges = self.cis.edges(batch, h_BR.float(), tokens, None)
        pace = rows_of(self.pace, edges.gene)
        return replace(edges, value=edges.value * pace[:, None], local=edges.local * pace)
