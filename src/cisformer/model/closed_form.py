"""The closed-form start: prior, fixed projection to white principal components, and linear loadings.

On the link scale (logit for accessibility, standard deviations of log1p expression for genes)

    eta[i, f] = prior[f] + <z[i], loadings[f]>

with z white over the training cells. ATAC→RNA: ridge regression, `Zᵀ(Y − mean) / (n + λ_k)`. RNA→ATAC: one Newton
step of ridge logistic regression from the prior, `Zᵀ(Y[:, f] − p_f) / (n p_f (1 − p_f) + λ_k)`. Both are exact
without solving a system because ZᵀZ = n·1. Component k of standard deviation σ_k is penalised by λ_k = λ σ_1 / σ_k:
between ridge on white components (λ) and on the components as they are (λ σ_1² / σ_k²); its validation loss was within
0.0001 of the best of the three in six of six comparisons (benchmarks/RESULTS.md). Since principal components are
nested, the loadings of the first r of them are the first r columns: rank and penalty are chosen on validation cells at
the cost of a few matrix products.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.config import Modality
from cisformer.data.batches import Batch, Layout, ragged_rows, read_modality, row_blocks, rows_of
from cisformer.data.store import CellStore

logger = logging.getLogger(__name__)
TFIDF_SCALE = 1e4
PCA_CELLS = 20_000
SELECTION_CELLS, SELECTION_TARGETS = 1_000, 50_000
"""Most validation cells and targets of them that rank and penalty are chosen by."""
LEAST_PACE = 0.01
PENALTIES = (1.0, 3.0, 10.0, 30.0, 60.0, 120.0, 250.0, 500.0, 1_000.0, 3_000.0, 10_000.0)


class Projection(nn.Module):
    """Fixed map from a cell's input to white principal components; no trained parameters.

    RNA enters as log1p-normalised expression, ATAC as log1p(1e4 · tf · idf) with tf = 1 / open cCREs of the cell.
    Normalising hides how deeply a cell was sequenced, which the number of its open cCREs shares: for RNA input, the
    log number of expressed genes stands beside the others, with the spread of the largest component.
    """

    def __init__(self, n_input: int, rank: int, modality: Modality) -> None:
        super().__init__()
        self.modality = modality
        self.components: Tensor
        self.offset: Tensor
        self.depth: Tensor
        self.idf: Tensor
        self.register_buffer("components", torch.zeros(n_input, rank))
        self.register_buffer("offset", torch.zeros(rank))
        self.register_buffer("depth", torch.zeros(rank))
        self.sd: Tensor
        self.register_buffer("idf", torch.ones(n_input))
        self.register_buffer("sd", torch.ones(rank))

    def forward(self, batch: Batch) -> Tensor:
        """Return z, float32 [B, rank]."""
        weight = batch.value
        if self.modality == "atac":
            n_open = batch.indptr.diff().to(weight.dtype)
            cell = ragged_rows(batch.indptr, len(batch.index))
            weight = torch.log1p(TFIDF_SCALE * rows_of(self.idf, batch.index) / rows_of(n_open, cell))
        pooled = F.embedding_bag(
            batch.index, self.components, batch.indptr[:-1], mode="sum", per_sample_weights=weight
        )
        n_found = batch.indptr.diff().to(pooled.dtype)
        return pooled + torch.log1p(n_found)[:, None] * self.depth - self.offset


@dataclass(frozen=True)
class FeatureCounts:
    """What one pass over the training cells finds.

    Attributes
    ----------
    n_cells
        Training cells.
    n_open
        Per reference feature of the input, the cells in which it is not zero.
    total, squares, n_seen
        Per reference feature of the target: sum and sum of squares of its normalised values, cells not zero.
    """

    n_cells: int
    n_open: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    n_seen: np.ndarray

    def __add__(self, other: FeatureCounts) -> FeatureCounts:
        return FeatureCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class LinearStart:
    """The closed-form model.

    Attributes
    ----------
    projection
        Fixed map to z.
    prior, scale
        Per target: mean on the link scale, and the unit in which `loadings` act; float32 [F].
    loadings
        float32 [F, rank]; zero columns beyond the chosen rank.
    rank, ridge
        What validation chose; rank 0 is the mean profile.
    """

    projection: Projection
    prior: np.ndarray
    scale: np.ndarray
    loadings: np.ndarray
    rank: int
    ridge: float


def count_features(store: CellStore, rows: np.ndarray, direction: str) -> FeatureCounts:
    """Go over the training cells once and count what is seen in them."""
    modalities: tuple[Modality, Modality] = ("atac", "rna") if direction == "atac2rna" else ("rna", "atac")
    sizes = {"rna": store.reference.n_genes, "atac": store.reference.n_ccres}
    n_open = np.zeros(sizes[modalities[0]], np.int64)
    total, squares = np.zeros((2, sizes[modalities[1]]))
    n_seen = np.zeros(sizes[modalities[1]], np.int64)
    for part in row_blocks(rows):
        source = read_modality(store, part, modalities[0])
        target = read_modality(store, part, modalities[1])
        n_open += np.bincount(source.indices, minlength=len(n_open))
        n_seen += np.bincount(target.indices, minlength=len(n_seen))
        total += np.bincount(target.indices, target.data, minlength=len(total))
        squares += np.bincount(target.indices, target.data.astype(np.float64) ** 2, minlength=len(total))
    return FeatureCounts(len(rows), n_open, total, squares, n_seen)


def fit_projection(cells: sp.csr_matrix, modality: Modality, rank: int, seed: int) -> Projection:
    """Fit the projection to normalised cells [n, n_input] by truncated SVD, with depth, centred and whitened.

    One component more than wanted is computed, since the first of an uncentred SVD is mostly the mean.
    Source: Halko, Martinsson, Tropp (2011) randomised SVD as in scikit-learn; TF-IDF as in Cusanovich et al. (2015).
    """
    from sklearn.decomposition import TruncatedSVD

    rank = max(1, min(rank, min(cells.shape) - 2))
    projection = Projection(cells.shape[1], rank, modality)
    if modality == "atac":
        n_open = np.bincount(cells.indices, minlength=cells.shape[1])
        projection.idf = torch.from_numpy(np.log1p(cells.shape[0] / np.maximum(n_open, 1)).astype(np.float32))
        n_found = np.diff(cells.indptr)
        weight = TFIDF_SCALE * projection.idf.numpy().take(cells.indices)
        weight /= np.repeat(n_found.astype(np.float32), n_found)
        cells = sp.csr_matrix((np.log1p(weight, out=weight), cells.indices, cells.indptr), cells.shape)
    svd = TruncatedSVD(min(rank + 1, min(cells.shape) - 1), random_state=seed, n_iter=7)
    scores = svd.fit_transform(cells)
    depth = np.log1p(np.diff(cells.indptr))
    # Expression, as predicted, is normalised for depth; accessibility is not.
    depth_unit = scores.std(axis=0).max() / max(depth.std(), 1e-6) if modality == "rna" else 0.0
    scores = np.column_stack([scores, depth * depth_unit])
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
    """Return z of the cells in `rows`, float32 [len(rows), rank]."""
    from cisformer.data.batches import encode_input

    parts = []
    for part in row_blocks(rows):
        cells = read_modality(store, part, layout.input_modality)
        parts.append(projection(encode_input(cells, layout, None, None)).numpy())
    return np.concatenate(parts)


def link_moments(counts: FeatureCounts, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return prior and scale of the seen targets.

    RNA→ATAC: logit of the frequency, smoothed by one cell of the mean frequency; scale 1. ATAC→RNA: mean, and
    standard deviation of log1p expression, pulled up towards the median one so that genes seen in a handful of
    cells do not rule the loss.
    """
    seen = layout.target_index
    mean = counts.total[seen] / counts.n_cells
    if layout.direction == "rna2atac":
        smooth = (counts.n_seen[seen] + mean.mean()) / (counts.n_cells + 1)
        return np.log(smooth / (1 - smooth)).astype(np.float32), np.ones(len(seen), np.float32)
    variance = np.maximum(counts.squares[seen] / counts.n_cells - mean**2, 0)
    return mean.astype(np.float32), np.sqrt(variance + np.median(variance) + 1e-8).astype(np.float32)


def cross_products(
    z: np.ndarray, store: CellStore, rows: np.ndarray, layout: Layout, centre: np.ndarray
) -> np.ndarray:
    """Return Zᵀ(Y − centre) as float64 [rank, F], in blocks of rows."""
    product = -np.outer(z.sum(axis=0, dtype=np.float64), centre)
    start = 0
    for part in row_blocks(rows):
        target = read_modality(store, part, layout.target_modality)[:, layout.target_index]
        product += (target.T @ z[start : start + len(part)].astype(np.float64)).T
        start += len(part)
    return product


def solve(
    product: np.ndarray, prior: np.ndarray, scale: np.ndarray, n: int, ridge: np.ndarray, direction: str
) -> np.ndarray:
    """Return loadings float32 [F, rank] from `product` = Zᵀ(Y − centre) and the penalty of each component."""
    if direction == "atac2rna":
        return (product / scale / (n + ridge[:, None])).T.astype(np.float32)
    p = 1 / (1 + np.exp(-prior.astype(np.float64)))
    return (product / (n * p * (1 - p) + ridge[:, None])).T.astype(np.float32)


def pace_of(loadings: np.ndarray) -> np.ndarray:
    """Return how far a training step may move each target, float32 [F] in [LEAST_PACE, 1].

    It is the variance that the closed form explains (z is white: the squared length of the loadings), as a share of
    what it explains of the best-explained twentieth. Adam moves every parameter equally far, however little the data
    say of it; without a pace, targets that are seldom seen move by noise (benchmarks/RESULTS.md).
    """
    explained = np.square(loadings).sum(axis=1)
    top = np.quantile(explained, 0.95) if len(explained) else 0.0
    if top == 0:
        return np.ones(len(explained), np.float32)
    return np.clip(explained / top, LEAST_PACE, 1).astype(np.float32)


def link_loss(eta: Tensor, target: Tensor, scale: Tensor, direction: str) -> Tensor:
    """Return the loss of each cell, mean over targets, float32 [B].

    RNA→ATAC: binary cross-entropy of logits `eta`. ATAC→RNA: half the squared error in units of `scale`.
    """
    if direction == "rna2atac":
        return F.binary_cross_entropy_with_logits(eta, target, reduction="none").mean(dim=1)
    return 0.5 * (eta - target / scale).square().mean(dim=1)


def fit_linear(
    store: CellStore,
    train: np.ndarray,
    val_store: CellStore,
    val: np.ndarray,
    layout: Layout,
    counts: FeatureCounts,
    *,
    rank: int,
    ridge: float | str,
    seed: int,
) -> LinearStart:
    """Fit the closed-form model to cells `train` of `store`; choose rank and penalty on cells `val` of `val_store`.

    Parameters
    ----------
    rank
        Most components.
    ridge
        Penalty λ, or "auto" for the best of a grid on validation cells, the mean profile among it.
    """
    rng = np.random.default_rng([seed, 3])
    sample = np.sort(rng.choice(train, min(len(train), PCA_CELLS), replace=False))
    projection = fit_projection(
        read_modality(store, sample, layout.input_modality)[:, layout.input_index],
        layout.input_modality, rank, seed,
    )  # fmt: skip
    prior, scale = link_moments(counts, layout)
    centre = mean_of(prior, layout.direction)
    product = cross_products(states(projection, store, train, layout), store, train, layout, centre)
    relative = (projection.sd[0] / projection.sd).numpy()
    best_rank, best = product.shape[0], 30.0 if ridge == "auto" else float(ridge)
    if ridge == "auto" and len(val):
        chosen = np.sort(rng.choice(val, min(len(val), SELECTION_CELLS), replace=False))
        n_targets = len(layout.target_index)
        judged = np.sort(rng.choice(n_targets, min(n_targets, SELECTION_TARGETS), replace=False))
        part = replace(layout, target_index=layout.target_index[judged])
        fits = {
            penalty: solve(
                product[:, judged],
                prior[judged],
                scale[judged],
                len(train),
                penalty * relative,
                layout.direction,
            )
            for penalty in PENALTIES
        }
        best_rank, best = _select(fits, projection, val_store, chosen, part, prior[judged], scale[judged])
        logger.info("linear start: %d components, penalty %g", best_rank, best)
    loadings = solve(product, prior, scale, len(train), best * relative, layout.direction)
    loadings[:, best_rank:] = 0
    return LinearStart(projection, prior, scale, loadings, best_rank, best)


def mean_of(prior: np.ndarray, direction: str) -> np.ndarray:
    """Return the mean of each target, from its mean on the link scale."""
    return 1 / (1 + np.exp(-prior)) if direction == "rna2atac" else prior


def learn_from(
    parts: list[tuple[CellStore, np.ndarray]],
    projection: Projection,
    layout: Layout,
    scale: np.ndarray,
    *,
    rank: int,
    ridge: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return prior [F] and loadings [F, rank] in closed form from the cells of several stores together.

    Projection, rank and penalty are given, so that the same call with and without some cells says what these cells
    add; see `fit_linear` for the rest.
    """
    counts = [count_features(store, rows, layout.direction) for store, rows in parts]
    total = counts[0] if len(counts) == 1 else counts[0] + counts[1]
    prior, _ = link_moments(total, layout)
    centre = mean_of(prior, layout.direction)
    product = sum(
        cross_products(states(projection, store, rows, layout)[:, :rank], store, rows, layout, centre)
        for store, rows in parts
    )
    penalty = ridge * (projection.sd[0] / projection.sd[:rank]).numpy()
    return prior, solve(np.asarray(product), prior, scale, total.n_cells, penalty, layout.direction)


def _select(
    fits: dict[float, np.ndarray],
    projection: Projection,
    store: CellStore,
    val: np.ndarray,
    layout: Layout,
    prior: np.ndarray,
    scale: np.ndarray,
) -> tuple[int, float]:
    """Return the (rank, penalty) of lowest validation loss; rank 0 is the mean profile."""
    full = projection.components.shape[1]
    ranks = sorted({0, full, *(r for r in (4, 8, 16, 24, 32, 48, 64, 96, 128) if r < full)})
    losses = {(r, penalty): 0.0 for penalty in fits for r in ranks}
    unit = torch.from_numpy(scale)
    for part in row_blocks(val, 100):
        z = torch.from_numpy(states(projection, store, part, layout))
        target = read_modality(store, part, layout.target_modality)[:, layout.target_index]
        dense = torch.from_numpy(target.toarray())
        for penalty, loadings in fits.items():
            eta = torch.from_numpy(prior / scale).repeat(len(part), 1)
            for low, high in zip([0, *ranks], ranks, strict=False):
                eta += z[:, low:high] @ torch.from_numpy(loadings[:, low:high]).T
                losses[high, penalty] += float(link_loss(eta, dense, unit, layout.direction).sum())
    return min(losses, key=lambda choice: losses[choice])
