"""CPU time of the documented architecture at the documented sizes, beside the machine's matrix products.

    python benchmarks/full.py [--cells 3] [--ccres 65536] [--published ENV --work FOLDER]

All on one thread and in CPU-seconds, the least of a few repeats, since other work on a machine only ever
adds. Rates count the operations of the published definition (a multiply-add is 2; a training step 3 forward
passes), without what is computed twice or on padding. The share is that of a 4096 × 4096 product of the same
precision, measured before and after.

With --published, the published tool is trained for one epoch on the same sizes in the same run. ENV is a
Python environment that has it (`ENV/bin/cisformer`); FOLDER holds `cisformer_config/` (documented sizes,
batch_size 2, num_workers 1, an Accelerate file for one CPU process) and, per direction, `atac2rna/` and
`rna2atac/` with a few cells of shards as its `data_preprocess` wrote them. CPU time is read when its log
announces a step.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import re
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from cisformer.config import DIRECTIONS, Direction, default_config
from cisformer.model import documented
from cisformer.model.bf16_attention import attention
from cisformer.model.documented import FullModel

N_CCRES, N_GENES = 1_033_239, 38_244
SIZES = {"atac2rna": (10_000, 3_000), "rna2atac": (2_048, 2_048)}
PREDICTION_GENES = 3_600
PUBLISHED_BATCH = 2


def least_cpu_seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the CPU time of the fastest of some runs, after one to warm up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def product_rate(dtype: torch.dtype) -> float:
    """Return GFLOP/s of a 4096 × 4096 matrix product."""
    a = torch.randn(4096, 4096).to(dtype)
    return 2 * 4096**3 / least_cpu_seconds(lambda: a @ a, 3) / 1e9


def forward_flops(direction: Direction, n_context: float, n_queries: float, dropout: float = 0.0) -> float:
    """Return the operations of a forward pass of one cell, of whose tokens attention is shown all but `dropout`."""
    model = default_config(direction).model
    inner, among = model.dec_heads * model.dec_dim_head, n_queries if direction == "atac2rna" else 0
    seen = (1 - dropout) * (n_context + among)
    queried = n_queries + among
    projections = 2 * (queried + seen) * inner * model.dim
    attention_products = 2 * n_queries * seen * inner
    feed_forward = 2 * n_queries * model.dec_ff_mult * model.dim**2
    return 2 * model.dec_depth * (projections + attention_products + feed_forward)


def make_tokens(
    direction: Direction, n_cells: int, n_context: int, n_queries: int
) -> dict[str, torch.Tensor]:
    """Return random tokens without padding."""
    n_ccres, n_genes = (n_context, n_queries) if direction == "atac2rna" else (n_queries, n_context)
    tokens = {
        "ccre_index": torch.stack([torch.randperm(N_CCRES)[:n_ccres] for _ in range(n_cells)]),
        "gene_index": torch.stack([torch.randperm(N_GENES)[:n_genes] for _ in range(n_cells)]),
    }
    if direction == "rna2atac":
        tokens["gene_value"] = torch.randint(1, 65, (n_cells, n_genes))
    return tokens


def measure_attention(direction: Direction, repeats: int) -> tuple[float, float]:
    """Return GFLOP/s of attention alone, forward and in training, at the cross-attention's size."""
    model, (n_context, n_queries) = default_config(direction).model, SIZES[direction]
    shapes = [(1, model.dec_heads, n, model.dec_dim_head) for n in (n_queries, n_context, n_context)]
    q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for shape in shapes)
    flops = 4 * model.dec_heads * model.dec_dim_head * n_queries * n_context
    with torch.no_grad():
        forward = least_cpu_seconds(lambda: attention(q, k, v), repeats)
    weight = torch.randn(q.shape).bfloat16()
    training = least_cpu_seconds(lambda: attention(q, k, v).backward(weight), repeats)
    return flops / forward / 1e9, 3 * flops / training / 1e9


def measure_step(direction: Direction, n_cells: int, repeats: int, bf16: bool) -> float:
    """Return CPU-seconds per cell of a training step: forward, backward, AdamW, dropout on."""
    model = FullModel(default_config(direction).model, direction).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = make_tokens(direction, n_cells, *SIZES[direction])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(**tokens)
        if direction == "atac2rna":
            target = torch.randint(logits.shape[-1], logits.shape[:2])
            loss = F.cross_entropy(logits.float().transpose(1, 2), target)
        else:
            loss = F.binary_cross_entropy_with_logits(logits.float(), torch.rand_like(logits.float()).round())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return least_cpu_seconds(step, repeats) / n_cells


def measure_prediction(n_ccres: int, repeats: int) -> float:
    """Return CPU-seconds to predict all cCREs of one cell of 3,600 genes, from a share of them."""
    model = FullModel(default_config("rna2atac").model, "rna2atac").eval()
    tokens = make_tokens("rna2atac", 1, PREDICTION_GENES, n_ccres)

    def encode() -> list[documented.Keys]:
        return model.encode(tokens["gene_index"], tokens["gene_value"])

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        once = least_cpu_seconds(encode, repeats)
        context = encode()
        rest = least_cpu_seconds(lambda: list(model.decode_chunks(context, tokens["ccre_index"])), repeats)
    return once + rest * N_CCRES / n_ccres


def session_cpu_seconds(session: int) -> float:
    """Return the CPU time of all processes of a session so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_published(direction: Direction, env: Path, work: Path) -> float:
    """Return CPU-seconds per cell of a training step of the published tool.

    ATAC→RNA: least difference between two steps that its log announces, without the last, which may be of one
    cell. RNA→ATAC: its progress bar from none to all cells of the shard.
    """
    command = [env.resolve() / "bin" / "cisformer", f"{direction}_train", "-n", "timing", "-s", "save"]
    command += ["-d", direction] if direction == "atac2rna" else ["-t", direction, "-v", direction]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{env.resolve()}/bin:{os.environ['PATH']}"}
    process = subprocess.Popen(
        command, cwd=work, env=environment, start_new_session=True, bufsize=0,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    times, text = [], ""
    mark = r"Train\tepoch: 1\titer" if direction == "atac2rna" else r"Training epoch 1: +(0|100)%"
    while piece := process.stdout.read(65536):
        seen = len(re.findall(mark, text))
        text += piece.decode(errors="replace")
        times += [session_cpu_seconds(process.pid)] * (len(re.findall(mark, text)) - seen)
    process.wait()
    if direction == "atac2rna":
        return min(b - a for a, b in itertools.pairwise(times[:-1])) / PUBLISHED_BATCH
    shard = next((work / direction).glob("*.pt"))
    return (times[1] - times[0]) / len(torch.load(shard, weights_only=True)[0])


def report(name: str, seconds: float, flops: float, rate: float, published: float | None) -> None:
    """Print one row of the table."""
    ratio = f"{published / seconds:6.1f}x of {published:.1f}" if published else ""
    share = flops / seconds / 1e9 / rate
    print(
        f"{name:44s} {seconds:9.2f} CPU-s {flops / seconds / 1e9:7.0f} GFLOP/s {share:5.0%} {ratio}",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=4, help="cells in a step of RNA→ATAC")
    parser.add_argument("--ccres", type=int, default=65_536, help="cCREs to predict; scaled up to all")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--no-float32", action="store_true", help="leave out the step in float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--published", type=Path, help="environment of the published tool")
    parser.add_argument("--work", type=Path, help="its working folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    print(f"torch {torch.__version__}, python {platform.python_version()}, seed {options.seed}, one thread")
    rates = {bf16: product_rate(torch.bfloat16 if bf16 else torch.float32) for bf16 in (False, True)}
    print(f"matrix product: float32 {rates[False]:.0f}, bfloat16 {rates[True]:.0f} GFLOP/s")
    for direction in DIRECTIONS:
        published = None
        if options.published:
            published = measure_published(direction, options.published, options.work)
        forward, training = measure_attention(direction, options.repeats)
        print(
            f"{direction} attention: forward {forward:.0f} GFLOP/s ({forward / rates[True]:.0%}), "
            f"training {training:.0f} GFLOP/s ({training / rates[True]:.0%})"
        )
        n_cells = 1 if direction == "atac2rna" else options.cells
        flops = 3 * forward_flops(
            direction, *SIZES[direction], default_config(direction).model.dec_attn_dropout
        )
        for bf16 in (True,) if options.no_float32 else (True, False):
            seconds = measure_step(direction, n_cells, options.repeats if bf16 else 1, bf16)
            name = f"{direction} training step, {'bfloat16' if bf16 else 'float32'}, a cell"
            report(name, seconds, flops, rates[bf16], published)
    seconds = measure_prediction(options.ccres, options.repeats)
    report(
        "rna2atac prediction, bfloat16, a cell",
        seconds,
        forward_flops("rna2atac", PREDICTION_GENES, N_CCRES),
        rates[True],
        None,
    )
    after = product_rate(torch.bfloat16)
    print(f"matrix product afterwards: bfloat16 {after:.0f} GFLOP/s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")


if __name__ == "__main__":
    main()
