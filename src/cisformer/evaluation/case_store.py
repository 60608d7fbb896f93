"""Predict cells of a preprocessed data set, and match them with the cells that were learned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.config import Direction
from cisformer.data.store import CellStore, find_split
from cisformer.errors import InputError, StoreError
from cisformer.evaluation.case import Case, keep_features, labels_of, predicted_values
from cisformer.evaluation.matrices import Matrix
from cisformer.evaluation.probabilities import PROBABILITY_FLOOR
from cisformer.evaluation.training_cells import log_normalise
from cisformer.model.checkpoint import check_reference
from cisformer.model.cis import CisModel
from cisformer.prediction.cells import StoreRows
from cisformer.prediction.predict import predict

if TYPE_CHECKING:
    from cisformer.model.checkpoint import Checkpoint

MAX_CELLS, BASELINE_CELLS = 20_000, 5
"""Maximum number of test cells that are scored, and of training cells per test cell that baselines learn from."""
MANY_VALUES = 200_000_000
"""Architecture full: up to this many probabilities are kept down to the floor of the scores; of more those under
0.001 are left out."""


def case_of_store(
    data: str | Path,
    checkpoint: Checkpoint,
    *,
    split: str = "test",
    cell_type: str | None = None,
    max_cells: int = MAX_CELLS,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Predict a split of a preprocessed data set and match it.

    Parameters
    ----------
    data
        What `data_preprocess` wrote.
    checkpoint
        The model; cells are read in its reference.
    split
        "test", or "val".
    cell_type
        Column of the cells' annotation.
    max_cells
        Maximum number of cells to score; more are sampled. Baselines learn from at most `BASELINE_CELLS` times as many.
    seed
        Random seed of the samples.
    options
        For `cisformer.predict`.
    """
    if max_cells < 1:
        raise InputError(f"max_cells is {max_cells}", hint="give at least 1")
    store = _open_split(data, split, checkpoint.direction)
    if store is None:
        raise StoreError(f"{data} holds no {split} cells", hint="run data_preprocess without --manually")
    check_reference(store.reference, checkpoint.reference, f"data {store.path}")
    # Baselines get the validation cells as well: they too choose their settings.
    names = ("train",) if split == "val" else ("train", "val")
    others = [found for name in names if (found := _open_split(data, name, checkpoint.direction))]
    (test,), noted = _sample([store], max_cells, seed, f"{split} cells scored")
    learned, noted_learned = _sample(
        others, BASELINE_CELLS * max_cells, seed, "training cells given to baselines"
    )
    case = _case_of_rows(checkpoint, _predicted(checkpoint, test, options), test, learned, cell_type)
    return replace(case, notes=(*noted, *noted_learned, *case.notes))


def _sample(
    stores: list[CellStore], most: int, seed: int, what: str
) -> tuple[list[StoreRows], tuple[str, ...]]:
    """Return the cells of some stores, at most `most` of them, drawn at random, and a note if cells are left out."""
    sizes = np.array([store.n_cells for store in stores], dtype=np.int64)
    n_cells = int(sizes.sum())
    if n_cells <= most:
        return [StoreRows.of(store) for store in stores], ()
    chosen = np.sort(np.random.default_rng(seed).choice(n_cells, most, replace=False))
    starts = np.cumsum(sizes) - sizes
    parts = np.split(chosen, np.searchsorted(chosen, starts[1:]))
    rows = [StoreRows(store, part - start) for store, part, start in zip(stores, parts, starts, strict=True)]
    return rows, (f"{most:,} of {n_cells:,} {what}: a random sample",)


def _predicted(checkpoint: Checkpoint, test: StoreRows, options: dict[str, Any]) -> Matrix:
    """Predict cells: accessibility as a product that is computed on demand, where the architecture allows it."""
    if checkpoint.direction == "rna2atac":
        n_values = len(test.rows) * len(checkpoint.layout.target_index)
        floor = PROBABILITY_FLOOR if n_values <= MANY_VALUES else 10 * PROBABILITY_FLOOR
        by_cis = isinstance(checkpoint.model, CisModel)
        options = options | ({"compact": True} if by_cis else {"min_prob": floor})
    result = predict(checkpoint, test, **options)
    assert not isinstance(result, Path)
    return predicted_values(result, "the prediction")


def _read_pair(cells: StoreRows, direction: Direction) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return (raw input, target in the units of the task) of some cells of a store."""
    rna, atac = cells.store.rna(cells.rows), cells.store.atac(cells.rows)
    return (rna, atac) if direction == "rna2atac" else (atac, log_normalise(rna))


def _open_split(data: str | Path, split: Any, direction: Direction) -> CellStore | None:
    folder = find_split(data, split, direction)
    return None if folder is None else CellStore.open(folder)


def _case_of_rows(
    checkpoint: Checkpoint,
    predicted: Matrix,
    test: StoreRows,
    learned: list[StoreRows],
    cell_type: str | None,
) -> Case:
    """Match predictions of cells of a store with the cells that were learned from."""
    direction, reference = checkpoint.direction, checkpoint.reference
    test_input, truth = _read_pair(test, direction)
    case = Case(
        direction,
        predicted,
        truth,
        test.store.barcodes[test.rows],
        reference.ccre_labels if direction == "rna2atac" else reference.gene_labels,
        labels_of((test.info,), cell_type),
    )
    if learned:
        pairs = [_read_pair(part, direction) for part in learned]
        case = replace(
            case,
            train_input=sp.vstack([pair[0] for pair in pairs], format="csr"),
            train_target=sp.vstack([pair[1] for pair in pairs], format="csr"),
            train_labels=labels_of((pd.concat([part.info for part in learned]),), cell_type),
            test_input=test_input,
        )
    seen = np.zeros(predicted.shape[1], dtype=np.bool_)
    seen[checkpoint.layout.target_index] = True
    return keep_features(case, seen)
