"""Match the barcodes of two modalities, and split cells into training, validation and test."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cisformer.data.barcodes import CHANCE_SHARE, Translation, translate
from cisformer.data.features import are_row_numbers
from cisformer.errors import InputError

logger = logging.getLogger(__name__)

TEST_SHARE = 0.2
"""Share of all cells that are for testing."""
VAL_SHARE = 0.1
"""Share of the remaining, training, side that is for validation."""


def pair_barcodes(
    rna: pd.Index, atac: pd.Index, *, same_file: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Find the cells that have both modalities.

    Barcodes that are spelt in two ways are translated where the translation is certain, and it is said how.

    Parameters
    ----------
    rna, atac
        Barcodes of either modality, unique.
    same_file
        Whether both are of one file, where names that only count rows name the same cells.

    Returns
    -------
    Rows in `rna` and rows in `atac` of the shared barcodes, sorted by barcode of `rna`.

    Raises
    ------
    InputError
        If names only count rows; if no barcode is shared, or no more than by chance. It shows some of each, and says
        whether a suffix such as ``-1`` is the difference.
    """
    counted = [name for name, cells in (("RNA", rna), ("ATAC", atac)) if are_row_numbers(cells)]
    if counted and not same_file:
        raise InputError(
            f"the cells of {' and '.join(counted)} are named by row numbers ({rna[0]}, {rna[1]}, … and {atac[0]}, "
            f"{atac[1]}, …), which do not show which cells are the same",
            hint="put the barcodes into obs_names of both, or into a column 'barcode' of obs",
        )
    found = translate(rna, atac)
    if not len(found.left):
        raise _nothing_shared(rna, atac)
    if found.share(len(rna), len(atac)) < CHANCE_SHARE:
        raise _by_chance(rna, atac, found)
    if found.how:
        logger.warning("barcodes of RNA and ATAC are written in two ways and were translated: %s", found.how)
    for name, all_cells in (("RNA", rna), ("ATAC", atac)):
        if len(all_cells) > len(found.left):
            logger.warning(
                "%d of %d %s cells have no partner in the other modality and are left out",
                len(all_cells) - len(found.left), len(all_cells), name,
            )  # fmt: skip
    order = np.argsort(rna[found.left].to_numpy(str), kind="stable")
    return found.left[order], found.right[order]


def _by_chance(rna: pd.Index, atac: pd.Index, found: Translation) -> InputError:
    examples = (", ".join(map(str, names[:2])) for names in (rna, atac))
    message = (
        "RNA and ATAC share only {} of {} and {} barcodes, as chance gives; RNA has {}, …; ATAC has {}, …"
    ).format(f"{len(found.left):,}", f"{len(rna):,}", f"{len(atac):,}", *examples)
    return InputError(
        message,
        hint="give two files of the same cells; if ATAC has barcodes of 10x Multiome's ATAC whitelist, translate them: "
        "the same line of the RNA whitelist 737K-arc-v1.txt.gz has the RNA barcode",
    )


def _nothing_shared(rna: pd.Index, atac: pd.Index) -> InputError:
    examples = (", ".join(map(str, names[:3])) for names in (rna, atac))
    message = "RNA and ATAC share no barcode: RNA has {}, …; ATAC has {}, …".format(*examples)
    hint = "give two files of the same cells"
    for pattern, what in (
        (r"[-_.]\d+$", "a suffix such as -1"),
        (r"^[^#]*#|^.*:|^[^-_]*_", "a prefix such as sample#"),
        (r"[-_][^-_]*$", "what follows the last - or _"),
    ):
        bare_rna, bare_atac = ({re.sub(pattern, "", str(name)) for name in names} for names in (rna, atac))
        n_same = len(bare_rna & bare_atac)
        if n_same > 0.5 * min(len(rna), len(atac)):
            hint = f"without {what} {n_same:,} barcodes agree: rename obs_names in one of the files"
            break
    return InputError(message, hint=hint)


@dataclass(frozen=True)
class Split:
    """Positions of the training, validation and test cells, each ascending."""

    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def groups_of(obs: pd.DataFrame, column: str | None) -> NDArray[np.object_] | None:
    """Return the group of each paired cell from a column of the RNA's `obs`, or else of the ATAC's; `None` of none.

    Raises
    ------
    InputError
        If neither has the column.
    """
    if column is None:
        return None
    for name in (f"{column}_rna", f"{column}_atac", column):
        if name in obs:
            groups: NDArray[np.object_] = obs[name].astype(str).to_numpy(object)
            return groups
    columns = sorted({name.rpartition("_")[0] for name in obs.columns})
    raise InputError(
        f"obs has no column {column!r} to split by", hint=f"it has {', '.join(columns) or 'none'}"
    )


def split_cells(n_cells: int, seed: int, groups: NDArray[np.object_] | None = None) -> Split:
    """Split cells 72 : 8 : 20.

    Validation cells come out of the training side, never out of the test side. The split depends on the order
    of the cells (sorted by barcode) and the seed alone.

    Parameters
    ----------
    n_cells
        Number of cells.
    seed
        Random seed of the draw.
    groups
        The group (donor, batch) of each cell; groups are kept whole, as near to the shares as they allow.
        Where only one is left to train on, validation cells are drawn from within it.

    Raises
    ------
    InputError
        If there are too few cells, or only one group.
    """
    if n_cells < 3:
        raise InputError(
            f"{n_cells} paired cells cannot be split into train, val and test",
            hint="keep them in one data set with --manually",
        )
    rng = np.random.default_rng(seed)
    cells = np.arange(n_cells)
    if groups is None:
        test = _draw(cells, TEST_SHARE, rng)
        rest = np.setdiff1d(cells, test)
        val = _draw(rest, VAL_SHARE, rng)
        return Split(np.setdiff1d(rest, val), val, test)
    test = _draw_groups(cells, groups, TEST_SHARE, rng)
    rest = np.setdiff1d(cells, test)
    if len(np.unique(groups[rest])) > 1:
        val = _draw_groups(rest, groups, VAL_SHARE, rng)
    else:
        logger.warning("only one group is left to train on; validation cells are taken from it too")
        val = _draw(rest, VAL_SHARE, rng)
    return Split(np.setdiff1d(rest, val), val, test)


def _draw(cells: NDArray[np.int64], share: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw a share of `cells`, at least one and not all."""
    n_drawn = min(max(1, round(share * len(cells))), len(cells) - 1)
    return np.sort(rng.choice(cells, n_drawn, replace=False))


def _draw_groups(
    cells: NDArray[np.int64], groups: NDArray[np.object_], share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw whole groups while each brings the number of cells nearer to the share; at least the smallest."""
    names, sizes = np.unique(groups[cells], return_counts=True)
    if len(names) < 2:
        raise InputError(
            f"all cells are in one group, {names[0]!r}",
            hint="split by a column with several values, or without",
        )
    target, taken = share * len(cells), 0
    drawn: list[str] = []
    for group in rng.permutation(len(names)):
        if abs(taken + sizes[group] - target) < abs(taken - target) and len(drawn) < len(names) - 1:
            drawn.append(names[group])
            taken += sizes[group]
    drawn = drawn or [names[np.argmin(sizes)]]
    return cells[np.isin(groups[cells], drawn)]
