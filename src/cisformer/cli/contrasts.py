"""Commands that compare links between groups, and that find the factors behind them."""

from __future__ import annotations

from typing import Any

import rich_click as click

from cisformer.cli.common import CONTEXT
from cisformer.cli.links import Names

_FORCE = click.option("--force", is_flag=True, help="Overwrite an existing output.")


@click.command("compare_links", context_settings=CONTEXT)
@click.option("-l", "--links", required=True,
              help="Links to compare: the cisformer_link folder, or a table with gene and cCRE columns.")  # fmt: skip
@click.option("-d", "--data_path", required=True, help="Preprocessed cells: the folder, or one .pt file.")
@click.option("-c", "--celltype_info", required=True,
              help="Cell types: a table without header; barcode, cell type. Or FILE:COLUMN of obs.")  # fmt: skip
@click.option("--groups", required=True, nargs=2, metavar="A B",
              help="What to compare: two cell types, or two values of --condition.")  # fmt: skip
@click.option("--condition", metavar="COLUMN",
              help="Column of cell_info.tsv whose two values are compared within each cell type.")  # fmt: skip
@click.option("--donor", metavar="COLUMN",
              help="Column of cell_info.tsv with donors; donors, not cells, are then the replicates.")  # fmt: skip
@click.option("--covariates", type=Names(), default=(), metavar="COLUMNS",
              help="Columns of cell_info.tsv to adjust expression for, in addition to depths.")  # fmt: skip
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


@click.command("link_tfs", context_settings=CONTEXT)
@click.option("-l", "--links", required=True, help="The cisformer_link folder, or a links.tsv.gz.")
@click.option("--fasta", required=True, help="The genome that the links are on: FASTA, plain or .gz.")
@click.option("--motifs", required=True, help="Motifs in MEME's text format, named by gene symbols.")
@click.option("-o", "--output_dir", default="./output/regulon", show_default=True, help="Output directory.")
@click.option("--min_score", default=0.1, show_default=True, help="Smallest score of a link to use.")
@click.option("--max_p", default=1e-4, show_default=True, help="Largest p-value of a motif match.")
@click.option("--min_triplet", default=0.02, show_default=True, help="Smallest score of a triplet to write.")
@_FORCE
def link_tfs(output_dir: str, force: bool, **options: Any) -> None:
    """Find which transcription factors drive which genes, by their motifs in linked cCREs."""
    from cisformer.analysis.regulon import link_tfs as link_factors
    from cisformer.runtime.files import refuse_existing

    refuse_existing(output_dir, force=force)
    found = link_factors(**options)
    click.echo(found.describe())
    for path in found.write(output_dir, force=force):
        click.echo(f"wrote {path}")
