"""The closed-form start against scikit-learn and against matrices written out."""

from dataclasses import astuple, replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from cisformer.data.batches import encode_input, read_modality
from cisformer.data.preprocess import preprocess
from cisformer.data.store import CellStore, find_split
from cisformer.model import closed_form, closed_form_atac
from cisformer.model.cell_rows import CellRows
from cisformer.model.closed_form import (
    LEAST_PACE,
    StartOptions,
    count_features,
    fit_linear,
    link_loss,
    pace_of,
)
from cisformer.model.closed_form_atac import (
    BESIDE_SPREAD,
    USUAL_SHARED,
    Hat,
    Penalty,
    Sums,
    _Case,
    beside,
    learn_covariance,
    shared_loadings,
    solve,
)
from cisformer.model.link_function import change_of_log_odds
from cisformer.model.projection import fit_projection, states
from cisformer.model.target_states import (
    CellRidge,
    assemble,
    axis_scores,
    conjugate_gradients,
    held_out_states,
    target_axes,
)
from cisformer.training.closed_form_start import make_layout

NONE = CellRows(())


def fit(store, rows, val=NONE, *, direction, ridge=1.0, rank=5):
    """Fit to cells of a store; return its layout and the closed form."""
    counts = count_features(store, rows, direction)
    layout = make_layout(counts, direction, store)
    return layout, fit_linear(CellRows.of(store, rows), val, layout, counts, StartOptions(rank, ridge, 0))


@pytest.fixture(scope="module", params=["atac2rna", "rna2atac"])
def fitted(request, tiny_data):
    """A store, its layout, and its closed-form fit with penalty 1 and rank 5."""
    store = CellStore.open(find_split(tiny_data[request.param], "train"))
    return store, *fit(store, np.arange(store.n_cells), direction=request.param)


@pytest.fixture(scope="module")
def expression(tiny_data):
    store = CellStore.open(find_split(tiny_data["atac2rna"], "train"))
    return store, *fit(store, np.arange(store.n_cells), direction="atac2rna")


@pytest.fixture(scope="module")
def accessibility(tiny_data):
    store = CellStore.open(find_split(tiny_data["rna2atac"], "train"))
    return store, *fit(store, np.arange(store.n_cells), direction="rna2atac")


@pytest.fixture(scope="module")
def summed(accessibility):
    """States and accessibility of the cells, what one sweep leaves of them, and the spread of the components."""
    store, layout, start = accessibility
    rows = np.arange(store.n_cells)
    z = states(start.projection, store, rows, layout).astype(np.float64)
    sums = Sums.over(CellRows.of(store, rows), start.projection, layout)
    return z, dense(store, layout, "target"), sums, start.projection.sd.double().numpy()


@pytest.mark.parametrize("limit", ["FEW_CELLS", "FOLD_VALUES"])
def test_few_validation_cells_do_not_choose_the_penalty_alone(limit, tiny, tmp_path, monkeypatch):
    """Six cells whose RNA is paired with the ATAC of others speak for the mean profile; the training cells do not."""
    rna, atac = tiny.rna.copy(), tiny.atac.copy()
    atac.X = atac.X[[*range(150, 156), *range(6, 160)]]
    store = preprocess(rna, atac, tmp_path, direction="rna2atac", reference="dataset", manually=True)["all"]
    wrong = np.isin(store.barcodes, rna.obs_names[:6])
    val, rows = CellRows.of(store, np.flatnonzero(wrong)), np.flatnonzero(~wrong)
    assert fit(store, rows, val, direction="rna2atac", ridge="auto")[1].rank > 0
    monkeypatch.setattr(closed_form, limit, 0)
    assert fit(store, rows, val, direction="rna2atac", ridge="auto")[1].rank == 0


def dense(store, layout, side):
    rows = np.arange(store.n_cells)
    modality = layout.input_modality if side == "input" else layout.target_modality
    index = layout.input_index if side == "input" else layout.target_index
    return read_modality(store, rows, modality).toarray()[:, index]


def test_principal_states_are_white_on_the_training_cells(fitted):
    store, layout, start = fitted
    z = states(start.projection, store, np.arange(store.n_cells), layout)
    own = start.projection.principal.numpy()
    assert own.sum() == 5
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(z.T @ z[:, own] / len(z), np.eye(z.shape[1])[:, own], atol=2e-3)
    np.testing.assert_allclose(np.square(z).mean(axis=0), 1, atol=1e-2)
    assert (np.diff(start.projection.sd.numpy()[own]) <= 0).all()


def test_states_span_the_principal_components(fitted):
    """The subspace of scikit-learn's exact, centred SVD of the same matrix, for the component that stands out."""
    store, layout, start = fitted
    x = dense(store, layout, "input").astype(np.float64)
    if layout.input_modality == "atac":
        x = x * np.log1p(len(x) / np.maximum(x.sum(axis=0), 1))
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    else:
        depth = np.log1p((x > 0).sum(axis=1))
        x = x / np.sqrt(x.var(axis=0) + np.median(x.var(axis=0)))
        spread = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)[0] / np.sqrt(len(x))
        x = np.column_stack([x, (depth - depth.mean()) / depth.std() * spread])
    u = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)[0][:, :1]
    z = states(start.projection, store, np.arange(store.n_cells), layout)
    q = np.linalg.qr(z[:, start.projection.principal.numpy()])[0]
    assert np.linalg.svd(q.T @ u)[1].min() > 0.9


def test_expression_is_ridge_regression_of_its_leading_components(expression):
    """scikit-learn's ridge on all cCREs and its exact PCA of expression give the same prediction."""
    store, layout, start = expression
    rows = np.arange(store.n_cells)
    x = start.projection.features(CellRows.of(store, rows).read(layout).x).toarray().astype(np.float64)
    y = (dense(store, layout, "target") - start.prior) / start.scale
    axes = PCA(start.rank, svd_solver="full").fit(y).components_
    ridge = Ridge(alpha=np.square(x - x.mean(axis=0)).sum() / len(x)).fit(x, y @ axes.T)
    predicted = states(start.projection, store, rows, layout) @ start.loadings.T
    np.testing.assert_allclose(predicted, ridge.predict(x) @ axes, atol=5e-3)
    np.testing.assert_allclose(start.prior, dense(store, layout, "target").mean(axis=0), atol=1e-5)


def test_held_out_states_predict_as_if_the_cell_had_not_been_fitted_to(expression):
    """Close to what refitting without each cell gives, and far from what the fit says of its own cells."""
    store, layout, start = expression
    rows = np.arange(store.n_cells)
    matrix = CellRows.of(store, rows).read(layout)
    axes = start.target_states.axes.astype(np.float64)
    u = axis_scores(matrix.y, start.prior, start.scale, axes)
    x = start.projection.features(matrix.x).toarray().astype(np.float64)
    alpha = np.square(x - x.mean(axis=0)).sum() / len(x)
    left_out = np.stack([
        Ridge(alpha=alpha).fit(np.delete(x, i, 0), np.delete(u, i, 0)).predict(x[[i]])[0] for i in range(25)
    ])  # fmt: skip
    z = states(start.projection, store, rows, layout)
    readout = start.target_states.readout
    found = (held_out_states(z, u, start.target_states) @ readout)[:25]
    own = (z @ readout)[:25]
    assert np.square(found - left_out).mean() < 0.1 * np.square(own - left_out).mean()


def test_conjugate_gradients_solve_all_columns():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(30, 30))
    a = a @ a.T + 5 * np.eye(30)
    wanted = rng.normal(size=(30, 4))
    found = conjugate_gradients(lambda v: a @ v, wanted, np.zeros((30, 4)))
    np.testing.assert_allclose(found, np.linalg.solve(a, wanted), atol=1e-3)


def test_leverage_is_the_mean_share_of_a_cells_own_target():
    rng = np.random.default_rng(0)
    x = sp.csr_matrix(rng.random((200, 50)) * (rng.random((200, 50)) < 0.3), dtype=np.float32)
    _, leverage = CellRidge(x, rng.normal(size=(200, 2)), rng).fit(1.0)
    centred = x.toarray() - x.mean(axis=0)
    kernel = np.asarray(centred @ centred.T)
    exact = np.trace(kernel @ np.linalg.inv(kernel + np.trace(kernel) / 200 * np.eye(200))) / 200
    assert leverage == pytest.approx(exact, abs=0.02)


def test_no_components_of_expression_leave_the_projection_as_it_is(expression):
    """Validation may choose none; no warning about their spread then."""
    store, layout, start = expression
    x = start.projection.features(CellRows.of(store, np.arange(store.n_cells)).read(layout).x)
    own = int(start.projection.principal.sum())
    ridge = CellRidge(x, np.zeros((store.n_cells, 0)), np.random.default_rng(0))
    projection, found = assemble(start.projection, ridge, np.zeros((len(layout.target_index), 0)), 1.0)
    assert projection.rank == own
    assert found.readout.shape == (own, 0)


def test_axes_of_too_few_cells():
    assert target_axes(sp.csr_matrix(np.eye(1, 7)), np.ones(7), 0).shape == (7, 0)
    assert target_axes(sp.csr_matrix(np.eye(3, 7)), np.ones(7), 0).shape == (7, 2)


def test_accessibility_without_unevenness_is_ridge_regression(accessibility, summed):
    """Given a penalty, a is the middle one; with a = 0 the loadings are those of scikit-learn's ridge."""
    start, (z, y, sums, sd) = accessibility[2], summed
    loadings, p = solve(sums, sd, Penalty(5, 0.7, 0.0)), sums.frequency()
    shrink = sd / sd[0]
    ridge = Ridge(alpha=0.7 * len(z), fit_intercept=False).fit(z * shrink, y - p)
    np.testing.assert_allclose(loadings * (p * (1 - p))[:, None], ridge.coef_ * shrink, atol=1e-5)
    usual = Penalty(5, 1.0, 0.5, shared=USUAL_SHARED)
    np.testing.assert_array_equal(start.loadings, solve(sums, sd, usual))


def test_what_ccres_share_is_ridge_regression_of_their_number(summed):
    """scikit-learn's ridge of how many cCREs are open in a cell, more than on average."""
    z, y, sums, sd = summed
    p, shrink = sums.frequency(), sd / sd[0]
    more = (y.sum(axis=1) - p.sum()) / (p * (1 - p)).sum()
    ridge = Ridge(alpha=len(z) / 4, fit_intercept=False).fit(z * shrink, more)
    found = shared_loadings(sums, sd, 4.0)
    np.testing.assert_allclose(found, ridge.coef_ * shrink, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        solve(sums, sd, Penalty(0, 1.0, 0.0, shared=4.0)), np.tile(found, (len(p), 1)), rtol=1e-5
    )


@pytest.mark.parametrize(
    "other",
    [{"rank": 4}, {"ridge": 2.0}, {"unevenness": 1.0}, {"steps": 3}, {"strength": 0.5}, {"shared": 0.0}],
    ids=str,
)
def test_what_was_learnt_for_one_penalty_serves_no_other_by_mistake(summed, other):
    z, y, sums, sd = summed
    case = _Case(sums, *(torch.from_numpy(x) for x in (z, y, sums.prior())))
    first = Penalty(5, 0.7, 0.5, steps=2, shared=10.0)
    case.hat(sd, first)
    for penalty in (first, replace(first, **other)):
        for found, wanted in zip(
            astuple(case.hat(sd, penalty)), astuple(Hat.of(sums, sd, penalty)), strict=True
        ):
            np.testing.assert_array_equal(found, wanted)


def test_depth_raises_all_ccres_alike():
    """Cells that differ in depth alone: every cCRE would learn that with an error of its own, all together do not."""
    rng, n_cells, n_ccres = np.random.default_rng(0), 150, 400
    depth = rng.normal(size=n_cells)
    z = np.column_stack([depth, rng.normal(size=n_cells)])
    p = rng.uniform(0.05, 0.3, n_ccres)
    y = (rng.random((n_cells, n_ccres)) < p * (1 + 0.3 * depth[:, None])).astype(float)
    sums, sd = Sums(n_cells, y.sum(axis=0), z.sum(axis=0), z.T @ z, z.T @ y), np.ones(2)
    errors = [
        solve(sums, sd, Penalty(2, 1.0, 0.0, steps=30, shared=shared))[:, 0] - 0.3 / (1 - p)
        for shared in (0.0, 100.0)
    ]
    assert np.square(errors[1]).mean() < 0.2 * np.square(errors[0]).mean()


@pytest.mark.parametrize(("steps", "shared"), [(0, 0.0), (3, 0.0), (3, 10.0)])
def test_loadings_drawn_to_their_neighbours_are_the_posterior_mean(accessibility, steps, shared):
    """Of a normal model written out with dense matrices, one cCRE at a time."""
    store, layout, start = accessibility
    sd = start.projection.sd.double().numpy()
    sums = Sums.over(CellRows.of(store, np.arange(store.n_cells)), start.projection, layout)
    near = beside(store.reference.ccres.iloc[layout.target_index])
    penalty = Penalty(5, 0.7, 0.5, steps=steps, strength=0.5, beside=True, shared=shared)
    loadings = solve(sums, sd, penalty, near)
    hat, p = Hat.of(sums, sd, penalty), sums.frequency()
    w, precision = p * (1 - p), np.linalg.inv(hat.basis @ hat.basis.T)
    m = shared_loadings(sums, sd, shared)
    score = sums.cross - np.outer(sums.z, p) - np.outer(sums.gram @ m, w)
    for f in (0, 11, 40):
        row = near[f].toarray().ravel()
        own = precision * w[f] ** -0.5  # of M_f: V⁻¹ w^(1 - a), of neighbours of weight w: V⁻¹ w^(1 - a) too
        pooled = np.linalg.solve((row @ w) * sums.gram + BESIDE_SPREAD * w[f] * own, score @ row)
        wanted = pooled + np.linalg.solve(sums.gram + own, score[:, f] / w[f] - sums.gram @ pooled)
        np.testing.assert_allclose(loadings[f], m + wanted, rtol=1e-4, atol=1e-5)
    assert np.abs(loadings - solve(sums, sd, replace(penalty, beside=False))).max() > 0.01


def test_cells_say_how_loadings_vary():
    """Scores of loadings with a planted covariance, not diagonal: that is learnt, and then nothing more."""
    rng, gram = np.random.default_rng(0), np.diag([900.0, 1000, 1100])
    planted = np.array([[4.0, 1.5, 0], [1.5, 1, 0], [0, 0, 0.01]])
    weight = rng.uniform(0.01, 0.1, 4000)
    loadings = rng.multivariate_normal(np.zeros(3), planted, 4000) * weight[:, None] ** -0.25
    noise = rng.normal(size=(4000, 3)) * np.sqrt(np.outer(weight, np.diag(gram)))
    score = gram @ (loadings * weight[:, None]).T + noise.T
    learnt = np.eye(3)
    for _ in range(100):
        learnt = learn_covariance(learnt, gram, score, weight, 0.5)
    np.testing.assert_allclose(learnt, planted, atol=0.2)
    again = learn_covariance(learnt, gram, score, weight, 0.5)
    np.testing.assert_allclose(again, learnt, atol=1e-3)


def test_few_cells_do_not_say_how_loadings_vary(accessibility):
    """No cCRE is open in enough of them: what was assumed stays, without a warning."""
    store, layout, start = accessibility
    sd = start.projection.sd.double().numpy()
    sums = Sums.over(CellRows.of(store, np.arange(4)), start.projection, layout)
    assumed, learnt = (solve(sums, sd, Penalty(5, 0.7, 0.5, steps=steps)) for steps in (0, 3))
    np.testing.assert_array_equal(learnt, assumed)


def test_neighbours_on_the_genome():
    ccres = pd.DataFrame(
        {"chrom": ["chr1", "chr2", "chr1", "chr1"], "start": [20_000, 0, 10_000, 900_000]}
    ).assign(end=lambda x: x["start"] + 200)
    wanted = np.zeros((4, 4))
    wanted[0, 2] = wanted[2, 0] = 0.5
    np.testing.assert_allclose(beside(ccres).toarray(), wanted)
    assert beside(ccres[:1]).shape == (1, 1)
    assert beside(ccres[:1]).nnz == 0


def test_full_unevenness_is_one_newton_step_from_the_prior(accessibility, summed):
    """Gradient and Hessian of the ridge-penalised log-likelihood by automatic differentiation."""
    start, (z, y, sums, sd) = accessibility[2], summed
    loadings, p = solve(sums, sd, Penalty(5, 0.7, 1.0)), sums.frequency()
    z, target = torch.from_numpy(z), torch.from_numpy(y).double()
    penalty = torch.from_numpy(0.7 * len(z) * (p * (1 - p)).mean() * (sd[0] / sd) ** 2)
    for f in (0, 11, 40):

        def negative_log_likelihood(b, f=f):
            eta = float(start.prior[f]) + z @ b
            return torch.nn.functional.binary_cross_entropy_with_logits(
                eta, target[:, f], reduction="sum") + 0.5 * (penalty * b.square()).sum()  # fmt: skip

        zero = torch.zeros(5, dtype=torch.float64)
        gradient = torch.autograd.functional.jacobian(negative_log_likelihood, zero)
        hessian = torch.autograd.functional.hessian(negative_log_likelihood, zero)
        np.testing.assert_allclose(loadings[f], -torch.linalg.solve(hessian, gradient), rtol=0.02, atol=2e-3)


def test_states_need_not_be_white(accessibility):
    """Cells that the projection was not fitted to: the normal equations are solved with their own ZᵀZ."""
    store, layout, start = accessibility
    rows = np.arange(store.n_cells)
    z = states(start.projection, store, rows, layout).astype(np.float64)
    chosen = rows[z[:, 0] > 0]
    z, sd = z[chosen], start.projection.sd.double().numpy()
    assert np.abs(z.T @ z / len(z) - np.eye(5)).max() > 0.2
    sums = Sums.over(CellRows.of(store, chosen), start.projection, layout)
    p = 1 / (1 + np.exp(-sums.prior().astype(np.float64)))
    y = dense(store, layout, "target")[chosen]
    system = z.T @ z + len(z) * 0.5 * np.diag((sd[0] / sd) ** 2)
    wanted = np.linalg.solve(system, z.T @ (y - p)) / (p * (1 - p))
    np.testing.assert_allclose(solve(sums, sd, Penalty(5, 0.5, 0.0)), wanted.T, rtol=1e-3, atol=1e-4)


def test_sums_of_parts_are_sums_of_all(accessibility):
    store, layout, start = accessibility
    rows = np.arange(store.n_cells)
    whole = Sums.over(CellRows.of(store, rows), start.projection, layout)
    parts = [Sums.over(CellRows.of(store, part), start.projection, layout) for part in (rows[:50], rows[50:])]
    np.testing.assert_allclose((parts[0] + parts[1]).cross, whole.cross, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose((parts[0] + parts[1]).prior(), start.prior, atol=1e-6)


def test_the_link_is_that_of_a_straight_probability():
    """p + p (1 − p) x as long as half of p and of 1 − p is left; beyond, log odds go on with the slope reached."""
    p = torch.tensor([0.001, 0.2, 0.5, 0.9], dtype=torch.float64)
    x = torch.cat([torch.linspace(-9, 9, 19), torch.linspace(10, 900, 90)]).double()[:, None].repeat(1, 4)
    x.requires_grad_()
    change = change_of_log_odds(x, p.logit())
    straight = p + p * (1 - p) * x
    near = (straight >= p / 2) & (1 - straight >= (1 - p) / 2)
    torch.testing.assert_close((p.logit() + change).sigmoid()[near], straight[near])
    slope = torch.autograd.grad(change.sum(), x)[0]
    for beyond, wanted in ((straight < p / 2, 4 * (1 - p) / (2 - p)), (~near & (x > 0), 4 * p / (1 + p))):
        assert beyond.any(dim=0).all()
        torch.testing.assert_close(slope[beyond], wanted.expand_as(slope)[beyond])


def test_the_link_is_exact_for_a_ccre_that_is_open_in_nearly_every_cell():
    prior, x = torch.tensor([-16.0, 16.0]), torch.tensor([[-1e6], [-0.3], [2.0], [1e6]])
    wanted = change_of_log_odds(x.double(), prior.double())
    torch.testing.assert_close(change_of_log_odds(x, prior), wanted.float(), rtol=1e-4, atol=1e-6)


def test_the_link_of_earlier_checkpoints_is_log_odds_below_and_a_share_of_the_odds_above():
    x = torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0])
    wanted = [-2, -0.1, 0, np.log(1.1), np.log(3)]
    np.testing.assert_allclose(change_of_log_odds(x, torch.zeros(5), 1), wanted, rtol=1e-6)


def test_features_are_counted(fitted):
    store, layout, _ = fitted
    counts = count_features(store, np.arange(store.n_cells), layout.direction)
    y = dense(store, layout, "target")
    np.testing.assert_array_equal(counts.n_seen[layout.target_index], (y > 0).sum(axis=0))
    np.testing.assert_allclose(counts.total[layout.target_index], y.sum(axis=0), rtol=1e-5)
    assert counts.n_seen.sum() == (y > 0).sum()


class Shuffled:
    """A store whose expression is that of other cells."""

    def __init__(self, store):
        self.path, self.reference, self.n_cells, self.atac = (
            store.path,
            store.reference,
            store.n_cells,
            store.atac,
        )
        self._store, self._order = store, np.random.default_rng(1).permutation(store.n_cells)

    def rna(self, rows):
        return self._store.rna(self._order[rows])


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_validation_chooses_little_where_inputs_say_nothing(direction, tiny_data):
    """Targets of other cells: nearly the mean profile is best, and `auto` finds that."""
    store = CellStore.open(find_split(tiny_data[direction], "train"))
    rows = np.random.default_rng(0).permutation(store.n_cells)
    moved = []
    for cells in (store, Shuffled(store)):
        layout, start = fit(
            cells, rows[30:], CellRows.of(cells, rows[:30]), direction=direction, ridge="auto"
        )  # fmt: skip
        moved.append(np.square(states(start.projection, store, rows, layout) @ start.loadings.T).mean())
    assert moved[1] < 0.6 * moved[0]


def test_some_targets_choose_for_all(tiny_data, monkeypatch):
    """Rank and penalty are those that the drawn targets would choose alone; loadings are of every target."""
    store = CellStore.open(find_split(tiny_data["rna2atac"], "train"))
    rows = np.arange(store.n_cells)
    monkeypatch.setattr(closed_form_atac, "SELECTION_VALUES", 40 * (len(rows) - 120))
    layout, start = fit(
        store, rows[:120], CellRows.of(store, rows[120:]), direction="rna2atac", ridge="auto"
    )  # fmt: skip
    sums = Sums.over(CellRows.of(store, rows[:120]), start.projection, layout)
    near = beside(store.reference.ccres.iloc[layout.target_index])
    sd = start.projection.sd.double().numpy()
    np.testing.assert_array_equal(start.loadings, solve(sums, sd, start.penalty, near))
    assert start.loadings.shape == (len(layout.target_index), 5)
    assert not start.loadings[:, start.rank :].any()


def test_a_sample_keeps_stores_apart(tiny_data):
    store = CellStore.open(find_split(tiny_data["rna2atac"], "train"))
    both = CellRows.of(store, np.arange(50)) + CellRows.of(store, np.arange(60, 90))
    some = both.sample(40, np.random.default_rng(0))
    assert len(some) == 40
    assert set(some.parts[0][1]) <= set(range(50))
    assert set(some.parts[1][1]) <= set(range(60, 90))
    assert len(both.sample(1000, np.random.default_rng(0))) == 80


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


def test_the_penalty_shrinks(summed):
    _, _, sums, sd = summed
    loose, tight = (np.square(solve(sums, sd, Penalty(5, r, 0.5))).sum(axis=1) for r in (0.1, 10))
    assert (tight < loose).all()
    assert not solve(sums, sd, Penalty(0, 1.0, 0.0)).any()


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
