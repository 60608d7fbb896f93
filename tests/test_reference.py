"""Built-in references, building one, and taking a data set's own features."""

from __future__ import annotations

import gzip
import importlib.resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cisformer.data.annotation import read_gtf
from cisformer.data.features import gene_identity, peak_regions
from cisformer.data.genome import GENE_COLUMNS, overlap_pairs, tss
from cisformer.data.known_genomes import coverage, guess_genome, load_annotation
from cisformer.data.own_reference import build_reference, dataset_reference
from cisformer.data.reference import Reference, load_reference, save_reference
from cisformer.errors import InputError, OutputExistsError, ReferenceMismatchError

# Any change of these breaks every published checkpoint and every stored data set.
PUBLISHED = {
    "human": ("hg38", 38_244, 1_033_239, "6dbef5418407b4cf2cef4bf397bb3c07278618d23c614a799b7719b2d6e139dc"),
    "mouse": ("mm39", 23_234, 262_853, "860923987181984f8620043fc9e2d2d2ab48571fe571d424577fef97d01bd6c1"),
}

GTF = """\
#!genome
chr1\tX\tgene\t1001\t2000\t.\t+\t.\tgene_id "ENSG00000000001.3"; gene_name "AAA";
chr1\tX\texon\t1001\t1100\t.\t+\t.\tgene_id "ENSG00000000001.3"; gene_name "AAA";
chr2\tX\tgene\t501\t900\t.\t-\t.\tgene_id "Y74C9A.3"; gene "bbb"; other_gene "no";
chrX\tX\tgene\t11\t90\t.\t+\t.\tgene_id "ENSG00000000002.1"; gene_name "PAR";
chrY\tX\tgene\t11\t90\t.\t+\t.\tgene_id "ENSG00000000002.1_PAR_Y"; gene_name "PAR";
"""
GENES = [
    ["ENSG00000000001", "AAA", "chr1", 1000, 2000, "+"],
    ["Y74C9A.3", "bbb", "chr2", 500, 900, "-"],
    ["ENSG00000000002", "PAR", "chrX", 10, 90, "+"],
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_references_are_the_published_ones(name: str):
    reference = load_reference(name)
    genome, n_genes, n_ccres, fingerprint = PUBLISHED[name]
    assert (reference.genome, reference.n_genes, reference.n_ccres) == (genome, n_genes, n_ccres)
    assert reference.fingerprint == fingerprint
    assert reference.is_built_in


def test_human_reference_by_known_rows():
    human = load_reference("human")
    assert human.genes.iloc[0].tolist() == ["ENSG00000223972", "DDX11L1", "chr1", 12009, 13670, "+"]
    assert human.ccres.iloc[0].tolist() == ["chr1", 104896, 105048]
    assert human.ccres.iloc[-1].tolist() == ["chr22", 50789503, 50789801]
    assert (human.genes["start"] >= 0).all()


def test_mouse_ccres_are_of_the_genome_of_the_mouse_genes():
    mouse = load_reference("mouse")
    site = tss(mouse.genes)
    near = mouse.genes.assign(start=np.maximum(site - 500, 0), end=site + 500)[site >= 0]
    share = len(np.unique(overlap_pairs(near, mouse.ccres)[0])) / len(near)
    assert share > 0.55  # 17 % when read as mm10
    assert (site < 0).sum() == 1


def test_built_in_tables_are_small():
    folder = importlib.resources.files("cisformer.resources")
    assert sum(len(path.read_bytes()) for path in folder.iterdir() if path.is_file()) < 10e6


def test_labels_are_unique():
    mouse = load_reference("mouse")
    assert mouse.genes["gene_name"].duplicated().any()
    assert len(set(mouse.gene_labels)) == mouse.n_genes
    assert mouse.ccre_labels[0] == "chr1:3189840-3190134"


@pytest.fixture
def small() -> Reference:
    human = load_reference("human")
    return Reference("dataset", "hg38", human.genes.iloc[:30].copy(), human.ccres.iloc[:50].copy())


def test_saved_and_loaded_is_the_same_and_the_bytes_repeat(small: Reference, tmp_path: Path):
    for folder in ("a", "b"):
        save_reference(small, tmp_path / folder)
    loaded = load_reference(tmp_path / "a")
    assert loaded.fingerprint == small.fingerprint
    assert (loaded.name, loaded.genome, loaded.is_built_in) == ("dataset", "hg38", False)
    for name in ("genes.tsv.gz", "ccres.bed.gz", "reference.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fingerprint_sees_every_column(small: Reference):
    for table, column in ((small.genes, "gene_id"), (small.genes, "strand"), (small.ccres, "end")):
        before = small.fingerprint
        table.loc[3, column] = table.loc[4, column] if column != "strand" else "?"
        assert Reference("dataset", "hg38", small.genes, small.ccres).fingerprint != before
        del small.__dict__["fingerprint"]


def test_an_edited_table_is_refused(small: Reference, tmp_path: Path):
    save_reference(small, tmp_path)
    lines = gzip.decompress((tmp_path / "ccres.bed.gz").read_bytes()).splitlines(keepends=True)
    (tmp_path / "ccres.bed.gz").write_bytes(gzip.compress(b"".join(lines[1:])))
    with pytest.raises(ReferenceMismatchError, match="not those it was built with"):
        load_reference(tmp_path)


@pytest.mark.parametrize("content", [None, "not json"])
def test_no_reference_there(content: str | None, tmp_path: Path):
    if content is not None:
        (tmp_path / "reference.json").write_text(content)
    with pytest.raises(InputError, match="is not a reference folder"):
        load_reference(tmp_path)
    with pytest.raises(InputError, match="no reference 'humna'") as caught:
        load_reference("humna")
    assert "build_reference" in caught.value.hint


@pytest.mark.parametrize("packed", [False, True])
def test_gtf_genes_are_read(packed: bool, tmp_path: Path):
    path = tmp_path / "genes.gtf"  # gzip is told by content, not by name
    path.write_bytes(gzip.compress(GTF.encode()) if packed else GTF.encode())
    genes = read_gtf(path)
    assert list(genes.columns) == GENE_COLUMNS
    assert genes.to_numpy().tolist() == GENES


def test_gtf_without_gene_lines_gives_the_extent_of_each_gene(tmp_path: Path):
    path = tmp_path / "t.gtf"
    line = 'chr1\tX\texon\t{}\t{}\t.\t-\t.\tgene_id "G"; transcript_id "T";\n'
    path.write_text(line.format(301, 400) + line.format(101, 200))
    assert read_gtf(path).to_numpy().tolist() == [["G", "G", "chr1", 100, 400, "-"]]


def test_a_reference_of_any_genome(tmp_path: Path):
    (tmp_path / "g.gtf").write_text(GTF)
    (tmp_path / "p.bed").write_text("track name=x\n1\t10\t60\tpeak1\n2\t5\t9\n1\t10\t60\n")
    built = build_reference(tmp_path / "g.gtf", tmp_path / "p.bed", tmp_path / "worm")
    assert built.name == "worm"
    assert built.ccres.to_numpy().tolist() == [["chr1", 10, 60], ["chr2", 5, 9]]  # spelt as the genes, once
    assert load_reference(tmp_path / "worm").fingerprint == built.fingerprint
    with pytest.raises(OutputExistsError):
        build_reference(tmp_path / "g.gtf", tmp_path / "p.bed", tmp_path / "worm")


@pytest.mark.parametrize(
    ("gtf", "bed", "message"),
    [
        (GTF, "chr9\t1\t5\n", "share no chromosome"),
        (GTF, "chr1\t5\t1\n", "line 1 is not a BED region"),
        (GTF, "chr1:1-5\n", "line 1 is not a BED region"),
        ("##gff-version 3\n", "chr1\t1\t5\n", "no GTF line"),
        (None, "chr1\t1\t5\n", "cannot read"),
    ],
)
def test_bad_annotations_are_refused(gtf: str | None, bed: str, message: str, tmp_path: Path):
    if gtf is not None:
        (tmp_path / "g.gtf").write_text(gtf)
    (tmp_path / "p.bed").write_text(bed)
    with pytest.raises(InputError, match=message):
        build_reference(tmp_path / "g.gtf", tmp_path / "p.bed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def frame(index: list[str], **columns: list) -> pd.DataFrame:
    return pd.DataFrame(columns, index=index)


def test_gene_identity_finds_ids_and_names():
    by_name = frame(["A", "B"], gene_ids=["ENSG00000000001.7", "ENSG00000000002"])
    by_id = frame(["ENSG00000000001.7", "ENSG00000000002"], feature_name=["A", "B"])
    expected = [["ENSG00000000001", "A"], ["ENSG00000000002", "B"]]
    assert gene_identity(by_name).to_numpy().tolist() == expected
    assert gene_identity(by_id).to_numpy().tolist() == expected
    assert gene_identity(frame(["AL1.1", "B"])).to_numpy().tolist() == [["AL1.1", "AL1.1"], ["B", "B"]]


def human_peaks(n: int = 300) -> list[str]:
    return load_reference("human").ccre_labels[:: load_reference("human").n_ccres // n].tolist()


def test_dataset_coordinates_come_from_the_annotation_of_the_genome():
    reference = dataset_reference(frame(["RABL2B", "nobody", "RABL2B"]), frame(human_peaks()))
    assert (reference.name, reference.genome, reference.n_genes) == ("dataset", "hg38", 2)
    human = load_reference("human").genes.set_index("gene_name").loc["RABL2B"]
    assert reference.genes.iloc[0]["start"] == human["start"]
    assert reference.genes.iloc[1].tolist() == ["nobody", "nobody", "", -1, -1, ""]


def test_dataset_coordinates_from_var_from_interval_and_from_a_gtf(tmp_path: Path):
    peaks = frame(["chr1:10-20", "2-5-9", "chr1:10-20"])
    known = frame(["g"], chrom=["2"], start=[5], end=[50], strand=["-"])
    reference = dataset_reference(known, peaks)
    assert reference.genes.to_numpy().tolist() == [["g", "g", "2", 5, 50, "-"]]
    assert reference.ccres.to_numpy().tolist() == [["chr1", 10, 20], ["2", 5, 9]]
    tenx = dataset_reference(frame(["g"], interval=["chr1:5-50"]), peaks)
    assert tenx.genes.to_numpy().tolist() == [["g", "g", "chr1", 5, 50, ""]]
    (tmp_path / "g.gtf").write_text(GTF)
    annotated = dataset_reference(frame(["AAA", "bbb"]), peaks, tmp_path / "g.gtf")
    assert annotated.genes["start"].tolist() == [1000, 500]
    assert annotated.genes["chrom"].tolist() == ["chr1", "2"]  # spelt as the peaks


def test_coordinates_in_var_may_be_incomplete():
    peaks = frame(["chr1:10-20"])
    genes = frame(
        ["a", "b", "c"], chrom=["chr1", None, "chr1"], start=[5.0, 3, None], end=[9, 4, 8], strand=[-1, 1, 1]
    )
    assert dataset_reference(genes, peaks).genes.iloc[:, 2:].to_numpy().tolist() == [
        ["chr1", 5, 9, "-"],
        ["", -1, -1, ""],
        ["", -1, -1, ""],
    ]
    tenx = dataset_reference(frame(["a", "b"], interval=["chr1:5-9", ""]), peaks).genes
    assert tenx.iloc[:, 2:].to_numpy().tolist() == [["chr1", 5, 9, ""], ["", -1, -1, ""]]


def test_peaks_may_have_their_regions_in_columns():
    expected = [["chr1", 5, 9]]
    assert peak_regions(frame(["p"], chrom=["chr1"], start=[5], end=[9])).to_numpy().tolist() == expected
    assert peak_regions(frame(["p"], interval=["chr1:5-9"])).to_numpy().tolist() == expected
    with pytest.raises(InputError, match="'p' is not a region"):
        peak_regions(frame(["p"], chrom=["chr1"], start=[None], end=[9]))


def test_genome_is_guessed_from_peaks():
    mouse = load_reference("mouse").ccres.iloc[::400].reset_index(drop=True)
    assert guess_genome(mouse) == "mm39"
    assert guess_genome(mouse.assign(start=mouse["start"] + 5000, end=mouse["end"] + 5000)) == ""
    assert guess_genome(mouse.assign(chrom=mouse["chrom"].str[3:])) == "mm39"


@pytest.mark.parametrize(
    ("folder", "genome"),
    [("bmmc_starter_A", "hg38"), ("pbmc10k_full_40", "hg38"), ("scpoem_S1_300", "hg38"),
     ("k562_chr22_95", "hg38"), ("scicar_a549_2641", "hg19"),
     ("snareseq_mop_10309", "mm10")],
)  # fmt: skip
def test_genome_of_real_data(folder: str, genome: str, shared: Path):
    from cisformer.data.sources import open_rows

    with open_rows(shared / "data" / folder / "atac.h5ad", "atac") as source:
        peaks = peak_regions(source.var)
    assert guess_genome(peaks) == genome
    share, chance = coverage(peaks, load_reference("human").ccres)
    assert (share > 0.5) == (genome == "hg38")
    assert chance < 0.5


UCSC = (
    "chr{c}\trefGene\t{kind}\t{start}\t{end}\t.\t{strand}\t.\t"
    'gene_id "{name}"; transcript_id "{tx}"; gene_name "{name}";\n'
)


def ucsc(name: str, chrom: str, start: int, end: int, tx: str) -> str:
    """A transcript and an exon of a gene, as genePredToGtf writes them: no gene line."""
    return "".join(
        UCSC.format(c=chrom, kind=kind, start=start + 1, end=end, strand="+", name=name, tx=tx)
        for kind in ("transcript", "exon")
    )


def test_a_gene_with_several_loci_keeps_one_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    lines = [
        ucsc("ALT", "4_GL000257v2_alt", 1000, 1100, "NM_1"),
        ucsc("ALT", "4", 5000, 5100, "NM_1"),
        ucsc("COPY", "4", 121_000_000, 121_050_000, "NM_2"),
        ucsc("COPY", "4", 121_020_000, 121_060_000, "NM_3"),
        ucsc("COPY", "4", 181_000_000, 181_050_000, "NM_2_copy"),
        ucsc("PAR", "Y", 2_000_000, 2_000_100, "NM_4"),
        ucsc("PAR", "X", 82_000_000, 82_000_100, "NM_4"),
        ucsc("ONE", "6", 10, 90, "NM_5"),
    ]
    (tmp_path / "ucsc.gtf").write_text("".join(lines))
    genes = read_gtf(tmp_path / "ucsc.gtf").set_index("gene_id")[["chrom", "start", "end"]]
    assert genes.T.to_dict("list") == {
        "ALT": ["chr4", 5000, 5100],
        "COPY": ["chr4", 121_000_000, 121_060_000],
        "PAR": ["chrX", 82_000_000, 82_000_100],
        "ONE": ["chr6", 10, 90],
    }
    assert "3 genes have several loci, such as" in caplog.text


def gtf_line(attributes: str, chrom: str = "chr1") -> str:
    return f"{chrom}\tx\tgene\t101\t200\t.\t-\t.\t{attributes}\n"


@pytest.mark.parametrize(
    "text",
    [
        gtf_line('gene_id "G.1"; gene_name "AAA";').replace("\n", "\r\n"),
        gtf_line("gene_id G.1; gene_name AAA;"),
        gtf_line('gene_id "G.1"; transcript_id ""; db_xref "GeneID:1"; gene "AAA"; gene_biotype "x";'),
    ],
    ids=["crlf", "unquoted", "RefSeq"],
)
def test_spellings_of_gtf(text: str, tmp_path: Path):
    (tmp_path / "g.gtf").write_bytes(text.encode())
    assert read_gtf(tmp_path / "g.gtf").to_numpy().tolist() == [["G.1", "AAA", "chr1", 100, 200, "-"]]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (gtf_line('gene_id "G";').replace("\t", " "), "not separated by tabs"),
        (gtf_line("ID=gene:G;Name=AAA"), "gffread"),
    ],
)
def test_what_is_no_gtf_is_refused_with_what_mends_it(text: str, hint: str, tmp_path: Path):
    (tmp_path / "g.gtf").write_text(text)
    with pytest.raises(InputError, match="no GTF line with a gene_id") as caught:
        read_gtf(tmp_path / "g.gtf")
    assert hint in caught.value.hint


def test_a_gtf_that_shares_no_chromosome_with_the_peaks_is_refused(tmp_path: Path):
    (tmp_path / "refseq.gtf").write_text(gtf_line('gene_id "AAA";', "NC_000004.12"))
    genes, peaks = frame(["AAA"]), frame(["chr4:10-20"])
    with pytest.raises(InputError, match=r"share no chromosome: NC_000004\.12 and chr4") as caught:
        dataset_reference(genes, peaks, tmp_path / "refseq.gtf")
    assert "accessions" in caught.value.hint
    dashed = dataset_reference(genes, frame(["NC-000004.12-10-20"]), tmp_path / "refseq.gtf")  # of Seurat
    assert dashed.genes["chrom"].tolist() == dashed.ccres["chrom"].tolist() == ["NC-000004.12"]


SHAPES = {
    "own": ({"chrom": ["chr1"], "start": [100], "end": [200], "strand": ["-"]}, 199),
    "glue": ({"chrom": ["chr1"], "chromStart": [100], "chromEnd": [200], "strand": ["-"]}, 199),
    "biomart": (
        {"chromosome_name": ["1"], "start_position": [101], "end_position": [200], "strand": [-1]},
        199,
    ),
    "granges": ({"seqnames": ["chr1"], "start": [101], "end": [200], "strand": ["-"]}, 199),
    "interval": ({"interval": ["chr1:199-200"]}, 199),
}


@pytest.mark.parametrize(("columns", "site"), SHAPES.values(), ids=SHAPES)
def test_gene_coordinates_in_every_shape(columns: dict, site: int):
    reference = dataset_reference(frame(["g"], **columns), frame(["chr1:10-20"]))
    assert tss(reference.genes).tolist() == [site]
    assert reference.genes["chrom"].tolist() == ["chr1"]


def test_strands_that_are_missing_come_by_id_or_are_said_to_be_in_doubt(caplog: pytest.LogCaptureFixture):
    known = load_reference("human").genes.set_index("gene_id")["strand"]
    ids = ["ENSG00000136997", "ENSG00000075624", "stranger"]  # MYC +, ACTB -
    var = frame(ids, chrom=["chr1"] * 3, start=[100] * 3, end=[200] * 3)
    reference = dataset_reference(var, frame(["chr1:10-20"]))
    assert reference.genes["strand"].tolist() == [*known[ids[:2]], ""] == ["+", "-", ""]
    assert "1 of 3 genes have no strand" in caplog.text


@pytest.mark.parametrize(
    ("genome", "name", "expected"),
    [("hg19", "GATA1", ("chrX", 48_644_981, "+")), ("mm10", "Actb", ("chr5", 142_906_753, "-")),
     ("hg38", "MSN", ("chrX", 65_588_376, "+")), ("hg38", "MYC", None), ("mm39", "Actb", None)],
)  # fmt: skip
def test_gene_coordinates_of_four_genomes(genome: str, name: str, expected: tuple | None):
    genes = load_annotation(genome)
    assert list(genes.columns) == GENE_COLUMNS
    assert not genes["gene_name"].duplicated().any() or genome in ("hg38", "mm39")
    row = genes[genes["gene_name"] == name]
    if expected is not None:
        assert (row["chrom"].iloc[0], int(tss(row)[0]), row["strand"].iloc[0]) == expected
    reference = dataset_reference(frame([name]), frame([f"{row['chrom'].iloc[0]}:10-20"]), genome=genome)
    assert (reference.genome, tss(reference.genes).tolist()) == (genome, tss(row).tolist())
    with pytest.raises(InputError, match="no annotation of genome 'rn6'"):
        load_annotation("rn6")


def test_genes_that_the_built_in_references_lack_are_found_but_not_counted_on_their_chromosomes():
    human, mouse = "ENSG00000290825", "ENSMUSG00000144196"  # DDX11L2 of chr1, and one without a name
    var, peaks = frame(["MSN", human, mouse]), frame(["chr1:10-20", "GL456210.1:10-20"])
    assert dataset_reference(var, peaks, genome="hg38").genes["start"].tolist() == [65_588_376, 11_868, -1]
    assert dataset_reference(var, peaks, genome="mm39").genes["start"].tolist() == [-1, -1, 630]
    known, every = load_annotation("hg38"), load_annotation("hg38", every_gene=True)
    assert human not in set(known["gene_id"])
    assert every["gene_id"].is_unique
    lacking = known[~known["gene_id"].isin(load_reference("human").genes["gene_id"])]
    assert set(lacking["chrom"]) == {"chrX", "chrY", "chrM"}


def test_a_genome_that_the_peaks_contradict_is_said(caplog: pytest.LogCaptureFixture):
    site = load_annotation("hg19")[["chrom", "start"]].iloc[::100]
    peaks = frame([f"{chrom}:{start}-{start + 300}" for chrom, start in site.itertuples(index=False)])
    assert dataset_reference(frame(["MSN"]), peaks, genome="hg38").genome == "hg38"
    assert "the peaks look like hg19, but the genome was given as hg38" in caplog.text
    caplog.clear()
    assert dataset_reference(frame(["MSN"]), peaks, genome="hg19").genome == "hg19"
    assert "look like" not in caplog.text


def test_a_gtf_with_other_names_says_which(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    gtf = tmp_path / "a.gtf"
    gtf.write_text(GTF)
    dataset_reference(frame(["PAR.2"]), frame(["chrX:10-20"]), gtf=gtf)
    assert f"{gtf} has ENSG00000000001, Y74C9A.3, ENSG00000000002, named AAA, bbb, PAR" in caplog.text


def test_pseudoautosomal_copies_are_summed():
    var = frame(["ENSG00000002586.20", "ENSG00000002586.20_PAR_Y"])
    assert gene_identity(var)["gene_id"].tolist() == ["ENSG00000002586"] * 2
