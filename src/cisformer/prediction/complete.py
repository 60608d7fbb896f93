"""Complete a mosaic in one call: learn from the cells with both modalities, predict what the others lack.

In the output folder:

    completed.h5mu                            all cells, measured and predicted apart; see `mosaic`
    predicted_rna.h5ad, predicted_atac.h5ad   the predictions alone
    data/, models/                            what the models were trained on, and the models
    run.json                                  which steps are done: a second call does only the steps that are missing
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from cisformer.config import Direction, Modality, Preset, TrainingChoice
from cisformer.data.preprocess import preprocess
from cisformer.model.checkpoint import load_checkpoint
from cisformer.prediction.mosaic import (
    MODALITIES,
    Mosaic,
    complete_side,
    join_sides,
    read_mosaic,
    write_mosaic,
)
from cisformer.prediction.predict import predict
from cisformer.runtime.journal import Facts, Journal, Step, do_steps, fingerprint
from cisformer.training.loop import train

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)
COMPLETED, DATA, MODELS = "completed.h5mu", "data", "models"
DIRECTION: dict[Modality, Direction] = {"rna": "atac2rna", "atac": "rna2atac"}
"""Predicted modality → direction."""


@dataclass(frozen=True)
class CompletionOptions(TrainingChoice):
    """Options of `complete`; see there."""

    groupby: str | None = None
    gtf: str | Path | None = None


def complete(
    data: str | Path,
    output_dir: str | Path = "cisformer_completed",
    *,
    groupby: str | None = None,
    gtf: str | Path | None = None,
    preset: Preset = "small",
    epochs: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Predict what is missing in a mosaic: a data set in which some cells lack RNA or ATAC.

    Cells are paired by barcode; a modality with no counts in a cell is taken as missing. Models of the directions
    that are needed are trained on the cells that have both modalities, with the data's own genes and peaks, and
    predict what the other cells lack. Measured and predicted values are never in the same matrix.

    Parameters
    ----------
    data
        An `.h5mu` with the modalities ``rna`` (counts) and ``atac`` (peaks).
    output_dir
        Where everything goes.
    groupby
        Column of `obs`, such as cell types: warn of groups that lack a modality and have no paired cell.
    gtf
        Gene annotation, if the file lacks gene coordinates.
    preset
        Size of the models; see `default_config`.
    epochs
        Maximum number of epochs; by default the preset's.
    seed
        Random seed of the split and of training.
    force
        Repeat everything if the file or the options have changed; write into a folder that holds something else.

    Returns
    -------
    Path
        ``completed.h5mu``. Both modalities have all cells [n_cells, n_features of the input] and no `X`:
        ``layers["measured"]`` is X of the input, in its unit; ``layers["predicted"]`` holds
        log1p(counts per 10,000) or probabilities of being open, in compact form where it would be large;
        ``obs["measured"]`` says which of them a cell has, ``var["seen_in_training"]`` what could be predicted.

    Raises
    ------
    InputError
        The file is not such a mosaic; fewer than 50 cells have both modalities, all have, or some have neither.
    OutputExistsError
        `output_dir` holds results of another file or other options, and `force` is not given.
    """
    options = CompletionOptions(preset, epochs, seed, groupby, gtf)
    made_from = {
        "the file": fingerprint(Path(data)),
        "--gtf": "None" if gtf is None else fingerprint(Path(gtf)),
        "--preset": preset,
        "--epochs": str(epochs),
        "--seed": str(seed),
    }
    completion = _Completion(read_mosaic(data), Path(output_dir), options)
    completion.journal = Journal.open(Path(output_dir), force=force)
    do_steps(list(completion.steps(made_from)), completion.journal, force=force)
    return Path(output_dir) / COMPLETED


class _Completion:
    """The steps, and what they share: the mosaic, the folder and the options."""

    journal: Journal

    def __init__(self, mosaic: Mosaic, folder: Path, options: CompletionOptions) -> None:
        self.mosaic, self.folder, self.options = mosaic, folder, options
        self.lacked = [modality for modality in MODALITIES if len(mosaic.lacking(modality))]
        self.groups = {} if options.groupby is None else {options.groupby: mosaic.column(options.groupby)}
        _warn_of_unpaired_groups(mosaic, self.groups)

    def steps(self, made_from: dict[str, str]) -> Iterator[Step]:
        """Yield all steps: three for each modality that is lacked, and the last."""
        for modality in self.lacked:
            for verb in ("preprocess", "train", "predict"):
                yield self._step(verb, modality, made_from)
        last = made_from | {"--groupby": str(self.options.groupby)}
        yield Step("complete", "put measured and predicted into one file", last, self.complete)

    def _step(self, verb: str, modality: Modality, made_from: dict[str, str]) -> Step:
        work = {"preprocess": self.preprocess, "train": self.train, "predict": self.predict}[verb]
        title = f"{verb} {DIRECTION[modality]}"
        return Step(f"{verb}_{modality}", title, made_from, lambda: work(modality))

    def preprocess(self, modality: Modality) -> Facts:
        """Align and split the paired cells."""
        rna, atac = (self._cells(side, self.mosaic.paired) for side in MODALITIES)
        direction = DIRECTION[modality]
        stores = preprocess(
            rna, atac, self.folder / DATA, direction=direction, reference="dataset", gtf=self.options.gtf,
            config=self.options.config(direction), seed=self.options.seed, force=True,
        )  # fmt: skip
        return {"files": [f"{DATA}/{store.path.name}" for store in stores.values()]}

    def train(self, modality: Modality) -> Facts:
        """Train a model on the paired cells."""
        direction = DIRECTION[modality]
        config = self.options.config(direction)
        best = train(
            self.folder / DATA, direction, direction=direction, save=self.folder / MODELS, config=config
        )
        assert best.folder is not None
        model, metrics = f"{MODELS}/{best.folder.parent.name}/best", best.metrics
        if metrics["val_loss"] >= metrics["mean_val_loss"]:
            logger.warning(
                "the %s model predicts validation cells no better than a mean profile: do not rely on its predictions",
                direction,
            )
        return {"files": [model], "model": model}

    def predict(self, modality: Modality) -> Facts:
        """Predict a modality for the cells that lack it, from the other."""
        name = f"predicted_{modality}.h5ad"
        source = next(side for side in MODALITIES if side != modality)
        cells = self._cells(source, self.mosaic.lacking(modality))
        predict(self._model(modality), cells, output=self.folder / name, force=True)
        return {"files": [name]}

    def complete(self) -> Facts:
        """Write the completed file."""
        sides = {modality: self._completed(modality) for modality in MODALITIES}
        whole = join_sides(self.mosaic, sides, self.groups)
        write_mosaic(whole, self.folder / COMPLETED)
        return {"files": [COMPLETED]}

    def _completed(self, modality: Modality) -> AnnData:
        if modality not in self.lacked:
            return complete_side(self.mosaic, modality, None, None)
        import anndata

        predicted = anndata.read_h5ad(self.folder / f"predicted_{modality}.h5ad")
        checkpoint = load_checkpoint(self._model(modality))
        side = complete_side(self.mosaic, modality, predicted, checkpoint.reference)
        losses = {key: checkpoint.metrics[key] for key in ("val_loss", "mean_val_loss")}
        side.uns["cisformer"] |= losses
        logger.info(
            "%s: %d cells measured, %d predicted; validation loss %.5f, mean profile %.5f",
            self.mosaic.names[modality], side.obs["measured"].sum(), predicted.n_obs, *losses.values(),
        )  # fmt: skip
        return side

    def _cells(self, modality: Modality, barcodes: pd.Index) -> AnnData:
        return self.mosaic.side(modality)[barcodes].copy()

    def _model(self, modality: Modality) -> Path:
        return self.folder / str(self.journal.facts(f"train_{modality}")["model"])


def _warn_of_unpaired_groups(mosaic: Mosaic, groups: dict[str, pd.Series]) -> None:
    """Name the groups that are to be completed although no model sees a paired cell of theirs."""
    for name, group in groups.items():
        paired = set(group[mosaic.paired].dropna())
        unseen = group[~group.isin(paired)].dropna().value_counts()
        unseen = unseen[unseen > 0]
        if len(unseen):
            told = ", ".join(f"{value} ({count} cells)" for value, count in unseen.items())
            logger.warning(
                "no cell of these groups of %s has both modalities, so models are not trained on them: %s",
                name, told,
            )  # fmt: skip
