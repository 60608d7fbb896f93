"""Statistics of links against scipy, least squares and loops."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

from cisformer.data.reference import Reference
from cisformer.links.statistics import (
    FEWEST_EXPECTED,
    PairProducts,
    Pairs,
    PartialCorrelation,
    activity_contact,
    associate,
    distance_contact,
    false_discovery_rate,
    orthonormal,
    skewed_p_value,
    two_way_rank,
)


@pytest.fixture
def pairs() -> Pairs:
    """Every one of 6 genes with every one of 9 cCREs."""
    gene, ccre = np.divmod(np.arange(54), 9)
    return Pairs(gene, ccre, (ccre - 4) * 10_000)


def test_pairs_come_from_the_window():
    genes = pd.DataFrame(
        {
            "gene_id": ["a", "b"], "gene_name": ["A", "B"], "chrom": ["chr1", "chr2"], "start": [1000, 50],
            "end": [2000, 60], "strand": ["-", "+"],
        }
    )  # fmt: skip
    ccres = pd.DataFrame(
        {"chrom": ["chr1", "chr1", "chr1"], "start": [0, 2499, 2500], "end": [10, 2501, 2520]}
    )
    found = Pairs.of(Reference("x", "", genes, ccres), np.array([0, 1]), np.array([0, 1, 2]), 500)
    assert list(found.gene) == [0]
    assert list(found.ccre) == [1]
    assert list(found.distance) == [1999 - 2500]  # upstream: beyond the start of a gene on the minus strand


def test_contact_falls_from_one():
    assert distance_contact(np.array([0]))[0] == 1
    assert np.all(np.diff(distance_contact(np.array([0, 1_000, -10_000, 100_000]))) < 0)


def test_shares_of_a_gene_sum_to_one(pairs):
    activity = np.linspace(0, 0.4, 9)
    share = activity_contact(pairs, activity)
    assert np.allclose(np.bincount(pairs.gene, share), 1)
    first = activity * (np.abs(pairs.distance[:9]) / 5000 + 1) ** -0.9
    assert np.allclose(share[:9], first / first.sum())
    assert not activity_contact(pairs, np.zeros(9)).any()


def test_association_is_the_ridge_regression(pairs):
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    gene, ccre = rng.normal(size=(6, 5)), rng.normal(size=(9, 5))
    ccre[3] = 0
    found = associate(pairs, gene, ccre).reshape(6, 9)
    unit = ccre / np.maximum(np.linalg.norm(ccre, axis=1, keepdims=True), 1e-300)
    for row in range(6):
        ridge = Ridge(alpha=3.0 * 9 / 5, fit_intercept=False, solver="cholesky")
        ridge.fit(unit.T, gene[row] / np.linalg.norm(gene[row]))
        assert np.allclose(found[row], ridge.coef_, atol=1e-6)
    assert not found[:, 3].any()


def test_twins_share_their_association():
    profile = np.array([[1.0, 0.0]])
    alone = associate(Pairs(np.array([0]), np.array([0]), np.array([0])), profile, profile)
    twins = Pairs(np.array([0, 0]), np.array([0, 1]), np.array([0, 0]))
    both = associate(twins, profile, np.vstack([profile, profile]))
    assert both[0] == pytest.approx(both[1])
    assert both[0] < alone[0]


def random_cells(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expression, open cCREs and two covariates that move both."""
    rng = np.random.default_rng(seed)
    covariates = rng.normal(size=(n, 2))
    expression = np.log1p(rng.poisson(np.exp(0.5 * covariates[:, [0]] + rng.normal(0, 0.3, 6)), (n, 6)))
    is_open = rng.random((n, 9)) < 1 / (1 + np.exp(1 - 0.8 * covariates[:, [0]]))
    return expression.astype(np.float32), is_open.astype(np.float32), covariates


def test_partial_correlation_is_that_of_residuals(pairs):
    expression, is_open, covariates = random_cells(400, 1)
    design = np.column_stack([np.ones(400), covariates])
    test = PartialCorrelation(pairs, orthonormal(covariates), (6, 9))
    for start in range(0, 400, 150):  # blocks of uneven size
        stop = start + 150
        test.add(sp.csr_matrix(expression[start:stop]), sp.csr_matrix(is_open[start:stop]))
    left = expression - design @ np.linalg.lstsq(design, expression, rcond=None)[0]
    right = is_open - design @ np.linalg.lstsq(design, is_open, rcond=None)[0]
    wanted = np.array(
        [stats.pearsonr(left[:, g], right[:, p])[0] for g, p in zip(pairs.gene, pairs.ccre, strict=True)]
    )
    assert np.allclose(test.correlation(), wanted, atol=1e-6)
    t = wanted * np.sqrt((400 - 4) / (1 - wanted**2))
    of_t = 2 * stats.t.sf(abs(t), 400 - 4)
    assert np.allclose(2 * stats.norm.sf(abs(test.z())), of_t, atol=1e-6)
    assert np.allclose(test.p_value(), of_t, atol=0.02)  # hardly skewed
    assert np.array_equal(np.sign(test.z()), np.sign(t))


def test_p_value_is_that_of_the_regression_coefficient(pairs):
    """The test equals the t test of accessibility in a linear model of expression."""
    expression, is_open, covariates = random_cells(200, 2)
    test = PartialCorrelation(pairs, orthonormal(covariates), (6, 9))
    test.add(sp.csr_matrix(expression), sp.csr_matrix(is_open))
    design = np.column_stack([is_open[:, 4], np.ones(200), covariates]).astype(float)
    slopes, (left,), *_ = np.linalg.lstsq(design, expression[:, 2].astype(float), rcond=None)
    error = np.sqrt(np.linalg.inv(design.T @ design)[0, 0] * left / 196)
    assert test.p_value()[2 * 9 + 4] == pytest.approx(2 * stats.t.sf(abs(slopes[0] / error), 196), rel=1e-4)


def test_rare_pairs_are_not_tested(pairs):
    expression, is_open, _ = random_cells(100, 3)
    is_open[:, 0] = 0
    is_open[:1, 0] = 1
    expression[:, 0] = 0
    test = PartialCorrelation(pairs, orthonormal(np.zeros((100, 0))), (6, 9))
    test.add(sp.csr_matrix(expression), sp.csr_matrix(is_open))
    rare = (pairs.gene == 0) | (pairs.ccre == 0)
    assert np.array_equal(np.isnan(test.p_value()), rare)
    assert not test.z()[rare].any()
    assert (test.expected[rare] < FEWEST_EXPECTED).all()


def test_too_few_cells_give_no_p_value(pairs):
    expression, is_open, covariates = random_cells(3, 4)
    test = PartialCorrelation(pairs, orthonormal(covariates), (6, 9))
    test.add(sp.csr_matrix(expression), sp.csr_matrix(is_open))
    assert np.isnan(test.p_value()).all()
    assert not test.z().any()


def test_basis_drops_what_it_has_already():
    rng = np.random.default_rng(0)
    column = rng.normal(size=50)
    basis = orthonormal(column, np.column_stack([2 * column + 1, np.full(50, 3.0)]))
    assert basis.shape == (50, 2)
    assert np.allclose(basis.T @ basis, np.eye(2))


def test_false_discovery_rate_is_scipys():
    p = np.random.default_rng(0).random(500) ** 2
    assert np.allclose(false_discovery_rate(p), stats.false_discovery_control(p))
    holed = p.copy()
    holed[::3] = np.nan
    found = false_discovery_rate(holed)
    assert np.array_equal(np.isnan(found), np.isnan(holed))
    assert np.allclose(found[~np.isnan(found)], stats.false_discovery_control(p[~np.isnan(holed)]))


def test_uncoupled_cells_give_uniform_p_values():
    rng = np.random.default_rng(5)
    n, genes, ccres = 300, 40, 50
    expression = np.log1p(rng.poisson(rng.uniform(0.1, 2, genes), (n, genes))).astype(np.float32)
    is_open = (rng.random((n, ccres)) < rng.uniform(0.05, 0.5, ccres)).astype(np.float32)
    gene, ccre = np.divmod(np.arange(genes * ccres), ccres)
    test = PartialCorrelation(Pairs(gene, ccre, ccre), orthonormal(np.zeros((n, 0))), (genes, ccres))
    test.add(sp.csr_matrix(expression), sp.csr_matrix(is_open))
    p = test.p_value()
    p = p[~np.isnan(p)]
    assert stats.kstest(p, "uniform").statistic < 0.04
    assert stats.chi2.isf(np.median(p), 1) / stats.chi2.isf(0.5, 1) == pytest.approx(1, abs=0.1)


def test_p_values_of_rare_pairs_hold_far_out():
    """Two cells of 200 are expected to have both: t finds three times too many p-values below 0.001."""
    rng = np.random.default_rng(0)
    n, features, seen = 200, 200, 20
    level = np.concatenate([rng.lognormal(1, 0.5, seen), np.zeros(n - seen)])
    rna = np.column_stack([rng.permutation(level) for _ in range(features)]).astype(np.float32)
    atac = np.column_stack([rng.permutation(level > 0) for _ in range(features)]).astype(np.float32)
    gene, ccre = np.divmod(np.arange(features**2), features)
    test = PartialCorrelation(Pairs(gene, ccre, ccre), orthonormal(np.zeros((n, 0))), (features, features))
    for rows in (slice(0, 150), slice(150, n)):
        test.add(sp.csr_matrix(rna[rows]), sp.csr_matrix(atac[rows]))
    wanted = stats.skew(rna[:, 3]) * stats.skew(atac[:, 5]) / np.sqrt(n)
    assert test.skewness()[3 * features + 5] == pytest.approx(wanted, rel=1e-3)
    below = 0.001 * len(gene)
    assert (2 * stats.norm.sf(abs(test.z())) < 0.001).sum() > 2 * below
    assert below / 3 < (test.p_value() < 0.001).sum() < 1.2 * below


def test_skewed_p_value_is_that_of_pearson_3():
    z, skew = np.array([-3.0, 0.2, 5.0]), np.array([0.7, 1.5, 0.05])
    wanted = stats.pearson3.sf(abs(z), skew) + stats.pearson3.cdf(-abs(z), skew)
    assert np.allclose(skewed_p_value(z, skew), wanted, rtol=1e-6)


def test_depth_confounding_is_adjusted_away():
    """Deep cells show more of everything: without depth in the basis p-values are small, with it they are uniform."""
    rng = np.random.default_rng(6)
    n, genes, ccres = 400, 40, 40
    depth = rng.normal(0, 0.8, n)
    rate = rng.uniform(0.3, 2, genes) * np.exp(depth)[:, None]
    expression = np.log1p(rng.poisson(rate)).astype(np.float32)
    is_open = (rng.random((n, ccres)) < 1 / (1 + np.exp(1.5 - depth[:, None]))).astype(np.float32)
    gene, ccre = np.divmod(np.arange(genes * ccres), ccres)
    pairs = Pairs(gene, ccre, ccre)

    def p_values(basis: np.ndarray) -> np.ndarray:
        test = PartialCorrelation(pairs, basis, (genes, ccres))
        test.add(sp.csr_matrix(expression), sp.csr_matrix(is_open))
        return test.p_value()

    assert np.median(p_values(orthonormal(np.zeros((n, 0))))) < 0.05
    adjusted = p_values(orthonormal(depth))
    assert stats.kstest(adjusted, "uniform").statistic < 0.06
    assert stats.chi2.isf(np.median(adjusted), 1) / stats.chi2.isf(0.5, 1) == pytest.approx(1, abs=0.1)


def test_products_may_be_given(pairs):
    expression, is_open, covariates = random_cells(100, 7)
    rna, atac = sp.csr_matrix(expression), sp.csr_matrix(is_open)
    alone, given = (PartialCorrelation(pairs, orthonormal(covariates), (6, 9)) for _ in range(2))
    alone.add(rna, atac)
    given.add(rna, atac, PairProducts(pairs, 9).of(rna, atac))
    assert np.array_equal(alone.z(), given.z())
    assert np.allclose(alone.product, (expression.T @ is_open)[pairs.gene, pairs.ccre])


def test_two_way_rank_equals_scipys():
    rng = np.random.default_rng(0)
    cell, gene, ccre = (a.ravel() for a in np.meshgrid(range(3), range(4), range(5), indexing="ij"))
    kept = rng.random(60) < 0.6
    cell, gene, ccre = cell[kept], gene[kept], ccre[kept]
    weight = rng.integers(0, 6, len(cell)) / 6  # with ties
    found = two_way_rank(weight, cell, gene, ccre, 4, 5)
    frame = pd.DataFrame({"cell": cell, "gene": gene, "ccre": ccre, "w": weight})
    both = frame.groupby(["cell", "gene"]).w.rank(pct=True) + frame.groupby(["cell", "ccre"]).w.rank(pct=True)
    low, high = both.groupby(frame.cell).transform("min"), both.groupby(frame.cell).transform("max")
    assert np.allclose(found, (both - low) / (high - low))
    assert len(two_way_rank(np.zeros(0), *[np.zeros(0, int)] * 3, 1, 1)) == 0
