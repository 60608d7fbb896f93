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
from cisformer.model.documented_task import FullTask
from cisformer.parallel.processes import Processes
from cisformer.runtime.device import best_device, fastest_precision
from cisformer.runtime.progress import progress
from cisformer.training.closed_form_start import fit_closed_form, fold_in, make_layout
from cisformer.training.loss_plot import draw_losses
from cisformer.training.reliability import validation_correlations
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
        return total / max(n_cells, 1)

    def _step(self, batch: Batch, n_real: int, together: int, where: str) -> float:
        """Make one step; return the mean loss of the cells of all processes."""
        with self.accelerator.autocast():
            per_cell = self.model(batch).float()
        share = per_cell[:n_real].sum() / together if n_real else per_cell.sum() * 0
        mean = float(self.accelerator.reduce(share.detach(), "sum"))
        if not np.isfinite(mean):
            raise TrainingError(
                f"the loss is {mean} at {where}; weights are those of the batch before",
                hint=f"lower training.lr (now {self.settings.lr:g}), or go on with --resume after that",
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
        """Note how well validation cells are predicted, then let `best` learn from them."""
        best = load_checkpoint(self.folder / BEST, self.start.direction)
        if not isinstance(best.model, CisModel) or "n_validation_cells_folded_in" in best.metrics:
            return
        found, n_cells = validation_correlations(best, self.cells)
        best.model.validation_r.copy_(torch.from_numpy(found))
        best.model.n_validation.fill_(n_cells)
        if self.settings.fold_in and "linear_rank" in best.metrics:
            best = fold_in(best, self.cells)
        save_checkpoint(best, self.folder / BEST)
