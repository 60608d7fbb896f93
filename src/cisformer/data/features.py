"""What an AnnData's `var` says of its genes and peaks: their ids, names and coordinates."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cisformer.data.genome import CCRE_COLUMNS, parse_regions
from cisformer.errors import InputError

NAME_COLUMNS = ("gene_name", "gene_names", "gene_symbol", "gene_symbols", "feature_name", "symbol", "name")
STRANDS = {"+": "+", "-": "-", "1": "+", "-1": "-", "1.0": "+", "-1.0": "-"}
ENSEMBL = r"^(ENS[A-Z]*G\d{11})(?:\.\d+)?$"


def strip_versions(ids: pd.Series) -> pd.Series:
    """Strip the version of Ensembl gene ids (``ENSG00000223972.6``); other names stay as they are."""
    return ids.astype(str).str.replace(ENSEMBL, r"\1", regex=True)


def gene_identity(var: pd.DataFrame) -> pd.DataFrame:
    """Find ids and names of genes in an AnnData's `var`.

    Returns
    -------
    Columns ``gene_id`` (Ensembl id without version where the index or a column of `var` has one, else the
    name) and ``gene_name`` (a column of `NAME_COLUMNS` where the index holds ids, else the index); one row
    per feature.
    """
    index = strip_versions(pd.Series(var.index.astype(str)))
    gene_id, gene_name = index, index
    if not index.str.match(ENSEMBL).mean() > 0.5:
        for column in var.columns:
            values = strip_versions(pd.Series(var[column].to_numpy()))
            if values.str.match(ENSEMBL).mean() > 0.5:
                gene_id = values.where(values.str.match(ENSEMBL), index)
                break
    else:
        for column in NAME_COLUMNS:
            if column in var:
                gene_name = pd.Series(var[column].to_numpy()).astype(str)
                break
    return pd.DataFrame({"gene_id": gene_id.to_numpy(object), "gene_name": gene_name.to_numpy(object)})


def peak_regions(var: pd.DataFrame) -> pd.DataFrame:
    """Find the regions of peaks in `var`: its index, or 10x ``interval``, or ``chrom, start, end``.

    Raises
    ------
    InputError
        Naming a peak that is no region and has no coordinates.
    """
    try:
        return parse_regions(var.index)
    except InputError:
        found = stated_coordinates(var)[CCRE_COLUMNS]
        if (found["start"] < 0).any():
            raise
        return found


def stated_coordinates(var: pd.DataFrame) -> pd.DataFrame:
    """Read the columns ``chrom, start, end, strand`` of `var`, or 10x ``interval``.

    Returns
    -------
    These columns, one row per feature; ``"", -1, -1, ""`` where `var` does not say, and ``""`` for strands
    other than ``+, -, 1, -1``.
    """
    columns = set(var.columns)
    if "interval" in columns and not set(CCRE_COLUMNS) <= columns:
        parts = pd.Series(var["interval"].to_numpy()).astype(str).str.extract(r"^(.+):(\d+)-(\d+)$")
    else:
        parts = var.reindex(columns=CCRE_COLUMNS).reset_index(drop=True)
    chrom, start, end = (parts[column] for column in parts)
    start, end = pd.to_numeric(start, errors="coerce"), pd.to_numeric(end, errors="coerce")
    known = chrom.notna() & start.notna() & end.notna()
    strand = var.reindex(columns=["strand"])["strand"].astype(str).map(STRANDS).fillna("")
    return pd.DataFrame(
        {
            "chrom": chrom.astype(str).where(known, ""),
            "start": start.where(known, -1).astype(np.int64),
            "end": end.where(known, -1).astype(np.int64),
            "strand": np.where(known, strand, "").astype(object),
        }
    )
