"""Write the same cells in the formats that users hold."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp


def write_10x(path: Path, rna: ad.AnnData, atac: ad.AnnData) -> None:
    """Write a Cell Ranger ARC feature matrix, features x cells in CSC; both with the same cells in order."""
    matrix = sp.csc_matrix(sp.hstack([rna.X, atac.X]).T).astype(np.int32)
    ids = [*rna.var.get("gene_id", pd.Series(rna.var_names, rna.var_names)), *atac.var_names]
    features = {
        "id": ids,
        "name": [*rna.var_names, *atac.var_names],
        "feature_type": ["Gene Expression"] * rna.n_vars + ["Peaks"] * atac.n_vars,
        "genome": ["GRCh38"] * len(ids),
        "interval": ["chr1:0-1"] * rna.n_vars + list(atac.var_names),
    }
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = (
            matrix.data,
            matrix.indices.astype(np.int64),
            matrix.indptr,
        )
        group["shape"] = np.array(matrix.shape, np.int32)
        group["barcodes"] = np.array(rna.obs_names, "S")
        for name, values in features.items():
            group[f"features/{name}"] = np.array(values, "S")


def write_h5mu(path: Path, rna: ad.AnnData, atac: ad.AnnData) -> None:
    """Write a MuData file, by mudata itself."""
    import mudata

    with mudata.set_options(pull_on_update=False):
        mudata.MuData({"rna": rna.copy(), "atac": atac.copy()}).write(path)


def damage(path: Path) -> None:
    """Cut a file to two thirds."""
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size * 2 // 3)
