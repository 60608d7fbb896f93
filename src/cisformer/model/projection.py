"""The states of a cell: a fixed linear map of its input, with no trained parameters.

RNA enters as log1p-normalised expression over the gene's standard deviation; ATAC as the idf of the open cCREs, scaled
to length 1 in each cell. The first states are principal components, white over the cells that they were fitted to.
ATAC→RNA adds states that tell the leading components of expression (`cisformer.model.target_states`).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.config import Modality
from cisformer.data.batches import (
    Batch,
    Layout,
    encode_input,
    ragged_rows,
    read_modality,
    row_blocks,
    rows_of,
)
from cisformer.data.store import CellStore


class Projection(nn.Module):
    """Map from a cell's input to its states z.

    Normalising hides how deeply a cell was sequenced, which the number of its open cCREs shares: for RNA input, the
    log number of expressed genes enters as one more feature, with the spread of the largest component.

    Attributes
    ----------
    components, offset, depth
        z = x @ components + log1p(number of features found) × depth − offset; float32 [n_input, K], [K], [K].
    weight
        Of each input feature: one over its spread (genes), or its idf (cCREs); float32 [n_input].
    sd
        Spread of each principal component before whitening; 1 for other states; float32 [K].
    principal
        Which states are principal components; bool [K].
    """

    components: Tensor
    offset: Tensor
    depth: Tensor
    weight: Tensor
    sd: Tensor
    principal: Tensor

    def __init__(self, n_input: int, rank: int, modality: Modality) -> None:
        super().__init__()
        self.modality = modality
        self.register_buffer("components", torch.zeros(n_input, rank))
        self.register_buffer("offset", torch.zeros(rank))
        self.register_buffer("depth", torch.zeros(rank))
        self.register_buffer("weight", torch.ones(n_input))
        self.register_buffer("sd", torch.ones(rank))
        self.register_buffer("principal", torch.ones(rank, dtype=torch.bool))

    @property
    def rank(self) -> int:
        """Number of states, K."""
        return self.components.shape[1]

    def forward(self, batch: Batch) -> Tensor:
        """Return z, float32 [B, K]."""
        weight = batch.value * rows_of(self.weight, batch.index)
        if self.modality == "atac":
            cell = ragged_rows(batch.indptr, len(batch.index))
            squares = weight.new_zeros(batch.n_cells).index_add(0, cell, weight.square())
            weight = weight / rows_of(squares, cell).sqrt().clamp(min=1e-9)
        pooled = F.embedding_bag(
            batch.index, self.components, batch.indptr[:-1], mode="sum", per_sample_weights=weight
        )
        n_found = batch.indptr.diff().to(pooled.dtype)
        return pooled + torch.log1p(n_found)[:, None] * self.depth - self.offset

    def features(self, cells: sp.csr_matrix) -> sp.csr_matrix:
        """Return the features x of normalised cells [n, n_input], float32, as `forward` sees them."""
        x = sp.csr_matrix(cells, dtype=np.float32, copy=True)
        x.data *= self.weight.numpy()[x.indices]
        if self.modality == "atac":
            length = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
            x.data /= np.repeat(np.maximum(length, 1e-9), np.diff(x.indptr)).astype(np.float32)
        return x

    def open_value(self, n_open: float) -> np.ndarray:
        """Return the feature x of each cCRE where it is open in a cell of `n_open` open cCREs; float64 [n_input]."""
        idf = self.weight.double().cpu().numpy()
        frequency = 1 / np.expm1(np.maximum(idf, 1e-9))
        mean_square = np.average(np.square(idf), weights=frequency)
        return idf / np.sqrt(n_open * mean_square)


def input_weights(cells: sp.csr_matrix, modality: Modality) -> np.ndarray:
    """Return one over the spread of each gene, or the idf of each cCRE, over normalised cells; float32 [n_input].

    Rarely expressed genes have a small spread: the median variance is added to all.
    """
    n = cells.shape[0]
    if modality == "atac":
        return np.log1p(n / np.maximum(cells.getnnz(axis=0), 1)).astype(np.float32)
    mean = np.asarray(cells.mean(axis=0), np.float64).ravel()
    variance = np.maximum(np.asarray(cells.multiply(cells).mean(axis=0)).ravel() - mean**2, 0)
    return (1 / np.sqrt(variance + np.median(variance) + 1e-8)).astype(np.float32)


def fit_projection(cells: sp.csr_matrix, modality: Modality, rank: int, seed: int) -> Projection:
    """Fit the projection to normalised cells [n, n_input] by truncated SVD, with depth, centred and whitened.

    One component more than wanted is computed, since the first of an uncentred SVD is mostly the mean.
    Source: Halko, Martinsson, Tropp (2011), randomised SVD as in scikit-learn.
    """
    from sklearn.decomposition import TruncatedSVD

    rank = max(1, min(rank, min(cells.shape) - 2))
    projection = Projection(cells.shape[1], rank, modality)
    projection.weight = torch.from_numpy(input_weights(cells, modality))
    x = projection.features(cells).tocsc()  # by feature: products are several times faster
    svd = TruncatedSVD(min(rank + 1, min(x.shape) - 1), random_state=seed, n_iter=7)
    scores = svd.fit_transform(x)
    depth = np.log1p(np.diff(cells.indptr))
    # Expression, as predicted, is normalised for depth; accessibility is not.
    depth_unit = scores.std(axis=0).max() / max(depth.std(), 1e-6) if modality == "rna" else 0.0
    scores = np.column_stack([scores, depth * depth_unit]).astype(np.float64)
    centre = scores.mean(axis=0)
    variance, rotation = np.linalg.eigh(np.cov(scores.T, bias=True).reshape(len(centre), len(centre)))
    largest = np.argsort(variance)[::-1][:rank]
    sd = np.sqrt(np.maximum(variance[largest], 1e-12))
    whiten = rotation[:, largest] / sd
    projection.sd = torch.from_numpy(sd.astype(np.float32))
    projection.components = torch.from_numpy((svd.components_.T @ whiten[:-1]).astype(np.float32))
    projection.depth = torch.from_numpy((whiten[-1] * depth_unit).astype(np.float32))
    projection.offset = torch.from_numpy((centre @ whiten).astype(np.float32))
    return projection


def states(projection: Projection, store: CellStore, rows: np.ndarray, layout: Layout) -> np.ndarray:
    """Return z of the cells in `rows`, float32 [len(rows), K]."""
    parts = [np.zeros((0, projection.rank), np.float32)]
    for part in row_blocks(rows):
        cells = read_modality(store, part, layout.input_modality)
        parts.append(projection(encode_input(cells, layout, None, None)).numpy())
    return np.concatenate(parts)
