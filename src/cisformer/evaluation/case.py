"""A prediction beside the truth and the training data, on the same cells and features.

`case_files` brings them together from files, `case_store` from a preprocessed data set and a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.config import Direction
from cisformer.errors import InputError
from cisformer.evaluation.matrices import Matrix, select
from cisformer.prediction.compact import compact_of, is_compact

if TYPE_CHECKING:
    from anndata import AnnData

CELL_TYPE = "cell_type"
"""The column of `obs` that holds cell types, unless another is named."""


@dataclass(frozen=True, eq=False)
class Case:
    """A prediction beside the truth, and what was there to learn from.

    Attributes
    ----------
    direction
        Which modality is predicted.
    predicted, truth
        Probabilities and 0/1 accessibility, or log-normalised expression [cells × features].
    barcodes, features
        Names of cells and features.
    labels
        Cell type of each cell, or None.
    train_input, train_target, train_labels
        Training cells: raw counts or 0/1 accessibility, the target in the units of `truth`, and cell types;
        None where they were not given.
    test_input
        Raw input of the test cells, features as in `train_input`; None where it was not given.
    notes
        What the reader of the report should know, one line each.
    """

    direction: Direction
    predicted: Matrix
    truth: sp.csr_matrix
    barcodes: np.ndarray
    features: np.ndarray
    labels: np.ndarray | None = None
    train_input: sp.csr_matrix | None = None
    train_target: sp.csr_matrix | None = None
    train_labels: np.ndarray | None = None
    test_input: sp.csr_matrix | None = None
    notes: tuple[str, ...] = ()

    def with_features(self, kept: np.ndarray) -> Case:
        """Return the case with the features `kept` (rows of `features`) alone."""
        target = self.train_target
        return replace(
            self,
            predicted=select(self.predicted, columns=kept),
            truth=self.truth[:, kept],
            features=self.features[kept],
            train_target=None if target is None else target[:, kept],
        )

    def with_cells(self, kept: np.ndarray) -> Case:
        """Return the case with the test cells `kept` alone."""
        return replace(
            self,
            predicted=select(self.predicted, rows=kept),
            truth=self.truth[kept],
            barcodes=self.barcodes[kept],
            labels=None if self.labels is None else self.labels[kept],
            test_input=None if self.test_input is None else self.test_input[kept],
        )


def keep_features(case: Case, kept: np.ndarray) -> Case:
    """Return the case with the features `kept` alone, and a note of how many; refuse where there is none."""
    if not kept.any():
        raise InputError(
            "no feature is in all three: the prediction, the truth and the training data",
            hint="check that the files are of the same genome and annotation",
        )
    if kept.all():
        return case
    note = f"{kept.sum():,} of {len(kept):,} features scored: those in the truth's file that were seen in training"
    return replace(case.with_features(np.flatnonzero(kept)), notes=(*case.notes, note))


def predicted_values(prediction: AnnData, label: str) -> Matrix:
    """Return what was predicted, cells × features; what a compact prediction holds is computed on demand."""
    if is_compact(prediction):
        return compact_of(prediction, label)
    return sp.csr_matrix(prediction.X, dtype=np.float32)


def labels_of(tables: tuple[pd.DataFrame, ...], key: str | None) -> np.ndarray | None:
    """Return the cell types of the first table that has them; `InputError` if a named column is nowhere."""
    wanted = key or CELL_TYPE
    for table in tables:
        for column in (wanted, f"{wanted}_rna", f"{wanted}_atac"):
            if column in table:
                return table[column].astype(str).to_numpy(dtype=object)
    if key is not None:
        columns = ", ".join(map(str, tables[0].columns[:8])) or "none"
        raise InputError(f"there is no column {key!r} in obs; there are {columns}", hint="name one of these")
    return None
