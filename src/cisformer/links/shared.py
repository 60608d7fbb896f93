"""What all types share of a score: the prior's features, association of all cells, and the weights of evidence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from cisformer.data.genome import overlap_pairs, rename_chroms, tss
from cisformer.data.known_genomes import GENOMES, load_annotation
from cisformer.data.reference import Reference
from cisformer.links.evidence import state_profiles
from cisformer.links.measure import CellSums, LinkInputs, PairTests
from cisformer.links.prior import (
    PROMOTER_BP,
    UNKNOWN_BREADTH,
    LinkPrior,
    count_between,
    count_near,
    expression_breadth,
    load_prior,
    opening_rate,
    pair_features,
    relative_activity,
)
from cisformer.links.statistics import Pairs, associate
from cisformer.links.weights import (
    Evidence,
    EvidenceWeights,
    estimate_weights,
    exchange_genes,
    keep_total,
    probability,
)

SEEN_GENE, SEEN_CCRE = 0.05, 0.02
"""Weights are estimated from genes and cCREs seen in at least these shares of the cells."""
FEWEST_CELLS_OF_BREADTH, COUNTS_OF_BREADTH = 20, 20.0
"""A type tells breadth of expression with so many cells; with so many counts a type, half of it is believed."""


@dataclass(frozen=True)
class SharedEvidence:
    """What all types share.

    Attributes
    ----------
    pairs
        Genes and cCREs.
    prior, weights
        Of the score.
    genes_between, breadth, genes_near
        Features of the prior that no type changes; [E].
    is_promoter
        Which cCREs lie at the TSS of a gene; [P].
    association
        Of all cells; [E].
    less
        What is taken from all log odds, so that evidence adds no links.
    power
        Root of the number of cells expected to have both; [E].
    """

    pairs: Pairs
    prior: LinkPrior
    weights: EvidenceWeights
    genes_between: np.ndarray
    breadth: np.ndarray
    genes_near: np.ndarray
    is_promoter: np.ndarray
    association: np.ndarray
    less: float
    power: np.ndarray

    def activity(self, n_open: np.ndarray, n_cells: int) -> np.ndarray:
        """Return the accessibility of cCREs in some cells, over that of an average promoter; [P]."""
        return relative_activity(opening_rate(n_open / (n_cells + 1)), self.is_promoter)

    def prior_log_odds(self, activity: np.ndarray) -> np.ndarray:
        """Return the prior's log odds where cCREs are accessible like this; [E]."""
        of_ccre = self.prior.activity_log_odds(activity)
        return self._log_odds_of_closed + of_ccre[self.pairs.ccre]

    @cached_property
    def _log_odds_of_closed(self) -> np.ndarray:
        """The prior's log odds if cCREs were not accessible: what no type changes; [E]."""
        closed = np.zeros(len(self.pairs))
        return self.prior.log_odds(
            pair_features(self.pairs.distance, closed, self.genes_between, self.breadth, self.genes_near)
        )


def share_evidence(inputs: LinkInputs, cells: CellSums, tests: PairTests) -> SharedEvidence:
    """Return prior, association and weights of evidence, from all cells."""
    reference, layout, pairs = inputs.store.reference, inputs.layout, inputs.pairs
    genes = reference.genes.iloc[layout.target_index].reset_index(drop=True)
    ccres = reference.ccres.iloc[layout.input_index].reset_index(drop=True)
    site, middle = tss(genes), ((ccres["start"] + ccres["end"]) // 2).to_numpy()
    chrom, known = genes["chrom"].to_numpy(), _genes_of_genome(reference)
    n_cells, n_open = int(cells.n_cells.sum()), cells.n_open.sum(axis=0)
    level = cells.n_expressed.sum(axis=0) / n_cells
    partner = exchange_genes(chrom, level, np.random.default_rng(0))
    of_genes, of_ccres = state_profiles(inputs.model, float(np.exp(np.median(cells.depths[:, 1]))))
    both = associate(pairs, np.stack([of_genes, of_genes[partner]]), of_ccres)
    association, exchanged = both.astype(np.float64)
    shared = SharedEvidence(
        pairs=pairs,
        prior=load_prior(),
        weights=EvidenceWeights(),
        genes_between=count_between(known, chrom[pairs.gene], middle[pairs.ccre], site[pairs.gene]),
        breadth=_breadth(cells)[pairs.gene],
        genes_near=count_near(known, chrom, site)[pairs.gene],
        is_promoter=_promoters(genes, ccres),
        association=association,
        less=0.0,
        power=pair_power(pairs, cells),
    )
    prior = shared.prior_log_odds(shared.activity(n_open, n_cells))
    used = (level[pairs.gene] >= SEEN_GENE) & ((n_open / n_cells)[pairs.ccre] >= SEEN_CCRE)
    used &= np.abs(pairs.distance) > PROMOTER_BP
    measured = Evidence(probability(prior), shared.association, exchanged, tests.coupling, shared.power)
    weights = estimate_weights(measured.rows(used))
    added = weights.log_odds(shared.association, tests.coupling, shared.power)
    less = keep_total(prior[used], added[used]) if used.any() else 0.0
    return replace(shared, weights=weights, less=less)


def _genes_of_genome(reference: Reference) -> pd.DataFrame:
    """Return the genes of the reference's genome; its own where the genome is not built in, or has fewer.

    A data set may hold few genes. A pair would then seem to have none between gene and cCRE. It may also hold genes
    with which the prior was not fitted, such as all of GENCODE.
    """
    own = reference.genes.assign(gene_name=reference.gene_labels)
    if reference.genome not in GENOMES:
        return own
    known = load_annotation(reference.genome)
    n_known = (load_annotation(reference.genome, every_gene=True)["end"] > 0).sum()
    if n_known < (own["end"] > 0).sum():
        return own
    return known.assign(chrom=rename_chroms(known["chrom"], own["chrom"]))


def _breadth(cells: CellSums) -> np.ndarray:
    """Return the breadth of expression over the types that have enough cells to tell; [G].

    Few counts make any gene look specific, so breadth is shrunk to that of an unknown gene.
    """
    enough = cells.n_cells >= FEWEST_CELLS_OF_BREADTH
    counts = cells.counts[enough] if enough.sum() > 1 else cells.counts
    seen = counts.mean(axis=0)
    trust: np.ndarray = seen / (seen + COUNTS_OF_BREADTH)
    return UNKNOWN_BREADTH + trust * (expression_breadth(counts) - UNKNOWN_BREADTH)


def _promoters(genes: pd.DataFrame, ccres: pd.DataFrame) -> np.ndarray:
    """Say which cCREs lie within 500 bp of the TSS of a known gene; bool [P]."""
    site = tss(genes)
    around = pd.DataFrame(
        {"chrom": genes["chrom"], "start": np.maximum(site - PROMOTER_BP, 0), "end": site + PROMOTER_BP}
    )
    found = np.zeros(len(ccres), dtype=bool)
    found[overlap_pairs(around[(genes["end"] > 0).to_numpy()], ccres)[1]] = True
    return found


def pair_power(pairs: Pairs, cells: CellSums, number: int | None = None) -> np.ndarray:
    """Return the root of the number of cells expected to have both of a pair, in all cells or a type; [E]."""
    rows = slice(None) if number is None else slice(number, number + 1)
    n_cells = cells.n_cells[rows].sum()
    n_open, n_expressed = cells.n_open[rows].sum(axis=0), cells.n_expressed[rows].sum(axis=0)
    return np.sqrt(n_open[pairs.ccre] * n_expressed[pairs.gene] / n_cells)
