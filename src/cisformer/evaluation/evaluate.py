"""Evaluate a prediction: its scores with intervals, beside those of baselines, and a plain verdict."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cisformer.config import Direction
from cisformer.evaluation.baselines import ORACLE, Baselines, fit_baselines, mask_oracle
from cisformer.evaluation.case import Case
from cisformer.evaluation.case_files import TrainingFiles, case_of_files
from cisformer.evaluation.case_store import MAX_CELLS, case_of_store
from cisformer.evaluation.figures import figure_data
from cisformer.evaluation.matrices import Matrix
from cisformer.evaluation.scores import METRICS, Comparison, Measured, Truth, compare, measure
from cisformer.evaluation.verdict import MODEL, judge, score_text
from cisformer.runtime.files import atomic_path
from cisformer.runtime.provenance import occasion, provenance

if TYPE_CHECKING:
    from anndata import AnnData

    from cisformer.model.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

FORMAT = "cisformer-evaluation"
FORMAT_VERSION = 1
PACKAGES = ("numpy", "scipy", "scikit-learn", "anndata", "torch")


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of a prediction and of baselines on the same cells.

    Attributes
    ----------
    direction
        Which modality is predicted.
    verdict
        Whether the model beats the baselines, in words.
    standing
        The same as one word: "better", "even", "mixed", "worse", or "alone" where there is no baseline.
    scores
        By method, then metric: value, low, high (95 % interval), n.
    comparisons
        The model against each baseline on each metric.
    figures
        The numbers behind the figures.
    facts
        What was evaluated and how.
    """

    direction: Direction
    verdict: str
    standing: str
    scores: dict[str, dict[str, dict[str, float]]]
    comparisons: list[dict[str, Any]]
    figures: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON has; what is not defined is None."""
        plain: dict[str, Any] = _plain({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)})
        return plain

    def write_json(self, path: str | Path) -> Path:
        """Write `to_dict` as JSON, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False), encoding="utf-8")
        return Path(path)

    @property
    def methods(self) -> list[str]:
        """The model and the baselines, in the order of the table."""
        return list(self.scores)

    def outcome(self, metric: str, baseline: str) -> str:
        """Return how the model does against a baseline: "better", "tie", "worse", or "" if not compared."""
        found = (c for c in self.comparisons if c["metric"] == metric and c["baseline"] == baseline)
        return next((c["outcome"] for c in found), "")

    def table(self) -> str:
        """Return the scores as text, one metric a line."""
        return _text_table(self, [metric.key for metric in METRICS[self.direction]])

    def summary(self) -> str:
        """Return the headline scores and the verdict as text, a few lines."""
        keys = [metric.key for metric in METRICS[self.direction] if metric.headline]
        return f"{_text_table(self, keys)}\n{self.verdict}"


def evaluate(
    predicted: AnnData | str | Path,
    truth: AnnData | str | Path,
    *,
    train_input: AnnData | str | Path | None = None,
    train_target: AnnData | str | Path | None = None,
    test_input: AnnData | str | Path | None = None,
    direction: Direction | None = None,
    cell_type: str | None = None,
    training_log: str | Path | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Compare a prediction with the measurement, and with baselines fitted to the training cells.

    Parameters
    ----------
    predicted
        Probabilities of being open, or log1p-normalised expression (counts per 10,000) [cells × features]; by
        any tool.
    truth
        Peaks or raw counts of the same cells, matched by barcode; features matched by name, id or region.
    train_input, train_target, test_input
        Raw counts or peaks of the training cells, and the input of the test cells. Baselines need all three.
    direction
        "rna2atac" or "atac2rna"; as the prediction's file says, or by its features' names, unless given.
    cell_type
        Column of `obs` with cell types; "cell_type" where there is one, unless given.
    training_log
        A training run's `metrics.jsonl`, for its curves.
    seed
        Random seed of the bootstrap and of the baselines' choices.

    Returns
    -------
    EvaluationReport
        Scores with intervals, comparisons, and the verdict; `write_report` makes a page of it.

    Raises
    ------
    InputError
        Files that do not fit together; values that are not in the units of the task.
    """
    started = time.perf_counter()
    learned = TrainingFiles(train_input, train_target, test_input)
    case = case_of_files(predicted, truth, learned, direction=direction, cell_type=cell_type)
    facts = {"prediction": _source(predicted), "truth": _source(truth)}
    return evaluate_case(case, facts=facts, training_log=training_log, seed=seed, started=started)


def evaluate_model(
    data: str | Path,
    model: Checkpoint | str | Path,
    *,
    split: str = "test",
    cell_type: str | None = None,
    direction: Direction | None = None,
    training_log: str | Path | None = None,
    max_cells: int = MAX_CELLS,
    seed: int = 0,
    **options: Any,
) -> EvaluationReport:
    """Predict a split of a preprocessed data set with a model, and compare it with baselines.

    Parameters
    ----------
    data
        What `data_preprocess` wrote.
    model
        A checkpoint.
    split
        "test", or "val" for the cells that the checkpoint was chosen on: their scores are too good.
    cell_type
        Column of the cells' annotation; "cell_type" where there is one, unless given.
    direction
        If given, the checkpoint has to be of this direction.
    training_log
        `metrics.jsonl` of the training run; by default the one in the checkpoint's run folder.
    max_cells
        Maximum number of cells to score; of a larger split a random sample of this size is scored, and baselines learn
        from at most 5 times as many training cells. The report says so.
    seed
        Random seed of the bootstrap, of the samples and of the baselines' choices.
    **options
        For `predict`, such as `device`.

    Returns
    -------
    EvaluationReport
        See `evaluate`.

    Raises
    ------
    CheckpointError, ReferenceMismatchError, StoreError, InputError
        The data or the checkpoint cannot be used, or do not belong together.
    """
    from cisformer.model.checkpoint import Checkpoint, load_checkpoint

    started = time.perf_counter()
    checkpoint = model if isinstance(model, Checkpoint) else load_checkpoint(model, direction)
    case = case_of_store(
        data, checkpoint, split=split, cell_type=cell_type, max_cells=max_cells, seed=seed, **options
    )
    if split == "val":
        case = replace(case, notes=(*case.notes, "validation cells flatter the model: it was chosen on them"))
    facts: dict[str, Any] = {"data": str(data), "split": split, "checkpoint": str(checkpoint.folder)}
    facts |= {"configuration": checkpoint.config.model_dump(), "checkpoint_metrics": checkpoint.metrics}
    if training_log is None and checkpoint.folder is not None:
        beside = checkpoint.folder.parent / "metrics.jsonl"
        training_log = beside if beside.is_file() else None
    return evaluate_case(case, facts=facts, training_log=training_log, seed=seed, started=started)


def evaluate_case(
    case: Case,
    *,
    others: Mapping[str, Matrix] | None = None,
    facts: Mapping[str, Any] | None = None,
    training_log: str | Path | None = None,
    seed: int = 0,
    started: float | None = None,
) -> EvaluationReport:
    """Score a matched prediction and baselines; the core of `evaluate` and `evaluate_model`.

    Parameters
    ----------
    case
        Prediction, truth and training cells.
    others
        Predictions of the same cells and features by other methods, by name.
    facts
        What to record beside the scores.
    training_log
        A training run's `metrics.jsonl`.
    seed
        Random seed of the bootstrap and of the baselines' choices.
    started
        `time.perf_counter()` when work began.
    """
    started = time.perf_counter() if started is None else started
    baselines = _baselines(case, seed)
    predictions: dict[str, Matrix] = {MODEL: case.predicted, **(others or {})}
    if baselines is not None:
        assert case.test_input is not None
        predictions |= baselines.predict(case.test_input, case.labels)
    if case.direction == "atac2rna":
        predictions[ORACLE] = mask_oracle(case.truth)
    truth = _truth(case, baselines, seed)
    measured = {}
    for name, predicted in predictions.items():
        logger.info("scoring %s", name)
        measured[name] = measure(predicted, truth)
    comparisons = _comparisons(measured, case.direction)
    standing, verdict = judge(measured, comparisons, case.direction)
    return EvaluationReport(
        case.direction,
        verdict,
        standing,
        {name: {key: asdict(m.interval(key)) for key in m.value} for name, m in measured.items()},
        [{**asdict(c), "outcome": c.outcome} for c in comparisons],
        figure_data(measured, truth, training_log, seed),
        _facts(case, baselines, facts, seed, started),
    )


def _baselines(case: Case, seed: int) -> Baselines | None:
    if case.train_input is None or case.train_target is None:
        return None
    logger.info("fitting baselines to %d training cells", case.train_input.shape[0])
    return fit_baselines(
        case.train_input, case.train_target, direction=case.direction, labels=case.train_labels, seed=seed
    )


def _truth(case: Case, baselines: Baselines | None, seed: int) -> Truth:
    mean = None if baselines is None else baselines.mean
    return Truth(case.direction, case.truth, mean, case.labels, seed)


def _comparisons(measured: Mapping[str, Measured], direction: Direction) -> list[Comparison]:
    pairs = (
        compare(measured[MODEL], other, name, metric)
        for metric in METRICS[direction]
        for name, other in measured.items()
        if name not in (MODEL, ORACLE)
    )
    return [pair for pair in pairs if pair is not None]


# ---------------------------------------------------------------------------------------------- text


MARKS = {"better": "+", "tie": "=", "worse": "-", "": " "}


def _text_table(report: EvaluationReport, keys: list[str]) -> str:
    """One line per metric, one column per method; + = - say how the model does against it."""
    metrics = [m for m in METRICS[report.direction] if m.key in keys and m.key in report.scores[MODEL]]
    lines = [["", *report.methods]]
    for metric in metrics:
        cells = [_cell(report, metric.key, method) for method in report.methods]
        lines.append([f"{metric.name} ({metric.better} is better)", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(
        [*rows, "+ the model is better, = no difference outside the 95 % interval, - it is worse"]
    )


def _cell(report: EvaluationReport, key: str, method: str) -> str:
    score = report.scores[method].get(key)
    if score is None or not np.isfinite(score["value"]):
        return "–"
    half = score["high"] - score["value"]
    spread = f" ±{score_text(half, score['value'])}" if np.isfinite(half) and method == MODEL else ""
    return f"{score_text(score['value'])}{spread} {MARKS[report.outcome(key, method)]}".rstrip()


# ---------------------------------------------------------------------------------------------- facts


def _facts(
    case: Case, baselines: Baselines | None, facts: Mapping[str, Any] | None, seed: int, started: float
) -> dict[str, Any]:
    known = {
        "test_cells": case.truth.shape[0],
        "features": case.truth.shape[1],
        "training_cells": None if case.train_input is None else case.train_input.shape[0],
        "cell_types": None if case.labels is None else len(np.unique(case.labels.astype(str))),
        "notes": list(case.notes),
        "baseline_settings": {}
        if baselines is None
        else {k: v.settings for k, v in baselines.fitted.items()},
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
    }
    return {**(facts or {}), **known, **provenance(**occasion())}


def _source(data: Any) -> str:
    return str(data) if isinstance(data, str | Path) else "AnnData"


def _plain(value: Any) -> Any:
    """Return `value` in types that JSON has; floats to six significant digits, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value if value is None or isinstance(value, bool | int | str) else str(value)
