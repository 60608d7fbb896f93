"""From variants to genes: reading them, joining them, and the enrichment."""

import gzip
import json
import logging

import numpy as np
import pandas as pd
import pytest
from made_links import TYPES, write_links
from scipy import stats

import cisformer
from cisformer.analysis.enrichment import FEWEST_LOCI, LinkedShare, linked_enrichment, one_per_locus
from cisformer.analysis.read_variants import genome_named, on_chroms, read_variants
from cisformer.analysis.stored import open_links
from cisformer.analysis.variant_genes import FILES, annotate_variants
from cisformer.errors import InputError, OutputExistsError

VCF = """##fileformat=VCFv4.2
##reference=GRCh38
##contig=<ID=chr1,length=248956422>
#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO
chr1\t25001\trs1\tA\tG,T\t.\t.\tPIP=0.5
chr1\t24999\t.\tACGT\tA\t.\t.\t.
chr1\t25501\tbehind\tA\tG\t.\t.\t.
chr2\t90100\trs4\tC\tT\t.\t.\t.
chr1\t59000\tsv\tN\t<DEL>\t.\t.\tSVTYPE=DEL;END=59950
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_links(tmp_path_factory.mktemp("made") / "cisformer_link")


def write(path, text, *, gz=False):
    path.write_bytes(gzip.compress(text.encode()) if gz else text.encode())
    return path


# ---------------------------------------------------------------- reading


def test_vcf_counts_from_one_and_spans_ref(tmp_path):
    found = read_variants(write(tmp_path / "v.vcf", VCF))
    assert (found.kind, found.genome) == ("VCF", "hg38")
    rows = found.table[["variant", "start", "end", "alt"]].to_numpy().tolist()
    assert rows[0] == ["rs1", 25000, 25001, "G,T"]
    assert rows[1] == ["chr1:24999:ACGT:A", 24998, 25002, "A"]
    assert rows[4] == ["sv", 58999, 59950, "<DEL>"]
    assert found.table["pip"].tolist()[0] == 0.5


@pytest.mark.parametrize("name", ["v.vcf", "v.vcf.gz", "v.txt", "v.tsv.gz"])
@pytest.mark.parametrize("gz", [True, False])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_names_packing_and_line_ends_do_not_matter(name, gz, newline, tmp_path):
    path = write(tmp_path / name, "\ufeff" * (newline == "\r\n") + VCF.replace("\n", newline), gz=gz)
    pd.testing.assert_frame_equal(read_variants(path).table, read_variants(write(tmp_path / "x", VCF)).table)


TABLES = {
    "plain": "chrom\tpos\tref\talt\tpip\nchr1\t25001\tA\tG\t0.5\n",
    "catalog": "DATE\tSNPS\tCHR_ID\tCHR_POS\tP-VALUE\tPIP\n2020\trs1\t1\t25001\t1E-8\t0.5\n",
    "comma": '"chr","position","name, long","pip"\n"1","25,001","rs1",0.5\n'.replace("25,001", "25001"),
    "plink": " CHR BP   SNP  P pip\n 1 25001 rs1 0.1 0.5\n",
    "gtex": "variant_id\tpip\nchr1_25001_A_G_b38\t0.5\n",
    "marker": "MarkerName\tpip\n1:25001:A:G\t0.5\n",
    "span": "chrom\tstart\tend\tpip\nchr1\t25000\t25001\t0.5\n",
    "annovar": "chrom\tstart\tend\tpip\nchr1\t25001\t25001\t0.5\n",
    "builds": "chrom\tpos_hg19\tpos_hg38\tpip\n1\t7\t25001\t0.5\n",
    "hash": "#CHR\tBP\tN\tpip\n1\t25001\t400\t0.5\n",
    "float": "chr\tpos\tpip\n1.0\t25001.0\t0.5\n",
    "trailing": "chrom\tpos\tpip\nchr1\t25001\t0.5\t\n",
    "finemap": "chromosome\tbase_pair_location\tposterior_prob\n1\t25001\t0.5\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_under_the_usual_names(name, tmp_path):
    found = read_variants(write(tmp_path / "v.tsv", TABLES[name]), genome="hg38")
    row = found.table.iloc[0]
    assert (row["chrom"].removeprefix("chr"), row["start"], row["end"], row["pip"]) == (
        "1",
        25000,
        25001,
        0.5,
    )
    assert found.genome == ("hg38" if name in ("gtex", "builds") else "")


def test_bed_counts_from_zero_and_names_are_kept(tmp_path):
    text = 'track name="x y"\nbrowser position chr1\n#c\nchr1\t25000\t25001\trs1\nchr1\t30\t30\tins\n'
    found = read_variants(write(tmp_path / "v.bed", text))
    assert found.table[["variant", "start", "end"]].to_numpy().tolist() == [
        ["rs1", 25000, 25001],
        ["ins", 30, 31],
    ]
    alone = read_variants(write(tmp_path / "w.bed", "1\t25001\t25001\n"))
    assert alone.table[["start", "end"]].to_numpy().tolist() == [[25000, 25001]]


def test_repeats_and_rows_without_a_position_are_counted(tmp_path):
    text = "CHR_ID\tCHR_POS\tPIP\n1\t25001\t0.1\n1\t25001\t0.7\n1;2\t5;6\t\n"
    found = read_variants(write(tmp_path / "v.tsv", text))
    assert found.table["pip"].tolist() == [0.7]
    assert found.left_out == {"rows have no position": 1, "rows repeat a variant": 1}


BAD = {
    "empty": ("", "is empty"),
    "header only": (VCF.split("chr1\t")[0], "no variants"),
    "rsids": ("SNP\tP\nrs1\t0.1\nrs2\t0.2\n", "by rsid and has no positions"),
    "rsid list": ("rs12345\nrs3\nrs4\n", "rsid"),
    "no columns": ("a\tb\nx\ty\n", "no columns for chromosome and position"),
    "two genomes": (VCF.replace("##reference=GRCh38", "##reference=hg19"), "names two genomes"),
    "no record": (VCF + "chr1 100 . A\n", "line 10 is no VCF record"),
    "row names of R": ("chrom\tpos\n1\tchr1\t5\n", "names 2 columns and has 3"),
    "backward": ("chr1\t30\t20\n", "is no BED"),
    "binary": ("BCF\x02\x02\x00\udcff", "cannot read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_holds_no_variants_is_refused(name, tmp_path):
    text, complaint = BAD[name]
    path = tmp_path / "v.vcf"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=complaint) as error:
        read_variants(path)
    assert str(path) in error.value.message
    assert error.value.hint


def test_genomes_by_any_of_their_names():
    told = {"##contig=<ID=1,assembly=b37>": "hg19", "hs37d5": "hg19", "GRCm39": "mm39", "NCBI36": "hg18"}
    assert {text: genome_named(text) for text in told} == told
    assert genome_named("position") == genome_named("b3") == ""


def test_chromosomes_are_spelt_as_the_links_do(tmp_path):
    text = "chr\tpos\n1\t5\n23\t6\nMT\t7\nchrM\t8\nchrUn_x\t9\n"
    found = on_chroms(read_variants(write(tmp_path / "v.tsv", text)), ["chr1", "chrX", "chrM"], "links")
    assert found.table["chrom"].tolist() == ["chr1", "chrX", "chrM", "chrM"]
    assert found.left_out == {"are on chromosomes without cCREs, such as chrUn_x": 1}
    with pytest.raises(
        InputError, match=r"no variant of .* lies on a chromosome of links: 1, 23, MT against A"
    ):
        on_chroms(read_variants(tmp_path / "v.tsv"), ["A"], "links")


# ---------------------------------------------------------------- joining


@pytest.fixture(scope="module")
def annotation(folder, tmp_path_factory):
    return annotate_variants(
        folder, write(tmp_path_factory.mktemp("v") / "v.vcf", VCF), n_permutations=50, min_score=0.1
    )


def test_every_link_of_a_variant_is_a_row_the_best_first(annotation):
    rows = annotation.links.query("variant == 'rs1'")[["ccre", "gene_name", "cell_type", "score"]]
    assert rows.astype({"score": float}).round(3).to_numpy().tolist() == [
        ["chr1:25000-25500", "</script><b>", TYPES[0], 0.7],
        ["chr1:25000-25500", "</script><b>", TYPES[1], 0.3],
        ["chr1:25000-25500", "NEAR", TYPES[0], 0.2],
    ]
    assert annotation.links["score"].is_monotonic_decreasing
    assert annotation.links["score"].min() >= 0.1


def test_distances_follow_the_strand(annotation):
    rows = (
        annotation.links.set_index(["variant", "gene_name"])["variant_distance"].groupby(level=[0, 1]).first()
    )
    assert rows["rs1", "NEAR"] == 15_000
    assert rows["rs1", "</script><b>"] == 59_999 - 25_000  # on -, so this variant is downstream
    assert annotation.variants.set_index("variant")["nearest_distance"]["rs1"] == 15_000


def test_the_summary_has_each_variant_once_beside_its_nearest_gene(annotation):
    table = annotation.variants.set_index("variant")
    assert table["n_ccres"].tolist() == [1, 1, 0, 1, 1]
    assert table["nearest_gene"].tolist() == ["NEAR", "NEAR", "NEAR", "FAR", "</script><b>"]
    assert table["linked_gene"].tolist() == ["</script><b>"] * 2 + ["", "FAR", "</script><b>"]
    assert annotation.counts == {
        "variants": 5, "in_no_ccre": 1, "in_ccre": 4, "linked": 4, "by_nearest": 1, "not_nearest": 2,
    }  # fmt: skip
    assert table["gene"].tolist() == ["</script><b>"] * 2 + ["NEAR", "FAR", "</script><b>"]
    assert table["by"].tolist() == ["link", "link", "nearest", "link", "link"]
    assert "1 in no cCRE" in annotation.describe()


def test_files_and_their_record(folder, annotation, tmp_path):
    paths = annotation.write(tmp_path / "out")
    assert tuple(path.name for path in paths) == FILES
    again = pd.read_csv(paths[0], sep="\t", keep_default_na=False)
    assert set(again["cell_type"]) == set(TYPES)
    report = json.loads(paths[3].read_text())
    assert (report["format"], report["assembly"], report["counts"]["in_ccre"]) == (
        "cisformer-variants",
        "hg38",
        4,
    )
    with pytest.raises(OutputExistsError):
        annotation.write(tmp_path / "out")


def test_another_genome_is_refused_and_an_unknown_one_is_said(folder, tmp_path, caplog):
    old = write(tmp_path / "v.vcf", VCF.replace("GRCh38", "GRCh37").replace("248956422", "249250621"))
    with pytest.raises(InputError, match=r"are on hg19, the links of .* on hg38") as error:
        annotate_variants(folder, old)
    assert "lift" in error.value.hint
    with pytest.raises(InputError, match="says that its genome is hg19, --genome says hg38"):
        annotate_variants(folder, old, genome="GRCh38")
    bed = write(tmp_path / "v.bed", "1\t25000\t25001\n")
    with caplog.at_level(logging.WARNING):
        annotate_variants(folder, bed, n_permutations=5)
        assert "does not say of which genome" in caplog.text
        caplog.clear()
        assert annotate_variants(folder, bed, genome="GRCh38", n_permutations=5).source["assembly"] == "hg38"
        assert "of which genome" not in caplog.text


def test_variants_outside_all_ccres_are_said(folder, tmp_path, caplog):
    found = annotate_variants(folder, write(tmp_path / "v.bed", "1\t1\t2\nchr9\t5\t6\n"), genome="hg38")
    assert "no variant lies in a cCRE of the links. Are its positions of genome hg38?" in caplog.text
    assert found.variants["by"].tolist() == ["nearest"]  # chr9 has no cCRE
    with pytest.raises(InputError, match="smallest score of a link is 50"):
        annotate_variants(folder, tmp_path / "v.bed", min_score=50)


def test_min_pip(folder, tmp_path):
    path = write(tmp_path / "v.vcf", VCF)
    assert annotate_variants(folder, path, min_pip=0.5, n_permutations=5).counts["variants"] == 1
    with pytest.raises(InputError, match=r"the highest is 0\.5"):
        annotate_variants(folder, path, min_pip=0.6)
    with pytest.raises(InputError, match="no column of pip"):
        annotate_variants(folder, write(tmp_path / "v.bed", "1\t25000\t25001\n"), min_pip=0.1, genome="hg38")


def test_a_table_alone_gives_the_same_links(folder, annotation, tmp_path):
    table = pd.read_csv(folder / "links.tsv.gz", sep="\t", keep_default_na=False)
    table.drop(columns=["fdr", "score_fdr"]).to_csv(tmp_path / "some.tsv", sep="\t", index=False)
    alone = annotate_variants(
        tmp_path / "some.tsv", write(tmp_path / "v.vcf", VCF), n_permutations=5, min_score=0.1
    )
    assert alone.links["fdr"].isna().all()
    columns = ["variant", "gene_id", "cell_type", "score", "variant_distance"]
    left, right = (a.links[columns].sort_values(columns, ignore_index=True) for a in (alone, annotation))
    pd.testing.assert_frame_equal(left, right, check_dtype=False, atol=1e-4)


def test_links_of_one_type_and_none(tmp_path):
    one = write_links(tmp_path / "cisformer_link", types=TYPES[:1], genome="")
    stored = open_links(tmp_path)
    assert (stored.cell_types, stored.genome, len(stored.ccres)) == ([TYPES[0]], "", 5)
    result = annotate_variants(one, write(tmp_path / "v.vcf", VCF), n_permutations=5)
    assert set(result.links["cell_type"]) == {TYPES[0]}
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no links"):
        open_links(tmp_path / "empty")
    (one / "x_250kbp_correlation_matrix.h5ad").write_bytes(b"no")
    with pytest.raises(InputError, match="is not a matrix of links"):
        open_links(one)


def test_the_command(folder, tmp_path, command):
    path = write(tmp_path / "v.vcf.gz", VCF)
    done = command(
        "annotate_variants", "-l", folder, "-v", path, "-o", tmp_path / "out", "--permutations", "1e2"
    )
    assert done.returncode == 0, done.stderr
    assert "5 variants: 1 in no cCRE" in done.stdout
    assert all((tmp_path / "out" / name).is_file() for name in FILES)
    done = command("annotate_variants", "-l", folder, "-v", path, "-o", tmp_path / "out.tsv")
    assert done.returncode != 0
    assert "give a folder" in done.stderr


# ---------------------------------------------------------------- enrichment


def made_genome(rng, n=3000):
    """cCREs whose linked score follows accessibility in one type, and a feature of its own in another."""
    start = np.sort(rng.integers(0, 200_000_000, n))
    width = rng.integers(150, 900, n)
    ccres = pd.DataFrame({"chrom": "chr1", "start": start, "end": start + width})
    site = np.sort(rng.integers(0, 200_000_000, 400))
    genes = pd.DataFrame({"chrom": "chr1", "start": site, "end": site + 100, "strand": "+"})
    n_open = np.round(np.exp(rng.normal(2, 1, n)) * width / 400)
    score = {
        "open": (n_open / (n_open + 10)).astype(np.float32),
        "own": rng.beta(0.3, 1, n).astype(np.float32),
    }
    return LinkedShare(np.arange(n), score, n_open), ccres, genes


def hits_of(rows, ccres):
    return pd.DataFrame(
        {"chrom": "chr1", "start": ccres["start"].to_numpy()[rows], "pip": np.nan, "ccre": rows}
    )


def test_random_variants_give_uniform_p_values():
    rng = np.random.default_rng(5)
    linked, ccres, genes = made_genome(rng)
    width = (ccres["end"] - ccres["start"]).to_numpy()
    p_values = {"open": [], "own": []}
    for seed in range(120):
        rows = rng.choice(
            len(ccres), 60, replace=False, p=width / width.sum()
        )  # a longer cCRE is hit more often
        found = linked_enrichment(hits_of(rows, ccres), linked, ccres, genes, n_draws=200, seed=seed)
        for name, p in zip(found["cell_type"], found["p_value"], strict=True):
            p_values[name].append(p)
    for name, found in p_values.items():
        assert stats.kstest(found, "uniform").pvalue > 0.01, name
        assert np.mean(np.array(found) < 0.05) < 0.12, name


def test_planted_enrichment_is_found_in_its_type_alone():
    others = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        linked, ccres, genes = made_genome(rng)
        own = np.flatnonzero(linked.score["own"] > 0.3)
        width = (ccres["end"] - ccres["start"]).to_numpy()[own]
        rows = rng.choice(own, 60, replace=False, p=width / width.sum())
        found = linked_enrichment(hits_of(rows, ccres), linked, ccres, genes, n_draws=500, seed=seed)
        found = found.set_index("cell_type")
        assert found.loc["own", "fdr"] < 0.01
        assert found.loc["own", "fold"] > 1.5
        assert found.loc["own", "p_value"] >= 1 / 501
        others.append(found.loc["open", "p_value"])
    assert np.mean(others) > 0.25


def test_a_locus_counts_once_by_its_likeliest_variant():
    hits = pd.DataFrame(
        {
            "chrom": "chr1",
            "start": [100, 200, 300_000, 900],
            "pip": [0.1, 0.9, np.nan, 0.2],
            "ccre": [1, 2, 3, 4],
        }
    )
    assert one_per_locus(hits, 0).tolist() == [2, 3]
    linked, ccres, genes = made_genome(np.random.default_rng(0), 50)
    few = hits_of(np.arange(FEWEST_LOCI - 1) * 10, ccres)
    assert linked_enrichment(few, linked, ccres, genes, n_draws=5, seed=0)["p_value"].isna().all()
    assert linked_enrichment(few[:0], linked, ccres, genes, n_draws=5, seed=0)["observed"].eq(0).all()


def test_the_function_that_python_offers_is_this_one():
    assert cisformer.annotate_variants is annotate_variants
