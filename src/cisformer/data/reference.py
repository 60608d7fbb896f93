"""Gene and cCRE vocabularies with coordinates: built-in, built by a user, or a data set's own features."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import io
import json
import logging
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cisformer.data.annotation import read_bed, read_gtf
from cisformer.data.features import gene_identity, peak_regions, stated_coordinates
from cisformer.data.genome import (
    CCRE_COLUMNS,
    GENE_COLUMNS,
    overlaps_any,
    region_names,
    rename_chroms,
    tss,
)
from cisformer.errors import InputError, ReferenceMismatchError
from cisformer.runtime.files import atomic_folder, read_json
from cisformer.runtime.provenance import package_version

logger = logging.getLogger(__name__)

BUILT_IN = {"human": "hg38", "mouse": "mm39"}
"""Built-in references, and the genome of each."""
GENOMES = {"hg38": "human", "hg19": "human", "mm39": "mouse", "mm10": "mouse"}
"""Genomes whose gene coordinates are built in, and the species of each."""
FORMAT = "cisformer-reference"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Reference:
    """The genes and cCREs that a data set or a model counts in, in fixed order.

    Two references are the same when their fingerprints are.

    Parameters
    ----------
    name
        ``"human"``, ``"mouse"``, ``"dataset"``, or the name of the folder it was built in.
    genome
        ``"hg38"``, ``"mm39"``, or ``""`` where unknown.
    genes
        Columns ``gene_id, gene_name, chrom, start, end, strand``; one row per gene. Coordinates are 0-based
        and half-open, and ``"", -1, -1, ""`` where unknown.
    ccres
        Columns ``chrom, start, end``; one row per cCRE.
    """

    name: str
    genome: str
    genes: pd.DataFrame
    ccres: pd.DataFrame

    def __post_init__(self) -> None:
        for table, wanted, label in (
            (self.genes, GENE_COLUMNS, "gene"),
            (self.ccres, CCRE_COLUMNS, "cCRE"),
        ):
            if list(table.columns) != wanted:
                raise InputError(
                    f"the {label} table of reference {self.name!r} has columns {list(table.columns)}, "
                    f"wanted {wanted}"
                )
            if not len(table):
                raise InputError(f"reference {self.name!r} has no {label}")

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.genes)

    @property
    def n_ccres(self) -> int:
        """Number of cCREs."""
        return len(self.ccres)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over gene ids, names and all coordinates, in order: 64 hex digits."""
        digest = hashlib.sha256()
        for table in (self.genes, self.ccres):
            for column in table.columns:
                digest.update(_column_bytes(table[column]))
        return digest.hexdigest()

    @cached_property
    def gene_labels(self) -> NDArray[np.object_]:
        """Unique display names: the gene's name, or its id where an earlier gene has that name."""
        name, gene_id = self.genes["gene_name"], self.genes["gene_id"]
        labels: NDArray[np.object_] = np.where(name.duplicated() | (name == ""), gene_id, name).astype(object)
        return labels

    @cached_property
    def ccre_labels(self) -> NDArray[np.object_]:
        """``chrom:start-end`` of each cCRE."""
        return region_names(self.ccres)

    @property
    def is_built_in(self) -> bool:
        """Whether `load_reference(name)` gives this reference, so that it need not be stored with data."""
        return self.name in BUILT_IN and self.fingerprint == load_reference(self.name).fingerprint

    def describe(self) -> str:
        """Return one line about the reference for logs."""
        genome = f", {self.genome}" if self.genome else ""
        return f"{self.name}{genome}: {self.n_genes:,} genes, {self.n_ccres:,} cCREs"


def _column_bytes(column: pd.Series) -> bytes:
    if pd.api.types.is_integer_dtype(column):
        return bytes(column.to_numpy("<i8").tobytes())
    codes, names = pd.factorize(column)
    return bytes(codes.astype("<i4").tobytes()) + "\n".join(map(str, names)).encode() + b"\0"


def load_reference(source: str | Path) -> Reference:
    """Load a reference.

    Parameters
    ----------
    source
        ``"human"`` (38,244 genes, 1,033,239 cCREs, hg38), ``"mouse"`` (23,234 genes, 262,853 cCREs, mm39),
        or a folder that `build_reference` or `save_reference` made.

    Returns
    -------
    Reference
        Genes and cCREs with coordinates (0-based, half-open) and a fingerprint.

    Raises
    ------
    InputError
        If there is no such reference or the folder is not one.
    ReferenceMismatchError
        If the tables in the folder have changed since it was saved.
    """
    folder = Path(source)
    if str(source) in BUILT_IN and not (isinstance(source, Path) and folder.is_dir()):
        if (folder / "reference.json").is_file():
            logger.warning(
                "using the built-in reference %s, not the folder of that name; write ./%s for the folder",
                source,
                source,
            )
        return _load_built_in(str(source))
    if not folder.is_dir():
        raise InputError(
            f"there is no reference {str(source)!r}: wanted human, mouse, dataset, or a folder",
            hint="make a reference of your own with `cisformer build_reference --gtf GTF --peaks BED -o DIR`",
        )
    return _load_folder(folder)


def built_in_of(genome: str) -> str:
    """Return the name of the built-in reference of a genome, ``""`` where there is none."""
    return next((name for name, built_in in BUILT_IN.items() if built_in == genome), "")


@lru_cache
def _load_built_in(name: str) -> Reference:
    genes = _read_genes(io.BytesIO(_resource(f"{name}_genes.tsv.gz").read_bytes()))
    packed = np.load(io.BytesIO(_resource(f"{name}_ccres.npz").read_bytes()))
    return Reference(name, BUILT_IN[name], genes, _unpack_ccres(packed))


def _resource(name: str) -> Traversable:
    return importlib.resources.files("cisformer.resources").joinpath(name)


def _unpack_ccres(packed: np.lib.npyio.NpzFile) -> pd.DataFrame:
    """Undo `write_ccres` of scripts/build_resources.py: gaps between cCREs, and widths, as byte planes."""
    gap, width = (
        np.ascontiguousarray(packed[key].T).view(dtype).ravel().astype(np.int64)
        for key, dtype in (("gap", "<u4"), ("width", "<u2"))
    )
    counts = packed["counts"]
    end = np.cumsum(gap + width)
    first = np.cumsum(counts) - counts
    end -= np.repeat(np.where(first > 0, end[first - 1], 0), counts)
    chrom = np.repeat(packed["chroms"].astype(object), counts)
    return pd.DataFrame({"chrom": chrom, "start": end - width, "end": end})


def _read_genes(handle: IO[bytes]) -> pd.DataFrame:
    text = dict.fromkeys(("gene_id", "gene_name", "chrom", "strand"), str)
    genes = pd.read_csv(handle, sep="\t", compression="gzip", dtype=text, keep_default_na=False, na_values=[])
    return genes.astype({"start": np.int64, "end": np.int64})


def save_reference(reference: Reference, folder: str | Path) -> None:
    """Write `genes.tsv.gz`, `ccres.bed.gz` and `reference.json` into `folder`, made where it is missing.

    The same reference gives the same bytes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for table, name in ((reference.genes, "genes.tsv.gz"), (reference.ccres, "ccres.bed.gz")):
        text = table.to_csv(sep="\t", index=False, header=name == "genes.tsv.gz", lineterminator="\n")
        (folder / name).write_bytes(gzip.compress(text.encode(), 6, mtime=0))
    about = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": package_version(),
        "name": reference.name,
        "genome": reference.genome,
        "n_genes": reference.n_genes,
        "n_ccres": reference.n_ccres,
        "fingerprint": reference.fingerprint,
    }
    (folder / "reference.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _load_folder(folder: Path) -> Reference:
    try:
        about = read_json(folder / "reference.json")
        with open(folder / "genes.tsv.gz", "rb") as handle:
            genes = _read_genes(handle)
        ccres = pd.read_csv(
            folder / "ccres.bed.gz", sep="\t", names=CCRE_COLUMNS, dtype={"chrom": str}, keep_default_na=False
        )
        ccres = ccres.astype({"start": np.int64, "end": np.int64})
        reference = Reference(str(about["name"]), str(about["genome"]), genes, ccres)
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise InputError(
            f"{folder} is not a reference folder: {error}",
            hint="make one with `cisformer build_reference --gtf GTF --peaks BED -o DIR`",
        ) from error
    if reference.fingerprint != about.get("fingerprint"):
        raise ReferenceMismatchError(
            f"the tables in {folder} have changed: they are not those it was built with "
            f"(fingerprint {reference.fingerprint[:12]}, saved {str(about.get('fingerprint'))[:12]})",
            hint="build the reference again",
        )
    return reference


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
    genome = guess_genome(ccres) if genome is None else genome
    genes = gene_identity(rna_var)
    coordinates = _gene_coordinates(rna_var, genes, genome, gtf)
    genes = pd.concat([genes, coordinates], axis=1).drop_duplicates("gene_id", ignore_index=True)
    genes["chrom"] = rename_chroms(genes["chrom"], ccres["chrom"])
    require_shared_chroms(genes, ccres, str(gtf or "the genes"), "the peaks")
    unknown = genes[genes["start"] < 0]
    if len(unknown):
        logger.warning(
            "%d of %d genes have no coordinates, so they get no cis window and no links, such as %s%s",
            len(unknown), len(genes), _few(unknown["gene_name"]),
            "" if gtf else _who_has_them(genome),
        )  # fmt: skip
    return Reference("dataset", genome, genes, ccres)


def _who_has_them(genome: str) -> str:
    """Say where the coordinates of genes can be had that are missing."""
    if not genome:
        return f"; --gtf can give them, or --genome {'|'.join(GENOMES)}"
    if genome in BUILT_IN.values():
        return ""
    return f"; the built-in genes of {genome} are RefSeq's, by name: --gtf gives others, such as Ensembl's lncRNAs"


def _gene_coordinates(
    var: pd.DataFrame, genes: pd.DataFrame, genome: str, gtf: str | Path | None
) -> pd.DataFrame:
    """Return ``chrom, start, end, strand`` of each gene; see `dataset_reference` for where they come from."""
    if gtf is not None:
        return look_up_genes(genes, read_gtf(gtf))
    stated = stated_coordinates(var)
    if (stated["strand"] != "").any() or not genome:
        return _with_strands(stated, genes)
    found = look_up_genes(genes, load_annotation(genome))
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
    for species in BUILT_IN:
        known = load_reference(species).genes.set_index("gene_id")["strand"]
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


def look_up_genes(genes: pd.DataFrame, annotation: pd.DataFrame) -> pd.DataFrame:
    """Find the coordinates of `genes` in `annotation` by id, then by name (the first of that name).

    Returns
    -------
    Columns ``chrom, start, end, strand``, one row per gene; ``"", -1, -1, ""`` where neither is found.
    """
    row = np.full(len(genes), -1)
    for key in ("gene_id", "gene_name"):
        known = annotation.reset_index(drop=True).drop_duplicates(key)
        known = known[known[key] != ""]
        position = pd.Index(known[key]).get_indexer(pd.Index(genes[key]))
        row = np.where((row < 0) & (position >= 0), known.index.to_numpy()[position], row)
    found = annotation[GENE_COLUMNS[2:]].reset_index(drop=True).reindex(row).reset_index(drop=True)
    found = found.fillna({"chrom": "", "start": -1, "end": -1, "strand": ""})
    return found.astype({"start": np.int64, "end": np.int64})


@lru_cache
def load_annotation(genome: str) -> pd.DataFrame:
    """Return the genes of a genome of `GENOMES`, with coordinates: columns as `Reference.genes`.

    hg38 and mm39 are those of the built-in references (GENCODE). hg19 and mm10 are RefSeq genes by name; they get
    the Ensembl id that the built-in reference gives that name.
    """
    if genome not in GENOMES:
        raise InputError(
            f"there is no annotation of genome {genome!r}: wanted {', '.join(GENOMES)}",
            hint="give the genes of another genome with --gtf",
        )
    genes = load_reference(GENOMES[genome]).genes
    if genome in BUILT_IN.values():
        return genes
    table = _read_genes(io.BytesIO(_resource(f"{genome}_genes.tsv.gz").read_bytes()))
    ids = genes.drop_duplicates("gene_name").set_index("gene_name")["gene_id"]
    return table.assign(gene_id=ids.reindex(table["gene_name"]).fillna("").to_numpy())[GENE_COLUMNS]


def guess_genome(regions: pd.DataFrame) -> str:
    """Guess the genome of peaks: one of `GENOMES`, or ``""`` where they fit none.

    Peaks of the same genome overlap the built-in cCREs far more often than the same peaks moved by 20 kb do:
    of real hg38 data 76-96 % against 41-45 %, while of hg19 data 34 % against 32 %. Peaks that fit neither hg38 nor
    mm39 are held against the TSSs of all genomes: of real hg19 data 25 % lie within 500 bp of one against 3 % when
    moved, of mm10 data 6.6 % against 0.7 %; with a wrong genome at most 1.4 times as many as when moved.
    """
    shares = {BUILT_IN[name]: coverage(regions, load_reference(name).ccres) for name in BUILT_IN}
    genome, (share, chance) = max(shares.items(), key=lambda item: item[1][0] - item[1][1])
    if share > 0.5 and share > 1.25 * chance:
        return genome
    near = {genome: coverage(regions, _promoters(genome)) for genome in GENOMES}
    genome, (share, chance) = max(near.items(), key=lambda item: item[1][0] - item[1][1])
    n_near = share * len(regions)
    return genome if n_near >= 20 and share > 3 * chance else ""


def _promoters(genome: str) -> pd.DataFrame:
    """Return the 500 bp on both sides of each TSS of a genome."""
    genes = load_annotation(genome)
    genes = genes[genes["start"] >= 0]
    site = tss(genes)
    return pd.DataFrame(
        {"chrom": genes["chrom"].to_numpy(), "start": np.maximum(site - 500, 0), "end": site + 500}
    )


def coverage(regions: pd.DataFrame, ccres: pd.DataFrame, most: int = 20_000) -> tuple[float, float]:
    """Return the share of `regions` that overlap a cCRE, and of the same moved by 20 kb.

    Estimated from about `most` of them, evenly spaced.
    """
    sample = regions.iloc[:: max(1, len(regions) // most)].reset_index(drop=True)
    sample["chrom"] = rename_chroms(sample["chrom"], ccres["chrom"])
    if sample.empty:
        return 0.0, 0.0
    moved = sample.assign(start=sample["start"] + 20_000, end=sample["end"] + 20_000)
    share, chance = (float(overlaps_any(part, ccres).mean()) for part in (sample, moved))
    return share, chance
