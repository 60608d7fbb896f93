"""What a step of training does to the weights, against AdamW written out, and what is drawn anew."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cisformer.config import parse_config
from cisformer.data.batches import TrainingBatches
from cisformer.data.store import CellStore, find_split
from cisformer.model.checkpoint import load_checkpoint
from cisformer.training.loop import Run, train

DIRECTIONS = ["atac2rna", "rna2atac"]
NO_DROPOUT = {"dec_emb_dropout": 0.0, "dec_ff_dropout": 0.0, "dec_attn_dropout": 0.0}
LR, DECAY, CLIP, BETAS, EPS = 0.01, 0.3, 1e-3, (0.9, 0.999), 1e-8


def configured(make, direction, model, **training):
    """Return a tiny configuration with other values in its model and training sections."""
    given = make(direction, **training).model_dump()
    given["model"] |= model
    return parse_config(given, direction)


def losses(best):
    return [
        json.loads(line) for line in (best.folder.parent / "metrics.jsonl").read_text().splitlines()
    ]  # fmt: skip


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_one_step_is_that_of_adamw_with_clipped_gradients_and_decay(
    direction, tiny_data, tiny_config, tmp_path
):
    """A whole epoch is one batch. Gradients are longer than the limit, so that clipping is seen."""
    config = configured(
        tiny_config,
        direction,
        NO_DROPOUT,
        epoch=1,
        batch_size=1000,
        lr=LR,
        weight_decay=DECAY,
        grad_clip=CLIP,
    )
    run = train(
        tiny_data[direction], "x", direction=direction, save=tmp_path, config=config, cpu=True
    ).folder.parent
    before, after = (load_checkpoint(run / f"epoch{epoch}") for epoch in (0, 1))
    store = CellStore.open(find_split(tiny_data[direction], "train"))
    batches = TrainingBatches(store, before.layout, config, np.arange(store.n_cells))
    half = torch.autocast("cpu", torch.bfloat16) if after.metrics["precision"] == "bf16" else nullcontext()
    model = before.model.train()
    with half:
        loss = model(batches.draw(1, 0)).float().mean()
    loss.backward()
    weights = {n: p for n, p in model.named_parameters() if p.grad is not None}
    length = torch.sqrt(sum(p.grad.double().square().sum() for p in weights.values()))
    assert length > 2 * CLIP
    found = dict(after.model.named_parameters())
    for name, weight in weights.items():
        gradient = weight.grad * (CLIP / (length + 1e-6)).float()
        decayed = weight.detach() * (1 - LR * DECAY)
        first = (1 - BETAS[0]) * gradient / (1 - BETAS[0])
        second = (1 - BETAS[1]) * gradient.square() / (1 - BETAS[1])
        expected = decayed - LR * first / (second.sqrt() + EPS)
        # Where a gradient is nearly nothing, its rounding decides the step.
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        torch.testing.assert_close(found[name].detach()[clear], expected[clear], rtol=1e-3, atol=2e-4)
        still = (gradient == 0) & (decayed.abs() > 0.1)
        torch.testing.assert_close(found[name].detach()[still], decayed[still])


def test_the_learning_rate_falls_every_gamma_step(tiny_data, tiny_config, tmp_path):
    config = tiny_config("rna2atac", epoch=5, lr=0.001, gamma_step=2, gamma=0.5, patience=9)
    best = train(tiny_data["rna2atac"], "x", direction="rna2atac", save=tmp_path, config=config)
    rates = [record["lr"] for record in losses(best)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])


@pytest.mark.parametrize("key", sorted(NO_DROPOUT))
def test_dropout_is_on_in_training(key, tiny_data, tiny_config, tmp_path):
    """From the same start, the second epoch's loss depends on how much is dropped."""
    found = []
    for share in (0.0, 0.9):
        config = configured(tiny_config, "rna2atac", NO_DROPOUT | {key: share}, epoch=2, lr=0.01)
        best = train(tiny_data["rna2atac"], f"{share}", direction="rna2atac", save=tmp_path, config=config)
        found.append(losses(best)[2]["train_loss"])
    assert found[0] != pytest.approx(found[1], rel=1e-6)


def test_tokens_are_drawn_anew_in_every_epoch(tiny_data, tiny_config, tiny_checkpoints):
    store = CellStore.open(find_split(tiny_data["rna2atac"], "train"))
    config = tiny_config("rna2atac", batch_size=1)
    limits = config.datapreprocess.model_copy(update={"enc_max_len": 5})
    config = config.model_copy(update={"datapreprocess": limits})
    rows = np.arange(1)
    batches = TrainingBatches(store, tiny_checkpoints["rna2atac"].layout, config, rows)
    seen = {tuple(batches.draw(epoch, 0).token.tolist()) for epoch in range(1, 7)}
    assert len(seen) == 6
    assert all(len(tokens) == 5 for tokens in seen)


@pytest.mark.parametrize("n_processes", [1, 4])
def test_gradients_are_sums_over_processes(n_processes, monkeypatch):
    """Accelerate averages gradients; of a share of the global mean each process has to give its multiple."""
    given = []
    accelerator = SimpleNamespace(
        num_processes=n_processes, autocast=nullcontext, reduce=lambda x, how: x, backward=given.append,
        clip_grad_norm_=lambda *of: None,
    )  # fmt: skip
    run = Run.__new__(Run)
    run.accelerator = accelerator
    run.settings = SimpleNamespace(grad_clip=1.0, lr=1.0)
    run.model = lambda batch: batch
    run.model.parameters = list
    run.optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda **how: None)
    per_cell = torch.arange(6.0)
    run._step(per_cell, 5, 20, "here")
    assert float(given[0]) == pytest.approx(float(per_cell[:5].sum()) / 20 * n_processes)
