"""`python -m cisformer` and the `cisformer` command."""

from __future__ import annotations

import logging
import signal
import sys
import warnings
from collections import Counter
from types import FrameType


def main() -> None:
    """Run the command line; a `CisformerError` becomes one line on stderr and exit code 1."""
    from cisformer.cli import cisformer
    from cisformer.errors import CisformerError

    debug = "--debug" in sys.argv
    recap = _speak(debug)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        try:
            cisformer(prog_name="cisformer")
        finally:
            recap.print()
    except CisformerError as error:
        if debug:
            raise
        _give_up(error.message, error.hint)
    except OSError as error:  # a file that vanished, a folder that is not the user's
        if debug:
            raise
        _give_up(str(error), "check that the disk has room, and that you may read and write there")
    except (MemoryError, RuntimeError) as error:
        if debug or not _out_of_memory(error):
            raise
        _give_up(
            f"out of memory: {' '.join(str(error).split())[:200]}",
            "lower batch_size (or dim), or take a larger machine",
        )


class Stopped(SystemExit):
    """The user, or the system, wants the command to end; whoever writes cleans up on the way out."""


def _stop(number: int, frame: FrameType | None) -> None:
    """Leave as if by an exception, so that temporary files go; 128 + signal is the exit code of shells."""
    name = signal.Signals(number).name
    print(  # noqa: T201
        f"error: stopped by {name}; earlier results are as they were\n"
        "  hint: run the command again; training goes on with --resume FOLDER",
        file=sys.stderr,
    )
    raise Stopped(128 + number)


def _out_of_memory(error: Exception) -> bool:
    """Tell whether there was no memory left: torch says so with a `RuntimeError` of many kinds."""
    return (
        isinstance(error, MemoryError) or "out of memory" in str(error) or "not enough memory" in str(error)
    )


def _give_up(message: str, hint: str) -> None:
    """Print what is wrong and the next step; exit with code 1."""
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)  # noqa: T201
    sys.exit(1)


def _speak(debug: bool) -> _Recap:
    """Send log messages to stderr; keep the warnings of libraries out of a user's sight unless debugging."""
    handler, recap = logging.StreamHandler(sys.stderr), _Recap()
    handler.setFormatter(_Plain())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    ours = logging.getLogger("cisformer")
    ours.setLevel(logging.DEBUG if debug else logging.INFO)
    ours.addHandler(recap)
    if not debug:
        warnings.simplefilter("ignore")
        _hush_hdf5()
    return recap


def _hush_hdf5() -> None:
    """Leave out what HDF5 repeats for every object of a file that it could not close, once the error is told."""

    def repeated(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and "Can't decrement id ref count" in str(error)

    show, show_unraisable = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: None if repeated(error) else show(kind, error, trace)
    sys.unraisablehook = lambda found: None if repeated(found.exc_value) else show_unraisable(found)


class _Plain(logging.Formatter):
    """Messages as they are; warnings and worse with their level in front."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


class _Recap(logging.Handler):
    """Keeps our warnings, to say them once more at the end where other lines have followed them."""

    def __init__(self) -> None:
        super().__init__()
        self._warnings: Counter[str] = Counter()
        self._followed = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._warnings[record.getMessage()] += 1
        else:
            self._followed |= bool(self._warnings)

    def print(self) -> None:
        """Print each warning once, with how often it came."""
        total = self._warnings.total()
        if not self._followed and total == len(self._warnings):  # they stand right above, once each
            return
        lines = [f"{total} warning{'s' if total > 1 else ''} in all:"]
        for message, times in self._warnings.items():
            lines.append(f"  - {message}{f' ({times} times)' if times > 1 else ''}")
        print("\n".join(lines), file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
