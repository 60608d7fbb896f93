"""The genes and cCREs that data sets and models are counted in: built in, or read from a folder and written to it."""

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

from cisformer.data.genome import (
    CCRE_COLUMNS,
    GENE_COLUMNS,
    region_names,
)
from cisformer.errors import InputError, ReferenceMismatchError
from cisformer.runtime.files import read_json
from cisformer.runtime.provenance import package_version

logger = logging.getLogger(__name__)

BUILT_IN = {"human": "hg38", "mouse": "mm39"}
"""Built-in references, and the genome of each."""
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
    genes = read_genes(io.BytesIO(resource(f"{name}_genes.tsv.gz").read_bytes()))
    packed = np.load(io.BytesIO(resource(f"{name}_ccres.npz").read_bytes()))
    return Reference(name, BUILT_IN[name], genes, _unpack_ccres(packed))


def resource(name: str) -> Traversable:
    """Return a file that comes with the package."""
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


def read_genes(handle: IO[bytes]) -> pd.DataFrame:
    """Read a gzipped table of genes: columns as `Reference.genes`, or those of them that the file has."""
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
            genes = read_genes(handle)
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
