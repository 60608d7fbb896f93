"""Prediction: one modality in, the other out. What is predicted is never read.

Cells come from an AnnData or `.h5ad` of the input modality, or from a preprocessed store, of which only the input
modality is opened. Results leave in blocks of cells, so that memory does not grow with their number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cisformer.config import Direction, Modality
from cisformer.data.alignment import FeatureMap, accept_map, map_genes, map_peaks
from cisformer.data.batches import Batch, encode_input, normalise, prefetch, read_modality, row_blocks
from cisformer.data.containers import is_cells_folder
from cisformer.data.io import H5adWriter
from cisformer.data.reference import Reference
from cisformer.data.sources import Source, open_rows
from cisformer.data.store import CellStore
from cisformer.errors import InputError
from cisformer.model.checkpoint import Checkpoint, check_reference, load_checkpoint
from cisformer.model.documented_task import FullTask, choose_genes
from cisformer.parallel.processes import Processes
from cisformer.runtime.device import best_device
from cisformer.runtime.files import refuse_existing
from cisformer.runtime.progress import progress
from cisformer.runtime.provenance import provenance

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
MIN_PROB = 0.001
READ_CELLS = 256
TINY = np.nextafter(np.float32(0), np.float32(1))
"""The smallest probability that a sparse matrix has to hold."""


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
        cls, data: AnnData | str | Path, modality: Modality, reference: Reference
    ) -> Iterator[InputCells]:
        """Open an AnnData, an `.h5ad`, `.h5mu` or 10x `.h5` file, a `.pt` shard, or a folder of shards."""
        if isinstance(data, str | Path) and (Path(data).suffix in (".pt", ".json") or _is_store(Path(data))):
            store = CellStore.open(data)
            store.verify()
            check_reference(reference, store.reference, f"the checkpoint for {data}")
            yield cls(store.cell_info, partial(read_modality, store, modality=modality), str(data))
            return
        with open_rows(data, modality) as source:
            find = map_genes if modality == "rna" else map_peaks
            found = find(source.var, reference)
            accept_map(found, source.var, reference, source.label)
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


def predict(
    checkpoint: Checkpoint | str | Path,
    data: AnnData | str | Path,
    *,
    output: str | Path | None = None,
    direction: Direction | None = None,
    batch_size: int = 16,
    num_workers: int = 2,
    max_tokens: int | None = None,
    min_prob: float = MIN_PROB,
    binarize: bool = False,
    genes: str | Path = "expressed_in_training",
    chunk: int | None = None,
    device: str | torch.device | None = None,
    force: bool = False,
) -> AnnData | Path:
    """Predict one modality of single cells from the other.

    Parameters
    ----------
    checkpoint
        A `Checkpoint`, or where one is.
    data
        Cells of the input modality: AnnData with counts (RNA) or peaks (ATAC), a file of one, or a preprocessed
        store. In a store only the input modality is read.
    output
        Write to this `.h5ad` in blocks instead of returning an AnnData.
    direction
        What the checkpoint has to be for, where given.
    batch_size
        Cells predicted at once; memory follows it.
    num_workers
        Threads that prepare batches ahead.
    max_tokens
        Most tokens that attention sees; `None` takes the configuration's `enc_max_len`.
    min_prob
        RNA→ATAC: probabilities below are left out of the sparse result. 0 keeps all.
    binarize
        RNA→ATAC: 1 for as many of a cell's likeliest cCREs as its probabilities sum up to, in place of
        probabilities. A threshold of 0.5 would close nearly all: few cCREs are open in more than half of the cells.
    genes
        ATAC→RNA, architecture full: which genes to predict: "expressed_in_training" (all that the model knows),
        "all" of the reference, or a file of ids or names. Never those that a cell expresses: that is the answer.
    chunk
        RNA→ATAC, architecture full: cCREs decoded together, which bounds memory; 8,192 if not given.
    device
        Where to compute; an NVIDIA GPU where there is one, else the CPU. Under `accelerate launch`, processes share
        the cells where there is an `output`.
    force
        Overwrite `output`.

    Returns
    -------
    AnnData or Path
        [n_cells, whole reference] with CSR float32 `X`: probabilities of being open, or log1p-normalised expression
        (counts per 10,000). Features not seen in training are zero and have `var["seen_in_training"]` false. With
        `output`, its path.

    Raises
    ------
    CheckpointError, ReferenceMismatchError, InputError, OutputExistsError
        The parts do not belong together, or the result would overwrite something.
    """
    if output is not None:
        refuse_existing(output, force=force)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, direction)
    for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
        if value < least:
            raise InputError(f"{name} is {value}", hint=f"give at least {least}")
    if not 0 <= min_prob < 1:
        raise InputError(f"min_prob is {min_prob}", hint="it is a probability: at least 0, below 1")
    processes = Processes.current(cpu=str(device) == "cpu") if output is not None else Processes()
    checkpoint = _as_asked(checkpoint, genes, chunk)
    limit = max_tokens if max_tokens is not None else checkpoint.config.datapreprocess.enc_max_len
    with InputCells.open(data, checkpoint.layout.input_modality, checkpoint.reference) as cells:
        parts = list(row_blocks(np.arange(len(cells.obs)), batch_size))
        mine = processes.share(parts)
        results = _predict_blocks(
            checkpoint, cells, mine, num_workers, None if limit == "whole" else limit,
            torch.device(device or processes.device or best_device()),
        )  # fmt: skip
        sparse = (
            _to_csr(part, checkpoint, min_prob=min_prob, binarize=binarize)
            for part in progress(results, total=len(mine), desc="predicting", unit="batches")
        )
        var, uns = _target_var(checkpoint), {"cisformer": _record(checkpoint, cells, min_prob, binarize)}
        if output is None:
            return _collect(sparse, cells.obs, var, uns)
        if processes.size == 1:
            _write(sparse, Path(output), cells.obs, var, uns, force=force)
            return Path(output)
        with processes.scratch(Path(output)) as folder:
            _write(sparse, folder / f"{processes.rank}.h5ad", cells.obs.iloc[_rows(mine)], var, {})
            processes.wait()
            if processes.is_main:
                written = (part for rank in range(processes.size) for part in _read(folder / f"{rank}.h5ad"))
                _write(written, Path(output), cells.obs, var, uns, force=force)
    return Path(output)


def _write(
    sparse: Iterator[sp.csr_matrix],
    path: Path,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    uns: dict[str, Any],
    *,
    force: bool = True,
) -> None:
    """Write the cells in `obs` as they come."""
    start = 0
    with H5adWriter(path, var, uns, force=force) as writer:
        for block in sparse:
            writer.append(block, obs.iloc[start : start + block.shape[0]])
            start += block.shape[0]


def _rows(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _read(path: Path) -> Iterator[sp.csr_matrix]:
    """Yield the cells of a written prediction in blocks."""
    import h5py
    from anndata.io import sparse_dataset

    with h5py.File(path) as file:
        cells = sparse_dataset(file["X"])
        for start in range(0, cells.shape[0], READ_CELLS):
            yield cells[start : start + READ_CELLS]


def _as_asked(checkpoint: Checkpoint, genes: str | Path, chunk: int | None) -> Checkpoint:
    """Return the checkpoint with the genes and the chunk that architecture full was asked for."""
    if genes != "expressed_in_training":
        checkpoint = _with_genes(checkpoint, genes)
    return checkpoint if chunk is None else _with_chunk(checkpoint, chunk)


def _with_chunk(checkpoint: Checkpoint, chunk: int) -> Checkpoint:
    if checkpoint.direction != "rna2atac" or not isinstance(checkpoint.model, FullTask):
        raise InputError(
            "a chunk of cCREs is for RNA→ATAC models of architecture full",
            hint="leave it out: this model gives all cCREs at once",
        )
    if chunk < 1:
        raise InputError(f"the chunk is {chunk} cCREs", hint="give at least 1")
    return replace(checkpoint, model=checkpoint.model.with_chunk(chunk))


def _with_genes(checkpoint: Checkpoint, genes: str | Path) -> Checkpoint:
    if checkpoint.direction != "atac2rna" or not isinstance(checkpoint.model, FullTask):
        raise InputError(
            "a choice of genes is for ATAC→RNA models of architecture full",
            hint="leave it out: all genes known from training are predicted",
        )
    rows = choose_genes(genes, checkpoint.layout, checkpoint.reference)
    return replace(checkpoint, model=checkpoint.model.with_targets(rows))


def _predict_blocks(
    checkpoint: Checkpoint,
    cells: InputCells,
    parts: Sequence[np.ndarray],
    num_workers: int,
    max_len: int | None,
    device: torch.device,
) -> Iterator[np.ndarray]:
    """Yield predictions of known targets, float32 [cells, F], for each part of the cells."""
    layout = checkpoint.layout
    model = checkpoint.model.to(device)

    def make(rows: np.ndarray) -> Batch:
        return encode_input(cells.read(rows), layout, max_len, None)

    makers = [partial(make, rows) for rows in parts]
    for batch in prefetch(makers, num_workers, device):
        yield model.predict(batch).float().cpu().numpy()
    cells.check()  # before the result gets its name


def _to_csr(dense: np.ndarray, checkpoint: Checkpoint, *, min_prob: float, binarize: bool) -> sp.csr_matrix:
    """Return known targets [B, F] as CSR over the whole reference."""
    feature = checkpoint.layout.target_index.astype(np.int32)
    if checkpoint.direction == "rna2atac":
        if binarize:
            dense = _likeliest(dense)
        kept = [np.flatnonzero(cell >= max(min_prob, TINY)) for cell in dense]
    else:
        kept = [np.flatnonzero(cell) for cell in dense]
    return sp.csr_matrix(
        (
            np.concatenate([cell.take(columns) for cell, columns in zip(dense, kept, strict=True)]),
            np.concatenate([feature.take(columns) for columns in kept]),
            np.cumsum([0, *map(len, kept)]),
        ),
        shape=(len(dense), checkpoint.layout.n_target_reference),
    )


def _likeliest(probability: np.ndarray) -> np.ndarray:
    """Return 1 for each cell's likeliest cCREs, as many as its probabilities sum up to; ties by position."""
    binary = np.zeros_like(probability)
    for cell, values in zip(binary, probability, strict=True):
        expected = round(float(values.sum(dtype=np.float64)))
        cell[np.argsort(-values, kind="stable")[:expected]] = 1
    return binary


def _target_var(checkpoint: Checkpoint) -> pd.DataFrame:
    """Annotation of the predicted features: those of the reference, and whether training saw them."""
    reference = checkpoint.reference
    atac = checkpoint.direction == "rna2atac"
    table = reference.ccres if atac else reference.genes
    var = table.set_index(pd.Index(reference.ccre_labels if atac else reference.gene_labels))
    seen = np.zeros(len(var), dtype=bool)
    seen[checkpoint.layout.target_index] = True
    return var.assign(seen_in_training=seen)


def _record(checkpoint: Checkpoint, cells: InputCells, min_prob: float, binarize: bool) -> dict[str, Any]:
    atac = checkpoint.direction == "rna2atac"
    unit = (
        ("open (1) or closed" if binarize else "probability of being open")
        if atac
        else "log1p(counts per 10,000)"
    )
    return {
        "format": "cisformer-prediction",
        "format_version": FORMAT_VERSION,
        "direction": checkpoint.direction,
        "unit": unit,
        "min_prob": min_prob if atac and not binarize else 0.0,
        "checkpoint": str(checkpoint.folder),
        "reference": checkpoint.reference.name,
        "fingerprint": checkpoint.reference.fingerprint,
        "input": cells.source,
        **provenance(seed=checkpoint.config.training.SEED),
    }


def _collect(
    sparse: Iterator[sp.csr_matrix], obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]
) -> AnnData:
    from anndata import AnnData

    parts = [sp.csr_matrix((0, len(var)), dtype=np.float32), *sparse]
    return AnnData(sp.vstack(parts, format="csr"), obs=obs.copy(), var=var, uns=uns)
