"""The score of each cell type: what belongs to the type, and how much more than in others.

A type's log odds of a link are the prior's, with the type's own accessibility; what association and coupling of all
cells add; and two things of the type's own:

- *expression*: by how much the type's log expression of the gene, x, is above the mean of all types. Where a link
  works, its gene is expressed more: the odds that it works are exp(1.7 + 1.5 x). Since most links work in most types,
  this hardly raises a score, but lowers it where the gene is expressed less than elsewhere. (Planted links of one type
  are told from the same pairs in another type, where the cCRE is open as well, at AUROC 0.78 by expression alone, 0.57
  by coupling within types, 0.51 by association over the states that the type's cells occupy, which is therefore left
  out; `contact`, seed 11.)
- *coupling within the type*: the effect is shrunk to that of all cells, as far as the spread of effects between types
  is no more than their errors (empirical Bayes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cisformer.links.measure import CellSums, PairTests
from cisformer.links.prior import ACTIVITY_SCALE, opening_rate
from cisformer.links.shared import SharedEvidence, pair_power
from cisformer.links.weights import probability, score_fdr

WORKS, WORKS_BY_EXPRESSION, MOST_EXPRESSION = 1.7, 1.5, 2.0
PER_CELL = 1e4
SMALLEST_EXPRESSION = 0.05
"""Counts in ten thousand, added before logs are taken."""


@dataclass(frozen=True)
class TypeScores:
    """Scores of all pairs in one type; float64 [E] each.

    Attributes
    ----------
    prior
        Probability of a link by the prior, with the type's accessibility.
    expression
        Log expression of the gene less the mean of types.
    coupling
        z-score that the type's shrunk effect would have over all cells.
    log_odds
        Of a link that works.
    own, variance
        Log odds in which `specificity` compares types, expression counting in full; and the variance of what is the
        type's own.
    """

    prior: np.ndarray
    expression: np.ndarray
    coupling: np.ndarray
    log_odds: np.ndarray
    own: np.ndarray
    variance: np.ndarray

    @property
    def score(self) -> np.ndarray:
        """Probability of a link."""
        return probability(self.log_odds)

    @property
    def fdr(self) -> np.ndarray:
        """Expected share of non-links among links at least as strong."""
        return score_fdr(self.score)


class TypeScorer:
    """Score pairs type by type, and against the mean of all types.

    Parameters
    ----------
    shared
        What all types share.
    cells, tests
        What the first two passes found.
    """

    def __init__(self, shared: SharedEvidence, cells: CellSums, tests: PairTests) -> None:
        self.shared, self.cells, self.tests = shared, cells, tests
        self.expression, self.expression_variance = relative_expression(cells.counts)
        self.powers = [pair_power(shared.pairs, cells, number) for number in range(len(cells.types))]
        self.association = shared.weights.of_association(shared.power) * shared.association
        self.spread = between_types(tests, shared.power, self.powers)
        self.sum, self.sum_of_variances = np.zeros(len(shared.pairs)), np.zeros(len(shared.pairs))
        for number in range(len(cells.types)):
            scores = self.of_type(number)
            self.sum += scores.own
            self.sum_of_variances += scores.variance

    def of_type(self, number: int) -> TypeScores:
        """Return the scores of a type."""
        shared, pairs, n_cells = self.shared, self.shared.pairs, int(self.cells.n_cells[number])
        n_open = self.cells.n_open[number]
        activity = shared.activity(n_open, n_cells)
        coupling, coupling_variance = self._coupling(number)
        factor = shared.weights.of_coupling(shared.power)
        prior, expression = shared.prior_log_odds(activity), self.expression[number][pairs.gene]
        working = works(self.expression[number])[pairs.gene]
        log_odds = (
            prior
            + self.association
            + shared.weights.coupling_log_odds(coupling, shared.power)
            + working
            - shared.less
        )
        variance = (
            np.square(factor) * coupling_variance
            + WORKS_BY_EXPRESSION**2 * self.expression_variance[number][pairs.gene]
            + self._activity_variance(activity, n_open, n_cells)[pairs.ccre]
        )
        own = log_odds - working + WORKS_BY_EXPRESSION * expression
        return TypeScores(probability(prior), expression, coupling, log_odds, own, variance)

    def _coupling(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the type's shrunk effect in units of the z-score of all cells, and its variance; [E] each."""
        pooled, own = self.tests.coupling, self.tests.within[number]
        power = self.powers[number]
        tested = ~np.isnan(own) & (power > 0) & (pooled != 0)
        ratio = np.divide(self.shared.power, power, out=np.zeros_like(power), where=tested)
        error = np.square(ratio)
        trust = self.spread / (self.spread + error) if self.spread > 0 else np.zeros_like(error)
        shrunk = np.where(tested, pooled + trust * (np.where(tested, own, 0) * ratio - pooled), pooled)
        return shrunk, np.where(tested, trust * error, 0)

    def _activity_variance(self, activity: np.ndarray, n_open: np.ndarray, n_cells: int) -> np.ndarray:
        """Return the variance of the weight of log activity that comes from counting cells; [P]."""
        rate = opening_rate(n_open / (n_cells + 1))
        scale = np.divide(activity, rate, out=np.zeros_like(rate), where=rate > 0)
        share = (n_open + 0.5) / (n_cells + 1)
        slope = self.shared.prior.weights[1] * ACTIVITY_SCALE * scale / (1 + ACTIVITY_SCALE * activity)
        return np.square(slope) * share / (n_cells * np.maximum(1 - share, 1e-3))

    def specificity(self, scores: TypeScores) -> tuple[np.ndarray, np.ndarray]:
        """Return by how much a type's log odds are above the mean of the other types, and its standard error; [E] each.

        NaN where there is one type only.
        """
        others = len(self.cells.types) - 1
        if others == 0:
            return np.full(len(scores.own), np.nan), np.full(len(scores.own), np.nan)
        mean = (self.sum - scores.own) / others
        variance = (self.sum_of_variances - scores.variance) / others**2
        return scores.own - mean, np.sqrt(np.maximum(scores.variance + variance, 0))


def works(expression: np.ndarray) -> np.ndarray:
    """Return the log of the chance that a link works in a type, over that at mean expression; any shape."""
    return np.logaddexp(0, -WORKS) - np.logaddexp(0, -WORKS - WORKS_BY_EXPRESSION * expression)


def relative_expression(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the log expression of genes in each type less the mean of types, and its variance; [T, G] each.

    Parameters
    ----------
    counts
        Summed over each type's cells; [T, G]. Variance is that of Poisson counts.
    """
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
    level = PER_CELL * counts / total + SMALLEST_EXPRESSION
    log = np.log(level)
    variance = np.square(PER_CELL / total / level) * np.maximum(counts, 1)
    return np.clip(log - log.mean(axis=0), -MOST_EXPRESSION, MOST_EXPRESSION), variance


def between_types(tests: PairTests, power: np.ndarray, powers: Sequence[np.ndarray]) -> float:
    """Return the variance of coupling between types beyond its error, in units of the z-score of all cells.

    Parameters
    ----------
    tests
        z-scores of all cells, and within types.
    power, powers
        Of all cells [E], and of each type [T][E].
    """
    excess, number = 0.0, 0.0
    for own, mine in zip(tests.within, powers, strict=True):
        tested = ~np.isnan(own) & (tests.coupling != 0) & (mine > 0)
        if not tested.any():
            continue
        ratio = power[tested] / mine[tested]
        off = own[tested] * ratio - tests.coupling[tested]
        excess += float((np.square((off - off.mean()) / ratio) - 1).sum())
        number += float(np.square(1 / ratio).sum())
    return max(excess / number, 0.0) if number > 0 else 0.0
