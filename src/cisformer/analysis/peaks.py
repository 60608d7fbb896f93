"""What peaks are: promoter, gene body or distal; the nearest TSS; the genes they are linked to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cisformer.analysis.stored import StoredLinks, check_min_score, open_links, warn_few_genes
from cisformer.data.annotation import read_bed, read_gtf
from cisformer.data.features import peak_regions
from cisformer.data.genome import nearest_tss, overlap_pairs, region_names, rename_chroms, tss
from cisformer.data.known_genomes import GENOMES, guess_genome, load_annotation
from cisformer.data.sources import open_rows
from cisformer.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

HDF5, MOST_NAMED = b"\x89HDF", 10


def annotate_peaks(
    peaks: str | Path | AnnData,
    links: str | Path | None = None,
    *,
    genome: str | None = None,
    gtf: str | Path | None = None,
    promoter_bp: int = 1000,
    min_score: float = 0.5,
) -> pd.DataFrame:
    """Say where peaks lie relative to genes, and which genes they are linked to.

    Parameters
    ----------
    peaks
        BED, plain or gzipped; or cells with peaks: h5ad, any other file of cells, or an AnnData.
    links
        The `cisformer_link` folder, or a `links.tsv.gz`.
    genome
        hg38, hg19, mm39 or mm10; guessed from the peaks otherwise.
    gtf
        Genes to use. Without it, genes are those of the links' folder, or the built-in ones of the genome.
    promoter_bp
        A peak within this many bp of a TSS is a promoter.
    min_score
        Smallest score of a link to use.

    Returns
    -------
    pandas.DataFrame
        One row per peak: peak, chrom, start, end, kind (promoter; gene body: within a gene, of exons nothing is known;
        distal), nearest_gene, nearest_gene_id, nearest_distance (from TSS to the middle of the peak in bp, negative
        upstream), genes_over (of which it touches the body). With links: linked_gene, cell_type and score of the best
        link of the cCREs that it overlaps, and linked_genes, ten at most, the best first.

    Raises
    ------
    InputError
        If a file is not what it should be, the genome is unknown, or peaks and genes share no chromosome.
    """
    check_min_score(min_score)
    regions, label = _read(peaks)
    stored = open_links(links) if links is not None else None
    genes = _genes(regions, label, stored, genome, gtf)
    regions["chrom"] = rename_chroms(regions["chrom"], genes["chrom"])
    if not regions["chrom"].isin(set(genes["chrom"])).any():
        raise InputError(
            f"no peak of {label} lies on a chromosome with genes: {regions['chrom'].iloc[0]} against "
            f"{genes['chrom'].iloc[0]}",
            hint="give peaks and genes of one genome",
        )
    table = _places(regions, genes, promoter_bp)
    return table if stored is None else table.assign(**_linked(regions, stored, min_score))


def _read(peaks: str | Path | AnnData) -> tuple[pd.DataFrame, str]:
    if isinstance(peaks, str | Path) and Path(peaks).is_file():
        with open(peaks, "rb") as handle:
            packed = handle.read(4) == HDF5
        if not packed and not str(peaks).endswith((".h5ad.gz", ".h5.gz")):
            regions = read_bed(peaks)
            if regions.empty:
                raise InputError(
                    f"{peaks} holds no peaks", hint="wanted: chrom, start, end, separated by tabs"
                )
            return regions, str(peaks)
    with open_rows(peaks, "atac", strict=False) as source:
        return peak_regions(source.var).reset_index(drop=True), source.label


def _genes(
    regions: pd.DataFrame, label: str, stored: StoredLinks | None, genome: str | None, gtf: str | Path | None
) -> pd.DataFrame:
    """Return the genes to measure by; `InputError` where the genome is unknown, or not that of the links."""
    if gtf is not None:
        return read_gtf(gtf)
    known = genome or guess_genome(regions)
    if stored is not None and stored.genome and known and known != stored.genome:
        raise InputError(
            f"the peaks of {label} are on {known}, the links of {stored.source} on {stored.genome}",
            hint=f"lift the peaks over to {stored.genome}; or state their genome with --genome, if this is wrong",
        )
    if stored is not None and (stored.genes["end"] - stored.genes["start"] > 1).any():
        warn_few_genes(stored, ". Give --gtf for all genes")
        return stored.genes
    if genome is None and not known:
        raise InputError(
            f"the genome of {label} is none of {', '.join(GENOMES)}, as far as its peaks say",
            hint="state it with --genome, or give its genes with --gtf",
        )
    return load_annotation(known)


def _places(regions: pd.DataFrame, genes: pd.DataFrame, promoter_bp: int) -> pd.DataFrame:
    placed = genes[genes["end"] > 0].reset_index(drop=True)
    near, distance = nearest_tss(regions, placed)
    site = tss(placed)
    around = placed.assign(start=np.maximum(site - promoter_bp, 0), end=site + promoter_bp + 1)
    is_promoter = np.isin(np.arange(len(regions)), overlap_pairs(regions, around)[0])
    over, body = overlap_pairs(regions, placed)
    within = np.isin(np.arange(len(regions)), over)
    names = placed["gene_name"].to_numpy(object)
    known = near >= 0
    gene, gene_id = (
        np.where(known, placed[name].to_numpy(object)[near], "") for name in ("gene_name", "gene_id")
    )
    kind = np.where(is_promoter, "promoter", np.where(within, "gene body", "distal"))
    return regions.assign(
        peak=region_names(regions),
        kind=kind,
        nearest_gene=gene,
        nearest_gene_id=gene_id,
        nearest_distance=pd.Series(distance, dtype="Int64").where(known),
        genes_over=_joined(over, names[body], len(regions)),
    )[
        ["peak", "chrom", "start", "end", "kind", "nearest_gene", "nearest_gene_id", "nearest_distance", "genes_over"]
    ]  # fmt: skip


def _joined(row: np.ndarray, names: np.ndarray, n: int) -> np.ndarray:
    """Join the names of each row by semicolons, ten at most."""
    joined = np.full(n, "", dtype=object)
    for number, found in pd.Series(names).groupby(row, sort=False):
        joined[number] = ";".join(found.drop_duplicates()[:MOST_NAMED])
    return joined


def _linked(regions: pd.DataFrame, stored: StoredLinks, min_score: float) -> dict[str, np.ndarray]:
    """Return the best linked gene of each peak, its type and score, and all linked genes."""
    peak, ccre = overlap_pairs(
        regions.assign(chrom=rename_chroms(regions["chrom"], stored.ccres["chrom"])), stored.ccres
    )
    hits = pd.DataFrame({"peak": peak, "ccre": ccre})
    found = []
    for name in stored.cell_types:
        table = stored.of_type(name)
        table = table[(table["score"] >= min_score) & table["ccre"].isin(set(ccre))]
        found.append(hits.merge(table, on="ccre").assign(cell_type=name))
    rows = pd.concat(found, ignore_index=True).sort_values("score", ascending=False, kind="stable")
    names = stored.genes["gene_name"].to_numpy(object)[rows["gene"]]
    best = rows.assign(name=names).drop_duplicates("peak").set_index("peak").reindex(np.arange(len(regions)))
    return {
        "linked_gene": best["name"].fillna("").to_numpy(object),
        "cell_type": best["cell_type"].fillna("").to_numpy(object),
        "score": best["score"].to_numpy(),
        "linked_genes": _joined(rows["peak"].to_numpy(), names, len(regions)),
    }
