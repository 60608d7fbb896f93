"""Files as people have them: the right numbers, or a refusal that says what to do."""

from __future__ import annotations

import gzip
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from cisformer.data.preprocess import preprocess
from cisformer.data.sources import open_rows
from cisformer.data.store import CellStore
from cisformer.errors import InputError


def stored(rna: object, atac: object, folder: Path, **options: object) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what `preprocess` stores, as tables of cells x features that are not empty."""
    store = preprocess(rna, atac, folder, manually=True, **options)["all"]
    tables = []
    for matrix, names in (
        (store.rna(np.arange(store.n_cells)), store.reference.genes["gene_id"].to_numpy()),
        (store.atac(np.arange(store.n_cells)), store.reference.ccre_labels),
    ):
        kept = np.flatnonzero(matrix.getnnz(axis=0))
        tables.append(pd.DataFrame(matrix[:, kept].toarray(), store.barcodes, names[kept]).sort_index(axis=1))
    return tables[0], tables[1]


def truth(pair: tuple[ad.AnnData, ad.AnnData]) -> tuple[pd.DataFrame, pd.DataFrame]:
    rna, atac = pair
    wanted = (
        pd.DataFrame(rna.X.toarray(), rna.obs_names, rna.var["gene_id"].to_numpy()),
        pd.DataFrame((atac.X.toarray() > 0).astype(float), atac.obs_names, atac.var_names),
    )
    return tuple(
        table.loc[:, (table != 0).any()].sort_index(axis=1).sort_index().astype(np.float32)
        for table in wanted
    )


def assert_right(got: tuple[pd.DataFrame, pd.DataFrame], pair: tuple[ad.AnnData, ad.AnnData]) -> None:
    for found, wanted in zip(got, truth(pair), strict=True):
        pd.testing.assert_frame_equal(
            found, wanted, check_names=False, check_index_type=False, check_column_type=False
        )


# ---------------------------------------------------------------------------------------------- containers


def as_gz(rna: ad.AnnData, path: Path) -> Path:
    rna.write_h5ad(path / "rna.h5ad")
    with open(path / "rna.h5ad", "rb") as plain, gzip.open(path / "packed.h5ad.gz", "wb") as packed:
        shutil.copyfileobj(plain, packed)
    return path / "packed.h5ad.gz"


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def as_zarr(rna: ad.AnnData, path: Path) -> Path:
    rna.write_zarr(path / "rna.zarr")
    return path / "rna.zarr"


def as_loom(rna: ad.AnnData, path: Path) -> Path:
    with h5py.File(path / "rna.loom", "w") as file:
        file["matrix"] = rna.X.T.toarray()
        file["row_attrs/Gene"] = np.array(list(rna.var_names), "S")
        file["col_attrs/CellID"] = np.array(list(rna.obs_names), "S")
    return path / "rna.loom"


def write_mtx(rna: ad.AnnData, folder: Path, prefix: str = "", packed: bool = False) -> None:
    folder.mkdir(parents=True)
    scipy.io.mmwrite(folder / f"{prefix}matrix.mtx", rna.X.T.astype(int))
    names = "".join(
        f"{i}\t{n}\tGene Expression\n" for i, n in zip(rna.var["gene_id"], rna.var_names, strict=True)
    )
    (folder / f"{prefix}features.tsv").write_text(names)
    (folder / f"{prefix}barcodes.tsv").write_text("\n".join(rna.obs_names) + "\n")
    for path in list(folder.iterdir()) if packed else []:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def as_starsolo(rna: ad.AnnData, path: Path) -> Path:
    write_mtx(rna, path / "Solo.out/Gene/filtered")
    return path / "Solo.out"


def as_geo(rna: ad.AnnData, path: Path) -> Path:
    write_mtx(rna, path / "geo", "GSM0000001_sampleA_", packed=True)
    return path / "geo"


def as_matrix_itself(rna: ad.AnnData, path: Path) -> Path:
    write_mtx(rna, path / "one")
    return path / "one/matrix.mtx"


def as_outs(rna: ad.AnnData, path: Path) -> Path:
    write_mtx(rna, path / "run/outs/filtered_feature_bc_matrix", packed=True)
    return path / "run"


def as_cell_ranger_2(rna: ad.AnnData, path: Path) -> Path:
    with h5py.File(path / "cr2.h5", "w") as file:
        group = file.create_group("GRCh38")
        matrix = sp.csr_matrix(rna.X)
        group["data"], group["indices"], group["indptr"] = (
            matrix.data.astype(int),
            matrix.indices,
            matrix.indptr,
        )
        group["shape"] = np.array(matrix.shape[::-1])
        group["barcodes"], group["genes"] = np.array(rna.obs_names, "S"), np.array(rna.var["gene_id"], "S")
        group["gene_names"] = np.array(list(rna.var_names), "S")
    return path / "cr2.h5"


def as_zstd(rna: ad.AnnData, path: Path) -> Path:
    hdf5plugin = pytest.importorskip("hdf5plugin")
    rna.write_h5ad(path / "zstd.h5ad", compression=hdf5plugin.FILTERS["zstd"])
    return path / "zstd.h5ad"


CONTAINERS = [
    as_gz, as_zarr, as_loom, as_starsolo, as_geo, as_matrix_itself, as_outs, as_cell_ranger_2, as_zstd,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Writing zarr v2")
@pytest.mark.parametrize("write", CONTAINERS)
def test_every_container_gives_the_same_cells(write: Callable, cells: tuple, tmp_path: Path):
    square = cells[0][:, : cells[0].n_obs].copy()  # as many genes as cells: nothing tells rows from columns
    for number, rna in enumerate((cells[0], square)):
        folder = tmp_path / str(number)
        folder.mkdir()
        got = stored(write(rna, folder), cells[1], folder / "data")
        assert_right(got, (rna[got[0].index].copy(), cells[1][got[0].index].copy()))


@pytest.mark.parametrize(
    ("name", "content", "says", "hint"),
    [
        ("x.rds", b"\x1f\x8b" + bytes(100), "an R object", "write10xCounts"),
        ("x.csv", b"cell,A,B\nc1,0,1\n", "a table in text", 'sc.read_csv("'),
        ("x.bam", b"BAM\1", "aligned reads", "make_fragment_file"),
        ("x.h5ad", b"hello", "is not an HDF5 file", "convert it"),
    ],
)
def test_other_files_are_refused_with_what_converts_them(
    name: str, content: bytes, says: str, hint: str, cells: tuple, tmp_path: Path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught, open_rows(tmp_path / name, "rna"):
        pass
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("groups", "hint"),
    [
        (("assays", "cell.names"), 'SeuratDisk::Convert("'),
        (("Class", "Metadata"), "fragments.tsv.gz"),
        (("anndatas",), "to_adata()"),
    ],
)
def test_other_hdf5_is_refused_with_what_converts_it(groups: tuple[str, ...], hint: str, tmp_path: Path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name in groups:
            file.create_group(name)
    with pytest.raises(InputError) as caught, open_rows(tmp_path / "x.h5", "rna"):
        pass
    assert hint in caught.value.hint


def test_a_file_open_elsewhere_is_not_called_damaged(cells: tuple, tmp_path: Path):
    cells[0].write_h5ad(tmp_path / "rna.h5ad")
    fcntl = pytest.importorskip("fcntl")
    with open(tmp_path / "rna.h5ad", "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(InputError, match="open for writing in another program"),
            open_rows(held.name, "rna"),
        ):
            pass


# ---------------------------------------------------------------------------------------------- AnnData of others


def test_muon_objects_and_odd_names_of_modalities(cells: tuple, tmp_path: Path):
    mudata = pytest.importorskip("mudata")
    with mudata.set_options(pull_on_update=False):
        for names in (("rna", "atac"), ("scRNA", "scATAC"), ("gex", "atac_peaks"), ("RNA", "peaks")):
            both = mudata.MuData(dict(zip(names, (adata.copy() for adata in cells), strict=True)))
            assert_right(stored(both, both, tmp_path / names[1]), cells)
        protein = cells[0].copy()
        protein.var_names = [f"p{i}" for i in range(protein.n_vars)]
        other = mudata.MuData({"rna": cells[0].copy(), "adt": protein})
    with pytest.raises(InputError, match="has no ATAC modality: it holds rna, adt"):
        preprocess(other, other, tmp_path / "none")


def test_gene_names_in_a_column_of_row_numbers(cells: tuple, tmp_path: Path):
    rna = cells[0].copy()
    rna.var = pd.DataFrame({"features": 1, "index": rna.var_names}, index=[str(i) for i in range(rna.n_vars)])
    assert_right(stored(rna, cells[1], tmp_path), cells)


def test_the_reserved_column_index_is_kept_under_another_name(cells: tuple, tmp_path: Path):
    from cisformer.data.h5ad import H5adWriter

    rna = cells[0].copy()
    rna.write_h5ad(tmp_path / "rna.h5ad")
    with h5py.File(tmp_path / "rna.h5ad", "r+") as file:
        obs = file["obs"]
        obs.move(obs.attrs["_index"], "cellnames")
        obs.attrs["_index"] = "cellnames"
        obs["_index"] = np.array(list(rna.obs_names), dtype=h5py.string_dtype())
        obs["_index"].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        obs.attrs["column-order"] = np.array(
            [*obs.attrs["column-order"], "_index"], dtype=h5py.string_dtype()
        )
    with open_rows(tmp_path / "rna.h5ad", "rna") as source:
        assert "_index" not in source.obs
        assert source.obs["index"].tolist() == rna.obs_names.tolist()
        with H5adWriter(tmp_path / "out.h5ad", source.obs, source.var) as writer:
            writer.append(source.rows(0, source.n_cells))


def test_raw_without_feature_types_and_mislabelled_peaks(cells: tuple, tmp_path: Path):
    rna, atac = cells
    both = ad.AnnData(
        sp.hstack([rna.X, atac.X], format="csr"),
        rna.obs,
        pd.DataFrame(index=[*rna.var_names, *atac.var_names]),
    )
    both.var["gene_ids"] = [*rna.var["gene_id"], *atac.var_names]
    both.raw = both.copy()
    both.var["feature_types"] = ["Gene Expression"] * rna.n_vars + ["Peaks"] * atac.n_vars
    both.X = np.log1p(both.X)
    assert_right(stored(both, both, tmp_path / "raw"), cells)
    for types in ("Gene Expression", ""):
        labelled = atac.copy()
        labelled.var["feature_types"] = types
        assert_right(stored(rna, labelled, tmp_path / f"types{types}"), cells)


@pytest.mark.parametrize("turn", ["rna", "atac"])
def test_transposed_cells_are_refused(turn: str, cells: tuple, tmp_path: Path):
    pair = {"rna": cells[0], "atac": cells[1]}
    pair[turn] = pair[turn].T.copy()
    with pytest.raises(InputError, match="is transposed") as caught:
        preprocess(pair["rna"], pair["atac"], tmp_path)
    assert "adata.T" in caught.value.hint


def test_swapped_files_are_named(cells: tuple, tmp_path: Path):
    with pytest.raises(InputError, match="holds peaks, such as chr") as caught:
        preprocess(cells[1], cells[0], tmp_path)
    assert "-r" in caught.value.hint


# ---------------------------------------------------------------------------------------------- values


def test_imputed_atac_is_refused_and_its_counts_are_found_in_a_layer(
    cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rna, atac = cells
    imputed = atac.copy()
    imputed.X = np.clip(0.6 * atac.X.toarray().mean(0) + 0.3 * atac.X.toarray(), 1e-4, 0.99).astype(
        np.float32
    )
    with pytest.raises(InputError, match="100% of them above 0, as a model or smoothing makes them"):
        preprocess(rna, imputed, tmp_path / "no")
    imputed.layers["raw_counts"] = atac.X
    with caplog.at_level(logging.INFO):
        assert_right(stored(rna, imputed, tmp_path / "layer"), cells)
    assert "reading the counts in layers/raw_counts" in caplog.text


def test_tfidf_is_open_where_it_is_not_zero(cells: tuple, tmp_path: Path):
    atac = cells[1].copy()
    atac.X = sp.csr_matrix(atac.X.multiply(0.37))
    assert_right(stored(cells[0], atac, tmp_path), cells)


def test_binary_rna_is_no_counts(cells: tuple, tmp_path: Path):
    rna = cells[0].copy()
    rna.X = sp.csr_matrix((rna.X > 0).astype(np.float32))
    with pytest.raises(InputError, match="found binary values in X"):
        preprocess(rna, cells[1], tmp_path / "no")
    for name, slot in (
        ("counts", sp.csr_matrix(rna.shape)),
        ("counts", rna.X),
    ):  # empty, binary: beside the counts
        beside = cells[0].copy()
        beside.layers[name] = slot
        assert_right(stored(beside, cells[1], tmp_path / str(slot.nnz)), cells)


# ---------------------------------------------------------------------------------------------- names of peaks

SPELLINGS = {
    "dots": "{c}.{s}.{e}",
    "commas": "{c}:{s:,}-{e:,}",
    "stranded": "{c}:{s}-{e}:*",
    "blank": " {c}:{s}-{e} ",
    "made unique": "{c}:{s}-{e}-1",
    "no chr": "{b}:{s}-{e}",
    "genome": "GRCh38_{c}:{s}-{e}",
    "scientific": "{c}-{s:.9e}-{e:.9e}",
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings_of_peaks(spelling: str, cells: tuple, tmp_path: Path):
    atac = cells[1].copy()
    atac.var = pd.DataFrame(
        index=[
            spelling.format(c=row.chrom, s=row.start, e=row.end, b=row.chrom[3:])
            for row in cells[1].var.itertuples()
        ]
    )
    assert_right(stored(cells[0], atac, tmp_path), cells)


COLUMNS = {
    "pyranges": (("Chromosome", "Start", "End"), 0),
    "chr": (("chr", "start", "end"), 0),
    "bed": (("chrom", "chromStart", "chromEnd"), 0),
    "GRanges": (("seqnames", "start", "end"), 1),
}


@pytest.mark.parametrize(("columns", "first_base"), COLUMNS.values(), ids=COLUMNS)
@pytest.mark.parametrize("kind", [int, float, str])
def test_columns_of_regions(
    columns: tuple[str, ...], first_base: int, kind: type, cells: tuple, tmp_path: Path
):
    atac = cells[1].copy()
    region = (
        atac.var["chrom"].astype(str),
        (atac.var["start"] + first_base).map(kind),
        atac.var["end"].map(kind),
    )
    table = pd.DataFrame({name: values.to_numpy() for name, values in zip(columns, region, strict=True)})
    atac.var = table.set_axis([f"peak_{i}" for i in range(atac.n_vars)])
    assert_right(stored(cells[0], atac, tmp_path), cells)


@pytest.mark.parametrize("reference", ["human", "dataset"])
def test_a_peak_that_starts_below_zero_is_refused(reference: str, cells: tuple, tmp_path: Path):
    atac = cells[1].copy()
    atac.var_names = ["chr4:-80-420", *atac.var_names[1:]]
    with pytest.raises(InputError, match="'chr4:-80-420' starts before its chromosome"):
        preprocess(cells[0], atac, tmp_path, reference=reference)


def test_contigs_keep_their_names(cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    odd = [
        "KI270728.1:5000-5500",
        "GL000194.1-100-900",
        "chrUn_KI270742v1_1000_2000",
        "HLA-A*01:01:01:01-5-50",
    ]
    atac = cells[1].copy()
    atac.var_names = [*odd, *atac.var_names[4:]]
    with caplog.at_level(logging.INFO):
        store = preprocess(cells[0], atac, tmp_path, reference="dataset", manually=True)["all"]
        preprocess(cells[0], atac, tmp_path / "human", manually=True)
    assert store.reference.ccres["chrom"][:4].tolist() == [
        "KI270728.1", "GL000194.1", "chrUn_KI270742v1", "HLA-A*01:01:01:01",
    ]  # fmt: skip
    assert "4 peaks are not in it, such as KI270728.1:5000-5500" in caplog.text


def test_tiles_are_asked_for_their_genome(cells: tuple, tmp_path: Path):
    atac = cells[1].copy()
    start = atac.var["start"] // 500 * 500
    atac.var = pd.DataFrame(
        index=[f"{c}:{s}-{s + 500}" for c, s in zip(atac.var["chrom"], start, strict=True)]
    )
    atac = atac[:, ~atac.var_names.duplicated()].copy()
    with pytest.raises(InputError, match="are tiles, such as chr") as caught:
        preprocess(cells[0], atac, tmp_path)
    assert "--genome hg38" in caught.value.hint
    assert preprocess(cells[0], atac, tmp_path, genome="hg38", manually=True)["all"].n_cells == 40
    with pytest.raises(InputError, match="of hg38, the data of mm10") as caught:
        preprocess(cells[0], atac, tmp_path / "mm10", genome="mm10")
    assert "--reference dataset --genome mm10" in caught.value.hint


# ---------------------------------------------------------------------------------------------- barcodes


def complement(barcode: str) -> str:
    return barcode[::-1].translate(str.maketrans("ACGT", "TGCA"))


BARCODES = {
    "ArchR": (lambda x, i: f"{x}-1", lambda x, i: f"PBMC#{x}-1"),
    "Seurat": (lambda x, i: f"{x}-1", lambda x, i: f"s1_{x}-1"),
    "none": (lambda x, i: f"{x}-1", lambda x, i: x),
    "blank": (lambda x, i: f"{x}-1", lambda x, i: f"{x}-1 "),
    "lower case": (lambda x, i: f"{x}-1", lambda x, i: f"{x.lower()}-1"),
    "both ends": (lambda x, i: f"{x}-1_s1", lambda x, i: f"s1_{x}-1"),
    "concat": (lambda x, i: f"{x}-{1 + (i >= 20)}", lambda x, i: f"{x}-1-{int(i >= 20)}"),
    "all 1": (lambda x, i: f"{x}-{1 + (i >= 20)}", lambda x, i: f"{x}-1"),
    "reverse complement": (lambda x, i: f"{x}-1", lambda x, i: f"{complement(x)}-1"),
}


@pytest.mark.parametrize(("of_rna", "of_atac"), BARCODES.values(), ids=BARCODES)
def test_barcodes_that_are_spelt_in_two_ways_are_translated(
    of_rna: Callable, of_atac: Callable, cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rna, atac = (adata.copy() for adata in cells)
    letters = [name.split("-")[0] for name in rna.obs_names]
    rna.obs_names = [of_rna(x, i) for i, x in enumerate(letters)]
    atac.obs_names = [of_atac(x, i) for i, x in enumerate(letters)]
    named = rna.obs_names
    shuffled = atac[np.random.default_rng(0).permutation(atac.n_obs)].copy()
    got = stored(rna, shuffled, tmp_path)
    atac.obs_names = named
    assert_right(got, (rna, atac))
    assert "were translated" in caplog.text


def test_barcodes_that_agree_by_chance_are_no_pairs(cells: tuple, tmp_path: Path):
    rng = np.random.default_rng(1)
    atac = cells[1].copy()
    names = ["".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(atac.n_obs)]
    names[3], names[20] = atac.obs_names[30], atac.obs_names[7]
    atac.obs_names = names
    with pytest.raises(InputError, match="share only 2 of 40 and 40 barcodes, as chance gives"):
        preprocess(cells[0], atac, tmp_path)


def test_row_numbers_are_replaced_by_the_column_of_barcodes_or_refused(cells: tuple, tmp_path: Path):
    rna, atac = cells[0].copy(), cells[1][np.random.default_rng(0).permutation(40)].copy()
    for adata in (rna, atac):
        adata.obs["barcode"] = adata.obs_names.to_numpy()
        adata.obs_names = [str(i) for i in range(adata.n_obs)]
    assert_right(stored(rna, atac, tmp_path / "column"), cells)
    for adata in (rna, atac):
        del adata.obs["barcode"]
    with pytest.raises(InputError, match="named by row numbers") as caught:
        preprocess(rna, atac, tmp_path / "none")
    assert "barcode" in caught.value.hint
    both = ad.AnnData(sp.hstack([rna.X, cells[1].X], format="csr"), obs=rna.obs)
    both.var = pd.DataFrame(
        {"feature_types": ["Gene Expression"] * rna.n_vars + ["Peaks"] * atac.n_vars},
        index=[*rna.var_names, *atac.var_names],
    )
    assert (
        preprocess(both, both, tmp_path / "same", manually=True)["all"].n_cells == 40
    )  # one file: the same rows


# ---------------------------------------------------------------------------------------------- annotation of cells


def test_text_of_obs_stays_text(cells: tuple, tmp_path: Path):
    rna = cells[0].copy()
    names = ["0", "1.10", "1.1", "NA", "nan", "01", "1e3", "x"] * 5
    rna.obs = pd.DataFrame(
        {"cluster": pd.Categorical(names), "batch": ["1", "2"] * 20, "n": range(40)}, rna.obs_names
    )
    store = preprocess(rna, cells[1], tmp_path, manually=True)["all"]
    info = CellStore.open(store.path).cell_info.loc[rna.obs_names]
    assert info["cluster_rna"].tolist() == names
    assert info["batch_rna"].tolist() == ["1", "2"] * 20
    assert info["n_rna"].tolist() == list(range(40))


def test_cell_types_come_from_a_column_of_obs(cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    from cisformer.links.files import read_cell_types

    for name, adata in zip(("rna", "atac"), (each.copy() for each in cells), strict=True):
        types = ["0", "1.10", "T cell ", "B\ncell"] * 10
        adata.obs["type"] = pd.Series(types, adata.obs_names).where(np.arange(40) > 0)
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        read = read_cell_types(f"{tmp_path}/{name}.h5ad:type")
        assert read.tolist() == (["0", "1.10", "T cell", "B cell"] * 10)[1:]
        assert read.index.tolist() == adata.obs_names[1:].tolist()
        assert "1 of 40 cells have no type" in caplog.text
    with pytest.raises(InputError, match="has no column 'x' in obs"):
        read_cell_types(f"{tmp_path}/rna.h5ad:x")


def test_cells_without_a_type_are_no_type_of_their_own(caplog: pytest.LogCaptureFixture):
    from cisformer.links.files import check_cell_types

    types = pd.Series(["NK", None, np.nan, "nan"], index=list("abcd"))
    assert check_cell_types(types, "types").to_dict() == {"a": "NK", "d": "nan"}
    assert check_cell_types(types.astype("category"), "types").to_dict() == {"a": "NK", "d": "nan"}
    assert "types: 2 of 4 cells have no type" in caplog.text
    with pytest.raises(InputError, match="no cell has a type"):
        check_cell_types(types[1:3], "types")
    with pytest.raises(InputError, match="is a list, wanted a pandas Series"):
        check_cell_types(["NK"], "types")
