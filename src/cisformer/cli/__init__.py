"""The command line: each command translates its options, calls one library function, and says what was written."""

from __future__ import annotations

import importlib
from typing import Any

import rich_click as click

from cisformer import __version__
from cisformer.cli.common import CONTEXT

COMMANDS = {
    "generate_default_config": "model",
    "data_preprocess": "data",
    "atac2rna_train": "model",
    "atac2rna_predict": "prediction",
    "atac2rna_link": "links",
    "rna2atac_train": "model",
    "rna2atac_predict": "prediction",
    "expand": "prediction",
    "tracks": "prediction",
    "complete": "prediction",
    "transfer_labels": "prediction",
    "evaluate": "evaluation",
    "evaluate_links": "links",
    "export_links": "links",
    "plot_links": "links",
    "compare_links": "contrasts",
    "link_tfs": "contrasts",
    "annotate_variants": "annotation",
    "annotate_peaks": "annotation",
    "browse": "annotation",
    "inspect": "data",
    "build_reference": "data",
    "export_checkpoint": "model",
    "pack_model": "model",
    "simulate": "links",
    "run": "run",
    "demo": "model",
}
"""Command name → module under `cisformer.cli` that defines a function of that name."""


class LazyGroup(click.RichGroup):
    """A group that imports the module of a command only when that command is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the documentation."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> Any:
        """Import and return one command; `None` if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cisformer.cli.{COMMANDS[cmd_name]}")
        return getattr(module, cmd_name)


@click.group(cls=LazyGroup, context_settings=CONTEXT)
@click.version_option(__version__, "--version", prog_name="cisformer")
@click.option("--debug", is_flag=True, help="Show the traceback of an error, and debugging messages.")
@click.pass_context
def cisformer(context: click.Context, debug: bool) -> None:
    """Predict chromatin accessibility from gene expression and back, and link cCREs to genes per cell type."""
    context.obj = {"debug": debug}
