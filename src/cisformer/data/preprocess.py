"""Turn paired RNA and ATAC of a user into split, aligned data sets for training."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.config import Config, Direction, load_config
from cisformer.data.alignment import FeatureMap, accept_map, map_genes, map_peaks
from cisformer.data.io import H5adWriter
from cisformer.data.pairing import pair_barcodes, split_cells
from cisformer.data.reference import Reference, dataset_reference, load_reference
from cisformer.data.shards import RowFile, UnsortedCells
from cisformer.data.sources import Source, open_rows
from cisformer.data.store import CellStore, SplitName, write_split
from cisformer.errors import InputError
from cisformer.runtime.files import atomic_folders, make_folder, refuse_existing, write_errors
from cisformer.runtime.progress import progress
from cisformer.runtime.provenance import occasion, provenance

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

Seconds = defaultdict[str, float]
"""Seconds spent by stage: ``read``, ``align`` (summed over workers), ``write``."""


def preprocess(
    rna: str | Path | AnnData,
    atac: str | Path | AnnData,
    save_dir: str | Path | None = None,
    *,
    direction: Direction = "rna2atac",
    reference: str | Path | Reference = "human",
    config: Config | str | Path | None = None,
    cnt: int = 10_000,
    batch_size: int = 10,
    num_workers: int = 10,
    manually: bool = False,
    shuffle: bool = False,
    split_by: str | None = None,
    seed: int = 0,
    gtf: str | Path | None = None,
    force: bool = False,
    write_h5ad: bool = False,
) -> dict[SplitName, CellStore]:
    """Align paired RNA and ATAC to a reference, split the cells, and write them as data sets for training.

    The input is read in blocks of cells: memory does not grow with their number, but for their annotation
    (about 1 kB each). Cells are matched by barcode and written sorted by barcode, so that the order of cells
    and features in the input does not matter.

    Parameters
    ----------
    rna, atac
        An h5ad, h5mu or 10x h5 file, or an AnnData; see `open_rows`. RNA in counts.
    save_dir
        Where the folders ``<direction>_train``, ``_val`` and ``_test`` go; the working folder by default.
    direction
        Which modality will be predicted from which. It names the folders and files; the cells are the same.
    reference
        ``"human"``, ``"mouse"``, ``"dataset"`` (the input's own genes and peaks), a folder that
        `build_reference` made, or a `Reference`.
    config
        The task configuration; how cells are to be sampled is noted in the manifest, with ``multiple = 1``
        for validation and test.
    cnt
        Maximum number of training cells per shard.
    batch_size, num_workers
        Blocks of `batch_size` x `num_workers` cells are read and aligned at once, by `num_workers` threads
        (at most one per processor).
    manually
        Do not split: one folder ``<direction>_all``.
    shuffle
        Write the cells of each split in random order, and no ``cell_info.tsv``.
    split_by
        Column of `obs` (donor, batch) whose groups are kept together by the split.
    seed
        Random seed of the split and of the shuffling.
    gtf
        Gene annotation, for the gene coordinates of ``reference="dataset"``.
    force
        Overwrite existing folders.
    write_h5ad
        Write ``mapped_rna.h5ad`` and ``mapped_atac.h5ad`` into the test folder (the only one if `manually`).

    Returns
    -------
    dict of str to CellStore
        The data sets by split: ``train``, ``val`` and ``test``, or ``all``.

    Raises
    ------
    InputError
        If an input is not what it should be; nothing has been written then.
    OutputExistsError
        If a folder to be written has something in it and `force` is not given.
    """
    folder = Path(save_dir or ".")
    task = config if isinstance(config, Config) else load_config(config, direction)
    if min(cnt, batch_size, num_workers) < 1:
        raise InputError("cnt, batch_size and num_workers must be at least 1")
    if manually and split_by is not None:
        raise InputError(
            "there is no split to keep groups together in", hint="leave out --manually or --split-by"
        )
    splits: tuple[SplitName, ...] = ("all",) if manually else ("train", "val", "test")
    folders = {split: folder / f"{direction}_{split}" for split in splits}
    for path in folders.values():
        refuse_existing(path, force=force)
    seconds: Seconds = defaultdict(float)
    with _aligned(rna, atac, reference, gtf, folder, (batch_size, num_workers), seconds) as aligned:
        cells, chosen, origin = aligned
        positions = _split(cells.obs, splits, seed, split_by, shuffle)
        origin |= {"seed": seed, "split_by": split_by, "shuffle": shuffle, "run": secrets.token_hex(8)}
        start = time.perf_counter()
        # All splits are whole before the first is put in place; train comes last: without it there is no data set.
        placing = dict(reversed(folders.items()))
        with atomic_folders(list(placing.values()), force=force) as temporary:
            for split, new in zip(placing, temporary, strict=True):
                whole = split in ("val", "test")
                sampling = task.datapreprocess.model_dump() | ({"multiple": 1} if whole else {})
                about = {"split": split, "datapreprocess": sampling, **origin}
                part, size = cells.take(positions[split]), None if whole else cnt
                write_split(new, part, chosen, direction, size, about, cell_info=not shuffle)
        seconds["write"] += time.perf_counter() - start
    stores = {split: CellStore.open(path) for split, path in folders.items()}
    _log_summary(stores, seconds)
    if write_h5ad:
        write_mapped(stores[splits[-1]])
    return stores


@contextlib.contextmanager
def _aligned(
    rna: str | Path | AnnData,
    atac: str | Path | AnnData,
    reference: str | Path | Reference,
    gtf: str | Path | None,
    folder: Path,
    workers: tuple[int, int],
    seconds: Seconds,
) -> Iterator[tuple[UnsortedCells, Reference, dict[str, Any]]]:
    """Yield the paired cells, aligned and kept in files; their reference; what a manifest says of them."""
    with contextlib.ExitStack() as stack:
        with open_rows(rna, "rna") as genes, open_rows(atac, "atac") as peaks:
            sources = genes, peaks
            rows = pair_barcodes(genes.obs.index, peaks.obs.index)
            chosen = _choose_reference(reference, sources, gtf)
            maps = _map_features(sources, chosen)
            make_folder(folder)
            stack.enter_context(write_errors(folder, folder))
            folder_of_rows = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix=".cells", dir=folder))
            )
            row_files = [
                stack.enter_context(RowFile(folder_of_rows, with_values=values)) for values in (True, False)
            ]
            _align(sources, maps, row_files, workers, seconds)
        cells, empty = _without_empty(
            UnsortedCells(row_files[0], row_files[1], *rows, _join_obs(sources, rows))
        )
        inputs = {
            source.modality: _describe(source, found) for source, found in zip(sources, maps, strict=True)
        }
        yield cells, chosen, {"input": inputs, "empty_cells": empty, "provenance": provenance(**occasion())}


def _choose_reference(
    reference: str | Path | Reference, sources: tuple[Source, Source], gtf: str | Path | None
) -> Reference:
    if isinstance(reference, Reference):
        chosen = reference
    elif str(reference) == "dataset":
        chosen = dataset_reference(sources[0].var, sources[1].var, gtf)
    elif gtf is not None:
        raise InputError(
            f"a GTF does not go with reference {str(reference)!r}, whose genes have coordinates",
            hint="leave it out, or take the data's own features with --reference dataset",
        )
    else:
        chosen = load_reference(reference)
    logger.info("reference %s", chosen.describe())
    return chosen


def _map_features(sources: tuple[Source, Source], reference: Reference) -> list[FeatureMap]:
    maps = [map_genes(sources[0].var, reference), map_peaks(sources[1].var, reference)]
    for source, found in zip(sources, maps, strict=True):
        accept_map(found, source.var, reference, source.label)
    return maps


def _align(
    sources: tuple[Source, Source],
    maps: list[FeatureMap],
    row_files: list[RowFile],
    workers: tuple[int, int],
    seconds: Seconds,
) -> None:
    """Read both modalities in blocks, align the blocks in threads, and park them in order."""
    batch_size, num_workers = workers
    n_threads = min(num_workers, os.cpu_count() or 1)
    for source, found, row_file in zip(sources, maps, row_files, strict=True):
        with ThreadPoolExecutor(n_threads) as pool:
            blocks = _timed_blocks(source.blocks(batch_size * num_workers), seconds)
            aligned = _aligned_blocks(blocks, found, pool, n_threads, seconds)
            what = f"aligning {source.modality.upper()}"
            for block in progress(aligned, total=source.n_cells, desc=what, unit="cells", size=_n_rows):
                start = time.perf_counter()
                row_file.append(block)
                seconds["write"] += time.perf_counter() - start


def _timed_blocks(blocks: Iterator[sp.csr_matrix], seconds: Seconds) -> Iterator[sp.csr_matrix]:
    while True:
        start = time.perf_counter()
        block = next(blocks, None)
        seconds["read"] += time.perf_counter() - start
        if block is None:
            return
        yield block


def _aligned_blocks(
    blocks: Iterator[sp.csr_matrix],
    found: FeatureMap,
    pool: ThreadPoolExecutor,
    n_waiting: int,
    seconds: Seconds,
) -> Iterator[sp.csr_matrix]:
    """Yield aligned blocks in order, while `n_waiting` more are in work."""
    waiting: deque[Future[tuple[sp.csr_matrix, float]]] = deque()

    def oldest() -> sp.csr_matrix:
        aligned, spent = waiting.popleft().result()
        seconds["align"] += spent
        return aligned

    for block in blocks:
        waiting.append(pool.submit(_timed_apply, found, block))
        if len(waiting) > n_waiting:
            yield oldest()
    while waiting:
        yield oldest()


def _timed_apply(found: FeatureMap, block: sp.csr_matrix) -> tuple[sp.csr_matrix, float]:
    start = time.perf_counter()
    return found.apply(block), time.perf_counter() - start


def _n_rows(block: sp.csr_matrix) -> int:
    return block.shape[0]


def _join_obs(
    sources: tuple[Source, Source], rows: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> pd.DataFrame:
    """Return the annotation of paired rows side by side, columns suffixed ``_rna`` and ``_atac``."""
    rna, atac = (source.obs.iloc[row] for source, row in zip(sources, rows, strict=True))
    return pd.concat([rna.add_suffix("_rna"), atac.add_suffix("_atac")], axis=1)


def _without_empty(cells: UnsortedCells) -> tuple[UnsortedCells, list[str]]:
    """Leave out cells without any gene or any cCRE of the reference; also return their barcodes."""
    filled = (cells.rna.lengths[cells.rna_rows] > 0) & (cells.atac.lengths[cells.atac_rows] > 0)
    empty = cells.obs.index[~filled].tolist()
    if not empty:
        return cells, []
    if len(empty) == len(filled):
        raise InputError(
            "no cell has both a gene and an open cCRE of the reference",
            hint="look at both files with `cisformer inspect`",
        )
    logger.warning(
        "%d of %d cells have no gene or no cCRE of the reference and are left out: %s%s",
        len(empty), len(filled), ", ".join(empty[:3]), ", …" if len(empty) > 3 else "",
    )  # fmt: skip
    return cells.take(np.flatnonzero(filled)), empty


def _split(
    obs: pd.DataFrame, splits: tuple[SplitName, ...], seed: int, split_by: str | None, shuffle: bool
) -> dict[SplitName, NDArray[np.int64]]:
    """Return the positions of each split's cells, in the order in which they are to be written."""
    if splits == ("all",):
        positions: dict[SplitName, NDArray[np.int64]] = {"all": np.arange(len(obs))}
    else:
        parts = split_cells(len(obs), seed, _groups(obs, split_by))
        positions = {"train": parts.train, "val": parts.val, "test": parts.test}
    if shuffle:
        rng = np.random.default_rng([seed, 1])
        positions = {split: rng.permutation(cells) for split, cells in positions.items()}
    return positions


def _groups(obs: pd.DataFrame, column: str | None) -> NDArray[np.object_] | None:
    """Return the group of each cell from a column of the RNA's `obs`, or else of the ATAC's."""
    if column is None:
        return None
    for name in (f"{column}_rna", f"{column}_atac", column):
        if name in obs:
            return obs[name].astype(str).to_numpy(object)
    columns = sorted({name.rpartition("_")[0] for name in obs.columns})
    raise InputError(
        f"obs has no column {column!r} to split by", hint=f"it has {', '.join(columns) or 'none'}"
    )


def _describe(source: Source, found: FeatureMap) -> dict[str, Any]:
    """Return what a manifest says of an input."""
    return {
        "path": source.label,
        "kind": source.kind,
        "slot": source.slot,
        "n_cells": source.n_cells,
        "n_features": found.n_features,
        "n_found": found.n_found,
        "named_by": found.id_type,
    }


def _log_summary(stores: dict[SplitName, CellStore], seconds: Seconds) -> None:
    n_cells = sum(store.n_cells for store in stores.values())
    total = sum(seconds.values()) or 1.0
    shares = ", ".join(f"{stage} {spent / total:.0%}" for stage, spent in seconds.items())
    sizes = ", ".join(f"{split} {store.n_cells:,}" for split, store in stores.items())
    logger.info("%d cells (%s) in %.1f s of work: %s", n_cells, sizes, total, shares)


def write_mapped(store: CellStore, rows_per_block: int = 500) -> None:
    """Write the aligned cells of a data set into its folder: ``mapped_rna.h5ad`` and ``mapped_atac.h5ad``.

    Same cells, same order, features of the reference: the truth to hold predictions against.
    """
    reference = store.reference
    genes = reference.genes.set_axis(pd.Index(reference.gene_labels))
    ccres = reference.ccres.set_axis(pd.Index(reference.ccre_labels))
    for name, var, read in (("rna", genes, store.rna), ("atac", ccres, store.atac)):
        path = store.path / f"mapped_{name}.h5ad"
        with H5adWriter(path, store.cell_info, var, compression="lzf") as writer:
            for start in range(0, store.n_cells, rows_per_block):
                writer.append(read(np.arange(start, min(start + rows_per_block, store.n_cells))))
