"""The data commands as a user types them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import pytest
from formats import write_10x

from cisformer.data.store import CellStore
from cisformer.simulation import SimulatedCells

Command = Callable[..., subprocess.CompletedProcess[str]]


def preprocess_of(folder: Path, more: str = "") -> list[object]:
    """Return the command that preprocesses the cells in a folder."""
    return ["data_preprocess", "-r", folder / "rna.h5ad", "-a", folder / "atac.h5ad", *more.split()]


def test_preprocess_takes_every_flag_of_the_spec(command: Command, tiny_files: Path, tmp_path: Path):
    arguments = ["data_preprocess", "--rna", tiny_files / "rna.h5ad", "--atac", tiny_files / "atac.h5ad"]
    flags = "--cnt 1e10 --batch_size 4 --num_workers 2 --atac2rna --manually --shuffle --species dataset"
    done = command(*arguments, "--save_dir", tmp_path, *flags.split())
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'atac2rna_all'} (all: 160 cells)" in done.stdout
    assert CellStore.open(tmp_path / "atac2rna_all" / "atac2rna_0.pt").n_cells == 160
    again = command(*arguments, "-s", tmp_path, "--atac2rna", "--manually", "--reference", "dataset")
    assert again.returncode == 1
    assert again.stderr.startswith("error: ")
    assert "--force" in again.stderr


def test_the_split_does_not_depend_on_the_hash_seed(command: Command, tiny_files: Path, tmp_path: Path):
    for seed in ("1", "2"):
        asked = preprocess_of(tiny_files, "--reference dataset")
        done = command(*asked, "-s", tmp_path / seed, PYTHONHASHSEED=seed)
        assert done.returncode == 0, done.stderr
    for split in ("train", "val", "test"):
        name = f"rna2atac_{split}/rna2atac_0.pt"
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_working_folder_and_its_config_are_the_defaults(
    command: Command, tiny_files: Path, tmp_path: Path
):
    (tmp_path / "cisformer_config").mkdir()
    (tmp_path / "cisformer_config" / "rna2atac_config.yaml").write_text("datapreprocess:\n  multiple: 9\n")
    done = command(*preprocess_of(tiny_files, "--species dataset"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert CellStore.open(tmp_path / "rna2atac_train").manifest["datapreprocess"]["multiple"] == 9


def test_errors_are_one_line_and_a_hint(command: Command, tmp_path: Path):
    done = command(
        "data_preprocess", "-r", tmp_path / "none.h5ad", "-a", tmp_path / "none.h5ad", cwd=tmp_path
    )
    assert done.returncode == 1
    from cisformer.data.containers import WANTED

    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'none.h5ad'} does not exist; wanted {WANTED}",
        "  hint: check the path",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [2_000, 20_000])
def test_a_full_disk_leaves_the_old_data(limit: int, tiny_files: Path, tmp_path: Path):
    asked = preprocess_of(tiny_files, "--species dataset")
    run = [sys.executable, "-m", "cisformer", *map(str, asked), "-s", str(tmp_path)]
    subprocess.run(run, cwd=tiny_files, check=True, capture_output=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    full = subprocess.run(
        [*run, "--force", "--seed", "1"],
        cwd=tiny_files,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, limit)
        ),  # EFBIG, as ENOSPC would be
    )
    assert full.returncode == 1
    assert full.stderr.splitlines()[-2].startswith("error: ")
    assert "free disk space" in full.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_inspect_tells_what_files_are(command: Command, tiny_files: Path, tiny_data: dict[str, Path]):
    files = [tiny_files / "rna.h5ad", tiny_files / "atac.h5ad", tiny_data["rna2atac"] / "rna2atac_train"]
    done = command("inspect", "--json", "--verify", *files)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rna, atac, store = report["files"]
    assert (rna["modality"], rna["n_cells"], rna["n_features"], rna["values"]) == ("rna", 160, 150, "counts")
    assert (atac["modality"], atac["genome"], atac["values"]) == ("atac", "hg38", "binary")
    assert rna["share_found"] == atac["share_found"] == 1
    assert (store["kind"], store["split"], store["checksums"]) == ("preprocessed cells", "train", "agree")
    assert report["shared_barcodes"] == [{"rna": str(files[0]), "atac": str(files[1]), "n_shared": 160}]
    text = command("inspect", *files).stdout
    assert "160 barcodes shared by" in text
    assert store["fingerprint"] in text


def test_inspect_of_one_file_with_both_modalities(command: Command, tiny: SimulatedCells, tmp_path: Path):
    write_10x(tmp_path / "both.h5", tiny.rna, tiny.atac[tiny.rna.obs_names])
    report = json.loads(command("inspect", "--json", tmp_path / "both.h5").stdout)
    assert [(file["kind"], file["modality"]) for file in report["files"]] == [
        ("10x h5", "rna"),
        ("10x h5", "atac"),
    ]
    assert report["shared_barcodes"][0]["n_shared"] == 160


def test_inspect_shows_what_preprocess_would_refuse(command: Command, tiny: SimulatedCells, tmp_path: Path):
    normalised = tiny.rna.copy()
    normalised.X = normalised.X.log1p()
    normalised.write_h5ad(tmp_path / "rna.h5ad")
    (file,) = json.loads(command("inspect", "--json", tmp_path / "rna.h5ad").stdout)["files"]
    assert file["values"] == "log-normalised"


def test_inspect_of_a_folder_shows_the_data_sets_in_it(
    command: Command, tiny_data: dict[str, Path], tmp_path: Path
):
    report = json.loads(command("inspect", "--json", tiny_data["atac2rna"]).stdout)
    assert sorted(file["split"] for file in report["files"]) == ["test", "train", "val"]
    for missing, message in (
        (tmp_path, "is a folder without"),
        (tiny_data["atac2rna"] / "x", "does not exist"),
    ):
        done = command("inspect", missing)
        assert done.returncode == 1
        assert message in done.stderr


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_inspect_reads_our_own_h5ad_and_checkpoints(
    direction: str, command: Command, tiny_checkpoints: dict, tiny: SimulatedCells, tmp_path: Path
):
    from cisformer.data.h5ad import write_h5ad

    write_h5ad(tiny.rna.copy(), tmp_path / "ours.h5ad")
    checkpoint = tiny_checkpoints[direction]
    ours, model = json.loads(command("inspect", "--json", tmp_path / "ours.h5ad", checkpoint.folder).stdout)[
        "files"
    ]
    assert ours["written_by_cisformer"]["package"] == "cisformer"
    assert (model["kind"], model["direction"]) == ("checkpoint", direction)
    assert model["fingerprint"] == checkpoint.reference.fingerprint
    assert "dec_depth" in model["config"]


def test_a_reference_is_built_and_used(
    command: Command, tiny_files: Path, tiny_data: dict[str, Path], tmp_path: Path
):
    rna, atac = (ad.read_h5ad(tiny_files / f"{name}.h5ad", backed="r") for name in ("rna", "atac"))
    genes, peaks = rna.var, atac.var_names.str.extract(r"(.+):(\d+)-(\d+)")
    (tmp_path / "genes.gtf").write_text(
        "".join(
            f"{gene.chrom}\tx\tgene\t{gene.start + 1}\t{gene.end}\t.\t{gene.strand}\t.\t"
            f'gene_id "{gene.gene_id}"; gene_name "{name}";\n'
            for name, gene in genes.iterrows()
        )
    )
    peaks.to_csv(tmp_path / "peaks.bed", sep="\t", header=False, index=False)
    from_files = ["--gtf", tmp_path / "genes.gtf", "--peaks", tmp_path / "peaks.bed"]
    built = command("build_reference", *from_files, "-o", "own", cwd=tmp_path)
    assert "wrote own (own, hg38: 150 genes, 900 cCREs)" in built.stdout, built.stderr
    done = command(*preprocess_of(tiny_files, "-s out --reference own"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    store, same = (
        CellStore.open(base / "rna2atac_val") for base in (tmp_path / "out", tiny_data["rna2atac"])
    )
    assert store.reference.name == "own"
    assert store.barcodes.tolist() == same.barcodes.tolist()
    assert (store.rna([0, 1]) != same.rna([0, 1])).nnz == 0
    assert (store.atac([0, 1]) != same.atac([0, 1])).nnz == 0
