"""Links as they lie on disk, read one cell type at a time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cisformer.data.genome import parse_regions
from cisformer.data.known_genomes import guess_genome
from cisformer.errors import InputError
from cisformer.links.files import COMPONENTS, FOLDER, FORMAT
from cisformer.links.files import FORMAT_VERSION as NEWEST
from cisformer.links.formats import OWN_COLUMNS, TABLE, read_any_table

if TYPE_CHECKING:
    import h5py

logger = logging.getLogger(__name__)
MATRICES = "*_correlation_matrix.h5ad"
NEEDED = tuple(name for name in OWN_COLUMNS if name != "fdr")
"""Columns that a table of links cannot do without."""
WHOLE_GENOME = 10_000
"""Genes that at least a whole human or mouse annotation has."""


@dataclass(frozen=True)
class StoredLinks:
    """Links of a folder or a table.

    Attributes
    ----------
    source
        The folder or file.
    genome
        Such as ``"hg38"``; ``""`` where unknown.
    genes
        Columns gene_id, gene_name, chrom, start, end, strand; of a table, genes are as long as their TSS.
    ccres
        Columns chrom, start, end: of a folder all of the reference, of a table those that it names.
    n_cells
        Cell type → number of cells, 0 where unknown; sorted by name.
    parts
        Cell type → where its links are: a matrix file, or rows of a table.
    """

    source: str
    genome: str
    genes: pd.DataFrame
    ccres: pd.DataFrame
    n_cells: dict[str, int]
    parts: Mapping[str, Path | pd.DataFrame]

    @property
    def cell_types(self) -> list[str]:
        """Names of the cell types."""
        return list(self.n_cells)

    def of_type(self, cell_type: str, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the links of one cell type.

        Parameters
        ----------
        cell_type
            One of `cell_types`.
        columns
            What of `COMPONENTS` to read beside; NaN where these links have no such column.

        Returns
        -------
        Columns gene and ccre (rows of `genes` and `ccres`), distance in bp, score, and `columns`; one row per link.
        """
        part = self.parts[cell_type]
        if isinstance(part, pd.DataFrame):
            return part.reindex(columns=["gene", "ccre", "distance", "score", *columns]).reset_index(
                drop=True
            )
        import h5py

        with h5py.File(part, "r") as file:
            return _links_of(file, columns)


def _links_of(file: h5py.File, columns: Sequence[str]) -> pd.DataFrame:
    indptr = file["X/indptr"][:]
    table = {
        "gene": np.repeat(np.arange(len(indptr) - 1), np.diff(indptr)),
        "ccre": file["X/indices"][:].astype(np.int64),
        "distance": file["layers/distance/data"][:].astype(np.int64),
        "score": file["X/data"][:],
    }
    for name in columns:
        known = name in file["layers"]
        table[name] = file[f"layers/{name}/data"][:] if known else np.full(len(table["gene"]), np.nan)
    return pd.DataFrame(table)


def open_links(links: str | Path) -> StoredLinks:
    """Open what `cisformer atac2rna_link` wrote.

    Parameters
    ----------
    links
        The `cisformer_link` folder, the folder above it, or a `links.tsv.gz`. A table beside its matrices stands
        for the folder; a table alone, such as `export_links` writes, knows no cCREs but its own.

    Raises
    ------
    InputError
        If there are no links, or they are damaged or of a later version.
    """
    path = Path(links)
    if path.is_file() and path.name != TABLE:
        return _open_table(path)
    folder = path.parent if path.is_file() else path
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    files = sorted(folder.glob(MATRICES))
    if files:
        return _open_folder(folder, files)
    if (folder / TABLE).is_file():
        return _open_table(folder / TABLE)
    raise InputError(f"{path} holds no links", hint="give the folder that cisformer atac2rna_link wrote")


def _open_folder(folder: Path, files: Sequence[Path]) -> StoredLinks:
    import h5py
    from anndata.io import read_elem

    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for path in files:
        try:
            with h5py.File(path, "r") as file:
                record = read_elem(file["uns/cisformer"])
                _check(path, record, found)
                found[str(record["cell_type"])] = path, record
                if len(found) == 1:
                    genes = read_elem(file["obs"]).reset_index(drop=True)
                    names = file["var"].attrs["_index"]
                    ccres = parse_regions(file["var"][names].asstr()[:])
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{path} is not a matrix of links: {error}", hint="run cisformer atac2rna_link again"
            ) from None
    record = next(iter(found.values()))[1]
    genome = str(record["genome"]) if "genome" in record else guess_genome(ccres)
    names = sorted(found)
    n_cells = {name: int(found[name][1]["n_cells"]) for name in names}
    return StoredLinks(
        str(folder), genome, _plain(genes), ccres, n_cells, {name: found[name][0] for name in names}
    )


def _check(path: Path, record: Mapping[str, Any], found: Mapping[str, tuple[Path, dict[str, Any]]]) -> None:
    """Raise `InputError` if a matrix is of a later version, or not made together with those before it."""
    if record["format"] != FORMAT or int(record["format_version"]) > NEWEST:
        raise InputError(
            f"{path} has format {record['format']} {record['format_version']}, wanted {FORMAT} up to {NEWEST}",
            hint="update cisformer, or link again",
        )
    for other, earlier in found.values():
        same = ("reference_fingerprint", "window_bp")
        if any(str(record[key]) != str(earlier[key]) for key in same) or str(record["cell_type"]) in found:
            raise InputError(
                f"{path.name} and {other.name} are of two runs of atac2rna_link",
                hint="use a separate folder for each run",
            )


def _plain(genes: pd.DataFrame) -> pd.DataFrame:
    """Return genes with text as plain objects, whatever the reader made of them."""
    texts = dict.fromkeys(("gene_id", "gene_name", "chrom", "strand"), object)
    return genes.astype(texts).astype({"start": np.int64, "end": np.int64})


def _open_table(path: Path) -> StoredLinks:
    table = read_any_table(path)
    missing = [name for name in NEEDED if name not in table]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]}", hint="give the links.tsv.gz that atac2rna_link wrote"
        )
    if table.empty:
        raise InputError(f"{path} holds no links", hint="filter less, or link again")
    table = table.astype({"strand": str})
    ccre, names = pd.factorize(table["ccre"])
    ccres = parse_regions(names)
    gene, _ = pd.factorize(table["gene_id"])
    first = ~pd.Series(gene).duplicated().to_numpy()
    genes = table.loc[first, ["gene_id", "gene_name"]].reset_index(drop=True).astype(object)
    site = table.loc[first, "tss"].to_numpy(np.int64)
    strand = table.loc[first, "strand"].to_numpy(object)
    genes = genes.assign(
        chrom=ccres["chrom"].to_numpy(object)[ccre[first]], start=site, end=site + 1, strand=strand
    )
    columns = ["distance", "score", *(name for name in COMPONENTS if name in table)]
    rows = table[columns].apply(pd.to_numeric, errors="coerce").assign(gene=gene, ccre=ccre)
    parts = {str(name): part for name, part in rows.groupby(table["cell_type"], sort=True)}
    return StoredLinks(str(path), guess_genome(ccres), genes, ccres, dict.fromkeys(parts, 0), parts)


def check_min_score(min_score: float) -> None:
    """Raise `InputError` unless scores of links can be that high."""
    if not 0 <= min_score <= 1:
        raise InputError(
            f"the smallest score of a link is {min_score:g}", hint="give a score between 0 and 1, such as 0.5"
        )


def warn_few_genes(stored: StoredLinks, hint: str = "") -> None:
    """Warn where the nearest gene is sought among a part of the genome's genes only."""
    number = int((stored.genes["end"] > 0).sum())
    if stored.genome and number < WHOLE_GENOME:
        logger.warning(
            "%s has %s genes of %s: the nearest gene is the nearest of these%s", stored.source, f"{number:,}",
            stored.genome, hint,
        )  # fmt: skip
