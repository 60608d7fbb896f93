"""Browser formats against their published definitions; tables of other tools read."""

import gzip

import numpy as np
import pandas as pd
import pytest

from cisformer.errors import InputError
from cisformer.links.formats import FORMATS, export_links, read_links, strongest, write_format


@pytest.fixture
def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "gene_id": ["E1", "E1", "E2", "E2"],
            "gene_name": ["GENE A", "GENE A", "B", "B"],
            "tss": [1500, 1500, 9000, 9000],
            "strand": ["+", "+", "-", np.nan],
            "ccre": ["chr1:100-400", "chr1:2000-2300", "chr1:100-400", "chr1:8900-9200"],
            "cell_type": ["T\tcell", "T\tcell", "T\tcell", "B"],
            "distance": [-1250, 650, 8750, -50],
            "score": [0.9, 0.2, 1.3, 0.55],
            "fdr": [0.01, 0.5, np.nan, 0.04],
        }
    )


def lines_of(path) -> list[str]:
    return path.read_text().splitlines()


def test_bedpe(table, tmp_path):
    """BEDPE as bedtools defines it: ten columns and more, 0-based half-open."""
    write_format(table, tmp_path / "a.bedpe", "bedpe")
    header, *rows = lines_of(tmp_path / "a.bedpe")
    assert header.startswith("#chrom1\tstart1\tend1\tchrom2\tstart2\tend2\tname\tscore\tstrand1\tstrand2")
    for row in rows:
        chrom1, start1, end1, chrom2, start2, end2, name, score, strand1, strand2, *_ = row.split("\t")
        assert (chrom1, chrom2, strand1) == ("chr1", "chr1", ".")
        assert 0 <= int(start1) < int(end1)
        assert int(end2) == int(start2) + 1
        assert strand2 in "+-."
        assert float(score) > 0
        assert name
    assert len({row.count("\t") for row in [header, *rows]}) == 1
    back = read_links(tmp_path / "a.bedpe")
    assert list(back["gene"]) == ["GENE A", "GENE A", "B", "B"]
    assert np.allclose(back["score"], table["score"])


def test_interact(table, tmp_path):
    """UCSC interact.as: 18 columns, score 0-1000, ends within chromStart and chromEnd, names without blanks."""
    write_format(table, tmp_path / "a.interact", "interact")
    header, *rows = lines_of(tmp_path / "a.interact")
    assert header.startswith("track type=interact ")
    assert header.count('"') == 4
    assert len(rows) == len(table)
    for row in rows:
        fields = row.split("\t")
        assert len(fields) == 18
        chrom, start, end, name, score, value, kind, colour = fields[:8]
        source, target = fields[8:13], fields[13:18]
        assert chrom == source[0] == target[0]
        assert int(start) == min(int(source[1]), int(target[1]))
        assert int(end) == max(int(source[2]), int(target[2]))
        assert 0 <= int(score) <= 1000
        assert float(value) > 0
        assert colour == "0"
        assert not any(" " in text for text in (name, kind, source[3], target[3]))
        assert {source[4], target[4]} <= set("+-.")


def test_longrange(table, tmp_path):
    """WashU longrange: every link from both ends, sorted, `chrom:start-end,score` in the fourth column."""
    write_format(table, tmp_path / "a.longrange", "longrange")
    rows = [line.split("\t") for line in lines_of(tmp_path / "a.longrange")]
    assert len(rows) == 2 * len(table)
    keys = [(chrom, int(start), int(end)) for chrom, start, end, _ in rows]
    assert keys == sorted(keys)
    there = {
        f"{chrom}:{start}-{end},{other.split(',')[1]}": other.split(",")[0]
        for chrom, start, end, other in rows
    }
    for here, other in there.items():
        score = here.split(",")[1]
        assert f"{other},{score}" in there
    assert {float(other.split(",")[1]) for *_, other in rows} == set(table["score"])


def test_tsv_is_read_back(table, tmp_path):
    write_format(table, tmp_path / "a.tsv.gz", "tsv")
    assert gzip.decompress((tmp_path / "a.tsv.gz").read_bytes()).startswith(b"gene_id\tgene_name")
    back = read_links(tmp_path / "a.tsv.gz")
    assert np.allclose(back["score"], table["score"])
    assert list(back["start"]) == [100, 2000, 100, 8900]
    (tmp_path / "a.tsv.gz").rename(tmp_path / "links.tsv.gz")
    pd.testing.assert_frame_equal(read_links(tmp_path), back)


def test_same_table_same_bytes(table, tmp_path):
    for form, suffix in FORMATS.items():
        for name in "ab":
            write_format(table, tmp_path / f"{name}{suffix}", form)
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_strongest(table):
    assert list(strongest(table, fdr=0.05).index) == [0, 3]
    assert list(strongest(table, min_score=0.5).index) == [0, 2, 3]
    assert list(strongest(table, top_per_gene=1).index) == [0, 2, 3]
    assert list(strongest(table, cell_types=["B"]).index) == [3]
    assert len(strongest(table)) == 4
    with pytest.raises(InputError, match="'NK' is not in the links"):
        strongest(table, cell_types=["NK"])


def test_export(table, tmp_path):
    write_format(table, tmp_path / "links.tsv.gz", "tsv")
    assert export_links(tmp_path, tmp_path / "out.bedpe", min_score=0.5) == 3
    assert len(lines_of(tmp_path / "out.bedpe")) == 4
    assert export_links(tmp_path / "links.tsv.gz", tmp_path / "out.txt", form="longrange", fdr=0.05) == 2
    with pytest.raises(InputError, match="cannot tell a format"):
        export_links(tmp_path, tmp_path / "out.txt")
    table.drop(columns="tss").to_csv(tmp_path / "other.tsv", sep="\t", index=False)
    with pytest.raises(InputError, match="no column tss"):
        export_links(tmp_path / "other.tsv", tmp_path / "out.bedpe")


@pytest.mark.parametrize(
    ("columns", "separator"),
    [
        ({"peak": ["chr1-100-200"], "gene": ["A"], "Correlation": [0.5]}, "\t"),
        ({"chr": ["chr1"], "start": [100], "end": [200], "TargetGene": ["A"], "ABC.Score": [0.5]}, "\t"),
        ({"chromosome": ["x"], "region": ["chr1_100_200"], "symbol": ["A"], "weight": [0.5]}, ","),
    ],
)
def test_tables_of_other_tools(tmp_path, columns, separator):
    path = tmp_path / "links.tsv"
    pd.DataFrame(columns).to_csv(path, sep=separator, index=False)
    found = read_links(path)
    assert found[["chrom", "start", "end", "gene", "score"]].to_numpy().tolist() == [
        ["chr1", 100, 200, "A", 0.5]
    ]


def test_tables_that_are_not_links(tmp_path):
    path = tmp_path / "links.tsv"
    path.write_text("gene\tvalue\nA\t1\n")
    with pytest.raises(InputError, match="no column for a cCRE"):
        read_links(path)
    path.write_text("ccre\tvalue\nchr1:1-2\t1\n")
    with pytest.raises(InputError, match="no column for a gene"):
        read_links(path)
    path.write_text("ccre\tgene\nchr1:1-2\tA\n")
    with pytest.raises(InputError, match="no column for a score"):
        read_links(path)
    with pytest.raises(InputError, match="a column 'x'"):
        read_links(path, score="x")
    with pytest.raises(InputError, match="cannot read"):
        read_links(tmp_path / "none.tsv")
    (tmp_path / "a.bedpe").write_text("chr1\t1\t2\n")
    with pytest.raises(InputError, match="not BEDPE"):
        read_links(tmp_path / "a.bedpe")


HEADINGS = {
    "ours": "#chrom1\tstart1\tend1\tchrom2\tstart2\tend2\tname\tscore\n",
    "names without #": "chrom1\tstart1\tend1\tchrom2\tstart2\tend2\tname\tscore\n",
    "track": "browser position chr1:1-9\ntrack name=links\n# a comment\n",
    "none": "",
    "byte order mark": "\ufeffchrom1\tx\ty\n",
}


@pytest.mark.parametrize("heading", HEADINGS.values(), ids=HEADINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_headings_of_bedpe(tmp_path, heading, end):
    link = 'chr1\t100\t200\tchr1\t900\t901\tH#A "x|chr1:100-200\t0.5\n'
    (tmp_path / "a.bedpe").write_bytes((heading + link + link).replace("\n", end).encode())
    found = read_links(tmp_path / "a.bedpe")
    assert found.to_numpy().tolist() == [["chr1", 100, 200, 'H#A "x', 0.5]] * 2
