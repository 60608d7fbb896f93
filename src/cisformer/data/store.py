"""Preprocessed cells on disk: a folder per split, with `.pt` shards of CSR tensors, and how they are read.

A split folder holds

- ``<direction>_0.pt``, ``<direction>_1.pt``, …: whole cells, both modalities, nothing sampled:
  ``rna_indptr, rna_indices, rna_values`` (counts), ``atac_indptr, atac_indices, atac_values`` (1);
- ``barcodes.txt``, one per cell; ``cell_info.tsv`` with what the input said of them (not for shuffled cells);
- ``reference/``, where the reference is not a built-in one;
- ``manifest.json``: format, sizes, reference fingerprint, checksums of the files, where it all came from.

A folder may come from anyone: sizes and names in its files are checked before use, and no code in them is run.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.config import Direction
from cisformer.data.manifest import BARCODES, CELL_INFO, MANIFEST, new_manifest, read_manifest
from cisformer.data.reference import Reference, load_reference, save_reference
from cisformer.data.shards import UnsortedCells, write_shard
from cisformer.errors import ReferenceMismatchError, StoreError, brief
from cisformer.runtime.ahead import ahead
from cisformer.runtime.files import read_json, sha256_file

SplitName = Literal["train", "val", "test", "all"]
PARTS: tuple[SplitName, ...] = ("train", "val", "test")
"""Splits that `data_preprocess` writes together."""
Modality = Literal["rna", "atac"]


class CellStore:
    """Preprocessed cells, memory-mapped.

    Opened with `CellStore.open`. Rows of the shards opened are numbered through, 0 to `n_cells` - 1. May be
    sent to other processes, which map the files anew.

    Parameters
    ----------
    folder
        A split folder.
    manifest
        The content of its ``manifest.json``.
    shards
        Which of the manifest's shards to read.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shards: slice = slice(None)) -> None:
        self.path = folder
        self.manifest = manifest
        self._slice = shards
        self._about = manifest["shards"][shards]
        sizes = [shard["n_cells"] for shard in manifest["shards"]]
        first = sum(sizes[: shards.start or 0])
        self._offsets = np.concatenate([[0], np.cumsum(sizes[shards])]).astype(np.int64)
        self._rows = slice(first, first + int(self._offsets[-1]))
        self._shards = [_open_shard(folder / shard["file"], shard) for shard in self._about]

    @classmethod
    def open(cls, path: str | Path) -> CellStore:
        """Open a split folder, its manifest, or one ``.pt`` shard in it.

        Raises
        ------
        StoreError
            If `path` is none of them, or a file is missing, cut short, or of a later format.
        """
        path = Path(path)
        folder = path if path.is_dir() else path.parent
        manifest = read_manifest(path, folder)
        if path.suffix != ".pt":
            return cls(folder, manifest)
        names = [shard["file"] for shard in manifest["shards"]]
        if path.name not in names:
            raise StoreError(
                f"{path} is not among the shards of {folder / MANIFEST}: {', '.join(names[:3])}",
                hint="give the folder, or one of its shards",
            )
        number = names.index(path.name)
        return cls(folder, manifest, slice(number, number + 1))

    def __reduce__(self) -> tuple[Any, ...]:
        return CellStore, (self.path, self.manifest, self._slice)

    def __repr__(self) -> str:
        return f"CellStore({str(self.path)!r}, n_cells={self.n_cells:,})"

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self._offsets[-1])

    @property
    def direction(self) -> Direction:
        """The direction that the cells were preprocessed for; shards of both directions are alike."""
        return self.manifest["direction"]

    @cached_property
    def reference(self) -> Reference:
        """The genes and cCREs that the cells are counted in.

        Raises
        ------
        ReferenceMismatchError
            If it is no longer the one that the cells were aligned to.
        """
        about = self.manifest["reference"]
        reference = load_reference(about["name"] if about["built_in"] else self.path / "reference")
        if reference.fingerprint != about["fingerprint"]:
            raise ReferenceMismatchError(
                f"{self.path} was aligned to another {about['name']} reference "
                f"({about['fingerprint'][:12]}) than the present one ({reference.fingerprint[:12]})",
                hint="preprocess the data again",
            )
        return reference

    @cached_property
    def barcodes(self) -> NDArray[np.object_]:
        """Barcode of each cell, as str."""
        path = self.path / BARCODES
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, UnicodeDecodeError) as error:
            raise _damaged(path, str(error)) from error
        self._check_length(path, len(lines))
        return np.array(lines[self._rows], dtype=object)

    def _check_length(self, path: Path, n_found: int) -> None:
        if n_found != self.manifest["n_cells"]:
            raise _damaged(path, f"it has {n_found:,} cells, the manifest {self.manifest['n_cells']:,}")

    @cached_property
    def cell_info(self) -> pd.DataFrame:
        """What the input's `obs` said, columns suffixed ``_rna`` and ``_atac``; none for shuffled cells.

        What was text or a category is text, also where it looks like a number.
        """
        path = self.path / CELL_INFO
        if not path.exists():
            return pd.DataFrame(index=pd.Index(self.barcodes, name="barcode"))
        text = {0: str} | dict.fromkeys(self.manifest.get("text_columns", []), str)
        try:
            table = pd.read_csv(
                path, sep="\t", index_col=0, dtype=text, keep_default_na=False, na_values=[""]
            )
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        self._check_length(path, len(table))
        return table.iloc[self._rows]

    def rna(self, rows: NDArray[np.int64]) -> sp.csr_matrix:
        """Return the counts of cells, float32 [len(rows), n_genes]; rows in any order, repeats allowed."""
        return self._read(np.asarray(rows, np.int64), "rna", self.manifest["reference"]["n_genes"])

    def atac(self, rows: NDArray[np.int64]) -> sp.csr_matrix:
        """Return the open cCREs of cells, float32 ones [len(rows), n_ccres]; rows as for `rna`."""
        return self._read(np.asarray(rows, np.int64), "atac", self.manifest["reference"]["n_ccres"])

    def _read(self, rows: NDArray[np.int64], modality: Modality, n_features: int) -> sp.csr_matrix:
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.n_cells:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a store of {self.n_cells} cells")
        shard_of = np.searchsorted(self._offsets, rows, side="right") - 1
        used = np.unique(shard_of)
        parts = [
            self._shards[shard].rows(rows[shard_of == shard] - self._offsets[shard], modality, n_features)
            for shard in used
        ]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return sp.csr_matrix((0, n_features), dtype=np.float32)
        gathered = np.argsort(shard_of, kind="stable")
        return sp.csr_matrix(sp.vstack(parts, format="csr")[np.argsort(gathered, kind="stable")])

    def verify(self) -> None:
        """Compare every file with its checksum; reads all of it, about 1 GB a second.

        Raises
        ------
        StoreError
            Naming the first file that differs or is missing.
        """
        checksums = {shard["file"]: shard["sha256"] for shard in self._about} | self.manifest.get("files", {})
        for name, sha256 in checksums.items():
            path = self.path / name
            if not path.is_file():
                raise _missing(path)
            if sha256_file(path) != sha256:
                raise _damaged(path, "its checksum differs from the manifest's")


@dataclass(frozen=True, eq=False)
class _Shard:
    """One memory-mapped `.pt` file."""

    path: Path
    arrays: dict[str, NDArray]

    def rows(self, rows: NDArray[np.int64], modality: Modality, n_features: int) -> sp.csr_matrix:
        indptr, indices = self.arrays[f"{modality}_indptr"], self.arrays[f"{modality}_indices"]
        start, end = indptr[rows], indptr[rows + 1]
        spans = [slice(low, high) for low, high in zip(start.tolist(), end.tolist(), strict=True)]
        index = np.concatenate([indices[span] for span in spans]) if spans else indices[:0]
        if len(index) and not 0 <= index.min() <= index.max() < n_features:
            raise _damaged(self.path, f"it holds features outside 0 to {n_features - 1}")
        if modality == "atac":
            value = np.ones(len(index), np.float32)
        else:
            values = self.arrays["rna_values"]
            value = np.concatenate([values[span] for span in spans]) if spans else values[:0]
        pointer = np.concatenate([[0], np.cumsum(end - start)])
        return sp.csr_matrix((value.astype(np.float32, copy=False), index, pointer), (len(rows), n_features))


def _open_shard(path: Path, about: dict[str, Any]) -> _Shard:
    import torch  # not above: bad input is told before a second of importing

    if not path.is_file():
        raise _missing(path)
    if path.stat().st_size != about["bytes"]:
        raise _damaged(path, f"it has {path.stat().st_size:,} bytes, the manifest says {about['bytes']:,}")
    try:
        # torch takes the name of a file in UTF-8, whatever the locale has it in.
        named = os.fsencode(path) == str(path).encode("utf-8", "replace")
        with contextlib.nullcontext(path) if named else open(path, "rb") as file:
            tensors = torch.load(file, mmap=named, weights_only=True)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    except UnpicklingError as error:
        raise StoreError(
            f"{path} is damaged, or holds more than tensors",
            hint="it is not loaded, because it may run code; restore it, or preprocess the data again",
        ) from error
    except Exception as error:  # damaged archives raise whatever torch, zipfile or pickle come upon
        raise _damaged(path, f"torch cannot load it ({type(error).__name__})") from error
    _check_arrays(path, arrays, about)
    return _Shard(path, arrays)


_KINDS = {
    **{f"{modality}_{part}": "i" for modality in ("rna", "atac") for part in ("indptr", "indices", "values")},
    "atac_values": "u",
}
"""Tensors of a shard, and the kind of their numbers."""


def _check_arrays(path: Path, arrays: dict[str, NDArray], about: dict[str, Any]) -> None:
    """Raise `StoreError` unless the arrays are the CSR matrices that the manifest speaks of, within the file."""
    if {name: array.dtype.kind for name, array in arrays.items()} != _KINDS:
        raise _damaged(path, f"it holds {brief(sorted(arrays))}, wanted {', '.join(_KINDS)}, whole numbers")
    for modality in ("rna", "atac"):
        indptr, indices = arrays[f"{modality}_indptr"], arrays[f"{modality}_indices"]
        sizes = {"indptr": about["n_cells"] + 1, "indices": about[f"{modality}_nnz"]}
        sizes["values"] = sizes["indices"]
        for part, size in sizes.items():
            array = arrays[f"{modality}_{part}"]
            # A tensor may repeat one number for ever (stride 0); only the ones of ATAC, never read, do so.
            never_read = (modality, part) == ("atac", "values")
            if array.shape != (size,) or not (never_read or array.nbytes <= about["bytes"]):
                raise _damaged(path, f"{modality}_{part} has shape {array.shape}, wanted {size:,}")
        if indptr[0] != 0 or indptr[-1] != len(indices) or (indptr[1:] < indptr[:-1]).any():
            raise _damaged(path, f"{modality}_indptr does not lead through {len(indices):,} entries")


def _missing(path: Path) -> StoreError:
    return StoreError(f"{path} is missing", hint="restore it, or preprocess the data again")


def _damaged(path: Path, what: str) -> StoreError:
    return StoreError(f"{path} is damaged: {what}", hint="restore the file, or preprocess the data again")


def find_split(path: str | Path, split: SplitName, direction: Direction | None = None) -> Path | None:
    """Find the folder of a split.

    Parameters
    ----------
    path
        What was given to ``data_preprocess --save_dir``, or any split folder or shard in it.
    split
        The split wanted.
    direction
        Which direction's, where both were preprocessed. The cells are the same.

    Returns
    -------
    The folder, or `None` if there is none.

    Raises
    ------
    StoreError
        If the splits there were not written together; see `require_one_run`.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    base = folder.parent if (folder / MANIFEST).exists() else folder
    own = folder.name.rpartition("_")[0]
    for name in (direction, own, "rna2atac", "atac2rna"):
        if name and any((base / f"{name}_{part}" / MANIFEST).exists() for part in (*PARTS, "all")):
            found = base / f"{name}_{split}"
            break
    else:
        return None
    if not (found / MANIFEST).exists():
        return None
    require_one_run(found)
    return found


def require_one_run(folder: Path) -> None:
    """Raise `StoreError` where a split and those beside it were not written together.

    A kill between the renames of ``data_preprocess --force`` leaves splits of two runs, which may share cells.
    Nothing is known of splits whose manifest names no run (of early versions) or another split (renamed by hand).
    """
    folder, runs = folder.absolute(), {}  # absolute: "." has no name
    for split in PARTS:
        beside = folder.with_name(f"{folder.name.rpartition('_')[0]}_{split}")
        with contextlib.suppress(OSError, ValueError):  # missing or damaged: opening it says so
            manifest = read_json(beside / MANIFEST)
            if manifest.get("split") == split and "run" in manifest:
                runs[beside.name] = manifest["run"]
    own = runs.get(folder.name)
    other = next((name for name, run in runs.items() if run != own), None)
    if own is not None and other is not None:
        raise StoreError(
            f"{folder.name} and {other} in {folder.parent} come from different runs of data_preprocess",
            hint="run it again, with --force",
        )


@dataclass(frozen=True, eq=False)
class Split:
    """Cells that go to the empty `folder` of a split, `cnt` a shard, or all in one; `about` goes into its manifest."""

    folder: Path
    cells: UnsortedCells
    about: dict[str, Any]
    cnt: int | None = None

    @property
    def shards(self) -> list[slice]:
        """Cells of each shard."""
        n_cells = len(self.cells.obs)
        step = self.cnt or max(n_cells, 1)
        return [slice(start, start + step) for start in range(0, n_cells, step)]


def write_splits(splits: list[Split], reference: Reference, direction: Direction, n_threads: int = 0) -> None:
    """Fill the folders of splits, shard by shard, in so many threads.

    Shuffled cells (`about["shuffle"]`) are not pairs any more: no annotation is written of them.
    """
    jobs = [
        (split.cells, rows, split.folder / f"{direction}_{number}.pt")
        for split in splits
        for number, rows in enumerate(split.shards)
    ]
    written = ahead(lambda job: _write_shard(*job), jobs, n_threads)
    for split in splits:
        _describe_split(split, [next(written) for _ in split.shards], reference, direction)


def _write_shard(cells: UnsortedCells, rows: slice, path: Path) -> dict[str, Any]:
    """Write a shard; return what the manifest says of it."""
    sizes = write_shard(path, cells.rna, cells.atac, cells.rna_rows[rows], cells.atac_rows[rows])
    return {"file": path.name, **sizes, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _describe_split(
    split: Split, shards: list[dict[str, Any]], reference: Reference, direction: Direction
) -> None:
    """Write barcodes, annotation, reference and manifest beside the shards."""
    folder, obs = split.folder, split.cells.obs
    (folder / BARCODES).write_bytes("".join(f"{barcode}\n" for barcode in obs.index).encode())
    if not split.about["shuffle"]:
        obs.to_csv(folder / CELL_INFO, sep="\t", index_label="barcode")
    if not reference.is_built_in:
        save_reference(reference, folder / "reference")
    tables = {name: sha256_file(folder / name) for name in (BARCODES, CELL_INFO) if (folder / name).is_file()}
    numbers = obs.select_dtypes(["number", "bool", "boolean"]).columns
    text = {"text_columns": [name for name in obs.columns if name not in numbers]}
    manifest = new_manifest(direction, reference, shards, tables) | text | split.about
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
