"""A folder of links made by hand, whose answers are known: for tests of what links answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.data.reference import Reference
from cisformer.links.files import COMPONENTS, Links, TypeLinks

TYPES = ("CD4/8 T", 'say "B" <b>')
"""Names that a file system, a table and a page have to take as they are."""
GENES = pd.DataFrame(
    {
        "gene_id": ["ENSG01", "ENSG02", "ENSG03"],
        "gene_name": ["NEAR", "</script><b>", "FAR"],
        "chrom": ["chr1", "chr1", "chr2"],
        "start": [10_000, 50_000, 10_000],
        "end": [20_000, 60_000, 30_000],
        "strand": ["+", "-", "+"],
    }
)
CCRES = pd.DataFrame(
    {
        "chrom": ["chr1", "chr1", "chr1", "chr2", "chr2"],
        "start": [9_800, 25_000, 59_900, 12_000, 90_000],
        "end": [10_300, 25_500, 60_200, 12_500, 90_500],
    }
)
SCORES = {
    TYPES[0]: [(0, 0, 0.9), (0, 1, 0.2), (1, 1, 0.7), (2, 3, 0.05)],
    TYPES[1]: [(0, 0, 0.8), (1, 1, 0.3), (1, 2, 0.95), (2, 4, 0.6)],
}
"""Cell type → gene, cCRE and score of each link."""


def made_links(genome: str = "hg38", types: tuple[str, ...] = TYPES) -> Links:
    """Return links of three genes and five cCREs."""
    reference = Reference("dataset", genome, GENES, CCRES)
    made = []
    for number, name in enumerate(sorted(types)):
        rows = SCORES[name]
        gene, ccre = (np.array([row[i] for row in rows], np.int64) for i in (0, 1))
        score = np.array([row[2] for row in rows], np.float32)
        middle = (CCRES["start"] + CCRES["end"]).to_numpy()[ccre] // 2
        site = np.where(GENES["strand"] == "-", GENES["end"] - 1, GENES["start"])[gene]
        distance = np.where(GENES["strand"].to_numpy()[gene] == "-", site - middle, middle - site)
        evidence = {key: np.full(len(rows), 0.25, np.float32) for key in COMPONENTS}
        evidence |= {"score": score, "n_open": np.arange(1, len(rows) + 1).astype(np.float32)}
        evidence |= {"specificity": score - 0.5}
        made.append(TypeLinks(name, 10 + number, gene, ccre, distance, evidence))
    return Links(reference, 250_000, made, {links.cell_type: links.n_cells for links in made})


def write_links(folder: Path, **options: object) -> Path:
    """Write them as `atac2rna_link` does; return the folder."""
    made_links(**options).write(folder)  # type: ignore[arg-type]
    return folder
