"""`cisformer run`: the whole way, going on after a kill, what has changed, what is wrong."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import anndata as ad
import pandas as pd
import pytest
from formats import write_10x, write_h5mu

import cisformer
from cisformer.errors import CisformerError, InputError, OutputExistsError, StoreError
from cisformer.runtime.journal import FILE, Journal
from cisformer.workflow import ALL_CELLS, RunOptions

N_STEPS = 9
HEADINGS = ("What was found", "How good the models are", "Links", "Files", "Next")


@pytest.fixture(scope="module")
def arguments(tiny_files):
    return ["run", "-r", tiny_files / "rna.h5ad", "-a", tiny_files / "atac.h5ad", "--epochs", "1"]


@pytest.fixture(scope="module")
def whole(arguments, command, tmp_path_factory):
    """A finished run, and what it said."""
    folder = tmp_path_factory.mktemp("run") / "out"
    done = command(*arguments, "--groupby", "cell_type", "-o", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def again(whole, tmp_path):
    """A copy of the finished run, to change."""
    return shutil.copytree(whole[0], tmp_path / "again")


def steps(done):
    """Title → whether it was done already, as the log says."""
    found = re.findall(r"^step \d of 9, ([^:\n]+)(: done already)?$", done.stderr, re.M)
    return {title: bool(already) for title, already in found}


def redone(done):
    return [title for title, already in steps(done).items() if not already]


# ---------------------------------------------------------------- the whole way


def test_one_command_leads_from_two_files_to_links_and_says_what_came_out(whole):
    folder, done = whole
    assert len(redone(done)) == N_STEPS
    assert all(f"\n{heading}" in f"\n{done.stdout}" for heading in HEADINGS)
    assert "160 cells have both" in done.stdout
    assert "3 cell types, from column 'cell_type'" in done.stdout
    assert done.stdout.count("cannot be told apart") + done.stdout.count("does not beat") + done.stdout.count(
        "beats every"
    ) >= 2  # fmt: skip
    assert (folder / "summary.txt").read_text(encoding="utf-8").strip() == done.stdout.strip()


def test_every_file_that_the_summary_names_is_there_and_the_page_leads_to_it(whole):
    folder, done = whole
    listed = done.stdout.split("\nFiles, in ")[1].split("\n\n")[0].splitlines()[1:]
    assert len(listed) >= 8
    for line in listed:
        assert list(folder.glob(line.split()[0])), line
    links = re.findall(r'href="([^"]+)"', (folder / "index.html").read_text(encoding="utf-8"))
    assert len(links) >= 7
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_counts_of_links_are_those_of_the_table(whole):
    folder, done = whole
    table = pd.read_csv(folder / "cisformer_link" / "links.tsv.gz", sep="\t")
    assert f"{len(table):,} pairs" in done.stdout
    assert f"{(table.fdr <= 0.05).sum():,} of them" in done.stdout
    assert f"{(table.score >= 0.5).sum():,} have a score" in done.stdout
    assert f"-g {table.gene_name[table.score.idxmax()]} " in done.stdout
    assert "cells of all splits" in " ".join(steps(done))
    assert sum(json.loads((folder / "cisformer_link" / "cell_num.json").read_text()).values()) == 160
    assert set(table.cell_type) == set(json.loads((folder / "cisformer_link" / "cell_num.json").read_text()))


def test_the_commands_that_come_next_run(whole):
    _, done = whole
    commands = re.findall(r"^      cisformer (.+)$", done.stdout, re.M)
    assert [line.split()[0] for line in commands] == ["plot_links", "export_links", "rna2atac_predict"]
    for line in commands:
        words = [sys.executable, "-m", "cisformer", *shlex.split(line)]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


def test_a_second_run_does_nothing_and_says_the_same(whole, arguments, command):
    folder, first = whole
    said = {folder / "summary.txt", folder / "index.html"}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path not in said}
    done = command(*arguments, "--groupby", "cell_type", "-o", folder)
    assert done.stdout == first.stdout
    assert list(steps(done).values()) == [True] * N_STEPS
    assert before == {path: path.stat().st_mtime_ns for path in before}


# ---------------------------------------------------------------- going on


def test_a_killed_run_goes_on_where_it_was_and_ends_as_one_that_was_not_killed(
    whole, arguments, command, tmp_path
):
    """Killed while a model trains: what was done before is kept, and the training goes on after its last epoch."""
    folder = tmp_path / "out"
    words = [sys.executable, "-m", "cisformer", *arguments, "--groupby", "cell_type", "-o", folder]
    process = subprocess.Popen(list(map(str, words)), stderr=subprocess.DEVNULL, env=dict(os.environ))
    while not list(folder.glob("models/*_atac2rna/training_state.pt")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    done = command(*arguments, "--groupby", "cell_type", "-o", folder)
    assert done.returncode == 0, done.stderr
    assert redone(done)[0] == "train ATAC→RNA"
    assert len(redone(done)) == 6
    assert "resuming" in done.stderr
    assert len(list(folder.glob("models/*_atac2rna"))) == 1
    same = [(where / "cisformer_link" / "links.tsv.gz").read_bytes() for where in (folder, whole[0])]
    assert same[0] == same[1]


def test_a_step_whose_files_are_gone_is_done_again_and_no_other(again, arguments, command):
    shutil.rmtree(again / "cisformer_link")
    done = command(*arguments, "--groupby", "cell_type", "-o", again)
    assert done.returncode == 0
    assert redone(done) == ["link cCREs to genes"]
    assert (again / "cisformer_link" / "links.tsv.gz").is_file()


def test_a_damaged_training_begins_anew(again, arguments, command):
    """The journal says that training was begun; its state is damaged."""
    journal = json.loads((again / FILE).read_text())
    step = journal["steps"]["train_rna2atac"]
    step["done"] = False
    (again / FILE).write_text(json.dumps(journal))
    (run,) = again.glob("models/*_rna2atac")
    (run / "training_state.pt").write_bytes(b"nothing")
    done = command(*arguments, "--groupby", "cell_type", "-o", again)
    assert done.returncode == 0, done.stderr
    assert redone(done) == ["train RNA→ATAC"]
    assert "starts again from the beginning" in done.stderr


# ---------------------------------------------------------------- what has changed


def test_other_files_are_refused_and_nothing_is_changed(again, arguments, command, tiny_files, tmp_path):
    rna = ad.read_h5ad(tiny_files / "rna.h5ad")
    rna[5:].write_h5ad(tmp_path / "fewer.h5ad")
    arguments = [tmp_path / "fewer.h5ad" if word == tiny_files / "rna.h5ad" else word for word in arguments]
    before = {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}
    done = command(*arguments, "--groupby", "cell_type", "-o", again)
    assert done.returncode == 1
    assert "this has changed since: the RNA file" in done.stderr
    assert "--force" in done.stderr
    assert "Traceback" not in done.stderr
    assert before == {path: path.read_bytes() for path in again.rglob("*") if path.is_file()}


def test_other_cell_types_with_force_redo_what_depends_on_them_only(again, arguments, command, tiny_files):
    types = ("--celltype_info", tiny_files / "celltype_info.tsv")
    refused = command(*arguments, *types, "-o", again)
    assert refused.returncode == 1
    assert "--groupby" in refused.stderr  # the types are the same, the evaluation's column is not
    donors = command(*arguments, "--groupby", "donor", "-o", again, "--force")
    assert donors.returncode == 0, donors.stderr
    assert redone(donors) == ["evaluate ATAC→RNA", "evaluate RNA→ATAC", "link cCREs to genes"]
    assert set(json.loads((again / "cisformer_link" / "cell_num.json").read_text())) == {"donor_1", "donor_2"}


# ---------------------------------------------------------------- other input


def renamed(adata, names, **columns):
    return ad.AnnData(adata.X, obs=adata.obs[[]], var=pd.DataFrame(columns, index=names))


def test_without_types_and_coordinates_links_are_left_out_and_said(tiny, tmp_path):
    """In-process, since nothing here depends on the command line."""
    renamed(tiny.rna, [f"g{i}" for i in range(tiny.rna.n_vars)]).write_h5ad(tmp_path / "rna.h5ad")
    tiny.atac.write_h5ad(tmp_path / "atac.h5ad")
    summary = cisformer.run(tmp_path / "rna.h5ad", tmp_path / "atac.h5ad", tmp_path / "out", epochs=0)
    assert summary.links == ("none: no gene has coordinates, so no cCRE is near any",)
    assert any("no cell types were given" in line for line in summary.found)
    assert "--gtf" in summary.next_steps[0][1]
    assert not (tmp_path / "out" / "cisformer_link").exists()
    assert "plot_links" not in summary.text()


@pytest.mark.parametrize("write", [write_10x, write_h5mu], ids=["10x", "h5mu"])
def test_one_file_with_both_modalities_will_do(write, tiny, tmp_path):
    path = tmp_path / ("cells.h5" if write is write_10x else "cells.h5mu")
    columns = ["gene_id", "chrom", "start", "end", "strand"]
    rna = renamed(
        tiny.rna, tiny.rna.var_names, **{key: tiny.rna.var[key] for key in columns if key in tiny.rna.var}
    )
    write(path, rna, renamed(tiny.atac, tiny.atac.var_names))
    summary = cisformer.run(path, path, tmp_path / "out", epochs=0)
    assert summary.found[0].startswith("RNA: 160 cells × 150 genes")
    assert summary.found[1].startswith("ATAC: 160 cells × 900 peaks")
    table = pd.read_csv(tmp_path / "out" / "cisformer_link" / "links.tsv.gz", sep="\t")
    assert set(table.cell_type) == {ALL_CELLS}
    assert any("--groupby" in command for _, command in summary.next_steps)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (["--groupby", "celltype"], "obs has no column 'celltype'", "did you mean 'cell_type'?"),
        (["--groupby", "state_1"], "different values for 160 cells", "clusters"),
        (["--groupby", "cell_type", "-c", "types.tsv"], "given twice", "leave one of them out"),
        (["-c", "types.tsv"], "types.tsv", "tab-separated"),
        (["--epochs", "-1"], "training.epoch is -1", "greater than or equal to 0"),
        (["--seed", "-1"], "the seed is -1", "0 or more"),
        (["--genome", "hg99"], "genome 'hg99' is not built in", "--gtf"),
        (["--gtf", "genes.gtf"], "there is no file genes.gtf", "check the path"),
        (["-r", "nothing.h5ad"], "nothing.h5ad", "path"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_work(options, message, hint, arguments, command, tmp_path):
    done = command(*arguments, *options, "-o", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_types_of_other_cells_are_told_before_any_work(tiny_files, tmp_path):
    (tmp_path / "types.tsv").write_text("AAAA-1\tB\nCCCC-1\tT\n")
    with pytest.raises(InputError, match="none of the 2 barcodes"):
        cisformer.run(
            tiny_files / "rna.h5ad",
            tiny_files / "atac.h5ad",
            tmp_path / "out",
            celltype_info=tmp_path / "types.tsv",
        )
    assert not (tmp_path / "out").exists()


def test_an_empty_column_is_no_column_of_types(tiny, tmp_path):
    rna = tiny.rna.copy()
    rna.obs["empty"] = ""
    rna.write_h5ad(tmp_path / "rna.h5ad")
    tiny.atac.write_h5ad(tmp_path / "atac.h5ad")
    with pytest.raises(InputError, match="is empty"):
        cisformer.run(tmp_path / "rna.h5ad", tmp_path / "atac.h5ad", tmp_path / "out", groupby="empty")


def test_an_unknown_preset_is_refused():
    with pytest.raises(InputError, match="no preset 'large'"):
        RunOptions(preset="large")


def test_a_folder_of_something_else_is_left_alone(tiny_files, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="no earlier run has written it"):
        cisformer.run(tiny_files / "rna.h5ad", tiny_files / "atac.h5ad", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------- journal


def test_a_step_is_done_only_from_the_same_things_and_with_its_files(tmp_path):
    journal = Journal.open(tmp_path / "run", force=False)
    journal.begin("a", {"file": "1"})
    assert not journal.is_done("a", {"file": "1"})
    assert journal.changes("a", {"file": "2"}) == []  # nothing would be lost
    (tmp_path / "run" / "result").write_text("")
    journal.finish("a", {"files": ["result"]}, 1.0)
    journal = Journal.open(tmp_path / "run", force=False)
    assert journal.is_done("a", {"file": "1"})
    assert not journal.is_done("a", {"file": "2"})
    assert journal.changes("a", {"file": "2", "seed": "0"}) == ["file", "seed"]
    (tmp_path / "run" / "result").unlink()
    assert not journal.is_done("a", {"file": "1"})


def test_an_interrupted_step_keeps_the_time_it_was_begun_unless_it_is_another(tmp_path):
    journal = Journal.open(tmp_path, force=False)
    journal.begin("a", {"file": "1"})
    journal._steps["a"]["begun"] = "1999"
    journal.begin("a", {"file": "1"})
    assert journal.begun("a") == "1999"
    journal.begin("a", {"file": "2"})
    assert journal.begun("a") > "2000"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "cisformer-run", "format_version": 99, "steps": {}}',
             '{"format": "cisformer-run", "format_version": 1, "steps": {"a": {"done": true}}}',
             '{"format": "cisformer-run", "format_version": 1, "steps": []}'],
)  # fmt: skip
def test_a_damaged_journal_is_told(text, tmp_path):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(StoreError, match="does not say which steps are done") as told:
        Journal.open(tmp_path, force=True)
    assert isinstance(told.value, CisformerError)
    assert told.value.hint
