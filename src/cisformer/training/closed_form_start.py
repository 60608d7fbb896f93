"""The closed-form start of a training, and what validation cells add to it at the end.

The fits themselves are in `model.target_states` (ATAC→RNA), `model.closed_form_atac` (RNA→ATAC) and
`model.closed_form_cis` (cCREs near a gene); here is which of them are used, on which cells.
"""

from __future__ import annotations

import numpy as np
import torch

from cisformer.config import Config, Direction
from cisformer.data.batches import Layout
from cisformer.data.store import CellStore
from cisformer.errors import TrainingError
from cisformer.model.cell_rows import CellRows
from cisformer.model.checkpoint import Checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.closed_form import (
    FeatureCounts,
    LinearStart,
    StartOptions,
    count_features,
    fit_linear,
    fitting_sample,
)
from cisformer.model.closed_form_atac import Penalty, Sums, beside, solve
from cisformer.model.closed_form_cis import Windows, fit_local
from cisformer.model.projection import states
from cisformer.model.target_states import CellRidge, assemble, axis_scores
from cisformer.training.split import CellSplit

LIKENESS_CELLS = 5_000
"""At most so many training cells that say what is usual among them."""


def fold_in(best: Checkpoint, cells: CellSplit) -> Checkpoint:
    """Return `best` with what the validation cells add to its closed-form part.

    Validation has then done its work: choosing rank, penalty and epoch. The closed form of training and validation
    cells, less that of training cells alone, goes into prior, states and loadings; all else stays. The recorded
    losses are those from before, when the validation cells were unknown to the model.
    """
    model = best.model
    assert isinstance(model, CisModel)
    train, val = both_sides(cells)
    if best.direction == "rna2atac":
        _fold_into_loadings(model, best, train, val)
    elif (model.readout.diagonal() > 0).any():
        _fold_into_states(model, best, cells)
    metrics = best.metrics | {"n_validation_cells_folded_in": len(val)}
    return Checkpoint(model, best.config, best.reference, metrics, best.folder)


@torch.no_grad()
def _fold_into_loadings(model: CisModel, best: Checkpoint, train: CellRows, val: CellRows) -> None:
    penalty = Penalty.from_metrics(best.metrics)
    near = beside(best.reference.ccres.iloc[best.layout.target_index])
    before, more = (Sums.over(part, model.projection, best.layout) for part in (train, val))
    after, sd = before + more, model.projection.sd.double().numpy()
    model.prior.copy_(torch.from_numpy(after.prior()))
    model.add_to_loadings(solve(after, sd, penalty, near) - solve(before, sd, penalty, near))


@torch.no_grad()
def _fold_into_states(model: CisModel, best: Checkpoint, cells: CellSplit) -> None:
    train, val = both_sides(cells)
    seed, layout = best.config.training.SEED, best.layout
    counts = count_features(cells.val, cells.val_rows, best.direction)
    added = counts.total[layout.target_index]
    mean = (model.prior.double().numpy() * len(train) + added) / (len(train) + len(val))
    sample = fitting_sample(train + val, counts, np.random.default_rng([seed, 7])).read(layout)
    supervised = ~model.projection.principal
    axes, scale = model.target_axes[:, supervised].double().numpy(), model.scale.numpy()
    scores = axis_scores(sample.y, mean, scale, axes)
    ridge = CellRidge(model.projection.features(sample.x), scores, np.random.default_rng([seed, 6]))
    unit = model.readout.diagonal()[supervised].double().numpy()
    projection, found = assemble(model.projection, ridge, axes, best.metrics["linear_ridge"], unit)
    before = model.readout[:, supervised].double().numpy()
    model.projection.load_state_dict(projection.state_dict())
    model.prior.copy_(torch.from_numpy(mean.astype(np.float32)))
    model.add_to_loadings((axes @ (found.readout - before).T).astype(np.float32))
    model.set_target_states(found)


def both_sides(cells: CellSplit) -> tuple[CellRows, CellRows]:
    """Return training and validation cells."""
    return CellRows.of(cells.train, cells.train_rows), CellRows.of(cells.val, cells.val_rows)


def fit_closed_form(
    config: Config, cells: CellSplit, layout: Layout, counts: FeatureCounts
) -> tuple[CisModel, LinearStart]:
    """Return the closed-form model of training cells as a network, rank and penalties chosen on validation cells."""
    model, seed = config.model, config.training.SEED
    train, val = both_sides(cells)
    options = StartOptions(model.linear_rank, model.linear_ridge, seed)
    start = fit_linear(train, val, layout, counts, options)
    windows = local = None
    if layout.direction == "atac2rna":
        windows = Windows.of(cells.train.reference, layout, model.cis_window)
        local = fit_local(train, val, layout, start, windows, seed)
    network = CisModel.from_start(config, layout, start, windows, local)
    some, projection = train.sample(LIKENESS_CELLS, np.random.default_rng([seed, 9])), network.projection
    z = np.concatenate([states(projection, store, rows, layout) for store, rows in some.parts])
    frequency = (counts.n_open[layout.input_index] + 0.5) / (counts.n_cells + 1)
    network.likeness.fit(some.read(layout).x, z * projection.principal.numpy(), frequency, seed)
    return network, start


def make_layout(counts: FeatureCounts, direction: Direction, store: CellStore) -> Layout:
    """Return the features seen in training cells.

    Raises
    ------
    TrainingError
        No feature of a modality was seen, or every cCRE is open in every cell.
    """
    reference = store.reference
    sizes = (reference.n_ccres, reference.n_genes)
    n_input, n_target = sizes if direction == "atac2rna" else sizes[::-1]
    layout = Layout(
        direction, np.flatnonzero(counts.n_open), np.flatnonzero(counts.n_seen), n_input, n_target
    )
    for index, modality in (
        (layout.input_index, layout.input_modality),
        (layout.target_index, layout.target_modality),
    ):
        if len(index) == 0:
            raise TrainingError(
                f"the training cells in {store.path} hold no {modality.upper()} at all",
                hint="preprocess again",
            )
    n_open = (counts.n_seen if direction == "rna2atac" else counts.n_open).astype(np.int64)
    if n_open[n_open > 0].min() == counts.n_cells:
        raise TrainingError(
            f"every cCRE seen in {store.path} is open in all {counts.n_cells} training cells: nothing to learn",
            hint="preprocess counts or 0/1, not smoothed or scaled values: any value above 0 is taken as open",
        )
    return layout
