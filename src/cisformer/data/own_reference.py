"""Make a reference of one's own: from a GTF and a BED, or from the genes and peaks of a data set."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.data.annotation import read_bed, read_gtf
from cisformer.data.features import gene_identity, peak_regions, stated_coordinates
from cisformer.data.genome import rename_chroms
from cisformer.data.known_genomes import GENOMES, guess_genome, load_annotation, look_up_genes
from cisformer.data.reference import BUILT_IN, Reference, save_reference
from cisformer.errors import InputError
from cisformer.runtime.files import atomic_folder

logger = logging.getLogger(__name__)


def build_reference(
    gtf: str | Path, peaks: str | Path, folder: str | Path, *, force: bool = False
) -> Reference:
    """Make a reference from a gene annotation and a list of cCREs, of any genome.

    Parameters
    ----------
    gtf
        GTF file, plain or gzipped. Genes are its ``gene`` lines; without such lines, the extent of each gene's lines.
    peaks
        BED file (at least three columns), plain or gzipped. Identical regions are kept once.
    folder
        Where to write it; its name becomes the name of the reference.
    force
        Overwrite an existing folder.

    Returns
    -------
    Reference
        What was written.

    Raises
    ------
    InputError
        If a file is missing, or is not GTF or BED.
    OutputExistsError
        If `folder` has something in it and `force` is not given.
    """
    genes = read_gtf(gtf)
    ccres = read_bed(peaks)
    ccres["chrom"] = rename_chroms(ccres["chrom"], genes["chrom"])
    require_shared_chroms(genes, ccres, str(gtf), str(peaks))
    reference = Reference(Path(folder).resolve().name, guess_genome(ccres), genes, ccres)
    with atomic_folder(folder, force=force) as temporary:
        save_reference(reference, temporary)
    return reference


def require_shared_chroms(genes: pd.DataFrame, ccres: pd.DataFrame, gtf: str, peaks: str) -> None:
    """Raise `InputError` where genes and cCREs have no chromosome in common; log genes on chromosomes without cCREs."""
    placed = genes["start"] >= 0
    shared = genes["chrom"].isin(set(ccres["chrom"]))
    if placed.any() and not shared.any():
        spelt = _few(genes["chrom"][placed])
        accession = "; these are accessions: use the GTF of GENCODE, Ensembl or UCSC" if "NC" in spelt else ""
        raise InputError(
            f"{gtf} and {peaks} share no chromosome: {spelt} and {_few(ccres['chrom'])}",
            hint=f"use files of the same genome, with the same chromosome names{accession}",
        )
    lost = placed & ~shared
    if lost.any():
        logger.info(
            "%d of %d genes lie on chromosomes without peaks, such as %s",
            lost.sum(), len(genes), _few(genes["chrom"][lost]),
        )  # fmt: skip


def _few(values: pd.Series) -> str:
    return ", ".join(map(str, pd.unique(values)[:3]))


def dataset_reference(
    rna_var: pd.DataFrame, atac_var: pd.DataFrame, gtf: str | Path | None = None, genome: str | None = None
) -> Reference:
    """Take a data set's own genes and peaks as the reference.

    Parameters
    ----------
    rna_var, atac_var
        `var` of both modalities. Features given twice are one.
    gtf
        Gene annotation of the data's genome. Without it, gene coordinates come from ``chrom, start, end,
        strand`` of `rna_var`; without a strand there, from the built-in annotation by id, then name, where
        the genome is known; where that has none, from ``chrom, start, end`` or 10x ``interval``.
    genome
        A genome of `GENOMES`; guessed from the peaks where it is not given.

    Returns
    -------
    Genes without coordinates stay in the reference, but lie in no window.

    Raises
    ------
    InputError
        If the annotation shares no chromosome with the peaks, or a peak is no region.
    """
    ccres = peak_regions(atac_var).drop_duplicates(ignore_index=True)
    guessed = guess_genome(ccres)
    if genome and guessed and guessed != genome:
        logger.warning(
            "the peaks look like %s, but the genome was given as %s: if that is wrong, so are the links",
            guessed,
            genome,
        )
    genome = guessed if genome is None else genome
    genes = gene_identity(rna_var)
    annotation = None if gtf is None else read_gtf(gtf)
    coordinates = _gene_coordinates(rna_var, genes, genome, annotation)
    genes = pd.concat([genes, coordinates], axis=1).drop_duplicates("gene_id", ignore_index=True)
    genes["chrom"] = rename_chroms(genes["chrom"], ccres["chrom"])
    require_shared_chroms(genes, ccres, str(gtf or "the genes"), "the peaks")
    unknown = genes[genes["start"] < 0]
    if len(unknown):
        logger.warning(
            "%d of %d genes have no coordinates, so they get no cis window and no links, such as %s%s",
            len(unknown), len(genes), _few(unknown["gene_name"]),
            _who_has_them(genome) if annotation is None else _names_in(annotation, str(gtf)),
        )  # fmt: skip
    return Reference("dataset", genome, genes, ccres)


def _who_has_them(genome: str) -> str:
    """Say where the coordinates of genes can be had that are missing."""
    if not genome:
        return f"; --gtf can give them, or --genome {'|'.join(GENOMES)}"
    if genome in BUILT_IN.values():
        return f"; those built in for {genome} are GENCODE's: give Ensembl ids in var['gene_ids'], or --gtf"
    return f"; the built-in genes of {genome} are RefSeq's, by name: --gtf gives others, such as Ensembl's lncRNAs"


def _names_in(annotation: pd.DataFrame, gtf: str) -> str:
    """Say how the genes of a GTF are called, beside genes that it lacks."""
    return f"; {gtf} has {_few(annotation['gene_id'])}, named {_few(annotation['gene_name'])}"


def _gene_coordinates(
    var: pd.DataFrame, genes: pd.DataFrame, genome: str, annotation: pd.DataFrame | None
) -> pd.DataFrame:
    """Return ``chrom, start, end, strand`` of each gene; see `dataset_reference` for where they come from."""
    if annotation is not None:
        return look_up_genes(genes, annotation)
    stated = stated_coordinates(var)
    if (stated["strand"] != "").any() or not genome:
        return _with_strands(stated, genes)
    found = look_up_genes(genes, load_annotation(genome, every_gene=True))
    missing = found["start"] < 0
    found[missing] = _with_strands(stated[missing], genes[missing])
    return found


def _with_strands(stated: pd.DataFrame, genes: pd.DataFrame) -> pd.DataFrame:
    """Fill in strands that are not stated, by Ensembl id; say how many TSSs stay in doubt.

    The strand of a gene is the same in all assemblies but for a few inversions. A single base, as 10x states the
    TSS, is in no doubt.
    """
    bare = (stated["strand"] == "") & (stated["start"] >= 0)
    if not bare.any():
        return stated
    for genome in BUILT_IN.values():
        known = load_annotation(genome, every_gene=True).set_index("gene_id")["strand"]
        strand = known.reindex(genes["gene_id"]).to_numpy(object)
        fill = bare.to_numpy() & pd.notna(strand) & (strand != "")
        stated = stated.assign(strand=np.where(fill, strand, stated["strand"]))
    wide = stated["end"] - stated["start"] > 1
    doubtful, filled = (stated["strand"] == "") & bare & wide, bare & (stated["strand"] != "")
    if filled.any():
        logger.info("%d genes have no strand in var; taken from the built-in annotation by id", filled.sum())
    if doubtful.any():
        logger.warning(
            "%d of %d genes have no strand: their start is used as TSS, which is wrong on the minus strand; give --gtf",
            doubtful.sum(), len(stated),
        )  # fmt: skip
    return stated
