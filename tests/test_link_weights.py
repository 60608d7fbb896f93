"""Weights of evidence: planted slopes come back, noise weighs nothing, sums stay."""

import numpy as np
import pytest

from cisformer.links.weights import (
    FEWEST_PAIRS,
    Evidence,
    EvidenceWeights,
    estimate_weights,
    exchange_genes,
    keep_total,
    probability,
    score_fdr,
)


def planted(n: int, gain: float, kappa: float, seed: int) -> Evidence:
    """Pairs of which links, as likely as the prior says, have more association and coupling."""
    rng = np.random.default_rng(seed)
    prior = probability(rng.normal(-2, 1.5, n))
    is_link = rng.random(n) < prior
    power = rng.uniform(1, 15, n)
    spread = 0.02 + 0.2 / (1 + power)
    return Evidence(
        prior=prior,
        association=rng.normal(0.01, spread) + gain * is_link,
        exchanged=rng.normal(0.003, spread),
        coupling=rng.normal(size=n) + kappa * power * is_link,
        power=power,
    )


def test_planted_weights_come_back():
    evidence = planted(60_000, 0.02, 0.05, 1)
    found = estimate_weights(evidence)
    assert found.association_gain == pytest.approx((0.02 * evidence.exchanged.std()) ** 0.5, rel=0.12)
    assert found.coupling_gain == pytest.approx(0.05, rel=0.15)
    variance = np.interp([2, 14], found.power, found.null_variance)
    assert np.allclose(np.sqrt(variance), [0.02 + 0.2 / 3, 0.02 + 0.2 / 15], rtol=0.15)


@pytest.mark.parametrize("seed", range(5))
def test_noise_weighs_next_to_nothing(seed):
    evidence = planted(60_000, 0.0, 0.0, seed)
    found = estimate_weights(evidence)
    added = found.log_odds(evidence.association, evidence.coupling, evidence.power)
    assert np.std(added) < 0.15


def test_a_blurred_prior_costs_the_root_of_what_it_hides():
    """If half of the likely pairs are no links, the slope is half; the weight falls by √2 only."""
    whole, half = planted(60_000, 0.04, 0.0, 4), planted(60_000, 0.04, 0.0, 4)
    noise = planted(60_000, 0.0, 0.0, 4).association
    hidden = np.random.default_rng(5).random(60_000) < 0.5
    half.association[hidden] = noise[hidden]
    ratio = estimate_weights(half).association_gain / estimate_weights(whole).association_gain
    assert ratio == pytest.approx(0.5**0.5, abs=0.06)


def test_association_that_falls_where_links_are_is_not_used():
    found = estimate_weights(planted(60_000, -0.02, -0.05, 2))
    assert found.association_gain == 0
    assert found.coupling_gain == 0


def test_few_pairs_leave_the_prior():
    found = estimate_weights(planted(FEWEST_PAIRS - 1, 0.05, 0.1, 3))
    assert not found.log_odds(np.ones(3), np.ones(3), np.ones(3)).any()


def test_log_odds_by_hand():
    weights = EvidenceWeights(0.02, (1.0, 3.0), (0.001, 0.003), 0.05)
    added = weights.log_odds(np.array([0.1]), np.array([9.0]), np.array([2.0]))
    assert added[0] == pytest.approx(0.02 / 0.002 * 0.1 + 2 * 0.05 * 2 * 6)


def test_exchanged_genes_are_alike_and_elsewhere():
    rng = np.random.default_rng(0)
    chrom, level = rng.choice(["chr1", "chr2", "chr3"], 400), rng.random(400)
    partner = exchange_genes(chrom, level, rng)
    assert (chrom[partner] != chrom).all()
    rank = np.argsort(np.argsort(level))
    assert np.abs(rank[partner] - rank).max() <= 20


def test_one_chromosome_has_nowhere_else():
    partner = exchange_genes(np.array(["chr1"] * 30), np.arange(30.0), np.random.default_rng(0))
    assert len(partner) == 30


def test_evidence_adds_no_links():
    rng = np.random.default_rng(1)
    prior, added = rng.normal(-3, 2, 5000), rng.normal(1, 2, 5000)
    less = keep_total(prior, added)
    assert probability(prior + added - less).sum() == pytest.approx(probability(prior).sum(), rel=1e-6)
    assert keep_total(prior, np.zeros(5000)) == pytest.approx(0, abs=1e-9)


def test_score_fdr_is_the_share_of_non_links_above():
    score = np.array([0.2, 0.9, 0.5, 0.5, 0.0])
    found = score_fdr(score)
    by_hand = [np.mean([1 - other for other in score if other >= s]) for s in score]
    assert np.allclose(found, by_hand)
    assert len(score_fdr(np.zeros(0))) == 0


def test_score_fdr_holds_for_calibrated_scores():
    rng = np.random.default_rng(2)
    score = rng.beta(0.5, 2, 50_000)
    is_link = rng.random(50_000) < score
    called = score_fdr(score) < 0.2
    assert np.mean(~is_link[called]) == pytest.approx(score_fdr(score)[called].max(), abs=0.02)
