"""Checkpoints: reloaded bit by bit, refused in one line where they do not fit."""

import dataclasses
import json
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from formats import damage
from safetensors.torch import load_file, save_file

from cisformer.config import default_config
from cisformer.data.batches import encode_input, read_modality
from cisformer.data.reference import load_reference
from cisformer.data.store import CellStore, find_split
from cisformer.errors import CheckpointError, ReferenceMismatchError
from cisformer.model.checkpoint import load_checkpoint, save_checkpoint
from cisformer.runtime.files import sha256_file


@pytest.mark.parametrize("direction", ["atac2rna", "rna2atac"])
def test_a_reloaded_checkpoint_is_bit_equal(direction, tiny_checkpoints, tiny_data, tmp_path):
    checkpoint = tiny_checkpoints[direction]
    again = load_checkpoint(save_checkpoint(checkpoint, tmp_path / "copy"))
    for (name, a), (other, b) in zip(
        checkpoint.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert name == other
        assert np.array_equal(a.numpy(), b.numpy(), equal_nan=True)  # unknown reliability is NaN
    store = CellStore.open(find_split(tiny_data[direction], "test"))
    layout = checkpoint.layout
    batch = encode_input(read_modality(store, np.arange(5), layout.input_modality), layout, None, None)
    assert torch.equal(checkpoint.model.predict(batch), again.model.predict(batch))
    assert again.config == checkpoint.config
    assert again.metrics == checkpoint.metrics


@pytest.mark.parametrize("name", ["", "model.safetensors", "config.yaml"])
def test_the_folder_or_a_file_in_it_will_do(name, tiny_checkpoints):
    checkpoint = tiny_checkpoints["rna2atac"]
    assert load_checkpoint(checkpoint.folder / name).direction == "rna2atac"


def test_a_runs_folder_means_its_best(tiny_checkpoints):
    checkpoint = tiny_checkpoints["rna2atac"]
    assert load_checkpoint(checkpoint.folder.parent).folder == checkpoint.folder


def test_another_direction_is_refused(tiny_checkpoints):
    with pytest.raises(CheckpointError, match="predicts rna2atac, this command needs atac2rna"):
        load_checkpoint(tiny_checkpoints["rna2atac"].folder, "atac2rna")


def test_another_config_is_refused_and_the_key_named(tiny_checkpoints):
    with pytest.raises(CheckpointError, match=r"model\.max_express|model\.dim"):
        load_checkpoint(tiny_checkpoints["rna2atac"].folder, config=default_config("rna2atac"))


def test_another_reference_is_refused(tiny_checkpoints):
    with pytest.raises(ReferenceMismatchError, match="genes"):
        load_checkpoint(tiny_checkpoints["rna2atac"].folder, reference=load_reference("mouse"))


@pytest.fixture
def copy(tiny_checkpoints, tmp_path):
    return shutil.copytree(tiny_checkpoints["rna2atac"].folder, tmp_path / "copy")


def test_a_flipped_bit_is_found(copy):
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load_checkpoint(copy)


def test_missing_and_damaged_files_are_named(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(copy)
    (copy / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(copy)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(copy / "nowhere")
    (copy / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="not a cisformer checkpoint"):
        load_checkpoint(copy)


def test_a_later_format_is_refused(copy):
    manifest = json.loads((copy / "checkpoint.json").read_text())
    (copy / "checkpoint.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="update cisformer"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("pace"), r"lacks \['pace'\]"),
        (lambda weights: weights.update(rhythm=torch.zeros(3)), r"holds \['rhythm'\]"),
    ],
)
def test_weights_of_another_version_are_to_be_trained_again(change, message, copy):
    """As models were before they had a pace, or will be: the file is whole, its checksum agrees."""
    weights = load_file(copy / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors")
    manifest = json.loads((copy / "checkpoint.json").read_text())
    manifest["sha256"] = sha256_file(copy / "model.safetensors")
    (copy / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"another version of cisformer, .* {message}") as caught:
        load_checkpoint(copy)
    assert "train the model again" in caught.value.hint


def test_a_link_function_of_a_later_version_is_not_read_as_todays(tiny_checkpoints, tmp_path):
    checkpoint = tiny_checkpoints["rna2atac"]
    later = dataclasses.replace(checkpoint, model=deepcopy(checkpoint.model))
    later.model.link_version += 1
    with pytest.raises(CheckpointError, match="has version 3 of the link function") as caught:
        load_checkpoint(save_checkpoint(later, tmp_path / "later"))
    assert caught.value.hint == "update cisformer"


def test_damaged_weights_are_to_be_copied_again(copy):
    """Whatever the manifest says of them."""
    damage(copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not match its checksum") as caught:
        load_checkpoint(copy)
    assert caught.value.hint == "copy the checkpoint again"
    manifest = json.loads((copy / "checkpoint.json").read_text())
    manifest["sha256"] = sha256_file(copy / "model.safetensors")
    (copy / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_checkpoint(copy)
    assert caught.value.hint == "copy the checkpoint again"


def test_a_checkpoint_prints_as_one_line(tiny_checkpoints):
    text = repr(tiny_checkpoints["rna2atac"])
    assert "\n" not in text
    assert len(text) < 300
    assert "rna2atac" in text


def test_a_reference_of_ones_own_may_be_called_human(tiny_checkpoints, tmp_path):
    """What decides is whether it is the built-in one, not what it is called."""
    given = tiny_checkpoints["rna2atac"]
    own = dataclasses.replace(given, reference=dataclasses.replace(given.reference, name="human"))
    loaded = load_checkpoint(save_checkpoint(own, tmp_path / "own"))
    assert loaded.reference.fingerprint == given.reference.fingerprint
