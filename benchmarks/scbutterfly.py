"""Predict both modalities with scButterfly, for `compare.py`; runs in an environment of its own.

    python benchmarks/scbutterfly.py FOLDER [--seed 0]

FOLDER holds rna.h5ad and atac.h5ad of all cells, with obs["split"] "train" or "test"; predicted_rna.h5ad and
predicted_atac.h5ad of the test cells are written there. Settings are its own defaults. It preprocesses all cells
together, test cells of both modalities among them (choice of genes and peaks, TF-IDF): a small advantage that we
leave to it. It predicts 3,000 variable genes and the peaks open in 0.5 % of the cells; the others get the mean of
the training cells. Its accessibility is on the scale of TF-IDF and is scaled for each cCRE to the training mean.
"""

import argparse
import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from scButterfly import train_model
from scButterfly.butterfly import Butterfly
from torch.utils.data import DataLoader


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    np.random.seed(options.seed)  # noqa: NPY002 - it draws from the global state
    # The same batches without four new processes in each epoch, which take most of the time on small sets.
    train_model.DataLoader = lambda *a, **kw: DataLoader(*a, **{**kw, "num_workers": 0})
    if not torch.cuda.is_available():  # it moves some tensors to a GPU without asking
        torch.Tensor.cuda = lambda tensor, *a, **kw: tensor
    rna, atac = (ad.read_h5ad(options.folder / f"{name}.h5ad") for name in ("rna", "atac"))
    rna.X, atac.X = (sp.csr_matrix(m.X, dtype=np.float32) for m in (rna, atac))
    atac = atac[:, np.argsort(atac.var["chrom"].astype(str), kind="stable")].copy()
    train, test = (list(np.flatnonzero(rna.obs["split"] == part)) for part in ("train", "test"))

    depth = float(np.median(np.asarray(rna.X.sum(axis=1))))
    model = Butterfly()
    model.load_data(rna, atac, list(train), test)
    model.data_preprocessing()
    for found in (model.RNA_data_p, model.ATAC_data_p):
        found.X = sp.csr_matrix(found.X, dtype=np.float32)
    chroms = model.ATAC_data_p.var["chrom"].astype(str)
    model.augmentation(aug_type=None)
    model.construct_model(chrom_list=[int((chroms == name).sum()) for name in dict.fromkeys(chroms)])
    with tempfile.TemporaryDirectory() as output:
        model.train_model(output_path=output, seed=options.seed)
        rna_found, atac_found = model.test_model(output_path=output)

    write(
        options.folder / "predicted_rna.h5ad",
        rna,
        train,
        test,
        expression(rna_found, depth),
        rna_found.var_names,
    )
    write(
        options.folder / "predicted_atac.h5ad", atac, train, test, dense(atac_found.X), atac_found.var_names
    )


def dense(matrix: np.ndarray) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


def expression(found: ad.AnnData, depth: float) -> np.ndarray:
    """Return log1p(counts per 10,000) from log1p(counts per median depth)."""
    return np.log1p(np.maximum(np.expm1(dense(found.X)), 0) * (1e4 / depth))


def write(
    path: Path, cells: ad.AnnData, train: list[int], test: list[int], found: np.ndarray, names: list[str]
) -> None:
    """Put predictions into all features, the rest at the training mean; accessibility scaled to it."""
    is_atac = path.name == "predicted_atac.h5ad"
    target = cells[train].X
    if not is_atac:
        target = target.multiply(1e4 / np.maximum(target.sum(axis=1), 1)).tocsr().log1p()
    mean = np.asarray(target.mean(axis=0)).ravel()
    columns = cells.var_names.get_indexer(names)
    values = np.tile(mean, (len(test), 1))
    scale = mean[columns] / np.maximum(found.mean(axis=0), 1e-6) if is_atac else 1.0
    values[:, columns] = np.clip(found * scale, 1e-4, 1 - 1e-4) if is_atac else found
    result = ad.AnnData(values.astype(np.float32), obs=cells.obs.iloc[test][[]], var=cells.var[[]])
    result.write_h5ad(path)


if __name__ == "__main__":
    main()
