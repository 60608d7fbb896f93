"""One picture of a training run: losses by epoch, beside the mean profile and the linear start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cisformer.runtime.files import atomic_path

TRAINING, VALIDATION, REFERENCE = "#9aa5b1", "#1f5fa8", "#555555"


def draw_losses(history: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> Path:
    """Draw the losses of a run.

    Parameters
    ----------
    history
        One record per epoch, as in `metrics.jsonl`.
    path
        Picture to write; its suffix says the format.
    title
        Stands above.

    Returns
    -------
    `path`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    epochs = [record["epoch"] for record in history]
    best = min(history, key=lambda record: record["val_loss"])
    for key, colour, name in (
        ("train_loss", TRAINING, "training"),
        ("val_loss", VALIDATION, "validation"),
    ):
        losses = [record[key] if record[key] is not None else float("nan") for record in history]
        axes.plot(epochs, losses, color=colour, marker="o", markersize=3, label=name)
    for key, style, name in (
        ("mean_val_loss", ":", "mean profile"),
        ("linear_val_loss", "--", "linear start"),
    ):
        if key in best:
            axes.axhline(
                best[key], color=REFERENCE, linestyle=style, linewidth=1, label=f"{name}, validation"
            )
    axes.plot(
        best["epoch"], best["val_loss"], "o", markersize=9, markerfacecolor="none", markeredgecolor=VALIDATION,
        label=f"best: epoch {best['epoch']}",
    )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="loss", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(
            temporary, dpi=130, metadata={"Software": None} if Path(path).suffix == ".png" else None
        )
    return Path(path)
