"""Cells unlike the training cells are told, and others are not."""

import json
import logging
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

from cisformer.data.batches import Batch
from cisformer.data.store import CellStore, find_split
from cisformer.model.checkpoint import load_checkpoint
from cisformer.model.likeness import Likeness
from cisformer.prediction.compact import compact_of
from cisformer.prediction.likeness import DEPTH, DISTANCE, UNLIKE, warn_if_unlike
from cisformer.prediction.predict import predict
from cisformer.runtime.files import sha256_file

DIRECTIONS = ["atac2rna", "rna2atac"]


def cells_of(rng, profiles, n):
    """Cells of each profile in turn, and their states: what they have of each of three kinds of features."""
    cells = sp.csr_matrix(rng.random((n, 600)) < profiles[np.arange(n) % len(profiles)])
    parts = [np.asarray(cells[:, part].mean(axis=1)) for part in np.split(np.arange(600), 3)]
    return cells, np.hstack(parts).astype(np.float32)


def batch_of(cells):
    indptr, index = (torch.from_numpy(x.astype(np.int64)) for x in (cells.indptr, cells.indices))
    return Batch(indptr, index, torch.ones(cells.nnz))


def distance_of(likeness, cells, z):
    return likeness.distance(batch_of(cells), torch.from_numpy(z)).numpy()


@pytest.fixture
def known():
    """Three types of training cells, each with features of its own that the others seldom have."""
    rng = np.random.default_rng(0)
    profiles = np.full((3, 600), 0.01)
    for k in range(3):
        profiles[k, 200 * k : 200 * (k + 1)] = 0.1
    train, z = cells_of(rng, profiles, 3_000)
    likeness = Likeness(600, 3)
    likeness.fit(train[:1000], z[:1000], (train.getnnz(axis=0) + 0.5) / 3_001, 0)
    return likeness, profiles, (train, z), rng


def test_a_type_that_was_left_out_is_told(known):
    """Whether its features are rare in all training cells, or common, but in cells of different types."""
    likeness, profiles, _, rng = known
    seldom = np.where(np.arange(600) % 2, 0.04, 0.01)[None]
    between = np.where(np.arange(600) < 400, 0.055, 0.01)[None]
    same = distance_of(likeness, *cells_of(rng, profiles, 2_000))
    assert 0.01 < (same > 1).mean() < 0.05
    for strange in (seldom, between):
        assert (distance_of(likeness, *cells_of(rng, strange, 2_000)) > 1).mean() > 0.5


def test_distance_is_the_mean_rarity_in_two_groups_over_the_limit(known):
    """The limit is of training cells, each judged by the frequencies among the others."""
    likeness, profiles, (train, z), rng = known
    frequency, dense, z = (train.getnnz(axis=0) + 0.5) / 3_001, train[:1000].toarray(), z[:1000]

    def nearest(state):
        return np.square(likeness.centres.numpy() - state).sum(axis=1).argmin()

    group = np.array([nearest(state) for state in z])

    def rarity(cell, k, own=0):
        """`own`: of how many of the group's cells the cell itself is one."""
        count, n = dense[group == k].sum(axis=0), (group == k).sum()
        return -np.log((count[cell] - own + frequency[cell]) / (n - own + 1)).mean()

    def of_two(cell, k, own=0):
        every = [rarity(cell, other, own if other == k else 0) for other in np.unique(group)]
        return (rarity(cell, k, own) + min(every)) / 2

    limit = np.quantile([of_two(cell, k, 1) for cell, k in zip(dense, group, strict=True)], 0.975)
    assert float(likeness.limit) == pytest.approx(limit, rel=1e-4)
    cells, states = cells_of(rng, profiles, 7)
    wanted = [of_two(c, nearest(s)) / limit for c, s in zip(cells.toarray(), states, strict=True)]
    np.testing.assert_allclose(distance_of(likeness, cells, states), wanted, rtol=1e-3)
    assert distance_of(likeness, sp.csr_matrix((2, 600)), states[:2]).tolist() == [0, 0]


def test_few_cells_are_one_group(known):
    _, profiles, (train, z), rng = known
    likeness = Likeness(600, 3)
    likeness.fit(train[:60], z[:60], (train.getnnz(axis=0) + 0.5) / 3_001, 0)
    assert len(likeness.centres.unique(dim=0)) == len(likeness.rarity.unique(dim=1).T) == 1
    assert np.isfinite(distance_of(likeness, *cells_of(rng, profiles, 9))).all()


def test_cells_that_are_alike_fill_fewer_groups(known):
    """Without a warning, and without a group of no cells."""
    _, profiles, (train, z), rng = known
    likeness = Likeness(600, 3)
    likeness.fit(train[:1000], z[np.arange(1000) % 4], (train.getnnz(axis=0) + 0.5) / 3_001, 0)
    assert len(likeness.centres.unique(dim=0)) == len(likeness.rarity.unique(dim=1).T) == 4
    assert np.isfinite(distance_of(likeness, *cells_of(rng, profiles, 9))).all()


def test_one_line_says_what_differs(known, caplog):
    likeness, *_ = known
    for distance, depth, words in (
        (np.full(20, 0.5), np.full(20, 24), None),
        (np.repeat([0.5, 3], 10), np.full(20, 24), "50% of them"),
        (np.full(20, 0.5), np.full(20, 5), "known features is 5,"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_if_unlike(likeness, distance, depth)
        assert len(caplog.records) == (words is not None)
        assert words is None or words in caplog.text


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_predictions_say_which_cells_are_unlike(
    direction, tiny, tiny_data, tiny_checkpoints, tmp_path, caplog
):
    store = CellStore.open(find_split(tiny_data[direction], "test"))
    checkpoint = tiny_checkpoints[direction]
    usual = predict(checkpoint, store.path)
    assert usual.obs[UNLIKE].dtype == bool
    assert usual.obs[UNLIKE].mean() < 0.2  # of a few cells
    np.testing.assert_array_equal(usual.obs[UNLIKE], usual.obs[DISTANCE] > 1)
    written = ad.read_h5ad(predict(checkpoint, store.path, output=tmp_path / "x.h5ad", batch_size=7))
    for name in (DISTANCE, DEPTH):
        np.testing.assert_allclose(written.obs[name], usual.obs[name], rtol=1e-3)

    rng = np.random.default_rng(0)
    strange = (tiny.rna if direction == "rna2atac" else tiny.atac)[:30].copy()
    order = rng.permutation(strange.n_vars)
    strange.X = sp.csr_matrix(strange.X.toarray()[:, order])
    with caplog.at_level(logging.WARNING):
        moved = predict(checkpoint, strange)
    assert moved.obs[DISTANCE].median() > 1.05 * usual.obs[DISTANCE].median()
    assert moved.obs[UNLIKE].mean() > 0.5
    assert UNLIKE in caplog.text


def rewritten(folder, change):
    """Change the weights of a checkpoint by `change`, and its checksum with them."""
    weights = next(folder.glob("*.safetensors"))
    save_file(change(load_file(weights)), weights)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["sha256"] = sha256_file(weights)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    return load_checkpoint(folder)


def test_a_checkpoint_without_groups_says_what_it_said(tiny_data, tiny_checkpoints, tmp_path):
    folder = shutil.copytree(tiny_checkpoints["rna2atac"].folder, tmp_path / "old")
    rng, kept = np.random.default_rng(0), {}

    def before(tensors):
        n_input = len(tensors["likeness.rarity"])
        kept["rarity"] = rng.random(n_input).astype(np.float32)
        tensors["likeness.rarity"] = torch.from_numpy(kept["rarity"])
        tensors["likeness.limit"] = torch.tensor(0.5)
        return {k: v for k, v in tensors.items() if k != "likeness.centres"}

    checkpoint = rewritten(folder, before)
    store = CellStore.open(find_split(tiny_data["rna2atac"], "test"))
    found = store.rna(np.arange(store.n_cells))[:, checkpoint.layout.input_index] > 0
    wanted = found @ kept["rarity"] / found.getnnz(axis=1) / 0.5
    np.testing.assert_allclose(predict(checkpoint, store.path).obs[DISTANCE], wanted, rtol=1e-5)
    everything = torch.arange(200_000) % len(
        kept["rarity"]
    )  # sums beyond the largest number of half precision
    deep = Batch(torch.tensor([0, len(everything)]), everything, torch.ones(len(everything)))
    wanted = kept["rarity"].mean() / 0.5
    assert float(checkpoint.model.distance(deep)) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_checkpoint_of_before_says_nothing_of_it(direction, tiny_data, tiny_checkpoints, tmp_path):
    """Its weights lack the training cells, intervals, and the link, which was another one then."""
    folder = shutil.copytree(tiny_checkpoints[direction].folder, tmp_path / "old")
    later = ("likeness.", "interval_90", "link_version")
    before = rewritten(folder, lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(later)})
    store = CellStore.open(find_split(tiny_data[direction], "test"))
    found = predict(before, store.path)
    assert UNLIKE not in found.obs
    assert found.var.get("interval_90", pd.Series(dtype=float)).isna().all()
    same = predict(tiny_checkpoints[direction], store.path).X.toarray()
    if direction == "rna2atac":
        assert np.abs(found.X.toarray() - same).max() > 0.01
        compact = predict(before, store.path, compact=True)
        assert "link_version" not in compact.var
        same = compact_of(compact, "before").toarray()
    np.testing.assert_allclose(found.X.toarray(), same, atol=1e-6)
