"""Training: epoch 0 is linear, best is best, runs repeat, and what goes wrong is said."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from cisformer.config import dump_config
from cisformer.data.batches import dense_targets
from cisformer.data.store import CellStore, find_split
from cisformer.errors import TrainingError
from cisformer.evaluation.correlation import correlation
from cisformer.model.checkpoint import load_checkpoint
from cisformer.model.closed_form import count_features
from cisformer.model.closed_form_atac import Penalty, Sums, beside, solve
from cisformer.model.projection import states
from cisformer.runtime import device
from cisformer.training import loop
from cisformer.training.closed_form_start import both_sides, make_layout
from cisformer.training.follow import follow_training, validation_losses
from cisformer.training.loop import mixed_precision, train
from cisformer.training.reliability import validation_reliability
from cisformer.training.run_folder import precision_of
from cisformer.training.split import CellSplit, validation_batches

DIRECTIONS = ["atac2rna", "rna2atac"]


def history(checkpoint):
    return [
        json.loads(line) for line in (checkpoint.folder.parent / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_best_is_the_epoch_of_lowest_validation_loss(direction, tiny_checkpoints):
    best = tiny_checkpoints[direction]
    losses = [record["val_loss"] for record in history(best)]
    assert best.metrics["epoch"] == int(np.argmin(losses))
    assert best.metrics["val_loss"] == min(losses) <= best.metrics["linear_val_loss"]
    assert best.metrics["linear_val_loss"] <= best.metrics["mean_val_loss"]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_epoch_is_saved_with_the_loss_it_has(direction, tiny_checkpoints, tiny_data):
    folder = tiny_checkpoints[direction].folder.parent
    assert sorted(p.name for p in folder.glob("epoch*")) == ["epoch0", "epoch1", "epoch2"]
    store = CellStore.open(find_split(tiny_data[direction], "val"))
    for epoch, record in enumerate(history(tiny_checkpoints[direction])):
        saved = load_checkpoint(folder / f"epoch{epoch}")
        with torch.no_grad():
            losses = [
                saved.model(batch)
                for batch in validation_batches(store, np.arange(store.n_cells), saved.layout, saved.config)
            ]
        assert math.isclose(float(torch.cat(losses).mean()), record["val_loss"], rel_tol=1e-5)


def unfolded(best, cells):
    """Return what a run's best checkpoint was before validation cells were folded in."""
    epoch, start = (load_checkpoint(best.folder.parent / f"epoch{n}") for n in (best.metrics["epoch"], 0))
    return follow_training(epoch, start, cells)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_training_is_followed_as_far_as_validation_cells_are_sure(direction, tiny_checkpoints, tiny_data):
    """The share by hand; where the gain is nothing but chance the start is kept."""
    best = tiny_checkpoints[direction]
    cells = CellSplit.open(tiny_data[direction], None, direction, 0)
    epoch, start = (load_checkpoint(best.folder.parent / f"epoch{n}") for n in (2, 0))
    gain = validation_losses(start, cells) - validation_losses(epoch, cells)
    z2 = len(gain) * gain.mean() ** 2 / gain.var(ddof=1)
    share = 1 - 1 / z2 if z2 > 1 and gain.mean() > 0 else 0
    followed = follow_training(epoch, start, cells)
    assert followed.metrics["training_share"] == pytest.approx(share, abs=1e-4)
    trained = dict(load_checkpoint(best.folder.parent / "epoch2").model.named_parameters())
    for (name, weight), (_, first) in zip(
        followed.model.named_parameters(), start.model.named_parameters(), strict=True
    ):
        wanted = (first + share * (trained[name] - first)).detach()
        np.testing.assert_allclose(weight.detach(), wanted, atol=1e-5)
    back = follow_training(
        start, load_checkpoint(best.folder.parent / "epoch2"), cells
    )  # a loss in place of a gain
    if share > 0:
        assert back.metrics["training_share"] == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_best_is_its_epoch_with_the_closed_form_of_all_cells(direction, tiny_checkpoints, tiny_data):
    """Where nothing was trained, folding in gives the closed form of training and validation cells together."""
    best = tiny_checkpoints[direction]
    epoch = unfolded(best, CellSplit.open(tiny_data[best.direction], None, best.direction, 0))
    cells = CellSplit.open(tiny_data[direction], None, direction, 0)
    assert best.metrics["n_validation_cells_folded_in"] == cells.val.n_cells
    train, val = both_sides(cells)
    if direction == "rna2atac":
        sd = epoch.model.projection.sd.double().numpy()
        assert {f"linear_{field.name}" for field in fields(Penalty)} <= best.metrics.keys()
        penalty = Penalty.from_metrics(best.metrics)
        near = beside(best.reference.ccres.iloc[best.layout.target_index])
        before, after = (
            Sums.over(part, epoch.model.projection, epoch.layout) for part in (train, train + val)
        )  # fmt: skip
        np.testing.assert_allclose(best.model.prior, after.prior(), atol=1e-6)
        np.testing.assert_allclose(
            best.model.state_loadings() - epoch.model.state_loadings(),
            solve(after, sd, penalty, near) - solve(before, sd, penalty, near),
            atol=1e-5,
        )
    untouched = [n for n, p in epoch.model.named_parameters() if n != "loadings"]
    assert all(torch.equal(dict(best.model.named_parameters())[n], dict(epoch.model.named_parameters())[n])
               for n in untouched)  # fmt: skip


def test_folding_in_gives_the_regression_of_all_cells(tiny_checkpoints, tiny_data):
    """Scores of the same components of expression, by scikit-learn's ridge on training and validation cells."""
    best = tiny_checkpoints["atac2rna"]
    epoch = unfolded(best, CellSplit.open(tiny_data[best.direction], None, best.direction, 0))
    model, layout = best.model, best.layout
    train, val = both_sides(CellSplit.open(tiny_data["atac2rna"], None, "atac2rna", 0))
    matrix = (train + val).read(layout)
    y = matrix.y.toarray().astype(np.float64)
    np.testing.assert_allclose(model.prior, y.mean(axis=0), atol=1e-5)
    own = ~model.projection.principal.numpy()
    axes = model.target_axes.numpy()[:, own].astype(np.float64)
    x = model.projection.features(matrix.x).toarray().astype(np.float64)
    alpha = best.metrics["linear_ridge"] * np.square(x - x.mean(axis=0)).sum() / len(x)
    ridge = Ridge(alpha=alpha).fit(x, ((y - model.prior.numpy()) / model.scale.numpy()) @ axes)
    z = np.concatenate([states(model.projection, store, rows, layout) for store, rows in (train + val).parts])
    np.testing.assert_allclose(z @ model.readout.numpy()[:, own], ridge.predict(x), atol=2e-2)
    change = (model.readout - epoch.model.readout).numpy()[:, own]
    found = model.state_loadings() - epoch.model.state_loadings()
    np.testing.assert_allclose(found, axes @ change.T, atol=1e-5)
    assert np.abs(change).max() > 0


def test_training_lowers_the_training_loss(tiny_data, tiny_config, tmp_path):
    best = train(tiny_data["rna2atac"], "x", direction="rna2atac", save=tmp_path,
                 config=tiny_config("rna2atac", epoch=6, lr=5e-3, patience=10))  # fmt: skip
    losses = [record["train_loss"] for record in history(best)[1:]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_run_repeats(direction, tiny_checkpoints, tiny_data, tiny_config, tmp_path):
    again = train(
        tiny_data[direction], "x", direction=direction, save=tmp_path, config=tiny_config(direction)
    )
    assert [r["val_loss"] for r in history(again)] == [
        r["val_loss"] for r in history(tiny_checkpoints[direction])
    ]


def test_an_interrupted_run_resumes_to_the_same_losses(tiny_checkpoints, tiny_data, tmp_path):
    whole = tiny_checkpoints["rna2atac"]
    cut = shutil.copytree(whole.folder.parent, tmp_path / "cut")
    short = train(tiny_data["rna2atac"], "short", direction="rna2atac", save=tmp_path,
                  config=whole.config.model_copy(update={
                      "training": whole.config.training.model_copy(update={"epoch": 1})}))  # fmt: skip
    for name in ("training_state.pt", "metrics.jsonl"):
        shutil.copy(short.folder.parent / name, cut / name)
    shutil.rmtree(cut / "epoch2")
    resumed = train(tiny_data["rna2atac"], direction="rna2atac", resume=cut)
    assert [r["val_loss"] for r in history(resumed)] == [r["val_loss"] for r in history(whole)]
    for a, b in zip(
        load_checkpoint(cut / "epoch2").model.parameters(),
        load_checkpoint(whole.folder.parent / "epoch2").model.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_training_goes_on_from_a_checkpoint(tiny_checkpoints, tiny_data, tiny_config, tmp_path):
    first = load_checkpoint(tiny_checkpoints["rna2atac"].folder.parent / "epoch2")
    tuned = train(tiny_data["rna2atac"], "x", direction="rna2atac", save=tmp_path, model_parameters=first.folder,
                  config=tiny_config("rna2atac", epoch=1))  # fmt: skip
    assert math.isclose(history(tuned)[0]["val_loss"], first.metrics["val_loss"], rel_tol=1e-6)


def test_patience_ends_training(tiny_data, tiny_config, tmp_path):
    config = tiny_config("rna2atac", epoch=30, lr=0.3, patience=2)
    best = train(tiny_data["rna2atac"], "x", direction="rna2atac", save=tmp_path, config=config)
    records = history(best)
    assert len(records) < 31
    assert len(records) - 1 - best.metrics["epoch"] == 2


def test_no_epochs_means_the_linear_model(tiny_data, tiny_config, tmp_path):
    best = train(
        tiny_data["rna2atac"],
        "x",
        direction="rna2atac",
        save=tmp_path,
        config=tiny_config("rna2atac", epoch=0),
    )
    assert best.metrics["epoch"] == 0


def test_only_the_last_epochs_are_kept_where_asked(tiny_data, tiny_config, tmp_path):
    config = tiny_config("rna2atac", epoch=3, keep_epochs=1)
    best = train(tiny_data["rna2atac"], "x", direction="rna2atac", save=tmp_path, config=config)
    assert sorted(p.name for p in best.folder.parent.glob("epoch*")) == ["epoch0", "epoch3"]


def test_a_loss_that_is_not_finite_stops_before_weights_change(tiny_data, tiny_config, tmp_path):
    config = tiny_config("rna2atac", epoch=3, lr=1e30)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at epoch 1, batch \d"):
        train(tiny_data["rna2atac"], "x", direction="rna2atac", save=tmp_path, config=config)
    saved = load_checkpoint(next(tmp_path.iterdir()))
    assert all(torch.isfinite(p).all() for p in saved.model.parameters())


def test_without_validation_data_training_cells_are_set_aside(tiny_data):
    folder = find_split(tiny_data["rna2atac"], "train")
    cells = CellSplit.open(folder, None, "rna2atac", 0)
    assert cells.val.path.name == "rna2atac_val"
    alone = CellSplit._set_aside(cells.train, 0)
    assert len(np.intersect1d(alone.train_rows, alone.val_rows)) == 0
    assert len(alone.train_rows) + len(alone.val_rows) == cells.train.n_cells


def test_test_cells_are_in_neither_training_nor_validation(tiny_data):
    for direction in DIRECTIONS:
        cells = CellSplit.open(tiny_data[direction], None, direction, 0)
        test = CellStore.open(find_split(tiny_data[direction], "test"))
        for store in (cells.train, cells.val):
            assert len(np.intersect1d(store.barcodes, test.barcodes)) == 0


def test_the_same_cells_for_training_and_validation_are_refused(tiny_data):
    folder = find_split(tiny_data["rna2atac"], "train")
    with pytest.raises(TrainingError, match="cells are in the training and the validation data"):
        CellSplit.open(folder, folder / "rna2atac_0.pt", "rna2atac", 0)


def test_names_of_runs_stay_in_the_folder(tiny_data, tiny_config, tmp_path):
    best = train(tiny_data["rna2atac"], "../a b/$(x)", direction="rna2atac", save=tmp_path,
                 config=tiny_config("rna2atac", epoch=0))  # fmt: skip
    assert best.folder.parent.parent == tmp_path


def test_tensorboard_gets_the_losses(tiny_data, tiny_config, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra 'tensorboard' is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config("rna2atac", epoch=1, tracker="tensorboard")
    best = train(tiny_data["rna2atac"], "x", direction="rna2atac", save=tmp_path, config=config)
    events = next(tmp_path.rglob("events.out.tfevents*"))
    found = EventAccumulator(str(events.parent)).Reload().Scalars("val_loss")
    assert [(e.step, e.value) for e in found] == [
        (r["epoch"], pytest.approx(r["val_loss"], rel=1e-6)) for r in history(best)
    ]


@pytest.mark.parametrize(
    ("asked", "gpu", "bf16", "precision"),
    [
        (None, True, True, "bf16"), (None, True, False, "fp16"), (None, False, True, "bf16"),
        (None, False, False, "no"), ("no", True, True, "no"), ("fp16", True, True, "fp16"),
        ("fp16", False, False, "no"), ("bf16", False, False, "bf16"),
    ],
)  # fmt: skip
def test_precision_is_what_the_launcher_says_or_the_device_does_fastest(
    asked, gpu, bf16, precision, monkeypatch
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if asked:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    monkeypatch.setattr(loop, "best_device", lambda: "cuda" if gpu else "cpu")
    monkeypatch.setattr(device, "multiplies_bf16", lambda device: bf16)
    assert mixed_precision(cpu=False) == precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_spares_the_closed_form(direction, dtype, tiny_checkpoints, tiny_data):
    """Where the transformer adds nothing yet, the loss is that of single precision; and gradients are finite."""
    folder = tiny_checkpoints[direction].folder.parent
    model = load_checkpoint(folder / "epoch0").model
    store = CellStore.open(find_split(tiny_data[direction], "val"))
    batch = next(iter(validation_batches(store, np.arange(9), *layout_and_config(folder))))
    with torch.autocast("cpu", dtype=dtype):
        half = model(batch)
    torch.testing.assert_close(half, model(batch), rtol=1e-6, atol=0)
    half.mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    trained = load_checkpoint(folder / "epoch2").model
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        half = trained(batch)
    with torch.no_grad():
        torch.testing.assert_close(half, trained(batch), rtol=1e-3, atol=1e-5)


def layout_and_config(folder):
    saved = load_checkpoint(folder / "epoch0")
    return saved.layout, saved.config


def test_without_a_compiler_blocks_are_not_compiled(tiny_data, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    config = tiny_config("rna2atac", compile=True)
    with pytest.raises(TrainingError, match="no C\\+\\+ compiler"):
        train(tiny_data["rna2atac"], direction="rna2atac", config=config, save=tmp_path / "save", cpu=True)
    assert not (tmp_path / "save").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_train_to_the_same_losses(tiny_checkpoints, tiny_data, tiny_config, tmp_path):
    """In a process of its own: the compiler warns of what is not ours."""
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_config("rna2atac", compile=True, epoch=1)))
    data = tiny_data["rna2atac"]
    command = [sys.executable, "-m", "cisformer", "rna2atac_train", "-t", data / "rna2atac_train",
               "-v", data / "rna2atac_val", "-n", "compiled", "-c", config, "-s", tmp_path]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    best = load_checkpoint(next(tmp_path.glob("*_compiled")) / "best")
    plain = history(tiny_checkpoints["rna2atac"])[:2]
    for ours, theirs in zip(history(best), plain, strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
    assert best.model.state_dict().keys() == tiny_checkpoints["rna2atac"].model.state_dict().keys()


def test_training_takes_the_precision_of_a_process_that_has_one(tiny_data, tiny_config, tmp_path):
    """Accelerate refuses a second precision in a process; notebooks may have made an Accelerator before."""
    code = (
        "import sys, json, accelerate, cisformer\n"
        "accelerate.Accelerator(cpu=True, mixed_precision=sys.argv[1])\n"
        "best = cisformer.train(sys.argv[2], direction='rna2atac', save=sys.argv[3], config=sys.argv[4], cpu=True)\n"
        "print((best.folder.parent / 'metrics.jsonl').read_text().splitlines()[-1])"
    )
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_config("rna2atac", epoch=1)))
    for precision in ("no", "bf16"):
        command = [sys.executable, "-c", code, precision, tiny_data["rna2atac"], tmp_path / precision, config]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert json.loads(done.stdout.splitlines()[-1])["precision"] == precision


def test_a_resumed_run_keeps_its_precision(tiny_checkpoints, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(device, "multiplies_bf16", lambda device: True)
    run = tmp_path / "run"
    run.mkdir()
    assert precision_of(run) is None
    (run / "metrics.jsonl").write_text(json.dumps({"epoch": 0, "precision": "no"}) + "\n")
    assert mixed_precision(cpu=True, before=precision_of(run)) == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert mixed_precision(cpu=True, before="no") == "bf16"
    assert history(tiny_checkpoints["rna2atac"])[-1]["precision"] in ("no", "bf16")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_each_target_is_saved_with_its_correlation_in_validation_cells(
    direction, tiny_checkpoints, tiny_data
):
    best = tiny_checkpoints[direction]
    epoch = unfolded(best, CellSplit.open(tiny_data[best.direction], None, best.direction, 0))
    store = CellStore.open(find_split(tiny_data[direction], "val"))
    batches = list(validation_batches(store, np.arange(store.n_cells), epoch.layout, epoch.config))
    predicted = torch.cat([epoch.model.predict(batch) for batch in batches]).numpy().astype(np.float64)
    found = torch.cat([dense_targets(batch, predicted.shape[1]) for batch in batches]).numpy()
    told = found.std(axis=0) > 0
    np.testing.assert_array_equal(np.isnan(best.model.validation_r.numpy()), ~told)
    for f in np.flatnonzero(told)[:20]:
        wanted = np.corrcoef(predicted[:, f], found[:, f])[0, 1]
        assert float(best.model.validation_r[f]) == pytest.approx(wanted, abs=2e-3)
    assert int(best.model.n_validation) == store.n_cells
    if direction == "atac2rna":  # one cell more than the share, as a new cell is one of n + 1
        errors = np.sort(np.abs(predicted - found), axis=0)
        wanted = errors[int(np.ceil(0.9 * (store.n_cells + 1))) - 1]
        np.testing.assert_allclose(best.model.interval_90.numpy(), wanted, atol=1e-5)


def test_with_fewer_than_nine_validation_cells_there_is_no_interval(tiny_checkpoints, tiny_data):
    cells = CellSplit.open(tiny_data["atac2rna"], None, "atac2rna", 0)
    for n_cells in (8, 9):
        found = validation_reliability(
            tiny_checkpoints["atac2rna"], replace(cells, val_rows=cells.val_rows[:n_cells])
        )
        assert np.isfinite(found.interval).all() == (n_cells == 9)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_targets_that_validation_calls_predictable_are_predicted_better(
    direction, tiny_checkpoints, tiny_data
):
    """In test cells: the third of highest validation_r against the third of lowest."""
    best = tiny_checkpoints[direction]
    store = CellStore.open(find_split(tiny_data[direction], "test"))
    batches = list(validation_batches(store, np.arange(store.n_cells), best.layout, best.config))
    predicted = torch.cat([best.model.predict(batch) for batch in batches]).numpy()
    found = torch.cat([dense_targets(batch, predicted.shape[1]) for batch in batches]).numpy()
    r, promised = correlation(predicted, found), best.model.validation_r.numpy()
    order = np.argsort(np.where(np.isnan(promised), 0, promised))
    third = len(order) // 3
    assert np.nanmean(r[order[-third:]]) > np.nanmean(r[order[:third]])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cells_that_all_have_every_ccre_open_are_refused(direction, tiny_data):
    """As of smoothed accessibility: nothing is zero."""
    store = CellStore.open(find_split(tiny_data[direction], "train"))
    counts = count_features(store, np.arange(store.n_cells), direction)
    name = "n_seen" if direction == "rna2atac" else "n_open"
    everywhere = np.where(getattr(counts, name) > 0, counts.n_cells, 0)
    with pytest.raises(TrainingError, match=r"open in all \d+ training cells") as caught:
        make_layout(replace(counts, **{name: everywhere}), direction, store)
    assert "not smoothed" in caught.value.hint
