"""The cells of a training: which are learned from, which judge, and the batches of the latter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cisformer.config import Config, Direction
from cisformer.data.batches import (
    Batch,
    Layout,
    add_targets,
    encode_input,
    prefetch,
    read_modality,
    row_blocks,
)
from cisformer.data.store import CellStore, SplitName, find_split, require_one_run
from cisformer.errors import TrainingError
from cisformer.model.checkpoint import check_reference

logger = logging.getLogger(__name__)
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class CellSplit:
    """Training and validation cells: a store and the rows of it, each."""

    train: CellStore
    train_rows: np.ndarray
    val: CellStore
    val_rows: np.ndarray

    @classmethod
    def open(cls, train: str | Path, val: str | Path | None, direction: Direction, seed: int) -> CellSplit:
        """Open what `data_preprocess` wrote: its whole folder, of which the split is taken, or one split.

        Without validation data a tenth of the training cells is set aside, chosen by sorted barcode and seed.
        """
        store = CellStore.open(_split_folder(train, "train", direction))
        require_one_run(store.path)
        val_path = (
            find_split(train, "val", direction) if val is None else _split_folder(val, "val", direction)
        )
        if val_path is None:
            return cls._set_aside(store, seed)
        val_store = CellStore.open(val_path)
        check_reference(val_store.reference, store.reference, f"validation data {val_path}")
        shared = np.intersect1d(store.barcodes, val_store.barcodes)
        if len(shared):
            raise TrainingError(
                f"{len(shared)} cells are in the training and the validation data, such as {shared[0]}",
                hint="give two folders that data_preprocess wrote together, which share no cell",
            )
        return cls(store, np.arange(store.n_cells), val_store, np.arange(val_store.n_cells))

    @classmethod
    def _set_aside(cls, store: CellStore, seed: int) -> CellSplit:
        if store.n_cells < 4:
            raise TrainingError(f"{store.path} holds {store.n_cells} cells", hint="training needs at least 4")
        by_barcode = np.argsort(store.barcodes, kind="stable")
        shuffled = np.random.default_rng([seed, 4]).permutation(by_barcode)
        n_val = max(1, round(VALIDATION_SHARE * store.n_cells))
        logger.info("no validation data: %d of %d training cells set aside", n_val, store.n_cells)
        return cls(store, np.sort(shuffled[n_val:]), store, np.sort(shuffled[:n_val]))


def _split_folder(path: str | Path, split: SplitName, direction: Direction) -> Path:
    """Return `path` where it is a split itself, else the split within it."""
    path = Path(path)
    is_split = path.is_file() or (path / "manifest.json").is_file()
    return path if is_split else find_split(path, split, direction) or path


def validation_batches(
    store: CellStore,
    rows: np.ndarray,
    layout: Layout,
    config: Config,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Yield batches with all targets and a fixed choice of tokens."""
    limits = config.datapreprocess
    max_len = None if limits.enc_max_len == "whole" else limits.enc_max_len

    def make(part: np.ndarray) -> Batch:
        batch = encode_input(read_modality(store, part, layout.input_modality), layout, max_len, None)
        return add_targets(batch, read_modality(store, part, layout.target_modality), layout)

    makers = [partial(make, part) for part in row_blocks(rows, config.training.batch_size)]
    yield from prefetch(makers, config.training.num_workers, device)
