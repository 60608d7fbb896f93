"""Run every stage on as many cells as wanted, as commands, and measure each: time, memory, disk.

    python benchmarks/million.py WORK --cells 1000000 [--depth 0.05] [--stages simulate preprocess train …]

Shallow simulated cells (`simulate --depth`; at 0.05 about 250 genes and 490 open cCREs each) of 10,000 genes and
100,000 cCREs, human reference. `train` is `atac2rna_train`, preset small with batches of 128 and 1,000 targets a cell,
one epoch, ended by SIGKILL in that epoch and finished with `--resume`; `start` is `rna2atac_train` with `epoch: 0`, the
closed form, on the first shard (10,000 cells) and validated on the second; `predict` reads all cells from `rna.h5ad`
and writes their accessibility in the compact form; `link` takes 200 cells a type. A stage that WORK/stages.json has is
not run again. Memory is the largest of the stage, with and without mapped files; disk is what the stage left.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from preprocess import Run, run

from cisformer.config import Direction, default_config, dump_config

CISFORMER = [sys.executable, "-m", "cisformer"]
N_GENES, N_CCRES = 10_000, 100_000
CELLS_PER_TYPE = 200
BATCH_SIZE, TARGETS = 128, 1000
SECONDS_INTO_EPOCH = 20


def simulate(work: Path, options: argparse.Namespace) -> list[Run]:
    sizes = {"n_cells": options.cells, "n_genes": N_GENES, "n_ccres": N_CCRES, "depth": options.depth}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    return [run([*CISFORMER, "simulate", "-o", ".", "--seed", str(options.seed), "--force", *flags], work)]


def preprocess(work: Path, options: argparse.Namespace) -> list[Run]:
    flags = ["--atac2rna", "--num_workers", "2", "--force"]
    return [
        run([*CISFORMER, "data_preprocess", "-r", "rna.h5ad", "-a", "atac.h5ad", "-s", "data", *flags], work)
    ]


def train(work: Path, options: argparse.Namespace) -> list[Run]:
    """Train one epoch, killed once in it and resumed."""
    command = [*CISFORMER, "atac2rna_train", "-d", "data", "-n", "million", "-s", "save", "-c"]
    command.append(configuration(work, "atac2rna", epoch=1))
    killed = run(command, work, kill_after=("epoch 0 (closed form)", SECONDS_INTO_EPOCH))
    return [killed, run([*command, "--resume", str(newest(work / "save"))], work)]


def start(work: Path, options: argparse.Namespace) -> list[Run]:
    shards = [text for flag, number in (("-t", 0), ("-v", 1)) for text in (flag, shard(number))]
    flags = ["-n", "start", "-s", "save_rna2atac", "-c", configuration(work, "rna2atac", epoch=0)]
    return [run([*CISFORMER, "rna2atac_train", *shards, *flags], work)]


def predict(work: Path, options: argparse.Namespace) -> list[Run]:
    model = newest(work / "save_rna2atac")
    flags = ["-m", str(model), "--compact", "-o", "predicted", "--force"]
    return [run([*CISFORMER, "rna2atac_predict", "-r", "rna.h5ad", *flags], work)]


def link(work: Path, options: argparse.Namespace) -> list[Run]:
    flags = ["-m", str(newest(work / "save")), "-n", str(CELLS_PER_TYPE), "-o", "links", "--force"]
    return [
        run(
            [*CISFORMER, "atac2rna_link", "-d", "data/atac2rna_train", "-c", "celltype_info.tsv", *flags],
            work,
        )
    ]


STAGES = {
    "simulate": simulate,
    "preprocess": preprocess,
    "train": train,
    "start": start,
    "predict": predict,
    "link": link,
}


def configuration(work: Path, direction: Direction, epoch: int) -> str:
    """Write the small preset with so many epochs, larger batches and fewer targets a cell; return its file's name."""
    config = default_config(direction, "small")
    training = config.training.model_copy(update={"epoch": epoch, "batch_size": BATCH_SIZE})
    drawn = config.datapreprocess.model_copy(update={"dec_max_len": TARGETS})
    config = config.model_copy(update={"training": training, "datapreprocess": drawn})
    path = work / f"{direction}_{epoch}.yaml"
    path.write_text(dump_config(config))
    return path.name


def shard(number: int) -> str:
    """Return the name of a shard of training cells."""
    return f"data/atac2rna_train/atac2rna_{number}.pt"


def newest(folder: Path) -> Path:
    """Return the training run in a folder that was begun last."""
    return max((path.parent for path in folder.glob("*/config.yaml")), key=lambda path: path.stat().st_mtime)


def disk_gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def measure(work: Path, options: argparse.Namespace) -> None:
    """Run the stages that are not done yet; print a row of each."""
    done_path = work / "stages.json"
    done = json.loads(done_path.read_text()) if done_path.exists() else {}
    print("| stage | cells | wall s | CPU s | peak GB | without mapped files | left on disk, GB |")
    print("|---|---|---|---|---|---|---|")
    for name in options.stages:
        if name not in done:
            before = disk_gb(work)
            runs = STAGES[name](work, options)
            logs = "\n".join(one.log for one in runs)
            (work / f"{name}.log").write_text(logs)
            keys = ("wall_s", "cpu_s", "peak_gb", "own_gb")
            parts = [{key: asdict(one)[key] for key in keys} for one in runs]
            done[name] = {"parts": parts, "disk_gb": disk_gb(work) - before}
            done_path.write_text(json.dumps(done, indent=1))
        parts = done[name]["parts"]
        total = {key: sum(part[key] for part in parts) for key in ("wall_s", "cpu_s")}
        most = {key: max(part[key] for part in parts) for key in ("peak_gb", "own_gb")}
        print(
            f"| {name} | {options.cells:,} | {total['wall_s']:.0f} | {total['cpu_s']:.0f} | {most['peak_gb']:.2f} "
            f"| {most['own_gb']:.2f} | {done[name]['disk_gb']:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--depth", type=float, default=0.05)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    measure(options.work.resolve(), options)


if __name__ == "__main__":
    main()
