"""The closed-form start of a training, and what validation cells add to it at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cisformer.config import Config, Direction
from cisformer.data.batches import Layout
from cisformer.data.store import CellStore
from cisformer.errors import TrainingError
from cisformer.model.checkpoint import Checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.closed_form import FeatureCounts, LinearStart, fit_linear, learn_from
from cisformer.model.closed_form_cis import Windows, fit_local
from cisformer.training.split import CellSplit


def fold_in(best: Checkpoint, cells: CellSplit) -> Checkpoint:
    """Return `best` with what the validation cells add to its closed-form part.

    Validation has then done its work: choosing rank, penalty and epoch. The closed form of training and validation
    cells, less that of training cells alone, goes into prior and loadings; all else stays. The recorded losses are
    those from before, when the validation cells were unknown to the model.
    """
    model, rank = best.model, int(best.metrics["linear_rank"])
    assert isinstance(model, CisModel)
    train, val = (cells.train, cells.train_rows), (cells.val, cells.val_rows)
    options: dict[str, Any] = {"rank": rank, "ridge": best.metrics["linear_ridge"]}
    scale = model.scale.numpy()
    _, before = learn_from([train], model.projection, best.layout, scale, **options)
    prior, after = learn_from([train, val], model.projection, best.layout, scale, **options)
    with torch.no_grad():
        model.prior.copy_(torch.from_numpy(prior))
        model.add_to_loadings(after - before)
    metrics = best.metrics | {"n_validation_cells_folded_in": len(cells.val_rows)}
    return Checkpoint(model, best.config, best.reference, metrics, best.folder)


def fit_closed_form(
    config: Config, cells: CellSplit, layout: Layout, counts: FeatureCounts
) -> tuple[CisModel, LinearStart]:
    """Return the closed-form model of training cells as a network, rank and penalties chosen on validation cells."""
    model, seed = config.model, config.training.SEED
    data = cells.train, cells.train_rows, cells.val, cells.val_rows, layout
    start = fit_linear(
        *data, counts, rank=min(model.linear_rank, model.emb_rank), ridge=model.linear_ridge, seed=seed
    )
    if layout.direction == "rna2atac":
        return CisModel.from_start(config, layout, start, None, None), start
    windows = Windows.of(cells.train.reference, layout, model.cis_window)
    local = fit_local(*data, start, windows, seed)
    return CisModel.from_start(config, layout, start, windows, local), start


def make_layout(counts: FeatureCounts, direction: Direction, store: CellStore) -> Layout:
    """Return the features seen in training cells.

    Raises
    ------
    TrainingError
        No feature of a modality was seen.
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
    return layout
