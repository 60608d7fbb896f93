"""Transfer cell labels from a reference to predicted cells, by their nearest neighbours."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.data.batches import normalise_rna
from cisformer.data.features import gene_identity
from cisformer.data.h5ad import load_h5ad
from cisformer.errors import InputError
from cisformer.prediction.compact import STATES
from cisformer.runtime.files import atomic_path, refuse_existing

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
UNKNOWN = "unknown"
FEWEST_GENES = 50
N_COMPONENTS = 30


@dataclass(frozen=True)
class TransferOptions:
    """How labels are carried over; see `transfer_labels`."""

    n_neighbors: int = 30
    min_confidence: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_neighbors < 1:
            raise InputError(f"n_neighbors is {self.n_neighbors}", hint="give at least 1")
        if not 0 <= self.min_confidence <= 1:
            raise InputError(f"min_confidence is {self.min_confidence}", hint="give a share from 0 to 1")


def transfer_labels(
    predicted: AnnData | str | Path,
    reference: AnnData | str | Path,
    key: str,
    *,
    n_neighbors: int = 30,
    min_confidence: float = 0.5,
    seed: int = 0,
) -> pd.DataFrame:
    """Label predicted cells like their nearest neighbours among labelled cells.

    If both are predictions of one model (the reference, for example, of the multiome it was trained on), cells are
    compared by their states in that model. Otherwise they are compared by the expression of their common genes. It is
    standardised within each of the two sets, since a prediction varies less than a measurement, and projected on
    principal components of the reference; the distance is cosine.

    Parameters
    ----------
    predicted
        Predicted cells: expression, or accessibility with ``obsm["X_cisformer"]``. A file (`.h5ad`) or an AnnData.
    reference
        Labelled cells: measured or predicted expression, or predictions of the same model.
    key
        Column of the reference's `obs` that holds the labels; cells without one are left out.
    n_neighbors
        Number of labelled neighbours that vote.
    min_confidence
        A cell with a smaller share of votes for its label is called "unknown".
    seed
        Random seed of the principal components.

    Returns
    -------
    DataFrame
        Indexed by barcode: `key`, the label or "unknown"; ``<key>_best``, the label with most votes;
        ``<key>_confidence``, its share of the votes, from 0 to 1.

    Raises
    ------
    InputError
        No such column, too few labelled cells, or too few common genes.
    """
    options = TransferOptions(n_neighbors, min_confidence, seed)
    cells, labelled = load_h5ad(predicted), load_h5ad(reference)
    if key not in labelled.obs:
        raise InputError(
            f"there is no column {key!r} in the reference's obs",
            hint=f"there are: {', '.join(map(str, labelled.obs.columns)) or 'none'}",
        )
    known = labelled.obs[key].notna().to_numpy()
    if known.sum() < 2:
        raise InputError(f"{known.sum()} reference cells have a value in {key!r}", hint="label some first")
    labels = labelled.obs[key][known].astype(str).to_numpy()
    query, target = _common_space(cells, labelled[known], options)
    return (
        _vote(query, target, labels, options)
        .set_axis(cells.obs_names)
        .rename(columns=lambda c: c.format(key=key))
    )


def _common_space(
    cells: AnnData, labelled: AnnData, options: TransferOptions
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return both as points of one space, [n_cells, k] and [n_labelled, k]."""
    if _same_model(cells, labelled):
        logger.info("labels: cells are compared by their states in the model")
        return np.asarray(cells.obsm[STATES]), np.asarray(labelled.obsm[STATES])
    query, target = _common_genes(cells, labelled)
    logger.info("labels: cells are compared by %d common genes", query.shape[1])
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize

    query, target = _standardised(query), _standardised(target)
    pca = PCA(min(N_COMPONENTS, *target.shape), random_state=options.seed).fit(target)
    return normalize(pca.transform(query)), normalize(pca.transform(target))


def _same_model(cells: AnnData, labelled: AnnData) -> bool:
    """Tell whether both are predictions of one checkpoint."""
    records = [dict(adata.uns.get("cisformer", {})) for adata in (cells, labelled)]
    keys = ("checkpoint", "fingerprint", "direction")
    same = all(records[0].get(key) == records[1].get(key) is not None for key in keys)
    return same and all(STATES in adata.obsm for adata in (cells, labelled))


def _common_genes(cells: AnnData, labelled: AnnData) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return log-normalised expression of the genes that both have, matched by id or by name."""
    identities = [gene_identity(adata.var) for adata in (cells, labelled)]
    best: tuple[NDArray[np.int64], NDArray[np.int64]] = (np.zeros(0, np.int64),) * 2
    for column in ("gene_id", "gene_name"):
        left, right = (
            pd.Series(np.arange(len(t)), t[column].str.upper())[
                lambda s: (s.index != "") & ~s.index.duplicated()
            ]
            for t in identities
        )
        shared = left.index.intersection(right.index, sort=False)
        if len(shared) > len(best[0]):
            best = left[shared].to_numpy(), right[shared].to_numpy()
    if len(best[0]) < FEWEST_GENES:
        names = [", ".join(adata.var_names[:3]) for adata in (cells, labelled)]
        raise InputError(
            f"both files share {len(best[0])} genes, at least {FEWEST_GENES} are needed: {names[0]} against {names[1]}",
            hint="give expression of the same species, or predictions of one model for both",
        )
    return _expression(cells)[:, best[0]], _expression(labelled)[:, best[1]]


def _expression(adata: AnnData) -> NDArray[np.floating]:
    """Return expression as it is, or log-normalised where it holds counts; dense."""
    if adata.X is None:
        raise InputError(
            "a table of cells has no matrix X", hint="give expression, or predictions of one model for both"
        )
    matrix = sp.csr_matrix(adata.X, dtype=np.float32)
    counts = bool(len(matrix.data)) and bool((matrix.data == np.round(matrix.data)).all())
    dense: NDArray[np.floating] = (normalise_rna(matrix) if counts else matrix).toarray()
    return dense


def _standardised(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return each column with mean 0 and standard deviation 1; constant columns are 0."""
    deviation = values.std(axis=0)
    standardised: NDArray[np.floating] = (values - values.mean(axis=0)) / np.where(
        deviation > 0, deviation, 1
    )
    return standardised


def _vote(
    query: NDArray[np.floating], target: NDArray[np.floating], labels: NDArray[Any], options: TransferOptions
) -> pd.DataFrame:
    """Return label, likeliest label and confidence of each query cell."""
    from sklearn.neighbors import KNeighborsClassifier

    knn = KNeighborsClassifier(min(options.n_neighbors, len(labels))).fit(target, labels)
    share = knn.predict_proba(query)
    best, confidence = knn.classes_[share.argmax(axis=1)], share.max(axis=1)
    sure = confidence >= options.min_confidence
    return pd.DataFrame(
        {"{key}": np.where(sure, best, UNKNOWN), "{key}_best": best, "{key}_confidence": confidence}
    )


def write_labels(labels: pd.DataFrame, path: str | Path, *, force: bool = False) -> Path:
    """Write the labels of cells as a table, one line per barcode; the first two columns are a `celltype_info`."""
    refuse_existing(path, force=force)
    with atomic_path(path, force=force) as temporary:
        labels.to_csv(temporary, sep="\t", header=False, float_format="%.4g")
    return Path(path)
