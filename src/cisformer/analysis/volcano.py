"""Draw the differences of links between two groups: effect against p-value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.links.plot import FAINT, INK, STYLE
from cisformer.runtime.files import atomic_path

MOST_PANELS, COLUMNS = 12, 3
N_NAMES = 8
COLOURS = ("#c1440e", "#1f6f8b")


def draw_volcano(
    table: pd.DataFrame, groups: tuple[str, str], output: str | Path, *, fdr: float = 0.05
) -> None:
    """Draw −log10 p against the effect of each link, one panel per cell type, and write the figure.

    Parameters
    ----------
    table
        What `compare_links` found.
    groups
        Names of A and B.
    output
        File to write: .png, .svg or .pdf.
    fdr
        Links below are coloured, the strongest named by their genes. Circles are empty where a change of accessibility
        alone may explain the difference.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tested = table[table["p_value"].notna()]
    sizes = tested.groupby("cell_type", sort=False).size()
    names = list(sizes.nlargest(MOST_PANELS).index)
    n_columns = min(COLUMNS, len(names))
    n_rows = -(-len(names) // n_columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.6 + 3.1 * n_columns, 0.5 + 2.6 * n_rows), layout="constrained")
        for number, name in enumerate(names):
            axes = figure.add_subplot(n_rows, n_columns, number + 1)
            _panel(axes, tested[tested["cell_type"] == name], groups, fdr)
            if name:
                axes.set_title(name, fontsize=8, color=INK, pad=18)
        with atomic_path(output) as temporary:
            figure.savefig(temporary, dpi=200)


def _panel(axes, part: pd.DataFrame, groups: tuple[str, str], fdr: float) -> None:  # type: ignore[no-untyped-def]
    effect = part["effect"].to_numpy()
    height = -np.log10(np.maximum(part["p_value"].to_numpy(), 1e-300))
    sure, explained = (part["fdr"] < fdr).to_numpy(), part["accessibility_explains"].to_numpy(bool)
    axes.scatter(effect[~sure], height[~sure], s=3, color=FAINT, lw=0, alpha=0.5, rasterized=True)
    for sign, colour, group in zip((1, -1), COLOURS, groups, strict=True):
        mine = sure & (np.sign(effect) == sign)
        axes.scatter(
            effect[mine],
            height[mine],
            s=7,
            color=colour,
            lw=0.5,
            label=f"stronger in {group}: {mine.sum():,}",
        )
        mine &= explained
        axes.scatter(effect[mine], height[mine], s=7, facecolors="white", edgecolors=colour, lw=0.5)
    reach = 1.15 * float(np.quantile(np.abs(effect), 0.999)) if len(effect) else 1.0
    reach = max(reach, 1.25 * float(np.abs(effect[sure]).max(initial=0)), 1e-6)
    axes.set_xlim(-reach, reach)
    axes.set_ylim(0, 1.05 * max(float(height.max(initial=0)), 1.0))
    _name(axes, part["gene_name"].to_numpy(), effect / reach, height / axes.get_ylim()[1], sure & ~explained)
    axes.axvline(0, color=FAINT, lw=0.5, zorder=0)
    axes.set_xlabel(f"coupling in {groups[0]} less coupling in {groups[1]}")
    axes.set_ylabel("−log10 p")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False, fontsize=6.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, handletextpad=0.1,
        columnspacing=1.0,
    )  # fmt: skip


def _name(axes, names: np.ndarray, x: np.ndarray, y: np.ndarray, sure: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    """Write the genes of the smallest p-values beside their points, but for names that would cover another."""
    placed: list[tuple[float, float]] = []
    for row in np.flatnonzero(sure)[np.argsort(-y[sure], kind="stable")]:
        if len(placed) == N_NAMES:
            break
        if any(abs(x[row] - a) < 0.3 and abs(y[row] - b) < 0.04 for a, b in placed):
            continue
        placed.append((x[row], y[row]))
        side = 1 if x[row] > 0 else -1
        axes.annotate(
            names[row], ((x[row] + 1) / 2, y[row]), (3 * side, 0), xycoords="axes fraction", textcoords="offset points",
            ha="left" if side > 0 else "right", va="center", fontsize=5.5, style="italic", color=INK,
        )  # fmt: skip
