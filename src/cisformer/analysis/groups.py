"""The cells of two groups to compare, and their donors."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cisformer.data.store import CellStore
from cisformer.errors import InputError
from cisformer.links.inputs import find_column

logger = logging.getLogger(__name__)
FEWEST_DONORS, FEWEST_SHARED = 2, 3
"""Donors in each group; donors in both groups that make a paired comparison."""


@dataclass(frozen=True)
class Unit:
    """Cells that are one replicate: of a group, or of a donor in a group.

    Attributes
    ----------
    group
        0 for A, 1 for B.
    donor
        Its name; "" where cells are the replicates.
    rows
        Ascending rows of its cells in the store.
    """

    group: int
    donor: str
    rows: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Two groups of cells.

    Attributes
    ----------
    cell_type
        Within which conditions are compared; "" where the groups are cell types.
    groups
        Names of A and B.
    links_of
        Cell types whose links are compared.
    units
        Their cells: those of A, then those of B; of the same donors in the same order where `paired`.
    paired
        Whether donors are compared with themselves.
    """

    cell_type: str
    groups: tuple[str, str]
    links_of: tuple[str, ...]
    units: tuple[Unit, ...]
    paired: bool

    @property
    def has_donors(self) -> bool:
        """Whether donors are the replicates."""
        return any(unit.donor for unit in self.units)

    @property
    def n_cells(self) -> list[int]:
        """Number of cells of A and of B."""
        return [sum(len(unit.rows) for unit in self.units if unit.group == group) for group in (0, 1)]

    @property
    def n_donors(self) -> list[int]:
        """Number of units of A and of B."""
        return [sum(unit.group == group for unit in self.units) for group in (0, 1)]

    def describe(self) -> str:
        """Return names and sizes, in a line."""
        sizes = [f"{n:,} cells" for n in self.n_cells]
        if self.has_donors:
            sizes = [f"{n} of {d} donors" for n, d in zip(sizes, self.n_donors, strict=True)]
        pair = " and ".join(f"{name} {size}" for name, size in zip(self.groups, sizes, strict=True))
        return f"{self.cell_type}, {pair}" if self.cell_type else pair


def choose_comparisons(
    store: CellStore,
    members: Mapping[str, np.ndarray],
    groups: tuple[str, str],
    condition: str | None,
    donor: str | None,
    cell_types: Sequence[str],
) -> list[Comparison]:
    """Return what there is to compare: the two types, or the two conditions within each type that has both.

    Parameters
    ----------
    store
        Preprocessed cells, with `cell_info`.
    members
        Cell type → ascending rows of its cells.
    groups, condition, donor, cell_types
        See `ContrastOptions`.

    Raises
    ------
    InputError
        If a group, type or column is unknown, has no cells, or too few donors.
    """
    donors = None if donor is None else texts_of(store, donor)
    if condition is None:
        return [_between_types(members, groups, donors, donor)]
    values = texts_of(store, condition)
    if gaps := int((values == "").sum()):
        logger.warning("%d of %d cells have no value in column %r: left out", gaps, len(values), condition)
    for name in groups:
        if not (values == name).any():
            raise _unknown("condition", name, values[values != ""], f"the column {condition!r}")
    for name in cell_types:
        if name not in members:
            raise _unknown("cell type", name, members, "the cell types")
    found, complaint = [], None
    for name in cell_types or members:
        rows = tuple(members[name][values[members[name]] == group] for group in groups)
        if not all(map(len, rows)):
            logger.warning("cell type %r has no cells of %s", name, " and ".join(
                repr(group) for group, own in zip(groups, rows, strict=True) if not len(own)))  # fmt: skip
            continue
        try:
            found.append(_comparison(name, groups, (name,), rows, donors, donor))
        except InputError as error:
            complaint = error
            logger.warning("cell type %r is left out: %s", name, error.message)
    if not found:
        raise complaint or InputError(
            f"no cell type has cells of both {groups[0]!r} and {groups[1]!r}", hint="name other groups"
        )
    return found


def _between_types(
    members: Mapping[str, np.ndarray], groups: tuple[str, str], donors: np.ndarray | None, donor: str | None
) -> Comparison:
    for name in groups:
        if name not in members:
            raise _unknown("cell type", name, members, "the cell types")
        if len(members[name]) == 0:
            raise InputError(
                f"cell type {name!r} has no cells in this data", hint="name another, or give its cells"
            )
    return _comparison("", groups, groups, (members[groups[0]], members[groups[1]]), donors, donor)


def _unknown(what: str, name: str, known: object, where: str) -> InputError:
    names = ", ".join(sorted(map(str, pd.unique(pd.Series(list(known), dtype=object))))[:10])  # type: ignore[call-overload]
    return InputError(f"there is no {what} {name!r} in {where}", hint=f"there are: {names or 'none'}")


def _comparison(
    cell_type: str,
    groups: tuple[str, str],
    links_of: tuple[str, ...],
    rows: tuple[np.ndarray, ...],
    donors: np.ndarray | None,
    column: str | None,
) -> Comparison:
    if donors is None:
        units = tuple(Unit(number, "", own) for number, own in enumerate(rows))
        return Comparison(cell_type, groups, links_of, units, False)
    gaps = sum(int((donors[own] == "").sum()) for own in rows)
    if gaps:
        raise InputError(
            f"column {column!r} has no value for {gaps} of {sum(map(len, rows))} cells of these groups",
            hint="fill it in, or drop these cells",
        )
    place = f"cell type {cell_type!r}: " if cell_type else ""
    names = [sorted(set(donors[own])) for own in rows]
    shared = sorted(set(names[0]) & set(names[1]))
    paired = len(shared) >= FEWEST_SHARED
    if paired:
        if lost := sorted(set(names[0]) ^ set(names[1])):
            logger.warning("%sdonors with cells of one group only are left out: %s", place, ", ".join(lost))
        names = [shared, shared]
    elif min(map(len, names)) < FEWEST_DONORS:
        have = " and ".join(f"{group!r} has {len(own)} ({', '.join(own[:3])})"
                            for group, own in zip(groups, names, strict=True))  # fmt: skip
        raise InputError(
            f"donors as replicates need {FEWEST_DONORS} in each group: {have}",
            hint="without --donor cells are the replicates; then a link of one donor only counts as a difference",
        )
    elif shared:
        logger.warning(
            "%s%s in both groups: too few for a paired test (%d), so they count as different donors", place,
            ", ".join(shared), FEWEST_SHARED,
        )  # fmt: skip
    units = tuple(
        Unit(number, name, own[donors[own] == name])
        for number, own in enumerate(rows)
        for name in names[number]
    )
    return Comparison(cell_type, groups, links_of, units, paired)


def texts_of(store: CellStore, name: str) -> np.ndarray:
    """Return a column of `cell_info` as text, "" where it has no value; whole numbers as they are written: ``1``.

    Raises
    ------
    InputError
        If there is no such column.
    """
    column = find_column(store, name)
    known = column.notna().to_numpy()
    if pd.api.types.is_float_dtype(column) and (column[known] % 1 == 0).all():
        column = column.astype("Int64")
    texts = column.astype(str).str.strip().to_numpy(dtype=object)
    return np.where(known, texts, "")
