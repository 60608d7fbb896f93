"""What a trained model knows of links: attention, effects of closing cCREs, and profiles over its cell states."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from cisformer.data.batches import Batch
from cisformer.links.statistics import Pairs, two_way_rank
from cisformer.model.cis import CisModel
from cisformer.model.documented_task import FullTask

FAINT_STATE = 1e-3
"""States of which genes make less than this share of what they make of the strongest one are left out."""


def state_profiles(model: CisModel, n_open: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how genes [G, K] and cCREs [P, K] change with the model's principal cell states.

    cCREs: with z = x V / s for normalised accessibility x, principal axes V and their standard deviations
    s, the regression of x on z is V s; the projection holds V / s, of which the length of each column is 1
    / s. Genes: the linear path's loadings, and what its weights of single cCREs add, since these change
    with the states as well.

    Parameters
    ----------
    model
        An ATAC→RNA model.
    n_open
        Open cCREs of a typical cell, which says what x of an open cCRE is.
    """
    principal = model.projection.principal.cpu().numpy()
    components = model.projection.components.double().cpu().numpy()[:, principal]
    ccre = components / np.maximum(np.square(components).sum(axis=0), 1e-30)
    gene = model.state_loadings().double().cpu().numpy()[:, principal]
    assert model.cis is not None
    unit = model.projection.open_value(n_open)
    weight = model.pair_weights().double().cpu().numpy()
    where = (model.cis.window_gene.cpu().numpy(), model.cis.window_ccre.cpu().numpy())
    per_open = ccre / np.maximum(unit, 1e-9)[:, None]
    gene = gene + sp.csr_matrix((weight, where), shape=(len(gene), len(ccre))) @ per_open
    strength = np.square(gene).sum(axis=0)
    in_use = strength > FAINT_STATE * strength.max(initial=0)
    return gene[:, in_use], ccre[:, in_use]


class AttentionSums:
    """Sums over cells of rank-normalised attention and of in-silico effects, by pair.

    A model that kept its closed-form start attends with random weights to values that are all 0: it has no attention.

    Parameters
    ----------
    model
        An ATAC→RNA model.
    window_pair
        What `places_in_window` says of the pairs to report; [E].
    """

    def __init__(self, model: CisModel, window_pair: np.ndarray) -> None:
        assert model.cis is not None
        self.model, self.window_pair = model, window_pair
        self.shape = len(model.layout.target_index), len(model.layout.input_index)
        self.attends = bool(model.cis.pair_value.weight.any())
        self.attention, self.effect = (np.zeros(len(model.pair_weights()) + 1) for _ in range(2))
        self.attention[-1] = self.effect[-1] = np.nan

    def add(self, batch: Batch) -> None:
        """Add the cells of a batch."""
        at_once = 1 if batch.index.device.type == "cpu" else None  # edges of one cell fit into a CPU's cache
        for edges in self.model.cis_attention(batch, at_once):
            cell, gene, ccre, pair = (
                x.cpu().numpy() for x in (edges.cell, edges.gene, edges.ccre, edges.pair)
            )
            np.add.at(self.effect, pair, edges.effect.double().cpu().numpy())
            if self.attends:
                rank = two_way_rank(edges.mean_weight.cpu().numpy(), cell, gene, ccre, *self.shape)
                np.add.at(self.attention, pair, rank)

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return attention and effects, NaN where the model has none, as beyond its window; float64 [E] each."""
        attention, effect = self.attention[self.window_pair], self.effect[self.window_pair]
        return attention if self.attends else np.full_like(attention, np.nan), effect


def places_in_window(model: CisModel, pairs: Pairs) -> np.ndarray:
    """Return the number of each pair in the model's window, or −1; int64 [E]."""
    assert model.cis is not None
    n_ccres = len(model.layout.input_index)
    known = model.cis.window_gene.cpu().numpy() * n_ccres + model.cis.window_ccre.cpu().numpy()
    order = np.argsort(known)
    known, wanted = known[order], pairs.gene * n_ccres + pairs.ccre
    place = np.searchsorted(known, wanted)
    found = np.append(known, -1)[place] == wanted
    return np.where(found, np.append(order, -1)[place], -1)


class WholeAttentionSums:
    """Sums over cells of architecture full's rank-normalised attention, by pair; effects are not known."""

    def __init__(self, task: FullTask, pairs: Pairs) -> None:
        self.task, self.pairs = task, pairs
        self.attention, self.effect = np.zeros(len(pairs)), np.full(len(pairs), np.nan)

    def add(self, batch: Batch) -> None:
        """Add the cells of a batch: of each, the pairs whose cCRE is open."""
        n_ccres = len(self.task.layout.input_index)
        for cell, open_ in enumerate(batch.index.cpu().split(batch.indptr.diff().tolist())):
            token = np.full(n_ccres, -1)
            token[open_.numpy()] = np.arange(len(open_))
            here = np.flatnonzero(token[self.pairs.ccre] >= 0)
            gene, place = self.pairs.gene[here], token[self.pairs.ccre[here]]
            rank = self.task.pair_ranks(batch, cell, torch.from_numpy(gene), torch.from_numpy(place))
            self.attention[here] += rank.double().numpy()

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return attention, and NaN for effects; float64 [E] each."""
        return self.attention, self.effect
