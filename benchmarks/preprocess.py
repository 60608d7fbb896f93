"""Measure `cisformer data_preprocess`: CPU time, peak memory, disk, throughput, and where the time goes.

    python benchmarks/preprocess.py WORK --data DIR [--peer PEER/bin/cisformer] [--num_workers 2]
    python benchmarks/preprocess.py WORK --cells 10000 100000 [--compression gzip]

With `--data`, a folder with ``rna.h5ad``, ``atac.h5ad`` and ``cisformer_config/`` goes through both
directions, by ours and, if given, by the published tool. With `--cells`, sets of simulated cells of that size
do, in one direction: each cell has about 2,000 of 20,000 human genes and 6,000 open peaks of 100,000. Prints
markdown tables. CPU time is that of all processes and threads; peak memory that of all processes together
(their shares of it, sampled about once a second) or of the largest alone, whichever is more.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

N_GENES, N_PEAKS = 20_000, 100_000
GENES_PER_CELL, PEAKS_PER_CELL = 2_000, 6_000
POLLS_PER_SAMPLE = 20  # of memory: walking the pages of gigabytes is no small work itself
STAGES = ("read", "align", "write")


@dataclass(frozen=True)
class Run:
    """What one process took."""

    cpu_s: float
    wall_s: float
    peak_gb: float
    own_gb: float  # without pages of mapped files, which the system takes back where memory is short
    log: str

    def share(self, stage: str) -> str:
        """Share of the work that a stage took, as the log says."""
        found = re.search(rf"\b{stage} (\d+%)", self.log.rsplit("s of work:", 1)[-1])
        return found.group(1) if found else "-"


def run(command: list[str], cwd: Path, kill_after: tuple[str, float] | None = None) -> Run:
    """Run a command to its end, or end it by SIGKILL so many seconds after its log says so; exit where it fails.

    This process stays small, because Linux counts what it holds towards the peak of the process it starts.
    """
    log = cwd / "log.txt"
    start, peak_kb, own_kb, n_polls, done = time.perf_counter(), 0, 0, 0, 0
    with open(log, "w") as handle:
        process = subprocess.Popen(command, cwd=cwd, stdout=handle, stderr=subprocess.STDOUT)
        while not done:
            time.sleep(0.05)
            n_polls += 1
            if n_polls % POLLS_PER_SAMPLE == 0:
                peak_kb = max(peak_kb, memory_kb(process.pid))
                own_kb = max(own_kb, memory_kb(process.pid, "Pss_Anon"))
                if kill_after and kill_after[0] in log.read_text():
                    time.sleep(kill_after[1])
                    process.kill()
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode and not (kill_after and process.returncode == -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    peak_gb = max(peak_kb, usage.ru_maxrss) / 1e6
    return Run(usage.ru_utime + usage.ru_stime, wall, peak_gb, own_kb / 1e6, log.read_text())


def memory_kb(pid: int, kind: str = "Pss") -> int:
    """Return the memory of a process and all below it: proportional set sizes, kB; 0 where it has ended."""
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        share = re.search(rf"^{kind}:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(share.group(1)) + sum(memory_kb(child, kind) for child in children) if share else 0


def preprocess(command: list[str], data: Path, out: Path, *flags: str) -> tuple[Run, float]:
    """Preprocess into an empty folder; return what it took, and the megabytes written."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copytree(data / "cisformer_config", out / "cisformer_config", dirs_exist_ok=True)
    inputs = ["-r", str(data / "rna.h5ad"), "-a", str(data / "atac.h5ad"), "--species", "human"]
    took = run([*command, "data_preprocess", *inputs, "-s", str(out / "cells"), *flags], out)
    written = sum(path.stat().st_size for path in (out / "cells").rglob("*") if path.is_file())
    return took, written / 1e6


def compare(data: Path, work: Path, peer: Path | None, flags: list[str]) -> None:
    """Print both directions, ours beside the published tool."""
    tools = {"cisformer (this)": [sys.executable, "-m", "cisformer"]}
    if peer is not None:
        tools["published 1.1.2"] = [str(peer)]
    print("| tool | direction | CPU s | wall s | peak GB | written MB |\n|---|---|---|---|---|---|")
    for tool, command in tools.items():
        for direction, chosen in (("rna2atac", []), ("atac2rna", ["--atac2rna"])):
            took, written = preprocess(command, data, work / "out", *flags, *chosen)
            print(
                f"| {tool} | {direction} | {took.cpu_s:.1f} | {took.wall_s:.1f} | {took.peak_gb:.2f} "
                f"| {written:.0f} |",
                flush=True,
            )


def scale(sizes: list[int], work: Path, flags: list[str], compression: str | None, seed: int) -> None:
    """Print how time and memory go with the number of cells."""
    stages = " | ".join(STAGES)
    print(f"| cells | input GB | CPU s | wall s | cells/s | peak GB | written MB | {stages} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    peaks = []
    for n_cells in sizes:
        data = work / f"cells_{n_cells}"
        if not (data / "rna.h5ad").exists():
            arguments = [str(data), str(n_cells), compression or "none", str(seed)]
            subprocess.run([sys.executable, __file__, "--simulate", *arguments], check=True)
        size = sum((data / name).stat().st_size for name in ("rna.h5ad", "atac.h5ad")) / 1e9
        took, written = preprocess([sys.executable, "-m", "cisformer"], data, work / "out", *flags)
        shares = " | ".join(took.share(stage) for stage in STAGES)
        peaks.append(took.peak_gb)
        print(
            f"| {n_cells:,} | {size:.2f} | {took.cpu_s:.1f} | {took.wall_s:.1f} "
            f"| {n_cells / took.wall_s:,.0f} | {took.peak_gb:.2f} | {written:.0f} | {shares} |",
            flush=True,
        )
    print(f"\npeak memory, last by first: {peaks[-1] / peaks[0]:.2f}")


def simulate(folder: Path, n_cells: int, compression: str | None, seed: int, n_peaks: int = N_PEAKS) -> None:
    """Write paired cells in blocks: random genes and peaks, ATAC in another order of cells."""
    import numpy as np
    import pandas as pd
    import scipy.sparse as sp

    from cisformer.data.h5ad import H5adWriter
    from cisformer.data.reference import load_reference

    rng = np.random.default_rng(seed)
    human = load_reference("human")
    ccres = np.sort(rng.choice(human.n_ccres, n_peaks, replace=False))
    genes = rng.choice(human.genes["gene_name"].to_numpy(), N_GENES, replace=False)
    barcodes = np.array([f"{number:016x}-1" for number in rng.permutation(n_cells)])

    def block(n: int, n_features: int, n_open: int, largest: int) -> sp.csr_matrix:
        columns = np.cumsum(rng.integers(1, 2 * n_features // n_open, (n, n_open)), axis=1) - 1
        kept = columns < n_features
        indptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
        values = rng.integers(1, largest + 1, indptr[-1]).astype(np.float32)
        return sp.csr_matrix((values, columns[kept].astype(np.int32), indptr), shape=(n, n_features))

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cisformer_config").mkdir(exist_ok=True)
    for name, var, n_open, largest, order in (
        ("rna", pd.DataFrame(index=genes), GENES_PER_CELL, 4, barcodes),
        ("atac", pd.DataFrame(index=human.ccre_labels[ccres]), PEAKS_PER_CELL, 1, rng.permutation(barcodes)),
    ):
        obs = pd.DataFrame({"cell_type": "simulated"}, index=order)
        with H5adWriter(folder / f"{name}.h5ad", obs, var, compression=compression) as writer:
            for start in range(0, n_cells, 1000):
                writer.append(block(len(order[start : start + 1000]), len(var), n_open, largest))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="folder for data and output")
    parser.add_argument("--data", type=Path, help="folder with rna.h5ad and atac.h5ad, and cisformer_config/")
    parser.add_argument("--peer", type=Path, help="the published tool's command")
    parser.add_argument("--cells", type=int, nargs="+", default=[], help="sizes to simulate")
    parser.add_argument("--compression", choices=["gzip", "lzf"], help="of the simulated input")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", help="passed on to data_preprocess")
    options = parser.parse_args()
    flags = ["--num_workers", options.num_workers] if options.num_workers else []
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    print(f"peak of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB\n")
    if options.data:
        compare(options.data.resolve(), work, options.peer and options.peer.absolute(), flags)
    if options.cells:
        scale(options.cells, work, flags, options.compression, options.seed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--simulate"]:
        where, how_many, packing, start_seed = sys.argv[2:]
        simulate(Path(where), int(how_many), None if packing == "none" else packing, int(start_seed))
    else:
        main()
