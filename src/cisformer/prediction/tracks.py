"""Genome browser tracks: one bigWig per group of cells, a UCSC track hub and an IGV session that show them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pandas as pd

from cisformer.errors import InputError
from cisformer.prediction.groups import GroupAccessibility, group_accessibility
from cisformer.runtime.files import atomic_folder

if TYPE_CHECKING:
    from anndata import AnnData

COLOURS = (
    "31,95,168",
    "200,80,40",
    "60,140,80",
    "140,80,160",
    "180,140,30",
    "40,150,170",
    "190,60,110",
    "90,90,90",
)
"""RGB of the tracks, in turn."""


def write_tracks(
    data: str | Path | AnnData,
    folder: str | Path,
    *,
    groupby: str,
    genome: str = "",
    chrom_sizes: str | Path | None = None,
    force: bool = False,
) -> Path:
    """Write the mean accessibility of each group of cells as a bigWig, with a track hub and an IGV session.

    Parameters
    ----------
    data
        ATAC cells, a prediction or a compact prediction; see `group_accessibility`.
    folder
        Where the files go: ``<group>.bw``, ``hub.txt`` (UCSC, one file), ``igv_session.xml``.
    groupby
        Column of `obs`.
    genome
        Assembly as UCSC names it, such as "hg38"; taken from the data where it says so.
    chrom_sizes
        Table without header of chromosome and length in bp. Without it a chromosome ends with its last region.
    force
        Replace an existing folder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        pybigtools is not installed, the genome is not known, or what `group_accessibility` raises.
    OutputExistsError
        The folder has something in it.
    """
    found = group_accessibility(data, groupby)
    genome = genome or found.genome
    if not genome:
        raise InputError(
            "the data does not say which genome its regions are of", hint="give --genome, such as hg38"
        )
    sizes = _chrom_sizes(found.regions, chrom_sizes)
    files = _file_names(found.groups.index)
    with atomic_folder(folder, force=force) as temporary:
        for values, name in zip(found.accessibility, files, strict=True):
            write_bigwig(temporary / name, found.regions, values, sizes)
        (temporary / "hub.txt").write_text(_hub(found, files, genome), encoding="utf-8")
        (temporary / "igv_session.xml").write_text(_igv_session(found, files, genome), encoding="utf-8")
    return Path(folder)


def write_bigwig(path: Path, regions: pd.DataFrame, values: np.ndarray, sizes: dict[str, int]) -> None:
    """Write one value per region; where regions overlap, the largest counts. Zeros are left out."""
    try:
        import pybigtools
    except ImportError:
        raise InputError(
            "bigWig files need pybigtools, which is not installed", hint="pip install pybigtools"
        ) from None
    pybigtools.open(str(path), "w").write(sizes, _intervals(regions, values))


def _intervals(regions: pd.DataFrame, values: np.ndarray) -> Iterator[tuple[str, int, int, float]]:
    """Yield sorted intervals that do not overlap."""
    table = regions.assign(value=values)[values > 0].sort_values(["chrom", "start", "end"])
    for chrom, part in table.groupby("chrom", sort=True):
        start, end, value = (part[c].to_numpy() for c in ("start", "end", "value"))
        if (start[1:] >= end[:-1]).all():
            pieces = zip(start, end, value, strict=True)
        else:
            pieces = zip(*_flattened(start, end, value), strict=True)
        for low, high, height in pieces:
            yield str(chrom), int(low), int(high), float(height)


def _flattened(
    start: np.ndarray, end: np.ndarray, value: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut overlapping intervals at every border; each piece has the largest value of those that cover it."""
    borders = np.unique(np.concatenate([start, end]))
    first, last = np.searchsorted(borders, start), np.searchsorted(borders, end)
    height = np.zeros(len(borders) - 1)
    n_pieces = last - first
    piece = (
        np.repeat(first, n_pieces)
        + np.arange(n_pieces.sum())
        - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    )
    np.maximum.at(height, piece, np.repeat(value, n_pieces))
    kept = height > 0
    return borders[:-1][kept], borders[1:][kept], height[kept]


def _chrom_sizes(regions: pd.DataFrame, path: str | Path | None) -> dict[str, int]:
    """Return the length of each chromosome, as given or up to its last region."""
    reach = {str(chrom): int(end) for chrom, end in regions.groupby("chrom")["end"].max().items()}
    if path is None:
        return reach
    try:
        table = pd.read_csv(
            path, sep=r"\s+", header=None, usecols=[0, 1], dtype={0: str, 1: np.int64}, keep_default_na=False
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no table of chromosome sizes: {error}", hint="wanted: name, tab, length"
        ) from None
    sizes = dict(zip(table[0], table[1].astype(int), strict=True))
    for chrom, end in reach.items():
        if sizes.get(chrom, 0) < end:
            raise InputError(
                f"{path} says {sizes.get(chrom, 'nothing')} for {chrom}, where a region ends at {end}",
                hint="give the chromosome sizes of the data's genome",
            )
    return sizes


def _file_names(groups: pd.Index) -> list[str]:
    """Return a file name per group: characters that file names or URLs do not take become `_`; all differ."""
    names: list[str] = []
    for group in groups:
        plain = re.sub(r"[^\w.+-]+", "_", group).strip("._") or "group"
        taken = {name.lower() for name in names}
        options = (f"{plain}{suffix}.bw" for suffix in ("", *(f"_{k}" for k in range(2, len(groups) + 2))))
        names.append(next(name for name in options if name.lower() not in taken))
    return names


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _hub(found: GroupAccessibility, files: list[str], genome: str) -> str:
    """Return a UCSC track hub in one file (useOneFile): the tracks of a composite, one per group."""
    top = float(found.accessibility.max(initial=0)) or 1.0
    lines = [
        "hub cisformer", "shortLabel cisformer", "longLabel Mean accessibility per group, cisformer",
        "useOneFile on", "email none@example.org", "", f"genome {genome}", "",
        "track accessibility", "compositeTrack on", "shortLabel accessibility",
        "longLabel Share of cells in which a region is open, or mean probability", "type bigWig",
        "visibility full", "autoScale group", f"viewLimits 0:{top:.4g}", "",
    ]  # fmt: skip
    for number, (group, file) in enumerate(zip(found.groups.index, files, strict=True)):
        lines += [
            f"    track group{number}", "    parent accessibility on", f"    bigDataUrl {file}",
            f"    shortLabel {_one_line(group)[:17]}", f"    longLabel {_one_line(group)[:80]}", "    type bigWig",
            f"    color {COLOURS[number % len(COLOURS)]}", "",
        ]  # fmt: skip
    return "\n".join(lines)


def _igv_session(found: GroupAccessibility, files: list[str], genome: str) -> str:
    """Return a session for IGV, desktop or web: one track per group, all on one scale."""
    session = ElementTree.Element("Session", genome=genome, locus="All", version="8")
    resources = ElementTree.SubElement(session, "Resources")
    panel = ElementTree.SubElement(session, "Panel", name="DataPanel")
    for number, (group, file) in enumerate(zip(found.groups.index, files, strict=True)):
        ElementTree.SubElement(resources, "Resource", path=file, type="bw", name=_one_line(group))
        ElementTree.SubElement(
            panel, "Track", id=file, name=_one_line(group), color=COLOURS[number % len(COLOURS)],
            autoscaleGroup="1", visible="true",
        )  # fmt: skip
    ElementTree.indent(session)
    return ElementTree.tostring(session, encoding="unicode", xml_declaration=True) + "\n"
