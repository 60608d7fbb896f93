"""The command that evaluates predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from cisformer.cli.common import CONTEXT

if TYPE_CHECKING:
    from cisformer.evaluation.evaluate import EvaluationReport


@click.command("evaluate", context_settings=CONTEXT)
@click.option("--predicted", help="Predicted cells (.h5ad): probabilities, or log1p-normalised expression.")
@click.option("--truth", help="The same cells as measured: peaks or raw counts (.h5ad, .h5mu, 10x .h5).")
@click.option("--train_input", help="Input of the training cells, for the baselines.")
@click.option("--train_target", help="Target of the training cells, for the baselines.")
@click.option("--test_input", help="Input of the test cells, for the baselines.")
@click.option("--data", "-d", help="In place of all these: the folder that data_preprocess wrote.")
@click.option("--model_parameters", "-m", help="With --data: a checkpoint, whose predictions are evaluated.")
@click.option(
    "--split",
    type=click.Choice(["test", "val"]),
    default="test",
    show_default=True,
    help="With --data: which cells to score. Scores on val are too good, since the model was chosen on them.",
)
@click.option(
    "--direction",
    type=click.Choice(["rna2atac", "atac2rna"]),
    help="What was predicted.  [default: as the prediction's file says]",
)
@click.option("--cell_type", help="Column of obs with cell types.  [default: cell_type, where there is one]")
@click.option("--training_log", help="metrics.jsonl of the training run, for its curves.")
@click.option(
    "--max_cells",
    type=click.IntRange(min=1),
    default=20_000,
    show_default=True,
    help="With --data: maximum number of cells to score; more are sampled.",
)
@click.option(
    "--seed", default=0, show_default=True, help="Random seed of the bootstrap and of the baselines."
)
@click.option(
    "-o",
    "--output_dir",
    default="./output/evaluation",
    show_default=True,
    help="Where report.html and report.json go.",
)
@click.option("--force", is_flag=True, help="Overwrite an earlier report.")
def evaluate(output_dir: str, force: bool, **options: Any) -> None:
    """Compare predictions with those of simple methods, with intervals and a verdict in one sentence."""
    from cisformer.evaluation.report import write_report
    from cisformer.runtime.files import refuse_existing

    for name in ("report.html", "report.json"):
        refuse_existing(Path(output_dir) / name, force=force)
    report = _evaluate(**options)
    click.echo(report.table())
    click.echo(f"\n{report.verdict}\n")
    for note in report.facts["notes"]:
        click.echo(f"note: {note}")
    for path in write_report(report, output_dir, force=force):
        click.echo(f"wrote {path}")


def _evaluate(
    data: str | None,
    model_parameters: str | None,
    split: str,
    training_log: str | None,
    max_cells: int,
    **options: Any,
) -> EvaluationReport:
    """Evaluate either files or a model on a data set."""
    from cisformer.errors import InputError
    from cisformer.evaluation.evaluate import evaluate as evaluate_files
    from cisformer.evaluation.evaluate import evaluate_model

    files = ("predicted", "truth", "train_input", "train_target", "test_input")
    given = [f"--{name}" for name in files if options[name] is not None]
    by_model = [name for name, value in (("--data", data), ("-m", model_parameters)) if value is not None]
    if len(by_model) == 1 or bool(given) == bool(by_model):
        found = ", ".join([*by_model, *given]) or "none of them"
        raise InputError(
            f"evaluate needs --data and -m, or --predicted and --truth; got {found}",
            hint="see `cisformer evaluate --help`",
        )
    if data is not None and model_parameters is not None:
        common = {name: options[name] for name in ("direction", "cell_type", "seed")}
        common |= {"split": split, "training_log": training_log, "max_cells": max_cells}
        return evaluate_model(data, model_parameters, **common)
    missing = [f"--{name}" for name in ("predicted", "truth") if options[name] is None]
    if missing:
        raise InputError(f"evaluate lacks {' and '.join(missing)}", hint="see `cisformer evaluate --help`")
    return evaluate_files(**options, training_log=training_log)
