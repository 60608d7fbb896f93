"""Paired cells with planted cis links, for demonstrations, tests and benchmarks.

The model comes from biology and its constants from real multiome data, not from anything that is scored on
it: densities, depths and open rates of PBMC; correlation of a gene with a nearby cCRE across cells about
0.03 (0.01–0.04 in PBMC, BMMC and SNARE-seq data) and 0.007 within a cell state (0.005–0.01 there).

*Cells* have a type (unequal sizes, grouped in lineages), a continuous state (three programmes that run
within types), a donor, and independent-ish log-normal depths of RNA and ATAC.

*cCREs* have an activity on the log-odds scale: a base level plus loadings on type and state. Loadings are
shared in part by neighbours of one regulatory domain, so that unlinked neighbours look like linked ones. In
each cell a cCRE is open with the probability that its activity gives, and an open one is seen with a
probability given by the depth.

*Genes* have a log rate: a base level, a trans part (loadings on type and state, in small part those of their
domain) and a cis part: each linked cCRE adds its effect times its activity in that cell. Since RNA outlives
a snapshot of chromatin, that activity is the probability to be open, with one part in twenty of the open state
of the moment. A gene has its promoter (cCREs within 500 bp of the TSS) and 0–6 distal links; some links work in some
types only, though the cCRE is open in others. Counts are gamma-Poisson.

Which cCREs are linked, and whether cells of one state still vary together, is not known of real cells. So there are
three *modes*; a method that does well in one of them only has learned the generator:

- ``contact``: a link's chance is ∝ (distance + 5 kb)^-0.7 / √(1 + exp(−base level)), so open cCREs are linked more;
- ``uniform``: it is ∝ (distance + 5 kb)^-0.7 alone, however open the cCRE is;
- ``no-coupling``: as ``contact``, but a gene follows the probability to be open, not the open state of the moment:
  given their state, expression and accessibility of a cell are independent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
from scipy import sparse

from cisformer.errors import InputError
from cisformer.runtime.files import atomic_path

if TYPE_CHECKING:
    from anndata import AnnData

    from cisformer.data.reference import Reference

TYPE_NAMES = (
    "CD14 Mono",
    "CD4 Naive",
    "CD8 TEM",
    "NK",
    "B naive",
    "CD4 TCM",
    "CD16 Mono",
    "cDC2",
    "MAIT",
    "B memory",
    "Treg",
    "pDC",
)
LINEAGES = ("myeloid", "T", "T", "NK", "B", "T", "myeloid", "myeloid", "T", "B", "T", "myeloid")
FILES = ("rna.h5ad", "atac.h5ad", "celltype_info.tsv", "true_links.tsv")
TILE_GENES = 250
CCRES_PER_PEAK = 9.5  # 1,033,239 human cCREs; 10x PBMC Multiome calls 108,377 peaks
FLANK_BP = 100_000
PROMOTER_BP = 500
N_STATES = 3
MAX_LINKS = 6
SNAPSHOT_SHARE = 0.05
Mode = Literal["contact", "uniform", "no-coupling"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class SimulatedCells:
    """Simulated paired cells, and their planted links.

    Attributes
    ----------
    rna
        Integer counts, CSR [n_cells, n_genes]; `var`: gene_id, chrom, start, end, strand; `obs`: cell_type,
        donor, state_1…3.
    atac
        0/1, CSR [n_cells, n_ccres], same cells in the same order; `var`: chrom, start, end, named
        chrom:start-end.
    links
        One row per link and cell type in which it works: gene_id, gene_name, ccre, cell_type, effect (mean
        change of the gene's natural-log rate that the open cCRE makes in that type), distance (signed, bp,
        cCRE midpoint − TSS in the direction of transcription), promoter.
    """

    rna: AnnData
    atac: AnnData
    links: pd.DataFrame

    def write(self, folder: str | Path) -> Path:
        """Write rna.h5ad, atac.h5ad, celltype_info.tsv and true_links.tsv into `folder`; return it."""
        folder = Path(folder)
        for name, adata in (("rna.h5ad", self.rna), ("atac.h5ad", self.atac)):
            with atomic_path(folder / name) as path:
                adata.write_h5ad(path, compression="gzip")
        with atomic_path(folder / "celltype_info.tsv") as path:
            self.rna.obs["cell_type"].to_csv(path, sep="\t", header=False)
        with atomic_path(folder / "true_links.tsv") as path:
            self.links.to_csv(path, sep="\t", index=False, float_format="%.5g")
        return folder


def simulate(
    n_cells: int = 2000,
    n_genes: int = 5000,
    n_ccres: int = 40_000,
    *,
    n_types: int = 8,
    mode: Mode = "contact",
    seed: int = 0,
    reference: str | Reference = "human",
    window_bp: int = 250_000,
) -> SimulatedCells:
    """Simulate paired RNA and ATAC of `n_cells` PBMC-like cells with planted cis links.

    Genes and cCREs lie in contiguous stretches of `reference`, thinned to the density of called peaks and of
    expressed genes (promoters and coding genes stay), so that cis windows are populated as in real data.

    Parameters
    ----------
    n_cells, n_genes, n_ccres, n_types
        Sizes; `n_types` at most `n_cells`.
    mode
        Which cCREs are linked, and whether gene and cCRE vary together in cells of one state: "contact", "uniform" or
        "no-coupling"; see the text of this module.
    seed
        The same seed gives the same cells, bit by bit.
    reference
        Reference that genes and cCREs are taken from: a name that `load_reference` takes, or a loaded one.
    window_bp
        Largest distance of a planted link from the TSS.

    Returns
    -------
    SimulatedCells
        `rna` and `atac` as AnnData, and `links`, the truth as a table.

    Raises
    ------
    InputError
        If a size is not positive or larger than the reference has, or the mode is unknown.
    """
    _check_sizes(n_cells, n_genes, n_ccres, n_types)
    if mode not in MODES:
        raise InputError(f"there is no mode {mode!r}", hint=f"choose from: {', '.join(MODES)}")
    rng = np.random.default_rng(seed)
    genes, ccres = _draw_regions(reference, n_genes, n_ccres, rng)
    cells = _Cells.draw(n_cells, n_types, rng)
    landscape = _Landscape.draw(genes, ccres, cells.loadings_len, rng)
    by_openness = np.zeros(n_ccres) if mode == "uniform" else landscape.ccre_base
    links = _plant_links(genes, ccres, by_openness, n_types, window_bp, rng)
    snapshot_share = 0.0 if mode == "no-coupling" else SNAPSHOT_SHARE
    rna, atac, mean_open = _observe(cells, landscape, links, snapshot_share, rng)
    return SimulatedCells(
        rna=_as_adata(rna, cells.obs, genes.set_index("gene_name")),
        atac=_as_adata(atac, cells.obs, ccres.set_index(_names(ccres))),
        links=_truth_table(genes, ccres, links, mean_open, cells.type_names),
    )


def _check_sizes(n_cells: int, n_genes: int, n_ccres: int, n_types: int) -> None:
    for name, value in (
        ("n_cells", n_cells),
        ("n_genes", n_genes),
        ("n_ccres", n_ccres),
        ("n_types", n_types),
    ):
        if value < 1:
            raise InputError(f"{name} is {value}; it has to be at least 1")
    if n_types > n_cells:
        raise InputError(f"{n_types} cell types in {n_cells} cells", hint="use at most one type per cell")


# ---------------------------------------------------------------- regions


def _draw_regions(
    reference: str | Reference, n_genes: int, n_ccres: int, rng: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return genes and cCREs of random contiguous stretches, in genome order."""
    if isinstance(reference, str):
        from cisformer.data.reference import load_reference

        reference = load_reference(reference)
    genes = reference.genes.assign(gene_name=reference.gene_labels)
    genes = genes[genes["start"] >= 0].sort_values(["chrom", "start"], kind="stable", ignore_index=True)
    ccres = reference.ccres.sort_values(["chrom", "start"], kind="stable", ignore_index=True)
    if n_genes > len(genes) or n_ccres > len(ccres):
        raise InputError(
            f"{n_genes} genes and {n_ccres} cCREs wanted; the reference has {len(genes)} and {len(ccres)}",
            hint="simulate fewer, or use a larger reference",
        )
    in_tiles, near = _draw_tiles(genes, ccres, n_genes, n_ccres, rng)
    genes = _keep(genes[in_tiles], n_genes, ~_is_noncoding(genes["gene_name"][in_tiles]), rng)
    ccres = ccres[near].reset_index(drop=True)
    is_promoter = np.zeros(len(ccres), dtype=bool)
    is_promoter[_promoter_pairs(genes, ccres)[1]] = True
    return genes, _keep(ccres, n_ccres, is_promoter, rng)


def _draw_tiles(
    genes: pd.DataFrame, ccres: pd.DataFrame, n_genes: int, n_ccres: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw tiles of neighbouring genes, and the cCREs around them, until both are enough (two masks)."""
    tile = genes.groupby("chrom", sort=False).cumcount() // TILE_GENES
    tiles = list(genes.groupby([genes["chrom"], tile], sort=False).indices.values())
    in_tiles = np.zeros(len(genes), dtype=bool)
    near = np.zeros(len(ccres), dtype=bool)
    for number in rng.permutation(len(tiles)):
        block = genes.loc[tiles[number]]
        in_tiles[tiles[number]] = True
        near |= (
            (ccres["chrom"] == block["chrom"].iloc[0])
            & (ccres["end"] > block["start"].min() - FLANK_BP)
            & (ccres["start"] < block["end"].max() + FLANK_BP)
        ).to_numpy()
        if in_tiles.sum() >= n_genes and near.sum() >= CCRES_PER_PEAK * n_ccres:
            break
    return in_tiles, near if near.sum() >= n_ccres else np.ones(len(ccres), dtype=bool)


def _keep(frame: pd.DataFrame, number: int, first: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    """Keep `number` random rows in their order, those of the mask `first` before others."""
    priority = rng.random(len(frame)) + np.asarray(first)
    rows = np.sort(np.argsort(-priority, kind="stable")[:number])
    return frame.iloc[rows].reset_index(drop=True)


def _is_noncoding(names: pd.Series) -> np.ndarray:
    """Say which gene names look like those of non-coding genes, which single cells seldom show."""
    pattern = r"^(?:[A-Z]{2}\d{6}|LINC|MIR|RNU|RN7|RNA5|Y_RNA|SNOR|ENSG)|-AS\d|-DT$|-IT\d|-OT\d|\dP\d*$"
    matches: np.ndarray = names.str.contains(pattern, regex=True).to_numpy()
    return matches


def _names(ccres: pd.DataFrame) -> np.ndarray:
    from cisformer.data.genome import region_names

    return region_names(ccres)


def _pairs(genes: pd.DataFrame, ccres: pd.DataFrame, bp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gene rows, cCRE rows and signed distances of pairs whose midpoint is within `bp` of the TSS."""
    from cisformer.data.genome import signed_distance, window_pairs

    gene_row, ccre_row = window_pairs(genes, ccres, bp)
    distance = signed_distance(genes, ccres, gene_row, ccre_row)
    near = np.abs(distance) <= bp
    return gene_row[near], ccre_row[near], distance[near]


def _promoter_pairs(genes: pd.DataFrame, ccres: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return _pairs(genes, ccres, PROMOTER_BP)[:2]


# ---------------------------------------------------------------- cells


@dataclass(frozen=True)
class _Cells:
    """Cells: `programme` [n_cells, K] has type profile, states and donor; depths are around 1."""

    obs: pd.DataFrame
    type_names: list[str]
    type_of: np.ndarray
    programme: np.ndarray
    rna_depth: np.ndarray
    atac_depth: np.ndarray

    @property
    def loadings_len(self) -> int:
        return int(self.programme.shape[1])

    @classmethod
    def draw(cls, n_cells: int, n_types: int, rng: np.random.Generator) -> _Cells:
        type_names = [TYPE_NAMES[t] if t < len(TYPE_NAMES) else f"type {t + 1}" for t in range(n_types)]
        share = 0.75 ** np.arange(n_types)
        type_of = np.concatenate(
            [np.arange(n_types), rng.choice(n_types, n_cells - n_types, p=share / share.sum())]
        )
        type_of = rng.permutation(type_of)
        state = rng.normal(size=(n_cells, N_STATES))
        state += rng.normal(0, 0.5, (n_types, N_STATES))[type_of]
        donor = rng.integers(0, 2, n_cells)
        programme = np.hstack(
            [_type_profiles(n_types, rng)[type_of], 0.5 * state, 0.2 * (2 * donor[:, None] - 1)]
        )
        log_depth = rng.multivariate_normal(
            [0, 0], [[0.20, 0.08], [0.08, 0.35]], size=n_cells, method="cholesky"
        )
        obs = pd.DataFrame(
            {"cell_type": pd.Categorical(np.array(type_names)[type_of], categories=type_names)}
        )
        obs["donor"] = pd.Categorical(np.array(["donor_1", "donor_2"])[donor])
        for column in range(N_STATES):
            obs[f"state_{column + 1}"] = state[:, column]
        obs.index = pd.Index(_barcodes(n_cells, rng), name="barcode")
        depth = np.exp(log_depth)
        return cls(obs, type_names, type_of, programme, depth[:, 0], depth[:, 1])


def _type_profiles(n_types: int, rng: np.random.Generator) -> np.ndarray:
    """Return [n_types, n_types + lineages] profiles: types of one lineage are alike."""
    lineage = [LINEAGES[t] if t < len(LINEAGES) else f"lineage {t // 3}" for t in range(n_types)]
    number = pd.factorize(np.array(lineage))[0]
    return np.hstack([0.8 * np.eye(n_types), np.eye(number.max() + 1)[number]]) - 0.2


def _barcodes(n_cells: int, rng: np.random.Generator) -> np.ndarray:
    """Return `n_cells` different 16-letter barcodes with the suffix -1."""
    numbers = rng.choice(4**12, n_cells, replace=False)
    letters = np.array(list("ACGT"))[(numbers[:, None] >> (2 * np.arange(12))) & 3]
    return np.array(["".join(row) + "ACGT-1" for row in letters], dtype=object)


# ---------------------------------------------------------------- landscape


@dataclass(frozen=True)
class _Landscape:
    """Base levels and loadings on the cells' programmes: log odds of cCREs, log rates of genes."""

    ccre_base: np.ndarray
    ccre_loadings: np.ndarray
    gene_base: np.ndarray
    gene_loadings: np.ndarray

    @classmethod
    def draw(
        cls, genes: pd.DataFrame, ccres: pd.DataFrame, length: int, rng: np.random.Generator
    ) -> _Landscape:
        domain = _Domains(ccres, rng)
        shared = rng.normal(size=(domain.number, length))
        gene_loadings = 0.3 * shared[domain.of(genes)] + 0.95 * rng.normal(size=(len(genes), length))
        gene_base = rng.normal(-3.5, 1.4, len(genes))
        ccre_loadings = 0.7 * shared[domain.of(ccres)] + 0.7 * rng.normal(size=(len(ccres), length))
        ccre_loadings *= rng.gamma(1.5, 0.55, (len(ccres), 1))
        ccre_base = rng.normal(-4.4, 1.8, len(ccres))
        gene_row, ccre_row = _promoter_pairs(genes, ccres)
        ccre_base[ccre_row] = 1.0 + 0.5 * gene_base[gene_row] + rng.normal(0, 0.7, len(ccre_row))
        ccre_loadings[ccre_row] = 0.1 * gene_loadings[gene_row] + 0.3 * ccre_loadings[ccre_row]
        return cls(ccre_base, ccre_loadings, gene_base, 0.2 * gene_loadings)


class _Domains:
    """Regulatory domains: consecutive runs of the genome of about 150 kb with a boundary between them."""

    def __init__(self, ccres: pd.DataFrame, rng: np.random.Generator) -> None:
        self._chroms = {chrom: number for number, chrom in enumerate(sorted(ccres["chrom"].unique()))}
        length = int(ccres["end"].max()) + 1
        edges = np.cumsum(rng.exponential(150_000, 2 * length // 150_000 + 10))
        self._edges, self._per_chrom = edges, len(edges) + 1
        self.number = self._per_chrom * len(self._chroms)

    def of(self, regions: pd.DataFrame) -> np.ndarray:
        """Return the domain of the midpoint of each region (of its start, for genes)."""
        point = regions["start"].to_numpy()
        chrom = regions["chrom"].map(self._chroms).to_numpy()
        number: np.ndarray = chrom * self._per_chrom + np.searchsorted(self._edges, point)
        return number


# ---------------------------------------------------------------- links


@dataclass(frozen=True)
class _Links:
    """Planted links: `effect` [n_links, n_types] is 0 where a link does not work."""

    gene: np.ndarray
    ccre: np.ndarray
    distance: np.ndarray
    promoter: np.ndarray
    effect: np.ndarray


def _plant_links(
    genes: pd.DataFrame,
    ccres: pd.DataFrame,
    openness: np.ndarray,
    n_types: int,
    window_bp: int,
    rng: np.random.Generator,
) -> _Links:
    """Draw links; a cCRE with a high `openness` (log odds) is drawn more often."""
    gene, ccre, distance = _pairs(genes, ccres, window_bp)
    promoter = np.abs(distance) <= PROMOTER_BP
    weight = (np.abs(distance) + 5_000.0) ** -0.7 / (1 + np.exp(-openness[ccre])) ** 0.5
    wanted = rng.binomial(MAX_LINKS, 0.5, len(genes))
    chosen = promoter | _draw_without_replacement(gene, np.where(promoter, 0, weight), wanted, rng)
    gene, ccre, distance, promoter = gene[chosen], ccre[chosen], distance[chosen], promoter[chosen]
    size = np.where(promoter, 0.5, rng.gamma(4.0, 0.35, len(gene)))
    restricted = ~promoter & (rng.random(len(gene)) < 0.3)
    works = ~restricted[:, None] | (rng.random((len(gene), n_types)) < 0.5)
    return _Links(gene, ccre, distance, promoter, size[:, None] * works)


def _draw_without_replacement(
    group: np.ndarray, weight: np.ndarray, wanted: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Choose up to `wanted[g]` members of each (sorted) group, likelier by `weight` (exponential race)."""
    with np.errstate(divide="ignore"):
        time = rng.exponential(size=len(group)) / weight
    order = np.lexsort((time, group))
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - np.searchsorted(group, group)[order]
    best: np.ndarray = (rank < wanted[group]) & (weight > 0)
    return best


# ---------------------------------------------------------------- observation


def _observe(
    cells: _Cells, landscape: _Landscape, links: _Links, snapshot_share: float, rng: np.random.Generator
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray]:
    """Return counts, 0/1 accessibility, and mean activity of each cCRE in each type [n_types, n_ccres]."""
    n_types, block = len(cells.type_names), 256
    rna_blocks, atac_blocks, order = [], [], []
    mean_open = np.zeros((n_types, len(landscape.ccre_base)))
    for cell_type in range(n_types):
        weight = _link_matrix(links, cell_type, landscape)
        members = np.flatnonzero(cells.type_of == cell_type)
        for start in range(0, len(members), block):
            rows = members[start : start + block]
            probability = _open_probability(cells.programme[rows], landscape)
            is_open = rng.random(probability.shape, dtype=np.float32) < probability
            activity = probability + snapshot_share * (is_open - probability)
            mean_open[cell_type] += activity.sum(0) / len(members)
            rna_blocks.append(_count(activity @ weight, rows, cells, landscape, rng))
            atac_blocks.append(_see(is_open, cells.atac_depth[rows], rng))
            order.append(rows)
    back = np.argsort(np.concatenate(order))
    return sparse.vstack(rna_blocks).tocsr()[back], sparse.vstack(atac_blocks).tocsr()[back], mean_open


def _link_matrix(links: _Links, cell_type: int, landscape: _Landscape) -> sparse.csc_matrix:
    """Return effects [n_ccres, n_genes] of the links that work in a type."""
    works = links.effect[:, cell_type] > 0
    shape = (len(landscape.ccre_base), len(landscape.gene_base))
    effects = links.effect[works, cell_type].astype(np.float32)
    return sparse.csc_matrix((effects, (links.ccre[works], links.gene[works])), shape=shape)


def _open_probability(programme: np.ndarray, landscape: _Landscape) -> np.ndarray:
    log_odds = programme.astype(np.float32) @ landscape.ccre_loadings.T.astype(np.float32)
    log_odds += landscape.ccre_base.astype(np.float32)
    return 1 / (1 + np.exp(-log_odds))


def _count(
    cis: np.ndarray, rows: np.ndarray, cells: _Cells, landscape: _Landscape, rng: np.random.Generator
) -> sparse.csr_matrix:
    """Draw gamma-Poisson counts (dispersion 0.3) of cells `rows` given their cis part."""
    log_rate = landscape.gene_base + cells.programme[rows] @ landscape.gene_loadings.T + cis
    rate = cells.rna_depth[rows, None] * np.exp(np.minimum(log_rate, 6.0))
    noise = rng.standard_gamma(1 / 0.3, rate.shape, dtype=np.float32) * 0.3
    return sparse.csr_matrix(rng.poisson(rate * noise).astype(np.int32))


def _see(is_open: np.ndarray, depth: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Keep each open cCRE with the probability that sequencing of that depth sees it."""
    seen = sparse.csr_matrix(is_open)
    capture = np.repeat(1 - np.exp(-0.7 * depth), np.diff(seen.indptr))
    seen.data = (rng.random(seen.nnz) < capture).astype(np.uint8)
    seen.eliminate_zeros()
    return seen.astype(np.uint8)


# ---------------------------------------------------------------- results


def _as_adata(matrix: sparse.csr_matrix, obs: pd.DataFrame, var: pd.DataFrame) -> AnnData:
    from anndata import AnnData

    var = var.rename_axis(None)
    return AnnData(matrix.astype(np.float32), obs=obs.copy(), var=var)


def _truth_table(
    genes: pd.DataFrame, ccres: pd.DataFrame, links: _Links, mean_open: np.ndarray, type_names: list[str]
) -> pd.DataFrame:
    link, cell_type = np.nonzero(links.effect > 0)
    gene, ccre = links.gene[link], links.ccre[link]
    return pd.DataFrame(
        {
            "gene_id": genes["gene_id"].to_numpy()[gene],
            "gene_name": genes["gene_name"].to_numpy()[gene],
            "ccre": _names(ccres)[ccre],
            "cell_type": np.array(type_names)[cell_type],
            "effect": links.effect[link, cell_type] * mean_open[cell_type, ccre],
            "distance": links.distance[link],
            "promoter": links.promoter[link],
        }
    )
