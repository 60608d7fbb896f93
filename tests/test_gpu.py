"""An NVIDIA GPU against the CPU, to the tolerance that docs/hardware.md states; skipped where there is none.

CISFORMER_TEST_DEVICE=cpu runs these tests without a GPU, the CPU against itself.
"""

import os

import numpy as np
import pytest
import torch

from cisformer.data.store import CellStore, find_split
from cisformer.links.score import score_links
from cisformer.model.checkpoint import load_checkpoint
from cisformer.prediction.predict import predict
from cisformer.training.loop import train
from cisformer.training.split import validation_batches

DEVICE = os.environ.get("CISFORMER_TEST_DEVICE", "cuda")
DIRECTIONS = ["atac2rna", "rna2atac"]
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no NVIDIA GPU"
)


def fresh(checkpoint):
    """Load a checkpoint once more, its weights moved so far that every path counts."""
    shaken = load_checkpoint(checkpoint.folder.parent / "epoch2")
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in shaken.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return shaken


def loss_and_gradients(checkpoint, store, device, dtype=None):
    model = fresh(checkpoint).model.to(device)
    batch = next(iter(validation_batches(store, np.arange(12), model.layout, checkpoint.config, device)))
    with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None):
        loss = model(batch).mean()
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_and_gradients_are_those_of_the_cpu(direction, tiny_checkpoints, tiny_data):
    store = CellStore.open(find_split(tiny_data[direction], "val"))
    expected, wanted = loss_and_gradients(tiny_checkpoints[direction], store, "cpu")
    loss, gradients = loss_and_gradients(tiny_checkpoints[direction], store, DEVICE)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-2, atol=1e-3 * float(gradient.abs().max())
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision_keeps_the_loss(direction, dtype, tiny_checkpoints, tiny_data):
    store = CellStore.open(find_split(tiny_data[direction], "val"))
    expected, _ = loss_and_gradients(tiny_checkpoints[direction], store, "cpu")
    assert loss_and_gradients(tiny_checkpoints[direction], store, DEVICE, dtype)[0] == pytest.approx(
        expected, rel=1e-2
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_predictions_are_those_of_the_cpu(direction, tiny_checkpoints, tiny_data):
    cells = find_split(tiny_data[direction], "test")
    ours, theirs = (
        predict(fresh(tiny_checkpoints[direction]), cells, device=device, min_prob=0)
        for device in (DEVICE, "cpu")
    )
    np.testing.assert_allclose(ours.X.toarray(), theirs.X.toarray(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_training_starts_from_the_same_loss_and_comes_as_far(
    direction, tiny_checkpoints, tiny_data, tiny_config, tmp_path
):
    best = train(
        tiny_data[direction],
        direction=direction,
        save=tmp_path,
        config=tiny_config(direction),
        cpu=DEVICE == "cpu",
    )
    expected = tiny_checkpoints[direction].metrics
    assert best.metrics["linear_val_loss"] == pytest.approx(expected["linear_val_loss"], rel=1e-4)
    gained = [record["linear_val_loss"] - record["val_loss"] for record in (best.metrics, expected)]
    assert gained[0] == pytest.approx(gained[1], rel=0.3)
    assert gained[1] > 0


def test_links_are_those_of_the_cpu(tiny_checkpoints, tiny_data):
    store = CellStore.open(find_split(tiny_data["atac2rna"], "train"))
    types = store.cell_info.filter(like="cell_type").iloc[:, 0]
    ours, theirs = (
        score_links(fresh(tiny_checkpoints["atac2rna"]), store, types, device=device)
        for device in (DEVICE, "cpu")
    )
    for left, right in zip(ours.types, theirs.types, strict=True):
        for name, values in left.evidence.items():
            np.testing.assert_allclose(values, right.evidence[name], rtol=1e-2, atol=1e-4, err_msg=name)
