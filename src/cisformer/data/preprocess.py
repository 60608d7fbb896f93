"""Turn paired RNA and ATAC of a user into split, aligned data sets for training."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.config import Config, Direction, load_config
from cisformer.data.alignment import FeatureMap, accept_map, map_genes, map_peaks
from cisformer.data.features import are_tiles, peak_regions
from cisformer.data.fragments import FragmentOptions
from cisformer.data.h5ad import H5adWriter
from cisformer.data.known_genomes import GENOMES
from cisformer.data.own_reference import dataset_reference
from cisformer.data.pairing import groups_of, pair_barcodes, split_cells
from cisformer.data.reference import Reference, load_reference
from cisformer.data.shards import RowFile, UnsortedCells
from cisformer.data.sources import Source, open_rows
from cisformer.data.store import CellStore, Split, SplitName, write_splits
from cisformer.errors import InputError
from cisformer.runtime.ahead import ahead
from cisformer.runtime.files import atomic_folders, make_folder, refuse_existing, write_errors
from cisformer.runtime.progress import progress
from cisformer.runtime.provenance import occasion, provenance

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

Input: TypeAlias = Union[str, Path, "AnnData"]


@dataclass(frozen=True)
class PreprocessOptions:
    """What `preprocess` was asked for, checked; its parameters say what each is."""

    direction: Direction = "rna2atac"
    reference: str | Path | Reference = "human"
    genome: str | None = None
    gtf: str | Path | None = None
    min_fragments: int | None = None
    cnt: int = 10_000
    batch_size: int = 10
    num_workers: int = 10
    manually: bool = False
    shuffle: bool = False
    split_by: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.cnt, self.batch_size, self.num_workers, self.min_fragments or 1) < 1:
            raise InputError("cnt, batch_size, num_workers and min_fragments must be at least 1")
        if self.manually and self.split_by is not None:
            raise InputError(
                "--manually makes no split, so --split-by has no effect",
                hint="leave out --manually or --split-by",
            )
        own = not isinstance(self.reference, Reference) and str(self.reference) == "dataset"
        if self.gtf is not None and not own:
            raise InputError(
                f"a GTF cannot be used with reference {str(self.reference)!r}, whose genes have coordinates",
                hint="leave it out, or use the data's own features with --reference dataset",
            )
        if self.genome is not None and self.genome not in GENOMES:
            raise InputError(
                f"genome {self.genome!r} is not built in: there are {', '.join(GENOMES)}",
                hint="leave it out and give --gtf",
            )

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """The folders that are written."""
        return ("all",) if self.manually else ("train", "val", "test")

    @property
    def n_threads(self) -> int:
        """Threads that align cells, and write shards."""
        return min(self.num_workers, os.cpu_count() or 1)

    @property
    def block_cells(self) -> int:
        """Cells that are read and aligned at once."""
        return self.batch_size * self.num_workers


class _Clock:
    """Seconds spent by stage: ``read``, ``align`` (summed over workers), ``write``."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1.0
        shares = (f"{stage} {spent / total:.0%}" for stage, spent in self.seconds.items())
        return f"{total:.1f} s of work: {', '.join(shares)}"


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
    genome: str | None = None,
    min_fragments: int | None = None,
    force: bool = False,
    write_h5ad: bool = False,
) -> dict[SplitName, CellStore]:
    """Align paired RNA and ATAC to a reference, split the cells, and write them as data sets for training.

    The input is read in blocks of cells, so memory does not grow with their number, apart from their annotation
    (about 1 kB per cell). Cells are matched by barcode and written sorted by barcode, so that the order of cells
    and features in the input does not matter.

    Parameters
    ----------
    rna, atac
        A file, folder or AnnData; see `open_rows`. RNA in counts. ATAC may be a fragments file, whose insertions are
        counted on the reference's cCREs.
    save_dir
        Where the folders ``<direction>_train``, ``_val`` and ``_test`` go; the working folder by default.
    direction
        Which modality will be predicted from which. It names the folders and files; the cells are the same.
    reference
        ``"human"``, ``"mouse"``, ``"dataset"`` (the input's own genes and peaks), a folder that
        `build_reference` made, or a `Reference`.
    config
        The task configuration. Its sampling of tokens and targets is recorded in the manifest, with ``multiple = 1``
        for validation and test.
    cnt
        Maximum number of training cells per shard.
    batch_size, num_workers
        Blocks of `batch_size` x `num_workers` cells are read and aligned at once, and shards written, by
        `num_workers` threads (at most one per processor).
    manually
        Do not split: one folder ``<direction>_all``.
    shuffle
        Write the cells of each split in random order, without ``cell_info.tsv``.
    split_by
        Column of `obs`, such as donor or batch: cells of one value stay in the same split.
    seed
        Random seed of the split and of the shuffling.
    gtf
        Gene annotation, for the gene coordinates of ``reference="dataset"``.
    genome
        ``"hg38"``, ``"hg19"``, ``"mm39"`` or ``"mm10"``: assembly of the built-in gene coordinates that
        ``reference="dataset"`` uses; by default guessed from the peaks.
    min_fragments
        If ATAC is a fragments file: leave out cells with fewer fragments than this.
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
    options = PreprocessOptions(
        direction=direction, reference=reference, genome=genome, gtf=gtf, min_fragments=min_fragments, cnt=cnt,
        batch_size=batch_size, num_workers=num_workers, manually=manually, shuffle=shuffle, split_by=split_by,
        seed=seed,
    )  # fmt: skip
    folder = Path(save_dir or ".")
    task = config if isinstance(config, Config) else load_config(config, direction)
    folders = {split: folder / f"{direction}_{split}" for split in options.splits}
    for path in folders.values():
        refuse_existing(path, force=force)
    clock = _Clock()
    with _aligned((rna, atac), options, folder, clock) as (cells, chosen, origin), clock("write"):
        about = origin | {"seed": seed, "split_by": split_by, "shuffle": shuffle, "run": secrets.token_hex(8)}
        records = {split: _record(split, task) | about for split in folders}
        _write_splits(folders, cells, chosen, records, options, force)
    stores = {split: CellStore.open(path) for split, path in folders.items()}
    sizes = ", ".join(f"{split} {store.n_cells:,}" for split, store in stores.items())
    logger.info("%d cells (%s) in %s", sum(store.n_cells for store in stores.values()), sizes, clock)
    if write_h5ad:
        write_mapped(stores[options.splits[-1]])
    return stores


def _record(split: SplitName, task: Config) -> dict[str, Any]:
    """Return what a manifest says of its split: validation and test cells are sampled once."""
    once = {"multiple": 1} if split in ("val", "test") else {}
    return {"split": split, "datapreprocess": task.datapreprocess.model_dump() | once}


def _write_splits(
    folders: dict[SplitName, Path],
    cells: UnsortedCells,
    reference: Reference,
    records: dict[SplitName, dict[str, Any]],
    options: PreprocessOptions,
    force: bool,
) -> None:
    """Write all splits, then put them in place, the training cells last: without these there is no data set."""
    positions = _split(cells.obs, options)
    placing = dict(reversed(folders.items()))
    with atomic_folders(list(placing.values()), force=force) as temporary:
        splits = [
            Split(
                new,
                cells.take(positions[split]),
                records[split],
                None if split in ("val", "test") else options.cnt,
            )
            for split, new in zip(placing, temporary, strict=True)
        ]
        write_splits(splits, reference, options.direction, options.n_threads)


@contextlib.contextmanager
def _aligned(
    inputs: tuple[Input, Input], options: PreprocessOptions, folder: Path, clock: _Clock
) -> Iterator[tuple[UnsortedCells, Reference, dict[str, Any]]]:
    """Yield the paired cells, aligned, in files on disk; their reference; what a manifest says of them."""
    with contextlib.ExitStack() as stack:
        with _opened(inputs, options) as (sources, reference):
            same = inputs[0] is inputs[1] or (
                isinstance(inputs[0], str | Path) and str(inputs[0]) == str(inputs[1])
            )
            rows = pair_barcodes(sources[0].obs.index, sources[1].obs.index, same_file=same)
            maps = _map_features(sources, reference)
            make_folder(folder)
            stack.enter_context(write_errors(folder, folder))
            aside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".cells", dir=folder)))
            files = [stack.enter_context(RowFile(aside, with_values=values)) for values in (True, False)]
            for source, found, file in zip(sources, maps, files, strict=True):
                _align(source, found, file, options, clock)
        cells, empty = _without_empty(UnsortedCells(files[0], files[1], *rows, _join_obs(sources, rows)))
        described = {
            source.modality: _describe(source, found) for source, found in zip(sources, maps, strict=True)
        }
        yield (
            cells,
            reference,
            {"input": described, "empty_cells": empty, "provenance": provenance(**occasion())},
        )


@contextlib.contextmanager
def _opened(
    inputs: tuple[Input, Input], options: PreprocessOptions
) -> Iterator[tuple[tuple[Source, Source], Reference]]:
    """Yield both modalities, opened, and the reference; fragments are counted on it."""
    reference = options.reference
    own = not isinstance(reference, Reference) and str(reference) == "dataset"
    fixed = None if own else reference if isinstance(reference, Reference) else load_reference(reference)
    with open_rows(inputs[0], "rna") as genes:
        least = options.min_fragments or 1
        fragments = (
            None if fixed is None else FragmentOptions(fixed.ccres, genes.obs.index, least, fixed.genome)
        )
        with open_rows(inputs[1], "atac", fragments=fragments) as peaks:
            chosen = fixed or dataset_reference(genes.var, peaks.var, options.gtf, options.genome)
            _check_genome(peaks, chosen, options.genome)
            logger.info("reference %s", chosen.describe())
            yield (genes, peaks), chosen


def _check_genome(peaks: Source, reference: Reference, genome: str | None) -> None:
    """Refuse tiles whose genome was only guessed, and a reference of another genome than the one given."""
    if genome is None:
        guessed = peaks.kind != "fragments" and reference.genome and are_tiles(peak_regions(peaks.var))
        if guessed:
            raise InputError(
                f"the features of {peaks.label} are tiles, such as {peaks.var.index[0]}, from which the genome "
                "cannot be recognised",
                hint=f"give --genome {reference.genome}, or another of {', '.join(GENOMES)}",
            )
    elif genome != reference.genome:
        raise InputError(
            f"reference {reference.name!r} is of {reference.genome or 'an unknown genome'}, the data of {genome}",
            hint=f"use the data's own features: --reference dataset --genome {genome}",
        )


def _map_features(sources: tuple[Source, Source], reference: Reference) -> list[FeatureMap]:
    maps = [map_genes(sources[0].var, reference), map_peaks(sources[1].var, reference)]
    for source, found in zip(sources, maps, strict=True):
        accept_map(found, source.var, reference, source.label)
    return maps


def _align(
    source: Source, found: FeatureMap, file: RowFile, options: PreprocessOptions, clock: _Clock
) -> None:
    """Read a modality in blocks, align the blocks in threads, and write them in order."""

    def read() -> Iterator[sp.csr_matrix]:
        for start in range(0, source.n_cells, options.block_cells):
            with clock("read"):
                block = source.rows(start, min(start + options.block_cells, source.n_cells))
            yield block

    def apply(block: sp.csr_matrix) -> sp.csr_matrix:
        with clock("align"):
            return found.apply(block)

    aligned = ahead(apply, read(), options.n_threads)
    what = f"aligning {source.modality.upper()}"
    for block in progress(aligned, total=source.n_cells, desc=what, unit="cells", size=_n_rows):
        with clock("write"):
            file.append(block)


def _n_rows(block: sp.csr_matrix) -> int:
    return int(block.shape[0])


def _join_obs(
    sources: tuple[Source, Source], rows: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> pd.DataFrame:
    """Return the annotation of paired rows side by side, columns suffixed ``_rna`` and ``_atac``.

    Cells are named by the barcodes of the RNA; where the ATAC spells them otherwise, ``barcode_atac`` has its own.
    """
    rna, atac = (source.obs.iloc[row] for source, row in zip(sources, rows, strict=True))
    if not atac.index.equals(rna.index):
        atac = atac.assign(barcode=atac.index.astype(str)).set_axis(rna.index)
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
            hint="check both files with `cisformer inspect`",
        )
    logger.warning(
        "%d of %d cells have no gene or no cCRE of the reference and are left out: %s%s",
        len(empty), len(filled), ", ".join(empty[:3]), ", …" if len(empty) > 3 else "",
    )  # fmt: skip
    return cells.take(np.flatnonzero(filled)), empty


def _split(obs: pd.DataFrame, options: PreprocessOptions) -> dict[SplitName, NDArray[np.int64]]:
    """Return the positions of each split's cells, in the order in which they are to be written."""
    if options.manually:
        positions: dict[SplitName, NDArray[np.int64]] = {"all": np.arange(len(obs))}
    else:
        parts = split_cells(len(obs), options.seed, groups_of(obs, options.split_by))
        positions = {"train": parts.train, "val": parts.val, "test": parts.test}
    if options.shuffle:
        rng = np.random.default_rng([options.seed, 1])
        positions = {split: rng.permutation(cells) for split, cells in positions.items()}
    return positions


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
