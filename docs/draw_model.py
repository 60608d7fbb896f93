"""Draw the figure of the model: `python docs/draw_model.py` writes docs/_static/model.svg."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

OUTPUT = Path(__file__).parent / "_static" / "model.svg"
INK, INPUT, FIXED, CLOSED, LEARNED = "#222222", "#f1f1f1", "#d9e4ef", "#cfe3d4", "#fbe3c8"
STYLE = {
    "font.family": "sans-serif",
    "svg.fonttype": "path",
    "svg.hashsalt": "cisformer",
    "mathtext.fontset": "cm",
}

BOXES = {
    "cell": (0.2, 2.4, 1.9, 1.3, INPUT, "one cell", "its genes with counts,\nor its open cCREs"),
    "pcs": (2.8, 4.3, 2.7, 1.0, FIXED, "$z_i$: principal components", "white; fixed in the checkpoint"),
    "latents": (2.8, 2.55, 2.7, 1.0, LEARNED, "latents attend to tokens", "then to each other, dec_depth times"),
    "near": (2.8, 0.8, 2.7, 1.0, INPUT, "open cCREs near the gene", "within cis_window of its body"),
    "h": (6.1, 2.55, 1.4, 1.0, LEARNED, "$h_i$", "starts at zero"),
    "readout": (8.0, 3.4, 2.2, 1.1, CLOSED, r"$\langle z_i + h_i,\; B_f\rangle$", "B starts as ridge regression"),
    "cis": (6.1, 0.65, 3.2, 1.3, CLOSED, r"$\mathrm{cis}_{if}$  (ATAC→RNA)",
            "one weight per gene–cCRE pair: ridge;\nattention with a distance bias: zero"),
    "prior": (8.0, 5.0, 2.2, 0.95, CLOSED, r"$\mathrm{prior}_f + \mathrm{bias}_f$", "mean profile; a learned shift"),
    "eta": (11.0, 3.45, 0.95, 1.0, INPUT, r"$\eta_{if}$", "sum"),
    "out": (12.6, 3.3, 2.0, 1.3, INPUT, "prediction", "probability of being open,\nor log1p expression"),
}  # fmt: skip
"""Name → left, bottom, width, height, colour, headline, small print."""

ARROWS = [
    ("cell", "pcs"), ("cell", "latents"), ("cell", "near"), ("latents", "h"), ("h", "readout"), ("pcs", "readout"),
    ("near", "cis"), ("cis", "eta"), ("prior", "eta"), ("readout", "eta"), ("eta", "out"),
]  # fmt: skip


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(11, 4.8))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 14.8), ylim=(-0.35, 6.1))
    axes.set_axis_off()
    for left, bottom, width, height, colour, head, small in BOXES.values():
        axes.add_patch(
            FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.12",
                           facecolor=colour, edgecolor=INK, linewidth=0.8)
        )  # fmt: skip
        two_lines = "\n" in small
        middle = left + width / 2
        axes.text(
            middle, bottom + height * (0.76 if two_lines else 0.66), head, ha="center", va="center", size=9.5
        )
        axes.text(middle, bottom + height * (0.34 if two_lines else 0.27), small, ha="center", va="center",
                  size=7, color="#444444", linespacing=1.3)  # fmt: skip
    for start, end in ARROWS:
        _arrow(axes, start, end)
    _legend(axes)
    return figure


def _arrow(axes: Axes, start: str, end: str) -> None:
    """Draw from the right edge of a box to the left edge of another."""
    left, bottom, width, height, *_ = BOXES[start]
    to_left, to_bottom, _, to_height, *_ = BOXES[end]
    axes.annotate(
        "", (to_left - 0.03, to_bottom + to_height / 2), (left + width + 0.03, bottom + height / 2),
        arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 0.9, "shrinkA": 0, "shrinkB": 0,
                    "connectionstyle": "arc3,rad=0"},
    )  # fmt: skip


def _legend(axes: Axes) -> None:
    kinds = (
        (FIXED, "fixed"),
        (CLOSED, "starts in closed form, then learned"),
        (LEARNED, "learned, adds nothing at first"),
    )
    for x, (colour, words) in zip((2.8, 4.1, 7.9), kinds, strict=True):
        axes.add_patch(FancyBboxPatch((x, -0.15), 0.3, 0.26, boxstyle="round,pad=0,rounding_size=0.05",
                                      facecolor=colour, edgecolor=INK, linewidth=0.6))  # fmt: skip
        axes.text(x + 0.42, -0.02, words, va="center", size=8)


if __name__ == "__main__":
    with mpl.rc_context(STYLE):
        draw().savefig(OUTPUT, metadata={"Date": None})
