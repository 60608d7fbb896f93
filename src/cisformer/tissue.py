"""What simulated cells are drawn from: genes and cCREs of a reference, cells, their landscape, planted links.

`simulation` says what the model is; `sparse_cells` draws large sets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd
from scipy import sparse

from cisformer.data.genome import region_names, signed_distance, window_pairs
from cisformer.errors import InputError

if TYPE_CHECKING:
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
TILE_GENES = 250
CCRES_PER_PEAK = 9.5  # 1,033,239 human cCREs; 10x PBMC Multiome calls 108,377 peaks
FLANK_BP = 100_000
PROMOTER_BP = 500
N_STATES = 3
MAX_LINKS = 6
SNAPSHOT_SHARE = 0.05
DISPERSION = 0.3
"""Of counts: their variance is mean + 0.3 · mean²."""
CAPTURE = 0.7
"""An open cCRE is seen with probability 1 − exp(−0.7 · depth)."""
Mode = Literal["contact", "uniform", "no-coupling"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class SimulationOptions:
    """What `simulate` was asked for; checks itself. Its parameters say what each is."""

    n_cells: int = 2000
    n_genes: int = 5000
    n_ccres: int = 40_000
    n_types: int = 8
    mode: Mode = "contact"
    seed: int = 0
    reference: str | Reference = "human"
    window_bp: int = 250_000

    def __post_init__(self) -> None:
        for name in ("n_cells", "n_genes", "n_ccres", "n_types"):
            if (value := getattr(self, name)) < 1:
                raise InputError(f"{name} is {value}; it has to be at least 1")
        if self.n_types > self.n_cells:
            raise InputError(
                f"{self.n_types} cell types in {self.n_cells} cells", hint="use at most one type per cell"
            )
        if self.mode not in MODES:
            raise InputError(f"there is no mode {self.mode!r}", hint=f"choose from: {', '.join(MODES)}")


@dataclass(frozen=True)
class Tissue:
    """Cells and what they obey.

    Attributes
    ----------
    genes, ccres
        Rows of the reference, in genome order.
    cells, landscape, links
        See there.
    snapshot_share
        Share of a cCRE's activity that is its open state of the moment.
    """

    genes: pd.DataFrame
    ccres: pd.DataFrame
    cells: Cells
    landscape: Landscape
    links: Links
    snapshot_share: float

    @classmethod
    def draw(cls, options: SimulationOptions, rng: np.random.Generator) -> Tissue:
        """Draw regions, cells, landscape and links."""
        genes, ccres = _draw_regions(options.reference, options.n_genes, options.n_ccres, rng)
        cells = Cells.draw(options.n_cells, options.n_types, rng)
        landscape = Landscape.draw(genes, ccres, cells.loadings_len, rng)
        by_openness = np.zeros(len(ccres)) if options.mode == "uniform" else landscape.ccre_base
        links = _plant_links(genes, ccres, by_openness, options.n_types, options.window_bp, rng)
        share = 0.0 if options.mode == "no-coupling" else SNAPSHOT_SHARE
        return cls(genes, ccres, cells, landscape, links, share)

    def link_matrix(self, cell_type: int) -> sparse.csc_matrix:
        """Return effects [n_ccres, n_genes] of the links that work in a type."""
        works = self.links.effect[:, cell_type] > 0
        effects = self.links.effect[works, cell_type].astype(np.float32)
        pairs = self.links.ccre[works], self.links.gene[works]
        return sparse.csc_matrix((effects, pairs), shape=(len(self.ccres), len(self.genes)))

    def truth_table(self, mean_open: np.ndarray) -> pd.DataFrame:
        """Return one row per link and type in which it works, given mean activities [n_types, n_ccres]."""
        links = self.links
        link, cell_type = np.nonzero(links.effect > 0)
        gene, ccre = links.gene[link], links.ccre[link]
        return pd.DataFrame(
            {
                "gene_id": self.genes["gene_id"].to_numpy()[gene],
                "gene_name": self.genes["gene_name"].to_numpy()[gene],
                "ccre": region_names(self.ccres)[ccre],
                "cell_type": np.array(self.cells.type_names)[cell_type],
                "effect": links.effect[link, cell_type] * mean_open[cell_type, ccre],
                "distance": links.distance[link],
                "promoter": links.promoter[link],
            }
        )


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
    chrom, names = pd.factorize(ccres["chrom"])
    start, end = ccres["start"].to_numpy(), ccres["end"].to_numpy()
    for number in rng.permutation(len(tiles)):
        block = genes.loc[tiles[number]]
        in_tiles[tiles[number]] = True
        near |= (
            (chrom == names.get_indexer([block["chrom"].iloc[0]]))
            & (end > block["start"].min() - FLANK_BP)
            & (start < block["end"].max() + FLANK_BP)
        )
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


def _pairs(genes: pd.DataFrame, ccres: pd.DataFrame, bp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gene rows, cCRE rows and signed distances of pairs whose midpoint is within `bp` of the TSS."""
    gene_row, ccre_row = window_pairs(genes, ccres, bp)
    distance = signed_distance(genes, ccres, gene_row, ccre_row)
    near = np.abs(distance) <= bp
    return gene_row[near], ccre_row[near], distance[near]


def _promoter_pairs(genes: pd.DataFrame, ccres: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    return _pairs(genes, ccres, PROMOTER_BP)[:2]


# ---------------------------------------------------------------- cells


@dataclass(frozen=True)
class Cells:
    """Cells: `programme` [n_cells, K] has type profile, states and donor; depths are around 1."""

    obs: pd.DataFrame
    type_names: list[str]
    type_of: np.ndarray
    programme: np.ndarray
    rna_depth: np.ndarray
    atac_depth: np.ndarray

    @property
    def loadings_len(self) -> int:
        """Length of a programme."""
        return int(self.programme.shape[1])

    @classmethod
    def draw(cls, n_cells: int, n_types: int, rng: np.random.Generator) -> Cells:
        """Draw types, states, donors and depths."""
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
class Landscape:
    """Base levels and loadings on the cells' programmes: log odds of cCREs, log rates of genes."""

    ccre_base: np.ndarray
    ccre_loadings: np.ndarray
    gene_base: np.ndarray
    gene_loadings: np.ndarray

    @classmethod
    def draw(
        cls, genes: pd.DataFrame, ccres: pd.DataFrame, length: int, rng: np.random.Generator
    ) -> Landscape:
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

    def open_probability(self, programme: np.ndarray) -> np.ndarray:
        """Return the probability of each cCRE to be open in cells of these programmes; float32 [n, n_ccres]."""
        log_odds = programme.astype(np.float32) @ self.ccre_loadings.T.astype(np.float32)
        log_odds += self.ccre_base.astype(np.float32)
        return 1 / (1 + np.exp(-log_odds))


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
class Links:
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
) -> Links:
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
    return Links(gene, ccre, distance, promoter, size[:, None] * works)


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
