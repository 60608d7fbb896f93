"""Write an evaluation as one HTML page without outside parts: verdict, scores, figures, run facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cisformer.evaluation.baselines import ORACLE
from cisformer.evaluation.evaluate import EvaluationReport
from cisformer.evaluation.scores import METRICS, Metric
from cisformer.evaluation.svg import Chart, Scale
from cisformer.evaluation.verdict import MODEL, score_text
from cisformer.runtime.files import atomic_path, refuse_existing
from cisformer.runtime.pages import render_page

STYLES = {
    MODEL: "c0",
    "PCA-ridge": "c1",
    "kNN": "c2",
    "cell-type mean": "c3",
    "mean profile": "c4",
    ORACLE: "c5",
}
HEADINGS = {"rna2atac": "Accessibility predicted from RNA", "atac2rna": "Expression predicted from ATAC"}
FEATURE = {"rna2atac": ("cCRE", "AUROC per cCRE"), "atac2rna": ("gene", "Pearson r per gene")}
STANDINGS = {
    "better": "ahead", "even": "level", "mixed": "mixed", "worse": "behind", "alone": "no baseline",
}  # fmt: skip
"""Text of the badge beside the verdict."""


def write_report(report: EvaluationReport, folder: str | Path, *, force: bool = False) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into `folder`.

    Parameters
    ----------
    report
        What `evaluate` or `evaluate_model` returned.
    folder
        Where the two files go.
    force
        Overwrite an earlier report.

    Returns
    -------
    tuple of Path
        The page, and the numbers.

    Raises
    ------
    OutputExistsError
        If there is a report already and `force` is not given.
    """
    page, data = Path(folder) / "report.html", Path(folder) / "report.json"
    for path in (page, data):
        refuse_existing(path, force=force)
    html = render(report)
    report.write_json(data)
    with atomic_path(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page, data


def render(report: EvaluationReport) -> str:
    """Return the page."""
    from markupsafe import Markup

    plain = report.to_dict()
    figures = [figure | {"svgs": [Markup(svg) for svg in figure["svgs"]]} for figure in _figures(plain)]
    return render_page(
        "cisformer.evaluation",
        "report.html",
        heading=HEADINGS[report.direction],
        verdict=report.verdict.partition(". "),
        standing=report.standing,
        badge=STANDINGS[report.standing],
        methods=[{"name": name, "style": style_of(name, report.methods)} for name in report.methods],
        rows=_rows(report, plain),
        figures=figures,
        facts=_facts(plain["facts"]),
        notes=plain["facts"].get("notes", []),
        details=_details(plain["facts"]),
    )


def style_of(name: str, methods: list[str]) -> str:
    """Return the class that colours a method."""
    extra = [method for method in methods if method not in STYLES]
    return STYLES.get(name) or f"c{6 + extra.index(name) % 3}"


# ---------------------------------------------------------------------------------------------- scores


def _rows(report: EvaluationReport, plain: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per metric: a cell per method, with how the model does against it."""
    rows = []
    for metric in METRICS[report.direction]:
        if metric.key not in plain["scores"][MODEL]:
            continue
        cells = [_cell(report, plain, metric, method) for method in report.methods]
        best = _best(metric, [cell for cell in cells if cell["method"] != ORACLE])
        rows.append({"metric": metric, "cells": [cell | {"best": cell["method"] in best} for cell in cells]})
    return rows


def _cell(report: EvaluationReport, plain: dict[str, Any], metric: Metric, method: str) -> dict[str, Any]:
    score = plain["scores"][method].get(metric.key)
    value = None if score is None else score["value"]
    half = None if score is None or None in (score["high"], value) else score["high"] - value
    return {
        "method": method,
        "value": value,
        "text": "–" if value is None else score_text(value),
        "half": "" if half is None else f"±{score_text(half, value)}",
        "outcome": report.outcome(metric.key, method),
    }


def _best(metric: Metric, cells: list[dict[str, Any]]) -> list[str]:
    """Return the methods with the best value as it is shown."""
    known = [cell for cell in cells if cell["value"] is not None]
    if not known:
        return []
    choose = max if metric.better == "higher" else min
    best = choose(known, key=lambda cell: cell["value"])["text"]
    return [cell["method"] for cell in known if cell["text"] == best]


# ---------------------------------------------------------------------------------------------- figures


def _figures(plain: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure that there are numbers for: heading, explanation, charts, legend."""
    data, methods = plain["figures"], list(plain["scores"])
    made = [_gains(plain, methods)] if plain["comparisons"] else []
    makers = {
        "reliability": _reliability,
        "detection": _detection,
        "pseudobulk": _pseudobulk,
        "training": _training,
    }
    for name, make in makers.items():
        if data.get(name):
            made.append(make(data[name], plain, methods))
    return sorted(made, key=lambda figure: (figure["key"] != "gains", figure["wide"]))


def _figure(
    key: str, title: str, about: str, svgs: list[str], legend: list[dict[str, str]], **more: Any
) -> dict[str, Any]:
    return {"key": key, "title": title, "about": about, "svgs": svgs, "legend": legend, "wide": False, **more}


def _legend(names: list[str], methods: list[str]) -> list[dict[str, str]]:
    return [{"name": name, "style": style_of(name, methods)} for name in names]


def _gains(plain: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """For each headline score the gain over each baseline, with its interval."""
    svgs = []
    for metric in METRICS[plain["direction"]]:
        against = [c for c in plain["comparisons"] if c["metric"] == metric.key]
        if metric.headline and against:
            svgs.append(_gain_chart(metric, against, methods))
    about = (
        "How much better the model is than each baseline, with 95 % intervals from a bootstrap over test "
        "cells that is the same for both. Right of the line: the model is better. Open circle: no clear difference."
    )
    return _figure("gains", "Gain over each baseline", about, svgs, [], wide=True, columns=True)


def _gain_chart(metric: Metric, against: list[dict[str, Any]], methods: list[str]) -> str:
    values = [c[key] for c in against for key in ("low", "gain", "high")]
    said = "; ".join(f"{c['baseline']} {c['gain']:+.4f} ({c['outcome']})" for c in against)
    n = len(against)
    chart = Chart(
        f"Gain in {metric.name}", f"Gain over each baseline: {said}.",
        Scale.over([*values, 0.0]), Scale(-0.5, n - 0.5), f"{metric.name}: gain",
        height=70 + 34 * n, margins=(10, 14, 44, 108),
    )  # fmt: skip
    chart.rule((0, -0.5), (0, n - 0.5), "zero")
    for i, c in enumerate(against):
        row, style = n - 1 - i, style_of(c["baseline"], methods)
        if c["low"] is not None:
            chart.rule((c["low"], row), (c["high"], row), f"whisker {style}")
        chart.dots(
            [c["gain"]], [row], f"{style} {c['outcome']}", radius=5, name=f"{c['baseline']}, {c['outcome']}"
        )
        down = chart.at(0, row)[1]
        chart.marks.append(
            f'<text class="tick" x="100" y="{down + 4}" text-anchor="end">{c["baseline"]}</text>'
        )
    return chart.svg(y_ticks=0, x_ticks=4)


def _reliability(data: dict[str, Any], plain: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Observed share against predicted probability, on logarithmic axes."""
    ece = plain["scores"][MODEL]["ece"]["value"]
    ratio = plain["scores"][MODEL]["open_ratio"]["value"]
    scale = Scale(0.0005, 1.0, "log")
    chart = Chart(
        "Reliability diagram",
        f"Share that is open against predicted probability. Calibration error of the model {ece}.",
        scale, scale, "predicted probability", "share that is open",
    )  # fmt: skip
    chart.rule((scale.low, scale.low), (1, 1))
    for name in reversed(list(data)):
        positive = [value or None for value in data[name]["observed"]]
        chart.line(data[name]["predicted"], positive, style_of(name, methods), name=name)
    about = (
        "Where the line follows the diagonal, probabilities are right on average. Calibration error of the "
        f"model: {score_text(ece)}. Its probabilities add up to {ratio:.1%} of the cCREs that are open."
    )
    return _figure("reliability", "Calibration", about, [chart.svg()], _legend(list(data), methods))


def _detection(data: dict[str, Any], plain: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Score per feature against the share of cells that it is detected in."""
    feature, score = FEATURE[plain["direction"]]
    values = [v for m in data["methods"].values() for v in m["median"]]
    values += [v for key in ("low", "high") for v in data["methods"][MODEL][key]]
    x, y = Scale.over(data["rate"], "log"), Scale.over(values)
    chart = Chart(
        f"{score} against detection rate",
        f"Median {score} in bins of the share of cells in which a {feature} is detected.",
        x, y, f"share of cells in which the {feature} is detected", score,
    )  # fmt: skip
    ours = data["methods"][MODEL]
    chart.band(data["rate"], ours["low"], ours["high"], "c0")
    for name in reversed(list(data["methods"])):
        chart.line(data["rate"], data["methods"][name]["median"], style_of(name, methods), name=name)
    about = (
        f"Median over the {feature}s of each bin, {sum(data['n']):,} in all; the shade holds the middle half "
        "of the model's. Rare features are noisy for every method."
    )
    legend = _legend(list(data["methods"]), methods)
    return _figure("detection", f"{score}, by detection rate", about, [chart.svg()], legend)


def _pseudobulk(data: dict[str, Any], plain: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Predicted against true log fold change, one small chart per cell type."""
    del methods
    values = [v for t in data.values() for key in ("true", "predicted") for v in t[key] if v is not None]
    reach = sorted(abs(v) for v in values)[int(len(values) * 0.99)] if values else 1.0
    scale = Scale(-reach, reach)
    svgs = [_scatter(name, t, scale) for name, t in data.items()]
    unit = (
        "log2 fold change of accessibility"
        if plain["direction"] == "rna2atac"
        else "change of log expression"
    )
    n_drawn = len(next(iter(data.values()))["true"])
    about = (
        f"Each cell type against all others: {unit}, true (across) and predicted (up); one dot per feature, "
        f"{n_drawn} drawn, r over all that are scored. Points beyond the frame lie on its edge."
    )
    return _figure("pseudobulk", "Cell types", about, svgs, [], wide=True, small=True)


def _scatter(name: str, data: dict[str, Any], scale: Scale) -> str:
    r = "–" if data["r"] is None else f"{data['r']:.2f}"
    chart = Chart(
        f"{name}: predicted against true change", f"r = {r}, {data['n_cells']} cells.", scale, scale,
        f"{name}, {data['n_cells']} cells", "", width=200, height=210, margins=(8, 6, 40, 34),
    )  # fmt: skip
    chart.rule((scale.low, scale.low), (scale.high, scale.high))
    chart.dots(data["true"], data["predicted"], "c0 cloud", radius=1.8)
    room = scale.high - scale.low
    chart.text(scale.low + room * 0.04, scale.high - room * 0.07, f"r = {r}", "r")
    return chart.svg(x_ticks=4, y_ticks=4)


def _training(data: dict[str, Any], plain: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Loss of training and validation cells by epoch, beside the linear start and the mean profile."""
    del plain, methods
    guides = {"linear start": data.get("linear_val_loss"), "mean profile": data.get("mean_val_loss")}
    levels = {
        name: next((v for v in column if v is not None), None) for name, column in guides.items() if column
    }
    known = {name: level for name, level in levels.items() if level is not None}
    curves = {"validation": data["val_loss"], "training": data.get("train_loss", [])}
    epochs = data["epoch"]
    x, y = (
        Scale(min(epochs) - 0.3, max(epochs) + 0.3),
        Scale.over([*curves["training"], *curves["validation"], *known.values()]),
    )
    best = min((v, e) for v, e in zip(data["val_loss"], epochs, strict=True) if v is not None)
    chart = Chart(
        "Training curves", f"Lowest validation loss {best[0]} in epoch {best[1]}.", x, y, "epoch", "loss",
    )  # fmt: skip
    for style, level in zip(("c1", "c4"), known.values(), strict=False):
        chart.rule((x.low, level), (x.high, level), f"level {style}")
    chart.line(epochs[: len(curves["training"])], curves["training"], "c2", name="training")
    chart.line(epochs, curves["validation"], "c0", name="validation")
    chart.dots([best[1]], [best[0]], "c0 ring", radius=7, name="best")
    about = f"Epoch 0 is the closed-form linear model. The ring is the epoch that was kept: {best[1]}."
    if took := sum(second or 0 for second in data.get("seconds", [])):
        about += f" {len(epochs) - 1} epochs took {took:,.0f} s."
    names = {"validation": "c0", "training": "c2"} | dict(zip(known, ("c1", "c4"), strict=False))
    legend = [{"name": name, "style": style} for name, style in names.items()]
    return _figure("training", "Training", about, [chart.svg()], legend)


# ---------------------------------------------------------------------------------------------- facts

_NAMES = {
    "test_cells": "Test cells", "features": "Features scored", "training_cells": "Training cells",
    "cell_types": "Cell types", "prediction": "Prediction", "truth": "Truth", "data": "Data",
    "split": "Split", "checkpoint": "Checkpoint", "seed": "Seed", "seconds": "Time of evaluation, s",
    "created": "Made", "command": "Command",
}  # fmt: skip


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = [(label, facts.get(key)) for key, label in _NAMES.items()]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    known.append(("Versions", f"cisformer {facts.get('version')}, {versions}"))
    return [
        (label, f"{value:,}" if isinstance(value, int) else str(value))
        for label, value in known
        if value is not None
    ]


def _details(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Longer facts, folded."""
    longer = {
        "Settings that the baselines chose": "baseline_settings",
        "Configuration of the model": "configuration",
        "Losses recorded in the checkpoint": "checkpoint_metrics",
    }
    return [(title, json.dumps(facts[key], indent=1)) for title, key in longer.items() if facts.get(key)]
