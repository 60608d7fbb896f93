"""Measure the prior of links, and correlation beside it, against real experiments.

    python benchmarks/links_real.py DATA

DATA holds `crispr/`, `truth/` and `heme_bulk_14/`. Printed, with 95 % intervals (genes drawn anew):

- *score as shipped*: the prior, for each chromosome fitted without it (screens and eQTL; capture Hi-C is never fitted),
  and, where there are populations to correlate over, correlation with a weight estimated as in `atac2rna_link`;
- *features refitted*: a logistic regression on the truth itself, chromosomes left out in turn;
- distance, the nearest gene, accessibility, accessibility × contact, and scores of other tools.

Capture Hi-C is counted by tile, gene and cell type, and again with each tile and gene once.

Differences are of paired draws. Prints markdown.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from fit_link_prior import EQTL, SCREENS, left_out, reliability
from link_truths import Blood, Truth, blood_correlation, capture_in_any_type, read_truths

from cisformer.data.reference import load_reference
from cisformer.links.precision import average_precision, bootstrap_interval
from cisformer.links.prior import FEATURES
from cisformer.links.weights import Evidence, estimate_weights, exchange_genes, probability

N_DRAWS = 500
CAPTURE, CAPTURE_IN_ANY = "capture Hi-C", "capture Hi-C, any type"


def refitted(truth: Truth, features: pd.DataFrame) -> np.ndarray:
    """Return log odds of a logistic regression, each chromosome's from the others; [E]."""
    known = features.to_numpy()
    known = (known - known.mean(axis=0)) / known.std(axis=0)
    chrom, result = truth.pairs["chrom"].to_numpy(), np.zeros(len(known))
    for name in np.unique(chrom):
        own = chrom == name
        model = LogisticRegression(max_iter=1000).fit(known[~own], truth.is_link[~own])
        result[own] = model.decision_function(known[own])
    return result


def with_correlation(truth: Truth, blood: Blood, prior: np.ndarray) -> np.ndarray:
    """Add correlation over populations to log odds, with the weight that the data give it."""
    names = truth.pairs["gene"].unique()
    own = pd.Series(np.arange(len(names)), names).reindex(truth.pairs["gene"]).to_numpy()
    level = blood.level[:, blood.gene.reindex(names)].mean(axis=0)
    chrom = truth.pairs.groupby("gene")["chrom"].first().reindex(names).to_numpy()
    partner = pd.Series(names[exchange_genes(chrom, level, np.random.default_rng(0))][own])
    exchanged = blood_correlation(blood, partner, truth.pairs["peak"].to_numpy())
    power = np.ones(len(prior))
    found = truth.scores["correlation"]
    evidence = Evidence(probability(prior), found, exchanged, np.zeros(len(prior)), power)
    weights = estimate_weights(evidence)
    print(f"weight of correlation in {truth.name}: {weights.of_association(power)[0]:.2f} per unit of r")
    return prior + weights.log_odds(found, np.zeros(len(prior)), power)


def difference(truth: Truth, left: np.ndarray, right: np.ndarray, gene: np.ndarray) -> str:
    """Return the 95 % interval of the difference of two average precisions, genes drawn anew."""
    rng = np.random.default_rng(0)
    rows_of = list(pd.Series(np.arange(len(gene))).groupby(gene).indices.values())
    drawn = []
    for _ in range(N_DRAWS):
        rows = np.concatenate([rows_of[i] for i in rng.integers(0, len(rows_of), len(rows_of))])
        drawn.append(
            average_precision(truth.is_link[rows], left[rows])
            - average_precision(truth.is_link[rows], right[rows])
        )
    low, high = np.percentile(drawn, [2.5, 97.5])
    return f"{low:+.3f} to {high:+.3f}"


def report(truth: Truth, scores: dict[str, np.ndarray]) -> None:
    """Print a table: average precision, interval, and how far the first score and the refitted one are above each."""
    gene = pd.factorize(truth.pairs["gene"])[0]
    first, again = next(iter(scores.values())), scores["features refitted"]
    print(f"\n### {truth.name}: {len(gene):,} pairs, {truth.is_link.mean():.1%} links\n")
    print(
        "| by | AUPRC | 95 % | score as shipped less this | features refitted less this |\n|---|---|---|---|---|"
    )
    for name, values in scores.items():
        area = average_precision(truth.is_link, values)
        low, high = bootstrap_interval(truth.is_link, values, gene, N_DRAWS, 0)
        less = ["" if values is one else difference(truth, one, values, gene) for one in (first, again)]
        print(f"| {name} | {area:.3f} | {low:.3f}–{high:.3f} | {' | '.join(less)} |")


def encode_re2g(data: Path, truth: Truth, shipped: np.ndarray) -> None:
    """Print the screens' pairs of chromosome 22 by ENCODE-rE2G's own score, and ours on the same pairs."""
    from cisformer.data.genome import overlap_pairs

    table = pd.read_csv(data / "truth" / "encode_re2g_k562_chr22_hg38.tsv.gz", sep="\t")
    own = np.flatnonzero(truth.pairs["chrom"] == "chr22")
    pairs = truth.pairs.iloc[own]
    left, right = overlap_pairs(pairs[["chrom", "start", "end"]], table[["chrom", "start", "end"]])
    same = pairs["gene"].to_numpy()[left] == table["gene"].to_numpy()[right]
    found = np.zeros(len(own))
    np.maximum.at(found, left[same], table["score"].to_numpy()[right[same]])
    is_link = truth.is_link[own]
    print(
        f"\nchromosome 22 only, {len(own)} pairs, {is_link.sum()} links: ENCODE-rE2G (more assays) ", end=""
    )
    print(f"{average_precision(is_link, found):.3f}, ours {average_precision(is_link, shipped[own]):.3f}")


def main() -> None:
    """Measure all truths."""
    data = Path(sys.argv[1])
    truths, blood = read_truths(data), Blood.read(data)
    truths[CAPTURE_IN_ANY] = capture_in_any_type(data, load_reference("human"), blood)
    odds = {name: left_out(truths, name) for name in truths}
    screens = truths[SCREENS]
    flagged = screens.features.assign(breadth=screens.pairs["ubiquitous"])
    without = screens.features.drop(columns="breadth")
    print("\nreliability in the screens, chromosomes left out (predicted, observed by tenth): ", end="")
    tenths = reliability(probability(odds[SCREENS]), screens.is_link)
    print(", ".join(f"{t['predicted']:.3f} {t['observed']:.3f}" for t in tenths))
    own = {
        "score as shipped": odds[SCREENS],
        "features refitted": refitted(screens, screens.features),
        "features refitted, the table's ubiquitous-expression flag as breadth": refitted(screens, flagged),
        "features refitted, without breadth": refitted(screens, without),
    }
    report(screens, own | screens.scores)
    far = (screens.pairs["distance"] > 10_000).to_numpy()
    beyond = Truth(f"{SCREENS} beyond 10 kb", screens.pairs[far], screens.features[far], {})
    report(beyond, {name: values[far] for name, values in (own | screens.scores).items()})
    encode_re2g(data, screens, odds[SCREENS])
    for name in (EQTL, CAPTURE, CAPTURE_IN_ANY):
        truth = truths[name]
        more = truth.features.assign(correlation=truth.scores["correlation"])
        own = {
            "score as shipped": with_correlation(truth, blood, odds[name]),
            "prior alone": odds[name],
            "features refitted": refitted(truth, truth.features[list(FEATURES)]),
            "features and correlation refitted": refitted(truth, more),
        }
        report(truth, own | truth.scores)


if __name__ == "__main__":
    main()
