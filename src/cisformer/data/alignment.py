"""Bring a user's genes and peaks onto a reference, by sparse matrix products.

A gene goes to the reference gene of its id or name; a peak opens every cCRE that it shares a base with, or,
where it is itself a cCRE of the reference, that one alone. Both are a matrix features x reference, so that
aligning cells is one product: order of cells and features does not matter, features given twice are summed.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from cisformer.data.features import ENSEMBL, are_tiles, gene_identity, peak_regions, stated_coordinates
from cisformer.data.genome import overlap_pairs, parse_regions, rename_chroms, species_of
from cisformer.data.known_genomes import GENOMES, coverage, guess_genome
from cisformer.data.reference import Reference, built_in_of
from cisformer.errors import InputError

logger = logging.getLogger(__name__)

MIN_SHARE_FOUND = 0.5
"""Below this share of features found, the input is of another species, genome or naming."""


NUMBERS = "numbers, as Entrez ids are"
"""What `describe_genes` says of these."""


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Where each feature of a data set lies in a reference.

    Parameters
    ----------
    features
        ``"genes"`` or ``"peaks"``.
    matrix
        1 where the feature is, or overlaps, the reference's [n_features, n_reference].
    id_type
        What the features are named by, in words.
    notes
        What was done that the user should know, one line each.
    """

    features: str
    matrix: sp.csr_matrix
    id_type: str
    notes: tuple[str, ...] = ()

    @property
    def n_features(self) -> int:
        """Number of features in the data set."""
        return self.matrix.shape[0]

    @property
    def n_found(self) -> int:
        """Number of them that the reference has."""
        return int(np.count_nonzero(np.diff(self.matrix.indptr)))

    @property
    def share_found(self) -> float:
        """`n_found` as a share of all."""
        return self.n_found / max(self.n_features, 1)

    def apply(self, cells: sp.csr_matrix) -> sp.csr_matrix:
        """Align cells.

        Parameters
        ----------
        cells
            [n_cells, n_features], values > 0 where stored.

        Returns
        -------
        float32 [n_cells, n_reference], indices sorted and unique: counts of genes, 1 for open cCREs.
        """
        if not cells.data.all():
            cells = cells.copy()
            cells.eliminate_zeros()
        found = self.matrix[cells.indices]  # what each entry of each cell becomes, one behind the other
        first, shape = found.indptr[cells.indptr], (cells.shape[0], self.matrix.shape[1])
        if self.features == "genes":
            counts = np.repeat(cells.data, np.diff(found.indptr)).astype(np.float32, copy=False)
            aligned = sp.csr_matrix((counts, found.indices, first), shape)
            aligned = aligned.tocsc().tocsr()  # sorted, in less time than sorting takes
            aligned.sum_duplicates()
            return aligned
        aligned = sp.csr_matrix((found.data, found.indices, first), shape)
        if not aligned.has_sorted_indices:
            for start, end in itertools.pairwise(first):  # all values are 1: only indices are sorted
                aligned.indices[start:end].sort(kind="stable")  # quick where runs are sorted, as they are
            aligned.has_sorted_indices = True
        aligned.sum_duplicates()
        aligned.data[:] = 1
        return aligned


def map_genes(var: pd.DataFrame, reference: Reference) -> FeatureMap:
    """Find the genes of `var` in a reference: by id, then by name, then by name in another case.

    Ensembl versions are ignored. Names are compared without case only where they do not look like those of
    another species, since most human and mouse genes share a name but for its case.
    """
    identity = gene_identity(var, species_of(reference.genome))
    row = _look_up(reference.genes["gene_id"], identity["gene_id"])
    _fill(row, _look_up(reference.genes["gene_name"], identity["gene_name"]))
    n_exact = int((row >= 0).sum())
    id_type, species = describe_genes(identity["gene_id"])
    if not reference.is_built_in or species in ("", reference.name):
        _fill(row, _look_up(reference.genes["gene_name"].str.upper(), identity["gene_name"].str.upper()))
    found = np.flatnonzero(row >= 0)
    notes = []
    if len(found) > n_exact:
        notes.append(f"{len(found) - n_exact:,} genes found by name in another case")
    if n_twice := len(found) - len(np.unique(row[found])):
        notes.append(f"{n_twice:,} genes are given more than once; their counts are summed")
    stated = stated_coordinates(var)["chrom"]
    notes += _on_other_chroms(stated[stated != ""], reference.genes["chrom"], "genes")
    shape = (len(var), reference.n_genes)
    return FeatureMap("genes", _incidence(found, row[found], shape), id_type, tuple(notes))


def _look_up(known: pd.Series, wanted: pd.Series) -> NDArray[np.int64]:
    """Return the first row of `known` that holds each text of `wanted`, or -1."""
    first = known.drop_duplicates()
    position = pd.Index(first).get_indexer(pd.Index(wanted))
    return np.where(position < 0, -1, first.index.to_numpy(np.int64)[position])


def _fill(row: NDArray[np.int64], other: NDArray[np.int64]) -> None:
    """Fill the -1 of `row` from `other`, in place."""
    missing = row < 0
    row[missing] = other[missing]


def _incidence(rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]) -> sp.csr_matrix:
    return sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)


def describe_genes(names: pd.Series) -> tuple[str, str]:
    """Say what genes are named by, and guess whose they are.

    Returns
    -------
    A phrase such as ``"mouse Ensembl ids"``, and ``"human"``, ``"mouse"`` or ``""``.
    """
    if names.str.match(ENSEMBL).mean() > 0.5:
        human, mouse = names.str.match("ENSG").mean() > 0.5, names.str.match("ENSMUSG").mean() > 0.5
        species = "human" if human else "mouse" if mouse else ""
        return f"{species or 'other'} Ensembl ids", species
    if names.str.match(r"\d+$").mean() > 0.5:
        return NUMBERS, ""
    if names.str.match(r"[A-Z][A-Z0-9.\-orf]*$").mean() > 0.5:
        return "human gene symbols", "human"
    if names.str.match(r"[A-Z][a-z0-9]+").mean() > 0.5:
        return "mouse gene symbols", "mouse"
    return "gene symbols", ""


def map_peaks(var: pd.DataFrame, reference: Reference) -> FeatureMap:
    """Find the cCREs of a reference that each peak of `var` opens: those it shares at least one base with.

    A peak that is itself in the reference opens that cCRE alone. Chromosomes match with or without ``chr``.
    """
    if are_genes(var, reference):
        raise InputError(
            f"these features are genes, such as {var.index[0]!r}, where peaks are wanted",
            hint="give the ATAC file, with peaks named chrom:start-end",
        )
    peaks = peak_regions(var)
    peaks["chrom"] = rename_chroms(peaks["chrom"], reference.ccres["chrom"], reference.genome)
    peak, ccre = overlap_pairs(peaks, reference.ccres)
    same = _same_region(peaks, reference.ccres, peak, ccre)
    has_same = np.zeros(len(peaks), bool)
    has_same[peak[same]] = True
    kept = same | ~has_same[peak]
    notes = []
    if len(var) and ":" not in str(var.index[0]) and _is_region(str(var.index[0])):
        notes.append(f"peaks are named like {var.index[0]!r}; read as chrom:start-end")
    notes += _on_other_chroms(peaks["chrom"], reference.ccres["chrom"], "peaks", reference.genome)
    shape = (len(peaks), reference.n_ccres)
    return FeatureMap("peaks", _incidence(peak[kept], ccre[kept], shape), "regions", tuple(notes))


def _on_other_chroms(chrom: pd.Series, known: pd.Series, what: str, genome: str = "") -> list[str]:
    """Say how many genes or peaks lie on chromosomes that the reference lacks, and what to do."""
    number = rename_chroms(chrom, known, genome).value_counts()
    lacking = number[~number.index.isin(pd.unique(known))]
    if lacking.empty:
        return []
    named = ", ".join(f"{name} {count:,}" for name, count in lacking.head(5).items())
    more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
    return [
        f"{lacking.sum():,} {what} lie on chromosomes that the reference lacks ({named}{more}) and are left out; "
        "--reference dataset keeps them"
    ]


def _is_region(name: str) -> bool:
    try:
        parse_regions([name])
    except InputError:
        return False
    return True


def are_genes(var: pd.DataFrame, reference: Reference) -> bool:
    """Tell whether features are genes: not named by regions, and with strands or names that `reference` has."""
    if isinstance(var.index, pd.RangeIndex):  # regions that fragments were counted on
        return False
    try:
        parse_regions(var.index[:10])
    except InputError:
        stranded = (stated_coordinates(var)["strand"] != "").mean() > 0.5
        return bool(stranded) or map_genes(var, reference).share_found > 0.1
    return False


def _same_region(
    left: pd.DataFrame, right: pd.DataFrame, left_row: NDArray[np.int64], right_row: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return which pairs of overlapping regions are the same region."""
    ends = (left[side].to_numpy()[left_row] == right[side].to_numpy()[right_row] for side in ("start", "end"))
    return np.logical_and(*ends)


def require_found(
    found: FeatureMap, var: pd.DataFrame, reference: Reference, label: str, *, of_model: bool = False
) -> None:
    """Raise `InputError` where fewer than half of the features are in the reference, saying what they are.

    `of_model` says that the reference is that of a model, so that the user cannot choose another.
    """
    other = _other_model if of_model else _other_reference
    if found.share_found >= MIN_SHARE_FOUND:
        return
    if found.features == "peaks" and found.n_found and are_tiles(peak_regions(var)):
        genome = reference.genome or "the reference's genome"
        logger.warning(
            "%s: the features are tiles, from which the genome cannot be recognised; taken as %s",
            label,
            genome,
        )
        return
    head = f"{label}: only {found.n_found:,} of {found.n_features:,} {found.features}"
    if found.features == "genes":
        example = ", ".join(map(str, var.index[:3]))
        raise InputError(
            f"{head} are in the {reference.name} reference; they look like {found.id_type} ({example})",
            hint="name genes by Ensembl id or symbol: in var_names, or in a column such as gene_id or gene_name"
            if found.id_type == NUMBERS
            else other(describe_genes(gene_identity(var)["gene_id"])[1], reference),
        )
    peaks = peak_regions(var)
    share, chance = coverage(peaks, reference.ccres)
    genome = guess_genome(peaks)
    looks = f"like {genome}" if genome else f"unlike {', '.join(GENOMES)}"
    raise InputError(
        f"{head} overlap a cCRE of the {reference.name} reference ({share:.0%}; {chance:.0%} when "
        f"moved by 20 kb, that is by chance); they look {looks}",
        hint=other(built_in_of(genome), reference, genome),
    )


def _other_reference(species: str, reference: Reference, genome: str = "") -> str:
    if species and not (species == reference.name and reference.is_built_in):
        return f"use --reference {species}"
    known = f" --genome {genome}" if genome else ""
    return f"take the data's own features with --reference dataset{known}, or make one with `cisformer build_reference`"


def _other_model(species: str, reference: Reference, genome: str = "") -> str:
    own = reference.genome
    if genome and own and genome != own and GENOMES[genome] == GENOMES.get(own):
        return f"the model is of {own}: lift the peaks over to it, with UCSC liftOver or CrossMap"
    species = species or GENOMES.get(genome, "")
    if species and GENOMES.get(own, species) != species:
        return f"the model is of {GENOMES[own]}: use one that was trained on {species} cells"
    if reference.is_built_in:
        return f"use a model that was trained on data like these, or data of {own} like those of the model"
    return (
        "the model knows only the genes and peaks that it was trained on; a model for other data sets is trained "
        f"after `data_preprocess --reference {species or 'human'}`"
    )


def accept_map(
    found: FeatureMap, var: pd.DataFrame, reference: Reference, label: str, *, of_model: bool = False
) -> None:
    """Refuse a map that finds too little, as `require_found` does; log what another finds."""
    require_found(found, var, reference, label, of_model=of_model)
    log_found(found, var, reference, label)


def log_found(found: FeatureMap, var: pd.DataFrame, reference: Reference, label: str) -> None:
    """Log how many features the reference has, which it has not, and the notes."""
    logger.info(
        "%s: %d of %d %s (%s) are in the %s reference",
        label, found.n_found, found.n_features, found.features, found.id_type, reference.name,
    )  # fmt: skip
    missing = np.flatnonzero(np.diff(found.matrix.indptr) == 0)
    if len(missing):
        logger.info(
            "%s: %d %s are not in it, such as %s",
            label, len(missing), found.features, ", ".join(map(str, var.index[missing[:3]])),
        )  # fmt: skip
    for note in found.notes:
        logger.info("%s: %s", label, note)
