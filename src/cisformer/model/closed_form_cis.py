"""The closed-form cis model: per gene, a ridge regression on the open cCREs in its window.

What the principal components leave of a gene's expression is regressed on what they leave of the accessibility of the
cCREs near it. With x the accessibility of gene g's cCREs less their mean and their regression on z, and r the
residual of the linear start,

    w_g = (xᵀx + λ D⁻¹)⁻¹ xᵀ r_g,    D = diag((|distance| + 5 kb)^-0.7), scaled to 1 at 20 kb

so that near cCREs may have larger weights (the contact exponent of the activity-by-contact model, Fulco et al. 2019).
λ is the same for all genes, chosen on validation cells. Nothing is dense in cells × cCREs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.linalg import cho_factor, cho_solve

from cisformer.data.batches import Layout
from cisformer.data.genome import signed_distance, window_pairs
from cisformer.data.reference import Reference
from cisformer.model.cell_rows import CellRows
from cisformer.model.closed_form import LinearStart
from cisformer.model.projection import states
from cisformer.model.target_states import axis_scores, held_out_states

logger = logging.getLogger(__name__)
DISTANCE_EDGES_BP = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
CONTACT_OFFSET_BP, CONTACT_UNIT_BP, CONTACT_POWER = 5_000, 20_000, 0.7
PENALTIES = (10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, np.inf)
FIT_CELLS = 20_000
SELECTION_CELLS, SELECTION_GENES = 1_000, 2_000


@dataclass(frozen=True)
class Windows:
    """The cCREs near each gene, listed by cCRE, among the features a model knows.

    Attributes
    ----------
    indptr
        Where each cCRE's pairs start; int64 [n_input + 1].
    gene
        Target number of each pair; int64 [W].
    distance
        Signed distance of the cCRE's middle to the TSS in bp, negative upstream; int64 [W].
    """

    indptr: np.ndarray
    gene: np.ndarray
    distance: np.ndarray

    @classmethod
    def of(cls, reference: Reference, layout: Layout, window_bp: int) -> Windows:
        """Find all pairs of known genes and known cCREs within `window_bp` of the gene body."""
        genes = reference.genes.iloc[layout.target_index].reset_index(drop=True)
        ccres = reference.ccres.iloc[layout.input_index].reset_index(drop=True)
        gene, ccre = window_pairs(genes, ccres, window_bp)
        order = np.lexsort((gene, ccre))
        gene, ccre = gene[order], ccre[order]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(ccre, minlength=len(ccres)))])
        return cls(indptr.astype(np.int64), gene.astype(np.int64), signed_distance(genes, ccres, gene, ccre))

    @property
    def ccre(self) -> np.ndarray:
        """Input number of each pair; int64 [W]."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))

    @property
    def distance_bin(self) -> np.ndarray:
        """Signed, log-spaced bin of every pair; int64 [W]."""
        edges = np.array(DISTANCE_EDGES_BP)
        return np.digitize(self.distance, np.concatenate([-edges[::-1], edges])).astype(np.int64)


@dataclass(frozen=True)
class LocalStart:
    """The closed-form cis model, to be added to a `LinearStart`.

    Attributes
    ----------
    weight
        Change of a gene, in units of its scale, per open cCRE; float32 [W], as `Windows` lists pairs.
    bias, loadings
        What keeps the mean and the linear path as they were: to be added to eta and to the linear loadings;
        float32 [F] and [F, rank].
    penalty
        The chosen λ; infinite where the cCREs near a gene did not help on validation cells.
    """

    weight: np.ndarray
    bias: np.ndarray
    loadings: np.ndarray
    penalty: float


@dataclass(frozen=True)
class _Side:
    """Cells of one side of the split, ready to be cut by columns."""

    x: sp.csc_matrix
    y: sp.csc_matrix
    z: np.ndarray
    known: np.ndarray
    """The states that the linear start's residual is of: of fitted cells, as if they had not been."""


def fit_local(
    train: CellRows, val: CellRows, layout: Layout, start: LinearStart, windows: Windows, seed: int
) -> LocalStart:
    """Fit the cis model to `train` cells; choose its penalty on `val` cells."""
    rng = np.random.default_rng([seed, 5])
    fit = _read(train.sample(FIT_CELLS, rng), layout, start, fitted=True)
    held_out = _read(val.sample(SELECTION_CELLS, rng), layout, start, fitted=False)
    mean = np.asarray(fit.x.mean(axis=0)).ravel()
    gram = fit.z.T @ fit.z
    slope = np.linalg.pinv(gram, hermitian=True) @ ((fit.x.T @ fit.z).T - np.outer(fit.z.sum(axis=0), mean))
    by_gene = np.argsort(windows.gene, kind="stable")
    genes, first = np.unique(windows.gene[by_gene], return_index=True)
    pairs_of = dict(zip(genes.tolist(), np.split(by_gene, first[1:]) if len(genes) else [], strict=True))
    ccre = windows.ccre

    def weights(gene: int, penalties: Sequence[float]) -> np.ndarray:
        pair = pairs_of[gene]
        inner = _Cut(fit, ccre[pair], mean, slope, gram)
        return _ridge(inner, _residual(fit, gene, start), weight_variance(windows.distance[pair]), penalties)

    losses = np.zeros(len(PENALTIES))
    for gene in _some(genes, SELECTION_GENES, rng).tolist():
        guess = _Cut(held_out, ccre[pairs_of[gene]], mean, slope, gram).predict(weights(gene, PENALTIES))
        losses += np.square(_residual(held_out, gene, start)[:, None] - guess).sum(axis=0)
    best = PENALTIES[int(np.argmin(losses))]
    logger.info("cis start: %d gene-cCRE pairs, penalty %g", len(ccre), best)
    chosen = np.zeros(len(ccre), np.float32)
    if np.isfinite(best):
        for gene, pair in pairs_of.items():
            chosen[pair] = weights(gene, (best,))[:, 0]
    n_targets = len(layout.target_index)
    bias = -np.bincount(windows.gene, chosen * mean[ccre], n_targets)
    spread = sp.csr_matrix((chosen, (windows.gene, ccre)), shape=(n_targets, len(mean)))
    return LocalStart(chosen, bias.astype(np.float32), -(spread @ slope.T).astype(np.float32), best)


def weight_variance(distance_bp: np.ndarray) -> np.ndarray:
    """Return the prior variance of a link's weight by distance, 1 at 15 kb; any shape."""
    return ((np.abs(distance_bp) + CONTACT_OFFSET_BP) / CONTACT_UNIT_BP) ** -CONTACT_POWER


def _some(items: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(items, min(len(items), most), replace=False))


def _read(cells: CellRows, layout: Layout, start: LinearStart, *, fitted: bool) -> _Side:
    matrix = cells.read(layout)
    parts = [states(start.projection, store, rows, layout) for store, rows in cells.parts]
    z = known = np.concatenate(parts).astype(np.float64)
    if fitted and start.target_states is not None:
        u = axis_scores(matrix.y, start.prior, start.scale, start.target_states.axes)
        known = held_out_states(z, u, start.target_states)
    return _Side(matrix.x.tocsc(), matrix.y.tocsc(), z, known)


def _residual(side: _Side, gene: int, start: LinearStart) -> np.ndarray:
    """Return what the linear start leaves of a gene, in units of its scale; float64 [n]."""
    expression = side.y[:, [gene]].toarray().ravel().astype(np.float64)
    explained = side.known @ start.loadings[gene].astype(np.float64)
    return (expression - start.prior[gene]) / start.scale[gene] - explained


class _Cut:
    """A few cCREs of all cells, less their mean and their regression on z, never made dense."""

    def __init__(
        self, side: _Side, near: np.ndarray, mean: np.ndarray, slope: np.ndarray, states_gram: np.ndarray
    ) -> None:
        self.x, self.z, self.states_gram = side.x[:, near], side.z, states_gram
        self.mean, self.slope = mean[near], slope[:, near]

    def predict(self, weight: np.ndarray) -> np.ndarray:
        """Return x̃ @ weight."""
        return self.x @ weight - self.mean @ weight - self.z @ (self.slope @ weight)

    def gram(self) -> np.ndarray:
        """Return x̃ᵀx̃, exact on the fitted cells."""
        own: np.ndarray = (self.x.T @ self.x).toarray()
        explained = np.vstack([self.mean, self.slope])  # one product for both: the mean is a state of 1
        own -= explained.T @ np.vstack([self.x.shape[0] * self.mean, self.states_gram @ self.slope])
        return own

    def cross(self, residual: np.ndarray) -> np.ndarray:
        """Return x̃ᵀ residual."""
        return self.x.T @ residual - self.mean * residual.sum() - self.slope.T @ (self.z.T @ residual)


def _ridge(cut: _Cut, residual: np.ndarray, variance: np.ndarray, penalties: Sequence[float]) -> np.ndarray:
    """Return the weights for some penalties, float64 [pairs, penalties]; none at an infinite one."""
    gram, cross = cut.gram(), cut.cross(residual)
    weights = np.zeros((len(cross), len(penalties)))
    for column, penalty in enumerate(penalties):
        if np.isfinite(penalty):
            system = gram + np.diag(penalty / variance)
            factor = cho_factor(system, overwrite_a=True, check_finite=False)
            weights[:, column] = cho_solve(factor, cross, check_finite=False)
    return weights
