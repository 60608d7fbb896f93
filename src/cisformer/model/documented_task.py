"""The documented architecture as training and prediction see it: targets, losses, draws, and values.

ATAC→RNA. A gene's class is 0 where it is not expressed, else one of `max_express` bins of equal width of its
log1p counts relative to the cell's maximum. The loss is cross-entropy over genes drawn uniformly from all
that training knows, never from those that the cell expresses. The prediction is the expected log1p-normalised
expression, each class standing for its mean over the training cells. Genes see each other, so they are
predicted in blocks of as many as in training.

RNA→ATAC. Half of the drawn cCREs are open and half closed; the loss is binary cross-entropy. Such a sample
shifts all log-odds of a cell by a known amount,

    shift = log(drawn open / open) − log(drawn closed / closed)

and the loss is taken at logit + base + shift, `base` being the log-odds of being open in the training cells:
over all cCREs, or of each where `prior` is set. So logit + base is calibrated as it stands, while the logit
alone means what it means in the published program.

Shapes: B cells, S drawn targets, F known targets, K classes, N tokens of all cells.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cisformer.config import Config
from cisformer.data.batches import Batch, Layout, ragged_rows, read_modality, row_blocks
from cisformer.data.reference import Reference
from cisformer.data.store import CellStore
from cisformer.errors import InputError
from cisformer.model.cell_encoder import attended_tokens
from cisformer.model.closed_form import FeatureCounts, link_moments
from cisformer.model.documented import FullModel, Keys
from cisformer.runtime.device import multiplies_bf16


@dataclass(frozen=True)
class Drawn:
    """Targets drawn for a batch.

    Attributes
    ----------
    column
        Which known targets; int64 [B, S].
    target
        Class of each gene (int64), or 1 for an open cCRE (float32); [B, S].
    shift
        What the draw adds to the log-odds of each cell's cCREs; float32 [B, 1].
    """

    column: Tensor
    target: Tensor
    shift: Tensor


class FullTask(nn.Module):
    """The documented architecture with the interface of `CisModel`.

    Parameters
    ----------
    config
        A configuration with `architecture: full`.
    layout
        The features that the model knows.
    network
        A network to use; a new one otherwise.
    """

    def __init__(self, config: Config, layout: Layout, network: FullModel | None = None) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.network = network or FullModel(config.model, layout.direction)
        n_targets, limit = len(layout.target_index), config.datapreprocess.dec_max_len
        self.n_drawn = n_targets if limit == "whole" else min(limit, n_targets)
        classes = (config.model.max_express + 1,)
        self.prior: Tensor
        self.level: Tensor
        self.class_value: Tensor
        self.input_row: Tensor
        self.target_row: Tensor
        self.register_buffer("prior", torch.zeros(n_targets, *classes * (layout.direction == "atac2rna")))
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("class_value", torch.zeros(classes))
        self.register_buffer("input_row", torch.from_numpy(layout.input_index), persistent=False)
        self.register_buffer("target_row", torch.from_numpy(layout.target_index), persistent=False)

    @classmethod
    def from_start(
        cls, config: Config, layout: Layout, store: CellStore, rows: np.ndarray, counts: FeatureCounts
    ) -> FullTask:
        """Return an untrained model that knows the frequencies of training; with `prior` it predicts them."""
        task = cls(config, layout)
        if layout.direction == "rna2atac":
            task.prior.copy_(torch.from_numpy(link_moments(counts, layout)[0]))
            task.level.copy_(task.prior.sigmoid().mean().logit())
        else:
            task._count_classes(store, rows)
        if config.model.prior:
            nn.init.zeros_(task.network.to_out.weight)
            nn.init.zeros_(task.network.to_out.bias)
        return task

    @classmethod
    def from_published(cls, config: Config, network: FullModel, n_genes: int, n_ccres: int) -> FullTask:
        """Return a model of all features around published weights, of whose training nothing is known.

        ATAC→RNA then gives log1p counts relative to the cell's maximum (middles of bins, between 0 and 1),
        and RNA→ATAC the probability in a half-open half-closed sample.
        """
        genes, ccres = np.arange(n_genes), np.arange(n_ccres)
        source, target = (ccres, genes) if network.direction == "atac2rna" else (genes, ccres)
        task = cls(config, Layout(network.direction, source, target, len(source), len(target)), network)
        n_bins = config.model.max_express
        task.class_value[1:] = (torch.arange(n_bins) + 0.5) / n_bins
        return task

    def _count_classes(self, store: CellStore, rows: np.ndarray) -> None:
        """Set the log-frequency of every gene's classes, and the mean expression of each class."""
        n_targets, n_classes = self.prior.shape
        count, total = torch.zeros(n_targets * n_classes), torch.zeros(n_classes)
        for part in row_blocks(rows):
            cells = read_modality(store, part, "rna")[:, self.layout.target_index]
            value, gene = torch.from_numpy(cells.data), torch.from_numpy(cells.indices).long()
            gene_class = self._classes(value, torch.from_numpy(cells.indptr).long())
            count += torch.bincount(gene * n_classes + gene_class, minlength=len(count))
            total += torch.bincount(gene_class, value, minlength=n_classes)
        count = count.view_as(self.prior)
        count[:, 0] = len(rows) - count.sum(dim=1)
        share = count.sum(dim=0) / count.sum()
        self.prior.copy_(((count + share + 1e-6) / (len(rows) + 1)).log())
        self.class_value.copy_(total / count.sum(dim=0).clamp(min=1))

    @property
    def base(self) -> Tensor:
        """What is added to the logits of known targets: their prior, or the log-odds over all cCREs."""
        return self.prior if self.config.model.prior else self.level.expand_as(self.prior)

    @property
    def rank(self) -> int:
        """Components of the linear path: there is none."""
        return 0

    # ---- training

    def compile_blocks(self) -> None:
        """Compile the attention layers with torch.compile; names and values of the weights stay."""
        for layer in self.network.layers:
            layer.compile()

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each cell over drawn targets, float32 [B]; the draw is fixed in eval mode."""
        drawn = self.draw(batch)
        with self._precision():
            logits = torch.cat(list(self._decode(self._encode(batch), self.target_row[drawn.column])), dim=1)
        return self._loss(logits.float() + self.base[drawn.column], drawn)

    def mean_loss(self, batch: Batch) -> Tensor:
        """Return the loss of each cell under the mean profile alone, float32 [B]."""
        drawn = self.draw(batch)
        return self._loss(self.prior[drawn.column], drawn)

    def _loss(self, eta: Tensor, drawn: Drawn) -> Tensor:
        if self.layout.direction == "atac2rna":
            return F.cross_entropy(eta.transpose(1, 2), drawn.target, reduction="none").mean(dim=1)
        shifted = eta + drawn.shift
        return F.binary_cross_entropy_with_logits(shifted, drawn.target, reduction="none").mean(dim=1)

    def draw(self, batch: Batch) -> Drawn:
        """Draw targets: anew in training; in eval mode the same for a cell whichever batch it is in."""
        assert batch.target_indptr is not None
        assert batch.target_index is not None
        if self.layout.direction == "atac2rna":
            return self._draw_genes(batch, None if self.training else torch.Generator().manual_seed(0))
        draws = []
        for open_ in batch.target_index.cpu().split(batch.target_indptr.diff().tolist()):
            rng = None if self.training else torch.Generator().manual_seed(int(open_.sum()))
            draws.append(_half_open(open_, len(self.prior), self.n_drawn, rng))
        column, target, shift = (torch.stack(x).to(self.prior.device) for x in zip(*draws, strict=True))
        return Drawn(column, target, shift[:, None])

    def _draw_genes(self, batch: Batch, rng: torch.Generator | None) -> Drawn:
        """Draw genes for all cells together, or take those that the batch brings."""
        assert batch.target_indptr is not None
        assert batch.target_index is not None
        assert batch.target_value is not None
        column = batch.columns
        if column is None:
            column = torch.randperm(len(self.prior), generator=rng)[: self.n_drawn].to(self.prior.device)
        cell = ragged_rows(batch.target_indptr, len(batch.target_index))
        dense = torch.zeros(batch.n_cells, len(self.prior), dtype=torch.int64, device=cell.device)
        dense[cell, batch.target_index] = self._classes(batch.target_value, batch.target_indptr)
        return Drawn(
            column.expand(batch.n_cells, -1), dense[:, column], self.prior.new_zeros(batch.n_cells, 1)
        )

    def _classes(self, value: Tensor, indptr: Tensor) -> Tensor:
        """Return 1..`max_express`: bins of log1p counts relative to the cell's maximum; int64 [N]."""
        cell, n_bins = ragged_rows(indptr, len(value)), len(self.class_value) - 1
        logs = counts_of(value, indptr).log1p()
        top = logs.new_zeros(len(indptr) - 1).scatter_reduce(0, cell, logs, "amax")
        return (logs / top[cell] * n_bins - 1e-4).ceil().long().clamp(1, n_bins)

    # ---- prediction

    @torch.no_grad()
    def predict(self, batch: Batch) -> Tensor:
        """Return probabilities or expected log1p-normalised expression of all known targets, float32 [B, F].

        Cells are taken one by one, and targets in blocks, so that memory does not grow with either.
        """
        predicted = self.prior.new_empty(batch.n_cells, len(self.prior))
        order = self._order()
        for cell in range(batch.n_cells):
            with self._precision():
                context = self._encode(batch, cell)
                logits = torch.cat(list(self._decode(context, self.target_row[order][None])), dim=1)[0]
            predicted[cell, order] = self._values(logits.float() + self.base[order])
        return predicted

    def _values(self, eta: Tensor) -> Tensor:
        if self.layout.direction == "rna2atac":
            return eta.sigmoid()
        return eta.softmax(dim=-1) @ self.class_value

    def _order(self) -> Tensor:
        """Return the known targets in the order of decoding: genes mixed, as in the draws of training."""
        n_targets = len(self.prior)
        if self.layout.direction == "rna2atac":
            return torch.arange(n_targets, device=self.prior.device)
        return torch.randperm(n_targets, generator=torch.Generator().manual_seed(0)).to(self.prior.device)

    @torch.no_grad()
    def pair_ranks(self, batch: Batch, cell: int, gene: Tensor, token: Tensor) -> Tensor:
        """Return the two-way rank of one cell's attention of genes to open cCREs, float32 [E]; ATAC→RNA only.

        Parameters
        ----------
        batch, cell
            A batch, and which of its cells.
        gene, token
            Known targets, and places among the tokens that attention sees of this cell; int64 [E].
        """
        order, place = self._order(), torch.empty(len(self.prior), dtype=torch.int64)
        place[order.cpu()] = torch.arange(len(order))
        with self._precision():
            context = self._encode(batch, cell)
            genes = self._blocks(self.target_row[order][None])
            parts = [self.network.last_attention(context, rows) for rows in genes]
        return pair_ranks(torch.cat([q for q, _ in parts], dim=1), parts[0][1], place[gene], token)

    def _encode(self, batch: Batch, cell: int | None = None) -> list[Keys]:
        """Return the context of a batch, or of one of its cells."""
        index, value, indptr = attended_tokens(batch)
        count = value
        if (
            self.layout.direction == "rna2atac"
        ):  # of the whole cell: its least value is 1 count, attended or not
            count = counts_of(batch.value, batch.indptr)
            count = count if batch.token is None else count[batch.token]
        lengths = indptr.diff().tolist()
        cells = slice(None) if cell is None else slice(cell, cell + 1)
        rows = pad_sequence(self.input_row[index].split(lengths)[cells], batch_first=True, padding_value=-1)
        counts = pad_sequence(count.long().split(lengths)[cells], batch_first=True)
        return self.network.encode(rows, counts.clamp(max=self.config.model.max_express))

    def _decode(self, context: list[Keys], rows_BS: Tensor) -> Iterator[Tensor]:
        """Yield the logits of targets, block by block."""
        for part in self._blocks(rows_BS):
            yield from self.network.decode_chunks(context, part)

    def _blocks(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Return targets in as few blocks of equal size as training's limit allows; cCREs in one."""
        if self.layout.direction == "rna2atac":
            return (rows,)
        return rows.tensor_split(math.ceil(rows.shape[-1] / self.n_drawn), dim=-1)

    def _precision(self) -> AbstractContextManager[Any]:
        """Return a context that computes in bfloat16 where that is fast."""
        device = self.prior.device
        return torch.autocast(device.type, torch.bfloat16) if multiplies_bf16(device) else nullcontext()

    def with_targets(self, rows: np.ndarray) -> FullTask:
        """Return a model with the same network that predicts these reference rows (ascending, int64).

        Rows that training did not know get the mean prior.
        """
        task = FullTask(self.config, replace(self.layout, target_index=rows), self.network)
        task.n_drawn = min(max(1, self.n_drawn), len(rows))
        place = np.searchsorted(self.layout.target_index, rows).clip(max=len(self.prior) - 1)
        known = torch.from_numpy(self.layout.target_index[place] == rows)
        prior = self.prior.cpu()
        task.prior.copy_(prior.mean(dim=0))
        task.prior[known] = prior[torch.from_numpy(place)][known]
        task.level.copy_(self.level)
        task.class_value.copy_(self.class_value)
        return task.train(self.training)

    def with_chunk(self, n_ccres: int) -> FullTask:
        """Return a model of the same weights that decodes so many cCREs together."""
        task = self.with_targets(self.layout.target_index)
        task.network = copy.copy(self.network)
        task.network.chunk = n_ccres
        return task


def counts_of(value: Tensor, indptr: Tensor) -> Tensor:
    """Return counts from log1p-normalised expression of ragged cells, their least being 1: float32 [N]."""
    cell, linear = ragged_rows(indptr, len(value)), value.expm1()
    least = linear.new_full((len(indptr) - 1,), torch.inf).scatter_reduce(0, cell, linear, "amin")
    return (linear / least[cell]).round()


def _half_open(
    open_: Tensor, n: int, n_drawn: int, rng: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw `n_drawn` of `n` cCREs, half of them open if there are; return them, labels and shift."""
    closed = torch.ones(n, dtype=torch.bool)
    closed[open_] = False
    closed_ = closed.nonzero().squeeze(1)
    n_open = max(min(n_drawn // 2, len(open_)), n_drawn - len(closed_))
    n_closed = n_drawn - n_open
    chosen = [
        pool[torch.randperm(len(pool), generator=rng)[:size]]
        for pool, size in ((open_, n_open), (closed_, n_closed))
    ]
    shift = _log_share(n_open, len(open_)) - _log_share(n_closed, len(closed_))
    label = (torch.arange(n_drawn) < n_open).float()
    return torch.cat(chosen), label, torch.tensor(shift)


def _log_share(drawn: int, among: int) -> float:
    return math.log(drawn / among) if drawn else 0.0


def choose_genes(genes: str | Path, layout: Layout, reference: Reference) -> np.ndarray:
    """Return the reference rows of the genes to predict, ascending int64: never those that a cell expresses.

    Parameters
    ----------
    genes
        "expressed_in_training", "all", or a file with one gene id or name a line.
    layout, reference
        Of the model.

    Raises
    ------
    InputError
        The file is missing, or names genes that the reference does not have.
    """
    if genes == "expressed_in_training":
        return layout.target_index
    if genes == "all":
        return np.arange(layout.n_target_reference)
    try:
        names = Path(genes).read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"gene list {genes} cannot be read: {error}", hint="one gene id or name a line"
        ) from None
    table = reference.genes
    row_of = {label: row for key in ("gene_name", "gene_id") for row, label in enumerate(table[key])}
    unknown = [name for name in names if name not in row_of]
    if unknown or not names:
        found = f"{len(unknown)} genes that reference '{reference.name}' does not have, such as {unknown[:3]}"
        raise InputError(
            f"{genes} names {found if names else 'no genes'}", hint="use ids or names of the reference"
        )
    return np.unique([row_of[name] for name in names]).astype(np.int64)


def pair_ranks(q_HMD: Tensor, k_HTD: Tensor, query_E: Tensor, key_E: Tensor, block: int = 256) -> Tensor:
    """Return the two-way rank of attention weights of pairs (query, key), float32 [E] in 0 to 1.

    A weight, mean over heads, has a rank among all keys of its query and one among all queries of its key;
    each is scaled to 0 (lowest) to 1 (highest), and the two are averaged. No more than `block` rows or
    columns of the matrix of weights exist at a time: a first pass goes by rows and keeps the softmax sums, a
    second by columns.
    """
    q_HMD = q_HMD.float() * q_HMD.shape[-1] ** -0.5
    k_HTD = k_HTD.float()
    log_sums, by_row = [], torch.empty(len(query_E))
    for start, q_part in zip(range(0, q_HMD.shape[1], block), q_HMD.split(block, dim=1), strict=True):
        scores = q_part @ k_HTD.mT
        log_sums.append(scores.logsumexp(dim=-1, keepdim=True))
        inside = (query_E >= start) & (query_E < start + block)
        weights = (scores - log_sums[-1]).exp().mean(dim=0)
        by_row[inside] = _rank_in_rows(weights, query_E[inside] - start, key_E[inside])
    by_column, log_sum = torch.empty(len(key_E)), torch.cat(log_sums, dim=1)
    for start, k_part in zip(range(0, k_HTD.shape[1], block), k_HTD.split(block, dim=1), strict=True):
        weights = (q_HMD @ k_part.mT - log_sum).exp().mean(dim=0)
        inside = (key_E >= start) & (key_E < start + block)
        by_column[inside] = _rank_in_rows(weights.T, key_E[inside] - start, query_E[inside])
    return (by_row + by_column) / 2


def _rank_in_rows(matrix: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Return the scaled rank (0 to 1, ties by position) of entries within their rows."""
    rank = matrix.argsort(dim=1, stable=True).argsort(dim=1)
    return rank[row, column].cpu() / max(1, matrix.shape[1] - 1)
