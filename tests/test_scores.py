"""Scores of methods, their intervals and comparisons, against loops and planted truth."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from cisformer.evaluation import scores
from cisformer.evaluation.like_frequency import frequency_strata, like_frequency_scores
from cisformer.evaluation.scores import METRICS, Comparison, Metric, Truth, compare, measure


@pytest.fixture(scope="module")
def open_cells():
    """(true probabilities, truth) of 80 cells × 60 cCREs of two types."""
    rng = np.random.default_rng(0)
    types = np.repeat(["a", "b"], 40)
    odds = rng.normal(-1, 1, 60) + rng.normal(0, 1.5, (2, 60))[(types == "b").astype(int)]
    probability = (1 / (1 + np.exp(-odds))).astype(np.float32)
    values = sp.csr_matrix((rng.random((80, 60)) < probability).astype(np.float32))
    return probability, Truth(
        "rna2atac", values, probability.mean(axis=0), types.astype(object), n_recomputed=20
    )


@pytest.fixture(scope="module")
def expressed_cells():
    """(true means, truth) of 80 cells × 40 genes."""
    rng = np.random.default_rng(1)
    mean = np.abs(rng.normal(1, 1, (80, 1)) * rng.random(40)).astype(np.float32)
    values = sp.csr_matrix(np.maximum(mean + rng.normal(0, 0.3, mean.shape), 0))
    types = np.where(np.arange(80) < 40, "a", "b").astype(object)
    return mean, Truth("atac2rna", values, mean.mean(axis=0), types, n_recomputed=20)


def test_every_metric_of_the_table_is_measured(open_cells, expressed_cells):
    for (predicted, truth), extra in ((open_cells, {"open_ratio"}), (expressed_cells, set())):
        assert set(measure(predicted, truth).value) == {m.key for m in METRICS[truth.direction]} | extra


def test_accessibility_scores_equal_loops(open_cells):
    predicted, truth = open_cells
    found, target = measure(predicted, truth).value, truth.values.toarray()
    scored = [j for j in range(60) if 3 <= target[:, j].sum() <= 77]
    assert truth.scored.sum() == len(scored)
    per_ccre = [roc_auc_score(target[:, j], predicted[:, j]) for j in scored]
    assert found["ccre_auroc"] == pytest.approx(np.mean(per_ccre))
    precision = [average_precision_score(target[i], predicted[i]) for i in range(80)]
    assert found["cell_auprc"] == pytest.approx(np.mean(precision))
    clipped = np.clip(predicted.astype(float), 1e-4, 1 - 1e-4)
    assert found["log_loss"] == pytest.approx(log_loss(target.ravel(), clipped.ravel()))
    assert found["open_ratio"] == pytest.approx(predicted.sum() / target.sum(), rel=1e-5)
    auroc, above = like_frequency_scores(predicted, truth.values, frequency_strata(truth.mean))
    assert found["cell_auroc_residual"] == pytest.approx(np.nanmean(auroc))
    assert found["cell_auprc_residual"] == pytest.approx(np.nanmean(above))


def test_expression_scores_equal_loops(expressed_cells):
    predicted, truth = expressed_cells
    found, target = measure(predicted, truth).value, truth.values.toarray()
    genes = [j for j in range(40) if (target[:, j] > 0).sum() >= 3]
    assert found["gene_pearson"] == pytest.approx(
        np.mean([pearsonr(predicted[:, j], target[:, j]).statistic for j in genes])
    )
    assert found["gene_spearman"] == pytest.approx(
        np.mean([spearmanr(predicted[:, j], target[:, j]).statistic for j in genes])
    )
    residual = [pearsonr(predicted[i] - truth.mean, target[i] - truth.mean).statistic for i in range(80)]
    assert found["cell_pearson_residual"] == pytest.approx(np.mean(residual), abs=1e-5)
    r2 = 1 - ((predicted - target) ** 2).sum() / ((truth.mean - target) ** 2).sum()
    assert found["r2"] == pytest.approx(r2, abs=1e-6)


def test_pseudobulk_equals_a_loop(open_cells):
    predicted, truth = open_cells
    target, kept = truth.values.toarray(), truth.scored

    def change(matrix):
        a, b = matrix[:40].mean(axis=0), matrix[40:].mean(axis=0)
        return np.log2((a + 0.01) / (b + 0.01))[kept]

    expected = pearsonr(change(predicted), change(target)).statistic
    assert measure(predicted, truth).value["pseudobulk"] == pytest.approx(expected, abs=1e-5)


def test_types_with_few_cells_have_no_pseudobulk():
    labels = np.array(["a"] * 15 + ["b"] * 12 + ["rare"] * 3, dtype=object)
    truth = Truth("rna2atac", sp.csr_matrix(np.eye(30)), labels=labels)
    code, names = truth.types
    assert names == ["a", "b"]
    assert (code[27:] == -1).all()


def test_without_training_mean_there_is_nothing_to_remove(open_cells, expressed_cells):
    for predicted, truth in (open_cells, expressed_cells):
        found = measure(predicted, Truth(truth.direction, truth.values, n_recomputed=5)).value
        assert not {name for name in found if name.endswith("_residual")} | {"r2", "pseudobulk"} & set(found)


def test_of_many_values_a_sample_is_ranked_among_features_of_like_frequency(open_cells, monkeypatch):
    _, truth = open_cells
    monkeypatch.setattr(scores, "MOST_RANKED_VALUES", 80 * 30)
    sample = Truth("rna2atac", truth.values, truth.mean)
    features = np.concatenate(sample.strata)
    assert 0 < len(features) <= 30
    assert len(np.unique(features)) == len(features)


def test_sparse_and_dense_predictions_score_alike(open_cells):
    predicted, truth = open_cells
    predicted = predicted * (predicted > 0.2)
    one, other = measure(predicted, truth), measure(sp.csr_matrix(predicted), truth)
    for key, value in one.value.items():
        assert other.value[key] == pytest.approx(value)
        np.testing.assert_allclose(other.draws[key], one.draws[key])


@pytest.mark.parametrize("key", ["ccre_auroc", "log_loss", "cell_auprc", "pseudobulk", "ece"])
def test_intervals_are_as_wide_as_the_spread_over_new_cells(key, open_cells):
    probability, truth = open_cells
    rng = np.random.default_rng(5)
    again = []
    for _ in range(40):
        values = sp.csr_matrix((rng.random(probability.shape) < probability).astype(np.float32))
        again.append(
            measure(probability, Truth("rna2atac", values, truth.mean, truth.labels, n_recomputed=0)).value[
                key
            ]
        )
    interval = measure(probability, truth).interval(key)
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(np.std(again), rel=0.6)


def test_a_better_model_is_better_and_the_same_model_ties(open_cells):
    predicted, truth = open_cells
    flat = np.tile(truth.mean, (80, 1)).astype(np.float32)
    model, mean = measure(predicted, truth), measure(flat, truth)
    for metric in METRICS["rna2atac"]:
        assert compare(model, model, "itself", metric).outcome == "tie"
        if metric.key != "ece":
            assert compare(model, mean, "mean profile", metric).outcome == "better"
            assert compare(mean, model, "model", metric).outcome == "worse"


def test_pairing_makes_differences_sharper_than_intervals(open_cells):
    predicted, truth = open_cells
    model, other = measure(predicted, truth), measure(predicted * 0.9, truth)
    metric = next(m for m in METRICS["rna2atac"] if m.key == "log_loss")
    gain = compare(model, other, "other", metric)
    whole = model.interval("log_loss")
    assert gain.high - gain.low < (whole.high - whole.low) / 2


def test_what_is_not_defined_is_not_compared(open_cells):
    predicted, truth = open_cells
    model = measure(predicted, truth)
    assert compare(model, model, "itself", Metric("r2", "", "higher", "", "")) is None
    assert Comparison("m", "b", 0.1, -0.1, 0.3).outcome == "tie"
