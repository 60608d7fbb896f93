"""Measure whether the prior of links stays calibrated where a data set holds other peaks, genes, types or depths.

    python benchmarks/links_shift.py DATA

DATA holds `crispr/`, `truth/` and `heme_bulk_14/`. The pairs are those of the K562 screens, each chromosome judged by a
prior that was fitted without it, to the features as they are. Then one thing is made otherwise, and nothing refitted.
Printed: AUPRC, the sum of probabilities over the number of links, and mean probability and share of links among the
tenth with the highest probability. Prints markdown.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from fit_link_prior import SCREENS, fit_prior
from link_truths import Blood, Truth, read_truths

from cisformer.data.reference import load_reference
from cisformer.links.precision import average_precision
from cisformer.links.prior import ACTIVITY_SCALE, UNKNOWN_BREADTH, expression_breadth
from cisformer.links.shared import COUNTS_OF_BREADTH
from cisformer.links.weights import probability

N_CELLS, PROMOTER_RATE = 1000, 0.012
"""Of the shallow data set; promoters in the mouse cortex set are open in so many cells."""
LYMPHOID, UNLIKE = ("B", "CD4", "CD8", "NK"), ("HSC", "Ery", "Mono", "CD4")


def other_peaks(features: pd.DataFrame, blood: Blood) -> dict[str, pd.DataFrame]:
    """Accessibility relative to the promoters of fewer peaks, and counted in few cells; by what is other."""
    rng = np.random.default_rng(0)
    activity = np.expm1(features["log_activity"].to_numpy()) / ACTIVITY_SCALE
    signal, promoter = blood.signal.mean(axis=0), blood.is_promoter(load_reference("human").genes)
    usual = signal[promoter].mean()
    kept = {
        "random tenth of the peaks": rng.random(len(signal)) < 0.1,
        "strongest half of the peaks": signal >= np.quantile(signal, 0.5),
        "strongest tenth of the peaks": signal >= np.quantile(signal, 0.9),
    }
    found = {name: activity * usual / signal[promoter & rows].mean() for name, rows in kept.items()}
    opened = rng.poisson(activity * N_CELLS * PROMOTER_RATE)
    found[f"{N_CELLS:,} cells, promoters open in {PROMOTER_RATE:.1%}"] = opened / (N_CELLS * PROMOTER_RATE)
    return {name: features.assign(log_activity=np.log1p(ACTIVITY_SCALE * one)) for name, one in found.items()}


def other_expression(data: Path, blood: Blood, screens: Truth) -> dict[str, pd.DataFrame]:
    """Breadth from fewer genes, types or counts; by what is other."""
    rng = np.random.default_rng(0)
    rna = anndata.read_h5ad(data / "heme_bulk_14" / "rna.h5ad")
    counts = rna.X.toarray().astype(float)
    share = counts / counts.sum(axis=1, keepdims=True)
    best = np.argsort(-share.mean(axis=0))[:5000]
    level = np.log2(1 + 1e6 * share / share[:, best].sum(axis=1, keepdims=True))
    shallow = np.stack([rng.multinomial(100_000, row) for row in share]).astype(float)
    trust = shallow.mean(axis=0) / (shallow.mean(axis=0) + COUNTS_OF_BREADTH)
    found = {
        "the 5,000 best expressed genes only": level.mean(axis=0) / np.maximum(level.max(axis=0), 1e-9),
        "100,000 counts a type": UNKNOWN_BREADTH + trust * (expression_breadth(shallow) - UNKNOWN_BREADTH),
        "one type": expression_breadth(share[:1]),
    }
    for name, types in (("four lymphoid types", LYMPHOID), ("four unlike types", UNLIKE)):
        found[name] = expression_breadth(share[[blood.names.index(one) for one in types]])
    genes = screens.pairs["gene"]
    return {
        name: screens.features.assign(breadth=replace(blood, breadth=breadth).breadth_of(genes))
        for name, breadth in found.items()
    }


def judged(truths: dict[str, Truth], sets: dict[str, pd.DataFrame]) -> dict[str, np.ndarray]:
    """Return log odds of the screens' pairs with other features, each from a prior without its chromosome; [E] each."""
    chrom = truths[SCREENS].pairs["chrom"].to_numpy()
    odds = {name: np.zeros(len(chrom)) for name in sets}
    for left_out in np.unique(chrom):
        prior, rows = fit_prior(truths, left_out), chrom == left_out
        for name, features in sets.items():
            odds[name][rows] = prior.log_odds(features[rows])
    return odds


def row(name: str, log_odds: np.ndarray, is_link: np.ndarray) -> str:
    """Return a row of the table."""
    predicted = probability(log_odds)
    top = np.argsort(predicted, kind="stable")[-len(predicted) // 10 :]
    return (
        f"| {name} | {average_precision(is_link, log_odds):.3f} | {predicted.sum() / is_link.sum():.2f} "
        f"| {predicted[top].mean():.3f} | {is_link[top].mean():.3f} |"
    )


def main() -> None:
    """Measure the screens as they are, and made otherwise."""
    data = Path(sys.argv[1])
    truths, blood = read_truths(data), Blood.read(data)
    screens = truths[SCREENS]
    sets = {"as fitted": screens.features}
    sets |= other_peaks(screens.features, blood) | other_expression(data, blood, screens)
    print(
        "| the data set has | AUPRC | predicted / links | top tenth: predicted | links |\n|---|---|---|---|---|"
    )
    for name, log_odds in judged(truths, sets).items():
        print(row(name, log_odds, screens.is_link))


if __name__ == "__main__":
    main()
