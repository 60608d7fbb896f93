"""How far each target's prediction can be trusted: what validation cells, unknown to the model, say of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from cisformer.data.batches import dense_targets
from cisformer.model.checkpoint import Checkpoint
from cisformer.model.cis import CisModel
from cisformer.training.split import CellSplit, validation_batches

MOST_CELLS = 2_000
"""Validation cells that are predicted for it."""
COVERAGE = 0.9
"""Share of new cells whose expression is to lie within the interval."""


@dataclass(frozen=True)
class Reliability:
    """What is found in validation cells.

    Attributes
    ----------
    r
        Pearson r of prediction and measurement of each target; 0 where the prediction is the same in every cell, NaN
        where the measurement is; float32 [F].
    interval
        Half-width of an interval around the prediction that holds the measurement of a new cell with probability
        `COVERAGE`; NaN with fewer than 9 cells; float32 [F]. Split conformal prediction: Lei et al. 2018, Journal of
        the American Statistical Association 113, section 2.2.
    n_cells
        Number of validation cells.
    """

    r: np.ndarray
    interval: np.ndarray
    n_cells: int


def validation_reliability(checkpoint: Checkpoint, cells: CellSplit) -> Reliability:
    """Predict validation cells, at most `MOST_CELLS`, and compare with what was measured."""
    model = checkpoint.model.eval()
    assert isinstance(model, CisModel)
    rng = np.random.default_rng([checkpoint.config.training.SEED, 8])
    rows = np.sort(rng.choice(cells.val_rows, min(len(cells.val_rows), MOST_CELLS), replace=False))
    sums = torch.zeros(5, len(model.prior), dtype=torch.float64)
    n_kept = (
        len(rows) - math.ceil((len(rows) + 1) * COVERAGE) + 1
    )  # the least of the largest errors is the quantile
    errors = torch.zeros(0, len(model.prior))
    with torch.no_grad():
        for batch in validation_batches(cells.val, rows, checkpoint.layout, checkpoint.config):
            predicted = model.predict(batch).double()
            found = dense_targets(batch, len(model.prior)).double()
            products = (predicted, found, predicted * found, predicted.square(), found.square())
            sums += torch.stack([x.sum(dim=0) for x in products])
            if checkpoint.direction == "atac2rna":
                errors = torch.cat([errors, (predicted - found).abs().float()])
                errors = errors if len(errors) < 4 * n_kept else _largest(errors, n_kept)
    errors = _largest(errors, n_kept)
    interval = errors[-1].numpy() if len(errors) else np.full(len(model.prior), np.nan, np.float32)
    return Reliability(_correlations(sums / len(rows)), interval, len(rows))


def _largest(errors: torch.Tensor, n: int) -> torch.Tensor:
    """Return the `n` largest errors of each target, descending [≤ n, F]."""
    return errors.topk(min(n, len(errors)), dim=0).values


def _correlations(means: torch.Tensor) -> np.ndarray:
    """Return Pearson r of means of prediction, measurement, their product and their squares [5, F]."""
    p, y, py, pp, yy = means.numpy()
    spread_p, spread_y = np.sqrt(np.maximum(pp - p**2, 0)), np.sqrt(np.maximum(yy - y**2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(spread_p > 1e-7, (py - p * y) / (spread_p * spread_y), 0.0)
    return np.where(spread_y > 1e-7, np.clip(r, -1, 1), np.nan).astype(np.float32)
