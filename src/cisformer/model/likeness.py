"""How like the training cells a cell is: how rare in training the features found in it are, and how deep it is.

The rarity of a cell is the mean of −log of the training frequency over the features found in it. Cells of a type that
was not in training open cCREs, or express genes, that few training cells do. Distances in principal components do not
tell them: what sets them apart is in no component, and training cells are farther out than cells that the components
were not fitted to (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from cisformer.data.batches import Batch, ragged_rows, rows_of

WITHIN = 0.975
"""Share of training cells within the limit."""
DEPTHS = (0.05, 0.5, 0.95)
"""Quantiles of the training cells' number of features found."""


class Likeness(nn.Module):
    """What is usual among training cells.

    Attributes
    ----------
    rarity
        −log of each input feature's frequency in training; float32 [n_input].
    limit
        The mean rarity that `WITHIN` of the training cells do not pass; NaN where nothing is known.
    depth
        `DEPTHS` of the number of features found in a training cell; float32 [3].
    """

    rarity: Tensor
    limit: Tensor
    depth: Tensor

    def __init__(self, n_input: int) -> None:
        super().__init__()
        self.register_buffer("rarity", torch.full((n_input,), torch.nan))
        self.register_buffer("limit", torch.tensor(torch.nan))
        self.register_buffer("depth", torch.full((len(DEPTHS),), torch.nan))

    @property
    def known(self) -> bool:
        """Whether there is anything to compare with: not in checkpoints of earlier versions."""
        return bool(self.limit.isfinite())

    @torch.no_grad()
    def fit(self, cells: sp.csr_matrix, n_open: np.ndarray, n_cells: int) -> None:
        """Learn from the training cells.

        Parameters
        ----------
        cells
            Some of the training cells, known features only [n, n_input]; not zero where a feature is found.
        n_open, n_cells
            In how many of how many training cells each feature is found. A training cell is judged without itself.
        """
        n_found = np.diff(cells.indptr)
        others = (n_open[cells.indices] - 1 + 0.5) / n_cells
        cell = np.repeat(np.arange(cells.shape[0]), n_found)
        mean = np.bincount(cell, -np.log(others), cells.shape[0])[n_found > 0] / n_found[n_found > 0]
        if not len(mean):
            return
        self.rarity.copy_(torch.from_numpy(-np.log((n_open + 0.5) / (n_cells + 1))))
        self.limit.fill_(float(np.quantile(mean, WITHIN)))
        self.depth.copy_(torch.from_numpy(np.quantile(n_found, DEPTHS)))

    @torch.no_grad()
    def distance(self, batch: Batch) -> Tensor:
        """Return the rarity of cells in units of the limit, 0 where nothing is found; float [B]."""
        n_found = batch.indptr.diff()
        total = self.rarity.new_zeros(batch.n_cells)
        total.index_add_(0, ragged_rows(batch.indptr, len(batch.index)), rows_of(self.rarity, batch.index))
        return total / n_found.clamp(min=1) / self.limit

    def unusual_depth(self, n_found: np.ndarray) -> tuple[float, float] | None:
        """Return the median depth of cells and of the training cells where they differ; else `None`.

        They differ where more than half of the cells are below the lowest twentieth of the training cells, or above the
        highest.
        """
        low, middle, high = self.depth.tolist()
        found = float(np.median(n_found))
        return None if low <= found <= high else (found, middle)
