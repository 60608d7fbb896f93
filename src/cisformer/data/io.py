"""Read cells into memory, write them to h5ad: at once, or streamed in blocks of cells."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.config import Modality
from cisformer.data.sources import open_rows
from cisformer.runtime.files import atomic_path
from cisformer.runtime.provenance import provenance

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

logger = logging.getLogger(__name__)

_CHUNK = 1 << 16  # elements per HDF5 chunk of a streamed matrix
_BLOCK = 1000  # cells read at once


def read_rna(data: str | Path | AnnData) -> AnnData:
    """Read RNA counts.

    Parameters
    ----------
    data
        See `open_rows`: an h5ad, h5mu or 10x h5 file, or an AnnData.

    Returns
    -------
    A new AnnData with whole-number counts as float32 CSR in `X`, out of ``layers["counts"]``, `raw` or `X`.

    Raises
    ------
    InputError
        If there is no such file, or it holds no RNA counts.
    """
    return _read(data, "rna")


def read_atac(data: str | Path | AnnData) -> AnnData:
    """Read open peaks.

    Parameters
    ----------
    data
        See `open_rows`: an h5ad, h5mu or 10x h5 file, or an AnnData.

    Returns
    -------
    A new AnnData with float32 CSR in `X`, 1 where a peak is open (where the input has any value above 0).

    Raises
    ------
    InputError
        If there is no such file, or it holds no ATAC.
    """
    adata = _read(data, "atac")
    adata.X.data[:] = 1
    return adata


def _read(data: str | Path | AnnData, modality: Modality) -> AnnData:
    from anndata import AnnData

    with open_rows(data, modality) as source:
        blocks = [block.astype(np.float32) for block in source.blocks(_BLOCK)]
        matrix = sp.csr_matrix(sp.vstack(blocks, format="csr"))
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return AnnData(matrix, obs=source.obs.copy(), var=source.var.copy())


class H5adWriter:
    """Write an h5ad file in blocks of cells, in memory that does not grow with their number.

    Used as a context manager; the file appears under its name only when the block ends without an exception.

    Parameters
    ----------
    path
        The ``.h5ad`` file to write.
    var
        Annotation of the features, indexed by name.
    uns
        Unstructured annotation; ``uns["cisformer"]`` with the provenance is added where it is missing.
    compression
        ``"gzip"``, ``"lzf"`` or `None`; of the matrix.
    force
        Replace the file if there is one at the end.

    Examples
    --------
    >>> import numpy as np, pandas as pd, scipy.sparse as sp, tempfile, anndata
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with H5adWriter(f"{folder}/a.h5ad", pd.DataFrame(index=["A", "B"])) as writer:
    ...         writer.append(sp.csr_matrix(np.eye(2)), pd.DataFrame(index=["cell1", "cell2"]))
    ...     anndata.read_h5ad(f"{folder}/a.h5ad").shape
    (2, 2)
    """

    def __init__(
        self,
        path: str | Path,
        var: pd.DataFrame,
        uns: dict[str, Any] | None = None,
        *,
        compression: str | None = None,
        force: bool = True,
    ) -> None:
        self.path = Path(path)
        self.n_cells = 0
        self._var = var
        self._uns = {"cisformer": provenance()} | (uns or {})
        self._compression, self._force = compression, force
        self._obs: list[pd.DataFrame] = []
        self._indptr = [np.zeros(1, np.int64)]
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> H5adWriter:
        import h5py

        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path, force=self._force))
            self._file: h5py.File = stack.enter_context(h5py.File(temporary, "w"))
            self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            matrix = self._file.create_group("X")
            matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            for name, dtype in (("data", np.float32), ("indices", np.int32)):
                matrix.create_dataset(
                    name, (0,), dtype, chunks=(_CHUNK,), maxshape=(None,), compression=self._compression
                )
            self._exit = stack.pop_all()
        return self

    def append(self, block: sp.csr_matrix, obs: pd.DataFrame) -> None:
        """Add cells.

        Parameters
        ----------
        block
            [n_cells, n_features]; stored as float32.
        obs
            Annotation of these cells, indexed by barcode; the same columns in every block.
        """
        if block.shape != (len(obs), len(self._var)):
            raise ValueError(
                f"a block of shape {block.shape} for {len(obs)} cells and {len(self._var)} features"
            )
        _extend(self._file["X/data"], block.data)
        _extend(self._file["X/indices"], block.indices)
        self._indptr.append(self._indptr[-1][-1] + block.indptr[1:].astype(np.int64))
        self._obs.append(obs)
        self.n_cells += len(obs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._exit:
            if error is not None:
                raise error
            self._finish()

    def _finish(self) -> None:
        matrix = self._file["X"]
        matrix.attrs["shape"] = np.array([self.n_cells, len(self._var)], np.int64)
        matrix.create_dataset("indptr", data=np.concatenate(self._indptr), compression=self._compression)
        obs = pd.concat(self._obs) if self._obs else pd.DataFrame(index=pd.Index([], dtype=object))
        write_elements(self._file, obs=storable_frame(obs), var=storable_frame(self._var), uns=self._uns)


def _extend(dataset: h5py.Dataset, values: np.ndarray) -> None:
    old = dataset.shape[0]
    dataset.resize((old + len(values),))
    dataset[old:] = values


def write_elements(file: h5py.File, **elements: Any) -> None:
    """Write AnnData elements (`obs`, `var`, `uns`) into an open h5ad file, and empty ones for the others."""
    from anndata.io import write_elem

    elements["uns"] = storable(elements.get("uns") or {})
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        elements.setdefault(name, {})
    for name, value in elements.items():
        write_elem(file, name, value)


def storable(value: Any) -> Any:
    """Return `value` as h5ad can hold it: dicts without their `None` entries, paths as text."""
    if isinstance(value, dict):
        return {str(key): storable(entry) for key, entry in value.items() if entry is not None}
    return str(value) if isinstance(value, Path) else value


def storable_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` as h5ad holds it best: text columns as categories where values repeat or are missing."""
    frame = frame.copy(deep=False)
    frame.index = frame.index.astype(str)
    frame.columns = frame.columns.astype(str)
    for name in frame.select_dtypes(["object", "string"]).columns:
        text = frame[name].map(str, na_action="ignore")
        repeats = text.isna().any() or text.nunique() < len(text)
        frame[name] = text.astype("category") if repeats else text
    return frame


def write_h5ad(adata: AnnData, path: str | Path) -> None:
    """Write an AnnData to an h5ad file, atomically, with our provenance in ``uns["cisformer"]``."""
    adata.uns.setdefault("cisformer", storable(provenance()))
    adata.obs, adata.var = storable_frame(adata.obs), storable_frame(adata.var)
    with atomic_path(path) as temporary:
        adata.write_h5ad(temporary)
