"""Work shared by processes: the same results as from one, written once."""

import json
import os
import subprocess
import sys

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from cisformer.parallel.launch import cpu_arguments, n_usable_processes
from cisformer.parallel.processes import Processes


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 1, 5, 100])
def test_shares_follow_each_other_and_leave_nothing_out(n, size):
    items = list(range(n))
    shares = [Processes(rank, size).share(items) for rank in range(size)]
    assert [item for share in shares for item in share] == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_balance_gives_every_job_to_one_process_and_large_jobs_to_different_ones():
    work = {"a": 100, "b": 90, "c": 10, "d": 5, "e": 0}
    shares = [Processes(rank, 2).balance(work) for rank in range(2)]
    assert sorted(name for share in shares for name in share) == sorted(work)
    assert [sum(work[name] for name in share) for share in shares] == [105, 100] or [
        sum(work[name] for name in share) for share in shares
    ] == [100, 105]


def test_one_process_is_a_team_of_its_own(tmp_path):
    processes = Processes.current()
    assert (processes.rank, processes.size, processes.is_main) == (0, 1, True)
    with processes.scratch(tmp_path / "out.h5ad") as folder:
        (folder / "x").write_text("")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """An Accelerate config for two CPU processes."""
    path = tmp_path_factory.mktemp("accelerate") / "two.yaml"
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU",
        "num_machines": 1, "num_processes": 2, "use_cpu": True, "main_process_port": 29517,
        "main_training_function": "main",
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_two_processes_predict_what_one_predicts(
    direction, command, two_processes, tiny_checkpoints, tiny_files, tmp_path
):
    source = {"atac2rna": ["-d", tiny_files / "atac.h5ad"], "rna2atac": ["-r", tiny_files / "rna.h5ad"]}
    given = [f"{direction}_predict", *source[direction], "-m", tiny_checkpoints[direction].folder,
             "--batch_size", "7", "-o", tmp_path]  # fmt: skip
    for name, more in (("one", []), ("two", ["--accelerate_config", two_processes])):
        done = command(*given, "-n", name, *more, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote") == 1
        assert ("2 processes share the work" in done.stderr) == (name == "two")
    one, two = (ad.read_h5ad(tmp_path / f"{name}.h5ad") for name in ("one", "two"))
    assert one.obs.equals(two.obs)
    assert one.var.equals(two.var)
    assert type(one.X) is type(two.X)
    values = [x.toarray() if sp.issparse(x) else x for x in (one.X, two.X)]
    np.testing.assert_array_equal(*values)
    np.testing.assert_array_equal(one.obsm["X_cisformer"], two.obsm["X_cisformer"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5ad", "two.h5ad"]


def test_two_processes_link_what_one_links(
    command, two_processes, tiny_checkpoints, tiny_data, tiny_files, tmp_path
):
    given = ["atac2rna_link", "-d", tiny_data["atac2rna"] / "atac2rna_train", "-c", tiny_files / "celltype_info.tsv",
             "-m", tiny_checkpoints["atac2rna"].folder]  # fmt: skip
    for name, more in (("one", []), ("two", ["--accelerate_config", two_processes])):
        done = command(*given, "-o", tmp_path / name, *more, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("links.tsv.gz") == 1
        assert ("2 processes share the work" in done.stderr) == (name == "two")
        assert [path.name for path in (tmp_path / name).iterdir()] == ["cisformer_link"]
    one, two = (tmp_path / name / "cisformer_link" for name in ("one", "two"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    assert (one / "cell_num.json").read_bytes() == (two / "cell_num.json").read_bytes()
    assert (one / "links.tsv.gz").read_bytes() == (two / "links.tsv.gz").read_bytes()
    for matrix in (name for name in names if name.endswith(".h5ad")):
        with h5py.File(one / matrix) as left, h5py.File(two / matrix) as right:
            for layer in ("X", *(f"layers/{key}" for key in left["layers"])):
                np.testing.assert_array_equal(left[f"{layer}/data"], right[f"{layer}/data"])


def test_what_fails_in_two_processes_is_said_once(command, two_processes, tmp_path):
    done = command(
        "atac2rna_train", "-d", "nowhere", "-n", "x", "--accelerate_config", two_processes, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_several_machines_meet_at_the_first():
    config = {"num_machines": 2, "num_processes": 8, "machine_rank": 1, "main_process_ip": "10.0.0.7",
              "main_process_port": 29500, "use_cpu": True}  # fmt: skip
    assert cpu_arguments(config) == [
        "--nproc_per_node", "4", "--nnodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.7",
        "--master_port", "29500",
    ]  # fmt: skip


def test_processes_of_other_machines_need_no_gpu_here(caplog):
    config = {"num_machines": 2, "num_processes": 8, "gpu_ids": "all", "distributed_type": "MULTI_GPU"}
    assert n_usable_processes(config, n_gpus=4) == 4
    assert caplog.text == ""
    assert n_usable_processes(config, n_gpus=2) == 1
    assert "4 processes, this machine has 2 GPUs" in caplog.text


def test_a_process_that_is_killed_is_reported(two_processes, tmp_path):
    """SIGKILL, as of a machine without memory left, ends the second process; the command says so."""
    code = (
        "import os, signal, sys; from cisformer import cli, __main__\n"
        "import cisformer.parallel.launch as launch\n"
        "if os.environ.get('RANK') == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('RANK') == '0': import time; time.sleep(60)\n"
        "__main__.main()"
    )
    package = tmp_path / "cisformer_killed.py"
    package.write_text(code)
    config = json.loads(two_processes.read_text())
    run = (
        "import sys; from pathlib import Path; import cisformer.parallel.launch as launch\n"
        "from cisformer.errors import *\n"
        f"sys.argv = ['cisformer']; config = {config!r}\n"
        "launch.COMMAND = ['-m', 'cisformer_killed']\n"
        "try: launch._launch(Path('two.yaml'), config)\n"
        "except CisformerError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}, check=False,
    )  # fmt: skip
    assert "process 1 was killed by SIGKILL" in done.stdout, done.stderr
