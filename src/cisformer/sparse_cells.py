"""Simulated cells of shallow sequencing, as many as wanted: drawn and written block by block.

The model is that of `simulation`, but few of a cell's open cCREs are seen and few of its genes counted. So it pays
to draw first which cCREs fragments fall on, and when a gene would have its first count. What the gene's rate is, and
more counts, is asked only where that comes in time for a gene whose cCREs are all open; whether a cCRE is open only
where a fragment falls on it, or such a gene depends on it.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse
from threadpoolctl import threadpool_limits

from cisformer.data.genome import region_names
from cisformer.data.h5ad import H5adWriter
from cisformer.errors import InputError
from cisformer.runtime.ahead import ahead
from cisformer.runtime.progress import progress
from cisformer.simulation import write_truth
from cisformer.tissue import CAPTURE, DISPERSION, SimulationOptions, Tissue

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
        stack.enter_context(
            threadpool_limits(1, "blas")
        )  # a thread a block: products must not start their own
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
    ccres, linked
        Log odds that a cCRE is closed, by programme and base, and those of cCREs with links; [n_ccres or L, K + 1].
    place
        Place of each cCRE among the linked ones, -1 for others; [n_ccres].
    genes
        Log rates of genes in each type by programme and base, what the open states of the moment add where all are
        open included; n_types x [n_genes, K + 1].
    effects
        Effects of the links that work in each type; n_types x [n_genes, L].
    """

    tissue: Tissue
    depth: float
    seed: int
    ccres: np.ndarray
    linked: np.ndarray
    place: np.ndarray
    genes: list[np.ndarray]
    effects: list[sparse.csr_matrix]

    @classmethod
    def of(cls, tissue: Tissue, depth: float, seed: int) -> _Sampler:
        landscape, linked = tissue.landscape, np.unique(tissue.links.ccre)
        place = np.full(len(tissue.ccres), -1)
        place[linked] = np.arange(len(linked))
        types = range(len(tissue.cells.type_names))
        effects = [sparse.csr_matrix(tissue.link_matrix(number)[linked].T) for number in types]
        ccres = -np.column_stack([landscape.ccre_loadings, landscape.ccre_base]).astype(np.float32)
        bases = [landscape.gene_base + tissue.snapshot_share * one.sum(axis=1).A1 for one in effects]
        genes = [np.column_stack([landscape.gene_loadings, base]).astype(np.float32) for base in bases]
        return cls(tissue, depth, seed, ccres, ccres[linked], place, genes, effects)

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
        cells, effects, n = self.tissue.cells, self.effects[cell_type], len(rows)
        snapshot = np.float32(self.tissue.snapshot_share)
        programme = np.column_stack([cells.programme[rows], np.ones(n)]).astype(np.float32)
        depth = (self.depth * cells.rna_depth[rows]).astype(np.float32)
        chance = _chance(self.linked @ programme.T)
        most = effects @ chance
        most *= 1 - snapshot
        most += self.genes[cell_type] @ programme.T
        gene, cell, first = _early(_rate(most, depth), rng)
        link, owner = _entries(effects, gene)
        on, ccre = _fragments(self.depth * CAPTURE * cells.atac_depth[rows], len(self.place), rng)
        place = self.place.take(ccre)  # take: three times as fast as brackets
        linked, other = np.flatnonzero(place >= 0), np.flatnonzero(place < 0)
        asked = [effects.indices.take(link) * n + cell.take(owner), place.take(linked) * n + on.take(linked)]
        is_open = _once(np.concatenate(asked), chance, rng)
        lost = np.bincount(owner, effects.data.take(link) * ~is_open[: len(link)], len(gene))
        rate = _rate(most[gene, cell] - snapshot * lost, depth.take(cell))
        seen = np.empty(len(ccre), bool)
        seen[linked] = is_open[len(link) :]
        seen[other] = self._is_open(programme, on.take(other), ccre.take(other), rng)
        counts = _matrix(_counts(rate, first, rng), cell, gene, (n, len(most)))
        return counts, _matrix(seen, on, ccre, (n, len(self.place)))

    def _is_open(
        self, programme: np.ndarray, cell: np.ndarray, ccre: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Draw whether cCREs are open in cells, each pair once."""
        log_odds = np.einsum("fk,fk->f", self.ccres.take(ccre, axis=0), programme.take(cell, axis=0))
        return rng.random(len(cell), dtype=np.float32) < _chance(log_odds)


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + PART_CELLS] for start in range(0, len(rows), PART_CELLS)]


def _chance(log_odds: np.ndarray) -> np.ndarray:
    """Return the probability to be open of log odds to be closed, which are overwritten."""
    np.exp(log_odds, out=log_odds)
    log_odds += 1
    np.reciprocal(log_odds, out=log_odds)
    return log_odds


def _rate(log_rate: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Return the expected counts of genes whose log rate is given, at most 6."""
    rate: np.ndarray = np.minimum(log_rate, 6)
    np.exp(rate, out=rate)
    rate *= depth
    return rate


def _entries(matrix: sparse.csr_matrix, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the entries of some rows are stored, one row behind the other, and whose they are, 0, 1, …"""
    starts, ends = matrix.indptr.take(rows), matrix.indptr.take(rows + 1)
    owner = np.repeat(np.arange(len(rows), dtype=np.int32), ends - starts)
    before = np.cumsum(ends - starts) - (ends - starts)
    return np.arange(len(owner), dtype=np.int32) + (starts - before).take(owner), owner


def _once(asked: np.ndarray, chance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw True with the chance of each place that is asked for; of a place that comes twice, the same."""
    drawn = np.empty(chance.size, bool)
    drawn[asked] = rng.random(len(asked), dtype=np.float32) < chance.ravel().take(asked)
    return drawn.take(asked)


def _early(most: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw which genes have a first count before the time `most` [n_genes, n]; return genes, cells and times.

    With gamma noise of shape r, no count comes before time s with probability (1 + s / r)^-r, at least 1 - s.
    """
    r = 1 / DISPERSION
    raw = rng.bit_generator.random_raw(-(-most.size // 4))
    chance = raw.view(np.uint16)[: most.size]  # in 65536ths, rounded down
    early = np.flatnonzero(chance < np.float32(1 << 16) * most.ravel())
    exact = (chance.take(early) + rng.random(len(early))) / (1 << 16)
    first = ((1 - exact) ** (-1 / r) - 1) * r
    gene, cell = np.divmod(early, most.shape[1])
    return gene, cell, first


def _counts(rate: np.ndarray, first: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw gamma-Poisson counts of given means, the first of which comes at the time `first`; 0 after `rate`.

    After a first count at s the noise has shape r + 1 and rate r + s, and others come at that rate until `rate`.
    """
    r = 1 / DISPERSION
    noise = rng.standard_gamma(r + 1, len(first)) / (r + first)
    counts: np.ndarray = (first < rate) * (1 + rng.poisson(noise * np.maximum(rate - first, 0)))
    return counts


def _matrix(
    values: np.ndarray, row: np.ndarray, column: np.ndarray, shape: tuple[int, int]
) -> sparse.csr_matrix:
    """Return the values above 0."""
    kept = np.flatnonzero(values)
    entries = values.take(kept).astype(np.float32)
    return sparse.csr_matrix((entries, (row.take(kept), column.take(kept))), shape=shape)


def _fragments(rate: np.ndarray, n_ccres: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw on which cCREs at least one fragment falls, `rate[i]` a cCRE in cell i; return cells and cCREs, sorted.

    Cells are laid end to end on a line on which fragments fall one after the other.
    """
    end = n_ccres * np.cumsum(rate)
    most = int(end[-1] + 10 * np.sqrt(end[-1]) + 50)  # 10 standard deviations above what comes
    at = np.cumsum(rng.standard_exponential(most, dtype=np.float32), dtype=np.float64)
    number = np.diff(np.searchsorted(at, end), prepend=0)
    at = at[: number.sum()] - np.repeat(end - n_ccres * rate, number)
    at *= np.repeat((1 - 1e-12) / rate, number)  # rounding must not lead beyond the last cCRE
    at += np.repeat(n_ccres * np.arange(len(rate)), number)
    place = at.astype(np.int64)
    cell, ccre = np.divmod(place.compress(np.diff(place, prepend=-1) != 0), n_ccres)
    return cell, ccre
