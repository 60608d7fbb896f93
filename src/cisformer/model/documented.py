"""The documented architecture, both directions; reads and writes published checkpoints.

A cell's context is its open cCREs or its expressed genes, embedded and layer-normed. Queries (genes, or
cCREs) are embeddings that go through pre-norm layers: genes attend to each other, then to the context, then
feed forward; cCREs do not see each other, so that any number of them is decoded in chunks of flat memory. A
cCRE's embedding is that of its seven decimal digits, one behind the other. No padding is computed: tokens of
all cells stand one behind the other, and each cell's queries look at its own.

Shapes: B cells, G genes, P cCREs, N tokens of all cells, T of one cell, M queries of all cells, C width, H
heads, D head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from cisformer.config import Direction, Model, parse_config
from cisformer.model.bf16_attention import attention
from cisformer.model.published import check_tensors, published_name, read_tensors
from cisformer.runtime.files import atomic_path

N_DIGITS = 7
CHUNK = 8192
"""cCREs that are decoded together, unless `FullModel.chunk` says otherwise."""
Lengths = list[int]
"""How many tokens each cell has."""


class DigitEmbedding(nn.Module):
    """Embeds a number below 10⁷ as its decimal digits, the most significant first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, dim // N_DIGITS))
        self.place: Tensor
        self.register_buffer("place", 10 ** torch.arange(N_DIGITS - 1, -1, -1), persistent=False)

    def forward(self, number: Tensor) -> Tensor:
        """Return [..., dim]."""
        return F.embedding(number[..., None] // self.place % 10, self.weight).flatten(-2)


@dataclass(frozen=True)
class Keys:
    """What queries look at: keys and values [N, H·D] of the cells one behind the other, and how many each has."""

    key: Tensor
    value: Tensor
    lengths: Lengths


class Attention(nn.Module):
    """Multi-head attention of each cell's (normed) queries to its own keys.

    Dropout hides a share of each cell's tokens: unlike dropout of single weights it keeps the fused kernels, and
    spares their work.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm = nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.to_out = nn.Linear(inner, dim)
        self.dropout = dropout

    def keys(self, token_NC: Tensor, lengths: Lengths, real: Tensor | None = None) -> Keys:
        """Return keys and values of tokens; values of those that are not `real` are zero."""
        if self.training and self.dropout:
            kept, lengths = _draw_rows(lengths, self.dropout, token_NC.device)
            token_NC, real = token_NC[kept], None if real is None else real[kept]
        value = self.to_v(token_NC)
        return Keys(self.to_k(token_NC), value if real is None else value * real[:, None], lengths)

    def forward(self, q_MC: Tensor, keys: Keys, queries: Lengths) -> Tensor:
        """Return [M, C]."""
        return self.to_out(attend(self.to_q(q_MC), keys.key, keys.value, queries, keys.lengths, self.heads))


def _draw_rows(lengths: Lengths, dropout: float, device: torch.device) -> tuple[Tensor, Lengths]:
    """Draw all but a share `dropout` of each cell's rows; return their numbers, and how many are left by cell."""
    left = [n - int(dropout * n) for n in lengths]
    starts = itertools.accumulate([0, *lengths])
    rows = [start + torch.randperm(n)[:k] for start, n, k in zip(starts, lengths, left, strict=False)]
    return torch.cat(rows).to(device), left


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, dim: int, mult: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.w1, self.w2 = nn.Linear(dim, mult * dim), nn.Linear(mult * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_MC: Tensor) -> Tensor:
        """Return [M, C]."""
        return self.w2(self.dropout(F.gelu(self.w1(self.norm(x_MC)))))


def attend(q: Tensor, k: Tensor, v: Tensor, queries: Lengths, keys: Lengths, heads: int) -> Tensor:
    """Return attention of each cell's queries to its own keys, [M, H·D]; zero for cells without keys.

    Cells of one size are one call of the kernel. Others are taken one by one on a CPU, where padding would
    cost more than it saves, and padded and masked elsewhere.
    """
    if len(set(queries)) == 1 and len(set(keys)) == 1:
        return _attend_equal(q, k, v, len(queries), heads)
    if q.device.type == "cpu":
        cells = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return torch.cat([_attend_equal(*cell, 1, heads) for cell in cells])
    return _attend_padded(q, k, v, queries, keys, heads)


def _attend_equal(q: Tensor, k: Tensor, v: Tensor, n_cells: int, heads: int) -> Tensor:
    """Return [M, H·D] for cells that have equally many queries and equally many keys."""
    if len(q) == 0 or len(k) == 0:
        return q * 0
    q, k, v = (_split_heads(x.unflatten(0, (n_cells, -1)), heads) for x in (q, k, v))
    return attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


def _attend_padded(q: Tensor, k: Tensor, v: Tensor, queries: Lengths, keys: Lengths, heads: int) -> Tensor:
    """Return [M, H·D] for cells of any sizes, in one call of the kernel."""
    q_BHLD, k_BHTD, v_BHTD = (
        _split_heads(pad_sequence(x.split(n), batch_first=True), heads)
        for x, n in ((q, queries), (k, keys), (v, keys))
    )
    # A cell without keys may look at its padding, which is zero.
    visible = _mask([max(1, n) for n in keys], q.device)[:, None, None]
    out_BLC = attention(q_BHLD, k_BHTD, v_BHTD, visible).transpose(1, 2).flatten(2)
    return out_BLC[_mask(queries, q.device)]


def _split_heads(x_BLC: Tensor, heads: int) -> Tensor:
    """Return [B, H, L, D]."""
    return x_BLC.unflatten(-1, (heads, -1)).transpose(1, 2)


def _mask(lengths: Lengths, device: torch.device) -> Tensor:
    """Return [B, longest], true where a cell has a token."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]


class Layer(nn.Module):
    """Queries look at each other (genes only), at the context, and go through a feed-forward layer."""

    def __init__(self, model: Model, direction: Direction) -> None:
        super().__init__()
        shape = model.dim, model.dec_heads, model.dec_dim_head, model.dec_attn_dropout
        self.self_attention = Attention(*shape) if direction == "atac2rna" else None
        self.cross_attention = Attention(*shape)
        self.feed_forward = FeedForward(model.dim, model.dec_ff_mult, model.dec_ff_dropout)

    def forward(self, x_MC: Tensor, queries: Queries, context: Keys) -> Tensor:
        """Return [M, C]."""
        x_MC = self.among_queries(x_MC, queries)
        x_MC = x_MC + self.cross_attention(self.cross_attention.norm(x_MC), context, queries.lengths)
        return x_MC + self.feed_forward(x_MC)

    def among_queries(self, x_MC: Tensor, queries: Queries) -> Tensor:
        """Return [M, C] after self-attention, where there is any."""
        if self.self_attention is None:
            return x_MC
        normed_MC = self.self_attention.norm(x_MC)
        keys = self.self_attention.keys(normed_MC, queries.lengths, queries.real)
        return x_MC + self.self_attention(normed_MC, keys, queries.lengths)


@dataclass(frozen=True)
class Queries:
    """Embedded queries [M, C], how many each cell has, and which are real where padding is not left out."""

    x: Tensor
    lengths: Lengths
    real: Tensor | None = None


class FullModel(nn.Module):
    """The documented network: tokens in, logits out.

    Parameters
    ----------
    model
        The `model` section of a configuration.
    direction
        ATAC→RNA gives `max_express` + 1 logits per gene, RNA→ATAC one per cCRE.

    Notes
    -----
    `mask_padding` false in `model` repeats what the published program does with padding (index −1): padded
    context is looked at like any token, and so are padded genes, whose values count as zero.
    """

    def __init__(self, model: Model, direction: Direction) -> None:
        super().__init__()
        self.direction, self.mask_padding, self.chunk = direction, model.mask_padding, CHUNK
        genes: nn.Module = nn.Embedding(model.total_gene + 1, model.dim)
        ccres: nn.Module = DigitEmbedding(model.dim)
        atac2rna = direction == "atac2rna"
        self.context_embedding = ccres if atac2rna else genes
        self.query_embedding = genes if atac2rna else ccres
        self.value_embedding = None if atac2rna else nn.Embedding(model.max_express + 1, model.dim)
        self.context_norm = nn.LayerNorm(model.dim)
        self.dropout = nn.Dropout(model.dec_emb_dropout)
        self.layers: Any = nn.ModuleList(Layer(model, direction) for _ in range(model.dec_depth))
        self.norm = nn.LayerNorm(model.dim)
        self.to_out = nn.Linear(model.dim, model.max_express + 1 if atac2rna else 1)

    def forward(self, *, ccre_index: Tensor, gene_index: Tensor, gene_value: Tensor | None = None) -> Tensor:
        """Return the logits of the output modality's tokens.

        Parameters
        ----------
        ccre_index, gene_index
            0-based numbers in the reference, −1 where there is padding; int64 [B, P] and [B, G].
        gene_value
            RNA→ATAC: binned expression of the genes, 1 to `max_express`; int64 [B, G].

        Returns
        -------
        float [B, G, max_express + 1] or [B, P]; zero at padding, where that is masked.
        """
        context_index, query_index = self._sort(ccre_index, gene_index)
        context = self.encode(context_index, gene_value)
        return torch.cat(list(self.decode_chunks(context, query_index)), dim=1)

    def encode(self, index_BT: Tensor, value_BT: Tensor | None = None) -> list[Keys]:
        """Return the context of cells, layer by layer; tokens are projected once, however many look at them."""
        kept_BT = self._kept(index_BT)
        x_NC = self.context_embedding(index_BT[kept_BT] + 1)
        if self.value_embedding is not None:
            assert value_BT is not None, "RNA→ATAC needs gene_value"
            x_NC = x_NC + self.value_embedding(value_BT[kept_BT].clamp(min=0))
        x_NC = self.dropout(self.context_norm(x_NC))
        lengths = kept_BT.sum(dim=1).tolist()
        return [layer.cross_attention.keys(x_NC, lengths) for layer in self.layers]

    def decode_chunks(self, context: list[Keys], index_BQ: Tensor) -> Iterator[Tensor]:
        """Yield the logits of queries [B, Q]; cCREs in chunks where no gradient is wanted."""
        chunk = index_BQ.shape[1] if self.direction == "atac2rna" or torch.is_grad_enabled() else self.chunk
        for part in index_BQ.split(max(1, chunk), dim=1):
            yield self.decode(context, part)

    def decode(self, context: list[Keys], index_BQ: Tensor) -> Tensor:
        """Return the logits of queries [B, Q], as `forward` does; memory grows with their number."""
        queries = self._embed_queries(index_BQ)
        x_MC = self._before_last_layer(queries, context)
        x_MC = self.layers[-1](x_MC, queries, context[-1])
        logits_MO = self.to_out(self.norm(x_MC))
        if self.direction == "rna2atac":
            logits_MO = logits_MO.squeeze(-1)
        if len(logits_MO) == index_BQ.numel():
            return logits_MO.unflatten(0, index_BQ.shape)
        padded = logits_MO.new_zeros(*index_BQ.shape, *logits_MO.shape[1:])
        return padded.index_put((self._kept(index_BQ),), logits_MO)

    @torch.no_grad()
    def cross_attention(
        self,
        *,
        ccre_index: Tensor,
        gene_index: Tensor,
        gene_value: Tensor | None = None,
        as_published: bool = True,
    ) -> Tensor:
        """Return the last layer's cross-attention weights, mean over heads: float [B, Q, T], zero at padding.

        Arguments as in `forward`; see `last_attention` for `as_published`, and `attention_blocks` for what
        does not fit in memory.
        """
        context_index, query_index = self._sort(ccre_index, gene_index)
        whole = torch.zeros(*query_index.shape, context_index.shape[1], device=context_index.device)
        for cell in range(len(whole)):
            tokens, queries = context_index[cell], query_index[cell]
            value = None if gene_value is None else gene_value[cell : cell + 1]
            q_HMD, k_HTD = self.last_attention(self.encode(tokens[None], value), queries[None], as_published)
            weights = torch.cat(list(attention_blocks(q_HMD, k_HTD)))
            whole[cell, self._kept(queries).nonzero(), self._kept(tokens).nonzero().T] = weights
        return whole

    @torch.no_grad()
    def last_attention(
        self, context: list[Keys], query_index: Tensor, as_published: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return queries [H, Q, D] and keys [H, T, D] of the last cross-attention of one cell.

        Parameters
        ----------
        context
            Of one cell.
        query_index
            int64 [1, Q].
        as_published
            The published program makes the queries from the last layer's input as it is, before
            self-attention and norm. False gives those that the prediction itself uses.
        """
        queries = self._embed_queries(query_index)
        x_MC = self._before_last_layer(queries, context)
        last = self.layers[-1]
        if not as_published:
            x_MC = last.cross_attention.norm(last.among_queries(x_MC, queries))
        both = last.cross_attention.to_q(x_MC), context[-1].key
        q_HMD, k_HTD = (_split_heads(x[None], last.cross_attention.heads)[0] for x in both)
        return q_HMD, k_HTD

    def _sort(self, ccre_index: Tensor, gene_index: Tensor) -> tuple[Tensor, Tensor]:
        return (ccre_index, gene_index) if self.direction == "atac2rna" else (gene_index, ccre_index)

    def _kept(self, index: Tensor) -> Tensor:
        """Return which tokens are computed: the real ones, or all."""
        return index >= 0 if self.mask_padding else torch.ones_like(index, dtype=torch.bool)

    def _embed_queries(self, index_BQ: Tensor) -> Queries:
        kept_BQ = self._kept(index_BQ)
        index_M = index_BQ[kept_BQ]
        # Genes are embedded by number + 1, 0 being padding; queried cCREs by the bare number.
        x_MC = self.query_embedding(index_M + 1 if self.direction == "atac2rna" else index_M.clamp(min=0))
        real = None if self.mask_padding else index_M >= 0
        return Queries(self.dropout(x_MC), kept_BQ.sum(dim=1).tolist(), real)

    def _before_last_layer(self, queries: Queries, context: list[Keys]) -> Tensor:
        x_MC = queries.x
        for layer, keys in zip(self.layers[:-1], context[:-1], strict=True):
            x_MC = layer(x_MC, queries, keys)
        return x_MC


def attention_blocks(q_HMD: Tensor, k_HTD: Tensor, block: int = 256) -> Iterator[Tensor]:
    """Yield attention weights, mean over heads, in blocks of queries: float32 [≤ block, T]."""
    for q_part in q_HMD.split(block, dim=1):
        scores = q_part @ k_HTD.transpose(1, 2) * q_part.shape[-1] ** -0.5
        yield scores.float().softmax(dim=-1).mean(dim=0)


def load_published(
    weights_path: str | Path, config: Mapping[str, Any], direction: Direction, mask_padding: bool = True
) -> FullModel:
    """Read a published checkpoint.

    Parameters
    ----------
    weights_path
        `pytorch_model.bin`, read without running code, or a `.safetensors` file.
    config
        The configuration it was trained with: its `model` section, or the whole.
    direction
        What the model predicts.
    mask_padding
        False repeats the published program, which lets padding into attention.

    Returns
    -------
    The model in eval mode, float32, on the CPU.

    Raises
    ------
    CheckpointError
        The file cannot be read, or its tensors are not those of the configuration.
    """
    section = dict(config.get("model", config)) | {"architecture": "full", "mask_padding": mask_padding}
    model = FullModel(parse_config({"model": section}, direction).model, direction)
    tensors = read_tensors(Path(weights_path))
    state = model.state_dict()
    names = {published_name(name, direction): name for name in state}
    check_tensors(tensors, {theirs: state[ours] for theirs, ours in names.items()}, Path(weights_path))
    model.load_state_dict({ours: tensors[theirs] for theirs, ours in names.items()})
    return model.eval()


def export_published(model: FullModel, path: str | Path) -> Path:
    """Write the weights in the published layout: a `.safetensors` file, or else as `torch.save` does."""
    from safetensors.torch import save_file

    state = model.state_dict()
    tensors = {published_name(k, model.direction): v.detach().cpu().contiguous() for k, v in state.items()}
    with atomic_path(path) as temporary:
        if temporary.suffix == ".safetensors":
            save_file(tensors, temporary)
        else:
            torch.save(tensors, temporary)
    return Path(path)
