"""`python -m cisformer` and the `cisformer` command."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from types import FrameType
from typing import Any

from cisformer.parallel.processes import is_main_process
from cisformer.runtime.installation import clash

logger = logging.getLogger("cisformer")
UNCLOSED = ("Can't decrement id ref count", "Can't close ")
"""How HDF5 begins to say that it cannot write the rest of a file; the second since HDF5 2.0."""


def main() -> None:
    """Run the command line; a `CisformerError` becomes one line on stderr and exit code 1."""
    from cisformer.cli import cisformer
    from cisformer.errors import CisformerError, WriteError

    # A waiting thread soon gives its core away. Waiting longer gains a tenth on an idle machine, and costs half of the
    # speed on a busy one (benchmarks/RESULTS.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "100")
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale without our arrows and dots
            stream.reconfigure(errors="replace")
    recap = _speak(debug)
    if (problem := clash()) is not None:
        logger.warning("%s", problem)
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
        _give_up(error.message, error.hint, at_once=isinstance(error, WriteError))
    except OSError as error:  # a file that vanished, a folder that is not the user's
        if debug:
            raise
        _give_up(str(error), "check that the disk is not full, and that you may read and write there")
    except ImportError as error:
        if debug:
            raise
        _give_up(
            f"a library that cisformer uses cannot be imported: {error}",
            "install it again: pip install --force-reinstall cisformer-links; --debug shows where it fails",
        )
    except Stopped as stopped:
        if debug:
            raise
        _stopped(stopped.args[0])
    except (MemoryError, RuntimeError) as error:
        if not debug and _lost_another(error):
            sys.exit(1)
        if debug or not _out_of_memory(error):
            raise
        _give_up(
            f"out of memory: {' '.join(str(error).split())[:200]}",
            "lower batch_size (or dim), or use a machine with more memory",
        )


class Stopped(BaseException):
    """A signal asked the command to end. Open writers remove their temporary files as it passes them."""


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise `Stopped`, so that temporary files are removed."""
    raise Stopped(number)


def _stopped(number: int) -> None:
    """Report the signal and exit with 128 + its number, as shells do; worker processes exit without a message."""
    if "RANK" in os.environ:
        sys.exit(128 + number)
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    how = ": it continues where it stopped" if command in ("run", "complete") else ""
    how = "; training continues with --resume FOLDER" if command.endswith("_train") else how
    print(  # noqa: T201
        f"error: stopped by {signal.Signals(number).name}; earlier results are as they were\n"
        f"  hint: run the command again{how}",
        file=sys.stderr,
    )
    sys.exit(128 + number)


def _lost_another(error: Exception) -> bool:
    """Return whether the error is that another process has failed, which has printed the reason."""
    lost = ("closed by peer", "connection", "gloo", "nccl", "store->get")
    return "RANK" in os.environ and any(word in str(error).lower() for word in lost)


def _out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out; torch raises several kinds of `RuntimeError` for that."""
    return (
        isinstance(error, MemoryError) or "out of memory" in str(error) or "not enough memory" in str(error)
    )


def _give_up(message: str, hint: str, *, at_once: bool = False) -> None:
    """Print what is wrong and the next step; exit with code 1.

    If several processes fail in the same way, the first prints: the others wait, and the launcher ends them.
    After a failed write HDF5 crashes while Python shuts down; `at_once` exits without that.
    """
    if not is_main_process():
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)  # noqa: T201
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(1)


def _speak(debug: bool) -> _Recap:
    """Send log messages to stderr; hide the warnings of libraries unless debugging."""
    handler, recap = logging.StreamHandler(sys.stderr), _Recap()
    handler.setFormatter(_Plain())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    ours = logging.getLogger("cisformer")
    ours.setLevel(logging.DEBUG if debug else logging.INFO if is_main_process() else logging.ERROR)
    ours.addHandler(recap)
    if not debug:
        warnings.simplefilter("ignore")
        _hush_destructors()
    return recap


def _hush_destructors() -> None:
    """Handle errors that are raised while Python deletes an object, where no code can catch them.

    HDF5 repeats its error for every object of a file that it could not close: the repeats are hidden. A signal
    that arrives at such a moment would be lost: it is sent again.
    """
    show, show_unraisable = sys.excepthook, sys.unraisablehook

    def repeated(error: BaseException | None) -> bool:
        return isinstance(error, RuntimeError) and str(error).startswith(UNCLOSED)

    def unraisable(found: Any) -> None:
        if isinstance(found.exc_value, Stopped):
            threading.Timer(0.01, os.kill, (os.getpid(), found.exc_value.args[0])).start()
        elif not repeated(found.exc_value):
            show_unraisable(found)

    def uncaught(kind: Any, error: BaseException, trace: Any) -> None:
        if not repeated(error) and not isinstance(error, Stopped):
            show(kind, error, trace)

    sys.excepthook, sys.unraisablehook = uncaught, unraisable


class _Plain(logging.Formatter):
    """Format messages without a prefix; warnings and errors begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"


class _Recap(logging.Handler):
    """Collect our warnings, to repeat them at the end if other lines were printed after them."""

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
