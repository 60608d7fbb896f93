"""Training: from a preprocessed data set to a folder of checkpoints, the best one among them.

Epoch 0 is the closed-form linear model. It is evaluated and saved like every other epoch, and `best` is the epoch of
lowest validation loss, so that a trained model is never worse than linear on the validation cells.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cisformer.config import Config, Direction, default_config, load_config
from cisformer.data.batches import Batch, TrainingBatches
from cisformer.errors import CheckpointError, TrainingError
from cisformer.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cisformer.model.cis import CisModel
from cisformer.model.closed_form import count_features
from cisformer.model.closed_form_atac import Penalty
from cisformer.model.documented_task import FullTask
from cisformer.parallel.processes import Processes
from cisformer.runtime.device import best_device, fastest_precision, keep_freed_memory
from cisformer.runtime.progress import progress
from cisformer.training.closed_form_start import fit_closed_form, fold_in, make_layout
from cisformer.training.follow import follow_training
from cisformer.training.loss_plot import draw_losses
from cisformer.training.reliability import validation_reliability
from cisformer.training.row_gradient import RowGradient
from cisformer.training.run_folder import (
    BEST,
    LOSS_PLOT,
    STATE,
    best_epoch,
    last_epoch,
    new_folder,
    precision_of,
    read_state,
    write_epoch,
)
from cisformer.training.split import CellSplit, validation_batches

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)
START_METRICS = (*(f"linear_{field.name}" for field in fields(Penalty)), "linear_val_loss", "mean_val_loss")
"""Facts about the closed-form start; part of every epoch's record."""


def train(
    data: str | Path,
    name: str = "cisformer",
    *,
    direction: Direction,
    val_data: str | Path | None = None,
    save: str | Path = "save",
    config: Config | str | Path | None = None,
    model_parameters: str | Path | None = None,
    resume: str | Path | None = None,
    cpu: bool = False,
) -> Checkpoint:
    """Train a model and return its best checkpoint.

    Parameters
    ----------
    data
        Folder that `preprocess` wrote: the one of all splits, or that of the training cells.
    name
        The run goes to `<save>/<date>_<name>`.
    direction
        "rna2atac" or "atac2rna": which modality is predicted from which.
    val_data
        Folder of the validation cells; by default the one next to the training cells, or else a tenth of these.
    save
        Folder for training runs.
    config
        A `Config`, a YAML file, or `None` for the defaults of the direction.
    model_parameters
        A checkpoint to start from, with a new optimizer; a given config must agree with it.
    resume
        The folder of an interrupted run to finish, with its own settings.
    cpu
        Use the CPU even if there is a GPU.

    Returns
    -------
    Checkpoint
        The epoch with the lowest validation loss, which is in `<save>/<date>_<name>/best`.

    Raises
    ------
    StoreError, CheckpointError, ReferenceMismatchError
        The data or the checkpoint cannot be used, or do not belong together.
    TrainingError
        Too few cells, or a loss that is not finite.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    settings = _settings(config, direction, resume)
    if settings.training.compile:
        _require_compiler(cpu=cpu)
    cells = CellSplit.open(data, val_data, direction, settings.training.SEED)
    for store in {cells.train.path: cells.train, cells.val.path: cells.val}.values():
        store.verify()
    first = None
    if resume is not None:
        first = last_epoch(Path(resume), direction, cells.train.reference)
    elif model_parameters is not None:
        given = None if config is None else settings
        first = load_checkpoint(model_parameters, direction, config=given, reference=cells.train.reference)
        settings = settings.model_copy(update={"model": first.config.model})
    Processes.current(cpu=cpu)
    tracker = None if settings.training.tracker == "none" else settings.training.tracker
    before = None if resume is None else precision_of(Path(resume))
    # Accelerate has one precision in a process: an earlier one stays.
    precision = None if AcceleratorState._shared_state else mixed_precision(cpu=cpu, before=before)
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, log_with=tracker, project_dir=str(save))
    logger.info("training on %s, precision %s", accelerator.device, accelerator.mixed_precision)
    settings = _with_total_gene(settings, cells.train.reference.n_genes)
    folder = Path(resume) if resume is not None else new_folder(accelerator, Path(save), name, settings)
    torch.manual_seed(settings.training.SEED)
    start = first or closed_form_checkpoint(accelerator, cells, settings, direction, folder)
    run = Run(accelerator, cells, settings, folder, start)
    if resume is not None:
        run.restore()
    run.fit()
    return load_checkpoint(folder / BEST, direction)


def _require_compiler(*, cpu: bool) -> None:
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if (cpu or best_device() == "cpu") and not shutil.which(os.environ.get("CXX", usual)):
        raise TrainingError(
            "the configuration says compile: true, but there is no C++ compiler on this machine",
            hint=f"install {usual}, or set training.compile to false",
        )


def mixed_precision(*, cpu: bool, before: str | None = None) -> str:
    """Return "bf16", "fp16" or "no".

    It is what Accelerate's environment variable or configuration asks for, else what an interrupted run had `before`,
    else what the device multiplies fastest.
    """
    device = "cpu" if cpu else best_device()
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", before)
    if asked in ("no", "bf16") or (asked == "fp16" and device == "cuda"):
        return str(asked)
    return fastest_precision(torch.device(device))


def _settings(config: Config | str | Path | None, direction: Direction, resume: str | Path | None) -> Config:
    if resume is not None:
        if not (Path(resume) / "config.yaml").is_file():
            raise CheckpointError(
                f"{resume} is not the folder of a training run: it has no config.yaml",
                hint="give --resume a folder under the save directory, such as save/<date>_<name>",
            )
        return load_config(Path(resume) / "config.yaml", direction)
    if isinstance(config, Config):
        return config
    return default_config(direction) if config is None else load_config(config, direction)


def _with_total_gene(config: Config, n_genes: int) -> Config:
    if config.model.total_gene == n_genes:
        return config
    logger.info("total_gene set to the reference's %d genes", n_genes)
    return config.model_copy(update={"model": config.model.model_copy(update={"total_gene": n_genes})})


def closed_form_checkpoint(
    accelerator: Accelerator, cells: CellSplit, config: Config, direction: Direction, folder: Path
) -> Checkpoint:
    """Fit the closed form in the main process and hand it to the others through the folder."""
    handed = folder / "linear"
    if accelerator.is_main_process:
        save_checkpoint(_fit(cells, config, direction), handed)
    accelerator.wait_for_everyone()
    checkpoint = load_checkpoint(handed, direction)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(handed)
    return checkpoint


def _fit(cells: CellSplit, config: Config, direction: Direction) -> Checkpoint:
    """Return what training starts from: the closed form; of architecture full the mean profile."""
    store, rows = cells.train, cells.train_rows
    counts = count_features(store, rows, direction)
    layout = make_layout(counts, direction, store)
    if config.model.architecture == "full":
        task = FullTask.from_start(config, layout, store, rows, counts)
        return Checkpoint(task, config, store.reference, {"linear_rank": 0, "linear_ridge": 0.0})
    network, start = fit_closed_form(config, cells, layout, counts)
    metrics = {"linear_rank": start.rank, "linear_ridge": start.ridge}
    metrics |= {} if start.penalty is None else start.penalty.to_metrics()
    return Checkpoint(network, config, store.reference, metrics)


class Run:
    """One training run: model, optimizer and batches, and the folder that its epochs go to.

    Parameters
    ----------
    accelerator
        Devices and processes.
    cells
        Training and validation cells.
    config
        All settings.
    folder
        Where the run is written.
    start
        What training starts from: the closed form, a given checkpoint, or the last epoch of an interrupted run.
    """

    def __init__(
        self, accelerator: Accelerator, cells: CellSplit, config: Config, folder: Path, start: Checkpoint
    ) -> None:
        self.accelerator, self.cells, self.config, self.folder = accelerator, cells, config, folder
        self.settings, self.start = config.training, start
        self.history: list[dict[str, Any]] = []
        self.start_metrics = {k: v for k, v in start.metrics.items() if k in START_METRICS}
        optimizer = torch.optim.AdamW(
            start.model.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.scheduler = torch.optim.lr_scheduler.StepLR(
            optimizer, self.settings.gamma_step, self.settings.gamma
        )
        if self.settings.compile:
            start.model.compile_blocks()
        on_cpu = accelerator.device.type == "cpu"
        if on_cpu:
            keep_freed_memory()
        self.row_gradient: RowGradient | None = None
        if on_cpu and accelerator.num_processes == 1 and isinstance(start.model, CisModel):
            self.row_gradient = RowGradient(start.model.sparse_gradients())
        self.model, self.optimizer = accelerator.prepare(start.model, optimizer)
        # Without Accelerate's cast around it: validation is in single precision.
        self.network = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # The documented architecture sees each cell `multiple` times an epoch, with new draws.
        repeats = config.datapreprocess.multiple if config.model.architecture == "full" else 1
        self.batches = TrainingBatches(
            cells.train, start.layout, config, np.repeat(cells.train_rows, repeats),
            accelerator.num_processes, accelerator.process_index,
        )  # fmt: skip
        if self.settings.tracker != "none":
            accelerator.init_trackers(folder.name)

    def restore(self) -> None:
        """Take optimizer, scheduler and history from the last whole epoch of an interrupted run."""
        path = self.folder / STATE
        if not path.is_file():
            return
        state = read_state(path)
        try:
            self.optimizer.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.accelerator.scaler and state.get("scaler"):
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} does not belong to the model of its epoch: {error}") from error
        self.history = state["history"]
        logger.info("resuming %s after epoch %d", self.folder, state["epoch"])

    def fit(self) -> None:
        """Train to the last epoch, or until patience runs out."""
        if not self.history:
            self._finish_epoch(0, train_loss=float("nan"), seconds=0.0)
        for epoch in range(len(self.history), self.settings.epoch + 1):
            if self._out_of_patience():
                logger.info("stopped: no better validation loss for %d epochs", self.settings.patience)
                break
            started = time.perf_counter()
            train_loss = self._train_epoch(epoch)
            self._finish_epoch(epoch, train_loss, time.perf_counter() - started)
        self.optimizer.optimizer.state.clear()  # saved with its epoch; what follows needs the memory
        if self.accelerator.is_main_process:
            self._finish_best()
            title = f"{self.folder.name}, {self.start.direction}"
            draw_losses(self.history, self.folder / LOSS_PLOT, title)
        self.accelerator.wait_for_everyone()

    # ---- epochs ----------------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> float:
        """Go over the training cells once; return the mean loss."""
        self.model.train()
        # Dropout is drawn afresh from the epoch, so that a resumed run repeats an uninterrupted one.
        torch.manual_seed(hash((self.settings.SEED, epoch, self.accelerator.process_index)) % 2**63)
        total, n_cells = 0.0, 0
        steps = self.batches.n_steps
        batches = self.batches.epoch(epoch, self.accelerator.device)
        for step, batch in enumerate(progress(batches, total=steps, desc=f"epoch {epoch}")):
            rows, together = self.batches.step_rows(epoch, step)
            loss = self._step(batch, len(rows), together, f"epoch {epoch}, batch {step}")
            total, n_cells = total + loss * together, n_cells + together
        self.scheduler.step()
        if self.row_gradient is not None:
            self.row_gradient.free()
        return total / max(n_cells, 1)

    def _step(self, batch: Batch, n_real: int, together: int, where: str) -> float:
        """Make one step; return the mean loss of the cells of all processes."""
        with self.accelerator.autocast():
            per_cell = self.model(batch).float()
        share = per_cell[:n_real].sum() / together if n_real else per_cell.sum() * 0
        mean = float(self.accelerator.reduce(share.detach(), "sum"))
        if not np.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at {where}; the weights are those from before this batch",
                hint=f"lower training.lr (now {self.settings.lr:g}), then start again, or continue with --resume",
            )
        # Accelerate averages gradients over processes; a share of the global mean has to be summed instead.
        self.accelerator.backward(share * self.accelerator.num_processes)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _finish_epoch(self, epoch: int, train_loss: float, seconds: float) -> None:
        """Validate, record and save an epoch."""
        losses = self._validate()
        if "linear_val_loss" not in self.start_metrics:
            self.start_metrics |= {
                "linear_val_loss": losses["val_loss"],
                "mean_val_loss": losses["mean_val_loss"],
            }
        rate = len(self.cells.train_rows) / seconds if seconds else None
        record = {
            "epoch": epoch,
            "train_loss": None if np.isnan(train_loss) else train_loss,
            "val_loss": losses["val_loss"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
            "cells_per_second": rate and round(rate, 1),
            "precision": self.accelerator.mixed_precision,
            "n_training_cells": len(self.cells.train_rows),
            "n_validation_cells": len(self.cells.val_rows),
            **self.start_metrics,
        }
        self.history.append(record)
        if self.settings.tracker != "none":
            self.accelerator.log({k: v for k, v in record.items() if isinstance(v, float)}, step=epoch)
        if self.accelerator.is_main_process:
            self._say(record)
            self._save(record)
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Return the validation loss of the model and of the mean profile, over all cells and targets."""
        self.network.eval()
        device = self.accelerator.device
        rows = self.cells.val_rows[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in validation_batches(self.cells.val, rows, self.start.layout, self.config, device):
            both = torch.stack([self.network(batch).float(), self.network.mean_loss(batch).float()])
            sums += both.cpu().double().sum(dim=1)  # Apple's GPUs have no float64
        total = self.accelerator.reduce(sums.float().to(device), "sum").cpu().double()
        total = sums if self.accelerator.num_processes == 1 else total
        return dict(
            zip(("val_loss", "mean_val_loss"), (total / len(self.cells.val_rows)).tolist(), strict=True)
        )

    def _out_of_patience(self) -> bool:
        losses = [record["val_loss"] for record in self.history]
        return len(losses) - 1 - int(np.argmin(losses)) >= self.settings.patience

    # ---- records ---------------------------------------------------------------------------------------------

    def _say(self, record: dict[str, Any]) -> None:
        if record["epoch"] == 0:
            logger.info(
                "epoch 0 (closed form): validation loss %.5f, mean profile %.5f",
                record["val_loss"], record["mean_val_loss"],
            )  # fmt: skip
            return
        best = best_epoch(self.history)
        logger.info(
            "epoch %d: training loss %.5f, validation loss %.5f%s, %.0f cells/s",
            record["epoch"], record["train_loss"], record["val_loss"],
            " (best)" if best == record["epoch"] else "", record["cells_per_second"],
        )  # fmt: skip

    def _save(self, record: dict[str, Any]) -> None:
        scaler = self.accelerator.scaler
        state = {
            "optimizer": self.optimizer.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
        }
        checkpoint = Checkpoint(self.network, self.config, self.start.reference, record)
        write_epoch(self.folder, checkpoint, self.history, state)

    def _finish_best(self) -> None:
        """Follow training as far as is sure, note what can be predicted, then learn from validation cells."""
        best = load_checkpoint(self.folder / BEST, self.start.direction)
        finished = {"training_share", "n_validation_cells_folded_in"} & best.metrics.keys()
        if finished or not isinstance(best.model, CisModel):
            return
        start = self.folder / "epoch0"
        if start.is_dir():  # a run begun by an earlier version may have deleted it
            best = follow_training(best, load_checkpoint(start, self.start.direction), self.cells)
        assert isinstance(best.model, CisModel)
        found = validation_reliability(best, self.cells)
        best.model.validation_r.copy_(torch.from_numpy(found.r))
        best.model.n_validation.fill_(found.n_cells)
        if best.direction == "atac2rna":
            best.model.interval_90.copy_(torch.from_numpy(found.interval))
        if self.settings.fold_in and "linear_rank" in best.metrics:
            best = fold_in(best, self.cells)
        save_checkpoint(best, self.folder / BEST)
