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
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from cisformer.data.batches import Layout, read_modality
from cisformer.data.genome import signed_distance, window_pairs
from cisformer.data.reference import Reference
from cisformer.data.store import CellStore
from cisformer.model.closed_form import LinearStart, states

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


def fit_local(
    store: CellStore,
    train: np.ndarray,
    val_store: CellStore,
    val: np.ndarray,
    layout: Layout,
    start: LinearStart,
    windows: Windows,
    seed: int,
) -> LocalStart:
    """Fit the cis model to cells `train` of `store`; choose its penalty on cells `val` of `val_store`."""
    rng = np.random.default_rng([seed, 5])
    fit = _read(store, _some(train, FIT_CELLS, rng), layout, start)
    held_out = _read(val_store, _some(val, SELECTION_CELLS, rng), layout, start)
    mean = np.asarray(fit.x.mean(axis=0)).ravel()
    slope = (fit.x.T @ fit.z).T / len(fit.z)
    by_gene = np.argsort(windows.gene, kind="stable")
    genes, first = np.unique(windows.gene[by_gene], return_index=True)
    judged = set(_some(genes, SELECTION_GENES, rng).tolist())
    weight = np.zeros((len(windows.gene), len(PENALTIES)), np.float32)
    losses = np.zeros(len(PENALTIES))
    ccre = windows.ccre
    pairs_of = np.split(by_gene, first[1:]) if len(genes) else []
    for gene, pair in zip(genes, pairs_of, strict=True):
        near = ccre[pair]
        inner = _Cut(fit, near, mean, slope)
        weight[pair] = _ridge(inner, _residual(fit, gene, start), weight_variance(windows.distance[pair]))
        if gene in judged:
            guess = _Cut(held_out, near, mean, slope).predict(weight[pair])
            losses += np.square(_residual(held_out, gene, start)[:, None] - guess).sum(axis=0)
    best = int(np.argmin(losses))
    logger.info("cis start: %d gene-cCRE pairs, penalty %g", len(weight), PENALTIES[best])
    chosen = weight[:, best]
    n_targets = len(layout.target_index)
    bias = -np.bincount(windows.gene, chosen * mean[ccre], n_targets)
    spread = sp.csr_matrix((chosen, (windows.gene, ccre)), shape=(n_targets, len(mean)))
    return LocalStart(
        chosen, bias.astype(np.float32), -(spread @ slope.T).astype(np.float32), PENALTIES[best]
    )


def weight_variance(distance_bp: np.ndarray) -> np.ndarray:
    """Return the prior variance of a link's weight by distance, 1 at 15 kb; any shape."""
    return ((np.abs(distance_bp) + CONTACT_OFFSET_BP) / CONTACT_UNIT_BP) ** -CONTACT_POWER


def _some(items: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.choice(items, min(len(items), most), replace=False))


def _read(store: CellStore, rows: np.ndarray, layout: Layout, start: LinearStart) -> _Side:
    x = read_modality(store, rows, layout.input_modality)[:, layout.input_index].tocsc()
    y = read_modality(store, rows, layout.target_modality)[:, layout.target_index].tocsc()
    return _Side(x, y, states(start.projection, store, rows, layout).astype(np.float64))


def _residual(side: _Side, gene: int, start: LinearStart) -> np.ndarray:
    """Return what the linear start leaves of a gene, in units of its scale; float64 [n]."""
    expression = side.y[:, [gene]].toarray().ravel().astype(np.float64)
    return (expression - start.prior[gene]) / start.scale[gene] - side.z @ start.loadings[gene].astype(
        np.float64
    )


class _Cut:
    """A few cCREs of all cells, less their mean and their regression on z, never made dense."""

    def __init__(self, side: _Side, near: np.ndarray, mean: np.ndarray, slope: np.ndarray) -> None:
        self.x, self.z = side.x[:, near], side.z
        self.mean, self.slope = mean[near], slope[:, near]

    def predict(self, weight: np.ndarray) -> np.ndarray:
        """Return x̃ @ weight."""
        return self.x @ weight - self.mean @ weight - self.z @ (self.slope @ weight)

    def gram(self) -> np.ndarray:
        """Return x̃ᵀx̃; exact on the fitted cells, where z is white."""
        n = self.x.shape[0]
        return (
            (self.x.T @ self.x).toarray() - n * np.outer(self.mean, self.mean) - n * self.slope.T @ self.slope
        )

    def cross(self, residual: np.ndarray) -> np.ndarray:
        """Return x̃ᵀ residual."""
        return self.x.T @ residual - self.mean * residual.sum() - self.slope.T @ (self.z.T @ residual)


def _ridge(cut: _Cut, residual: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Return the weights for every penalty, float64 [pairs, penalties], by one eigendecomposition."""
    root = np.sqrt(variance)
    values, vectors = np.linalg.eigh(root[:, None] * cut.gram() * root)
    inner = vectors.T @ (root * cut.cross(residual))
    shrunk = inner[:, None] / (np.maximum(values, 0)[:, None] + np.array(PENALTIES))
    return root[:, None] * (vectors @ shrunk)
