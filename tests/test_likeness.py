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
    return sp.csr_matrix(rng.random((n, 600)) < profiles[rng.integers(len(profiles), size=n)])


def batch_of(cells):
    indptr, index = (torch.from_numpy(x.astype(np.int64)) for x in (cells.indptr, cells.indices))
    return Batch(indptr, index, torch.ones(cells.nnz))


@pytest.fixture
def known():
    """Three types of training cells; a fourth is not among them."""
    rng = np.random.default_rng(0)
    profiles = rng.beta(0.3, 5, (1, 600)) * rng.lognormal(0, 1, (4, 600)).clip(0, 10)
    train = cells_of(rng, profiles[:3], 3_000)
    likeness = Likeness(600)
    likeness.fit(train[:1000], train.getnnz(axis=0), 3_000)
    return likeness, profiles, train, rng


def test_a_type_that_was_left_out_is_told(known):
    likeness, profiles, _, rng = known
    same, other = (likeness.distance(batch_of(cells_of(rng, p, 2_000))) for p in (profiles[:3], profiles[3:]))
    assert 0.005 < float((same > 1).float().mean()) < 0.05
    assert float((other > 1).float().mean()) > 0.3


def test_distance_is_the_mean_rarity_over_the_limit(known):
    """The limit is of training cells, each judged by the frequencies among the others."""
    likeness, profiles, train, rng = known
    counts, dense = train.getnnz(axis=0), train.toarray()
    own = [-np.log((counts[row] - 0.5) / 3_000).mean() for row in dense[:1000]]
    assert float(likeness.limit) == pytest.approx(np.quantile(own, 0.975), rel=1e-5)
    cells = cells_of(rng, profiles, 7)
    wanted = [
        -np.log((counts[row] + 0.5) / 3_001).mean() / np.quantile(own, 0.975) for row in cells.toarray()
    ]
    np.testing.assert_allclose(likeness.distance(batch_of(cells)), wanted, rtol=1e-4)
    empty = batch_of(sp.csr_matrix((2, 600)))
    assert likeness.distance(empty).tolist() == [0, 0]


def test_one_line_says_what_differs(known, caplog):
    likeness, *_ = known
    for distance, depth, words in (
        (np.full(20, 0.5), np.full(20, 50), None),
        (np.repeat([0.5, 3], 10), np.full(20, 50), "in 50% of them"),
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


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_checkpoint_of_before_says_nothing_of_it(direction, tiny_data, tiny_checkpoints, tmp_path):
    """Its weights lack the training cells, intervals, and the link, which was another one then."""
    folder = shutil.copytree(tiny_checkpoints[direction].folder, tmp_path / "old")
    weights = next(folder.glob("*.safetensors"))
    later = ("likeness.", "interval_90", "link_version")
    save_file({k: v for k, v in load_file(weights).items() if not k.startswith(later)}, weights)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["sha256"] = sha256_file(weights)
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    store = CellStore.open(find_split(tiny_data[direction], "test"))
    before = load_checkpoint(folder)
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
