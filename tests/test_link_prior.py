"""The prior: features by hand, signs of weights, and how it does in real screens."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cisformer.links.prior import (
    FEATURES,
    UNKNOWN_BREADTH,
    count_between,
    count_near,
    expression_breadth,
    is_noncoding,
    load_prior,
    pair_features,
    relative_activity,
)

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def genes() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "gene_name": ["A", "B", "LINC00001", "C", "D"],
            "chrom": ["chr1", "chr1", "chr1", "chr2", "chr1"],
            "start": [100, 500, 600, 550, -1], "end": [200, 700, 800, 900, -1], "strand": ["+", "-", "+", "+", "+"],
        }
    )  # fmt: skip


def test_genes_between_are_counted_strictly_and_by_tss(genes):
    chrom = np.array(["chr1", "chr1", "chr1", "chr2", "chr9"])
    left, right = np.array([0, 100, 2000, 0, 0]), np.array([1000, 699, 50, 1000, 1000])
    assert count_between(genes, chrom, left, right).tolist() == [2, 0, 2, 1, 0]


def test_noncoding_names():
    names = pd.Series(
        ["TP53", "LINC01234", "AC012345.1", "MIR21", "GATA1", "HOXA-AS2", "Gm1234", "1700001C02Rik"]
    )
    assert is_noncoding(names).tolist() == [False, True, True, True, False, True, True, True]


def test_genes_near_count_the_gene_itself(genes):
    chrom, site = np.array(["chr1", "chr1", "chr2", "chr9"]), np.array([100, 99_000, 550, 550])
    assert count_near(genes, chrom, site).tolist() == [2, 2, 1, 0]
    assert count_near(genes, chrom[:1], np.array([100_699])).tolist() == [0]


def test_breadth_by_hand():
    expression = np.array([[5e5, 5e5, 0], [1e6, 0, 0]])
    first = (np.log2(1 + 5e5) + np.log2(1 + 1e6)) / 2 / np.log2(1 + 1e6)
    assert np.allclose(expression_breadth(expression), [first, 0.5, UNKNOWN_BREADTH])
    assert np.array_equal(expression_breadth(expression[:1]), np.full(3, UNKNOWN_BREADTH))


def test_breadth_does_not_depend_on_which_genes_the_data_hold():
    """A rank among the data's genes did: with well expressed genes alone, half of them seemed narrow."""
    rng = np.random.default_rng(0)
    level = rng.gamma(2, 5_000, (4, 100)) * (rng.random((4, 100)) < np.linspace(0.2, 1, 100))
    level *= 1e6 / level.sum(axis=1, keepdims=True)
    broad = np.arange(100) >= 70
    some = np.column_stack([level[:, broad], 1e6 - level[:, broad].sum(axis=1)])  # the same depth
    assert np.allclose(expression_breadth(some)[:-1], expression_breadth(level)[broad])


def test_activity_is_relative_to_promoters():
    rate = np.array([0.1, 0.4, 0.2, 0.0])
    assert np.allclose(relative_activity(rate, np.array([False, True, True, False])), rate / 0.3)
    assert relative_activity(rate, np.zeros(4, bool)).max() == 1
    assert not relative_activity(np.zeros(3), np.zeros(3, bool)).any()


def test_weights_have_the_signs_of_biology():
    weights = dict(zip(FEATURES, load_prior().weights, strict=True))
    assert weights.pop("log_activity") > 0
    assert all(weight < 0 for weight in weights.values())


def test_log_odds_are_linear():
    prior = load_prior()
    features = pair_features(*(np.array([value, value]) for value in (1e4, 0.2, 3, 0.5, 1.0)))
    by_hand = prior.intercept + features.to_numpy() @ np.array(prior.weights)
    assert np.allclose(prior.log_odds(features), by_hand)


def test_figures_stand_beside_the_weights():
    text = resources.files("cisformer.resources").joinpath("link_prior.json").read_text(encoding="utf-8")
    table = json.loads(text)
    screens = table["chromosomes left out"]["CRISPRi K562"]
    assert screens["auprc"] >= 0.55
    assert screens["auprc"] > screens["auprc of distance"] + 0.1
    for tenth in table["reliability in the screens"]:
        assert abs(tenth["predicted"] - tenth["observed"]) <= 0.05


def test_the_script_makes_the_shipped_table(shared, tmp_path):
    """The weights are what the script fits to the tables, to the last digit."""
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import fit_link_prior as f\nfrom pathlib import Path\n"
        f"f.PRIOR = Path({str(tmp_path / 'prior.json')!r})\nsys.argv = ['x', {str(shared / 'data')!r}]\nf.main()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    made = json.loads((tmp_path / "prior.json").read_text(encoding="utf-8"))
    shipped = load_prior()
    assert made["intercept"] == pytest.approx(shipped.intercept, abs=0.01)
    assert list(made["weights"].values()) == pytest.approx(list(shipped.weights), abs=0.01)
