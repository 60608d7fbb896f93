"""Match a prediction, the truth and the training data of files by name.

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
from cisformer.data.alignment import FeatureMap, map_genes, map_peaks
from cisformer.data.features import gene_identity, peak_regions
from cisformer.data.genome import CCRE_COLUMNS, GENE_COLUMNS, parse_regions
from cisformer.data.h5ad import load_h5ad, read_atac, read_rna
from cisformer.data.reference import Reference
from cisformer.errors import InputError
from cisformer.evaluation.case import Case, keep_features, labels_of, predicted_values
from cisformer.evaluation.matrices import select
from cisformer.evaluation.training_cells import log_normalise

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


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
        select(predicted_values(prediction, label), rows=rows),
        aligned[test_rows],
        measured.obs_names.to_numpy(dtype=object)[test_rows],
        prediction.var_names.to_numpy(dtype=object),
        labels_of((measured.obs.iloc[test_rows], prediction.obs.iloc[rows]), cell_type),
        notes=_cell_notes(prediction, measured, rows),
    )
    _check_range(case, label)
    case, seen = _add_training(case, prediction.var, learned or TrainingFiles(), cell_type)
    kept = covered if seen is None else covered & seen
    if "seen_in_training" in prediction.var:
        kept = kept & prediction.var["seen_in_training"].to_numpy(dtype=bool)
    return keep_features(case, kept)


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
        train_labels=labels_of((targets.obs.iloc[target_rows], inputs.obs.iloc[rows]), cell_type),
        test_input=aligned_input[position],
    )
    return case, np.asarray(train_target.sum(axis=0)).ravel() > 0


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
        features = " against ".join(", ".join(map(str, table.index[:3])) for table in (var, wanted))
        raise InputError(
            f"{label} has none of the {found.features} of the prediction: {features}",
            hint="give cells whose features were predicted",
        )
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
