"""Packed models: they predict as the folder does, show their card, and nothing bad gets out of a zip."""

import gzip
import hashlib
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch

from cisformer.data.inspect import as_text, inspect
from cisformer.data.store import find_split
from cisformer.errors import CheckpointError, InputError, OutputExistsError
from cisformer.model.checkpoint import load_checkpoint
from cisformer.model.pack import pack_model
from cisformer.prediction.predict import predict
from cisformer.runtime.archive import unpacked

DIRECTIONS = ["atac2rna", "rna2atac"]


@pytest.fixture(scope="module")
def packed(tiny_checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return {
        direction: pack_model(tiny_checkpoints[direction].folder.parent, folder / f"{direction}.zip",
                              license="MIT", data="simulated cells")
        for direction in DIRECTIONS
    }  # fmt: skip


def report_of(direction: str) -> dict:
    scores = {"model": {"log_loss": {"value": 0.5}}, "mean": {"log_loss": {"value": 0.7}}}
    return {
        "format": "cisformer-evaluation", "direction": direction, "scores": scores, "verdict": "Better.",
        "facts": {"test_cells": 32, "split": "test"},
    }  # fmt: skip


def rewritten(path, target, change):
    """Write a zip again with other entries: name → content, or (content, options of the entry)."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return target


def with_sums(entries):
    """Make the checksums agree again, as one who means harm would."""
    entries["SHA256SUMS"] = "".join(
        f"{hashlib.sha256(content).hexdigest()}  {name}\n"
        for name, content in entries.items()
        if name != "SHA256SUMS"
    ).encode()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_packed_model_elsewhere_predicts_bit_equal(
    direction, packed, tiny_checkpoints, tiny_data, tmp_path
):
    copy = shutil.copy(packed[direction], tmp_path / "other name.zip")
    cells = find_split(tiny_data[direction], "test")
    theirs, ours = predict(copy, cells), predict(tiny_checkpoints[direction], cells)
    assert np.array_equal(theirs.X.toarray(), ours.X.toarray())
    assert theirs.uns["cisformer"]["checkpoint"] == str(copy)
    assert load_checkpoint(copy).metrics == tiny_checkpoints[direction].metrics


def test_the_same_model_gives_the_same_bytes(packed, tiny_checkpoints, tmp_path):
    again = pack_model(
        tiny_checkpoints["rna2atac"].folder, tmp_path / "again.zip", license="MIT", data="simulated cells"
    )
    assert again.read_bytes() == packed["rna2atac"].read_bytes()
    repacked = pack_model(again, tmp_path / "repacked.zip", license="MIT", data="simulated cells")
    assert repacked.read_bytes() == again.read_bytes()


def test_half_stores_matrices_as_float16_and_loads_them_as_float32(tiny_checkpoints, tmp_path):
    checkpoint = tiny_checkpoints["rna2atac"]
    again = load_checkpoint(pack_model(checkpoint.folder, tmp_path / "half.zip", half=True))
    for (name, mine), other in zip(
        checkpoint.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        assert mine.dtype == other.dtype
        wanted = mine if mine.dim() < 2 else mine.half().float()
        assert torch.equal(wanted.nan_to_num(), other.nan_to_num()), name
    assert any(not torch.equal(a, b) for a, b in zip(
        checkpoint.model.parameters(), again.model.parameters(), strict=True))  # fmt: skip


def test_inspect_shows_the_card_with_the_scores_of_a_report(tiny_checkpoints, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report_of("rna2atac")))
    path = pack_model(tiny_checkpoints["rna2atac"].folder, tmp_path / "m.zip", report=tmp_path / "report.json",
                      license="MIT License\n\nPermission …", data="160 simulated cells")  # fmt: skip
    (record,) = inspect(path, verify=True)["files"]
    assert record["kind"] == "packed model"
    assert record["n_training_cells"] == 115
    assert record["scores"] == {"log_loss": 0.5}
    assert record["checksums"] == "agree"
    text = as_text({"files": [record], "shared_barcodes": []})
    assert "160 simulated cells" in text
    assert "MIT License" in text
    with unpacked(path) as folder:
        page = (folder / "README.md").read_text()
        assert "| log_loss | 0.5 | 0.7 |" in page
        assert "| Training cells | 115 |" in page
        assert (folder / "LICENSE").read_text() == "MIT License\n\nPermission …\n"


def test_a_report_of_another_direction_or_format_is_refused(tiny_checkpoints, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report_of("atac2rna")))
    (tmp_path / "other.json").write_text("[]")
    for name, message in (("report", "scores atac2rna"), ("other", "not a report"), ("none", "not a report")):
        with pytest.raises(InputError, match=message):
            pack_model(
                tiny_checkpoints["rna2atac"].folder, tmp_path / "m.zip", report=tmp_path / f"{name}.json"
            )
    assert not (tmp_path / "m.zip").exists()


def test_an_existing_zip_and_another_name_are_refused(packed, tiny_checkpoints, tmp_path):
    with pytest.raises(OutputExistsError):
        pack_model(tiny_checkpoints["rna2atac"].folder, packed["rna2atac"])
    with pytest.raises(InputError, match=r"not called \.zip"):
        pack_model(tiny_checkpoints["rna2atac"].folder, tmp_path / "model.tar")


def test_messages_name_the_zip(packed):
    with pytest.raises(CheckpointError, match=r"rna2atac\.zip predicts rna2atac"):
        load_checkpoint(packed["rna2atac"], "atac2rna")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint("nowhere.zip")


def test_a_built_in_reference_is_named_and_not_copied(tiny_checkpoints, tmp_path):
    folder = shutil.copytree(tiny_checkpoints["rna2atac"].folder, tmp_path / "copy")
    with unpacked(pack_model(folder, tmp_path / "own.zip")) as inside:
        assert (inside / "reference" / "genes.tsv.gz").is_file()
        assert json.loads((inside / "card.json").read_text())["reference"]["name"] == "dataset"


# ---------------------------------------------------------------- zips that mean harm


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/tmp/outside.txt", "reference/../../outside", "data.pkl", "C:\\outside"]
)
def test_names_that_no_packed_model_has_are_refused(name, packed, tmp_path):
    """Among them those that leave the folder, and pickles."""

    def change(entries):
        entries[name] = b"x"
        with_sums(entries)

    (tmp_path / "a").mkdir()
    path = rewritten(packed["rna2atac"], tmp_path / "a" / "bad.zip", change)
    with pytest.raises(CheckpointError, match="no packed model has"):
        load_checkpoint(path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["bad.zip"]


def test_a_changed_file_is_found_whatever_it_is(packed, tmp_path):
    for name in ("model.safetensors", "card.json", "config.yaml", "reference/ccres.bed.gz"):
        path = rewritten(
            packed["rna2atac"], tmp_path / "bad.zip", lambda entries, name=name: entries.update({name: b"{}"})
        )
        with pytest.raises(CheckpointError, match=f"{name} does not match its checksum"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        load_checkpoint(
            rewritten(
                packed["rna2atac"], tmp_path / "b.zip", lambda entries: entries.pop("model.safetensors")
            )
        )


def test_a_pickle_in_place_of_weights_is_refused(packed, tmp_path):
    def change(entries):
        entries["model.safetensors"] = b"\x80\x04cos\nsystem\n(S'touch /tmp/ran'\ntR."
        manifest = json.loads(entries["checkpoint.json"])
        manifest["sha256"] = hashlib.sha256(entries["model.safetensors"]).hexdigest()
        entries["checkpoint.json"] = json.dumps(manifest).encode()
        with_sums(entries)

    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(rewritten(packed["rna2atac"], tmp_path / "bad.zip", change))


def test_what_would_grow_is_refused(packed, tmp_path):
    """A compressed zip, a size that the zip does not hold, and a gzip that holds a million times its size."""
    deflated = tmp_path / "deflated.zip"
    with (
        zipfile.ZipFile(packed["rna2atac"]) as old,
        zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="stored as they are"):
        load_checkpoint(deflated)

    content = bytearray(packed["rna2atac"].read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = (0x7FFFFFFF).to_bytes(4, "little") * 2
    (tmp_path / "claims.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match="claims more bytes"):
        load_checkpoint(tmp_path / "claims.zip")

    def change(entries):
        entries["reference/ccres.bed.gz"] = gzip.compress(b"\0" * 50_000_000)
        with_sums(entries)

    with pytest.raises(CheckpointError, match="more than 100 times"):
        load_checkpoint(rewritten(packed["rna2atac"], tmp_path / "bomb.zip", change))


def test_any_damage_is_told_in_one_line(packed, tmp_path):
    whole = packed["rna2atac"].read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "bad.zip"
    for _ in range(60):
        content = bytearray(whole)
        for place in rng.integers(0, len(content), 3):
            content[place] ^= 1 << int(rng.integers(8))
        for place in len(content) - rng.integers(1, 1000, 3):  # among the entries at the end
            content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content[: int(rng.integers(1, len(content)))] if rng.random() < 0.3 else content)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


# ---------------------------------------------------------------- the command


def test_the_command_packs_and_the_zip_stands_for_the_folder(command, tiny_checkpoints, tiny_data, tmp_path):
    model = tiny_checkpoints["rna2atac"].folder
    (tmp_path / "terms.txt").write_text("Free to use.")
    done = command("pack_model", model, "-o", "m.zip", "--license", "terms.txt", "--half", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = command("inspect", "m.zip", cwd=tmp_path)
    assert "Free to use." in done.stdout
    assert "float16" in done.stdout
    (tmp_path / "bad.zip").write_bytes(b"PK")
    done = command("inspect", "bad.zip", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: bad.zip is not a packed model")
