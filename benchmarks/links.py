"""Measure links against planted ones: what they find, whether p-values are honest, what they cost.

    python benchmarks/links.py WORK --seeds 101 202 [--modes contact uniform no-coupling] [--epochs 20]
    python benchmarks/links.py WORK --seeds 101 --null [--figure docs/_static/links_qq.png]
    python benchmarks/links.py WORK --power --seeds 101
    python benchmarks/links.py WORK --cost

Each seed and mode gives 2,000 simulated cells, 5,000 genes and 40,000 cCREs (seeds 11 and 12 served to choose how
weights are estimated); the `small` preset is trained on 72 % of the cells, and all cells are linked. Pairs count if
the gene is seen in at least 10 % of the cells, the cCRE in 5 %, and they lie between 500 bp and 250 kb apart. "Told the
truth" is a logistic regression on log distance, association, coupling and log accessibility × contact share, fitted to
the very pairs that it is scored on. Over all cells, a pair has the mean of the types that list it. `--null` shuffles
the RNA of cells within type and depth decile: no link is left; it tests pooled over types, per type, and with six
random donors as replicates. `--power` links 250 to 4,000 cells. `--cost` links human-reference cells with the default
configuration and the documented sizes. Prints markdown; CPU seconds are of all threads.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression

from cisformer.config import default_config
from cisformer.data.genome import window_pairs
from cisformer.data.preprocess import preprocess
from cisformer.data.store import CellStore
from cisformer.links.files import Links
from cisformer.links.precision import average_precision, bootstrap_interval
from cisformer.links.score import score_links
from cisformer.links.statistics import distance_contact
from cisformer.model.checkpoint import Checkpoint
from cisformer.simulation import SimulatedCells, simulate
from cisformer.training.loop import train

SEEN_GENE, SEEN_CCRE = 0.10, 0.05
NEAREST_BP, FARTHEST_BP = 500, 250_000
HALF = "half "


def prepare(
    work: Path, mode: str, seed: int, epochs: int, n_cells: int = 2000
) -> tuple[SimulatedCells, CellStore, Checkpoint]:
    """Simulate, preprocess and train; return the cells, a store of all of them and the best checkpoint."""
    cells = simulate(n_cells, mode=mode, seed=seed)
    return cells, *trained(cells, work / f"{mode}{seed}_{n_cells}", epochs)


def trained(cells: SimulatedCells, folder: Path, epochs: int) -> tuple[CellStore, Checkpoint]:
    """Preprocess cells and train on some of them; return a store of all and the best checkpoint."""
    options = {"direction": "atac2rna", "reference": "dataset", "force": True}
    preprocess(cells.rna, cells.atac, folder, **options)
    store = preprocess(cells.rna, cells.atac, folder, manually=True, **options)["all"]
    config = default_config("atac2rna", "small")
    training = config.training.model_copy(update={"epoch": epochs})
    checkpoint = train(
        folder, "links", direction="atac2rna", save=folder / "save", cpu=True,
        config=config.model_copy(update={"training": training}),
    )  # fmt: skip
    return store, checkpoint


def judged_pairs(cells: SimulatedCells, rows: np.ndarray | None = None) -> pd.DataFrame:
    """Return pairs that count (among cells `rows`), whether they are links in any type, and Pearson correlations."""
    rna, atac = (cells.rna, cells.atac) if rows is None else (cells.rna[rows], cells.atac[rows])
    genes = rna.var.reset_index(names="gene_name")
    regions = atac.var.reset_index(drop=True)
    gene, ccre = window_pairs(genes, regions, FARTHEST_BP)
    tss = np.where(genes["strand"] == "-", genes["end"] - 1, genes["start"])
    distance = np.abs((regions["start"] + regions["end"]).to_numpy()[ccre] // 2 - tss[gene])
    counts = rna.X.toarray()
    is_open = atac.X.toarray().astype(np.float32)
    kept = ((counts > 0).mean(0)[gene] >= SEEN_GENE) & (is_open.mean(0)[ccre] >= SEEN_CCRE)
    kept &= (distance > NEAREST_BP) & (distance <= FARTHEST_BP)
    gene, ccre, distance = gene[kept], ccre[kept], distance[kept].astype(float)
    expression = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    left = (expression - expression.mean(0)) / np.maximum(expression.std(0), 1e-9)
    right = (is_open - is_open.mean(0)) / np.maximum(is_open.std(0), 1e-9)
    pearson = np.array([left[:, g] @ right[:, c] for g, c in zip(gene, ccre, strict=True)]) / len(left)
    table = pd.DataFrame(
        {
            "gene_id": genes["gene_id"].to_numpy()[gene], "ccre": atac.var_names.to_numpy()[ccre],
            "distance_bp": distance, "pearson": pearson,
            "activity_distance": is_open.mean(0)[ccre] * distance_contact(distance),
        }
    )  # fmt: skip
    return mark_links(table, cells.links)


def mark_links(table: pd.DataFrame, links: pd.DataFrame) -> pd.DataFrame:
    """Add `is_link`: whether the pair is planted."""
    planted = pd.MultiIndex.from_frame(links[["gene_id", "ccre"]])
    return table.assign(is_link=pd.MultiIndex.from_frame(table[["gene_id", "ccre"]]).isin(planted))


def judged_methods(cells: SimulatedCells, links: Links) -> tuple[pd.DataFrame, dict[str, pd.Series]]:
    """Return the pairs that count, with their scores over all cells, and what each method says of them."""
    pairs = judged_pairs(cells)
    columns = ["score", "prior", "association", "coupling", "attention", "activity_contact"]
    best = links.table.groupby(["gene_id", "ccre"])[columns].mean()
    effect = links.table.groupby(["gene_id", "ccre"])["effect"].mean()
    pairs = pairs.merge(best.assign(effect=effect).reset_index(), on=["gene_id", "ccre"], how="left").fillna(
        0
    )
    methods = {
        "distance": -pairs["distance_bp"],
        "Pearson": pairs["pearson"],
        "Pearson × (d + 5 kb)^-0.7": pairs["pearson"] * (pairs["distance_bp"] + 5_000) ** -0.7,
        "accessibility × contact": pairs["activity_distance"],
        **({"attention": pairs["attention"]} if links.table["attention"].notna().any() else {}),
        "effect": -pairs["effect"],
        "coupling": pairs["coupling"],
        "association": pairs["association"],
        "prior": pairs["prior"],
        "told the truth": told_the_truth(pairs),
        "score": pairs["score"],
    }
    return pairs, methods


def found_links(cells: SimulatedCells, links: Links) -> None:
    """Print average precisions of pairs over all cells, and of pairs in each type."""
    pairs, methods = judged_methods(cells, links)
    print(f"\npairs, all cells: {len(pairs):,}, {pairs['is_link'].mean():.1%} planted\n")
    areas = print_areas(methods, pairs)
    simple = max(areas[name] for name in list(methods)[:4])
    print(f"\nscore / best of the first four: {areas['score'] / simple:.3f}")
    print(f"score / told the truth: {areas['score'] / areas['told the truth']:.3f}")
    print(f"reliability (predicted, planted) by tenth: {reliability(pairs)}")

    by_type = []
    for name in links.cell_num:
        own = judged_pairs(cells, np.flatnonzero(cells.rna.obs["cell_type"] == name))
        own = mark_links(own, cells.links[cells.links["cell_type"] == name])
        scores = links.table[links.table["cell_type"] == name][["gene_id", "ccre", "score"]]
        by_type.append(own.merge(scores, on=["gene_id", "ccre"], how="left").fillna(0))
    table = pd.concat(by_type)
    table = table.merge(pairs[["gene_id", "ccre", "pearson"]], on=["gene_id", "ccre"], suffixes=("", "_all"))
    print(f"\npairs, in each type: {len(table):,}, {table['is_link'].mean():.1%} planted\n")
    print_areas(
        {
            "distance": -table["distance_bp"],
            "Pearson in the type": table["pearson"],
            "Pearson × (d + 5 kb)^-0.7, all cells": table["pearson_all"]
            * (table["distance_bp"] + 5_000) ** -0.7,
            "score": table["score"],
        },
        table,
    )


def told_the_truth(pairs: pd.DataFrame) -> pd.Series:
    """Return the log odds of a logistic regression fitted to these pairs."""
    known = np.column_stack(
        [
            np.log(pairs["distance_bp"] + 5_000), pairs["association"], pairs["coupling"].clip(-6, 6),
            np.log(pairs["activity_contact"] + 1e-5),
        ]
    )  # fmt: skip
    known = (known - known.mean(axis=0)) / known.std(axis=0)
    model = LogisticRegression(C=1e4, max_iter=1000).fit(known, pairs["is_link"])
    return pd.Series(model.decision_function(known), pairs.index)


def reliability(pairs: pd.DataFrame) -> str:
    """Return mean score and share of links of pairs by tenth of their score."""
    rows = np.array_split(np.argsort(pairs["score"].to_numpy()), 10)
    parts = [pairs.iloc[part] for part in rows]
    return ", ".join(f"{part['score'].mean():.2f} {part['is_link'].mean():.2f}" for part in parts)


def type_specific(cells: SimulatedCells, links: Links) -> None:
    """Print how well types in which a planted link works are told from those in which its cCRE is open, but idle."""
    for name in ("specificity", "score", "activity_contact", "expression"):
        area, total = told_apart(cells, links, name)
        print(f"type in which a link works, told by {name}: AUROC {area:.3f} ({total:,} comparisons)")


def told_apart(cells: SimulatedCells, links: Links, name: str) -> tuple[float, int]:
    """Return the AUROC by which a column tells types in which a link works, and the number of comparisons."""
    table = links.table.merge(
        cells.links[["gene_id", "ccre", "promoter"]].drop_duplicates(), on=["gene_id", "ccre"]
    )
    share = table["n_open"] / table["cell_type"].map(links.cell_num)
    seen = pd.Series((cells.rna.X > 0).mean(axis=0).A1, cells.rna.var["gene_id"].to_numpy())
    table = table[~table["promoter"] & (share >= SEEN_CCRE) & (table["gene_id"].map(seen) >= SEEN_GENE)]
    planted = pd.MultiIndex.from_frame(cells.links[["gene_id", "ccre", "cell_type"]])
    works = pd.MultiIndex.from_frame(table[["gene_id", "ccre", "cell_type"]]).isin(planted)
    right, total = 0.0, 0
    for _, part in table.assign(works=works).groupby(["gene_id", "ccre"]):
        inside, outside = part.loc[part["works"], name].to_numpy(), part.loc[~part["works"], name].to_numpy()
        right += (inside[:, None] > outside).sum() + 0.5 * (inside[:, None] == outside).sum()
        total += len(inside) * len(outside)
    return right / total, total


def print_areas(methods: dict[str, pd.Series], pairs: pd.DataFrame) -> dict[str, float]:
    """Print a table of average precisions with 95 % intervals (genes drawn anew); return the former."""
    is_link, gene = pairs["is_link"].to_numpy(), pd.factorize(pairs["gene_id"])[0]
    print("| by | AUPRC | 95 % |\n|---|---|---|")
    areas = {}
    for name, values in methods.items():
        score = values.to_numpy(float)
        areas[name] = average_precision(is_link, score)
        low, high = bootstrap_interval(is_link, score, gene, 200, 0)
        print(f"| {name} | {areas[name]:.3f} | {low:.3f}–{high:.3f} |")
    return areas


def split_halves(cells: SimulatedCells, store: CellStore, checkpoint: Checkpoint, seed: int) -> None:
    """Print how the scores of halves of a type agree with each other, and with halves of other types."""
    rng = np.random.default_rng(seed)
    types = cells.rna.obs["cell_type"].astype(str)
    half = types + pd.Series(rng.integers(0, 2, len(types)), index=types.index).map(lambda n: f"|{HALF}{n}")
    table = score_links(checkpoint, store, half).table
    wide = table.pivot_table(index=["gene_id", "ccre"], columns="cell_type", values="score").dropna()
    for label, values in (
        ("scores", wide),
        ("less the mean of all halves", wide.sub(wide.mean(axis=1), axis=0)),
    ):
        agreement = values.corr(method="spearman")
        same = [
            agreement.loc[a, b]
            for a in values
            for b in values
            if a < b and a.split("|")[0] == b.split("|")[0]
        ]
        other = [
            agreement.loc[a, b]
            for a in values
            for b in values
            if a < b and a.split("|")[0] != b.split("|")[0]
        ]
        print(f"split halves, {label}: Spearman {np.mean(same):.3f} with the other half of the type ", end="")
        print(
            f"(least {min(same):.3f}), {np.mean(other):.3f} with halves of other types (most {max(other):.3f})"
        )


def null_calibration(
    work: Path, cells: SimulatedCells, checkpoint: Checkpoint, seed: int, figure: Path | None
) -> None:
    """Print inflation and false discoveries when RNA is shuffled within type and depth decile."""
    rng = np.random.default_rng(seed)
    depth = np.asarray(cells.rna.X.sum(axis=1)).ravel()
    types = cells.rna.obs["cell_type"]
    order = np.arange(len(depth))
    for name in types.cat.categories:
        rows = np.flatnonzero(types == name)
        decile = pd.qcut(depth[rows], 10, labels=False, duplicates="drop")
        for number in np.unique(decile):
            order[rows[decile == number]] = rng.permutation(rows[decile == number])
    rna = cells.rna.copy()
    rna.X = cells.rna.X[order]
    rna.obs["donor6"] = [f"d{number}" for number in rng.integers(0, 6, rna.n_obs)]
    store = preprocess(
        rna,
        cells.atac,
        work / f"null{seed}",
        direction="atac2rna",
        reference="dataset",
        manually=True,
        force=True,
    )["all"]
    for label, options in (("cells as replicates", {}), ("six donors as replicates", {"donor": "donor6"})):
        print(f"\n{label}")
        print_null(score_links(checkpoint, store, types.astype(str), **options).table, types, figure)
        figure = None


def print_null(table: pd.DataFrame, types: pd.Series, figure: Path | None) -> None:
    """Print inflation and false discoveries by type."""
    tested = table[table["p_value"].notna()]
    print(
        "\n| cell type | cells | tested | λ | p < 0.0001, over 0.0001 | FDR < 0.05 |\n|---|---|---|---|---|---|"
    )
    for name, part in [*tested.groupby("cell_type"), ("all", tested)]:
        n_cells = int((types == name).sum()) or len(types)
        false = (part["fdr"] < 0.05).sum()
        tail = (part["p_value"] < 1e-4).mean() / 1e-4
        print(
            f"| {name} | {n_cells:,} | {len(part):,} | {inflation(part['p_value']):.3f} | {tail:.2f} ", end=""
        )
        print(f"| {false / len(part):.5%} |")
    if figure is not None:
        draw_qq(tested, figure)
        print(f"\nwrote {figure}")


def inflation(p_value: pd.Series) -> float:
    """Return λ: the median χ² of the p-values over its expectation."""
    return float(stats.chi2.isf(np.median(p_value), 1) / stats.chi2.isf(0.5, 1))


def draw_qq(tested: pd.DataFrame, path: Path) -> None:
    """Draw observed against expected p-values of each type."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for name, part in tested.groupby("cell_type"):
            observed = -np.log10(np.sort(part["p_value"]))
            expected = -np.log10((np.arange(len(part)) + 0.5) / len(part))
            axes.plot(expected, observed, ".", ms=3, label=f"{name}, λ = {inflation(part['p_value']):.2f}")
        n = tested["cell_type"].value_counts().min()  # the widest band
        grid = np.arange(1, int(n) + 1, max(1, int(n) // 5000))
        band = [-np.log10(stats.beta.ppf(q, grid, n - grid + 1)) for q in (0.025, 0.975)]
        axes.fill_between(-np.log10(grid / n), *band, color="0.85", lw=0, zorder=0)
        axes.axline((0, 0), slope=1, color="0.3", lw=0.8)
        axes.set_xlabel("expected −log10 p")
        axes.set_ylabel("observed −log10 p")
        axes.legend(frameon=False, fontsize=6, loc="upper left", handletextpad=0.2)
        figure.savefig(path, dpi=200)


def print_power(work: Path, seeds: list[int], epochs: int) -> None:
    """Print which share of planted links is found at score_fdr 0.5 and fdr 0.05, by number of cells."""
    print("\n| cells | cells in a type (median) | planted links | score_fdr < 0.5 | p-value, fdr < 0.05 |")
    print("|---|---|---|---|---|")
    for seed in seeds:
        for n_cells in (250, 500, 1000, 2000, 4000):
            cells, store, checkpoint = prepare(work, "contact", seed, epochs, n_cells)
            links = score_links(checkpoint, store, cells.rna.obs["cell_type"].astype(str))
            wanted = cells.links[~cells.links["promoter"]][["gene_id", "ccre", "cell_type"]]
            found = wanted.merge(links.table, on=["gene_id", "ccre", "cell_type"], how="left")
            shares = (found["score_fdr"] < 0.5).mean(), (found["fdr"] < 0.05).mean()
            median = int(np.median(list(links.cell_num.values())))
            print(f"| {n_cells:,} | {median:,} | {len(found):,} | {shares[0]:.1%} | {shares[1]:.2%} |")


def cost(work: Path) -> None:
    """Print CPU time per cell and peak memory at the documented sizes, human reference."""
    cells = simulate(n_cells=400, n_genes=15_000, n_ccres=100_000, seed=7)
    folder = work / "cost"
    store = preprocess(cells.rna, cells.atac, folder, direction="atac2rna", manually=True, force=True)["all"]
    config = default_config("atac2rna")
    training = config.training.model_copy(update={"epoch": 0})
    config = config.model_copy(update={"training": training})
    checkpoint = train(
        store.path, "cost", direction="atac2rna", save=folder / "save", config=config, cpu=True
    )
    torch.nn.init.normal_(
        checkpoint.model.cis.pair_value.weight, std=0.01
    )  # it attends, as trained models do
    types = cells.rna.obs["cell_type"].astype(str)
    print(
        "\n| cells | open cCREs | pairs | links | CPU-s | CPU-s a cell | peak GB |\n|---|---|---|---|---|---|---|"
    )
    for n_cells in (100, 200, 400):
        started = time.process_time()
        links = score_links(checkpoint, store, types[:n_cells])
        seconds = time.process_time() - started
        opened = cells.atac.X[:n_cells].sum(axis=1).mean()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        pairs = len(checkpoint.model.cis.window_gene)
        print(f"| {n_cells} | {opened:,.0f} | {pairs:,} | {len(links.table):,} ", end="")
        print(f"| {seconds:.1f} | {seconds / n_cells:.3f} | {peak:.2f} |")


def main() -> None:
    """Parse the command line and print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--modes", nargs="*", default=["contact", "uniform", "no-coupling"])
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--null", action="store_true")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--cost", action="store_true")
    given = parser.parse_args()
    if given.power:
        print_power(given.work, given.seeds, given.epochs)
        return
    for mode, seed in ((mode, seed) for mode in given.modes for seed in given.seeds):
        print(f"\n### {mode}, seed {seed}")
        cells, store, checkpoint = prepare(given.work, mode, seed, given.epochs)
        if given.null:
            null_calibration(given.work, cells, checkpoint, seed, given.figure)
            continue
        started = time.process_time()
        links = score_links(checkpoint, store, cells.rna.obs["cell_type"].astype(str))
        seconds = time.process_time() - started
        found_links(cells, links)
        type_specific(cells, links)
        print(
            f"\nlinking: {seconds / len(cells.rna):.3f} CPU-s a cell; best epoch {checkpoint.metrics['epoch']}\n"
        )
        split_halves(cells, store, checkpoint, seed)
    if given.cost:
        cost(given.work)


if __name__ == "__main__":
    main()
