"""A record of the steps done in a folder, so that a second run does only the missing ones."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cisformer.errors import InputError, OutputExistsError, StoreError
from cisformer.runtime.files import atomic_path, make_folder, read_json, sha256_file
from cisformer.runtime.provenance import occasion, provenance

logger = logging.getLogger(__name__)

FORMAT = "cisformer-run"
FORMAT_VERSION = 1
FILE = "run.json"
STAMP = "%Y-%m-%d_%H-%M-%S"
"""How times are written, so that their order is that of text; folders of training runs begin so."""

Facts = dict[str, Any]
"""Results of a step, in types that JSON has. `files` lists the files it wrote, relative to the folder."""


class Journal:
    """The steps of a run, in a file that is rewritten after each of them.

    A step is done if it finished, its inputs and options are unchanged, and its files still exist.

    Parameters
    ----------
    folder
        Where the run writes.
    steps
        By name: what each step was made from, whether it is done, and its facts.
    """

    def __init__(self, folder: Path, steps: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self._steps = steps

    @classmethod
    def open(cls, folder: Path, *, force: bool) -> Journal:
        """Open the journal of a folder, or begin one in a new or empty folder.

        Raises
        ------
        OutputExistsError
            The folder holds something else, and `force` is not given.
        StoreError
            The journal cannot be read.
        """
        path = folder / FILE
        if path.is_file():
            return cls(folder, _read(path))
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not force):
            raise OutputExistsError(
                f"{folder} exists already, and no earlier run has written it (it has no run.json)",
                hint="choose another output folder, or write into this one with --force",
            )
        make_folder(folder)
        journal = cls(folder, {})
        journal._write()
        return journal

    def is_done(self, step: str, made_from: Mapping[str, str]) -> bool:
        """Whether a step was done with the present files and options."""
        known = self._steps.get(step, {})
        return known.get("done", False) and known["made_from"] == dict(made_from) and self._has_files(step)

    def changes(self, step: str, made_from: Mapping[str, str]) -> list[str]:
        """Return what has changed since a step was done; nothing where it was never done."""
        known = self._steps.get(step, {})
        if not known.get("done", False):
            return []
        before = known["made_from"]
        names = dict.fromkeys([*made_from, *before])
        return [name for name in names if made_from.get(name) != before.get(name)]

    def begin(self, step: str, made_from: Mapping[str, str]) -> None:
        """Record that a step begins; an interrupted step with the same inputs and options continues."""
        known = self._steps.get(step, {})
        if known.get("done", True) or known["made_from"] != dict(made_from):
            now = datetime.now().strftime(STAMP)
            self._steps[step] = {"made_from": dict(made_from), "done": False, "begun": now}
            self._write()

    def begun(self, step: str) -> str:
        """Return when the present attempt at a step was first begun, in the format `STAMP`."""
        return str(self._steps[step]["begun"])

    def finish(self, step: str, facts: Facts, seconds: float) -> None:
        """Record that a step is done, and its results."""
        self._steps[step] |= {"done": True, "seconds": round(seconds, 1), "facts": facts}
        self._write()

    def facts(self, step: str) -> Facts:
        """Return what a finished step found."""
        facts: Facts = self._steps[step]["facts"]
        return facts

    def seconds(self) -> float:
        """Return how long all finished steps took together, in the runs that did them."""
        return float(sum(step.get("seconds", 0.0) for step in self._steps.values()))

    def _has_files(self, step: str) -> bool:
        return all((self.folder / name).exists() for name in self._steps[step]["facts"]["files"])

    def _write(self) -> None:
        about = {"format": FORMAT, "format_version": FORMAT_VERSION, "steps": self._steps}
        with atomic_path(self.folder / FILE) as path:
            text = json.dumps(about | {"provenance": provenance(**occasion())}, indent=1)
            path.write_text(text + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        about = read_json(path)
        if about["format"] != FORMAT or about["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it is of format {about['format']!r} {about['format_version']!r}")
        steps: dict[str, dict[str, Any]] = about["steps"]
        for step in steps.values():
            _ = step["made_from"], step["begun"], step["done"] and step["facts"]["files"]
        return steps
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} does not say which steps are done: {error!r}",
            hint="remove it, and run again with --force: then all steps are repeated",
        ) from error


@dataclass(frozen=True)
class Step:
    """A part of the run.

    Attributes
    ----------
    name, title
        In the journal, and for people.
    made_from
        Everything that its result depends on, by what people call it.
    work
        Do it, and return what was found.
    """

    name: str
    title: str
    made_from: Mapping[str, str]
    work: Callable[[], Facts]


def do_steps(steps: list[Step], journal: Journal, *, force: bool) -> None:
    """Do the steps that are not done yet, and record their results.

    Raises
    ------
    OutputExistsError
        A step that is done would be done again from other things, and `force` is not given. Nothing is done then.
    """
    _refuse_changes(journal, steps, force)
    for number, step in enumerate(steps, 1):
        _do(step, journal, f"step {number} of {len(steps)}, {step.title}")


def _do(step: Step, journal: Journal, heading: str) -> None:
    if journal.is_done(step.name, step.made_from):
        logger.info("%s: done already", heading)
        return
    logger.info("%s", heading)
    journal.begin(step.name, step.made_from)
    started = time.monotonic()
    facts = step.work()
    journal.finish(step.name, facts, time.monotonic() - started)


def _refuse_changes(journal: Journal, steps: list[Step], force: bool) -> None:
    """Raise `OutputExistsError` if a finished step would run again with other inputs or options."""
    changed = {step.title: journal.changes(step.name, step.made_from) for step in steps}
    changed = {title: changes for title, changes in changed.items() if changes}
    if changed and not force:
        what = ", ".join(dict.fromkeys(change for changes in changed.values() for change in changes))
        raise OutputExistsError(
            f"{journal.folder} holds the results of an earlier run, and this has changed since: {what}",
            hint=f"choose another output folder, or repeat the changed steps ({', '.join(changed)}) with --force",
        )


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files of a folder.

    Raises
    ------
    InputError
        There is no such file.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = (f"{file.relative_to(path).as_posix()} {sha256_file(file)}" for file in files)
        return fingerprint_of_text("\n".join(lines))
    if not path.is_file():
        raise InputError(f"there is no file {path}", hint="check the path")
    return sha256_file(path)


def fingerprint_of_text(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
