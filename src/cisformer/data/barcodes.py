"""Find whether two lists of barcodes name the same cells, and translate one into the other if that is certain.

A barcode is taken apart into what stands before its letters A, C, G, T, these letters, and what stands after them. Two
files spell the sample before or after in ways of their own (``s1_AAAC…-1``, ``PBMC#AAAC…-1``, ``AAAC…-1-0``); the
letters tell which sample of one is which of the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

CHANCE_SHARE = 0.1
"""Where fewer of the smaller file's barcodes agree, they agree by chance: whitelists of 10x overlap in letters."""

_CORE = re.compile(r"^(.*?)([ACGTN]{8,}(?:[-_+][ACGTN]{8,})*)(.*)$")
_COMPLEMENT = str.maketrans("ACGTN", "TGCAN")
_CERTAIN = 0.5
"""A translation is believed where it pairs this share of the smaller file."""
_CLEAR = 0.9
"""A sample of one file is a sample of the other where this share of its shared barcodes lies in it."""


@dataclass(frozen=True)
class Translation:
    """How barcodes of one file are spelt in another.

    Attributes
    ----------
    left, right
        Positions in the two lists of the barcodes of the same cells.
    how
        In words, with an example; ``""`` where they are spelt alike.
    """

    left: np.ndarray
    right: np.ndarray
    how: str = ""

    def share(self, n_left: int, n_right: int) -> float:
        """Return the share of the smaller list that is paired."""
        return len(self.left) / max(min(n_left, n_right), 1)


def translate(left: pd.Index, right: pd.Index) -> Translation:
    """Pair two lists of unique barcodes: as they are spelt, or by the translation that pairs far more of them.

    Returns
    -------
    The exact matches where no translation is certain; there may be none.
    """
    exact = _exact(left, right)
    if exact.share(len(left), len(right)) > _CLEAR:
        return exact
    options = [exact]
    parts_left, parts_right = _take_apart(left), _take_apart(right)
    for turned in (False, True):
        core = parts_right["core"].map(_reverse_complement) if turned else parts_right["core"]
        matched = _by_sample(parts_left, parts_right.assign(core=core))
        if matched.share(len(left), len(right)) > _CERTAIN:
            i, j = matched.left[0], matched.right[0]
            what = "reverse complements" if turned else "the same letters, other samples or suffixes"
            options.append(Translation(matched.left, matched.right, f"{what}: {right[j]} is {left[i]}"))
    best = max(options, key=lambda option: len(option.left))
    return best if len(best.left) > 1.1 * len(exact.left) else exact


def _exact(left: pd.Index, right: pd.Index) -> Translation:
    position = right.get_indexer(left)
    found = np.flatnonzero(position >= 0)
    return Translation(found, position[found])


def _take_apart(names: pd.Index) -> pd.DataFrame:
    """Return ``core`` and ``sample``, what stands before and after it, of each barcode; ``""`` without letters."""
    found = [_CORE.match(str(name).strip().upper()) for name in names]
    return pd.DataFrame(
        {
            "core": [match[2] if match else "" for match in found],
            "sample": [f"{match[1]}|{match[3]}" if match else "" for match in found],
        }
    )


def _reverse_complement(core: str) -> str:
    return core[::-1].translate(_COMPLEMENT)


def _by_sample(left: pd.DataFrame, right: pd.DataFrame) -> Translation:
    """Match letters within samples that correspond: nearly all that one shares, it shares with the other.

    One side may be enough: if the other file spells two samples alike, each of them corresponds to that one.
    """
    left, right = (part.assign(row=np.arange(len(part)))[part["core"] != ""] for part in (left, right))
    both = left.merge(right, on="core", suffixes=("_left", "_right"))
    pairs = both.groupby(["sample_left", "sample_right"], as_index=False).size()
    sizes = [
        pairs[f"sample_{side}"].map(part["sample"].value_counts())
        for side, part in (("left", left), ("right", right))
    ]
    by_chance = pairs["size"] < CHANCE_SHARE * np.minimum(*sizes)
    clear = [
        pairs["size"] > _CLEAR * pairs.groupby(f"sample_{side}")["size"].transform("sum")
        for side in ("left", "right")
    ]
    certain = pairs[(clear[0] | clear[1]) & ~by_chance]
    both = both.merge(certain, on=["sample_left", "sample_right"])
    once = ~(both["row_left"].duplicated(keep=False) | both["row_right"].duplicated(keep=False))
    both = both[once].sort_values("row_left")
    return Translation(both["row_left"].to_numpy(np.int64), both["row_right"].to_numpy(np.int64))
