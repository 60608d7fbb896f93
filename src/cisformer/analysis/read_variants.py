"""Read lists of variants: VCF, BED, and tables under the names that GWAS and fine-mapping give their columns.

`variant_genes` then matches them to genes. Positions of VCF and of a `pos` column count from 1, those of BED from 0;
here all are 0-based and half-open.
"""

from __future__ import annotations

import csv
import io
import itertools
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from cisformer.data.annotation import open_text
from cisformer.data.genome import rename_chroms
from cisformer.errors import InputError

logger = logging.getLogger(__name__)

COLUMNS = ("variant", "chrom", "start", "end", "ref", "alt", "pip")
CHROM_NAMES = (
    "chrom", "chr", "chromosome", "chr_id", "hm_chrom", "seqnames", "chr_name", "chrom_id", "contig",
)  # fmt: skip
POSITION_NAMES = (
    "pos", "position", "bp", "base_pair_location", "chr_pos", "hm_pos", "chr_position", "basepair", "base_pair",
    "genpos", "pos_bp", "bp_pos",
)  # fmt: skip
ID_NAMES = (
    "variant_id", "variant", "rsid", "rs_id", "hm_rsid", "snp", "snps", "snp_id", "snpid", "markername", "marker", "id",
    "name", "hm_variant_id", "cpra",
)  # fmt: skip
REF_NAMES = ("ref", "reference", "ref_allele", "reference_allele", "allele_ref")
ALT_NAMES = ("alt", "alternate", "alt_allele", "alternative_allele", "allele_alt")
PIP_NAMES = (
    "pip", "posterior_inclusion_probability", "posterior_prob", "posterior_probability", "pp", "cs_pip", "max_pip",
)  # fmt: skip
STATED_IN_NAME = re.compile(
    r"^(?P<chrom>(?:chr)?[0-9A-Za-z.]+)[:_-](?P<pos>[0-9]+)(?:[:_-](?P<ref>[ACGTNacgtn]+)[:_/>-](?P<alt>[ACGTNacgtn,*]+))?"
    r"(?:[:_-](?P<genome>b3[78]|hg[0-9]+|GRC[hm][0-9]+))?$"
)
RSID = re.compile(r"^(?:rs|ss|esv|nsv)[0-9]+$", re.I)
GENOME_WORDS = {
    "hg38": r"hg38|grch38|b38|gca_000001405\.(?:1[5-9]|2[0-9])",
    "hg19": r"hg19|grch37|b37|hs37d5|g1k_v37|gca_000001405\.(?:[1-9]|1[0-4])(?![0-9])",
    "hg18": r"hg18|ncbi36|b36",
    "mm39": r"mm39|grcm39",
    "mm10": r"mm10|grcm38",
}
CHR1_LENGTHS = {248956422: "hg38", 249250621: "hg19", 195154279: "mm39", 195471971: "mm10"}
PLINK_CHROMS = {"23": "X", "24": "Y", "25": "X", "26": "MT"}
REFERENCE_ONLY = {"<NON_REF>", "<*>"}


@dataclass(frozen=True)
class Variants:
    """Variants of a file, each once.

    Attributes
    ----------
    source, kind
        The file, and what it is: VCF, BED or table.
    genome
        What the file says of its genome, such as ``"hg38"``; ``""`` where it says nothing.
    table
        Columns variant (its name, or chrom:pos:ref:alt), chrom, start, end, ref, alt, and pip (NaN where unknown).
    left_out
        Why rows are no variants here → number of rows.
    """

    source: str
    kind: str
    genome: str
    table: pd.DataFrame
    left_out: dict[str, int] = field(default_factory=dict)


def read_variants(path: str | Path, *, genome: str = "") -> Variants:
    """Read variants.

    Parameters
    ----------
    path
        Plain or gzipped; what it is, its content says:

        - VCF: the bases of REF, or up to END of symbolic alleles;
        - BED: chrom, start, end, and a name in column 4;
        - a table with a header: chromosome and position (chrom, CHR_ID …; pos, CHR_POS …), or start and end, or
          both in a name such as ``chr1_12345_A_G``; ref, alt, an rsid and pip where there are such columns.
    genome
        Of which genome the positions are wanted, where a table has columns for several (``pos_hg19``, ``pos_hg38``).

    Raises
    ------
    InputError
        If the file is missing or none of these, has rsids alone, or no variant.
    """
    path = Path(path)
    with open_text(path) as handle:
        lines = handle.read().lstrip("\ufeff").splitlines()
    body = [line for line in lines if line.strip() and not line.startswith(("##", "track", "browser"))]
    head = [line for line in lines if line.startswith("##")]
    if not body:
        what = "is empty" if not lines else "holds no variants"
        raise InputError(f"{path} {what}", hint="give a VCF, a BED, or a table with chrom and pos")
    if (head and head[0].startswith("##fileformat=VCF")) or body[0].startswith("#CHROM\tPOS\tID\tREF"):
        found = _read_vcf(path, head, body)
    elif _is_bed(body):
        found = _read_bed(path, body)
    else:
        found = _read_table(path, body, genome)
    if found.table.empty:
        raise InputError(
            f"{path} ({found.kind}) holds no variants{_told(found.left_out)}", hint="check the file"
        )
    return _once(found)


def _told(left_out: dict[str, int]) -> str:
    return "".join(f"; {number:,} left out ({why})" for why, number in left_out.items())


def _once(found: Variants) -> Variants:
    """Keep each variant once, with its highest pip."""
    table = found.table.sort_values("pip", ascending=False, kind="stable", na_position="last")
    kept = table.drop_duplicates(["chrom", "start", "end", "ref", "alt"]).sort_index()
    repeats = len(table) - len(kept)
    left_out = found.left_out | ({"rows repeat a variant": repeats} if repeats else {})
    return replace(found, table=kept.reset_index(drop=True), left_out=left_out)


def _frame(rows: Iterable[Sequence[object]]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=list(COLUMNS))
    return table.astype({"start": np.int64, "end": np.int64, "pip": np.float64})


def _name(given: str, chrom: str, start: int, ref: str, alt: str) -> str:
    """Return the name of a variant: its own, or chrom:pos:ref:alt, the position counted from 1."""
    return given if given not in ("", ".") else ":".join(filter(None, (chrom, str(start + 1), ref, alt)))


# ---------------------------------------------------------------------------------------------- VCF and BED


def _read_vcf(path: Path, head: Sequence[str], body: Sequence[str]) -> Variants:
    rows, left_out = [], {"records are reference blocks, without an allele": 0}
    for number, line in enumerate(body, start=len(head) + 1):
        fields = line.split("\t")
        if line.startswith("#"):
            continue
        if len(fields) < 5 or not fields[1].isdigit():
            raise InputError(
                f"{path} line {number} is no VCF record: {line[:60]!r}",
                hint="wanted: CHROM, POS, ID, REF, ALT, separated by tabs",
            )
        chrom, ref, alt = fields[0], fields[3], fields[4]
        if set(alt.split(",")) <= REFERENCE_ONLY:
            left_out["records are reference blocks, without an allele"] += 1
            continue
        start = max(int(fields[1]) - 1, 0)
        info = fields[7] if len(fields) > 7 else ""
        end = start + max(len(ref), 1)
        if "<" in alt and (told := re.search(r"(?:^|;)END=([0-9]+)", info)):
            end = max(end, int(told[1]))
        pip = re.search(r"(?:^|;)PIP=([0-9.eE+-]+)", info)
        name = _name(fields[2], chrom, start, ref, alt)
        rows.append((name, chrom, start, end, ref, alt, _number(pip[1]) if pip else np.nan))
    left_out = {why: number for why, number in left_out.items() if number}
    return Variants(str(path), "VCF", _genome_of_header(path, head), _frame(rows), left_out)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan


def _genome_of_header(path: Path, head: Sequence[str]) -> str:
    """Return the genome that a VCF header states by name or by the length of chromosome 1; `InputError` if two."""
    stated: dict[str, str] = {}
    for line in head:
        if line.startswith(("##reference=", "##contig=<", "##assembly=")):
            genome = genome_named(line)
            length = re.search(r"ID=(?:chr)?1,.*?length=([0-9]+)", line)
            if length and int(length[1]) in CHR1_LENGTHS:
                genome = CHR1_LENGTHS[int(length[1])]
            if genome:
                stated.setdefault(genome, line)
    if len(stated) > 1:
        first, second = list(stated.values())[:2]
        raise InputError(
            f"the header of {path} names two genomes: {first[:80]!r} and {second[:80]!r}",
            hint="mend its ##reference and ##contig lines",
        )
    return next(iter(stated), "")


def genome_named(text: str) -> str:
    """Return the genome that a text names, such as ``"hg38"`` for GRCh38; ``""`` where it names none.

    Examples
    --------
    >>> genome_named("##reference=file:///data/GRCh38.p13.fa"), genome_named("pos_b37"), genome_named("pos")
    ('hg38', 'hg19', '')
    """
    plain = text.lower()
    return next((g for g, words in GENOME_WORDS.items() if re.search(rf"(?<![a-z])(?:{words})", plain)), "")


def _is_bed(body: Sequence[str]) -> bool:
    if body[0].startswith("#") and set(body[0].lower().split("\t")) & set(POSITION_NAMES):
        return False
    fields = next((line for line in body if not line.startswith("#")), "").split("\t")
    if len(fields) < 3:
        fields = next((line for line in body if not line.startswith("#")), "").split()
    return len(fields) >= 3 and fields[1].isdigit() and fields[2].isdigit() and not RSID.match(fields[0])


def _read_bed(path: Path, body: Sequence[str]) -> Variants:
    rows = []
    for line in body:
        if line.startswith("#"):
            continue
        fields = line.split("\t") if line.count("\t") > 1 else line.split()
        if len(fields) < 3 or not (
            fields[1].isdigit() and fields[2].isdigit() and int(fields[1]) <= int(fields[2])
        ):
            raise InputError(
                f"{path} is no BED: {line.strip()[:60]!r}",
                hint="wanted: chrom, start, end, separated by tabs, with start < end",
            )
        rows.append((fields[0], int(fields[1]), int(fields[2]), fields[3] if len(fields) > 3 else ""))
    if all(start == end for _, start, end, _ in rows):
        logger.warning("%s: start equals end in all rows, so positions are taken as counted from 1", path)
        rows = [(chrom, start - 1, end, name) for chrom, start, end, name in rows]
    full = (
        (_name(name, chrom, start, "", ""), chrom, start, max(end, start + 1), "", "", np.nan)
        for chrom, start, end, name in rows
    )
    return Variants(str(path), "BED", "", _frame(full))


# ---------------------------------------------------------------------------------------------- tables


def _read_table(path: Path, body: Sequence[str], genome: str) -> Variants:
    header = body[0].lstrip("#")
    separator = "\t" if "\t" in header else "," if "," in header else r"\s+"
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    _refuse_unnamed(path, header, body, separator)
    try:
        table = pd.read_csv(
            io.StringIO("\n".join([header, *body[1:]])), sep=separator, dtype=str, keep_default_na=False,
            quoting=quoting, usecols=range(_n_fields(header, separator)), index_col=False, skipinitialspace=True,
        ).fillna("")  # fmt: skip
    except ValueError as error:
        raise InputError(
            f"cannot read a table of variants from {path}: {str(error).strip()}",
            hint="give a tab-separated table with a header, a VCF or a BED",
        ) from None
    table.columns = pd.Index([str(name).strip().strip('"') for name in table.columns])
    places, stated = _places(table, genome, path)
    texts = table.apply(lambda column: column.str.strip().str.strip('"'))
    pip = pd.to_numeric(texts[places["pip"]], errors="coerce") if "pip" in places else np.nan
    named = {key: texts[places[key]] if key in places else "" for key in ("id", "ref", "alt")}
    frame = pd.DataFrame({**_positions(texts, places), **named, "pip": pip}, index=table.index)
    placed = frame["start"].notna() & (frame["start"] >= 0) & (frame["chrom"] != "")
    frame = frame[placed].astype({"start": np.int64, "end": np.int64})
    frame["end"] = np.maximum(frame["end"], frame["start"] + frame["ref"].map(_bases))
    frame["variant"] = [
        _name(*row)
        for row in zip(*(frame[key] for key in ("id", "chrom", "start", "ref", "alt")), strict=True)
    ]
    lost = int((~placed).sum())
    left_out = {"rows have no position": lost} if lost else {}
    return Variants(str(path), "table", stated, frame[list(COLUMNS)].reset_index(drop=True), left_out)


def _n_fields(line: str, separator: str) -> int:
    if separator == ",":
        return len(next(csv.reader([line])))
    return len(line.rstrip("\t").split("\t") if separator == "\t" else line.split())


def _refuse_unnamed(path: Path, header: str, body: Sequence[str], separator: str) -> None:
    """Raise `InputError` where rows have a field more than the header: columns would be taken for one another."""
    wanted, found = (_n_fields(line, separator) for line in (header, body[1] if len(body) > 1 else header))
    if found > wanted:
        raise InputError(
            f"{path} names {wanted} columns and has {found} in its first row",
            hint="name all columns; in R, write.table(..., row.names = FALSE)",
        )


def _bases(ref: str) -> int:
    return len(ref) if re.fullmatch("[ACGTNacgtn]+", ref) else 1


def _places(table: pd.DataFrame, genome: str, path: Path) -> tuple[dict[str, str], str]:
    """Return what is known → column, and the genome that column names state."""
    plain: dict[str, str] = {}
    for name in table.columns:
        plain.setdefault(re.sub(r"[ .\-/()]+", "_", str(name).lower()).strip("_"), name)
    stated = {key: genome_named(f"_{key}") for key in plain}
    chosen = genome if genome in stated.values() else next(filter(None, stated.values()), "")
    names = {key: plain[key] for key, one in stated.items() if not one}
    suffix = re.compile(rf"_?(?:{GENOME_WORDS[chosen]})$") if chosen else re.compile("$^")
    names |= {suffix.sub("", key): plain[key] for key, one in stated.items() if one and one == chosen}

    def first(wanted: Sequence[str]) -> str | None:
        return next((names[name] for name in wanted if name in names), None)

    wanted = {
        "chrom": CHROM_NAMES, "pos": POSITION_NAMES, "start": ("start", "chromstart", "chrom_start"),
        "end": ("end", "stop", "chromend", "chrom_end"), "ref": REF_NAMES, "alt": ALT_NAMES, "pip": PIP_NAMES,
        "id": ID_NAMES,
    }  # fmt: skip
    places = {key: column for key, options in wanted.items() if (column := first(options)) is not None}
    if "chrom" in places and ("pos" in places or {"start", "end"} <= set(places)):
        position = places.get("pos", places.get("start", ""))
        return places, genome_named(f"_{position}")
    return _places_in_names(table, names, places, path)


def _places_in_names(
    table: pd.DataFrame, names: dict[str, str], places: dict[str, str], path: Path
) -> tuple[dict[str, str], str]:
    """Find a column whose entries say chromosome and position; `InputError` where there is none."""
    columns = [names[key] for key in (*ID_NAMES, *POSITION_NAMES) if key in names]
    for column in columns:
        found = table[column].str.strip().str.extract(STATED_IN_NAME)
        if found["pos"].notna().mean() >= 0.5:
            genome = next((genome_named(str(one)) for one in found["genome"].dropna()), "")
            return {**places, "name": column, "id": column}, genome
    if any(table[column].str.strip().str.match(RSID).mean() >= 0.5 for column in table.columns):
        raise InputError(
            f"{path} names variants by rsid and has no positions; its columns are {', '.join(table.columns[:12])}",
            hint="add columns chrom and pos: look the rsids up in dbSNP or with Ensembl VEP, on the links' genome",
        )
    raise InputError(
        f"{path} has no columns for chromosome and position; its columns are {', '.join(map(str, table.columns[:12]))}",
        hint="name them chrom and pos (counted from 1), or give a VCF or a BED",
    )


def _positions(texts: pd.DataFrame, places: dict[str, str]) -> dict[str, pd.Series]:
    """Return chrom, start and end, NaN where a row says nothing usable; alleles of a name as well."""
    if "name" in places:
        found = texts[places["name"]].str.extract(STATED_IN_NAME).fillna("")
        start = pd.to_numeric(found["pos"], errors="coerce") - 1
        width = found["ref"].map(_bases)
        return {"chrom": found["chrom"], "start": start, "end": start + width}
    chrom = texts[places["chrom"]].str.replace(r"\.0$", "", regex=True)
    if "pos" in places:
        start = _whole(texts[places["pos"]]) - 1
        return {"chrom": chrom, "start": start, "end": start + 1}
    start, end = _whole(texts[places["start"]]), _whole(texts[places["end"]])
    if (start == end).any():  # no region of BED is empty, so this table counts from 1, ends included
        start = start - 1
    return {"chrom": chrom, "start": start.where(end > start), "end": end}


def _whole(texts: pd.Series) -> pd.Series:
    """Return numbers; NaN where an entry is none, or not whole."""
    values = pd.to_numeric(texts.str.replace(",", ""), errors="coerce")
    return values.where((values % 1 == 0) & (values >= 0))


# ---------------------------------------------------------------------------------------------- chromosomes


def on_chroms(variants: Variants, known: Sequence[str], source: str) -> Variants:
    """Spell chromosomes as the links do, and leave out variants on chromosomes that these do not have.

    Raises
    ------
    InputError
        If no variant is left.
    """
    names = set(known)
    chrom = rename_chroms(variants.table["chrom"], names)
    coded = chrom.map(lambda name: PLINK_CHROMS.get(name.removeprefix("chr"), name))
    numbered = ~chrom.isin(names) & rename_chroms(coded, names).isin(names)
    chrom = chrom.where(~numbered, rename_chroms(coded, names))
    shared = chrom.isin(names)
    if not shared.any():
        ours = ", ".join(itertools.islice(sorted(names), 3))
        theirs = ", ".join(variants.table["chrom"].drop_duplicates().head(3))
        raise InputError(
            f"no variant of {variants.source} lies on a chromosome of {source}: {theirs} against {ours}",
            hint="give variants of the same genome, with the same chromosome names",
        )
    lost = variants.table["chrom"][~shared]
    told = {f"are on chromosomes without cCREs, such as {lost.iloc[0]}": len(lost)} if len(lost) else {}
    table = variants.table.assign(chrom=chrom)[shared].reset_index(drop=True)
    return replace(variants, table=table, left_out=variants.left_out | told)
