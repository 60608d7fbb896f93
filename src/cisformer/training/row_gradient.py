"""The gradient of a table of which every batch reads some rows, in memory that stays.

A table has a row per cCRE. Autograd makes its gradient anew in every step, zeros but for the rows of the batch. With a
million cCREs that fresh memory costs more time than AdamW of all rows (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowGradient:
    """Lays the sparse gradients of a table, each of distinct rows, into one dense gradient that is used again."""

    def __init__(self, table: Tensor) -> None:
        self.whole: Tensor | None = None
        table.register_post_accumulate_grad_hook(self._lay_out)

    @torch.no_grad()
    def _lay_out(self, table: Tensor) -> None:
        found = table.grad
        if found is None or not found.is_sparse:  # the batch reads all rows
            return
        self.whole = torch.zeros_like(table) if self.whole is None else self.whole.zero_()
        table.grad = self.whole.index_copy_(0, found._indices()[0], found._values())

    def free(self) -> None:
        """Give the memory back until the next gradient comes."""
        self.whole = None
