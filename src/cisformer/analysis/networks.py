"""Networks of factors and genes in the tables of others: decoupler's edges, CellOracle's base GRN."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cisformer.analysis.stored import StoredLinks
from cisformer.links.formats import text_writer

ROWS_AT_ONCE = 5_000


def network_of(triplets: pd.DataFrame) -> pd.DataFrame:
    """Return edges as decoupler takes them.

    Parameters
    ----------
    triplets
        Columns cell_type, tf, gene_name and score.

    Returns
    -------
    Columns source (a factor's gene: dimers count for both of theirs), target and weight: 1 − Π(1 − score) over
    the cCREs of the pair, the highest of the cell types. Each pair once, by source, then weight.
    """
    edges = triplets[["cell_type", "tf", "gene_name", "score"]].rename(columns={"gene_name": "target"})
    idle = np.log1p(-np.minimum(edges["score"].to_numpy(np.float64), 1 - 1e-12))
    by_type = edges.assign(idle=idle).groupby(["cell_type", "tf", "target"], as_index=False)["idle"].sum()
    by_type["weight"] = -np.expm1(by_type["idle"])
    by_type["source"] = by_type["tf"].str.split("::")
    single = by_type.explode("source").groupby(["source", "target"], as_index=False)["weight"].max()
    single = single.sort_values(
        ["source", "weight", "target"], ascending=[True, False, True], ignore_index=True
    )
    return single[["source", "target", "weight"]]


@dataclass(frozen=True)
class BaseGrn:
    """Motifs in the cCREs of linked pairs.

    Attributes
    ----------
    pairs
        Columns peak_id (``chr1_100_200``) and gene_short_name, one row per pair that is linked in a type.
    rows
        Row of `matches` of each pair.
    matches
        1 where a cCRE has a motif of a factor's gene; [P, T].
    genes
        Names of the columns.
    """

    pairs: pd.DataFrame
    rows: np.ndarray
    matches: sp.csr_matrix
    genes: list[str]

    @classmethod
    def of(
        cls,
        stored: StoredLinks,
        place: np.ndarray,
        matches: sp.csr_matrix,
        factors: list[list[str]],
        min_score: float,
    ) -> BaseGrn:
        """Gather the linked pairs of all types.

        Parameters
        ----------
        stored
            Links.
        place
            Row of `matches` of each of their cCREs, −1 for those without sequence.
        matches
            1 where a cCRE has a motif of a factor; [P, factors].
        factors
            Genes of each factor.
        min_score
            Smallest score of a link.
        """
        found: np.ndarray = np.zeros(0, np.int64)
        n_ccres = len(stored.ccres)
        for name in stored.cell_types:
            table = stored.of_type(name)
            kept = (table["score"].to_numpy() >= min_score) & (place[table["ccre"]] >= 0)
            found = np.union1d(
                found, table["gene"].to_numpy()[kept] * n_ccres + table["ccre"].to_numpy()[kept]
            )
        gene, ccre = found // n_ccres, found % n_ccres
        regions = stored.ccres.iloc[ccre]
        peak = [
            f"{chrom}_{start}_{end}"
            for chrom, start, end in regions[["chrom", "start", "end"]].itertuples(index=False)
        ]
        pairs = pd.DataFrame({"peak_id": peak, "gene_short_name": stored.genes["gene_name"].to_numpy()[gene]})
        names = sorted({name for part in factors for name in part})
        number = {name: n for n, name in enumerate(names)}
        member = [(n, number[name]) for n, part in enumerate(factors) for name in part]
        of_gene = sp.csr_matrix(
            (np.ones(len(member), np.float32), tuple(zip(*member, strict=True))), (len(factors), len(names))
        )
        by_gene = sp.csr_matrix(matches @ of_gene)
        by_gene.data[:] = 1
        return cls(pairs, place[ccre], by_gene, names)

    def table(self, start: int = 0, stop: int | None = None) -> pd.DataFrame:
        """Return the table, or some rows of it: peak_id, gene_short_name, and 0 or 1 for each gene of a factor."""
        pairs = self.pairs.iloc[start:stop].reset_index(drop=True)
        values = self.matches[self.rows[start:stop]].toarray().astype(np.int8)
        return pd.concat([pairs, pd.DataFrame(values, columns=self.genes)], axis=1)


def write_base_grn(grn: BaseGrn, path: Path) -> None:
    """Write the table in blocks: it is as wide as there are factors."""
    with text_writer(path) as handle:
        for start in range(0, max(len(grn.pairs), 1), ROWS_AT_ONCE):
            grn.table(start, start + ROWS_AT_ONCE).to_csv(handle, sep="\t", index=False, header=start == 0)
