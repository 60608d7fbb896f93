"""A mosaic: RNA and ATAC in one MuData, where some cells lack one of them; and the same with the gaps filled.

Measured and predicted values differ in unit and in noise. In a completed file they are never in one matrix:

    X                      empty, so that no program mistakes one for the other
    layers["measured"]     X of the input as it was; empty rows where nothing was measured
    layers["measured_…"]   the other layers of the input, and its raw, likewise
    layers["predicted"]    the prediction; empty rows where the cell was measured
    obs["measured"]        which of them a cell has
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.config import Modality
from cisformer.data.alignment import map_genes, map_peaks
from cisformer.data.h5ad import storable, storable_frame
from cisformer.data.hdf5 import told_as_damage
from cisformer.data.reference import Reference
from cisformer.data.sources import open_rows
from cisformer.data.tables import FEATURE_TYPES
from cisformer.errors import InputError
from cisformer.prediction.compact import INTERCEPT, LOADINGS, PRIOR, STATES
from cisformer.runtime.files import atomic_path
from cisformer.runtime.provenance import provenance

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

FORMAT = "cisformer-mosaic"
FORMAT_VERSION = 1
MODALITIES: tuple[Modality, Modality] = ("rna", "atac")
MEASURED, PREDICTED = "measured", "predicted"
LEAST_PAIRED = 50
"""Paired cells to learn from: 72 % are trained on, which are then more than the 32 components of the linear path."""
_BLOCK = 1000


@dataclass(frozen=True, eq=False)
class Mosaic:
    """The cells of a mosaic.

    Attributes
    ----------
    path
        The file.
    whole
        Its content.
    names
        What RNA and ATAC are called in it.
    has
        Which cells have anything measured in a modality; bool per cell, indexed by barcode.
    """

    path: Path
    whole: MuData
    names: dict[Modality, str]
    has: dict[Modality, pd.Series]

    @property
    def paired(self) -> pd.Index:
        """Barcodes of cells that have both modalities."""
        both = self.has["rna"] & self.has["atac"]
        return both.index[both]

    def lacking(self, modality: Modality) -> pd.Index:
        """Return the barcodes of cells that lack a modality."""
        return self.has[modality].index[~self.has[modality]]

    def side(self, modality: Modality) -> AnnData:
        """Return one modality as it is in the file."""
        return self.whole.mod[self.names[modality]]

    def column(self, name: str) -> pd.Series:
        """Return an annotation of all cells, from the common `obs` or that of either modality.

        Raises
        ------
        InputError
            No cell has a value of that name.
        """
        cells = self.has["rna"].index
        tables = [self.whole.obs, *(self.side(modality).obs for modality in MODALITIES)]
        values = pd.Series(np.nan, index=cells, dtype=object)
        for table in tables:
            if name in table:
                values = values.combine_first(table[name].astype(object).reindex(cells))
        if values.notna().any():
            return values.reindex(cells).map(str, na_action="ignore").astype("category")
        known = sorted({str(column) for table in tables for column in table if ":" not in str(column)})
        raise InputError(
            f"{self.path} has no annotation {name!r}; it has {', '.join(known) or 'none'}",
            hint="name a column of obs with --groupby",
        )


def read_mosaic(path: str | Path) -> Mosaic:
    """Read a MuData in which some cells lack RNA or ATAC. A row without any count counts as lacking.

    Raises
    ------
    InputError
        It is no MuData with both modalities; there is nothing to complete, or too little to learn from.
    """
    measured = {modality: _measured(path, modality) for modality in MODALITIES}
    whole = _read(path)
    cells = pd.Index(whole.obs_names)
    names = {
        modality: next(name for name in whole.mod if name.lower() in FEATURE_TYPES[modality])
        for modality in MODALITIES
    }
    has = {modality: pd.Series(cells.isin(measured[modality]), index=cells) for modality in MODALITIES}
    mosaic = Mosaic(Path(path), whole, names, has)
    _check(mosaic)
    return mosaic


def _measured(path: str | Path, modality: Modality) -> pd.Index:
    """Return the barcodes of cells with any count in a modality."""
    with open_rows(path, modality) as source:
        if source.kind != "h5mu":
            raise InputError(
                f"{path} is {source.kind}; wanted an .h5mu with the modalities rna and atac",
                hint="put both into a MuData: mudata.MuData({'rna': rna, 'atac': atac}).write('x.h5mu')",
            )
        counted = [np.asarray((block != 0).sum(axis=1)).ravel() for block in source.blocks(_BLOCK)]
        return source.obs.index[np.concatenate(counted) > 0]


def _read(path: str | Path) -> MuData:
    try:
        import mudata
    except ImportError as error:
        raise InputError(
            "completing a mosaic needs mudata, which is not installed",
            hint='pip install "cisformer-links[io]"',
        ) from error
    with told_as_damage(str(path)), mudata.set_options(pull_on_update=False):
        return mudata.read_h5mu(path)


def _check(mosaic: Mosaic) -> None:
    """Raise `InputError` where a mosaic cannot, or need not, be completed."""
    has_rna, has_atac = mosaic.has["rna"], mosaic.has["atac"]
    neither = has_rna.index[~has_rna & ~has_atac]
    if len(neither):
        raise InputError(
            f"{len(neither):,} of {len(has_rna):,} cells in {mosaic.path} have neither RNA nor ATAC, such as "
            f"{', '.join(neither[:3])}",
            hint="remove them: there is no modality to predict from",
        )
    n_paired = len(mosaic.paired)
    if not n_paired:
        raise InputError(
            f"no cell in {mosaic.path} has both RNA and ATAC: RNA has {', '.join(has_rna.index[has_rna][:3])}, …; "
            f"ATAC has {', '.join(has_atac.index[has_atac][:3])}, …",
            hint=f"{LEAST_PAIRED} such cells are needed; if barcodes are written in two ways, rename obs_names in one",
        )
    if n_paired == len(has_rna):
        raise InputError(
            f"all {n_paired:,} cells in {mosaic.path} have both RNA and ATAC: nothing is to be completed",
            hint="to train models on them, use `cisformer run`",
        )
    if n_paired < LEAST_PAIRED:
        raise InputError(
            f"{n_paired} of {len(has_rna):,} cells in {mosaic.path} have both RNA and ATAC; wanted at least "
            f"{LEAST_PAIRED} to learn from",
            hint="add paired cells, or predict with a model of a similar tissue (-m)",
        )


# ---------------------------------------------------------------------------------------------- completed


def complete_side(
    mosaic: Mosaic, modality: Modality, predicted: AnnData | None, reference: Reference | None
) -> AnnData:
    """Return one modality for all cells of a mosaic, measured and predicted apart.

    Parameters
    ----------
    mosaic
        The cells.
    modality
        Which of its modalities.
    predicted
        The prediction for the cells that lack it, and its reference; `None` where none does.
    reference
        Genes and cCREs of the prediction.

    Returns
    -------
    AnnData
        All cells × the features of the input, without `X`; see the top of this module.
    """
    from anndata import AnnData

    side, has = mosaic.side(modality), mosaic.has[modality]
    cells = has.index
    row = side.obs_names.get_indexer(cells)
    row[~has.to_numpy()] = -1
    obs = _obs(side.obs, cells).assign(**{MEASURED: has.to_numpy()})
    whole = AnnData(None, obs=obs, var=storable_frame(side.var), varm=dict(side.varm), uns=dict(side.uns))
    for name, matrix in _matrices(side).items():
        whole.layers[name] = _spread(matrix, row)
    for name, values in side.obsm.items():
        if isinstance(values, np.ndarray):
            whole.obsm[name] = _spread_dense(values, row)
    record: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, **provenance()}
    if predicted is not None and reference is not None:
        record |= _add_prediction(whole, predicted, modality, reference)
    whole.uns["cisformer"] = storable(record)
    return whole


def _matrices(side: AnnData) -> dict[str, Any]:
    """Return the matrices of the input by the names of their layers."""
    found = {MEASURED: side.X} | {f"{MEASURED}_{name}": matrix for name, matrix in side.layers.items()}
    if side.raw is not None and side.raw.var_names.equals(side.var_names):
        found[f"{MEASURED}_raw"] = side.raw.X
    elif side.raw is not None:
        logger.info("raw has other features, and is not copied to the output")
    return {name: matrix for name, matrix in found.items() if matrix is not None}


def _add_prediction(
    whole: AnnData, predicted: AnnData, modality: Modality, reference: Reference
) -> dict[str, Any]:
    """Put a prediction, full or compact, into its own layer or factors; return what is to be said of it."""
    find = map_genes if modality == "rna" else map_peaks
    matrix = find(whole.var, reference).matrix
    known, column = np.diff(matrix.indptr) > 0, np.asarray(matrix.argmax(axis=1)).ravel()
    row = predicted.obs_names.get_indexer(whole.obs_names)
    whole.var["seen_in_training"] = known & predicted.var["seen_in_training"].to_numpy()[column]
    if STATES in predicted.obsm:
        whole.obsm[STATES] = _spread_dense(np.asarray(predicted.obsm[STATES]), row)
    for name in predicted.var.select_dtypes(
        "floating"
    ):  # how well it is predicted, and factors of a compact one
        whole.var[name] = np.where(known, predicted.var[name].to_numpy()[column], np.nan)
    if predicted.X is None:
        whole.varm[LOADINGS] = np.asarray(predicted.varm[LOADINGS])[column]
        where = f"compact form: obsm['{STATES}'], varm['{LOADINGS}'], var['{INTERCEPT}'] and var['{PRIOR}']"
    else:
        values = sp.csr_matrix(predicted.X)[:, column] @ sp.diags_array(known.astype(np.float32))
        whole.layers[PREDICTED] = _spread(values, row)
        where = f"layers['{PREDICTED}']"
    about = predicted.uns["cisformer"]
    return {"predicted_in": where, "predicted_unit": about["unit"], "checkpoint": about["checkpoint"]}


def _spread(matrix: Any, row: NDArray[np.int64]) -> sp.csr_matrix:
    """Return rows of a matrix, empty ones for -1; values and their type as they are."""
    matrix = sp.csr_matrix(matrix)
    filled = np.flatnonzero(row >= 0)
    one = np.ones(len(filled), matrix.dtype)
    place = sp.csr_matrix((one, (filled, row[filled])), shape=(len(row), matrix.shape[0]))
    return sp.csr_matrix(place @ matrix)


def _spread_dense(values: NDArray[Any], row: NDArray[np.int64]) -> NDArray[Any]:
    """Return rows of an array, NaN for -1."""
    spread = np.full((len(row), *values.shape[1:]), np.nan, np.result_type(values.dtype, np.float32))
    spread[row >= 0] = values[row[row >= 0]]
    return spread


def _obs(obs: pd.DataFrame, cells: pd.Index) -> pd.DataFrame:
    """Return the annotation of all cells; what is not known of a cell is missing."""
    flags = obs.select_dtypes("bool").columns
    return storable_frame(obs.astype(dict.fromkeys(flags, "boolean")).reindex(cells))


def join_sides(mosaic: Mosaic, sides: dict[Modality, AnnData], groups: dict[str, pd.Series]) -> MuData:
    """Return the completed MuData; other modalities of the input stay as they are.

    The common `obs` says in `measured` which of both a cell has.
    """
    import mudata

    completed = {mosaic.names[modality]: side for modality, side in sides.items()}
    with mudata.set_options(pull_on_update=False):
        whole = mudata.MuData(dict(mosaic.whole.mod) | completed)
    has = mosaic.has
    which = np.select([has["rna"] & has["atac"], has["rna"]], ["both", "rna"], "atac")
    told = {MEASURED: pd.Categorical(which, ["both", "rna", "atac"])}
    cells = has["rna"].index
    obs = storable_frame(mosaic.whole.obs.reindex(cells)).assign(**told, **groups)
    whole.obs = obs.reindex(whole.obs_names)
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, "n_paired": len(mosaic.paired)}
    whole.uns = dict(mosaic.whole.uns) | {"cisformer": record | provenance()}
    return whole


def write_mosaic(whole: MuData, path: Path) -> None:
    """Write a MuData, atomically; without copies of the modalities' columns in the common tables."""
    import mudata

    with atomic_path(path) as temporary, mudata.set_options(pull_on_update=False):
        whole.write(temporary)
