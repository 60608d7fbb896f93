"""Measure training and prediction: speed beside what the machine can do, growth, and presets.

    python benchmarks/engine.py WORK speed [--cells 1000] [--ccres 100000]
    python benchmarks/engine.py WORK growth [--cells 1000 10000 100000] [--ccres 40000 200000 1000000]
    python benchmarks/engine.py WORK presets [--cells 2000]
    python benchmarks/engine.py WORK start [--cells 1000] [--ccres 100000 1000000] [--directions atac2rna]
    python benchmarks/engine.py WORK threads [--cells 2000] [--directions atac2rna]
    python benchmarks/engine.py WORK step [--cells 1000] [--ccres 100000 1000000] [--presets small]

`speed` takes training steps and predicts cells in this process, one thread, and runs the prediction commands. The
operations of matrix products are counted, and the bytes that go into and come out of every operator, and stand
beside the rates of a 4096 × 4096 product and of copying 1 GB, measured in the same run; then where the time of a step
goes, and what `compile` changes. What stays in cache between two operators counts as bytes, so that their rate may
pass that of copying. `growth` runs whole commands with the small preset and one epoch, on cells with 2,000 genes and
6,000 open cCREs each, human reference, over the number of cells at 100,000 cCREs and over the number of cCREs at
1,000 cells, and fits exponents. `presets` trains both presets on simulated cells with planted links (5,000 genes,
40,000 cCREs) and scores the test cells. `start` fits the closed form alone, in this process, to cells as those of
`growth`; `step` takes training steps after it, sizes in turn, and prints their median, for ATAC→RNA also of the
batches of the first set with their cCREs spread over those of the other sets: what a batch reads stays the same, the
tables alone grow. `threads` trains cells as those of `presets` for one epoch with one and two threads, alone and beside
busy processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from preprocess import Run, run, simulate

from cisformer.config import DIRECTIONS, Config, Direction, Preset, default_config, dump_config

CISFORMER = [sys.executable, "-m", "cisformer"]
GROWTH_CCRES, GROWTH_CELLS = 100_000, 1_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("what", choices=["speed", "growth", "presets", "start", "step", "threads"])
    parser.add_argument("--cells", type=int, nargs="+")
    parser.add_argument("--ccres", type=int, nargs="+")
    parser.add_argument("--over", nargs="+", default=["cells", "cCREs"], choices=["cells", "cCREs"])
    parser.add_argument("--presets", nargs="+", default=["small", "default"], choices=["small", "default"])
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="busy processes beside `threads`")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"python {platform.python_version()}, numpy {np.__version__}, seed {options.seed}")
    modes = {
        "speed": speed,
        "growth": growth,
        "presets": presets,
        "start": start,
        "step": step,
        "threads": threads,
    }
    modes[options.what](options)


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
        for name in options.over:
            sizes = over[name]
            print(f"\n{direction}, over {name}\n")
            print(
                "| cells | cCREs | training CPU s | peak GB | without mapped files | prediction CPU s a cell "
                "| peak GB | model MB |"
            )
            print("|---|---|---|---|---|---|---|---|")
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
        f"| {n_cells:,} | {n_ccres:,} | {trained.cpu_s:.0f} | {trained.peak_gb:.2f} | {trained.own_gb:.2f} "
        f"| {predicted.cpu_s / n_test:.3f} | {predicted.peak_gb:.2f} | {size:.0f} |",
        flush=True,
    )
    shutil.rmtree(folder / "save")
    return trained.cpu_s, trained.own_gb


# ---------------------------------------------------------------------------------------------- start


def start(options: argparse.Namespace) -> None:
    """Print CPU seconds of the closed-form start."""
    import torch

    from cisformer.training.loop import _fit
    from cisformer.training.split import CellSplit

    torch.set_num_threads(1)
    for direction in options.directions:
        for n_cells in options.cells or (GROWTH_CELLS,):
            for n_ccres in options.ccres or (100_000, 1_000_000):
                data = cells_on_disk(options, n_cells, n_ccres, direction) / "data"
                cells = CellSplit.open(data, None, direction, 0)
                began = time.process_time()
                _fit(cells, default_config(direction, "small"), direction)
                took = time.process_time() - began
                print(f"{direction}, {n_cells:,} cells, {n_ccres:,} cCREs: {took:.1f} CPU s", flush=True)


# ---------------------------------------------------------------------------------------------- step


def step(options: argparse.Namespace, n_steps: int = 9) -> None:
    """Print the CPU seconds of a training step over the number of cCREs: the median, sizes in turn."""
    import torch
    from accelerate import Accelerator

    from cisformer.training.loop import mixed_precision

    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision(cpu=True))
    n_cells, sizes = (options.cells or [GROWTH_CELLS])[0], options.ccres or (100_000, 1_000_000)
    for direction in options.directions:
        for preset in options.presets:
            config = default_config(direction, preset)
            runs = {}
            for n in sizes:
                folder = cells_on_disk(options, n_cells, n, direction)
                runs[f"{n:,} cCREs"] = Steps.prepared(folder, direction, config, accelerator, n_steps)
            if direction == "atac2rna":
                first, *others = list(runs)
                runs |= {
                    f"{name}, batches of the first": runs[first].spread(runs[name].run) for name in others
                }
            took = np.zeros((n_steps, len(runs)))
            for at in range(n_steps):
                for column, steps in enumerate(runs.values()):
                    began = time.process_time()
                    steps.take([(steps.first + steps.others)[at]])
                    took[at, column] = time.process_time() - began
            median = np.median(took[1:], axis=0)
            for (name, steps), seconds in zip(runs.items(), median, strict=True):
                read = np.median([len(batch.index.unique()) for _, batch in steps.others])
                print(
                    f"{direction}, {preset}, {name}: {seconds:.3f} CPU s a step, {seconds / median[0]:.2f} of the "
                    f"first; {read:,.0f} distinct inputs a batch",
                    flush=True,
                )


# ---------------------------------------------------------------------------------------------- presets


def planted_cells(options: argparse.Namespace, n_cells: int, direction: Direction) -> Path:
    """Simulate and preprocess cells with planted links if that has not been done; return their folder."""
    folder = options.work / f"presets_{n_cells}"
    if not (folder / "rna.h5ad").exists():
        folder.mkdir()
        run(
            [*CISFORMER, "simulate", "-o", ".", "--n_cells", str(n_cells), "--seed", str(options.seed)],
            folder,
        )
    if not (folder / "data" / f"{direction}_train").exists():
        flags = ["--atac2rna"] if direction == "atac2rna" else []
        run([*CISFORMER, "data_preprocess", "-r", "rna.h5ad", "-a", "atac.h5ad", "-s", "data",
             "--reference", "dataset", *flags], folder)  # fmt: skip
    return folder


def presets(options: argparse.Namespace) -> None:
    """Print time, memory and accuracy of the presets on simulated cells with planted links."""
    n_cells = (options.cells or [2_000])[0]
    shown = {"rna2atac": ("log_loss", "ccre_auroc"), "atac2rna": ("r2", "gene_pearson")}
    print(
        "| direction | preset | CPU s | wall s | peak GB | model MB | epochs | best | scores of test cells |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for direction in options.directions:
        folder = planted_cells(options, n_cells, direction)
        for preset in options.presets:
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
                f"| {direction} | {preset} | {took.cpu_s:.0f} | {took.wall_s:.0f} | {took.peak_gb:.2f} | {size:.0f} "
                f"| {len(history) - 1} | {best} | {text} |",
                flush=True,
            )


# ---------------------------------------------------------------------------------------------- threads


def threads(options: argparse.Namespace) -> None:
    """Print what one epoch of training by command takes with one and two threads, alone and beside busy processes."""
    ways: tuple[dict[str, str], ...] = ({}, {"OMP_WAIT_POLICY": "PASSIVE"})
    print("| direction | busy beside | threads | environment | CPU s | wall s | cells a second |")
    print("|---|---|---|---|---|---|---|")
    for direction in options.directions:
        folder = planted_cells(options, (options.cells or [2_000])[0], direction)
        for n_busy in options.busy:
            busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_busy)]
            try:
                for n_threads, way in ((1, {}), *((2, way) for way in ways)):
                    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": str(n_threads), **way}):
                        took, model = train(folder, direction, "small", epochs=1)
                    last = json.loads((model / "metrics.jsonl").read_text().splitlines()[-1])
                    print(
                        f"| {direction} | {n_busy} | {n_threads} | {way or 'as it is'} | {took.cpu_s:.0f} "
                        f"| {took.wall_s:.0f} | {last['cells_per_second']:.0f} |",
                        flush=True,
                    )
            finally:
                for process in busy:
                    process.kill()
                    process.wait()


# ---------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Machine:
    """What this machine does in the same run: GFLOP/s of a product, GB/s of copying."""

    product: float
    copying: float

    @classmethod
    def measured(cls) -> Machine:
        import torch
        from full import product_rate

        return cls(product_rate(torch.float32), copy_rate())

    def beside(self, work: Work, n_cells: int, cpu_s: float) -> str:
        """Say how fast some work was, and which shares of the machine's rates that is."""
        flops, gb = (x / cpu_s / 1e9 for x in (work.flops, work.n_bytes))
        return (
            f"{n_cells / cpu_s:.1f} cells per CPU s; a cell: {work.flops / n_cells / 1e9:.2f} GFLOP of products "
            f"({flops:.0f} GFLOP/s, {flops / self.product:.0%} of the rate), {work.n_bytes / n_cells / 1e9:.3f} GB "
            f"through operators ({gb:.1f} GB/s, {gb / self.copying:.0%} of the rate of copying)"
        )


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, and bytes of what went into and came out of operators."""

    flops: float
    n_bytes: float


def work_of(function: Callable[[], object]) -> Work:
    """Run a function and count its work."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import FlopCounterMode

    class Bytes(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if (
                func.overloadpacket is torch.ops.aten.index_select
            ):  # not the whole table: rows read and written
                moved = [out, out, args[2]]
            elif func.overloadpacket is torch.ops.aten.index_add_:  # rows read, added, written
                moved = [args[3], args[3], args[3], args[2]]
            else:
                moved = [] if func.is_view else tree_leaves((args, kwargs, out))
            self.total += sum(x.numel() * x.element_size() for x in moved if isinstance(x, torch.Tensor))
            return out

    with Bytes() as counted:
        function()
    in_place = {
        torch.ops.aten.addmm_: lambda _own, a, b, **_rest: 2 * a[0] * a[1] * b[1]
    }  # not known to torch
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        function()
    return Work(counter.get_total_flops(), counted.total)


def speed(options: argparse.Namespace) -> None:
    """Print rates of training and prediction beside those of the machine."""
    import torch

    torch.set_num_threads(1)
    n_cells, n_ccres = (options.cells or [1_000])[0], (options.ccres or [100_000])[0]
    machine = Machine.measured()
    print(f"torch {torch.__version__}, one thread, {n_cells:,} cells, {n_ccres:,} cCREs")
    print(f"matrix product: {machine.product:.0f} GFLOP/s in float32; copying: {machine.copying:.1f} GB/s")
    for direction in options.directions:
        folder = cells_on_disk(options, n_cells, n_ccres, direction)
        for preset in options.presets:
            print(f"\n## {direction}, preset {preset}\n")
            measure_training(folder, direction, preset, machine)
            _, model = train(folder, direction, preset, epochs=0)
            measure_prediction(folder, direction, model, machine)
    print(f"\nafterwards: {Machine.measured()}")


def measure_prediction(folder: Path, direction: Direction, model: Path, machine: Machine) -> None:
    """Print cells per CPU second of the prediction command, and without its start; write included."""
    import cisformer
    from cisformer.data.batches import encode_input, read_modality
    from cisformer.data.store import CellStore

    took, n_test = predict(folder, direction, model)
    print(
        f"prediction of {n_test} cells, whole command: {took.cpu_s:.1f} CPU s, {n_test / took.cpu_s:.1f} cells per "
        f"CPU s, {n_test / took.wall_s:.1f} a second"
    )
    shutil.rmtree(folder / "output")
    checkpoint = cisformer.load_checkpoint(model / "best")
    cells, written = folder / "data" / f"{direction}_train", folder / "predicted.h5ad"
    started, clock = time.process_time(), time.perf_counter()
    cisformer.predict(checkpoint, cells, output=written, device="cpu", force=True)
    cpu_s, wall_s = time.process_time() - started, time.perf_counter() - clock
    store, layout = CellStore.open(cells), checkpoint.layout
    batch = encode_input(read_modality(store, np.arange(16), layout.input_modality), layout, None, None)
    work = work_of(lambda: checkpoint.model.predict(batch))
    of_all = Work(work.flops * store.n_cells / 16, work.n_bytes * store.n_cells / 16)
    print(
        f"prediction of {store.n_cells} cells without the program's start: "
        f"{machine.beside(of_all, store.n_cells, cpu_s)}; "
        f"{store.n_cells / wall_s:.1f} a second, {written.stat().st_size / 1e9:.2f} GB written",
        flush=True,
    )
    written.unlink()


@dataclass
class Steps:
    """Training steps of a run that stands at its start: the first, to warm up, and others."""

    run: Any
    first: list
    others: list

    @classmethod
    def prepared(
        cls, folder: Path, direction: Direction, config: Config, accelerator: Any, n_steps: int
    ) -> Steps:
        """Fit the closed form to the training cells of `folder` and make `n_steps` batches and one."""
        import tempfile

        from cisformer.training.loop import Run as TrainingRun
        from cisformer.training.loop import closed_form_checkpoint
        from cisformer.training.split import CellSplit

        cells = CellSplit.open(folder / "data", None, direction, 0)
        with tempfile.TemporaryDirectory() as save:
            start = closed_form_checkpoint(accelerator, cells, config, direction, Path(save))
            run = TrainingRun(accelerator, cells, config, Path(save), start)
        run.model.train()
        batches = run.batches.epoch(1, accelerator.device)
        made = list(zip(range(n_steps + 1), batches, strict=False))
        return cls(run, made[:1], made[1:])

    def spread(self, run: Any) -> Steps:
        """Return these batches as batches of another run: their cCREs at random places among its more cCREs."""
        import torch

        n_own, n_all = (len(x.batches.layout.input_index) for x in (self.run, run))
        rng = np.random.default_rng(0)

        def moved(batch: Any) -> Any:
            place = torch.from_numpy(np.sort(rng.choice(n_all, n_own, replace=False)))
            return replace(batch, index=place[batch.index])

        first, others = (
            [(number, moved(batch)) for number, batch in part] for part in (self.first, self.others)
        )
        return Steps(run, first, others)

    def take(self, some: list) -> int:
        """Take some of the steps; return their number of cells."""
        for number, batch in some:
            rows, together = self.run.batches.step_rows(1, number)
            self.run._step(batch, len(rows), together, "benchmark")
        return sum(batch.n_cells for _, batch in some)


def measure_training(
    folder: Path, direction: Direction, preset: Preset, machine: Machine, n_steps: int = 4
) -> None:
    """Print cells per CPU second of training steps, plain and compiled, and where the time goes."""
    from accelerate import Accelerator
    from torch.profiler import ProfilerActivity, profile

    from cisformer.training.loop import mixed_precision

    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision(cpu=True))
    started = time.process_time()
    steps = Steps.prepared(folder, direction, default_config(direction, preset), accelerator, n_steps)
    start_s = time.process_time() - started

    def cpu_seconds() -> float:
        steps.take(steps.first)
        started = time.process_time()
        n_cells = steps.take(steps.others)
        return (time.process_time() - started) / n_cells

    cell_s, some = cpu_seconds(), steps.others[:1]
    work, n_cells = work_of(lambda: steps.take(some)), some[0][1].n_cells
    print(
        f"training, precision {accelerator.mixed_precision}: {machine.beside(work, n_cells, cell_s * n_cells)}; "
        f"closed-form start of {len(steps.run.cells.train_rows)} cells: {start_s:.0f} CPU s"
    )
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps.take(some)
    found = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in found)
    shares = [f"{e.key.removeprefix('aten::')} {e.self_cpu_time_total / total:.0%}" for e in found[:12]]
    print(f"where a step goes: {', '.join(shares)}")
    started = time.process_time()
    steps.run.network.compile_blocks()
    steps.take(steps.first)
    first_s = time.process_time() - started
    print(f"compiled: {cell_s / cpu_seconds():.2f} times as fast, first step {first_s:.0f} CPU s", flush=True)


def copy_rate() -> float:
    """Return GB/s, read and written, of copying 1 GB."""
    from full import least_cpu_seconds

    source = np.ones(2**27)
    target = np.empty_like(source)
    return 2 * source.nbytes / least_cpu_seconds(lambda: np.copyto(target, source), 3) / 1e9


if __name__ == "__main__":
    main()
