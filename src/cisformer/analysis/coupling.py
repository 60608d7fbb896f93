"""How much higher a gene's expression is in cells in which a cCRE is open: a measure that depths do not change.

Of some cells, M = (counts of the gene in cells in which the cCRE is open) / (counts expected there if expression did
not depend on it). Counts are expected in proportion to each cell's total, so that neither the depth of RNA nor the
gene's level enters; that sequencing misses open cCREs leaves M as it is, since it misses them in whatever cells.
`coupling` is M − 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from cisformer.links.statistics import PairProducts, Pairs

PRIOR_SQUARES = 3.0
"""How many squared expected counts the gene's own dispersion is worth."""
ONE_SIDED_5_PERCENT = 1.645
"""Standard errors by which a difference must exceed what accessibility can make of it."""


@dataclass(frozen=True)
class UnitSums:
    """What the cells of one unit (a group, or a donor's cells of a group) say of each gene, cCRE and pair.

    Attributes
    ----------
    n_cells
        Number of cells.
    size, size2
        Sums of the cells' sizes (total counts over their mean) and of their squares.
    counts, counts2, counts_size
        Of each gene, sums of its counts, of their squares, of counts times size; [G].
    n_expressed
        Cells that express each gene; [G].
    n_open, open_size, open_size2
        Cells in which each cCRE is open, and sums of their sizes and squared sizes; [P].
    observed, observed2, observed_size
        Of each pair, over cells in which the cCRE is open: sums of the gene's counts, of their squares, of counts
        times size; [E].
    expected
        Counts expected in these cells; [E].
    """

    n_cells: int
    size: float
    size2: float
    counts: np.ndarray
    counts2: np.ndarray
    counts_size: np.ndarray
    n_expressed: np.ndarray
    n_open: np.ndarray
    open_size: np.ndarray
    open_size2: np.ndarray
    observed: np.ndarray
    observed2: np.ndarray
    observed_size: np.ndarray
    expected: np.ndarray

    def cells_with_both(self, pairs: Pairs) -> np.ndarray:
        """Return the number of cells expected to have both of each pair; [E]."""
        number: np.ndarray = self.n_open[pairs.ccre] * self.n_expressed[pairs.gene] / max(self.n_cells, 1)
        return number


Block = tuple[np.ndarray, sp.csr_matrix, sp.csr_matrix, np.ndarray]
"""Of some cells: sizes [b], counts [b, G], open cCREs [b, P], covariates [b, q]."""


def sum_unit(blocks: Iterable[Block], pairs: Pairs, shape: tuple[int, int]) -> UnitSums:
    """Add up the cells of one unit, block by block.

    Expected counts of a gene are a regression of its counts on size times (1, covariates): with sizes as weights, so
    that it is exact where a rate does not depend on the covariates.
    """
    n_genes, n_ccres = shape
    products = PairProducts(pairs, n_ccres)
    n_cells, size, size2 = 0, 0.0, 0.0
    counts2, counts_size, n_expressed = (np.zeros(n_genes) for _ in range(3))
    n_open, open_size2 = np.zeros(n_ccres), np.zeros(n_ccres)
    observed, observed2, observed_size = (np.zeros(len(pairs)) for _ in range(3))
    gram, gene_part, ccre_part = np.zeros((0, 0)), np.zeros((0, 0)), np.zeros((0, 0))
    for sizes, rna, atac, covariates in blocks:
        design = np.column_stack([np.ones(len(sizes)), covariates])
        if n_cells == 0:
            q = design.shape[1]
            gram, gene_part, ccre_part = np.zeros((q, q)), np.zeros((q, n_genes)), np.zeros((q, n_ccres))
        n_cells, size, size2 = n_cells + len(sizes), size + sizes.sum(), size2 + np.square(sizes).sum()
        weighted = design * sizes[:, None]
        gram += design.T @ weighted
        gene_part += (rna.T @ design).T
        ccre_part += (atac.T @ weighted).T
        counts2 += np.bincount(rna.indices, np.square(rna.data, dtype=np.float64), n_genes)
        counts_size += rna.T @ sizes
        n_expressed += np.bincount(rna.indices, minlength=n_genes)
        n_open += np.bincount(atac.indices, minlength=n_ccres)
        open_size2 += atac.T @ np.square(sizes)
        pair, value = products.of(rna, atac)
        observed += np.bincount(pair, value, len(pairs))
        observed2 += np.bincount(pair, np.square(value), len(pairs))
        observed_size += np.bincount(
            *products.of(sp.csr_matrix(rna.multiply(sizes[:, None])), atac), len(pairs)
        )
    if n_cells == 0:
        gene_part, ccre_part, gram = np.zeros((1, n_genes)), np.zeros((1, n_ccres)), np.zeros((1, 1))
    slopes = np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ gene_part
    expected = np.zeros(len(pairs))
    for slope, part in zip(slopes, ccre_part, strict=True):
        expected += slope[pairs.gene] * part[pairs.ccre]
    return UnitSums(
        n_cells, size, size2, gene_part[0], counts2, counts_size, n_expressed, n_open, ccre_part[0], open_size2,
        observed, observed2, observed_size, expected,
    )  # fmt: skip


def dispersion(units: Iterable[UnitSums]) -> np.ndarray:
    """Return φ of each gene, for counts whose variance is m + φm² around the unit's mean rate; moments. [G]."""
    excess, squares = np.zeros(1), np.zeros(1)
    for unit in units:
        rate = unit.counts / max(unit.size, 1e-12)
        left = unit.counts2 - 2 * rate * unit.counts_size + np.square(rate) * unit.size2
        excess = excess + left - unit.counts
        squares = squares + np.square(rate) * unit.size2
    return np.maximum(np.divide(excess, squares, out=np.zeros_like(squares), where=squares > 0), 0)


def common_ratio(units: Iterable[UnitSums]) -> np.ndarray:
    """Return the M of each pair that all units share, drawn to 1 by one count; [E]."""
    observed, expected = np.ones(1), np.ones(1)
    for unit in units:
        observed = observed + unit.observed
        expected = expected + np.maximum(unit.expected, 0)
    return observed / expected


def open_dispersion(
    units: Sequence[UnitSums], pairs: Pairs, ratio: np.ndarray, phi: np.ndarray
) -> np.ndarray:
    """Return φ of each pair's gene among cells in which the cCRE is open, drawn to the gene's own; [E].

    These cells are more alike than all are, and it is their counts that the error comes from.

    Parameters
    ----------
    units, pairs, ratio, phi
        See `ratio_variance`.
    """
    excess = PRIOR_SQUARES * phi[pairs.gene]
    squares = np.full(len(pairs), PRIOR_SQUARES)
    for unit in units:
        rate = ratio * unit.counts[pairs.gene] / max(unit.size, 1e-12)
        square = np.square(rate) * unit.open_size2[pairs.ccre]
        excess += unit.observed2 - 2 * rate * unit.observed_size + square - rate * unit.open_size[pairs.ccre]
        squares += square
    found: np.ndarray = np.maximum(excess / squares, 0)
    return found


def ratio_variance(
    unit: UnitSums, pairs: Pairs, ratio: np.ndarray, phi: np.ndarray, open_phi: np.ndarray
) -> np.ndarray:
    """Return the variance of a unit's M, if its true value is `ratio`; [E], infinite where nothing is expected.

    By the delta method for M = (O / open size) / (C / size), O and C the gene's counts in open and in all cells, with
    variance m + φm² of a cell's count. Only totals of the gene and of the cCRE enter, so that the weight of a
    unit does not depend on what its pair of counts happens to be.

    Parameters
    ----------
    unit, pairs
        The cells' sums, and which gene with which cCRE.
    ratio
        M in all units; [E].
    phi, open_phi
        Dispersion of each gene, [G], and of the gene among cells in which the cCRE is open, [E].
    """
    gene, ccre = pairs.gene, pairs.ccre
    total, opened = unit.counts[gene], unit.open_size[ccre]
    rate = total / max(unit.size, 1e-12)
    rate_open = ratio * rate
    closed = np.maximum(unit.size - opened, 0)
    rest = np.maximum(total - rate_open * opened, 0)
    rate_closed = np.divide(rest, closed, out=np.zeros_like(rest), where=closed > 0)
    var_open = rate_open * opened + open_phi * np.square(rate_open) * unit.open_size2[ccre]
    var_closed = rate_closed * closed + phi[gene] * np.square(rate_closed) * (
        unit.size2 - unit.open_size2[ccre]
    )
    known = (rate > 0) & (opened > 0) & (unit.expected > 0)
    share = np.divide(1, rate * opened, out=np.zeros_like(rate), where=known)
    per_total = np.divide(ratio, total, out=np.zeros_like(rate), where=known)
    variance = var_open * np.square(share - per_total) + np.maximum(var_closed, 0) * np.square(per_total)
    return np.where(known & (variance > 0), variance, np.inf)


def accessibility_explains(
    ratio: tuple[np.ndarray, np.ndarray], error: np.ndarray, is_open: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Say for which pairs a cCRE that acts alike in both groups could make the difference in M; bool [E].

    If cells with an open cCRE express the gene 1 + β times as much as other cells, and a share π of cells has it open,
    then M = (1 + β) / (1 + βπ). So for one β > 0, M is lower in the group in which more cells have the cCRE open, and
    the ratio of the two M is at most the inverse ratio of the two π, whatever β is and however many open cCREs
    sequencing misses.

    Parameters
    ----------
    ratio
        M in A and in B; [E] each.
    error
        Standard error of their difference; [E].
    is_open
        Share of cells of A and of B with an open cCRE; [E] each. Depth is taken out by the median of their ratio.
    """
    change = np.divide(
        is_open[0], is_open[1], out=np.ones_like(error), where=(is_open[0] > 0) & (is_open[1] > 0)
    )
    change /= np.median(change)
    more_in_a = change > 1
    high, low = np.where(more_in_a, ratio, ratio[::-1])
    most = high * np.maximum(change, 1 / change)
    explained: np.ndarray = (low > high) & (low - most < ONE_SIDED_5_PERCENT * error)
    return explained
