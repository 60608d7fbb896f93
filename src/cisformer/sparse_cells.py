"""Simulated cells of shallow sequencing, as many as wanted: drawn and written block by block.

The model is that of `simulation`, but few of a cell's open cCREs are seen and few of its genes counted. So it pays
to draw first which cCREs fragments fall on, and to ask only there whether they are open; and to draw when a gene would
have its first count, and more counts only where that comes in time.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from cisformer.data.genome import region_names
from cisformer.data.h5ad import H5adWriter
from cisformer.errors import InputError
from cisformer.runtime.ahead import ahead
from cisformer.runtime.progress import progress
from cisformer.simulation import write_truth
from cisformer.tissue import CAPTURE, DISPERSION, Landscape, SimulationOptions, Tissue

BLOCK_CELLS = 4096
"""Cells drawn from one seed and written at once."""
PART_CELLS = 32
"""Cells of one type drawn at once; their numbers fit into the processor's cache."""
CELLS_OF_MEAN = 256
"""So many cells of a type tell the mean activity of its cCREs."""


def simulate_sparse(folder: str | Path, options: SimulationOptions, depth: float) -> Path:
    """Simulate shallow cells and write what `SimulatedCells.write` writes; return the folder.

    Memory does not grow with the number of cells, but for their annotation (about 0.5 kB a cell).

    Parameters
    ----------
    folder
        Where the files go.
    options
        As of `simulate`. The same options and depth give the same cells.
    depth
        Depth of sequencing of both modalities, as a share of that in `simulate`; above 0, at most 1.

    Raises
    ------
    InputError
        If the depth is out of range, or `simulate` would raise it.
    """
    if not 0 < depth <= 1:
        raise InputError(
            f"the depth is {depth}", hint="give a share of the usual depth, above 0 and at most 1"
        )
    folder = Path(folder)
    tissue = Tissue.draw(options, np.random.default_rng(options.seed))
    draw = _Sampler.of(tissue, depth, options.seed)
    genes, ccres, obs = tissue.genes, tissue.ccres, tissue.cells.obs
    var = {"rna": genes.set_index("gene_name"), "atac": ccres.set_index(region_names(ccres))}
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                H5adWriter(folder / f"{name}.h5ad", obs, table.rename_axis(None), compression="lzf")
            )
            for name, table in var.items()
        ]
        blocks = ahead(draw.block, range(0, options.n_cells, BLOCK_CELLS), os.cpu_count() or 1)
        for cells in progress(
            blocks, total=-(-options.n_cells // BLOCK_CELLS), desc="simulating", unit="blocks"
        ):
            for writer, block in zip(writers, cells, strict=True):
                writer.append(block)
    write_truth(folder, obs, tissue.truth_table(_mean_open(tissue)))
    return folder


def _mean_open(tissue: Tissue) -> np.ndarray:
    """Return the mean activity of each cCRE in the first cells of each type; [n_types, n_ccres]."""
    means = []
    for cell_type in range(len(tissue.cells.type_names)):
        members = np.flatnonzero(tissue.cells.type_of == cell_type)[:CELLS_OF_MEAN]
        means.append(tissue.landscape.open_probability(tissue.cells.programme[members]).mean(axis=0))
    return np.stack(means)


@dataclass(frozen=True)
class _Sampler:
    """Draws cells of a tissue at a depth.

    Attributes
    ----------
    tissue, depth, seed
        What is drawn from.
    landscape, linked
        That of all cCREs, and of those with links [L], in float32.
    place
        Place of each cCRE among the linked ones, -1 for others; [n_ccres].
    effects
        Effects of the links that work in each type; n_types x [n_genes, L].
    """

    tissue: Tissue
    depth: float
    seed: int
    landscape: Landscape
    linked: Landscape
    place: np.ndarray
    effects: list[sparse.csr_matrix]

    @classmethod
    def of(cls, tissue: Tissue, depth: float, seed: int) -> _Sampler:
        linked = np.unique(tissue.links.ccre)
        place = np.full(len(tissue.ccres), -1, np.int32)
        place[linked] = np.arange(len(linked), dtype=np.int32)
        types = range(len(tissue.cells.type_names))
        effects = [sparse.csr_matrix(tissue.link_matrix(number)[linked].T) for number in types]
        landscape = tissue.landscape.of_ccres(slice(None))
        return cls(tissue, depth, seed, landscape, landscape.of_ccres(linked), place, effects)

    def block(self, start: int) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        """Return counts and seen cCREs of the block of cells that begins with `start`, from a seed of its own."""
        rng = np.random.Generator(np.random.SFC64([self.seed, start]))
        rows = np.arange(start, min(start + BLOCK_CELLS, len(self.tissue.cells.type_of)))
        type_of = self.tissue.cells.type_of[rows]
        parts = [
            (part, *self._of_type(rows[part], cell_type, rng))
            for cell_type in np.unique(type_of)
            for part in _parts(np.flatnonzero(type_of == cell_type))
        ]
        order, counts, seen = zip(*parts, strict=True)
        back = np.argsort(np.concatenate(order))
        return sparse.vstack(counts, "csr")[back], sparse.vstack(seen, "csr")[back]

    def _of_type(
        self, rows: np.ndarray, cell_type: int, rng: np.random.Generator
    ) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
        cells, linked = self.tissue.cells, self.linked
        programme = cells.programme[rows].astype(np.float32)
        activity = _logistic(linked.ccre_loadings @ programme.T, linked.ccre_base)
        is_open = rng.random(activity.shape, dtype=np.float32) < activity
        activity *= np.float32(1 - self.tissue.snapshot_share)
        np.add(activity, np.float32(self.tissue.snapshot_share), out=activity, where=is_open)
        log_rate = linked.gene_loadings @ programme.T + linked.gene_base[:, None]
        log_rate += self.effects[cell_type] @ activity
        rate = np.exp(np.minimum(log_rate, 6)) * (self.depth * cells.rna_depth[rows]).astype(np.float32)
        return _counts(rate, rng), self._seen(rows, programme, is_open, rng)

    def _seen(
        self, rows: np.ndarray, programme: np.ndarray, is_open: np.ndarray, rng: np.random.Generator
    ) -> sparse.csr_matrix:
        """Return which open cCREs a fragment falls on; `is_open` says it of linked ones, [L, n]."""
        landscape, n_ccres = self.landscape, len(self.place)
        cell, ccre = _fragments(self.depth * CAPTURE * self.tissue.cells.atac_depth[rows], n_ccres, rng)
        place = self.place.take(ccre)  # take: three times as fast as brackets
        linked, other = np.flatnonzero(place >= 0), np.flatnonzero(place < 0)
        seen = np.empty(len(place), bool)
        seen[linked] = is_open.ravel().take(place.take(linked) * len(rows) + cell.take(linked))
        near, in_cell = ccre.take(other), cell.take(other)
        loadings, programmes = landscape.ccre_loadings.take(near, axis=0), programme.take(in_cell, axis=0)
        chance = _logistic(np.einsum("fk,fk->f", loadings, programmes), landscape.ccre_base.take(near))
        seen[other] = rng.random(len(chance), dtype=np.float32) < chance
        found = np.flatnonzero(seen)
        indptr = np.concatenate([[0], np.cumsum(np.bincount(cell.take(found), minlength=len(rows)))])
        ones = np.ones(len(found), np.float32)
        return sparse.csr_matrix((ones, ccre.take(found), indptr), shape=(len(rows), n_ccres))


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + PART_CELLS] for start in range(0, len(rows), PART_CELLS)]


def _logistic(log_odds: np.ndarray, base: np.ndarray) -> np.ndarray:
    """Return probabilities; `log_odds` [n] or [n, cells] is overwritten."""
    log_odds += base.reshape(-1, *[1] * (log_odds.ndim - 1))
    np.exp(np.negative(log_odds, out=log_odds), out=log_odds)
    log_odds += 1
    np.reciprocal(log_odds, out=log_odds)
    return log_odds


def _counts(rate: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Draw gamma-Poisson counts of given means [n_genes, n]; return them as [n, n_genes].

    With gamma noise of shape r, no count comes before time s with probability (1 + s / r)^-r. After a first one at s,
    the noise has shape r + 1 and rate r + s, and others come at that rate until the time `rate`.
    """
    r = 1 / DISPERSION
    chance = 1 - rng.random(rate.shape, dtype=np.float32)
    first = (chance ** np.float32(-1 / r) - 1) * np.float32(r)
    early = np.flatnonzero(first < rate)
    gene, cell = np.divmod(early, rate.shape[1])
    first, rate = first.take(early), rate.take(early)
    noise = rng.standard_gamma(r + 1, len(first)) / (r + first)
    counts = 1 + rng.poisson(noise * (rate - first))
    return sparse.csr_matrix((counts.astype(np.float32), (cell, gene)), shape=chance.shape[::-1])


def _fragments(rate: np.ndarray, n_ccres: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw on which cCREs at least one fragment falls, `rate[i]` a cCRE in cell i; return cells and cCREs, sorted.

    Cells are laid end to end on a line on which fragments fall one after the other.
    """
    end = n_ccres * np.cumsum(rate)
    most = int(end[-1] + 10 * np.sqrt(end[-1]) + 50)  # 10 standard deviations above what comes
    at = np.cumsum(rng.standard_exponential(most, dtype=np.float32), dtype=np.float64)
    last = np.searchsorted(at, end)
    cell = np.repeat(np.arange(len(rate), dtype=np.int32), np.diff(last, prepend=0))
    ccre = ((at[: last[-1]] - (end - n_ccres * rate).take(cell)) / rate.take(cell)).astype(np.int32)
    ccre = np.clip(ccre, 0, n_ccres - 1)
    new = np.append(True, (np.diff(ccre) != 0) | (np.diff(cell) != 0))[: len(ccre)]
    return cell.compress(new), ccre.compress(new)
