"""`cisformer evaluate` as a user runs it."""

import json

import pytest

from cisformer.data.store import CellStore, find_split
from cisformer.evaluation.verdict import score_text


@pytest.fixture(scope="module")
def files(tiny, tiny_data, tiny_checkpoints, tmp_path_factory):
    """Options for the files of both sides of the split, and a prediction of the test cells."""
    from cisformer.prediction.predict import predict

    folder = tmp_path_factory.mktemp("evaluate")
    test = CellStore.open(find_split(tiny_data["rna2atac"], "test")).barcodes
    learned = tiny.rna.obs_names.difference(test)
    given = {
        "truth": tiny.atac[test],
        "train_input": tiny.rna[learned],
        "train_target": tiny.atac[learned],
        "test_input": tiny.rna[test],
    }
    for name, adata in given.items():
        adata.copy().write_h5ad(folder / f"{name}.h5ad")
    predict(
        tiny_checkpoints["rna2atac"], tiny.rna[test].copy(), output=folder / "predicted.h5ad", num_workers=0
    )
    return folder


def _options(folder, *names):
    return [part for name in names for part in (f"--{name}", folder / f"{name}.h5ad")]


def test_files_make_a_report(files, command, tmp_path):
    names = ("predicted", "truth", "train_input", "train_target", "test_input")
    done = command("evaluate", *_options(files, *names), "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"] in done.stdout
    assert f"wrote {tmp_path / 'out' / 'report.html'}" in done.stdout
    value = report["scores"]["PCA-ridge"]["ccre_auroc"]["value"]
    line = next(line for line in done.stdout.splitlines() if line.startswith("AUROC per cCRE"))
    assert score_text(value) in line

    again = command("evaluate", *_options(files, *names), "-o", tmp_path / "out")
    assert again.returncode == 1
    assert "--force" in again.stderr


def test_a_model_on_a_data_set_makes_the_same_report(tiny_data, tiny_checkpoints, command, tmp_path):
    checkpoint = tiny_checkpoints["atac2rna"].folder
    done = command("evaluate", "--data", tiny_data["atac2rna"], "-m", checkpoint, "-o", tmp_path, "--force")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["direction"] == "atac2rna"
    assert report["figures"]["training"]["epoch"] == [0, 1, 2]
    assert report["facts"]["checkpoint"] == str(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got none of them"),
        (["--data", "x"], "got --data"),
        (["--predicted", "x.h5ad"], "evaluate lacks --truth"),
        (["--predicted", "x.h5ad", "--truth", "y.h5ad"], "there is no file x.h5ad"),
        (["--data", "x", "-m", "y", "--truth", "z"], "got --data, -m, --truth"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, command, tmp_path):
    done = command("evaluate", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []
