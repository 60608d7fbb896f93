"""Batches: normalisation, draws, and the sharing of a step among processes."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cisformer.data.batches import (
    Layout,
    TrainingBatches,
    add_targets,
    dense_targets,
    encode_input,
    normalise,
    normalise_rna,
    prefetch,
    ragged_rows,
    select_columns,
)
from cisformer.data.store import CellStore, find_split


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    return sp.random_array(
        (7, 30), density=0.4, rng=rng, format="csr", data_sampler=lambda size: rng.integers(1, 9, size)
    )


def test_normalisation_is_that_of_scanpy(counts):
    scanpy = pytest.importorskip("scanpy")
    import anndata

    adata = anndata.AnnData(sp.csr_matrix(counts.astype(np.float32)))
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    ours = normalise_rna(sp.csr_matrix(counts))
    np.testing.assert_allclose(ours.toarray(), adata.X.toarray(), rtol=1e-5)


def test_an_empty_cell_stays_zero():
    empty = sp.csr_matrix((2, 5), dtype=np.float32)
    assert normalise_rna(empty).nnz == 0


def test_atac_is_made_binary(counts):
    assert set(normalise(sp.csr_matrix(counts), "atac").data) == {1}


def test_select_columns_equals_indexing(counts):
    columns = np.array([1, 4, 5, 17, 29])
    ours = select_columns(sp.csr_matrix(counts), columns)
    np.testing.assert_array_equal(ours.toarray(), counts.toarray()[:, columns])


def layout_of(direction="rna2atac"):
    return Layout(direction, np.array([0, 2, 3, 5, 8, 13, 21]), np.array([1, 4, 9, 16]), 30, 30)


def test_a_batch_holds_the_known_features(counts):
    cells = normalise(sp.csr_matrix(counts), "rna")
    batch = encode_input(cells, layout_of(), None, None)
    dense = torch.zeros(7, 7)
    dense[ragged_rows(batch.indptr, len(batch.index)), batch.index] = batch.value
    np.testing.assert_allclose(dense.numpy(), cells.toarray()[:, layout_of().input_index], rtol=1e-6)
    batch = add_targets(batch, cells, layout_of())
    np.testing.assert_allclose(
        dense_targets(batch, 4), cells.toarray()[:, layout_of().target_index], rtol=1e-6
    )


@pytest.mark.parametrize("direction", ["rna2atac", "atac2rna"])
def test_long_cells_show_a_choice_that_depends_on_the_cell_alone(counts, direction):
    cells = normalise(sp.csr_matrix(counts), "rna" if direction == "rna2atac" else "atac")
    whole = encode_input(cells, layout_of(direction), 2, None)
    for cell in range(7):
        alone = encode_input(cells[[cell]], layout_of(direction), 2, None)
        picked = whole.index[whole.token[whole.token_indptr[cell] : whole.token_indptr[cell + 1]]]
        by_itself = alone.index if alone.token is None else alone.index[alone.token]
        assert picked.tolist() == by_itself.tolist()
        assert len(picked) <= 2


def test_the_highest_genes_are_kept(counts):
    cells = normalise(sp.csr_matrix(counts), "rna")
    batch = encode_input(cells, layout_of(), 1, None)
    for cell in range(7):
        row = slice(batch.indptr[cell], batch.indptr[cell + 1])
        if batch.value[row].numel():
            assert batch.value[batch.token[batch.token_indptr[cell]]] == batch.value[row].max()


@pytest.fixture
def store(tiny_data):
    return CellStore.open(find_split(tiny_data["rna2atac"], "train"))


def batches_of(store, config, world=1, rank=0):
    genes = np.flatnonzero(store.rna(np.arange(store.n_cells)).sum(axis=0).A1)
    ccres = np.flatnonzero(store.atac(np.arange(store.n_cells)).sum(axis=0).A1)
    layout = Layout("rna2atac", genes, ccres, store.reference.n_genes, store.reference.n_ccres)
    return TrainingBatches(store, layout, config, np.arange(store.n_cells), world, rank)


def test_an_epoch_shows_each_cell_once_in_an_order_of_its_own(store, tiny_config):
    batches = batches_of(store, tiny_config("rna2atac"))
    orders = [np.concatenate([batches.step_rows(e, s)[0] for s in range(batches.n_steps)]) for e in (1, 2)]
    assert all(sorted(order) == list(range(store.n_cells)) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()


def test_processes_share_the_cells_of_a_step(store, tiny_config):
    one = batches_of(store, tiny_config("rna2atac", batch_size=32))
    two = [batches_of(store, tiny_config("rna2atac", batch_size=16), 2, rank) for rank in (0, 1)]
    for step in range(one.n_steps):
        parts = [part.step_rows(3, step) for part in two]
        assert np.concatenate([rows for rows, _ in parts]).tolist() == one.step_rows(3, step)[0].tolist()
        assert {together for _, together in parts} == {len(one.step_rows(3, step)[0])}


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(store, tiny_config, num_workers):
    alone = list(batches_of(store, tiny_config("rna2atac", num_workers=0)).epoch(1))
    helped = list(batches_of(store, tiny_config("rna2atac", num_workers=num_workers)).epoch(1))
    assert len(alone) == len(helped)
    for a, b in zip(alone, helped, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.target_index, b.target_index)


def test_targets_are_drawn_where_there_are_more_than_wanted(store, tiny_config):
    config = tiny_config("rna2atac")
    few = config.model_copy(
        update={"datapreprocess": config.datapreprocess.model_copy(update={"dec_max_len": 5})}
    )
    batches = batches_of(store, few)
    first, second = batches.draw(1, 0), batches.draw(1, 1)
    assert len(first.columns) == 5 * few.datapreprocess.multiple
    assert first.columns.tolist() != second.columns.tolist()
    n_targets = len(batches.layout.target_index)
    all_targets = dense_targets(batches_of(store, config).draw(1, 0), n_targets)
    assert torch.equal(dense_targets(first, n_targets), all_targets[:, first.columns])


def test_an_exception_in_a_worker_reaches_the_caller():
    def fail():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(prefetch([fail], 2))
