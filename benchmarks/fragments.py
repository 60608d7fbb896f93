"""Count simulated fragments on the human cCREs: fragments a second, and memory.

    python benchmarks/fragments.py [N_FRAGMENTS]

Half of the fragments lie around cCREs, 80 % belong to 8,000 cells and the rest to 100,000 barcodes of background.
Prints, for a tenth of `N_FRAGMENTS` and for all, fragments per second of wall-clock and of CPU time, the latter also
without what every file costs (cutting a million cCREs into pieces); CPU seconds of decompression alone; and the largest
resident set of the process that counts. Each size is counted in a process of its own, which did not make the file.
"""

from __future__ import annotations

import contextlib
import gzip
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

N_CELLS, N_BARCODES = 8_000, 100_000


def make_barcodes() -> np.ndarray:
    """Return the barcodes; the first `N_CELLS` are cells."""
    letters = np.random.default_rng(1).choice(list("ACGT"), (N_BARCODES, 16))
    return np.array(["".join(word) + "-1" for word in letters], dtype=object)


def write_fragments(path: Path, n: int) -> None:
    """Write `n` fragments sorted by position."""
    import pyarrow as pa
    from pyarrow import csv

    from cisformer.data.reference import load_reference

    ccres, barcodes, rng = load_reference("human").ccres, make_barcodes(), np.random.default_rng(0)
    row = rng.choice(len(ccres), n, p=(weight := rng.random(len(ccres)) ** 6) / weight.sum())
    near = rng.random(n) < 0.5
    middle = (ccres["start"] + ccres["end"]).to_numpy()[row] // 2
    away = np.where(near, rng.integers(-300, 300, n), rng.integers(-40_000, 40_000, n))
    start = np.maximum(middle + away, 0)
    order = np.lexsort((start, pd.factorize(ccres["chrom"])[0][row]))
    cell = np.where(rng.random(n) < 0.8, rng.integers(0, N_CELLS, n), rng.integers(0, N_BARCODES, n))
    chrom, length = ccres["chrom"].to_numpy()[row], rng.integers(30, 600, n)
    options = csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with gzip.open(path, "wb", compresslevel=3) as file:
        for part in np.array_split(order, max(1, n // 200_000)):
            columns = (
                chrom[part],
                start[part],
                start[part] + length[part],
                barcodes[cell[part]],
                np.ones(len(part), int),
            )
            csv.write_csv(pa.table(list(columns), names=list("abcde")), file, options)


def count(path: Path, size: int) -> None:
    """Count a file and print how fast."""
    import resource

    import pyarrow as pa
    import pyarrow.compute
    import pyarrow.csv

    from cisformer.data.fragments import FragmentOptions, Pieces, count_fragments
    from cisformer.data.reference import load_reference

    ccres, cells = load_reference("human").ccres, pd.Index(make_barcodes()[:N_CELLS])
    clock = time.process_time()
    with pa.input_stream(path, compression="gzip") as stream:
        while stream.read(1 << 22):
            pass
    unpacking, clock = time.process_time() - clock, time.process_time()
    Pieces(ccres)
    pieces = time.process_time() - clock
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    wall, clock = time.perf_counter(), time.process_time()
    with contextlib.ExitStack() as files:
        counted = count_fragments(path, FragmentOptions(ccres, cells), files)
        took, spent = time.perf_counter() - wall, time.process_time() - clock
        n_open = sum(counted.rows(i, min(i + 500, N_CELLS)).nnz for i in range(0, N_CELLS, 500))
        read_back = time.process_time() - clock - spent
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{size:,} fragments: {size / took / 1e6:.2f} million a second, {size / spent / 1e6:.2f} a CPU second, "
        f"{size / (spent - pieces) / 1e6:.2f} without {pieces:.2f} CPU s for the cCREs; "
        f"unpacking {unpacking:.2f} CPU s; "
        f"{n_open:,} pairs read back in {read_back:.2f} CPU s; {peak:.2f} GB, {before:.2f} before"
    )


def main(n: int) -> None:
    """Measure a tenth of `n` and `n` fragments."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for size in (n // 10, n):
            path = Path(folder) / "fragments.tsv.gz"
            for work, arguments in ((write_fragments, (path, size)), (count, (path, size))):
                process = context.Process(target=work, args=arguments)
                process.start()
                process.join()


if __name__ == "__main__":
    main(int(float(sys.argv[1])) if len(sys.argv) > 1 else 10_000_000)
