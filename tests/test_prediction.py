"""Prediction: from one modality alone, the same whichever way the cells come in."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from cisformer.data.alignment import _other_model
from cisformer.data.reference import Reference, load_reference
from cisformer.data.store import CellStore, find_split
from cisformer.errors import InputError, OutputExistsError, ReferenceMismatchError
from cisformer.model.checkpoint import load_checkpoint
from cisformer.prediction.likeness import DEPTH, DISTANCE, UNLIKE
from cisformer.prediction.predict import predict

DIRECTIONS = ["atac2rna", "rna2atac"]
INPUT = {"atac2rna": "atac", "rna2atac": "rna"}


@pytest.fixture
def sources(tiny, tiny_data):
    """Per direction: the test store, and an AnnData of the same cells and only the input modality."""
    found = {}
    for direction in DIRECTIONS:
        store = CellStore.open(find_split(tiny_data[direction], "test"))
        adata = tiny.rna if direction == "rna2atac" else tiny.atac
        found[direction] = store, adata[store.barcodes].copy()
    return found


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_store_shard_file_and_anndata_give_the_same(direction, sources, tiny_checkpoints, tmp_path):
    store, adata = sources[direction]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    checkpoint = tiny_checkpoints[direction]
    shard = store.path / f"{direction}_0.pt"
    results = [predict(checkpoint, data) for data in (store.path, shard, adata, tmp_path / "cells.h5ad")]
    for other in results[1:]:
        assert other.obs_names.tolist() == results[0].obs_names.tolist()
        np.testing.assert_allclose(other.X.toarray(), results[0].X.toarray(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_blanking_what_is_predicted_changes_nothing(direction, sources, tiny_checkpoints, monkeypatch):
    """The store's target modality raises when it is read."""
    store, _ = sources[direction]
    before = predict(tiny_checkpoints[direction], store.path)

    def forbidden(self, rows):
        raise AssertionError("the target modality was read")

    monkeypatch.setattr(CellStore, "rna" if direction == "atac2rna" else "atac", forbidden)
    after = predict(tiny_checkpoints[direction], store.path)
    assert (before.X != after.X).nnz == 0


def test_permuted_rna_of_the_test_cells_gives_the_identical_rna_prediction(
    tiny, tiny_checkpoints, tiny_data, tmp_path
):
    """The whole road: preprocess again with the RNA of the cells permuted, and predict RNA from ATAC."""
    from cisformer.data.preprocess import preprocess

    test = CellStore.open(find_split(tiny_data["atac2rna"], "test")).barcodes
    rna, atac = tiny.rna[test].copy(), tiny.atac[test].copy()
    permuted = rna.copy()
    permuted.X = rna.X[np.random.default_rng(0).permutation(len(test))]
    results = []
    for name, version in (("as_is", rna), ("permuted", permuted)):
        preprocess(version, atac, tmp_path / name, direction="atac2rna", reference="dataset", manually=True)
        results.append(predict(tiny_checkpoints["atac2rna"], tmp_path / name / "atac2rna_all"))
    assert (results[0].X != results[1].X).nnz == 0
    assert results[0].X.nnz > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 7, "num_workers": 0}, {"num_workers": 3}]
)
def test_batch_size_and_workers_change_nothing(direction, options, sources, tiny_checkpoints):
    store, _ = sources[direction]
    expected = predict(tiny_checkpoints[direction], store.path)
    np.testing.assert_allclose(
        predict(tiny_checkpoints[direction], store.path, **options).X.toarray(),
        expected.X.toarray(),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_order_of_cells_is_kept(direction, sources, tiny_checkpoints):
    _, adata = sources[direction]
    order = np.random.default_rng(0).permutation(adata.n_obs)
    straight, mixed = (
        predict(tiny_checkpoints[direction], adata),
        predict(tiny_checkpoints[direction], adata[order].copy()),
    )
    assert mixed.obs_names.tolist() == adata.obs_names[order].tolist()
    np.testing.assert_allclose(mixed.X.toarray(), straight.X.toarray()[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_written_file_is_what_the_documentation_says(direction, sources, tiny_checkpoints, tmp_path):
    _, adata = sources[direction]
    path = predict(tiny_checkpoints[direction], adata, output=tmp_path / "out.h5ad", batch_size=9)
    written, returned = ad.read_h5ad(path), predict(tiny_checkpoints[direction], adata)
    reference = tiny_checkpoints[direction].reference
    n_features = reference.n_genes if direction == "atac2rna" else reference.n_ccres
    assert written.shape == (adata.n_obs, n_features)
    assert written.X.dtype == np.float32
    values = written.X.toarray() if sp.issparse(written.X) else written.X
    assert list(written.obs.columns) == [*adata.obs.columns, DISTANCE, DEPTH, UNLIKE]
    np.testing.assert_allclose(values, returned.X.toarray(), rtol=1e-4, atol=1e-5)
    assert written.var_names.tolist() == list(
        reference.gene_labels if direction == "atac2rna" else reference.ccre_labels
    )
    assert written.uns["cisformer"]["direction"] == direction
    assert written.uns["cisformer"]["fingerprint"] == reference.fingerprint
    unseen = ~written.var["seen_in_training"].to_numpy()
    assert not values[:, unseen].any()


def test_every_gene_seen_is_predicted(sources, tiny_checkpoints):
    store, _ = sources["atac2rna"]
    predicted = predict(tiny_checkpoints["atac2rna"], store.path)
    seen = predicted.var["seen_in_training"]
    assert (predicted.X.toarray()[:, seen].sum(axis=0) > 0).mean() > 0.95


def test_probabilities_are_left_out_below_the_least(sources, tiny_checkpoints):
    store, _ = sources["rna2atac"]
    whole = predict(tiny_checkpoints["rna2atac"], store.path, min_prob=0).X.toarray()
    some = predict(tiny_checkpoints["rna2atac"], store.path, min_prob=0.05).X.toarray()
    np.testing.assert_array_equal(some, np.where(whole >= 0.05, whole, 0))


def test_binarized_cells_open_as_many_ccres_as_expected(sources, tiny_checkpoints):
    store, _ = sources["rna2atac"]
    probability = predict(tiny_checkpoints["rna2atac"], store.path, min_prob=0).X.toarray()
    binary = predict(tiny_checkpoints["rna2atac"], store.path, binarize=True).X.toarray()
    assert set(np.unique(binary)) == {0, 1}
    np.testing.assert_allclose(binary.sum(axis=1), probability.sum(axis=1), atol=0.51)
    for p, b in zip(probability, binary, strict=True):
        assert p[b == 1].min() >= p[b == 0].max()


def test_an_existing_file_is_not_overwritten_unless_asked(sources, tiny_checkpoints, tmp_path):
    _, adata = sources["rna2atac"]
    path = tmp_path / "out.h5ad"
    path.write_text("precious")
    with pytest.raises(OutputExistsError):
        predict(tiny_checkpoints["rna2atac"], adata, output=path)
    assert path.read_text() == "precious"
    predict(tiny_checkpoints["rna2atac"], adata, output=path, force=True)
    assert ad.read_h5ad(path).n_obs == adata.n_obs


def test_a_store_of_another_reference_is_refused(tiny, tiny_checkpoints, tmp_path):
    from cisformer.data.preprocess import preprocess

    fewer = tiny.atac[:, 20:].copy()
    preprocess(tiny.rna, fewer, tmp_path / "d", direction="rna2atac", reference="dataset", manually=True)
    with pytest.raises(ReferenceMismatchError):
        predict(tiny_checkpoints["rna2atac"], tmp_path / "d" / "rna2atac_all")


def test_a_threshold_that_is_no_probability_is_refused(sources, tiny_checkpoints):
    with pytest.raises(InputError, match="min_prob is 2"):
        predict(tiny_checkpoints["rna2atac"], sources["rna2atac"][1], min_prob=2)


def test_tokens_can_be_limited(sources, tiny_checkpoints):
    """Fewer tokens reach attention; the linear path still sees all, so the prediction moves only a little."""
    store, _ = sources["rna2atac"]
    epoch2 = load_checkpoint(tiny_checkpoints["rna2atac"].folder.parent / "epoch2")
    whole, few = (predict(epoch2, store.path, max_tokens=n, min_prob=0).X.toarray() for n in (None, 2))
    assert 0 < np.abs(whole - few).max() < 0.2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_cells_are_read_in_blocks_of_any_size(direction, sources, tiny_checkpoints, tmp_path, monkeypatch):
    """Batches that end within, at, and beyond a block of the file hold the same cells."""
    _, adata = sources[direction]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    whole = predict(tiny_checkpoints[direction], adata, batch_size=1000)
    for block, batch in ((7, 5), (5, 5), (3, 11)):
        monkeypatch.setattr("cisformer.prediction.cells.READ_CELLS", block)
        parts = predict(tiny_checkpoints[direction], tmp_path / "cells.h5ad", batch_size=batch)
        assert parts.obs_names.equals(whole.obs_names)
        np.testing.assert_allclose(parts.X.toarray(), whole.X.toarray(), rtol=1e-4, atol=1e-5)


def test_a_file_that_changes_meanwhile_leaves_the_earlier_result(
    sources, tiny_checkpoints, tmp_path, monkeypatch
):
    _, adata = sources["rna2atac"]
    adata.write_h5ad(tmp_path / "rna.h5ad")
    given = {"output": tmp_path / "out.h5ad", "force": True, "num_workers": 0}
    predict(tiny_checkpoints["rna2atac"], tmp_path / "rna.h5ad", **given)
    before = (tmp_path / "out.h5ad").read_bytes()
    model = tiny_checkpoints["rna2atac"].model
    real = type(model).predict_with_place

    def touch(self, batch):
        with open(tmp_path / "rna.h5ad", "ab") as handle:
            handle.write(b"more")
        return real(self, batch)

    monkeypatch.setattr(type(model), "predict_with_place", touch)
    with pytest.raises(InputError, match="changed while it was read"):
        predict(tiny_checkpoints["rna2atac"], tmp_path / "rna.h5ad", **given)
    assert (tmp_path / "out.h5ad").read_bytes() == before


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"num_workers": -1}, {"min_prob": 1.0}])
def test_options_out_of_range_are_refused(option, tiny, tiny_checkpoints):
    with pytest.raises(InputError, match=next(iter(option))):
        predict(tiny_checkpoints["rna2atac"], tiny.rna, **option)


def test_cells_that_do_not_fit_the_model_are_told_what_to_do(tiny, tiny_checkpoints):
    """A user of a model cannot choose another reference."""
    human = tiny_checkpoints["rna2atac"]
    mouse = tiny.rna.copy()
    mouse.var_names = [f"ENSMUSG{number:011}" for number in range(mouse.n_vars)]
    mouse.var = mouse.var[[]]
    with pytest.raises(InputError, match="only 0 of 150 genes") as refused:
        predict(human, mouse)
    assert refused.value.hint == "the model is of human: use one that was trained on mouse cells"


@pytest.mark.parametrize(
    ("name", "genome", "species", "peaks", "expected"),
    [("dataset", "hg38", "human", "", "after `data_preprocess --reference human`"),
     ("dataset", "", "", "", "after `data_preprocess --reference human`"),
     ("dataset", "hg38", "", "hg19", "the model is of hg38: lift the peaks over"),
     ("dataset", "mm39", "human", "hg38", "the model is of mouse: use one that was trained on human cells")],
)  # fmt: skip
def test_the_advice_on_another_model(name, genome, species, peaks, expected):
    known = load_reference("human")
    own = Reference(name, genome, known.genes[:3], known.ccres[:3])
    assert expected in _other_model(species, own, peaks)


def test_rna_is_not_taken_for_atac(tiny, tiny_checkpoints):
    """Genes with coordinates could be read as regions."""
    assert {"chrom", "start", "end"} <= set(tiny.rna.var)
    with pytest.raises(InputError, match="these features are genes"):
        predict(tiny_checkpoints["atac2rna"], tiny.rna)
