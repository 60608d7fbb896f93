"""What is read from users' files, what is refused, and what is written."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from formats import damage, write_10x, write_h5mu

import cisformer.data.h5ad
from cisformer.data.h5ad import H5adWriter, read_atac, read_rna, write_h5ad
from cisformer.data.sources import open_rows
from cisformer.errors import InputError

COUNTS = np.array([[0, 3, 1], [2, 0, 0], [0, 0, 5], [1, 1, 0]], np.float32)
GENES = ["g1", "g2", "g3"]
PEAKS = ["chr1:10-20", "chr1:50-70", "chr2:5-9"]


def cells(matrix: object = None, names: list[str] | None = None, **kwargs: object) -> ad.AnnData:
    matrix = sp.csr_matrix(COUNTS) if matrix is None else matrix
    obs = pd.DataFrame({"donor": ["a", "b", "a", "b"]}, index=[f"c{i}-1" for i in range(4)])
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=names or GENES), **kwargs)


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(cisformer.data.h5ad).failed == 0


@pytest.mark.parametrize(
    "layout", [sp.csr_matrix, sp.csc_matrix, np.asarray, lambda x: sp.csr_matrix(x.astype(int))]
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_every_layout_reads_the_same(layout: object, on_disk: bool, tmp_path: Path):
    adata = cells(layout(COUNTS))
    if on_disk:
        adata.write_h5ad(tmp_path / "a.h5ad")
    read = read_rna(tmp_path / "a.h5ad" if on_disk else adata)
    assert np.array_equal(read.X.toarray(), COUNTS)
    assert (read.X.format, read.X.dtype, read.X.has_sorted_indices) == ("csr", np.float32, True)
    pd.testing.assert_frame_equal(read.obs, adata.obs, check_categorical=False, check_dtype=False)
    assert read.var_names.tolist() == GENES


def with_layer(adata: ad.AnnData) -> ad.AnnData:
    adata.layers["counts"] = sp.csr_matrix(COUNTS)
    return adata


def with_raw(adata: ad.AnnData) -> ad.AnnData:
    adata.raw = cells(names=["r1", "r2", "r3"])
    return adata


@pytest.mark.parametrize(
    ("add", "slot", "names"),
    [(with_layer, "layers/counts", GENES), (with_raw, "raw/X", ["r1", "r2", "r3"])],
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_counts_are_found_beside_normalised_values(
    add: object, slot: str, names: list[str], on_disk: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    adata = add(cells(sp.csr_matrix(np.log1p(COUNTS))))
    if on_disk:
        adata.write_h5ad(tmp_path / "a.h5ad")
    with caplog.at_level("INFO"):
        read = read_rna(tmp_path / "a.h5ad" if on_disk else adata)
    assert np.array_equal(read.X.toarray(), COUNTS)
    assert read.var_names.tolist() == names
    assert f"reading the counts in {slot}" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.log1p(COUNTS), "no RNA counts.*found log-normalised values in X"),
        (COUNTS - 0.5, "found scaled values in X"),
        (np.where(COUNTS == 5, np.nan, COUNTS), "found missing values in X"),
        (np.where(COUNTS == 5, -2, COUNTS), r"X of cell c2-1 holds -2\.0, negative"),
    ],
)
def test_rna_that_is_not_counts_is_refused(values: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        read_rna(cells(values))


def test_a_fraction_late_in_the_file_is_found():
    many = np.ones((300_000, 1), np.float32)
    many[7], many[299_000] = 2, 1.5
    adata = ad.AnnData(sp.csr_matrix(many), obs=pd.DataFrame(index=[f"c{i}" for i in range(300_000)]))
    with pytest.raises(InputError, match=r"X of cell c299000 holds 1.5, not a whole number"):
        read_rna(adata)


def test_atac_is_binarised_whatever_it_holds(caplog: pytest.LogCaptureFixture):
    for values in (COUNTS, COUNTS * 0.3):
        with caplog.at_level("INFO"):
            assert np.array_equal(read_atac(cells(values, PEAKS)).X.toarray(), COUNTS > 0)
        assert "any value above 0 is taken as open" in caplog.text
    with pytest.raises(InputError, match="of cell c2-1 holds nan"):
        read_atac(cells(np.where(COUNTS == 5, np.nan, COUNTS), PEAKS))


def test_explicit_zeros_are_not_open():
    stored = sp.csr_matrix((np.array([0, 1], np.float32), ([0, 1], [1, 2])), shape=(4, 3))
    assert read_atac(cells(stored, PEAKS)).X.nnz == 1


def test_missing_and_foreign_files(tmp_path: Path):
    with pytest.raises(InputError, match=r"no.h5ad does not exist"):
        read_rna(tmp_path / "no.h5ad")
    with pytest.raises(InputError, match=r"is a folder without matrix\.mtx"):
        read_rna(tmp_path)
    (tmp_path / "text.h5ad").write_text("hello")
    with pytest.raises(InputError, match="is not an HDF5 file"):
        read_rna(tmp_path / "text.h5ad")
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["table"] = [1]
    with pytest.raises(InputError, match="not h5ad, h5mu, loom or 10x h5: it holds table"):
        read_rna(tmp_path / "other.h5ad")


def test_a_file_cut_short_is_refused(tmp_path: Path):
    cells().write_h5ad(tmp_path / "a.h5ad")
    damage(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=r"a.h5ad is cut short or damaged"):
        read_rna(tmp_path / "a.h5ad")


def test_repeated_barcodes_are_refused():
    adata = cells()
    adata.obs.index = ["x", "y", "x", "z"]
    with pytest.raises(InputError, match="has 1 barcodes more than once, such as x"):
        read_rna(adata)


def test_features_of_both_modalities_are_told_apart():
    both = cells(np.hstack([COUNTS, COUNTS]), [*GENES, *PEAKS])
    both.var["feature_types"] = ["Gene Expression"] * 3 + ["Peaks"] * 3
    assert read_rna(both).var_names.tolist() == GENES
    assert read_atac(both).var_names.tolist() == PEAKS
    assert np.array_equal(read_atac(both).X.toarray(), COUNTS > 0)
    with pytest.raises(InputError, match="has no ATAC features: feature_types holds Gene Expression"):
        read_atac(both[:, :3])


def test_h5mu_is_read_by_modality(tmp_path: Path):
    write_h5mu(tmp_path / "x.h5mu", cells(), cells(names=PEAKS))
    with h5py.File(tmp_path / "x.h5mu", "r+") as file:
        ad.io.write_elem(
            file, "obs", pd.DataFrame({"shared": [7, 8, 9, 10]}, index=[f"c{i}-1" for i in range(4)])
        )
    read = read_rna(tmp_path / "x.h5mu")
    assert np.array_equal(read.X.toarray(), COUNTS)
    assert read.obs[["donor", "shared"]].astype(str).to_numpy().tolist() == [
        ["a", "7"],
        ["b", "8"],
        ["a", "9"],
        ["b", "10"],
    ]
    assert read_atac(tmp_path / "x.h5mu").var_names.tolist() == PEAKS
    with h5py.File(tmp_path / "x.h5mu", "r+") as file:
        del file["mod/atac"]
    with pytest.raises(InputError, match="has no ATAC modality: it holds rna"):
        read_atac(tmp_path / "x.h5mu")


def test_10x_h5_is_read_as_scanpy_reads_it(tmp_path: Path):
    import scanpy

    path = tmp_path / "filtered_feature_bc_matrix.h5"
    write_10x(path, cells(), cells(names=PEAKS))
    oracle = scanpy.read_10x_h5(path, gex_only=False)
    for read, kind in ((read_rna(path), "Gene Expression"), (read_atac(path), "Peaks")):
        expected = oracle[:, oracle.var["feature_types"] == kind]
        assert read.obs_names.tolist() == expected.obs_names.tolist()
        assert read.var_names.tolist() == expected.var_names.tolist()
        wanted = expected.X.toarray() if kind == "Gene Expression" else expected.X.toarray() > 0
        assert np.array_equal(read.X.toarray(), wanted)
        assert read.var["gene_ids"].tolist() == expected.var["gene_ids"].tolist()


def write_mtx(folder: Path) -> None:
    import gzip

    import scipy.io

    folder.mkdir()
    scipy.io.mmwrite(folder / "matrix.mtx", sp.csr_matrix(np.hstack([COUNTS, COUNTS]).T.astype(int)))
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx").read_bytes()))
    lines = [f"ENSG{i:011d}\t{name}\tGene Expression\n" for i, name in enumerate(GENES)]
    lines += [f"{name}\t{name}\tPeaks\n" for name in PEAKS]
    (folder / "features.tsv.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"c0-1\nc1-1\nc2-1\nc3-1\n"))


def test_10x_folder_is_read(tmp_path: Path):
    write_mtx(tmp_path / "filtered")
    assert np.array_equal(read_rna(tmp_path / "filtered").X.toarray(), COUNTS)
    assert read_atac(tmp_path / "filtered").var_names.tolist() == PEAKS


def test_h5mu_and_10x_need_neither_mudata_nor_scanpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_mtx(tmp_path / "filtered")
    write_h5mu(tmp_path / "x.h5mu", cells(), cells(names=PEAKS))
    write_10x(tmp_path / "x.h5", cells(), cells(names=PEAKS))
    for name in ("scanpy", "mudata"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("x.h5mu", "x.h5", "filtered"):
        assert np.array_equal(read_rna(tmp_path / name).X.toarray(), COUNTS)


def test_blocks_are_read_one_at_a_time(tmp_path: Path):
    cells().write_h5ad(tmp_path / "a.h5ad")
    with open_rows(tmp_path / "a.h5ad", "rna") as source:
        blocks = list(source.blocks(3))
    assert [block.shape for block in blocks] == [(3, 3), (1, 3)]
    assert np.array_equal(sp.vstack(blocks).toarray(), COUNTS)


def test_writer_gives_what_anndata_reads(tmp_path: Path):
    path = tmp_path / "out.h5ad"
    var = pd.DataFrame({"chrom": ["chr1"] * 3, "text": ["x", None, "x"]}, index=GENES)
    obs = cells().obs.assign(mixed=[1, "a", None, 2.5])
    uns = {"cisformer": {"seed": 3, "none": None}, "note": Path("x")}
    with H5adWriter(path, obs, var, uns, compression="gzip") as writer:
        for start in (0, 1, 3):
            rows = slice(start, {0: 1, 1: 3, 3: 4}[start])
            writer.append(sp.csr_matrix(COUNTS)[rows])
    read = ad.read_h5ad(path)
    assert np.array_equal(read.X.toarray(), COUNTS)
    assert (read.X.dtype, read.n_obs) == (np.float32, 4)
    assert read.obs["donor"].tolist() == ["a", "b", "a", "b"]
    assert read.obs["mixed"].astype(object).where(read.obs["mixed"].notna(), None).tolist() == [
        "1",
        "a",
        None,
        "2.5",
    ]
    assert read.uns["cisformer"]["seed"] == 3
    assert "none" not in read.uns["cisformer"]
    assert read.uns["note"] == "x"


def test_writer_of_states_of_no_width(tmp_path: Path):
    """Those of a model whose loadings are all zero."""
    obs, var = pd.DataFrame(index=["a", "b"]), pd.DataFrame(index=["g"])
    with H5adWriter(tmp_path / "x.h5ad", obs, var, layout="dense") as writer:
        writer.append(np.ones((2, 1), np.float32), states=np.zeros((2, 0), np.float32))
    assert ad.read_h5ad(tmp_path / "x.h5ad").obsm["states"].shape == (2, 0)


def test_writer_of_no_cells(tmp_path: Path):
    with H5adWriter(tmp_path / "out.h5ad", cells().obs[:0], pd.DataFrame(index=GENES)):
        pass
    assert ad.read_h5ad(tmp_path / "out.h5ad").shape == (0, 3)


def test_an_interrupted_writer_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "out.h5ad"
    write_h5ad(cells(), path)
    before = path.read_bytes()

    def interrupted() -> None:
        with H5adWriter(path, cells().obs, pd.DataFrame(index=GENES)) as writer:
            writer.append(sp.csr_matrix(COUNTS))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_writer_refuses_blocks_of_another_shape(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="a block of shape"),
        H5adWriter(tmp_path / "out.h5ad", cells().obs, pd.DataFrame(index=GENES)) as writer,
    ):
        writer.append(sp.csr_matrix(COUNTS[:, :2]))
    with (
        pytest.raises(ValueError, match="3 cells were written, 4 are annotated"),
        H5adWriter(tmp_path / "out.h5ad", cells().obs, pd.DataFrame(index=GENES)) as writer,
    ):
        writer.append(sp.csr_matrix(COUNTS[:3]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["csr", "dense", "none"])
def test_writer_stores_each_layout_and_what_describes_cells_and_features(layout, tmp_path: Path):
    state, loadings = np.arange(8.0).reshape(4, 2), np.arange(6.0).reshape(3, 2)
    var = pd.DataFrame(index=GENES)
    with H5adWriter(tmp_path / "a.h5ad", cells().obs, var, varm={"w": loadings}, layout=layout) as writer:
        for rows in (slice(0, 3), slice(3, 4)):
            block = {"csr": sp.csr_matrix(COUNTS)[rows], "dense": COUNTS[rows], "none": None}[layout]
            writer.append(block, X_state=state[rows])
    read = ad.read_h5ad(tmp_path / "a.h5ad")
    assert read.shape == (4, 3)
    assert np.array_equal(read.obsm["X_state"], state)
    assert np.array_equal(read.varm["w"], loadings)
    if layout == "none":
        assert read.X is None
    else:
        assert sp.issparse(read.X) == (layout == "csr")
        assert np.array_equal(read.X.toarray() if layout == "csr" else read.X, COUNTS)


def test_written_files_say_who_wrote_them(tmp_path: Path):
    write_h5ad(cells(), tmp_path / "out.h5ad")
    assert ad.read_h5ad(tmp_path / "out.h5ad").uns["cisformer"]["package"] == "cisformer"
