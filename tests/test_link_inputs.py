"""Options, covariates and donors of links: what is taken, and what is refused by name."""

from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cisformer.errors import InputError
from cisformer.links.inputs import (
    LinkKeywords,
    LinkOptions,
    check_design,
    design_of,
    donors_of,
    read_genes,
)
from cisformer.links.measure import donor_p_value


def table(**columns) -> SimpleNamespace:
    info = pd.DataFrame(columns)
    return SimpleNamespace(cell_info=info, n_cells=len(info), path="cells")


def test_few_integers_are_categories_and_others_numbers():
    rng = np.random.default_rng(0)
    cells = table(batch=[1, 2, 3] * 20, age=rng.permutation(60), dose=rng.random(60), sex=["f", "m"] * 30)
    assert design_of(cells, ["batch"]).shape == (60, 2)
    assert set(np.unique(design_of(cells, ["batch"]))) == {0, 1}
    assert design_of(cells, ["age"]).shape == (60, 1)
    assert design_of(cells, ["dose", "sex"]).shape == (60, 2)
    assert design_of(cells, []).shape == (60, 0)


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        ([1.0, np.nan, 2.0, 3.0], "column 'x' has no value for 1 of 4 cells"),
        (["a", None, "b", "b"], "column 'x' has no value for 1 of 4 cells"),
        (["a", "b", "c", "d"], "column 'x' has 4 values in 4 cells"),
    ],
)
def test_unusable_columns_are_named(column, wanted):
    with pytest.raises(InputError, match=wanted) as error:
        design_of(table(x=column), ["x"])
    assert error.value.hint


def test_two_donors_are_too_few():
    assert donors_of(table(donor=["b", "a", "c", "a"]), "donor").tolist() == [1, 0, 2, 0]
    with pytest.raises(InputError, match="names 2 donors"):
        donors_of(table(donor=["b", "a", "b", "a"]), "donor")
    with pytest.raises(InputError, match="no column 'who'"):
        donors_of(table(donor=["b", "a", "c", "a"]), "who")


def test_donor_test_is_the_t_test_over_donors():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(5, 400))
    z[0, :100] = np.nan
    z[:3, 100:110] = np.nan
    found = donor_p_value(z)
    assert np.allclose(found[110:], stats.ttest_1samp(z[:, 110:], 0).pvalue)
    assert np.allclose(found[:100], stats.ttest_1samp(z[1:, :100], 0).pvalue)
    assert np.isnan(found[100:110]).all()


def test_donor_effects_do_not_pass_for_links():
    """Donors differ in z beyond chance: pooled cells call that significant, donors as replicates do not."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=(6, 5000)) + rng.normal(0, 2, (6, 5000))
    p = donor_p_value(z)
    assert stats.kstest(p, "uniform").statistic < 0.03
    assert np.mean(2 * stats.norm.sf(np.abs(z.sum(axis=0)) / 6**0.5) < 0.05) > 0.3


def test_options_check_themselves():
    for wrong in (
        {"window_bp": 0},
        {"max_cells": 0},
        {"region": "chr1"},
        {"donor": "d", "covariates": ("d",)},
        {"genes": "GATA1"},
        {"covariates": "batch"},
    ):
        with pytest.raises(InputError):
            LinkOptions(**wrong)


def test_keywords_are_the_options():
    assert get_type_hints(LinkKeywords) == get_type_hints(LinkOptions)


def test_genes_from_a_file_or_a_text(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("GATA1\n\n TP53 \nGATA1\n")
    assert read_genes(path) == read_genes(str(path)) == ("GATA1", "TP53")
    assert read_genes("A,B, C") == ("A", "B", "C")
    assert read_genes(["A", "B"]) == ("A", "B")


def test_saturated_designs_are_refused(caplog):
    design = np.eye(12)[:, :9]
    with pytest.raises(InputError, match="no cell type has enough cells"):
        check_design(design, {"a": np.arange(6), "b": np.arange(6, 12)}, ["batch"])
    few = np.zeros((40, 1))
    few[::2] = 1
    check_design(few, {"a": np.arange(4), "b": np.arange(4, 40), "none": np.arange(0)}, ["batch"])
    assert "'a' has too few cells" in caplog.text
    assert "'b'" not in caplog.text
