"""Odd variants of files: the same cells all the same, or a refusal that names what is wrong."""

from __future__ import annotations

import gzip
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from formats import write_10x
from test_fragments import simulate_fragments
from test_inputs import assert_right, stored, write_mtx

from cisformer.data.features import gene_identity
from cisformer.data.genome import parse_regions, rename_chroms
from cisformer.data.h5ad import load_h5ad
from cisformer.data.inspect import as_text, inspect
from cisformer.data.preprocess import preprocess
from cisformer.data.reference import load_reference, save_reference
from cisformer.data.sources import open_rows
from cisformer.errors import InputError

# ---------------------------------------------------------------------------------------------- names

GENES = {
    "ENSG_symbol": "{i}_{s}", "symbol_ENSG": "{s}_{i}", "bar": "{s}|{i}", "dash": "{i}-{s}", "blank": "{i} {s}",
    "gene:": "gene:{i}", "lower case": "{l}", "Seurat": "GRCh38-{s}", "Cell Ranger": "GRCh38______{s}",
    "quotes": '"{s}"', "lifted version": "{i}.12_3",
}  # fmt: skip


@pytest.mark.parametrize("spelling", GENES.values(), ids=GENES)
def test_spellings_of_genes(spelling: str, cells: tuple):
    var = cells[0].var
    names = [spelling.format(i=i, s=s, l=i.lower()) for i, s in zip(var["gene_id"], var.index, strict=True)]
    found = gene_identity(pd.DataFrame(index=names))["gene_id"]
    wanted = var.index if "{s}" in spelling and "{i}" not in spelling else var["gene_id"]
    assert found.tolist() == list(wanted)


def test_numbers_for_genes_are_refused_as_such(cells: tuple, tmp_path: Path):
    rna = ad.AnnData(cells[0].X, cells[0].obs, pd.DataFrame(index=[str(i + 1000) for i in range(150)]))
    with pytest.raises(InputError, match="look like numbers, as Entrez ids are") as caught:
        preprocess(rna, cells[1], tmp_path)
    assert "Ensembl id or symbol" in caught.value.hint


def test_features_of_another_species_are_not_counted(
    cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A mixture of human and mouse: ``mm10_Actb`` is not human ACTB, ``mm10_chr4`` not human chr4."""
    rna, atac = cells
    genes = [f"GRCh38_{name}" for name in rna.var_names[:-3]] + ["mm10___Gapdh", "mm10___Actb", "mm10___Xist"]
    peaks = [f"GRCh38_{name}" for name in atac.var_names[:-90]] + [f"mm10_{x}" for x in atac.var_names[-90:]]
    mixed = (
        ad.AnnData(rna.X, rna.obs, pd.DataFrame(index=genes)),
        ad.AnnData(atac.X, atac.obs, pd.DataFrame(index=peaks)),
    )
    with caplog.at_level(logging.INFO):
        got = stored(*mixed, tmp_path)
    assert_right(got, (rna[:, :-3].copy(), atac[:, :-90].copy()))
    assert "3 genes are not in it, such as mm10___Gapdh" in caplog.text
    assert "90 peaks lie on chromosomes that the reference lacks" in caplog.text


@pytest.mark.parametrize(
    "name",
    ["chr1:10..20", "chr1:10:20", "chr1-10:20", "chr1\t10\t20", "chr1 10 20", "chr1|10|20", '"chr1:10-20"'],
)
def test_other_marks_in_regions(name: str):
    assert parse_regions([name]).to_numpy().tolist() == [["chr1", 10, 20]]


@pytest.mark.parametrize(
    "name", ["chr1:-10-20", "chr1--10-20", "chr1 -10 20", "chr1:10-20_peak", "chr1:a-b", "1:2"]
)
def test_what_is_no_region_stays_none(name: str):
    with pytest.raises(InputError):
        parse_regions([name])


def test_chromosomes_in_another_case():
    assert rename_chroms(pd.Series(["CHR1", "Chr2", "chrX"]), ["chr1", "chr2", "chrX"]).tolist() == [
        "chr1", "chr2", "chrX",
    ]  # fmt: skip
    assert rename_chroms(pd.Series(["Chr1"]), ["Chr1", "chr1"]).tolist() == ["Chr1"]


def test_genes_and_peaks_in_one_table_without_types(
    cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rna, atac = cells
    both = ad.AnnData(sp.hstack([rna.X, atac.X], format="csr"), rna.obs)
    both.var_names = [*rna.var_names, *atac.var_names]
    both.write_h5ad(tmp_path / "both.h5ad")
    got = stored(tmp_path / "both.h5ad", tmp_path / "both.h5ad", tmp_path / "data")
    assert_right(got, cells)
    assert "900 of 1050 features are peaks" in caplog.text


# ---------------------------------------------------------------------------------------------- values


def rewrite(adata: ad.AnnData, path: Path, **arrays: np.ndarray) -> Path:
    """Write an h5ad, and other arrays in place of those of its sparse X."""
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        for name, values in arrays.items():
            del file[f"X/{name}"]
            file[f"X/{name}"] = values
    return path


def test_sparse_matrices_that_are_not_canonical(cells: tuple, tmp_path: Path):
    """Entries given twice are summed, explicit zeros are closed peaks, any order and width of indices will do."""
    rna, atac = cells
    counts, is_open = sp.csr_matrix(rna.X), sp.csr_matrix(atac.X)
    twice = {
        "indices": np.repeat(counts.indices, 2).astype(np.int64)[::1],
        "indptr": counts.indptr.astype(np.int64) * 2,
    }
    halves = np.stack([counts.data - 1, np.ones(counts.nnz)], 1).ravel().astype(np.float64)
    zeros = np.stack([np.zeros(is_open.nnz), np.ones(is_open.nnz)], 1).ravel().astype(np.uint8)
    got = stored(
        rewrite(rna, tmp_path / "rna.h5ad", data=halves, **twice),
        rewrite(
            atac,
            tmp_path / "atac.h5ad",
            data=zeros,
            indices=np.repeat(is_open.indices, 2),
            indptr=is_open.indptr * 2,
        ),
        tmp_path / "data",
    )
    assert_right(got, cells)


TYPES = {
    "float16": lambda x: x.toarray().astype(np.float16),
    "big endian": lambda x: x.toarray().astype(">i2"),
    "turned back": lambda x: sp.csr_matrix(x.multiply(1 - 1e-7)).astype(np.float64),
    "csr_array": lambda x: sp.csr_array(x),
    "csc_array": lambda x: sp.csc_array(x),
    "unsigned": lambda x: sp.csr_matrix(x).astype(np.uint64),
}


@pytest.mark.parametrize("change", TYPES.values(), ids=TYPES)
def test_types_of_values(change: Callable, cells: tuple, tmp_path: Path):
    rna = ad.AnnData(change(cells[0].X), cells[0].obs, cells[0].var)
    assert_right(stored(rna, cells[1], tmp_path / "memory"), cells)
    rna.write_h5ad(tmp_path / "rna.h5ad")
    assert_right(stored(tmp_path / "rna.h5ad", cells[1], tmp_path / "file"), cells)


def test_small_integers_do_not_overflow_where_genes_are_summed(cells: tuple, tmp_path: Path):
    counts = np.where(cells[0].X.toarray() > 0, 200, 0).astype(np.uint8)
    names = [*cells[0].var_names, *cells[0].var["gene_id"]]
    twice = ad.AnnData(sp.csr_matrix(np.hstack([counts, counts])), cells[0].obs, pd.DataFrame(index=names))
    wanted = cells[0].copy()
    wanted.X = sp.csr_matrix(counts.astype(np.float32) * 2)
    assert_right(stored(twice, cells[1], tmp_path), (wanted, cells[1]))


def test_nothing_but_rounding_is_rounded(cells: tuple, tmp_path: Path):
    rna = cells[0].copy()
    rna.X = sp.csr_matrix(rna.X.multiply(1 + 1e-3))
    with pytest.raises(InputError, match="no RNA counts"):
        preprocess(rna, cells[1], tmp_path)


def test_backed_files_and_views(cells: tuple, tmp_path: Path):
    cells[0].write_h5ad(tmp_path / "rna.h5ad")
    backed = ad.read_h5ad(tmp_path / "rna.h5ad", backed="r")
    assert_right(stored(backed, cells[1], tmp_path / "whole"), cells)
    part = cells[0][5:25].copy(), cells[1][5:25].copy()
    assert_right(stored(backed[5:25], cells[1][5:25], tmp_path / "part"), part)
    backed.file.close()


def test_layers_that_are_not_looked_at_are_named(cells: tuple, tmp_path: Path):
    rna = cells[0].copy()
    rna.layers["spliced"], rna.layers["unspliced"] = rna.X.copy(), rna.X.copy()
    rna.X = np.log1p(rna.X.toarray())
    with pytest.raises(InputError, match="not looked at: layers/spliced, layers/unspliced") as caught:
        preprocess(rna, cells[1], tmp_path)
    assert "adata.layers['spliced'] + adata.layers['unspliced']" in caught.value.hint
    del rna.layers["spliced"]
    rna.X[3, 4] = np.nan
    with pytest.raises(InputError, match="missing values in X") as caught:
        preprocess(rna, cells[1], tmp_path)
    assert "numpy.nan_to_num" in caught.value.hint


@pytest.mark.parametrize("thing", [None, pd.DataFrame([[1]])])
def test_other_objects_are_refused(thing: object, cells: tuple, tmp_path: Path):
    with pytest.raises(InputError, match="wanted a path, an AnnData or a MuData"):
        preprocess(thing, cells[1], tmp_path)


# ---------------------------------------------------------------------------------------------- text

TABLES = {
    "BOM and CRLF": lambda b, f: ("\ufeff" + b.replace("\n", "\r\n"), "\ufeff" + f.replace("\n", "\r\n")),
    "headings": lambda b, f: ("x\n" + b, "id\tname\ttype\n" + f),
    "write.table of R": lambda b, f: (
        "".join(f'"{i}"\t"{name}"\n' for i, name in enumerate(b.split(), 1)),
        '"V1"\n' + "".join(f'"{i}"\t"{line.split(chr(9))[1]}"\n' for i, line in enumerate(f.splitlines(), 1)),
    ),
    "one column": lambda b, f: (b, "".join(line.split("\t")[0] + "\n" for line in f.splitlines())),
}


@pytest.mark.parametrize("change", TABLES.values(), ids=TABLES)
def test_tables_beside_a_matrix(change: Callable, cells: tuple, tmp_path: Path):
    write_mtx(cells[0], tmp_path / "m")
    paths = tmp_path / "m/barcodes.tsv", tmp_path / "m/features.tsv"
    texts = change(*(path.read_text(encoding="utf-8") for path in paths))
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    assert_right(stored(tmp_path / "m", cells[1], tmp_path / "data"), cells)


@pytest.mark.parametrize(
    ("heading", "mark", "more"), [("chrom\tstart\tend\n", "\t", "\tx"), ("", " ", ""), ("", "\t", "")]
)
def test_peaks_beside_a_matrix(heading: str, mark: str, more: str, cells: tuple, tmp_path: Path):
    (tmp_path / "m").mkdir()
    scipy.io.mmwrite(tmp_path / "m/matrix.mtx", sp.coo_matrix(cells[1].X.T), field="pattern")
    rows = cells[1].var[["chrom", "start", "end"]].astype(str).to_numpy()
    text = heading + "".join(mark.join(row) + more + "\n" for row in rows)
    (tmp_path / "m/peaks.bed").write_text(text, encoding="utf-8")
    (tmp_path / "m/barcodes.tsv").write_text("\n".join(cells[1].obs_names), encoding="utf-8")
    assert_right(stored(cells[0], tmp_path / "m", tmp_path / "data"), cells)


FRAGMENTS = {
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "blank first": lambda text: "# x\n\n" + text + "\n\n",
    "headings": lambda text: "chrom\tstart\tend\tbarcode\tcount\n" + text,
    "BOM": lambda text: "\ufeff" + text,
    "put together": lambda text: text[: text.index("\n") + 1] + "# id=b\n" + text[text.index("\n") + 1 :],
    "CHR": lambda text: text.replace("chr", "CHR"),
    "unsorted": lambda text: "".join(np.random.default_rng(0).permutation(text.splitlines(keepends=True))),
}


@pytest.mark.parametrize("change", FRAGMENTS.values(), ids=FRAGMENTS)
def test_spellings_of_fragments(change: Callable, cells: tuple, tmp_path: Path):
    pytest.importorskip("pyarrow")
    rows = simulate_fragments(cells[1], np.random.default_rng(0))
    text = "".join("\t".join(map(str, (*row, 1))) + "\n" for row in sorted(rows))
    (tmp_path / "fragments.tsv.gz").write_bytes(gzip.compress(change(text).encode()))
    assert_right(stored(cells[0], tmp_path / "fragments.tsv.gz", tmp_path / "data"), cells)


WRONG = {
    "empty.h5ad": (b"", "is empty", "again"),
    "page.h5ad": (b"<html>404</html>", "is a web page", "download it again"),
    "pointer.h5ad": (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer", "git lfs pull"),
    "x.zarr.zip": (b"PK\x03\x04" + bytes(50), "is an archive", "unpack it"),
    "x.tar.gz": (gzip.compress(bytes(1024), mtime=0), "is an archive", "unpack it"),
    "fragments.tsv.gz.tbi": (
        gzip.compress(b"TBI\1" + bytes(99), mtime=0),
        "is an index",
        "give fragments.tsv.gz",
    ),
    "fragments.tsv.gz": (
        gzip.compress(b"chr1 1 9 AAAC 1\n", mtime=0),
        "first line is 'chr1 1 9 AAAC 1'",
        "by tabs",
    ),
    "atac_fragments.tsv": (b"chr1\t1\t9\n", "first line is 'chr1 1 9'", "4 to 6 columns"),
}


@pytest.mark.parametrize(("name", "content", "says", "hint"), [(name, *case) for name, case in WRONG.items()])
def test_what_went_wrong_with_a_file_is_told(name: str, content: bytes, says: str, hint: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught, open_rows(tmp_path / name, "atac"):
        pass
    assert hint in caught.value.hint


def test_fragments_of_other_chromosomes_are_told_from_those_of_other_cells(cells: tuple, tmp_path: Path):
    pytest.importorskip("pyarrow")
    for chrom, says in (
        ("scaffold_1", "no fragment on a chromosome of the reference"),
        ("chr1", "shares no barcode"),
    ):
        text = f"{chrom}\t1\t9\tAAAACCCCGGGGTTTT-1\t1\n"
        (tmp_path / "fragments.tsv.gz").write_bytes(gzip.compress(text.encode()))
        with pytest.raises(InputError, match=says):
            preprocess(cells[0], tmp_path / "fragments.tsv.gz", tmp_path / "data")


def test_the_files_of_a_folder_are_named(cells: tuple, tmp_path: Path):
    cells[0].write_h5ad(tmp_path / "rna.h5ad")
    with pytest.raises(InputError, match="a folder without") as caught, open_rows(tmp_path, "rna"):
        pass
    assert "rna.h5ad" in caught.value.hint


# ---------------------------------------------------------------------------------------------- opening, inspecting


def test_inspect_reads_what_the_other_commands_read(cells: tuple, tmp_path: Path):
    pytest.importorskip("pyarrow")
    cells[0].write_h5ad(tmp_path / "rna.h5ad")
    (tmp_path / "rna.h5ad.gz").write_bytes(gzip.compress((tmp_path / "rna.h5ad").read_bytes(), 1))
    write_mtx(cells[0], tmp_path / "m")
    rows = simulate_fragments(cells[1], np.random.default_rng(0))
    text = "".join("\t".join(map(str, (*row, 1))) + "\n" for row in sorted(rows))
    (tmp_path / "fragments.tsv").write_text(text, encoding="utf-8")
    names = ("rna.h5ad.gz", "m/matrix.mtx", "fragments.tsv")
    report = inspect([tmp_path / name for name in names])
    assert [record["kind"] for record in report["files"]] == ["h5ad", "mtx", "fragments"]
    fragments = report["files"][2]
    assert (fragments["n_looked_at"], fragments["genome"]) == (len(rows), "hg38")
    assert fragments["share_found"] == 1  # of the insertions; the far ends lie behind the chromosomes
    assert "fragments.tsv" in as_text(report)


def test_a_library_that_cannot_be_imported_is_not_told_as_damage(
    cells: tuple, tmp_path: Path, command: Callable
):
    cells[0].write_h5ad(tmp_path / "rna.h5ad")
    (tmp_path / "anndata").mkdir()
    (tmp_path / "anndata/__init__.py").write_text("raise ImportError('numpy.core failed')", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = command("inspect", tmp_path / "rna.h5ad", PYTHONPATH=path)
    assert done.returncode == 1
    assert "cannot be imported: numpy.core failed" in done.stderr
    assert "pip install" in done.stderr
    assert "damaged" not in done.stderr


def test_one_way_to_open_an_h5ad(cells: tuple, tmp_path: Path):
    assert load_h5ad(cells[0]) is cells[0]
    cells[0].write_h5ad(tmp_path / "rna.h5ad")
    assert (load_h5ad(tmp_path / "rna.h5ad").X != cells[0].X).nnz == 0
    backed = load_h5ad(tmp_path / "rna.h5ad", backed=True)
    assert backed.isbacked
    backed.file.close()
    write_10x(tmp_path / "x.h5", *cells)
    (tmp_path / "cut.h5ad").write_bytes((tmp_path / "rna.h5ad").read_bytes()[:5000])
    for name, says in (
        ("none.h5ad", "there is no file"),
        ("x.h5", "is 10x h5; wanted"),
        ("cut.h5ad", "damaged"),
    ):
        with pytest.raises(InputError, match=says):
            load_h5ad(tmp_path / name)


def test_a_reference_of_ones_own_may_be_called_human(
    cells: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    built_in = load_reference("human")
    own = type(built_in)(
        "human", "", built_in.genes.iloc[:500].reset_index(drop=True), built_in.ccres.iloc[:900]
    )
    save_reference(own, tmp_path / "human")
    monkeypatch.chdir(tmp_path)
    assert load_reference("./human").n_genes == load_reference(Path("human")).n_genes == 500
    assert load_reference("human") is built_in
    assert "write ./human for the folder" in caplog.text
    rna = ad.AnnData(np.ones((4, 200), np.float32), pd.DataFrame(index=list("abcd")))
    rna.var_names = own.genes["gene_name"][:200].str.title()  # like mouse symbols: another case will do
    from cisformer.data.alignment import map_genes

    assert map_genes(rna.var, own).share_found == 1


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_a_locale_that_is_not_utf_8(locale: dict[str, str], cells: tuple, tmp_path: Path):
    """Names outside ASCII in files and paths: read, stored and printed, whatever the locale."""
    folder = tmp_path / "Zellen über α"
    folder.mkdir()
    rna = cells[0].copy()
    rna.obs["Typ"] = ["Müller glia", "γδ T"] * 20
    rna.write_h5ad(folder / "rna.h5ad")
    cells[1].write_h5ad(folder / "atac.h5ad")
    script = (
        "from pathlib import Path; from cisformer import preprocess; from cisformer.links.files import read_cell_types;"
        "folder = next(Path('.').glob('Zellen*'));"
        "store = preprocess(folder / 'rna.h5ad', folder / 'atac.h5ad', folder / 'data', manually=True)['all'];"
        "assert store.cell_info['Typ_rna'].nunique() == 2, store.cell_info;"
        "store.cell_info['Typ_rna'].to_csv('types.tsv', sep='\\t', header=False, encoding='utf-8');"
        "assert set(read_cell_types('types.tsv')) == {'M\\xfcller glia', '\\u03b3\\u03b4 T'}"
    )
    env = {**os.environ, "PYTHONUTF8": "0", **locale}
    for run in (["-c", script], ["-m", "cisformer", "inspect", "Zellen über α/rna.h5ad"]):
        done = subprocess.run([sys.executable, *run], cwd=tmp_path, env=env, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    assert b"obs" in done.stdout
