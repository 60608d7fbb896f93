"""From transcription factors to cCREs to genes: which factor's motif, active in a type, stands in which link."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.analysis.drivers import Activity, agreement, measure_activity, relative_accessibility, strata
from cisformer.analysis.motifs import Hits, factors_of, find_motifs, read_motifs
from cisformer.analysis.networks import BaseGrn, network_of, write_base_grn
from cisformer.analysis.sequences import read_sequences
from cisformer.analysis.stored import StoredLinks, open_links
from cisformer.data.genome import region_names
from cisformer.errors import InputError
from cisformer.links.files import safe_name
from cisformer.links.formats import text_writer
from cisformer.links.type_scores import MOST_EXPRESSION, works
from cisformer.runtime.files import atomic_folder, refuse_existing
from cisformer.runtime.provenance import provenance

logger = logging.getLogger(__name__)
FORMAT, FORMAT_VERSION = "cisformer-regulon", 1
TRIPLETS, ACTIVITY, NETWORK, GRN, REPORT = (
    "triplets.tsv.gz", "activity.tsv", "network.tsv", "base_grn.tsv.gz", "report.json",
)  # fmt: skip
NETWORKS = "networks"
LINKS_AT_ONCE = 20_000


@dataclass(frozen=True)
class RegulonOptions:
    """What counts as a link, a motif and a triplet; checks itself.

    Attributes
    ----------
    min_score
        Smallest score of a link.
    max_p
        Largest p-value of a motif's match.
    min_triplet
        Smallest score of a triplet that is reported.
    """

    min_score: float = 0.1
    max_p: float = 1e-4
    min_triplet: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.max_p < 1:
            raise InputError(
                f"the largest p-value is {self.max_p:g}", hint="give one between 0 and 1, such as 1e-4"
            )


@dataclass(frozen=True)
class Regulon:
    """Transcription factors, the cCREs with their motifs, and the linked genes.

    Attributes
    ----------
    triplets
        One row per cell type, factor, cCRE and gene, the highest score first within a type.
    activity
        One row per cell type and factor.
    base_grn
        Motifs of all linked pairs, whatever is active.
    report
        Sources, options and counts.
    """

    triplets: pd.DataFrame
    activity: pd.DataFrame
    base_grn: BaseGrn
    report: dict[str, object]

    def network(self, cell_type: str | None = None) -> pd.DataFrame:
        """Return source, target and weight, as decoupler takes them, of one cell type or of all."""
        rows = self.triplets if cell_type is None else self.triplets[self.triplets["cell_type"] == cell_type]
        return network_of(rows)

    def describe(self) -> str:
        """Return the result in a few lines."""
        lines = []
        for name, part in self.activity.groupby("cell_type", sort=True):
            active = part[(part["fdr"] < 0.05) & (part["activity"] > 0)].nlargest(5, "n_targets")
            mine = self.triplets[self.triplets["cell_type"] == name]
            best = ", ".join(
                f"{tf} ({n:,})" for tf, n in zip(active["tf"], active["n_targets"], strict=True) if n
            )
            lines.append(f"{name}: {len(mine):,} triplets; factors with most target genes: {best or 'none'}")
        return "\n".join(lines)

    def write(self, folder: str | Path, *, force: bool = False) -> list[Path]:
        """Write the tables and networks into a folder; return their paths."""
        folder = Path(folder)
        refuse_existing(folder, force=force)
        with atomic_folder(folder, force=force) as temporary:
            tables = {TRIPLETS: self.triplets, ACTIVITY: self.activity, NETWORK: self.network()}
            names: list[str] = []
            (temporary / NETWORKS).mkdir()
            for name in sorted(self.activity["cell_type"].unique()):
                names.append(safe_name(name, names))
                tables[f"{NETWORKS}/{names[-1]}.tsv"] = self.network(name)
            for file, table in tables.items():
                with text_writer(temporary / file) as handle:
                    table.to_csv(handle, sep="\t", index=False, float_format="%.5g")
            write_base_grn(self.base_grn, temporary / GRN)
            about = {"format": FORMAT, "format_version": FORMAT_VERSION, **provenance(**self.report)}
            (temporary / REPORT).write_text(
                json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        return [folder / file for file in (*tables, GRN, REPORT)]


def link_tfs(
    links: str | Path,
    fasta: str | Path,
    motifs: str | Path,
    *,
    min_score: float = 0.1,
    max_p: float = 1e-4,
    min_triplet: float = 0.02,
) -> Regulon:
    """Find which transcription factors drive which genes through which linked cCREs, in each cell type.

    Parameters
    ----------
    links
        The `cisformer_link` folder, or a `links.tsv.gz`.
    fasta
        The genome of the links, plain or gzipped.
    motifs
        Motifs in MEME's text format; their names contain the symbols of their genes.
    min_score
        Smallest score of a link.
    max_p
        Largest p-value of a motif's match.
    min_triplet
        Smallest score of a triplet that is reported.

    Returns
    -------
    Regulon
        The score of a triplet, between 0 and 1, is the product of three: the link's score in the type; the share of
        such motif matches that are more than chance, as similar cCREs have them; and whether the factor's expression in
        the type and over types agrees. It ranks triplets; it is not the probability of one.

    Raises
    ------
    InputError
        If a file cannot be read, the genomes differ, or no motif has the name of a gene of the links.
    """
    options = RegulonOptions(min_score, max_p, min_triplet)
    named = read_motifs(motifs)
    stored = open_links(links)
    factors = _factors(named, stored, str(motifs))
    cells = _Types.read(stored, factors, options)
    hits = _scan(named, factors, cells, fasta, stored, options)
    sites = _Sites.of(stored, cells, factors, hits)
    parts = [_triplets(stored, k, cells, factors, sites, options) for k in range(len(stored.cell_types))]
    triplets = pd.concat(parts, ignore_index=True)
    grn = BaseGrn.of(stored, sites.place, sites.matches, factors.genes, min_score)
    n_known = sites.matches.shape[0]
    report: dict[str, object] = {
        "links": stored.source, "fasta": str(fasta), "motifs": str(motifs), "options": asdict(options),
        "genome": stored.genome, "n_ccres": n_known, "n_ccres_without_sequence": len(cells.ccres) - n_known,
        "n_factors": len(factors.names), "motifs_without_gene": factors.unknown,
    }  # fmt: skip
    return Regulon(triplets, _activity_table(stored, factors, cells, sites, triplets), grn, report)


@dataclass(frozen=True)
class _Factors:
    """Factors that the motifs are of: `genes` of each (rows of the links' genes), `of_motif` its number or −1."""

    names: list[str]
    motifs: list[str]
    genes: list[list[str]]
    rows: list[np.ndarray]
    of_motif: np.ndarray
    unknown: list[str]

    def match(self, hits: Hits, place: np.ndarray, n_ccres: int) -> sp.csr_matrix:
        """Return 1 where a cCRE has a motif of a factor; [n_ccres, T]."""
        factor, row = self.of_motif[hits.motif], place[hits.row]
        kept = (factor >= 0) & (row >= 0)
        shape = (n_ccres, len(self.names))
        found = sp.csr_matrix((np.ones(kept.sum(), np.float32), (row[kept], factor[kept])), shape=shape)
        found.data[:] = 1
        return found


def _factors(named: dict[str, np.ndarray], stored: StoredLinks, source: str) -> _Factors:
    names = stored.genes["gene_name"].astype(str)
    found, unknown = factors_of(named, names)
    if not found:
        raise InputError(
            f"no motif of {source} has the name of a gene of the links: {', '.join(list(named)[:3])} against "
            f"{', '.join(names[:3])}",
            hint="give motifs whose names hold gene symbols, such as MA0139.1 CTCF",
        )
    if unknown:
        some = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        logger.warning(
            "%d of %d motifs belong to no gene of the links and are left out (%s)",
            len(unknown),
            len(named),
            some,
        )
    factors = sorted({"::".join(genes) for genes in found.values()})
    number = {name: n for n, name in enumerate(factors)}
    of_motif = np.array([number["::".join(found[name])] if name in found else -1 for name in named])
    first = pd.Series(np.arange(len(names)), index=names).groupby(level=0).first()
    genes = [name.split("::") for name in factors]
    motifs = pd.Series(list(named)).groupby(of_motif).agg(", ".join)
    return _Factors(
        factors,
        motifs.reindex(range(len(factors))).tolist(),
        genes,
        [first[part].to_numpy() for part in genes],
        of_motif,
        unknown,
    )


@dataclass(frozen=True)
class _Types:
    """Linked cCREs (rows of the links'), cells in which each is open [P, K], and expression of factors [T, K]."""

    ccres: np.ndarray
    n_open: np.ndarray
    expression: np.ndarray

    @classmethod
    def read(cls, stored: StoredLinks, factors: _Factors, options: RegulonOptions) -> _Types:
        """Read each type once."""
        n_open = np.zeros((len(stored.ccres), len(stored.cell_types)), np.float32)
        expression = np.full((len(stored.genes), len(stored.cell_types)), np.nan)
        linked = np.zeros(len(stored.ccres), dtype=bool)
        for k, name in enumerate(stored.cell_types):
            table = stored.of_type(name, ("n_open", "expression"))
            n_open[table["ccre"], k] = table["n_open"]
            expression[table["gene"], k] = table["expression"]
            linked[table["ccre"][table["score"] >= options.min_score]] = True
        ccres = np.flatnonzero(linked)
        if len(ccres) == 0:
            raise InputError(
                f"no link of {stored.source} has a score of {options.min_score:g}", hint="lower --min_score"
            )
        n_open = n_open[ccres]
        if np.isnan(n_open).all():
            raise InputError(
                f"{stored.source} does not say in how many cells cCREs are open (n_open)",
                hint="give the links.tsv.gz that atac2rna_link wrote",
            )
        return cls(ccres, np.nan_to_num(n_open), _of_factors(expression, factors))


def _of_factors(expression: np.ndarray, factors: _Factors) -> np.ndarray:
    """Return the expression of factors: of dimers the lower one; where a gene is not listed in a type, the least."""
    if np.isnan(expression).all():
        logger.warning("the links hold no expression of genes, so factors count as expressed in all types")
        return np.zeros((len(factors.names), expression.shape[1]))
    known = np.where(np.isnan(expression), -MOST_EXPRESSION, expression)
    return np.stack([known[rows].min(axis=0) for rows in factors.rows])


def _scan(
    named: dict[str, np.ndarray],
    factors: _Factors,
    cells: _Types,
    fasta: str | Path,
    stored: StoredLinks,
    options: RegulonOptions,
) -> Hits:
    """Find the motifs that are of known genes; numbers of motifs are those of `named`."""
    wanted = np.flatnonzero(factors.of_motif >= 0)
    keys = list(named)
    regions = stored.ccres.iloc[cells.ccres].reset_index(drop=True)
    sequences = read_sequences(fasta, regions, stored.genome)
    hits = find_motifs({keys[n]: named[keys[n]] for n in wanted}, sequences, len(regions), options.max_p)
    return Hits(hits.row, wanted[hits.motif].astype(np.int32), hits.log_p, hits.gc, hits.length)


@dataclass(frozen=True)
class _Sites:
    """Matches of factors in cCREs with a sequence, [P, T]; the row there of each cCRE of the links, −1 for others."""

    matches: sp.csr_matrix
    place: np.ndarray
    activity: Activity

    @classmethod
    def of(cls, stored: StoredLinks, cells: _Types, factors: _Factors, hits: Hits) -> _Sites:
        """Match factors, and measure their activity among cCREs alike in GC, length and accessibility."""
        known = np.flatnonzero(hits.length > 0)
        row = np.full(len(cells.ccres), -1)
        row[known] = np.arange(len(known))
        place = np.full(len(stored.ccres), -1)
        place[cells.ccres] = row
        matches = factors.match(hits, row, len(known))
        n_open = cells.n_open[known]
        alike = [hits.gc[known], hits.length[known]]
        if n_open.shape[1] > 1:
            alike.append(n_open.sum(axis=1))
        activity = measure_activity(matches, relative_accessibility(n_open, *alike), strata(*alike))
        return cls(matches, place, activity)

    def join(self, ccre: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield numbers of links and factors whose motif their cCRE has, for some links at a time."""
        row = self.place[ccre]
        for start in range(0, len(ccre), LINKS_AT_ONCE):
            own = np.arange(start, min(start + LINKS_AT_ONCE, len(ccre)))
            own = own[row[own] >= 0]
            part = self.matches[row[own]]
            yield np.repeat(own, np.diff(part.indptr)), part.indices


def _triplets(
    stored: StoredLinks, k: int, cells: _Types, factors: _Factors, sites: _Sites, options: RegulonOptions
) -> pd.DataFrame:
    """Return the triplets of one type that score at least `min_triplet`."""
    name, expression, activity = stored.cell_types[k], cells.expression[:, k], sites.activity
    links = stored.of_type(name)
    links = links[links["score"] >= options.min_score].reset_index(drop=True)
    ccre, link_score = links["ccre"].to_numpy(), links["score"].to_numpy(np.float64)
    chosen = np.exp(np.minimum(works(expression), 0)) * agreement(activity.z, cells.expression)
    kept = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))]
    for link, factor in sites.join(ccre):
        site = activity.site(sites.place[ccre[link]], factor, k)
        score = link_score[link] * site * chosen[factor]
        enough = score >= options.min_triplet
        kept.append((link[enough], factor[enough], site[enough], score[enough]))
    link, factor, site, score = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    order = np.argsort(-score, kind="stable")
    link, factor, site, score = link[order], factor[order], site[order], score[order]
    genes = stored.genes.iloc[links["gene"].to_numpy()[link]]
    return pd.DataFrame(
        {
            "cell_type": name,
            "tf": np.array(factors.names, dtype=object)[factor],
            "ccre": region_names(stored.ccres.iloc[ccre[link]]),
            "gene_id": genes["gene_id"].to_numpy(),
            "gene_name": genes["gene_name"].to_numpy(),
            "distance": links["distance"].to_numpy()[link],
            "score": score,
            "link_score": link_score[link],
            "site": site,
            "tf_expression": expression[factor],
            "tf_activity": activity.z[factor, k],
        }
    )


def _activity_table(
    stored: StoredLinks, factors: _Factors, cells: _Types, sites: _Sites, triplets: pd.DataFrame
) -> pd.DataFrame:
    activity, n_ccres = sites.activity, np.asarray(sites.matches.sum(axis=0)).ravel().astype(np.int64)
    agree = agreement(activity.z, cells.expression)
    n_targets = triplets.groupby(["cell_type", "tf"])["gene_id"].nunique()
    tables = []
    for k, name in enumerate(stored.cell_types):
        own = pd.MultiIndex.from_product([[name], factors.names])
        tables.append(
            pd.DataFrame(
                {
                    "cell_type": name,
                    "tf": factors.names,
                    "motifs": factors.motifs,
                    "n_ccres": n_ccres,
                    "expression": cells.expression[:, k],
                    "activity": activity.z[:, k],
                    "p_value": activity.p_value[:, k],
                    "fdr": activity.fdr[:, k],
                    "slope": activity.slope[:, k],
                    "agreement": agree,
                    "n_targets": n_targets.reindex(own).fillna(0).to_numpy(np.int64),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)
