"""Links that differ between two cell types or two conditions, with donors as replicates."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.analysis.candidates import PlacedPairs, place_pairs, read_candidates
from cisformer.analysis.coupling import (
    Block,
    UnitSums,
    accessibility_explains,
    common_ratio,
    dispersion,
    open_dispersion,
    ratio_variance,
    sum_unit,
)
from cisformer.analysis.groups import Comparison, choose_comparisons
from cisformer.analysis.moderated import Difference, compare_cells, compare_donors, compare_pairs
from cisformer.analysis.volcano import draw_volcano
from cisformer.data.batches import row_blocks
from cisformer.data.genome import region_names
from cisformer.data.store import CellStore
from cisformer.errors import InputError
from cisformer.links.files import check_cell_types, read_cell_types
from cisformer.links.formats import text_writer
from cisformer.links.inputs import choose_cells, design_of
from cisformer.links.statistics import false_discovery_rate
from cisformer.runtime.files import atomic_folder, refuse_existing
from cisformer.runtime.progress import progress
from cisformer.runtime.provenance import provenance

logger = logging.getLogger(__name__)
FORMAT, FORMAT_VERSION = "cisformer-contrast", 1
TABLE, FIGURE, REPORT = "contrast.tsv.gz", "volcano.png", "report.json"
BLOCK_CELLS = 256
FEWEST_EXPECTED = 5.0
"""A pair is tested if at least so many cells of each group are expected to have both: fewer are not normal."""
FEWEST_OF_DONOR = 0.5
"""The same of a donor that counts for a pair."""
FEWEST_PAIRED = 3
PER_CELL = 1e4


@dataclass(frozen=True)
class ContrastOptions:
    """What is compared; checks itself.

    Attributes
    ----------
    groups
        A and B: two cell types, or two values of `condition`.
    condition
        Column of `cell_info` whose values are compared within each cell type; `None` to compare cell types.
    donor
        Column of `cell_info` that names donors; `None` to take cells as replicates.
    covariates
        Columns to adjust expression for, beside depths.
    cell_types
        With `condition`, the types to compare in; all where empty.
    min_score
        Smallest score of a link to compare.
    """

    groups: tuple[str, str]
    condition: str | None = None
    donor: str | None = None
    covariates: tuple[str, ...] = ()
    cell_types: tuple[str, ...] = ()
    min_score: float = 0.1

    def __post_init__(self) -> None:
        if len(self.groups) != 2 or self.groups[0] == self.groups[1]:
            raise InputError(
                f"groups to compare are {' and '.join(map(repr, self.groups))}",
                hint="give two different ones",
            )
        columns = [name for name in (self.condition, self.donor, *self.covariates) if name is not None]
        twice = next((name for name in columns if columns.count(name) > 1), None)
        if twice is not None:
            raise InputError(
                f"column {twice!r} is named twice, as condition, donor or covariate", hint="name it once"
            )
        if self.cell_types and self.condition is None:
            raise InputError(
                "without --condition, cell types are chosen by --groups",
                hint="leave --cell_type out, or add --condition",
            )


@dataclass(frozen=True)
class LinkContrast:
    """Links compared between two groups.

    Attributes
    ----------
    table
        One row per link, and cell type where conditions were compared; see `docs/formats.md`.
    options
        What was compared.
    report
        What was found, and from how many cells and donors.
    """

    table: pd.DataFrame
    options: ContrastOptions
    report: dict[str, object]

    def describe(self, fdr: float = 0.05) -> str:
        """Return the result in a few lines."""
        a, b = self.options.groups
        lines = []
        tested = self.table[self.table["p_value"].notna()]
        for name, part in tested.groupby("cell_type", sort=False):
            sure = part[part["fdr"] < fdr]
            place = f"{name}: " if name else ""
            lines.append(
                f"{place}{len(part):,} links tested, {len(sure):,} differ (FDR below {fdr:g}): "
                f"{(sure['effect'] > 0).sum():,} stronger in {a}, {(sure['effect'] < 0).sum():,} in {b}"
            )
            if explained := int(sure["accessibility_explains"].sum()):
                lines[-1] += f"; {explained:,} of them may differ in the cCRE's accessibility alone"
        untested = [name for name in self.table["cell_type"].unique() if name not in set(tested["cell_type"])]
        if untested:
            lines.append(f"too few cells to test a link: {', '.join(untested)}")
        return "\n".join(lines)

    def write(self, folder: str | Path, *, force: bool = False) -> list[Path]:
        """Write `contrast.tsv.gz`, `volcano.png` and `report.json` into a folder; return their paths."""
        folder = Path(folder)
        refuse_existing(folder, force=force)
        with atomic_folder(folder, force=force) as temporary:
            with text_writer(temporary / TABLE) as handle:
                self.table.to_csv(handle, sep="\t", index=False, float_format="%.5g")
            draw_volcano(self.table, self.options.groups, temporary / FIGURE)
            about = {"format": FORMAT, "format_version": FORMAT_VERSION, **provenance(**self.report)}
            (temporary / REPORT).write_text(
                json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        return [folder / name for name in (TABLE, FIGURE, REPORT)]


def compare_links(
    links: str | Path,
    data: CellStore | str | Path,
    cell_types: pd.Series | str | Path,
    groups: Sequence[str],
    *,
    condition: str | None = None,
    donor: str | None = None,
    covariates: Sequence[str] = (),
    only: Sequence[str] = (),
    min_score: float = 0.1,
) -> LinkContrast:
    """Find links that differ between two cell types, or between two conditions within each cell type.

    A link's strength in a group of cells is its coupling: how far the gene's expression in cells with an open cCRE is
    above the group's mean, as a fraction of it, after depth is accounted for. Neither depth nor the gene's mean
    expression changes it.

    Parameters
    ----------
    links
        Links to compare: the `cisformer_link` folder, its table, or a table of another tool with gene and cCRE.
    data
        Preprocessed cells: a store, or its path.
    cell_types
        Cell type by barcode (a Series indexed by barcode), or a two-column table without header.
    groups
        A and B: two cell types, or two values of the column `condition`.
    condition
        Column of the store's `cell_info` whose two values are compared within each cell type.
    donor
        Column with the donor of each cell. Donors are then the replicates, at least two in each group; if three or
        more have cells in both groups, the comparison is paired within donors. Without it cells are replicates.
    covariates
        Columns to adjust expression for, in addition to the depths of RNA and ATAC.
    only
        With `condition`, the cell types to compare in; by default all.
    min_score
        Smallest score of a link to compare, if links have a score.

    Returns
    -------
    LinkContrast
        Effect (coupling in A minus that in B), its standard error, p-value and FDR of each link.

    Raises
    ------
    InputError
        If a group, column or type is not there, donors are too few, or cells are too few to test any link.
    """
    first, second = (str(name) for name in groups) if len(groups) == 2 else ("", "")
    options = ContrastOptions((first, second), condition, donor, tuple(covariates), tuple(only), min_score)
    store = data if isinstance(data, CellStore) else CellStore.open(data)
    if isinstance(cell_types, str | Path):
        types, source = read_cell_types(cell_types), str(cell_types)
    else:
        types, source = check_cell_types(cell_types, "cell_types"), "cell_types"
    members = choose_cells(store.barcodes, types, source, None, 0)
    comparisons = choose_comparisons(store, members, options.groups, condition, donor, options.cell_types)
    if donor is None:
        logger.warning(
            "cells are taken as replicates: differences between single donors count as differences between the groups. "
            "If there are several donors, name their column with --donor"
        )
    wanted = sorted({name for one in comparisons for name in one.links_of})
    candidates = read_candidates(links, min_score=min_score, cell_types=wanted)
    design = design_of(store, options.covariates)
    parts = [_compare(one, candidates, store, design) for one in _with_links(comparisons, candidates)]
    table = pd.concat([part for part, _ in parts], ignore_index=True)
    if table["p_value"].isna().all():
        sizes = "; ".join(one.describe() for one in comparisons)
        raise InputError(
            f"no link can be tested ({sizes}): at least {FEWEST_EXPECTED:g} cells of each group must be expected to "
            "express the gene with the cCRE open",
            hint="compare larger groups, or lower --min_score",
        )
    report: dict[str, object] = {
        "links": str(links), "data": str(store.path), "options": asdict(options),
        "reference_fingerprint": store.reference.fingerprint, "comparisons": [about for _, about in parts],
    }  # fmt: skip
    return LinkContrast(table, options, report)


def _with_links(comparisons: list[Comparison], candidates: pd.DataFrame) -> list[Comparison]:
    """Leave out comparisons of cell types that have no links; `InputError` where none stays."""
    named = set(candidates["cell_type"]) - {""}
    kept = [one for one in comparisons if not named or named & set(one.links_of)]
    lost = [name for one in comparisons if one not in kept for name in one.links_of]
    if not kept:
        raise InputError(
            f"the links have no cell type {' or '.join(map(repr, lost))}",
            hint=f"they are of: {', '.join(sorted(named)[:10])}",
        )
    if lost:
        logger.warning("no links of %s: left out", ", ".join(map(repr, lost)))
    return kept


def _compare(
    one: Comparison, candidates: pd.DataFrame, store: CellStore, design: np.ndarray
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Compare the links of one cell type, or of two types; return their table, and what is to be reported."""
    placed = place_pairs(candidates, store.reference, one.links_of)
    units, mean_total = read_units(one, placed, store, design)
    found = compare_units(units, one, placed)
    n_tested = int((~np.isnan(found.p_value)).sum())
    if one.has_donors and n_tested:
        logger.info(
            "%s: estimates vary between donors %.2f times as much as the sampling of cells explains",
            one.describe(), found.spread,
        )  # fmt: skip
    about: dict[str, object] = {
        "cell_type": one.cell_type, "n_cells": one.n_cells, "n_donors": one.n_donors if one.has_donors else None,
        "paired": one.paired, "n_tested": n_tested, "donor_spread": found.spread,
        "prior_df": found.prior_df if np.isfinite(found.prior_df) else None,
    }  # fmt: skip
    table = _table(one, placed, store, units, found)
    for letter in "ab":
        table[f"expression_{letter}"] /= mean_total / PER_CELL
    return table, about


def read_units(
    one: Comparison, placed: PlacedPairs, store: CellStore, design: np.ndarray
) -> tuple[list[UnitSums], float]:
    """Read the cells of each unit, in blocks: once for depths, once for sums; return the mean total, too."""
    rows = np.concatenate([unit.rows for unit in one.units])
    depths = [
        np.column_stack([np.asarray(read(part).sum(axis=1)).ravel() for read in (store.rna, store.atac)])
        for part in row_blocks(rows, BLOCK_CELLS)
    ]
    depth = np.zeros((store.n_cells, 2))
    depth[rows] = np.concatenate(depths)
    mean_total = max(float(depth[rows, 0].mean()), 1e-12)
    size = depth[:, 0] / mean_total
    covariates = np.column_stack([np.log1p(depth), design])
    covariates -= covariates[rows].mean(axis=0)
    shape = len(placed.genes), len(placed.ccres)

    def blocks(members: np.ndarray) -> Iterator[Block]:
        for part in row_blocks(members, BLOCK_CELLS):
            rna, atac = store.rna(part)[:, placed.genes], store.atac(part)[:, placed.ccres]
            yield size[part], rna, atac, covariates[part]

    label = one.cell_type or " and ".join(one.groups)
    bar = progress(one.units, total=len(one.units), desc=f"comparing {label}", unit="units")
    return [sum_unit(blocks(unit.rows), placed.pairs, shape) for unit in bar], mean_total


def compare_units(units: Sequence[UnitSums], one: Comparison, placed: PlacedPairs) -> Difference:
    """Test each pair for a difference of its M between the groups."""
    pairs = placed.pairs
    ratio, phi = common_ratio(units), dispersion(units)
    expected = np.stack([np.maximum(unit.expected, 0) for unit in units])
    observed = np.stack([unit.observed for unit in units])
    estimate = np.divide(observed, expected, out=np.full(expected.shape, np.nan), where=expected > 0)
    open_phi = open_dispersion(units, pairs, ratio, phi)
    variance = np.stack([ratio_variance(unit, pairs, ratio, phi, open_phi) for unit in units])
    both = np.stack([unit.cells_with_both(pairs) for unit in units])
    in_a = np.array([unit.group == 0 for unit in one.units])
    tested = (both[in_a].sum(axis=0) >= FEWEST_EXPECTED) & (both[~in_a].sum(axis=0) >= FEWEST_EXPECTED)
    if not one.has_donors:
        return compare_cells(estimate, variance, tested & np.isfinite(variance).all(axis=0))
    variance = np.where(both >= FEWEST_OF_DONOR, variance, np.inf)
    if one.paired:
        return compare_pairs(estimate, variance, in_a, tested, FEWEST_PAIRED)
    return compare_donors(estimate, variance, in_a, tested)


def _table(
    one: Comparison, placed: PlacedPairs, store: CellStore, units: Sequence[UnitSums], found: Difference
) -> pd.DataFrame:
    reference, pairs = store.reference, placed.pairs
    genes = reference.genes.iloc[placed.genes[pairs.gene]]
    columns: dict[str, object] = {
        "gene_id": genes["gene_id"].to_numpy(),
        "gene_name": genes["gene_name"].to_numpy(),
        "ccre": region_names(reference.ccres.iloc[placed.ccres[pairs.ccre]]),
        "distance": pairs.distance,
        "cell_type": one.cell_type,
        "group_a": one.groups[0],
        "group_b": one.groups[1],
        "effect": found.effect,
        "effect_se": found.error,
        "p_value": found.p_value,
        "fdr": false_discovery_rate(found.p_value),
        "coupling_a": found.mean_a - 1,
        "coupling_b": found.mean_b - 1,
    }
    for number, letter in enumerate("ab"):
        mine = [sums for sums, unit in zip(units, one.units, strict=True) if unit.group == number]
        n_cells = sum(sums.n_cells for sums in mine)
        size = max(sum(sums.size for sums in mine), 1e-12)
        columns[f"open_{letter}"] = np.sum([sums.n_open for sums in mine], axis=0)[pairs.ccre] / n_cells
        columns[f"expression_{letter}"] = np.sum([sums.counts for sums in mine], axis=0)[pairs.gene] / size
        if one.has_donors:
            columns[f"n_donors_{letter}"] = (found.n_a, found.n_b)[number]
    table = pd.DataFrame(columns)
    means, opened = (found.mean_a, found.mean_b), (table["open_a"].to_numpy(), table["open_b"].to_numpy())
    table["accessibility_explains"] = accessibility_explains(means, found.error, opened)
    return table
