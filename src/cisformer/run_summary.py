"""The summary of a run in plain words: for the terminal, a text file and a page."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from cisformer.config import DIRECTIONS, Direction
from cisformer.runtime.files import atomic_path
from cisformer.runtime.journal import Facts, Journal
from cisformer.runtime.pages import render_page

ARROWS: dict[Direction, str] = {"rna2atac": "RNA→ATAC", "atac2rna": "ATAC→RNA"}
TEXT, PAGE, LINKS_PAGE = "summary.txt", "index.html", "links.html"


@dataclass(frozen=True)
class RunSummary:
    """What `cisformer.run` found, and where it is.

    Attributes
    ----------
    folder
        The output folder.
    found
        What the data are, a sentence each.
    verdicts
        How good the model of each direction is, compared with simple methods, on cells not used for training.
    links
        How many links there are, or why there are none.
    files
        What lies in the folder: name, and what it is.
    next_steps
        What to do now: why, and the command.
    seconds
        How long the steps took.
    """

    folder: Path
    found: tuple[str, ...]
    verdicts: dict[Direction, str]
    links: tuple[str, ...]
    files: tuple[tuple[str, str], ...]
    next_steps: tuple[tuple[str, str], ...]
    seconds: float

    @property
    def paragraphs(self) -> dict[str, list[str]]:
        """Heading and sentences of each part but the files and the next steps."""
        verdicts = [f"{ARROWS[direction]}: {verdict}" for direction, verdict in self.verdicts.items()]
        return {
            "What was found": list(self.found),
            "How good the models are, on test cells": verdicts,
            "Links": list(self.links),
        }

    def text(self) -> str:
        """Return the summary as text."""
        parts = [
            "\n".join([heading, *(f"  - {line}" for line in lines)])
            for heading, lines in self.paragraphs.items()
        ]
        width = max(len(name) for name, _ in self.files)
        files = [f"  {name:<{width}}  {what}" for name, what in self.files]
        parts.append("\n".join([f"Files, in {self.folder}", *files]))
        parts.append("\n".join(["Next", *(f"  - {why}\n      {what}" for why, what in self.next_steps)]))
        return "\n\n".join([*parts, f"All steps together took {_duration(self.seconds)}."])

    def write(self) -> tuple[Path, Path]:
        """Write `summary.txt` and `index.html` into the folder, and return their paths."""
        text, page = self.folder / TEXT, self.folder / PAGE
        for path, content in ((text, self.text() + "\n"), (page, self._render())):
            with atomic_path(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
        return text, page

    def _render(self) -> str:
        return render_page(
            "cisformer", "run.html", within="resources",
            summary=self, took=_duration(self.seconds), folder=self.folder.resolve().name,
        )  # fmt: skip


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


def summarise(journal: Journal, rna: str, types: str) -> RunSummary:
    """Put into words what the steps found.

    Parameters
    ----------
    journal
        Of a run whose steps are all done.
    rna
        The RNA file, for the example of a next step.
    types
        Where the cell types are from, in words.

    Returns
    -------
    The summary, which is not written yet.
    """
    links = journal.facts("link")
    return RunSummary(
        folder=journal.folder,
        found=(*_found(journal), types),
        verdicts={direction: journal.facts(f"evaluate_{direction}")["verdict"] for direction in DIRECTIONS},
        links=tuple(_about_links(links)),
        files=tuple(_files(journal, links)),
        next_steps=tuple(_next_steps(journal, links, rna, types)),
        seconds=journal.seconds(),
    )


def _found(journal: Journal) -> list[str]:
    lines = [
        "ATAC: fragments"
        if about["values"] == "fragments"
        else f"{about['modality'].upper()}: {about['n_cells']:,} cells × {about['n_features']:,} "
        f"{'genes' if about['modality'] == 'rna' else 'peaks'}, {about['values']}"
        for about in journal.facts("inspect")["found"]
    ]
    preprocessed = journal.facts("preprocess_atac2rna")
    splits = preprocessed["n_cells"]
    lines.append(f"reference: {preprocessed['reference']}")
    lines.append(
        f"{sum(splits.values()):,} cells have both: {splits['train']:,} to train on, {splits['val']:,} to choose "
        f"the best epoch, {splits['test']:,} to test"
    )
    return lines


def _about_links(links: Facts) -> list[str]:
    if "skipped" in links:
        return [f"none: {links['skipped']}"]
    if not links["best_gene"]:
        return ["none: no gene has an open cCRE within the largest distance"]
    return [
        f"{links['n_pairs']:,} pairs of gene and cCRE are scored, over all cell types",
        f"{links['n_significant']:,} of them have a false discovery rate of at most 5 %: expression and accessibility "
        "vary together from cell to cell within the type, more than sequencing depth explains",
        f"{links['n_likely']:,} have a score of at least 0.5. Use the score to rank pairs: it was calibrated on "
        "screens of one cell line, and may be too high or too low on these cells. Test what matters to you",
    ]


def _files(journal: Journal, links: Facts) -> list[tuple[str, str]]:
    files = [(PAGE, "this summary as a page, with links to the reports")]
    if LINKS_PAGE in links["files"]:
        files.append((LINKS_PAGE, "a page to explore the links: search a gene, sort, filter, download"))
    if "skipped" not in links:
        files.append(
            ("cisformer_link/links.tsv.gz", "one row per cell type and pair: score, effect, p-value, FDR")
        )
        files.append(("cisformer_link/*.h5ad", "the same per cell type, genes × cCREs"))
    for direction in DIRECTIONS:
        report = journal.facts(f"evaluate_{direction}")["files"][0]
        files.append((report, f"{ARROWS[direction]} compared with simple methods"))
    for direction in DIRECTIONS:
        files.append((journal.facts(f"train_{direction}")["model"], f"model {ARROWS[direction]}"))
    return [
        *files,
        ("data", "preprocessed cells"),
        ("run.json", "finished steps, with their input files and options"),
    ]


def _next_steps(journal: Journal, links: Facts, rna: str, types: str) -> list[tuple[str, str]]:
    folder = journal.folder
    steps = []
    if "skipped" in links:
        steps.append(
            (
                "give the genes coordinates, and run again",
                "the same command with --genome GENOME or --gtf GTF, and --force",
            )
        )
    elif types.startswith("no cell types"):
        steps.append(
            (
                "links per cell type: name the column that holds them",
                "the same command with --groupby COLUMN --force",
            )
        )
    if links.get("best_gene"):
        where = shlex.quote(str(folder / "cisformer_link"))
        gene = shlex.quote(links["best_gene"])
        picture, track = (shlex.quote(str(folder / name)) for name in ("links.png", "links.bedpe"))
        steps += [
            ("draw a gene with its links", f"cisformer plot_links -l {where} -g {gene} -o {picture}"),
            (
                "look at the best links in IGV",
                f"cisformer export_links -l {where} -o {track} --top_per_gene 3",
            ),
        ]
    model = shlex.quote(str(folder / journal.facts("train_rna2atac")["model"]))
    output = shlex.quote(str(folder / "predicted"))
    steps.append(
        ("predict the accessibility of cells with RNA only",
         f"cisformer rna2atac_predict -r {shlex.quote(rna)} -m {model} -o {output}")
    )  # fmt: skip
    return steps
