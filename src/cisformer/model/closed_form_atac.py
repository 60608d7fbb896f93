"""RNA→ATAC in closed form: ridge regression of every cCRE on the states, with a penalty learnt from all cCREs.

    eta[i, f] = prior[f] + link(<z[i], loadings[f]>),    loadings[f] ~ N(M_f, V w_f^(a - 1)),    w_f = p_f (1 − p_f)

The loadings are ridge regression of accessibility in units of w, drawn to M_f = m + N_f with covariance V:

    loadings[f] = M_f + (ZᵀZ + V⁻¹ w_f^-a)⁻¹ (Zᵀ(Y[:, f] − p_f) / w_f − ZᵀZ M_f)

The link is in `model.link_function`.

V starts as that of ridge regression on principal components, diag(σ_k² / σ_1²) / (n λ mean(w)^a): a = 0 is ridge
regression of frequencies, a = 1 one Newton step of ridge logistic regression. A few steps of expectation–maximisation
over all cCREs then learn how much each state tells of accessibility, and which tell it together (empirical Bayes: Efron
and Morris 1973; Dempster, Laird, Rubin 1977). m is what all cCREs share: in a deeply sequenced cell more of each are
found open. If each cCRE had to learn that alone, its errors would change the order of the cCREs within a cell. m is
ridge regression of the number of open cCREs, where leading components are penalised least:

    m = (ZᵀZ + n/τ diag(σ_1² / σ_k²))⁻¹ Σ_f Zᵀ(Y[:, f] − p_f) / Σ_f w_f

N_f is what the cCREs beside f on the genome say: they tend to open in the same cells. Rank, λ, a, τ, steps and
neighbours are chosen on validation cells. One sweep over the cells gives ZᵀZ and ZᵀY; the rest are K × K systems.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional as F

from cisformer.data.batches import Layout, read_modality, row_blocks
from cisformer.model.cell_rows import CellRows
from cisformer.model.link_function import change_of_log_odds
from cisformer.model.projection import Projection, states

logger = logging.getLogger(__name__)
SELECTION_VALUES = 10_000_000
"""At most so many values of validation cells' targets that the penalty is chosen by."""
PENALTIES = (0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0)
"""λ over the variance of the largest component."""
UNEVENNESS = (0.0, 0.5, 1.0)
"""a: how much more seldom open cCREs are penalised."""
RANKS = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)
STEPS = (0, 1, 3, 10, 30)
STRENGTHS = (0.5, 1.0)
"""Of V once it has been learnt."""
SHARED, USUAL_SHARED = (0.0, 1.0, 10.0, 100.0), 10.0
"""τ: how freely m is learnt, 0 for m = 0; and the one that serves until it is chosen."""
LEARN_CCRES, LEARN_OPEN = 50_000, 5
"""V is learnt from at most so many cCREs, each open in at least so many cells."""
N_BESIDE, BESIDE_BP, MOST_BESIDE_BP = 8, 10_000, 100_000
"""Neighbours on either side; the distance at which one counts half; the farthest."""
BESIDE_SPREAD = 3.0
"""How much more neighbours are shrunk than if they were the cCRE itself."""
COLUMNS = 100_000
"""cCREs solved at once: bounds memory."""


@dataclass(frozen=True)
class Sums:
    """What one sweep over cells leaves of them, RNA→ATAC.

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

    def __sub__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

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

    @cached_property
    def cross_total(self) -> np.ndarray:
        """ZᵀY summed over the targets; float64 [K]."""
        return self.cross.sum(axis=1)

    def prior(self) -> np.ndarray:
        """Return the logit of the frequencies, smoothed by one cell of the mean frequency; float32 [F]."""
        return smoothed_logit(self.open_, self.n_cells)

    def frequency(self) -> np.ndarray:
        """Return the smoothed frequencies, p; float64 [F]."""
        return self._frequency

    @cached_property
    def _frequency(self) -> np.ndarray:  # once: every choice of a penalty asks for it several times
        return 1 / (1 + np.exp(-self.prior().astype(np.float64)))


@dataclass(frozen=True)
class Penalty:
    """How loadings are penalised; see the module.

    Attributes
    ----------
    rank, ridge, unevenness
        Number of states, λ and a of the ridge regression that V starts as.
    steps, strength
        Steps that V is learnt by, and what it is multiplied with.
    beside
        Whether loadings are drawn to those of the cCREs beside them.
    shared
        τ: how freely all cCREs share loadings; 0 if they share none.
    """

    rank: int
    ridge: float
    unevenness: float
    steps: int = 0
    strength: float = 1.0
    beside: bool = False
    shared: float = 0.0

    def to_metrics(self) -> dict[str, float]:
        """Return what a checkpoint records."""
        return {f"linear_{f.name}": getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_metrics(cls, metrics: dict[str, float]) -> Penalty:
        """Read what `to_metrics` wrote."""
        known = {f.name: metrics[f"linear_{f.name}"] for f in fields(cls) if f"linear_{f.name}" in metrics}
        return cls(**known | {"rank": int(known["rank"])})  # type: ignore[arg-type]


def smoothed_logit(n_open: np.ndarray, n_cells: int) -> np.ndarray:
    """Return the logit of frequencies smoothed by one cell of the mean frequency; float32, shape of `n_open`."""
    smooth = (n_open + n_open.mean() / n_cells) / (n_cells + 1)
    return np.log(smooth / (1 - smooth)).astype(np.float32)


def beside(ccres: pd.DataFrame) -> sp.csr_matrix:
    """Return how much the cCREs beside each one count; float32 [F, F], 0 for itself.

    Parameters
    ----------
    ccres
        Columns ``chrom, start, end``, of all targets.
    """
    middle = (ccres["start"].to_numpy(np.int64) + ccres["end"].to_numpy(np.int64)) // 2
    chrom = pd.factorize(ccres["chrom"].astype(str))[0]
    order = np.lexsort((middle, chrom))
    x, c, size = middle[order], chrom[order], len(order)
    pairs = []
    for step in range(1, min(N_BESIDE, size - 1) + 1):
        distance = x[step:] - x[:-step]
        near = np.flatnonzero((c[step:] == c[:-step]) & (distance < MOST_BESIDE_BP))
        weight = BESIDE_BP / (BESIDE_BP + distance[near])
        pairs.append(sp.csr_matrix((weight, (order[near], order[near + step])), (size, size), np.float32))
    half = sum(pairs, sp.csr_matrix((size, size), dtype=np.float32))
    return sp.csr_matrix(half + half.T)


@dataclass(frozen=True)
class Hat:
    """The inverses (ZᵀZ + V⁻¹ w_f^-a)⁻¹ of all targets, basis (spread + ridge_f)⁻¹ basisᵀ, and what targets share.

    Attributes
    ----------
    basis, spread
        float64 [K, K] and [K], basis basisᵀ = V and basisᵀ ZᵀZ basis = diag(spread); zero and one beyond the rank.
    ridge
        w_f^-a; float64 [F].
    shared
        m; float64 [K].
    """

    basis: np.ndarray
    spread: np.ndarray
    ridge: np.ndarray
    shared: np.ndarray

    @classmethod
    def of(cls, sums: Sums, sd: np.ndarray, penalty: Penalty, learnt: np.ndarray | None = None) -> Hat:
        """Decompose V; `learnt` is what `covariance_of` returns, where it is known.

        `sd` is the spread of each principal component, largest first.
        """
        p = sums.frequency()
        covariance = covariance_of(sums, sd, penalty) if learnt is None else learnt
        ridge, shared = (p * (1 - p)) ** -penalty.unevenness, shared_loadings(sums, sd, penalty.shared)
        return cls(*simultaneous(covariance * penalty.strength, sums.gram, penalty.rank), ridge, shared)


def covariance_of(sums: Sums, sd: np.ndarray, penalty: Penalty) -> np.ndarray:
    """Return V of strength 1, learnt in the penalty's steps; float64 [K, K]."""
    p = sums.frequency()
    weight, rank = p * (1 - p), penalty.rank
    start = np.zeros(len(sd))
    unit = sums.n_cells * max(penalty.ridge, 1e-9) * weight.mean() ** penalty.unevenness
    start[:rank] = np.square(sd[:rank] / sd[0]) / unit
    covariance = np.diag(start)
    shared, learnt = shared_loadings(sums, sd, penalty.shared), _learnt_from(sums)
    if penalty.steps and len(learnt):
        score = _score(sums, p, learnt) - np.outer(sums.gram @ shared, weight[learnt])
        for _ in range(penalty.steps):
            covariance = learn_covariance(covariance, sums.gram, score, weight[learnt], penalty.unevenness)
    return covariance


def shared_loadings(sums: Sums, sd: np.ndarray, freedom: float) -> np.ndarray:
    """Return m, the loadings that all targets share; float64 [K].

    Parameters
    ----------
    sums
        Of the training cells.
    sd
        Spread of each state before whitening, largest first; [K].
    freedom
        τ; 0 for none.
    """
    if freedom == 0:
        return np.zeros(len(sd))
    p = sums.frequency()
    penalty = sums.n_cells / freedom * np.square(sd[0] / sd)
    return np.linalg.solve(
        sums.gram + np.diag(penalty), (sums.cross_total - sums.z * p.sum()) / (p * (1 - p)).sum()
    )


def _learnt_from(sums: Sums) -> np.ndarray:
    """Return the cCREs that V is learnt from, spread evenly."""
    often = np.flatnonzero(sums.open_ >= LEARN_OPEN)
    return often[:: max(1, -(-len(often) // LEARN_CCRES))]


def _score(sums: Sums, p: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return Zᵀ(Y − p) of some cCREs; float64 [K, columns]."""
    return sums.cross[:, columns] - np.outer(sums.z, p[columns])


def simultaneous(covariance: np.ndarray, gram: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return basis [K, K] and values [K] with basis basisᵀ = covariance, basisᵀ gram basis = diag(values)."""
    size = len(gram)
    basis, values = np.zeros((size, size)), np.ones(size)
    if rank:
        spread, axes = np.linalg.eigh(covariance[:rank, :rank])
        root = axes * np.sqrt(np.maximum(spread, 0))
        found, turned = np.linalg.eigh(root.T @ gram[:rank, :rank] @ root)
        basis[:rank, :rank], values[:rank] = root @ turned, np.maximum(found, 0)
    return basis, values


def learn_covariance(
    covariance: np.ndarray, gram: np.ndarray, score: np.ndarray, weight: np.ndarray, unevenness: float
) -> np.ndarray:
    """Take one step of expectation–maximisation: V becomes the mean of what the loadings are expected to be.

    Parameters
    ----------
    covariance, gram
        V and ZᵀZ [K, K].
    score
        Zᵀ(Y − p) [K, cCREs], of variance w ZᵀZ where the cCRE does not depend on the states.
    weight, unevenness
        w [cCREs] and a.

    Returns
    -------
    numpy.ndarray
        [K, K], symmetric; the rank does not grow.
    """
    basis, values = simultaneous(covariance, gram, len(gram))
    power = weight**unevenness
    precision = values[:, None] * power + 1
    mean = (basis.T @ score) * np.sqrt(power / weight) / precision
    moment = mean @ mean.T / len(weight) + np.diag((1 / precision).mean(axis=1))
    learnt = basis @ moment @ basis.T
    return (learnt + learnt.T) / 2


def solve(
    sums: Sums,
    sd: np.ndarray,
    penalty: Penalty,
    near: sp.csr_matrix | None = None,
    columns: np.ndarray | None = None,
) -> np.ndarray:
    """Return loadings float32 [F, K], of all targets or of some `columns`; zero beyond the rank.

    One decomposition serves all cCREs: with V = B Bᵀ and Bᵀ ZᵀZ B = Λ, the inverse of ZᵀZ + V⁻¹ w^-a is
    B (Λ + w^-a)⁻¹ Bᵀ. `near` is what `beside` returns, where the penalty asks for it.
    """
    return loadings_of(sums, Hat.of(sums, sd, penalty), near if penalty.beside else None, columns)


def loadings_of(
    sums: Sums, hat: Hat, near: sp.csr_matrix | None, columns: np.ndarray | None = None
) -> np.ndarray:
    """Return what `solve` returns, by inverses that are known; no `near`: neighbours do not help."""
    wanted = np.arange(len(sums.open_)) if columns is None else columns
    parts = [wanted[start : start + COLUMNS] for start in range(0, len(wanted), COLUMNS)]
    solved = [_solve(sums, hat, near, part).astype(np.float32) for part in parts]
    return np.concatenate([np.zeros((0, len(sums.z)), np.float32), *solved])


def _solve(sums: Sums, hat: Hat, near: sp.csr_matrix | None, columns: np.ndarray) -> np.ndarray:
    p = sums.frequency()
    weight = (p * (1 - p))[columns]
    centre = np.repeat(hat.shared[:, None], len(columns), axis=1)
    if near is not None:
        centre += _beside(sums, hat, near[columns], columns)
    wanted = _score(sums, p, columns) / weight - sums.gram @ centre
    inverse = 1 / (hat.spread[:, None] + hat.ridge[columns])
    return (centre + hat.basis @ ((hat.basis.T @ wanted) * inverse)).T


def _beside(sums: Sums, hat: Hat, near: sp.csr_matrix, columns: np.ndarray) -> np.ndarray:
    """Return N [K, columns]: the neighbours' cells taken together, as if of one cCRE, and shrunk."""
    p = sums.frequency()
    weight = p * (1 - p)
    score = (near @ sums.cross.T).T - np.outer(sums.z, near @ p)
    score -= np.outer(sums.gram @ hat.shared, near @ weight)
    precision = hat.spread[:, None] * (near @ weight) + BESIDE_SPREAD * weight[columns] * hat.ridge[columns]
    return hat.basis @ ((hat.basis.T @ score) / precision)


@dataclass(frozen=True)
class _Case:
    """Cells that penalties are judged by: the sums of others, states z, targets y, prior; what was learnt already."""

    sums: Sums
    z: Tensor
    y: Tensor
    prior: Tensor
    learnt: dict[Penalty, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(
        cls, sums: Sums, cells: CellRows, projection: Projection, layout: Layout, judged: np.ndarray
    ) -> _Case:
        known = cells.read(replace(layout, target_index=layout.target_index[judged]))
        z = np.concatenate([states(projection, store, rows, layout) for store, rows in cells.parts])
        prior = torch.from_numpy(sums.prior()[judged])
        return cls(sums, torch.from_numpy(z), torch.from_numpy(known.y.toarray()), prior)

    def hat(self, sd: np.ndarray, choice: Penalty) -> Hat:
        """Return what `Hat.of` returns; V is learnt once for all strengths, with neighbours and without."""
        key = replace(choice, strength=1.0, beside=False)
        if key not in self.learnt:
            self.learnt[key] = covariance_of(self.sums, sd, key)
        return Hat.of(self.sums, sd, choice, self.learnt[key])

    def loss(self, loadings: np.ndarray) -> float:
        eta = change_of_log_odds(self.z @ torch.from_numpy(loadings).T, self.prior) + self.prior
        return float(F.binary_cross_entropy_with_logits(eta, self.y, reduction="sum"))


def select_penalty(
    judges: Sequence[tuple[Sums, CellRows]],
    projection: Projection,
    layout: Layout,
    near: sp.csr_matrix,
    rng: np.random.Generator,
) -> Penalty:
    """Return the penalty of lowest loss; rank 0 is the mean profile.

    First rank and λ at the middle unevenness, then λ and unevenness at that rank, then how V is learnt and whether
    neighbours help, then how much all cCREs share.

    Parameters
    ----------
    judges
        The sums of the cells to learn from, and the cells to judge by, once or several times.
    """
    n_targets, n_cells = len(layout.target_index), sum(len(cells) for _, cells in judges)
    judged = np.sort(rng.choice(n_targets, min(n_targets, SELECTION_VALUES // n_cells), replace=False))
    cases = [_Case.of(sums, cells, projection, layout, judged) for sums, cells in judges]
    sd = projection.sd.double().numpy()

    @cache  # the best choice so far is judged again beside others
    def loss(choice: Penalty) -> float:
        used = near if choice.beside else None
        return sum(case.loss(loadings_of(case.sums, case.hat(sd, choice), used, judged)) for case in cases)

    ranks = sorted({projection.rank, *(r for r in RANKS if r < projection.rank)})
    usual = Penalty(0, 1.0, UNEVENNESS[1], shared=USUAL_SHARED)
    pairs = itertools.product(ranks, PENALTIES)
    best = _best(loss, (replace(usual, rank=rank, ridge=ridge) for rank, ridge in pairs))
    forms = itertools.product(PENALTIES, UNEVENNESS)
    best = _best(loss, (replace(best, ridge=ridge, unevenness=uneven) for ridge, uneven in forms))
    best = _best(loss, (replace(best, steps=steps, beside=True) for steps in STEPS))
    choices = itertools.product(STRENGTHS, (False, True))
    best = _best(
        loss, (replace(best, strength=strength, beside=with_them) for strength, with_them in choices)
    )
    best = _best(loss, (replace(best, shared=shared) for shared in SHARED))
    alone = Penalty(0, best.ridge, best.unevenness)
    best = _best(loss, (alone, replace(alone, shared=best.shared), best))
    logger.info(
        "linear start: %d components, penalty %g, unevenness %g, %d steps, strength %g, neighbours %s, shared %g",
        best.rank, best.ridge, best.unevenness, best.steps, best.strength, best.beside, best.shared,
    )  # fmt: skip
    return best


def _best(loss: Callable[[Penalty], float], choices: Iterable[Penalty]) -> Penalty:
    return min(choices, key=loss)
