"""Find the file or folder of cells that a path stands for; if it cannot be read, say why and how to convert it."""

from __future__ import annotations

import contextlib
import gzip
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from cisformer.config import Modality
from cisformer.data.features import are_row_numbers
from cisformer.data.hdf5 import damaged, told_as_damage
from cisformer.errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

_HEADINGS = {
    "x", "v1", "barcode", "barcodes", "cell", "cell_id", "id", "gene", "gene_id", "gene_ids", "feature", "features",
    "chrom", "chr", "seqnames", "peak", "#chrom",
}  # fmt: skip
"""What stands first in a line that names columns; no gene, peak or barcode is called so."""
_HDF5_SUFFIXES = (".h5ad", ".h5", ".h5mu", ".loom")
Container = Literal["hdf5", "zarr", "mtx", "fragments"]

WANTED = "an .h5ad, .h5mu, 10x .h5, .loom or .zarr, a matrix.mtx folder or fragments.tsv.gz"
"""What may be given, in words for messages."""

ARC_FILES: dict[Modality, tuple[str, ...]] = {
    "rna": (
        "filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix", "Gene/filtered", "GeneFull/filtered",
        "filtered", "cellbender_filtered.h5",
    ),
    "atac": (
        "atac_fragments.tsv.gz", "fragments.tsv.gz", "filtered_feature_bc_matrix.h5",
        "filtered_peak_bc_matrix.h5", "filtered_feature_bc_matrix", "filtered_peak_bc_matrix",
    ),
}  # fmt: skip
"""What is taken from a folder of Cell Ranger, Cell Ranger ARC, Cell Ranger ATAC or STARsolo, the best first."""

_TO_10X = (
    'library(Seurat); x <- readRDS("{path}"); '
    'DropletUtils::write10xCounts("rna", GetAssayData(x, assay = "RNA", layer = "counts"), version = "3"); '
    'DropletUtils::write10xCounts("atac", GetAssayData(x, assay = "ATAC", layer = "counts"), version = "3")'
)
_FROM_ARCHR = (
    'm <- ArchR::getMatrixFromProject(proj, "PeakMatrix"); '
    'DropletUtils::write10xCounts("atac", SummarizedExperiment::assay(m), gene.id = as.character(rowRanges(m)), '
    'gene.symbol = as.character(rowRanges(m)), version = "3"), or give the fragments.tsv.gz that ArchR was made from'
)
REFUSED = {
    ".rds": ("an R object (Seurat, Signac or ArchR)", f"in R: {_TO_10X}"),
    ".rda": ("an R workspace", "in R, for its Seurat object x: " + _TO_10X.split("; ", 2)[2]),
    ".rdata": ("an R workspace", "in R, for its Seurat object x: " + _TO_10X.split("; ", 2)[2]),
    ".h5seurat": ("a SeuratDisk file", 'in R: SeuratDisk::Convert("{path}", dest = "h5ad")'),
    ".arrow": ("an ArchR Arrow file", f"in R: {_FROM_ARCHR}"),
    ".csv": (
        "a table in text",
        'in Python: import scanpy as sc; sc.read_csv("{path}").write_h5ad("rna.h5ad"), with .T before .write_h5ad '
        "where genes are rows",
    ),
    ".tsv": (
        "a table in text",
        'in Python: import scanpy as sc; sc.read_text("{path}").write_h5ad("rna.h5ad"), with .T before .write_h5ad '
        "where genes are rows",
    ),
    ".txt": (
        "a table in text",
        'in Python: import scanpy as sc; sc.read_text("{path}").write_h5ad("rna.h5ad"), with .T before .write_h5ad '
        "where genes are rows",
    ),
    ".bw": ("a bigWig track", "give the cells x peaks matrix, or fragments.tsv.gz"),
    ".bam": (
        "aligned reads",
        'in Python: import snapatac2; snapatac2.pp.make_fragment_file("{path}", "fragments.tsv.gz")',
    ),
}  # fmt: skip
"""Kinds of files that are not read: what they are, and what converts them."""


@contextlib.contextmanager
def locate(
    path: str | Path, modality: Modality, *, fragments: bool = False
) -> Iterator[tuple[Path, Container]]:
    """Yield the file or folder to read for a path, and its kind.

    A folder of Cell Ranger, STARsolo or GEO stands for the matrix in it, or with `fragments` for those. A gzipped
    h5ad or h5 is unpacked into a temporary file that lasts as long as the context.

    Raises
    ------
    InputError
        If there is nothing at `path`, or something that is not read; with the lines that convert it.
    """
    import h5py

    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; wanted {WANTED}", hint="check the path")
    if path.is_dir():
        path = _in_folder(path, modality, fragments)
    if path.is_dir():
        yield path, "zarr" if _is_zarr(path) else "mtx"
        return
    start = _first_bytes(path)
    if h5py.is_hdf5(path):
        _refuse_kind(path, {".h5seurat", ".arrow"})
        yield path, "hdf5"
    elif path.name.removesuffix(".gz").endswith(".mtx"):
        yield path, "mtx"
    elif start.startswith(b"\x1f\x8b") and path.name.removesuffix(".gz").endswith(_HDF5_SUFFIXES):
        logger.info("%s: unpacked into a temporary file; gunzip it to save this step", path)
        with tempfile.NamedTemporaryFile(suffix=".h5") as unpacked:
            _unpack(path, unpacked.name)
            yield Path(unpacked.name), "hdf5"
    elif _is_fragments(path, start):
        yield path, "fragments"
    else:
        _refuse_content(path, start)
        _refuse_kind(path, set(REFUSED))
        raise InputError(
            f"{path} is not an HDF5 file; wanted {WANTED}",
            hint="convert it, for instance scanpy.read(…).write_h5ad(…)",
        )


def is_fragments_file(path: Path) -> bool:
    """Tell whether there is a file of fragments at `path`."""
    import h5py

    return path.is_file() and not h5py.is_hdf5(path) and _is_fragments(path, _first_bytes(path))


def is_cells_folder(folder: Path) -> bool:
    """Return whether `folder` holds cells: a matrix in text form, a zarr store, or the output of a pipeline."""
    if not folder.is_dir():
        return False
    named = {name for names in ARC_FILES.values() for name in names}
    return _is_zarr(folder) or bool(_matrices(folder)) or any((folder / name).exists() for name in named)


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as handle:
            return handle.read(8)
    except PermissionError as error:
        raise InputError(f"you may not read {path}", hint="ask its owner, or chmod u+r it") from error
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", hint="check the path and the disk"
        ) from error


def _unpack(path: Path, target: str) -> None:
    try:
        with gzip.open(path, "rb") as packed, open(target, "wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, gzip.BadGzipFile) as error:
        raise damaged(str(path), error) from error


def _refuse_kind(path: Path, suffixes: set[str]) -> None:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix in suffixes and suffix in REFUSED:
        what, how = REFUSED[suffix]
        raise InputError(f"{path} is {what}; wanted {WANTED}", hint=how.replace("{path}", str(path)))


def _refuse_content(path: Path, start: bytes) -> None:
    """Raise `InputError` if the first bytes show another kind of file: a web page, an archive, an index."""
    fields: list[str] = []
    if path.name.removesuffix(".gz").endswith((".tsv", ".bed")) and "fragments" in path.name:
        from cisformer.data.fragments import first_fields

        fields = first_fields(path, start)
    found = {
        "empty": (not start, "download or make it again"),
        "a web page, as a download that failed leaves": (start.lstrip().startswith(b"<"), "download it again"),
        "a Git LFS pointer, not the file": (start.startswith(b"version "), "git lfs pull"),
        "an archive of several files": (
            start.startswith(b"PK\x03\x04") or path.name.endswith((".tar", ".tar.gz", ".tgz")),
            "unpack it, and give what is in it",
        ),
        "an index of another file": (
            path.suffix in (".tbi", ".csi", ".bai"), f"give {path.name.removesuffix(path.suffix)}"
        ),
        f"not a fragments file: its first line is {' '.join(fields)[:80]!r}": (
            bool(fields), "wanted chromosome, start, end, barcode and count in 4 to 6 columns, separated by tabs"
        ),
    }  # fmt: skip
    for what, (is_it, hint) in found.items():
        if is_it:
            raise InputError(f"{path} is {what}; wanted {WANTED}", hint=hint)


def _is_zarr(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup", ".zmetadata"))


def _is_fragments(path: Path, start: bytes) -> bool:
    """Tell whether a text file holds fragments: a region, a barcode, and perhaps a count."""
    from cisformer.data.fragments import first_fields

    fields = first_fields(path, start)
    return (
        len(fields) in (4, 5, 6) and fields[1].isdigit() and fields[2].isdigit() and not fields[3].isdigit()
    )


def _in_folder(folder: Path, modality: Modality, fragments: bool) -> Path:
    """Return what to read of a folder."""
    matrices = _matrices(folder)
    if _is_zarr(folder) or len(matrices) == 1:
        return folder if _is_zarr(folder) else matrices[0]
    if matrices:
        raise InputError(
            f"{folder} holds {len(matrices)} matrices: {', '.join(path.name for path in matrices[:3])}",
            hint=f"give one of them, such as {matrices[0]}",
        )
    for base in (folder, folder / "outs"):
        for name in ARC_FILES[modality]:
            inside = base / name
            if inside.exists() and (fragments or "fragments" not in name):
                logger.info("%s: reading %s", folder, inside.relative_to(folder))
                return _in_folder(inside, modality, fragments) if inside.is_dir() else inside
    if (folder / "Save-ArchR-Project.rds").exists() or (folder / "ArrowFiles").is_dir():
        raise InputError(
            f"{folder} is an ArchR project; wanted {WANTED}",
            hint=f'in R: proj <- ArchR::loadArchRProject("{folder}"); {_FROM_ARCHR}',
        )
    files = sorted(path.name for path in folder.iterdir() if path.name.endswith((*_HDF5_SUFFIXES, ".zarr")))
    raise InputError(
        f"{folder} is a folder without matrix.mtx, .h5, .zarr or fragments of a known name; wanted {WANTED}",
        hint=f"give the file in it: {', '.join(files[:3])}" if files else "give the file in it",
    )


def _matrices(folder: Path) -> list[Path]:
    """Return the matrices of a folder; of a plain and a gzipped one of a name, the plain."""
    found = sorted(path for path in folder.glob("*matrix.mtx*") if path.name.endswith((".mtx", ".mtx.gz")))
    return [path for path in found if path.suffix != ".gz" or path.with_suffix("") not in found]


def read_mtx(matrix: Path) -> AnnData:
    """Load a matrix in text form with the tables beside it, all features, whole.

    Parameters
    ----------
    matrix
        ``matrix.mtx`` or ``PREFIXmatrix.mtx``, plain or gzipped; ``PREFIXbarcodes.tsv`` and one of
        ``PREFIXfeatures.tsv``, ``PREFIXgenes.tsv`` and ``PREFIXpeaks.bed`` stand beside it.

    Raises
    ------
    InputError
        If a table is missing or does not fit the matrix.
    """
    import anndata
    import scipy.io
    import scipy.sparse as sp

    prefix = matrix.name.removesuffix(".gz").removesuffix("matrix.mtx")
    if prefix == matrix.name.removesuffix(".gz"):
        prefix = matrix.name.removesuffix(".gz").removesuffix(".mtx") + "_"
    logger.info("%s: a matrix in text form, which is loaded whole", matrix)
    barcodes = _table_beside(matrix, prefix, ("barcodes.tsv", "barcodes.txt", "cells.tsv"))
    features = _table_beside(matrix, prefix, ("features.tsv", "genes.tsv", "peaks.bed", "features.txt"))
    with told_as_damage(str(matrix)):
        stored = scipy.io.mmread(matrix)
    turned = stored.shape == (len(barcodes), len(features)) != (len(features), len(barcodes))
    cells = sp.csr_matrix(stored if turned else stored.T)
    if cells.shape != (len(barcodes), len(features)):
        raise InputError(
            f"{matrix} is of {stored.shape[0]:,} x {stored.shape[1]:,}, but there are {len(features):,} features and "
            f"{len(barcodes):,} barcodes in the files next to it",
            hint="give the three files of one sample",
        )
    return anndata.AnnData(cells, pd.DataFrame(index=pd.Index(barcodes[0])), _features(features))


def _features(table: pd.DataFrame) -> pd.DataFrame:
    """Return `var` of features.tsv (id, name, type), genes.tsv (id, name) or peaks.bed (chrom, start, end)."""
    numeric = len(table.columns) >= 3 and table[1].str.isdigit().all() and table[2].str.isdigit().all()
    if numeric:
        return pd.DataFrame(index=pd.Index(table[0] + ":" + table[1] + "-" + table[2]))
    if len(table.columns) == 1:
        return pd.DataFrame(index=pd.Index(table[0]))
    var = pd.DataFrame({"gene_ids": table[0].to_numpy()}, index=pd.Index(table[1]))
    if len(table.columns) >= 3 and (table[2] != "").any():
        var["feature_types"] = table[2].to_numpy()
    if len(table.columns) >= 6:
        var["interval"] = (table[3] + ":" + table[4] + "-" + table[5]).to_numpy()
    return var


def _table_beside(matrix: Path, prefix: str, names: tuple[str, ...]) -> pd.DataFrame:
    """Read a table beside a matrix as text, whatever stands in it."""
    tried = [matrix.with_name(prefix + name + packed) for name in names for packed in ("", ".gz")]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise InputError(
            f"{matrix}: there is no {prefix}{names[0]} in the same folder",
            hint=f"put {prefix}barcodes.tsv and {prefix}features.tsv into the same folder",
        )
    opener = gzip.open if path.suffix == ".gz" else open
    with told_as_damage(str(path)), opener(path, "rt", encoding="utf-8-sig") as handle:
        lines = [line.rstrip("\r\n") for line in handle]
    lines = [line for line in lines if line.strip()]
    mark = None if lines and "\t" not in lines[-1] and ".bed" in path.suffixes else "\t"
    rows = [[field.strip('"') for field in line.split(mark)] for line in lines]
    if rows and _is_heading(rows[0], rows[-1]):
        logger.info("%s: the first line names its columns: %s", path, " ".join(rows[0]))
        rows = rows[1:]
    table = pd.DataFrame(rows, dtype=object).fillna("")
    numbered = len(table.columns) > 1 and are_row_numbers(pd.Index(table[0]))
    return table.drop(columns=0).set_axis(range(len(table.columns) - 1), axis=1) if numbered else table


def _is_heading(first: list[str], last: list[str]) -> bool:
    """Tell whether the first line of a table holds names of columns, by their number or what is known of them."""
    return len(first) < len(last) or first[0].lower() in _HEADINGS
