"""Shared by the commands: option types and messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich_click as click

from cisformer.parallel.processes import is_main_process

CONTEXT = {"help_option_names": ["-h", "--help"]}


class LenientInt(click.ParamType):  # type: ignore[type-arg]  # not generic before click 8.3
    """An integer that may be written as 1e10."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return `value` as an integer; fail with the option's name otherwise."""
        try:
            number = float(value)
        except ValueError:
            self.fail(f"{value!r} is not a number, such as 10000 or 1e4", param, ctx)
        if not number.is_integer():
            self.fail(f"{value!r} is not a whole number", param, ctx)
        return int(number)


LENIENT_INT = LenientInt()


def shared_options(command: Any) -> Any:
    """Add the option of commands that several processes can share."""
    return click.option(
        "--accelerate_config", help="Accelerate config.  [default: the one in cisformer_config]"
    )(command)


def say(text: str) -> None:
    """Print a result; of several processes only the first does."""
    if is_main_process():
        click.echo(text)


def config_path(given: str | None, direction: str) -> Path | None:
    """Return the config to use: the one given, the one of the working folder, or `None` for the defaults."""
    default = Path("cisformer_config") / f"{direction}_config.yaml"
    return Path(given) if given else default if default.is_file() else None
