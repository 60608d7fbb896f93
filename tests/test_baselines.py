"""Baselines against scikit-learn and loops."""

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.kernel_ridge import KernelRidge as ExactKernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import KernelCenterer

from cisformer.evaluation.baselines import (
    GRIDS,
    CellTypeMean,
    KernelRidge,
    MeanProfile,
    NearestNeighbours,
    PcaRidge,
    fit_baselines,
    mask_oracle,
)
from cisformer.evaluation.training_cells import InputSpace, Product, TrainingCells, log_normalise, tf_idf


@pytest.fixture(scope="module")
def paired():
    """Counts [120 × 60], accessibility [120 × 90] and types of cells that share two programmes."""
    rng = np.random.default_rng(0)
    types = rng.integers(0, 3, 120)
    state = np.eye(3)[types] * 2 + rng.normal(size=(120, 3)) * 0.5
    rna = rng.poisson(np.exp(state @ rng.normal(size=(3, 60)) * 0.5))
    atac = rng.random((120, 90)) < 1 / (1 + np.exp(1.5 - state @ rng.normal(size=(3, 90))))
    return sp.csr_matrix(rna.astype(np.float32)), sp.csr_matrix(atac.astype(np.float32)), types.astype(str)


@pytest.fixture(scope="module", params=["rna2atac", "atac2rna"])
def task(request, paired):
    """(training cells, test cells, target of all, direction) for one direction."""
    rna, atac, types = paired
    source, target = (rna, atac) if request.param == "rna2atac" else (atac, log_normalise(rna))
    space = InputSpace.fit(source[:90], "rna" if request.param == "rna2atac" else "atac")
    train = TrainingCells(request.param, space.read(source[:90], types[:90]), target[:90])
    return train, space.read(source[90:], types[90:]), target.toarray(), request.param


def test_normalisations_equal_their_formulas(paired):
    rna, atac, _ = paired
    counts, open_ = rna.toarray().astype(float), atac.toarray().astype(float)
    np.testing.assert_allclose(
        log_normalise(rna).toarray(), np.log1p(counts / counts.sum(1, keepdims=True) * 1e4), rtol=1e-5
    )
    n_open = open_.sum(axis=0)
    expected = np.log1p(open_ / open_.sum(1, keepdims=True) * np.log(1 + 120 / n_open) * 1e4)
    np.testing.assert_allclose(tf_idf(atac, n_open, 120).toarray(), expected, rtol=1e-5)


def test_a_cell_without_counts_stays_zero():
    assert log_normalise(sp.csr_matrix((2, 5), dtype=np.float32)).toarray().tolist() == [[0] * 5] * 2


def test_product_slices_equal_the_whole():
    rng = np.random.default_rng(1)
    left, right = sp.random(7, 4, 0.6, rng=rng, format="csr"), sp.random(4, 9, 0.6, rng=rng, format="csr")
    product = Product(left, right, rng.normal(size=9), np.full(9, -0.1), 0.8)
    whole = np.clip(left.toarray() @ right.toarray() + product.offset, -0.1, 0.8)
    np.testing.assert_allclose(product.toarray(), whole, rtol=1e-5)
    np.testing.assert_allclose(product[2:5, :], whole[2:5], rtol=1e-5)
    np.testing.assert_allclose(product[:, 3:4], whole[:, 3:4], rtol=1e-5)


def test_components_are_the_principal_components(paired):
    rna = paired[0]
    space = InputSpace.fit(rna[:90], "rna")
    scores = space.read(rna[:90]).components
    normalised = log_normalise(rna[:90]).toarray()
    singular = np.linalg.svd(normalised - normalised.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(np.sqrt((scores**2).sum(axis=0)), singular[: scores.shape[1]], rtol=1e-3)


def test_mean_profile(task):
    train, cells, target, direction = task
    predicted = MeanProfile(train, {}).predict(cells).toarray()
    mean = target[:90].mean(axis=0)
    if direction == "rna2atac":
        mean = (mean * 90 + mean.mean()) / 91
    np.testing.assert_allclose(predicted, np.tile(mean, (30, 1)), rtol=1e-5)


def test_cell_type_mean_equals_a_loop(task):
    train, cells, target, _ = task
    predicted = CellTypeMean(train, {"shrink": 4}).predict(cells).toarray()
    for row, label in enumerate(cells.labels):
        own = target[:90][train.cells.labels == label]
        expected = (own.sum(axis=0) + 4 * train.mean) / (len(own) + 4)
        np.testing.assert_allclose(predicted[row], expected, rtol=1e-4)


def test_a_type_that_training_has_not_seen_gets_the_mean(task):
    train, cells, _, _ = task
    unknown = type(cells)(cells.components, cells.depth, np.full(len(cells.depth), "unseen", dtype=object))
    predicted = CellTypeMean(train, {"shrink": 4}).predict(unknown).toarray()
    np.testing.assert_allclose(predicted, MeanProfile(train, {}).predict(cells).toarray(), rtol=1e-5)


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_neighbours_equal_scikit_learn(task, white, metric):
    train, cells, target, direction = task
    settings = {"k": 10, "shrink": 5, "metric": metric, "white": white}
    predicted = NearestNeighbours(train, settings).predict(cells).toarray()
    scale = train.cells.components.std(axis=0) if white else 1
    regressor = KNeighborsRegressor(10, metric=metric).fit(train.cells.components / scale, target[:90])
    expected = (regressor.predict(cells.components / scale) * 10 + train.mean * 5) / 15
    if direction == "rna2atac":
        expected = np.clip(expected, np.maximum(1e-4, train.mean / 10), 1 - 1e-4)
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-6)


def test_ridge_equals_scikit_learn(task):
    train, cells, target, direction = task
    ridge = PcaRidge(train, {"n_components": 10, "penalty": 0.05})
    reference = Ridge(alpha=0.05 * 90).fit(ridge._design(train.cells), target[:90])
    expected = reference.predict(ridge._design(cells))
    if direction == "rna2atac":
        expected += train.mean - reference.intercept_  # the mean profile is smoothed
        expected = np.clip(expected, np.maximum(1e-4, train.mean / 10), 1 - 1e-4)
    np.testing.assert_allclose(ridge.predict(cells).toarray(), np.maximum(expected, 0), rtol=1e-3, atol=1e-4)


def test_kernel_ridge_equals_scikit_learn(task):
    """With every training cell a landmark, Nyström features are the kernel itself."""
    train, cells, target, direction = task
    ridge = KernelRidge(train, {"gamma": 0.5, "penalty": 0.01})
    points, others = ridge._points(train.cells), ridge._points(cells)
    width = {"gamma": 0.5 / (2 * points.var(axis=0).sum())}
    centre = KernelCenterer().fit(rbf_kernel(points, **width))
    exact = ExactKernelRidge(alpha=0.01 * 90, kernel="precomputed")
    exact.fit(centre.transform(rbf_kernel(points, **width)), target[:90] - target[:90].mean(axis=0))
    expected = exact.predict(centre.transform(rbf_kernel(others, points, **width))) + train.mean
    if direction == "rna2atac":
        expected = np.clip(expected, np.maximum(1e-4, train.mean / 10), 1 - 1e-4)
    np.testing.assert_allclose(ridge.predict(cells).toarray(), np.maximum(expected, 0), rtol=2e-3, atol=5e-4)


def test_settings_are_those_of_the_lowest_loss_on_held_out_training_cells(paired):
    rna, atac, types = paired
    fitted = fit_baselines(rna[:90], atac[:90], direction="rna2atac", labels=types[:90], seed=3).fitted
    assert list(fitted) == list(GRIDS)
    training = TrainingCells("rna2atac", InputSpace.fit(rna[:90], "rna", seed=3).read(rna[:90]), atac[:90])
    fit, tune = training.split(3)
    losses = {
        p: tune.loss(PcaRidge(fit, {"n_components": n, "penalty": p}).predict(tune.cells))
        for n in [fitted["PCA-ridge"].settings["n_components"]]
        for p in (0.001, 0.1, 3.0)
    }
    best = tune.loss(PcaRidge(fit, fitted["PCA-ridge"].settings).predict(tune.cells))
    assert best <= min(losses.values())


def test_baselines_beat_the_mean_where_there_is_something_to_learn(task):
    train, cells, target, direction = task
    losses = {}
    for name, settings in {
        "mean profile": {},
        "cell-type mean": {"shrink": 5},
        "kNN": {"k": 30, "shrink": 5, "metric": "cosine", "white": False},
        "PCA-ridge": {"n_components": 10, "penalty": 0.1},
        "kernel ridge": {"gamma": 0.3, "penalty": 0.03},
    }.items():
        test = TrainingCells(direction, cells, sp.csr_matrix(target[90:]))
        losses[name] = test.loss(GRIDS[name][0](train, settings).predict(cells))
    assert max(losses, key=losses.get) == "mean profile"


def test_without_labels_there_is_no_cell_type_mean(paired):
    rna, atac, _ = paired
    baselines = fit_baselines(rna[:90], atac[:90], direction="rna2atac")
    assert "cell-type mean" not in baselines.predict(rna[90:])


def test_probabilities_stay_inside_their_bounds(paired):
    rna, atac, types = paired
    baselines = fit_baselines(rna[:90], atac[:90], direction="rna2atac", labels=types[:90])
    for predicted in baselines.predict(rna[90:], types[90:]).values():
        values = predicted.toarray()
        assert values.min() >= 1e-4 * 0.999
        assert values.max() <= 1 - 1e-4


def test_mask_oracle_is_the_mask(paired):
    np.testing.assert_array_equal(mask_oracle(paired[0]).toarray(), paired[0].toarray() > 0)
