"""What the cells say of pairs of genes and cCREs, in three passes that read each cell once each.

1. `read_cells`: states, depths and counts of each type.
2. `read_tests`: what expression and accessibility share from cell to cell: over all cells beyond state, type and
   depth (coupling), within each type beyond depth, and between donors where these are the replicates.
3. `read_attention`, type by type: attention and effects of the model.

Only sums over cells are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from scipy import stats

from cisformer.data.batches import Layout, encode_input, normalise_rna, row_blocks
from cisformer.data.store import CellStore
from cisformer.links.evidence import AttentionSums, WholeAttentionSums, places_in_window
from cisformer.links.inputs import FEWEST_DONORS
from cisformer.links.statistics import PairProducts, Pairs, PartialCorrelation, orthonormal
from cisformer.model.cis import CisModel
from cisformer.model.documented_task import FullTask
from cisformer.runtime.progress import progress

BATCH_CELLS, BLOCK_CELLS = 16, 256
"""Cells that the model takes at once, and that sums do."""


@dataclass(frozen=True)
class LinkInputs:
    """A model, the cells of each type, and the pairs to score; features are numbered as the model knows them.

    Attributes
    ----------
    model, attending
        The model of states and effects; a network of architecture full whose attention is read, if there is one.
    store
        Preprocessed cells.
    members
        Cell type → ascending rows of its cells; may be empty.
    pairs
        Genes and the cCREs in their windows.
    covariates
        Columns to adjust for; [n_cells of the store, k].
    donor
        Donor of each cell of the store as a number; `None` where cells are the replicates.
    device
        Where the model is.
    """

    model: CisModel
    attending: FullTask | None
    store: CellStore
    members: dict[str, np.ndarray]
    pairs: Pairs
    covariates: np.ndarray
    donor: np.ndarray | None
    device: torch.device

    @property
    def layout(self) -> Layout:
        """Which features of the reference the model knows."""
        return self.model.layout

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of genes and cCREs."""
        return len(self.layout.target_index), len(self.layout.input_index)

    @cached_property
    def window_pair(self) -> np.ndarray:
        """The number of each pair among those that the model attends to, or −1; int64 [E]."""
        return places_in_window(self.model, self.pairs)

    def blocks(
        self, rows: np.ndarray, size: int
    ) -> Iterator[tuple[np.ndarray, sp.csr_matrix, sp.csr_matrix]]:
        """Yield blocks of cells: their rows, counts and open cCREs, of the whole reference."""
        for part in row_blocks(rows, size):
            yield part, self.store.rna(part), self.store.atac(part)


@dataclass(frozen=True)
class CellSums:
    """What the first pass finds; types in the order of `LinkInputs.members`, those without cells left out.

    Attributes
    ----------
    types
        Names of the types.
    n_cells
        Of each type; [T].
    states, depths
        White states [n, K] and log depths of RNA and ATAC [n, 2] of all cells, type after type.
    counts, n_expressed
        Counts of each gene, and cells that express it; [T, G].
    n_open
        Cells in which each cCRE is open; [T, P].
    """

    types: list[str]
    n_cells: np.ndarray
    states: np.ndarray
    depths: np.ndarray
    counts: np.ndarray
    n_expressed: np.ndarray
    n_open: np.ndarray

    def of_type(self, number: int) -> slice:
        """Return where the cells of a type stand."""
        start = int(self.n_cells[:number].sum())
        return slice(start, start + int(self.n_cells[number]))


@dataclass(frozen=True)
class PairTests:
    """What the second pass finds.

    Attributes
    ----------
    coupling
        z of each pair over all cells, 0 for pairs too rare to test; [E].
    within
        z within each type, NaN for pairs too rare to test; float32 [T, E].
    p_value
        Of the test within each type, over cells or donors; NaN where untested; float32 [T, E].
    """

    coupling: np.ndarray
    within: np.ndarray
    p_value: np.ndarray


def read_cells(inputs: LinkInputs) -> CellSums:
    """Make the first pass."""
    members = {name: rows for name, rows in inputs.members.items() if len(rows)}
    n_genes, n_ccres = inputs.shape
    counts, expressed = (np.zeros((len(members), n_genes)) for _ in range(2))
    n_open = np.zeros((len(members), n_ccres))
    states, depths = [], []
    for number, rows in enumerate(members.values()):
        for _, rna, atac in inputs.blocks(rows, BLOCK_CELLS):
            batch = encode_input(atac, inputs.layout, None, None).to(inputs.device)
            states.append(inputs.model.cell_states(batch).double().cpu().numpy())
            totals = [np.asarray(matrix.sum(axis=1)).reshape(-1, 1) for matrix in (rna, atac)]
            depths.append(np.log1p(np.hstack(totals)))
            known = rna[:, inputs.layout.target_index]
            counts[number] += np.asarray(known.sum(axis=0)).ravel()
            expressed[number] += np.bincount(known.indices, minlength=n_genes)
            n_open[number] += np.bincount(atac[:, inputs.layout.input_index].indices, minlength=n_ccres)
    n_cells = np.array([len(rows) for rows in members.values()], dtype=np.int64)
    return CellSums(
        list(members), n_cells, np.concatenate(states), np.concatenate(depths), counts, expressed, n_open
    )


def read_tests(inputs: LinkInputs, cells: CellSums) -> PairTests:
    """Make the second pass."""
    rows = np.concatenate([inputs.members[name] for name in cells.types])
    which = np.repeat(np.eye(len(cells.types)), cells.n_cells, axis=0)
    basis = orthonormal(cells.depths, inputs.covariates[rows], which, cells.states)
    coupling = PartialCorrelation(inputs.pairs, basis, inputs.shape)
    products = PairProducts(inputs.pairs, inputs.shape[1])
    within = np.full((len(cells.types), len(inputs.pairs)), np.nan, np.float32)
    p_value = within.copy()
    for number, name in enumerate(cells.types):
        members = inputs.members[name]
        test = _TypeTest(inputs, members, cells.depths[cells.of_type(number)])
        blocks = inputs.blocks(members, BLOCK_CELLS)
        total = -(-len(members) // BLOCK_CELLS)
        for part, rna, atac in progress(blocks, total=total, desc=f"tests of {name}", unit="blocks"):
            known = normalise_rna(rna)[:, inputs.layout.target_index]
            open_ = atac[:, inputs.layout.input_index]
            both = products.of(known, open_)
            coupling.add(known, open_, both)
            test.add(part, known, open_, both)
        within[number], p_value[number] = test.result()
    return PairTests(coupling.z(), within, p_value)


class _TypeTest:
    """Tests of one type: over its cells, and over its donors where these are known."""

    def __init__(self, inputs: LinkInputs, rows: np.ndarray, depths: np.ndarray) -> None:
        self.inputs = inputs
        self.cells = PartialCorrelation(
            inputs.pairs, orthonormal(depths, inputs.covariates[rows]), inputs.shape
        )
        self.donors: dict[int, PartialCorrelation] = {}
        if inputs.donor is not None:
            self.by_donor = PairProducts(inputs.pairs, inputs.shape[1])
            for donor in np.unique(inputs.donor[rows]):
                own = inputs.donor[rows] == donor
                basis = orthonormal(depths[own], inputs.covariates[rows[own]])
                self.donors[int(donor)] = PartialCorrelation(inputs.pairs, basis, inputs.shape)

    def add(
        self, rows: np.ndarray, rna: sp.csr_matrix, atac: sp.csr_matrix, both: tuple[np.ndarray, np.ndarray]
    ) -> None:
        self.cells.add(rna, atac, both)
        if self.inputs.donor is not None:
            donor = self.inputs.donor[rows]
            for number in np.unique(donor):
                own = np.flatnonzero(donor == number)
                self.donors[int(number)].add(rna[own], atac[own], self.by_donor.of(rna[own], atac[own]))

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return z over cells, and the p-value over cells or donors; NaN where untested. [E] each."""
        z = np.where(self.cells.tested, self.cells.z(), np.nan)
        if self.inputs.donor is None:
            return z, self.cells.p_value()
        return z, donor_p_value(np.stack([np.where(t.tested, t.z(), np.nan) for t in self.donors.values()]))


def donor_p_value(z: np.ndarray) -> np.ndarray:
    """Return p-values of a t-test over donors: is the mean z of a pair 0?

    Parameters
    ----------
    z
        Standard normal scores of each donor, NaN where a donor has too few cells; [D, E].

    Returns
    -------
    Float64 [E], two-sided; NaN with fewer than `FEWEST_DONORS` donors.
    """
    known = ~np.isnan(z)
    n_donors = known.sum(axis=0)
    tested = n_donors >= FEWEST_DONORS
    p = np.full(z.shape[1], np.nan)
    if tested.any():
        mean = np.where(known, z, 0).sum(axis=0)[tested] / n_donors[tested]
        squares = np.square(np.where(known, z, 0)).sum(axis=0)[tested] - n_donors[tested] * mean**2
        error = np.sqrt(np.maximum(squares, 1e-12) / (n_donors[tested] - 1) / n_donors[tested])
        p[tested] = 2 * stats.t.sf(np.abs(mean) / error, n_donors[tested] - 1)
    return p


def read_attention(inputs: LinkInputs, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Make the third pass over the cells of one type; return sums of attention and of effects, [E] each.

    NaN for pairs that the model does not look at.
    """
    attended: AttentionSums | WholeAttentionSums = AttentionSums(inputs.model, inputs.window_pair)
    if inputs.attending is not None:
        attended = WholeAttentionSums(inputs.attending.to(inputs.device), inputs.pairs)
    rows = inputs.members[name]
    total = -(-len(rows) // BATCH_CELLS)
    for part in progress(row_blocks(rows, BATCH_CELLS), total=total, desc=f"links of {name}", unit="batches"):
        attended.add(encode_input(inputs.store.atac(part), inputs.layout, None, None).to(inputs.device))
    return attended.sums()
