"""The closed-form start against scikit-learn and against matrices written out."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.linear_model import Ridge

from cisformer.data.batches import encode_input, read_modality
from cisformer.data.store import CellStore, find_split
from cisformer.model import closed_form
from cisformer.model.closed_form import (
    LEAST_PACE,
    count_features,
    fit_linear,
    fit_projection,
    link_loss,
    pace_of,
    solve,
    states,
)
from cisformer.training.closed_form_start import make_layout


@pytest.fixture(scope="module", params=["atac2rna", "rna2atac"])
def fitted(request, tiny_data):
    """A store, its layout, and its closed-form fit with penalty 7 and rank 5."""
    direction = request.param
    store = CellStore.open(find_split(tiny_data[direction], "train"))
    rows = np.arange(store.n_cells)
    counts = count_features(store, rows, direction)
    layout = make_layout(counts, direction, store)
    start = fit_linear(store, rows, store, rows[:0], layout, counts, rank=5, ridge=7.0, seed=0)
    return store, layout, start


def dense(store, layout, side):
    rows = np.arange(store.n_cells)
    modality = layout.input_modality if side == "input" else layout.target_modality
    index = layout.input_index if side == "input" else layout.target_index
    return read_modality(store, rows, modality).toarray()[:, index]


def test_states_are_white_on_the_training_cells(fitted):
    store, layout, start = fitted
    z = states(start.projection, store, np.arange(store.n_cells), layout)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(z.T @ z / len(z), np.eye(5), atol=1e-3)
    sd = start.projection.sd.numpy()
    assert (np.diff(sd) <= 0).all()


def test_states_span_the_principal_components(fitted):
    """The subspace of scikit-learn's exact, centred SVD of the same matrix, for the components that stand out."""
    store, layout, start = fitted
    x = dense(store, layout, "input").astype(np.float64)
    if layout.input_modality == "atac":
        idf = np.log1p(len(x) / np.maximum(x.sum(axis=0), 1))
        x = np.log1p(1e4 * x * idf / x.sum(axis=1, keepdims=True))
    else:
        depth = np.log1p((x > 0).sum(axis=1))
        spread = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)[0] / np.sqrt(len(x))
        x = np.column_stack([x, (depth - depth.mean()) / depth.std() * spread])
    u = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[0][:, :2]
    z = states(start.projection, store, np.arange(store.n_cells), layout)
    q = np.linalg.qr(z)[0]
    assert np.linalg.svd(q.T @ u)[1].min() > 0.9


def test_atac2rna_loadings_are_those_of_ridge_regression(tiny_data):
    store = CellStore.open(find_split(tiny_data["atac2rna"], "train"))
    rows = np.arange(store.n_cells)
    counts = count_features(store, rows, "atac2rna")
    layout = make_layout(counts, "atac2rna", store)
    start = fit_linear(store, rows, store, rows[:0], layout, counts, rank=5, ridge=7.0, seed=0)
    z, y = states(start.projection, store, rows, layout), dense(store, layout, "target")
    sd = start.projection.sd.numpy()
    shrink = np.sqrt(sd / sd[0])
    ridge = Ridge(alpha=7.0).fit(z.astype(np.float64) * shrink, y)
    np.testing.assert_allclose(start.loadings * start.scale[:, None], ridge.coef_ * shrink, atol=2e-3)
    np.testing.assert_allclose(start.prior, y.mean(axis=0), atol=1e-5)


def test_rna2atac_loadings_are_one_newton_step_from_the_prior(tiny_data):
    """Gradient and Hessian of the ridge-penalised log-likelihood by automatic differentiation."""
    store = CellStore.open(find_split(tiny_data["rna2atac"], "train"))
    rows = np.arange(store.n_cells)
    counts = count_features(store, rows, "rna2atac")
    layout = make_layout(counts, "rna2atac", store)
    start = fit_linear(store, rows, store, rows[:0], layout, counts, rank=5, ridge=7.0, seed=0)
    z = torch.from_numpy(states(start.projection, store, rows, layout)).double()
    target = torch.from_numpy(dense(store, layout, "target")).double()
    penalty = 7.0 * (start.projection.sd[0] / start.projection.sd).double()
    for f in (0, 11, 40):

        def negative_log_likelihood(b, f=f):
            eta = float(start.prior[f]) + z @ b
            return torch.nn.functional.binary_cross_entropy_with_logits(
                eta, target[:, f], reduction="sum") + 0.5 * (penalty * b.square()).sum()  # fmt: skip

        zero = torch.zeros(5, dtype=torch.float64)
        gradient = torch.autograd.functional.jacobian(negative_log_likelihood, zero)
        hessian = torch.autograd.functional.hessian(negative_log_likelihood, zero)
        newton = -torch.linalg.solve(hessian, gradient)
        np.testing.assert_allclose(start.loadings[f], newton.numpy(), rtol=0.02, atol=2e-3)


def test_features_are_counted(fitted):
    store, layout, _ = fitted
    counts = count_features(store, np.arange(store.n_cells), layout.direction)
    y = dense(store, layout, "target")
    np.testing.assert_array_equal(counts.n_seen[layout.target_index], (y > 0).sum(axis=0))
    np.testing.assert_allclose(counts.total[layout.target_index], y.sum(axis=0), rtol=1e-5)
    assert counts.n_seen.sum() == (y > 0).sum()


def test_validation_chooses_no_rank_where_inputs_say_nothing(tiny_data):
    """Targets of other cells: the mean profile is best, and `auto` finds that."""
    store = CellStore.open(find_split(tiny_data["atac2rna"], "train"))

    class Shuffled:
        path, reference, n_cells = store.path, store.reference, store.n_cells
        atac = staticmethod(store.atac)
        order = np.random.default_rng(1).permutation(store.n_cells)

        def rna(self, rows):
            return store.rna(self.order[rows])

    rows = np.random.default_rng(0).permutation(store.n_cells)
    train, val = rows[30:], rows[:30]
    counts = count_features(Shuffled(), train, "atac2rna")
    layout = make_layout(counts, "atac2rna", Shuffled())
    start = fit_linear(Shuffled(), train, Shuffled(), val, layout, counts, rank=5, ridge="auto", seed=0)
    signal = fit_linear(store, train, store, val, layout, counts, rank=5, ridge="auto", seed=0)
    assert signal.rank > 0
    assert np.abs(start.loadings).mean() < 0.5 * np.abs(signal.loadings).mean()


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_some_targets_choose_for_all(direction, tiny_data, monkeypatch):
    """Rank and penalty are those that the drawn targets would choose alone; loadings are of every target."""
    store = CellStore.open(find_split(tiny_data[direction], "train"))
    rows = np.arange(store.n_cells)
    counts = count_features(store, rows, direction)
    layout = make_layout(counts, direction, store)
    data = store, rows[:120], store, rows[120:], layout, counts
    monkeypatch.setattr(closed_form, "SELECTION_TARGETS", 40)
    start = fit_linear(*data, rank=5, ridge="auto", seed=0)
    given = fit_linear(*data, rank=5, ridge=start.ridge, seed=0)
    assert start.loadings.shape == (len(layout.target_index), 5)
    np.testing.assert_array_equal(start.loadings[:, : start.rank], given.loadings[:, : start.rank])
    assert not start.loadings[:, start.rank :].any()
    monkeypatch.setattr(closed_form, "SELECTION_TARGETS", len(layout.target_index) - 1)
    assert abs(np.log(fit_linear(*data, rank=5, ridge="auto", seed=0).ridge / start.ridge)) < np.log(50)


def test_projection_does_not_depend_on_the_batch(fitted):
    store, layout, start = fitted
    cells = read_modality(store, np.arange(20), layout.input_modality)
    together = start.projection(encode_input(cells, layout, None, None))
    alone = torch.cat([start.projection(encode_input(cells[[i]], layout, None, None)) for i in range(20)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_losses_are_the_textbook_ones():
    rng = np.random.default_rng(0)
    eta, y = (
        torch.from_numpy(rng.normal(size=(4, 6))),
        torch.from_numpy(rng.integers(0, 2, (4, 6)).astype(float)),
    )
    p = 1 / (1 + np.exp(-eta.numpy()))
    log_loss = -(y.numpy() * np.log(p) + (1 - y.numpy()) * np.log(1 - p)).mean(axis=1)
    np.testing.assert_allclose(link_loss(eta, y, torch.ones(6), "rna2atac"), log_loss)
    scale = torch.from_numpy(rng.uniform(1, 2, 6))
    squared = 0.5 * np.mean(((eta * scale - y) / scale).numpy() ** 2, axis=1)
    np.testing.assert_allclose(link_loss(eta, y, scale, "atac2rna"), squared)


def test_a_projection_of_fewer_cells_than_components_is_cut():
    cells = sp.csr_matrix(np.eye(6, 9, dtype=np.float32))
    assert fit_projection(cells, "atac", 32, 0).components.shape == (9, 4)


def test_the_penalty_shrinks():
    product, prior, scale = np.ones((3, 4)), np.full(4, -2.0), np.ones(4)
    for direction in ("atac2rna", "rna2atac"):
        loose, tight = (
            np.abs(solve(product, prior, scale, 100, np.full(3, r), direction)) for r in (1, 1000)
        )
        assert (tight < loose).all()


def test_pace_is_the_share_of_explained_variance():
    loadings = np.zeros((100, 3), np.float32)
    loadings[:, 1] = np.linspace(0, 1, 100)
    pace = pace_of(loadings)
    explained = loadings[:, 1] ** 2
    np.testing.assert_allclose(
        pace, np.clip(explained / np.quantile(explained, 0.95), LEAST_PACE, 1), rtol=1e-6
    )
    assert pace[0] == np.float32(LEAST_PACE)
    assert (pace[-5:] == 1).all()
    assert (
        pace_of(np.zeros((7, 3), np.float32)) == 1
    ).all()  # the mean profile: nothing is known of any target
