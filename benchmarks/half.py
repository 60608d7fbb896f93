"""By how much do scores move when a packed model stores its matrices as float16?

    python benchmarks/half.py RNA.h5ad ATAC.h5ad FOLDER

trains the preset small in both directions on the human reference, packs each model whole and with `half`, and scores
both on the test cells.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cisformer
from cisformer.config import DIRECTIONS, Direction


def scores(model: Path, data: Path, direction: Direction) -> dict[str, float]:
    """Return the scores of a packed model on the test cells."""
    report = cisformer.evaluate_model(data, model, direction=direction)
    return {metric: score["value"] for metric, score in report.scores["model"].items()}


def main(rna: Path, atac: Path, folder: Path) -> None:
    """Print a row per score: whole, half, difference."""
    for direction in DIRECTIONS:
        config = cisformer.default_config(direction, "small")
        cisformer.preprocess(rna, atac, folder / "data", direction=direction, config=config)
        best = cisformer.train(
            folder / "data", direction, direction=direction, save=folder / "save", config=config
        )
        whole, half = (
            cisformer.pack_model(best.folder, folder / f"{direction}_{name}.zip", half=name == "half")
            for name in ("whole", "half")
        )
        print(f"{direction}: {whole.stat().st_size:,} and {half.stat().st_size:,} bytes", flush=True)
        found = [scores(path, folder / "data", direction) for path in (whole, half)]
        for metric, value in found[0].items():
            print(
                f"| {direction} | {metric} | {value:.5f} | {found[1][metric]:.5f} | {found[1][metric] - value:+.6f} |"
            )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
