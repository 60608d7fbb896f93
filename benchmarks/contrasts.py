"""Do compared links tell planted differences from depth, expression, donors and accessibility?

    python benchmarks/contrasts.py [--seeds 1 2 3] [--n_cells 4000] [--access 60]
    python benchmarks/contrasts.py --permutations 40 [--seeds 1 2 3] [--n_cells 2000]
    python benchmarks/contrasts.py --permutations 20 --real FOLDER --batch batch

Simulated cells of two types (`cisformer.simulate`) get donors, of two conditions. In the first half of some pairs that
no link joins, a cCRE raises its gene in condition A alone: counts are added in cells in which it is open, and in B as
many in any cells, so that the gene's level is the same. In the second half it does so in one donor alone, which is no
difference between conditions. With `--access`, further cCREs raise their genes alike in both conditions, but are open
in fewer cells of one. Then B loses half of its RNA and 40 % of its open cCREs, and two thirds of genes 60 % of their
counts in one condition or the other.

`--permutations` asks for λ where nothing is to be found: nothing is planted, conditions are given to donors (or to
cells) at random, again and again, and then confounded with depth and level as above. `--real` does so with real cells
(rna.h5ad and atac.h5ad in FOLDER, donors or batches in a column of obs), all as one type.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from cisformer import compare_links, preprocess, simulate
from cisformer.analysis.candidates import PlacedPairs
from cisformer.analysis.contrasts import compare_units, read_units
from cisformer.analysis.groups import Comparison, Unit
from cisformer.data.genome import window_pairs
from cisformer.links.statistics import Pairs

GROUPS = ("A", "B")
SEEN_GENE, SEEN_CCRE = 0.1, 0.05
NEAR_BP = 100_000
DESIGNS = {"donors, donors": (True, True), "donors, cells": (True, False), "cells, cells": (False, False)}
"""Conditions of donors or of cells; donors or cells as replicates."""


@dataclass(frozen=True)
class Planting:
    """How many cells, donors and differences, and how strong."""

    n_cells: int = 2000
    n_genes: int = 400
    n_ccres: int = 3000
    n_donors: int = 4
    n_pairs: int = 60
    n_access: int = 0
    still_open: float = 0.5
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
    free = rng.permutation(np.flatnonzero((pairs["kind"] == "none") & pairs["seen"]))
    _, first = np.unique(pairs["gene"].to_numpy()[free], return_index=True)
    mixed = rng.permutation(free[first])
    chosen, access = np.split(mixed[: options.n_pairs + options.n_access], [options.n_pairs])
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
    pairs.loc[access, "kind"] = "access"
    for number, row in enumerate(access):
        gene, ccre = pairs["gene"][row], pairs["ccre_row"][row]
        loses = in_a if number % 2 else ~in_a
        is_open[:, ccre] &= ~loses | (rng.random(len(loses)) < options.still_open)
        counts[:, gene] += rng.poisson(options.effect * counts[:, gene].mean() * size * is_open[:, ccre])
    if options.confounded:
        counts, is_open = _confound(counts, is_open, in_a, rng)
    rna.X, atac.X = sp.csr_matrix(counts.astype(np.float32)), sp.csr_matrix(is_open.astype(np.float32))
    return PlantedCells(rna, atac, pairs)


def _pairs(cells, counts: np.ndarray, is_open: np.ndarray) -> pd.DataFrame:
    genes = cells.rna.var.reset_index(drop=True)
    gene, ccre = window_pairs(genes, cells.atac.var.reset_index(drop=True), NEAR_BP)
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


def inflation(p_value: np.ndarray | pd.Series) -> float:
    """Return λ: the median χ² of the p-values over its expectation."""
    return float(stats.chi2.isf(np.nanmedian(p_value), 1) / stats.chi2.isf(0.5, 1))


@dataclass(frozen=True)
class NullCells:
    """Cells without conditions, in memory, as `compare_links` reads them of a store.

    Attributes
    ----------
    counts, is_open
        [cells, genes], and bool [cells, cCREs].
    gene, ccre
        Pairs that are compared.
    donor, cell_type
        Of each cell.
    """

    counts: np.ndarray
    is_open: np.ndarray
    gene: np.ndarray
    ccre: np.ndarray
    donor: np.ndarray
    cell_type: np.ndarray

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.counts)

    def rna(self, rows: np.ndarray) -> sp.csr_matrix:
        """Return counts of some cells."""
        return sp.csr_matrix(self.counts[rows].astype(np.float32))

    def atac(self, rows: np.ndarray) -> sp.csr_matrix:
        """Return open cCREs of some cells."""
        return sp.csr_matrix(self.is_open[rows].astype(np.float32))

    @classmethod
    def simulated(cls, seed: int, n_cells: int) -> NullCells:
        """Simulate cells of two types and eight donors."""
        cells = simulate(n_cells, 400, 3000, n_types=2, seed=seed)
        counts, is_open = cells.rna.X.toarray(), cells.atac.X.toarray() > 0
        pairs = _pairs(cells, counts, is_open)
        donor = np.random.default_rng(seed).integers(0, 8, n_cells)
        types = cells.rna.obs["cell_type"].astype(str).to_numpy()
        return cls(counts, is_open, *(pairs[name].to_numpy() for name in ("gene", "ccre_row")), donor, types)

    @classmethod
    def real(cls, folder: Path, batch: str) -> NullCells:
        """Read real cells, all as one type; pairs that some ten cells have both of."""
        import anndata

        rna, atac = (anndata.read_h5ad(folder / name) for name in ("rna.h5ad", "atac.h5ad"))
        atac.var_names = [str(name) for name in atac.var_names]
        with tempfile.TemporaryDirectory() as name:
            store = preprocess(
                rna, atac, Path(name), direction="atac2rna", reference="dataset", manually=True
            )["all"]
            gene, ccre = window_pairs(store.reference.genes, store.reference.ccres, NEAR_BP)
            rows = np.arange(store.n_cells)
            counts, is_open = store.rna(rows), store.atac(rows) > 0
            n_open, share = (
                np.asarray(is_open.sum(axis=0)).ravel(),
                np.asarray((counts > 0).mean(axis=0)).ravel(),
            )
            kept = n_open[ccre] * share[gene] >= 10
            genes, gene = np.unique(gene[kept], return_inverse=True)
            ccres, ccre = np.unique(ccre[kept], return_inverse=True)
            donor = pd.factorize(rna.obs.loc[store.barcodes, batch].astype(str), sort=True)[0]
            counts, is_open = (
                _with_the_rest(values, own) for values, own in ((counts, genes), (is_open, ccres))
            )
        return cls(counts, is_open > 0, gene, ccre, donor, np.full(len(donor), "all"))

    def permuted(self, rng: np.random.Generator, *, by_donor: bool, donors: bool) -> list[np.ndarray]:
        """Return p-values, type by type, of conditions given at random to donors or cells, and confounded."""
        names = np.unique(self.donor)
        chosen = np.isin(self.donor, rng.permutation(names)[: len(names) // 2])
        in_a = chosen if by_donor else rng.permutation(chosen)
        counts, is_open = _confound(self.counts, self.is_open, in_a, rng)
        confounded = replace(self, counts=counts, is_open=is_open)
        placed = PlacedPairs(
            np.arange(self.counts.shape[1]), np.arange(self.is_open.shape[1]),
            Pairs(self.gene, self.ccre, np.zeros(len(self.gene), np.int64)),
        )  # fmt: skip
        found = []
        for cell_type in np.unique(self.cell_type):
            units = []
            for group, members in enumerate((in_a, ~in_a)):
                own = np.flatnonzero(members & (self.cell_type == cell_type))
                parts = [own[self.donor[own] == name] for name in names] if donors else [own]
                units += [
                    Unit(group, str(n) if donors else "", part) for n, part in enumerate(parts) if len(part)
                ]
            one = Comparison("", GROUPS, (), tuple(units), paired=False)
            sums, _ = read_units(one, placed, confounded, np.zeros((self.n_cells, 0)))
            found.append(compare_units(sums, one, placed).p_value)
        return found


def _with_the_rest(values: sp.csr_matrix, columns: np.ndarray) -> np.ndarray:
    """Return some columns, and the sum of the others as one more, so that depth stays what it was."""
    chosen = values[:, columns].toarray().astype(np.float32)
    rest = np.asarray(values.sum(axis=1)).ravel() - chosen.sum(axis=1)
    return np.column_stack([chosen, rest])


def report_null(label: str, cells: NullCells, n: int, seed: int) -> None:
    """Print λ over permutations, for each way to give conditions and to count replicates."""
    for name, (by_donor, donors) in DESIGNS.items():
        rng = np.random.default_rng(seed)
        parts = [p for _ in range(n) for p in cells.permuted(rng, by_donor=by_donor, donors=donors)]
        each = np.array([inflation(p) for p in parts])
        p = np.concatenate(parts)
        p = p[np.isfinite(p)]
        print(
            f"| {label} | {name} | {len(p) / len(parts):,.0f} | {np.median(each):.3f} | {each.std():.3f} | "
            f"{inflation(p):.3f} | {(p < 0.05).mean():.4f} | {(p < 0.01).mean():.4f} |", flush=True,
        )  # fmt: skip


def report(label: str, table: pd.DataFrame) -> None:
    """Print a row: λ of each kind, what is found at FDR 0.05, what of it is false, and what accessibility explains."""
    tested = table[table["p_value"].notna()]
    sure, kinds = tested["fdr"] < 0.05, tested["kind"]
    lambdas = [inflation(tested.loc[kinds == kind, "p_value"]) for kind in ("none", "both")]
    true, wanted = (sure & (kinds == "differs")).sum(), (kinds == "differs").sum()
    false = [int((sure & (kinds == kind)).sum()) for kind in ("none", "both", "donors")]
    access, explained = kinds == "access", sure & tested["accessibility_explains"]
    print(
        f"| {label} | {len(tested):,} | {lambdas[0]:.3f} | {lambdas[1]:.3f} | {true}/{wanted}, "
        f"{(explained & (kinds == 'differs')).sum()} explained | {false[0]} + {false[1]} + {false[2]} | "
        f"{(sure & access).sum()}/{access.sum()}, {(explained & access).sum()} explained |", flush=True,
    )  # fmt: skip


def main() -> None:
    """Parse the command line and print what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--n_cells", type=int, default=4000)
    parser.add_argument("--access", type=int, default=0)
    parser.add_argument("--still_open", type=float, default=0.5)
    parser.add_argument("--effect", type=float, default=2.5)
    parser.add_argument("--permutations", type=int, default=0)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--batch", default="batch")
    given = parser.parse_args()
    logging.getLogger("cisformer").setLevel(logging.ERROR)
    if given.permutations:
        print(
            "| cells | conditions of, replicates | tested | λ, median | its s.d. | λ, all p | p < .05 | p < .01 |"
        )
        print("|---|---|---|---|---|---|---|---|")
        if given.real is not None:
            report_null(given.real.name, NullCells.real(given.real, given.batch), given.permutations, 1)
            return
        for seed in given.seeds:
            report_null(f"seed {seed}", NullCells.simulated(seed, given.n_cells), given.permutations, seed)
        return
    print(
        "| seed, replicates | tested | λ none | λ linked in both | found | false: none + both + donors | access |"
    )
    print("|---|---|---|---|---|---|---|")
    for seed in given.seeds:
        cells = plant(
            Planting(
                seed=seed, n_cells=given.n_cells, n_access=given.access, still_open=given.still_open,
                effect=given.effect,
            )
        )  # fmt: skip
        for donor in ("donor", None):
            with tempfile.TemporaryDirectory() as name:
                report(f"{seed}, {'donors' if donor else 'cells'}", compare(cells, Path(name), donor=donor))


if __name__ == "__main__":
    main()
