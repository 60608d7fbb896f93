"""Scores against scikit-learn, scipy and loops."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from cisformer.evaluation import ranking
from cisformer.evaluation.bootstrap import Interval, resample_cells, resampled_correlation, resampled_mean
from cisformer.evaluation.correlation import correlation, squared_errors
from cisformer.evaluation.like_frequency import chance_precision, frequency_strata, like_frequency_scores
from cisformer.evaluation.probabilities import probability_scores
from cisformer.evaluation.pseudobulk import log_fold_changes, pseudobulk
from cisformer.evaluation.ranking import ranking_scores


def _loop(function, predicted, truth, axis):
    """Apply a scikit-learn score to each column or row; NaN where it has no positive or no negative."""
    if axis == 1:
        predicted, truth = predicted.T, truth.T
    defined = [0 < truth[:, j].sum() < len(truth) for j in range(truth.shape[1])]
    return np.array(
        [function(truth[:, j], predicted[:, j]) if ok else np.nan for j, ok in enumerate(defined)]
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layout", ["float32", "float64", "sparse", "csc", "negative"])
@pytest.mark.parametrize("n_levels", [3, 1_000_000])
def test_ranking_equals_scikit_learn(axis, layout, n_levels, monkeypatch):
    monkeypatch.setattr(ranking, "matrix_blocks", lambda m, a: _tiny_blocks(m, a))
    rng = np.random.default_rng(n_levels)
    truth = (rng.random((37, 29)) < rng.random(29) * 0.5).astype(np.float32)
    truth[:, 3], truth[:, 4] = 0, 1
    predicted = rng.integers(0, n_levels, truth.shape).astype(np.float32) * (rng.random(truth.shape) < 0.6)
    if layout == "negative":
        predicted = predicted * rng.choice(np.array([-1, 1], dtype=np.float32), truth.shape)  # makes -0 too
    made = {"float64": lambda m: m / 7.0, "csc": sp.csc_matrix, "float32": np.float32}.get(
        layout, sp.csr_matrix
    )
    scores = ranking_scores(
        made(predicted.astype(float if layout == "float64" else np.float32)), sp.csr_matrix(truth), axis=axis
    )
    np.testing.assert_allclose(scores.auroc, _loop(roc_auc_score, predicted, truth, axis), atol=1e-12)
    np.testing.assert_allclose(
        scores.auprc, _loop(average_precision_score, predicted, truth, axis), atol=1e-12
    )
    np.testing.assert_array_equal(scores.n_positive, truth.sum(axis=axis))


def _tiny_blocks(matrix, axis):
    length = matrix.shape[1 - axis]
    return (slice(start, min(start + 5, length)) for start in range(0, length, 5))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.integers(1, 6))
def test_sparse_and_dense_rankings_agree(seed, n_cells, n_features):
    rng = np.random.default_rng(seed)
    predicted = rng.integers(-2, 3, (n_cells, n_features)).astype(np.float32)
    truth = sp.csr_matrix(rng.integers(0, 2, (n_cells, n_features)))
    for axis in (0, 1):
        one, other = (ranking_scores(m, truth, axis=axis) for m in (predicted, sp.csr_matrix(predicted)))
        np.testing.assert_array_equal(one.auroc, other.auroc)
        np.testing.assert_array_equal(one.auprc, other.auprc)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix])
def test_ranking_of_many_positives_does_not_overflow(layout):
    rng = np.random.default_rng(11)
    truth = (rng.random((1, 200_000)) < 0.4).astype(np.float32)  # 80,000 squared is beyond 32 bits
    predicted = (rng.random(truth.shape) + 0.3 * truth).astype(np.float32)
    scores = ranking_scores(layout(predicted), sp.csr_matrix(truth), axis=1)
    assert scores.auroc[0] == pytest.approx(roc_auc_score(truth[0], predicted[0]))
    assert scores.auprc[0] == pytest.approx(average_precision_score(truth[0], predicted[0]))


def test_ranking_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        ranking_scores(np.array([[np.nan], [1.0]], dtype=np.float32), np.array([[1], [0]]))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="differ in shape"):
        ranking_scores(np.zeros((2, 3)), np.zeros((3, 2)))


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix])
def test_probability_scores_equal_scikit_learn(layout):
    rng = np.random.default_rng(0)
    truth = (rng.random((12, 50)) < 0.2).astype(float)
    predicted = rng.random(truth.shape) * (rng.random(truth.shape) < 0.7)
    scores = probability_scores(layout(predicted), sp.csr_matrix(truth))
    clipped = np.clip(predicted, 1e-4, 1 - 1e-4)
    for cell in range(12):
        assert scores.log_loss[cell] == pytest.approx(log_loss(truth[cell], clipped[cell], labels=[0, 1]))
        assert scores.brier[cell] == pytest.approx(brier_score_loss(truth[cell], predicted[cell]))
    np.testing.assert_allclose(scores.expected_open, predicted.sum(axis=1))


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix])
def test_reliability_equals_a_loop_over_bins(layout):
    rng = np.random.default_rng(1)
    predicted = rng.random((30, 40)) ** 3 * (rng.random((30, 40)) < 0.8)
    truth = (rng.random(predicted.shape) < predicted).astype(float)
    scores = probability_scores(layout(predicted), sp.csr_matrix(truth))
    count, mean_predicted, observed = scores.reliability
    gap = 0.0
    for b, (low, high) in enumerate(zip(scores.edges[:-1], scores.edges[1:], strict=True)):
        inside = (predicted >= low) & ((predicted < high) | (b == len(count) - 1))
        assert count[b] == inside.sum()
        assert mean_predicted[b] == pytest.approx(predicted[inside].mean())
        assert observed[b] == pytest.approx(truth[inside].mean())
        gap += inside.sum() * abs(predicted[inside].mean() - truth[inside].mean())
    assert scores.ece == pytest.approx(gap / predicted.size)


def test_calibration_tells_true_probabilities_from_overconfident_ones():
    rng = np.random.default_rng(2)
    true = rng.beta(1, 6, (200, 300))
    truth = sp.csr_matrix(rng.random(true.shape) < true)
    assert probability_scores(true, truth).ece < 0.005
    assert probability_scores(np.sqrt(true), truth).ece > 0.1


@pytest.mark.parametrize("axis", [0, 1])
def test_correlations_equal_scipy(axis):
    rng = np.random.default_rng(3)
    truth = rng.poisson(1.0, (25, 14)).astype(float)
    predicted = np.round(truth + rng.normal(size=truth.shape), 1)
    ours = (correlation(predicted, sp.csr_matrix(truth), axis=axis, ranks=ranks) for ranks in (False, True))
    pairs = list(zip(np.moveaxis(predicted, axis, 1), np.moveaxis(truth, axis, 1), strict=True))
    for function, scores in zip((pearsonr, spearmanr), ours, strict=True):
        np.testing.assert_allclose(scores, [function(a, b).statistic for a, b in pairs], atol=1e-12)


def test_constant_predictions_score_zero_and_constant_truths_nothing():
    truth = np.array([[0.1, 1.0], [0.1, 2.0], [0.1, 4.0]])
    predicted = np.array([[1.0, 0.7], [2.0, 0.7], [3.0, 0.7]])
    np.testing.assert_array_equal(correlation(predicted, truth), [np.nan, 0.0])


def test_mean_removed_correlation_of_the_mean_itself_is_none():
    rng = np.random.default_rng(4)
    truth = sp.csr_matrix(rng.random((20, 60)) < 0.3)
    mean = rng.random(60).astype(np.float32)
    np.testing.assert_array_equal(correlation(np.tile(mean, (20, 1)), truth, axis=1, minus=mean), 0.0)


@pytest.fixture(scope="module")
def frequencies():
    """(training mean, true probabilities, truth) of 400 cells × 600 cCREs, few of them often open."""
    rng = np.random.default_rng(9)
    mean = rng.beta(0.5, 20, 600) + 1e-3
    probability = np.minimum(mean * rng.lognormal(0, 1, (400, 600)) / np.exp(0.5), 1)
    return mean, probability, sp.csr_matrix(rng.random(probability.shape) < probability)


@pytest.mark.parametrize("kind", ["power of the mean", "cells drawn at random", "constant", "noise"])
def test_what_knows_nothing_of_the_cell_is_at_chance_within_like_frequency(kind, frequencies):
    mean, probability, truth = frequencies
    rng = np.random.default_rng(3)
    others = rng.random(probability.shape) < mean
    predicted = {
        "power of the mean": np.tile(mean**1.5, (400, 1)),
        "cells drawn at random": rng.multinomial(40, np.full(400, 1 / 400), 400) @ others / 80 + mean / 2,
        "constant": np.ones(truth.shape),
        "noise": rng.random(truth.shape),
    }[kind].astype(np.float32)
    strata = frequency_strata(mean)
    auroc, above = like_frequency_scores(predicted, truth, strata)
    assert np.nanmean(auroc) == pytest.approx(0.5, abs=0.012)
    assert np.nanmean(above) == pytest.approx(0, abs=0.012)
    assert np.nanmean(ranking_scores(predicted, truth, axis=1).auroc) > 0.7 or kind in ("constant", "noise")


def test_what_knows_the_cell_is_above_chance_within_like_frequency(frequencies):
    mean, probability, truth = frequencies
    auroc, above = like_frequency_scores(probability.astype(np.float32), truth, frequency_strata(mean))
    assert np.nanmean(auroc) > 0.65
    assert np.nanmean(above) > 0.1


def test_like_frequency_scores_equal_a_loop(frequencies):
    mean, probability, truth = frequencies
    predicted, strata = np.round(probability[:5], 2).astype(np.float32), frequency_strata(mean)
    width = [np.ptp(np.log(mean[part] / (1 - mean[part]))) for part in strata]
    assert max(width) <= 0.05
    auroc, above = like_frequency_scores(sp.csr_matrix(predicted), truth[:5], strata)
    for i, is_open in enumerate(truth[:5].toarray()):
        kept = [part for part in strata if 0 < is_open[part].sum() < len(part)]
        weight = [is_open[part].sum() for part in kept]
        areas = [roc_auc_score(is_open[part], predicted[i, part]) for part in kept]
        gains = [
            average_precision_score(is_open[part], predicted[i, part])
            - chance_precision(predicted[i : i + 1, part], is_open[part].sum())[0]
            for part in kept
        ]
        assert auroc[i] == pytest.approx(np.average(areas, weights=weight))
        assert above[i] == pytest.approx(np.average(gains, weights=weight), abs=1e-6)


@pytest.mark.parametrize("values", [[4.0, 3.0, 2.0, 1.0, 0.0], [2.0, 2.0, 1.0, 1.0, 1.0], [1.0] * 5])
@pytest.mark.parametrize("n_positive", [1, 2, 4])
def test_precision_by_chance_is_the_mean_over_all_draws(values, n_positive):
    draws = [
        average_precision_score(np.isin(np.arange(5), drawn), values)
        for drawn in itertools.combinations(range(5), n_positive)
    ]
    found = chance_precision(np.array([values]), np.array([n_positive]))
    np.testing.assert_allclose(found, np.mean(draws))


def test_squared_errors_give_r_squared():
    rng = np.random.default_rng(5)
    truth, predicted, mean = rng.normal(size=(9, 7)), rng.normal(size=(9, 7)), rng.normal(size=7)
    error, of_mean = squared_errors(predicted, sp.csr_matrix(truth), mean)
    assert error.sum() == pytest.approx(((truth - predicted) ** 2).sum())
    assert of_mean.sum() == pytest.approx(((truth - mean) ** 2).sum())


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix])
def test_pseudobulk_and_fold_changes_equal_a_loop(layout):
    rng = np.random.default_rng(6)
    values, group = rng.random((30, 8)), np.repeat([0, 1, 2, -1], [10, 5, 12, 3])
    means = pseudobulk(layout(values), group, 3)
    changes = log_fold_changes(means, np.bincount(group[:27]), 0.01)
    for t in range(3):
        inside, outside = values[group == t].mean(axis=0), values[(group != t) & (group >= 0)].mean(axis=0)
        np.testing.assert_allclose(means[t], inside)
        np.testing.assert_allclose(changes[t], np.log2((inside + 0.01) / (outside + 0.01)))
    np.testing.assert_allclose(
        log_fold_changes(means, np.bincount(group[:27]), None)[2],
        values[15:27].mean(axis=0) - values[:15].mean(axis=0),
    )


def test_bootstrap_interval_is_as_wide_as_theory_says():
    rng = np.random.default_rng(7)
    values = np.append(rng.normal(3.0, 2.0, 400), np.nan)
    value, draws = resampled_mean(values, resample_cells(401, 1000, rng))
    interval = Interval.of(value, draws, 400)
    assert interval.value == pytest.approx(np.nanmean(values))
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * 2.0 / np.sqrt(400), rel=0.15)
    assert draws.mean() == pytest.approx(value, abs=0.02)


def test_resampled_correlations_equal_those_of_the_drawn_cells():
    rng = np.random.default_rng(10)
    left, right, counts = rng.normal(size=(20, 6)), rng.normal(size=(20, 6)), resample_cells(20, 7, rng)
    right[:, 0], left[:, 1] = 3.3, 0.1
    for draw, correlations in zip(counts, resampled_correlation(left, right, counts), strict=True):
        rows = np.repeat(np.arange(20), draw)
        np.testing.assert_allclose(correlations, correlation(left[rows], right[rows]), atol=1e-9)


def test_bootstrap_of_a_ratio_and_of_nothing():
    rng = np.random.default_rng(8)
    weights, counts = rng.random(40), resample_cells(40, 20, rng)
    value, draws = resampled_mean(weights * 2, counts, weights)
    np.testing.assert_allclose([value, *draws], 2.0)
    assert (counts.sum(axis=1) == 40).all()
    assert np.isnan(resampled_mean(np.full(40, np.nan), counts)[0])
