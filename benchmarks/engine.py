"""Measure training and prediction: speed beside what the machine can do, growth, and presets.

    python benchmarks/engine.py WORK speed [--cells 1000] [--ccres 100000]
    python benchmarks/engine.py WORK growth [--cells 1000 10000 100000] [--ccres 40000 200000 1000000]
    python benchmarks/engine.py WORK presets

`speed` takes steps of the default configuration in this process, one thread, counts the operations of its matrix
products, and runs the prediction commands; beside them stand the rates of a 4096 × 4096 product and of copying
memory, measured in the same run, and where the time of a step goes. `growth` runs whole commands with the small
preset and one epoch, on cells with 2,000 genes and 6,000 open cCREs each, human reference, over the number of cells
at 100,000 cCREs and over the number of cCREs at 1,000 cells, and fits exponents. `presets` trains both presets on
2,000 simulated cells with planted links and scores the test cells.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from preprocess import Run, run, simulate

from cisformer.config import DIRECTIONS, Direction, Preset, default_config, dump_config

CISFORMER = [sys.executable, "-m", "cisformer"]
GROWTH_CCRES, GROWTH_CELLS = 100_000, 1_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("what", choices=["speed", "growth", "presets"])
    parser.add_argument("--cells", type=int, nargs="+")
    parser.add_argument("--ccres", type=int, nargs="+")
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"python {platform.python_version()}, numpy {np.__version__}, seed {options.seed}")
    {"speed": speed, "growth": growth, "presets": presets}[options.what](options)


# ---------------------------------------------------------------------------------------------- commands


def cells_on_disk(options: argparse.Namespace, n_cells: int, n_ccres: int, direction: Direction) -> Path:
    """Simulate and preprocess cells if that has not been done; return their folder."""
    folder = options.work / f"cells_{n_cells}_{n_ccres}"
    if not (folder / "rna.h5ad").exists():
        simulate(folder, n_cells, None, options.seed, n_ccres)
    if not (folder / "data" / f"{direction}_train").exists():
        flags = ["--atac2rna"] if direction == "atac2rna" else []
        run(
            [*CISFORMER, "data_preprocess", "-r", "rna.h5ad", "-a", "atac.h5ad", "-s", "data", *flags], folder
        )
    return folder


def train(folder: Path, direction: Direction, preset: Preset, epochs: int | None = None) -> tuple[Run, Path]:
    """Train by command; return what it took and the run's folder."""
    config = default_config(direction, preset)
    if epochs is not None:
        config = config.model_copy(update={"training": config.training.model_copy(update={"epoch": epochs})})
    (folder / "config.yaml").write_text(dump_config(config))
    data = (
        ["-d", "data"]
        if direction == "atac2rna"
        else ["-t", "data/rna2atac_train", "-v", "data/rna2atac_val"]
    )
    command = [*CISFORMER, f"{direction}_train", *data, "-n", preset, "-c", "config.yaml", "-s", "save"]
    took = run(command, folder)
    written = re.findall(r"^wrote (.*)/best$", took.log, re.MULTILINE)
    return took, folder / written[-1]


def predict(folder: Path, direction: Direction, model: Path) -> tuple[Run, int]:
    """Predict the test cells by command; return what it took and their number."""
    source = {"atac2rna": ["-d", "data/atac2rna_test"], "rna2atac": ["-r", "data/rna2atac_test"]}[direction]
    command = [*CISFORMER, f"{direction}_predict", *source, "-m", str(model), "--force", "--batch_size", "16"]
    took = run(command, folder)
    n_cells = len((folder / "data" / f"{direction}_test" / "barcodes.txt").read_text().split())
    return took, n_cells


# ---------------------------------------------------------------------------------------------- growth


def growth(options: argparse.Namespace) -> None:
    """Print time and memory over cells and cCREs, and fitted exponents."""
    over = {
        "cells": [(n, GROWTH_CCRES) for n in options.cells or (1_000, 10_000, 100_000)],
        "cCREs": [(GROWTH_CELLS, n) for n in options.ccres or (40_000, 200_000, 1_000_000)],
    }
    for direction in options.directions:
        for name, sizes in over.items():
            print(f"\n{direction}, over {name}\n")
            print(
                "| cells | cCREs | training CPU s | peak GB | prediction CPU s a cell | peak GB | model MB |"
            )
            print("|---|---|---|---|---|---|---|")
            rows = [growth_row(options, n_cells, n_ccres, direction) for n_cells, n_ccres in sizes]
            x = np.log([size[name == "cCREs"] for size in sizes])
            for at, what in () if len(sizes) < 2 else ((0, "training CPU"), (1, "training memory")):
                slope = np.polyfit(x, np.log([row[at] for row in rows]), 1)[0]
                print(f"\n{what} grows as {name}^{slope:.2f}", flush=True)


def growth_row(
    options: argparse.Namespace, n_cells: int, n_ccres: int, direction: Direction
) -> tuple[float, float]:
    folder = cells_on_disk(options, n_cells, n_ccres, direction)
    trained, model = train(folder, direction, "small", epochs=1)
    predicted, n_test = predict(folder, direction, model)
    size = (model / "best" / "model.safetensors").stat().st_size / 1e6
    print(
        f"| {n_cells:,} | {n_ccres:,} | {trained.cpu_s:.0f} | {trained.peak_gb:.2f} "
        f"| {predicted.cpu_s / n_test:.3f} | {predicted.peak_gb:.2f} | {size:.0f} |",
        flush=True,
    )
    shutil.rmtree(folder / "save")
    return trained.cpu_s, trained.peak_gb


# ---------------------------------------------------------------------------------------------- presets


def presets(options: argparse.Namespace) -> None:
    """Print time, memory and accuracy of the presets on simulated cells with planted links."""
    folder = options.work / "presets"
    if not (folder / "rna.h5ad").exists():
        folder.mkdir()
        run([*CISFORMER, "simulate", "-o", ".", "--seed", str(options.seed)], folder)
    shown = {"rna2atac": ("log_loss", "ccre_auroc"), "atac2rna": ("r2", "gene_pearson")}
    print("| direction | preset | CPU s | peak GB | model MB | epochs | best | scores of test cells |")
    print("|---|---|---|---|---|---|---|---|")
    for direction in options.directions:
        if not (folder / "data" / f"{direction}_train").exists():
            flags = ["--atac2rna"] if direction == "atac2rna" else []
            run([*CISFORMER, "data_preprocess", "-r", "rna.h5ad", "-a", "atac.h5ad", "-s", "data",
                 "--reference", "dataset", *flags], folder)  # fmt: skip
        for preset in ("small", "default"):
            took, model = train(folder, direction, preset)
            run(
                [*CISFORMER, "evaluate", "--data", "data", "-m", str(model), "-o", "scores", "--force"],
                folder,
            )
            scores = json.loads(next((folder / "scores").rglob("report.json")).read_text())["scores"]["model"]
            text = ", ".join(f"{key} {scores[key]['value']:.4f}" for key in shown[direction])
            history = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
            best = min(history, key=lambda record: record["val_loss"])["epoch"]
            size = (model / "best" / "model.safetensors").stat().st_size / 1e6
            print(
                f"| {direction} | {preset} | {took.cpu_s:.0f} | {took.peak_gb:.2f} | {size:.0f} "
                f"| {len(history) - 1} | {best} | {text} |",
                flush=True,
            )


# ---------------------------------------------------------------------------------------------- speed


def speed(options: argparse.Namespace) -> None:
    """Print rates of training and prediction beside those of the machine."""
    import torch
    from full import product_rate

    torch.set_num_threads(1)
    n_cells, n_ccres = (options.cells or [1_000])[0], (options.ccres or [100_000])[0]
    rate, bandwidth = product_rate(torch.float32), copy_rate()
    print(f"torch {torch.__version__}, one thread")
    print(f"matrix product: {rate:.0f} GFLOP/s in float32; copying: {bandwidth:.1f} GB/s read and written")
    for direction in options.directions:
        folder = cells_on_disk(options, n_cells, n_ccres, direction)
        measure_training(folder, direction, rate)
        _, model = train(folder, direction, "default", epochs=0)
        took, n_test = predict(folder, direction, model)
        written = sum(path.stat().st_size for path in (folder / "output").glob("*.h5ad")) / 1e9
        print(
            f"{direction} prediction of {n_test} cells, whole command: {took.cpu_s:.1f} CPU s, "
            f"{n_test / took.cpu_s:.1f} cells per CPU s, {n_test / took.wall_s:.1f} a second, {written:.2f} GB written"
        )
        shutil.rmtree(folder / "output")
    print(f"afterwards: {product_rate(torch.float32):.0f} GFLOP/s, {copy_rate():.1f} GB/s")


def measure_training(folder: Path, direction: Direction, rate: float, n_steps: int = 3) -> None:
    """Print cells per CPU second of training steps of the default configuration, and where the time goes."""
    import tempfile

    from accelerate import Accelerator
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    from cisformer.training import Cells
    from cisformer.training import Run as TrainingRun

    config = default_config(direction)
    cells = Cells.open(folder / "data", None, direction, 0)
    with tempfile.TemporaryDirectory() as save:
        training = TrainingRun(Accelerator(cpu=True), cells, config, direction, Path(save))
        started = time.process_time()
        checkpoint = training._linear_checkpoint()
        start_s = time.process_time() - started
    training.layout, training.reference = checkpoint.layout, checkpoint.reference
    training._prepare(checkpoint.model)
    training.model.train()
    batches = list(zip(range(n_steps + 2), training.batches.epoch(1), strict=False))

    def steps(some: list) -> int:
        for number, batch in some:
            rows, together = training.batches.step_rows(1, number)
            training._step(batch, len(rows), together, "benchmark")
        return sum(batch.n_cells for _, batch in some)

    steps(batches[:1])
    started = time.process_time()
    done = steps(batches[1 : n_steps + 1])
    cell_s = (time.process_time() - started) / done
    with FlopCounterMode(display=False) as counter:
        counted = steps(batches[-1:])
    flops = (counter.get_total_flops() + pool_flops(training, batches[-1][1])) / counted
    achieved = flops / cell_s / 1e9
    print(
        f"\n{direction} training, default configuration: {1 / cell_s:.1f} cells per CPU s "
        f"(closed-form start of {len(cells.train_rows)} cells: {start_s:.0f} CPU s); products of "
        f"{flops / 1e9:.2f} GFLOP a cell, {achieved:.0f} GFLOP/s, {achieved / rate:.0%} of the rate of a large one"
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps(batches[-1:])
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    shares = [f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}" for e in found[:12]]
    print(f"where a step goes: {', '.join(shares)}\n", flush=True)


def pool_flops(training: object, batch: object) -> float:
    """Return the operations of the latents' attention, forward and backward, which torch's counter leaves out."""
    pool = training.model.encoder.pool  # type: ignore[attr-defined]
    n_latents, heads, width = pool.query_LHR.shape
    indptr = batch.indptr if batch.token is None else batch.token_indptr  # type: ignore[attr-defined]
    products = 2 + 5  # scores and sum; and their gradients, the scores once more
    return products * 2.0 * n_latents * heads * width * int(indptr[-1])


def copy_rate() -> float:
    """Return GB/s, read and written, of copying 1 GB."""
    from full import least_cpu_seconds

    source = np.ones(2**27)
    target = np.empty_like(source)
    return 2 * source.nbytes / least_cpu_seconds(lambda: np.copyto(target, source), 3) / 1e9


if __name__ == "__main__":
    main()
