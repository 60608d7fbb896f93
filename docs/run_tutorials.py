"""Run the tutorials: the code blocks of a page, in order, in an empty folder.

    python docs/run_tutorials.py docs/tutorials/links.md             run, and compare with what the page shows
    python docs/run_tutorials.py --refresh docs/tutorials/*.md       run, and write outputs and figures anew

A page's ```bash blocks run in a shell, its ```python blocks in one namespace. A ```text block right after a code block
is that block's output; where there is none, the output is not shown. Figures are PNG files that the code writes and
the page shows from `_static/tutorials`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIGURES = Path(__file__).parent / "_static" / "tutorials"
BLOCK = re.compile(
    r"^```(?P<language>bash|python)\n(?P<code>.*?)^```\n(?:\n```text\n(?P<shown>.*?)^```\n)?", re.M | re.S
)
FIGURE = re.compile(r"_static/tutorials/([\w.-]+\.png)")
RUN_DATE = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
OUTCOME = re.compile(r"(?<= )[-+=](?= |$)")
VERDICT = "The model "
WIDTH, COLOURS = 1200, 256


@dataclass(frozen=True)
class Block:
    """Code of a page, and the output that the page shows for it, if any."""

    language: str
    code: str
    shown: str | None


def blocks_of(text: str) -> list[Block]:
    """Return the code blocks of a page in order."""
    return [Block(m["language"], m["code"], m["shown"]) for m in BLOCK.finditer(text)]


def run_blocks(blocks: list[Block]) -> Iterator[str]:
    """Run blocks in the current folder; yield what each prints."""
    os.environ["MPLBACKEND"] = "Agg"
    namespace: dict[str, object] = {"__name__": "__main__"}
    with tempfile.TemporaryDirectory() as folder:
        _offer_command(Path(folder))
        for block in blocks:
            printed = _shell(block.code) if block.language == "bash" else _python(block.code, namespace)
            yield RUN_DATE.sub("2026-01-31_12-00-00", printed)


def _offer_command(folder: Path) -> None:
    """Put a `cisformer` on the path that is this very Python's, installed as a command or not."""
    command = folder / "cisformer"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cisformer "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def _shell(code: str) -> str:
    command = ["bash", "-euo", "pipefail", "-c", code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _python(code: str, namespace: dict[str, object]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "<tutorial>", "exec"), namespace)
    return printed.getvalue()


def differences(shown: str, printed: str) -> list[str]:
    """Return the lines in which two outputs differ: words and layout count, numbers to about a quarter.

    Other machines add up in another order, and training carries such differences on.
    """
    ours, theirs = shown.splitlines(), printed.splitlines()
    if len(ours) != len(theirs):
        return [f"{len(ours)} lines shown, {len(theirs)} printed:\n{printed}"]
    return [f"{a!r} shown, {b!r} printed" for a, b in zip(ours, theirs, strict=True) if not _alike(a, b)]


def _alike(shown: str, printed: str) -> bool:
    if shown.startswith(VERDICT) and printed.startswith(VERDICT):
        return True  # who wins by a hair is another matter on another machine, and so is the sentence
    shown, printed = (OUTCOME.sub("=", re.sub(r"(?<=\d),(?=\d{3})", "", line)) for line in (shown, printed))
    if NUMBER.sub("#", shown).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(abs(float(a) - float(b)) <= 0.05 + 0.25 * max(abs(float(a)), abs(float(b))) for a, b in pairs)


def refreshed(text: str, outputs: list[str]) -> str:
    """Return a page with the outputs it shows replaced."""
    remaining = iter(outputs)

    def renew(match: re.Match[str]) -> str:
        printed = next(remaining)
        if match["shown"] is None:
            return match[0]
        return f"```{match['language']}\n{match['code']}```\n\n```text\n{printed.rstrip()}\n```\n"

    return BLOCK.sub(renew, text)


def run_page(page: Path, *, refresh: bool) -> list[str]:
    """Run a page in the current folder; return what is wrong with it, or renew it."""
    text = page.read_text(encoding="utf-8")
    blocks = blocks_of(text)
    outputs = list(run_blocks(blocks))
    missing = [name for name in FIGURE.findall(text) if not Path(name).is_file()]
    if missing:
        return [f"the code made no {name}" for name in missing]
    if refresh:
        page.write_text(refreshed(text, outputs), encoding="utf-8")
        for name in FIGURE.findall(text):
            _shrink(Path(name), FIGURES / name)
        return []
    shown = [(b.shown, out) for b, out in zip(blocks, outputs, strict=True) if b.shown is not None]
    return [line for pair in shown for line in differences(*pair)]


def _shrink(figure: Path, target: Path) -> None:
    """Copy a figure as wide as a page shows it, in a palette: a fifth of the bytes."""
    from PIL import Image

    with Image.open(figure) as image:
        small = image.convert("RGB")
        small.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        small.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)


def main() -> None:
    """Run the pages given."""
    parser = argparse.ArgumentParser(description="Run the code of tutorials.")
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--refresh", action="store_true", help="write outputs and figures into the pages")
    options = parser.parse_args()
    wrong = []
    for page in [page.resolve() for page in options.pages]:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            wrong += [f"{page.name}: {line}" for line in run_page(page, refresh=options.refresh)]
    print("\n".join(wrong), end="\n" if wrong else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
