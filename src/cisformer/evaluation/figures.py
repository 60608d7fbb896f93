"""The numbers behind the figures of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cisformer.errors import InputError
from cisformer.evaluation.baselines import ORACLE
from cisformer.evaluation.correlation import correlation
from cisformer.evaluation.scores import Measured, Truth
from cisformer.evaluation.verdict import MODEL

N_DETECTION_BINS = 12
MOST_SCATTER_TYPES, MOST_SCATTER_POINTS = 12, 250


def figure_data(
    measured: Mapping[str, Measured], truth: Truth, training_log: str | Path | None, seed: int
) -> dict[str, Any]:
    figures: dict[str, Any] = {"detection": _detection(measured, truth)}
    if truth.direction == "rna2atac":
        figures["reliability"] = {name: _reliability(m) for name, m in measured.items() if m.probabilities}
    if truth.types[1]:
        figures["pseudobulk"] = _scatter(measured[MODEL], truth, seed)
    if training_log is not None:
        figures["training"] = read_training_log(training_log)
    return figures


def _reliability(measured: Measured) -> dict[str, Any]:
    """Mean prediction, share open and number of entries of each bin that has any."""
    assert measured.probabilities is not None
    count, predicted, observed = measured.probabilities.reliability
    some = count > 0
    return {"predicted": predicted[some], "observed": observed[some], "count": count[some]}


def _detection(measured: Mapping[str, Measured], truth: Truth) -> dict[str, Any]:
    """Quartiles of the score per feature, in bins of the share of cells in which the feature is detected."""
    scored = np.flatnonzero(truth.scored)
    rate = truth.n_detected[scored] / truth.values.shape[0]
    if not len(scored):
        return {"rate": [], "n": [], "methods": {}}
    edges = np.unique(np.quantile(rate, np.linspace(0, 1, N_DETECTION_BINS + 1)))
    index = np.clip(np.searchsorted(edges, rate, "right") - 1, 0, max(len(edges) - 2, 0))
    bins = [np.flatnonzero(index == b) for b in np.unique(index)]
    methods = {
        name: np.array([_quartiles(m.per_feature[scored[members]]) for members in bins]).T
        for name, m in measured.items()
        if name != ORACLE
    }
    return {
        "rate": np.array([rate[members].mean() for members in bins]),
        "n": np.array([len(members) for members in bins]),
        "methods": {
            name: dict(zip(("low", "median", "high"), q, strict=True)) for name, q in methods.items()
        },
    }


def _quartiles(values: np.ndarray) -> np.ndarray:
    values = values[np.isfinite(values)]
    return np.quantile(values, [0.25, 0.5, 0.75]) if len(values) else np.full(3, np.nan)


def _scatter(measured: Measured, truth: Truth, seed: int) -> dict[str, Any]:
    """True and predicted log fold changes of a sample of features, for the largest types."""
    assert measured.fold_changes is not None
    code, names = truth.types
    sizes = np.bincount(code[code >= 0], minlength=len(names))
    scored = np.flatnonzero(truth.scored)
    true, predicted = truth.fold_changes(truth.values)[:, scored], measured.fold_changes[:, scored]
    r = correlation(predicted, true, axis=1)
    size = min(len(scored), MOST_SCATTER_POINTS)
    shown = np.sort(np.random.default_rng([seed, 3]).choice(len(scored), size, replace=False))
    return {
        names[t]: {"n_cells": sizes[t], "r": r[t], "true": true[t, shown], "predicted": predicted[t, shown]}
        for t in np.argsort(-sizes, kind="stable")[:MOST_SCATTER_TYPES]
    }


def read_training_log(path: str | Path) -> dict[str, list[Any]]:
    """Return the columns of a `metrics.jsonl`: epoch, train_loss, val_loss and so on.

    Raises
    ------
    InputError
        If there is no such file, or it is something else.
    """
    try:
        records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
        keys = list(dict.fromkeys(key for record in records for key in record))
        columns = {key: [record.get(key) for record in records] for key in keys}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a training log: {error}", hint="give a run's metrics.jsonl"
        ) from error
    if not {"epoch", "val_loss"} <= columns.keys():
        raise InputError(f"{path} has no epoch and val_loss", hint="give a run's metrics.jsonl")
    return columns
