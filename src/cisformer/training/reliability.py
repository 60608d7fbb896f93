"""How far each target's prediction can be trusted: its correlation with what was measured in validation cells."""

from __future__ import annotations

import numpy as np
import torch

from cisformer.data.batches import dense_targets
from cisformer.model.checkpoint import Checkpoint
from cisformer.model.cis import CisModel
from cisformer.training.split import CellSplit, validation_batches

MOST_CELLS = 2_000
"""Validation cells that are predicted for it."""


def validation_correlations(checkpoint: Checkpoint, cells: CellSplit) -> tuple[np.ndarray, int]:
    """Return Pearson r of prediction and measurement across validation cells, and the number of cells.

    Returns
    -------
    tuple[numpy.ndarray, int]
        float32 [F], 0 where the prediction is the same in every cell, NaN where the measurement is.
    """
    model = checkpoint.model.eval()
    assert isinstance(model, CisModel)
    rng = np.random.default_rng([checkpoint.config.training.SEED, 8])
    rows = np.sort(rng.choice(cells.val_rows, min(len(cells.val_rows), MOST_CELLS), replace=False))
    sums = torch.zeros(5, len(model.prior), dtype=torch.float64)
    with torch.no_grad():
        for batch in validation_batches(cells.val, rows, checkpoint.layout, checkpoint.config):
            predicted = model.predict(batch).double()
            found = dense_targets(batch, len(model.prior)).double()
            products = (predicted, found, predicted * found, predicted.square(), found.square())
            sums += torch.stack([x.sum(dim=0) for x in products])
    p, y, py, pp, yy = (sums / len(rows)).numpy()
    spread_p, spread_y = np.sqrt(np.maximum(pp - p**2, 0)), np.sqrt(np.maximum(yy - y**2, 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(spread_p > 1e-7, (py - p * y) / (spread_p * spread_y), 0.0)
    return np.where(spread_y > 1e-7, np.clip(r, -1, 1), np.nan).astype(np.float32), len(rows)
