"""The origin that files record: package, version, command and time."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def package_version() -> str:
    """Return the version of the installed package."""
    from cisformer import __version__

    return __version__


def provenance(**extra: Any) -> dict[str, Any]:
    """Return the record that every file we write carries: package, version and `extra`.

    Time and command line are not in it, so that the same work gives the same bytes; see `occasion`.
    """
    return {"package": "cisformer", "version": package_version(), **extra}


def occasion() -> dict[str, str]:
    """Return when and by which command a file was made, for manifests and reports."""
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
