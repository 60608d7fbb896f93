"""What the open cCREs near a gene add to its prediction, ATAC→RNA: one weight per pair, and attention.

Shapes: B cells, S drawn genes, E edges (cell, gene, open cCRE), W pairs, H heads, R embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cisformer.config import Model
from cisformer.data.batches import Batch, ragged_ranges, ragged_rows, rows_of
from cisformer.model.attention import segment_softmax, segment_sum
from cisformer.model.cell_encoder import Tokens
from cisformer.model.closed_form_cis import DISTANCE_EDGES_BP, Windows

CELL_KEY_DIM = 16
"""Width in which a cell's state meets the cCREs; narrow, since every open cCRE of a batch carries it."""
PAIRS_AT_ONCE = 200_000
"""Gene–cCRE pairs whose embeddings are multiplied in one go outside training; bounds memory."""


@dataclass(frozen=True)
class CisAttention:
    """What genes of some cells make of the open cCREs near them, edge by edge.

    Attributes
    ----------
    cell, gene, ccre, pair
        Batch row, target number, input number, and number within `Windows` of each edge; int64 [E].
    weight, value
        Attention weight and what it multiplies; float [E, H]. Weights of a (cell, gene, head) sum to less than 1.
    local
        The closed-form-started weight of the pair; float [E].
    """

    cell: Tensor
    gene: Tensor
    ccre: Tensor
    pair: Tensor
    weight: Tensor
    value: Tensor
    local: Tensor

    @property
    def contribution(self) -> Tensor:
        """What each edge adds to its gene's eta; float [E]."""
        return (self.weight * self.value).sum(dim=1) + self.local

    @property
    def mean_weight(self) -> Tensor:
        """Attention weight of each edge, mean over heads; float [E]."""
        n_heads = self.weight.shape[1]
        return self.weight @ self.weight.new_full((n_heads,), 1 / n_heads)  # sums over short rows are slow

    @property
    def effect(self) -> Tensor:
        """Change of the gene's eta if this one cCRE closed, its attention going to the rest; float [E].

        Exact without another pass: per head, out' = (out − w·v) / (1 − w), so out' − out = w (out − v) / (1 − w).
        """
        n_cells, n_genes = (1 + int(x.max()) if len(x) else 1 for x in (self.cell, self.gene))
        segment = self.cell * n_genes + self.gene
        out = segment_sum(self.weight * self.value, segment, n_cells * n_genes)
        rest = (1 - self.weight).clamp_(min=1e-6)
        change = rows_of(out, segment).sub_(self.value).mul_(self.weight).div_(rest)
        return change @ change.new_ones(change.shape[1]) - self.local


class CisPath(nn.Module):
    """What the open cCREs near a gene add to it.

    Two terms: a sum of one weight per (gene, cCRE) pair over the open ones, started in closed form (`local`), and
    attention of the gene to them, its values started at zero. Per head h,

        score[i, g, p] = <a_h, gene[g] * ccre[p]> + <q_h(cell i), K ccre[p]> + bias_h[signed distance bin]
        value[g, p]    = <b_h, gene[g] * ccre[p]>

    and a null slot takes the attention that no open cCRE deserves. What depends on the pair alone is computed once
    per distinct pair of a batch (in eval mode: once), so that an edge costs only its softmax.
    """

    def __init__(self, n_target: int, windows: Windows, model: Model) -> None:
        super().__init__()
        width, heads = model.emb_rank, model.dec_heads
        self.heads = heads
        self.gene = nn.Embedding(n_target, width)
        self.pair_score = nn.Linear(width, heads, bias=False)
        self.pair_value = nn.Linear(width, heads, bias=False)
        self.cell_query = nn.Linear(width, heads * CELL_KEY_DIM, bias=False)
        self.cell_key = nn.Linear(width, CELL_KEY_DIM, bias=False)
        self.distance_bias = nn.Embedding(2 * len(DISTANCE_EDGES_BP) + 1, heads)
        self.null = nn.Parameter(torch.zeros(heads))
        self.pair_weight = nn.Parameter(torch.zeros(len(windows.gene)))
        self.window_indptr: Tensor
        self.window_gene: Tensor
        self.window_ccre: Tensor
        self.window_bin: Tensor
        for name in ("indptr", "gene", "ccre", "distance_bin"):
            array = torch.from_numpy(getattr(windows, name))
            self.register_buffer(f"window_{name.removeprefix('distance_')}", array, persistent=False)
        self._ahead: tuple[tuple[Any, ...], tuple[Tensor, Tensor]] | None = None
        nn.init.zeros_(self.distance_bias.weight)
        nn.init.zeros_(self.pair_value.weight)

    def train(self, mode: bool = True) -> CisPath:
        """Switch between training and eval mode; forgets what was computed ahead."""
        self._ahead = None
        return super().train(mode)

    def forward(self, batch: Batch, h_BR: Tensor, tokens: Tokens, column: Tensor | None) -> Tensor:
        """Return cis, float [B, S]; `column` [F] gives the place of each target among the drawn ones, or −1."""
        edges = self.edges(batch, h_BR, tokens, column)
        place, n_columns = self._places(edges.gene, column)
        out = edges.local.new_zeros(batch.n_cells * n_columns)
        out = out.index_add(0, edges.cell * n_columns + place, edges.contribution)
        return out.reshape(batch.n_cells, n_columns)

    def _places(self, gene_E: Tensor, column: Tensor | None) -> tuple[Tensor, int]:
        """Return the place of each edge's gene among the drawn ones, and the number of these."""
        if column is None:
            return gene_E, len(self.gene.weight)
        return rows_of(column, gene_E), int(column.max()) + 1

    def edges(self, batch: Batch, h_BR: Tensor, tokens: Tokens, column: Tensor | None) -> CisAttention:
        """Return the attention of every (cell, gene, open cCRE) edge whose gene is drawn."""
        if torch.is_grad_enabled() or self.training:
            token_E, pair_E, term_EX = self._edges_of_distinct_pairs(batch, tokens, column)
            key_NK = rows_of(self.cell_key(tokens.embedding), rows_of(tokens.place, batch.index))
        else:
            term_WX, key_PK = self._computed_ahead(tokens.table)
            token_E, pair_E = self._window_pairs(batch.index, column)
            term_EX, key_NK = rows_of(term_WX, pair_E), rows_of(key_PK, batch.index)
        cell_E = rows_of(ragged_rows(batch.indptr, len(batch.index)), token_E)
        gene_E = rows_of(self.window_gene, pair_E)
        place_E, n_columns = self._places(gene_E, column)
        score_EH, value_EH = term_EX.split(self.heads, dim=1)
        weight_EH = segment_softmax(
            score_EH + rows_of(self._cell_scores(batch, h_BR, key_NK), token_E),
            cell_E * n_columns + place_E,
            batch.n_cells * n_columns,
            self.null,
        )
        return CisAttention(
            cell_E,
            gene_E,
            rows_of(batch.index, token_E),
            pair_E,
            weight_EH,
            value_EH,
            rows_of(self.pair_weight, pair_E),
        )

    def _window_pairs(self, number_P: Tensor, column: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the pairs of some cCREs with drawn genes: which of the cCREs, and number of the pair; int64 [W]."""
        start_P = rows_of(self.window_indptr, number_P)
        ccre_W, pair_W = ragged_ranges(start_P, rows_of(self.window_indptr, number_P + 1) - start_P)
        if column is None:
            return ccre_W, pair_W
        drawn = rows_of(column, rows_of(self.window_gene, pair_W)) >= 0
        return ccre_W[drawn], pair_W[drawn]

    def _edges_of_distinct_pairs(
        self, batch: Batch, tokens: Tokens, column: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return token, pair, and score and value of each edge, these computed once per distinct pair.

        int64 [E], [E], and float [E, 2 H]. The work grows with the batch, not with all cCREs.
        """
        ccre_W, pair_W = self._window_pairs(tokens.number, column)
        count_P = torch.bincount(ccre_W, minlength=len(tokens.number))
        slot_N = rows_of(tokens.place, batch.index)
        first_P = torch.cumsum(count_P, 0) - count_P
        token_E, slot_E = ragged_ranges(rows_of(first_P, slot_N), rows_of(count_P, slot_N))
        term_WX = self._score_pairs(pair_W, rows_of(tokens.embedding, ccre_W))
        return token_E, rows_of(pair_W, slot_E), rows_of(term_WX, slot_E)

    def _cell_scores(self, batch: Batch, h_BR: Tensor, key_NK: Tensor) -> Tensor:
        """Return the share of scores that depends on the cell, of each of its open cCREs; float [N, H]."""
        query_BHK = self.cell_query(h_BR).unflatten(-1, (self.heads, -1)) * CELL_KEY_DIM**-0.5
        of_cells = key_NK.split(batch.indptr.diff().tolist())
        return torch.cat([key_TK @ query_HK.T for key_TK, query_HK in zip(of_cells, query_BHK, strict=True)])

    def _computed_ahead(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return score and value of all pairs, float [W, 2 H], and keys of all cCREs, float [n_input, K]."""
        weights = (
            table,
            *(
                m.weight
                for m in (self.gene, self.pair_score, self.pair_value, self.distance_bias, self.cell_key)
            ),
        )
        state = tuple((w.data_ptr(), w._version, w.device) for w in weights)
        if self._ahead is None or self._ahead[0] != state:
            self._ahead = state, (self._all_pair_terms(table), self.cell_key(table))
        return self._ahead[1]

    def _all_pair_terms(self, table: Tensor) -> Tensor:
        everything = torch.arange(len(self.pair_weight), device=table.device)
        parts = [
            self._score_pairs(part, rows_of(table, rows_of(self.window_ccre, part)))
            for part in everything.split(PAIRS_AT_ONCE)
        ]
        return torch.cat([table.new_zeros(0, 2 * self.heads), *parts])

    def _score_pairs(self, pair_W: Tensor, ccre_WR: Tensor) -> Tensor:
        product_WR = rows_of(self.gene.weight, rows_of(self.window_gene, pair_W)) * ccre_WR
        distance = F.pad(self.distance_bias.weight, (0, self.heads))  # adds to scores alone
        both = torch.cat([self.pair_score.weight, self.pair_value.weight])
        return F.linear(product_WR, both) + rows_of(distance, rows_of(self.window_bin, pair_W))
