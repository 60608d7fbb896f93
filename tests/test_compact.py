"""Compact predictions: two small matrices that hold every probability."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.special import expit, logit

from cisformer.errors import InputError, WriteError
from cisformer.prediction import predict as predict_module
from cisformer.prediction.compact import STATES, is_compact, open_prediction
from cisformer.prediction.predict import predict


@pytest.fixture(scope="module")
def rna(tiny):
    return tiny.rna[:60].copy()


@pytest.fixture(scope="module")
def full(rna, tiny_checkpoints):
    return predict(tiny_checkpoints["rna2atac"], rna).X.toarray()


@pytest.fixture(scope="module")
def path(rna, tiny_checkpoints, tmp_path_factory):
    output = tmp_path_factory.mktemp("compact") / "c.h5ad"
    return predict(tiny_checkpoints["rna2atac"], rna, output=output, compact=True)


def test_the_file_is_a_valid_anndata_without_x(path, rna, tiny_checkpoints):
    adata = ad.read_h5ad(path)
    assert adata.shape == (rna.n_obs, tiny_checkpoints["rna2atac"].reference.n_ccres)
    assert is_compact(adata)
    assert adata.obs_names.tolist() == rna.obs_names.tolist()
    unseen = ~adata.var["seen_in_training"].to_numpy(bool)
    assert np.isneginf(adata.var["prior"].to_numpy()[unseen]).all()


def test_probabilities_are_exact(path, full):
    prediction = open_prediction(path)
    assert prediction.shape == full.shape
    np.testing.assert_allclose(prediction.toarray(), full, atol=1e-6)
    np.testing.assert_allclose(prediction[5:9, 100:300], full[5:9, 100:300], atol=1e-6)


def test_the_formula_of_the_documentation_gives_the_probabilities(path, full):
    text = (Path(__file__).parents[1] / "docs" / "predictions.md").read_text(encoding="utf-8")
    assert "log((1 + (1 - q) * m) / (1 - q * m)) + (x - m) / ((1 + (1 - q) * m) * (1 - q * m))" in text
    assert "m = min(max(x, -1 / (2 - 2 * q)), 1 / (2 * q))" in text
    file = ad.read_h5ad(path)
    x = file.var["intercept"].to_numpy() + file.obsm["X_cisformer"] @ file.varm["cisformer"].T
    prior = file.var["prior"].to_numpy(np.float64)
    q = expit(prior)
    with np.errstate(divide="ignore"):  # 0 where training saw no open cell
        m = np.clip(x, -1 / (2 - 2 * q), 1 / (2 * q))
    predicted = prior + np.log((1 + (1 - q) * m) / (1 - q * m)) + (x - m) / ((1 + (1 - q) * m) * (1 - q * m))
    np.testing.assert_allclose(expit(predicted), full, atol=1e-6)


def test_distances_between_states_are_those_inside_the_link(path, full, tiny_checkpoints):
    adata = ad.read_h5ad(path)
    seen = adata.var["seen_in_training"].to_numpy(bool)
    p, q = full[:, seen].astype(np.float64), expit(adata.var["prior"].to_numpy(np.float64)[seen])
    straight = np.clip(p, q / 2, (1 + q) / 2)  # beyond, log odds go on with the slope that they have there
    slope = np.where(p < q, 4 * (1 - q) / (2 - q), 4 * q / (1 + q))
    x = (straight - q) / (q * (1 - q)) + (logit(p) - logit(straight)) / slope
    difference = adata.obsm[STATES][:1] - adata.obsm[STATES][1:]
    wanted = np.linalg.norm(x[:1] - x[1:], axis=1)
    np.testing.assert_allclose(np.linalg.norm(difference, axis=1), wanted, rtol=1e-3)


def test_returned_and_written_are_the_same(path, rna, tiny_checkpoints):
    returned = predict(tiny_checkpoints["rna2atac"], rna, compact=True)
    assert is_compact(returned)
    written = ad.read_h5ad(path)
    np.testing.assert_allclose(returned.obsm[STATES], written.obsm[STATES], atol=1e-5)


def test_a_region_a_bed_and_a_list_of_cells(path, full, tmp_path):
    whole = open_prediction(path)
    first = whole.var.iloc[10]
    region = f"{first['chrom']}:{first['start']}-{first['end']}"
    bare = region.removeprefix("chr")
    for text in (region, bare):
        part = whole.select(region=text)
        assert part.var.index.tolist() == [whole.var.index[10]]
        np.testing.assert_allclose(part.toarray(), full[:, [10]], atol=1e-6)
    on_chrom = (whole.var["chrom"] == first["chrom"]).to_numpy()
    assert whole.select(region=first["chrom"]).shape[1] == on_chrom.sum()
    bed = tmp_path / "some.bed"
    whole.var.iloc[[3, 700]][["chrom", "start", "end"]].to_csv(bed, sep="\t", header=False, index=False)
    names = tmp_path / "cells.txt"
    names.write_text("\n".join(whole.obs.index[[7, 2]]) + "\n")
    part = whole.select(ccres=bed, cells=names)
    assert part.obs.index.tolist() == whole.obs.index[[2, 7]].tolist()
    np.testing.assert_allclose(part.toarray(), full[np.ix_([2, 7], [3, 700])], atol=1e-6)


def test_group_means_equal_those_of_the_full_matrix(path, full, rna):
    means = open_prediction(path).expand(groupby="cell_type")
    wanted = pd.DataFrame(full).groupby(rna.obs["cell_type"].astype(str).to_numpy()).mean()
    assert means.obs_names.tolist() == wanted.index.tolist()
    np.testing.assert_allclose(means.X, wanted.to_numpy(), atol=1e-6)
    assert means.obs["n_cells"].sum() == rna.n_obs


def test_values_can_be_left_out(path, full):
    prediction = open_prediction(path)
    some = prediction.expand(min_prob=0.05)
    assert sp.issparse(some.X)
    np.testing.assert_allclose(some.X.toarray(), np.where(full >= 0.05, full, 0), atol=1e-6)
    top = prediction.expand(top=7)
    assert (np.diff(top.X.indptr) == 7).all()
    np.testing.assert_allclose(np.sort(top.X.toarray())[:, -7:], np.sort(full)[:, -7:], atol=1e-6)


def test_a_written_part_is_what_expand_returns(path, tmp_path):
    prediction = open_prediction(path).select(region="chr10")
    for options in ({}, {"top": 3}, {"groupby": "cell_type", "min_prob": 0.01}):
        returned = prediction.expand(**options)
        written = ad.read_h5ad(prediction.write(tmp_path / "part.h5ad", **options, force=True))
        assert sp.issparse(written.X) == sp.issparse(returned.X)
        dense = [x.toarray() if sp.issparse(x) else x for x in (written.X, returned.X)]
        np.testing.assert_array_equal(*dense)
        assert written.obs_names.tolist() == returned.obs_names.tolist()


def test_a_dask_array_is_computed_where_it_is_asked_for(path, full):
    pytest.importorskip("dask", reason="dask is an extra")
    lazy = open_prediction(path).to_dask(cells_per_chunk=17)
    assert lazy.shape == full.shape
    np.testing.assert_allclose(lazy[20:40, :50].compute(), full[20:40, :50], atol=1e-6)
    np.testing.assert_allclose(lazy.mean(axis=0).compute(), full.mean(axis=0), atol=1e-6)


def test_the_size_decides_and_is_said(rna, tiny_checkpoints, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(predict_module, "COMPACT_ABOVE_BYTES", 1000)
    caplog.set_level("INFO")
    made = predict(tiny_checkpoints["rna2atac"], rna, output=tmp_path / "auto.h5ad")
    assert is_compact(ad.read_h5ad(made))
    assert "written in compact form" in caplog.text
    made = predict(tiny_checkpoints["rna2atac"], rna, output=tmp_path / "full.h5ad", compact=False)
    assert not is_compact(ad.read_h5ad(made))


def test_a_matrix_that_the_disk_cannot_hold_is_refused(rna, tiny_checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(predict_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(WriteError, match="free where") as refused:
        predict(tiny_checkpoints["rna2atac"], rna, output=tmp_path / "new" / "a.h5ad")
    assert "--compact" in refused.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"region": "chr9:1-2"}, "no cCRE of the prediction overlaps chr9:1-2"),
        ({"region": "chr1:9-2"}, "is not a region"),
        ({"cells": ["nobody"]}, "none of the 1 barcodes"),
        ({"cells": "no_such_file.txt"}, "no_such_file.txt cannot be read"),
    ],
)
def test_a_part_that_is_not_there_is_refused(asked, message, path):
    with pytest.raises(InputError, match=message):
        open_prediction(path).select(**asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"groupby": "nothing"}, "no column 'nothing' in obs"),
        ({"min_prob": 1.5}, "min_prob is 1.5"),
        ({"top": 0}, "top is 0"),
    ],
)
def test_options_of_expand_are_checked(asked, message, path):
    with pytest.raises(InputError, match=message):
        open_prediction(path).expand(**asked)


def test_other_files_are_no_compact_predictions(tiny_files, tmp_path):
    with pytest.raises(InputError, match="is no compact prediction"):
        open_prediction(tiny_files / "rna.h5ad")
    (tmp_path / "x.h5ad").write_text("x")
    with pytest.raises(InputError, match=r"x\.h5ad"):
        open_prediction(tmp_path / "x.h5ad")
    with pytest.raises(InputError, match="there is no file"):
        open_prediction(tmp_path / "none.h5ad")


def test_what_has_no_compact_form_is_refused(tiny, tiny_checkpoints):
    with pytest.raises(InputError, match="for RNA→ATAC models"):
        predict(tiny_checkpoints["atac2rna"], tiny.atac, compact=True)
    with pytest.raises(InputError, match="keeps every probability"):
        predict(tiny_checkpoints["rna2atac"], tiny.rna, compact=True, min_prob=0.1)


def test_expression_carries_its_states_too(tiny, tiny_checkpoints, tmp_path):
    given = tiny.atac[:20].copy()
    returned = predict(tiny_checkpoints["atac2rna"], given)
    written = ad.read_h5ad(predict(tiny_checkpoints["atac2rna"], given, output=tmp_path / "a.h5ad"))
    assert returned.obsm[STATES].shape[0] == 20
    np.testing.assert_allclose(written.obsm[STATES], returned.obsm[STATES], atol=1e-5)
