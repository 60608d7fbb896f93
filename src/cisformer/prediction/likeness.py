"""Compare the cells of a prediction with the training cells, and warn if they differ."""

from __future__ import annotations

import logging

import numpy as np

from cisformer.model.likeness import Likeness

logger = logging.getLogger(__name__)
DISTANCE, UNLIKE, DEPTH = "training_distance", "unlike_training", "n_features_known"
"""Columns of `obs`: rarity of the cell's features in units of the limit, whether it is above 1, number of features."""
WARN_SHARE = 0.1
"""Warn where more cells than this are unlike the training cells."""


def warn_if_unlike(likeness: Likeness, distance: np.ndarray, depth: np.ndarray) -> None:
    """Say in one line where the cells differ from the training cells in what they are, or in depth."""
    differs = []
    share = float((distance > 1).mean()) if len(distance) else 0.0
    if share > WARN_SHARE:
        differs.append(
            f"{share:.0%} of them have features that are rarer in similar training cells than those of 97.5% of "
            "the training cells"
        )
    unusual = likeness.unusual_depth(depth) if len(depth) else None
    if unusual is not None:
        differs.append(f"their median number of known features is {unusual[0]:.0f}, "
                       f"that of the training cells {unusual[1]:.0f}")  # fmt: skip
    if differs:
        logger.warning(
            "these cells are unlike the training cells: %s; read obs['%s'] before relying on them",
            "; ".join(differs), UNLIKE,
        )  # fmt: skip
