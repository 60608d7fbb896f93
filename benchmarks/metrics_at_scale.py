"""Measure AUROC and AUPRC per cCRE at the size of the human reference: 2,000 cells × 1,033,239 cCREs.

    python benchmarks/metrics_at_scale.py {dense,sparse}

`dense` makes probabilities block by block, as a model or a baseline does; `sparse` holds a tenth of them as CSR, as
`rna2atac_predict` writes them (200 million values, 1.6 GB). Prints CPU seconds and the largest resident set.
"""

import argparse
import resource
import time

import numpy as np
import scipy.sparse as sp

from cisformer.evaluation.ranking import ranking_scores

N_CELLS, N_CCRES, N_OPEN, STEP = 2000, 1_033_239, 10_000, 10


class Dense:
    """Random probabilities, made where they are sliced."""

    shape = (N_CELLS, N_CCRES)

    def __getitem__(self, key: tuple[slice, slice]) -> np.ndarray:
        columns = range(*key[1].indices(N_CCRES))
        rng = np.random.default_rng(columns.start)
        return rng.random((N_CELLS, len(columns)), dtype=np.float32)


def sparse(rng: np.random.Generator) -> sp.csr_matrix:
    """Return probabilities of every tenth cCRE, from another one in each cell."""
    per_cell = N_CCRES // STEP
    indices = np.empty(N_CELLS * per_cell, dtype=np.int32)
    for cell in range(N_CELLS):
        indices[cell * per_cell : (cell + 1) * per_cell] = cell % STEP + STEP * np.arange(
            per_cell, dtype=np.int32
        )
    indptr = np.arange(N_CELLS + 1, dtype=np.int64) * per_cell
    return sp.csr_matrix(
        (rng.random(len(indices), dtype=np.float32), indices, indptr), shape=(N_CELLS, N_CCRES)
    )


def truth(rng: np.random.Generator) -> sp.csr_matrix:
    """Return 10,000 open cCREs in each cell."""
    indices = np.concatenate([np.sort(rng.integers(0, N_CCRES, N_OPEN)) for _ in range(N_CELLS)])
    matrix = sp.csr_matrix(
        (np.ones(len(indices), np.float32), indices, np.arange(N_CELLS + 1) * N_OPEN),
        shape=(N_CELLS, N_CCRES),
    )
    matrix.sum_duplicates()
    return matrix


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["dense", "sparse"])
    rng = np.random.default_rng(0)
    predicted = Dense() if parser.parse_args().kind == "dense" else sparse(rng)
    open_ = truth(rng)
    started = time.process_time()
    scores = ranking_scores(predicted, open_)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{np.isfinite(scores.auroc).sum():,} cCREs scored, mean AUROC {np.nanmean(scores.auroc):.4f}")
    print(f"{seconds:.0f} CPU s, {peak:.2f} GB peak")


if __name__ == "__main__":
    main()
