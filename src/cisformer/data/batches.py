"""Batches of cells as a model reads them: ragged input, targets, and which of both are sampled.

Nothing is padded here. A batch holds the cells' inputs one behind the other (`index`, `value`) with `indptr` saying
where each cell starts, as in a CSR matrix. Every random draw comes from (seed, epoch, step), so that batches do not
depend on the number of workers or on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional as F

from cisformer.config import Config, Direction, Modality
from cisformer.data.store import CellStore
from cisformer.runtime.ahead import ahead

BLOCK_CELLS = 1_000
"""Cells that one sweep over a store takes at a time."""
RNA_SCALE = 1e4
"""Counts per cell after normalisation, before log1p."""


@dataclass(frozen=True)
class Layout:
    """Which reference features a model knows.

    Attributes
    ----------
    direction
        Which modality is read and which is predicted.
    input_index, target_index
        Ascending reference rows of the features seen in training; int64.
    n_input_reference, n_target_reference
        Sizes of the whole reference.
    """

    direction: Direction
    input_index: np.ndarray
    target_index: np.ndarray
    n_input_reference: int
    n_target_reference: int

    @property
    def input_modality(self) -> Modality:
        """The modality that the model reads."""
        return "atac" if self.direction == "atac2rna" else "rna"

    @property
    def target_modality(self) -> Modality:
        """The modality that the model predicts."""
        return "rna" if self.direction == "atac2rna" else "atac"


@dataclass(frozen=True)
class Batch:
    """A batch of cells, ready for a model.

    Axes: B cells, N input tokens of all cells, M non-zero targets of all cells, S drawn targets.

    Attributes
    ----------
    indptr, index, value
        The cells' whole inputs (int64 [B+1], int64 [N], float32 [N]): feature numbers as in
        `Layout.input_index`; value is log1p-normalised expression, or 1 for an open cCRE.
    token, token_indptr
        Which of the N tokens attention sees (int64), where not all; else `None`.
    target_indptr, target_index, target_value
        Non-zero targets, likewise; `None` when predicting.
    columns
        The targets drawn for this batch, ascending (int64 [S]); `None` for all.
    """

    indptr: Tensor
    index: Tensor
    value: Tensor
    token: Tensor | None = None
    token_indptr: Tensor | None = None
    target_indptr: Tensor | None = None
    target_index: Tensor | None = None
    target_value: Tensor | None = None
    columns: Tensor | None = None

    @property
    def n_cells(self) -> int:
        """Number of cells, B."""
        return len(self.indptr) - 1

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return self._map(lambda x: x.to(device, non_blocking=True))

    def split(self, size: int) -> list[Batch]:
        """Return the whole inputs of at most `size` cells at a time, without tokens drawn or targets."""
        parts = []
        for indptr in (self.indptr[i : i + size + 1] for i in range(0, self.n_cells, size)):
            start, stop = int(indptr[0]), int(indptr[-1])
            parts.append(Batch(indptr - start, self.index[start:stop], self.value[start:stop]))
        return parts

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, from which a GPU copies without the CPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(x) for k, x in tensors.items() if isinstance(x, Tensor)})


def normalise_rna(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Return log1p(counts / total × 1e4) per cell, float32; a cell without counts stays zero."""
    counts = counts.astype(np.float32, copy=True)
    total = np.asarray(counts.sum(axis=1)).ravel()
    per_cell = np.divide(RNA_SCALE, total, out=np.zeros_like(total), where=total > 0)
    counts.data = np.log1p(counts.data * np.repeat(per_cell, np.diff(counts.indptr)))
    return counts


def row_blocks(rows: np.ndarray, size: int = BLOCK_CELLS) -> Iterator[np.ndarray]:
    """Yield `rows` in runs of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def normalise(matrix: sp.csr_matrix, modality: Modality) -> sp.csr_matrix:
    """Return the values that models read and predict: log1p-normalised expression, or 1 for an open cCRE."""
    if modality == "rna":
        return normalise_rna(matrix)
    matrix = matrix.astype(np.float32, copy=True)
    matrix.data[:] = 1
    return matrix


def read_modality(store: CellStore, rows: np.ndarray, modality: Modality) -> sp.csr_matrix:
    """Return normalised cells [len(rows), whole reference] of one modality of a store."""
    return normalise_rna(store.rna(rows)) if modality == "rna" else store.atac(rows)


def encode_input(
    cells: sp.csr_matrix, layout: Layout, max_len: int | None, rng: np.random.Generator | None
) -> Batch:
    """Return a batch without targets from normalised cells [B, whole reference].

    Parameters
    ----------
    max_len
        Maximum number of tokens per cell that attention sees; `None` for all.
    rng
        Draws the tokens of longer cells. Without it the choice is fixed and depends on the cell alone: the highest
        expressed genes, or evenly spaced open cCREs.
    """
    known = cells[:, layout.input_index]
    batch = Batch(*(torch.from_numpy(a) for a in _ragged(known)))
    if max_len is None or np.diff(known.indptr).max(initial=0) <= max_len:
        return batch
    seen = _seen(known, max_len, layout.input_modality, rng)
    return replace(
        batch,
        token=torch.from_numpy(np.flatnonzero(seen)),
        token_indptr=torch.from_numpy(np.concatenate([[0], np.cumsum(seen)])[known.indptr]),
    )


def _ragged(matrix: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data.astype(np.float32)


def _seen(
    cells: sp.csr_matrix, max_len: int, modality: Modality, rng: np.random.Generator | None
) -> np.ndarray:
    """Return which of the cells' tokens attention sees, at most `max_len` of each cell; bool [N]."""
    lengths = np.diff(cells.indptr).astype(np.int64)
    cell = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(cell)) - cells.indptr[cell]
    if rng is None and modality == "atac":  # the k-th of m is at ⌊k n / m⌋, of n open cCREs
        n, m = lengths[cell], np.minimum(lengths, max_len)[cell]
        return -(-(position + 1) * m // n) > -(-position * m // n)
    order = np.lexsort((-cells.data, cell)) if rng is None else np.argsort(cell + rng.random(len(cell)))
    seen = np.empty(len(cell), dtype=bool)
    seen[order] = position < max_len
    return seen


def add_targets(
    batch: Batch, cells: sp.csr_matrix, layout: Layout, columns: np.ndarray | None = None
) -> Batch:
    """Return `batch` with the normalised targets of its cells [B, whole reference]."""
    indptr, index, value = _ragged(cells[:, layout.target_index])
    return replace(
        batch,
        target_indptr=torch.from_numpy(indptr),
        target_index=torch.from_numpy(index),
        target_value=torch.from_numpy(value),
        columns=None if columns is None else torch.from_numpy(columns),
    )


def dense_targets(batch: Batch, n_targets: int) -> Tensor:
    """Return the targets of a batch as float32 [B, n_targets], or [B, S] where columns were drawn."""
    assert batch.target_indptr is not None
    assert batch.target_index is not None
    assert batch.target_value is not None
    cell, index = ragged_rows(batch.target_indptr, len(batch.target_index)), batch.target_index
    value = batch.target_value
    if batch.columns is not None:
        index = rows_of(places(batch.columns, n_targets), index)
        kept = index >= 0
        cell, index, value, n_targets = cell[kept], index[kept], value[kept], len(batch.columns)
    dense = value.new_zeros(batch.n_cells, n_targets)
    dense[cell, index] = value
    return dense


def places(columns: Tensor, n: int) -> Tensor:
    """Return where each of 0 … n − 1 stands among `columns`, or −1; int64 [n]."""
    place = columns.new_full((n,), -1)
    place[columns] = torch.arange(len(columns), device=columns.device)
    return place


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """Return `x[index]` along the first axis, forward and backward several times faster on a CPU."""
    return x.index_select(0, index)


def table_rows(table: Tensor, index: Tensor, *, sparse_gradient: bool) -> Tensor:
    """Return rows of a table of parameters; its gradient, where sparse, holds these rows alone."""
    return F.embedding(index, table, sparse=True) if sparse_gradient else rows_of(table, index)


def ragged_ranges(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers of ranges and what is in them: starts `[5, 9]` of `[2, 1]` → `[0, 0, 1]`, `[5, 6, 9]`."""
    total, number = int(count.sum()), torch.arange(len(count), device=count.device)
    of_range = torch.repeat_interleave(number, count, output_size=total)
    before = torch.cumsum(count, 0) - count
    return of_range, torch.arange(total, device=count.device) + rows_of(start - before, of_range)


def ragged_rows(indptr: Tensor, length: int) -> Tensor:
    """Return the row of every entry of a ragged array: `[0, 2, 3]` → `[0, 0, 1]`."""
    return torch.repeat_interleave(
        torch.arange(len(indptr) - 1, device=indptr.device), indptr.diff(), output_size=length
    )


@dataclass(frozen=True)
class TrainingBatches:
    """The batches of one data set: which cells come together, and what is drawn for them.

    Attributes
    ----------
    store, layout, config
        The cells, the features that count, and the limits to draw within.
    rows
        The cells to use.
    world, rank
        How many processes share a batch, and which one this is. A global batch holds `batch_size × world` cells.
    """

    store: CellStore
    layout: Layout
    config: Config
    rows: np.ndarray
    world: int = 1
    rank: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def n_steps(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.rows) // (self.config.training.batch_size * self.world))

    def step_rows(self, epoch: int, step: int) -> tuple[np.ndarray, int]:
        """Return this process's cells of a step, and the number of cells of all processes together.

        A process without cells gets the first cell of the step, which the trainer weights with zero.
        """
        size = self.config.training.batch_size * self.world
        together = self._order(epoch)[step * size : (step + 1) * size]
        return np.array_split(together, self.world)[self.rank], len(together)

    def _order(self, epoch: int) -> np.ndarray:
        """Return the order of the cells in an epoch; kept until another is asked for."""
        found = self._orders.get(epoch)
        if found is None:
            found = np.random.default_rng([self.config.training.SEED, epoch]).permutation(self.rows)
            self._orders.clear()
            self._orders[epoch] = found
        return found

    def draw(self, epoch: int, step: int) -> Batch:
        """Return this process's batch of a step of an epoch, tokens and targets drawn anew."""
        rows, _ = self.step_rows(epoch, step)
        rows = rows if len(rows) else self.rows[:1]
        seed = self.config.training.SEED
        limits = self.config.datapreprocess
        columns = self._columns(np.random.default_rng([seed, epoch, step, 1]))
        cells = read_modality(self.store, rows, self.layout.input_modality)
        max_len = None if limits.enc_max_len == "whole" else limits.enc_max_len
        batch = encode_input(
            cells, self.layout, max_len, np.random.default_rng([seed, epoch, step, 2, self.rank])
        )
        return add_targets(
            batch, read_modality(self.store, rows, self.layout.target_modality), self.layout, columns
        )

    def _columns(self, rng: np.random.Generator) -> np.ndarray | None:
        """Draw the targets of a step uniformly: a uniform draw needs no weights to keep the loss unbiased."""
        limits = self.config.datapreprocess
        n_targets = len(self.layout.target_index)
        if limits.dec_max_len == "whole" or limits.dec_max_len * limits.multiple >= n_targets:
            return None
        return np.sort(rng.choice(n_targets, limits.dec_max_len * limits.multiple, replace=False))

    def epoch(self, epoch: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Yield the batches of an epoch on a device, prepared ahead by `num_workers` threads."""
        makers = [partial(self.draw, epoch, step) for step in range(self.n_steps)]
        yield from prefetch(makers, self.config.training.num_workers, device)


def prefetch(
    makers: Sequence[Callable[[], Batch]], num_workers: int, device: torch.device | str = "cpu"
) -> Iterator[Batch]:
    """Yield what each of `makers` returns, in order, on a device, with `num_workers` threads working ahead (0: none).

    For an NVIDIA GPU the threads leave batches in pinned memory, from which copies are fast and wait for nothing.
    """
    pin = torch.device(device).type == "cuda"

    def prepare(make: Callable[[], Batch]) -> Batch:
        return make().pin_memory() if pin else make()

    for batch in ahead(prepare, makers, num_workers):
        yield batch.to(device)
