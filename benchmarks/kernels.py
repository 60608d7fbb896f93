"""Time training steps of architecture full with our bfloat16 backward pass, and with torch's, step by step in turn.

    python benchmarks/kernels.py DATA DIRECTION [--batch_size 2] [--steps 6]

DATA is a preprocessed folder. Prints CPU seconds per step, and the ratio to our own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from cisformer.config import default_config, parse_config
from cisformer.model import bf16_attention, documented
from cisformer.training.loop import Run, closed_form_checkpoint, mixed_precision
from cisformer.training.split import CellSplit


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what `bf16_attention.attention` returns, by torch alone."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("direction", choices=["rna2atac", "atac2rna"])
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    content = default_config(options.direction).model_dump()
    content["model"]["architecture"] = "full"
    content["training"]["batch_size"] = options.batch_size
    config = parse_config(content, options.direction)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision(cpu=True))
    cells = CellSplit.open(options.data, None, options.direction, 0)
    with tempfile.TemporaryDirectory() as save:
        start = closed_form_checkpoint(accelerator, cells, config, options.direction, Path(save))
        run = Run(accelerator, cells, config, Path(save), start)
    run.model.train()
    kernels = {"own": bf16_attention.attention, "torch": torch_attention}
    seconds: dict[str, list[float]] = {name: [] for name in kernels}
    batches = run.batches.epoch(1, accelerator.device)
    for number, batch in zip(range(options.steps + 1), batches, strict=False):
        rows, together = run.batches.step_rows(1, number)
        for name, kernel in kernels.items():
            with mock.patch.object(documented, "attention", kernel):
                started = time.process_time()
                run._step(batch, len(rows), together, "benchmark")
                seconds[name].append(time.process_time() - started)
    print(f"torch {torch.__version__}, {accelerator.mixed_precision}, {torch.get_num_threads()} thread(s)")
    middle = {name: sorted(values[1:])[len(values[1:]) // 2] for name, values in seconds.items()}
    for name, value in middle.items():
        print(
            f"{name:10s} {value:8.3f} CPU s a step of {batch.n_cells} cells, {value / middle['own']:.2f} × own"
        )


if __name__ == "__main__":
    main()
