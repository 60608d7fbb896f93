"""Exceptions of cisformer.

Every error that a user can correct is a :class:`CisformerError`: its message says what went wrong, where, what was
found and what was wanted; its hint says what to do next. The command line prints both and no traceback.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class CisformerError(Exception):
    """Base of all errors that a user can correct.

    Parameters
    ----------
    message
        What, where, found, wanted: one line.
    hint
        The next step.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InputError(CisformerError):
    """A user's file or AnnData is not what the command needs."""


class ConfigError(CisformerError):
    """A configuration file or value is not acceptable."""


class ReferenceMismatchError(CisformerError):
    """Two parts were made with different gene and cCRE references."""


class StoreError(CisformerError):
    """A preprocessed data set is missing, damaged, or of an unknown version."""


class CheckpointError(CisformerError):
    """A checkpoint is missing, damaged, or of another direction, config or version."""


class OutputExistsError(CisformerError):
    """Writing would overwrite earlier results."""


class WriteError(CisformerError):
    """A result cannot be written: the disk is full or read-only, or the user may not write there."""


class TrainingError(CisformerError):
    """Training cannot start or cannot continue."""


def brief(value: object) -> str:
    """Return the `repr` of a value from a file, cut to one line, since it may be of any kind and size."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother = 2, 80, 80
    try:
        return shown.repr(value)
    except ValueError:  # a number of thousands of digits
        return f"too long a {type(value).__name__}"


def first_complaint(error: ValidationError) -> str:
    """Return the first error of pydantic: which entry, what was found, what is wrong with it."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))} is {brief(first['input'])}; {first['msg'].lower()}"
