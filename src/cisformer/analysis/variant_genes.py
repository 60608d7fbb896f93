"""From variants to cCREs to genes and cell types."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.analysis.enrichment import LinkedShare, linked_enrichment
from cisformer.analysis.read_variants import Variants, genome_named, on_chroms, read_variants
from cisformer.analysis.stored import StoredLinks, check_min_score, open_links, warn_few_genes
from cisformer.data.genome import nearest_tss, overlap_pairs, region_names, tss
from cisformer.errors import InputError
from cisformer.links.formats import text_writer
from cisformer.runtime.files import atomic_path, refuse_existing
from cisformer.runtime.provenance import provenance

logger = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "cisformer-variants", 1
LINKS, VARIANTS, ENRICHMENT, REPORT = "variant_links.tsv", "variants.tsv", "enrichment.tsv", "report.json"
FILES = (LINKS, VARIANTS, ENRICHMENT, REPORT)
SIGNIFICANT = 0.05
EVIDENCE = ("score_fdr", "specificity", "p_value", "fdr")
"""What of the links is carried over, beside the score."""


@dataclass(frozen=True)
class VariantOptions:
    """What `annotate_variants` was asked for; checked when it is made.

    Attributes
    ----------
    genome
        Genome of the variants; what their file says otherwise.
    min_score
        Smallest score of a link that counts.
    min_pip
        Smallest posterior inclusion probability of a variant that counts.
    n_permutations
        Number of matched draws.
    seed
        Of these draws.
    """

    genome: str | None = None
    min_score: float = 0.5
    min_pip: float | None = None
    n_permutations: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        check_min_score(self.min_score)
        if self.n_permutations < 1 or self.seed < 0:
            raise InputError(
                f"permutations is {self.n_permutations}, seed is {self.seed}",
                hint="give at least 1 permutation, and a seed of 0 or more",
            )


@dataclass(frozen=True)
class VariantAnnotation:
    """What links say of variants.

    Attributes
    ----------
    links
        One row per variant, gene and cell type, the highest score first.
    variants
        One row per variant, in their order: its gene and what names it (`by`: ``"link"`` or ``"nearest"``), the nearest
        gene, and the best linked gene.
    enrichment
        One row per cell type.
    counts
        Number of variants, of those in cCREs and of those with a gene.
    source
        Files, options, genome, and how many rows were left out, and why.
    """

    links: pd.DataFrame
    variants: pd.DataFrame
    enrichment: pd.DataFrame
    counts: dict[str, int]
    source: dict[str, object]

    def describe(self) -> str:
        """Return the result as lines of text."""
        c = self.counts
        lines = [
            f"{c['variants']:,} variant{'s' * (c['variants'] != 1)}: {c['in_no_ccre']:,} in no cCRE, "
            f"{c['in_ccre']:,} in a cCRE, {c['linked']:,} of these linked to a gene",
        ]
        if c["linked"]:
            lines.append(
                f"the best linked gene is not the nearest one for {c['not_nearest']:,} of {c['linked']:,}"
            )
        if c["linked"] < c["variants"]:
            lines.append(
                f"column gene: the best linked gene for {c['linked']:,}, the nearest gene for {c['by_nearest']:,}"
            )
            if none := c["variants"] - c["linked"] - c["by_nearest"]:
                lines[-1] += f", none for {none:,} (no gene on their chromosome)"
        tested = self.enrichment.dropna(subset=["p_value"])
        if tested.empty:
            lines.append("enrichment is not tested: too few loci")
        elif not (tested["fdr"] <= SIGNIFICANT).any():
            lines.append(f"no cell type stands out: the smallest FDR is {tested['fdr'].min():.2g}")
        for row in tested[tested["fdr"] <= SIGNIFICANT].itertuples():
            lines.append(
                f"{row.cell_type}: {row.fold:.2f} times as linked as matched cCREs, FDR {row.fdr:.2g}"
            )
        return "\n".join(lines)

    def write(self, folder: str | Path, *, force: bool = False) -> list[Path]:
        """Write `variant_links.tsv`, `variants.tsv`, `enrichment.tsv` and `report.json` into a folder."""
        folder = Path(folder)
        for name in FILES:
            refuse_existing(folder / name, force=force)
        for name, table in ((LINKS, self.links), (VARIANTS, self.variants), (ENRICHMENT, self.enrichment)):
            with text_writer(folder / name) as handle:
                table.to_csv(handle, sep="\t", index=False, float_format="%.5g")
        about = {"format": FORMAT, "format_version": FORMAT_VERSION, **self.source, "counts": self.counts}
        with atomic_path(folder / REPORT) as path:
            path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return [folder / name for name in FILES]


def annotate_variants(
    links: str | Path,
    variants: str | Path,
    *,
    genome: str | None = None,
    min_score: float = 0.5,
    min_pip: float | None = None,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> VariantAnnotation:
    """Find the genes that variants may act on, from the links of the cCREs in which they lie, in each cell type.

    Parameters
    ----------
    links
        The `cisformer_link` folder, or a `links.tsv.gz`.
    variants
        VCF, BED, or a table with a header; see `cisformer.analysis.read_variants.read_variants`.
    genome
        Genome of the variants, such as ``"hg38"``. By default the one that the file names; if it names none, that of
        the links, with a warning.
    min_score
        Smallest score of a link that counts.
    min_pip
        Leave out variants of a smaller posterior inclusion probability.
    n_permutations
        Number of random matched samples in the enrichment test.
    seed
        Random seed of these samples.

    Returns
    -------
    VariantAnnotation
        Variants with genes and cell types; a summary with the nearest gene; and for each cell type whether the
        variants' cCREs are linked more often than similar cCREs (Benjamini–Hochberg over types).

    Raises
    ------
    InputError
        If a file is not what it should be, the two are of different genomes, or share no chromosome.
    """
    options = VariantOptions(genome, min_score, min_pip, n_permutations, seed)
    stored = open_links(links)
    found = _of_genome(read_variants(variants, genome=stored.genome), stored, options)
    found = on_chroms(found, stored.ccres["chrom"].unique(), stored.source)
    found = _likely(found, options.min_pip)
    for why, number in found.left_out.items():
        logger.info("%s: %d left out (%s)", found.source, number, why)
    warn_few_genes(stored)
    return _annotate(stored, found, options)


def _of_genome(found: Variants, stored: StoredLinks, options: VariantOptions) -> Variants:
    """Raise `InputError` where variants and links are of different genomes; warn where that cannot be known."""
    given = (genome_named(options.genome) or options.genome.lower()) if options.genome else ""
    if given and found.genome and given != found.genome:
        raise InputError(
            f"{found.source} says that its genome is {found.genome}, --genome says {given}",
            hint="leave --genome out, or correct the file",
        )
    genome = given or found.genome
    if genome and stored.genome and genome != stored.genome:
        raise InputError(
            f"the variants of {found.source} are on {genome}, the links of {stored.source} on {stored.genome}",
            hint=f"lift the variants over to {stored.genome}, with UCSC liftOver or CrossMap",
        )
    if not genome:
        logger.warning(
            "%s does not say of which genome it is; assumed to be %s, as the links are. Give --genome to be sure",
            found.source, stored.genome or "that of the links",
        )  # fmt: skip
    elif not stored.genome:
        logger.warning("the genome of the links is unknown; the variants are on %s", genome)
    return replace(found, genome=genome or stored.genome)


def _likely(found: Variants, min_pip: float | None) -> Variants:
    """Leave out variants whose pip is too small; `InputError` where none has one, or none is left."""
    if min_pip is None:
        return found
    pip = found.table["pip"]
    if pip.isna().all():
        raise InputError(
            f"{found.source} has no column of pip", hint="leave --min_pip out, or name a column pip"
        )
    kept = (pip >= min_pip).to_numpy()
    if not kept.any():
        raise InputError(
            f"no variant of {found.source} has a pip of {min_pip:g}: the highest is {pip.max():.3g}",
            hint="lower --min_pip",
        )
    left_out = found.left_out | {f"have a pip below {min_pip:g}": int((~kept).sum())}
    return replace(found, table=found.table[kept].reset_index(drop=True), left_out=left_out)


def _annotate(stored: StoredLinks, found: Variants, options: VariantOptions) -> VariantAnnotation:
    variant, ccre = overlap_pairs(found.table, stored.ccres)
    hits = pd.DataFrame({"variant": variant, "ccre": ccre})
    if hits.empty:
        logger.warning(
            "%s: no variant lies in a cCRE of the links. Are its positions of genome %s?",
            found.source, found.genome or "of the links",
        )  # fmt: skip
    rows, linked = collect(stored, hits, options.min_score)
    told = found.table.iloc[variant].reset_index(drop=True)[["chrom", "start", "pip"]].assign(ccre=ccre)
    enrichment = linked_enrichment(
        told, linked, stored.ccres, stored.genes, n_draws=options.n_permutations, seed=options.seed
    )
    links = _link_table(stored, found.table, rows)
    summary = _summary(stored, found.table, hits, rows)
    with_gene = summary["linked_gene"] != ""
    counts = {
        "variants": len(summary),
        "in_no_ccre": int((summary["n_ccres"] == 0).sum()),
        "in_ccre": int((summary["n_ccres"] > 0).sum()),
        "linked": int(with_gene.sum()),
        "by_nearest": int((summary["by"] == "nearest").sum()),
        "not_nearest": int((with_gene & (summary["linked_gene_id"] != summary["nearest_gene_id"])).sum()),
    }
    source = provenance(
        links=stored.source, variants=found.source, kind=found.kind, options=asdict(options),
        assembly=found.genome, left_out=found.left_out,
    )  # fmt: skip
    return VariantAnnotation(links, summary, enrichment, counts, source)


def collect(stored: StoredLinks, hits: pd.DataFrame, min_score: float) -> tuple[pd.DataFrame, LinkedShare]:
    """Read each type once: the links of the variants' cCREs, and how far every cCRE is linked."""
    n = len(stored.ccres)
    is_hit = np.isin(np.arange(n), hits["ccre"])
    listed, n_open, best, rows = np.zeros(n, dtype=bool), np.zeros(n), {}, []
    for name in stored.cell_types:
        table = stored.of_type(name, ("n_open", *EVIDENCE))
        ccre = table["ccre"].to_numpy()
        listed[ccre] = True
        highest = np.zeros(n, dtype=np.float32)
        np.maximum.at(highest, ccre, table["score"].to_numpy(np.float32))
        best[name] = highest
        open_here = np.zeros(n)
        open_here[ccre] = np.nan_to_num(table["n_open"].to_numpy(np.float64))
        n_open += open_here
        rows.append(table[is_hit[ccre] & (table["score"] >= min_score).to_numpy()].assign(cell_type=name))
    ccres = np.flatnonzero(listed)
    linked = LinkedShare(ccres, {name: values[ccres] for name, values in best.items()}, n_open[ccres])
    return hits.merge(pd.concat(rows, ignore_index=True), on="ccre"), linked


def _variant_distance(stored: StoredLinks, variants: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Return the signed distance from TSS to variant, negative upstream; int64, one per row."""
    genes = stored.genes.iloc[rows["gene"]]
    middle = (variants["start"] + (variants["end"] - 1 - variants["start"]) // 2).to_numpy(np.int64)
    distance = middle[rows["variant"]] - tss(genes)
    signed: np.ndarray = np.where(genes["strand"].to_numpy() == "-", -distance, distance)
    return signed


def _link_table(stored: StoredLinks, variants: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    about = variants.iloc[rows["variant"]].reset_index(drop=True)
    genes = stored.genes.iloc[rows["gene"]].reset_index(drop=True)
    table = about.assign(
        ccre=region_names(stored.ccres.iloc[rows["ccre"]]),
        gene_id=genes["gene_id"],
        gene_name=genes["gene_name"],
        cell_type=rows["cell_type"].to_numpy(),
        score=rows["score"].to_numpy(),
        **{name: rows[name].to_numpy() for name in EVIDENCE},
        variant_distance=_variant_distance(stored, variants, rows),
        ccre_distance=rows["distance"].to_numpy(),
    )
    return table.sort_values("score", ascending=False, kind="stable", ignore_index=True)


def _summary(
    stored: StoredLinks, variants: pd.DataFrame, hits: pd.DataFrame, rows: pd.DataFrame
) -> pd.DataFrame:
    """Return one row per variant: cCREs, nearest gene, best linked gene, and which of the two to take."""
    near, near_distance = nearest_tss(variants, stored.genes)
    n_ccres = np.bincount(hits["variant"], minlength=len(variants))
    best = rows.sort_values("score", ascending=False, kind="stable").drop_duplicates("variant")
    best = best.assign(variant_distance=_variant_distance(stored, variants, best)).set_index("variant")
    best = best.reindex(np.arange(len(variants)))
    n_genes = rows.groupby("variant")["gene"].nunique().reindex(best.index).fillna(0).astype(int)
    names, ids = stored.genes["gene_name"].to_numpy(), stored.genes["gene_id"].to_numpy()
    nearest = pd.Series(near).where(near >= 0)
    gene = best["gene"].fillna(nearest)
    return variants.assign(
        n_ccres=n_ccres,
        ccre=_or_empty(region_names(stored.ccres), best["ccre"]),
        gene=_or_empty(names, gene),
        gene_id=_or_empty(ids, gene),
        by=np.select([best["gene"].notna(), gene.notna()], ["link", "nearest"], ""),
        nearest_gene=_or_empty(names, nearest),
        nearest_gene_id=_or_empty(ids, nearest),
        nearest_distance=pd.Series(near_distance, dtype="Int64").where(near >= 0),
        linked_gene=_or_empty(names, best["gene"]),
        linked_gene_id=_or_empty(ids, best["gene"]),
        cell_type=best["cell_type"].fillna(""),
        score=best["score"],
        **{name: best[name] for name in EVIDENCE},
        variant_distance=best["variant_distance"].astype("Int64"),
        n_linked_genes=n_genes,
    )


def _or_empty(names: np.ndarray, row: pd.Series) -> np.ndarray:
    """Return the names of rows, `""` where the row is NaN."""
    known = row.notna().to_numpy()
    found = np.full(len(row), "", dtype=object)
    found[known] = names[row[known].to_numpy(np.int64)]
    return found
