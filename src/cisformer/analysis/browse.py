"""One self-contained page of links: search a gene, see its locus and its links, sort, filter and take them away.

The page draws itself with some 300 lines of its own script. Bokeh, which ships its JavaScript in its wheel, would put
1.95 MB of it (core, widgets, tables) into every page, on a canvas that no screen reader reads.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cisformer.analysis.stored import StoredLinks, open_links
from cisformer.data.genome import overlap_pairs
from cisformer.errors import InputError
from cisformer.links.plot import CLONE
from cisformer.runtime.files import atomic_path
from cisformer.runtime.pages import json_for_html, render_page
from cisformer.runtime.provenance import package_version

logger = logging.getLogger(__name__)

MAX_LINKS = 50_000
MOST_GENES, TOP_PER_TYPE = 40, 5
FLANK_SHARE, FLANK_BP = 0.5, 10_000
"""How much is shown beside a gene's links, as a share of their reach; and at least so much."""


@dataclass(frozen=True)
class PageLinks:
    """What a page shows.

    Attributes
    ----------
    stored
        Where the links are from.
    rows
        The strongest links: gene, ccre (rows of `stored`), type (its number), distance, score, specificity, fdr.
    n_links
        How many have the smallest score or more.
    n_open
        In how many cells of each type each cCRE is open; [types, cCREs].
    """

    stored: StoredLinks
    rows: pd.DataFrame
    n_links: int
    n_open: np.ndarray


def browse(
    links: str | Path,
    output: str | Path,
    *,
    max_links: int = MAX_LINKS,
    min_score: float = 0.05,
    title: str = "",
) -> Path:
    """Write one HTML page of links that needs no network and no other file.

    Parameters
    ----------
    links
        The `cisformer_link` folder, or a `links.tsv.gz`.
    output
        The page, `.html`.
    max_links
        Maximum number of links to show: those with the highest scores.
    min_score
        Smallest score of a link to show.
    title
        Heading of the page; by default the name of the links.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    InputError
        If there are no links, or none has that score.
    """
    if Path(output).suffix.lower() not in (".html", ".htm"):
        raise InputError(f"cannot write a page to {output}", hint="end its name in .html")
    shown = choose_links(open_links(links), max_links, min_score)
    stored = shown.stored
    heading = title or Path(stored.source).resolve().parent.name or Path(stored.source).name
    page = render_page(
        "cisformer.analysis", "browse.html", heading=heading, data=_markup(json_for_html(page_data(shown))),
        genome=stored.genome, source=Path(stored.source).name, version=package_version(), n_links=shown.n_links,
        n_shown=len(shown.rows), min_score=min_score, n_types=len(stored.cell_types),
        n_genes=int(shown.rows["gene"].nunique()), cells_known=any(stored.n_cells.values()),
    )  # fmt: skip
    with atomic_path(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Path(output)


def _markup(text: str) -> Any:
    from markupsafe import Markup

    return Markup(text)


def choose_links(stored: StoredLinks, max_links: int, min_score: float) -> PageLinks:
    """Read links type by type and keep the strongest; see `browse`."""
    if max_links < 1:
        raise InputError(f"max_links is {max_links}", hint="give --max_links of 1 or more")
    n_open = np.zeros((len(stored.cell_types), len(stored.ccres)), dtype=np.float32)
    parts, n_links, highest = [], 0, 0.0
    for number, name in enumerate(stored.cell_types):
        table = stored.of_type(name, ("specificity", "fdr", "n_open")).assign(type=number)
        n_open[number, table["ccre"]] = table["n_open"].fillna(0).to_numpy(np.float32)
        highest = max(highest, float(table["score"].max() if len(table) else 0))
        table = table[table["score"] >= min_score]
        n_links += len(table)
        parts.append(table.nlargest(max_links, "score", keep="first").drop(columns="n_open"))
    rows = pd.concat(parts, ignore_index=True).sort_values("score", ascending=False, kind="stable")
    rows = rows.head(max_links).reset_index(drop=True)
    if rows.empty:
        raise InputError(
            f"no link of {stored.source} has a score of {min_score:g}: the highest is {highest:.3g}",
            hint="lower --min_score",
        )
    if len(rows) < n_links:
        logger.info("the page shows the %d strongest of %d links; --max_links shows more", len(rows), n_links)
    return PageLinks(stored, rows, n_links, n_open)


# ---------------------------------------------------------------------------------------------- start page


def strength(rows: pd.DataFrame, n_types: int) -> np.ndarray:
    """Return how strong and how specific of its type each link is; [L].

    Score times specificity (log odds) where the links have one; score less the best of the same pair in another type
    otherwise; the score alone where there is one type.
    """
    score: np.ndarray = rows["score"].to_numpy(np.float64)
    if n_types < 2:
        return score
    specificity: np.ndarray = rows["specificity"].to_numpy(np.float64)
    if np.isfinite(specificity).any():
        strengths: np.ndarray = score * np.nan_to_num(specificity)
        return strengths
    pair = pd.MultiIndex.from_frame(rows[["gene", "ccre"]])
    ranked = pd.Series(score, pair).sort_values(ascending=False, kind="stable")
    place = ranked.groupby(level=[0, 1], sort=False).cumcount()
    first, second = (ranked[place == k].reindex(pair).fillna(0).to_numpy() for k in (0, 1))
    less: np.ndarray = score - np.where(score == first, second, first)
    return less


def start_tables(shown: PageLinks) -> dict[str, Any]:
    """Return the strongest type-specific links (rows), and the heat map: for each gene its most type-specific link.

    The heat map's values are that link's specificity in every type, or its score where links have no specificity;
    `None` where a type does not list it.
    """
    rows, n_types = shown.rows, len(shown.stored.cell_types)
    ranked = rows.assign(strength=strength(rows, n_types))
    ranked = ranked[ranked["strength"] > 0].sort_values("strength", ascending=False, kind="stable")
    in_order = {"by": ["type", "strength"], "ascending": [True, False], "kind": "stable"}
    top = ranked.drop_duplicates(["gene", "type"]).groupby("type").head(TOP_PER_TYPE).sort_values(**in_order)
    genes = ranked.drop_duplicates("gene").groupby("type").head(max(MOST_GENES // n_types, 1))
    genes = genes.sort_values(**in_order)
    specific = n_types > 1 and bool(np.isfinite(rows["specificity"]).any())
    what = "specificity" if specific else "score"
    values = _in_all_types(shown.stored, genes, what)
    heat = {
        "what": what,
        "links": genes.index.tolist(),
        "values": [[_rounded(v) for v in line] for line in values],
    }
    return {"top": top.index.tolist(), "heat": heat}


def _in_all_types(stored: StoredLinks, rows: pd.DataFrame, column: str) -> np.ndarray:
    """Return what some links have in each type, NaN where a type does not list them; [rows, types]."""
    wanted = pd.MultiIndex.from_frame(rows[["gene", "ccre"]])
    values = np.full((len(rows), len(stored.cell_types)), np.nan)
    for number, name in enumerate(stored.cell_types):
        table = stored.of_type(name, ("specificity",))
        table = table[table["ccre"].isin(set(rows["ccre"]))]
        known = pd.Series(
            table[column].to_numpy(np.float64), pd.MultiIndex.from_frame(table[["gene", "ccre"]])
        )
        values[:, number] = known.reindex(wanted).to_numpy()
    return values


# ---------------------------------------------------------------------------------------------- data of the page


def page_data(shown: PageLinks) -> dict[str, Any]:
    """Return what the page's script reads: columns of genes, cCREs and links, accessibility packed in bytes."""
    stored, rows = shown.stored, shown.rows
    genes, gene_row = _genes(stored, rows)
    ccres = _ccres_in_view(stored, rows, shown.n_open)
    at = pd.Series(np.arange(len(ccres)), ccres)
    chroms, chrom = np.unique(stored.ccres["chrom"].to_numpy(str)[ccres], return_inverse=True)
    region = stored.ccres.iloc[ccres]
    cells = np.array(list(stored.n_cells.values()), dtype=np.float64)
    share = (
        shown.n_open[:, ccres] / np.where(cells > 0, cells, np.maximum(shown.n_open.max(axis=1), 1))[:, None]
    )
    most = float(share.max(initial=0)) or 1.0
    packed = np.ceil(np.clip(share / most, 0, 1) * 255).astype(np.uint8)
    return {
        "genome": stored.genome,
        "types": stored.cell_types,
        "cells": [int(n) for n in cells],
        "genes": genes,
        "ccres": {
            "chroms": chroms.tolist(), "chrom": chrom.tolist(), "start": region["start"].tolist(),
            "width": (region["end"] - region["start"]).tolist(),
        },
        "open": base64.b64encode(packed.tobytes()).decode(),
        "most": most,
        "links": {
            "gene": gene_row.reindex(rows["gene"]).tolist(), "ccre": at.reindex(rows["ccre"]).tolist(),
            "type": rows["type"].tolist(), "distance": rows["distance"].astype(int).tolist(),
            **{name: [_rounded(v) for v in rows[name].tolist()] for name in ("score", "specificity", "fdr")},
        },
        **start_tables(shown),
    }  # fmt: skip


def _rounded(value: float | None) -> float | None:
    """Return a number of four digits; `None` where there is none."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def _genes(stored: StoredLinks, rows: pd.DataFrame) -> tuple[dict[str, Any], pd.Series]:
    """Return the columns of genes: those with links, then those to draw beside; and reference row → row of these."""
    linked = np.sort(rows["gene"].unique())
    names = stored.genes["gene_name"].astype(str)
    beside = (stored.genes["end"] > 0) & ~names.str.contains(CLONE)
    others = np.setdiff1d(np.flatnonzero(beside), linked)
    chosen = np.concatenate([linked, others])
    table = stored.genes.iloc[chosen]
    columns: Mapping[str, Any] = {
        "name": [name or gene_id for name, gene_id in zip(table["gene_name"], table["gene_id"], strict=True)],
        "id": table["gene_id"].astype(str).tolist()[: len(linked)],
        "chrom": table["chrom"].astype(str).tolist(),
        "start": table["start"].tolist(),
        "end": table["end"].tolist(),
        "minus": (table["strand"] == "-").astype(int).tolist(),
        "linked": len(linked),
    }
    return dict(columns), pd.Series(np.arange(len(chosen)), chosen)


def _ccres_in_view(stored: StoredLinks, rows: pd.DataFrame, n_open: np.ndarray) -> np.ndarray:
    """Return the cCREs that are linked, or open somewhere near a gene's links; rows of the reference, ascending."""
    ends = rows.assign(
        start=stored.ccres["start"].to_numpy()[rows["ccre"]], end=stored.ccres["end"].to_numpy()[rows["ccre"]]
    )
    reach = ends.groupby("gene").agg(start=("start", "min"), end=("end", "max"))
    genes = stored.genes.iloc[reach.index]
    start = np.minimum(reach["start"].to_numpy(), genes["start"].to_numpy())
    end = np.maximum(reach["end"].to_numpy(), genes["end"].to_numpy())
    flank = np.maximum((FLANK_SHARE * (end - start)).astype(np.int64), FLANK_BP)
    views = pd.DataFrame(
        {"chrom": genes["chrom"].to_numpy(), "start": np.maximum(start - flank, 0), "end": end + flank}
    )
    near = overlap_pairs(views, stored.ccres)[1]
    is_open = n_open.max(axis=0, initial=0) > 0
    return np.union1d(near[is_open[near]], rows["ccre"].unique())
