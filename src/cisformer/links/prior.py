"""The prior of a link: what position, accessibility and breadth of expression say, before gene and cCRE are compared.

Its weights come from real experiments, CRISPRi screens above all, and stand in ``resources/link_prior.json`` with
the figures of how they did on chromosomes left out (``scripts/fit_link_prior.py`` makes the file). Five features, all
of which any paired data set has:

- ``log_distance``: log of the distance between TSS and cCRE + 5 kb;
- ``log_activity``: log(1 + 20 · activity), where activity is accessibility over that of an average promoter;
- ``log_genes_between``: log(1 + protein-coding TSSs between the two);
- ``breadth``: how evenly cell types express the gene, 0 to 1. Genes that all types express are regulated less from
  afar;
- ``log_genes_near``: log(1 + protein-coding TSSs within 100 kb of the gene's). Genes among many have fewer links.

None depends on which other peaks or genes a data set happens to hold: a prior that counted peaks around the gene, or
ranked breadth among the data's genes, was too sure by up to half where peaks or genes were few.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import pandas as pd

from cisformer.data.genome import tss

FEATURES = ("log_distance", "log_activity", "log_genes_between", "breadth", "log_genes_near")
DISTANCE_OFFSET_BP = 5_000
ACTIVITY_SCALE = 20.0
NEAR_BP = 100_000
PROMOTER_BP = 500
UNKNOWN_BREADTH = 0.7
"""With it for all genes, the prior's sum in the screens is the number of links."""
_NONCODING = re.compile(
    r"^(?:[A-Z]{2}\d{6}|LINC|M[Ii][Rr]\d|M[Ii][Rr][Ll]|RNU|RN7|RNA5|Y_RNA|S[Nn][Oo][Rr]|ENS|Gm\d|.*Rik$)"
    r"|-AS\d|-DT$|-IT\d|-OT\d|\dP\d*$|-ps\d*$"
)
_STRIDE = 1 << 40  # more than any chromosome is long


@dataclass(frozen=True)
class LinkPrior:
    """Log odds of a link, linear in `FEATURES`.

    Attributes
    ----------
    intercept
        Log odds where all features are 0.
    weights
        One per feature, in the order of `FEATURES`.
    """

    intercept: float
    weights: tuple[float, ...]

    def log_odds(self, features: pd.DataFrame) -> np.ndarray:
        """Return the log odds of pairs with these `FEATURES`; float64 [E]."""
        return self.intercept + features[list(FEATURES)].to_numpy(np.float64) @ np.array(self.weights)

    def activity_log_odds(self, activity: np.ndarray) -> np.ndarray:
        """Return what accessibility, over that of an average promoter, adds to the log odds; any shape."""
        return self.weights[FEATURES.index("log_activity")] * np.log1p(ACTIVITY_SCALE * activity)


@cache
def load_prior() -> LinkPrior:
    """Return the prior that comes with the package."""
    text = resources.files("cisformer.resources").joinpath("link_prior.json").read_text(encoding="utf-8")
    table = json.loads(text)
    return LinkPrior(table["intercept"], tuple(table["weights"][name] for name in FEATURES))


def pair_features(
    distance_bp: np.ndarray,
    activity: np.ndarray,
    genes_between: np.ndarray,
    breadth: np.ndarray,
    genes_near: np.ndarray,
) -> pd.DataFrame:
    """Return the features of pairs.

    Parameters
    ----------
    distance_bp
        Between TSS and the middle of the cCRE, signed or not; [E].
    activity
        Accessibility of the cCRE over that of an average promoter; [E].
    genes_between
        Number of protein-coding TSSs between the two; [E].
    breadth
        Of the gene's expression, see `expression_breadth`; [E].
    genes_near
        Number of protein-coding TSSs around the gene's, see `count_near`; [E].
    """
    columns = (
        np.log(np.abs(distance_bp) + DISTANCE_OFFSET_BP),
        np.log1p(ACTIVITY_SCALE * activity),
        np.log1p(genes_between),
        breadth,
        np.log1p(genes_near),
    )
    return pd.DataFrame(dict(zip(FEATURES, columns, strict=True)))


def is_noncoding(names: pd.Series) -> np.ndarray:
    """Say which gene names look like those of genes that code for no protein; bool [G]."""
    return np.array([_NONCODING.search(str(name)) is not None for name in names], dtype=bool)


def count_between(genes: pd.DataFrame, chrom: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Count the protein-coding TSSs strictly between two positions; int64 [E].

    Parameters
    ----------
    genes
        All genes, with `gene_name`; those without coordinates are not counted.
    chrom, left, right
        Of each pair, the chromosome and the two positions in bp, in either order; [E].
    """
    counted = genes[(genes["end"].to_numpy() > 0) & ~is_noncoding(genes["gene_name"])]
    code, names = pd.factorize(counted["chrom"])
    places = np.sort(code * _STRIDE + tss(counted))
    start = pd.Index(names).get_indexer(pd.Index(chrom)).astype(np.int64) * _STRIDE
    low, high = np.minimum(left, right), np.maximum(left, right)
    between = np.searchsorted(places, start + high) - np.searchsorted(places, start + low, side="right")
    return np.where(start >= 0, np.maximum(between, 0), 0)


def count_near(genes: pd.DataFrame, chrom: np.ndarray, site: np.ndarray) -> np.ndarray:
    """Count the protein-coding TSSs within 100 kb of a gene's, its own among them; int64 [G].

    Parameters
    ----------
    genes
        As in `count_between`.
    chrom, site
        Chromosome and TSS of each gene to count for, TSS in bp; [G].
    """
    return count_between(genes, chrom, site - NEAR_BP, site + NEAR_BP)


def expression_breadth(expression: np.ndarray) -> np.ndarray:
    """Return how evenly each gene is expressed over cell types, 1 where all express it alike; [G].

    The mean over types of log2(1 + CPM), over its maximum: 1 less a form of the index τ of Yanai et al. 2005.
    `UNKNOWN_BREADTH` where there is one type only, or the gene is not expressed.

    Parameters
    ----------
    expression
        Counts or CPM summed over each type's cells; [types, G].
    """
    total = expression.sum(axis=1, keepdims=True)
    level = np.log2(1 + 1e6 * expression / np.maximum(total, 1e-12))
    most = level.max(axis=0, initial=0)
    known = (most > 0) & (len(expression) > 1)
    return np.where(known, level.mean(axis=0) / np.maximum(most, 1e-12), UNKNOWN_BREADTH)


def opening_rate(share_open: np.ndarray) -> np.ndarray:
    """Return the rate at which a cCRE is seen open, −log(1 − share of cells); it does not level off as shares do."""
    return -np.log1p(-np.minimum(share_open, 0.999))


def relative_activity(rate: np.ndarray, is_promoter: np.ndarray) -> np.ndarray:
    """Return accessibility over its mean at promoters; over the mean of the top tenth where there are none. [P]."""
    rate = np.asarray(rate, np.float64)
    chosen = rate[is_promoter & (rate > 0)]
    if len(chosen) == 0:
        chosen = rate[rate >= np.quantile(rate, 0.9)] if len(rate) else rate
    typical = chosen.mean() if len(chosen) else 0.0
    return rate / typical if typical > 0 else np.zeros_like(rate)
