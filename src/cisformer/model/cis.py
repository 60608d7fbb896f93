"""The default architecture: a linear model, a latent transformer and cis attention, added on the link scale.

    eta[i, f] = prior[f] / scale[f] + link(pace[f] (bias[f] + <z[i] + h[i], B[f]> + cis[i, f]))

The link is the identity for ATAC→RNA, `link_function.change_of_log_odds` for RNA→ATAC. z are fixed states of the
cell (`projection`), B starts in closed form in their columns, h comes from latents that attend to the cell's tokens and
moves the cell in the same space, and cis (ATAC→RNA only) comes from the open cCREs near each gene: a weight per pair,
started in closed form, and attention. h and the attention start at exactly zero: the untrained model *is* the closed
form. The pace, fixed, is how far training may move a target: `closed_form.pace_of`.

Shapes: B cells, N tokens, P distinct tokens, L latents, R embedding width, K components, F targets, E edges, H heads,
D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.config import Config
from cisformer.data.batches import Batch, Layout, dense_targets, places, rows_of, table_rows
from cisformer.model.cell_encoder import CellEncoder, Tokens
from cisformer.model.cis_path import CisAttention, CisPath
from cisformer.model.closed_form import LinearStart, link_loss, pace_of
from cisformer.model.closed_form_cis import LocalStart, Windows
from cisformer.model.likeness import Likeness
from cisformer.model.link_function import LINK_VERSION, change_of_log_odds
from cisformer.model.projection import Projection
from cisformer.model.target_states import TargetStates

LOADING_STD = 0.05
"""Standard deviation of the first loadings that the closed form does not set."""
MOST_LEVERAGE = 0.5
"""Of a training cell in the closed form of a cCRE."""


def drawn(x: Tensor, batch: Batch) -> Tensor:
    """Return what `x`, [F, …], has for the targets drawn for a batch, or all of it; [S, …]."""
    return x if batch.columns is None else rows_of(x, batch.columns)


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
        self.link_version: Tensor
        if windows is None:
            self.register_buffer("hat_basis", torch.zeros(rank, rank))
            self.register_buffer("hat_values", torch.ones(rank))
            self.register_buffer("hat_ridge", torch.ones(n_target))
            self.register_buffer("link_version", torch.tensor(LINK_VERSION))
        self.target_axes: Tensor
        self.readout: Tensor
        self.leverage: Tensor
        self.interval_90: Tensor
        if windows is not None:
            self.register_buffer("interval_90", torch.full((n_target,), torch.nan))
            self.register_buffer("target_axes", torch.zeros(n_target, rank))
            self.register_buffer("readout", torch.zeros(rank, rank))
            self.register_buffer("leverage", torch.zeros(()))
        self.likeness = Likeness(n_input, rank)
        self.sparse_gradient = False
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
                for buffer, value in (
                    (model.hat_basis, start.hat.basis),
                    (model.hat_values, start.hat.spread),
                    (model.hat_ridge, start.hat.ridge),
                ):
                    buffer.copy_(torch.from_numpy(value))
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

    @torch.no_grad()
    def distance(self, batch: Batch) -> Tensor:
        """Return how unlike the training cells each cell is, above 1 if very; see `likeness`, float [B]."""
        return self.likeness.distance(batch, self.cell_states(batch) * self.projection.principal)

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

    def _drawn_loadings(self, batch: Batch) -> Tensor:
        if batch.columns is None:
            return self.loadings
        return table_rows(self.loadings, batch.columns, sparse_gradient=self.sparse_gradient)

    def sparse_gradients(self) -> Tensor:
        """Give a sparse gradient to the table with a row per cCRE from now on, and return that table."""
        if self.cis is not None:
            self.encoder.sparse_gradient = True
            return self.encoder.token.weight
        self.sparse_gradient = True
        return self.loadings

    def _move(self, batch: Batch, z_BK: Tensor, h_BR: Tensor, tokens: Tokens) -> Tensor:
        """Return the prediction of cells in these states, in single precision."""
        place_BR = _place(z_BK, h_BR)
        bias, prior, scale, pace = (drawn(x, batch) for x in (self.bias, self.prior, self.scale, self.pace))
        prior, loadings = prior / scale, self._drawn_loadings(batch)
        moved_BS = torch.addmm(bias, place_BR, loadings.T)
        if self.cis is not None:
            column = None if batch.columns is None else places(batch.columns, len(self.prior))
            moved_BS += self.cis(batch, h_BR, tokens, column)
        moved_BS = moved_BS.mul_(pace)  # in place: with all cCREs of a batch, memory is what costs
        if self.training and self.cis is None and batch.target_index is not None:
            moved_BS = moved_BS + self.held_out_change(batch, z_BK)
        if self.cis is None:
            moved_BS = change_of_log_odds(moved_BS, prior, int(self.link_version))
        return moved_BS.add_(prior)

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
    def cis_attention(self, batch: Batch, at_once: int | None = None) -> Iterator[CisAttention]:
        """Yield the edges of all cells, or of some `at_once`; ATAC→RNA only. `pace` takes values to eta's unit."""
        assert self.cis is not None
        _, h_BR, tokens = self.encode(batch)
        size = at_once or batch.n_cells
        with torch.autocast(h_BR.device.type, enabled=False):
            for part, h_PR in zip(batch.split(size), h_BR.float().split(size), strict=True):
                yield self.cis.edges(part, h_PR, tokens, None)
