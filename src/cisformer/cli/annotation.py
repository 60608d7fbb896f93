"""Commands that use links: annotate variants and peaks, and write a page for a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from cisformer.cli.common import CONTEXT, LENIENT_INT

_LINKS = "The cisformer_link folder, or a links.tsv.gz."
_FORCE = click.option("--force", is_flag=True, help="Overwrite an existing output.")
_MIN_SCORE = click.option(
    "--min_score", default=0.5, show_default=True, help="Smallest score of a link to use."
)


@click.command("annotate_variants", context_settings=CONTEXT)
@click.option("-l", "--links", required=True, help=_LINKS)
@click.option("-v", "--variants", required=True,
              help="VCF, BED, or a table with chrom and pos; plain or gzipped.")  # fmt: skip
@click.option("-o", "--output_dir", required=True, help="Folder to write into.")
@click.option(
    "--genome",
    help="Genome of the variants, such as hg38.  [default: what the file says, or that of the links]",
)
@_MIN_SCORE
@click.option(
    "--min_pip", type=float, help="Leave out variants of a smaller posterior inclusion probability."
)
@click.option("--permutations", "n_permutations", type=LENIENT_INT, default=10_000, show_default=True,
              help="Number of random matched samples in the enrichment test.")  # fmt: skip
@click.option("--seed", type=LENIENT_INT, default=0, show_default=True, help="Random seed of these samples.")
@_FORCE
def annotate_variants(links: str, variants: str, output_dir: str, force: bool, **options: Any) -> None:
    """Find the genes and cell types that variants may act on, from the links of the cCREs in which they lie."""
    from cisformer.analysis.variant_genes import FILES
    from cisformer.analysis.variant_genes import annotate_variants as annotate
    from cisformer.runtime.files import refuse_existing, refuse_file_name

    refuse_file_name(output_dir)
    for name in FILES:
        refuse_existing(Path(output_dir) / name, force=force)
    result = annotate(links, variants, **options)
    click.echo(result.describe())
    for path in result.write(output_dir, force=force):
        click.echo(f"wrote {path}")


@click.command("annotate_peaks", context_settings=CONTEXT)
@click.option("-p", "--peaks", required=True, help="BED, or cells with peaks, such as atac.h5ad.")
@click.option("-l", "--links", help=f"{_LINKS} Adds linked genes.")
@click.option("-o", "--output", required=True, help="Table to write: .tsv or .tsv.gz.")
@click.option("--genome", help="hg38, hg19, mm39 or mm10.  [default: guessed from the peaks]")
@click.option("--gtf", help="Genes to use.  [default: those of the links, or the built-in ones]")
@click.option("--promoter_bp", type=LENIENT_INT, default=1000, show_default=True,
              help="A peak within this many bp of a TSS is a promoter.")  # fmt: skip
@_MIN_SCORE
@_FORCE
def annotate_peaks(output: str, force: bool, **options: Any) -> None:
    """Annotate peaks: kind (promoter, gene body, distal), nearest TSS, and linked genes."""
    from cisformer.analysis.peaks import annotate_peaks as annotate
    from cisformer.links.formats import text_writer
    from cisformer.runtime.files import refuse_existing

    refuse_existing(output, force=force)
    table = annotate(**options)
    with text_writer(output) as handle:
        table.to_csv(handle, sep="\t", index=False, float_format="%.5g")
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in table["kind"].value_counts().items())
    click.echo(f"wrote {output} ({len(table):,} peaks: {kinds})")


@click.command("browse", context_settings=CONTEXT)
@click.option("-l", "--links", required=True, help=_LINKS)
@click.option("-o", "--output", required=True, help="Page to write: .html.")
@click.option("--max_links", type=LENIENT_INT, default=50_000, show_default=True,
              help="Maximum number of links to show: those with the highest scores.")  # fmt: skip
@click.option("--min_score", default=0.05, show_default=True, help="Smallest score of a link to show.")
@click.option("--title", default="", help="Heading of the page.  [default: the name of the links' folder]")
@_FORCE
def browse(links: str, output: str, force: bool, **options: Any) -> None:
    """Write one HTML page of links: search a gene, see its locus, sort, filter, download."""
    from cisformer.analysis.browse import browse as write_page
    from cisformer.runtime.files import refuse_existing

    refuse_existing(output, force=force)
    path = write_page(links, output, **options)
    click.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
