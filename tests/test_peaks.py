"""What peaks are, and which genes they are linked to."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_links import GENES, TYPES, write_links

from cisformer.analysis.peaks import annotate_peaks
from cisformer.data.genome import nearest_tss
from cisformer.data.known_genomes import load_annotation
from cisformer.errors import InputError

BED = (
    "track name=x\nchr1\t9500\t9700\nchr1\t15000\t15500\nchr1\t25100\t25300\nchr1\t61500\t61600\nchr3\t5\t9\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_links(tmp_path_factory.mktemp("made") / "cisformer_link")


@pytest.fixture
def bed(tmp_path):
    path = tmp_path / "peaks.bed"
    path.write_text(BED)
    return path


def test_a_header_is_passed_over_and_few_genes_are_said(folder, tmp_path, caplog):
    path = tmp_path / "peaks.bed"
    path.write_text("chr\tstart\tend\nchr1\t9500\t9700\n")
    assert annotate_peaks(path, folder)["peak"].tolist() == ["chr1:9500-9700"]
    assert "genes of hg38: the nearest gene is the nearest of these. Give --gtf" in caplog.text
    path.write_text("chr1\t9500\t9700\nchr\tstart\tend\n")
    with pytest.raises(InputError, match="line 2 is not a BED region"):
        annotate_peaks(path, folder)
    with pytest.raises(InputError, match="smallest score of a link is 2"):
        annotate_peaks(path, folder, min_score=2)


def test_kinds_distances_and_linked_genes(folder, bed):
    table = annotate_peaks(bed, folder, min_score=0.1).set_index("peak")
    assert table["kind"].tolist() == ["promoter", "gene body", "distal", "distal", "distal"]
    assert table["nearest_distance"].tolist()[:4] == [-400, 5250, 15200, -1551]
    assert table["nearest_gene"].tolist() == ["NEAR", "NEAR", "NEAR", "</script><b>", ""]
    assert table["genes_over"].tolist() == ["", "NEAR", "", "", ""]
    assert table.loc["chr1:25100-25300", ["linked_gene", "cell_type", "linked_genes"]].tolist() == [
        "</script><b>", TYPES[0], "</script><b>;NEAR",
    ]  # fmt: skip
    assert table["linked_gene"].tolist()[3:] == ["", ""]
    assert annotate_peaks(bed, folder, promoter_bp=2000)["kind"].tolist()[3] == "promoter"
    assert annotate_peaks(bed, folder, min_score=0.71)["linked_gene"].eq("").all()


def test_built_in_genes_and_cells_with_peaks(tiny_files, tiny):
    table = annotate_peaks(tiny_files / "atac.h5ad")
    assert table["peak"].tolist() == tiny.atac.var_names.tolist()
    assert set(table["kind"]) == {"promoter", "gene body", "distal"}
    genes = load_annotation("hg38")
    site = genes[genes["start"] >= 0].assign(
        site=lambda t: np.where(t["strand"] == "-", t["end"] - 1, t["start"])
    )
    for row in table.iloc[::60].itertuples():
        own = site[site["chrom"] == row.chrom]
        apart = (own["site"] - (row.start + row.end) // 2).abs()
        assert abs(row.nearest_distance) == apart.min()
        assert row.nearest_gene in own["gene_name"][apart == apart.min()].tolist()
        assert (row.kind == "promoter") == bool(
            ((own["site"] - 1000 < row.end) & (own["site"] + 1000 >= row.start)).any()
        )


def test_peaks_of_chromosome_x_have_genes(tmp_path: Path):
    path = tmp_path / "x.bed"
    path.write_text("chrX\t65588000\t65588600\n")
    (peak,) = annotate_peaks(path, genome="hg38").itertuples()
    assert (peak.kind, peak.nearest_gene, peak.nearest_distance) == ("promoter", "MSN", -76)


def test_nearest_tss_with_unknown_genes_and_chromosomes():
    genes = GENES.assign(start=[-1, 50_000, 10_000], end=[-1, 60_000, 30_000])
    regions = pd.DataFrame({"chrom": ["chr1", "chr2", "chrX"], "start": [0, 0, 0], "end": [10, 10, 10]})
    row, distance = nearest_tss(regions, genes)
    assert row.tolist() == [1, 2, -1]
    assert distance.tolist() == [59_994, -9_995, 0]
    assert nearest_tss(regions, genes[:1])[0].tolist() == [-1, -1, -1]


def test_what_is_no_peaks_or_of_another_genome_is_refused(folder, bed, tmp_path):
    with pytest.raises(InputError, match="on hg19, the links of"):
        annotate_peaks(bed, folder, genome="hg19")
    with pytest.raises(InputError, match=r"the genome of .* is none of"):
        annotate_peaks(bed)
    (tmp_path / "none.bed").write_text("#chrom\tstart\tend\n")
    with pytest.raises(InputError, match="holds no peaks"):
        annotate_peaks(tmp_path / "none.bed")
    (tmp_path / "far.bed").write_text("chr9\t5\t9\n")
    with pytest.raises(InputError, match="no peak of"):
        annotate_peaks(tmp_path / "far.bed", folder)
    with pytest.raises(InputError, match=r"missing\.bed"):
        annotate_peaks(tmp_path / "missing.bed")


def test_the_command(folder, bed, tmp_path, command):
    output = tmp_path / "peaks.tsv.gz"
    done = command("annotate_peaks", "-p", bed, "-l", folder, "-o", output)
    assert done.returncode == 0, done.stderr
    assert "5 peaks: 3 distal, 1 promoter, 1 gene body" in done.stdout
    assert len(pd.read_csv(output, sep="\t")) == 5
    assert command("annotate_peaks", "-p", bed, "-l", folder, "-o", output).returncode != 0
