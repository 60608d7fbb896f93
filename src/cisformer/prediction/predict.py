"""Prediction: one modality in, the other out. What is predicted is never read.

Cells come from an AnnData or a file of the input modality, or from a preprocessed store, of which only the input
modality is opened. Results leave in blocks of cells, so that memory does not grow with their number.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cisformer.config import Direction
from cisformer.data.fragments import MIN_FRAGMENTS
from cisformer.errors import InputError, WriteError
from cisformer.model.checkpoint import Checkpoint, load_checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.documented_task import FullTask, choose_genes
from cisformer.parallel.processes import Processes
from cisformer.prediction.cells import InputCells, StoreRows
from cisformer.prediction.predictor import PredictionOptions, Predictor
from cisformer.runtime.device import best_device, keep_freed_memory
from cisformer.runtime.files import refuse_existing

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
COMPACT_ABOVE_BYTES = 2_000_000_000
"""A full matrix that would be larger is written in compact form, unless the user asks for it."""


def predict(
    checkpoint: Checkpoint | str | Path,
    data: AnnData | StoreRows | str | Path,
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
    min_fragments: int = MIN_FRAGMENTS,
    device: str | torch.device | None = None,
    force: bool = False,
) -> AnnData | Path:
    """Predict one modality of single cells from the other.

    Parameters
    ----------
    checkpoint
        A `Checkpoint`, or its path.
    data
        Cells of the input modality: AnnData with counts (RNA) or peaks (ATAC), a file of one, or a preprocessed
        store, or some rows of one. In a store only the input modality is read.
    output
        Write to this `.h5ad` in blocks instead of returning an AnnData.
    direction
        If given, the checkpoint has to be of this direction.
    batch_size
        Number of cells predicted at once; memory grows with it.
    num_workers
        Number of threads that prepare batches ahead.
    max_tokens
        Maximum number of tokens per cell that attention sees; `None` takes the configuration's `enc_max_len`.
    min_prob
        RNA→ATAC: leave smaller probabilities out of the matrix. 0 keeps all.
    binarize
        RNA→ATAC: write 1 for the most probable cCREs of each cell and 0 for the others, in place of probabilities. The
        number of ones is the sum of the cell's probabilities. With a threshold of 0.5 nearly all would be 0: few
        cCREs are open in more than half of the cells.
    genes
        ATAC→RNA, architecture full: genes to predict: "expressed_in_training" (all seen in training), "all" of the
        reference, or a file of ids or names. The genes that a cell expresses are never used: they are the answer.
    chunk
        RNA→ATAC, architecture full: number of cCREs decoded at once; fewer need less memory. Default 8,192.
    compact
        RNA→ATAC: write two small matrices in place of all probabilities; see `open_prediction`. `None` does so if the
        full matrix would take more than 2 GB on disk.
    min_fragments
        ATAC→RNA: minimum number of fragments for a barcode of a fragments file to count as a cell.
    device
        Where to compute; by default an NVIDIA GPU if there is one, else the CPU. Under `accelerate launch` with an
        `output`, each process predicts a part of the cells.
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
        The full matrix does not fit on the disk.
    """
    options = PredictionOptions(
        batch_size, num_workers, max_tokens, min_prob, binarize, genes, chunk, compact, min_fragments
    )
    if output is not None:
        refuse_existing(output, force=force)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(checkpoint, direction)
    processes = Processes.current(cpu=str(device) == "cpu") if output is not None else Processes()
    checkpoint = _as_asked(checkpoint, options)
    place = torch.device(device or processes.device or best_device())
    if place.type == "cpu":
        keep_freed_memory()
    with InputCells.open(
        data, checkpoint.layout.input_modality, checkpoint.reference, min_fragments
    ) as cells:
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
            "`cisformer expand` writes parts of it as a matrix, --full writes all",
            n_bytes / 1e9,
        )
        return True
    free = shutil.disk_usage(_existing_folder(Path(output))).free
    if n_bytes > COMPACT_ABOVE_BYTES / 10:
        logger.info("the full matrix takes up to %s; %s are free", _size(n_bytes), _size(free))
    if n_bytes > free:
        raise WriteError(
            f"the full matrix of {n_cells} cells takes up to {_size(n_bytes)}, and {_size(free)} are free where "
            f"{output} would be",
            hint="write the compact form (--compact), or free disk space" if possible else "free disk space",
        )
    return False


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes > 1e8 else f"{n_bytes / 1e6:.1f} MB"


def _existing_folder(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _as_asked(checkpoint: Checkpoint, options: PredictionOptions) -> Checkpoint:
    """Return the checkpoint with the genes and the chunk that architecture full was asked for."""
    if options.genes != "expressed_in_training":
        checkpoint = _with_genes(checkpoint, options.genes)
    return checkpoint if options.chunk is None else _with_chunk(checkpoint, options.chunk)


def _with_chunk(checkpoint: Checkpoint, chunk: int) -> Checkpoint:
    if checkpoint.direction != "rna2atac" or not isinstance(checkpoint.model, FullTask):
        raise InputError(
            "chunk is only for RNA→ATAC models of architecture full",
            hint="leave it out: this model gives all cCREs at once",
        )
    if chunk < 1:
        raise InputError(f"the chunk is {chunk} cCREs", hint="give at least 1")
    return replace(checkpoint, model=checkpoint.model.with_chunk(chunk))


def _with_genes(checkpoint: Checkpoint, genes: str | Path) -> Checkpoint:
    if checkpoint.direction != "atac2rna" or not isinstance(checkpoint.model, FullTask):
        raise InputError(
            "a choice of genes is only for ATAC→RNA models of architecture full",
            hint="leave it out: all genes seen in training are predicted",
        )
    rows = choose_genes(genes, checkpoint.layout, checkpoint.reference)
    return replace(checkpoint, model=checkpoint.model.with_targets(rows))
