"""Commands that compare links between groups, and that find the factors behind them."""

from __future__ import annotations

from typing import Any

import rich_click as click

from cisformer.cli.common import CONTEXT
from cisformer.cli.links import Names

_FORCE = click.option("--force", is_flag=True, help="Overwrite an existing output.")


@click.command("compare_links", context_settings=CONTEXT)
@click.option("-l", "--links", required=True,
              help="Links to compare: the cisformer_link folder, or a table with gene and cCRE.")  # fmt: skip
@click.option("-d", "--data_path", required=True, help="Preprocessed cells: the folder, or one .pt file.")
@click.option("-c", "--celltype_info", required=True,
              help="Cell types: a table without header; barcode, cell type. Or FILE:COLUMN of obs.")  # fmt: skip
@click.option("--groups", required=True, nargs=2, metavar="A B",
              help="What to compare: two cell types, or two values of --condition.")  # fmt: skip
@click.option("--condition", metavar="COLUMN",
              help="Column of cell_info.tsv whose values are compared, in each cell type by itself.")  # fmt: skip
@click.option("--donor", metavar="COLUMN",
              help="Column of cell_info.tsv that names donors, who are then the replicates.")  # fmt: skip
@click.option("--covariates", type=Names(), default=(), metavar="COLUMNS",
              help="Columns of cell_info.tsv to adjust expression for, beside depths.")  # fmt: skip
@click.option("--cell_type", "only", multiple=True,
              help="With --condition, compare in this cell type only; may be repeated.")  # fmt: skip
@click.option("--min_score", default=0.1, show_default=True, help="Smallest score of a link to compare.")
@click.option("-o", "--output_dir", default="./output/contrast", show_default=True, help="Output directory.")
@_FORCE
def compare_links(data_path: str, celltype_info: str, output_dir: str, force: bool, **options: Any) -> None:
    """Find links that differ between two cell types or conditions, with donors as replicates."""
    from cisformer.analysis.contrasts import compare_links as compare
    from cisformer.runtime.files import refuse_existing

    refuse_existing(output_dir, force=force)
    found = compare(data=data_path, cell_types=celltype_info, **options)
    click.echo(found.describe())
    for path in found.write(output_dir, force=force):
        click.echo(f"wrote {path}")
