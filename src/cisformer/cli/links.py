"""Commands on links: infer, export, evaluate and draw them; and simulate cells with known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from cisformer.cli.common import CONTEXT, LENIENT_INT, say, shared_options

MODES = ("contact", "uniform", "no-coupling")
FORMAT_NAMES = ("bedpe", "interact", "longrange")
_FORCE = click.option("--force", is_flag=True, help="Overwrite an existing output.")


class Names(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """Several names in one word, separated by commas."""

    name = "names"

    def __init__(self, choices: tuple[str, ...] = ()) -> None:
        self.choices = choices

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return the names; fail where one is not among the choices."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        for name in names:
            if self.choices and name not in self.choices:
                self.fail(f"{name!r} is not one of {', '.join(self.choices)}", param, ctx)
        return names


@click.command("atac2rna_link", context_settings=CONTEXT)
@click.option("-d", "--data_path", required=True, help="Preprocessed cells: the folder, or one .pt file.")
@click.option("-c", "--celltype_info", required=True,
              help="Cell types: a tab-separated table without header; barcode, cell type. Or FILE:COLUMN of obs, "
                   "such as rna.h5ad:cell_type.")  # fmt: skip
@click.option("-m", "--model_parameters", required=True, help="Previous trained model parameters.")
@click.option("-o", "--output_dir", default="./output", show_default=True, help="Output directory.")
@click.option(
    "-n", "--num_of_cells", type=LENIENT_INT, help="Maximum number of cells per type.  [default: all]"
)
@click.option("--config", help="Config file to compare with the checkpoint's own, which is used.")
@click.option("--distance", type=LENIENT_INT, default=250_000, show_default=True,
              help="Largest distance between gene and cCRE, in base pairs.")  # fmt: skip
@click.option("--formats", type=Names(FORMAT_NAMES), default=(), metavar="NAMES",
              help=f"Genome browser files of the strongest links: {','.join(FORMAT_NAMES)}.")  # fmt: skip
@click.option("--covariates", type=Names(), default=(), metavar="COLUMNS",
              help="Columns of cell_info.tsv, such as donor,batch, to adjust p-values for besides depth.")  # fmt: skip
@click.option("--donor", metavar="COLUMN",
              help="Column of cell_info.tsv with donors; donors, not cells, are then the replicates.")  # fmt: skip
@click.option(
    "--genes", metavar="NAMES", help="Link these genes only: A,B,C, or a file with one name a line."
)
@click.option("--region", help="Link genes whose TSS lies in chrom:start-end only.")
@click.option(
    "--seed", type=LENIENT_INT, default=0, show_default=True, help="Random seed of the choice of cells."
)
@shared_options
@_FORCE
def atac2rna_link(
    data_path: str,
    celltype_info: str,
    model_parameters: str,
    config: str | None,
    num_of_cells: int | None,
    distance: int,
    genes: str | None,
    accelerate_config: str | None,
    **options: Any,
) -> None:
    """Extract cCRE-gene regulatory links, cell type by cell type."""
    from cisformer.parallel.launch import relaunched

    done, cpu = relaunched(accelerate_config)
    if done:
        return
    from cisformer.config import load_config
    from cisformer.links.inputs import read_genes
    from cisformer.links.score import link
    from cisformer.model.checkpoint import load_checkpoint

    wanted = load_config(config, "atac2rna") if config else None
    checkpoint = load_checkpoint(model_parameters, "atac2rna", config=wanted)
    folder = link(
        checkpoint, data_path, celltype_info, window_bp=distance, max_cells=num_of_cells,
        genes=read_genes(genes) if genes else (), device="cpu" if cpu else None, **options,
    )  # fmt: skip
    for path in sorted(folder.iterdir()):
        say(f"wrote {path}")


@click.command("export_links", context_settings=CONTEXT)
@click.option("-l", "--links", required=True, help="links.tsv.gz, or the cisformer_link folder with it.")
@click.option("-o", "--output", required=True, help="File to write.")
@click.option("--format", "form", type=click.Choice(["tsv", *FORMAT_NAMES]),
              help="Format.  [default: by the name of the output]")  # fmt: skip
@click.option("--fdr", type=float, help="Largest false discovery rate.")
@click.option("--min_score", type=float, help="Smallest score.")
@click.option(
    "--top_per_gene", type=LENIENT_INT, help="Maximum number of links per gene and cell type: the strongest."
)
@click.option("--cell_type", "cell_types", multiple=True, help="Only this cell type; may be repeated.")
@_FORCE
def export_links(output: str, force: bool, **options: Any) -> None:
    """Filter links, and write them for genome browsers: IGV (bedpe), UCSC (interact), WashU (longrange)."""
    from cisformer.links.formats import export_links as export
    from cisformer.runtime.files import refuse_existing

    refuse_existing(output, force=force)
    number = export(output=output, **options)
    click.echo(f"wrote {output} ({number:,} links)")


@click.command("evaluate_links", context_settings=CONTEXT)
@click.option(
    "-l",
    "--links",
    help="Links of any tool: a table, .bedpe, or the cisformer_link folder.  [default: baselines only]",
)
@click.option("-t", "--truth", required=True, help="Tested pairs (CRISPRi), eQTL, or links (table, .bedpe).")
@click.option("-o", "--output", help="Write the result to this JSON file as well.")
@click.option("--score", help="Column to rank by.  [default: found by name]")
@click.option("--cell_type", help="Links of this cell type only.  [default: best of all]")
@click.option(
    "--reference", help="human, mouse or a folder with gene coordinates, if the truth has no distance."
)
@click.option("--min_distance", type=LENIENT_INT, default=0, show_default=True,
              help="Leave out pairs closer than this many bp, such as promoters.")  # fmt: skip
@click.option("--seed", type=LENIENT_INT, default=0, show_default=True, help="Random seed of the bootstrap.")
@_FORCE
def evaluate_links(
    output: str | None, reference: str | None, min_distance: int, force: bool, **options: Any
) -> None:
    """Compare links with known ones, and with distance, the nearest gene and activity by distance."""
    from cisformer.data.reference import load_reference
    from cisformer.links.benchmark import evaluate_links as evaluate
    from cisformer.runtime.files import refuse_existing

    if output:
        refuse_existing(output, force=force)
    genes = load_reference(reference) if reference else None
    result = evaluate(reference=genes, min_distance_bp=min_distance, **options)
    click.echo(result.describe())
    if output:
        result.write(output)
        click.echo(f"wrote {output}")


@click.command("plot_links", context_settings=CONTEXT)
@click.option("-l", "--links", required=True, help="The cisformer_link folder.")
@click.option("-g", "--gene", required=True, help="Name or id of the gene.")
@click.option("-o", "--output", help="Figure to write: .png, .svg or .pdf.  [default: <gene>_links.png]")
@click.option("--cell_type", "cell_types", multiple=True, help="Only this cell type; may be repeated.")
@click.option("--min_score", default=0.05, show_default=True, help="Smallest score to draw.")
@click.option(
    "--top", type=LENIENT_INT, default=10, show_default=True, help="Maximum number of links per cell type."
)
@click.option("--region", help="What to show: chrom:start-end.  [default: as far as links reach]")
@_FORCE
def plot_links(gene: str, output: str | None, force: bool, **options: Any) -> None:
    """Draw a gene's links: accessibility per cell type, arcs coloured by score, genes."""
    from cisformer.links.files import safe_name
    from cisformer.links.plot import plot_links as plot
    from cisformer.runtime.files import refuse_existing

    path = output or f"{safe_name(gene)}_links.png"
    refuse_existing(path, force=force)
    plot(gene=gene, output=path, **options)
    click.echo(f"wrote {path}")


@click.command("simulate", context_settings=CONTEXT)
@click.option("-o", "--output_dir", required=True, help="Output directory.")
@click.option("--n_cells", type=LENIENT_INT, default=2000, show_default=True, help="Number of cells.")
@click.option("--n_genes", type=LENIENT_INT, default=5000, show_default=True, help="Number of genes.")
@click.option("--n_ccres", type=LENIENT_INT, default=40_000, show_default=True, help="Number of cCREs.")
@click.option("--n_types", type=LENIENT_INT, default=8, show_default=True, help="Number of cell types.")
@click.option("--mode", type=click.Choice(MODES), default="contact", show_default=True,
              help="How links are sampled; see the page on links.")  # fmt: skip
@click.option(
    "--reference", default="human", show_default=True, help="Reference to sample genes and cCREs from."
)
@click.option(
    "--seed",
    type=LENIENT_INT,
    default=0,
    show_default=True,
    help="Random seed: the same seed gives the same cells.",
)
@click.option("--depth", type=float, help="Sequence shallowly, at this share of the usual depth. Cells are then drawn "
              "and written in blocks, quickly and in flat memory: 0.05 for a million cells.")  # fmt: skip
@_FORCE
def simulate(output_dir: str, depth: float | None, force: bool, **options: Any) -> None:
    """Simulate paired cells with planted cCRE-gene links."""
    from cisformer.runtime.files import refuse_existing
    from cisformer.simulation import FILES
    from cisformer.simulation import simulate as simulate_cells
    from cisformer.sparse_cells import simulate_sparse
    from cisformer.tissue import SimulationOptions

    for name in FILES:
        refuse_existing(Path(output_dir) / name, force=force)
    if depth is None:
        simulate_cells(**options).write(output_dir)
    else:
        simulate_sparse(output_dir, SimulationOptions(**options), depth)
    for name in FILES:
        click.echo(f"wrote {Path(output_dir) / name}")
