"""Does a prediction know which cCREs are open in a cell, beyond how often each of them is open in any cell?

An open cCRE is compared only with closed ones that were open about as often in the training cells. So a mean profile,
any power of it, and the mean of cells drawn at random are at chance; benchmarks/RESULTS.md shows it on real cells.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from cisformer.evaluation.matrices import Matrix, dense, divide, matrix_blocks
from cisformer.evaluation.ranking import ranking_scores

STEP = 0.05
"""Width of a stratum in log odds of being open: within one, odds differ by 5 % at most."""


def frequency_strata(mean: np.ndarray) -> list[np.ndarray]:
    """Return positions of the cCREs of each stratum of like frequency; a cCRE that is alone in its stratum is left out.

    Parameters
    ----------
    mean
        Share of the training cells in which each cCRE is open.
    """
    share = np.clip(mean, 1e-9, 1 - 1e-9)
    log_odds = np.log(share / (1 - share))
    order = np.argsort(log_odds, kind="stable")
    number = np.floor((log_odds[order] - log_odds.min()) / STEP)
    return [part for part in np.split(order, np.flatnonzero(np.diff(number)) + 1) if len(part) > 1]


def like_frequency_scores(
    predicted: Matrix, truth: sp.spmatrix, strata: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC, and average precision above chance, of each cell within strata of like frequency.

    Parameters
    ----------
    predicted
        Scores [cells × cCREs].
    truth
        The same shape; an entry that is not zero is open.
    strata
        Positions of the cCREs of each stratum.

    Returns
    -------
    tuple[numpy.ndarray, numpy.ndarray]
        One value per cell each: the mean over strata, weighted by the number of the cell's open cCREs in it. Chance is
        0.5 and 0. NaN for a cell without a stratum that holds both open and closed cCREs.
    """
    matrix = sp.csc_matrix(predicted) if sp.issparse(predicted) else predicted
    columns = sp.csc_matrix(truth)
    sums = np.zeros((3, predicted.shape[0]))
    for stratum in strata:
        block = dense(matrix[:, stratum])
        ranking = ranking_scores(block, columns[:, stratum], axis=1)
        above = ranking.auprc - chance_precision(block, ranking.n_positive)
        weight = np.where(np.isfinite(ranking.auroc), ranking.n_positive, 0)
        sums += [weight, weight * np.nan_to_num(ranking.auroc), weight * np.nan_to_num(above)]
    return divide(sums[1], sums[0]), divide(sums[2], sums[0])


def chance_precision(predicted: np.ndarray, n_positive: np.ndarray) -> np.ndarray:
    """Return the expected average precision of each row if its positives were drawn at random, ties as they are.

    Without ties it is the known mean over random orders: Bestgen, The Prague Bulletin of Mathematical Linguistics 103
    (2015). Ties lower it, so that a method with many ties would seem worse than chance beside it.

    Parameters
    ----------
    predicted
        Scores [rows × members].
    n_positive
        Number of positives of each row.
    """
    n_rows, n = predicted.shape
    place = np.arange(1, n + 1)
    inverse = np.empty(n_rows)
    for rows in matrix_blocks(predicted, 1):
        ordered = np.sort(predicted[rows], axis=1)[:, ::-1]
        last = np.ones(ordered.shape, dtype=bool)
        last[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
        n_above = np.minimum.accumulate(np.where(last, place, n)[:, ::-1], axis=1)
        inverse[rows] = (1 / n_above).mean(axis=1)
    pair = (n_positive - 1) / (n - 1)
    return np.asarray(pair + (1 - pair) * inverse)
