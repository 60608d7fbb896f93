"""Read cells into memory, write them to h5ad: at once, or streamed in blocks of cells."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.config import Modality
from cisformer.data.hdf5 import check_claims, kind_of, open_hdf5, told_as_damage
from cisformer.data.sources import open_rows
from cisformer.errors import InputError
from cisformer.runtime.files import atomic_path
from cisformer.runtime.provenance import provenance

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

logger = logging.getLogger(__name__)

MatrixLayout = Literal["csr", "dense", "none"]

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


def load_h5ad(data: str | Path | AnnData, *, backed: bool = False) -> AnnData:
    """Return an AnnData as it is, or read one from an h5ad: all of it, as it stands there.

    For what is no input of cells in counts (`open_rows` reads these): predictions, labelled cells, evaluated ones.

    Parameters
    ----------
    data
        An ``.h5ad``, also compressed with zstd or blosc where hdf5plugin is installed; or an AnnData.
    backed
        Leave ``X`` in the file, where there is one.

    Raises
    ------
    InputError
        If there is no such file, it is no h5ad, it is damaged, or open for writing elsewhere.
    """
    if not isinstance(data, str | Path):
        return data
    import anndata

    if not Path(data).is_file():
        raise InputError(f"there is no file {data}", hint="check the path")
    with open_hdf5(data) as (file, _), told_as_damage(str(data)):
        if (kind := kind_of(file, str(data))) != "h5ad":
            raise InputError(f"{data} is {kind}; wanted an .h5ad", hint="give one AnnData in an .h5ad")
        check_claims(file, str(data))
        has_matrix = "X" in file
    with told_as_damage(str(data)):
        return anndata.read_h5ad(data, backed="r" if backed and has_matrix else None)


class H5adWriter:
    """Write an h5ad file in blocks of cells. Memory does not grow with the number of blocks.

    Use it as a context manager. The file appears under its name only when the block ends without an exception.

    Parameters
    ----------
    path
        The ``.h5ad`` file to write.
    obs, var
        Annotation of all cells and of the features, indexed by name; `obs` may be set anew until the file is closed.
    uns
        Unstructured annotation; ``uns["cisformer"]`` with the provenance is added where it is missing.
    varm
        Arrays [n_features, k] that describe the features.
    layout
        How ``X`` is stored: "csr", "dense" (float32), or "none" for a file without ``X``.
    compression
        ``"gzip"``, ``"lzf"`` or `None`; of the matrix.
    force
        Replace the file if there is one at the end.

    Examples
    --------
    >>> import numpy as np, pandas as pd, scipy.sparse as sp, tempfile, anndata
    >>> obs, var = pd.DataFrame(index=["cell1", "cell2"]), pd.DataFrame(index=["A", "B"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with H5adWriter(f"{folder}/a.h5ad", obs, var) as writer:
    ...         writer.append(sp.csr_matrix(np.eye(2)))
    ...     anndata.read_h5ad(f"{folder}/a.h5ad").shape
    (2, 2)
    """

    def __init__(
        self,
        path: str | Path,
        obs: pd.DataFrame,
        var: pd.DataFrame,
        uns: dict[str, Any] | None = None,
        *,
        varm: Mapping[str, np.ndarray] | None = None,
        layout: MatrixLayout = "csr",
        compression: str | None = None,
        force: bool = True,
    ) -> None:
        self.path = Path(path)
        self.n_cells = 0
        self.obs, self._var, self._varm = obs, var, dict(varm or {})
        self._uns = {"cisformer": provenance()} | (uns or {})
        self._layout = layout
        self._compression, self._force = compression, force
        self._exit = contextlib.ExitStack()

    def __enter__(self) -> H5adWriter:
        import h5py

        with contextlib.ExitStack() as stack:
            temporary = stack.enter_context(atomic_path(self.path, force=self._force))
            self._file: h5py.File = stack.enter_context(h5py.File(temporary, "w"))
            self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
            if self._layout == "csr":
                matrix = self._file.create_group("X")
                matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
                self._growing("X/data", (), np.float32)
                self._growing("X/indices", (), np.int32)
                self._growing("X/indptr", (), np.int64)
                _extend(self._file["X/indptr"], np.zeros(1, np.int64))
            elif self._layout == "dense":
                self._growing("X", (len(self._var),), np.float32)
            self._exit = stack.pop_all()
        return self

    def _growing(self, name: str, width: tuple[int, ...], dtype: type) -> None:
        """Make an empty dataset [0, *width] that grows by cells; a chunk holds whole cells where it can."""
        most = tuple(max(1, n) for n in width)  # a model without loadings has states of width 0
        per_chunk = (max(1, _CHUNK // most[0]), min(most[0], _CHUNK)) if width else (_CHUNK,)
        compression = self._compression if name.startswith("X") else None
        made = self._file.create_dataset(
            name, (0, *width), dtype, chunks=per_chunk, maxshape=(None, *most), compression=compression
        )
        if width:
            made.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def append(self, block: sp.csr_matrix | np.ndarray | None = None, **obsm: np.ndarray) -> None:
        """Add the next cells.

        Parameters
        ----------
        block
            [n_cells, n_features], stored as float32; `None` for a file without ``X``.
        obsm
            Arrays [n_cells, k] of these cells; the same names in every block.
        """
        length = {len(values) for values in obsm.values()} | (
            {block.shape[0]} if block is not None else set()
        )
        if len(length) != 1 or (block is not None and block.shape[1] != len(self._var)):
            shape = None if block is None else block.shape
            raise ValueError(f"a block of shape {shape} for {len(self._var)} features")
        if isinstance(block, sp.csr_matrix):
            indptr = self._file["X/indptr"]
            _extend(self._file["X/data"], block.data)
            _extend(self._file["X/indices"], block.indices)
            _extend(indptr, indptr[-1] + block.indptr[1:].astype(np.int64))
        elif block is not None:
            _extend(self._file["X"], block)
        for name, values in obsm.items():
            if f"obsm/{name}" not in self._file:
                self._growing(f"obsm/{name}", values.shape[1:], np.float32)
            _extend(self._file[f"obsm/{name}"], values)
        self.n_cells += length.pop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._exit:
            if error is not None:
                raise error
            self._finish()

    def _finish(self) -> None:
        if self.n_cells != len(self.obs):
            raise ValueError(f"{self.n_cells} cells were written, {len(self.obs)} are annotated")
        if self._layout == "csr":
            self._file["X"].attrs["shape"] = np.array([self.n_cells, len(self._var)], np.int64)
        write_elements(
            self._file,
            obs=storable_frame(self.obs),
            var=storable_frame(self._var),
            varm=self._varm,
            uns=self._uns,
        )


def _extend(dataset: h5py.Dataset, values: np.ndarray) -> None:
    old = dataset.shape[0]
    dataset.resize(old + len(values), axis=0)
    dataset[old:] = values


def write_elements(file: h5py.File, **elements: Any) -> None:
    """Write AnnData elements (`obs`, `var`, `uns`) into an open h5ad file, and empty ones for those it lacks."""
    from anndata.io import write_elem

    elements["uns"] = storable(elements.get("uns") or {})
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        if name not in file:
            elements.setdefault(name, {})
    if "obsm" in file:
        file["obsm"].attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
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
