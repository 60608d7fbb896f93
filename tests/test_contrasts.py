"""Links compared between groups: the measure, the tests, planted differences, nulls, and what is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from made_links import write_links
from scipy import stats

from cisformer import compare_links, preprocess
from cisformer.analysis.candidates import read_candidates
from cisformer.analysis.coupling import (
    accessibility_explains,
    common_ratio,
    dispersion,
    open_dispersion,
    ratio_variance,
    sum_unit,
)
from cisformer.analysis.moderated import compare_donors, compare_pairs, fit_scaled_f
from cisformer.errors import InputError, OutputExistsError
from cisformer.links.statistics import Pairs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def planting():
    """The module benchmarks/contrasts.py, whose cells the tests use as well."""
    spec = importlib.util.spec_from_file_location("contrasts_benchmark", ROOT / "benchmarks" / "contrasts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["contrasts_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["contrasts_benchmark"]


# ---------------------------------------------------------------- the measure


def one_pair(rng, n, *, level=0.5, ratio=2.0, depth=1.0, capture=1.0):
    """Sums of cells with one gene and one cCRE that is open in a fifth of them and multiplies the rate."""
    size = depth * rng.lognormal(0, 0.4, n)
    is_open = rng.random(n) < 0.2
    counts = rng.poisson(size * level * np.where(is_open, ratio, 1.0) * rng.gamma(4, 0.25, n))
    seen = is_open & (rng.random(n) < capture * (1 if capture == 1 else size))  # deep cells show more
    rna, atac = (
        sp.csr_matrix(counts[:, None].astype(np.float32)),
        sp.csr_matrix(seen[:, None].astype(np.float32)),
    )
    pairs = Pairs(np.array([0]), np.array([0]), np.array([0]))
    blocks = [
        (size[i : i + 999], rna[i : i + 999], atac[i : i + 999], np.log(size[i : i + 999, None]))
        for i in range(0, n, 999)
    ]
    return sum_unit(blocks, pairs, (1, 1)), pairs


@pytest.mark.parametrize("change", [{}, {"depth": 0.3}, {"level": 3.0}, {"capture": 0.3}])
def test_the_ratio_depends_on_neither_depth_nor_level(change):
    unit, _ = one_pair(np.random.default_rng(1), 200_000, **change)
    expected = 2.0 / (0.2 * 2.0 + 0.8)  # rate where open over the mean rate
    assert unit.observed[0] / unit.expected[0] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("ratio", "level"), [(1.0, 0.1), (1.0, 2.0), (2.5, 0.5)])
def test_the_variance_is_that_of_repeated_draws(ratio, level):
    rng = np.random.default_rng(2)
    draws = [one_pair(rng, 400, ratio=ratio, level=level) for _ in range(250)]
    units, pairs = [unit for unit, _ in draws], draws[0][1]
    estimate = np.array([unit.observed[0] / unit.expected[0] for unit in units])
    common, phi = common_ratio(units), dispersion(units)
    open_phi = open_dispersion(units, pairs, common, phi)
    predicted = [ratio_variance(unit, pairs, common, phi, open_phi)[0] for unit in units]
    assert np.mean(predicted) == pytest.approx(estimate.var(), rel=0.3)


def test_sums_are_those_of_a_plain_regression():
    rng = np.random.default_rng(3)
    n, size = 60, rng.lognormal(0, 0.5, 60)
    counts, is_open, covariate = rng.poisson(1.0, (n, 2)), rng.random((n, 3)) < 0.4, rng.normal(size=(n, 1))
    pairs = Pairs(np.array([0, 1, 1]), np.array([2, 0, 1]), np.zeros(3, int))
    rna, atac = sp.csr_matrix(counts.astype(np.float32)), sp.csr_matrix(is_open.astype(np.float32))
    unit = sum_unit([(size, rna, atac, covariate)], pairs, (2, 3))
    design = np.column_stack([np.ones(n), covariate])
    slope = np.linalg.solve(design.T @ (size[:, None] * design), design.T @ counts)
    fitted = size[:, None] * (design @ slope)
    for row, (gene, ccre) in enumerate(zip(pairs.gene, pairs.ccre, strict=True)):
        assert unit.expected[row] == pytest.approx(fitted[is_open[:, ccre], gene].sum())
        assert unit.observed[row] == counts[is_open[:, ccre], gene].sum()


# ---------------------------------------------------------------- tests over donors


def test_variances_of_a_scaled_f_distribution_give_its_scale_and_degrees_of_freedom():
    rng = np.random.default_rng(4)
    df = rng.integers(3, 7, 20_000).astype(float)
    variance = 1.7 * stats.f.rvs(df, 9, random_state=rng)
    scale, prior_df = fit_scaled_f(variance, df)
    assert scale == pytest.approx(1.7, rel=0.05)
    assert prior_df == pytest.approx(9, rel=0.15)
    assert fit_scaled_f(stats.chi2.rvs(df, random_state=rng) / df, df)[1] > 100


def test_with_one_pair_and_equal_weights_it_is_a_t_test():
    rng = np.random.default_rng(5)
    values, in_a = rng.normal(size=(7, 1)), np.array([True] * 3 + [False] * 4)
    tested, variance = np.array([True]), np.full((7, 1), 0.3)
    found = compare_donors(values, variance, in_a, tested)
    oracle = stats.ttest_ind(values[in_a, 0], values[~in_a, 0])
    assert found.effect[0] / found.error[0] == pytest.approx(oracle.statistic)
    assert found.p_value[0] == pytest.approx(oracle.pvalue)
    in_a = np.array([True] * 3 + [False] * 3)
    paired = compare_pairs(values[:6], variance[:6], in_a, tested, 3)
    oracle = stats.ttest_rel(values[:3, 0], values[3:6, 0])
    assert paired.p_value[0] == pytest.approx(oracle.pvalue)


def test_p_values_over_few_donors_are_uniform_though_donors_differ():
    rng = np.random.default_rng(6)
    in_a, n = np.array([True] * 3 + [False] * 3), 20_000
    variance = rng.gamma(3, 0.1, (6, n))
    own = 1.5 * stats.invgamma.rvs(6, scale=5, size=n, random_state=rng)
    found = compare_donors(
        rng.normal(size=(6, n)) * np.sqrt(variance * own), variance, in_a, np.ones(n, bool)
    )
    assert stats.kstest(found.p_value, "uniform").statistic < 0.015
    assert np.mean(found.p_value < 1e-3) < 2e-3
    assert found.spread > 1.2


def test_a_donor_that_says_nothing_of_a_pair_does_not_count():
    values, variance = np.array([[1.0], [2.0], [9.0], [5.0]]), np.array([[1.0], [1.0], [np.inf], [1.0]])
    found = compare_donors(values, variance, np.array([True, True, False, False]), np.array([True]))
    assert np.isnan(found.p_value[0])
    assert (found.n_a[0], found.n_b[0]) == (2, 1)
    assert found.mean_b[0] == 5


# ---------------------------------------------------------------- planted differences


@pytest.fixture(scope="module")
def planted(planting):
    return planting.plant(
        planting.Planting(n_cells=3000, n_genes=250, n_ccres=1500, n_pairs=40, effect=6.0, seed=3)
    )


@pytest.fixture(scope="module")
def by_donors(planted, planting, tmp_path_factory):
    return planting.compare(planted, tmp_path_factory.mktemp("donors"), donor="donor")


def test_planted_differences_are_found_and_depth_and_level_make_none(by_donors):
    tested = by_donors[by_donors["p_value"].notna()]
    sure = tested["fdr"] < 0.05
    differs = tested["kind"] == "differs"
    assert sure[differs].mean() > 0.4
    assert (tested["effect"][sure & differs] > 0).all()
    assert sure[~differs].sum() <= 0.1 * sure.sum()
    for kind in ("none", "both"):
        assert (tested.loc[tested["kind"] == kind, "p_value"] < 0.01).mean() < 0.025


@pytest.mark.parametrize("by_donor", [True, False])
def test_with_permuted_conditions_p_values_are_uniform(planting, by_donor):
    cells, rng = planting.NullCells.simulated(3, 2000), np.random.default_rng(8)
    p = np.concatenate(
        [part for _ in range(6) for part in cells.permuted(rng, by_donor=by_donor, donors=by_donor)]
    )
    p = p[np.isfinite(p)]
    assert 0.9 < planting.inflation(p) < 1.1
    assert (p < 0.01).mean() < 0.02


def test_a_change_of_accessibility_alone_is_told_from_a_change_of_the_link(planting, tmp_path):
    options = {"n_genes": 250, "n_ccres": 1500, "n_pairs": 30, "n_access": 40, "effect": 6.0}
    cells = planting.plant(planting.Planting(3000, **options, seed=5))
    found = planting.compare(cells, tmp_path, donor="donor")
    sure = found[found["fdr"] < 0.05]
    access, differs = (
        sure.loc[sure["kind"] == kind, "accessibility_explains"] for kind in ("access", "differs")
    )
    assert len(access) > 5
    assert len(differs) > 5
    assert access.mean() > 0.8
    assert differs.mean() < 0.1


def test_accessibility_explains_at_most_its_own_ratio():
    is_open = np.array([0.2, 0.2, 0.2, 0.1]), np.array([0.1, 0.1, 0.1, 0.1])  # the median of the ratios is 2
    is_open[0][3] = 0.4  # twice the others': M may be half as high
    ratio = np.full(4, 1.0), np.array([1.0, 1.3, 0.7, 1.9])
    error = np.full(4, 0.01)
    assert accessibility_explains(ratio, error, is_open).tolist() == [False, False, False, True]
    ratio[1][3] = 2.1
    assert not accessibility_explains(ratio, error, is_open)[3]


# ---------------------------------------------------------------- inputs


@pytest.fixture(scope="module")
def small(planting, tmp_path_factory):
    """A small store, cell types, and a table of pairs without score, FDR or cell type."""
    folder = tmp_path_factory.mktemp("small")
    cells = planting.plant(planting.Planting(600, 120, 700, n_pairs=10, seed=4))
    obs = cells.rna.obs
    obs["dose"] = np.where(obs["condition"] == "A", 1, 2)
    obs["paired"] = [f"p{number}" for number in np.arange(len(obs)) % 4]
    obs["half"] = np.where(np.arange(len(obs)) % 3, obs["donor"], "both")
    obs["single"] = obs["condition"].map({"A": "x", "B": "y"})
    obs["gappy"] = [None if number % 50 == 0 else name for number, name in enumerate(obs["donor"])]
    rare = np.flatnonzero(obs["condition"] == "B")[:5]
    obs["rare"] = ["r" if number in rare else "rest" for number in range(len(obs))]
    store = preprocess(
        cells.rna, cells.atac, folder, direction="atac2rna", reference="dataset", manually=True, force=True
    )["all"]
    pairs = folder / "pairs.csv"
    cells.pairs[["gene_id", "ccre"]].to_csv(pairs, index=False)
    types = obs["cell_type"].astype(str)
    types.to_csv(folder / "types.tsv", sep="\t", header=False)
    return store, types, pairs


def test_cell_types_are_compared_as_conditions_are(small, caplog):
    store, types, pairs = small
    groups = sorted(types.unique())
    found = compare_links(pairs, store, types, groups, donor="paired")
    assert set(found.table["cell_type"]) == {""}
    assert found.report["comparisons"][0]["paired"]
    assert (found.table["n_donors_a"] <= 4).all()
    back = compare_links(pairs, store, types, groups[::-1], donor="paired")
    np.testing.assert_allclose(found.table["effect"], -back.table["effect"])
    np.testing.assert_allclose(found.table["p_value"], back.table["p_value"])
    assert "cells are taken as replicates" not in caplog.text
    compare_links(pairs, store, types, groups)
    assert "cells are taken as replicates" in caplog.text


def test_conditions_may_be_numbers_and_donors_named_in_one_type(small):
    store, types, pairs = small
    name = types.iloc[0]
    found = compare_links(pairs, store, types, ("1", "2"), condition="dose", donor="donor", only=[name])
    same = compare_links(pairs, store, types, ("A", "B"), condition="condition", donor="donor")
    same = same.table[same.table["cell_type"] == name].reset_index(drop=True)
    same["group_a"], same["group_b"] = "1", "2"
    pd.testing.assert_frame_equal(found.table, same)


def test_table_figure_and_report_are_written(small, tmp_path, command):
    store, _, pairs = small
    given = ["-l", pairs, "-d", store.path, "-c", store.path.parent / "types.tsv", "--groups", "A", "B"]
    given += ["--condition", "condition", "--donor", "donor", "-o", tmp_path / "out"]
    done = command("compare_links", *given)
    assert done.returncode == 0, done.stderr
    assert "links tested" in done.stdout
    table = pd.read_csv(tmp_path / "out" / "contrast.tsv.gz", sep="\t")
    assert {"gene_id", "ccre", "effect", "effect_se", "p_value", "fdr", "coupling_a", "open_b"} <= set(table)
    assert table["p_value"].notna().any()
    assert (tmp_path / "out" / "volcano.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["format"] == "cisformer-contrast"
    assert report["comparisons"][0]["n_donors"] == [4, 4]
    again = command("compare_links", *given)
    assert again.returncode == 1
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    ("groups", "options", "complaint"),
    [
        (
            ("A", "C"),
            {"condition": "condition"},
            "no condition 'C' in the column 'condition'.*there are: A, B",
        ),
        (("A", "B"), {"condition": "treatment"}, "no column 'treatment'"),
        (("A", "B"), {}, "no cell type 'A'"),
        (("A", "A"), {"condition": "condition"}, "two different"),
        (("A", "B"), {"condition": "condition", "donor": "single"}, "need 2 in each group: 'A' has 1"),
        (("A", "B"), {"condition": "condition", "donor": "gappy"}, "'gappy' has no value for"),
        (("A", "B"), {"condition": "condition", "donor": "condition"}, "named twice"),
        (("A", "B"), {"condition": "condition", "only": ["Martian"]}, "no cell type 'Martian'"),
        (("r", "rest"), {"condition": "rare"}, "no link can be tested"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(small, groups, options, complaint):
    store, types, pairs = small
    with pytest.raises(InputError, match=complaint):
        compare_links(pairs, store, types, groups, **options)


def test_donors_are_told_of_by_cell_type_and_untested_types_together(small, caplog):
    store, types, pairs = small
    some = types.copy()
    some.iloc[np.flatnonzero(some == some.iloc[0])[:12]] = "few"
    found = compare_links(pairs, store, some, ("A", "B"), condition="condition", donor="half")
    assert f"cell type {types.iloc[0]!r}: both in both groups: too few for a paired test (3)" in caplog.text
    assert found.describe().splitlines()[-1] == "too few cells to test a link: few"
    assert sum("links tested" in line for line in found.describe().splitlines()) == types.nunique()


def test_a_smallest_score_above_all_is_said(tmp_path):
    folder = write_links(tmp_path / "cisformer_link")
    with pytest.raises(InputError, match=r"none of the \d+ links in .* has a score of at least 3"):
        read_candidates(folder, min_score=3)


def test_links_of_other_cells_are_refused(small, tmp_path):
    store, types, _ = small
    other = tmp_path / "other.tsv"
    other.write_text("gene\tpeak\tscore\nNOSUCH\tchr1:5-9\t0.9\n")
    with pytest.raises(InputError, match="none of the 1 links is of a gene and a cCRE"):
        compare_links(other, store, types, ("A", "B"), condition="condition")
    with pytest.raises(InputError, match=r"score of at least 0\.95"):
        compare_links(other, store, types, ("A", "B"), condition="condition", min_score=0.95)


def test_an_existing_result_is_not_overwritten(small, tmp_path):
    store, types, pairs = small
    found = compare_links(pairs, store, types, ("A", "B"), condition="condition")
    found.write(tmp_path / "out")
    with pytest.raises(OutputExistsError):
        found.write(tmp_path / "out")
    assert found.write(tmp_path / "out", force=True)[0].is_file()
