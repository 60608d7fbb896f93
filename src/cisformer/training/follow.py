"""How far to follow training: as far as validation cells are sure of what it gained."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from cisformer.model.checkpoint import Checkpoint
from cisformer.training.split import CellSplit, validation_batches

logger = logging.getLogger(__name__)


def follow_training(best: Checkpoint, start: Checkpoint, cells: CellSplit) -> Checkpoint:
    """Return a model on the way from the start to the best epoch.

    The share of the way is 1 − 1/z², none below z = 1, with z the mean gain of a validation cell over its standard
    error (James and Stein 1961): a few dozen cells choose an epoch by chance, thousands do not. Weights are mixed,
    which is mixing predictions to first order. The share stands in `metrics["training_share"]`.
    """
    gain = validation_losses(start, cells) - validation_losses(best, cells)
    error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.inf
    z = float(gain.mean() / max(error, 1e-12))
    share = 1 - 1 / z**2 if z > 1 else 0.0
    before = dict(start.model.named_parameters())
    with torch.no_grad():
        for name, weight in best.model.named_parameters():
            weight.copy_(torch.lerp(before[name], weight, share))
    logger.info("the gain of training is %.1f standard errors: %.0f%% of it is taken", z, 100 * share)
    return replace(best, metrics=best.metrics | {"training_share": share})


@torch.no_grad()
def validation_losses(checkpoint: Checkpoint, cells: CellSplit) -> np.ndarray:
    """Return the loss of every validation cell, float64 [n]."""
    model = checkpoint.model.eval()
    # In one piece: hundreds of small ones, kept between large ones, would break memory up.
    losses, done = np.empty(len(cells.val_rows)), 0
    for batch in validation_batches(cells.val, cells.val_rows, checkpoint.layout, checkpoint.config):
        losses[done : done + batch.n_cells] = model(batch).numpy()
        done += batch.n_cells
    return losses
