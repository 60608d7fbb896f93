"""Score links of any tool against pairs that were tested in the laboratory, or planted.

Every tested pair is in the count: one that a tool has no score for ranks last, and how many these are is
said. Beside each score stand distance, the nearest gene and, where known, activity × contact.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.data.genome import rename_chroms, signed_distance
from cisformer.data.reference import Reference
from cisformer.errors import InputError
from cisformer.links.formats import read_links
from cisformer.links.precision import average_precision, bootstrap_interval, enrichment
from cisformer.links.statistics import distance_contact
from cisformer.links.truth import TruePairs, match_scores, read_truth, same_genes, same_pairs
from cisformer.runtime.files import atomic_path
from cisformer.runtime.provenance import provenance

logger = logging.getLogger(__name__)
DISTANCE_BINS_BP = (0, 10_000, 50_000, 100_000, 250_000, np.inf)
N_BOOTSTRAP = 1000


@dataclass(frozen=True)
class MethodScore:
    """How well one score finds the links among some pairs.

    Attributes
    ----------
    method, distance_bin
        Which score, over which pairs.
    n_pairs, n_links
        Pairs and links among them.
    auprc, low, high
        Average precision and its 95 % bootstrap interval, genes drawn anew; NaN where there is no link.
    """

    method: str
    distance_bin: str
    n_pairs: int
    n_links: int
    auprc: float
    low: float
    high: float


@dataclass(frozen=True)
class LinkEvaluation:
    """The result of `evaluate_links`.

    Attributes
    ----------
    scores
        One per method and distance bin, "all" first.
    curves
        Method → enrichment (precision over the share of links among pairs) at each of `RECALLS`.
    coverage
        How many pairs and links there are, and how many the table has a score for.
    source
        Files, options, versions.
    """

    scores: list[MethodScore]
    curves: dict[str, list[float]]
    coverage: dict[str, int]
    source: dict[str, object]

    @property
    def table(self) -> pd.DataFrame:
        """One row per method and distance bin."""
        return pd.DataFrame([asdict(score) for score in self.scores])

    def auprc(self, method: str, distance_bin: str = "all") -> float:
        """Return the average precision of a method."""
        return next(s.auprc for s in self.scores if (s.method, s.distance_bin) == (method, distance_bin))

    def describe(self) -> str:
        """Return the result as lines of text."""
        c = self.coverage
        pair_share, link_share = c["pairs_scored"] / c["pairs"], c["links_scored"] / c["links"]
        lines = [
            f"{c['pairs']:,} pairs, {c['links']:,} of them links",
            f"scored: {c['pairs_scored']:,} pairs ({pair_share:.0%}), {c['links_scored']:,} links "
            f"({link_share:.0%}); the rest ranks last",
            f"{'AUPRC':<18}" + "".join(f"{name:>24}" for name in self.table["distance_bin"].unique()),
        ]
        for method, rows in self.table.groupby("method", sort=False):
            cells = (
                f"{r.auprc:.3f} [{r.low:.3f}, {r.high:.3f}]" if r.n_links else "no links"
                for r in rows.itertuples()
            )
            lines.append(f"{method:<18}" + "".join(f"{cell:>24}" for cell in cells))
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """Write the result as JSON."""
        with atomic_path(path) as temporary:
            text = json.dumps(_without_nan(asdict(self)), indent=1, default=str, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")


def _without_nan(value: object) -> object:
    """Return what JSON can hold: null in place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def evaluate_links(
    links: str | Path | pd.DataFrame | None,
    truth: str | Path | TruePairs,
    *,
    score: str | None = None,
    cell_type: str | None = None,
    reference: Reference | None = None,
    min_distance_bp: int = 0,
    n_bootstrap: int = N_BOOTSTRAP,
    seed: int = 0,
) -> LinkEvaluation:
    """Score links against true ones.

    Parameters
    ----------
    links
        The table of any tool, as a file or a frame (`Links.table` too): cCRE (chrom:start-end, or chrom, start,
        end), gene, score; or BEDPE. Without it only the baselines are scored.
    truth
        Tested pairs with a yes or no (a CRISPRi screen), fine-mapped eQTL (`pip`), or links alone.
    score
        Column to rank by.
    cell_type
        Use the links of this type only; otherwise a pair has its highest score of all types.
    reference
        Where genes are, to fill in distances that the truth does not give.
    min_distance_bp
        Leave nearer pairs out, such as promoters.
    n_bootstrap, seed
        Draws for the intervals, and their seed.

    Returns
    -------
    LinkEvaluation
        Average precision and enrichment of the score and of the baselines, overall and by distance;
        `describe()` is the text that the command prints.

    Raises
    ------
    InputError
        If a file cannot be read, or no pair or no link is left.
    """
    pairs = truth if isinstance(truth, TruePairs) else read_truth(truth)
    predicted = None if links is None else read_links(links, score=score)
    if predicted is not None and cell_type is not None:
        predicted = _of_type(predicted, cell_type)
    table = pairs.table
    if pairs.is_open:
        if predicted is None:
            raise InputError(f"{pairs.source} holds links only", hint="give a table of scored pairs")
        table = _universe(table, predicted, pairs.source)
    table = _with_distance(table, reference)
    table = table[~(table["distance"] < min_distance_bp)].reset_index(drop=True)
    methods = _baselines(table)
    scored = np.zeros(len(table), dtype=bool)
    if predicted is not None:
        found = match_scores(table, predicted)
        scored = np.isfinite(found)
        if not scored.any():
            raise _nothing_in_common(table, predicted, pairs.source)
        methods = {"score": np.where(scored, found, -np.inf)} | methods
    is_link = table["is_link"].to_numpy(bool)
    if not is_link.any() or is_link.all():
        raise InputError(
            f"of {len(table)} pairs in {pairs.source} {is_link.sum()} are links: nothing to tell apart",
            hint="give pairs that are links and pairs that are not",
        )
    coverage = {
        "pairs": len(table),
        "links": int(is_link.sum()),
        "pairs_scored": int(scored.sum()),
        "links_scored": int((scored & is_link).sum()),
    }
    scores = _score_bins(methods, table, n_bootstrap, seed)
    curves = {name: enrichment(is_link, values) for name, values in methods.items()}
    source = provenance(links=links if isinstance(links, str | Path) else None, truth=pairs.source, seed=seed)
    return LinkEvaluation(scores, curves, coverage, source)


def _of_type(predicted: pd.DataFrame, cell_type: str) -> pd.DataFrame:
    present = predicted["cell_type"].unique() if "cell_type" in predicted else np.array([], dtype=object)
    if cell_type not in present:
        names = ", ".join(map(str, present)) or "none"
        raise InputError(f"the links have no cell type {cell_type!r}", hint=f"they have: {names}")
    return predicted[predicted["cell_type"] == cell_type]


def _universe(links: pd.DataFrame, predicted: pd.DataFrame, source: str) -> pd.DataFrame:
    """Return every pair of `predicted` whose gene has a true link, and the links that it lacks."""
    wanted, own = same_genes(links, predicted)
    kept = np.isin(own, wanted)
    if not kept.any():
        raise _nothing_in_common(links, predicted, source)
    pairs = predicted[kept].assign(_gene=own[kept]).drop_duplicates(["chrom", "start", "end", "_gene"])
    pairs = pairs.drop(columns="_gene").reset_index(drop=True)
    left, right = same_pairs(pairs, links)
    if len(left) == 0:
        raise _nothing_in_common(links, predicted, source)
    missing = np.setdiff1d(np.arange(len(links)), right)
    pairs["is_link"] = np.isin(np.arange(len(pairs)), left)
    if "distance" in pairs:
        pairs["distance"] = pairs["distance"].abs()
    rest = links.assign(_gene=wanted).iloc[missing].drop_duplicates(["chrom", "start", "end", "_gene"])
    shared = [name for name in pairs.columns if name in rest.columns]
    return pd.concat([pairs, rest[shared]], ignore_index=True)


def _nothing_in_common(pairs: pd.DataFrame, predicted: pd.DataFrame, source: str) -> InputError:
    """Return the error that says whether genes or elements have nothing in common."""
    left, right = same_genes(pairs, predicted)
    n_genes = len(set(left) & set(right))
    n_chroms = len(set(rename_chroms(predicted["chrom"], pairs["chrom"].unique())) & set(pairs["chrom"]))
    shown = [
        f"{t['chrom'].iloc[0]}:{t['start'].iloc[0]}-{t['end'].iloc[0]} {t['gene'].iloc[0]}"
        for t in (predicted, pairs)
    ]
    return InputError(
        f"no pair of {source} is among the {len(predicted)} links: {n_genes} genes and {n_chroms} chromosomes in "
        f"common; the links are such as {shown[0]}, the pairs such as {shown[1]}",
        hint="give links and pairs of one genome assembly, with the same kind of gene names",
    )


def _with_distance(table: pd.DataFrame, reference: Reference | None) -> pd.DataFrame:
    """Fill in missing distances from the reference's genes, by id or name."""
    distance = table.get("distance", pd.Series(np.nan, index=table.index)).to_numpy(np.float64).copy()
    missing = np.flatnonzero(np.isnan(distance))
    if reference is not None and len(missing):
        genes = reference.genes.rename(columns={"gene_name": "gene"})
        wanted, known_genes = same_genes(table, genes)
        first = pd.Series(np.arange(len(genes)), index=known_genes)
        first = first[~first.index.duplicated()]
        row = first.reindex(wanted[missing]).to_numpy(np.float64)
        known = ~np.isnan(row)
        where, gene = missing[known], row[known].astype(np.int64)
        chrom = rename_chroms(table["chrom"].astype(str), genes["chrom"].unique()).to_numpy()
        same = genes["chrom"].to_numpy()[gene] == chrom[where]
        where, gene = where[same], gene[same]
        regions = table[["chrom", "start", "end"]].reset_index(drop=True)
        distance[where] = np.abs(signed_distance(reference.genes, regions, gene, where))
    return table.assign(distance=distance)


def _baselines(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return scores that need no model."""
    distance = table["distance"].to_numpy(np.float64)
    if np.isnan(distance).all():
        logger.warning("no distances: give a reference with the genes to compare with distance")
        return {}
    closeness = np.where(np.isnan(distance), -np.inf, -distance)
    element = table[["chrom", "start", "end"]].astype(str).agg(":".join, axis=1)
    nearest = pd.Series(closeness).groupby(element.to_numpy()).transform("max").to_numpy()
    methods = {"distance": closeness, "nearest gene": (closeness == nearest) & np.isfinite(closeness)}
    if "activity" in table:
        activity = table["activity"].to_numpy(np.float64)
        methods["activity/distance"] = np.nan_to_num(
            activity * distance_contact(np.nan_to_num(distance, nan=np.inf))
        )
    if "activity_contact" in table:
        methods["activity_contact"] = table["activity_contact"].fillna(0).to_numpy(np.float64)
    return {name: np.asarray(values, dtype=np.float64) for name, values in methods.items()}


def _score_bins(
    methods: dict[str, np.ndarray], table: pd.DataFrame, n_bootstrap: int, seed: int
) -> list[MethodScore]:
    is_link = table["is_link"].to_numpy(bool)
    gene = pd.factorize(table["gene"])[0]
    bins: dict[str, np.ndarray] = {"all": np.ones(len(table), dtype=bool)}
    distance = table["distance"].to_numpy(np.float64)
    for low, high in pairwise(DISTANCE_BINS_BP):
        inside = (distance >= low) & (distance < high)
        if inside.any():
            bins[_bin_name(low, high)] = inside
    scores = []
    for name, values in methods.items():
        for label, inside in bins.items():
            truth = is_link[inside]
            area = average_precision(truth, values[inside])
            low, high = bootstrap_interval(truth, values[inside], gene[inside], n_bootstrap, seed)
            scores.append(MethodScore(name, label, int(inside.sum()), int(truth.sum()), area, low, high))
    return scores


def _bin_name(low: float, high: float) -> str:
    return f"{low / 1000:g} kb+" if np.isinf(high) else f"{low / 1000:g}-{high / 1000:g} kb"
