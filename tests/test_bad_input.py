"""Every row of the design's list of bad input, run as a user would: the real command, in a process of its own.

All commands of this file run once, two at a time; each test looks at one. What is refused says so in one line and a
hint, on stderr, without a traceback; and no file of the folder that they all work in may have changed afterwards.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from formats import damage

Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Refused:
    """A command that must not succeed, and what its message has to say.

    Parameters
    ----------
    command
        Arguments of `cisformer`.
    says
        Where, what was found, what was wanted: texts of the `error:` line, with … between them.
    hint
        The next step: a text of the `hint:` line.
    """

    command: str
    says: str
    hint: str


def preprocess(rna: str = "rna.h5ad", atac: str = "atac.h5ad", more: str = "--reference dataset") -> str:
    return f"data_preprocess -r {rna} -a {atac} -s out {more}"


LINK = "atac2rna_link -o out -m atac2rna"
REFUSED = {
    "missing file": Refused(
        preprocess("none.h5ad", more=""), "none.h5ad does not exist … wanted an .h5ad", "check the path"
    ),
    "truncated file": Refused(
        preprocess("cut.h5ad"), "cut.h5ad is cut short or damaged", "make the file again"
    ),
    "not an h5ad: text": Refused(
        preprocess("text.h5ad"), "text.h5ad is not an HDF5 file … wanted an .h5ad", "convert it"
    ),
    "not an h5ad: other HDF5": Refused(
        preprocess("other.h5ad"), "other.h5ad is HDF5, but not h5ad … it holds weights", "give an AnnData"
    ),
    "no shared barcode": Refused(
        preprocess(atac="renamed.h5ad"),
        "share no barcode … RNA has … ATAC has other0, other1, other2",
        "give two files of the same cells",
    ),
    "duplicated barcodes": Refused(
        preprocess("twice.h5ad"), "twice.h5ad has 1 barcodes more than once", "make them unique"
    ),
    "peaks that are no regions": Refused(
        preprocess(atac="peaks.h5ad"),
        "'peak_0' is not a region … wanted chrom:start-end",
        "chr1-181117-181803",
    ),
    "genes of another species": Refused(
        preprocess(more="--reference mouse"),
        "rna.h5ad: only … of 150 genes are in the mouse reference … they look like human",
        "use --reference human",
    ),
    "peaks of another genome": Refused(
        preprocess(atac="moved.h5ad", more=""),
        "moved.h5ad: only … of 900 peaks overlap a cCRE of the human reference … unlike hg38, hg19, mm39, mm10",
        "own features with --reference dataset",
    ),
    "log-normalised RNA": Refused(
        preprocess("log.h5ad"),
        "log.h5ad: no RNA counts; wanted whole numbers … found log-normalised values in X",
        "store the raw counts",
    ),
    "negative RNA": Refused(
        preprocess("negative.h5ad"), "negative.h5ad: … holds -1.0, negative", "give raw counts"
    ),
    "NaN in ATAC": Refused(
        preprocess(atac="nan.h5ad"), "nan.h5ad: X of cell … holds nan … wanted counts", "give raw counts"
    ),
    "no cell with both": Refused(
        preprocess("zeros.h5ad"), "no cell has both a gene and an open cCRE", "cisformer inspect"
    ),
    "unknown config key": Refused(
        "atac2rna_train -d data -n x -s out -c typo.yaml",
        "typo.yaml: unknown key 'training.batchsize'",
        "did you mean 'batch_size'",
    ),
    "wrong type in the config": Refused(
        "rna2atac_train -t data -v data -n x -s out -c wrong.yaml",
        "wrong.yaml: model.dim is 'wide'",
        "it should be",
    ),
    "dim that 7 does not divide": Refused(
        "rna2atac_train -t data -v data -n x -s out -c full.yaml",
        "full.yaml: model.dim is 64 … 7 digits",
        "such as 63",
    ),
    "config that is no YAML": Refused(
        preprocess(more="-c text.h5ad"), "text.h5ad", "compare it with a generated one"
    ),
    "checkpoint of the other direction": Refused(
        "rna2atac_predict -r rna.h5ad -m atac2rna -o out",
        "atac2rna predicts atac2rna, this command needs rna2atac",
        "another checkpoint",
    ),
    "checkpoint of another config": Refused(
        "rna2atac_predict -r rna.h5ad -m rna2atac -o out -c wide.yaml",
        "rna2atac has model.dim = 14, the config says 28",
        "leave the config out",
    ),
    "checkpoint of another reference": Refused(
        "atac2rna_predict -d other_reference/atac2rna_val -m atac2rna -o out",
        "made with reference 'dataset' (150 genes, 900 cCREs) … the data with 'dataset' (150 genes, 899 cCREs)",
        "same --reference",
    ),
    "no checkpoint": Refused(
        "rna2atac_predict -r rna.h5ad -m data -o out",
        "data is not a cisformer checkpoint … checkpoint.json",
        "give -m the folder",
    ),
    "damaged checkpoint": Refused(
        "rna2atac_predict -r rna.h5ad -m flipped_model -o out",
        "flipped_model/model.safetensors does not match its checksum",
        "copy the checkpoint again",
    ),
    "cell types with a header": Refused(
        f"{LINK} -d data/atac2rna_train -c header.tsv",
        "line 1 of header.tsv looks like a header: 'barcode', 'cell_type'",
        "remove it",
    ),
    "cell types of unknown barcodes": Refused(
        f"{LINK} -d data/atac2rna_train -c strangers.tsv",
        "none of the 2 barcodes in strangers.tsv is in the data … who1, who2 against",
        "barcodes.txt",
    ),
    "cell types in one column": Refused(
        f"{LINK} -d data/atac2rna_train -c one_column.tsv",
        "one_column.tsv has one column … wanted barcode and cell type",
        "by a tab",
    ),
    "shard with a flipped bit: training": Refused(
        "atac2rna_train -d flipped/atac2rna_train -n x -s out",
        "flipped/atac2rna_train/atac2rna_0.pt is damaged: its checksum differs",
        "restore the file",
    ),
    "shard with a flipped bit: prediction": Refused(
        "atac2rna_predict -d flipped/atac2rna_train -m atac2rna -o out",
        "atac2rna_0.pt is damaged: its checksum differs",
        "restore the file",
    ),
    "shard with a flipped bit: links": Refused(
        f"{LINK} -d flipped/atac2rna_train -c celltype_info.tsv",
        "atac2rna_0.pt is damaged: its checksum differs",
        "restore the file",
    ),
    "shard cut short": Refused(
        "atac2rna_train -d cut/atac2rna_train -n x -s out",
        "atac2rna_0.pt is damaged: it has … the manifest says",
        "restore the file",
    ),
    "shard that carries code": Refused(
        "atac2rna_predict -d code/atac2rna_train/atac2rna_0.pt -m atac2rna -o out",
        "atac2rna_0.pt is damaged, or holds more than tensors",
        "it may run code",
    ),
    "weights that carry code": Refused(
        "rna2atac_predict -r rna.h5ad -m code.bin -o out -c full63.yaml",
        "code.bin holds more than weights",
        "it may run code",
    ),
    "resuming what is no run": Refused(
        "atac2rna_train -d data -n x --resume data",
        "data is not the folder of a training run",
        "save/<date>_<name>",
    ),
    "inspecting a damaged data set": Refused(
        "inspect --verify flipped", "atac2rna_0.pt is damaged: its checksum differs", "restore the file"
    ),
    "inspecting a damaged checkpoint": Refused(
        "inspect --verify flipped_model",
        "model.safetensors is damaged: its checksum differs",
        "copy the folder again",
    ),
    "earlier data": Refused(
        "data_preprocess -r rna.h5ad -a atac.h5ad -s data --reference dataset",
        "data/rna2atac_train exists already",
        "--force",
    ),
    "earlier prediction": Refused(
        "rna2atac_predict -r rna.h5ad -m rna2atac -o results -n earlier",
        "results/earlier.h5ad exists already",
        "--force",
    ),
    "earlier links": Refused(
        "atac2rna_link -d data/atac2rna_train -c celltype_info.tsv -m atac2rna -o results",
        "results/cisformer_link exists already",
        "--force",
    ),
    "earlier report": Refused(
        "evaluate --data data -m rna2atac -o results", "results/report.html exists already", "--force"
    ),
    "earlier simulation": Refused("simulate -o . --n_cells 10", "rna.h5ad exists already", "--force"),
}

DEBUGGED = ("truncated file", "cell types with a header")
"""Run once more with `--debug`."""


@dataclass(frozen=True)
class Accepted:
    """A command that helps itself, and what it has to say about it, texts with … between them."""

    command: str
    says: str


ACCEPTED = {
    "peaks as chr1-100-200": Accepted(
        preprocess(atac="dashes.h5ad"), "peaks are named like 'chr … read as chrom:start-end"
    ),
    "peaks as chr1_100_200": Accepted(
        preprocess(atac="underscores.h5ad"), "peaks are named like 'chr … read as chrom:start-end"
    ),
    "barcodes that differ by a suffix": Accepted(
        preprocess(atac="suffixed.h5ad"), "written in two ways and were translated: … -7 is … 160 cells"
    ),
    "ATAC in counts": Accepted(
        preprocess(atac="counts.h5ad"), "counts.h5ad: peaks hold counts; any value above 0 is taken as open"
    ),
    "dense matrices": Accepted(preprocess("dense.h5ad"), "160 cells"),
    "cells without genes, and without partner": Accepted(
        preprocess("empty_cells.h5ad", "fewer.h5ad"),
        "warning: 2 of 150 cells have no gene or no cCRE of the reference and are left out … "
        "warning: 10 of 160 RNA cells have no partner … "
        "2 warnings in all:\n  - 10 of 160 RNA cells have no partner … are left out\n  - 2 of 150 cells",
    ),
    "a type that is absent": Accepted(
        f"{LINK} -d data/atac2rna_train -c absent.tsv",
        "warning: cell type 'ghost' has no cells in this data: no links are written for it",
    ),
}


@pytest.fixture(scope="module")
def workplace(
    tiny_files: Path, tiny_data: dict, tiny_checkpoints: dict, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with good input, bad input of every kind, and earlier results."""
    folder = tmp_path_factory.mktemp("bad input")  # with a space, as users have them
    for name in ("rna.h5ad", "atac.h5ad", "celltype_info.tsv"):
        shutil.copy(tiny_files / name, folder)
    for direction in tiny_data:
        shutil.copytree(tiny_data[direction], folder / "data", dirs_exist_ok=True)
        shutil.copytree(tiny_checkpoints[direction].folder, folder / direction)
    (folder / "results/cisformer_link").mkdir(parents=True)
    for name in ("earlier.h5ad", "cisformer_link/links.tsv.gz", "report.html", "report.json"):
        (folder / "results" / name).write_text("the work of a day")
    write_bad_matrices(folder)
    write_bad_texts(folder)
    write_damaged_folders(folder)
    return folder


def write_bad_matrices(folder: Path) -> None:
    rna, atac = (ad.read_h5ad(folder / f"{name}.h5ad") for name in ("rna", "atac"))
    shutil.copy(folder / "rna.h5ad", folder / "cut.h5ad")
    damage(folder / "cut.h5ad")
    with h5py.File(folder / "other.h5ad", "w") as file:
        file["weights"] = np.zeros(3)

    def write(name: str, adata: ad.AnnData, change: Callable[[ad.AnnData], object]) -> None:
        copy = adata.copy()
        change(copy)
        copy.write_h5ad(folder / f"{name}.h5ad")

    def with_value(value: float) -> Callable[[ad.AnnData], None]:
        def change(adata: ad.AnnData) -> None:
            adata.X = adata.X.astype(np.float32)
            adata.X.data[7] = value

        return change

    def rename(names: Callable[[ad.AnnData], object]) -> Callable[[ad.AnnData], None]:
        return lambda adata: setattr(adata, "obs_names", names(adata))

    def rename_peaks(names: Callable[[ad.AnnData], object]) -> Callable[[ad.AnnData], None]:
        def change(adata: ad.AnnData) -> None:
            adata.var = adata.var[[]]
            adata.var_names = names(adata)

        return change

    write("renamed", atac, rename(lambda a: [f"other{i}" for i in range(a.n_obs)]))
    write("suffixed", atac, rename(lambda a: [f"{name.split('-')[0]}-7" for name in a.obs_names]))
    write("twice", rna, rename(lambda a: [a.obs_names[1], *a.obs_names[1:]]))
    write("peaks", atac, rename_peaks(lambda a: [f"peak_{i}" for i in range(a.n_vars)]))
    write("moved", atac, rename_peaks(lambda a: [f"chrZ:{i}-{i + 1}" for i in range(0, 10 * a.n_vars, 10)]))
    write("dashes", atac, rename_peaks(lambda a: a.var_names.str.replace(":", "-")))
    write("underscores", atac, rename_peaks(lambda a: a.var_names.str.replace("[:-]", "_", regex=True)))
    write("log", rna, lambda a: setattr(a, "X", a.X.astype(np.float32).log1p()))
    write("negative", rna, with_value(-1))
    write("nan", atac, with_value(np.nan))
    write("zeros", rna, lambda a: setattr(a, "X", sp.csr_matrix(a.shape, dtype=np.float32)))
    write("counts", atac, with_value(3))
    write("dense", rna, lambda a: setattr(a, "X", a.X.toarray()))
    emptied = rna.copy()
    emptied.X = sp.csr_matrix(sp.diags([0.0, 0.0, *[1.0] * 158]) @ emptied.X)
    emptied.write_h5ad(folder / "empty_cells.h5ad")
    atac[rna.obs_names[:150]].copy().write_h5ad(folder / "fewer.h5ad")


def write_bad_texts(folder: Path) -> None:
    first = (folder / "celltype_info.tsv").read_text()
    texts = {
        "text.h5ad": "model: [",
        "typo.yaml": "training:\n  batchsize: 3\n",
        "wrong.yaml": "model:\n  dim: wide\n",
        "full.yaml": "model:\n  architecture: full\n  dim: 64\n",
        "full63.yaml": "model:\n  architecture: full\n  dim: 63\n",
        "wide.yaml": (folder / "rna2atac/config.yaml").read_text().replace("dim: 14", "dim: 28"),
        "header.tsv": "barcode\tcell_type\n" + first,
        "strangers.tsv": "who1\tT\nwho2\tB\n",
        "one_column.tsv": "cell1 T\n",
        "absent.tsv": first + "nobody\tghost\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)


class Code:
    """A pickle of this runs a command when it is loaded without care."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("code_ran"),)


def write_damaged_folders(folder: Path) -> None:
    for name in ("flipped", "cut", "code"):
        shutil.copytree(folder / "data/atac2rna_train", folder / name / "atac2rna_train")
    flip(folder / "flipped/atac2rna_train/atac2rna_0.pt", 1 / 3)
    damage(folder / "cut/atac2rna_train/atac2rna_0.pt")
    shutil.copytree(folder / "rna2atac", folder / "flipped_model")
    flip(folder / "flipped_model/model.safetensors", 2 / 3)
    shard = folder / "code/atac2rna_train/atac2rna_0.pt"
    size = shard.stat().st_size
    torch.save({"rna_indptr": Code()}, shard)
    shard.write_bytes(shard.read_bytes().ljust(size, b"\0"))
    with open(folder / "code/atac2rna_train/manifest.json", "r+") as file:
        text = file.read().replace(f'"bytes": {size}', f'"bytes": {shard.stat().st_size}')
        file.seek(0)
        file.write(text)
    torch.save({"weight": Code()}, folder / "code.bin")
    other_reference(folder)


def other_reference(folder: Path) -> None:
    """Preprocess the same cells with one peak fewer."""
    from cisformer.data.preprocess import preprocess as run

    atac = ad.read_h5ad(folder / "atac.h5ad")
    run(
        folder / "rna.h5ad",
        atac[:, 1:].copy(),
        folder / "other_reference",
        direction="atac2rna",
        reference="dataset",
    )


def flip(path: Path, where: float) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1
    path.write_bytes(content)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def before(workplace: Path) -> dict[str, bytes]:
    return snapshot(workplace)


@pytest.fixture(scope="module")
def outcomes(
    workplace: Path,
    before: dict[str, bytes],
    command: Callable[..., Done],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Done]:
    """Run all commands; each accepted one writes to a folder of its own."""
    outputs = tmp_path_factory.mktemp("outputs")
    jobs = {name: refused.command for name, refused in REFUSED.items()}
    jobs |= {f"{name}, --debug": f"--debug {REFUSED[name].command}" for name in DEBUGGED}
    for number, (name, accepted) in enumerate(ACCEPTED.items()):
        jobs[name] = accepted.command.replace(" out", f" {outputs / str(number)}")
    with ThreadPoolExecutor(2) as pool:
        done = dict(
            zip(jobs, pool.map(lambda job: command(*job.split(), cwd=workplace), jobs.values()), strict=True)
        )
    return done


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_and_a_hint(name: str, outcomes: dict[str, Done]):
    done, wanted = outcomes[name], REFUSED[name]
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    *_, error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("  hint: ")
    assert done.stderr.count("error: ") == 1
    assert [text for text in wanted.says.split(" … ") if text not in error] == []
    assert wanted.hint in hint


@pytest.mark.parametrize("name", DEBUGGED)
def test_debug_shows_the_traceback(name: str, outcomes: dict[str, Done]):
    done = outcomes[f"{name}, --debug"]
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert REFUSED[name].says.split(" … ")[0] in done.stderr


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_with_a_note(name: str, outcomes: dict[str, Done]):
    done = outcomes[name]
    assert done.returncode == 0, done.stderr
    assert [text for text in ACCEPTED[name].says.split(" … ") if text not in done.stderr] == []


def test_nothing_was_written_and_earlier_results_are_as_they_were(
    outcomes: dict[str, Done], workplace: Path, before: dict[str, bytes]
):
    after = snapshot(workplace)
    assert set(after) ^ set(before) == set()
    assert [name for name in after if after[name] != before[name]] == []


def test_no_code_ran(outcomes: dict[str, Done], workplace: Path):
    assert not list(workplace.rglob("code_ran"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        torch.load("code.bin", weights_only=False)  # so the file does carry code
        assert Path("code_ran").exists()
        Path("code_ran").unlink()
