"""Same seed, same bytes: shards, weights, predictions and links, on every run, worker count and hash seed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

RUNS = {"first": ("0", 1), "again, with other workers and another hash seed": ("4711", 4)}
"""Hash seed and number of workers."""


def all_stages(
    command: Callable[..., subprocess.CompletedProcess[str]], folder: Path, hash_seed: str, workers: int
) -> None:
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("num_workers: 0", f"num_workers: {workers}"))
    files = "-r rna.h5ad -a atac.h5ad --reference dataset --atac2rna --num_workers"
    steps = [
        f"data_preprocess {files} {workers} -s data",
        f"data_preprocess {files} {workers} -s shuffled --shuffle --manually --cnt 50",
        "atac2rna_train -d data -n x -c config.yaml -s save",
        f"atac2rna_predict -d data/atac2rna_test -m run -o out --num_workers {workers}",
        "atac2rna_link -d data/atac2rna_train -c celltype_info.tsv -m run -o out --formats bedpe",
    ]
    for step in steps:
        done = command(*step.split(), cwd=folder, PYTHONHASHSEED=hash_seed)
        assert done.returncode == 0, done.stderr
        if step.startswith("atac2rna_train"):
            next((folder / "save").iterdir()).rename(folder / "run")


@pytest.fixture(scope="module")
def results(
    command: Callable[..., subprocess.CompletedProcess[str]], tiny_files: Path, tiny_config: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:  # fmt: skip
    """Run every stage twice, each time in a folder of its own."""
    from cisformer.config import dump_config

    folders = {}
    for name in RUNS:
        folders[name] = tmp_path_factory.mktemp("run")
        shutil.copytree(tiny_files, folders[name], dirs_exist_ok=True)
        (folders[name] / "config.yaml").write_text(dump_config(tiny_config("atac2rna")))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: all_stages(command, folders[name], *RUNS[name]), RUNS))
    return folders


def same_bytes(results: dict[str, Path], pattern: str) -> list[str]:
    """Return the files of a pattern, all of which have the same bytes in all runs."""
    first, *others = (
        sorted(str(path.relative_to(folder)) for path in folder.glob(pattern)) for folder in results.values()
    )
    assert all(names == first for names in others)
    for name in first:
        assert len({(folder / name).read_bytes() for folder in results.values()}) == 1, name
    return first


def test_data_sets(results: dict[str, Path]):
    names = same_bytes(results, "data/*/*.pt") + same_bytes(results, "shuffled/*/*.pt")
    assert len(names) == 3 + 4
    assert len(same_bytes(results, "data/*/cell_info.tsv") + same_bytes(results, "data/*/barcodes.txt")) == 6


def test_weights_and_losses(results: dict[str, Path]):
    assert same_bytes(results, "run/*/model.safetensors") == [
        f"run/{n}/model.safetensors" for n in ("best", "epoch0", "epoch1", "epoch2")
    ]
    records = []
    for folder in results.values():
        lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
        records.append([(line["train_loss"], line["val_loss"], line["lr"]) for line in lines])
    assert records[0] == records[1]


def test_predictions(results: dict[str, Path]):
    assert same_bytes(results, "out/*.h5ad") == ["out/cisformer_predicted_rna.h5ad"]


def test_links(results: dict[str, Path]):
    names = [Path(name).name for name in same_bytes(results, "out/cisformer_link/*")]
    assert {"links.tsv.gz", "cell_num.json", "cell_num.pkl"} < set(names)
    assert (
        sum(name.endswith(".h5ad") for name in names) == sum(name.endswith(".bedpe") for name in names) == 3
    )
