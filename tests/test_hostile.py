"""Files from strangers: none runs code, leads out of its folder, or takes memory that it does not fill."""

from __future__ import annotations

import ast
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import cisformer
from cisformer.data.h5ad import read_rna
from cisformer.data.inspect import inspect
from cisformer.data.store import CellStore
from cisformer.errors import CheckpointError, CisformerError, InputError, StoreError
from cisformer.links.files import safe_name
from cisformer.links.formats import FORMATS, export_links
from cisformer.links.plot import plot_links
from cisformer.links.score import link
from cisformer.model.checkpoint import load_checkpoint
from cisformer.model.published import read_tensors
from cisformer.runtime.files import sha256_file
from cisformer.training.run_folder import new_folder, read_state

HUGE = 10**15
HOSTILE_TYPES = [
    "../x",
    "..",
    ".",
    "a/b",
    "a_b",
    "A_B",
    "/etc/passwd",
    "CON",
    "con",
    "nul.txt",
    "T" * 300,
    "\U0001f9ec",
    "é",
    "e\u0301",
    "-rf",
    "$(touch x)",
    "`touch x`",
    "; touch x",
    "a\\b",
    "C:\\x",
    "type|pipe",
    "<script>alert(1)</script>",
    "x\ty",
    "$\\frac{$",
    "a\nb",
    " lead",
    "trail. ",
    "%s{}",
]


# ---- no code -----------------------------------------------------------------------------------------------------


def test_the_source_loads_no_pickle_and_starts_no_shell():
    wrong = []
    for path in Path(cisformer.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, options = (
                ast.unparse(node.func),
                {option.arg: ast.unparse(option.value) for option in node.keywords},
            )
            if (
                name
                in (
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                    "os.system",
                    "os.popen",
                    "yaml.load",
                    "pd.read_pickle",
                    "joblib.load",
                )
                or name
                in ("pickle.load", "pickle.loads", "pickle.Unpickler", "pd.eval", "subprocess.getoutput")
                or (name == "torch.load" and options.get("weights_only") != "True")
                or (name == "np.load" and "allow_pickle" in options)
                or "shell" in options
            ):
                wrong.append(f"{path.name}:{node.lineno} {name}")
    assert wrong == []


class Code:
    """A pickle of this makes a file when it is loaded without care."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that only code in a pickle makes."""
    return tmp_path / "code_ran"


@pytest.fixture
def store_folder(tiny_data: dict, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data["atac2rna"] / "atac2rna_val", tmp_path / "atac2rna_val"))


@pytest.fixture
def model_folder(tiny_checkpoints: dict, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoints["atac2rna"].folder, tmp_path / "model"))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def put_shard(folder: Path, content: object) -> None:
    """Write a shard, and have the manifest agree with it."""
    shard = folder / "atac2rna_0.pt"
    torch.save(content, shard)
    about = {"bytes": shard.stat().st_size, "sha256": sha256_file(shard)}
    edit_json(folder / "manifest.json", lambda manifest: manifest["shards"][0].update(about))


def test_files_that_carry_code_are_refused(
    store_folder: Path, model_folder: Path, tmp_path: Path, marker: Path
):
    put_shard(store_folder, {"rna_indptr": Code(marker)})
    with pytest.raises(StoreError, match="may run code"):
        CellStore.open(store_folder)
    torch.save(
        {"epoch": 1, "optimizer": Code(marker), "scheduler": {}, "history": "[]"},
        tmp_path / "training_state.pt",
    )
    with pytest.raises(CheckpointError, match="more than a training state"):
        read_state(tmp_path / "training_state.pt")
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"weight": Code(marker)}, tmp_path / "pytorch_model.bin", **options)
        with pytest.raises(CheckpointError, match=r"may run code|cannot be read"):
            read_tensors(tmp_path / "pytorch_model.bin")
    torch.save({"weight": Code(marker)}, model_folder / "model.safetensors")
    edit_json(
        model_folder / "checkpoint.json",
        lambda m: m.update(sha256=sha256_file(model_folder / "model.safetensors")),
    )
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(model_folder)
    (tmp_path / "config.yaml").write_text(f"model: !!python/object/apply:pathlib.Path.touch [{marker}]")
    with pytest.raises(CisformerError, match="not a YAML file"):
        cisformer.train("data", config=tmp_path / "config.yaml", direction="atac2rna")
    assert not marker.exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert marker.exists(), "the files of this test carry code"


# ---- no way out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.pt", "/tmp/atac2rna_0.pt", "a/../../atac2rna_0.pt", "atac2rna_0.pt\n", "", 3, None]
)
def test_a_manifest_cannot_name_files_elsewhere(name: object, store_folder: Path):
    edit_json(store_folder / "manifest.json", lambda manifest: manifest["shards"][0].update(file=name))
    with pytest.raises(StoreError, match=r"manifest.json is damaged: shards.0.file"):
        CellStore.open(store_folder)


@pytest.mark.parametrize("name", ["../x", "/tmp", "mouse/../human"])
def test_a_manifest_cannot_name_a_reference_elsewhere(name: str, store_folder: Path):
    edit_json(store_folder / "manifest.json", lambda m: m["reference"].update(name=name, built_in=True))
    with pytest.raises(StoreError, match=r"manifest\.json is damaged: reference"):
        CellStore.open(store_folder)


def test_other_files_of_a_manifest_stay_in_the_folder(store_folder: Path):
    edit_json(store_folder / "manifest.json", lambda manifest: manifest["files"].update({"../../x": "0"}))
    with pytest.raises(StoreError, match=r"manifest\.json is damaged: files"):
        CellStore.open(store_folder)


def test_the_name_of_a_run_stays_under_save(tmp_path: Path):
    from accelerate import Accelerator

    from cisformer.config import default_config

    for name in ["../../out", "/etc/x", "a\0b", "T" * 400, "", "..", "\U0001f9ec"]:
        folder = new_folder(Accelerator(cpu=True), tmp_path / "save", name, default_config("atac2rna"))
        assert folder.parent == tmp_path / "save"
        assert (folder / "config.yaml").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


@pytest.mark.filterwarnings("ignore:Glyph")  # no font has them all
def test_cell_types_with_hostile_names_stay_in_the_folder(
    tiny_checkpoints: dict, tiny_data: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    store = CellStore.open(tiny_data["atac2rna"] / "atac2rna_train")
    names = np.resize(np.array(HOSTILE_TYPES, dtype=object), store.n_cells)
    types = pd.Series(names, index=store.barcodes)
    folder = link(
        tiny_checkpoints["atac2rna"],
        store,
        types,
        "out",
        max_cells=2,
        formats=["bedpe", "interact", "longrange"],
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["cisformer_link"]
    matrices = sorted(folder.glob("*_correlation_matrix.h5ad"))
    assert len(matrices) == len(HOSTILE_TYPES)
    found = {ad.read_h5ad(path, backed="r").uns["cisformer"]["cell_type"] for path in matrices}
    plain = {" ".join(name.split()) for name in HOSTILE_TYPES}  # blanks at the ends and line breaks go
    assert found == plain == set(json.loads((folder / "cell_num.json").read_text()))
    for suffix, n_columns in ((".bedpe", 12), (".interact", 18), (".longrange", 4)):
        for path in folder.glob(f"*{suffix}"):
            rows = [line for line in path.read_text().splitlines() if not line.startswith(("#", "track"))]
            assert {len(line.split("\t")) for line in rows} <= {n_columns}
    table = pd.read_csv(folder / "links.tsv.gz", sep="\t", keep_default_na=False)
    assert set(table["cell_type"]) <= plain
    for form, suffix in FORMATS.items():
        export_links(folder, tmp_path / f"export{suffix}", form=form)
    plot_links(folder, table["gene_name"].iloc[0], output=tmp_path / "locus.svg")
    assert not (tmp_path / "x").exists()


def test_genes_with_hostile_names(
    command: Callable[..., subprocess.CompletedProcess[str]],
    tiny_checkpoints: dict,
    tiny_data: dict,
    tmp_path: Path,
):
    store = CellStore.open(tiny_data["atac2rna"] / "atac2rna_train")
    folder = link(
        tiny_checkpoints["atac2rna"],
        store,
        pd.Series("$\\frac{$", index=store.barcodes),
        tmp_path / "out",
        max_cells=9,
    )
    (path,) = folder.glob("*.h5ad")
    gene = "../../$\\frac{<b>"
    matrix = ad.read_h5ad(path)
    matrix.obs["gene_name"] = matrix.obs["gene_name"].astype(object)
    matrix.obs.iloc[int(np.argmax(matrix.X.getnnz(axis=1))), matrix.obs.columns.get_loc("gene_name")] = gene
    matrix.write_h5ad(path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    done = command("plot_links", "-l", folder, "-g", gene, cwd=tmp_path / "a" / "b")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [f"{safe_name(gene)}_links.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_names_that_collide_after_cleaning_stay_apart():
    taken: list[str] = []
    crafted = [
        *HOSTILE_TYPES,
        *(safe_name(name) for name in HOSTILE_TYPES),
        *(safe_name(name, ["x"]) for name in HOSTILE_TYPES),
    ]
    for name in dict.fromkeys(crafted):
        taken.append(safe_name(name, taken))
    assert len({name.casefold() for name in taken}) == len(set(crafted))


# ---- no memory ---------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory():
    """Fail where a test took more than 300 MB: what a header claims must not be taken before it is checked."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 300_000


def shard_tensors(store_folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(store_folder / "atac2rna_0.pt", weights_only=True)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("name", ["rna_indptr", "rna_indices", "rna_values", "atac_indptr", "atac_indices"])
def test_a_shard_that_claims_more_than_it_holds(name: str, store_folder: Path):
    tensors = shard_tensors(store_folder)
    tensors[name] = torch.zeros(1, dtype=tensors[name].dtype).expand(HUGE)  # one number, said to be repeated
    put_shard(store_folder, tensors)
    with pytest.raises(StoreError, match=f"atac2rna_0.pt is damaged: {name} has shape"):
        CellStore.open(store_folder)

    def claim(manifest: dict[str, Any]) -> None:  # and a manifest that agrees
        manifest["n_cells"] = manifest["shards"][0]["n_cells"] = HUGE - 1
        manifest["shards"][0].update(rna_nnz=HUGE, atac_nnz=HUGE)

    edit_json(store_folder / "manifest.json", claim)
    with pytest.raises(StoreError, match="is damaged"):
        CellStore.open(store_folder)


@pytest.mark.usefixtures("little_memory")
def test_a_shard_whose_pointer_leads_astray(store_folder: Path):
    for change in (lambda p: p + 1, lambda p: p * 10**12, lambda p: p.flip(0), lambda p: p.clone().fill_(0)):
        tensors = shard_tensors(store_folder)
        tensors["rna_indptr"] = change(tensors["rna_indptr"])
        put_shard(store_folder, tensors)
        with pytest.raises(StoreError, match="rna_indptr does not lead"):
            CellStore.open(store_folder)


@pytest.mark.usefixtures("little_memory")
def test_weights_that_claim_more_than_they_hold(model_folder: Path, tmp_path: Path):
    header = json.dumps({"w": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}).encode()
    weights = model_folder / "model.safetensors"
    for content in (len(header).to_bytes(8, "little") + header, HUGE.to_bytes(8, "little") + header):
        weights.write_bytes(content)
        edit_json(
            model_folder / "checkpoint.json", lambda manifest: manifest.update(sha256=sha256_file(weights))
        )
        for read in (lambda: load_checkpoint(model_folder), lambda: read_tensors(weights)):
            with pytest.raises(CheckpointError, match="cannot be read"):
                read()
    torch.save({"w": torch.zeros(1).expand(HUGE)}, tmp_path / "pytorch_model.bin")
    assert read_tensors(tmp_path / "pytorch_model.bin")["w"].untyped_storage().nbytes() == 4


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    "key",
    [
        "dim",
        "emb_rank",
        "num_latents",
        "dec_depth",
        "dec_ff_mult",
        "dec_dim_head",
        "cis_window",
    ],
)
def test_a_checkpoint_whose_config_asks_for_more_than_its_weights(key: str, model_folder: Path):
    config = model_folder / "config.yaml"
    lines = [
        f"  {key}: {10**12}" if line.startswith(f"  {key}:") else line
        for line in config.read_text().splitlines()
    ]
    config.write_text("\n".join(lines))
    edit_json(
        model_folder / "checkpoint.json", lambda manifest: manifest.update(config_sha256=sha256_file(config))
    )
    with pytest.raises(CisformerError, match=f"does not fit its own config|model.{key} is"):
        load_checkpoint(model_folder)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    "place", ["obs/_index", "X/indptr", "X/data", "X/indices", "var/gene_id", "layers/counts", "X"]
)
def test_an_h5ad_that_claims_more_than_it_holds(place: str, tiny_files: Path, tmp_path: Path):
    path = tmp_path / "rna.h5ad"
    shutil.copy(tiny_files / "rna.h5ad", path)
    with h5py.File(path, "r+") as file:
        name = (
            place
            if place in file or place.startswith("layers")
            else f"{place.split('/')[0]}/{file['obs'].attrs['_index']}"
        )
        attributes = (
            dict(file[name].attrs)
            if name in file
            else {"encoding-type": "array", "encoding-version": "0.2.0"}
        )
        dtype = file[name].dtype if name in file and isinstance(file[name], h5py.Dataset) else np.float32
        if name in file:
            del file[name]
        shape = (160, HUGE) if place in ("layers/counts", "X") else (HUGE,)
        made = file.create_dataset(name, shape, dtype, chunks=(1, 1000)[-len(shape) :])
        made.attrs.update(
            {"encoding-type": "array", "encoding-version": "0.2.0"} if place == "X" else attributes
        )
    for read in (lambda: read_rna(path), lambda: inspect([path])):
        with pytest.raises(InputError, match="damaged"):
            read()


def test_an_accelerate_config_reaches_no_shell(tmp_path: Path):
    """What the config holds is handed on as one word of a list, whatever it is."""
    (tmp_path / "accelerate; touch x.yaml").write_text(
        "num_processes: 2\nuse_cpu: true\ndistributed_type: $(touch y)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "cisformer", "atac2rna_train", "-d", "$(touch z)", "-n", "x",
         "--accelerate_config", "accelerate; touch x.yaml"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["accelerate; touch x.yaml"]
