"""Do compared links tell planted differences from depth, expression and donors?

    python benchmarks/contrasts.py [--seeds 1 2 3] [--n_cells 4000]
    python benchmarks/contrasts.py --real FOLDER --batch batch

Simulated cells of two types (`cisformer.simulate`) get donors, of two conditions. In the first half of some pairs that
no link joins, a cCRE raises its gene in condition A alone: counts are added in cells in which it is open, and in B as
many in any cells, so that the gene's level is the same. In the second half it does so in one donor alone, which is no
difference between conditions. Then B loses half of its RNA and 40 % of its open cCREs, and two
thirds of genes 60 % of their counts in one condition or the other.

`--real` takes real cells (rna.h5ad and atac.h5ad in FOLDER, donors or batches in a column of obs), gives each batch, or
each cell, one of two conditions at random, and confounds them likewise: nothing is to be found.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from cisformer import compare_links, preprocess, simulate
from cisformer.data.genome import region_names, window_pairs

GROUPS = ("A", "B")
SEEN_GENE, SEEN_CCRE = 0.1, 0.05


@dataclass(frozen=True)
class Planting:
    """How many cells, donors and differences, and how strong."""

    n_cells: int = 2000
    n_genes: int = 400
    n_ccres: int = 3000
    n_donors: int = 4
    n_pairs: int = 60
    effect: float = 2.5
    seed: int = 0
    confounded: bool = True


@dataclass(frozen=True)
class PlantedCells:
    """Cells of two conditions, the candidate pairs, and which of them differ."""

    rna: object
    atac: object
    pairs: pd.DataFrame


def plant(options: Planting) -> PlantedCells:
    """Simulate cells with planted differences of links; `pairs` has columns gene_id, ccre and kind."""
    rng = np.random.default_rng(options.seed)
    cells = simulate(options.n_cells, options.n_genes, options.n_ccres, n_types=2, seed=options.seed)
    rna, atac = cells.rna.copy(), cells.atac.copy()
    donor = rng.integers(0, 2 * options.n_donors, options.n_cells)
    in_a = donor < options.n_donors
    rna.obs["condition"] = np.where(in_a, *GROUPS)
    rna.obs["donor"] = [f"d{number}" for number in donor]
    counts, is_open = rna.X.toarray(), atac.X.toarray() > 0
    pairs = _pairs(cells, counts, is_open)
    free = np.flatnonzero((pairs["kind"] == "none") & pairs["seen"])
    _, first = np.unique(rng.permutation(pairs["gene"].to_numpy()[free]), return_index=True)
    chosen = rng.permutation(free[first])[: options.n_pairs]
    half = len(chosen) // 2
    pairs.loc[chosen[:half], "kind"], pairs.loc[chosen[half:], "kind"] = "differs", "donors"
    size = counts.sum(axis=1) / counts.sum(axis=1).mean()
    for number, row in enumerate(chosen):
        gene, ccre = pairs["gene"][row], pairs["ccre_row"][row]
        works = in_a if number < half else donor == rng.integers(2 * options.n_donors)
        added = options.effect * counts[:, gene].mean() * size
        spread = is_open[:, ccre].mean()
        where = np.where(works, is_open[:, ccre], spread)
        counts[:, gene] += rng.poisson(added * where)
    if options.confounded:
        counts, is_open = _confound(counts, is_open, in_a, rng)
    rna.X, atac.X = sp.csr_matrix(counts.astype(np.float32)), sp.csr_matrix(is_open.astype(np.float32))
    return PlantedCells(rna, atac, pairs)


def _pairs(cells, counts: np.ndarray, is_open: np.ndarray) -> pd.DataFrame:
    genes = cells.rna.var.reset_index(drop=True)
    gene, ccre = window_pairs(genes, cells.atac.var.reset_index(drop=True), 100_000)
    seen = ((counts > 0).mean(axis=0) >= SEEN_GENE)[gene] & (is_open.mean(axis=0) >= SEEN_CCRE)[ccre]
    table = pd.DataFrame(
        {
            "gene_id": genes["gene_id"].to_numpy()[gene], "ccre": cells.atac.var_names.to_numpy()[ccre],
            "gene": gene, "ccre_row": ccre, "seen": seen,
        }
    )  # fmt: skip
    linked = pd.MultiIndex.from_frame(cells.links[["gene_id", "ccre"]])
    is_linked = pd.MultiIndex.from_frame(table[["gene_id", "ccre"]]).isin(linked)
    return table.assign(kind=np.where(is_linked, "both", "none"))


def _confound(
    counts: np.ndarray, is_open: np.ndarray, in_a: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Make depths and levels of expression differ between the conditions."""
    which = rng.integers(0, 3, counts.shape[1])
    kept = np.where((which[None] == 0) & in_a[:, None] | (which[None] == 1) & ~in_a[:, None], 0.4, 1.0)
    kept = kept * np.where(in_a, 1.0, 0.5)[:, None]
    seen = is_open & (rng.random(is_open.shape) < np.where(in_a, 1.0, 0.6)[:, None])
    return rng.binomial(counts.astype(np.int64), kept), seen


def compare(
    cells: PlantedCells, folder: Path, *, donor: str | None, condition: str = "condition"
) -> pd.DataFrame:
    """Compare the conditions; return the table of links with `kind`."""
    store = preprocess(
        cells.rna, cells.atac, folder, direction="atac2rna", reference="dataset", manually=True, force=True
    )["all"]
    path = folder / "pairs.tsv"
    cells.pairs[["gene_id", "ccre"]].to_csv(path, sep="\t", index=False)
    types = cells.rna.obs["cell_type"].astype(str)
    found = compare_links(path, store, types, GROUPS, condition=condition, donor=donor)
    return found.table.merge(cells.pairs[["gene_id", "ccre", "kind"]], on=["gene_id", "ccre"])


def real_null(folder: Path, batch: str, seed: int, *, by_batch: bool) -> PlantedCells:
    """Return real cells with conditions at random, confounded with depth and level; `pairs` within 100 kb."""
    import anndata

    rng = np.random.default_rng(seed)
    rna, atac = (anndata.read_h5ad(folder / name) for name in ("rna.h5ad", "atac.h5ad"))
    rna.obs["donor"] = rna.obs[batch].astype(str)
    names = rng.permutation(rna.obs["donor"].unique())
    chosen = rna.obs["donor"].isin(names[: len(names) // 2]).to_numpy()
    in_a = chosen if by_batch else rng.permutation(chosen)
    rna.obs["condition"] = np.where(in_a, *GROUPS)
    rna.obs["cell_type"] = "all"
    counts, is_open = _confound(rna.X.toarray(), atac.X.toarray() > 0, in_a, rng)
    rna.X, atac.X = sp.csr_matrix(counts.astype(np.float32)), sp.csr_matrix(is_open.astype(np.float32))
    atac.var_names = [str(name) for name in atac.var_names]
    return PlantedCells(rna, atac, pd.DataFrame())


def compare_real(cells: PlantedCells, folder: Path, donor: str | None) -> pd.DataFrame:
    """Compare all pairs within 100 kb."""
    store = preprocess(
        cells.rna, cells.atac, folder, direction="atac2rna", reference="dataset", manually=True, force=True
    )["all"]
    gene, ccre = window_pairs(store.reference.genes, store.reference.ccres, 100_000)
    pairs = pd.DataFrame(
        {
            "gene_id": store.reference.genes["gene_id"].to_numpy()[gene],
            "ccre": region_names(store.reference.ccres)[ccre],
        }
    )
    pairs.to_csv(folder / "pairs.tsv", sep="\t", index=False)
    types = cells.rna.obs["cell_type"].astype(str)
    found = compare_links(folder / "pairs.tsv", store, types, GROUPS, condition="condition", donor=donor)
    return found.table.assign(kind="none")


def inflation(p_value: pd.Series) -> float:
    """Return λ: the median χ² of the p-values over its expectation."""
    p = p_value.dropna()
    return float(stats.chi2.isf(p.median(), 1) / stats.chi2.isf(0.5, 1))


def permuted(cells: PlantedCells, rng: np.random.Generator, *, donors: bool) -> PlantedCells:
    """Exchange the conditions of donors (two of each condition), or of cells within types."""
    rna = cells.rna.copy()
    obs = rna.obs
    if donors:
        names = obs.groupby("condition")["donor"].unique()
        swapped = [
            name for group in GROUPS for name in rng.permutation(names[group])[: len(names[group]) // 2]
        ]
        other = np.where(obs["condition"] == GROUPS[0], GROUPS[1], GROUPS[0])
        obs["condition"] = np.where(obs["donor"].isin(swapped), other, obs["condition"])
    else:
        obs["condition"] = obs.groupby("cell_type", observed=True)["condition"].transform(
            lambda part: rng.permutation(part.to_numpy())
        )
    return PlantedCells(rna, cells.atac, cells.pairs)


def report(label: str, table: pd.DataFrame) -> None:
    """Print a row: λ of each kind, what is found at FDR 0.05, and what of it is false."""
    tested = table[table["p_value"].notna()]
    sure = tested["fdr"] < 0.05
    kinds = tested["kind"]
    lambdas = [inflation(tested.loc[kinds == kind, "p_value"]) for kind in ("none", "both")]
    true, wanted = (sure & (kinds == "differs")).sum(), (kinds == "differs").sum()
    false = [int((sure & (kinds == kind)).sum()) for kind in ("none", "both", "donors")]
    print(
        f"| {label} | {len(tested):,} | {lambdas[0]:.3f} | {lambdas[1]:.3f} | {true}/{wanted} | "
        f"{false[0]} + {false[1]} + {false[2]} |", flush=True,
    )  # fmt: skip


def main() -> None:
    """Parse the command line and print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--n_cells", type=int, default=4000)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--batch", default="batch")
    given = parser.parse_args()
    logging.getLogger("cisformer").setLevel(logging.ERROR)
    if given.real is not None:
        print(
            "| seed, conditions of, test | links tested | λ | p < 0.01 | FDR < 0.05 |\n|---|---|---|---|---|"
        )
        for seed, by_batch in ((seed, by_batch) for by_batch in (True, False) for seed in given.seeds):
            cells = real_null(given.real, given.batch, seed, by_batch=by_batch)
            for donor in ("donor", None) if by_batch else (None,):
                with tempfile.TemporaryDirectory() as name:
                    p = (table := compare_real(cells, Path(name), donor))["p_value"].dropna()
                of, test = "batches" if by_batch else "cells", "donors" if donor else "cells"
                print(
                    f"| {seed}, {of}, {test} | {len(p):,} | {inflation(p):.3f} | {(p < 0.01).mean():.2%} | "
                    f"{(table['fdr'] < 0.05).sum()} |", flush=True,
                )  # fmt: skip
        return
    print("| seed, test | links tested | λ none | λ linked in both | found | false: none + both + donors |")
    print("|---|---|---|---|---|---|")
    for seed in given.seeds:
        cells = plant(Planting(seed=seed, n_cells=given.n_cells))
        rng = np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            report(f"{seed}, donors", compare(cells, folder, donor="donor"))
            report(f"{seed}, cells", compare(cells, folder, donor=None))
            null = permuted(cells, rng, donors=True)
            report(f"{seed}, donors, conditions permuted over donors", compare(null, folder, donor="donor"))
            report(f"{seed}, cells, conditions permuted over donors", compare(null, folder, donor=None))
            null = permuted(cells, rng, donors=False)
            report(f"{seed}, cells, conditions permuted over cells", compare(null, folder, donor=None))


if __name__ == "__main__":
    main()
