"""Motifs of transcription factors: read, given to genes, and found in sequences."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd

from cisformer.errors import InputError

logger = logging.getLogger(__name__)
BLOCK_BASES = 2_000_000
LETTERS = np.full(256, 4, np.int8)
LETTERS[np.frombuffer(b"ACGT", np.uint8)] = np.arange(4)


def _memelite() -> ModuleType:
    try:
        import memelite
    except ImportError:
        raise InputError(
            "motifs need memelite, which is not installed", hint='pip install "cisformer-links[motifs]"'
        ) from None
    return memelite  # type: ignore[no-any-return]


def read_motifs(path: str | Path) -> dict[str, np.ndarray]:
    """Read a MEME file.

    Parameters
    ----------
    path
        Motifs in MEME's text format, as JASPAR, HOCOMOCO and CIS-BP offer them.

    Returns
    -------
    What stands behind MOTIF, such as ``MA0139.1 CTCF`` → probabilities of A, C, G, T; [4, width] each.

    Raises
    ------
    InputError
        If memelite is not installed, or the file is missing, holds no motif, or something else.
    """
    reader = _memelite().io.read_meme
    try:
        motifs: dict[str, np.ndarray] = reader(str(path))
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"cannot read motifs from {path}: {str(error).strip()}",
            hint="give motifs of DNA in MEME's text format, not compressed",
        ) from None
    if not motifs:
        raise InputError(f"{path} holds no motif", hint="give motifs in MEME's text format")
    return motifs


def factors_of(names: Iterable[str], genes: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Find the genes of motifs by their names; case does not count.

    Parameters
    ----------
    names
        Of motifs: an id, a name, or both. Dimers join genes by ``::``; what stands in parentheses, the species and
        the collection are left out (``RARA(var.2)``, ``CTCF_HUMAN.H11MO.0.A``, ``(GATA1)_(Homo_sapiens)``).
    genes
        Names of genes.

    Returns
    -------
    Motif → names of its genes, of the motifs that have all of theirs; and the other motifs.
    """
    spelled: dict[str, str] = {}
    for gene in genes:
        spelled.setdefault(gene.casefold(), gene)
    found, unknown = {}, []
    for name in names:
        words = name.split()
        tried = (_known(word, spelled) for word in (*words[1:], *words[:1]))
        parts = next((genes for genes in tried if genes), ())
        if parts:
            found[name] = parts
        else:
            unknown.append(name)
    return found, unknown


def _known(word: str, spelled: dict[str, str]) -> tuple[str, ...]:
    """Return the genes that a word names, none where one of them is unknown."""
    genes = []
    for part in word.split("::"):
        plain = re.sub(r"\([^)]*\)$", "", part)
        inside = re.match(r"^\(([^)]+)\)", part)
        options = (part, plain, inside[1] if inside else "", re.split(r"[._]", plain)[0])
        gene = next((spelled[option.casefold()] for option in options if option.casefold() in spelled), None)
        if gene is None:
            return ()
        genes.append(gene)
    return tuple(dict.fromkeys(genes))


@dataclass(frozen=True)
class Hits:
    """Where motifs are.

    Attributes
    ----------
    row, motif
        Region, and number of the motif; int32 [H], one entry for each of a region's motifs.
    log_p
        −log10 of the p-value of the best match; float32 [H].
    gc, length
        Share of G and C among the known bases of each region, and their number; NaN and 0 for regions without a
        sequence; [P].
    """

    row: np.ndarray
    motif: np.ndarray
    log_p: np.ndarray
    gc: np.ndarray
    length: np.ndarray


def find_motifs(
    motifs: dict[str, np.ndarray], sequences: Iterable[tuple[int, bytes]], n_regions: int, max_p: float
) -> Hits:
    """Find motifs on both strands, as FIMO does (memelite), with a block of sequences in memory at a time.

    A match that touches an unknown base does not count, so that N and motifs longer than a region find nothing.

    Parameters
    ----------
    motifs
        As `read_motifs` returns them.
    sequences
        Row and sequence of regions, as `read_sequences` yields them.
    n_regions
        Number of rows.
    max_p
        Largest p-value of a match, of each place and strand.
    """
    fimo = _memelite().fimo
    gc, length = np.full(n_regions, np.nan), np.zeros(n_regions, np.int64)
    parts: list[pd.DataFrame] = []
    for rows, codes in _blocks(sequences):
        known = codes < 4
        length[rows] = known.sum(axis=1)
        n_gc = ((codes == 1) | (codes == 2)).sum(axis=1)
        gc[rows] = np.divide(n_gc, length[rows], out=np.full(len(rows), np.nan), where=length[rows] > 0)
        one_hot = (codes[:, None, :] == np.arange(4, dtype=np.int8)[None, :, None]).astype(np.int8)
        n_unknown = np.pad(np.cumsum(~known, axis=1, dtype=np.int32), ((0, 0), (1, 0)))
        for table in fimo(motifs, one_hot, threshold=max_p):
            if len(table) == 0:
                continue
            at, start, end = (table[name].to_numpy(np.int64) for name in ("sequence_name", "start", "end"))
            inside = (end <= codes.shape[1]) & (start >= 0)
            at, start, end, table = at[inside], start[inside], end[inside], table[inside]
            whole = n_unknown[at, end] == n_unknown[at, start]
            best = pd.DataFrame(
                {
                    "row": rows[at[whole]].astype(np.int32),
                    "motif": table["motif_idx"].to_numpy(np.int32)[whole],
                    "log_p": -np.log10(np.maximum(table["p-value"].to_numpy()[whole], 1e-30)).astype(
                        np.float32
                    ),
                }
            ).sort_values("log_p", ascending=False, kind="stable")
            parts.append(best.drop_duplicates(["row"]))
    found = pd.concat(parts) if parts else pd.DataFrame({"row": [], "motif": [], "log_p": []})
    found = found.sort_values(["row", "motif"], kind="stable")
    return Hits(
        found["row"].to_numpy(np.int32),
        found["motif"].to_numpy(np.int32),
        found["log_p"].to_numpy(np.float32),
        gc,
        length,
    )


def _blocks(sequences: Iterable[tuple[int, bytes]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows and letters (0–3, 4 for others and behind the end) of some sequences at a time; int8 [n, L]."""
    rows: list[int] = []
    held: list[bytes] = []
    longest = 0
    for row, sequence in sequences:
        grown = max(longest, len(sequence))
        if held and grown * (len(held) + 1) > BLOCK_BASES:
            yield np.array(rows), _letters(held)
            rows, held, grown = [], [], len(sequence)
        rows.append(row)
        held.append(sequence)
        longest = grown
    if held:
        yield np.array(rows), _letters(held)


def _letters(sequences: list[bytes]) -> np.ndarray:
    width = max(map(len, sequences))
    text = np.frombuffer(b"".join(sequence.ljust(width, b"N") for sequence in sequences), np.uint8)
    letters: np.ndarray = LETTERS[text].reshape(len(sequences), width)
    return letters
