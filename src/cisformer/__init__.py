"""Predict chromatin accessibility from gene expression and back, and link cCREs to genes per cell type.

The functions below are the whole of what the command line does; each is imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = {
    "run": "workflow",
    "preprocess": "data.preprocess",
    "train": "training.loop",
    "predict": "prediction.predict",
    "open_prediction": "prediction.compact",
    "write_tracks": "prediction.tracks",
    "complete": "prediction.complete",
    "transfer_labels": "prediction.transfer",
    "link": "links.score",
    "score_links": "links.score",
    "evaluate": "evaluation.evaluate",
    "evaluate_model": "evaluation.evaluate",
    "write_report": "evaluation.report",
    "evaluate_links": "links.benchmark",
    "export_links": "links.formats",
    "plot": "links.plot",
    "plot_links": "links.plot",
    "compare_links": "analysis.contrasts",
    "link_tfs": "analysis.regulon",
    "annotate_variants": "analysis.variant_genes",
    "annotate_peaks": "analysis.peaks",
    "browse": "analysis.browse",
    "simulate": "simulation",
    "inspect": "data.inspect",
    "build_reference": "data.own_reference",
    "load_reference": "data.reference",
    "load_checkpoint": "model.checkpoint",
    "export_checkpoint": "model.checkpoint",
    "pack_model": "model.pack",
    "default_config": "config",
    "load_config": "config",
}
"""Public function → module that defines it."""

_DEFINED_AS = {"plot": "plot_links"}
"""Public names that are called otherwise where they are defined."""

__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'cisformer' has no attribute '{name}'")
    module = importlib.import_module(f"cisformer.{_FUNCTIONS[name]}")
    return getattr(module, _DEFINED_AS.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)
