"""The folder of a training run: what stands in it, and how it is written and read again.

save/<date>_<name>/
    config.yaml           the resolved configuration
    metrics.jsonl         one line per epoch
    training.png          the losses drawn
    epoch0/ epoch1/ …     checkpoints
    best/                 the best of them
    training_state.pt     optimizer and scheduler after the last whole epoch, for --resume
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import zipfile
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cisformer.config import Config, Direction, dump_config
from cisformer.data.reference import Reference
from cisformer.errors import CheckpointError
from cisformer.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from cisformer.runtime.files import atomic_path, make_folder

if TYPE_CHECKING:
    from accelerate import Accelerator

BEST, STATE, METRICS, LOSS_PLOT = "best", "training_state.pt", "metrics.jsonl", "training.png"


def new_folder(accelerator: Accelerator, save: Path, name: str, config: Config) -> Path:
    """Make `<save>/<date>_<name>`, the same for all processes; characters that no file name takes become `_`."""
    from accelerate.utils import broadcast_object_list

    safe = re.sub(r"[^\w.+-]+", "_", name).strip("._")[:100] or "cisformer"
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    chosen = [save / f"{stamp}_{safe}"]
    if accelerator.is_main_process:
        make_folder(save)
        for attempt in itertools.count(2):  # making it is claiming it: no two runs write to one folder
            try:
                chosen[0].mkdir()
                break
            except FileExistsError:
                chosen = [save / f"{stamp}_{safe}_{attempt}"]
    broadcast_object_list(chosen)
    if accelerator.is_main_process:
        with atomic_path(chosen[0] / "config.yaml") as path:
            path.write_text(dump_config(config), encoding="utf-8")
    accelerator.wait_for_everyone()
    return chosen[0]


def last_epoch(folder: Path, direction: Direction, reference: Reference) -> Checkpoint | None:
    """Return the checkpoint that `training_state.pt` belongs to, epoch 0, or `None` where nothing was done yet."""
    epoch = read_state(folder / STATE)["epoch"] if (folder / STATE).is_file() else 0
    if not (folder / f"epoch{epoch}").is_dir():
        if epoch == 0:
            return None
        raise CheckpointError(f"{folder} holds no epoch{epoch} to resume from", hint="start a new run")
    return load_checkpoint(folder / f"epoch{epoch}", direction, reference=reference)


def read_state(path: Path) -> dict[str, Any]:
    """Read a `training_state.pt`; nothing in it is run, and its checksums (of the archive) are compared."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums of its archives
            if (part := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {part} differs")
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        if int(state["epoch"]) < 0 or not {"optimizer", "scheduler", "history"} <= state.keys():
            raise ValueError("it lacks a part")
        return state | {"history": json.loads(state["history"])}
    except Exception as error:  # damaged archives raise whatever torch, zipfile or pickle come upon
        raise CheckpointError(
            f"{path} is damaged, or holds more than a training state: {' '.join(str(error).split())[:200]}",
            hint="restore it, or continue from the best epoch in a new run: -m FOLDER",
        ) from error


def precision_of(folder: Path) -> str | None:
    """Return the precision of an interrupted run, if it has come to an epoch."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        precision: str | None = json.loads(lines[-1]).get("precision")
        return precision
    except (OSError, ValueError, IndexError):
        return None  # nothing was done yet; a damaged state is told where it is read


def write_epoch(
    folder: Path, checkpoint: Checkpoint, history: list[dict[str, Any]], state: dict[str, Any]
) -> None:
    """Write the newest epoch: its checkpoint, `best` if it is, the optimizer's state, and the metrics, in this order.

    Parameters
    ----------
    folder
        The run's.
    checkpoint
        What the epoch gave; the configuration says how many epochs are kept.
    history
        The records of all epochs, this one the last.
    state
        State dicts of optimizer, scheduler and scaler.
    """
    epoch = history[-1]["epoch"]
    save_checkpoint(checkpoint, folder / f"epoch{epoch}")
    if best_epoch(history) == epoch:
        save_checkpoint(checkpoint, folder / BEST)
    with atomic_path(folder / STATE) as path:
        torch.save({"epoch": epoch, **state, "history": json.dumps(history)}, path)
    with atomic_path(folder / METRICS) as path:
        path.write_text("".join(json.dumps(record) + "\n" for record in history), encoding="utf-8")
    keep = checkpoint.config.training.keep_epochs
    if keep and epoch > keep:  # the start is kept
        shutil.rmtree(folder / f"epoch{epoch - keep}", ignore_errors=True)


def best_epoch(history: list[dict[str, Any]]) -> int:
    """Return the epoch of lowest validation loss, the first of equals."""
    best: int = min(history, key=lambda record: record["val_loss"])["epoch"]
    return best
