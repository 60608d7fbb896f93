"""Share a model: one zip with weights, configuration, reference, checksums and a model card."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cisformer.data.reference import BUILT_IN
from cisformer.errors import InputError
from cisformer.model.checkpoint import CONFIG, REFERENCE, Checkpoint, load_checkpoint
from cisformer.model.checkpoint_manifest import MANIFEST, folder_of
from cisformer.model.weights import WEIGHTS
from cisformer.runtime.archive import CARD, LICENSE, README, is_archive, unpacked, write_archive
from cisformer.runtime.files import read_json, refuse_existing, sha256_file
from cisformer.runtime.provenance import provenance

FORMAT = "cisformer-card"
FORMAT_VERSION = 1
REPORT_FORMAT = "cisformer-evaluation"
READS = {"rna2atac": "gene expression", "atac2rna": "chromatin accessibility"}
GIVES = {
    "rna2atac": "the probability that each cCRE is open",
    "atac2rna": "the expression of each gene, log1p(counts per 10,000)",
}
LOSSES = {"val_loss": "this model", "linear_val_loss": "linear start", "mean_val_loss": "mean profile"}


@dataclass(frozen=True)
class PackOptions:
    """Description of a model by its user; see `pack_model`."""

    report: str | Path | None = None
    license: str = ""
    data: str = ""
    half: bool = False


def pack_model(
    model: str | Path,
    output: str | Path = "model.zip",
    *,
    report: str | Path | None = None,
    license: str = "",
    data: str = "",
    half: bool = False,
    force: bool = False,
) -> Path:
    """Put a model into one zip to share: weights, configuration, reference, model card and checksums.

    The zip can be used wherever a checkpoint is expected; its predictions are identical to the last bit. The same
    input gives the same bytes. Of a built-in reference only the name is stored.

    Parameters
    ----------
    model
        A checkpoint, or a training run's folder.
    output
        The zip to write.
    report
        `report.json` of `evaluate`, whose scores are written to the card.
    license
        Terms of use of the model: a name, or the whole text.
    data
        Description of the training data.
    half
        Store matrices as float16; they are loaded as float32. Vectors stay as they are.
    force
        Overwrite `output`.

    Returns
    -------
    Path
        The zip.

    Raises
    ------
    CheckpointError
        `model` is no checkpoint, or damaged.
    InputError
        The output is not called ``.zip``, or the report is of another direction.
    OutputExistsError
        `output` exists and `force` is not given.
    """
    if not is_archive(output):
        raise InputError(
            f"{output} is not called .zip", hint="end its name in .zip: -m recognises packed models by it"
        )
    refuse_existing(output, force=force)
    options = PackOptions(report, license, data, half)
    checkpoint = load_checkpoint(model)  # which checks it
    with _folder(Path(model)) as source, tempfile.TemporaryDirectory(prefix="cisformer-") as name:
        folder = Path(name)
        _copy(source, folder, half=half)
        card = model_card(checkpoint, options)
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8", newline="\n")
        (folder / README).write_text(card_text(card), encoding="utf-8", newline="\n")
        if license:
            (folder / LICENSE).write_text(license.rstrip() + "\n", encoding="utf-8", newline="\n")
        return write_archive(folder, output, force=force)


@contextlib.contextmanager
def _folder(model: Path) -> Iterator[Path]:
    if is_archive(model):
        with unpacked(model) as folder:
            yield folder
    else:
        yield folder_of(model)


def _copy(source: Path, target: Path, *, half: bool) -> None:
    """Copy the files of a checkpoint; with `half`, its matrices as float16."""
    shutil.copyfile(source / CONFIG, target / CONFIG)
    manifest = read_json(source / MANIFEST)
    if manifest["reference"]["name"] not in BUILT_IN:
        shutil.copytree(source / REFERENCE, target / REFERENCE)
    if half:
        _halve(source / WEIGHTS, target / WEIGHTS)
        manifest |= {"sha256": sha256_file(target / WEIGHTS), "matrices": "float16"}
    else:
        shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    (target / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8", newline="\n")


def _halve(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: _half(tensor) for name, tensor in load_file(source).items()}, target)


def _half(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix as float16, unless that would lose more than digits; anything else as it is."""
    if tensor.dim() < 2 or tensor.dtype != torch.float32:
        return tensor
    halved = tensor.half()
    return halved if torch.isfinite(halved).all() else tensor


# ---------------------------------------------------------------------------------------------------- the card


def model_card(checkpoint: Checkpoint, options: PackOptions) -> dict[str, Any]:
    """Return what a packed model says of itself, in types that JSON has; nothing of the moment."""
    reference, layout, metrics = checkpoint.reference, checkpoint.layout, checkpoint.metrics
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "direction": checkpoint.direction,
        "architecture": checkpoint.config.model.architecture,
        "license": options.license.strip(),
        "data": options.data,
        "n_training_cells": metrics.get("n_training_cells"),
        "n_validation_cells": metrics.get("n_validation_cells"),
        "reference": {
            "name": reference.name,
            "genome": reference.genome,
            "n_genes": reference.n_genes,
            "n_ccres": reference.n_ccres,
            "fingerprint": reference.fingerprint,
        },
        "n_inputs_seen": len(layout.input_index),
        "n_targets_seen": len(layout.target_index),
        "validation_loss": {name: metrics.get(key) for key, name in LOSSES.items()},
        "scores": _scores(options.report, checkpoint.direction),
        "matrices": "float16" if options.half else "float32",
        "provenance": provenance(seed=checkpoint.config.training.SEED),
    }


def _scores(report: str | Path | None, direction: str) -> dict[str, Any]:
    """Return scores, verdict and test cells of a report of `evaluate`; nothing without one."""
    if report is None:
        return {}
    try:
        found = read_json(report)
        scores, verdict, facts = found["scores"], found["verdict"], found["facts"]
        values = {
            metric: {method: scores[method][metric]["value"] for method in scores if metric in scores[method]}
            for metric in next(iter(scores.values()))
        }
        about = {key: facts.get(key) for key in ("test_cells", "split")}
        if found["format"] != REPORT_FORMAT:
            raise ValueError(f"it is of format {found['format']!r}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(
            f"{report} is not a report of evaluate: {error}", hint="give the report.json that evaluate wrote"
        ) from None
    if found["direction"] != direction:
        raise InputError(
            f"{report} scores {found['direction']}, the model predicts {direction}",
            hint="give the report of this model",
        )
    return {"verdict": verdict, **about, "values": values}


def card_text(card: dict[str, Any]) -> str:
    """Return a card as Markdown."""
    reference, direction = card["reference"], card["direction"]
    facts = {
        "Trained on": card["data"] or "not stated",
        "Training cells": _number(card["n_training_cells"]),
        "Validation cells": _number(card["n_validation_cells"]),
        "Reference": f"{reference['name']} {reference['genome']}".strip()
        + f", {reference['n_genes']:,} genes, {reference['n_ccres']:,} cCREs",
        "Features it reads": _number(card["n_inputs_seen"]),
        "Features it predicts": _number(card["n_targets_seen"]),
        "Architecture": card["architecture"],
        "Matrices stored as": card["matrices"],
        "Made with": f"cisformer {card['provenance']['version']}",
        "License": card["license"].splitlines()[0] if card["license"] else "not stated",
    }
    lines = [f"# A cisformer model, {direction}", ""]
    lines += [f"It reads {READS[direction]} of single cells and predicts {GIVES[direction]}.", ""]
    lines += _table(("", ""), facts.items())
    losses = [(name, _number(loss)) for name, loss in card["validation_loss"].items() if loss is not None]
    lines += ["## Validation loss", "", *_table(("", "loss"), losses)] if losses else []
    lines += _score_lines(card["scores"])
    return "\n".join([*lines, "## Use", "", f"    cisformer {direction}_predict -m model.zip --help", ""])


def _score_lines(scores: dict[str, Any]) -> list[str]:
    if not scores:
        return []
    methods = list(next(iter(scores["values"].values())))
    rows = [
        (metric, *(_number(values.get(method)) for method in methods))
        for metric, values in scores["values"].items()
    ]
    cells = f"On {_number(scores['test_cells'])} test cells. {scores['verdict']}"
    return ["## Scores", "", cells, "", *_table(("", *methods), rows)]


def _table(head: tuple[str, ...], rows: Any) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [*(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines), ""]


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
