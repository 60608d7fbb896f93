"""Measure links on cells of generators that nobody tuned on; `unlike_cells.py` says how these work.

    python benchmarks/links_unlike.py WORK --seeds 2 3 [--kinds tree factors]
    python benchmarks/links_unlike.py WORK --seeds 2 3 --null

One row for each kind and seed, 2,000 cells × 2,000 genes × 22,000 peaks, models the closed-form start. Pairs and
methods are those of `links.py`; a repressing link is no link there, and has its own columns. `--null`: p-values where
nothing is linked, with three types, twice the depth and twice the nuisance, with and without covariates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from links import inflation, judged_methods, mark_links, told_apart, trained
from unlike_cells import Kind, generate

from cisformer.links.files import Links
from cisformer.links.precision import average_precision
from cisformer.links.score import score_links

KINDS = {
    "tree": Kind(False),
    "tree, mouse, dense": Kind(False, "mouse", depth=3.0, coupling=0.05),
    "tree, sparse, nuisance": Kind(False, depth=0.25, nuisance=1.0),
    "factors": Kind(True, repressors=0.15),
    "factors, 12 types, nuisance": Kind(True, n_types=12, unequal=True, nuisance=1.0, repressors=0.15),
    "factors, one type": Kind(True, n_types=1, coupling=0.05),
}
NULL = Kind(True, n_types=3, depth=2.0, nuisance=2.0, housekeeping=1.0)
SIMPLE = ("distance", "Pearson", "Pearson × (d + 5 kb)^-0.7", "accessibility × contact")
SHOWN = (*SIMPLE, "association", "prior", "told the truth", "score")
COLUMNS = (
    *("cells", "seed", "pairs", "linked", *SHOWN, "/ best simple", "/ told", "top tenth: score, links"),
    "type told by specificity, expression, accessibility × contact",
    *("mean score of activating, repressing, none", "association < 0", "effect > 0"),
)
NULL_COLUMNS = ("seed", "covariates", "tested", "λ", "p < .05, over .05", "< .001", "< .0001", "fdr < .05")
COVARIATES = {
    "none": {},
    "batch": {"covariates": ("batch",)},
    "batch, cycle": {"covariates": ("batch", "s", "g2m")},
    "batches as donors": {"donor": "batch"},
}


def row(work: Path, name: str, seed: int) -> str:
    """Return a row of the table of found links."""
    cells, repressors = generate(KINDS[name], seed)
    store, checkpoint = trained(cells, work / f"{name} {seed}", 0)
    links = score_links(checkpoint, store, cells.rna.obs["cell_type"].astype(str))
    pairs, methods = judged_methods(cells, links)
    is_link = pairs["is_link"].to_numpy()
    areas = {one: average_precision(is_link, methods[one].to_numpy(float)) for one in SHOWN}
    top = pairs["score"] >= pairs["score"].quantile(0.9)
    values = [f"{len(pairs):,}", f"{is_link.mean():.1%}", *(f"{area:.3f}" for area in areas.values())]
    values += [
        f"{areas['score'] / max(areas[one] for one in SIMPLE):.2f}",
        f"{areas['score'] / areas['told the truth']:.2f}",
    ]
    values += [f"{pairs['score'][top].mean():.2f}, {is_link[top].mean():.2f}", types_told(cells, links)]
    return " | ".join([name, str(seed), *values, negative(pairs, repressors)])


def types_told(cells, links: Links) -> str:
    """Return how well the type in which a link works is told by specificity, expression and accessibility."""
    if len(links.cell_num) == 1:
        return ""
    areas = (told_apart(cells, links, name)[0] for name in ("specificity", "expression", "activity_contact"))
    return ", ".join(f"{area:.2f}" for area in areas)


def negative(pairs: pd.DataFrame, repressors: pd.DataFrame) -> str:
    """Return mean scores of activating, repressing and no links; and how many of the first two seem to repress:

    association < 0, and effect > 0 (expression rises when the cCRE is closed).
    """
    if len(repressors) == 0:
        return " | | "
    represses = mark_links(pairs, repressors)["is_link"]
    groups = (pairs["is_link"], represses, ~pairs["is_link"] & ~represses)
    values = [", ".join(f"{pairs['score'][group].mean():.2f}" for group in groups)]
    for says in (pairs["association"] < 0, pairs["effect"] > 0):
        values.append(", ".join(f"{says[group].mean():.0%}" for group in groups[:2]))
    return " | ".join(values)


def null_rows(work: Path, seed: int) -> list[str]:
    """Return rows of the table of p-values where nothing is linked."""
    cells, _ = generate(NULL, seed)
    store, checkpoint = trained(cells, work / f"null {seed}", 0)
    rows = []
    for label, options in COVARIATES.items():
        table = score_links(checkpoint, store, cells.rna.obs["cell_type"].astype(str), **options).table
        table = table[table["p_value"].notna() & (table["distance"].abs() > 500)]
        p = table["p_value"]
        shares = [f"{(p < level).mean() / level:.2f}" for level in (0.05, 1e-3, 1e-4)]
        rows.append(
            " | ".join(
                [
                    str(seed),
                    label,
                    f"{len(p):,}",
                    f"{inflation(p):.3f}",
                    *shares,
                    str((table["fdr"] < 0.05).sum()),
                ]
            )
        )
    return rows


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--null", action="store_true")
    given = parser.parse_args()
    columns = NULL_COLUMNS if given.null else COLUMNS
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for kind in ["null"] if given.null else given.kinds:
        for seed in given.seeds:
            rows = null_rows(given.work, seed) if given.null else [row(given.work, kind, seed)]
            print("\n".join(f"| {one} |" for one in rows), flush=True)


if __name__ == "__main__":
    main()
