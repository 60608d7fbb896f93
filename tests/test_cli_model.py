"""Configuration, training and prediction as a user runs them: real processes, files and exit codes."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import yaml

from cisformer.config import load_config

DIRECTIONS = ["atac2rna", "rna2atac"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tiny_data, tiny_files, tiny_config):
    """A folder with data and small configs, where both models have been trained by command."""
    from cisformer.config import dump_config

    folder = tmp_path_factory.mktemp("workplace")
    (folder / "cisformer_config").mkdir()
    for direction in DIRECTIONS:
        text = dump_config(tiny_config(direction, epoch=1))
        (folder / "cisformer_config" / f"{direction}_config.yaml").write_text(text)
        shutil.copytree(tiny_data[direction], folder / "data", dirs_exist_ok=True)
    for name in ("rna.h5ad", "atac.h5ad"):
        shutil.copy(tiny_files / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(workplace, command):
    given = {"atac2rna": ["-d", "data"], "rna2atac": ["-t", "data/rna2atac_train", "-v", "data/rna2atac_val"]}
    for direction in DIRECTIONS:
        done = command(f"{direction}_train", *given[direction], "-n", direction, "-s", "save", cwd=workplace)
        assert done.returncode == 0, done.stderr
        assert "best: epoch" in done.stdout
    return {d: next((workplace / "save").glob(f"*_{d}")) for d in DIRECTIONS}


def test_default_configs_are_written_with_names_and_values_of_the_documentation(command, tmp_path):
    done = command("generate_default_config", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "cisformer_config"
    assert sorted(p.name for p in folder.iterdir()) == [
        "accelerate_config.yaml", "atac2rna_config.yaml", "rna2atac_config.yaml"]  # fmt: skip
    accelerate = yaml.safe_load((folder / "accelerate_config.yaml").read_text())
    assert {"gpu_ids", "main_process_port", "mixed_precision", "num_processes", "use_cpu"} <= set(accelerate)
    assert load_config(folder / "atac2rna_config.yaml", "atac2rna").model.dim == 280
    again = command("generate_default_config", cwd=tmp_path)
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_the_written_accelerate_config_is_one_that_accelerate_reads(command, tmp_path):
    command("generate_default_config", cwd=tmp_path)
    code = (
        "from accelerate.commands.config.config_args import load_config_from_file;"
        "print(load_config_from_file('cisformer_config/accelerate_config.yaml').num_processes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 1


def test_training_writes_what_the_documentation_says(trained):
    for folder in trained.values():
        assert {"config.yaml", "metrics.jsonl", "training.png", "epoch0", "epoch1", "best", "training_state.pt"} <= {
            p.name for p in folder.iterdir()}  # fmt: skip


def test_prediction_of_rna_from_a_shard(trained, workplace, command):
    done = command(
        "atac2rna_predict", "-d", "data/atac2rna_test/atac2rna_0.pt", "-m", trained["atac2rna"], cwd=workplace
    )
    assert done.returncode == 0, done.stderr
    written = ad.read_h5ad(workplace / "output/cisformer_predicted_rna.h5ad")
    assert written.n_obs == 32
    assert any(name.endswith("_atac") for name in written.obs.columns)


def test_prediction_of_atac_from_an_h5ad(trained, workplace, command):
    best = trained["rna2atac"] / "best" / "model.safetensors"
    done = command(
        "rna2atac_predict", "-r", "rna.h5ad", "-m", best, "-n", "mine", "--rna_len", "100", cwd=workplace
    )
    assert done.returncode == 0, done.stderr
    written = ad.read_h5ad(workplace / "output/mine.h5ad")
    assert written.shape == (160, 900)
    values = sp.csr_matrix(written.X).data
    assert np.all((values > 0) & (values <= 1))


BAD = [
    (
        ["rna2atac_predict", "-r", "rna.h5ad", "-m", "{atac2rna}"],
        "predicts atac2rna, this command needs rna2atac",
    ),
    (["rna2atac_predict", "-r", "nowhere.h5ad", "-m", "{rna2atac}"], "nowhere.h5ad"),
    (["atac2rna_predict", "-d", "data/atac2rna_test", "-m", "nowhere"], "checkpoint nowhere does not exist"),
    (
        ["rna2atac_predict", "-r", "rna.h5ad", "-m", "{rna2atac}", "-c", "wide.yaml"],
        "model.dim = 14, the config says 28",
    ),
    (["atac2rna_train", "-d", "data", "-n", "x", "-c", "typo.yaml"], "did you mean 'batch_size'"),
    (["atac2rna_train", "-d", "nowhere", "-n", "x"], "nowhere"),
    (
        ["rna2atac_train", "-t", "data/rna2atac_train", "-v", "data/rna2atac_train", "-n", "x"],
        "training and the validation",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_input_gets_one_clear_line(arguments, message, trained, workplace, command):
    text = (workplace / "cisformer_config/rna2atac_config.yaml").read_text()
    (workplace / "wide.yaml").write_text(text.replace("dim: 14", "dim: 28"))
    (workplace / "typo.yaml").write_text("training:\n  batchsize: 3\n")
    before = sorted(workplace.rglob("*"))
    done = command(*(str(a).format(**trained) for a in arguments), cwd=workplace)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(workplace.rglob("*")) == before


def test_debug_shows_the_traceback(workplace, command):
    done = command("--debug", "atac2rna_predict", "-d", "data", "-m", "nowhere", cwd=workplace)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_an_option_that_does_not_exist_is_refused(command):
    done = command("atac2rna_train", "--dat", "x")
    assert done.returncode == 2


def test_devices_that_are_not_there_give_a_warning_and_the_cpu(workplace, command, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has the GPUs that the config names")
    config = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "gpu_ids": "1,2",
        "mixed_precision": "fp16", "num_machines": 1, "num_processes": 2, "use_cpu": False, "main_process_port": 29934,
    }  # fmt: skip
    path = tmp_path / "accelerate.yaml"
    path.write_text(json.dumps(config))
    done = command("rna2atac_train", "-t", "data/rna2atac_train", "-v", "data/rna2atac_val", "-n", "gpu",
                   "-s", tmp_path,
                   "--accelerate_config", path, cwd=workplace)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "asks for GPU 1, 2, this machine has no GPU: running on the CPU" in done.stderr


@pytest.mark.parametrize(("direction", "machines"), [("atac2rna", 1), ("rna2atac", 2)])
def test_two_processes_learn_what_one_learns(direction, machines, workplace, command, tmp_path):
    """The same global batch shared by two processes gives the same losses.

    They are of one launcher, or of two that meet at a port, as on two machines.
    """
    alone = (
        (workplace / f"cisformer_config/{direction}_config.yaml")
        .read_text()
        .replace("_dropout: 0.1", "_dropout: 0.0")
    )
    shared = alone.replace("batch_size: 16", "batch_size: 8")
    splits = ["-t", workplace / "data/rna2atac_train", "-v", workplace / "data/rna2atac_val"]
    given = {"atac2rna": ["-d", workplace / "data"], "rna2atac": splits}
    losses = []
    for name, text, processes in (("one", alone, 1), ("two", shared, 2)):
        (tmp_path / f"{name}.yaml").write_text(text)
        n_launchers = machines if processes > 1 else 1

        def train(rank, name=name, processes=processes, n_launchers=n_launchers):
            accelerate = {
                "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU" if processes > 1 else "NO",
                "mixed_precision": "no", "num_machines": n_launchers, "machine_rank": rank,
                "num_processes": processes, "use_cpu": True, "main_process_ip": "127.0.0.1",
                "main_process_port": 29511, "main_training_function": "main",
            }  # fmt: skip
            path = tmp_path / f"{name}_accelerate_{rank}.yaml"
            path.write_text(json.dumps(accelerate))
            return command(
                f"{direction}_train", "-n", name, *given[direction],
                "-s", tmp_path / "save", "-c", tmp_path / f"{name}.yaml",
                "--accelerate_config", path, cwd=tmp_path, OMP_NUM_THREADS="1",
            )  # fmt: skip

        with ThreadPoolExecutor(n_launchers) as pool:
            done = list(pool.map(train, range(n_launchers)))
        assert [each.returncode for each in done] == [0] * n_launchers, [each.stderr for each in done]
        assert sum(each.stdout.count("wrote") for each in done) == 1
        assert ("2 processes share the work" in done[0].stderr) == (processes == 2)
        run = next((tmp_path / "save").glob(f"*_{name}"))
        losses.append(
            [json.loads(line)["val_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        )
    # Adam divides by the size of a gradient: where that is rounding alone, the two differ a little.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_help_is_quick_to_load_and_names_every_command(command):
    from cisformer.cli import COMMANDS

    done = command("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", ["atac2rna_train", "rna2atac_train", "atac2rna_predict", "rna2atac_predict"])
def test_every_option_of_the_documentation_is_there(name, command, shared):
    """The usage block of the specification, option by option."""
    text = (Path(shared) / "spec" / "usage.md").read_text()
    usage = text.split(f"usage: cisformer {name} ")[1].split("```")[0]
    wanted = {w.strip("[],") for w in usage.split() if w.startswith(("-", "[-")) and len(w.strip("[],-")) > 0}
    options = command(name, "--help").stdout
    assert [o for o in sorted(wanted) if o not in options] == []
