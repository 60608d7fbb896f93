"""Time training steps with our own attention and dropout beside torch's, in one run, step by step in turn.

    python benchmarks/kernels.py DATA DIRECTION [--preset default|small] [--architecture cis|full] [--steps 6]

DATA is a preprocessed folder. "own" is the code as it is. "torch" puts padded `scaled_dot_product_attention` in the
place of ragged attention (cis) or of the bfloat16 backward pass (full), and `nn.Dropout` in the place of ours.
Prints CPU seconds per step, and the ratio to "own".
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.config import default_config, parse_config
from cisformer.model import attention, bf16_attention, documented
from cisformer.training.loop import Run, closed_form_checkpoint, mixed_precision
from cisformer.training.split import CellSplit


def padded_attention(query: Tensor, token: Tensor, slot: Tensor, indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `ragged_attention` does, with torch's own attention over cells filled up to the longest."""
    lengths = indptr.diff()
    real = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    place = torch.zeros(real.shape, dtype=torch.int64)
    place[real] = slot
    rows = token[place] * real[..., None]
    mask = (real | (lengths == 0)[:, None])[:, None, None]
    queries = query.expand(len(lengths), 1, *query.shape)
    out = F.scaled_dot_product_attention(queries, rows[:, None], rows[:, None], attn_mask=mask, scale=1.0)
    return out.squeeze(1), rows.sum(dim=1) / lengths.clamp(min=1)[:, None]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return what `bf16_attention.attention` returns, by torch alone."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@contextmanager
def torch_kernels(what: str) -> Iterator[None]:
    """Put torch's kernels in the place of ours: "attention", "dropout", or "both"."""
    with ExitStack() as stack:
        if what in ("attention", "both"):
            stack.enter_context(mock.patch.object(attention, "ragged_attention", padded_attention))
            for module in (bf16_attention, documented):
                stack.enter_context(mock.patch.object(module, "attention", torch_attention))
        if what in ("dropout", "both"):
            stack.enter_context(mock.patch.object(attention.Dropout, "forward", nn.Dropout.forward))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("direction", choices=["rna2atac", "atac2rna"])
    parser.add_argument("--preset", default="default", choices=["default", "small"])
    parser.add_argument("--architecture", default="cis", choices=["cis", "full"])
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    content = default_config(options.direction, options.preset).model_dump()
    content["model"]["architecture"] = options.architecture
    if options.batch_size:
        content["training"]["batch_size"] = options.batch_size
    config = parse_config(content, options.direction)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision(cpu=True))
    cells = CellSplit.open(options.data, None, options.direction, 0)
    with tempfile.TemporaryDirectory() as save:
        start = closed_form_checkpoint(accelerator, cells, config, options.direction, Path(save))
        run = Run(accelerator, cells, config, Path(save), start)
    run.model.train()
    kernels = ("own", "attention", "dropout", "both")
    seconds = {name: [] for name in kernels}
    batches = run.batches.epoch(1, accelerator.device)
    for number, batch in zip(range(options.steps + 1), batches, strict=False):
        rows, together = run.batches.step_rows(1, number)
        for name in kernels:
            with torch_kernels(name):
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
