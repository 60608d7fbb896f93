"""Commands on data: preprocess, inspect, build a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from cisformer.cli.common import CONTEXT, LENIENT_INT, config_path

if TYPE_CHECKING:
    from cisformer.config import Direction


@click.command("data_preprocess", context_settings=CONTEXT)
@click.option(
    "-r",
    "--rna",
    required=True,
    help="RNA counts: .h5ad, .h5mu, 10x .h5, .loom, .zarr, or a folder of matrix.mtx.",
)
@click.option(
    "-a",
    "--atac",
    required=True,
    help="ATAC peaks in one of these formats, or fragments.tsv.gz; may be the same file or folder as -r.",
)
@click.option("-c", "--config", help="Config file. [default: cisformer_config/<direction>_config.yaml]")
@click.option("-s", "--save_dir", default=".", show_default=True, help="Save directory.")
@click.option("--cnt", type=LENIENT_INT, default=10_000, show_default=True,
              help="Number of cells per output file (training sets only).")  # fmt: skip
@click.option("--batch_size", type=LENIENT_INT, default=10, show_default=True,
              help="Number of cells per worker and iteration.")  # fmt: skip
@click.option(
    "--num_workers", type=LENIENT_INT, default=10, show_default=True, help="Number of parallel workers."
)
@click.option("--atac2rna", is_flag=True, help="Process ATAC to RNA; RNA to ATAC otherwise.")
@click.option("--manually", is_flag=True, help="Manual mode: no split into train, val and test.")
@click.option("--shuffle", is_flag=True, help="Shuffle the cells; cell_info.tsv is then not written.")
@click.option("--reference", "--species", default="human", show_default=True,
              help="human, mouse, dataset (the input's own features), or a folder.")  # fmt: skip
@click.option("--gtf", help="Gene annotation for the gene coordinates of --reference dataset.")
@click.option(
    "--genome",
    help="hg38, hg19, mm39 or mm10: whose gene coordinates --reference dataset takes; guessed by default.",
)
@click.option(
    "--min_fragments",
    type=LENIENT_INT,
    help="If ATAC is a fragments file: leave out cells with fewer fragments than this.",
)
@click.option(
    "--split-by",
    "--split_by",
    metavar="COLUMN",
    help="Column of obs, such as donors: cells of one value stay in the same split.",
)
@click.option(
    "--seed",
    type=LENIENT_INT,
    default=0,
    show_default=True,
    help="Random seed of the split and of the shuffling.",
)
@click.option(
    "--write-h5ad", "--write_h5ad", is_flag=True, help="Write the aligned test cells as h5ad files too."
)
@click.option("--force", is_flag=True, help="Overwrite existing data sets.")
def data_preprocess(config: str | None, atac2rna: bool, **options: Any) -> None:
    """Preprocess paired RNA and ATAC data for training: align, split, write."""
    from cisformer.data.preprocess import preprocess

    direction: Direction = "atac2rna" if atac2rna else "rna2atac"
    stores = preprocess(direction=direction, config=config_path(config, direction), **options)
    for split, store in stores.items():
        click.echo(f"wrote {store.path} ({split}: {store.n_cells:,} cells)")


@click.command("inspect", context_settings=CONTEXT)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--reference", help="Count features in this reference; by default the built-in one that fits.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@click.option(
    "--verify", is_flag=True, help="Compare data sets, checkpoints and references with their checksums."
)
def inspect(files: tuple[Path, ...], reference: str | None, as_json: bool, verify: bool) -> None:
    """Describe FILES: kind, cells, features, values, genome, coverage, shared barcodes."""
    import json

    from cisformer.data.inspect import as_text
    from cisformer.data.inspect import inspect as describe

    report = describe(files, reference=reference, verify=verify)
    click.echo(json.dumps(report, indent=1) if as_json else as_text(report))


@click.command("build_reference", context_settings=CONTEXT)
@click.option("--gtf", required=True, help="Gene annotation, .gtf or .gtf.gz.")
@click.option("--peaks", required=True, help="cCREs, .bed or .bed.gz.")
@click.option("-o", "--output", required=True, help="Folder to write the reference to.")
@click.option("--force", is_flag=True, help="Overwrite an existing folder.")
def build_reference(gtf: str, peaks: str, output: str, force: bool) -> None:
    """Make a reference for any genome, to use with data_preprocess --reference DIR."""
    from cisformer.data.own_reference import build_reference as build

    reference = build(gtf, peaks, output, force=force)
    click.echo(f"wrote {output} ({reference.describe()})")
