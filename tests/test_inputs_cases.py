"""Cases of public trackers that no other file of tests holds: names of clusters, mixed and old files, whitelists."""

from __future__ import annotations

import gzip
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from test_inputs import assert_right, stored

from cisformer.data import containers
from cisformer.data.preprocess import preprocess
from cisformer.errors import InputError
from cisformer.links.files import read_cell_types
from cisformer.links.formats import export_links, write_format

CLUSTERS = ["0", "01", "1.1", "1.10", "1e3", "1000", "NA", "nan"]


def test_clusters_that_look_like_numbers_stay_apart(tmp_path: Path):
    """Leiden clusters in the table of types, in links, and in what is exported of them."""
    text = "".join(f"AAAC{i}-1\t{name}\n" for i, name in enumerate(CLUSTERS))
    (tmp_path / "types.tsv").write_text(text, encoding="utf-8")
    assert read_cell_types(tmp_path / "types.tsv").tolist() == CLUSTERS
    n = len(CLUSTERS)
    table = pd.DataFrame(
        {
            "gene_id": "E1", "gene_name": "NA", "tss": 1500, "strand": "+",
            "ccre": [f"chr1:{i}-{i + 9}" for i in range(2 * n)],
            "cell_type": CLUSTERS * 2, "distance": 5, "score": np.linspace(1, 0.1, 2 * n), "fdr": 0.01,
        }
    )  # fmt: skip
    write_format(table, tmp_path / "links.tsv.gz", "tsv")
    for name in CLUSTERS:
        assert export_links(tmp_path, tmp_path / "one.tsv.gz", cell_types=[name]) == 2
        kept = pd.read_csv(tmp_path / "one.tsv.gz", sep="\t", dtype=str, keep_default_na=False)
        assert kept[["gene_name", "cell_type"]].to_numpy().tolist() == [["NA", name]] * 2
    assert export_links(tmp_path, tmp_path / "best.tsv.gz", top_per_gene=1) == n
    best = pd.read_csv(tmp_path / "best.tsv.gz", sep="\t", dtype=str, keep_default_na=False)
    assert best["cell_type"].tolist() == CLUSTERS


def test_a_file_that_may_not_be_read(cells: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cells[0].write_h5ad(tmp_path / "rna.h5ad")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(containers, "open", refuse, raising=False)
    with pytest.raises(InputError, match="you may not read") as caught:
        preprocess(tmp_path / "rna.h5ad", cells[1], tmp_path / "data")
    assert "chmod" in caught.value.hint


def test_a_file_of_before_anndata_07(cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Compound tables, categories in `uns`, sparse by `h5sparse_format`."""
    rna = cells[0]
    codes, names = pd.factorize(rna.obs["cell_type"], sort=True)
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        rows = [(name.encode(), int(code)) for name, code in zip(rna.obs_names, codes, strict=True)]
        file["obs"] = np.array(rows, dtype=[("index", "S20"), ("cell_type", "i1")])
        file["uns/cell_type_categories"] = np.array([name.encode() for name in names])
        file["var"] = np.array([(name.encode(),) for name in rna.var_names], dtype=[("index", "S30")])
        matrix = sp.csr_matrix(rna.X)
        group = file.create_group("X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", np.array(rna.shape)
        group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
    with pytest.warns():  # of anndata, which reads such files by a way of old
        got = stored(tmp_path / "old.h5ad", cells[1], tmp_path / "data")
    assert_right(got, cells)
    assert "is in an old anndata format" in caplog.text


def test_barcodes_of_the_atac_side_of_a_multiome_are_explained(cells: tuple, tmp_path: Path):
    rng = np.random.default_rng(0)
    atac = cells[1].copy()
    names = {"".join(rng.choice(list("ACGT"), 16)) + "-1" for _ in range(39)} - set(atac.obs_names)
    atac.obs_names = [*sorted(names), cells[0].obs_names[0]]
    with pytest.raises(InputError, match="as chance gives") as caught:
        preprocess(cells[0], atac, tmp_path)
    assert "737K-arc-v1" in caught.value.hint


def test_paired_and_single_cells_in_one_file(cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The order of MultiVI: cells of one modality alone have nothing in the other, and are left out."""
    rna, atac = cells
    kind = np.repeat(["paired", "expression", "accessibility"], [24, 8, 8])
    counts, is_open = rna.X.toarray(), atac.X.toarray()
    counts[kind == "accessibility"], is_open[kind == "expression"] = 0, 0
    both = ad.AnnData(sp.csr_matrix(np.hstack([counts, is_open])))
    both.obs_names = [f"{name}_{what}" for name, what in zip(rna.obs_names, kind, strict=True)]
    both.var_names = [*rna.var_names, *atac.var_names]
    both.var["modality"] = ["Gene Expression"] * rna.n_vars + ["Peaks"] * atac.n_vars
    both.write_h5ad(tmp_path / "both.h5ad")
    got = stored(tmp_path / "both.h5ad", tmp_path / "both.h5ad", tmp_path / "data")
    wanted = rna[:24].copy(), atac[:24].copy()
    for adata in wanted:
        adata.obs_names = [f"{name}_paired" for name in adata.obs_names]
    assert_right(got, wanted)
    assert "16 of 40 cells have no gene or no cCRE of the reference" in caplog.text


def test_modalities_of_an_h5mu_with_other_cells(
    cells: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    mudata = pytest.importorskip("mudata")
    with mudata.set_options(pull_on_update=False):
        mudata.MuData({"rna": cells[0][:30].copy(), "atac": cells[1][10:].copy()}).write(tmp_path / "x.h5mu")
    got = stored(tmp_path / "x.h5mu", tmp_path / "x.h5mu", tmp_path / "data")
    assert_right(got, (cells[0][10:30].copy(), cells[1][10:30].copy()))
    assert "10 of 30 RNA cells have no partner" in caplog.text


def test_a_gtf_of_accessions_or_of_gff3_is_refused(cells: tuple, tmp_path: Path):
    name = cells[0].var_names[0]
    lines = f'NC_000004.12\tx\tgene\t1\t900\t.\t+\t.\tgene_id "{name}"; gene_name "{name}";\n'
    (tmp_path / "refseq.gtf").write_text(lines, encoding="utf-8")
    (tmp_path / "x.gff3.gz").write_bytes(gzip.compress(b"chr4\tx\tgene\t1\t900\t.\t+\t.\tID=gene:A;Name=A\n"))
    for name, says, hint in (
        ("refseq.gtf", "share no chromosome", "accessions"),
        ("x.gff3.gz", "looks like GFF3", "gffread"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            preprocess(*cells, tmp_path / "data", reference="dataset", gtf=tmp_path / name)
        assert hint in caught.value.hint
