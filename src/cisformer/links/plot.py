"""Draw the links of one gene: accessibility of each cell type, arcs to the cCREs, the genes of the locus."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cisformer.data.genome import parse_regions
from cisformer.errors import InputError
from cisformer.links.files import Links
from cisformer.links.gene import GeneLinks, gene_links, read_gene_links
from cisformer.runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
FIGURE_WIDTH_IN, TRACK_HEIGHT_IN, GENE_ROW_HEIGHT_IN = 7.2, 0.62, 0.23
MOST_GENES, MARGIN = 14, 0.04
LETTER_WIDTH = 0.0105
"""Of a letter of a gene's name, as a share of the locus."""
INK, FAINT, BAR = "#222222", "#9a9a9a", "#5b7a99"
COLOUR_MAP = "viridis_r"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 7,
    "axes.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "cisformer",
    "pdf.fonttype": 42,
    "text.parse_math": False,  # names are names, also where they hold a $
}
CLONE = re.compile(r"^(?:[A-Z]{2}\d{6}|ENSG|ENSMUSG|RNU|RNA5|Y_RNA|MIR\d|SNOR|Gm\d)|P\d*$")


@dataclass(frozen=True)
class Locus:
    """A stretch of a chromosome, in bp."""

    chrom: str
    start: int
    end: int


@dataclass(frozen=True)
class _PlacedGene:
    """A gene as it is drawn: what of it is in view, where its name goes, in which row."""

    name: str
    gene_id: str
    left: int
    right: int
    middle: float
    tss: int
    strand: str
    row: int


def plot_links(
    links: Links | str | Path,
    gene: str,
    *,
    output: str | Path | None = None,
    cell_types: Sequence[str] = (),
    min_score: float = 0.05,
    top: int = 10,
    region: str | None = None,
) -> Figure:
    """Draw the locus of a gene.

    Parameters
    ----------
    links
        What `score_links` returned, or the `cisformer_link` folder that it was written to.
    gene
        Name or id.
    output
        Write the figure to this .png, .svg or .pdf.
    cell_types
        Which types to draw, in this order; all by name otherwise.
    min_score, top
        Draw links of at least this score, and at most so many per type.
    region
        What to show, chrom:start-end; as far as the drawn links reach, otherwise.

    Returns
    -------
    matplotlib.figure.Figure
        Accessibility of each type as bars (share of its cells in which a cCRE is open), links as arcs, genes below.

    Raises
    ------
    InputError
        If there is no such gene or cell type, or `output` is of another format.
    """
    if output is not None and Path(output).suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot write a figure to {output}", hint=f"end its name in {', '.join(SUFFIXES)}")
    found = gene_links(links, gene) if isinstance(links, Links) else read_gene_links(links, gene)
    found = found.select(cell_types)
    drawn = {name: _strongest(table, min_score, top) for name, table in found.tables.items()}
    locus = _reach(found, drawn) if region is None else _parse(region, found)
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = _draw(found, drawn, locus)
        if output is not None:
            with atomic_path(output) as temporary:
                figure.savefig(temporary, dpi=300, metadata=_no_date(Path(output).suffix.lower()))
    return figure


def _parse(region: str, found: GeneLinks) -> Locus:
    place = parse_regions([region]).iloc[0]
    locus = Locus(str(place["chrom"]), int(place["start"]), int(place["end"]))
    if locus.chrom != found.chrom or locus.end <= found.start or locus.start >= found.end:
        raise InputError(
            f"{region} does not touch {found.gene}",
            hint=f"it lies at {found.chrom}:{found.start}-{found.end}",
        )
    return locus


def _no_date(suffix: str) -> dict[str, None]:
    return {} if suffix == ".png" else {"CreationDate" if suffix == ".pdf" else "Date": None}


def _strongest(table: pd.DataFrame, min_score: float, top: int) -> pd.DataFrame:
    return table[table["score"] >= min_score].nlargest(top, "score")


def _reach(found: GeneLinks, drawn: dict[str, pd.DataFrame]) -> Locus:
    """Return the gene and all drawn links, with a margin."""
    starts = [found.start, *(table["start"].min() for table in drawn.values() if len(table))]
    ends = [found.end, *(table["end"].max() for table in drawn.values() if len(table))]
    low, high = int(min(starts)), int(max(ends))
    margin = int(MARGIN * (high - low)) + 1_000
    return Locus(found.chrom, max(low - margin, 0), high + margin)


def _draw(found: GeneLinks, drawn: dict[str, pd.DataFrame], locus: Locus) -> Figure:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    genes = _pack(_neighbours(found, locus), locus)
    n_rows = 1 + max((gene.row for gene in genes), default=0)
    heights = [TRACK_HEIGHT_IN] * len(drawn) + [GENE_ROW_HEIGHT_IN * (n_rows + 0.6)]
    above, below = 0.34, 0.42
    height = sum(heights) + above + below
    figure = Figure(figsize=(FIGURE_WIDTH_IN, height))
    grid = figure.add_gridspec(
        len(heights), 1, height_ratios=heights, left=0.15, right=0.9, hspace=0.0,
        top=1 - above / height, bottom=below / height,
    )  # fmt: skip
    highest = max((table["score"].max() for table in drawn.values() if len(table)), default=0.0)
    colours = ScalarMappable(Normalize(0, max(float(highest), 0.1)), COLOUR_MAP)
    most_open = max((_open_share(found, name, locus).max(initial=0) for name in drawn), default=0.0) or 1.0
    for number, name in enumerate(drawn):
        axes = figure.add_subplot(grid[number])
        _draw_type(axes, found, name, drawn[name], locus, (colours, most_open))
        if number == 0:
            axes.set_title(found.gene, fontsize=9, fontstyle="italic", color=INK, pad=8)
            axes.text(
                1,
                1.04,
                f"open in 0–{most_open:.0%} of cells",
                transform=axes.transAxes,
                ha="right",
                color=FAINT,
            )
    axes = figure.add_subplot(grid[-1])
    _draw_genes(axes, found, genes, n_rows, locus)
    bar_axes = figure.add_axes((0.915, 0.5 - 0.6 / height, 0.012, 1.2 / height))
    bar = figure.colorbar(colours, cax=bar_axes)
    bar.outline.set_linewidth(0.4)
    bar.set_label("link score")
    bar_axes.tick_params(width=0.4, length=2)
    return figure


def _open_share(found: GeneLinks, name: str, locus: Locus) -> np.ndarray:
    """Return the share of a type's cells in which each cCRE in view is open."""
    table = found.tables[name]
    seen = (table["end"] > locus.start) & (table["start"] < locus.end)
    share: np.ndarray = (table["n_open"][seen] / max(found.n_cells[name], 1)).to_numpy(np.float64)
    return share


def _draw_type(
    axes: Axes,
    found: GeneLinks,
    name: str,
    drawn: pd.DataFrame,
    locus: Locus,
    scales: tuple[ScalarMappable, float],
) -> None:
    """Bars of accessibility above the line, arcs from the TSS below it, coloured and as wide as their score.

    `scales` are the colours of scores, and the accessibility of the highest bar.
    """
    colours, most_open = scales
    table = found.tables[name]
    table = table[(table["end"] > locus.start) & (table["start"] < locus.end)]
    widest = (locus.end - locus.start) / 260
    width = np.maximum(table["end"] - table["start"], widest)
    axes.bar(
        (table["start"] + table["end"]) / 2,
        _open_share(found, name, locus) / most_open,
        width,
        color=BAR,
        lw=0,
    )
    axes.axhline(0, color=INK, lw=0.5)
    axes.axvline(found.tss, color=FAINT, lw=0.4, ls=(0, (2, 3)), zorder=0)
    longest = max(locus.end - found.tss, found.tss - locus.start)
    drawn = drawn.sort_values("score")
    middle, score = ((drawn["start"] + drawn["end"]) / 2).to_numpy(float), drawn["score"].to_numpy(float)
    for target, colour, height in zip(
        middle, colours.to_rgba(score), np.asarray(colours.norm(score), float), strict=True
    ):
        x, y = _arc(found.tss, target, longest)
        axes.plot(x, y, color=colour, lw=0.5 + 1.3 * height)
    axes.set_xlim(locus.start, locus.end)
    axes.set_ylim(-1.15, 1.15)
    axes.set_axis_off()
    axes.text(-0.012, 0.62, name, transform=axes.transAxes, ha="right", va="center", color=INK, fontsize=7.5)
    axes.text(
        -0.012,
        0.36,
        f"{found.n_cells[name]:,} cells",
        transform=axes.transAxes,
        ha="right",
        va="center",
        color=FAINT,
    )


def _arc(left: float, right: float, longest: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a half ellipse below the line; longer ones hang lower, by the square root."""
    angle = np.linspace(0, np.pi, 60)
    depth = 0.25 + 0.75 * np.sqrt(abs(right - left) / max(longest, 1))
    return (left + right) / 2 + (left - right) / 2 * np.cos(angle), -depth * np.sin(angle)


def _neighbours(found: GeneLinks, locus: Locus) -> pd.DataFrame:
    """Return genes in view, the gene itself first, then long ones; names of clones left out."""
    genes = found.genes
    seen = (genes["chrom"] == locus.chrom) & (genes["end"] > locus.start) & (genes["start"] < locus.end)
    genes = genes[seen]
    own = (genes["gene_id"] == found.gene_id).to_numpy()
    named = ~genes["gene_name"].astype(str).str.contains(CLONE).to_numpy()
    order = np.argsort((genes["start"] - genes["end"]).to_numpy(), kind="stable")
    chosen = [*np.flatnonzero(own), *(i for i in order if named[i] and not own[i])]
    return genes.iloc[chosen[:MOST_GENES]]


def _pack(genes: pd.DataFrame, locus: Locus) -> list[_PlacedGene]:
    """Put genes into rows so that neither bodies, arrows nor names overlap."""
    letter = (locus.end - locus.start) * LETTER_WIDTH
    taken: list[list[tuple[float, float]]] = []
    placed = []
    for name, start, end, strand, gene_id in genes[
        ["gene_name", "start", "end", "strand", "gene_id"]
    ].itertuples(index=False, name=None):
        left, right = max(start, locus.start), min(end, locus.end)
        half = letter * len(name) / 2
        middle = min(max((left + right) / 2, locus.start + half), locus.end - half)
        span = min(left - 2 * letter, middle - half), max(right + 2 * letter, middle + half)
        free = (n for n, spans in enumerate(taken) if all(span[1] < a or span[0] > b for a, b in spans))
        row = next(free, len(taken))
        if row == len(taken):
            taken.append([])
        taken[row].append(span)
        placed.append(
            _PlacedGene(name, gene_id, left, right, middle, end - 1 if strand == "-" else start, strand, row)
        )
    return placed


def _draw_genes(axes: Axes, found: GeneLinks, genes: list[_PlacedGene], n_rows: int, locus: Locus) -> None:
    """Gene bodies, names, an arrow from each TSS, and the scale of the chromosome."""
    for gene in genes:
        own = gene.gene_id == found.gene_id
        colour, row = INK if own else FAINT, gene.row
        axes.plot(
            [gene.left, gene.right], [row, row], color=colour, lw=2.6 if own else 1.6, solid_capstyle="butt"
        )
        axes.text(
            gene.middle, row + 0.2, gene.name, ha="center", va="top", color=colour, style="italic",
            fontsize=7 if own else 6,
        )  # fmt: skip
        if locus.start <= gene.tss <= locus.end:
            _draw_arrow(axes, gene, colour, (locus.end - locus.start) * 2 * LETTER_WIDTH)
    axes.set_ylim(n_rows - 0.1, -0.75)
    axes.set_xlim(locus.start, locus.end)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.{_digits(locus)}f}")
    axes.tick_params(length=2.5, width=0.6)
    axes.set_xlabel(f"{locus.chrom} (Mb)", labelpad=2)


def _draw_arrow(axes: Axes, gene: _PlacedGene, colour: str, length: float) -> None:
    """An arrow that goes up at the TSS and turns in the direction of transcription."""
    top = gene.row - 0.35
    tip = gene.tss + (-length if gene.strand == "-" else length)
    style = {"arrowstyle": "-|>", "lw": 0.6, "color": colour, "mutation_scale": 5, "shrinkA": 0, "shrinkB": 0}
    axes.plot([gene.tss, gene.tss], [gene.row, top], color=colour, lw=0.6)
    axes.annotate("", (tip, top), (gene.tss, top), arrowprops=style)


def _digits(locus: Locus) -> int:
    return int(np.clip(2 - np.floor(np.log10(max(locus.end - locus.start, 1) / 1e6)), 1, 5))
