"""Which package this is, and whether another one of the same import name shares its environment.

The published tool is called `cisformer` on PyPI. This package is another one, under a name of its own; both put their
modules into a folder `cisformer`, so whichever is installed last overwrites files of the other.
"""

from __future__ import annotations

DISTRIBUTION = "cisformer-links"
"""What this package is called where packages are listed; import and command are `cisformer`."""
_AUTHOR = "The cisformer authors"


def clash() -> str | None:
    """Return what is wrong and how to mend it, in one line, where the published tool is installed too."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        other = metadata("cisformer")
    except PackageNotFoundError:
        return None
    if "Author" in other and other["Author"] == _AUTHOR:  # this package, from before it had a name of its own
        return None
    return (
        f"the published tool cisformer {other['Version']} is installed in the same environment, and the two overwrite "
        f"files of each other; run `pip uninstall cisformer`, then install {DISTRIBUTION} with --force-reinstall"
    )
