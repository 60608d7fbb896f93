"""Fit the prior of links to real experiments, and write `src/cisformer/resources/link_prior.json`.

    python scripts/fit_link_prior.py DATA

DATA holds `crispr/`, `truth/` and `heme_bulk_14/`. A logistic regression on the features of
`cisformer.links.prior` is fitted to CRISPRi screens in K562 and, with four tenths of their weight, to fine-mapped eQTL:
slopes are shared, each experiment has its own intercept. Then slope and intercept are fitted again to the screens
alone, so that the result is a probability there. Capture Hi-C is never fitted. Figures beside the weights are of
chromosomes left out in turn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from link_truths import Truth, read_truths
from sklearn.linear_model import LogisticRegression

from cisformer.links.precision import average_precision
from cisformer.links.prior import FEATURES, LinkPrior

PRIOR = Path(__file__).parents[1] / "src" / "cisformer" / "resources" / "link_prior.json"
SCREENS, EQTL = "CRISPRi K562", "eQTL"
SHARE_OF = {SCREENS: 1.0, EQTL: 0.4}
TOTAL_WEIGHT = 1000.0


def fit_prior(truths: dict[str, Truth], without: str = "", features: Sequence[str] = FEATURES) -> LinkPrior:
    """Fit the prior to all chromosomes but one."""
    kept = {name: (truths[name].pairs["chrom"] != without).to_numpy() for name in SHARE_OF}
    known = {name: truths[name].features[list(features)].to_numpy() for name in SHARE_OF}
    scale = known[SCREENS].std(axis=0)
    blocks, weight, target = [], [], []
    for number, (name, share) in enumerate(SHARE_OF.items()):
        rows = kept[name]
        own = np.zeros((rows.sum(), len(SHARE_OF)))
        own[:, number] = 10.0  # an intercept that the penalty hardly sees
        blocks.append(np.hstack([(known[name][rows] - known[name].mean(axis=0)) / scale, own]))
        weight.append(np.full(rows.sum(), share * TOTAL_WEIGHT / len(rows)))
        target.append(truths[name].is_link[rows])
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(np.vstack(blocks), np.concatenate(target), sample_weight=np.concatenate(weight))
    slopes = model.coef_[0, : len(features)] / scale
    line = known[SCREENS][kept[SCREENS]] @ slopes
    again = LogisticRegression(C=1e6).fit(line[:, None], truths[SCREENS].is_link[kept[SCREENS]])
    return LinkPrior(float(again.intercept_[0]), tuple((again.coef_[0, 0] * slopes).tolist()))


def left_out(truths: dict[str, Truth], name: str, features: Sequence[str] = FEATURES) -> np.ndarray:
    """Return the log odds of a truth's pairs, each from a prior that has not seen its chromosome; [E]."""
    truth = truths[name]
    known = truth.features[list(features)].to_numpy()
    result = np.zeros(len(known))
    for chrom in sorted(truth.pairs["chrom"].unique()):
        prior = fit_prior(truths, chrom, features)
        rows = (truth.pairs["chrom"] == chrom).to_numpy()
        result[rows] = prior.intercept + known[rows] @ np.array(prior.weights)
    return result


def reliability(probability: np.ndarray, is_link: np.ndarray) -> list[dict[str, float]]:
    """Return, by tenth of the pairs in order of their probability, its mean and the share of links."""
    parts = np.array_split(np.argsort(probability, kind="stable"), 10)
    return [
        {"predicted": round(float(probability[p].mean()), 4), "observed": round(float(is_link[p].mean()), 4)}
        for p in parts
    ]


def main() -> None:
    """Fit, measure, write."""
    truths = read_truths(Path(sys.argv[1]))
    prior = fit_prior(truths)
    odds = {name: left_out(truths, name) for name in truths}
    figures = {
        name: {
            "pairs": len(truth.pairs),
            "links": int(truth.is_link.sum()),
            "auprc": round(average_precision(truth.is_link, odds[name]), 3),
            "auprc of distance": round(average_precision(truth.is_link, truth.scores["distance"]), 3),
        }
        for name, truth in truths.items()
    }
    screens = truths[SCREENS]
    table = {
        "intercept": round(prior.intercept, 4),
        "weights": dict(zip(FEATURES, (round(w, 4) for w in prior.weights), strict=True)),
        "fitted to": SHARE_OF,
        "chromosomes left out": figures,
        "reliability in the screens": reliability(1 / (1 + np.exp(-odds[SCREENS])), screens.is_link),
    }
    PRIOR.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(PRIOR.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
