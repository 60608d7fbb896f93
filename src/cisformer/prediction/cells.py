"""The cells to predict from: one modality of a file, an AnnData or a preprocessed store, read on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.config import Modality
from cisformer.data.alignment import FeatureMap, accept_map, map_genes, map_peaks
from cisformer.data.batches import normalise, read_modality
from cisformer.data.containers import is_cells_folder
from cisformer.data.fragments import MIN_FRAGMENTS, FragmentOptions
from cisformer.data.reference import Reference
from cisformer.data.sources import Source, open_rows
from cisformer.data.store import CellStore
from cisformer.model.checkpoint import check_reference

if TYPE_CHECKING:
    from anndata import AnnData

READ_CELLS = 256


@dataclass(frozen=True, eq=False)
class StoreRows:
    """Some cells of a preprocessed store: row numbers of it, in order."""

    store: CellStore
    rows: np.ndarray

    @classmethod
    def of(cls, store: CellStore) -> StoreRows:
        """Return all cells of a store."""
        return cls(store, np.arange(store.n_cells))

    @property
    def info(self) -> pd.DataFrame:
        """Annotation of the cells, indexed by barcode."""
        return self.store.cell_info.iloc[self.rows]

    def read(self, part: np.ndarray, modality: Modality) -> sp.csr_matrix:
        """Return normalised cells, positions in `rows`, [len(part), whole reference]."""
        return read_modality(self.store, self.rows[part], modality=modality)


@dataclass(frozen=True)
class InputCells:
    """Cells of one modality, read on demand.

    Attributes
    ----------
    obs
        Annotation of the cells, indexed by barcode.
    read
        A run of rows (int64) → normalised cells [len(rows), whole reference], CSR.
    source
        Where they come from, for records.
    check
        Raises where the file changed since it was opened.
    """

    obs: pd.DataFrame
    read: Callable[[np.ndarray], sp.csr_matrix]
    source: str
    check: Callable[[], None] = lambda: None

    @classmethod
    @contextmanager
    def open(
        cls,
        data: AnnData | StoreRows | str | Path,
        modality: Modality,
        reference: Reference,
        min_fragments: int = MIN_FRAGMENTS,
    ) -> Iterator[InputCells]:
        """Open an AnnData, a file or folder of cells, a `.pt` shard, a folder of shards, or some cells of a store.

        Of a fragments file, barcodes with `min_fragments` are the cells.
        """
        if isinstance(data, str | Path) and (Path(data).suffix in (".pt", ".json") or _is_store(Path(data))):
            data = StoreRows.of(CellStore.open(data))
        if isinstance(data, StoreRows):
            data.store.verify()
            check_reference(reference, data.store.reference, f"the checkpoint for {data.store.path}")
            yield cls(data.info, partial(data.read, modality=modality), str(data.store.path))
            return
        fragments = FragmentOptions(reference.ccres, min_fragments=min_fragments, genome=reference.genome)
        with open_rows(data, modality, fragments=fragments) as source:
            find = map_genes if modality == "rna" else map_peaks
            found = find(source.var, reference)
            accept_map(found, source.var, reference, source.label, of_model=True)
            yield cls(source.obs, _reader(source, found), source.label, source.check)


def _is_store(path: Path) -> bool:
    return path.is_dir() and not is_cells_folder(path)


def _reader(source: Source, found: FeatureMap) -> Callable[[np.ndarray], sp.csr_matrix]:
    """Return a function that reads a run of cells and normalises them; a few blocks of the file are kept."""

    @lru_cache(maxsize=4)
    def block(number: int) -> sp.csr_matrix:
        rows = source.rows(number * READ_CELLS, min((number + 1) * READ_CELLS, source.n_cells))
        return normalise(found.apply(rows), source.modality)

    def read(rows: np.ndarray) -> sp.csr_matrix:
        first, last = int(rows[0]), int(rows[-1]) + 1
        numbers = range(first // READ_CELLS, (last - 1) // READ_CELLS + 1)
        start = numbers[0] * READ_CELLS
        return sp.vstack([block(number) for number in numbers], format="csr")[first - start : last - start]

    return read
