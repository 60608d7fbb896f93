"""Count simulated fragments on the human cCREs: fragments a second, and memory.

    python benchmarks/fragments.py [N_FRAGMENTS]

Half of the fragments lie around cCREs, 80 % belong to 8,000 cells and the rest to 100,000 barcodes of background.
Prints fragments per wall-clock and per CPU second for two sizes, and the largest resident set, which should not grow.
"""

from __future__ import annotations

import contextlib
import gzip
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.data.fragments import FragmentOptions, count_fragments
from cisformer.data.reference import load_reference

N_CELLS, N_BARCODES = 8_000, 100_000


def write_fragments(path: Path, n: int, ccres: pd.DataFrame, barcodes: np.ndarray) -> None:
    """Write `n` fragments sorted by position."""
    rng = np.random.default_rng(0)
    row = rng.choice(len(ccres), n, p=(weight := rng.random(len(ccres)) ** 6) / weight.sum())
    near = rng.random(n) < 0.5
    middle = (ccres["start"] + ccres["end"]).to_numpy()[row] // 2
    start = np.maximum(
        middle + np.where(near, rng.integers(-300, 300, n), rng.integers(-40_000, 40_000, n)), 0
    )
    order = np.lexsort((start, pd.factorize(ccres["chrom"])[0][row]))
    cell = np.where(rng.random(n) < 0.8, rng.integers(0, N_CELLS, n), rng.integers(0, N_BARCODES, n))
    chrom, length = ccres["chrom"].to_numpy()[row], rng.integers(30, 600, n)
    with gzip.open(path, "wt", compresslevel=3) as file:
        for part in np.array_split(order, max(1, n // 200_000)):
            columns = (chrom[part], start[part], start[part] + length[part], barcodes[cell[part]])
            file.write("".join(f"{c}\t{s}\t{e}\t{b}\t1\n" for c, s, e, b in zip(*columns, strict=True)))


def main(n: int) -> None:
    """Measure a tenth of `n` and `n` fragments."""
    ccres = load_reference("human").ccres
    letters = np.random.default_rng(1).choice(list("ACGT"), (N_BARCODES, 16))
    barcodes = np.array(["".join(word) + "-1" for word in letters], dtype=object)
    with tempfile.TemporaryDirectory() as folder:
        for size in (n // 10, n):
            path = Path(folder) / "fragments.tsv.gz"
            write_fragments(path, size, ccres, barcodes)
            wall, cpu = time.perf_counter(), time.process_time()
            with contextlib.ExitStack() as files:
                cells = count_fragments(path, FragmentOptions(ccres, pd.Index(barcodes[:N_CELLS])), files)
                counted = time.perf_counter() - wall, time.process_time() - cpu
                n_open = sum(
                    cells.rows(i, min(i + 500, N_CELLS)).nnz for i in range(0, len(cells.barcodes), 500)
                )
                read = time.process_time() - cpu - counted[1]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(
                f"{size:,} fragments: {size / counted[0] / 1e6:.2f} million a second, "
                f"{size / counted[1] / 1e6:.2f} a CPU second; {n_open:,} pairs read back in {read:.1f} CPU s; "
                f"{peak:.2f} GB"
            )


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000)
