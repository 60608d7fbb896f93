"""Prediction: one modality in, the other out. What is predicted is never read.

Cells come from an AnnData or a file of the input modality, or from a preprocessed store, of which only the input
modality is opened. Results leave in blocks of cells, so that memory does not grow with their number.
"""

from __future__ import annotations

import copy
import itertools
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cisformer.config import Direction
from cisformer.data.batches import Batch, encode_input, prefetch, row_blocks
from cisformer.data.io import H5adWriter, MatrixLayout
from cisformer.errors import InputError, WriteError
from cisformer.model.checkpoint import Checkpoint, load_checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.documented_task import FullTask, choose_genes
from cisformer.parallel.processes import Processes
from cisformer.prediction.cells import READ_CELLS, InputCells
from cisformer.prediction.compact import (
    COMPACT_FORMAT,
    COMPACT_VERSION,
    INTERCEPT,
    LOADINGS,
    PRIOR,
    STATES,
    LowRank,
)
from cisformer.runtime.device import best_device
from cisformer.runtime.files import refuse_existing
from cisformer.runtime.progress import progress
from cisformer.runtime.provenance import provenance

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
COMPACT_CELLS = 128
"""Cells encoded at once for a compact file: without their probabilities they need little memory."""
COMPACT_ABOVE_BYTES = 2_000_000_000
"""A full matrix that would be larger is written in compact form, unless the user asks for it."""
TINY = np.nextafter(np.float32(0), np.float32(1))
"""The smallest probability that a sparse matrix has to hold."""


@dataclass(frozen=True)
class PredictionOptions:
    """What a user may ask of a prediction; see `predict`."""

    batch_size: int = 16
    num_workers: int = 2
    max_tokens: int | None = None
    min_prob: float = 0.0
    binarize: bool = False
    genes: str | Path = "expressed_in_training"
    chunk: int | None = None
    compact: bool | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("num_workers", self.num_workers, 0)):
            if value < least:
                raise InputError(f"{name} is {value}", hint=f"give at least {least}")
        if not 0 <= self.min_prob < 1:
            raise InputError(f"min_prob is {self.min_prob}", hint="it is a probability: at least 0, below 1")
        if self.compact and (self.min_prob > 0 or self.binarize):
            raise InputError(
                "a compact prediction keeps every probability: min_prob and binarize are for a full matrix",
                hint="leave them out, or use them with `cisformer expand` afterwards",
            )


@dataclass(frozen=True)
class Predicted:
    """Predictions of consecutive cells.

    Attributes
    ----------
    matrix
        Known targets, float32 [B, F]; `None` in a compact prediction.
    states
        Places in the space of the model's loadings, float32 [B, R]; `None` for architecture full, which has none.
    """

    matrix: np.ndarray | None
    states: np.ndarray | None

    @property
    def obsm(self) -> dict[str, np.ndarray]:
        """What goes into `obsm`."""
        return {} if self.states is None else {STATES: self.states}


def predict(
    checkpoint: Checkpoint | str | Path,
    data: AnnData | str | Path,
    *,
    output: str | Path | None = None,
    direction: Direction | None = None,
    batch_size: int = 16,
    num_workers: int = 2,
    max_tokens: int | None = None,
    min_prob: float = 0.0,
    binarize: bool = False,
    genes: str | Path = "expressed_in_training",
    chunk: int | None = None,
    compact: bool | None = None,
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
        Number of cells predicted at once; memory follows it.
    num_workers
        Number of threads that prepare batches ahead.
    max_tokens
        Maximum number of tokens per cell that attention sees; `None` takes the configuration's `enc_max_len`.
    min_prob
        RNA→ATAC: leave probabilities below out of the matrix. 0 keeps all.
    binarize
        RNA→ATAC: 1 for as many of a cell's likeliest cCREs as its probabilities sum up to, in place of
        probabilities. A threshold of 0.5 would close nearly all: few cCREs are open in more than half of the cells.
    genes
        ATAC→RNA, architecture full: which genes to predict: "expressed_in_training" (all that the model knows),
        "all" of the reference, or a file of ids or names. Never those that a cell expresses: that is the answer.
    chunk
        RNA→ATAC, architecture full: number of cCREs decoded together, which bounds memory; 8,192 if not given.
    compact
        RNA→ATAC: keep two small matrices in place of all probabilities; see `open_prediction`. `None` does so where
        the full matrix would take more than 2 GB on disk.
    device
        Where to compute; an NVIDIA GPU where there is one, else the CPU. Under `accelerate launch`, processes share
        the cells where there is an `output`.
    force
        Overwrite `output`.

    Returns
    -------
    AnnData or Path
        [n_cells, whole reference] with float32 `X`: probabilities of being open, or log1p-normalised expression
        (counts per 10,000). `X` is CSR; in a file it is dense where that is smaller, and absent in a compact one.
        Features not seen in training are zero and have `var["seen_in_training"]` false.
        ``obsm["X_cisformer"]`` holds each cell's state in the model. With `output`, its path.

    Raises
    ------
    CheckpointError, ReferenceMismatchError, InputError, OutputExistsError
        The parts do not belong together, or the result would overwrite something.
    WriteError
        The disk has no room for the full matrix.
    """
    options = PredictionOptions(
        batch_size, num_workers, max_tokens, min_prob, binarize, genes, chunk, compact
    )
    if output is not None:
        refuse_existing(output, force=force)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, direction)
    processes = Processes.current(cpu=str(device) == "cpu") if output is not None else Processes()
    checkpoint = _as_asked(checkpoint, options)
    place = torch.device(device or processes.device or best_device())
    with InputCells.open(data, checkpoint.layout.input_modality, checkpoint.reference) as cells:
        options = replace(options, compact=_choose_compact(checkpoint, options, len(cells.obs), output))
        predictor = Predictor(checkpoint, cells, options, place)
        if output is None:
            return predictor.collect()
        predictor.write(Path(output), processes, force=force)
    return Path(output)


def _choose_compact(
    checkpoint: Checkpoint, options: PredictionOptions, n_cells: int, output: str | Path | None
) -> bool:
    """Decide whether to write the compact form; say so, and refuse what the disk cannot hold."""
    possible = checkpoint.direction == "rna2atac" and isinstance(checkpoint.model, CisModel)
    if options.compact and not possible:
        raise InputError(
            f"a compact prediction is for RNA→ATAC models of architecture cis; this one is "
            f"{checkpoint.direction}, {checkpoint.config.model.architecture}",
            hint="leave it out",
        )
    if options.compact or output is None:
        return bool(options.compact)
    layout = checkpoint.layout
    if options.min_prob > 0 or options.binarize:
        return False  # how many values are left is not known before
    n_bytes = n_cells * min(8 * len(layout.target_index), 4 * layout.n_target_reference)
    if possible and options.compact is None and n_bytes > COMPACT_ABOVE_BYTES:
        logger.info(
            "the full matrix would take %.1f GB: written in compact form, which holds every probability; "
            "`cisformer expand` makes parts of it full, --full writes all",
            n_bytes / 1e9,
        )
        return True
    free = shutil.disk_usage(_existing_folder(Path(output))).free
    if n_bytes > COMPACT_ABOVE_BYTES / 10:
        logger.info("the full matrix takes up to %.1f GB; %.1f GB are free", n_bytes / 1e9, free / 1e9)
    if n_bytes > free:
        raise WriteError(
            f"the full matrix of {n_cells} cells takes up to {n_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            f"free where {output} would be",
            hint="write the compact form (--compact), or free some room" if possible else "free some room",
        )
    return False


def _existing_folder(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


@dataclass(frozen=True)
class Predictor:
    """Cells, a model and what was asked: all that a prediction takes."""

    checkpoint: Checkpoint
    cells: InputCells
    options: PredictionOptions
    device: torch.device

    @cached_property
    def model(self) -> CisModel | FullTask:
        """The model on the device; the caller's stays where it is."""
        model = self.checkpoint.model
        here = next(model.parameters()).device
        return model if here.type == self.device.type else copy.deepcopy(model).to(self.device)

    @cached_property
    def low_rank(self) -> LowRank | None:
        """The model's logits as a product; `None` for architecture full."""
        return LowRank.of(self.model) if isinstance(self.model, CisModel) else None

    def parts(self) -> list[np.ndarray]:
        """Return the rows of each batch of cells."""
        size = max(self.options.batch_size, COMPACT_CELLS if self.options.compact else 1)
        return list(row_blocks(np.arange(len(self.cells.obs)), size))

    def blocks(self, parts: Sequence[np.ndarray]) -> Iterator[Predicted]:
        """Yield the predictions of each part of the cells, with progress."""
        asked = self.options.max_tokens
        limit = self.checkpoint.config.datapreprocess.enc_max_len if asked is None else asked
        max_len = None if limit == "whole" else limit

        def make(rows: np.ndarray) -> Batch:
            return encode_input(self.cells.read(rows), self.checkpoint.layout, max_len, None)

        batches = prefetch([partial(make, rows) for rows in parts], self.options.num_workers, self.device)
        for batch in progress(batches, total=len(parts), desc="predicting", unit="batches"):
            yield self._predict(batch)
        self.cells.check()  # before the result gets its name

    def _predict(self, batch: Batch) -> Predicted:
        if self.low_rank is None:
            return Predicted(self.model.predict(batch).float().cpu().numpy(), None)
        assert isinstance(self.model, CisModel)
        matrix = None
        if self.options.compact:
            place = self.model.place(batch)
        else:
            matrix, place = self.model.predict_with_place(batch)
        states = self.low_rank.states(place).cpu().numpy()
        return Predicted(None if matrix is None else matrix.float().cpu().numpy(), states)

    # ---- output

    def collect(self) -> AnnData:
        """Return the prediction as an AnnData."""
        from anndata import AnnData

        var, varm, uns = self._features()
        blocks = list(self.blocks(self.parts()))
        matrix = None
        if not self.options.compact:
            empty = sp.csr_matrix((0, len(var)), dtype=np.float32)
            matrix = sp.vstack(
                [empty, *(self._sparse(b.matrix) for b in blocks if b.matrix is not None)], format="csr"
            )
        states = [block.states for block in blocks if block.states is not None]
        obsm = {STATES: np.concatenate(states)} if states else {}
        return AnnData(matrix, obs=self.cells.obs.copy(), var=var, uns=uns, obsm=obsm, varm=varm)

    def write(self, path: Path, processes: Processes, *, force: bool) -> None:
        """Write the prediction; several processes share the cells, and the first of them joins their parts."""
        parts = self.parts()
        if processes.size == 1:
            self._write(path, self.blocks(parts), self.cells.obs, force=force)
            return
        mine = processes.share(parts)
        with processes.scratch(path) as folder:
            rows = np.concatenate(mine) if mine else np.zeros(0, np.int64)
            self._write(folder / f"{processes.rank}.h5ad", self.blocks(mine), self.cells.obs.iloc[rows])
            processes.wait()
            if processes.is_main:
                written = itertools.chain.from_iterable(
                    _read(folder / f"{rank}.h5ad", self.checkpoint.layout.target_index)
                    for rank in range(processes.size)
                )
                self._write(path, written, self.cells.obs, force=force)

    def _write(
        self, path: Path, blocks: Iterator[Predicted], obs: pd.DataFrame, *, force: bool = True
    ) -> None:
        """Write cells as they come; the first block says which layout is smaller."""
        first = next(blocks, None)
        blocks = iter(()) if first is None else itertools.chain([first], blocks)
        layout = self._matrix_layout(first)
        var, varm, uns = self._features()
        with H5adWriter(path, obs, var, uns, varm=varm, layout=layout, force=force) as writer:
            for block in blocks:
                writer.append(self._matrix(block.matrix, layout), **block.obsm)

    def _matrix_layout(self, first: Predicted | None) -> MatrixLayout:
        if self.options.compact:
            return "none"
        if first is None:
            return "csr"
        assert first.matrix is not None
        stored = self._sparse(first.matrix)
        return "dense" if 2 * stored.nnz > np.prod(stored.shape) else "csr"

    def _matrix(self, known: np.ndarray | None, layout: MatrixLayout) -> np.ndarray | sp.csr_matrix | None:
        """Return known targets over the whole reference, as they are stored."""
        if known is None:
            return None
        if layout == "csr":
            return self._sparse(known)
        index, n_features = self.checkpoint.layout.target_index, self.checkpoint.layout.n_target_reference
        known = self._as_values(known)
        if len(index) == n_features:
            return known
        whole = np.zeros((len(known), n_features), np.float32)
        whole[:, index] = known
        return whole

    def _as_values(self, known: np.ndarray) -> np.ndarray:
        """Return open/closed where that was asked for, and zero in place of what is left out."""
        if self.options.binarize:
            return _likeliest(known)
        return (
            np.where(known >= self.options.min_prob, known, np.float32(0))
            if self.options.min_prob > 0
            else known
        )

    def _sparse(self, known: np.ndarray) -> sp.csr_matrix:
        """Return known targets [B, F] as CSR over the whole reference."""
        known = self._as_values(known)
        feature = self.checkpoint.layout.target_index.astype(np.int32)
        kept = [np.flatnonzero(cell >= TINY) for cell in known]
        return sp.csr_matrix(
            (
                np.concatenate([cell.take(columns) for cell, columns in zip(known, kept, strict=True)]),
                np.concatenate([feature.take(columns) for columns in kept]),
                np.cumsum([0, *map(len, kept)]),
            ),
            shape=(len(known), self.checkpoint.layout.n_target_reference),
        )

    def _features(self) -> tuple[pd.DataFrame, dict[str, np.ndarray], dict[str, Any]]:
        """Return `var`, `varm` and `uns` of the result."""
        reference, layout = self.checkpoint.reference, self.checkpoint.layout
        atac = self.checkpoint.direction == "rna2atac"
        table = reference.ccres if atac else reference.genes
        var = table.set_index(pd.Index(reference.ccre_labels if atac else reference.gene_labels))
        seen = np.zeros(len(var), dtype=bool)
        seen[layout.target_index] = True
        var, varm = var.assign(seen_in_training=seen), {}
        if self.options.compact:
            assert self.low_rank is not None
            prior, intercept = np.full(len(var), -np.inf, np.float32), np.zeros(len(var), np.float32)
            prior[seen] = self.low_rank.prior.cpu().numpy()
            intercept[seen] = self.low_rank.intercept.cpu().numpy()
            loadings = np.zeros((len(var), self.low_rank.loadings.shape[1]), np.float32)
            loadings[seen] = self.low_rank.loadings.cpu().numpy()
            var, varm = var.assign(**{PRIOR: prior, INTERCEPT: intercept}), {LOADINGS: loadings}
        return var, varm, {"cisformer": self._record()}

    def _record(self) -> dict[str, Any]:
        """Return what the result says of its origin."""
        checkpoint, options = self.checkpoint, self.options
        atac = checkpoint.direction == "rna2atac"
        probability = "open (1) or closed" if options.binarize else "probability of being open"
        return {
            "format": COMPACT_FORMAT if options.compact else "cisformer-prediction",
            "format_version": COMPACT_VERSION if options.compact else FORMAT_VERSION,
            "direction": checkpoint.direction,
            "unit": probability if atac else "log1p(counts per 10,000)",
            "min_prob": options.min_prob if atac and not options.binarize else 0.0,
            "checkpoint": str(checkpoint.folder),
            "reference": checkpoint.reference.name,
            "genome": checkpoint.reference.genome,
            "fingerprint": checkpoint.reference.fingerprint,
            "input": self.cells.source,
            **provenance(seed=checkpoint.config.training.SEED),
        }


def _read(path: Path, known: np.ndarray) -> Iterator[Predicted]:
    """Yield the cells of a written prediction in blocks; `known` are the columns of known targets."""
    import h5py
    from anndata.io import sparse_dataset

    with h5py.File(path) as file:
        states = file["obsm"].get(STATES)
        cells = file.get("X")
        if isinstance(cells, h5py.Group):
            cells = sparse_dataset(cells)
        n_cells = len(states) if cells is None else cells.shape[0]
        for start in range(0, n_cells, READ_CELLS):
            part = slice(start, start + READ_CELLS)
            matrix = None if cells is None else cells[part]
            if matrix is not None:
                matrix = (matrix.toarray() if sp.issparse(matrix) else matrix)[:, known]
            yield Predicted(matrix, None if states is None else states[part])


def _as_asked(checkpoint: Checkpoint, options: PredictionOptions) -> Checkpoint:
    """Return the checkpoint with the genes and the chunk that architecture full was asked for."""
    if options.genes != "expressed_in_training":
        checkpoint = _with_genes(checkpoint, options.genes)
    return checkpoint if options.chunk is None else _with_chunk(checkpoint, options.chunk)


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


def _likeliest(probability: np.ndarray) -> np.ndarray:
    """Return 1 for each cell's likeliest cCREs, as many as its probabilities sum up to; ties by position."""
    binary = np.zeros_like(probability)
    for cell, values in zip(binary, probability, strict=True):
        expected = round(float(values.sum(dtype=np.float64)))
        cell[np.argsort(-values, kind="stable")[:expected]] = 1
    return binary
