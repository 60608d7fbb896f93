"""ATAC→RNA in closed form: ridge regression of the leading components of expression on all cCREs.

Genes vary together, and most of a single gene's variance over cells is noise: regress what genes share, not each
gene. With V the leading principal components of expression (in units of the loss), u = Vᵀy their scores in a cell, and
x the cCREs of the cell as `Projection` sees them,

    û = Wᵀ(x − mean),    W = (XᵀX + λI)⁻¹ Xᵀ U,    prediction = mean + V û

Solved for the cells instead of the cCREs, by conjugate gradients with the sparse X: a few products for all λ.
The number of components and λ are chosen on validation cells (benchmarks/RESULTS.md).

A ridge on more cCREs than cells fits the noise of its own cells: what it says of a training cell is too good. To first
order, the prediction of a cell from the others is (û − h u) / (1 − h), with h the mean leverage (Golub, Heath, Wahba
1979). Training and the cis regression see that instead of û.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from cisformer.model.projection import Projection

logger = logging.getLogger(__name__)
PENALTIES = (10.0, 3.0, 1.0, 0.3, 0.1)
"""λ over the mean squared length of a cell's features, strongest first: each solution starts the next."""
LEAST_PENALTY = 1e-4
MOST_COMPONENTS = 32
RANKS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
N_PROBES = 8
TOLERANCE, MOST_STEPS = 1e-3, 100


@dataclass(frozen=True)
class CellMatrix:
    """Normalised input and target of some cells: sparse [n, n_input] and [n, F]."""

    x: sp.csr_matrix
    y: sp.csr_matrix


@dataclass(frozen=True)
class TargetStates:
    """The closed-form ATAC→RNA model.

    Attributes
    ----------
    axes
        Leading components of the target, V; float32 [F, k], columns of length 1 at right angles.
    readout
        û = z @ readout; float32 [K, k], z the states of the whole projection.
    leverage
        h: the mean share of a training cell's own target in its û.
    penalty
        The chosen λ.
    """

    axes: np.ndarray
    readout: np.ndarray
    leverage: float
    penalty: float

    @property
    def loadings(self) -> np.ndarray:
        """What the target changes by with each state; float32 [F, K]."""
        return (self.axes @ self.readout.T).astype(np.float32)


def target_axes(y: sp.csr_matrix, scale: np.ndarray, seed: int) -> np.ndarray:
    """Return the leading principal components of y / scale; float64 [F, ≤ MOST_COMPONENTS]."""
    from sklearn.decomposition import PCA

    k = min(MOST_COMPONENTS, min(y.shape) - 1)
    if k < 1:
        return np.zeros((y.shape[1], 0))
    scaled = sp.csr_matrix(y, dtype=np.float64) @ sp.diags(1 / scale.astype(np.float64))
    return PCA(k, svd_solver="arpack", random_state=seed).fit(scaled.tocsr()).components_.T


def axis_scores(y: sp.csr_matrix, mean: np.ndarray, scale: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Return the scores u of cells on the axes of the target; float64 [n, k]."""
    weights = axes / scale[:, None].astype(np.float64)
    return y @ weights - mean @ weights


class CellRidge:
    """Ridge regression on sparse features of cells, less their mean, for any penalty."""

    def __init__(self, x: sp.csr_matrix, targets: np.ndarray, rng: np.random.Generator) -> None:
        # By feature: a product then goes over the features in order, at random only over cells × targets.
        self.x, self.targets = x.tocsc(), targets
        self.mean = np.asarray(x.mean(axis=0), np.float64).ravel()
        squares = float(x.multiply(x).sum()) / x.shape[0] - float(self.mean @ self.mean)
        self.unit = max(squares, 1e-12)
        self.probes = rng.choice([-1.0, 1.0], (x.shape[0], N_PROBES))
        self._dual = np.zeros((x.shape[0], targets.shape[1] + N_PROBES))

    def fit(self, penalty: float) -> tuple[np.ndarray, float]:
        """Return weights [n_input, k] and the mean leverage; starts from the penalty before."""
        shift = max(penalty, LEAST_PENALTY) * self.unit
        wanted = np.column_stack([self.targets, self.probes])
        self._dual = conjugate_gradients(lambda a: self._kernel(a) + shift * a, wanted, self._dual)
        own = self._dual[:, self.targets.shape[1] :]
        leverage = 1 - shift * float((own * self.probes).mean())
        return self._adjoint(self._dual[:, : self.targets.shape[1]]), float(np.clip(leverage, 0, 0.95))

    def _adjoint(self, a: np.ndarray) -> np.ndarray:
        return self.x.T @ (a - a.mean(axis=0)).astype(np.float32)

    def _kernel(self, a: np.ndarray) -> np.ndarray:
        image = (self.x @ self._adjoint(a)).astype(np.float64)
        return image - image.mean(axis=0)


def conjugate_gradients(
    apply: Callable[[np.ndarray], np.ndarray],
    wanted: np.ndarray,
    start: np.ndarray,
    tolerance: float = TOLERANCE,
) -> np.ndarray:
    """Solve apply(a) = wanted, `apply` symmetric and positive, all columns [n, k] at once.

    It ends when no column's residual is longer than `tolerance` of its wanted side, or after `MOST_STEPS` steps.

    Source: Hestenes and Stiefel (1952).
    """
    a = start.copy()
    residual = wanted - apply(a)
    direction, size = residual.copy(), np.square(residual).sum(axis=0)
    goal = tolerance**2 * np.square(wanted).sum(axis=0)
    for _ in range(MOST_STEPS):
        if (size <= goal).all():
            break
        image = apply(direction)
        step = size / np.maximum((direction * image).sum(axis=0), 1e-300)
        a += step * direction
        residual -= step * image
        before, size = size, np.square(residual).sum(axis=0)
        direction = residual + (size / np.maximum(before, 1e-300)) * direction
    return a


def held_out_states(z: np.ndarray, u: np.ndarray, model: TargetStates) -> np.ndarray:
    """Return the states [n, K] that training cells with scores u would have, had they not been fitted to."""
    unit = np.diag(model.readout[len(model.readout) - model.axes.shape[1] :])
    odds = model.leverage / (1 - model.leverage)
    result = z.astype(np.float64)
    result[:, z.shape[1] - len(unit) :] += odds * (z @ model.readout - u) / unit
    return result


def fit_target_states(
    projection: Projection,
    fit: CellMatrix,
    held_out: CellMatrix | None,
    moments: tuple[np.ndarray, np.ndarray],
    seed: int,
    penalty: float | None,
) -> tuple[Projection, TargetStates]:
    """Fit the closed form; choose components and penalty on `held_out` cells unless `penalty` is given.

    Returns
    -------
    tuple[Projection, TargetStates]
        The projection with a state for each component of the target beside its own, and the model on it.
    """
    mean, scale = moments
    axes = target_axes(fit.y, scale, seed)
    ridge = CellRidge(
        projection.features(fit.x), axis_scores(fit.y, mean, scale, axes), np.random.default_rng([seed, 6])
    )
    if penalty is not None or held_out is None or not held_out.x.shape[0]:
        chosen = 1.0 if penalty is None else penalty
        return assemble(projection, ridge, axes, chosen)
    x, wanted = projection.features(held_out.x), axis_scores(held_out.y, mean, scale, axes)
    gains: dict[tuple[int, float], float] = {}
    for value in PENALTIES:
        weights, _ = ridge.fit(value)
        found = x @ weights - ridge.mean @ weights
        gain = np.concatenate([[0], np.cumsum((2 * found * wanted - found**2).sum(axis=0))])
        gains |= {(k, value): gain[k] for k in RANKS if k < len(gain)}
    rank, best = max(gains, key=lambda choice: gains[choice])
    logger.info("linear start: %d components of expression, penalty %g", rank, best)
    ridge.targets, ridge._dual = ridge.targets[:, :rank], np.zeros((len(ridge.targets), rank + N_PROBES))
    return assemble(projection, ridge, axes[:, :rank], best)


def assemble(
    projection: Projection, ridge: CellRidge, axes: np.ndarray, penalty: float, unit: np.ndarray | None = None
) -> tuple[Projection, TargetStates]:
    """Return the projection with û, less what its principal components tell of it, as further states.

    `unit`, of each further state, is its spread unless given.
    """
    weights, leverage = ridge.fit(penalty)
    own = projection.principal.numpy()
    components = projection.components.double().numpy()[:, own]
    offset = projection.offset.double().numpy()[own]
    found = ridge.x @ weights - ridge.mean @ weights
    white = ridge.x @ components - offset
    shared = np.linalg.lstsq(white, found, rcond=None)[0] if len(white) > len(offset) else white.T @ found * 0
    rest = found - white @ shared
    if unit is None:
        spread = found.std() if found.size else 0.0
        unit = np.maximum(rest.std(axis=0), 1e-3 * max(spread, 1e-12))
    result = Projection(len(components), len(offset) + axes.shape[1], projection.modality)
    result.weight = projection.weight
    further = (weights - components @ shared) / unit
    result.components = _tensor(np.column_stack([components, further]))
    result.offset = _tensor(np.concatenate([offset, (ridge.mean @ weights - offset @ shared) / unit]))
    result.sd[: len(offset)] = projection.sd[projection.principal]
    result.principal[len(offset) :] = False
    readout = np.concatenate([shared, np.diag(unit)]).astype(np.float32)
    return result, TargetStates(axes.astype(np.float32), readout, leverage, penalty)


def _tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32))
