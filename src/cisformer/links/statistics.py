"""Statistics of gene–cCRE pairs: contact, association over cell states, partial correlation over cells, ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from scipy import special, stats

from cisformer.data.reference import Reference

CONTACT_OFFSET_BP, CONTACT_POWER = 5_000, 0.9
UNEXPLAINED = 3.0
"""Of a gene's profile over states: what its cCREs leave over what they explain."""
FEWEST_EXPECTED = 2.0
"""A pair is tested if at least so many cells are expected to have both: below, p-values are not uniform."""
LEAST_SKEW = 0.03
GENES_AT_ONCE = 256
"""Genes whose systems of equations are solved together; bounds memory."""


@dataclass(frozen=True)
class Pairs:
    """Some genes and the cCREs in their windows.

    Attributes
    ----------
    gene, ccre
        Numbers among the genes and cCREs at hand, sorted by gene, then cCRE; int64 [E].
    distance
        Signed distance from TSS to the middle of the cCRE in bp, negative upstream; int64 [E].
    """

    gene: np.ndarray
    ccre: np.ndarray
    distance: np.ndarray

    def __len__(self) -> int:
        return len(self.gene)

    @classmethod
    def of(cls, reference: Reference, genes: np.ndarray, ccres: np.ndarray, window_bp: int) -> Pairs:
        """Pair `genes` and `ccres` (reference rows) where a cCRE is within `window_bp` of the gene body."""
        from cisformer.data.genome import signed_distance, window_pairs

        gene_table = reference.genes.iloc[genes].reset_index(drop=True)
        ccre_table = reference.ccres.iloc[ccres].reset_index(drop=True)
        gene, ccre = window_pairs(gene_table, ccre_table, window_bp)
        return cls(gene, ccre, signed_distance(gene_table, ccre_table, gene, ccre))


def distance_contact(distance_bp: np.ndarray) -> np.ndarray:
    """Return the expected contact of two loci by distance, 1 at the TSS; any shape."""
    return (np.abs(distance_bp) / CONTACT_OFFSET_BP + 1.0) ** -CONTACT_POWER


def activity_contact(pairs: Pairs, activity: np.ndarray) -> np.ndarray:
    """Return each pair's share of accessibility × contact among its gene's pairs.

    Parameters
    ----------
    pairs
        All pairs around the genes.
    activity
        Accessibility of each cCRE in some cells, such as the share of them in which it is open; [P].

    Returns
    -------
    Float64 [E], between 0 and 1, summing to 1 over a gene's pairs (0 where nothing near the gene is open).
    """
    part = activity[pairs.ccre] * distance_contact(pairs.distance)
    total = np.bincount(pairs.gene, part)[pairs.gene] if len(pairs) else part
    return np.divide(part, total, out=np.zeros_like(part), where=total > 0)


def associate(pairs: Pairs, gene_profiles: np.ndarray, ccre_profiles: np.ndarray) -> np.ndarray:
    """Return how much of a gene's profile over cell states each of its cCREs takes, given the others.

    With b the gene's profile, scaled to length 1, and U the cCREs' profiles, likewise, one per row: the ridge
    regression w = U (UᵀU + λ·1)⁻¹ b. A cCRE whose neighbour tells the same gets half of what it would get
    alone. The penalty λ = 3·(cCREs in the window) / (states) is that of a normal prior under which all cCREs
    near a gene together explain a quarter of its profile.

    Parameters
    ----------
    pairs
        All pairs around the genes.
    gene_profiles, ccre_profiles
        Regression of each gene and cCRE on the same K white cell states; [G, K], or several [m, G, K], and [P, K].

    Returns
    -------
    Float32 [E] or [m, E], between −1 and 1; 0 where a profile is zero.
    """
    n_states = gene_profiles.shape[-1]
    result = np.zeros((*gene_profiles.shape[:-2], len(pairs)), np.float32)
    if len(pairs) == 0 or n_states == 0:
        return result
    unit_genes, unit_ccres = _unit_rows(gene_profiles), _unit_rows(ccre_profiles)
    genes, first = np.unique(pairs.gene, return_index=True)
    last = np.append(first[1:], len(pairs))
    for block in np.array_split(np.arange(len(genes)), -(-len(genes) // GENES_AT_ONCE)):
        windows = [unit_ccres[pairs.ccre[first[i] : last[i]]] for i in block]
        penalty = [UNEXPLAINED * len(near) / n_states for near in windows]
        gram = np.stack([near.T @ near for near in windows]) + np.multiply.outer(penalty, np.eye(n_states))
        profile = np.moveaxis(unit_genes[..., genes[block], :].reshape(-1, len(block), n_states), 0, 2)
        for i, near, weight in zip(block, windows, np.linalg.solve(gram, profile), strict=True):
            result[..., first[i] : last[i]] = (near @ weight).T
    return result


def _unit_rows(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    length = np.linalg.norm(matrix, axis=-1, keepdims=True)
    return np.divide(matrix, length, out=np.zeros_like(matrix), where=length > 0)


def orthonormal(*columns: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis [n, q] of the span of `columns` ([n] or [n, k] each) and the constant."""
    n = len(columns[0])
    matrix = np.column_stack([np.ones(n), *columns]).astype(np.float64)
    matrix[:, 1:] -= matrix[:, 1:].mean(axis=0)
    scale = np.linalg.norm(matrix, axis=0)
    matrix = matrix[:, scale > 1e-9] / scale[scale > 1e-9]
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    return left[:, values > 1e-8]


class PairProducts:
    """Products of expression and accessibility in each cell, of pairs that have both.

    Parameters
    ----------
    pairs
        Which gene with which cCRE.
    n_ccres
        Number of cCREs at hand.
    """

    def __init__(self, pairs: Pairs, n_ccres: int) -> None:
        by_ccre = np.argsort(pairs.ccre, kind="stable")
        self._start = np.searchsorted(pairs.ccre[by_ccre], np.arange(n_ccres + 1))
        self._pair, self._gene = by_ccre.astype(np.int32), pairs.gene[by_ccre].astype(np.int32)

    def of(self, rna: sp.csr_matrix, atac: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
        """Return pairs, with repeats, and the expression of the gene in a cell in which the cCRE is open."""
        parts = [self._part(rna[i : i + 32], atac[i : i + 32]) for i in range(0, rna.shape[0], 32)]
        if not parts:
            return np.zeros(0, np.int64), np.zeros(0)
        return np.concatenate([pair for pair, _ in parts]), np.concatenate([value for _, value in parts])

    def _part(self, rna: sp.csr_matrix, atac: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
        start, stop = self._start[atac.indices], self._start[atac.indices + 1]
        count = stop - start
        first = np.cumsum(count) - count
        place = np.arange(count.sum()) + np.repeat(start - first, count)
        row = np.repeat(np.arange(atac.shape[0]) * rna.shape[1], np.diff(atac.indptr))  # of `rna`, flat
        value = rna.toarray().ravel().take(np.repeat(row, count) + self._gene.take(place))
        both = np.flatnonzero(value > 0)
        return self._pair.take(place.take(both)), value.take(both).astype(np.float64)


class PartialCorrelation:
    """Partial correlation of expression and accessibility over cells, gathered block by block.

    Genes and cCREs are regressed on the columns of `basis`; their residuals are correlated. Only sums are
    kept, so that memory does not grow with the number of cells, and nothing is dense in cells × cCREs.

    Parameters
    ----------
    pairs
        Which gene with which cCRE.
    basis
        Orthonormal covariates of all cells to come, the constant among their span; [n, q].
    shape
        Numbers of genes and cCREs at hand.
    """

    def __init__(self, pairs: Pairs, basis: np.ndarray, shape: tuple[int, int]) -> None:
        n_genes, n_ccres = shape
        self.pairs, self.basis = pairs, basis
        self.product = np.zeros(len(pairs))
        self.squares, self.n_expressed, self.n_open = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_ccres)
        self.sums, self.cubes = np.zeros(n_genes), np.zeros(n_genes)
        # [q, n], but laid out as the products that are added to it
        self.gene_part, self.ccre_part = (np.zeros((n, basis.shape[1])).T for n in shape)
        self._seen = 0

    def add(
        self, rna: sp.csr_matrix, atac: sp.csr_matrix, products: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        """Add the next cells.

        Parameters
        ----------
        rna
            log1p-normalised expression; [b, G].
        atac
            Open cCREs; [b, P].
        products
            What `PairProducts.of` says of them, where it is known.
        """
        self.__dict__.pop("_scores", None)
        basis = self.basis[self._seen : self._seen + rna.shape[0]]
        self._seen += rna.shape[0]
        self.n_open += np.bincount(atac.indices, minlength=len(self.n_open))
        self.n_expressed += np.bincount(rna.indices, minlength=len(self.n_expressed))
        value = rna.data.astype(np.float64)
        for power, total in enumerate((self.sums, self.squares, self.cubes), start=1):
            total += np.bincount(rna.indices, value**power, len(total))
        self.gene_part += (rna.T.tocsr() @ basis).T  # by feature: twice as fast
        self.ccre_part += (atac.T.tocsr() @ basis).T
        pair, both = products or PairProducts(self.pairs, len(self.n_open)).of(rna, atac)
        np.add.at(self.product, pair, both)

    @property
    def expected(self) -> np.ndarray:
        """Cells expected to have both of a pair by chance; float64 [E]."""
        return self.n_open[self.pairs.ccre] * self.n_expressed[self.pairs.gene] / max(self._seen, 1)

    def correlation(self) -> np.ndarray:
        """Return the partial correlation of each pair; float64 [E], 0 where nothing varies."""
        gene, ccre = self.pairs.gene, self.pairs.ccre
        covariance = self.product.copy()
        for gene_row, ccre_row in zip(self.gene_part, self.ccre_part, strict=True):
            covariance -= gene_row[gene] * ccre_row[ccre]
        gene_left = _left(self.squares, self.gene_part)[gene]
        ccre_left = _left(self.n_open, self.ccre_part)[ccre]
        scale = np.sqrt(gene_left * ccre_left)
        return np.clip(np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0), -1, 1)

    def statistic(self) -> tuple[np.ndarray, int]:
        """Return t of each pair and the degrees of freedom; all 0 where there are none."""
        free = self._seen - self.basis.shape[1] - 1
        if free < 1:
            return np.zeros(len(self.pairs)), 0
        r = self.correlation()
        return r * np.sqrt(free / np.maximum(1 - r * r, 1e-12)), free

    @property
    def tested(self) -> np.ndarray:
        """Which pairs are frequent enough to test, and leave degrees of freedom; bool [E]."""
        return (self.expected >= FEWEST_EXPECTED) & (self._seen - self.basis.shape[1] > 1)

    def z(self) -> np.ndarray:
        """Return standard normal scores of the statistic; 0 for pairs too rare to test. Float64 [E]."""
        return self._scores[0].copy()

    @cached_property
    def _scores(self) -> tuple[np.ndarray, np.ndarray]:
        """What `z` returns, and the one-sided p-values of t of the pairs that are tested."""
        t, free = self.statistic()
        tested = self.tested
        z = np.zeros(len(t))
        tail = stats.t.sf(np.abs(t[tested]), free)
        z[tested] = np.sign(t[tested]) * stats.norm.isf(tail)
        return np.clip(z, -37, 37), tail

    def skewness(self) -> np.ndarray:
        """Return the skewness of the statistic without a link, from that of gene and cCRE over cells; float64 [E]."""
        n = max(self._seen, 1)
        mean, square, cube = self.sums / n, self.squares / n, self.cubes / n
        variance = np.maximum(square - mean**2, 1e-12)
        gene = (cube - 3 * mean * square + 2 * mean**3) / variance**1.5
        share = self.n_open / n
        ccre = (1 - 2 * share) / np.sqrt(np.maximum(share * (1 - share), 1e-12))
        return gene[self.pairs.gene] * ccre[self.pairs.ccre] / np.sqrt(n)

    def p_value(self) -> np.ndarray:
        """Return two-sided p-values; NaN for pairs too rare to test. Float64 [E].

        Those of t, unless the statistic is skewed, as it is where few cells have both: then those of a Pearson type
        III distribution with this skewness (Mielke and Berry 2007, Permutation Methods), to which t is too generous
        far out.
        """
        z, tail = self._scores
        tested = self.tested
        p = np.full(len(z), np.nan)
        p[tested] = 2 * tail
        skew = np.abs(self.skewness())
        skewed = tested & (skew > LEAST_SKEW)
        p[skewed] = skewed_p_value(z[skewed], skew[skewed])
        return p


def skewed_p_value(z: np.ndarray, skewness: np.ndarray) -> np.ndarray:
    """Return how often |z| is as large if z has mean 0, variance 1 and Pearson type III tails; float64 [E].

    Parameters
    ----------
    z
        Standard scores; [E].
    skewness
        Of z, above 0; [E].
    """
    shape = 4 / np.square(skewness)
    off = 2 * np.abs(z) / skewness
    return special.gammaincc(shape, shape + off) + special.gammainc(shape, np.maximum(shape - off, 0))


def _left(total: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the sum of squares that the covariates leave; 0 where it is rounding error."""
    left = total - np.square(part).sum(axis=0)
    return np.where(left > 1e-7 * total, left, 0)


def false_discovery_rate(p_value: np.ndarray) -> np.ndarray:
    """Return Benjamini–Hochberg adjusted p-values, float64 [E]. NaN entries are not counted, and stay NaN."""
    fdr = np.full(len(p_value), np.nan)
    tested = ~np.isnan(p_value)
    fdr[tested] = stats.false_discovery_control(p_value[tested])
    return fdr


def two_way_rank(
    weight: np.ndarray, cell: np.ndarray, gene: np.ndarray, ccre: np.ndarray, n_genes: int, n_ccres: int
) -> np.ndarray:
    """Rank attention weights of each cell both ways, then stretch them to 0–1 in each cell.

    The rank of an edge among the cCREs of its gene, and among the genes of its cCRE, each as a share of
    their number, are averaged. So a gene with few open cCREs, whose weights are all large, is comparable
    with others.

    Parameters
    ----------
    weight
        Attention weights of edges, at least 0, compared in single precision; [E].
    cell, gene, ccre
        What each edge joins, cell by cell in ascending order; int64 [E].
    n_genes, n_ccres
        More than the largest gene and cCRE.

    Returns
    -------
    Float64 [E], 0 for the weakest edges of a cell and 1 for the strongest.
    """
    if len(weight) == 0:
        return weight.astype(np.float64)
    rank = _rank_share(weight, cell * n_genes + gene) + _rank_share(weight, cell * n_ccres + ccre)
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    size = np.diff(first, append=len(cell))
    low, high = (np.repeat(best.reduceat(rank, first), size) for best in (np.minimum, np.maximum))
    return np.divide(rank - low, high - low, out=np.ones_like(rank), where=high > low)


def _rank_share(value: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """Return rank / number of entries within each segment, in (0, 1]; ties have their mean rank.

    Floats that are not negative sort as their bits do, so that segment and value make one whole number to sort.
    """
    bits = (value.astype(np.float32) + 0).view(np.uint32)  # + 0: no -0
    key = segment.astype(np.uint64) << np.uint64(32) | bits
    order = np.argsort(key, kind="stable")  # four times as fast: edges come nearly sorted by segment
    key, segment = key.take(order), segment.take(order)
    place = np.arange(1.0, len(key) + 1)
    if (key[1:] == key[:-1]).any():
        first = np.flatnonzero(np.append(True, key[1:] != key[:-1]))  # of each run of ties
        end = np.append(first[1:], len(key))
        place = np.repeat((first + end + 1) / 2, end - first)
    start = np.flatnonzero(np.append(True, segment[1:] != segment[:-1]))
    size = np.diff(start, append=len(key))
    result = np.empty(len(key))
    result[order] = (place - np.repeat(start, size)) / np.repeat(size, size)
    return result
