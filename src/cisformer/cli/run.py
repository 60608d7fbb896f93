"""The command that runs all steps: from two files to links."""

from __future__ import annotations

from typing import Any

import rich_click as click

from cisformer.cli.common import CONTEXT, LENIENT_INT


@click.command("run", context_settings=CONTEXT)
@click.option(
    "-r", "--rna", required=True, help="RNA counts: .h5ad, .h5mu, 10x .h5, a folder; see the docs, Files."
)
@click.option(
    "-a", "--atac", required=True, help="ATAC peaks, likewise, or fragments.tsv.gz; may be the same file."
)
@click.option("-o", "--output_dir", default="./cisformer_run", show_default=True, help="Output directory.")
@click.option(
    "--groupby", metavar="COLUMN", help="Column of obs with cell types.  [default: all cells as one type]"
)
@click.option("-c", "--celltype_info",
              help="In place of --groupby: a tab-separated table without header; barcode, cell type.")  # fmt: skip
@click.option("--reference", "--species", default="dataset", show_default=True,
              help="dataset (your own genes and peaks, any genome), human, mouse, or a folder.")  # fmt: skip
@click.option(
    "--genome",
    help="hg38, hg19, mm39 or mm10: whose gene coordinates --reference dataset takes; guessed by default.",
)
@click.option("--gtf", help="Gene annotation for the gene coordinates of --reference dataset.")
@click.option("--preset", type=click.Choice(["small", "default"]), default="small", show_default=True,
              help="Size of the models; small trains in minutes on a laptop.")  # fmt: skip
@click.option("--epochs", type=LENIENT_INT, help="Maximum number of epochs.  [default: the preset's]")
@click.option("--seed", type=LENIENT_INT, default=0, show_default=True, help="Random seed of every step.")
@click.option("--force", is_flag=True, help="Replace results whose files or options have changed.")
def run(**options: Any) -> None:
    """Run all steps: inspect, preprocess, train, evaluate, link. If stopped, run it again: it continues."""
    from cisformer.workflow import run as run_all

    click.echo(run_all(**options).text())
