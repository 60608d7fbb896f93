"""Commands that write configurations, train models, and export, share and demonstrate them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from cisformer.cli.common import CONTEXT, config_path, say, shared_options

if TYPE_CHECKING:
    from cisformer.config import Direction

CONFIG_DIR = Path("cisformer_config")


@click.command("generate_default_config", context_settings=CONTEXT)
@click.option("--preset", type=click.Choice(["default", "small"]), default="default", show_default=True,
              help="Size of the model: as documented, or one that trains in minutes on a laptop.")  # fmt: skip
@click.option("--force", is_flag=True, help="Overwrite an existing cisformer_config.")
def generate_default_config(preset: Any, force: bool) -> None:
    """Generate default config files in ./cisformer_config."""
    from cisformer.config import DIRECTIONS, default_config, dump_config
    from cisformer.parallel.launch import detect_accelerate_config
    from cisformer.runtime.files import atomic_folder

    with atomic_folder(CONFIG_DIR, force=force) as folder:
        accelerate = json.dumps(detect_accelerate_config(), indent=2)
        (folder / "accelerate_config.yaml").write_text(accelerate + "\n", encoding="utf-8")
        for direction in DIRECTIONS:
            text = dump_config(default_config(direction, preset))
            (folder / f"{direction}_config.yaml").write_text(text, encoding="utf-8")
    for name in ("accelerate_config.yaml", "atac2rna_config.yaml", "rna2atac_config.yaml"):
        click.echo(f"wrote {CONFIG_DIR / name}")


def _train(
    direction: Direction, accelerate_config: str | None, config_file: str | None, **options: Any
) -> None:
    from cisformer.parallel.launch import relaunched

    done, cpu = relaunched(accelerate_config)
    if done:
        return
    from cisformer.training.loop import train

    best = train(direction=direction, config=config_path(config_file, direction), cpu=cpu, **options)
    metrics = best.metrics
    say(
        f"best: epoch {metrics['epoch']}, validation loss {metrics['val_loss']:.5f} "
        f"(linear start {metrics['linear_val_loss']:.5f}, mean profile {metrics['mean_val_loss']:.5f})"
    )
    say(f"wrote {best.folder}")


def _training_options(command: Any) -> Any:
    """Options of both training commands."""
    for option in reversed((
        click.option("-n", "--name", required=True, help="Project name."),
        click.option("-s", "--save", default="./save", show_default=True, help="Save directory."),
        click.option("-c", "--config_file", help="Config file.  [default: cisformer_config/<direction>_config.yaml]"),
        click.option("-m", "--model_parameters", help="Load previous model: a checkpoint to continue from."),
        click.option("--resume", help="Folder of an interrupted run (under the save directory) to finish."),
        shared_options,
    )):  # fmt: skip
        command = option(command)
    return command


@click.command("atac2rna_train", context_settings=CONTEXT)
@click.option("-d", "--data_dir", required=True, help="Data directory, as data_preprocess wrote it.")
@_training_options
def atac2rna_train(
    data_dir: str, accelerate_config: str | None, config_file: str | None, **options: Any
) -> None:
    """Train ATAC ➝ RNA prediction model."""
    _train("atac2rna", accelerate_config, config_file, data=data_dir, **options)


@click.command("rna2atac_train", context_settings=CONTEXT)
@click.option("-t", "--train_data_dir", required=True, help="Training data directory.")
@click.option("-v", "--val_data_dir", required=True, help="Validation data directory.")
@_training_options
def rna2atac_train(
    train_data_dir: str,
    val_data_dir: str,
    accelerate_config: str | None,
    config_file: str | None,
    **options: Any,
) -> None:
    """Train RNA ➝ ATAC prediction model."""
    _train("rna2atac", accelerate_config, config_file, data=train_data_dir, val_data=val_data_dir, **options)


_MODEL = click.option("-m", "--model_parameters", required=True, help="Previous trained model parameters.")
_FORCE = click.option("--force", is_flag=True, help="Overwrite an existing output.")


@click.command("export_checkpoint", context_settings=CONTEXT)
@_MODEL
@click.option("-o", "--output", default="pytorch_model.bin", show_default=True,
              help="File of weights to write: .bin, or .safetensors.")  # fmt: skip
@_FORCE
def export_checkpoint(model_parameters: str, output: str, force: bool) -> None:
    """Write a model of architecture full as the published program reads it."""
    from cisformer.model.checkpoint import export_checkpoint as export
    from cisformer.model.checkpoint import load_checkpoint
    from cisformer.runtime.files import refuse_existing

    refuse_existing(output, force=force)
    click.echo(f"wrote {export(load_checkpoint(model_parameters), output)}")


@click.command("pack_model", context_settings=CONTEXT)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", default="model.zip", show_default=True, help="Zip to write.")
@click.option("--report", help="report.json of evaluate: its scores are written to the card.")
@click.option("--license", "license_", default="", help="Terms of use: a name such as MIT, or a text file.")
@click.option("--data", default="", help="Description of the training data, for the card.")
@click.option("--half", is_flag=True, help="Store matrices as float16; scores may change a little.")
@_FORCE
def pack_model(model: Path, license_: str, **options: Any) -> None:
    """Put MODEL, a checkpoint or training run, into one zip to share; -m takes the zip as it takes the folder."""
    from cisformer.model.pack import pack_model

    text = Path(license_).read_text(encoding="utf-8") if Path(license_).is_file() else license_
    click.echo(f"wrote {pack_model(model, license=text, **options)}")


@click.command("demo", context_settings=CONTEXT)
@click.option("-o", "--output_dir", default="./cisformer_demo", show_default=True, help="Output directory.")
@click.option("--quick", is_flag=True, help="Use a tiny data set, to check that everything runs.")
@click.option("--seed", default=0, show_default=True, help="Random seed of the simulated cells.")
@_FORCE
def demo(output_dir: str, **options: Any) -> None:
    """Run all steps on simulated cells: preprocess, train, predict, evaluate, link."""
    from cisformer.demo import run_demo

    results = run_demo(output_dir, **options)
    click.echo("results:")
    for path in results:
        click.echo(f"  {path}")
