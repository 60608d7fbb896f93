"""Batches: normalisation, draws, and the sharing of a step among processes."""

import itertools
import threading

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


@pytest.fixture
def long_cells():
    """Cells of 30, 0, 8, 9 and 17 of 30 features, some values equal."""
    rng = np.random.default_rng(2)
    dense = np.zeros((5, 30), np.float32)
    for cell, n_found in zip(dense, (30, 0, 8, 9, 17), strict=True):
        cell[rng.choice(30, n_found, replace=False)] = rng.integers(1, 5, n_found)
    return sp.csr_matrix(dense)


def seen_of(cells, direction, rng):
    """Return the tokens that attention is shown of each cell, at most 8, as places within the cell."""
    layout = Layout(direction, np.arange(30), np.arange(30), 30, 30)
    batch = encode_input(cells, layout, 8, rng)
    start = torch.from_numpy(cells.indptr[:-1].astype(np.int64))
    return [
        (batch.token[low:high] - first).tolist()
        for low, high, first in zip(batch.token_indptr, batch.token_indptr[1:], start, strict=False)
    ]


def test_the_highest_genes_and_evenly_spaced_ccres_are_shown(long_cells):
    rows = [long_cells.data[low:high] for low, high in itertools.pairwise(long_cells.indptr)]
    highest = [sorted(np.argsort(-row, kind="stable")[:8].tolist()) for row in rows]
    assert seen_of(long_cells, "rna2atac", None) == highest
    spaced = [(np.arange(min(8, len(row))) * len(row) // max(1, min(8, len(row)))).tolist() for row in rows]
    assert seen_of(long_cells, "atac2rna", None) == spaced


@pytest.mark.parametrize("direction", ["rna2atac", "atac2rna"])
def test_drawn_tokens_are_of_their_cell_and_each_is_drawn_as_often(long_cells, direction):
    rng = np.random.default_rng(0)
    times = [np.zeros(n) for n in np.diff(long_cells.indptr)]
    for _ in range(400):
        for cell, seen in zip(times, seen_of(long_cells, direction, rng), strict=True):
            assert len(seen) == min(8, len(cell))
            assert seen == sorted(set(seen))
            cell[seen] += 1
    for cell in times:
        assert (np.abs(cell / 400 - min(1, 8 / max(1, len(cell)))) < 0.12).all()


def test_for_a_gpu_threads_leave_batches_in_pinned_memory(long_cells, monkeypatch):
    """What a machine without a GPU can see of it: every tensor is pinned off the main thread, then sent."""
    calls = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda x: calls.append((threading.current_thread().name, "pin")) or x
    )
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda x, device, **how: calls.append((threading.current_thread().name, device, how)) or x,
    )
    layout = Layout("rna2atac", np.arange(30), np.arange(30), 30, 30)
    make = lambda: encode_input(long_cells, layout, None, None)  # noqa: E731
    list(prefetch([make, make], 1, "cuda"))
    main = threading.current_thread().name
    assert [call[1] for call in calls if call[0] != main] == ["pin"] * 6
    assert [call[1:] for call in calls if call[0] == main] == [("cuda", {"non_blocking": True})] * 6


def test_an_exception_in_a_worker_reaches_the_caller():
    def fail():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(prefetch([fail], 2))
