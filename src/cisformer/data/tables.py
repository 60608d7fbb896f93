"""Check the tables of cells and features: barcodes, which features belong to a modality, swapped axes."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cisformer.config import Modality
from cisformer.data.features import are_row_numbers
from cisformer.errors import InputError

logger = logging.getLogger(__name__)

FEATURE_TYPES = {
    "rna": {"gene expression", "gex", "rna"},
    "atac": {"peaks", "atac", "chromatin accessibility"},
}
"""What feature types and the modalities of an h5mu are called, in lower case."""

FEATURE_TYPE_COLUMNS = ("feature_types", "feature_type", "modality")
"""Columns of `var` that may tell genes from peaks."""

_REGION_NAME = r"^(chr)?[^\s:]+[:_-]\d+[_-]\d+$"
_FEW = 0.02
"""Fewer features than this share do not tell that a file holds genes and peaks."""
_FEATURE_NAME = r"^ENS[A-Z]*G\d{11}|^chr[^\s:]+[:_-]\d+[_-]\d+$"
_BARCODE_NAME = r"^(.*[#_])?[ACGT]{12,}([-_.].*)?$"
_CONTROL = r"[\x00-\x1f\x7f\ud800-\udfff]"
"""What no line of a text file can hold."""

BARCODE_COLUMNS = (
    "barcode",
    "barcodes",
    "cell_barcode",
    "cb",
    "cell_id",
    "cellid",
    "cell",
    "cellnames",
    "index",
)
"""Columns of `obs` that may hold the barcodes, in lower case, where the names only count rows."""


def check_barcodes(obs: pd.DataFrame, label: str) -> None:
    """Raise `InputError` where barcodes are empty, hold control characters, or repeat."""
    unfit = obs.index[obs.index.str.contains(_CONTROL) | (obs.index == "")]
    if len(unfit):
        raise InputError(
            f"{label} has {len(unfit):,} barcodes that are empty or hold control characters, such as {unfit[0]!r}",
            hint="rename these cells",
        )
    repeated = obs.index[obs.index.duplicated()].unique()
    if len(repeated):
        raise InputError(
            f"{label} has {len(repeated):,} barcodes more than once, such as {', '.join(repeated[:3])}",
            hint="make them unique, for instance by adding the sample's name, in the same way in RNA and ATAC",
        )


def with_barcodes(obs: pd.DataFrame, label: str) -> pd.DataFrame:
    """Name cells by the column of barcodes where their names only count rows."""
    if not are_row_numbers(obs.index):
        return obs
    columns = {name.lower(): name for name in obs.columns[::-1]}
    for column in (columns[name] for name in BARCODE_COLUMNS if name in columns):
        barcodes = obs[column].astype(str)
        if barcodes.is_unique and not are_row_numbers(pd.Index(barcodes)):
            logger.warning(
                "%s: cells are named by row numbers; their barcodes are read from obs[%r]", label, column
            )
            return obs.set_axis(pd.Index(barcodes.to_numpy()))
    return obs


def refuse_peaks(var: pd.DataFrame, modality: Modality, label: str) -> None:
    """Raise `InputError` where RNA is wanted and all features are peaks."""
    names = pd.Series(var.index.astype(str))
    if modality != "rna" or not len(names) or not names[:50].str.match(_REGION_NAME).all():
        return
    column = next((var[name] for name in FEATURE_TYPE_COLUMNS if name in var), pd.Series(dtype=object))
    told = column.astype(str).str.lower().isin(FEATURE_TYPES["rna"]).any()
    if not told and names.str.match(_REGION_NAME).mean() > 1 - _FEW:
        raise InputError(
            f"{label} holds peaks, such as {names[0]}; wanted RNA counts of genes",
            hint="give the RNA file with -r and the ATAC file with -a",
        )


def check_orientation(obs: pd.DataFrame, var: pd.DataFrame, label: str) -> None:
    """Raise `InputError` where cells are named as features are, and features as cells."""
    few = [pd.Series(table.index[:50].astype(str)) for table in (obs, var)]
    features, barcodes = few[0].str.match(_FEATURE_NAME).mean(), few[1].str.match(_BARCODE_NAME).mean()
    if (features > 0.5 and len(obs) > 1) or (barcodes > 0.9 and len(var) > 1):
        raise InputError(
            f"{label} is transposed: its obs are {', '.join(few[0][:2])}, …, its var {', '.join(few[1][:2])}, …; "
            "wanted cells in obs and features in var",
            hint='transpose it: adata.T.write_h5ad("transposed.h5ad")',
        )


def plain_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Return an annotation with text for column names, each once: of several of a name, the first."""
    columns = ["index" if name == "_index" else str(name) for name in table.columns]  # h5ad reserves _index
    named = table.set_axis(columns, axis=1)
    return named.loc[:, ~named.columns.duplicated()]


def _by_their_names(var: pd.DataFrame, modality: Modality, label: str) -> NDArray[np.int64] | None:
    """Return which features are of this modality where genes and peaks stand together and nothing tells their types."""
    peaks = pd.Series(var.index.astype(str)).str.match(_REGION_NAME).to_numpy()
    if not _FEW < peaks.mean() < 1 - _FEW:
        return None
    logger.warning(
        "%s holds genes and peaks without feature_types; by their names %d of %d features are peaks",
        label, peaks.sum(), len(peaks),
    )  # fmt: skip
    return np.flatnonzero(peaks == (modality == "atac"))


def columns_of(var: pd.DataFrame, modality: Modality, label: str) -> NDArray[np.int64] | None:
    """Return which features are of this modality; `None` for all."""
    name = next((name for name in FEATURE_TYPE_COLUMNS if name in var), None)
    if name is None:
        return _by_their_names(var, modality, label)
    types = var[name].astype(str).str.lower()
    mine = types.isin(FEATURE_TYPES[modality]).to_numpy()
    if mine.all() or not types.isin(set.union(*FEATURE_TYPES.values())).any():
        return None
    if mine.any():
        return np.flatnonzero(mine)
    regions = pd.Series(var.index[:50].astype(str)).str.match(_REGION_NAME).mean() > 0.9
    if regions and modality == "atac":
        logger.warning(
            "%s: %s calls peaks %s; they are read as peaks by their names", label, name, types.iloc[0]
        )
        return None
    option = {"rna": "-r", "atac": "-a"}
    raise InputError(
        f"{label} has no {modality.upper()} features: {name} holds {', '.join(map(str, var[name].unique()[:3]))}",
        hint=f"give the RNA file with {option['rna']} and the ATAC file with {option['atac']}",
    )
