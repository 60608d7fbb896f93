"""Links in the formats of others: BEDPE (IGV), UCSC interact, WashU longrange; and their tables, read.

All coordinates are 0-based and half-open, as in our own table.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np
import pandas as pd

from cisformer.data.genome import parse_regions
from cisformer.errors import InputError
from cisformer.runtime.files import atomic_path

FormatName = Literal["tsv", "bedpe", "interact", "longrange"]
TABLE = "links.tsv.gz"
OWN_COLUMNS = ("gene_id", "gene_name", "tss", "strand", "ccre", "cell_type", "distance", "score", "fdr")
FORMATS: dict[str, str] = {
    "tsv": ".tsv.gz",
    "bedpe": ".bedpe",
    "interact": ".interact",
    "longrange": ".longrange",
}
"""Format → suffix of its files."""


def strongest(
    table: pd.DataFrame,
    *,
    fdr: float | None = None,
    min_score: float | None = None,
    top_per_gene: int | None = None,
    cell_types: Sequence[str] = (),
) -> pd.DataFrame:
    """Return the rows that pass all filters given, in their order.

    Parameters
    ----------
    table
        Links with columns gene_id, cell_type, score and fdr.
    fdr
        Largest false discovery rate; untested links do not pass.
    min_score
        Smallest score.
    top_per_gene
        Only the so many highest scores of each gene in each cell type.
    cell_types
        Only these.

    Raises
    ------
    InputError
        If a cell type is not in the table.
    """
    keep = np.ones(len(table), dtype=bool)
    if cell_types:
        _known(cell_types, table["cell_type"].unique())
        keep &= table["cell_type"].isin(cell_types).to_numpy()
    if fdr is not None:
        keep &= (table["fdr"] <= fdr).to_numpy()
    if min_score is not None:
        keep &= (table["score"] >= min_score).to_numpy()
    kept = table[keep]
    if top_per_gene is not None:
        rank = kept.groupby(["cell_type", "gene_id"], sort=False)["score"].rank(
            ascending=False, method="first"
        )
        kept = kept[rank <= top_per_gene]
    return kept


def _known(wanted: Sequence[str], present: np.ndarray) -> None:
    for name in wanted:
        if name not in present:
            raise InputError(
                f"cell type {name!r} is not in the links",
                hint=f"there are: {', '.join(map(str, present[:10]))}",
            )


def export_links(
    links: str | Path,
    output: str | Path,
    *,
    form: str | None = None,
    fdr: float | None = None,
    min_score: float | None = None,
    top_per_gene: int | None = None,
    cell_types: Sequence[str] = (),
) -> int:
    """Filter our own table and write it in one of `FORMATS`.

    Parameters
    ----------
    links
        `links.tsv.gz`, or the folder with it.
    output
        The file to write.
    form
        The format; by the suffix of `output` otherwise.
    fdr, min_score, top_per_gene, cell_types
        See `strongest`.

    Returns
    -------
    int
        Number of links written.

    Raises
    ------
    InputError
        If the table is missing or not ours, a cell type is unknown, or the format is.
    """
    name = Path(output).name.removesuffix(".gz")
    known = {suffix.removesuffix(".gz"): form for form, suffix in FORMATS.items()}
    form = form or known.get(Path(name).suffix)
    if form is None:
        raise InputError(f"cannot tell a format from the name {output}", hint="give --format")
    path = Path(links) / TABLE if Path(links).is_dir() else Path(links)
    table = read_any_table(path)
    missing = [column for column in OWN_COLUMNS if column not in table]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]}", hint="give the links.tsv.gz that atac2rna_link wrote"
        )
    kept = strongest(table, fdr=fdr, min_score=min_score, top_per_gene=top_per_gene, cell_types=cell_types)
    write_format(kept, output, form)
    return len(kept)


def write_format(table: pd.DataFrame, path: str | Path, form: str) -> None:
    """Write links to a file.

    Parameters
    ----------
    table
        Links as in `links.tsv.gz`.
    path
        The file; compressed where its name ends in `.gz`.
    form
        One of `FORMATS`.
    """
    with text_writer(path) as handle:
        if form == "tsv":
            table.to_csv(handle, sep="\t", index=False, float_format="%.5g")
            return
        ends = pd.concat([table.reset_index(drop=True), parse_regions(table["ccre"])], axis=1)
        columns, header = {"bedpe": _bedpe, "interact": _interact, "longrange": _longrange}[form](ends)
        handle.write(f"{header}\n" if header else "")
        columns.to_csv(
            handle, sep="\t", index=False, header=False, float_format="%.5g", quoting=csv.QUOTE_NONE
        )


def _bedpe(links: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """BEDPE: cCRE, TSS, name, score, strands, and two columns more. IGV draws an arc per line."""
    columns = {
        "#chrom1": links["chrom"],
        "start1": links["start"],
        "end1": links["end"],
        "chrom2": links["chrom"],
        "start2": links["tss"],
        "end2": links["tss"] + 1,
        "name": _text(links["gene_name"]) + "|" + links["ccre"],
        "score": links["score"],
        "strand1": ".",
        "strand2": _text(links["strand"]),
        "cell_type": _text(links["cell_type"]),
        "distance": links["distance"],
    }
    return pd.DataFrame(columns), "\t".join(columns)


def _interact(links: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """UCSC interact (bed5+13): source is the cCRE, target the TSS; score 0–1000, darker when higher."""
    types = ", ".join(map(str, links["cell_type"].unique()))[:100].replace('"', "'")
    header = (
        f'track type=interact name="cisformer links" description="cCRE-gene links: {_line(types)}" '
        "interactDirectional=true useScore=on visibility=full"
    )
    name = _text(links["gene_name"], "_")
    columns = {
        "chrom": links["chrom"],
        "chromStart": np.minimum(links["start"], links["tss"]),
        "chromEnd": np.maximum(links["end"], links["tss"] + 1),
        "name": name,
        "score": (links["score"].clip(0, 1) * 1000).round().astype(np.int64),
        "value": links["score"],
        "exp": _text(links["cell_type"], "_"),
        "color": 0,
        "sourceChrom": links["chrom"],
        "sourceStart": links["start"],
        "sourceEnd": links["end"],
        "sourceName": links["ccre"],
        "sourceStrand": ".",
        "targetChrom": links["chrom"],
        "targetStart": links["tss"],
        "targetEnd": links["tss"] + 1,
        "targetName": name,
        "targetStrand": _text(links["strand"]),
    }
    return pd.DataFrame(columns), header


def _longrange(links: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """WashU longrange: each link from both of its ends, sorted by position; no header."""
    ends = [(links["start"], links["end"]), (links["tss"], links["tss"] + 1)]
    score = links["score"].map("{:.5g}".format)
    both = pd.concat(
        [
            pd.DataFrame(
                {
                    "chrom": links["chrom"],
                    "start": start,
                    "end": end,
                    "other": links["chrom"]
                    + ":"
                    + other[0].astype(str)
                    + "-"
                    + other[1].astype(str)
                    + ","
                    + score,
                }
            )
            for (start, end), other in (ends, ends[::-1])
        ]
    )
    return both.sort_values(["chrom", "start", "end", "other"]), ""


def _line(value: object, space: str = " ") -> str:
    """Return a text that cannot break a tab-separated line."""
    return space.join(str(value).split()) or "."


def _text(values: pd.Series, space: str = " ") -> pd.Series:
    return values.fillna("").map(lambda value: _line(value, space))


@contextlib.contextmanager
def text_writer(path: str | Path) -> Iterator[IO[str]]:
    """Open a text file for writing, atomically; gzipped, without time stamp, where it ends in `.gz`."""
    with atomic_path(path) as temporary:
        if Path(path).suffix != ".gz":
            with open(temporary, "w", encoding="utf-8", newline="\n") as handle:
                yield handle
            return
        with (
            open(temporary, "wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=2, fileobj=raw, mtime=0) as packed,
            io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as text,
        ):
            yield text


ELEMENT_NAMES = ("ccre", "peak", "region", "element", "enhancer", "name")
GENE_ID_NAMES = ("gene_id", "geneid", "ensembl_id", "targetgeneensemblid", "measuredgeneensemblid")
GENE_NAMES = ("gene_name", "gene", "genesymbol", "measuredgenesymbol", "targetgene", "symbol", "gene_id")
SCORE_NAMES = ("score", "weight", "value", "correlation", "abc.score", "importance", "coef", "zscore")
CELL_TYPE_NAMES = ("cell_type", "celltype", "cell type")
CHROM_NAMES = ("chrom", "chr", "seqnames", "chromosome")
MISSING = ("", "NA", "N/A", "nan", "NaN", "null", "None", ".")
"""What stands for a missing number; names are read as they are."""


def read_links(links: str | Path | pd.DataFrame, *, score: str | None = None) -> pd.DataFrame:
    """Read links of any tool: a tidy table with a header, or BEDPE.

    Parameters
    ----------
    links
        A file, tab- or comma-separated, possibly gzipped; the `cisformer_link` folder; or a frame. The cCRE
        stands in one column (chrom:start-end) or in chrom, start, end; the gene under gene_name, gene, gene_id or
        the like. BEDPE (suffix `.bedpe`): the cCRE is the first region, the gene the part of the name before `|`.
    score
        Column to rank by; found by name otherwise (score, weight, correlation …).

    Returns
    -------
    Columns chrom, start, end, gene, score, and gene_id, cell_type, distance, activity_contact where present.

    Raises
    ------
    InputError
        If the file is missing, or a column cannot be found.
    """
    if isinstance(links, pd.DataFrame):
        return _tidy(links.reset_index(drop=True), Path("the table"), score)
    path = Path(links)
    path = path / TABLE if (path / TABLE).is_file() else path
    return read_bedpe(path) if is_bedpe(path) else _tidy(read_any_table(path), path, score)


def _tidy(table: pd.DataFrame, path: Path, score: str | None) -> pd.DataFrame:
    places = places_of(table)
    found = regions_of(table, places, path)
    gene = first_column(places, GENE_NAMES)
    if gene is None:
        raise _no_column(path, "a gene", GENE_NAMES, table)
    column = score if score is not None else first_column(places, SCORE_NAMES)
    if column is None or column not in table.columns:
        raise _no_column(path, "a score" if score is None else f"a column {score!r}", SCORE_NAMES, table)
    found["gene"] = table[gene].astype(str)
    found["score"] = pd.to_numeric(table[column], errors="coerce")
    for name, known in (("gene_id", GENE_ID_NAMES), ("cell_type", CELL_TYPE_NAMES)):
        if (source := first_column(places, known)) is not None:
            found[name] = table[source].astype(str)
    for name in ("distance", "activity_contact"):
        if name in places:
            found[name] = pd.to_numeric(table[places[name]], errors="coerce")
    return found


def is_bedpe(path: Path) -> bool:
    """Return whether a file is named as BEDPE is."""
    return path.name.removesuffix(".gz").endswith(".bedpe")


def read_any_table(path: Path) -> pd.DataFrame:
    """Read a table with a header, its separator found out; raise `InputError` if that cannot be."""
    try:
        sample = pd.read_csv(path, sep="\t", nrows=2, comment=None)
        separator = "\t" if sample.shape[1] > 1 else ","
        columns = pd.read_csv(path, sep=separator, nrows=0).columns
        texts = {*GENE_NAMES, *GENE_ID_NAMES, *CELL_TYPE_NAMES, *ELEMENT_NAMES, *CHROM_NAMES}
        named = [name for name in columns if _plain(name) in texts]
        numbers = {name: list(MISSING) for name in columns if name not in named}
        return pd.read_csv(
            path,
            sep=separator,
            low_memory=False,
            dtype=dict.fromkeys(named, str),
            keep_default_na=False,
            na_values=numbers,
        )
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(
            f"cannot read a table from {path}: {str(error).strip()}",
            hint="give a tab-separated table with a header",
        ) from None


def places_of(table: pd.DataFrame) -> dict[str, str]:
    """Return plain column name → column: lower case, without a leading `#`."""
    return {_plain(name): name for name in table.columns}


def _plain(name: object) -> str:
    return str(name).lower().lstrip("#").strip()


def read_bedpe(path: Path) -> pd.DataFrame:
    """Read BEDPE links: element, gene (the name before `|`), score (1 where there is none)."""
    names = ["chrom", "start", "end", "chrom2", "start2", "end2", "name", "score"]
    try:
        table = pd.read_csv(
            path, sep="\t", skiprows=_n_heading(path), header=None, usecols=range(8), names=names,
            quoting=csv.QUOTE_NONE,
            dtype={"chrom": str, "chrom2": str, "name": str}, keep_default_na=False, na_values={"score": list(MISSING)},
        )  # fmt: skip
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} is not BEDPE: {str(error).strip()}",
            hint="wanted: two regions, name, score in eight columns",
        ) from None
    table["gene"] = table["name"].astype(str).str.split("|").str[0]
    table["score"] = pd.to_numeric(table["score"], errors="coerce").fillna(1.0)
    return table[["chrom", "start", "end", "gene", "score"]]


def _n_heading(path: Path) -> int:
    """Count the lines before the first link: comments, `track` and `browser` lines, names of columns."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle):
            fields = line.split("\t")
            if len(fields) > 2 and not line.startswith("#") and fields[1].strip().isdigit():
                return number
    raise ValueError("no line holds a region")


def regions_of(table: pd.DataFrame, places: Mapping[str, str], path: Path) -> pd.DataFrame:
    """Return the elements of a table as chrom, start, end; `places`: lower-case column name → column."""
    chrom = first_column(places, CHROM_NAMES)
    for start, end in (("start", "end"), ("chromstart", "chromend")):
        if chrom is not None and {start, end} <= set(places):
            regions = table[[chrom, places[start], places[end]]].copy()
            regions.columns = pd.Index(["chrom", "start", "end"])
            return regions.astype({"chrom": str})
    column = first_column(places, ELEMENT_NAMES)
    if column is None:
        raise _no_column(path, "a cCRE", ("chrom, start, end", *ELEMENT_NAMES), table)
    return parse_regions(table[column])


def first_column(places: Mapping[str, str], names: Sequence[str]) -> str | None:
    """Return the first of some columns that a table has; `places`: lower-case column name → column."""
    return next((places[name] for name in names if name in places), None)


def _no_column(path: Path, what: str, names: Sequence[str], table: pd.DataFrame) -> InputError:
    return InputError(
        f"{path} has no column for {what}; it has {', '.join(map(str, table.columns[:12]))}",
        hint=f"name it one of: {', '.join(names)}",
    )
