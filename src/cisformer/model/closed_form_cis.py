"""The closed-form cis model: per gene, a ridge regression on the open cCREs in its window.

What the principal components leave of a gene's expression is regressed on what they leave of the accessibility of the
cCREs near it. With x the accessibility of gene g's cCREs less their mean and their regression on z, and r the
residual of the linear start,

    w_g = (xᵀx + λ D⁻¹)⁻¹ xᵀ r_g,    D = diag((|distance| + 5 kb)^-0.7), scaled to 1 at 20 kb

so that near cCREs may have larger weights (the contact exponent of the activity-by-contact model, Fulco et al. 2019).
λ is the same for all genes, chosen on validation cells. Nothing is dense in cells × cCREs.

Neighbouring genes share most of their cCREs, so they are solved together, by conjugate gradients: one xᵀx over the
cCREs near any of them, and D = 0 where a cCRE is not near a gene.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy.sparse as sp

from cisformer.data.batches import Layout
from cisformer.data.genome import signed_distance, window_pairs
from cisformer.data.reference import Reference
from cisformer.model.cell_rows import CellRows
from cisformer.model.closed_form import LinearStart
from cisformer.model.projection import states
from cisformer.model.target_states import axis_scores, conjugate_gradients, held_out_states

logger = logging.getLogger(__name__)
DISTANCE_EDGES_BP = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)
CONTACT_OFFSET_BP, CONTACT_UNIT_BP, CONTACT_POWER = 5_000, 20_000, 0.7
PENALTIES = (np.inf, 3_000.0, 1_000.0, 300.0, 100.0, 30.0, 10.0)
"""Strongest first: each solution starts the next."""
FIT_CELLS = 20_000
SELECTION_CELLS, SELECTION_GENES = 1_000, 2_000
BLOCK_GENES, BLOCK_CCRES = 16, 1_024
"""At most so many neighbouring genes, and cCREs near any of them, are solved together."""
TOLERANCE = 1e-4
DENSE_SHARE = 0.1
"""Of cCRE pairs that are open together in some cell: above it, xᵀx is multiplied as a dense matrix."""


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
    explained = _Explained(mean, slope, gram)
    blocks = _blocks(windows)
    losses = np.zeros(len(PENALTIES))
    for block in _some(blocks, rng):
        cut, unknown = _Cut(held_out, block.ccre, explained), _residual(held_out, block.gene, start)
        for i, weight in enumerate(_ridge(fit, block, explained, start, PENALTIES)):
            losses[i] += np.square(unknown - cut.predict(weight)).sum()
    best = PENALTIES[int(np.argmin(losses))]
    logger.info("cis start: %d gene-cCRE pairs, penalty %g", len(windows.gene), best)
    ccre, chosen = windows.ccre, np.zeros(len(windows.gene), np.float32)
    if np.isfinite(best):
        for block in blocks:
            (weight,) = _ridge(fit, block, explained, start, (best,))
            chosen[block.pair] = weight[block.row, block.column]
    n_targets = len(layout.target_index)
    bias = -np.bincount(windows.gene, chosen * mean[ccre], n_targets)
    spread = sp.csr_matrix((chosen, (windows.gene, ccre)), shape=(n_targets, len(mean)))
    return LocalStart(chosen, bias.astype(np.float32), -(spread @ slope.T).astype(np.float32), best)


def weight_variance(distance_bp: np.ndarray) -> np.ndarray:
    """Return the prior variance of a link's weight by distance, 1 at 15 kb; any shape."""
    return ((np.abs(distance_bp) + CONTACT_OFFSET_BP) / CONTACT_UNIT_BP) ** -CONTACT_POWER


@dataclass(frozen=True)
class _Block:
    """Neighbouring genes and the cCREs near any of them.

    Attributes
    ----------
    gene, ccre
        Target and input numbers; int64 [G] and [U].
    pair, row, column
        Number within `Windows` of each pair, and where its cCRE and its gene stand in the block; int64 [w].
    distance
        Of each pair; int64 [w].
    """

    gene: np.ndarray
    ccre: np.ndarray
    pair: np.ndarray
    row: np.ndarray
    column: np.ndarray
    distance: np.ndarray

    def variance(self) -> np.ndarray:
        """Return the prior variance of each weight, 0 where a cCRE is not near a gene; float64 [U, G]."""
        variance = np.zeros((len(self.ccre), len(self.gene)))
        variance[self.row, self.column] = weight_variance(self.distance)
        return variance


def _blocks(windows: Windows) -> list[_Block]:
    """Return all genes with their cCREs, neighbours together."""
    by_gene = np.argsort(windows.gene, kind="stable")
    _, first = np.unique(windows.gene[by_gene], return_index=True)
    pairs_of_genes = np.split(by_gene, first[1:]) if len(first) else []
    ccre, blocks = windows.ccre, []
    block_of = np.full(len(windows.indptr) - 1, -1)
    together: list[np.ndarray] = []
    n_ccres = 0

    def close() -> None:
        pair = np.concatenate(together)
        genes, column = np.unique(windows.gene[pair], return_inverse=True)
        ccres, row = np.unique(ccre[pair], return_inverse=True)
        blocks.append(_Block(genes, ccres, pair, row, column, windows.distance[pair]))
        together.clear()

    for pair in sorted(pairs_of_genes, key=lambda pair: pair[0]):  # by their first cCRE
        near = ccre[pair]
        n_ccres += int(np.count_nonzero(block_of[near] != len(blocks)))
        if together and (n_ccres > BLOCK_CCRES or len(together) == BLOCK_GENES):
            close()
            n_ccres = len(near)
        block_of[near] = len(blocks)
        together.append(pair)
    if together:
        close()
    return blocks


def _some(blocks: list[_Block], rng: np.random.Generator) -> list[_Block]:
    """Draw blocks until they hold `SELECTION_GENES` genes."""
    order = rng.permutation(len(blocks))
    before = np.cumsum([0, *(len(blocks[i].gene) for i in order)])[:-1]
    return [blocks[i] for i in np.sort(order[before < SELECTION_GENES])]


def _read(cells: CellRows, layout: Layout, start: LinearStart, *, fitted: bool) -> _Side:
    matrix = cells.read(layout)
    parts = [states(start.projection, store, rows, layout) for store, rows in cells.parts]
    z = known = np.concatenate(parts).astype(np.float64)
    if fitted and start.target_states is not None:
        u = axis_scores(matrix.y, start.prior, start.scale, start.target_states.axes)
        known = held_out_states(z, u, start.target_states)
    return _Side(matrix.x.tocsc(), matrix.y.tocsc(), z, known)


def _residual(side: _Side, genes: np.ndarray, start: LinearStart) -> np.ndarray:
    """Return what the linear start leaves of genes, in units of their scale; float64 [n, G]."""
    expression = side.y[:, genes].toarray().astype(np.float64)
    explained = side.known @ start.loadings[genes].T.astype(np.float64)
    return (expression - start.prior[genes]) / start.scale[genes] - explained


@dataclass(frozen=True)
class _Explained:
    """What mean and states tell of the accessibility of the fitted cells.

    Attributes
    ----------
    mean, slope
        Of each cCRE; float64 [n_input] and [K, n_input].
    gram
        zᵀz; float64 [K, K].
    """

    mean: np.ndarray
    slope: np.ndarray
    gram: np.ndarray


class _Cut:
    """x̃: a few cCREs of all cells, less their mean and their regression on z, never made dense."""

    def __init__(self, side: _Side, near: np.ndarray, explained: _Explained) -> None:
        self.x, self.z, self.states_gram = side.x[:, near], side.z, explained.gram
        self.mean, self.slope = explained.mean[near], explained.slope[:, near]

    def predict(self, weight: np.ndarray) -> np.ndarray:
        """Return x̃ @ weight."""
        return self.x @ weight - self.mean @ weight - self.z @ (self.slope @ weight)

    def gram(self) -> Callable[[np.ndarray], np.ndarray]:
        """Return the map v → x̃ᵀx̃ v, exact on the fitted cells."""
        own = self.x.T @ self.x
        if own.nnz > DENSE_SHARE * own.shape[0] ** 2:
            own = own.toarray()
        explained = np.vstack([self.mean, self.slope])  # one product for both: the mean is a state of 1
        image = np.vstack([self.x.shape[0] * self.mean, self.states_gram @ self.slope])
        return lambda v: own @ v - explained.T @ (image @ v)

    def cross(self, residual: np.ndarray) -> np.ndarray:
        """Return x̃ᵀ residual."""
        total = np.outer(self.mean, residual.sum(axis=0))
        return self.x.T @ residual - total - self.slope.T @ (self.z.T @ residual)


def _ridge(
    side: _Side, block: _Block, explained: _Explained, start: LinearStart, penalties: Sequence[float]
) -> Iterator[np.ndarray]:
    """Yield the weights for each penalty, float64 [U, G]; none at an infinite one."""
    cut = _Cut(side, block.ccre, explained)
    gram, root = cut.gram(), np.sqrt(block.variance())
    wanted = root * cut.cross(_residual(side, block.gene, start))
    found = np.zeros_like(wanted)
    for penalty in penalties:
        if np.isfinite(penalty):
            found = conjugate_gradients(partial(_system, gram, root, penalty), wanted, found, TOLERANCE)
        yield root * found


def _system(
    gram: Callable[[np.ndarray], np.ndarray], root: np.ndarray, penalty: float, v: np.ndarray
) -> np.ndarray:
    """Return (√D x̃ᵀx̃ √D + λ) v, with `root` √D."""
    return root * gram(root * v) + penalty * v
