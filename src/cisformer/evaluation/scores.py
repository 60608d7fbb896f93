"""Measure several predictions of the same cells in the same way, with intervals, and say which is better.

Intervals and comparisons come from one bootstrap over test cells, the same draws for every method, so that
what is common to the methods cancels in their difference. Scores that are not means over cells (AUROC of a
cCRE across cells, say) are computed anew in fewer draws, on a sample of the features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import scipy.sparse as sp
from scipy.stats import rankdata

from cisformer.config import Direction
from cisformer.evaluation.bootstrap import Interval, resample_cells, resampled_correlation, resampled_mean
from cisformer.evaluation.correlation import correlation, squared_errors
from cisformer.evaluation.like_frequency import frequency_strata, like_frequency_scores
from cisformer.evaluation.matrices import Matrix, dense
from cisformer.evaluation.probabilities import ProbabilityScores, calibration_error, probability_scores
from cisformer.evaluation.pseudobulk import log_fold_changes, pseudobulk
from cisformer.evaluation.ranking import ranking_scores

MIN_CELLS = 3
"""A feature is scored across cells if it is open in, and closed in, at least this many (or expressed in)."""

MIN_TYPE_CELLS = 10
"""A cell type has a pseudobulk if it has at least this many test cells."""

FOLD_CHANGE_OFFSET = 0.01
N_DRAWS = 1000
N_RECOMPUTED = 50
MOST_RECOMPUTED_VALUES = 1 << 22
MOST_RANKED_VALUES = 1 << 26
"""Predictions that are ranked within strata of like frequency; beyond, of a sample of the features."""


# ---------------------------------------------------------------------------------------------- which scores


@dataclass(frozen=True)
class Metric:
    """One score: what it is called, which way is better, what it is a mean over, and what it means."""

    key: str
    name: str
    better: Literal["higher", "lower"]
    over: str
    meaning: str
    headline: bool = False


_PSEUDOBULK = Metric(
    "pseudobulk",
    "pseudobulk log fold change, r",
    "higher",
    "cell types",
    "correlation across features of predicted and true change of each cell type against all others",
)
METRICS: dict[Direction, tuple[Metric, ...]] = {
    "rna2atac": (
        Metric("log_loss", "log-loss", "lower", "cells",
               "mean of −log of the probability given to what happened", headline=True),
        Metric("ccre_auroc", "AUROC per cCRE", "higher", "cCREs",
               "does it know in which cells a cCRE is open? 0.5 is chance, and all that a mean profile has",
               headline=True),
        Metric("ccre_auprc", "AUPRC per cCRE", "higher", "cCREs", "the same as average precision"),
        Metric("cell_auroc", "AUROC per cell", "higher", "cells",
               "does it know which cCREs are open in a cell? Mostly the mean profile"),
        Metric("cell_auprc", "AUPRC per cell", "higher", "cells", "the same as average precision",
               headline=True),
        Metric("cell_auroc_residual", "AUROC per cell, mean removed", "higher", "cells",
               "the same among cCREs that are open equally often: only what is special to the cell"),
        Metric("cell_auprc_residual", "AUPRC per cell above chance, mean removed", "higher", "cells",
               "the same as average precision; 0 is chance"),
        Metric("brier", "Brier score", "lower", "cells", "mean squared error of the probabilities"),
        Metric("ece", "calibration error", "lower", "entries",
               "mean distance of predicted probability and observed share, over bins"),
        _PSEUDOBULK,
    ),
    "atac2rna": (
        Metric("r2", "R² over the mean", "higher", "cells",
               "share of the squared error of the mean profile that is explained", headline=True),
        Metric("gene_pearson", "Pearson r per gene", "higher", "genes",
               "across cells, all cells counted, expressing or not", headline=True),
        Metric("gene_spearman", "Spearman ρ per gene", "higher", "genes", "the same with ranks"),
        Metric("cell_pearson", "Pearson r per cell", "higher", "cells",
               "across genes; mostly the mean profile"),
        Metric("cell_pearson_residual", "Pearson r per cell, mean removed", "higher", "cells",
               "the same after taking off the training mean: only what is special to the cell"),
        _PSEUDOBULK,
    ),
}  # fmt: skip
"""The scores of each direction, in the order of the table."""


# ---------------------------------------------------------------------------------------------- the truth


@dataclass(frozen=True)
class Truth:
    """What was measured in the test cells, and how intervals are drawn.

    Attributes
    ----------
    direction
        Which modality is predicted.
    values
        0/1 accessibility or log-normalised expression [cells × features].
    mean
        Mean of the training cells [features], or None where there are none.
    labels
        Cell type of each cell, or None.
    seed
        Random seed of the bootstrap.
    n_draws, n_recomputed
        Bootstrap draws of means over cells, and of scores that have to be computed anew.
    """

    direction: Direction
    values: sp.csr_matrix
    mean: np.ndarray | None = None
    labels: np.ndarray | None = None
    seed: int = 0
    n_draws: int = N_DRAWS
    n_recomputed: int = N_RECOMPUTED

    @cached_property
    def counts(self) -> np.ndarray:
        """How often each cell is drawn [draws × cells]."""
        return resample_cells(self.values.shape[0], self.n_draws, np.random.default_rng(self.seed))

    @cached_property
    def n_detected(self) -> np.ndarray:
        """In how many test cells each feature is open or expressed."""
        return np.bincount(self.values.indices[self.values.data != 0], minlength=self.values.shape[1])

    @cached_property
    def scored(self) -> np.ndarray:
        """Features that are scored across cells."""
        enough = self.n_detected >= MIN_CELLS
        if self.direction == "rna2atac":
            enough &= self.values.shape[0] - self.n_detected >= MIN_CELLS
        return enough

    @cached_property
    def recomputed(self) -> np.ndarray:
        """The sample of scored features that bootstrap draws are computed on."""
        scored = np.flatnonzero(self.scored)
        size = min(len(scored), max(MOST_RECOMPUTED_VALUES // max(self.values.shape[0], 1), 1))
        return np.sort(np.random.default_rng([self.seed, 1]).choice(scored, size, replace=False))

    @cached_property
    def strata(self) -> list[np.ndarray]:
        """Features of like training frequency, of all features or a sample; none without training cells."""
        if self.mean is None:
            return []
        n_cells, n_features = self.values.shape
        size = min(n_features, max(MOST_RANKED_VALUES // max(n_cells, 1), 1))
        sample = np.sort(np.random.default_rng([self.seed, 2]).choice(n_features, size, replace=False))
        return [sample[stratum] for stratum in frequency_strata(self.mean[sample])]

    @cached_property
    def types(self) -> tuple[np.ndarray, list[str]]:
        """Each cell's type as a number (−1: none, or too few cells), and the types' names."""
        nobody = np.full(self.values.shape[0], -1)
        if self.labels is None:
            return nobody, []
        names, code, size = np.unique(self.labels.astype(str), return_inverse=True, return_counts=True)
        kept = np.flatnonzero(size >= MIN_TYPE_CELLS)
        if len(kept) < 2:
            return nobody, []
        rank = np.full(len(names), -1)
        rank[kept] = np.arange(len(kept))
        return rank[code], names[kept].tolist()

    def fold_changes(self, predicted: Matrix, weights: np.ndarray | None = None) -> np.ndarray:
        """Return log fold changes of the types against the rest [types × features].

        Parameters
        ----------
        predicted
            Values [cells × features].
        weights
            How often each cell counts: one draw of the bootstrap.
        """
        code, names = self.types
        weights = np.ones(len(code)) if weights is None else weights
        sizes = np.bincount(code[code >= 0], weights[code >= 0], len(names))
        means = pseudobulk(predicted, code, len(names), weights=weights)
        return log_fold_changes(means, sizes, FOLD_CHANGE_OFFSET if self.direction == "rna2atac" else None)


# ---------------------------------------------------------------------------------------------- one method


@dataclass
class Measured:
    """The scores of one method.

    Attributes
    ----------
    value, draws, n
        By metric: the score, the score in each bootstrap draw, and what it is the mean of.
    per_feature
        AUROC or Pearson r of each feature; NaN where it is not defined.
    probabilities
        Calibration, for accessibility.
    fold_changes
        Log fold changes of the types [types × features], where there are types.
    """

    value: dict[str, float] = field(default_factory=dict)
    draws: dict[str, np.ndarray] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    per_feature: np.ndarray = field(default_factory=lambda: np.zeros(0))
    probabilities: ProbabilityScores | None = None
    fold_changes: np.ndarray | None = None

    def interval(self, key: str) -> Interval:
        """Return a score with its interval."""
        return Interval.of(self.value[key], self.draws[key], self.n[key])

    def add(self, key: str, value: float, draws: np.ndarray, n: int) -> None:
        """Record one score."""
        self.value[key], self.draws[key], self.n[key] = value, draws, int(n)

    def add_cells(
        self, key: str, values: np.ndarray, truth: Truth, weights: np.ndarray | None = None
    ) -> None:
        """Record a mean over cells."""
        self.add(key, *resampled_mean(values, truth.counts, weights), n=np.isfinite(values).sum())

    def add_recomputed(self, key: str, value: float, draws: list[float], n: int) -> None:
        """Record a score whose draws come from a sample of features: only their spread is used."""
        spread = np.array(draws, dtype=float)
        self.add(key, value, spread - spread.mean() + value if len(spread) else spread, n)


def measure(predicted: Matrix, truth: Truth) -> Measured:
    """Return all scores of a prediction [cells × features]."""
    result = Measured()
    if truth.direction == "rna2atac":
        _measure_probabilities(result, predicted, truth)
        _measure_rankings(result, predicted, truth)
    else:
        _measure_expression(result, predicted, truth)
    if truth.types[1]:
        _measure_pseudobulk(result, predicted, truth)
    return result


def _measure_probabilities(result: Measured, predicted: Matrix, truth: Truth) -> None:
    scores = result.probabilities = probability_scores(predicted, truth.values)
    n_open = np.asarray(truth.values.sum(axis=1), dtype=float).ravel()
    result.add_cells("log_loss", scores.log_loss, truth)
    result.add_cells("brier", scores.brier, truth)
    result.add_cells("open_ratio", scores.expected_open, truth, n_open)
    n_cells = scores.bin_sums.shape[1]
    drawn = np.stack([truth.counts @ sums for sums in scores.bin_sums])
    result.add("ece", scores.ece, calibration_error(drawn), n_cells * truth.values.shape[1])
    ranking = ranking_scores(predicted, truth.values, axis=1)
    result.add_cells("cell_auroc", ranking.auroc, truth)
    result.add_cells("cell_auprc", ranking.auprc, truth)
    if truth.mean is not None:
        auroc, auprc = like_frequency_scores(predicted, truth.values, truth.strata)
        result.add_cells("cell_auroc_residual", auroc, truth)
        result.add_cells("cell_auprc_residual", auprc, truth)


def _measure_rankings(result: Measured, predicted: Matrix, truth: Truth) -> None:
    whole = ranking_scores(predicted, truth.values)
    result.per_feature = np.where(truth.scored, whole.auroc, np.nan)
    sample, target = dense(predicted[:, truth.recomputed]), truth.values[:, truth.recomputed]
    auroc, auprc = [], []
    for rows in _drawn_rows(truth):
        again = ranking_scores(sample[rows], target[rows])
        auroc.append(_mean(again.auroc))
        auprc.append(_mean(again.auprc))
    n = truth.scored.sum()
    result.add_recomputed("ccre_auroc", _mean(result.per_feature), auroc, n)
    result.add_recomputed("ccre_auprc", _mean(whole.auprc[truth.scored]), auprc, n)


def _measure_expression(result: Measured, predicted: Matrix, truth: Truth) -> None:
    if truth.mean is not None:
        error, error_of_mean = squared_errors(predicted, truth.values, truth.mean)
        result.add_cells("r2", error_of_mean - error, truth, error_of_mean)
        residual = correlation(predicted, truth.values, axis=1, minus=truth.mean)
        result.add_cells("cell_pearson_residual", residual, truth)
    result.add_cells("cell_pearson", correlation(predicted, truth.values, axis=1), truth)
    for key, ranks in {"gene_pearson": False, "gene_spearman": True}.items():
        whole = np.where(truth.scored, correlation(predicted, truth.values, ranks=ranks), np.nan)
        result.add_recomputed(
            key, _mean(whole), _drawn_correlations(predicted, truth, ranks), truth.scored.sum()
        )
        result.per_feature = result.per_feature if ranks else whole


def _drawn_correlations(predicted: Matrix, truth: Truth, ranks: bool) -> list[float]:
    """Mean correlation per gene in each draw."""
    sample, target = (dense(matrix[:, truth.recomputed], float) for matrix in (predicted, truth.values))
    if ranks:
        sample, target = rankdata(sample, axis=0), rankdata(target, axis=0)
    again = resampled_correlation(sample, target, truth.counts[: truth.n_recomputed])
    return [_mean(draw) for draw in again]


def _measure_pseudobulk(result: Measured, predicted: Matrix, truth: Truth) -> None:
    """Correlate fold changes over the scored features; draws over a sample of them."""
    result.fold_changes = truth.fold_changes(predicted)
    scored = np.flatnonzero(truth.scored)
    if len(scored) < 3:
        return
    per_type = correlation(
        result.fold_changes[:, scored], truth.fold_changes(truth.values)[:, scored], axis=1
    )
    sample, target = dense(predicted[:, truth.recomputed]), dense(truth.values[:, truth.recomputed])
    draws = []
    for weights in truth.counts[: truth.n_recomputed]:
        pair = (truth.fold_changes(matrix, weights) for matrix in (sample, target))
        draws.append(_mean(correlation(*pair, axis=1)))
    result.add_recomputed("pseudobulk", _mean(per_type), draws, np.isfinite(per_type).sum())


def _drawn_rows(truth: Truth) -> list[np.ndarray]:
    cells = np.arange(truth.values.shape[0])
    return [np.repeat(cells, counts) for counts in truth.counts[: truth.n_recomputed]]


def _mean(values: np.ndarray) -> float:
    """Mean without NaNs; NaN where nothing is left."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


# ---------------------------------------------------------------------------------------------- two methods

Outcome = Literal["better", "tie", "worse"]


@dataclass(frozen=True)
class Comparison:
    """One method against another on one metric, paired over bootstrap draws.

    `gain` is how much better the first is, positive whichever way is better, with its 95 % interval; a tie is
    an interval that holds zero.
    """

    metric: str
    baseline: str
    gain: float
    low: float
    high: float

    @property
    def outcome(self) -> Outcome:
        """Whether the first is better, worse, or not to be told apart."""
        if not (self.low <= 0 <= self.high):
            return "better" if self.gain > 0 else "worse"
        return "tie"


def compare(model: Measured, other: Measured, name: str, metric: Metric) -> Comparison | None:
    """Compare two methods; None where a score is missing or not defined."""
    key = metric.key
    if not np.isfinite([m.value.get(key, np.nan) for m in (model, other)]).all():
        return None
    sign = 1 if metric.better == "higher" else -1
    gain = sign * (model.value[key] - other.value[key])
    interval = Interval.of(gain, sign * (model.draws[key] - other.draws[key]), model.n[key])
    return Comparison(key, name, gain, interval.low, interval.high)
