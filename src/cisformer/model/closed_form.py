"""The closed-form start: prior, states and linear loadings.

On the link scale (logit for accessibility, standard deviations of log1p expression for genes)

    eta[i, f] = prior[f] + link(<z[i], loadings[f]>)

ATAC→RNA: the link is the identity; see `cisformer.model.target_states`. RNA→ATAC: see
`cisformer.model.closed_form_atac`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from cisformer.config import Modality
from cisformer.data.batches import Layout, read_modality, row_blocks
from cisformer.data.store import CellStore
from cisformer.model.cell_rows import CellRows
from cisformer.model.closed_form_atac import (
    USUAL_SHARED,
    Hat,
    Penalty,
    Sums,
    beside,
    loadings_of,
    select_penalty,
    smoothed_logit,
)
from cisformer.model.projection import Projection, fit_projection
from cisformer.model.target_states import TargetStates, fit_target_states

FIT_CELLS, FIT_VALUES = 20_000, 50_000_000
"""At most so many training cells, and values of theirs, that projections are fitted to."""
SELECTION_CELLS = 1_000
"""At most so many validation cells that rank and penalty are chosen by."""
FEW_CELLS, N_FOLDS = 200, 5
"""RNA→ATAC: with fewer validation cells than this, training cells left out in turn help to choose the penalty."""
FOLD_VALUES = 30_000_000
"""But only where the sums of all folds hold no more values than this (8 bytes each): some 190,000 cCREs."""
LEAST_PACE = 0.01


@dataclass(frozen=True)
class FeatureCounts:
    """Statistics of one pass over the training cells.

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
        float32 [F, K]; zero columns beyond the chosen rank.
    rank, ridge
        What validation chose; rank 0 is the mean profile.
    target_states
        ATAC→RNA: the model that the loadings are of.
    penalty, hat
        RNA→ATAC: what they were solved with.
    """

    projection: Projection
    prior: np.ndarray
    scale: np.ndarray
    loadings: np.ndarray
    rank: int
    ridge: float
    target_states: TargetStates | None = None
    penalty: Penalty | None = None
    hat: Hat | None = None


def count_features(store: CellStore, rows: np.ndarray, direction: str) -> FeatureCounts:
    """Go over cells once and count what is seen in them."""
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


def link_moments(counts: FeatureCounts, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return prior and scale of the seen targets; float32 [F] each.

    RNA→ATAC: logit of the smoothed frequency; scale 1. ATAC→RNA: mean, and standard deviation of log1p expression,
    pulled up towards the median one so that genes seen in a handful of cells do not rule the loss.
    """
    seen = layout.target_index
    if layout.direction == "rna2atac":
        return smoothed_logit(counts.n_seen[seen], counts.n_cells), np.ones(len(seen), np.float32)
    mean = counts.total[seen] / counts.n_cells
    variance = np.maximum(counts.squares[seen] / counts.n_cells - mean**2, 0)
    return mean.astype(np.float32), np.sqrt(variance + np.median(variance) + 1e-8).astype(np.float32)


def pace_of(loadings: np.ndarray) -> np.ndarray:
    """Return how far a training step may move each target, float32 [F] in [LEAST_PACE, 1].

    It is the variance that the closed form explains (states have variance 1: the squared length of the loadings), as a
    share of what it explains of the best-explained twentieth. Adam moves every parameter equally far, however little
    the data say of it; without a pace, targets that are seldom seen move by noise (benchmarks/RESULTS.md).
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


@dataclass(frozen=True)
class StartOptions:
    """Maximum number of components, ridge penalty ("auto": chosen on validation cells), seed of the samples."""

    rank: int
    ridge: float | str
    seed: int


def fit_linear(
    train: CellRows, val: CellRows, layout: Layout, counts: FeatureCounts, options: StartOptions
) -> LinearStart:
    """Fit the closed-form model to `train` cells; choose rank and penalty on `val` cells.

    Parameters
    ----------
    train, val
        Cells to learn from, and to choose by; none of the latter: a middle penalty.
    layout
        The features seen in `train`.
    counts
        What `count_features` found in `train`.
    options
        Maximum number of components, penalty, seed.
    """
    rng = np.random.default_rng([options.seed, 3])
    sample = fitting_sample(train, counts, rng).read(layout)
    projection = fit_projection(sample.x, layout.input_modality, options.rank, options.seed)
    held_out = val.sample(SELECTION_CELLS, rng)
    moments = link_moments(counts, layout)
    given = None if options.ridge == "auto" else float(options.ridge)
    if layout.direction == "atac2rna":
        chosen = held_out.read(layout) if len(held_out) else None
        projection, found = fit_target_states(projection, sample, chosen, moments, options.seed, given)
        rank = found.axes.shape[1]
        return LinearStart(projection, *moments, found.loadings, rank, found.penalty, target_states=found)
    few = (
        0 < len(held_out) < FEW_CELLS and N_FOLDS * len(layout.target_index) * projection.rank <= FOLD_VALUES
    )
    n_folds = N_FOLDS if given is None and few else 1
    folds = train.folds(n_folds, rng)
    parts = [Sums.over(fold, projection, layout) for fold in folds]
    sums = sum(parts[1:], parts[0])
    near = beside(train.reference.ccres.iloc[layout.target_index])
    penalty = Penalty(projection.rank, 0.3 if given is None else given, 0.5, shared=USUAL_SHARED)
    if given is None and len(held_out):
        left_out = [(sums - part, fold) for part, fold in zip(parts, folds, strict=True) if n_folds > 1]
        penalty = select_penalty([(sums, held_out), *left_out], projection, layout, near, rng)
    hat = Hat.of(sums, projection.sd.double().numpy(), penalty)
    loadings = loadings_of(sums, hat, near if penalty.beside else None)
    return LinearStart(projection, *moments, loadings, penalty.rank, penalty.ridge, penalty=penalty, hat=hat)


def fitting_sample(cells: CellRows, counts: FeatureCounts, rng: np.random.Generator) -> CellRows:
    """Return the cells that projections are fitted to: as many as `FIT_CELLS` and `FIT_VALUES` allow."""
    values_a_cell = max(1.0, counts.n_open.sum() / counts.n_cells)
    return cells.sample(min(FIT_CELLS, max(1_000, int(FIT_VALUES / values_a_cell))), rng)
