"""What a model has to beat: mean profile, cell-type mean, nearest neighbours, PCA-ridge, kernel ridge, and a mask
oracle.

They are meant to be strong. Each sees what the model sees, the input modality of the training cells and of
the cell to predict, and chooses its settings (number of neighbours, metric, penalty, number of components,
shrinkage) by its loss on a tenth of the training cells held out, then fits all of them. Predictions are
products of two thin matrices, made block by block, so that a million cCREs fit in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp

from cisformer.config import Direction
from cisformer.evaluation.pseudobulk import pseudobulk
from cisformer.evaluation.training_cells import CellsToPredict, InputSpace, Product, TrainingCells

MOST_LANDMARKS, MOST_COEFFICIENTS = 600, 40_000_000
"""Kernel ridge: maximum number of landmark cells, and of coefficients of all features together."""


class Baseline(Protocol):
    """A fitted baseline."""

    @property
    def settings(self) -> dict[str, Any]:
        """Settings chosen on held-out training cells."""

    def predict(self, cells: CellsToPredict) -> Product:
        """Return the prediction of `cells` [cells × target features]."""


@dataclass(frozen=True)
class MeanProfile:
    """The mean of the training cells, for every cell the same."""

    training: TrainingCells
    settings: dict[str, Any]

    def predict(self, cells: CellsToPredict) -> Product:
        """Return the mean for each of `cells`."""
        mean = self.training.mean
        nothing = sp.csr_matrix((1, len(mean)), dtype=np.float32)
        return self.training.product(sp.csr_matrix((len(cells.depth), 1), dtype=np.float32), nothing, mean)


@dataclass(frozen=True)
class CellTypeMean:
    """The mean of the training cells of the same label, shrunk to the mean profile by `shrink` cells."""

    training: TrainingCells
    settings: dict[str, Any]

    def predict(self, cells: CellsToPredict) -> Product:
        """Return the mean of each cell's type; the mean profile for a type that training has not seen."""
        assert self.training.cells.labels is not None
        assert cells.labels is not None
        types, group = np.unique(self.training.cells.labels.astype(str), return_inverse=True)
        sizes = np.bincount(group)
        weight = (sizes / (sizes + self.settings["shrink"]))[:, None]
        mean = self.training.mean
        change = weight * (pseudobulk(self.training.target, group, len(types)) - mean)
        member = (cells.labels.astype(str)[:, None] == types).astype(np.float32)
        return self.training.product(member, change.astype(np.float32), mean)


@dataclass(frozen=True)
class NearestNeighbours:
    """The mean of the most similar training cells, shrunk to the mean profile by `shrink` cells."""

    training: TrainingCells
    settings: dict[str, Any]

    def predict(self, cells: CellsToPredict) -> Product:
        """Return the mean of each cell's neighbours."""
        from sklearn.neighbors import NearestNeighbors

        k, shrink = min(self.settings["k"], self.training.target.shape[0]), self.settings["shrink"]
        scale = self.training.cells.components.std(axis=0) if self.settings["white"] else 1.0
        search = NearestNeighbors(n_neighbors=k, metric=self.settings["metric"], algorithm="brute")
        search.fit(self.training.cells.components / scale)
        near = search.kneighbors_graph(cells.components / scale)
        left = (near / (k + shrink)).astype(np.float32)
        return self.training.product(left, self.training.target, self.training.mean * shrink / (k + shrink))


@dataclass(frozen=True)
class PcaRidge:
    """Ridge regression of the target on principal components and log depth of the input.

    Components keep their variance, so that the penalty weighs most on the small ones; depth has the
    variance of the first.
    """

    training: TrainingCells
    settings: dict[str, Any]

    def _design(self, cells: CellsToPredict) -> np.ndarray:
        """Return components and depth [cells × k + 1], centred, the largest of s.d. 1."""
        of = self.training.cells
        scores = (cells.components - of.components.mean(axis=0)) / of.components.std(axis=0).max()
        depth = (cells.depth - of.depth.mean()) / max(of.depth.std(), 1e-9)
        return np.column_stack([scores[:, : self.settings["n_components"]], depth])

    def predict(self, cells: CellsToPredict) -> Product:
        """Return mean + design @ coefficients, which minimise squared error / n + penalty × their squares."""
        design = self._design(self.training.cells)
        gram = design.T @ design + self.settings["penalty"] * len(design) * np.eye(design.shape[1])
        coefficients = np.linalg.solve(gram, (self.training.target.T @ design).T)
        left, right = self._design(cells).astype(np.float32), coefficients.astype(np.float32)
        return self.training.product(left, right, self.training.mean)


@dataclass(frozen=True)
class KernelRidge:
    """Ridge regression on a Gaussian kernel of the principal components, by Nyström features.

    Components keep their variance, and depth has the variance of the first, as in `PcaRidge`; the width of the kernel
    is in units of the mean squared distance of two cells. Source: Williams and Seeger (2001).
    """

    training: TrainingCells
    settings: dict[str, Any]

    @cached_property
    def _map(self) -> Any:
        from sklearn.kernel_approximation import Nystroem

        points = self._points(self.training.cells)
        n_targets = self.training.target.shape[1]
        size = min(MOST_LANDMARKS, max(50, MOST_COEFFICIENTS // n_targets), len(points))
        gamma = self.settings["gamma"] / (2 * points.var(axis=0).sum())
        return Nystroem(gamma=gamma, n_components=size, random_state=0).fit(points)

    def _points(self, cells: CellsToPredict) -> np.ndarray:
        depth = (cells.depth - self.training.cells.depth.mean()) / max(self.training.cells.depth.std(), 1e-9)
        return np.column_stack([cells.components, depth * self.training.cells.components.std(axis=0).max()])

    def predict(self, cells: CellsToPredict) -> Product:
        """Return mean + features @ coefficients, which minimise squared error / n + penalty × their squares."""
        design = self._map.transform(self._points(self.training.cells))
        centre = design.mean(axis=0)
        design = design - centre
        gram = design.T @ design + self.settings["penalty"] * len(design) * np.eye(design.shape[1])
        coefficients = np.linalg.solve(gram, (self.training.target.T @ design).T)
        left = (self._map.transform(self._points(cells)) - centre).astype(np.float32)
        return self.training.product(left, coefficients.astype(np.float32), self.training.mean)


Kind = type[MeanProfile] | type[CellTypeMean] | type[NearestNeighbours] | type[PcaRidge] | type[KernelRidge]

GRIDS: dict[str, tuple[Kind, dict[str, Iterable[Any]]]] = {
    "mean profile": (MeanProfile, {}),
    "cell-type mean": (CellTypeMean, {"shrink": (1, 5, 20, 100)}),
    "kNN": (
        NearestNeighbours,
        {
            "k": (30, 100, 300),
            "shrink": (0, 3, 10, 30, 100, 300),
            "metric": ("cosine", "euclidean"),
            "white": (False, True),
        },
    ),
    "PCA-ridge": (
        PcaRidge,
        {"n_components": (10, 20, 50), "penalty": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)},
    ),
    "kernel ridge": (KernelRidge, {"gamma": (0.1, 0.3, 1.0), "penalty": (0.001, 0.003, 0.01, 0.03, 0.1)}),
}
"""Each baseline by its name, with the settings it chooses from."""

ORACLE = "mask oracle"
"""Writes 1 where the true cell expresses a gene: what a prediction that reads the answer would score."""


@dataclass(frozen=True)
class Baselines:
    """Baselines fitted to one training set.

    Attributes
    ----------
    space
        Principal components of the input.
    mean
        What the mean profile predicts [features].
    fitted
        Baselines by name.
    """

    space: InputSpace
    mean: np.ndarray
    fitted: dict[str, Baseline]

    def predict(self, test_input: sp.csr_matrix, labels: np.ndarray | None = None) -> dict[str, Product]:
        """Predict cells by every baseline; those that need labels are left out where there are none.

        Parameters
        ----------
        test_input
            Raw counts or 0/1 accessibility [cells × input features].
        labels
            Cell type of each cell.
        """
        cells = self.space.read(sp.csr_matrix(test_input, dtype=np.float32), labels)
        return {
            name: baseline.predict(cells)
            for name, baseline in self.fitted.items()
            if labels is not None or not isinstance(baseline, CellTypeMean)
        }


def fit_baselines(
    train_input: sp.csr_matrix,
    train_target: sp.csr_matrix,
    *,
    direction: Direction,
    labels: np.ndarray | None = None,
    seed: int = 0,
    names: Iterable[str] = tuple(GRIDS),
) -> Baselines:
    """Fit the baselines, each with the settings that have the lowest loss on held-out training cells.

    Parameters
    ----------
    train_input
        Raw counts (RNA→ATAC) or 0/1 accessibility (ATAC→RNA) [cells × input features].
    train_target
        0/1 accessibility or log-normalised expression [cells × target features].
    direction
        Which modality is predicted.
    labels
        Cell type of each cell; without at least two there is no cell-type mean.
    seed
        Random seed of the choice of tuning cells.
    names
        Which baselines.
    """
    modality = "rna" if direction == "rna2atac" else "atac"
    train_input = sp.csr_matrix(train_input, dtype=np.float32)
    space = InputSpace.fit(train_input, modality, seed=seed)
    target = sp.csr_matrix(train_target, dtype=np.float32)
    training = TrainingCells(direction, space.read(train_input, labels), target)
    telling = labels is not None and len(set(labels)) > 1
    chosen = [name for name in names if telling or name != "cell-type mean"]
    return Baselines(
        space,
        training.mean.astype(np.float32),
        {name: _fit(training, *GRIDS[name], seed=seed) for name in chosen},
    )


def _fit(training: TrainingCells, kind: Kind, grid: dict[str, Iterable[Any]], *, seed: int) -> Baseline:
    """Choose the settings on held-out training cells, then fit all training cells with them."""
    options = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(options) == 1:
        return kind(training, options[0])
    fit, tune = training.split(seed)
    losses = [tune.loss(kind(fit, settings).predict(tune.cells)) for settings in options]
    return kind(training, options[int(np.argmin(losses))])


def mask_oracle(truth: sp.csr_matrix) -> sp.csr_matrix:
    """Return 1 where `truth` [cells × genes] is expressed: not a method, but a measure of leakage."""
    return (sp.csr_matrix(truth) != 0).astype(np.float32)
