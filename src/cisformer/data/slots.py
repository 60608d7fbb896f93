"""Choose the matrix of an AnnData that holds the counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cisformer.config import Modality
from cisformer.data.matrices import describe_values, sample_values, share_above_zero
from cisformer.errors import InputError

SLOTS = ("layers/counts", "raw/X", "X")
"""Where counts are looked for first, in this order; then in other layers whose name says so."""

_COUNT_LAYER = re.compile(r"count|raw|umi", re.IGNORECASE)
_IMPUTED = 0.5
"""ATAC that is no counts and has more than this share above 0 is what a model made of it."""
_ENOUGH = 1000
"""So many values above 0, all of them 1, are not RNA counts."""


@dataclass(frozen=True)
class Slot:
    """A matrix that was chosen.

    Attributes
    ----------
    name
        ``X``, ``raw/X`` or ``layers/…``.
    node
        The matrix, on disk or in memory.
    holds
        What `describe_values` says of its first values.
    """

    name: str
    node: Any
    holds: str


def slot_names(layers: Any) -> list[str]:
    """Return the slots to look at, given the names of the layers."""
    others = [f"layers/{name}" for name in layers if _COUNT_LAYER.search(name) and name != "counts"]
    return [*SLOTS, *sorted(others)]


def choose_slot(
    nodes: dict[str, Any], modality: Modality, label: str, strict: bool, others: Sequence[str] = ()
) -> Slot:
    """Return the first slot that holds counts; ATAC may do with other values in X where most entries are 0.

    Parameters
    ----------
    nodes
        The matrices by `slot_names`, in that order.
    modality, label
        What they are read as, and what to call the file.
    strict
        Whether RNA that is not in counts, and ATAC that is imputed, is refused.
    others
        Layers that are not looked at, to be named where nothing will do.

    Raises
    ------
    InputError
        If no slot will do, saying what each holds.
    """
    samples = {name: sample_values(node) for name, node in nodes.items()}
    found = {name: describe_values(values) for name, values in samples.items()}
    slots = [Slot(name, nodes[name], holds) for name, holds in found.items() if holds]
    for kinds in (("counts",), ("binary",)) if modality == "rna" else (("counts", "binary"),):
        for slot in slots:
            if slot.holds in kinds and not (strict and modality == "rna" and _is_binarised(slot, samples)):
                return slot
    values = next((slot for slot in slots if slot.name == "X" and slot.holds != "unreadable"), None)
    if values is not None and (not strict or values.holds == "empty"):
        return values
    if values is not None and modality == "atac":
        share = share_above_zero(values.node)
        if share <= _IMPUTED or values.holds in ("scaled", "missing"):
            return values
        raise InputError(
            f"{label}: X holds {values.holds} values, {share:.0%} of them above 0, as a model or smoothing makes "
            "them; wanted measured counts, or 0 and 1",
            hint="store the measured counts in layers['counts'], or give the file from before imputation",
        )
    looks = ", ".join(f"{slot.holds} values in {slot.name}" for slot in slots) or "no matrix"
    beside = f"; not looked at: {', '.join(others[:5])}" if others else ""
    how = "store the raw counts in layers['counts']"
    if {"layers/spliced", "layers/unspliced"} <= set(others):
        how += ": adata.layers['counts'] = adata.layers['spliced'] + adata.layers['unspliced']"
    elif any(slot.holds == "missing" for slot in slots):
        how += "; where NaN stand for 0, as a concatenation leaves them: numpy.nan_to_num"
    raise InputError(
        f"{label}: no {modality.upper()} counts; wanted whole numbers in layers['counts'], raw or X, found {looks}"
        f"{beside}",
        hint=how,
    )


def _is_binarised(slot: Slot, samples: dict[str, Any]) -> bool:
    return slot.holds == "binary" and int(np.count_nonzero(samples[slot.name])) >= _ENOUGH
