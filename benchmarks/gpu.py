"""Measure training and prediction on a GPU: speed, memory, share of its peak, precision and compiling compared.

    python benchmarks/gpu.py WORK [--cells 1000] [--ccres 100000] [--device cuda]

Cells as in `engine.py` (2,000 genes and 6,000 open cCREs each, human reference). For both directions and presets:
training steps in float32, bfloat16 and float16, plain and compiled, with cells a second, largest memory, and the share
that products have of the rate of an 8192 × 8192 product in the same precision in the same run; then prediction of
the training cells, its write included. `--device cpu` tries the script where there is no GPU. Correctness is the
matter of tests/test_gpu.py.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from engine import Steps, cells_on_disk, train, work_of

from cisformer import load_checkpoint, predict
from cisformer.config import DIRECTIONS, Direction, default_config

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--cells", type=int, default=1_000)
    parser.add_argument("--ccres", type=int, default=100_000)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--presets", nargs="+", default=["small", "default"], choices=["small", "default"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    print(f"python {platform.python_version()}, torch {torch.__version__}, {name}, seed {options.seed}")
    for direction in options.directions:
        folder = cells_on_disk(options, options.cells, options.ccres, direction)
        print(
            "\n| direction | preset | precision | compiled | cells a second | peak GB | share of a product's rate |"
        )
        print("|---|---|---|---|---|---|---|")
        for preset in options.presets:
            config = default_config(direction, preset)
            for precision in ("no", "bf16") if options.device == "cpu" else DTYPES:
                training_rows(options.device, folder, direction, preset, config, precision)
        for preset in options.presets:
            prediction_row(options.device, folder, direction, preset)


def training_rows(
    device: str, folder: Path, direction: Direction, preset: str, config: object, precision: str
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process otherwise
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    steps = Steps.prepared(folder, direction, config, accelerator, 8)  # type: ignore[arg-type]
    rate = product_rate(device, DTYPES[precision])
    some = steps.others[:1]
    flops = work_of(lambda: steps.take(some)).flops / some[0][1].n_cells
    for compiled in (False, True):
        if compiled:
            steps.run.network.compile_blocks()
        seconds, peak = timed(
            device, lambda: steps.take(steps.others), warm_up=lambda: steps.take(steps.others)
        )
        n_cells = sum(batch.n_cells for _, batch in steps.others)
        share = flops * n_cells / seconds / rate
        print(
            f"| {direction} | {preset} | {precision} | {compiled} | {n_cells / seconds:.0f} | {peak:.2f} "
            f"| {share:.1%} |",
            flush=True,
        )


def prediction_row(device: str, folder: Path, direction: Direction, preset: str) -> None:
    _, model = train(folder, direction, preset, epochs=0)  # type: ignore[arg-type]
    checkpoint = load_checkpoint(model / "best")
    cells, written = folder / "data" / f"{direction}_train", folder / "predicted.h5ad"
    write = lambda: predict(checkpoint, cells, output=written, device=device, force=True)  # noqa: E731
    seconds, peak = timed(device, write, warm_up=write)
    n_cells = len((cells / "barcodes.txt").read_text().split())
    print(
        f"{direction}, preset {preset}: {n_cells} cells predicted and written, {n_cells / seconds:.0f} a second, "
        f"{peak:.2f} GB on the device",
        flush=True,
    )
    written.unlink()


def timed(device: str, function: Callable[[], object], warm_up: Callable[[], object]) -> tuple[float, float]:
    """Return wall seconds and largest memory on the device in GB."""
    warm_up()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Return operations a second of a matrix product."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device).to(dtype)
    seconds, _ = timed(device, lambda: [a @ a for _ in range(10)], warm_up=lambda: a @ a)
    return 10 * 2 * size**3 / seconds


if __name__ == "__main__":
    main()
