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
    """

    def __init__(self, model: CisModel, pairs: Pairs) -> None:
        self.model = model
        assert model.cis is not None
        gene, ccre = model.cis.window_gene.cpu().numpy(), model.cis.window_ccre.cpu().numpy()
        self.shape = len(model.layout.target_index), len(model.layout.input_index)
        key, wanted = pairs.gene * self.shape[1] + pairs.ccre, gene * self.shape[1] + ccre
        place = np.searchsorted(key, wanted)
        inside = place < len(key)
        inside[inside] = key[place[inside]] == wanted[inside]
        self.place = np.where(inside, place, -1)
        self.inside = np.zeros(len(pairs), dtype=bool)
        self.inside[place[inside]] = True
        self.attends = bool(model.cis.pair_value.weight.any())
        self.attention, self.effect = np.zeros(len(pairs)), np.zeros(len(pairs))

    def add(self, batch: Batch) -> None:
        """Add the cells of a batch."""
        edges = self.model.cis_attention(batch)
        cell, gene, ccre = (x.cpu().numpy() for x in (edges.cell, edges.gene, edges.ccre))
        place = self.place[edges.pair.cpu().numpy()]
        kept = place >= 0
        np.add.at(self.effect, place[kept], edges.effect.double().cpu().numpy()[kept])
        if not self.attends:
            return
        weight = edges.weight.mean(dim=1).cpu().numpy()
        rank = two_way_rank(
            weight, cell, gene, ccre, *map(len, (self.model.prior, self.model.projection.weight))
        )
        np.add.at(self.attention, place[kept], rank[kept])

    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Return attention and effects, NaN where the model has none, as beyond its window; float64 [E] each."""
        attention = np.where(self.inside & self.attends, self.attention, np.nan)
        return attention, np.where(self.inside, self.effect, np.nan)


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
