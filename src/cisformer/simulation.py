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
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from cisformer.data.genome import region_names
from cisformer.runtime.files import atomic_path
from cisformer.tissue import CAPTURE, DISPERSION, Mode, SimulationOptions, Tissue

if TYPE_CHECKING:
    from anndata import AnnData

    from cisformer.data.reference import Reference

FILES = ("rna.h5ad", "atac.h5ad", "celltype_info.tsv", "true_links.tsv")


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
        write_truth(folder, self.rna.obs, self.links)
        return folder


def write_truth(folder: Path, obs: pd.DataFrame, links: pd.DataFrame) -> None:
    """Write celltype_info.tsv and true_links.tsv."""
    with atomic_path(folder / "celltype_info.tsv") as path:
        obs["cell_type"].to_csv(path, sep="\t", header=False)
    with atomic_path(folder / "true_links.tsv") as path:
        links.to_csv(path, sep="\t", index=False, float_format="%.5g")


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
    options = SimulationOptions(n_cells, n_genes, n_ccres, n_types, mode, seed, reference, window_bp)
    rng = np.random.default_rng(seed)
    tissue = Tissue.draw(options, rng)
    rna, atac, mean_open = _observe(tissue, rng)
    genes, ccres, obs = tissue.genes, tissue.ccres, tissue.cells.obs
    return SimulatedCells(
        rna=_as_adata(rna, obs, genes.set_index("gene_name")),
        atac=_as_adata(atac, obs, ccres.set_index(region_names(ccres))),
        links=tissue.truth_table(mean_open),
    )


def _observe(
    tissue: Tissue, rng: np.random.Generator
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, np.ndarray]:
    """Return counts, 0/1 accessibility, and mean activity of each cCRE in each type [n_types, n_ccres]."""
    cells, landscape = tissue.cells, tissue.landscape
    n_types, block = len(cells.type_names), 256
    rna_blocks, atac_blocks, order = [], [], []
    mean_open = np.zeros((n_types, len(landscape.ccre_base)))
    for cell_type in range(n_types):
        weight = tissue.link_matrix(cell_type)
        members = np.flatnonzero(cells.type_of == cell_type)
        for start in range(0, len(members), block):
            rows = members[start : start + block]
            probability = landscape.open_probability(cells.programme[rows])
            is_open = rng.random(probability.shape, dtype=np.float32) < probability
            activity = probability + tissue.snapshot_share * (is_open - probability)
            mean_open[cell_type] += activity.sum(0) / len(members)
            rna_blocks.append(_count(activity @ weight, rows, tissue, rng))
            atac_blocks.append(_see(is_open, cells.atac_depth[rows], rng))
            order.append(rows)
    back = np.argsort(np.concatenate(order))
    return sparse.vstack(rna_blocks).tocsr()[back], sparse.vstack(atac_blocks).tocsr()[back], mean_open


def _count(cis: np.ndarray, rows: np.ndarray, tissue: Tissue, rng: np.random.Generator) -> sparse.csr_matrix:
    """Draw gamma-Poisson counts of cells `rows` given their cis part."""
    cells, landscape = tissue.cells, tissue.landscape
    log_rate = landscape.gene_base + cells.programme[rows] @ landscape.gene_loadings.T + cis
    rate = cells.rna_depth[rows, None] * np.exp(np.minimum(log_rate, 6.0))
    noise = rng.standard_gamma(1 / DISPERSION, rate.shape, dtype=np.float32) * DISPERSION
    return sparse.csr_matrix(rng.poisson(rate * noise).astype(np.int32))


def _see(is_open: np.ndarray, depth: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Keep each open cCRE with the probability that sequencing of that depth sees it."""
    seen = sparse.csr_matrix(is_open)
    capture = np.repeat(1 - np.exp(-CAPTURE * depth), np.diff(seen.indptr))
    seen.data = (rng.random(seen.nnz) < capture).astype(np.uint8)
    seen.eliminate_zeros()
    return seen.astype(np.uint8)


def _as_adata(matrix: sparse.csr_matrix, obs: pd.DataFrame, var: pd.DataFrame) -> AnnData:
    from anndata import AnnData

    var = var.rename_axis(None)
    return AnnData(matrix.astype(np.float32), obs=obs.copy(), var=var)
