"""The whole evaluation: honest verdicts, the same numbers everywhere."""

import json

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cisformer.data.store import CellStore, find_split
from cisformer.errors import InputError
from cisformer.evaluation.evaluate import evaluate, evaluate_model
from cisformer.evaluation.figures import read_training_log
from cisformer.evaluation.scores import METRICS, Comparison, Measured
from cisformer.evaluation.verdict import judge


@pytest.fixture(scope="module")
def parts(tiny):
    """Training and test halves of simulated cells, and predictions of different worth for the test ATAC."""
    rna, atac = tiny.rna, tiny.atac
    train, test = np.arange(0, 110), np.arange(110, 160)
    types = rna.obs["cell_type"].astype(str).to_numpy()
    mean = np.asarray(atac.X[train].mean(axis=0)).ravel()
    own = {t: np.asarray(atac.X[train][types[train] == t].mean(axis=0)).ravel() for t in np.unique(types)}
    kinds = {
        "mean": np.tile(mean, (50, 1)),
        "types": np.array([(own[t] * 5 + mean * 5) / 10 for t in types[test]]),
        "noise": np.random.default_rng(0).random((50, atac.n_vars)),
        "truth": atac.X[test].toarray() * 0.98 + 0.01,
    }
    made = {
        name: ad.AnnData(
            sp.csr_matrix(values.astype(np.float32)), obs=atac.obs.iloc[test], var=atac.var.copy()
        )
        for name, values in kinds.items()
    }
    given = {
        "truth": atac[test].copy(),
        "train_input": rna[train].copy(),
        "train_target": atac[train].copy(),
        "test_input": rna[test].copy(),
    }
    return made, given


@pytest.fixture(scope="module")
def reports(parts):
    made, given = parts
    return {name: evaluate(predicted, **given) for name, predicted in made.items()}


@pytest.mark.parametrize(
    ("name", "standing", "words"),
    [
        ("truth", "better", "The model beats every baseline. It is best on log-loss"),
        ("noise", "worse", "The model does not beat the baselines. It is worse on"),
    ],
)
def test_verdicts_tell_the_truth(reports, name, standing, words):
    assert reports[name].standing == standing
    assert reports[name].verdict.startswith(words)


def test_a_mean_profile_is_not_said_to_beat_the_mean_profile(reports):
    report = reports["mean"]
    assert report.outcome("ccre_auroc", "mean profile") == "tie"
    assert report.standing in ("mixed", "worse", "even")
    assert report.scores["model"]["ccre_auroc"]["value"] == 0.5
    assert report.scores["mean profile"]["cell_auroc_residual"]["value"] == pytest.approx(0.5, abs=0.01)


def test_scores_stand_beside_all_baselines(reports):
    report = reports["types"]
    assert report.methods == ["model", "mean profile", "cell-type mean", "kNN", "PCA-ridge", "kernel ridge"]
    keys = {metric.key for metric in METRICS["rna2atac"]}
    assert all(keys <= set(scores) for scores in report.scores.values())
    assert {c["metric"] for c in report.comparisons} == keys


def test_the_mask_oracle_shows_the_leak_but_does_not_judge(tiny, tiny_data, tiny_checkpoints):
    report = evaluate_model(tiny_data["atac2rna"], tiny_checkpoints["atac2rna"], num_workers=0)
    assert report.scores["mask oracle"]["gene_pearson"]["value"] > 0.8
    assert not any(c["baseline"] == "mask oracle" for c in report.comparisons)
    assert "oracle" not in report.verdict


@pytest.mark.parametrize("direction", ["rna2atac", "atac2rna"])
def test_a_model_on_its_data_set_equals_its_files(direction, tiny, tiny_data, tiny_checkpoints):
    from cisformer.prediction.predict import predict

    model = tiny_checkpoints[direction]
    by_store = evaluate_model(tiny_data[direction], model, num_workers=0)
    split = {
        s: CellStore.open(find_split(tiny_data[direction], s)).barcodes for s in ("train", "val", "test")
    }
    source, target = (tiny.rna, tiny.atac) if direction == "rna2atac" else (tiny.atac, tiny.rna)
    learned = np.concatenate([split["train"], split["val"]])
    predicted = predict(model, source[split["test"]].copy(), min_prob=1e-4, num_workers=0)
    by_files = evaluate(
        predicted, target[split["test"]].copy(), train_input=source[learned].copy(),
        train_target=target[learned].copy(), test_input=source[split["test"]].copy(),
    )  # fmt: skip
    for key, score in by_store.scores["model"].items():
        assert by_files.scores["model"][key]["value"] == pytest.approx(
            score["value"], rel=2e-3, nan_ok=True
        ), key
    assert by_store.figures["training"]["epoch"] == [0, 1, 2]


def test_without_training_cells_it_says_that_nothing_was_compared(parts):
    made, given = parts
    report = evaluate(made["types"], given["truth"])
    assert report.standing == "alone"
    assert "needs training data" in report.verdict
    assert any("--train_input, --train_target, --test_input" in note for note in report.facts["notes"])
    assert report.comparisons == []


def test_the_same_seed_gives_the_same_report(parts, reports):
    made, given = parts
    again = evaluate(made["types"], **given)
    assert again.scores == reports["types"].scores
    assert again.comparisons == reports["types"].comparisons


def test_json_holds_everything_without_nan(reports, tmp_path):
    path = reports["types"].write_json(tmp_path / "report.json")
    read = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} in JSON"))
    assert read["format"] == "cisformer-evaluation"
    for name, scores in reports["types"].scores.items():
        assert read["scores"][name]["log_loss"]["value"] == pytest.approx(
            scores["log_loss"]["value"], rel=1e-5
        )
    assert set(read["figures"]) == {"detection", "reliability", "pseudobulk"}
    assert sum(read["figures"]["reliability"]["model"]["count"]) == read["facts"]["features"] * 50


def test_probabilities_add_up_to_the_ccres_that_are_open(tiny_data, tiny_checkpoints):
    report = evaluate_model(tiny_data["rna2atac"], tiny_checkpoints["rna2atac"], num_workers=0)
    assert report.scores["model"]["open_ratio"]["value"] == pytest.approx(1.0, abs=0.1)


def test_the_table_marks_who_wins(reports):
    line = next(line for line in reports["truth"].table().splitlines() if line.startswith("log-loss"))
    assert line.count("+") == 5


def _measured(**values):
    return Measured(value=values, draws={k: np.zeros(2) for k in values}, n=dict.fromkeys(values, 1))


def _verdict(**gains):
    """Verdict for gains over PCA-ridge on the headline scores, each with an interval of ± 0.1."""
    values = {"log_loss": 0.2, "ccre_auroc": 0.7, "cell_auprc": 0.3}
    measured = {
        "model": _measured(**values),
        "PCA-ridge": _measured(**values | {"log_loss": 0.200004}),
        "cell-type mean": _measured(**values),
    }
    comparisons = [Comparison(key, "PCA-ridge", gain, gain - 0.1, gain + 0.1) for key, gain in gains.items()]
    return judge(measured, comparisons, "rna2atac")


@pytest.mark.parametrize(
    ("gains", "standing"),
    [
        ((1, 1, 1), "better"),
        ((1, 0, 1), "even"),
        ((0, 0, 0), "even"),
        ((1, -1, 0), "mixed"),
        ((-1, -1, -1), "worse"),
    ],
)
def test_standing_follows_the_headline_scores(gains, standing):
    assert _verdict(**dict(zip(("log_loss", "ccre_auroc", "cell_auprc"), gains, strict=True)))[0] == standing


def test_a_loss_is_named_with_what_it_was_lost_to():
    _, sentence = _verdict(log_loss=1, ccre_auroc=-1, cell_auprc=0)
    assert "is best on log-loss (0.200000 against 0.200004 of PCA-ridge)" in sentence
    assert "is worse on AUROC per cCRE (0.7000 against 0.7000 of PCA-ridge)" in sentence


def test_a_better_cell_type_mean_is_named_and_left_out_of_the_standing():
    measured = {name: _measured(log_loss=0.2) for name in ("model", "PCA-ridge", "cell-type mean")}
    gains = {"PCA-ridge": 1, "cell-type mean": -1}
    comparisons = [Comparison("log_loss", name, gain, gain - 0.1, gain + 0.1) for name, gain in gains.items()]
    standing, sentence = judge(measured, comparisons, "rna2atac")
    assert standing == "better"
    assert sentence.startswith("The model beats every baseline without type labels.")
    assert sentence.endswith(
        "The cell-type mean, which uses the cells' type labels, is better on log-loss (0.2000)."
    )


def test_training_log_is_read_or_refused(tmp_path):
    good, bad = tmp_path / "metrics.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"epoch": 0, "val_loss": 0.5}\n{"epoch": 1, "val_loss": 0.4, "train_loss": 0.6}\n')
    assert read_training_log(good) == {"epoch": [0, 1], "val_loss": [0.5, 0.4], "train_loss": [None, 0.6]}
    for text in ("not json", '{"loss": 1}', "[1]"):
        bad.write_text(text)
        with pytest.raises(InputError, match=r"is not a training log|has no epoch"):
            read_training_log(bad)
