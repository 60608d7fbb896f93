"""Predict one modality with scvi-tools' MultiVI, for `compare.py`; runs in an environment of its own.

    python benchmarks/multivi.py FOLDER DIRECTION [--epochs 500] [--minutes 15] [--seed 0]

FOLDER holds rna.h5ad and atac.h5ad of all cells, with obs["split"] "train" or "test"; predicted_rna.h5ad or
predicted_atac.h5ad of the test cells is written there. As its documentation shows, MultiVI learns from the paired
training cells and the unpaired test cells together, of which only the input modality is used, stops early, and
imputes, decoded as a paired cell. Accessibility comes with the region factors put back in and is scaled by one
number, so that its mean is that of the training cells: MultiVI leaves depth out of it. After `--minutes` of CPU time
training stops with the epoch at hand; the number of epochs is printed.
"""

import argparse
import time
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
import scvi
from lightning.pytorch import Callback, LightningModule, Trainer
from mudata import MuData


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("direction", choices=["rna2atac", "atac2rna"])
    parser.add_argument("--epochs", type=int, default=500, help="most; training stops early by itself")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    scvi.settings.seed = options.seed
    source, target = options.direction.split("2")
    both = {name: ad.read_h5ad(options.folder / f"{name}.h5ad") for name in ("rna", "atac")}
    paired = {name: adata[adata.obs["split"] == "train"] for name, adata in both.items()}
    alone = both[source][both[source].obs["split"] == "test"]

    cells = joined(paired, alone, source)
    keys = {"rna_layer": "rna", "atac_layer": "atac", "batch_key": "rna"}
    scvi.model.MULTIVI.setup_mudata(cells, batch_key="modality", modalities=keys)
    model = scvi.model.MULTIVI(cells, n_genes=both["rna"].n_vars, n_regions=both["atac"].n_vars)
    model.train(
        max_epochs=options.epochs, enable_progress_bar=False, callbacks=[StopAfter(options.minutes * 60)]
    )
    print(f"epochs: {len(model.history['elbo_train'])}")
    test = np.flatnonzero(cells["rna"].obs["modality"] == "alone")
    predicted = (
        expression(model, test) if target == "rna" else accessibility(model, test, paired["atac"].X.mean())
    )
    result = ad.AnnData(predicted.astype(np.float32), obs=alone.obs[[]], var=both[target].var[[]])
    result.write_h5ad(options.folder / f"predicted_{target}.h5ad")


class StopAfter(Callback):
    """Stop training after some CPU seconds."""

    def __init__(self, cpu_s: float) -> None:
        self.cpu_s = cpu_s

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module
        trainer.should_stop = trainer.should_stop or time.process_time() > self.cpu_s


def joined(paired: dict[str, ad.AnnData], alone: ad.AnnData, source: str) -> MuData:
    """Return paired cells above cells that have the modality `source` alone; the other is all zero there."""
    parts = {}
    for name, adata in paired.items():
        below = alone.X if name == source else sp.csr_matrix((alone.n_obs, adata.n_vars), dtype=np.float32)
        parts[name] = ad.AnnData(
            sp.vstack([adata.X, below], format="csr").astype(np.float32), var=adata.var[[]]
        )
        parts[name].obs_names = [*adata.obs_names, *alone.obs_names]
        parts[name].obs["modality"] = ["paired"] * adata.n_obs + ["alone"] * alone.n_obs
    return MuData(parts)


def expression(model: scvi.model.MULTIVI, test: np.ndarray) -> np.ndarray:
    """Return log1p(counts per 10,000)."""
    found = model.get_normalized_expression(indices=test, transform_batch="paired", return_numpy=True)
    return np.log1p(1e4 * np.asarray(found))


def accessibility(model: scvi.model.MULTIVI, test: np.ndarray, mean: float) -> np.ndarray:
    """Return probabilities whose mean is `mean`."""
    found = model.get_normalized_accessibility(
        indices=test, transform_batch="paired", normalize_regions=True, return_numpy=True
    )
    found = found.toarray() if sp.issparse(found) else np.asarray(found)
    return np.clip(found * (mean / found.mean()), 1e-4, 1 - 1e-4)


if __name__ == "__main__":
    main()
