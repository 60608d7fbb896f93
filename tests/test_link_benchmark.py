"""Scoring of links against scikit-learn, and against the CRISPRi benchmark's known figure."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score

from cisformer.data.reference import Reference
from cisformer.errors import InputError
from cisformer.links.benchmark import evaluate_links
from cisformer.links.precision import RECALLS, average_precision, bootstrap_interval, enrichment
from cisformer.links.truth import match_scores, read_truth


def screen() -> pd.DataFrame:
    """Pairs of a screen: near ones are links more often, and an informative score."""
    n, rng = 400, np.random.default_rng(0)
    start = rng.integers(0, 1_000_000, n) * 500  # no two overlap
    distance = rng.integers(100, 400_000, n)
    is_link = rng.random(n) < 0.5 * np.exp(-distance / 50_000) + 0.03
    return pd.DataFrame(
        {
            "chrom": "chr1", "chromStart": start, "chromEnd": start + 400,
            "measuredGeneSymbol": rng.choice(list("ABCDE"), n), "Regulated": is_link, "distanceToTSS": distance,
            "DHS.RPM": rng.random(n), "score": is_link + rng.normal(0, 1, n),
        }
    )  # fmt: skip


@pytest.fixture
def files(tmp_path):
    table = screen()
    table.drop(columns="score").to_csv(tmp_path / "truth.tsv", sep="\t", index=False)
    links = table.rename(columns={"chromStart": "start", "chromEnd": "end", "measuredGeneSymbol": "gene"})
    links[["chrom", "start", "end", "gene", "score"]].sample(frac=1, random_state=0).to_csv(
        tmp_path / "links.tsv", sep="\t", index=False
    )
    return table, tmp_path / "links.tsv", tmp_path / "truth.tsv"


def test_average_precision_is_scikit_learns():
    rng = np.random.default_rng(0)
    for decimals in (8, 1, 0):
        truth, score = rng.random(200) < 0.2, np.round(rng.normal(size=200), decimals)
        assert average_precision(truth, score) == pytest.approx(average_precision_score(truth, score))
    assert np.isnan(average_precision(np.zeros(3, bool), np.arange(3.0)))


def test_scores_and_baselines(files):
    table, links, truth = files
    result = evaluate_links(links, truth, n_bootstrap=50)
    is_link = table["Regulated"]
    assert result.auprc("score") == pytest.approx(average_precision_score(is_link, table["score"]))
    assert result.auprc("distance") == pytest.approx(
        average_precision_score(is_link, -table["distanceToTSS"])
    )
    near = table["distanceToTSS"] < 10_000
    assert result.auprc("score", "0-10 kb") == pytest.approx(
        average_precision_score(is_link[near], table["score"][near])
    )
    assert {"nearest gene", "activity/distance"} <= set(result.table["method"])
    assert result.coverage == {
        "pairs": 400,
        "links": is_link.sum(),
        "pairs_scored": 400,
        "links_scored": is_link.sum(),
    }
    for score in result.scores:
        assert np.isnan(score.low) or score.low <= score.auprc <= score.high
    assert "distance" in result.describe()


def test_pairs_without_a_score_rank_last_and_are_counted(files, tmp_path):
    table, links, truth = files
    half = pd.read_csv(links, sep="\t").iloc[:200]
    half.to_csv(tmp_path / "half.tsv", sep="\t", index=False)
    result = evaluate_links(tmp_path / "half.tsv", truth, n_bootstrap=0)
    assert result.coverage["pairs_scored"] == 200
    assert result.coverage["links_scored"] < result.coverage["links"]
    place = table.set_index(["chromStart", "measuredGeneSymbol"]).index
    scored = place.isin(half.set_index(["start", "gene"]).index)
    worst = np.where(scored, table["score"], -99)
    assert result.auprc("score") == pytest.approx(average_precision_score(table["Regulated"], worst))


def test_a_frame_scores_as_its_file_does(files):
    _, links, truth = files
    frame = pd.read_csv(links, sep="\t").set_index("gene", drop=False)
    assert (
        evaluate_links(frame, truth, n_bootstrap=5).scores
        == evaluate_links(links, truth, n_bootstrap=5).scores
    )


def test_a_distance_without_links_is_said_to_have_none(files):
    table, links, truth = files
    table[~((table["distanceToTSS"] > 250_000) & table["Regulated"])].to_csv(truth, sep="\t", index=False)
    text = evaluate_links(links, truth, n_bootstrap=5).describe()
    assert "no links" in text
    assert "nan" not in text


def test_overlap_and_gene_decide_which_score_counts():
    pairs = pd.DataFrame(
        {"chrom": "chr1", "start": [100, 100, 900], "end": [200, 200, 950], "gene": ["A", "B", "A"]}
    )
    predicted = pd.DataFrame(
        {
            "chrom": ["chr1", "chr1", "chr1", "chr2"], "start": [150, 199, 200, 100], "end": [160, 260, 300, 200],
            "gene": ["A", "A", "A", "B"], "score": [1.0, 3.0, 9.0, 9.0],
        }
    )  # fmt: skip
    found = match_scores(pairs, predicted)
    assert found[0] == 3
    assert np.isnan(found[1:]).all()


def test_enrichment_at_full_recall_by_hand():
    truth = np.array([1, 0, 1, 0, 0, 0, 0, 0], bool)
    curve = dict(zip(RECALLS, enrichment(truth, np.arange(8.0)[::-1]), strict=True))
    assert curve[0.5] == pytest.approx(1 / 0.25)
    assert curve[1.0] == pytest.approx((2 / 3) / 0.25)


def test_interval_draws_genes():
    rng = np.random.default_rng(0)
    truth, score = rng.random(300) < 0.3, rng.normal(size=300)
    one_gene = bootstrap_interval(truth, score, np.zeros(300, int), 20, 0)
    assert one_gene[0] == pytest.approx(one_gene[1])  # drawing the only gene again is the same set
    low, high = bootstrap_interval(truth, score, np.arange(300), 200, 0)
    assert low < average_precision(truth, score) < high


def test_links_only_as_truth(tiny_files, tmp_path):
    """Every other pair of the same genes is no link; links that the table lacks are counted as missed."""
    truth = pd.read_csv(tiny_files / "true_links.tsv", sep="\t").drop_duplicates(["gene_id", "ccre"])
    genes = truth["gene_id"].unique()[:10]
    truth[truth["gene_id"].isin(genes)].to_csv(tmp_path / "truth.tsv", sep="\t", index=False)
    wanted = truth[truth["gene_id"].isin(genes)]
    kept = wanted.iloc[1:]
    decoys = pd.DataFrame({"gene_id": genes[0], "ccre": ["chr22:1-2", "chr22:5-6"], "distance": [5, 6]})
    strange = pd.DataFrame({"gene_id": ["other"], "ccre": ["chr22:9-10"], "distance": [7]})
    table = pd.concat([kept[["gene_id", "ccre", "distance"]].assign(score=1.0), decoys.assign(score=0.0),
                       strange.assign(score=5.0)])  # fmt: skip
    table.assign(gene_name=table["gene_id"]).to_csv(tmp_path / "links.tsv", sep="\t", index=False)
    result = evaluate_links(tmp_path / "links.tsv", tmp_path / "truth.tsv", n_bootstrap=0)
    assert result.coverage["links"] == len(wanted)
    assert result.coverage["pairs"] == len(wanted) + 2
    assert result.coverage["links_scored"] == len(kept)


def test_eqtl_truth(tmp_path):
    path = tmp_path / "eqtl.tsv"
    pd.DataFrame(
        {"variant_id": ["chr1_101_A_C", "1_500_G_T"], "gene_name": ["A", "A"], "pip": [0.9, 0.01]}
    ).to_csv(path, sep="\t", index=False)
    table = read_truth(path).table
    assert table[["chrom", "start", "end", "is_link"]].to_numpy().tolist() == [
        ["chr1", 100, 101, True],
        ["chr1", 499, 500, False],
    ]


def test_distance_from_a_reference(tmp_path):
    genes = pd.DataFrame(
        {
            "gene_id": ["E1"],
            "gene_name": ["A"],
            "chrom": ["chr1"],
            "start": [1000],
            "end": [2000],
            "strand": ["-"],
        }
    )
    ccres = pd.DataFrame({"chrom": ["chr1"], "start": [0], "end": [10]})
    pairs = pd.DataFrame(
        {
            "chrom": "chr1",
            "start": [2000, 5000, 9000],
            "end": [2100, 5100, 9100],
            "gene": "A",
            "label": [1, 0, 0],
        }
    )
    pairs.to_csv(tmp_path / "truth.tsv", sep="\t", index=False)
    reference = Reference("x", "", genes, ccres)
    result = evaluate_links(None, tmp_path / "truth.tsv", reference=reference, n_bootstrap=0)
    assert result.auprc("distance") == 1
    far = evaluate_links(None, tmp_path / "truth.tsv", reference=reference, n_bootstrap=0, min_distance_bp=0)
    assert far.coverage["pairs"] == 3
    with pytest.raises(InputError, match="nothing to tell apart"):
        evaluate_links(None, tmp_path / "truth.tsv", reference=reference, min_distance_bp=1_000)


def test_written_result(files, tmp_path):
    _, links, truth = files
    result = evaluate_links(links, truth, n_bootstrap=5)
    result.write(tmp_path / "r.json")
    stored = json.loads((tmp_path / "r.json").read_text())
    assert stored["coverage"]["pairs"] == 400
    assert stored["scores"][0]["auprc"] == result.auprc("score")


def test_bad_truth(tmp_path, files):
    path = tmp_path / "t.tsv"
    path.write_text("chrom\tstart\tend\tgene\tlabel\nchr1\t1\t2\tA\tmaybe\n")
    with pytest.raises(InputError, match="'maybe'"):
        read_truth(path)
    path.write_text("chrom\tstart\tend\nchr1\t1\t2\n")
    with pytest.raises(InputError, match="no column for a gene"):
        read_truth(path)
    with pytest.raises(InputError, match="no cell type 'B'"):
        evaluate_links(files[1], files[2], cell_type="B")
    (tmp_path / "a.bedpe").write_text("chr1\t1\t2\tchr1\t5\t6\tA|x\t1\n")
    with pytest.raises(InputError, match="holds links only"):
        evaluate_links(None, tmp_path / "a.bedpe")


def test_crispri_benchmark(shared):
    """Distance alone has the average precision that the benchmark's own column gives."""
    truth = shared / "data/crispr/EPCrisprBenchmark_combined_data.training_K562.GRCh38.tsv.gz"
    result = evaluate_links(None, truth, n_bootstrap=0)
    assert result.coverage["pairs"] == 10_356
    assert result.coverage["links"] == 471
    assert result.auprc("distance") == pytest.approx(0.438, abs=0.005)
    assert result.auprc("activity/distance") > result.auprc("distance")


def spelled(table: pd.DataFrame, **changes) -> pd.DataFrame:
    return table.assign(**{name: table[name].map(change) for name, change in changes.items()})


@pytest.mark.parametrize(
    "change",
    [
        {"chrom": lambda c: c.removeprefix("chr")},
        {"gene": lambda g: g.lower()},
        {"gene": lambda g: f"{g}|cell type"},
        {"gene": lambda g: f"ENSG0000000000{ord(g)}.7"},
        {"gene": lambda g: f"ENSG0000000000{ord(g)}"},
    ],
)
def test_spelling_of_chromosomes_and_genes_does_not_matter(files, tmp_path, change):
    table, links, truth = files
    wanted = evaluate_links(links, truth, n_bootstrap=0).auprc("score")
    ids = table["measuredGeneSymbol"].map(lambda g: f"ENSG0000000000{ord(g)}.12")
    table.drop(columns="score").assign(measuredGeneEnsemblId=ids).to_csv(truth, sep="\t", index=False)
    spelled(pd.read_csv(links, sep="\t"), **change).to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    assert evaluate_links(tmp_path / "x.tsv", truth, n_bootstrap=0).auprc("score") == pytest.approx(wanted)


def test_hash_before_the_header_and_names_that_mean_nothing(files, tmp_path):
    table, links, truth = files
    wanted = evaluate_links(links, truth, n_bootstrap=0).auprc("score")
    renamed = pd.read_csv(links, sep="\t").rename(columns={"chrom": "#chr"})
    spelled(renamed, gene=lambda g: "NA" if g == "A" else g).to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    other = table.drop(columns="score").rename(columns={"chrom": "#chrom"})
    spelled(other, measuredGeneSymbol=lambda g: "NA" if g == "A" else g).to_csv(truth, sep="\t", index=False)
    found = evaluate_links(tmp_path / "x.tsv", truth, n_bootstrap=0)
    assert found.auprc("score") == pytest.approx(wanted)
    assert found.coverage["pairs_scored"] == 400


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"gene": lambda g: "X" + g}, "0 genes and 1 chrom"),
        ({"chrom": lambda c: "chr7"}, "5 genes and 0 chrom"),
    ],
)
def test_nothing_in_common_is_an_error(files, tmp_path, change, wanted):
    _, links, truth = files
    spelled(pd.read_csv(links, sep="\t"), **change).to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    with pytest.raises(InputError, match=wanted) as error:
        evaluate_links(tmp_path / "x.tsv", truth)
    assert error.value.hint
    only = pd.read_csv(truth, sep="\t").query("Regulated").drop(columns="Regulated")
    only.to_csv(tmp_path / "open.tsv", sep="\t", index=False)
    with pytest.raises(InputError, match="in common"):
        evaluate_links(tmp_path / "x.tsv", tmp_path / "open.tsv")


def test_written_result_is_json(files, tmp_path):
    table, links, truth = files
    table[~((table["distanceToTSS"] > 250_000) & table["Regulated"])].to_csv(truth, sep="\t", index=False)
    evaluate_links(links, truth, n_bootstrap=5).write(tmp_path / "x.json")

    def refuse(text):
        raise AssertionError(text)

    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert any(score["auprc"] is None for score in read["scores"])
