"""Cells of one or two stores, and what is read of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from cisformer.data.batches import Layout, read_modality
from cisformer.data.reference import Reference
from cisformer.data.store import CellStore
from cisformer.model.target_states import CellMatrix


@dataclass(frozen=True)
class CellRows:
    """Cells of one or two stores: a store and rows of it, each."""

    parts: tuple[tuple[CellStore, np.ndarray], ...]

    @classmethod
    def of(cls, store: CellStore, rows: np.ndarray) -> CellRows:
        """Return cells of one store."""
        return cls(((store, rows),))

    @property
    def reference(self) -> Reference:
        """The genes and cCREs of the stores."""
        return self.parts[0][0].reference

    def __add__(self, other: CellRows) -> CellRows:
        return CellRows(self.parts + other.parts)

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self.parts)

    def sample(self, most: int, rng: np.random.Generator) -> CellRows:
        """Return at most `most` of the cells, in their order."""
        chosen = np.sort(rng.choice(len(self), min(len(self), most), replace=False))
        first, parts = 0, []
        for store, rows in self.parts:
            here = chosen[(chosen >= first) & (chosen < first + len(rows))] - first
            parts.append((store, rows[here]))
            first += len(rows)
        return CellRows(tuple(parts))

    def folds(self, number: int, rng: np.random.Generator) -> list[CellRows]:
        """Return the cells in `number` parts of about the same size, drawn at random."""
        group = rng.permutation(np.arange(len(self)) % number)
        parts = np.split(group, np.cumsum([len(rows) for _, rows in self.parts])[:-1])
        return [
            CellRows(
                tuple((store, rows[of == k]) for (store, rows), of in zip(self.parts, parts, strict=True))
            )
            for k in range(min(number, len(self)))
        ]

    def read(self, layout: Layout) -> CellMatrix:
        """Return normalised input and target of all of the cells, known features only."""
        sides = ((layout.input_modality, layout.input_index), (layout.target_modality, layout.target_index))
        return CellMatrix(*(
            sp.vstack([read_modality(store, rows, side)[:, index] for store, rows in self.parts], format="csr")
            for side, index in sides
        ))  # fmt: skip
