"""Prediction beside the baselines on sets that nobody tuned on: parts of the real ones, and a generator of its own.

    python benchmarks/unseen.py DATA [--sets trajectory mop_thinned …] [--directions rna2atac atac2rna] [--epochs 0]

DATA holds a folder per set with rna.h5ad and atac.h5ad. Each set is split, learnt (closed form alone by default, preset
`small`) and scored by `evaluate_case`, all with `SEED`; a line per score: ours, then each baseline, with + where ours
is better by the paired interval, - where it is worse.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

import cisformer
from cisformer.config import DIRECTIONS, Direction, TrainingChoice
from cisformer.evaluation.case import Case
from cisformer.evaluation.case_files import TrainingFiles, case_of_files
from cisformer.evaluation.case_store import case_of_store
from cisformer.evaluation.evaluate import EvaluationReport, evaluate_case
from cisformer.evaluation.probabilities import PROBABILITY_FLOOR

SEED = 23
Pair = tuple[ad.AnnData, ad.AnnData]
"""RNA and ATAC of the same cells."""
BASELINES = ("mean profile", "kNN", "PCA-ridge", "kernel ridge")
CORTEX = "snareseq_mop_10309"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--epochs", type=int, default=0)
    options = parser.parse_args()
    for name in options.sets:
        for direction in options.directions:
            with tempfile.TemporaryDirectory() as folder:
                train, test = SETS[name](options.data)
                case = learn(train, test, direction, options.epochs, Path(folder))
                print(
                    f"== {name} {direction}: {case.train_input.shape[0]} training, {case.truth.shape[0]} test cells"
                )
                print(shown(evaluate_case(case, seed=SEED)), flush=True)


def learn(train: Pair, test: Pair | None, direction: Direction, epochs: int, folder: Path) -> Case:
    """Learn from cells and predict others: `test`, or a fifth of those given."""
    for cells in (*train, *(test or ())):
        cells.obs = cells.obs.drop(columns="cell_type", errors="ignore")
    cisformer.preprocess(
        *train, folder, direction=direction, reference="dataset", seed=SEED, manually=test is not None
    )
    config = TrainingChoice("small", epochs=epochs).config(direction)
    config = config.model_copy(update={"training": config.training.model_copy(update={"SEED": SEED})})
    data = folder if test is None else folder / f"{direction}_all"
    model = cisformer.train(data, "unseen", direction=direction, save=folder / "save", config=config)
    if test is None:
        return case_of_store(folder, model, seed=SEED)
    given = 0 if direction == "rna2atac" else 1
    predicted = cisformer.predict(model, test[given], min_prob=PROBABILITY_FLOOR)
    files = TrainingFiles(train[given], train[1 - given], test[given])
    return case_of_files(predicted, test[1 - given], files, direction=direction)


def shown(report: EvaluationReport) -> str:
    """Return the scores as text, one a line."""
    marks = {"better": "+", "tie": "=", "worse": "-", "": ""}
    lines = []
    for key, score in report.scores["model"].items():
        others = (
            f"{name} {report.scores[name][key]['value']:.5f}{marks[report.outcome(key, name)]}"
            for name in BASELINES
        )
        lines.append(f"{key:22s} {score['value']:.5f} | {' | '.join(others)}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- sets


def read(data: Path, name: str) -> Pair:
    rna, atac = (ad.read_h5ad(data / name / f"{side}.h5ad") for side in ("rna", "atac"))
    return rna, atac


def with_cells(pair: Pair, rows: np.ndarray) -> Pair:
    rna = pair[0][rows].copy()
    return rna, pair[1][rna.obs_names].copy()


def some(pair: Pair, n_cells: int) -> Pair:
    """Cells drawn at random."""
    rng = np.random.default_rng(SEED)
    return with_cells(pair, np.sort(rng.choice(pair[0].n_obs, n_cells, replace=False)))


def not_empty(rna: ad.AnnData, atac: ad.AnnData) -> Pair:
    sides = (sp.csr_matrix(rna.X), sp.csr_matrix(atac[rna.obs_names].X))
    return with_cells(
        (rna, atac), np.flatnonzero(np.all([side.getnnz(axis=1) > 0 for side in sides], axis=0))
    )


def thinned(pair: Pair, share: float) -> Pair:
    """Each count kept with a probability of `share`."""
    rng, sides = np.random.default_rng(SEED), []
    for cells in pair:
        counts = sp.csr_matrix(cells.X)
        counts.data = rng.binomial(counts.data.astype(int), share).astype(np.float32)
        counts.eliminate_zeros()
        sides.append(ad.AnnData(counts, obs=cells.obs, var=cells.var))
    return not_empty(*sides)


def features(pair: Pair, side: int, number: int) -> Pair:
    """Genes (side 0) or peaks (side 1) drawn at random."""
    sides = list(pair)
    chosen = np.random.default_rng(SEED).choice(pair[side].n_vars, number, replace=False)
    sides[side] = pair[side][:, np.sort(chosen)].copy()
    return not_empty(*sides)


def markers(pair: Pair, number: int) -> Pair:
    """The genes whose mean log expression varies most between types."""
    counts, types = sp.csr_matrix(pair[0].X).astype(np.float64), pair[0].obs["cell_type"]
    values = sp.csr_matrix(counts.multiply(1e4 / counts.sum(axis=1))).log1p()
    means = np.array([np.asarray(values[(types == t).to_numpy()].mean(axis=0))[0] for t in types.unique()])
    return not_empty(pair[0][:, np.sort(np.argsort(-means.var(axis=0))[:number])].copy(), pair[1])


def named(table: pd.DataFrame) -> pd.DataFrame:
    return table.set_index(table["chrom"] + ":" + table["start"].astype(str) + "-" + table["end"].astype(str))


def pooled(pair: Pair, size: int) -> Pair:
    """Sums of `size` cells of one type."""
    rng, types = np.random.default_rng(SEED), pair[0].obs["cell_type"]
    of_type = [rng.permutation(np.flatnonzero((types == t).to_numpy())) for t in sorted(types.unique())]
    cells = np.concatenate([rows[: len(rows) // size * size] for rows in of_type])
    pool = np.repeat(np.arange(len(cells) // size), size)
    sums = sp.csr_matrix((np.ones(len(cells), np.float32), (pool, cells)), (pool[-1] + 1, len(types)))
    obs = pd.DataFrame(index=[f"p{i}" for i in range(sums.shape[0])])
    rna, atac = pair[0], pair[1][pair[0].obs_names]
    first, second = (ad.AnnData(sums @ sp.csr_matrix(x.X), obs=obs.copy(), var=x.var) for x in (rna, atac))
    return first, second


def dominated(pair: Pair, cell_type: str, n_cells: int, share: float) -> Pair:
    """Cells of which `share` are of one type."""
    rng, of_type = np.random.default_rng(SEED), (pair[0].obs["cell_type"] == cell_type).to_numpy()
    many = int(n_cells * share)
    rows = [rng.choice(np.flatnonzero(of_type), many, replace=False)]
    rows.append(rng.choice(np.flatnonzero(~of_type), n_cells - many, replace=False))
    return with_cells(pair, np.sort(np.concatenate(rows)))


def left_out(pair: Pair, column: str, value: str, most: int | None = None) -> tuple[Pair, Pair]:
    """Training cells, at most so many, and those of one type or batch as test cells."""
    tested = (pair[0].obs[column].astype(str) == value).to_numpy()
    train = np.flatnonzero(~tested)
    if most is not None:
        train = np.sort(np.random.default_rng(SEED).choice(train, most, replace=False))
    return with_cells(pair, train), with_cells(pair, np.flatnonzero(tested))


def few(pair: Pair, n_train: int, n_test: int, seed: int = SEED) -> tuple[Pair, Pair]:
    order = np.random.default_rng(seed).permutation(pair[0].n_obs)
    parts = np.sort(order[:n_train]), np.sort(order[n_train : n_train + n_test])
    return with_cells(pair, parts[0]), with_cells(pair, parts[1])


def trajectory(
    seed: int,
    *,
    n_cells: int = 2500,
    n_genes: int = 1500,
    n_peaks: int = 12_000,
    umi: int = 1500,
    n_open: int = 600,
) -> Pair:
    """Cells along a trajectory with one branching, that our simulator knows nothing of.

    25 transcription factors rise and fall along it, some on one branch only; two act on each peak, up or down. Genes
    follow peaks near them and some factors. Three batches differ in every feature and in depth; counts are negative
    binomial; a tenth of each cell's RNA is ambient; a twentieth of the cells are doublets.
    """
    rng, n_factors = np.random.default_rng(seed), 25
    time = rng.random(n_cells)
    branch = rng.integers(0, 2, n_cells) * (time > 0.45)
    centre, width, only = (
        rng.random(n_factors),
        rng.uniform(0.08, 0.35, n_factors),
        rng.integers(-1, 2, n_factors),
    )
    there = (only < 0) | (time[:, None] <= 0.45) | (branch[:, None] == only)
    factors = np.exp(-0.5 * ((time[:, None] - centre) / width) ** 2) * np.where(there, 1, 0.05)
    factors -= factors.mean(axis=0)
    batch = rng.integers(0, 3, n_cells)

    effect = np.zeros((n_factors, n_peaks))
    for _ in range(2):
        effect[rng.integers(0, n_factors, n_peaks), np.arange(n_peaks)] += rng.normal(0, 1.8, n_peaks)
    effect *= rng.random(n_peaks) < 0.6
    log_odds = rng.normal(-3.2, 1.1, n_peaks) + factors @ effect + rng.normal(0, 0.3, (3, n_peaks))[batch]
    access = 1 / (1 + np.exp(-log_odds))
    chrom = np.sort(rng.integers(1, 20, n_peaks))
    start = np.zeros(n_peaks, int)
    for c in range(1, 20):
        start[chrom == c] = np.sort(rng.integers(10**5, 10**8, (chrom == c).sum()))

    tss = np.sort(rng.choice(n_peaks, n_genes, replace=False))
    rate = rng.normal(0, 1.5, n_genes) + rng.normal(0, 0.35, (3, n_genes))[batch]
    for _ in range(4):
        near = access[:, np.clip(tss + rng.integers(-6, 7, n_genes), 0, n_peaks - 1)]
        weight = np.abs(rng.normal(0, 0.3, n_genes)) * (rng.random(n_genes) < 0.6)
        rate = rate + (near - near.mean(axis=0)) / near.std(axis=0) * weight
    direct = rng.normal(0, 0.8, (n_factors, n_genes)) * (rng.random((n_factors, n_genes)) < 0.1)
    share = np.exp(rate + factors @ direct)
    share /= share.sum(axis=1, keepdims=True)

    double, other = rng.random(n_cells) < 0.05, rng.integers(0, n_cells, n_cells)
    share[double] = (share[double] + share[other[double]]) / 2
    both = access.copy()
    both[double] = 1 - (1 - access[double]) * (1 - access[other[double]])
    share = 0.9 * share + 0.1 * share.mean(axis=0)
    size = umi * rng.lognormal(0, 0.5, n_cells) * np.array([1, 0.7, 1.3])[batch]
    rna = rng.poisson(rng.gamma(2.0, share * size[:, None] / 2.0))
    depth = rng.lognormal(0, 0.4, n_cells) * np.array([1, 1.2, 0.8])[batch]
    scale = n_open / both.sum(axis=1).mean()
    atac = rng.poisson(both * scale * depth[:, None] + 0.002 * scale)

    obs = pd.DataFrame({"batch": [f"b{b}" for b in batch]}, index=[f"c{i:05d}" for i in range(n_cells)])
    names = np.array([f"chr{c}" for c in chrom])
    genes = pd.DataFrame(
        {"chrom": names[tss], "start": start[tss], "end": start[tss] + 10_000, "strand": "+"},
        index=[f"G{i}" for i in range(n_genes)],
    )
    peaks = named(pd.DataFrame({"chrom": names, "start": start, "end": start + 500}))
    single = ~peaks.index.duplicated()
    sides = (sp.csr_matrix(rna.astype(np.float32)), sp.csr_matrix(atac.astype(np.float32))[:, single])
    return not_empty(
        ad.AnnData(sides[0], obs=obs, var=genes), ad.AnnData(sides[1], obs=obs.copy(), var=peaks[single])
    )


def whole(make: Callable[[Path], Pair]) -> Callable[[Path], tuple[Pair, None]]:
    """A set of which a fifth of the cells is tested on."""
    return lambda data: (make(data), None)


SETS: dict[str, Callable[[Path], tuple[Pair, Pair | None]]] = {
    "mop_2500": whole(lambda data: some(read(data, CORTEX), 2500)),
    "mop_thinned": whole(lambda data: thinned(some(read(data, CORTEX), 4000), 0.3)),
    "mop_2000_peaks": whole(lambda data: features(some(read(data, CORTEX), 4000), 1, 2000)),
    "mop_200_genes": whole(lambda data: features(some(read(data, CORTEX), 4000), 0, 200)),
    "mop_100_markers": whole(lambda data: markers(some(read(data, CORTEX), 4000), 100)),
    "mop_nine_tenths_L2/3": whole(lambda data: dominated(read(data, CORTEX), "L2/3", 3000, 0.9)),
    "mop_pooled_by_5": whole(lambda data: pooled(read(data, CORTEX), 5)),
    "mop_150_cells": lambda data: few(read(data, CORTEX), 150, 800),
    "bmmc_A": whole(lambda data: read(data, "bmmc_starter_A")),
    "bmmc_B": whole(lambda data: read(data, "bmmc_starter_B")),
    "bmmc_A_100_peaks": whole(lambda data: features(read(data, "bmmc_starter_A"), 1, 100)),
    "bmmc_B_100_genes": whole(lambda data: features(read(data, "bmmc_starter_B"), 0, 100)),
    "bmmc_A_without_NK": lambda data: left_out(read(data, "bmmc_starter_A"), "cell_type", "NK"),
    "bmmc_B_without_Erythroblast": lambda data: left_out(
        read(data, "bmmc_starter_B"), "cell_type", "Erythroblast"
    ),
    "scpoem": whole(lambda data: read(data, "scpoem_S1_300")),
    "k562": whole(lambda data: read(data, "k562_chr22_95")),
    "trajectory": whole(lambda data: trajectory(1)),
    "trajectory_deep": whole(
        lambda data: trajectory(2, n_cells=1200, n_genes=3000, n_peaks=8000, umi=15_000, n_open=2500)
    ),
    "trajectory_batch": lambda data: left_out(trajectory(3), "batch", "b2"),
    "trajectory_150_cells": lambda data: few(trajectory(4), 150, 800, seed=4),
}


if __name__ == "__main__":
    main()
