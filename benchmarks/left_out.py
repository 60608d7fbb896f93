"""Train without one donor, batch or cell type, predict it, and compare with the baselines.

    python benchmarks/left_out.py WORK --sets bmmc_starter_A --by batch [--values s1d1 s1d2]
        [--directions rna2atac] [--epochs 0] [--data ../shared/data] [--seed 0]

Each value of the column is left out in turn; a tenth of the other cells validates. Results are kept in
WORK/left_out.json, so that a second run adds what is missing; the tables are those of compare.py.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import anndata as ad
from compare import DIRECTIONS, HERE, LINEAR, overview, slim, table

import cisformer
from cisformer.config import Direction, default_config
from cisformer.evaluation.case import Case, TrainingFiles, case_of_files
from cisformer.evaluation.evaluate import evaluate_case
from cisformer.model.checkpoint import Checkpoint, load_checkpoint

INPUT = {"rna2atac": 0, "atac2rna": 1}
"""Which of (RNA, ATAC) a direction reads."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--sets", nargs="+", required=True)
    parser.add_argument("--by", default="batch", help="column of obs")
    parser.add_argument("--values", nargs="+", help="values of it to leave out; by default all")
    parser.add_argument("--directions", nargs="+", default=["rna2atac"], choices=DIRECTIONS)
    parser.add_argument("--epochs", type=int, help="0 for the closed form alone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "left_out.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.sets:
        pair = tuple(ad.read_h5ad(options.data / name / f"{kind}.h5ad") for kind in ("rna", "atac"))
        column = pair[0].obs[options.by].astype(str)
        for value in options.values or sorted(column.unique()):
            for direction in options.directions:
                key = f"{name}:{value.replace(' ', '_')} {direction}"
                if key not in results:
                    print(f"== {key}", flush=True)
                    left_out = (column == value).to_numpy()
                    folder = options.work / key.replace(" ", "_").replace("/", "_")
                    results[key] = run(pair, left_out, direction, folder, options)
                    kept.write_text(json.dumps(results, indent=1))
    text = "\n\n".join(table(key, result) for key, result in results.items())
    (options.work / "left_out.md").write_text(f"{overview(results)}\n\n{text}\n")
    print(overview(results))


def run(
    pair: tuple[ad.AnnData, ...], left_out: Any, direction: Direction, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Train on the other cells, predict those left out, and score."""
    known = tuple(cells[~left_out].copy() for cells in pair)
    new = tuple(cells[left_out].copy() for cells in pair)
    cisformer.preprocess(
        *known, folder, direction=direction, reference="dataset", manually=True, seed=options.seed, force=True
    )
    config = default_config(direction, "small")
    changes = {"SEED": options.seed} | ({} if options.epochs is None else {"epoch": options.epochs})
    config = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    best = cisformer.train(
        folder / f"{direction}_all", direction=direction, save=folder / "save", config=config
    )
    closed_form = load_checkpoint(best.folder.parent / "epoch0", direction)
    model = case(best, known, new, direction)
    report = evaluate_case(
        model, others={LINEAR: case(closed_form, known, new, direction).predicted}, seed=options.seed
    )
    return {"report": slim(report), "costs": {}, "checkpoint": best.metrics}


def case(
    checkpoint: Checkpoint, known: tuple[ad.AnnData, ...], new: tuple[ad.AnnData, ...], direction: Direction
) -> Case:
    """Match the prediction of the new cells with what was measured in them and in the others."""
    source = INPUT[direction]
    predicted = cisformer.predict(checkpoint, new[source], direction=direction)
    files = TrainingFiles(known[source], known[1 - source], new[source])
    return case_of_files(predicted, new[1 - source], files, direction=direction)


if __name__ == "__main__":
    main()
