"""The closed-form start: prior, states and linear loadings.

On the link scale (logit for accessibility, standard deviations of log1p expression for genes)

    eta[i, f] = prior[f] + link(<z[i], loadings[f]>)

ATAC→RNA: the link is the identity; see `cisformer.model.target_states`. RNA→ATAC: ridge regression of accessibility,
in units of p(1 − p) so that it is a change of log odds to first order,

    loadings[f] = (ZᵀZ + n λ_f D)⁻¹ Zᵀ(Y[:, f] − p_f) / (p_f (1 − p_f)),    D = diag(σ_1² / σ_k²)

and the link is x below 0, log(1 + x) above: a cCRE three times as often open as on average has x = 2, and log odds of
log 3 more. Without it a linear model of log odds overshoots at seldom open cCREs. λ_f = λ (m / p_f (1 − p_f))^a with m
the mean of p(1 − p): a = 0 is ridge regression of frequencies, a = 1 one Newton step of ridge logistic regression.
Rank, λ and a are chosen on validation cells. One sweep over the cells gives ZᵀZ and ZᵀY; the rest are K × K systems.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional as F

from cisformer.config import Modality
from cisformer.data.batches import Layout, read_modality, row_blocks
from cisformer.data.store import CellStore
from cisformer.model.projection import Projection, fit_projection, states
from cisformer.model.target_states import CellMatrix, TargetStates, fit_target_states

logger = logging.getLogger(__name__)
FIT_CELLS, FIT_VALUES = 20_000, 50_000_000
"""At most so many training cells, and values of theirs, that projections are fitted to."""
SELECTION_CELLS, SELECTION_VALUES = 1_000, 10_000_000
"""At most so many validation cells, and values of their targets, that rank and penalty are chosen by."""
LEAST_PACE = 0.01
PENALTIES = (0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
"""λ over the variance of the largest component."""
UNEVENNESS = (0.0, 0.5, 1.0)
"""a: how much more seldom open cCREs are penalised."""
RANKS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)


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
    unevenness
        a of the penalty, RNA→ATAC only.
    target_states, hat
        The ATAC→RNA model that the loadings are of; or what they were solved with, RNA→ATAC.
    """

    projection: Projection
    prior: np.ndarray
    scale: np.ndarray
    loadings: np.ndarray
    rank: int
    ridge: float
    unevenness: float = 0.0
    target_states: TargetStates | None = None
    hat: Hat | None = None


@dataclass(frozen=True)
class CellRows:
    """Cells of one or two stores: a store and rows of it, each."""

    parts: tuple[tuple[CellStore, np.ndarray], ...]

    @classmethod
    def of(cls, store: CellStore, rows: np.ndarray) -> CellRows:
        """Return cells of one store."""
        return cls(((store, rows),))

    def __add__(self, other: CellRows) -> CellRows:
        return CellRows(self.parts + other.parts)

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.parts)

    def sample(self, most: int, rng: np.random.Generator) -> CellRows:
        """Return at most `most` of the cells, in their order."""
        chosen = np.sort(rng.choice(len(self), min(len(self), most), replace=False))
        first, parts = 0, []
        for store, rows in self.parts:
            here = chosen[(chosen >= first) & (chosen < first + len(rows))] - first
            parts.append((store, rows[here]))
            first += len(rows)
        return CellRows(tuple(parts))

    def read(self, layout: Layout) -> CellMatrix:
        """Return normalised input and target of all of the cells, known features only."""
        sides = ((layout.input_modality, layout.input_index), (layout.target_modality, layout.target_index))
        return CellMatrix(*(
            sp.vstack([read_modality(store, rows, side)[:, index] for store, rows in self.parts], format="csr")
            for side, index in sides
        ))  # fmt: skip


@dataclass(frozen=True)
class Sums:
    """Sums of one pass over the cells, RNA→ATAC.

    Attributes
    ----------
    n_cells
        Number of cells.
    open_
        In how many of them each target is open; float64 [F].
    z, gram, cross
        Sum of z [K], ZᵀZ [K, K], and ZᵀY [K, F]; float64.
    """

    n_cells: int
    open_: np.ndarray
    z: np.ndarray
    gram: np.ndarray
    cross: np.ndarray

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @classmethod
    def over(cls, cells: CellRows, projection: Projection, layout: Layout) -> Sums:
        """Sweep over cells once."""
        rank, n_targets = projection.rank, len(layout.target_index)
        n, open_, z_sum = 0, np.zeros(n_targets), np.zeros(rank)
        gram, cross = np.zeros((rank, rank)), np.zeros((rank, n_targets))
        for store, rows in cells.parts:
            for part in row_blocks(rows):
                z = states(projection, store, part, layout).astype(np.float64)
                y = read_modality(store, part, layout.target_modality)[:, layout.target_index]
                n, open_, z_sum = (
                    n + len(part),
                    open_ + np.asarray(y.sum(axis=0)).ravel(),
                    z_sum + z.sum(axis=0),
                )
                gram, cross = gram + z.T @ z, cross + (y.T @ z).T
        return cls(n, open_, z_sum, gram, cross)

    def prior(self) -> np.ndarray:
        """Return the logit of the frequencies, smoothed by one cell of the mean frequency; float32 [F]."""
        return smoothed_logit(self.open_, self.n_cells)


@dataclass(frozen=True)
class Penalty:
    """How loadings are penalised: rank, λ, a; see the module."""

    rank: int
    ridge: float
    unevenness: float


def smoothed_logit(n_open: np.ndarray, n_cells: int) -> np.ndarray:
    """Return the logit of frequencies smoothed by one cell of the mean frequency; float32, shape of `n_open`."""
    smooth = (n_open + n_open.mean() / n_cells) / (n_cells + 1)
    return np.log(smooth / (1 - smooth)).astype(np.float32)


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


@dataclass(frozen=True)
class Hat:
    """The inverses (ZᵀZ + n λ_f D)⁻¹ of all targets: basis (values + ridge_f)⁻¹ basisᵀ.

    Attributes
    ----------
    basis, values
        float64 [K, K], zero beyond the rank, and [K].
    ridge
        n λ_f; float64 [F].
    """

    basis: np.ndarray
    values: np.ndarray
    ridge: np.ndarray

    @classmethod
    def of(cls, sums: Sums, sd: np.ndarray, penalty: Penalty) -> Hat:
        """Decompose ZᵀZ for a penalty; `sd` is the spread of each component, largest first."""
        rank, size = penalty.rank, len(sd)
        p = 1 / (1 + np.exp(-sums.prior().astype(np.float64)))
        weight = p * (1 - p)
        basis, values = np.zeros((size, size)), np.ones(size)
        root = sd[:rank] / sd[0]
        found, axes = np.linalg.eigh(root[:, None] * sums.gram[:rank, :rank] * root)
        basis[:rank, :rank], values[:rank] = root[:, None] * axes, np.maximum(found, 1e-9)
        ridge = sums.n_cells * penalty.ridge * (weight.mean() / weight) ** penalty.unevenness
        return cls(basis, values, ridge)


def solve(sums: Sums, sd: np.ndarray, penalty: Penalty, columns: np.ndarray | None = None) -> np.ndarray:
    """Return RNA→ATAC loadings float32 [F, K], of all targets or of some `columns`; zero beyond the rank.

    One eigendecomposition serves all λ_f: with D^-½ ZᵀZ D^-½ = Q Λ Qᵀ, the inverse of ZᵀZ + n λ_f D is
    D^-½ Q (Λ + n λ_f)⁻¹ Qᵀ D^-½.
    """
    every = slice(None) if columns is None else columns
    p = 1 / (1 + np.exp(-sums.prior().astype(np.float64)))
    hat = Hat.of(sums, sd, penalty)
    centred = sums.cross[:, every] - np.outer(sums.z, p[every])
    spread = hat.values[:, None] + hat.ridge[every]
    loadings = hat.basis @ ((hat.basis.T @ centred) / spread) / (p * (1 - p))[every]
    return np.ascontiguousarray(loadings.T, dtype=np.float32)


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


def change_of_log_odds(x: Tensor) -> Tensor:
    """Return x below 0 and log(1 + x) above: what a share x more of the odds adds to the logit; any shape."""
    return x.clamp(max=0) + x.clamp(min=0).log1p()


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
    sums = Sums.over(train, projection, layout)
    penalty = Penalty(projection.rank, 0.3 if given is None else given, 0.5)
    if given is None and len(held_out):
        penalty = _select(sums, projection, held_out, layout, rng)
    sd = projection.sd.double().numpy()
    return LinearStart(
        projection, *moments, solve(sums, sd, penalty), penalty.rank, penalty.ridge, penalty.unevenness,
        hat=Hat.of(sums, sd, penalty),
    )  # fmt: skip


def fitting_sample(cells: CellRows, counts: FeatureCounts, rng: np.random.Generator) -> CellRows:
    """Return the cells that projections are fitted to: as many as `FIT_CELLS` and `FIT_VALUES` allow."""
    values_a_cell = max(1.0, counts.n_open.sum() / counts.n_cells)
    return cells.sample(min(FIT_CELLS, max(1_000, int(FIT_VALUES / values_a_cell))), rng)


def _select(
    sums: Sums, projection: Projection, val: CellRows, layout: Layout, rng: np.random.Generator
) -> Penalty:
    """Return the penalty of lowest validation loss; rank 0 is the mean profile.

    First rank and λ at the middle unevenness, then λ and unevenness at that rank.
    """
    n_targets = len(layout.target_index)
    judged = np.sort(rng.choice(n_targets, min(n_targets, SELECTION_VALUES // len(val)), replace=False))
    known = val.read(replace(layout, target_index=layout.target_index[judged]))
    cells = np.concatenate([states(projection, store, rows, layout) for store, rows in val.parts])
    target, z = torch.from_numpy(known.y.toarray()), torch.from_numpy(cells)
    prior = torch.from_numpy(sums.prior()[judged])
    sd = projection.sd.double().numpy()

    def loss(choice: Penalty) -> float:
        loadings = torch.from_numpy(solve(sums, sd, choice, judged))
        eta = change_of_log_odds(z @ loadings.T) + prior
        return float(link_loss(eta, target, torch.ones(1), "rna2atac").mean())

    ranks = sorted({projection.rank, *(r for r in RANKS if r < projection.rank)})
    first = _best(loss, itertools.product(ranks, PENALTIES, UNEVENNESS[1:2]))
    best = _best(loss, itertools.product([first.rank], PENALTIES, UNEVENNESS))
    if loss(Penalty(0, 1.0, 0.0)) <= loss(best):
        best = Penalty(0, best.ridge, best.unevenness)
    logger.info(
        "linear start: %d components, penalty %g, unevenness %g", best.rank, best.ridge, best.unevenness
    )
    return best


def _best(loss: Callable[[Penalty], float], choices: Iterable[Sequence[Any]]) -> Penalty:
    return min((Penalty(*choice) for choice in choices), key=loss)
