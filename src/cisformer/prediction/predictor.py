"""Predict cells in blocks with one model, and write them as a full matrix or in compact form."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from cisformer.data.batches import Batch, encode_input, prefetch, row_blocks
from cisformer.data.fragments import MIN_FRAGMENTS
from cisformer.data.h5ad import H5adWriter, MatrixLayout
from cisformer.errors import InputError
from cisformer.model.checkpoint import Checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.documented_task import FullTask
from cisformer.model.link_function import LINK_VERSION
from cisformer.parallel.processes import Processes
from cisformer.prediction.cells import READ_CELLS, InputCells
from cisformer.prediction.compact import (
    COMPACT_FORMAT,
    COMPACT_VERSION,
    INTERCEPT,
    LINK,
    LOADINGS,
    PRIOR,
    STATES,
    LowRank,
)
from cisformer.prediction.likeness import DEPTH, DISTANCE, UNLIKE, warn_if_unlike
from cisformer.runtime.progress import progress
from cisformer.runtime.provenance import provenance

if TYPE_CHECKING:
    from anndata import AnnData

FORMAT_VERSION = 1
COMPACT_CELLS = 128
"""Cells encoded at once for a compact file: without their probabilities they need little memory."""
TINY = np.nextafter(np.float32(0), np.float32(1))
"""The smallest probability that a sparse matrix has to hold."""


@dataclass(frozen=True)
class PredictionOptions:
    """What a user may ask of a prediction; see `predict`."""

    batch_size: int = 16
    num_workers: int = 2
    max_tokens: int | None = None
    min_prob: float = 0.0
    binarize: bool = False
    genes: str | Path = "expressed_in_training"
    chunk: int | None = None
    compact: bool | None = None
    min_fragments: int = MIN_FRAGMENTS

    def __post_init__(self) -> None:
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("num_workers", self.num_workers, 0),
            ("min_fragments", self.min_fragments, 1),
        ):
            if value < least:
                raise InputError(f"{name} is {value}", hint=f"give at least {least}")
        if not 0 <= self.min_prob < 1:
            raise InputError(f"min_prob is {self.min_prob}", hint="it is a probability: at least 0, below 1")
        if self.compact and (self.min_prob > 0 or self.binarize):
            raise InputError(
                "a compact prediction keeps every probability: min_prob and binarize are for a full matrix",
                hint="leave them out, or use them with `cisformer expand` afterwards",
            )


@dataclass(frozen=True)
class Predicted:
    """Predictions of consecutive cells.

    Attributes
    ----------
    matrix
        Known targets, float32 [B, F]; `None` in a compact prediction.
    states
        Places in the space of the model's loadings, float32 [B, R]; `None` for architecture full, which has none.
    distance, depth
        How unlike the training cells each cell is, and how many known features it has; `None` where the model does not
        know what is usual among its training cells.
    """

    matrix: np.ndarray | None
    states: np.ndarray | None
    distance: np.ndarray | None = None
    depth: np.ndarray | None = None

    @property
    def obsm(self) -> dict[str, np.ndarray]:
        """What goes into `obsm`."""
        return {} if self.states is None else {STATES: self.states}


@dataclass(frozen=True)
class Predictor:
    """Cells, a model and what was asked: all that a prediction takes."""

    checkpoint: Checkpoint
    cells: InputCells
    options: PredictionOptions
    device: torch.device

    @cached_property
    def model(self) -> CisModel | FullTask:
        """The model on the device; the caller's stays where it is."""
        model = self.checkpoint.model
        here = next(model.parameters()).device
        return model if here.type == self.device.type else copy.deepcopy(model).to(self.device)

    @cached_property
    def low_rank(self) -> LowRank | None:
        """The model's logits as a product; `None` for architecture full."""
        return LowRank.of(self.model) if isinstance(self.model, CisModel) else None

    def parts(self) -> list[np.ndarray]:
        """Return the rows of each batch of cells."""
        size = max(self.options.batch_size, COMPACT_CELLS if self.options.compact else 1)
        return list(row_blocks(np.arange(len(self.cells.obs)), size))

    def blocks(self, parts: Sequence[np.ndarray]) -> Iterator[Predicted]:
        """Yield the predictions of each part of the cells, with progress."""
        asked = self.options.max_tokens
        limit = self.checkpoint.config.datapreprocess.enc_max_len if asked is None else asked
        max_len = None if limit == "whole" else limit

        def make(rows: np.ndarray) -> Batch:
            return encode_input(self.cells.read(rows), self.checkpoint.layout, max_len, None)

        batches = prefetch([partial(make, rows) for rows in parts], self.options.num_workers, self.device)
        for batch in progress(batches, total=len(parts), desc="predicting", unit="batches"):
            yield self._predict(batch)
        self.cells.check()  # before the result gets its name

    def _predict(self, batch: Batch) -> Predicted:
        if self.low_rank is None:
            return Predicted(self.model.predict(batch).float().cpu().numpy(), None)
        assert isinstance(self.model, CisModel)
        matrix = None
        if self.options.compact:
            place = self.model.place(batch)
        else:
            matrix, place = self.model.predict_with_place(batch)
        known = Predicted(
            None if matrix is None else matrix.float().cpu().numpy(),
            self.low_rank.states(place).cpu().numpy(),
        )
        if not self.model.likeness.known:
            return known
        distance = self.model.distance(batch).cpu().numpy()
        return replace(known, distance=distance, depth=batch.indptr.diff().cpu().numpy())

    # ---- output

    def collect(self) -> AnnData:
        """Return the prediction as an AnnData."""
        from anndata import AnnData

        var, varm, uns = self._features()
        blocks = list(self.blocks(self.parts()))
        matrix = None
        if not self.options.compact:
            empty = sp.csr_matrix((0, len(var)), dtype=np.float32)
            matrix = sp.vstack(
                [empty, *(self._sparse(b.matrix) for b in blocks if b.matrix is not None)], format="csr"
            )
        states = [block.states for block in blocks if block.states is not None]
        obsm = {STATES: np.concatenate(states)} if states else {}
        obs = self._with_distances(self.cells.obs, blocks)
        return AnnData(matrix, obs=obs, var=var, uns=uns, obsm=obsm, varm=varm)

    def _with_distances(self, obs: pd.DataFrame, blocks: Sequence[Predicted]) -> pd.DataFrame:
        """Return `obs` with how unlike the training cells each cell is; warn where many are."""
        found = [(b.distance, b.depth) for b in blocks if b.distance is not None and b.depth is not None]
        if not found or not isinstance(self.model, CisModel):
            return obs.copy()
        distance, depth = (np.concatenate(values) for values in zip(*found, strict=True))
        if len(distance) == len(self.cells.obs):  # once, where several processes share the cells
            warn_if_unlike(self.model.likeness, distance, depth)
        return obs.assign(**{DISTANCE: distance.astype(np.float32), DEPTH: depth, UNLIKE: distance > 1})

    def write(self, path: Path, processes: Processes, *, force: bool) -> None:
        """Write the prediction; several processes share the cells, and the first of them joins their parts."""
        parts = self.parts()
        if processes.size == 1:
            self._write(path, self.blocks(parts), self.cells.obs, force=force)
            return
        mine = processes.share(parts)
        with processes.scratch(path) as folder:
            rows = np.concatenate(mine) if mine else np.zeros(0, np.int64)
            self._write(folder / f"{processes.rank}.h5ad", self.blocks(mine), self.cells.obs.iloc[rows])
            processes.wait()
            if processes.is_main:
                written = itertools.chain.from_iterable(
                    _read(folder / f"{rank}.h5ad", self.checkpoint.layout.target_index)
                    for rank in range(processes.size)
                )
                self._write(path, written, self.cells.obs, force=force)

    def _write(
        self, path: Path, blocks: Iterator[Predicted], obs: pd.DataFrame, *, force: bool = True
    ) -> None:
        """Write cells as they come; the first block says which layout is smaller."""
        first = next(blocks, None)
        blocks = iter(()) if first is None else itertools.chain([first], blocks)
        layout = self._matrix_layout(first)
        var, varm, uns = self._features()
        cells = []
        with H5adWriter(path, obs, var, uns, varm=varm, layout=layout, force=force) as writer:
            for block in blocks:
                writer.append(self._matrix(block.matrix, layout), **block.obsm)
                cells.append(replace(block, matrix=None, states=None))
            writer.obs = self._with_distances(obs, cells)

    def _matrix_layout(self, first: Predicted | None) -> MatrixLayout:
        if self.options.compact:
            return "none"
        if first is None:
            return "csr"
        assert first.matrix is not None
        stored = self._sparse(first.matrix)
        return "dense" if 2 * stored.nnz > np.prod(stored.shape) else "csr"

    def _matrix(self, known: np.ndarray | None, layout: MatrixLayout) -> np.ndarray | sp.csr_matrix | None:
        """Return known targets over the whole reference, as they are stored."""
        if known is None:
            return None
        if layout == "csr":
            return self._sparse(known)
        index, n_features = self.checkpoint.layout.target_index, self.checkpoint.layout.n_target_reference
        known = self._as_values(known)
        if len(index) == n_features:
            return known
        whole = np.zeros((len(known), n_features), np.float32)
        whole[:, index] = known
        return whole

    def _as_values(self, known: np.ndarray) -> np.ndarray:
        """Return open/closed where that was asked for, and zero in place of what is left out."""
        if self.options.binarize:
            return _likeliest(known)
        return (
            np.where(known >= self.options.min_prob, known, np.float32(0))
            if self.options.min_prob > 0
            else known
        )

    def _sparse(self, known: np.ndarray) -> sp.csr_matrix:
        """Return known targets [B, F] as CSR over the whole reference."""
        known = self._as_values(known)
        feature = self.checkpoint.layout.target_index.astype(np.int32)
        kept = [np.flatnonzero(cell >= TINY) for cell in known]
        return sp.csr_matrix(
            (
                np.concatenate([cell.take(columns) for cell, columns in zip(known, kept, strict=True)]),
                np.concatenate([feature.take(columns) for columns in kept]),
                np.cumsum([0, *map(len, kept)]),
            ),
            shape=(len(known), self.checkpoint.layout.n_target_reference),
        )

    def _features(self) -> tuple[pd.DataFrame, dict[str, np.ndarray], dict[str, Any]]:
        """Return `var`, `varm` and `uns` of the result."""
        reference, layout = self.checkpoint.reference, self.checkpoint.layout
        atac = self.checkpoint.direction == "rna2atac"
        table = reference.ccres if atac else reference.genes
        var = table.set_index(pd.Index(reference.ccre_labels if atac else reference.gene_labels))
        seen = np.zeros(len(var), dtype=bool)
        seen[layout.target_index] = True
        var, varm = var.assign(seen_in_training=seen), {}
        if isinstance(self.model, CisModel):
            told = {
                "validation_r": self.model.validation_r,
                "validation_r_error": self.model.validation_error(),
            }
            for name, values in (told if atac else told | {"interval_90": self.model.interval_90}).items():
                column = np.full(len(var), np.nan, np.float32)
                column[seen] = values.cpu().numpy()
                var = var.assign(**{name: column})
        if self.options.compact:
            assert self.low_rank is not None
            prior, intercept = np.full(len(var), -np.inf, np.float32), np.zeros(len(var), np.float32)
            prior[seen] = self.low_rank.prior.cpu().numpy()
            intercept[seen] = self.low_rank.intercept.cpu().numpy()
            loadings = np.zeros((len(var), self.low_rank.loadings.shape[1]), np.float32)
            loadings[seen] = self.low_rank.loadings.cpu().numpy()
            var, varm = var.assign(**{PRIOR: prior, INTERCEPT: intercept}), {LOADINGS: loadings}
            if self.low_rank.link_version == LINK_VERSION:
                var = var.assign(**{LINK: np.float32(LINK_VERSION)})
        return var, varm, {"cisformer": self._record()}

    def _record(self) -> dict[str, Any]:
        """Return what the result says of its origin."""
        checkpoint, options = self.checkpoint, self.options
        atac = checkpoint.direction == "rna2atac"
        probability = "open (1) or closed" if options.binarize else "probability of being open"
        return {
            "format": COMPACT_FORMAT if options.compact else "cisformer-prediction",
            "format_version": COMPACT_VERSION if options.compact else FORMAT_VERSION,
            "direction": checkpoint.direction,
            "unit": probability if atac else "log1p(counts per 10,000)",
            "min_prob": options.min_prob if atac and not options.binarize else 0.0,
            "checkpoint": str(checkpoint.folder),
            "reference": checkpoint.reference.name,
            "genome": checkpoint.reference.genome,
            "fingerprint": checkpoint.reference.fingerprint,
            "input": self.cells.source,
            **provenance(seed=checkpoint.config.training.SEED),
        }


def _read(path: Path, known: np.ndarray) -> Iterator[Predicted]:
    """Yield the cells of a written prediction in blocks; `known` are the columns of known targets."""
    import h5py
    from anndata.io import sparse_dataset

    with h5py.File(path) as file:
        states, obs = file["obsm"].get(STATES), file["obs"]
        cells = file.get("X")
        if isinstance(cells, h5py.Group):
            cells = sparse_dataset(cells)
        n_cells = len(states) if cells is None else cells.shape[0]
        for start in range(0, n_cells, READ_CELLS):
            part = slice(start, start + READ_CELLS)
            matrix = None if cells is None else cells[part]
            if matrix is not None:
                matrix = (matrix.toarray() if sp.issparse(matrix) else matrix)[:, known]
            distance, depth = (obs[name][part] if name in obs else None for name in (DISTANCE, DEPTH))
            yield Predicted(matrix, None if states is None else states[part], distance, depth)


def _likeliest(probability: np.ndarray) -> np.ndarray:
    """Return 1 for each cell's likeliest cCREs, as many as its probabilities sum up to; ties by position."""
    binary = np.zeros_like(probability)
    for cell, values in zip(binary, probability, strict=True):
        expected = round(float(values.sum(dtype=np.float64)))
        cell[np.argsort(-values, kind="stable")[:expected]] = 1
    return binary
