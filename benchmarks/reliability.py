"""What a prediction promises of itself, and what is found: features and cells.

    python benchmarks/reliability.py DIR [--figure docs/_static/reliability.png]

DIR is where `benchmarks/compare.py` wrote a set: it holds `atac2rna` and `rna2atac` (preprocessed data) and `save`
(models). Features are sorted by `validation_r` into tenths; in each, mean r promised and mean r found in test cells.
Cells: the share that is called unlike the training cells, and the score of cells by tenth of their distance. Intervals
of predicted expression: the share of measurements in test cells that they hold.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from cisformer.data.batches import read_modality
from cisformer.data.store import CellStore, find_split
from cisformer.evaluation.correlation import correlation
from cisformer.model.checkpoint import load_checkpoint
from cisformer.prediction.likeness import DISTANCE, UNLIKE
from cisformer.prediction.predict import predict

NAMES = {"atac2rna": "genes, ATAC→RNA", "rna2atac": "cCREs, RNA→ATAC"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    found = {
        direction: measure(options.folder, direction)
        for direction in NAMES
        if (options.folder / direction).is_dir()
    }
    for direction, result in found.items():
        print(
            f"{direction}: {result['unlike']:.3f} of {result['cells']} test cells unlike the training cells"
        )
        for name, rows in (("validation_r", result["features"]), ("distance", result["by_distance"])):
            print(name, " ".join(f"{a:.3f}→{b:.3f}" for a, b, _ in rows))
        if "coverage" in result:
            print("interval_90, wanted 0.9: found; where expressed; by tenth of genes, rare first:")
            print(" ".join(f"{share:.3f}" for share in result["coverage"]))
    if options.figure:
        draw(found, options.figure)


def measure(folder: Path, direction: str) -> dict[str, Any]:
    """Predict the test cells; return promised and found values by tenth."""
    run = sorted(folder.glob("save/*_cisformer/best"))
    checkpoints = [load_checkpoint(path) for path in run]
    checkpoint = next(c for c in checkpoints if c.direction == direction)
    store = CellStore.open(find_split(folder / direction, "test", direction))
    known = checkpoint.layout.target_index
    predicted = predict(checkpoint, store.path)
    truth = read_modality(store, np.arange(store.n_cells), checkpoint.layout.target_modality)[:, known]
    values = np.asarray(predicted.X[:, known].toarray(), np.float32)
    r = correlation(values, truth)
    r[truth.getnnz(axis=0) < 3] = np.nan
    promised = predicted.var["validation_r"].to_numpy()[known]
    mean = values.mean(axis=0)
    per_cell = correlation(values, truth, axis=1, minus=mean)
    half_width = predicted.var.get("interval_90")
    within = {} if half_width is None else {"coverage": coverage(values, truth, half_width.to_numpy()[known])}
    return {
        **within,
        "unlike": float(predicted.obs[UNLIKE].mean()),
        "cells": store.n_cells,
        "features": tenths(promised, r),
        "by_distance": tenths(predicted.obs[DISTANCE].to_numpy(), per_cell),
    }


def coverage(values: np.ndarray, truth: Any, half_width: np.ndarray) -> list[float]:
    """Return the share of measurements within the interval: all, those above 0, and by tenth of genes, rare first."""
    found = truth.toarray()
    inside = np.abs(found - values) <= half_width
    parts = np.array_split(np.argsort(truth.getnnz(axis=0), kind="stable"), 10)
    return [float(x.mean()) for x in (inside, inside[found > 0], *(inside[:, part] for part in parts))]


def tenths(promised: np.ndarray, found: np.ndarray) -> list[tuple[float, float, float]]:
    """Return mean promised, mean found and its standard error in each tenth of what is promised."""
    both = np.flatnonzero(np.isfinite(promised) & np.isfinite(found))
    parts = np.array_split(both[np.argsort(promised[both], kind="stable")], 10)
    return [
        (float(promised[p].mean()), float(found[p].mean()), float(found[p].std() / len(p) ** 0.5))
        for p in parts
    ]


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw promised against found for both directions."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.3), layout="constrained")
    for axis, (direction, result) in zip(axes, found.items(), strict=True):
        x, y, error = np.array(result["features"]).T
        low, high = min(x.min(), y.min(), 0) - 0.01, max(x.max(), y.max()) + 0.02
        axis.plot([low, high], [low, high], color="0.7", lw=1, zorder=0)
        axis.errorbar(x, y, 1.96 * error, fmt="o", ms=4, color="#1f5a8c", capsize=2)
        axis.set(
            title=NAMES[direction], xlabel="validation_r, mean of a tenth", xlim=(low, high), ylim=(low, high)
        )
    axes[0].set_ylabel("r found in test cells")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
