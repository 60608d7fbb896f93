"""Commands that predict, and that use predictions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from cisformer.cli.common import CONTEXT, LENIENT_INT, say, shared_options

if TYPE_CHECKING:
    from cisformer.config import Direction


def _predict(
    direction: Direction,
    model: str,
    config_file: str | None,
    accelerate_config: str | None,
    output: Path,
    **options: Any,
) -> None:
    from cisformer.parallel.launch import relaunched

    done, cpu = relaunched(accelerate_config)
    if done:
        return
    from cisformer.config import load_config
    from cisformer.model.checkpoint import load_checkpoint
    from cisformer.prediction.predict import predict

    wanted = load_config(config_file, direction) if config_file else None
    checkpoint = load_checkpoint(model, direction, config=wanted)
    say(f"wrote {predict(checkpoint, output=output, device='cpu' if cpu else None, **options)}")


_MODEL = click.option("-m", "--model_parameters", required=True, help="Previous trained model parameters.")
_OUTPUT = click.option("-o", "--output_dir", default="./output", show_default=True, help="Output directory.")
_CONFIG = click.option(
    "-c", "--config_file", help="Config file to compare with the checkpoint's own, which is used."
)
_FORCE = click.option("--force", is_flag=True, help="Overwrite an existing output.")
_WORKERS = click.option("--num_workers", default=2, show_default=True, help="Number of workers.")


@click.command("atac2rna_predict", context_settings=CONTEXT)
@click.option("-d", "--data", required=True,
              help="Data file: a .pt shard, a folder of shards, ATAC cells (.h5ad, .h5mu, 10x .h5, …), "
                   "or fragments.tsv.gz.")  # fmt: skip
@_MODEL
@_OUTPUT
@click.option("-n", "--name", default="cisformer_predicted_rna", show_default=True, help="Output name.")
@_CONFIG
@click.option("--batch_size", default=16, show_default=True, help="Batch size.")
@_WORKERS
@click.option("--genes", default="expressed_in_training", show_default=True, metavar="CHOICE",
              help="architecture full: genes to predict; expressed_in_training, all, or a file of ids or names. "
                   "The genes that the cell itself expresses are never used.")  # fmt: skip
@click.option("--min_fragments", type=LENIENT_INT, default=1000, show_default=True,
              help="Minimum number of fragments for a barcode of fragments.tsv.gz to count as a cell.")  # fmt: skip
@shared_options
@_FORCE
def atac2rna_predict(
    data: str,
    model_parameters: str,
    output_dir: str,
    name: str,
    config_file: str | None,
    accelerate_config: str | None,
    **options: Any,
) -> None:
    """Predict gene expression from ATAC."""
    output = Path(output_dir) / f"{name}.h5ad"
    _predict("atac2rna", model_parameters, config_file, accelerate_config, output, data=data, **options)


@click.command("rna2atac_predict", context_settings=CONTEXT)
@click.option("-r", "--rna_file", required=True,
              help="RNA cells: .h5ad, .h5mu, 10x .h5, or a folder of preprocessed cells.")  # fmt: skip
@_MODEL
@_OUTPUT
@click.option("-n", "--name", default="cisformer_predicted_atac", show_default=True, help="Output name.")
@_CONFIG
@click.option(
    "--rna_len", default=3600, show_default=True, help="Number of non-zero expressed genes to be used."
)
@click.option("--batch_size", default=2, show_default=True, help="Batch size.")
@_WORKERS
@click.option("--compact/--full", default=None,
              help="Form of the file: two small matrices that hold every probability (see expand), or the full "
                   "matrix.  [default: full up to 2 GB]")  # fmt: skip
@click.option("--min_prob", default=0.0, show_default=True,
              help="Full matrix: leave out probabilities below this.")  # fmt: skip
@click.option(
    "--binarize",
    is_flag=True,
    help="Write 1 for each cell's most probable cCREs, as many as expected, and 0 for others.",
)
@click.option("--chunk", type=LENIENT_INT,
              help="architecture full: cCREs decoded at once; fewer need less memory.  [default: 8192]")  # fmt: skip
@shared_options
@_FORCE
def rna2atac_predict(
    rna_file: str,
    model_parameters: str,
    output_dir: str,
    name: str,
    config_file: str | None,
    accelerate_config: str | None,
    rna_len: int,
    **options: Any,
) -> None:
    """Predict chromatin accessibility from RNA."""
    output = Path(output_dir) / f"{name}.h5ad"
    _predict("rna2atac", model_parameters, config_file, accelerate_config, output, data=rna_file,
             max_tokens=rna_len, **options)  # fmt: skip


@click.command("expand", context_settings=CONTEXT)
@click.option("-i", "--input", "path", required=True, help="Compact prediction of rna2atac_predict.")
@click.option("-o", "--output", required=True, help="File to write (.h5ad).")
@click.option("--region", help="Only cCREs that overlap this region: chrom:start-end, or chrom.")
@click.option("--ccres", help="Only cCREs that overlap a region of this BED file.")
@click.option("--cells", help="Only cells whose barcodes are in this text file, one a line.")
@click.option("--groupby", help="One row per value of this obs column: the mean probability of its cells.")
@click.option("--min_prob", default=0.0, show_default=True, help="Leave out probabilities below this.")
@click.option("--top", type=LENIENT_INT, help="Keep only this many cCREs of each row: the most probable.")
@_FORCE
def expand(
    path: str, output: str, region: str | None, ccres: str | None, cells: str | None, **options: Any
) -> None:
    """Write the probabilities of a compact prediction, or a part of them, as a matrix."""
    from cisformer.prediction.compact import open_prediction

    part = open_prediction(path).select(region=region, ccres=ccres, cells=cells)
    click.echo(f"wrote {part.write(output, **options)}")


@click.command("tracks", context_settings=CONTEXT)
@click.option("-i", "--input", "data", required=True,
              help="Measured or predicted accessibility (.h5ad), full or compact.")  # fmt: skip
@click.option("--groupby", required=True, help="Column of obs: one track per value.")
@click.option("-o", "--output_dir", default="./output/tracks", show_default=True, help="Output directory.")
@click.option(
    "--genome", default="", help="Genome of the regions, such as hg38.  [default: as the data says]"
)
@click.option("--chrom_sizes", help="Table of chromosome lengths.  [default: up to the last region]")
@_FORCE
def tracks(data: str, output_dir: str, **options: Any) -> None:
    """Write one bigWig per group of cells, with a UCSC track hub and an IGV session."""
    from cisformer.prediction.tracks import write_tracks

    click.echo(f"wrote {write_tracks(data, output_dir, **options)}")


@click.command("transfer_labels", context_settings=CONTEXT)
@click.option("-i", "--input", "predicted", required=True, help="Predicted cells (.h5ad).")
@click.option("-r", "--reference", required=True,
              help="Labelled cells (.h5ad): expression, or predictions of the same model.")  # fmt: skip
@click.option("--key", required=True, help="Column of the reference's obs with the labels.")
@click.option(
    "-o", "--output", required=True, help="Table to write (.tsv): barcode, label, best label, confidence."
)
@click.option("--n_neighbors", default=30, show_default=True, help="Number of labelled neighbours that vote.")
@click.option("--min_confidence", default=0.5, show_default=True,
              help="A cell with a smaller share of votes for its label is called unknown.")  # fmt: skip
@_FORCE
def transfer_labels(
    predicted: str, reference: str, key: str, output: str, force: bool, **options: Any
) -> None:
    """Label predicted cells like their nearest labelled neighbours."""
    from cisformer.prediction.transfer import transfer_labels as transfer
    from cisformer.prediction.transfer import write_labels

    labels = transfer(predicted, reference, key, **options)
    path = write_labels(labels, output, force=force)
    unknown = int((labels[key] == "unknown").sum())
    click.echo(f"{len(labels) - unknown} of {len(labels)} cells labelled, {unknown} unknown")
    click.echo(f"wrote {path}")


@click.command("complete", context_settings=CONTEXT)
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output_dir", default="./cisformer_completed", show_default=True, help="Output directory."
)
@click.option("--groupby", metavar="COLUMN",
              help="Column of obs, such as cell types: warn of groups without any paired cell.")  # fmt: skip
@click.option("--gtf", help="Gene annotation, if the file lacks gene coordinates.")
@click.option("--preset", type=click.Choice(["small", "default"]), default="small", show_default=True,
              help="Size of the models; small trains in minutes on a laptop.")  # fmt: skip
@click.option("--epochs", type=LENIENT_INT, help="Maximum number of epochs.  [default: the preset's]")
@click.option("--seed", type=LENIENT_INT, default=0, show_default=True, help="Random seed of every step.")
@click.option("--force", is_flag=True, help="Replace results whose file or options have changed.")
def complete(data: Path, output_dir: str, **options: Any) -> None:
    """Predict what is missing in DATA, an .h5mu in which some cells lack RNA or ATAC. If stopped, run it again."""
    from cisformer.prediction.complete import complete

    click.echo(f"wrote {complete(data, output_dir, **options)}")
