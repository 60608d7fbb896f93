"""Write the command and configuration references from the code, so that they cannot go stale."""

from pathlib import Path

import click

from cisformer.cli import COMMANDS, cisformer
from cisformer.config import Config, default_config, type_of_section


def write(folder: Path) -> None:
    """Write commands.md and configuration.md."""
    folder.mkdir(exist_ok=True)
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    (folder / "configuration.md").write_text(configuration_page(), encoding="utf-8")


def commands_page() -> str:
    """Return every command with its options."""
    parts = ["# Commands", "Every command answers `--help`. A number may be written as `1e4`."]
    context = click.Context(cisformer, info_name="cisformer")
    for name in COMMANDS:
        command = cisformer.get_command(context, name)
        parts += [f"## {name}", command.help or "", "| option | meaning | default |", "|---|---|---|"]
        parts += [_option_row(p) for p in command.params]
        parts.append("")
    return _join(parts)


def _option_row(parameter: click.Parameter) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    if isinstance(parameter, click.Argument):
        return f"| {parameter.human_readable_name} | | |"
    assert isinstance(parameter, click.Option)
    default = "required" if parameter.required else _default(parameter)
    return f"| {names} | {(parameter.help or '').replace('|', '/')} | {default} |"


def _default(parameter: click.Option) -> str:
    value = parameter.default
    if parameter.is_flag or value is None or callable(value) or "UNSET" in repr(value):
        return ""
    return f"`{value}`" if value != () else ""


def configuration_page() -> str:
    """Return every key of the configuration with its meaning and defaults."""
    defaults = {d: default_config(d) for d in ("atac2rna", "rna2atac")}
    parts = ["# Configuration", "Keys of `atac2rna_config.yaml` and `rna2atac_config.yaml`."]
    for section in Config.model_fields:
        parts += [f"## {section}", "| key | meaning | ATAC→RNA | RNA→ATAC |", "|---|---|---|---|"]
        for key, field in type_of_section(section).model_fields.items():
            values = [getattr(getattr(config, section), key) for config in defaults.values()]
            parts.append(f"| `{key}` | {field.description} | {values[0]} | {values[1]} |")
        parts.append("")
    return _join(parts)


def _join(parts: list[str]) -> str:
    """Join paragraphs by empty lines, and the rows of tables by single line ends."""
    lines: list[str] = []
    for part in parts:
        if not (part.startswith("|") and lines and lines[-1].startswith("|")):
            lines.append("")
        lines.append(part)
    return "\n".join(lines[1:]) + "\n"
