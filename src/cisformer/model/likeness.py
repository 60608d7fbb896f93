"""How like the training cells a cell is: how rare its features are among those that it resembles, and how deep it is.

Training cells are put in groups by their states (k-means). The rarity of a cell in a group is the mean of −log of the
frequency there, over the features found in the cell. Of two groups the mean counts: the nearest one by states, and the
one in which the cell's features are least rare. A cell of a type that was not in training resembles some group, and has
features that are rare there, common as they may be elsewhere; and none in which all its features are common. Distances
in principal components do not tell such cells: what sets them apart is in no component, and training cells are farther
out than cells that the components were not fitted to (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import warnings

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.data.batches import Batch

N_GROUPS, GROUP_CELLS = 20, 50
"""At most so many groups of training cells, of so many cells on average at least."""
WITHIN = 0.975
"""Share of training cells within the limit."""
DEPTHS = (0.05, 0.5, 0.95)
"""Quantiles of the training cells' number of features found."""


class Likeness(nn.Module):
    """What is usual among training cells.

    Attributes
    ----------
    centres
        Mean states of each group of training cells; float32 [N_GROUPS, K].
    rarity
        −log of each input feature's frequency in each group; float32 [n_input, N_GROUPS].
    limit
        The rarity that `WITHIN` of the training cells do not pass; NaN where nothing is known.
    depth
        `DEPTHS` of the number of features found in a training cell; float32 [3].
    """

    centres: Tensor
    rarity: Tensor
    limit: Tensor
    depth: Tensor

    def __init__(self, n_input: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(N_GROUPS, rank))
        self.register_buffer("rarity", torch.full((n_input, N_GROUPS), torch.nan))
        self.register_buffer("limit", torch.tensor(torch.nan))
        self.register_buffer("depth", torch.full((len(DEPTHS),), torch.nan))

    @property
    def known(self) -> bool:
        """Whether there is anything to compare with: not in checkpoints of earlier versions."""
        return bool(self.limit.isfinite())

    @torch.no_grad()
    def fit(self, cells: sp.csr_matrix, z: np.ndarray, frequency: np.ndarray, seed: int) -> None:
        """Learn from training cells; the limit is theirs, each judged without itself.

        Parameters
        ----------
        cells
            Some of the training cells, known features only [n, n_input]; not zero where a feature is found.
        z
            Their states; float32 [n, K].
        frequency
            Of each feature among all training cells, above 0; it counts as one more cell of each group [n_input].
        seed
            Of the groups' first centres.
        """
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        n_found = np.diff(cells.indptr)
        if not n_found.any():
            return
        groups = KMeans(min(N_GROUPS, max(1, len(z) // GROUP_CELLS)), n_init=1, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different cells than groups
            labels = groups.fit_predict(z)
        filled, group = np.unique(labels, return_inverse=True)
        size = len(filled)
        found = sp.csr_matrix((np.ones(cells.nnz, np.float32), cells.indices, cells.indptr), cells.shape)
        rarity, own = np.zeros((cells.shape[1], size), np.float32), np.zeros(len(z))
        for k in range(size):
            rows = np.flatnonzero(group == k)
            count = found[rows].getnnz(axis=0)
            rarity[:, k] = -np.log((count + frequency) / (len(rows) + 1))
            own[rows] = found[rows] @ -np.log((np.maximum(count - 1, 0) + frequency) / len(rows))
        of_all = found @ rarity
        of_all[np.arange(len(z)), group] = own
        repeated = np.arange(N_GROUPS) % size
        self.centres.copy_(torch.from_numpy(groups.cluster_centers_[filled[repeated]]))
        self.rarity.copy_(torch.from_numpy(rarity[:, repeated]))
        rarity_of_two = ((own + of_all.min(axis=1)) / 2)[n_found > 0] / n_found[n_found > 0]
        self.limit.fill_(float(np.quantile(rarity_of_two, WITHIN)))
        self.depth.copy_(torch.from_numpy(np.quantile(n_found, DEPTHS)))

    @torch.no_grad()
    def distance(self, batch: Batch, z_BK: Tensor) -> Tensor:
        """Return the rarity of cells in states z in units of the limit, 0 where nothing is found; float [B]."""
        rarity_BG = F.embedding_bag(batch.index, self.rarity, batch.indptr[:-1], mode="mean").float()
        nearest_B1 = torch.cdist(z_BK, self.centres).argmin(dim=1, keepdim=True)
        return (rarity_BG.gather(1, nearest_B1)[:, 0] + rarity_BG.amin(dim=1)) / 2 / self.limit

    def unusual_depth(self, n_found: np.ndarray) -> tuple[float, float] | None:
        """Return the median depth of cells and of the training cells where they differ; else `None`.

        They differ where more than half of the cells are below the lowest twentieth of the training cells, or above the
        highest.
        """
        low, middle, high = self.depth.tolist()
        found = float(np.median(n_found))
        return None if low <= found <= high else (found, middle)
