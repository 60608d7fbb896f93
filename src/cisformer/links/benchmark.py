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

from cisformer.data.genome import overlap_pairs, rename_chroms, signed_distance
from cisformer.data.reference import Reference
from cisformer.errors import InputError
from cisformer.links.formats import (
    GENE_ID_NAMES,
    GENE_NAMES,
    first_column,
    is_bedpe,
    places_of,
    read_any_table,
    read_bedpe,
    read_links,
    regions_of,
)
from cisformer.links.statistics import distance_contact
from cisformer.runtime.files import atomic_path
from cisformer.runtime.provenance import provenance

logger = logging.getLogger(__name__)
DISTANCE_BINS_BP = (0, 10_000, 50_000, 100_000, 250_000, np.inf)
RECALLS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
N_BOOTSTRAP = 1000
LABEL_NAMES = ("regulated", "significant", "label", "truth", "is_link", "positive")
DISTANCE_NAMES = ("distance", "distancetotss", "distance_to_tss")
ACTIVITY_NAMES = ("activity", "dhs.rpm", "atac.rpm", "h3k27ac.rpm")
EQTL_PIP = 0.5


@dataclass(frozen=True)
class TruePairs:
    """Pairs of an element and a gene, and which of them are links.

    Attributes
    ----------
    table
        Columns chrom, start, end, gene, is_link, distance (bp, absolute; NaN where unknown), and activity and
        gene_id where known. One row per pair.
    is_open
        Whether the pairs are positives only, every other pair of the same genes being counted as no link.
    source
        Where they come from.
    """

    table: pd.DataFrame
    is_open: bool
    source: str


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


def read_truth(path: str | Path) -> TruePairs:
    """Read true links.

    Parameters
    ----------
    path
        One of, told apart by their columns:

        - tested pairs, such as the CRISPRi benchmark of Gschwind et al.: chrom, chromStart, chromEnd (or
          start, end), a gene, and Regulated (or significant, label, …); distance and DHS.RPM are used;
        - fine-mapped eQTL: chrom, pos (or variant_id chr_pos_ref_alt), a gene, and pip: 0.5 is a link;
        - links only: BEDPE, or a table with a cCRE and a gene such as the true_links.tsv of `simulate`. All
          other pairs of the same genes in the evaluated table then count as no link.

    Raises
    ------
    InputError
        If the file is missing or none of these.
    """
    path = Path(path)
    if is_bedpe(path):
        return TruePairs(read_bedpe(path).assign(is_link=True, distance=np.nan), True, str(path))
    table = read_any_table(path)
    places = places_of(table)
    gene = first_column(places, GENE_NAMES)
    if gene is None:
        raise InputError(f"{path} has no column for a gene", hint=f"name it one of: {', '.join(GENE_NAMES)}")
    pairs = _variants(table, places) if "pip" in places else regions_of(table, places, path)
    pairs["gene"] = table[gene].astype(str)
    if (name := first_column(places, GENE_ID_NAMES)) is not None:
        pairs["gene_id"] = table[name].astype(str)
    pairs["distance"] = np.nan
    if (name := first_column(places, DISTANCE_NAMES)) is not None:
        pairs["distance"] = pd.to_numeric(table[name], errors="coerce").abs()
    if (name := first_column(places, ACTIVITY_NAMES)) is not None:
        pairs["activity"] = pd.to_numeric(table[name], errors="coerce").fillna(0)
    label = first_column(places, LABEL_NAMES)
    if "pip" in places:
        pairs["is_link"] = pd.to_numeric(table[places["pip"]], errors="coerce") >= EQTL_PIP
    elif label is not None:
        pairs["is_link"] = _booleans(table[label], f"{path}, column {label}")
    else:
        pairs["is_link"] = True
    return TruePairs(pairs, bool(pairs["is_link"].all()), str(path))


def _variants(table: pd.DataFrame, places: Mapping[str, str]) -> pd.DataFrame:
    """Return the single base of each variant as a region."""
    if "variant_id" in places and "pos" not in places:
        parts = table[places["variant_id"]].astype(str).str.extract(r"^(\w+?)[_:](\d+)")
        chrom, position = parts[0], pd.to_numeric(parts[1])
    else:
        chrom = table[first_column(places, ("chrom", "chr")) or "chrom"].astype(str)
        position = pd.to_numeric(table[places["pos"]])
    chrom = chrom.where(chrom.str.startswith("chr"), "chr" + chrom)
    return pd.DataFrame({"chrom": chrom, "start": position - 1, "end": position}).astype(
        {"start": np.int64, "end": np.int64}
    )


def _booleans(column: pd.Series, what: str) -> np.ndarray:
    text = column.astype(str).str.strip().str.lower()
    known = text.isin(["true", "1", "1.0", "yes", "false", "0", "0.0", "no"])
    if not known.all():
        raise InputError(f"{what} holds {column[~known].iloc[0]!r}", hint="wanted: TRUE or FALSE, 1 or 0")
    truth: np.ndarray = text.isin(["true", "1", "1.0", "yes"]).to_numpy()
    return truth


def _universe(links: pd.DataFrame, predicted: pd.DataFrame, source: str) -> pd.DataFrame:
    """Return every pair of `predicted` whose gene has a true link, and the links that it lacks."""
    wanted, own = same_genes(links, predicted)
    kept = np.isin(own, wanted)
    if not kept.any():
        raise _nothing_in_common(links, predicted, source)
    pairs = predicted[kept].assign(_gene=own[kept]).drop_duplicates(["chrom", "start", "end", "_gene"])
    pairs = pairs.drop(columns="_gene").reset_index(drop=True)
    left, right = _same_pairs(pairs, links)
    if len(left) == 0:
        raise _nothing_in_common(links, predicted, source)
    missing = np.setdiff1d(np.arange(len(links)), right)
    pairs["is_link"] = np.isin(np.arange(len(pairs)), left)
    if "distance" in pairs:
        pairs["distance"] = pairs["distance"].abs()
    rest = links.assign(_gene=wanted).iloc[missing].drop_duplicates(["chrom", "start", "end", "_gene"])
    shared = [name for name in pairs.columns if name in rest.columns]
    return pd.concat([pairs, rest[shared]], ignore_index=True)


def match_scores(pairs: pd.DataFrame, predicted: pd.DataFrame) -> np.ndarray:
    """Return the highest score of predicted elements that overlap a pair's, for its gene; NaN if none."""
    left, right = _same_pairs(pairs, predicted)
    best = np.full(len(pairs), -np.inf)
    values = predicted["score"].to_numpy(np.float64)[right]
    np.fmax.at(best, left, values)
    return np.where(np.isneginf(best), np.nan, best)


def gene_keys(names: pd.Series) -> pd.Series:
    """Return gene names or ids as they are compared: in one case, what stands before `|`, ids without version.

    Examples
    --------
    >>> gene_keys(pd.Series(["Gata1", "ENSG00000102145.15", "TAL1|chr1:47681961"])).tolist()
    ['gata1', 'ensg00000102145', 'tal1']
    """
    plain = names.astype(str).str.strip().str.split("|").str[0].str.casefold()
    return plain.str.replace(r"^(ens[a-z]*\d+)\.\d+$", r"\1", regex=True)


def same_genes(left: pd.DataFrame, right: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the genes of two tables, spelled alike; by ids or names, whichever more rows have in common."""
    columns = ("gene_id", "gene")
    keys = [{name: gene_keys(table[name]) for name in columns if name in table} for table in (left, right)]
    best = max(
        ((a, b) for a in keys[0].values() for b in keys[1].values()),
        key=lambda pair: int(pair[0].isin(pair[1]).sum()),
    )
    return best[0].to_numpy(), best[1].to_numpy()


def _same_pairs(left: pd.DataFrame, right: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of `left` and `right` that are the same gene and overlapping elements."""
    genes = same_genes(left, right)
    chroms = (
        left["chrom"].astype(str),
        rename_chroms(right["chrom"].astype(str), left["chrom"].astype(str).unique()),
    )
    code, _ = pd.factorize(np.concatenate(genes))

    def keyed(table: pd.DataFrame, chrom: pd.Series, codes: np.ndarray) -> pd.DataFrame:
        both = [f"{chrom}\t{gene}" for chrom, gene in zip(chrom, codes, strict=True)]
        return pd.DataFrame(
            {"chrom": both, "start": table["start"].to_numpy(), "end": table["end"].to_numpy()}
        )

    return overlap_pairs(
        keyed(left, chroms[0], code[: len(left)]), keyed(right, chroms[1], code[len(left) :])
    )


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


def average_precision(is_link: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the precision-recall curve by steps, ties being one; NaN without a link."""
    return _average_precision(is_link.astype(np.float64), *_order(score), np.ones(len(is_link)))


def _order(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of falling scores, and where in it each group of ties ends."""
    order = np.argsort(-score, kind="stable")
    ordered = score[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    return order, last


def _average_precision(is_link: np.ndarray, order: np.ndarray, last: np.ndarray, weight: np.ndarray) -> float:
    found = np.cumsum((is_link * weight)[order])[last]
    called = np.cumsum(weight[order])[last]
    if len(found) == 0 or found[-1] == 0:
        return float("nan")
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    return float(np.sum(np.diff(found, prepend=0) * precision) / found[-1])


def bootstrap_interval(
    is_link: np.ndarray, score: np.ndarray, gene: np.ndarray, n_draws: int, seed: int
) -> tuple[float, float]:
    """Return the 95 % interval of the average precision when genes, with all their pairs, are drawn anew."""
    if not is_link.any() or n_draws == 0:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    order, last = _order(score)
    _, gene = np.unique(gene, return_inverse=True)
    n_genes = int(gene.max()) + 1
    truth = is_link.astype(np.float64)
    areas = []
    for _ in range(n_draws):
        times_drawn = np.bincount(rng.integers(0, n_genes, n_genes), minlength=n_genes)
        areas.append(_average_precision(truth, order, last, times_drawn[gene]))
    low, high = np.nanpercentile(areas, [2.5, 97.5])
    return float(low), float(high)


def enrichment(is_link: np.ndarray, score: np.ndarray) -> list[float]:
    """Return precision over the share of links, at the first threshold that reaches each of `RECALLS`."""
    order, last = _order(score)
    found, called = np.cumsum(is_link[order])[last], last + 1
    at = np.searchsorted(found, np.array(RECALLS) * is_link.sum() - 1e-9)
    return [float(value) for value in found[at] / called[at] / is_link.mean()]
