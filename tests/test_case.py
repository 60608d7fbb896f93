"""Prediction, truth and training cells meet by name, whatever their order."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cisformer.data.store import find_split
from cisformer.errors import InputError
from cisformer.evaluation.case_files import TrainingFiles, case_of_files
from cisformer.evaluation.case_store import case_of_store
from cisformer.evaluation.matrices import dense, select
from cisformer.evaluation.training_cells import log_normalise
from cisformer.prediction.predict import predict


@pytest.fixture
def cells(tiny):
    """(RNA, ATAC, prediction of the last 40 cells' ATAC): probabilities that say which entry they are."""
    rna, atac = tiny.rna.copy(), tiny.atac.copy()
    rng = np.random.default_rng(0)
    values = rng.random((40, atac.n_vars)).astype(np.float32)
    return rna, atac, ad.AnnData(sp.csr_matrix(values), obs=atac.obs.iloc[120:], var=atac.var.copy())


def _entries(case):
    """(barcode, feature) → (predicted, true) of a few entries."""
    predicted, truth = case.predicted.toarray(), case.truth.toarray()
    return {
        (b, f): (predicted[i, j], truth[i, j])
        for i, b in enumerate(case.barcodes)
        for j, f in enumerate(case.features)
        if (i + j) % 7 == 0
    }


def test_order_of_cells_and_features_does_not_matter(cells):
    _, atac, predicted = cells
    rng = np.random.default_rng(1)
    case = case_of_files(predicted, atac)
    shuffled = atac[rng.permutation(atac.n_obs)][:, rng.permutation(atac.n_vars)].copy()
    again = case_of_files(predicted[:, rng.permutation(atac.n_vars)].copy(), shuffled)
    assert case.truth.shape == (40, atac.n_vars)
    place = dict(zip(again.features, range(atac.n_vars), strict=True))
    for name, matrix in (("predicted", predicted.X), ("truth", atac.X[120:])):
        columns = [place[f] for f in case.features]
        np.testing.assert_array_equal(getattr(again, name)[:, columns].toarray(), matrix.toarray())


def test_only_shared_cells_are_scored_and_the_report_says_so(cells):
    _, atac, predicted = cells
    case = case_of_files(predicted, atac[100:130].copy())
    assert list(case.barcodes) == list(atac.obs_names[120:130])
    assert "10 cells are in both" in case.notes[0]


def test_peaks_open_the_regions_that_they_overlap(cells):
    _, atac, predicted = cells
    wider = atac.copy()
    wider.var_names = [
        f"{c}:{max(s - 1, 0)}-{e}"
        for c, s, e in zip(atac.var.chrom, atac.var.start, atac.var.end, strict=True)
    ]
    case = case_of_files(predicted, wider)
    assert (case.truth.toarray() >= atac.X[120:].toarray()).all()


def test_genes_match_by_id_or_name_and_truth_is_normalised(tiny):
    rna = tiny.rna
    predicted = ad.AnnData(
        log_normalise(rna.X[:30]), obs=rna.obs.iloc[:30], var=pd.DataFrame(index=rna.var["gene_id"])
    )
    case = case_of_files(predicted, rna, direction="atac2rna")
    np.testing.assert_allclose(case.predicted.toarray(), case.truth.toarray(), rtol=1e-5)


def test_features_that_training_never_showed_are_not_scored(cells):
    rna, atac, predicted = cells
    hidden = atac.copy()
    hidden.X = sp.csr_matrix(hidden.X.toarray() * (np.arange(atac.n_vars) >= 5))
    case = case_of_files(predicted, atac, TrainingFiles(rna[:120].copy(), hidden[:120].copy(), rna))
    assert not set(atac.var_names[:5]) & set(case.features)
    assert (np.asarray(case.train_target.sum(axis=0)) > 0).all()
    assert case.test_input.shape == (40, rna.n_vars)
    np.testing.assert_array_equal(case.test_input.toarray(), rna.X[120:].toarray())


def test_features_that_the_checkpoint_marks_unseen_are_not_scored(cells):
    _, atac, predicted = cells
    predicted.var["seen_in_training"] = np.arange(atac.n_vars) % 2 == 0
    assert list(case_of_files(predicted, atac).features) == list(atac.var_names[::2])


def test_test_cells_among_training_cells_are_refused(cells):
    rna, atac, predicted = cells
    with pytest.raises(InputError, match="10 test cells are among the training cells"):
        case_of_files(predicted, atac, TrainingFiles(rna[:130].copy(), atac[:130].copy(), rna))


def test_no_shared_barcode_is_refused(cells):
    _, atac, predicted = cells
    predicted.obs_names = [f"{name}-1" for name in predicted.obs_names]
    with pytest.raises(InputError, match="share no barcode"):
        case_of_files(predicted, atac)


def test_no_shared_feature_is_refused(cells):
    _, atac, predicted = cells
    predicted.var_names = [f"chrZ:{i * 10}-{i * 10 + 5}" for i in range(predicted.n_vars)]
    with pytest.raises(
        InputError, match=r"none of the peaks of the prediction: chr\d+:\d+.* against chrZ:0-5"
    ):
        case_of_files(predicted, atac)


@pytest.mark.parametrize(
    ("change", "message"), [(lambda x: x * 3 - 1, "wanted probabilities"), (lambda x: x / 0, "NaN")]
)
def test_values_out_of_range_are_refused(cells, change, message):
    _, atac, predicted = cells
    with np.errstate(all="ignore"):
        predicted.X = sp.csr_matrix(change(predicted.X.toarray()))
    with pytest.raises(InputError, match=message):
        case_of_files(predicted, atac)


def test_missing_test_input_cells_are_named(cells):
    rna, atac, predicted = cells
    with pytest.raises(InputError, match="lacks 40 of the 40 test cells"):
        case_of_files(predicted, atac, TrainingFiles(rna[:120].copy(), atac[:120].copy(), rna[:50].copy()))


def test_an_unknown_cell_type_column_is_named_with_those_there_are(cells):
    _, atac, predicted = cells
    with pytest.raises(InputError, match=r"no column 'celltype' in obs; there are cell_type"):
        case_of_files(predicted, atac, cell_type="celltype")


def test_a_file_that_is_no_h5ad_is_refused(cells, tmp_path):
    (tmp_path / "x.h5ad").write_text("nothing")
    for path, message in ((tmp_path / "x.h5ad", "not an HDF5 file"), (tmp_path / "y.h5ad", "no file")):
        with pytest.raises(InputError, match=message):
            case_of_files(path, cells[1])


def test_direction_comes_from_the_record_or_the_names(cells):
    _, atac, predicted = cells
    assert case_of_files(predicted, atac).direction == "rna2atac"
    predicted.uns["cisformer"] = {"direction": "atac2rna"}
    atac.X, atac.var["feature_types"] = 2 * atac.X, "Gene Expression"  # to be taken for RNA
    assert case_of_files(predicted, atac).direction == "atac2rna"
    assert case_of_files(predicted, atac, direction="rna2atac").direction == "rna2atac"


@pytest.mark.parametrize("direction", ["rna2atac", "atac2rna"])
def test_a_store_gives_the_cells_that_it_holds(direction, tiny, tiny_data, tiny_checkpoints):
    case = case_of_store(tiny_data[direction], tiny_checkpoints[direction], num_workers=0)
    rows = tiny.rna.obs_names.get_indexer(case.barcodes)
    assert len(case.barcodes) == 32
    assert case.train_input.shape[0] == 128
    target = tiny.atac.X if direction == "rna2atac" else log_normalise(tiny.rna.X)
    names = tiny.atac.var_names if direction == "rna2atac" else tiny.rna.var_names
    columns = names.get_indexer(case.features)
    np.testing.assert_allclose(case.truth.toarray(), target[rows][:, columns].toarray(), rtol=1e-6)
    assert list(case.labels) == list(tiny.rna.obs["cell_type"].iloc[rows].astype(str))


def test_accessibility_of_a_store_is_computed_on_demand_and_as_predict_gives_it(tiny_data, tiny_checkpoints):
    checkpoint = tiny_checkpoints["rna2atac"]
    case = case_of_store(tiny_data["rna2atac"], checkpoint, num_workers=0)
    assert not isinstance(case.predicted, np.ndarray | sp.spmatrix | sp.sparray)
    whole = predict(checkpoint, find_split(tiny_data["rna2atac"], "test"), num_workers=0)
    columns = whole.var_names.get_indexer(case.features)
    full = whole.X.toarray()[:, columns]
    np.testing.assert_allclose(case.predicted[:, :], full, atol=1e-6)
    some = case.with_features(np.array([5, 2])).with_cells(np.array([7, 0, 3]))
    np.testing.assert_allclose(some.predicted[1:, :1], full[[0, 3]][:, [5]], atol=1e-6)


@pytest.mark.parametrize("direction", ["rna2atac", "atac2rna"])
def test_many_cells_are_sampled_and_the_report_says_so(direction, tiny_data, tiny_checkpoints):
    whole, some = (
        case_of_store(tiny_data[direction], tiny_checkpoints[direction], num_workers=0, max_cells=n)
        for n in (32, 10)
    )
    assert not any("sample" in note for note in whole.notes)
    assert {"10 of 32 test cells scored: a random sample",
            "50 of 128 training cells given to baselines: a random sample"} <= set(some.notes)  # fmt: skip
    assert some.train_input.shape[0] == some.train_target.shape[0] == len(some.train_labels) == 50
    place = list(np.flatnonzero(np.isin(whole.barcodes, some.barcodes)))
    kept = np.flatnonzero(np.isin(whole.features, some.features))
    for name in ("predicted", "truth"):
        cells = dense(select(getattr(whole, name), rows=np.array(place), columns=kept)[:, :])
        np.testing.assert_allclose(cells, dense(getattr(some, name)[:, :]), atol=1e-5)
