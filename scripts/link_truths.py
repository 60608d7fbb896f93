"""Real evidence for links as tables of pairs with features: CRISPRi screens, fine-mapped eQTL, promoter-capture Hi-C.

Reads the tables of a data folder (`crispr/`, `truth/`, `heme_bulk_14/`) and the built-in human reference, which has
the autosomes; pairs on other chromosomes are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from cisformer.data.genome import overlap_pairs, tss
from cisformer.data.reference import Reference, load_reference
from cisformer.links.prior import (
    PROMOTER_BP,
    UNKNOWN_BREADTH,
    count_between,
    count_near,
    expression_breadth,
    is_noncoding,
    pair_features,
    relative_activity,
)
from cisformer.links.statistics import distance_contact as contact

SNP_FLANK_BP = 250
POPULATION_OF = {"B cells": "B", "CD14+ Monocytes": "Mono", "CD4 Naive": "CD4", "CD8 Naive": "CD8"}


@dataclass(frozen=True)
class Truth:
    """Tested pairs, in one order.

    Attributes
    ----------
    name
        Of the experiment.
    pairs
        chrom, gene, is_link, distance (bp); and other columns of the source.
    features
        What the prior looks at.
    scores
        Simple scores, and those of other tools; name → [E], high is linked.
    """

    name: str
    pairs: pd.DataFrame
    features: pd.DataFrame
    scores: dict[str, np.ndarray]

    @property
    def is_link(self) -> np.ndarray:
        """Which pairs are links; bool [E]."""
        return self.pairs["is_link"].to_numpy(bool)


@dataclass(frozen=True)
class Blood:
    """Expression and accessibility of 14 sorted blood populations.

    Attributes
    ----------
    names
        Of the populations.
    level
        log2(1 + CPM); [14, genes], by `gene`.
    breadth
        Of expression; [genes].
    gene
        Gene name → column.
    peaks
        chrom, start, end (hg38).
    signal
        Peak signal; [14, peaks].
    """

    names: list[str]
    level: np.ndarray
    breadth: np.ndarray
    gene: pd.Series
    peaks: pd.DataFrame
    signal: np.ndarray

    @classmethod
    def read(cls, data: Path) -> Blood:
        """Read the `heme_bulk_14` folder."""
        rna, atac = (anndata.read_h5ad(data / "heme_bulk_14" / name) for name in ("rna.h5ad", "atac.h5ad"))
        counts = rna.X.toarray().astype(np.float64)
        level = np.log2(1 + 1e6 * counts / counts.sum(axis=1, keepdims=True))
        lifted = (atac.var["start_hg38"] > 0).to_numpy()
        peaks = atac.var.loc[lifted, ["chrom", "start_hg38", "end_hg38"]].reset_index(drop=True)
        return cls(
            names=list(rna.obs_names),
            level=level,
            breadth=expression_breadth(counts),
            gene=pd.Series(np.arange(rna.n_vars), index=rna.var_names),
            peaks=peaks.set_axis(["chrom", "start", "end"], axis=1),
            signal=atac.X.toarray().astype(np.float64)[:, lifted],
        )

    def breadth_of(self, genes: pd.Series) -> np.ndarray:
        """Return the breadth of genes by name."""
        column = self.gene.reindex(genes).to_numpy()
        return np.where(np.isnan(column), UNKNOWN_BREADTH, self.breadth[np.nan_to_num(column).astype(int)])

    def strongest_peak(self, regions: pd.DataFrame) -> np.ndarray:
        """Return the strongest of the peaks that each region touches, −1 for none; [E]."""
        row, peak = overlap_pairs(regions, self.peaks)
        best = pd.DataFrame({"row": row, "peak": peak, "signal": self.signal.mean(axis=0)[peak]})
        best = best.sort_values("signal", kind="stable").drop_duplicates("row", keep="last")
        result = np.full(len(regions), -1)
        result[best["row"]] = best["peak"]
        return result

    def is_promoter(self, genes: pd.DataFrame) -> np.ndarray:
        """Say which peaks lie at the TSS of a gene that some population expresses."""
        column = self.gene.reindex(genes["gene_name"]).to_numpy()
        expressed = ~np.isnan(column) & (self.level.max(axis=0)[np.nan_to_num(column).astype(int)] > 1)
        site = tss(genes)[expressed]
        around = pd.DataFrame({"chrom": genes["chrom"].to_numpy()[expressed], "start": site - PROMOTER_BP})
        found = np.zeros(len(self.peaks), dtype=bool)
        found[overlap_pairs(around.assign(end=site + PROMOTER_BP), self.peaks)[1]] = True
        return found


def read_truths(data: Path) -> dict[str, Truth]:
    """Return the truths by name: "CRISPRi K562", "eQTL", "capture Hi-C"."""
    reference, blood = load_reference("human"), Blood.read(data)
    found = [screens(data, reference, blood), eqtl(data, reference, blood), capture(data, reference, blood)]
    return {truth.name: truth for truth in found}


def screens(data: Path, reference: Reference, blood: Blood) -> Truth:
    """CRISPRi screens in K562: DHS reads as accessibility, breadth of expression from blood populations."""
    path = data / "crispr" / "EPCrisprBenchmark_combined_data.training_K562.GRCh38.tsv.gz"
    table = pd.read_csv(path, sep="\t")
    table = table[table["chrom"].isin(set(reference.genes["chrom"]))].reset_index(drop=True)
    middle = ((table["chromStart"] + table["chromEnd"]) // 2).to_numpy()
    site = _tss_of_screen(table, middle, reference.genes)
    distance = np.abs(middle - site)
    reads = table["DHS.RPM"].to_numpy(float)
    at_promoter = _near_coding_tss(reference.genes, table["chrom"], middle)
    between = count_between(reference.genes, table["chrom"].to_numpy(), middle, site)
    activity = reads / reads[at_promoter].mean()
    acetylated = np.sqrt(reads * table["H3K27ac.RPM.expandedRegion"].to_numpy(float))
    far = table["distanceToTSS"].abs().to_numpy(float)
    pairs = pd.DataFrame(
        {
            "chrom": table["chrom"], "gene": table["measuredGeneSymbol"], "is_link": table["Regulated"].astype(bool),
            "distance": table["distanceToTSS"].abs(), "start": table["chromStart"], "end": table["chromEnd"],
            "ubiquitous": table["measuredGeneUbiquitousExpressed"].astype(float),
        }
    )  # fmt: skip
    scores = {
        "distance": -pairs["distance"].to_numpy(float),
        "nearest gene": _nearest(pairs),
        "accessibility × contact": reads * contact(far),
        "accessibility / distance": reads / far,
        "ABC-like: √(DHS · H3K27ac) / distance": acetylated / far,
    }
    near = count_near(reference.genes, table["chrom"].to_numpy(), site)
    features = pair_features(distance, activity, between, blood.breadth_of(pairs["gene"]), near)
    return Truth("CRISPRi K562", pairs, features, scores)


def _tss_of_screen(table: pd.DataFrame, middle: np.ndarray, genes: pd.DataFrame) -> np.ndarray:
    """Return each gene's TSS: the reference's or the table's, whichever fits the table's distance better."""
    by_id = pd.Series(tss(genes), index=genes["gene_id"])
    own = table["startTSS"].to_numpy()
    known = by_id[~by_id.index.duplicated()].reindex(table["measuredGeneEnsemblId"]).to_numpy(float)
    known = np.where(np.isnan(known), own, known).astype(np.int64)
    wanted = table["distanceToTSS"].abs().to_numpy()
    better = np.abs(np.abs(middle - known) - wanted) <= np.abs(np.abs(middle - own) - wanted)
    return np.where(better, known, own)


def _near_coding_tss(genes: pd.DataFrame, chrom: pd.Series, middle: np.ndarray) -> np.ndarray:
    coding = genes[~is_noncoding(genes["gene_name"])]
    site = tss(coding)
    around = pd.DataFrame({"chrom": coding["chrom"].to_numpy(), "start": site - PROMOTER_BP})
    points = pd.DataFrame({"chrom": chrom.to_numpy(), "start": middle, "end": middle + 1})
    near = np.zeros(len(middle), dtype=bool)
    near[overlap_pairs(points, around.assign(end=site + PROMOTER_BP + 1))[0]] = True
    return near


def _nearest(pairs: pd.DataFrame) -> np.ndarray:
    """Say which gene is the nearest of those tested with an element; 0 or 1."""
    element = pairs[["chrom", "start", "end"]].astype(str).agg(":".join, axis=1).to_numpy()
    nearest = pairs["distance"].groupby(element).transform("min")
    return (pairs["distance"] == nearest).to_numpy(float)


def eqtl(data: Path, reference: Reference, blood: Blood) -> Truth:
    """Fine-mapped eQTL; a variant stands for the strongest blood peak within 250 bp, others are left out."""
    table = pd.read_csv(data / "truth" / "eqtl_finemapped_pgboost_example_hg38.tsv.gz", sep="\t")
    around = table[["chrom", "start", "end"]].assign(
        start=table["start"] - SNP_FLANK_BP, end=table["end"] + SNP_FLANK_BP
    )
    signal = blood.signal.mean(axis=0)
    return _of_peaks("eQTL", table, around, reference, blood, signal)


def capture(data: Path, reference: Reference, blood: Blood) -> Truth:
    """Promoter-capture Hi-C by tile and cell type, with the accessibility of that type."""
    table = pd.read_csv(data / "truth" / "pbmc_pchic_scarlink_tiles_hg38.tsv.gz", sep="\t")
    population = table["cell_type"].map(POPULATION_OF).map(blood.names.index).to_numpy()
    return _of_peaks("capture Hi-C", table, table[["chrom", "start", "end"]], reference, blood, population)


def capture_in_any_type(data: Path, reference: Reference, blood: Blood) -> Truth:
    """Promoter-capture Hi-C, each tile and gene once: in contact in any cell type; accessibility is the mean log."""
    table = pd.read_csv(data / "truth" / "pbmc_pchic_scarlink_tiles_hg38.tsv.gz", sep="\t")
    table = table.groupby(["chrom", "start", "end", "gene"], as_index=False)["label"].max()
    signal = np.expm1(np.log1p(blood.signal).mean(axis=0))
    return _of_peaks(
        "capture Hi-C, any type", table, table[["chrom", "start", "end"]], reference, blood, signal
    )


def _of_peaks(
    name: str,
    table: pd.DataFrame,
    regions: pd.DataFrame,
    reference: Reference,
    blood: Blood,
    population: np.ndarray,
) -> Truth:
    """Build a truth of regions that touch a blood peak and genes that blood data and reference have.

    `population` is the population of each row, or a signal to use for all of them.
    """
    genes = reference.genes[reference.genes["end"] > 0]
    site_of = pd.Series(tss(genes), index=genes["gene_name"])
    site_of = site_of[~site_of.index.duplicated()]
    peak = blood.strongest_peak(regions)
    kept = (peak >= 0) & table["gene"].isin(site_of.index) & table["gene"].isin(blood.gene.index)
    kept &= table["chrom"].isin(set(genes["chrom"]))
    own = population[kept] if len(population) == len(table) else None
    peak, table = peak[kept], table[kept].reset_index(drop=True)
    middle = ((table["start"] + table["end"]) // 2).to_numpy()
    site = site_of.reindex(table["gene"]).to_numpy()
    distance = np.abs(middle - site)
    promoter = blood.is_promoter(genes)
    relative = np.stack([relative_activity(row, promoter) for row in blood.signal])
    activity = relative_activity(population, promoter)[peak] if own is None else relative[own, peak]
    between = count_between(genes, table["chrom"].to_numpy(), middle, site)
    near = count_near(genes, table["chrom"].to_numpy(), site)
    features = pair_features(distance, activity, between, blood.breadth_of(table["gene"]), near)
    pairs = table.assign(is_link=table["label"].astype(bool), distance=distance, peak=peak)
    scores = {
        "distance": -distance.astype(float),
        "nearest gene": _nearest(pairs),
        "accessibility": activity,
        "accessibility × contact": activity * contact(distance),
        "correlation": blood_correlation(blood, table["gene"], peak),
    }
    if "scarlink_z" in table:
        scores["SCARlink"] = table["scarlink_z"].to_numpy(float)
    return Truth(name, pairs, features, scores)


def blood_correlation(blood: Blood, genes: pd.Series, peak: np.ndarray) -> np.ndarray:
    """Return Pearson's r of expression and accessibility (logs) over the populations; [E]."""
    left = _standard(blood.level[:, blood.gene.reindex(genes).to_numpy(int)])
    return (left * _standard(np.log2(1 + blood.signal[:, peak]))).mean(axis=0)


def _standard(matrix: np.ndarray) -> np.ndarray:
    return (matrix - matrix.mean(axis=0)) / np.maximum(matrix.std(axis=0), 1e-9)
