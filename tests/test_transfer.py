"""Labels carried over to predicted cells."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from cisformer.errors import InputError, OutputExistsError
from cisformer.prediction.compact import STATES
from cisformer.prediction.predict import predict
from cisformer.prediction.transfer import transfer_labels, write_labels


@pytest.fixture(scope="module")
def predictions(tiny, tiny_checkpoints):
    """Predicted expression of 60 labelled and 100 other cells."""
    labelled, cells = (predict(tiny_checkpoints["atac2rna"], tiny.atac[rows].copy()) for rows in (
        slice(0, 60), slice(60, None)
    ))  # fmt: skip
    return labelled, cells


def truth(tiny, cells):
    return tiny.atac[cells.obs_names].obs["cell_type"].astype(str).to_numpy()


def test_states_of_one_model_give_what_scikit_learn_gives(predictions, tiny):
    labelled, cells = predictions
    found = transfer_labels(cells, labelled, "cell_type", n_neighbors=9)
    names = labelled.obs["cell_type"].astype(str).to_numpy()
    knn = KNeighborsClassifier(9).fit(labelled.obsm[STATES], names)
    share = knn.predict_proba(cells.obsm[STATES])
    assert found.index.tolist() == cells.obs_names.tolist()
    assert found["cell_type_best"].tolist() == knn.classes_[share.argmax(axis=1)].tolist()
    np.testing.assert_allclose(found["cell_type_confidence"], share.max(axis=1))
    assert (found["cell_type_best"] == truth(tiny, cells)).mean() > 0.6  # chance is about 0.35


def test_measured_expression_is_a_reference_too(predictions, tiny):
    cells = predictions[1]
    reference = tiny.rna[:60].copy()
    found = transfer_labels(cells, reference, "cell_type", n_neighbors=9)
    assert (found["cell_type_best"] == truth(tiny, cells)).mean() > 0.6  # one in three by chance


def test_genes_meet_by_id_and_by_name_in_any_order(predictions, tiny):
    cells = predictions[1]
    straight = transfer_labels(cells, tiny.rna[:60].copy(), "cell_type")
    mixed = tiny.rna[:60, np.random.default_rng(0).permutation(tiny.rna.n_vars)].copy()
    mixed.var_names = mixed.var_names.str.lower()
    again = transfer_labels(cells, mixed, "cell_type")
    assert (straight["cell_type_best"] == again["cell_type_best"]).all()


def test_a_cell_that_no_label_fits_is_unknown(predictions):
    labelled, cells = predictions
    mixed = labelled.copy()
    mixed.obs["coin"] = np.random.default_rng(0).permutation(["a", "b", "c"] * 20)
    found = transfer_labels(cells, mixed, "coin", min_confidence=0.7)
    assert (found["coin"] == "unknown").mean() > 0.8
    assert set(found["coin_best"]) <= {"a", "b", "c"}


def test_cells_without_a_label_do_not_vote(predictions):
    labelled, cells = predictions
    some = labelled.copy()
    first = some.obs["cell_type"].astype(str).iloc[0]
    some.obs["part"] = some.obs["cell_type"].astype(str).where(some.obs["cell_type"].astype(str) == first)
    assert set(transfer_labels(cells, some, "part")["part"]) == {first}


def test_the_table_is_a_celltype_info(predictions, tmp_path):
    labelled, cells = predictions
    labels = transfer_labels(cells, labelled, "cell_type")
    path = write_labels(labels, tmp_path / "labels.tsv")
    first = path.read_text().splitlines()[0].split("\t")
    assert first[:2] == [cells.obs_names[0], labels["cell_type"].iloc[0]]
    with pytest.raises(OutputExistsError):
        write_labels(labels, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "nothing"}, "no column 'nothing'"),
        ({"n_neighbors": 0}, "n_neighbors is 0"),
        ({"min_confidence": 2.0}, "min_confidence is 2"),
    ],
)
def test_what_cannot_be_is_refused(options, message, predictions):
    labelled, cells = predictions
    with pytest.raises(InputError, match=message):
        transfer_labels(cells, labelled, **{"key": "cell_type"} | options)


def test_cells_that_share_no_space_are_refused(predictions, tiny):
    foreign = tiny.rna[:60].copy()
    foreign.var_names = [f"other{k}" for k in range(foreign.n_vars)]
    foreign.var = foreign.var[[]]
    with pytest.raises(InputError, match="share 0 genes"):
        transfer_labels(predictions[1], foreign, "cell_type")
