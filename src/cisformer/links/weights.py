"""How far association and coupling speak for a link: weights estimated from the data set at hand.

The prior of `cisformer.links.prior` says which pairs are likely links; it is held fixed. If a kind of evidence says
anything, it is stronger where the prior is higher. So each weight is a regression on the prior probability π:

- *association* a: its slope on π, less the same slope when genes are exchanged with genes of other chromosomes
  (`exchange_genes`; same windows, no link left), over the variance of exchanged genes at the pair's power. Where
  association is noise, both slopes agree and the weight is 0. The prior is a blurred image of the links, which makes
  slopes too small, by how much depends on the tissue. The best weight was near 1 for each standard deviation of
  exchanged genes in all generators with association, though slopes were .2 to 1.2 of that; so the slope is drawn
  half-way there, on a log scale.
- *coupling* z: a link is expected to have z = κ · power, where power is the root of the number of cells expected to
  have both. κ is the slope of z on π · power, through 0, less its standard error. The weight of z is 2 · κ · power:
  κ is too small for the same reason; twice the estimate was best for each of three generators (seeds 11 and 12 of
  `benchmarks/links.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_COUPLING = 6.0
UNBLUR = 2.0
POWER_BINS = 20
FEWEST_PAIRS = 1_000
"""With fewer pairs nothing is estimated, and the score is the prior."""


@dataclass(frozen=True)
class EvidenceWeights:
    """Weights of association and coupling in the log odds of a link.

    Attributes
    ----------
    association_gain
        By how much association is taken to be higher in links.
    power, null_variance
        Variance of association without links, at some values of power; [bins] each.
    coupling_gain
        Expected z of a link for each unit of power.
    """

    association_gain: float = 0.0
    power: tuple[float, ...] = (1.0,)
    null_variance: tuple[float, ...] = (1.0,)
    coupling_gain: float = 0.0

    def of_association(self, power: np.ndarray) -> np.ndarray:
        """Return the weight of association for pairs of this power; [E]."""
        return self.association_gain / np.interp(power, self.power, self.null_variance)

    def of_coupling(self, power: np.ndarray) -> np.ndarray:
        """Return the weight of the z-score of coupling for pairs of this power; [E]."""
        return UNBLUR * self.coupling_gain * power

    def log_odds(self, association: np.ndarray, coupling: np.ndarray, power: np.ndarray) -> np.ndarray:
        """Return what both add to the log odds of links; float64 [E]."""
        return self.of_association(power) * association + self.coupling_log_odds(coupling, power)

    def coupling_log_odds(self, coupling: np.ndarray, power: np.ndarray) -> np.ndarray:
        """Return what coupling adds to the log odds of links; float64 [E]."""
        return self.of_coupling(power) * np.clip(coupling, -MOST_COUPLING, MOST_COUPLING)


@dataclass(frozen=True)
class Evidence:
    """What was measured of pairs, to estimate weights from; [E] each.

    Attributes
    ----------
    prior
        Probability of a link by the prior.
    association, exchanged
        Association of the pairs; and with genes exchanged.
    coupling
        z-scores; 0 for pairs too rare to test.
    power
        Root of the number of cells expected to have both.
    """

    prior: np.ndarray
    association: np.ndarray
    exchanged: np.ndarray
    coupling: np.ndarray
    power: np.ndarray

    def rows(self, kept: np.ndarray) -> Evidence:
        """Return some of the pairs."""
        return Evidence(**{name: value[kept] for name, value in vars(self).items()})


def estimate_weights(evidence: Evidence) -> EvidenceWeights:
    """Estimate weights; see the text of this module."""
    if len(evidence.prior) < FEWEST_PAIRS or np.ptp(evidence.prior) == 0:
        return EvidenceWeights()
    power, variance = _variance_by_power(evidence.exchanged, evidence.power)
    return EvidenceWeights(
        association_gain=_association_gain(evidence),
        power=power,
        null_variance=variance,
        coupling_gain=_coupling_gain(evidence),
    )


def _association_gain(evidence: Evidence) -> float:
    centred = evidence.prior - evidence.prior.mean()
    total, spread = np.square(centred).sum(), float(evidence.exchanged.std())
    gain = float(centred @ (evidence.association - evidence.exchanged) / total)
    error = spread * (2 / total) ** 0.5
    if gain <= error:
        return 0.0
    found = gain - error**2 / gain  # James and Stein
    return float((found * spread) ** 0.5)


def _coupling_gain(evidence: Evidence) -> float:
    expected = evidence.prior * evidence.power * (evidence.coupling != 0)
    total = np.square(expected).sum()
    if total == 0:
        return 0.0
    gain = expected @ np.clip(evidence.coupling, -MOST_COUPLING, MOST_COUPLING) / total
    return max(float(gain - total**-0.5), 0.0)


def _variance_by_power(
    exchanged: np.ndarray, power: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean square of `exchanged` in bins of equal numbers of pairs, and the middle of each bin."""
    parts = np.array_split(np.argsort(power, kind="stable"), POWER_BINS)
    smallest = max(1e-3 * float(np.square(exchanged).mean()), 1e-12)
    variance = [max(float(np.square(exchanged[part]).mean()), smallest) for part in parts]
    return tuple(float(np.median(power[part])) for part in parts), tuple(variance)


def exchange_genes(chrom: np.ndarray, level: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return for each gene another one of like expression, on another chromosome where there is one; [G].

    Parameters
    ----------
    chrom, level
        Chromosome and expression of each gene; [G].
    rng
        Draws among genes within a twentieth of all in rank.
    """
    n_genes = len(chrom)
    order = np.argsort(level, kind="stable")
    reach = max(n_genes // 20, 1)
    partner = np.arange(n_genes)
    waiting = np.arange(n_genes)  # places in `order`
    for _ in range(50):
        place = np.clip(waiting + rng.integers(-reach, reach + 1, len(waiting)), 0, n_genes - 1)
        partner[order[waiting]] = order[place]
        waiting = waiting[chrom[order[place]] == chrom[order[waiting]]]
        if len(waiting) == 0:
            break
    return partner


def probability(log_odds: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(−log odds)); [E]."""
    return 1 / (1 + np.exp(-np.clip(log_odds, -500, 500)))


def keep_total(prior: np.ndarray, added: np.ndarray) -> float:
    """Return what to take from all log odds so that evidence moves links around, and adds none.

    Parameters
    ----------
    prior, added
        Log odds by the prior, and what evidence adds; [E].
    """
    wanted = probability(prior).sum()
    low, high = float(added.min(initial=0.0)), float(added.max(initial=0.0))
    for _ in range(60):
        middle = (low + high) / 2
        if probability(prior + added - middle).sum() > wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def score_fdr(score: np.ndarray) -> np.ndarray:
    """Return the expected share of non-links among links at least as strong; float64 [E].

    The mean of 1 − score over all pairs with this score or a higher one.
    """
    order = np.argsort(-score)
    running = np.cumsum(1 - score[order].astype(np.float64)) / np.arange(1, len(score) + 1)
    ordered = score[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    last = np.append(first[1:], len(score)) - 1
    result = np.empty(len(score))
    result[order] = np.repeat(running[last], np.diff(np.append(first, len(score)))) if len(score) else running
    return result
