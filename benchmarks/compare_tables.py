"""The tables of `benchmarks/compare.py`, in markdown."""

from __future__ import annotations

from typing import Any

from cisformer.evaluation.baselines import ORACLE
from cisformer.evaluation.scores import METRICS, Metric
from cisformer.evaluation.verdict import MODEL, TOLD_TYPES, score_text

OURS, LINEAR = "cisformer", "closed form"
ARROWS = {"atac2rna": "ATAC→RNA", "rna2atac": "RNA→ATAC"}
MARKS = {"better": "+", "tie": "=", "worse": "−", "": ""}
IN_BRIEF = (
    "log_loss", "ccre_auroc", "cell_auprc", "cell_auroc_residual", "r2", "gene_pearson", "cell_pearson_residual",
)  # fmt: skip
IN_OVERVIEW = (*IN_BRIEF, "cell_auprc_residual")
SHOWN = (*IN_OVERVIEW, "ccre_auprc", "cell_auroc", "ece", "gene_spearman", "cell_pearson", "pseudobulk")


def shown(report: dict[str, Any], direction: str, keys: tuple[str, ...]) -> list[Metric]:
    """Return those scores of a direction that a report holds and a table shows."""
    return [m for m in METRICS[direction] if m.key in keys and m.key in report["scores"][MODEL]]


def arrow(metric: Metric) -> str:
    """Return which way is better."""
    return "↑" if metric.better == "higher" else "↓"


def table(key: str, result: dict[str, Any]) -> str:
    """Return the scores and costs of one set in markdown; bold is the best value."""
    report, direction = result["report"], key.split()[1]
    methods = list(report["scores"])
    facts = report["facts"]
    titles = [OURS if method == MODEL else method for method in methods]
    lines = [
        f"### {key}",
        f"{facts['training_cells']:,} training and {facts['test_cells']:,} test cells, {facts['features']:,} features; "
        f"best epoch {result['checkpoint']['epoch']}; seed {facts['seed']}. {report['verdict']}",
        "",
        f"| score | {' | '.join(titles)} | who wins |",
        "|" + "---|" * (len(titles) + 2),
    ]
    for metric in shown(report, direction, SHOWN):
        cells = [cell(report, metric, method) for method in methods]
        lines.append(f"| {metric.name} {arrow(metric)} | {' | '.join(cells)} | {winner(report, metric)} |")
    lines += ["", "| process | wall s | CPU s | peak GB |", "|---|---|---|---|"]
    lines += [
        f"| {k} | {c['wall_s']:.0f} | {c['cpu_s']:.0f} | {c['peak_gb']:.2f} |"
        for k, c in result["costs"].items()
    ]
    return "\n".join(lines)


def cell(report: dict[str, Any], metric: Metric, method: str) -> str:
    """Return a score with its interval (ours) or how ours does against it."""
    score = report["scores"][method].get(metric.key)
    if score is None or score["value"] is None:
        return "–"
    values = [s[metric.key]["value"] for m, s in report["scores"].items() if m != ORACLE and metric.key in s]
    known = [value for value in values if value is not None]
    best = (max if metric.better == "higher" else min)(known)
    text = score_text(score["value"])
    text = f"**{text}**" if text == score_text(best) and method != ORACLE else text
    if method == MODEL and score["high"] is not None:
        return f"{text} ±{score_text(score['high'] - score['value'], score['value'])}"
    return f"{text} {MARKS[outcome(report, metric, method)]}".rstrip()


def outcome(report: dict[str, Any], metric: Metric, method: str) -> str:
    """Return how ours does against a method: "better", "tie", "worse", or "" if not compared."""
    found = [c for c in report["comparisons"] if c["metric"] == metric.key and c["baseline"] == method]
    if not found:
        return ""
    values = [report["scores"][name][metric.key]["value"] for name in (MODEL, method)]
    same = score_text(values[0]) == score_text(values[1])  # the closed form itself, but for rounding
    return "tie" if same else str(found[0]["outcome"])


def winner(report: dict[str, Any], metric: Metric) -> str:
    """Return who is best on a score: ours, those it cannot be told apart from, or those that beat it."""
    against = {c["baseline"]: c["gain"] for c in report["comparisons"] if c["metric"] == metric.key}
    worse = [method for method in against if outcome(report, metric, method) == "worse"]
    if worse:
        return min(worse, key=lambda method: against[method])
    ties = [method for method in against if outcome(report, metric, method) == "tie"]
    return f"tie: {OURS}, {', '.join(ties)}" if ties else OURS


def overview(results: dict[str, Any]) -> str:
    """Return one table: every set, direction, score and method; bold is the best value."""
    methods: list[str] = []
    for result in results.values():
        methods += [m for m in result["report"]["scores"] if m not in (*methods, ORACLE)]
    titles = [OURS if method == MODEL else method for method in methods]
    lines = [
        f"| set | direction | score | {' | '.join(titles)} | who wins |",
        "|" + "---|" * (len(titles) + 4),
    ]
    for key, result in results.items():
        name, direction = key.split()
        report = result["report"]
        for metric in shown(report, direction, IN_OVERVIEW):
            cells = [cell(report, metric, m) if m in report["scores"] else "–" for m in methods]
            row = [name, ARROWS[direction], f"{metric.name} {arrow(metric)}", *cells, winner(report, metric)]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def brief(results: dict[str, Any], direction: str) -> str:
    """Return one line per set: ours, the best method that knows no more, and all that is ahead of ours."""
    results = {key.split()[0]: r["report"] for key, r in results.items() if key.endswith(direction)}
    if not results:
        return ""
    metrics = shown(next(iter(results.values())), direction, IN_BRIEF)
    names = [f"{metric.name} {arrow(metric)}" for metric in metrics]
    lines = [
        f"| {ARROWS[direction]} | {' | '.join(names)} | ahead of cisformer |",
        "|" + "---|" * (len(names) + 2),
    ]
    for name, report in results.items():
        cells = [beside_best(report, metric) for metric in metrics]
        lines.append(f"| {name} | {' | '.join(cells)} | {ahead(report, metrics)} |")
    return "\n".join(lines)


def beside_best(report: dict[str, Any], metric: Metric) -> str:
    """Return ours, the best of the methods that know no more, and whether ours is better."""
    known = {
        method: scores[metric.key]["value"]
        for method, scores in report["scores"].items()
        if method not in (MODEL, ORACLE, TOLD_TYPES, LINEAR) and metric.key in scores
    }
    best = (max if metric.better == "higher" else min)(known, key=lambda method: known[method])
    ours = report["scores"][MODEL][metric.key]["value"]
    return f"{score_text(ours)} {MARKS[outcome(report, metric, best)]} ({best} {score_text(known[best])})"


def ahead(report: dict[str, Any], metrics: list[Metric]) -> str:
    """Return who is better than ours, and on what."""
    said: dict[str, list[str]] = {}
    for metric in metrics:
        for method in report["scores"]:
            if outcome(report, metric, method) == "worse":
                said.setdefault(method, []).append(metric.name)
    return (
        "; ".join(
            f"**{method}** on {'all' if len(what) == len(metrics) else ', '.join(what)}"
            for method, what in said.items()
        )
        or "–"
    )


def pages(results: dict[str, Any], *groups: list[str]) -> str:
    """Return all tables: for each group of sets the whole table and the brief ones, then each set at length."""
    parts = []
    for names in groups:
        chosen = {
            f"{name} {direction}": results[f"{name} {direction}"]
            for name in names
            for direction in ARROWS
            if f"{name} {direction}" in results
        }
        if chosen:
            parts += [overview(chosen), *(brief(chosen, direction) for direction in ARROWS)]
    parts += [table(key, result) for key, result in results.items()]
    return "\n\n".join(part for part in parts if part) + "\n"
