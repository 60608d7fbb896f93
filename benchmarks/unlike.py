"""Which cells of a type that training has not seen are called unlike the training cells.

    python benchmarks/unlike.py DATA [--left-out snareseq_mop_10309:Astro:09D …] [--sides rna atac] [--groups 20]

DATA holds a folder per set with rna.h5ad and atac.h5ad. SET:TYPE:BATCH leaves out a type and a batch (`-`: none). Of
the other cells, a fifth is tested on; nine tenths of the rest are learnt from. A line: share of the left-out type that
is flagged, AUROC against test cells, shares of the test cells and of the batch that are flagged. `--groups 1` is nearly
the form before groups.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from unittest import mock

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from sklearn.metrics import roc_auc_score

from cisformer.config import Modality
from cisformer.data.batches import Batch, normalise
from cisformer.model import likeness
from cisformer.model.projection import fit_projection

LEFT_OUT = (
    "snareseq_mop_10309:Astro:09D", "snareseq_mop_10309:Oligo:09A", "snareseq_mop_10309:Pvalb:09F",
    "snareseq_mop_10309:L4/5:09K", "bmmc_starter_A:CD14+ Mono:-", "bmmc_starter_A:Naive CD20+ B:-",
    "bmmc_starter_A:Proerythroblast:-",
)  # fmt: skip
RANK, MOST_CELLS, SEED = 32, 5_000, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--left-out", nargs="+", default=LEFT_OUT)
    parser.add_argument("--sides", nargs="+", default=("rna", "atac"), choices=("rna", "atac"))
    parser.add_argument("--groups", type=int, default=likeness.N_GROUPS)
    options = parser.parse_args()
    for one in options.left_out:
        for side in options.sides:
            with mock.patch.object(likeness, "N_GROUPS", options.groups):
                print(one, side, measure(options.data, *one.split(":"), side), flush=True)


def measure(data: Path, name: str, cell_type: str, batch: str, side: Modality) -> str:
    """Leave out a type and a batch; return what is flagged of them, and of others."""
    obs = ad.read_h5ad(data / name / "rna.h5ad", backed="r").obs
    cells = normalise(sp.csr_matrix(ad.read_h5ad(data / name / f"{side}.h5ad")[obs.index].X), side)
    of_type, of_batch = (obs["cell_type"] == cell_type).to_numpy(), (obs["batch"] == batch).to_numpy()
    draw, other = np.random.default_rng(SEED).random(len(obs)), ~of_type & ~of_batch
    known = np.flatnonzero(other & (draw < 0.8))
    cells = cells[:, cells[known].getnnz(axis=0) > 0]
    rng = np.random.default_rng(1)
    train = np.sort(rng.permutation(len(known))[len(known) // 10 :])
    some = np.sort(rng.choice(len(train), min(MOST_CELLS, len(train)), replace=False))
    train = known[train]
    projection = fit_projection(cells[train], side, RANK, 0)
    model = likeness.Likeness(cells.shape[1], RANK)
    frequency = (cells[train].getnnz(axis=0) + 0.5) / (len(train) + 1)
    few = cells[train[some]]
    model.fit(few, projection(batch_of(few)).numpy(), frequency, 0)
    found = batch_of(cells)
    distance = model.distance(found, projection(found)).numpy()
    strange, usual = distance[of_type], distance[other & (draw >= 0.8)]
    auroc = roc_auc_score(np.repeat([1, 0], [len(strange), len(usual)]), np.concatenate([strange, usual]))
    shares = [(part > 1).mean() for part in (strange, usual, distance[of_batch & ~of_type]) if len(part)]
    return f"{shares[0]:.2f}, {auroc:.2f}; {', '.join(f'{share:.3f}' for share in shares[1:])}"


def batch_of(cells: sp.csr_matrix) -> Batch:
    indptr, index = (torch.from_numpy(x.astype(np.int64)) for x in (cells.indptr, cells.indices))
    return Batch(indptr, index, torch.from_numpy(cells.data))


if __name__ == "__main__":
    main()
