"""Factors, cCREs, genes: sequences, motifs, activity, planted drivers, networks, and what is refused."""

import gzip
import json
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats

from cisformer import link_tfs
from cisformer.analysis import sequences
from cisformer.analysis.drivers import measure_activity, relative_accessibility, strata
from cisformer.analysis.motifs import factors_of, find_motifs, read_motifs
from cisformer.analysis.networks import network_of
from cisformer.analysis.sequences import read_sequences
from cisformer.errors import InputError

BASES = np.frombuffer(b"ACGT", np.uint8)


# ---------------------------------------------------------------- sequences


def random_sequence(rng, length):
    return rng.choice(np.frombuffer(b"ACGTacgtN", np.uint8), length).tobytes()


def wrapped(name, sequence, width, end=b"\n"):
    return b">" + name + end + b"".join(sequence[i : i + width] + end for i in range(0, len(sequence), width))


@pytest.fixture
def genome():
    rng = np.random.default_rng(1)
    return {
        "1": random_sequence(rng, 1000),
        "chr2": random_sequence(rng, 777),
        "MT": random_sequence(rng, 60),
    }


@pytest.mark.parametrize(
    ("piece", "end", "packed"), [(1 << 20, b"\n", False), (7, b"\r\n", False), (64, b"\n", True)]
)
def test_regions_are_cut_out_whatever_the_pieces(genome, piece, end, packed, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sequences, "PIECE_BYTES", piece)
    text = b"".join(
        wrapped(name.encode() + b" description > of it", seq, 60, end) for name, seq in genome.items()
    )
    path = tmp_path / ("g.fa.gz" if packed else "g.fa")
    cut = len(text) // 2  # bgzip writes several gzip members
    path.write_bytes(gzip.compress(text[:cut]) + gzip.compress(text[cut:]) if packed else text)
    rows = [
        ("chr1", 10, 20),
        ("chr1", 0, 1000),
        ("chrM", 59, 60),
        ("chr2", 100, 300),
        ("chr1", 15, 500),
        ("chr9", 1, 2),
    ]
    regions = pd.DataFrame(rows, columns=["chrom", "start", "end"])
    found = dict(read_sequences(path, regions))
    own = {"chr1": "1", "chr2": "chr2", "chrM": "MT"}
    assert found == {
        row: genome[own[chrom]][start:end].upper()
        for row, (chrom, start, end) in enumerate(rows)
        if chrom in own
    }
    assert "1 of 6 cCREs are left out: they are on chromosomes" in caplog.text


@pytest.mark.parametrize(
    ("regions", "text", "complaint"),
    [
        (
            [("chr1", 5, 30)],
            b">chr1\nACGTACGTAC\n",
            "chr1:5-30 reaches beyond the end of chr1.*10 bases.*another genome",
        ),
        ([("chr1", 50, 60)], b">chr1\nACGT\n>chr2\nAC\n", "beyond the end of chr1"),
        ([("chrX", 5, 6)], b">chr1\nACGT\n", "no chromosome of the links.*chrX against chr1"),
        ([("chr1", 0, 2)], b"chrom\tstart\n", "no FASTA"),
        ([("chr1", 0, 2)], b"", "no sequence"),
        ([("chr1", 0, 2)], gzip.compress(b">chr1\nACGT", mtime=0)[:-4], "cannot read"),
    ],
)
def test_what_is_not_the_genome_is_refused(regions, text, complaint, tmp_path):
    path = tmp_path / "g.fa"
    path.write_bytes(text)
    with pytest.raises(InputError, match=f"(?s){complaint}"):
        list(read_sequences(path, pd.DataFrame(regions, columns=["chrom", "start", "end"])))


# ---------------------------------------------------------------- motifs


def meme(motifs):
    text = "MEME version 4\n\nALPHABET= ACGT\n\n"
    for name, motif in motifs.items():
        text += f"MOTIF {name}\nletter-probability matrix: alength= 4 w= {motif.shape[1]} nsites= 20 E= 0\n"
        text += "".join(" ".join(f"{value:.6f}" for value in column) + "\n" for column in motif.T)
    return text


def certain(word, weight=0.97):
    motif = np.full((4, len(word)), (1 - weight) / 3)
    motif[["ACGT".index(letter) for letter in word], np.arange(len(word))] = weight
    return motif


def test_motifs_are_given_to_genes_by_any_of_their_names():
    genes = ["CTCF", "Gata1", "TAL1", "NKX2-5", "RARA", "TBXT"]
    names = [
        "MA0139.1 CTCF", "GATA1::TAL1", "CTCF_HUMAN.H11MO.0.A", "CTCF.H12CORE.0.P.B", "MA0503.1 Nkx2-5(var.2)",
        "M08094_2.00 (GATA1)_(Homo_sapiens)_(DBD_1.00)", "MA9 RARA::RXRA", "MA1 NOSUCH",
    ]  # fmt: skip
    found, unknown = factors_of(names, genes)
    assert found == dict(
        zip(
            names, [("CTCF",), ("Gata1", "TAL1"), ("CTCF",), ("CTCF",), ("NKX2-5",), ("Gata1",)], strict=False
        )
    )
    assert unknown == ["MA9 RARA::RXRA", "MA1 NOSUCH"]


def test_matches_are_those_of_both_strands_and_of_known_bases():
    word, other = "ACGTTGCACA", "GGGTCTCAAT"
    reverse = word[::-1].translate(str.maketrans("ACGT", "TGCA"))
    rest = "T" * 20
    held = [
        rest + word + rest,
        rest + reverse,
        rest + word[:4] + "N" + word[5:] + rest,
        rest,
        word[:9],
        word + other,
    ]
    found = find_motifs(
        {"one": certain(word), "two": certain(other), "long": certain(word * 6)},
        [(row, text.encode()) for row, text in enumerate(held)],
        len(held) + 1,
        1e-4,
    )
    assert list(zip(found.row, found.motif, strict=True)) == [(0, 0), (1, 0), (5, 0), (5, 1)]
    assert found.length.tolist() == [50, 30, 49, 20, 9, 20, 0]
    assert found.gc[5] == pytest.approx(sum(map((word + other).count, "GC")) / 20)
    assert np.isnan(found.gc[6])


def test_matches_do_not_depend_on_the_blocks(monkeypatch):
    rng = np.random.default_rng(2)
    motifs = {str(n): rng.dirichlet(np.full(4, 0.2), 8).T for n in range(3)}
    held = [(row, rng.choice(BASES, rng.integers(5, 300)).tobytes()) for row in range(40)]
    once = find_motifs(motifs, held, 40, 1e-3)
    assert len(once.row) > 20
    monkeypatch.setattr("cisformer.analysis.motifs.BLOCK_BASES", 500)
    for name, value in vars(find_motifs(motifs, held, 40, 1e-3)).items():
        np.testing.assert_array_equal(value, getattr(once, name))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no motif"),
        ("MEME version 4\n", "holds no motif"),
        ("MOTIF A\nletter-probability matrix: alength= 4\n0.1 0.2 0.3 0.4\n", "cannot read motifs"),
        (
            "MOTIF A\nletter-probability matrix: alength= 20 w= 1\n" + "0.05 " * 20 + "\n",
            "cannot read motifs",
        ),
    ],
)
def test_what_holds_no_motifs_is_refused(text, complaint, tmp_path):
    path = tmp_path / "m.meme"
    path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_motifs(path)
    with pytest.raises(InputError, match="cannot read motifs"):
        read_motifs(tmp_path / "missing.meme")


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "memelite", None)
    with pytest.raises(InputError, match=r"cisformer-links\[motifs\]"):
        read_motifs("any.meme")


# ---------------------------------------------------------------- activity


def test_activity_is_a_permutation_test_within_strata():
    rng = np.random.default_rng(3)
    stratum = np.sort(rng.integers(0, 4, 200))
    matches = sp.csr_matrix((rng.random((200, 2)) < 0.2).astype(np.float32))
    relative = rng.normal(size=(200, 1)) + stratum[:, None]
    found = measure_activity(matches, relative, stratum)
    dense, draws = matches.toarray(), []
    for _ in range(3000):
        order = np.concatenate([rng.permutation(np.flatnonzero(stratum == number)) for number in range(4)])
        draws.append(dense.T @ relative[order, 0])
    draws = np.array(draws)
    expected = (dense.T @ relative[:, 0] - draws.mean(axis=0)) / draws.std(axis=0)
    np.testing.assert_allclose(found.z[:, 0], expected, atol=0.1)


def test_p_values_of_random_motifs_are_uniform_though_gc_decides_where_they_are():
    rng = np.random.default_rng(4)
    gc, length, total = rng.normal(size=2000), rng.integers(200, 400, 2000), rng.lognormal(3, 1, 2000)
    chance = 1 / (1 + np.exp(2.5 - 1.0 * gc))
    matches = sp.csr_matrix((rng.random((2000, 300)) < chance[:, None]).astype(np.float32))
    n_open = rng.poisson(total[:, None] * np.exp(0.5 * gc[:, None] * np.array([1.0, -1.0, 0.0])))
    alike = (gc, length, n_open.sum(axis=1))
    like = measure_activity(matches, relative_accessibility(n_open, *alike), strata(*alike))
    assert stats.kstest(like.p_value.ravel(), "uniform").statistic < 0.08
    careless = measure_activity(matches, relative_accessibility(n_open), np.zeros(2000, int))
    assert np.median(careless.p_value[:, 0]) < 0.01


def test_the_share_of_working_sites_is_what_lies_beyond_the_like():
    rng = np.random.default_rng(5)
    relative = rng.normal(size=(20_000, 1))
    works = rng.random(20_000) < 0.1 * (np.exp(0.8 * np.maximum(relative[:, 0], 0)) - 1)
    match = works | (rng.random(20_000) < 0.1)
    found = measure_activity(
        sp.csr_matrix(match[:, None].astype(np.float32)), relative, np.zeros(20_000, int)
    )
    rows = np.flatnonzero(match & (relative[:, 0] > 1))
    site = found.site(rows, np.zeros(len(rows), int), 0)
    assert site.mean() == pytest.approx(works[rows].mean(), abs=0.12)
    assert (found.site(np.flatnonzero(relative[:, 0] < 0), 0, 0) == 0).all()


# ---------------------------------------------------------------- planted drivers

TYPES = ("a", "b", "c")
FACTORS = ("DRIVER", "IDLE", "SAMESITE")


def planted(folder, rng):
    """Links, a genome and motifs: DRIVER opens cCREs of type a, IDLE nothing, SAMESITE is expressed in b alone."""
    n, width = 1500, 300
    starts = np.arange(n) * 1000 + 500
    names = [*FACTORS, *(f"G{number}" for number in range(57))]
    by_type = rng.integers(0, 4, n)  # the type in which it is more open; 3: none
    driven = (by_type == 0) & (rng.random(n) < 0.4)
    sites = {"DRIVER": driven | (rng.random(n) < 0.03), "IDLE": rng.random(n) < 0.08}
    words = {"DRIVER": "ACGTTGCACAT", "IDLE": "GGATCTCAATC"}
    sequence = rng.choice(BASES, n * 1000)
    for name, chosen in sites.items():
        for row in np.flatnonzero(chosen):
            at = starts[row] + rng.integers(0, width - 11)
            sequence[at : at + 11] = np.frombuffer(words[name].encode(), np.uint8)
    text = sequence.tobytes()
    (folder / "genome.fa").write_bytes(wrapped(b"1", text[: n * 500].lower() + text[n * 500 :], 70))
    motifs = {"MA1 DRIVER": certain(words["DRIVER"]), "MA2 IDLE": certain(words["IDLE"])}
    motifs |= {"MA3 Samesite": certain(words["DRIVER"]), "MA4 MARTIAN": certain("ACACACACAC")}
    (folder / "motifs.meme").write_text(meme(motifs))
    expression = {"DRIVER": (1.5, -0.7, -0.8), "IDLE": (0, 0, 0), "SAMESITE": (-1.5, 1.5, 0)}
    parts = []
    for k, cell_type in enumerate(TYPES):
        gene = np.arange(n) // 25
        parts.append(
            pd.DataFrame(
                {
                    "gene_id": [f"ENSG{number:011d}" for number in gene], "gene_name": np.array(names)[gene],
                    "tss": gene * 25_000 + 10, "strand": "+",
                    "ccre": [f"chr1:{start}-{start + width}" for start in starts], "cell_type": cell_type,
                    "distance": starts - gene * 25_000, "score": 0.7,
                    "n_open": rng.poisson(np.where(by_type == k, 60, 15)),
                    "expression": [expression.get(names[number], (0, 0, 0))[k] for number in gene],
                }
            )
        )  # fmt: skip
    pd.concat(parts).to_csv(folder / "links.tsv", sep="\t", index=False)
    return driven


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drivers")
    driven = planted(folder, np.random.default_rng(6))
    return folder, driven


@pytest.fixture(scope="module")
def regulon(drivers):
    folder, _ = drivers
    return link_tfs(folder / "links.tsv", folder / "genome.fa", folder / "motifs.meme")


def test_the_planted_driver_is_found_in_its_type_and_no_other(regulon, drivers):
    _, driven = drivers
    activity = regulon.activity.set_index(["tf", "cell_type"])
    assert activity.loc[("DRIVER", "a"), "fdr"] < 1e-6
    assert activity.loc[("DRIVER", "a"), "activity"] > 5
    assert (activity.loc["IDLE", "fdr"] > 0.05).all()
    triplets = regulon.triplets
    best = triplets[triplets["score"] > 0.3]
    assert set(best["tf"]) == {"DRIVER"}
    assert set(best["cell_type"]) == {"a"}
    row = best["ccre"].str.extract(r":(\d+)-")[0].astype(int).to_numpy() // 1000
    assert driven[row].mean() > 0.8
    assert len(np.unique(row)) > 0.7 * driven.sum()
    shared = triplets[(triplets["tf"] == "SAMESITE") & (triplets["cell_type"] == "a")]
    assert shared.empty  # it has the motif, but is expressed elsewhere
    assert activity.loc[("SAMESITE", "a"), "agreement"] == 0
    assert (triplets["score"] <= triplets["link_score"]).all()


def test_networks_are_tables_that_others_read(regulon, drivers, tmp_path):
    folder = tmp_path / "out"
    names = {path.relative_to(folder).as_posix() for path in regulon.write(folder)}
    assert names == {
        "triplets.tsv.gz", "activity.tsv", "network.tsv", "networks/a.tsv", "networks/b.tsv", "networks/c.tsv",
        "base_grn.tsv.gz", "report.json",
    }  # fmt: skip
    network = pd.read_csv(folder / "networks" / "a.tsv", sep="\t")
    assert list(network.columns) == ["source", "target", "weight"]
    assert not network.duplicated(["source", "target"]).any()
    assert network["weight"].between(0, 1).all()
    grn = pd.read_csv(folder / "base_grn.tsv.gz", sep="\t")
    assert list(grn.columns) == ["peak_id", "gene_short_name", "DRIVER", "IDLE", "SAMESITE"]
    assert grn["peak_id"].str.fullmatch(r"chr1_\d+_\d+").all()
    assert set(np.unique(grn[list(FACTORS)])) == {0, 1}
    assert len(grn) == 1500
    assert json.loads((folder / "report.json").read_text())["motifs_without_gene"] == ["MA4 MARTIAN"]


def test_a_dimer_counts_for_both_of_its_genes_and_cell_types_for_their_best():
    triplets = pd.DataFrame(
        {
            "cell_type": ["x", "x", "y", "x"], "tf": ["A::B", "A::B", "A::B", "B"], "gene_name": ["G"] * 4,
            "score": [0.5, 0.5, 0.6, 0.2],
        }
    )  # fmt: skip
    network = network_of(triplets)
    assert network.to_dict("records") == [
        {"source": "A", "target": "G", "weight": pytest.approx(0.75)},
        {"source": "B", "target": "G", "weight": pytest.approx(0.75)},
    ]
    assert network_of(triplets.iloc[:0]).empty


def test_one_cell_type_will_do(drivers, tmp_path):
    folder, _ = drivers
    table = pd.read_csv(folder / "links.tsv", sep="\t")
    table[table["cell_type"] == "a"].drop(columns="expression").to_csv(
        tmp_path / "one.tsv", sep="\t", index=False
    )
    found = link_tfs(tmp_path / "one.tsv", folder / "genome.fa", folder / "motifs.meme")
    assert found.activity.set_index("tf").loc["DRIVER", "fdr"] < 1e-3


def test_the_command(drivers, tmp_path, command):
    folder, _ = drivers
    given = ["--fasta", folder / "genome.fa", "--motifs", folder / "motifs.meme", "-o", tmp_path / "out"]
    done = command("link_tfs", "-l", folder / "links.tsv", *given)
    assert done.returncode == 0, done.stderr
    assert "factors with most target genes: DRIVER" in done.stdout
    assert "1 of 4 motifs belong to no gene of the links" in done.stderr
    again = command("link_tfs", "-l", folder / "links.tsv", *given)
    assert again.returncode == 1
    assert "--force" in again.stderr


def test_links_genome_and_motifs_have_to_fit(drivers, tmp_path):
    folder, _ = drivers
    links, genome, motifs = folder / "links.tsv", folder / "genome.fa", folder / "motifs.meme"
    (tmp_path / "alien.meme").write_text(meme({"MA1 MARTIAN": certain("ACGTACGT")}))
    with pytest.raises(InputError, match=r"no motif of .* has the name of a gene"):
        link_tfs(links, genome, tmp_path / "alien.meme")
    with pytest.raises(InputError, match=r"no link of .* has a score of 0\.9"):
        link_tfs(links, genome, motifs, min_score=0.9)
    with pytest.raises(InputError, match="largest p-value is 2"):
        link_tfs(links, genome, motifs, max_p=2)
    table = pd.read_csv(links, sep="\t").drop(columns="n_open")
    table.to_csv(tmp_path / "bare.tsv", sep="\t", index=False)
    with pytest.raises(InputError, match="n_open"):
        link_tfs(tmp_path / "bare.tsv", genome, motifs)
