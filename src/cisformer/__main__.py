"""`python -m cisformer` and the `cisformer` command."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings


def main() -> None:
    """Run the command line; a `CisformerError` becomes one line on stderr and exit code 1."""
    from cisformer.cli import cisformer
    from cisformer.errors import CisformerError

    # A waiting thread gives its core away: spinning made training on a busy machine fifteen times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    debug = "--debug" in sys.argv
    _speak(debug)
    try:
        cisformer(prog_name="cisformer")
    except CisformerError as error:
        if debug:
            raise
        _give_up(error.message, error.hint)
    except OSError as error:  # a full disk, a file that vanished
        if debug:
            raise
        _give_up(str(error), "check that the disk has room, and that you may read and write there")


def _give_up(message: str, hint: str) -> None:
    """Print what is wrong and the next step; exit with code 1.

    Of several processes that fail alike the first speaks: the others wait, and the launcher ends them meanwhile.
    """
    if not _is_main():
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)  # noqa: T201
    sys.exit(1)


def _speak(debug: bool) -> None:
    """Send log messages to stderr; keep the warnings of libraries out of a user's sight unless debugging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    level = logging.INFO if _is_main() else logging.ERROR
    logging.getLogger("cisformer").setLevel(logging.DEBUG if debug else level)
    if not debug:
        warnings.simplefilter("ignore")


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


class _Plain(logging.Formatter):
    """Messages as they are; warnings and worse with their level in front."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


if __name__ == "__main__":
    main()
