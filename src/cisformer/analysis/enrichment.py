"""Do a trait's variants lie in cCREs that are linked in one cell type, more than in cCREs like them?

A locus counts once, by one cCRE. It is compared with cCREs that are alike in distance to the nearest TSS, in
accessibility over all cells, in length, and in the number of cCREs around; what is left is the cell type. The matched
draw follows GREGOR (Schmidt et al., Bioinformatics 2015, doi:10.1093/bioinformatics/btv201), which matches variants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from cisformer.data.genome import nearest_tss
from cisformer.links.statistics import false_discovery_rate

FEWEST_MATCHED = 20
"""Smallest group of like cCREs, of which one is drawn."""
SPLITS = (0, 1, 2, 0, 1, 3)
"""Order in which features divide cCREs; accessibility and distance to the TSS do so twice as often."""
LOCUS_BP = 250_000
"""A locus; also how far around a cCRE others are counted, since of a dense locus fewer cCREs are kept."""
FEWEST_LOCI = 5


@dataclass(frozen=True)
class LinkedShare:
    """How far each cCRE is linked in each cell type.

    Attributes
    ----------
    ccre
        Rows of all cCREs that are listed in a type; int64 [C], ascending.
    score
        Cell type → best score of each, 0 where it is not listed; float32 [C].
    n_open
        In how many cells of all types each is open; [C].
    """

    ccre: np.ndarray
    score: dict[str, np.ndarray]
    n_open: np.ndarray


def linked_enrichment(
    hits: pd.DataFrame,
    linked: LinkedShare,
    ccres: pd.DataFrame,
    genes: pd.DataFrame,
    *,
    n_draws: int,
    seed: int,
) -> pd.DataFrame:
    """Compare the cCREs of variants with matched ones, in each cell type.

    Parameters
    ----------
    hits
        One row per variant and cCRE it lies in: chrom, start (of the variant), pip, ccre.
    linked
        Best scores of all cCREs.
    ccres, genes
        Of the links.
    n_draws
        Number of matched draws.
    seed
        Of the draws.

    Returns
    -------
    One row per cell type: cell_type, n_loci, observed (sum over loci of the score of the best link, that is the number
    of linked ones to be expected), expected (its mean over draws), fold, p_value ((1 + draws at least as high) /
    (1 + draws)) and fdr (Benjamini–Hochberg over types); p_value is NaN below `FEWEST_LOCI` loci.
    """
    chosen = one_per_locus(hits[np.isin(hits["ccre"], linked.ccre)], seed)
    place = np.searchsorted(linked.ccre, chosen)
    names = list(linked.score)
    observed = np.array([score[place].sum(dtype=np.float64) for score in linked.score.values()])
    expected, p_value = np.full(len(names), np.nan), np.full(len(names), np.nan)
    if len(place) >= FEWEST_LOCI:
        matched = MatchedCcres.of(linked, ccres, genes)
        expected, p_value = matched.test(place, n_draws=n_draws, seed=seed)
    fold = np.divide(observed, expected, out=np.full(len(names), np.nan), where=expected > 0)
    table = {
        "cell_type": names, "n_loci": len(place), "observed": observed, "expected": expected, "fold": fold,
        "p_value": p_value, "fdr": false_discovery_rate(p_value),
    }  # fmt: skip
    return pd.DataFrame(table).sort_values(["p_value", "cell_type"], ignore_index=True)


@dataclass(frozen=True)
class MatchedCcres:
    """Best scores of all cCREs, and groups of cCREs that are alike.

    Attributes
    ----------
    score
        [types, C].
    group
        Number of each cCRE's group; int64 [C].
    width
        Lengths: a variant hits long ones more often; [C].
    """

    score: np.ndarray
    group: np.ndarray
    width: np.ndarray

    @classmethod
    def of(cls, linked: LinkedShare, ccres: pd.DataFrame, genes: pd.DataFrame) -> MatchedCcres:
        """Group all listed cCREs; arguments are those of `linked_enrichment`."""
        width = (ccres["end"] - ccres["start"]).to_numpy(np.float64)[linked.ccre]
        return cls(np.stack(list(linked.score.values())), strata(_features(linked, ccres, genes)), width)

    def test(self, place: np.ndarray, *, n_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean sum of scores over draws, and the p-value of the sum at these cCREs; type by type."""
        observed = self.score[:, place].sum(axis=1, dtype=np.float64)
        drawn = self._draw(place, n_draws, seed)
        higher = (drawn >= observed[:, None] - 1e-9).sum(axis=1)
        return drawn.mean(axis=1), (1 + higher) / (1 + n_draws)

    def _draw(self, place: np.ndarray, n_draws: int, seed: int) -> np.ndarray:
        """Return the sum of scores of each draw, of the group of each place one, by width; float64 [types, draws]."""
        rng = np.random.default_rng(seed)
        members = pd.Series(np.arange(len(self.group))).groupby(self.group).indices
        sums = np.zeros((len(self.score), n_draws))
        for row in place:
            alike = members[self.group[row]]
            weight = self.width[alike]
            sums += self.score[:, rng.choice(alike, n_draws, p=weight / weight.sum())]
        return sums


def one_per_locus(hits: pd.DataFrame, seed: int) -> np.ndarray:
    """Return one cCRE for each locus of 250 kb: that of the variant with the highest pip, or any; int64 [L].

    Neighbouring cCREs are linked alike, so that several of one locus are not several pieces of evidence.
    """
    if hits.empty:
        return np.zeros(0, dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(hits))
    mixed = hits.iloc[order].sort_values("pip", ascending=False, kind="stable", na_position="last")
    locus = _loci(mixed["chrom"].to_numpy(), mixed["start"].to_numpy(np.int64))
    best = mixed[~pd.Series(locus).duplicated().to_numpy()]
    rows: np.ndarray = best["ccre"].drop_duplicates().to_numpy(np.int64)
    return np.sort(rows)


def _loci(chrom: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Number the loci that variants lie in: from the first variant on, as far as `LOCUS_BP`, and so on; [N]."""
    order = np.lexsort((start, chrom.astype(str)))
    locus, number, last, first = np.zeros(len(start), dtype=np.int64), -1, None, 0
    for row in order:
        if chrom[row] != last or start[row] > first + LOCUS_BP:
            number, last, first = number + 1, chrom[row], start[row]
        locus[row] = number
    return locus


def _features(linked: LinkedShare, ccres: pd.DataFrame, genes: pd.DataFrame) -> np.ndarray:
    """Return what cCREs are matched by: accessibility, distance to the nearest TSS, length, cCREs around; [C, 4]."""
    rows = ccres.iloc[linked.ccre].reset_index(drop=True)
    _, distance = nearest_tss(rows, genes)
    middle = (rows["start"] + rows["end"]).to_numpy(np.int64) // 2
    around = np.zeros(len(rows))
    for members in rows.groupby("chrom", sort=False).indices.values():
        places = np.sort(middle[members])
        low = np.searchsorted(places, middle[members] - LOCUS_BP)
        around[members] = np.searchsorted(places, middle[members] + LOCUS_BP, side="right") - low
    length = (rows["end"] - rows["start"]).to_numpy()
    return np.stack([linked.n_open, np.abs(distance), length, around], axis=1)


def strata(features: np.ndarray) -> np.ndarray:
    """Divide cCREs into groups of at least `FEWEST_MATCHED` that are alike: halves of halves, feature by feature; [C].

    A partition, where each cCRE is as likely as the others of its group to be hit, keeps p-values of random variants
    uniform however scores depend on the features. Nearest neighbours do not: those of extreme cCREs are less extreme.
    """
    group = np.zeros(len(features), dtype=np.int64)
    for level in range(max(int(np.log2(max(len(features), 1) / FEWEST_MATCHED)), 0)):
        values = pd.Series(features[:, SPLITS[level % len(SPLITS)]])
        share = values.groupby(group).rank(pct=True, method="first").to_numpy()
        group = 2 * group + (share > 0.5)
    return group
