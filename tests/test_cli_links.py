"""Commands on links, as a user runs them."""

import json

import pandas as pd


def test_simulate_link_export_evaluate_plot(command, tiny_data, tiny_files, tiny_checkpoints, tmp_path):
    """The whole road of links through the command line."""
    shard = tiny_data["atac2rna"] / "atac2rna_train" / "atac2rna_0.pt"
    model = tiny_checkpoints["atac2rna"].folder
    types = tiny_files / "celltype_info.tsv"
    given = ["atac2rna_link", "-d", shard, "-c", types, "-m", model, "-o", tmp_path, "-n", "1e1"]
    done = command(*given, "--formats", "bedpe,interact", "--covariates", "donor")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "cisformer_link"
    assert max(json.loads((folder / "cell_num.json").read_text()).values()) == 10
    names = sorted(path.name for path in folder.iterdir())
    assert sum(name.endswith("_250kbp_correlation_matrix.h5ad") for name in names) == 3
    assert sum(name.endswith("_250kbp_links.interact") for name in names) == 3
    again = command(*given)
    assert again.returncode == 1
    assert "--force" in again.stderr

    done = command("export_links", "-l", folder, "-o", tmp_path / "top.longrange", "--top_per_gene", "1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "top.longrange").stat().st_size > 0

    table = folder / "links.tsv.gz"
    done = command(
        "evaluate_links", "-l", table, "-t", tiny_files / "true_links.tsv", "-o", tmp_path / "e.json"
    )
    assert done.returncode == 0, done.stderr
    assert "activity_contact" in done.stdout
    assert json.loads((tmp_path / "e.json").read_text())["coverage"]["links"] > 0

    gene = pd.read_csv(table, sep="\t", nrows=1)["gene_id"][0]
    done = command("plot_links", "-l", tmp_path, "-g", gene, "-o", tmp_path / "locus.pdf")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "locus.pdf").read_bytes().startswith(b"%PDF")


def test_simulate(command, tmp_path):
    sizes = ["--n_cells", "30", "--n_genes", "20", "--n_ccres", "100", "--n_types", "2", "--seed", "4"]
    done = command("simulate", "-o", tmp_path / "sim", *sizes)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "sim" / "celltype_info.tsv", sep="\t", header=None)) == 30
    assert command("simulate", "-o", tmp_path / "sim", *sizes).returncode == 1
    done = command("simulate", "-o", tmp_path / "sim", *sizes, "--depth", "0.5", "--force")
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "sim" / "celltype_info.tsv", sep="\t", header=None)) == 30


def test_unknown_names_are_refused(command, tmp_path):
    done = command("atac2rna_link", "-d", "x", "-c", "y", "-m", "z", "--formats", "hic")
    assert done.returncode == 2
    assert "'hic' is not one of bedpe, interact, longrange" in " ".join(done.stderr.replace("│", "").split())
    done = command("export_links", "-l", tmp_path, "-o", tmp_path / "a.bedpe")
    assert done.returncode == 1
    assert "cannot read a table" in done.stderr
