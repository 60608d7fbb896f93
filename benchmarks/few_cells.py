"""Penalty of the RNA→ATAC closed form: chosen on few validation cells alone, or with training cells left out in turn.

    python benchmarks/few_cells.py DATA [--sets bmmc_starter_A snareseq_mop_10309:300 …] [--seeds 1 2 3]

DATA holds a folder per set with rna.h5ad and atac.h5ad; `:300` takes 300 cells at random. Each line is a split.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import anndata as ad
import numpy as np

import cisformer
from cisformer.config import TrainingChoice
from cisformer.model import closed_form

SETS = (
    "bmmc_starter_A", "bmmc_starter_B", "scpoem_S1_300", "snareseq_mop_10309:300", "snareseq_mop_10309:1000",
    "k562_chr22_95", "pbmc10k_full_40",
)  # fmt: skip
SCORES = ("log_loss", "ccre_auroc", "cell_auprc")
WAYS = {"alone": 0, "with training cells": closed_form.FEW_CELLS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options = parser.parse_args()
    for name in options.sets:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                print(name, seed, compare(options.data, name, seed, Path(folder)), flush=True)


def compare(data: Path, name: str, seed: int, folder: Path) -> str:
    """Return the scores of both ways and of PCA-ridge, as text."""
    name, _, n_cells = name.partition(":")
    rna, atac = (ad.read_h5ad(data / name / f"{side}.h5ad") for side in ("rna", "atac"))
    if n_cells:
        kept = np.sort(np.random.default_rng(seed).choice(rna.n_obs, int(n_cells), replace=False))
        rna = rna[kept].copy()
        atac = atac[rna.obs_names].copy()
    cisformer.preprocess(rna, atac, folder, direction="rna2atac", reference="dataset", seed=seed)
    config = TrainingChoice("small", epochs=0).config("rna2atac")
    said = []
    for way, few in WAYS.items():
        with mock.patch.object(closed_form, "FEW_CELLS", few):
            best = cisformer.train(folder, way, direction="rna2atac", save=folder / "save", config=config)
        report = cisformer.evaluate_model(folder, best)
        said.append(f"{way}: {shown(report.scores['model'])}")
    return "; ".join([*said, f"PCA-ridge: {shown(report.scores['PCA-ridge'])}"])


def shown(scores: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{scores[key]['value']:.5f}" for key in SCORES)


if __name__ == "__main__":
    main()
