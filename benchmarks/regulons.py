"""Are planted drivers found: factor → cCRE → gene, beside motifs in links and beside expression alone?

    python benchmarks/regulons.py WORK [--seeds 1 2 3]

A genome of three chromosomes of 6 Mb is drawn with its genes and cCREs, cells of six types are simulated on it
(`cisformer.simulate`), and one half of them is linked. The other half says which cCREs follow which gene over types:
twelve genes are drivers, and their motifs are written into cCREs that follow them, and into others at random.
Twelve more have motifs at random places only, four share the motif of a driver, but not its expression, and a
hundred have motifs that nobody wrote.
"""

from __future__ import annotations

import argparse
import gzip
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import average_precision_score

from cisformer import default_config, link, link_tfs, preprocess, simulate, train
from cisformer.data.reference import Reference

CHROMS, CHROM_BP = ("chr1", "chr2", "chr3"), 6_000_000
N_DRIVERS, N_IDLE, N_SHARED, N_NULL = 12, 12, 4, 100
MOTIF_WIDTH = 11
BASES = np.frombuffer(b"ACGT", np.uint8)


def small_genome(rng: np.random.Generator, n_genes: int = 500, n_ccres: int = 4000) -> Reference:
    """Return genes and cCREs at random places, some at TSSs; cCREs do not overlap."""
    genes = pd.DataFrame(
        {"chrom": rng.choice(CHROMS, n_genes), "start": rng.integers(50_000, CHROM_BP - 50_000, n_genes)}
    )
    genes = genes.sort_values(["chrom", "start"], ignore_index=True)
    genes["end"] = genes["start"] + rng.integers(2_000, 20_000, n_genes)
    genes["strand"] = rng.choice(["+", "-"], n_genes)
    genes["gene_id"] = [f"ENSG{number:011d}" for number in range(n_genes)]
    genes["gene_name"] = [f"GENE{number}" for number in range(n_genes)]
    sites = np.where(genes["strand"] == "+", genes["start"], genes["end"] - 1)
    n_rest = n_ccres - n_genes
    ccres = pd.DataFrame(
        {
            "chrom": [*genes["chrom"], *rng.choice(CHROMS, n_rest)],
            "start": [*(sites - 200), *rng.integers(1_000, CHROM_BP - 1_000, n_rest)],
        }
    )
    ccres["end"] = ccres["start"] + rng.integers(250, 450, n_ccres)
    ccres = ccres.sort_values(["chrom", "start"], ignore_index=True)
    furthest = ccres.groupby("chrom")["end"].transform(lambda end: end.cummax().shift(fill_value=0))
    ccres = ccres[ccres["start"] > furthest]
    columns = ["gene_id", "gene_name", "chrom", "start", "end", "strand"]
    return Reference("dataset", "", genes[columns], ccres.reset_index(drop=True))


@dataclass(frozen=True)
class Drivers:
    """Factors (gene names), their motifs, and which cCREs follow which of them."""

    names: list[str]
    is_driver: np.ndarray
    motifs: dict[str, np.ndarray]
    sites: np.ndarray
    follows: np.ndarray


def plant_drivers(expression: pd.DataFrame, accessibility: np.ndarray, rng: np.random.Generator) -> Drivers:
    """Choose factors and place motifs.

    Parameters
    ----------
    expression, accessibility
        Means over types, genes and cCREs in columns; [K, G] and [K, P].
    """
    level = np.log(expression + 1e-3)
    wide = (level - level.mean()).std()
    genes = wide.nlargest(80).index.to_numpy()
    chosen = rng.choice(genes, N_DRIVERS + N_IDLE, replace=False)
    profile = _standard(level[chosen].to_numpy())
    alike = profile.T @ _standard(np.log(accessibility + 1e-2)) / len(profile)
    chance = 1 / (1 + np.exp(-8 * (alike - 0.65)))
    chance[N_DRIVERS:] = 0
    follows = rng.random(chance.shape) < np.minimum(
        chance * 0.06 / np.maximum(chance.mean(axis=1, keepdims=True), 1e-9), 0.5
    )
    follows[N_DRIVERS:] = False
    sites = follows | (
        rng.random(chance.shape) < np.where(np.arange(len(chosen)) < N_DRIVERS, 0.03, 0.08)[:, None]
    )
    names = list(chosen)
    motifs = {name: rng.dirichlet(np.full(4, 0.06), MOTIF_WIDTH).T for name in names}
    rest = [name for name in genes if name not in names]
    for number in range(N_SHARED):
        motifs[rest[number]] = motifs[names[number]]
        names.append(rest[number])
    extra = np.zeros((N_SHARED, sites.shape[1]), dtype=bool)
    return Drivers(
        names,
        np.arange(len(names)) < N_DRIVERS,
        motifs,
        np.vstack([sites, extra]),
        np.vstack([follows, extra]),
    )


def _standard(values: np.ndarray) -> np.ndarray:
    return (values - values.mean(axis=0)) / np.maximum(values.std(axis=0), 1e-9)


def write_genome(path: Path, ccres: pd.DataFrame, drivers: Drivers, rng: np.random.Generator) -> None:
    """Write random chromosomes with sites of the motifs, in lower case here and there, with gaps of N; gzipped."""
    with gzip.open(path, "wb", compresslevel=1) as handle:
        for chrom in CHROMS:
            sequence = rng.choice(BASES, CHROM_BP, p=[0.29, 0.21, 0.21, 0.29])
            for row in np.flatnonzero(ccres["chrom"] == chrom):
                start, end = ccres["start"][row], ccres["end"][row]
                for factor in np.flatnonzero(drivers.sites[:, row]):
                    at = rng.integers(start, end - MOTIF_WIDTH)
                    motif = drivers.motifs[drivers.names[factor]]
                    sequence[at : at + MOTIF_WIDTH] = [BASES[rng.choice(4, p=column)] for column in motif.T]
            half = sequence[: CHROM_BP // 2]
            half |= 0x20  # soft-masked
            handle.write(f">{chrom.removeprefix('chr')}\n".encode())
            lines = sequence.tobytes()
            handle.writelines(lines[at : at + 60] + b"\n" for at in range(0, len(lines), 60))


def write_motifs(path: Path, motifs: dict[str, np.ndarray]) -> None:
    """Write motifs as JASPAR offers them."""
    lines = ["MEME version 4\n\nALPHABET= ACGT\n"]
    for number, (name, motif) in enumerate(motifs.items()):
        lines.append(
            f"MOTIF MA{number:04d}.1 {name}\nletter-probability matrix: alength= 4 w= {motif.shape[1]} nsites= 20 E= 0"
        )
        lines += [" ".join(f"{value:.6f}" for value in column) for column in motif.T]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Parse the command line and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--n_cells", type=int, default=4000)
    given = parser.parse_args()
    logging.getLogger("cisformer").setLevel(logging.ERROR)
    for seed in given.seeds:
        measure(given.work / str(seed), seed, given.n_cells)


def measure(work: Path, seed: int, n_cells: int) -> None:
    """Simulate, link, find drivers, print."""
    rng = np.random.default_rng(seed)
    work.mkdir(parents=True, exist_ok=True)
    reference = small_genome(rng)
    cells = simulate(n_cells, 500, reference.n_ccres, n_types=6, seed=seed, reference=reference)
    half = np.arange(n_cells) < n_cells // 2
    rna, atac = cells.rna, cells.atac
    types = rna.obs["cell_type"].astype(str)
    names = sorted(types.unique())
    expression = pd.DataFrame(
        [np.asarray(rna.X[np.flatnonzero(~half & (types == name))].mean(axis=0)).ravel() for name in names],
        columns=rna.var_names,
    )
    accessibility = np.stack(
        [np.asarray(atac.X[np.flatnonzero(~half & (types == name))].mean(axis=0)).ravel() for name in names]
    )
    drivers = plant_drivers(expression, accessibility, rng)
    ccres = atac.var[["chrom", "start", "end"]].reset_index(drop=True)
    write_genome(work / "genome.fa.gz", ccres, drivers, rng)
    rest = [name for name in rna.var_names if name not in drivers.names][:N_NULL]
    null = {name: rng.dirichlet(np.full(4, 0.15), MOTIF_WIDTH).T for name in rest}
    write_motifs(work / "motifs.meme", drivers.motifs | null)
    folder = work / "cisformer_link"
    if not folder.is_dir():
        linked(work, rna[half].copy(), atac[half].copy(), types[half])
    found = link_tfs(folder, work / "genome.fa.gz", work / "motifs.meme")
    print(f"\n### seed {seed}\n\n{found.describe()}\n")
    judge(found, cells, drivers, rna[half], expression, names)


def linked(work: Path, rna, atac, types: pd.Series) -> None:
    """Train on and link half of the cells."""
    stores = preprocess(rna, atac, work / "data", direction="atac2rna", reference="dataset", force=True)
    config = default_config("atac2rna", "small")
    best = train(work / "data", "half", direction="atac2rna", save=work / "save", config=config, cpu=True)
    link(best, stores["train"], types, work)


def judge(found, cells, drivers: Drivers, rna, expression: pd.DataFrame, names: list[str]) -> None:
    """Print average precisions of edges and triplets, and the calibration of triplets' scores."""
    ccre_names = cells.atac.var_names
    works = pd.MultiIndex.from_frame(cells.links[["gene_name", "ccre", "cell_type"]])
    level = np.log(expression + 1e-3)
    level = (level - level.mean()).set_axis(names)
    number = {name: n for n, name in enumerate(drivers.names)}
    triplets = found.triplets[found.triplets["tf"].isin(drivers.names)]
    row = {name: n for n, name in enumerate(ccre_names)}
    factor = triplets["tf"].map(number).to_numpy()
    true = drivers.follows[factor, triplets["ccre"].map(row).to_numpy()]
    linked = pd.MultiIndex.from_frame(triplets[["gene_name", "ccre", "cell_type"]]).isin(works)
    up = np.array([level.loc[k, t] > 0 for k, t in zip(triplets["cell_type"], triplets["tf"], strict=True)])
    print("| | range | triplets | mean | planted |\n|---|---|---|---|---|")
    for name, truth in (("score", true & up & linked), ("site", true & up), ("link_score", linked)):
        bins = pd.cut(triplets[name], [0, 0.05, 0.1, 0.2, 0.3, 0.5, 1])
        table = pd.DataFrame({"value": triplets[name], "true": truth}).groupby(bins, observed=True)
        for range_, part in table:
            print(
                f"| {name} | {range_} | {len(part):,} | {part['value'].mean():.2f} | {part['true'].mean():.2f} |"
            )
    links = cells.links[["gene_name", "ccre"]].drop_duplicates()
    follows = pd.DataFrame(drivers.follows, index=drivers.names, columns=ccre_names)
    edges = pd.DataFrame(0, index=drivers.names, columns=rna.var_names)
    for gene, ccre in links.itertuples(index=False):
        edges.loc[follows[ccre].to_numpy(), gene] = 1
    ours = found.network().pivot_table(index="source", columns="target", values="weight")
    ours = ours.reindex(index=edges.index, columns=edges.columns).fillna(0)
    log = np.log1p(rna.X.toarray() / np.maximum(rna.X.sum(axis=1), 1).reshape(-1, 1) * 1e4)
    cell = correlation(pd.DataFrame(np.asarray(log), columns=rna.var_names))
    cell, by_type = (table.loc[edges.index, edges.columns] for table in (cell, correlation(level)))
    motif = found.base_grn.table().groupby("gene_short_name")[found.base_grn.genes].max().T
    motif = motif.reindex(index=edges.index, columns=edges.columns).fillna(0)
    truth = edges.to_numpy().ravel()
    print(f"\nfactor-gene edges: {len(truth):,}, {truth.mean():.2%} planted\n\n| by | AUPRC |\n|---|---|")
    scores = {
        "expression correlation over cells": cell, "expression correlation over types": by_type,
        "motif in a linked cCRE": motif, "motif in a linked cCRE × correlation over types": motif * (1 + by_type),
        "network weight": ours,
    }  # fmt: skip
    for label, values in scores.items():
        print(
            f"| {label} | {average_precision_score(truth, values.to_numpy().ravel()):.3f} |",
            flush=True,
        )
    null = found.activity[~found.activity["tf"].isin(drivers.names)]
    inflation = stats.chi2.isf(null["p_value"].median(), 1) / stats.chi2.isf(0.5, 1)
    print(f"\n{null['p_value'].notna().sum()} tests of motifs that nobody wrote: λ {inflation:.3f}, ", end="")
    print(
        f"{(null['fdr'] < 0.05).sum()} with FDR < 0.05, {(found.triplets['tf'].isin(null['tf'])).sum():,} of ",
        end="",
    )
    print(f"{len(found.triplets):,} triplets")
    active = found.activity[(found.activity["fdr"] < 0.05) & (found.activity["activity"] > 0)]
    active = active[active["expression"] > 0]["tf"].unique()
    kind = np.array(["driver"] * N_DRIVERS + ["idle"] * N_IDLE + ["shared motif"] * N_SHARED)
    counts = {
        name: f"{np.isin(np.array(drivers.names)[kind == name], active).sum()}/{(kind == name).sum()}"
        for name in np.unique(kind).tolist()
    }
    print(f"\nactive (FDR < 0.05) in a type in which they are expressed above the mean: {counts}")


def correlation(values: pd.DataFrame) -> pd.DataFrame:
    """Return Pearson correlations of columns, 0 of those that do not vary."""
    scores = _standard(values.to_numpy())
    return pd.DataFrame(scores.T @ scores / len(values), index=values.columns, columns=values.columns)


if __name__ == "__main__":
    main()
