"""Paired cells of two generators that share nothing with `cisformer.simulation`, for `links_unlike.py`.

*tree*: no types, but a trunk and three branches of pseudotime; a "cell type" is a stretch of it. cCREs open in bumps
and steps along it, and a gene follows its cCREs 0.08 later. Each gene has its own reach (exp(−distance / reach), median
27 kb) and up to five cCREs, however open these are.

*factors*: types with their own activities of thirty transcription factors, which vary from cell to cell. A cCRE opens
with the factors that it binds. A third of the cCREs regulate a gene: the nearest one, or others, of their 300 kb domain
above all. What the cCREs of a gene do saturates.

In both, 30 % of the links work in half of the types only, neighbours resemble each other, a third of the genes are
housekeeping, dispersion is the gene's own. *Nuisance*: three batches, which go with the type in half of the cells,
and a cell cycle in which half of the cells are (both shift genes and cCREs), depth by type, 8 % ambient RNA, 5 %
doublets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from cisformer.data.genome import region_names, signed_distance, tss, window_pairs
from cisformer.data.reference import load_reference
from cisformer.links.prior import is_noncoding
from cisformer.simulation import SimulatedCells

N_FACTORS, CHUNK_BP, DOMAIN_BP, LAG = 30, 12_000_000, 300_000, 0.08
Profile = Callable[[np.ndarray, float], np.ndarray]
"""What some features do in cells: rows, and by how much pseudotime is late → [cells, features]."""


@dataclass(frozen=True)
class Kind:
    """What is simulated; `depth` is that of ATAC, `coupling` how far a gene follows the moment's open state."""

    factors: bool
    species: str = "human"
    n_types: int = 8
    unequal: bool = False
    depth: float = 1.0
    nuisance: float = 0.0
    coupling: float = 0.0
    repressors: float = 0.0
    housekeeping: float = 0.35


def place(species: str, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Return 2,000 genes and about 22,000 peaks of some stretches, crowded here and there; and which are promoters."""
    reference = load_reference(species)
    genes = reference.genes.assign(gene_name=reference.gene_labels).query("start >= 0").reset_index(drop=True)
    genes = genes[rng.random(len(genes)) < np.where(is_noncoding(genes["gene_name"]), 0.05, 0.75)]
    chunk_of = [x["chrom"] + ":" + (x["start"] // CHUNK_BP).astype(str) for x in (genes, reference.ccres)]
    wanted = rng.permutation(chunk_of[0].unique())
    wanted = wanted[: np.searchsorted(chunk_of[0].value_counts()[wanted].cumsum(), 2000) + 1]
    genes = genes[chunk_of[0].isin(wanted)].sort_values(["chrom", "start"], ignore_index=True)[:2000]
    ccres = reference.ccres[chunk_of[1].isin(wanted)]
    crowd = pd.factorize(ccres["chrom"] + ":" + (ccres["start"] // 50_000).astype(str))[0]
    weight = np.exp(rng.normal(0, 0.8, crowd.max() + 1))[crowd]
    ccres = ccres.iloc[rng.choice(len(ccres), 20_000, replace=False, p=weight / weight.sum())]
    middle, half = (ccres["start"] + ccres["end"]) // 2, np.exp(rng.normal(5.6, 0.5, 20_000)).astype(int) + 75
    distal = pd.DataFrame({"chrom": ccres["chrom"], "start": middle - half, "end": middle + half})
    own = genes[rng.random(len(genes)) < 0.9]
    left, right = rng.integers(100, 800, (2, len(own)))
    promoters = pd.DataFrame({"chrom": own["chrom"], "start": tss(own) - left, "end": tss(own) + right})
    peaks = pd.concat([distal.assign(promoter=False), promoters.assign(promoter=True)])
    peaks = peaks[peaks["start"] > 0].drop_duplicates(["chrom", "start", "end"])
    peaks = peaks.sort_values(["chrom", "start"], ignore_index=True)
    return genes, peaks.drop(columns="promoter"), peaks["promoter"].to_numpy()


def leaders(domain: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return for each feature whose programme it has: its own, or that of the first one of its domain."""
    leader, first = np.arange(len(domain)), {}
    for i in np.flatnonzero(rng.random(len(domain)) < share):
        leader[i] = first.setdefault(domain[i], i)
    return leader


def tree(kind: Kind, n: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable[..., Profile]]:
    """Return the stretch that each of `n` cells is in, and how to draw profiles of features by their domains."""
    time, branch = rng.beta(1.2, 1.1, n), rng.choice(3, n, p=[0.5, 0.3, 0.2])
    stretch = np.where(time < 0.4, time >= 0.2, 2 + 2 * branch + (time > 0.7)).astype(int)

    def draw(domain: np.ndarray, rng: np.random.Generator) -> Profile:
        leader = leaders(domain, 0.4, rng)
        shape, on = rng.choice(4, len(domain), p=[0.35, 0.35, 0.2, 0.1]), rng.choice(4, len(domain))
        centre, width = rng.random(len(domain)), rng.uniform(0.08, 0.3, len(domain))
        shape, on, width = shape[leader], on[leader], width[leader]
        centre = centre[leader] + rng.normal(0, 0.05, len(domain)) * (leader != np.arange(len(domain)))

        def at(rows: np.ndarray, lag: float) -> np.ndarray:
            x = (time[rows, None] - lag - centre) / width
            step = 1 / (1 + np.exp(np.where(shape == 2, -4, 4) * x))
            value = np.where(shape == 0, 0, np.where(shape == 1, np.exp(-x * x), step))
            mine = (on == 3) | (branch[rows, None] == on) | (time[rows, None] < 0.4)
            return value * np.where(mine, 1, 0.15)

        return at

    return stretch, draw


def factors(kind: Kind, n: int, rng: np.random.Generator) -> tuple[np.ndarray, Callable[..., Profile]]:
    """Return the type of each of `n` cells, and how to draw profiles of features by their domains."""
    n_types = kind.n_types
    share = 0.7 ** np.arange(n_types) if kind.unequal else rng.dirichlet(np.full(n_types, 3.0))
    type_of = rng.choice(n_types, n, p=share / share.sum())
    if kind.unequal:  # the rarest type has 25 cells
        type_of[type_of == n_types - 1] = 0
        type_of[rng.choice(n, 25, replace=False)] = n_types - 1
    mean = rng.gamma(0.4, 0.75, (max(n_types // 3, 1), N_FACTORS))[
        rng.integers(0, max(n_types // 3, 1), n_types)
    ]
    mean += rng.gamma(0.4, 0.75, mean.shape)
    activity = mean[type_of] * np.exp(rng.normal(0, 0.4, (n, N_FACTORS))) + 0.1 * rng.gamma(
        1, 1, (n, N_FACTORS)
    )

    def draw(domain: np.ndarray, rng: np.random.Generator) -> Profile:
        bound = np.zeros((len(domain), N_FACTORS))
        for _ in range(3):
            some = np.flatnonzero(rng.random(len(domain)) < 0.55)
            bound[some, rng.integers(0, N_FACTORS, len(some))] += rng.gamma(2, 0.5, len(some))
        bound = bound[leaders(domain, 0.35, rng)]
        return lambda rows, lag: np.minimum(activity[rows] @ bound.T, 4) / 2

    return type_of, draw


def plant(
    kind: Kind,
    genes: pd.DataFrame,
    peaks: pd.DataFrame,
    may: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return gene and cCRE of the links, between the genes and cCREs that `may` have some."""
    gene, ccre = window_pairs(genes, peaks, 250_000)
    distance = np.abs(signed_distance(genes, peaks, gene, ccre))
    kept = may[0][gene] & may[1][ccre] & (distance > 1000) & (distance <= 250_000)
    gene, ccre, distance = gene[kept], ccre[kept], distance[kept]
    if kind.factors:  # a cCRE chooses genes
        regulates, nearest = rng.random(len(peaks)) < 0.35, rng.random(len(peaks)) < 0.45
        same = domains(genes)[gene] == domains(peaks)[ccre]
        log_chance = np.where(same, 0, np.log(0.15)) - np.log(distance + 15_000)
        log_chance = np.where(nearest[ccre], -1e-3 * distance, log_chance)
        wanted = np.where(regulates, np.where(~nearest & (rng.random(len(peaks)) < 0.25), 2, 1), 0)
        chooser = ccre
    else:  # a gene chooses cCREs
        log_chance = -distance / np.exp(rng.normal(10.2, 0.8, len(genes)))[gene]
        wanted, chooser = rng.integers(0, 6, len(genes)), gene
    key = log_chance + rng.gumbel(size=len(gene))  # the highest ones are draws without replacement
    rank = pd.Series(-key).groupby(chooser).rank(method="first").to_numpy()
    link = rank <= wanted[chooser]
    return gene[link], ccre[link]


def domains(regions: pd.DataFrame) -> np.ndarray:
    """Return the domain of each region, by name."""
    return (regions["chrom"] + ":" + ((regions["start"] + 77_777) // DOMAIN_BP).astype(str)).to_numpy()


def generate(kind: Kind, seed: int, n: int = 2000) -> tuple[SimulatedCells, pd.DataFrame]:
    """Return paired cells with the links that activate, and the links that repress."""
    rng = np.random.default_rng([seed, 77])
    genes, peaks, is_promoter = place(kind.species, rng)
    n_genes, n_peaks = len(genes), len(peaks)
    type_of, draw = (factors if kind.factors else tree)(kind, n, rng)
    n_types = int(type_of.max()) + 1
    of_peaks, of_genes = draw(domains(peaks), rng), draw(domains(genes), rng)
    group = rng.choice(3, n_peaks, p=[0.2, 0.5, 0.3])  # always open, enhancers, weak ones
    base = np.where(is_promoter, 0.3, np.array([-1.0, -2.8, -4.2])[group]) + rng.normal(0, 0.9, n_peaks)
    base += 0.4 * np.log((peaks["end"] - peaks["start"]).to_numpy() / 500)
    slope = np.where(is_promoter, 0.8, np.array([0.4, 5.2, 3.2])[group]) * rng.gamma(3, 1 / 3, n_peaks)
    housekeeping = rng.random(n_genes) < kind.housekeeping
    gene, ccre = plant(kind, genes, peaks, (~housekeeping, ~is_promoter), rng)
    effect = rng.gamma(2, 0.7, len(gene)) * np.where(rng.random(len(gene)) < kind.repressors, -1, 1)
    works = (rng.random(len(gene)) > 0.3) | (rng.random((n_types, len(gene))) < 0.5)
    to_gene = sparse.csr_matrix((np.ones(len(gene)), (np.arange(len(gene)), gene)), (len(gene), n_genes))
    batch = np.where(rng.random(n) < 0.5, type_of % 3, rng.integers(0, 3, n))
    phase, cycling = rng.uniform(0, 2 * np.pi, n), rng.random(n) < 0.5
    hidden = np.column_stack([np.eye(3)[batch], np.cos(phase) * cycling, np.sin(phase) * cycling])
    shift_gene, shift_peak = (kind.nuisance * rng.normal(0, 0.3, (5, size)) for size in (n_genes, n_peaks))
    for shift in (shift_gene, shift_peak):
        shift[3:] *= 2 * (rng.random(shift.shape[1]) < 0.3)
    depth = np.exp(rng.normal(0, 0.5, n) + kind.nuisance * rng.normal(0, 0.5, n_types)[type_of]) * kind.depth
    rna_depth, gene_base = np.exp(rng.normal(0, 0.45, n)), rng.normal(-3.6, 1.2, n_genes) + 0.5 * housekeeping
    own_slope = np.where(housekeeping, 0.1, 0.7) * rng.gamma(2, 0.5, n_genes)
    dispersion, lag = np.exp(rng.normal(-1, 0.6, n_genes)), 0 if kind.factors else LAG
    counts, seen, mean_open = [], [], np.zeros((n_types, n_peaks))
    for rows in np.array_split(np.arange(n), n // 250):

        def probability(lag: float, rows: np.ndarray = rows) -> np.ndarray:
            return 1 / (1 + np.exp(-base - slope * of_peaks(rows, lag) - hidden[rows] @ shift_peak))

        chance = probability(0)
        is_open = rng.random(chance.shape) < chance
        np.add.at(mean_open, type_of[rows], chance)
        active = probability(lag) + kind.coupling * (is_open - chance)
        part = active[:, ccre] * effect * works[type_of[rows]]
        up, down = np.maximum(part, 0) @ to_gene, np.minimum(part, 0) @ to_gene
        own = own_slope * of_genes(rows, lag)
        cis = np.log(np.exp(own) - 0.75 + 3 * up / (1 + up)) + 1 + 1.5 * down if kind.factors else own + up
        rate = rna_depth[rows, None] * np.exp(np.minimum(gene_base + cis + hidden[rows] @ shift_gene, 5))
        counts.append(
            sparse.csr_matrix(rng.poisson(rate * rng.gamma(1 / dispersion, dispersion, rate.shape)))
        )
        seen.append(
            sparse.csr_matrix(is_open & (rng.random(chance.shape) < 1 - np.exp(-depth[rows, None] / 2)))
        )
    rna, atac = sparse.vstack(counts).tocsr(), sparse.vstack(seen).tocsr().astype(int)
    if kind.nuisance:
        rna, atac = spoil(rna, atac, rng)
    mean_open /= np.bincount(type_of)[:, None]
    on = works & (mean_open[:, ccre] >= 0.25 * mean_open[:, ccre].max(axis=0))
    names = np.array([f"type {number:02}" for number in range(n_types)])
    obs = pd.DataFrame(
        {"cell_type": pd.Categorical(names[type_of]), "batch": batch, "s": hidden[:, 3], "g2m": hidden[:, 4]}
    )
    obs.index = [f"cell{number:05}" for number in range(n)]
    where, link = np.nonzero(on)
    regions = region_names(peaks)
    links = pd.DataFrame(
        {"gene_id": genes["gene_id"].to_numpy()[gene[link]], "ccre": regions[ccre[link]], "cell_type": names[where],
         "effect": effect[link], "promoter": False}
    )  # fmt: skip
    cells = SimulatedCells(
        AnnData(rna.astype(np.float32), obs=obs, var=genes.set_index("gene_name").rename_axis(None)),
        AnnData(atac.astype(np.float32), obs=obs, var=peaks.set_index(regions)),
        links[links["effect"] > 0],
    )
    cells.rna.var_names_make_unique()
    return cells, links[links["effect"] < 0]


def spoil(
    rna: sparse.csr_matrix, atac: sparse.csr_matrix, rng: np.random.Generator
) -> tuple[sparse.csr_matrix, ...]:
    """Add ambient RNA to cells, and another cell to one in twenty."""
    n = rna.shape[0]
    total, profile = np.asarray(rna.sum(axis=1)).ravel(), np.asarray(rna.sum(axis=0)).ravel()
    ambient = rng.multinomial((rng.beta(2, 20, n) * total).astype(int), profile / profile.sum())
    doublet = sparse.csr_matrix(
        (np.ones(n // 20, int), (rng.choice(n, n // 20, replace=False), rng.integers(0, n, n // 20))), (n, n)
    )
    rna = (rna + sparse.csr_matrix(ambient)).tocsr()
    return rna + doublet @ rna, (atac + doublet @ atac > 0).astype(int)
