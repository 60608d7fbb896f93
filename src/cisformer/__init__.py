"""Predict chromatin accessibility from gene expression and back, and link cCREs to genes per cell type.

The functions below are the whole of what the command line does; each is imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_FUNCTIONS = {
    "preprocess": "data.preprocess",
    "train": "training",
    "predict": "prediction",
    "load_checkpoint": "model.checkpoint",
    "simulate": "simulation",
    "evaluate": "evaluation",
    "link": "linking",
    "evaluate_links": "link_evaluation",
    "plot_links": "plotting",
}
"""Public function → module that defines it."""

__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'cisformer' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cisformer.{_FUNCTIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
