"""Bring a prediction, the truth and the training data onto the same cells and features, by name.

The features are those of the prediction; truth and training target are aligned to them as `data_preprocess`
aligns input to a reference: genes by id or name, peaks by the regions that they overlap. What is scored are
the features that the truth's file has at all and that were seen in training.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.config import DIRECTIONS, Direction
from cisformer.data.alignment import FeatureMap, map_genes, map_peaks, require_found
from cisformer.data.features import gene_identity, peak_regions
from cisformer.data.genome import CCRE_COLUMNS, GENE_COLUMNS, parse_regions
from cisformer.data.h5ad import load_h5ad, read_atac, read_rna
from cisformer.data.reference import Reference
from cisformer.data.store import CellStore, find_split
from cisformer.errors import InputError, StoreError
from cisformer.evaluation.baselines import log_normalise
from cisformer.evaluation.metrics import PROBABILITY_FLOOR, Matrix, select
from cisformer.model.checkpoint import check_reference
from cisformer.model.cis import CisModel
from cisformer.prediction.cells import StoreRows
from cisformer.prediction.compact import compact_of, is_compact
from cisformer.prediction.predict import predict

if TYPE_CHECKING:
    from anndata import AnnData

    from cisformer.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

CELL_TYPE = "cell_type"
"""The column of `obs` that holds cell types, unless another is named."""
MAX_CELLS, BASELINE_CELLS = 20_000, 5
"""Maximum number of test cells that are scored, and of training cells per test cell that baselines learn from."""
MANY_VALUES = 200_000_000
"""Architecture full: up to this many probabilities are kept down to the floor of the scores; of more those under
0.001 are left out."""


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


# ---------------------------------------------------------------------------------------------- from files


@dataclass(frozen=True, eq=False)
class TrainingFiles:
    """What baselines need, AnnData objects or files; see `cisformer.evaluate` for what each is."""

    train_input: Any = None
    train_target: Any = None
    test_input: Any = None

    def missing(self) -> list[str]:
        """Return the options that were not given."""
        return [f"--{field.name}" for field in fields(self) if getattr(self, field.name) is None]

    def labels(self) -> list[str]:
        """Return what messages call each."""
        return [_label(getattr(self, field.name), f"--{field.name}") for field in fields(self)]


def case_of_files(
    predicted: Any,
    truth: Any,
    learned: TrainingFiles | None = None,
    *,
    direction: Direction | None = None,
    cell_type: str | None = None,
) -> Case:
    """Match AnnData objects or files; see `cisformer.evaluate` for what each is."""
    prediction, label = load_h5ad(predicted), _label(predicted, "the prediction")
    direction = direction or _direction(prediction, label)
    _, target = _modalities(direction)
    measured = _read(truth, target)
    rows, test_rows = _shared(prediction.obs_names, measured.obs_names, label, _label(truth, "the truth"))
    aligned, covered = _align_target(measured, prediction.var, target, _label(truth, "the truth"))
    case = Case(
        direction,
        select(_values(prediction, label), rows=rows),
        aligned[test_rows],
        measured.obs_names.to_numpy(dtype=object)[test_rows],
        prediction.var_names.to_numpy(dtype=object),
        _labels((measured.obs.iloc[test_rows], prediction.obs.iloc[rows]), cell_type),
        notes=_cell_notes(prediction, measured, rows),
    )
    _check_range(case, label)
    case, seen = _add_training(case, prediction.var, learned or TrainingFiles(), cell_type)
    kept = covered if seen is None else covered & seen
    if "seen_in_training" in prediction.var:
        kept = kept & prediction.var["seen_in_training"].to_numpy(dtype=bool)
    return _scored(case, kept)


def _modalities(direction: Direction) -> tuple[str, str]:
    """Return (input, target)."""
    return ("rna", "atac") if direction == "rna2atac" else ("atac", "rna")


def _add_training(
    case: Case, var: pd.DataFrame, learned: TrainingFiles, cell_type: str | None
) -> tuple[Case, np.ndarray | None]:
    """Add training cells where they were given, and return which features they show."""
    if missing := learned.missing():
        note = f"no baselines: they need {', '.join(missing)} as well"
        logger.warning(note)
        return replace(case, notes=(*case.notes, note)), None
    source, target = _modalities(case.direction)
    inputs, tests = _read(learned.train_input, source), _read(learned.test_input, source)
    targets, names = _read(learned.train_target, target), learned.labels()
    rows, target_rows = _shared(inputs.obs_names, targets.obs_names, names[0], names[1])
    aligned, _ = _align_target(targets, var, target, names[1])
    leaked = np.intersect1d(targets.obs_names[target_rows], case.barcodes)
    if len(leaked):
        raise InputError(
            f"{len(leaked):,} test cells are among the training cells, such as {leaked[0]}",
            hint="give the training cells of the model, and test cells that are not among them",
        )
    aligned_input = _align_input(tests, inputs.var, source, names[2])
    position = tests.obs_names.get_indexer(case.barcodes)
    if (position < 0).any():
        raise InputError(
            f"{names[2]} lacks {(position < 0).sum():,} of the {len(position):,} test cells, "
            f"such as {case.barcodes[position < 0][0]}",
            hint="give the input that the prediction was made from",
        )
    train_target = aligned[target_rows]
    case = replace(
        case,
        train_input=sp.csr_matrix(inputs.X)[rows],
        train_target=train_target,
        train_labels=_labels((targets.obs.iloc[target_rows], inputs.obs.iloc[rows]), cell_type),
        test_input=aligned_input[position],
    )
    return case, np.asarray(train_target.sum(axis=0)).ravel() > 0


def _scored(case: Case, kept: np.ndarray) -> Case:
    if not kept.any():
        raise InputError(
            "no feature is in all three: the prediction, the truth and the training data",
            hint="check that the files are of the same genome and annotation",
        )
    if kept.all():
        return case
    note = f"{kept.sum():,} of {len(kept):,} features scored: those in the truth's file that were seen in training"
    return replace(case.with_features(np.flatnonzero(kept)), notes=(*case.notes, note))


# ---------------------------------------------------------------------------------------------- from a store


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
    return _values(result, "the prediction")


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
        _labels((test.info,), cell_type),
    )
    if learned:
        pairs = [_read_pair(part, direction) for part in learned]
        case = replace(
            case,
            train_input=sp.vstack([pair[0] for pair in pairs], format="csr"),
            train_target=sp.vstack([pair[1] for pair in pairs], format="csr"),
            train_labels=_labels((pd.concat([part.info for part in learned]),), cell_type),
            test_input=test_input,
        )
    seen = np.zeros(predicted.shape[1], dtype=np.bool_)
    seen[checkpoint.layout.target_index] = True
    return _scored(case, seen)


# ---------------------------------------------------------------------------------------------- pieces


def _values(prediction: AnnData, label: str) -> Matrix:
    """Return what was predicted, cells × features; what a compact prediction holds is computed on demand."""
    if is_compact(prediction):
        return compact_of(prediction, label)
    return sp.csr_matrix(prediction.X, dtype=np.float32)


def _label(data: Any, otherwise: str) -> str:
    return str(data) if isinstance(data, str | Path) else otherwise


def _read(data: Any, modality: str) -> AnnData:
    return read_rna(data) if modality == "rna" else read_atac(data)


def _direction(prediction: AnnData, label: str) -> Direction:
    """Return what was predicted: as recorded, or by the names of the features."""
    record = prediction.uns.get("cisformer", {})
    for direction in DIRECTIONS:
        if isinstance(record, dict) and record.get("direction") == direction:
            return direction
    try:
        parse_regions(prediction.var_names[:100])
    except InputError:
        return "atac2rna"
    logger.info("%s has regions for features: taken as RNA→ATAC", label)
    return "rna2atac"


def _shared(
    left: pd.Index, right: pd.Index, left_label: str, right_label: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of the barcodes that two files share, in the order of the first."""
    position = right.get_indexer(left)
    rows = np.flatnonzero(position >= 0)
    if not len(rows):
        raise InputError(
            f"{left_label} and {right_label} share no barcode: "
            f"{', '.join(left[:3])} against {', '.join(right[:3])}",
            hint="use the same barcodes in both",
        )
    return rows, position[rows]


def _cell_notes(prediction: AnnData, measured: AnnData, rows: np.ndarray) -> tuple[str, ...]:
    if len(rows) == len(prediction) == len(measured):
        return ()
    n_predicted, n_measured = len(prediction), len(measured)
    return (f"{len(rows):,} cells are in both, of {n_predicted:,} predicted and {n_measured:,} measured",)


def _vocabulary(var: pd.DataFrame, modality: str) -> Reference:
    """Return features as a reference; the other modality's table holds one placeholder."""
    genes = pd.DataFrame([["", "", "", -1, -1, ""]], columns=GENE_COLUMNS)
    ccres = pd.DataFrame([["", -1, -1]], columns=CCRE_COLUMNS)
    if modality == "atac":
        return Reference("prediction's", "", genes, peak_regions(var))
    identity = gene_identity(var)
    genes = genes.loc[np.zeros(len(var), dtype=int)].reset_index(drop=True)
    genes[["gene_id", "gene_name"]] = identity[["gene_id", "gene_name"]]
    return Reference("prediction's", "", genes, ccres)


def _feature_map(var: pd.DataFrame, wanted: pd.DataFrame, modality: str, label: str) -> FeatureMap:
    """Return how the features `var` of a file lie in the features `wanted`."""
    reference = _vocabulary(wanted, modality)
    found = map_genes(var, reference) if modality == "rna" else map_peaks(var, reference)
    if not found.n_found:
        require_found(found, var, reference, label)
    if found.share_found < 0.5:
        logger.warning("%s: %d of %d features are in the prediction", label, found.n_found, found.n_features)
    return found


def _align_target(
    adata: AnnData, wanted: pd.DataFrame, modality: str, label: str
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return cells in the prediction's features and units, and which of the features the file has."""
    found = _feature_map(adata.var, wanted, modality, label)
    aligned = found.apply(sp.csr_matrix(adata.X))
    covered = np.asarray(found.matrix.sum(axis=0)).ravel() > 0
    return (log_normalise(aligned) if modality == "rna" else aligned), covered


def _align_input(adata: AnnData, wanted: pd.DataFrame, modality: str, label: str) -> sp.csr_matrix:
    """Return raw input cells in the features `wanted` of the training input."""
    if adata.var_names.equals(wanted.index):
        return sp.csr_matrix(adata.X)
    return _feature_map(adata.var, wanted, modality, label).apply(sp.csr_matrix(adata.X))


def _labels(tables: tuple[pd.DataFrame, ...], key: str | None) -> np.ndarray | None:
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


def _check_range(case: Case, label: str) -> None:
    """Refuse values that are not in the units of the task."""
    if not sp.issparse(case.predicted):
        return  # a compact prediction: probabilities as they are computed
    values = sp.csr_matrix(case.predicted).data
    if len(values) and not np.isfinite(values).all():
        raise InputError(
            f"{label} holds NaN or infinite values",
            hint="find the cells that hold them, and remove or correct these",
        )
    if case.direction == "rna2atac" and len(values) and (values.min() < 0 or values.max() > 1):
        raise InputError(
            f"{label} holds values from {values.min():.3g} to {values.max():.3g}; wanted probabilities",
            hint="predict without --binarize, or scale scores to probabilities",
        )
