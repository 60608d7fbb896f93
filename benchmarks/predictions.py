"""Measure the two forms of a RNA→ATAC prediction: size, time and memory of whole commands, and that both agree.

    python benchmarks/predictions.py WORK [--cells 10000] [--ccres 100000] [--full_cells 200] [--preset default]

Simulated cells with 2,000 genes and 6,000 open cCREs each, human reference; the model is trained for one epoch. The
compact form is written of all cells, the full matrix of `--full_cells` test cells. `start` is the command on one cell.
Then `expand` of one region, and of the means of two groups, is compared with the full matrix of the same cells.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import anndata
import numpy as np
from engine import CISFORMER, cells_on_disk, train
from preprocess import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--ccres", type=int, default=100_000)
    parser.add_argument("--full_cells", type=int, default=200)
    parser.add_argument("--preset", default="default", choices=["default", "small"])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = cells_on_disk(options, options.cells, options.ccres, "rna2atac")
    _, model = train(folder, "rna2atac", options.preset, 1)
    rna = anndata.read_h5ad(folder / "rna.h5ad")
    rna.obs["half"] = np.where(np.arange(rna.n_obs) % 2, "odd", "even")
    for name, part in {"all": rna, "some": rna[: options.full_cells], "one": rna[:1]}.items():
        part.write_h5ad(folder / f"{name}.h5ad")
    print(
        f"python {sys.version.split()[0]}, numpy {np.__version__}, seed {options.seed}, preset {options.preset}"
    )
    print("| form | cells | CPU s | wall s | cells per CPU s after the start | peak GB | MB |")
    print("|---|---|---|---|---|---|---|")
    start = measure(folder, model, "one", 1, "--compact", 0.0)
    measure(folder, model, "all", rna.n_obs, "--compact", start)
    measure(folder, model, "some", options.full_cells, "--full", start)
    compare(folder, model)


def measure(folder: Path, model: Path, name: str, n_cells: int, form: str, start: float) -> float:
    """Print what a prediction command took; return its CPU seconds."""
    command = [*CISFORMER, "rna2atac_predict", "-r", f"{name}.h5ad", "-m", str(model), "-n", name, form, "--force",
               "--batch_size", "16"]  # fmt: skip
    took = run(command, folder)
    size = (folder / "output" / f"{name}.h5ad").stat().st_size / 1e6
    rate = f"{n_cells / (took.cpu_s - start):,.0f}" if start else "(start)"
    print(
        f"| {form[2:]} | {n_cells:,} | {took.cpu_s:.1f} | {took.wall_s:.1f} | {rate} | {took.peak_gb:.2f} "
        f"| {size:,.0f} |",
        flush=True,
    )
    return took.cpu_s


def compare(folder: Path, model: Path) -> None:
    """Print the largest difference between expanded parts and the full matrix."""
    full = anndata.read_h5ad(folder / "output" / "some.h5ad")
    measure(folder, model, "some", full.n_obs, "--compact", 0.0)
    region = full.var_names[len(full.var_names) // 2]
    for label, flags in {"region": ["--region", region], "groups": ["--groupby", "half"]}.items():
        took = run(
            [*CISFORMER, "expand", "-i", "output/some.h5ad", "-o", f"{label}.h5ad", *flags, "--force"], folder
        )
        part = anndata.read_h5ad(folder / f"{label}.h5ad")
        wanted = full[:, part.var_names].X
        wanted = wanted.toarray() if hasattr(wanted, "toarray") else np.asarray(wanted)
        if label == "groups":
            half = full.obs["half"].astype(str).to_numpy()
            wanted = np.stack([wanted[half == name].mean(axis=0) for name in part.obs_names])
        difference = np.abs(part.X - wanted).max()
        print(f"expand {' '.join(flags)}: {took.cpu_s:.1f} CPU s, largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
