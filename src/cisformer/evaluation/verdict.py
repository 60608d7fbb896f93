"""Say in one sentence whether a model beats the baselines, and on which scores it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cisformer.config import Direction
from cisformer.evaluation.scores import METRICS, Comparison, Measured

MODEL = "model"
TOLD_TYPES = "cell-type mean"
"""The baseline that uses more than the model does (the types): it is named, but does not decide the verdict."""

SEVERITY = ("better", "tie", "worse")


def score_text(value: float, beside: float | None = None) -> str:
    """Return a score as it is shown everywhere: four decimals, five where it (or `beside`) is below 0.1."""
    size = abs(value if beside is None else beside)
    return f"{value:.5f}" if 0 < size < 0.1 else f"{value:.4f}"


def texts_apart(one: float, other: float) -> tuple[str, str]:
    """Return two scores as `score_text` does, with as many more decimals as tell them apart.

    >>> texts_apart(0.035152, 0.035149)
    ('0.035152', '0.035149')
    """
    usual = len(score_text(one).partition(".")[2])
    texts = [(f"{one:.{n}f}", f"{other:.{n}f}") for n in range(usual, 9)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])


def judge(
    measured: Mapping[str, Measured], comparisons: list[Comparison], direction: Direction
) -> tuple[str, str]:
    """Return the standing of the model among the baselines, as one word and in a sentence."""
    headline = {metric.key: metric for metric in METRICS[direction] if metric.headline}
    if not comparisons:
        values = "; ".join(
            f"{metric.name} {score_text(measured[MODEL].value[key])}"
            for key, metric in headline.items()
            if key in measured[MODEL].value
        )
        return "alone", f"Not compared with any baseline, which needs training data. Scores: {values}."
    fair = [c for c in comparisons if c.baseline != TOLD_TYPES]
    groups: dict[str, list[Comparison]] = {"better": [], "tie": [], "worse": []}
    for key in headline:
        against = [c for c in fair if c.metric == key]
        if against:
            hardest = min(against, key=lambda c: (-SEVERITY.index(c.outcome), c.gain))
            groups[hardest.outcome].append(hardest)
    told = [
        c for c in comparisons if c.baseline == TOLD_TYPES and c.metric in headline and c.outcome == "worse"
    ]
    said = {outcome: _phrases(group, measured, headline) for outcome, group in groups.items()}
    standing, sentence = _sentence(groups, said, " without type labels" if told else "")
    if told:
        names = " and ".join(
            f"{headline[c.metric].name} ({score_text(measured[TOLD_TYPES].value[c.metric])})" for c in told
        )
        sentence += f" The {TOLD_TYPES}, which uses the cells' type labels, is better on {names}."
    return standing, sentence


def _sentence(groups: dict[str, list[Comparison]], said: dict[str, str], which: str) -> tuple[str, str]:
    """Return the standing and the sentence that goes with it; `which` baselines it beats."""
    parts = [
        f"{words} {said[outcome]}"
        for outcome, words in zip(
            SEVERITY, ("is best on", "cannot be told apart on", "is worse on"), strict=True
        )
        if groups[outcome]
    ]
    if groups["worse"]:
        some = groups["better"] or groups["tie"]
        standing, head = ("mixed", "The model does not beat every baseline") if some else (
            "worse", "The model does not beat the baselines")  # fmt: skip
    elif groups["tie"]:
        standing, head = "even", f"The model is beaten by no baseline{which}"
    else:
        standing, head = "better", f"The model beats every baseline{which}"
    return standing, f"{head}. It {'; it '.join(parts)}."


def _phrases(group: list[Comparison], measured: Mapping[str, Measured], metrics: Mapping[str, Any]) -> str:
    """Return "log-loss (0.1852 against 0.1853 of PCA-ridge) and …"."""
    said = []
    for c in group:
        values = measured[MODEL].value[c.metric], measured[c.baseline].value[c.metric]
        ours, theirs = map(score_text, values) if c.outcome == "tie" else texts_apart(*values)
        article = "the " if c.baseline.islower() else ""
        said.append(f"{metrics[c.metric].name} ({ours} against {theirs} of {article}{c.baseline})")
    return ", ".join(said[:-1]) + (" and " if len(said) > 1 else "") + said[-1] if said else ""
