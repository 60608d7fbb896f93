"""From two files to links in one call: inspect, preprocess, train, evaluate, link, summarise.

Each step calls the public function of that name. A step that is done, with the same files and options, is not
repeated; `runtime.journal` keeps the record. In the output folder:

    run.json           which steps are done, and from what
    inspect.json       what the input files are
    data/              preprocessed cells, for each direction
    models/            a folder per training run
    evaluation/        a report page per direction
    cisformer_link/    the links
    links.html         a page to look at them
    summary.txt, index.html
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cisformer.config import DIRECTIONS, Direction, Preset, TrainingChoice
from cisformer.errors import CheckpointError, InputError
from cisformer.run_summary import ARROWS, LINKS_PAGE, RunSummary, summarise
from cisformer.runtime.files import atomic_path
from cisformer.runtime.journal import Facts, Journal, Step, do_steps, fingerprint, fingerprint_of_text

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)
ALL_CELLS = "all cells"
"""The one cell type of cells without types."""
DATA, MODELS, EVALUATION, INSPECTED = "data", "models", "evaluation", "inspect.json"
SIGNIFICANT, LIKELY = 0.05, 0.5
"""Largest false discovery rate, and smallest score, of the links that the summary counts."""


@dataclass(frozen=True)
class RunOptions(TrainingChoice):
    """Options of `run`; checked when the record is made.

    Attributes
    ----------
    groupby
        Column of `obs` with cell types.
    celltype_info
        Table of cell types without header: barcode, cell type. In place of `groupby`.
    reference
        As of `preprocess`; by default the data's own genes and peaks.
    genome
        Assembly of the built-in gene coordinates that ``reference="dataset"`` uses; `None` guesses it from the peaks.
    gtf
        Gene annotation, for the gene coordinates of ``reference="dataset"``.
    preset, epochs, seed
        As of `TrainingChoice`; the seed is also that of evaluation and links.
    """

    groupby: str | None = None
    celltype_info: str | Path | None = None
    reference: str | Path = "dataset"
    genome: str | None = None
    gtf: str | Path | None = None

    def __post_init__(self) -> None:
        if self.groupby is not None and self.celltype_info is not None:
            raise InputError(
                f"cell types are given twice: column {self.groupby!r} and {self.celltype_info}",
                hint="leave one of them out",
            )
        super().__post_init__()


def run(
    rna: str | Path,
    atac: str | Path,
    output_dir: str | Path = "cisformer_run",
    *,
    groupby: str | None = None,
    celltype_info: str | Path | None = None,
    reference: str | Path = "dataset",
    genome: str | None = None,
    gtf: str | Path | None = None,
    preset: Preset = "small",
    epochs: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> RunSummary:
    """Go from a multiome to links: inspect, preprocess, train, evaluate, link.

    Models of both directions are trained, so that one modality can be predicted from the other as well. A second
    call with the same files and options does only the steps that are missing.

    Parameters
    ----------
    rna, atac
        A file or folder with RNA counts, and one with ATAC: peaks, or fragments; may be the same. docs/formats.md lists
        the formats. Fragments are counted on the built-in cCREs of the genes' species, or on those of `reference`.
    output_dir
        Where everything goes.
    groupby
        Column of `obs` with cell types. Without it, and without `celltype_info`, all cells count as one type.
    celltype_info
        Table of cell types without header, separated by tabs: barcode, cell type. In place of `groupby`.
    reference
        As in `preprocess`, but by default ``"dataset"``, the data's own genes and peaks: this works for any genome
        and is fastest. With ``"human"`` or ``"mouse"`` the models can be used on other data, too.
    genome
        ``"hg38"``, ``"hg19"``, ``"mm39"`` or ``"mm10"``: assembly of the built-in gene coordinates that
        ``reference="dataset"`` uses; guessed from the peaks by default.
    gtf
        Gene annotation, for the gene coordinates of ``reference="dataset"``.
    preset
        Size of the models: ``"small"`` trains in minutes on a laptop, and has predicted no worse than ``"default"``
        on sets of up to 10,000 cells.
    epochs
        Maximum number of epochs; by default the preset's.
    seed
        Random seed of the split, of training, evaluation and links.
    force
        Repeat the steps whose files or options have changed, which replaces their results; write into a folder that
        holds something else.

    Returns
    -------
    RunSummary
        What was found, how good the models are, where the files are, and what to do next.

    Raises
    ------
    InputError
        If a file or an option is not what it should be.
    OutputExistsError
        If `output_dir` holds results of other files or options, and `force` is not given.
    """
    options = RunOptions(preset, epochs, seed, groupby, celltype_info, reference, genome, gtf)
    workflow = _Workflow(Path(rna), Path(atac), Path(output_dir), options)
    steps = list(workflow.steps())  # which looks at the files, before anything is written
    workflow.journal = Journal.open(workflow.folder, force=force)
    do_steps(steps, workflow.journal, force=force)
    summary = summarise(workflow.journal, str(rna), workflow.types_told)
    summary.write()
    return summary


def _step(
    verb: str, direction: Direction, made_from: Mapping[str, str], work: Callable[[Direction], Facts]
) -> Step:
    return Step(f"{verb}_{direction}", f"{verb} {ARROWS[direction]}", made_from, lambda: work(direction))


class _Workflow:
    """The steps, and what they share: files, folder, options and cell types.

    Everything that can be wrong with cell types is found here, before any work.
    """

    journal: Journal

    def __init__(self, rna: Path, atac: Path, folder: Path, options: RunOptions) -> None:
        from cisformer.data.preprocess import PreprocessOptions

        options = _with_reference(options, rna, atac)
        self.rna, self.atac, self.folder, self.options = rna, atac, folder, options
        PreprocessOptions(reference=options.reference, genome=options.genome, gtf=options.gtf)  # checked
        self.types, self.types_told = _cell_types(rna, atac, options)
        self.preset = {direction: options.config(direction) for direction in DIRECTIONS}

    # ---- which steps -----------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Yield all steps, each with what it is made from."""
        files = {"the RNA file": fingerprint(self.rna), "the ATAC file": fingerprint(self.atac)}
        cells = files | self._preprocessing()
        model = cells | {"--preset": self.options.preset, "--epochs": str(self.options.epochs)}
        labels = {"--groupby": str(self.options.groupby)}
        types = {"cell types": fingerprint_of_text(_as_text(self.types))}
        yield Step("inspect", "look at the files", files, self.inspect)
        for direction in DIRECTIONS:
            yield _step("preprocess", direction, cells, self.preprocess)
        for direction in DIRECTIONS:
            yield _step("train", direction, model, self.train)
        for direction in DIRECTIONS:
            yield _step("evaluate", direction, model | labels, self.evaluate)
        yield Step("gather", "gather the cells of all splits", cells, self.gather)
        yield Step("link", "link cCREs to genes", model | types, self.link)

    def _preprocessing(self) -> dict[str, str]:
        """Return what the preprocessed cells depend on beside the files."""
        options = self.options
        reference = Path(options.reference)
        about = {
            "--reference": fingerprint(reference) if reference.is_dir() else str(reference),
            "--genome": str(options.genome),
            "--seed": str(options.seed),
        }
        return about if options.gtf is None else about | {"the GTF file": fingerprint(Path(options.gtf))}

    # ---- the steps themselves --------------------------------------------------------------------------------

    def inspect(self) -> Facts:
        """Look at the files."""
        from cisformer.data.inspect import inspect

        report = inspect(list(dict.fromkeys([self.rna, self.atac])))
        with atomic_path(self.folder / INSPECTED) as path:
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        told = ("modality", "n_cells", "n_features", "values")
        return {
            "files": [INSPECTED],
            "found": [{key: file.get(key) for key in told} for file in report["files"]],
        }

    def preprocess(self, direction: Direction, *, manually: bool = False) -> Facts:
        """Align and split the cells; `manually` leaves them together."""
        from cisformer.data.preprocess import preprocess

        stores = preprocess(
            self.rna, self.atac, self.folder / DATA, direction=direction, reference=self.options.reference,
            genome=self.options.genome, gtf=self.options.gtf, config=self.preset[direction], manually=manually,
            seed=self.options.seed, force=True,
        )  # fmt: skip
        reference = next(iter(stores.values())).reference
        return {
            "files": [f"{DATA}/{store.path.name}" for store in stores.values()],
            "n_cells": {split: store.n_cells for split, store in stores.items()},
            "reference": reference.describe(),
            "n_genes_placed": int((reference.genes["start"] >= 0).sum()),
        }

    def train(self, direction: Direction) -> Facts:
        """Train a model; finish a training that was interrupted."""
        from cisformer.training.loop import train

        models, data = self.folder / MODELS, self.folder / DATA
        begun = self.journal.begun(f"train_{direction}")
        mine = [path for path in models.glob(f"*_{direction}") if path.name >= begun]
        resume = max((path for path in mine if (path / "config.yaml").is_file()), default=None)
        config = self.preset[direction]
        try:
            best = train(data, direction, direction=direction, save=models, config=config, resume=resume)
        except CheckpointError as error:
            if resume is None:
                raise
            logger.warning("%s; training starts again from the beginning", error.message)
            best = train(data, direction, direction=direction, save=models, config=config)
        assert best.folder is not None
        model = f"{MODELS}/{best.folder.parent.name}"
        return {"files": [f"{model}/best"], "model": model}

    def evaluate(self, direction: Direction) -> Facts:
        """Evaluate a model on the test cells, beside baselines."""
        from cisformer.evaluation.evaluate import evaluate_model
        from cisformer.evaluation.report import write_report

        report = evaluate_model(
            self.folder / DATA, self._model(direction), cell_type=self.options.groupby, seed=self.options.seed
        )
        page, numbers = write_report(report, self.folder / EVALUATION / direction, force=True)
        files = [str(path.relative_to(self.folder).as_posix()) for path in (page, numbers)]
        return {"files": files, "verdict": report.verdict, "standing": report.standing}

    def gather(self) -> Facts:
        """Write the cells of all splits together: rare types need every cell, and no link is judged on test cells."""
        return self.preprocess("atac2rna", manually=True) if self._can_link else {"files": []}

    def link(self) -> Facts:
        """Link cCREs to genes and make a page of it, or say why that cannot be."""
        if not self._can_link:
            return {"files": [], "skipped": "no gene has coordinates, so no cCRE is near any"}
        from cisformer.analysis.browse import browse
        from cisformer.links.score import link

        cells = self.folder / self.journal.facts("gather")["files"][0]
        folder = link(
            self._model("atac2rna"), cells, self.types, self.folder, seed=self.options.seed, force=True
        )
        counts = _count_links(folder / "links.tsv.gz")
        if not counts["best_gene"]:
            return {"files": [folder.name]} | counts
        browse(folder, self.folder / LINKS_PAGE, min_score=0.0, title=self.folder.resolve().name)
        return {"files": [folder.name, LINKS_PAGE]} | counts

    @property
    def _can_link(self) -> bool:
        return bool(self.journal.facts("preprocess_atac2rna")["n_genes_placed"])

    def _model(self, direction: Direction) -> Path:
        return self.folder / str(self.journal.facts(f"train_{direction}")["model"])


def _count_links(path: Path) -> Facts:
    """Count scored pairs, significant and likely ones, and name the gene of the highest score."""
    import pandas as pd

    n_pairs, n_significant, n_likely, best_score, best_gene = 0, 0, 0, float("-inf"), ""
    missing = {"score": [""], "fdr": [""]}  # a gene may be called NA
    tables = pd.read_csv(
        path, sep="\t", usecols=["gene_name", *missing], keep_default_na=False, na_values=missing,
        dtype={"gene_name": str}, chunksize=500_000,
    )  # fmt: skip
    for table in tables:
        n_pairs += len(table)
        n_significant += int((table["fdr"] <= SIGNIFICANT).sum())
        n_likely += int((table["score"] >= LIKELY).sum())
        if table["score"].max() > best_score:
            top = table.loc[table["score"].idxmax()]
            best_score, best_gene = float(top["score"]), str(top["gene_name"])
    counts = {"n_pairs": n_pairs, "n_significant": n_significant, "n_likely": n_likely}
    return counts | {"best_gene": best_gene}


# ---------------------------------------------------------------------------------------------- cell types


def _with_reference(options: RunOptions, rna: Path, atac: Path) -> RunOptions:
    """Return the options; for fragments, which have no cCREs of their own, with the built-in reference of the genes."""
    from cisformer.data.alignment import describe_genes
    from cisformer.data.containers import is_fragments_file
    from cisformer.data.features import gene_identity
    from cisformer.data.known_genomes import GENOMES
    from cisformer.data.sources import open_rows

    if str(options.reference) != "dataset" or not is_fragments_file(atac):
        return options
    if options.gtf is not None:
        raise InputError(
            f"{atac} holds fragments, which are counted on the cCREs of a reference; a GTF has no cCREs",
            hint="leave --gtf out, or make a reference: cisformer build_reference --gtf GTF --peaks BED -o DIR",
        )
    with open_rows(rna, "rna") as source:
        named_by, species = describe_genes(gene_identity(source.var)["gene_id"])
    species = GENOMES.get(options.genome or "", species)
    if not species:
        raise InputError(
            f"{atac} holds fragments, but nothing says on which cCREs to count them; the genes are {named_by}",
            hint="give --reference human, mouse, or a folder of `cisformer build_reference`",
        )
    logger.info(
        "%s: fragments, counted on the built-in cCREs of %s (the species of the genes)", atac, species
    )
    return replace(options, reference=species)


def _cell_types(rna: Path, atac: Path, options: RunOptions) -> tuple[pd.Series, str]:
    """Return the type of each cell by barcode, and where it is from, in words."""
    import pandas as pd

    from cisformer.data.containers import is_fragments_file
    from cisformer.data.sources import open_rows
    from cisformer.links.files import read_cell_types

    with open_rows(rna, "rna") as source:
        obs = source.obs
    if options.celltype_info is not None:
        types = read_cell_types(options.celltype_info)
        _require_known(types, obs.index, str(options.celltype_info))
        return types, f"{types.nunique()} cell types, from {options.celltype_info}"
    if options.groupby is None:
        return pd.Series(ALL_CELLS, index=obs.index), "no cell types were given: all cells count as one type"
    if options.groupby not in obs and not is_fragments_file(atac):
        with open_rows(atac, "atac") as source:
            obs = obs.join(source.obs, rsuffix="_atac")
    types = _column(obs, options.groupby)
    untyped = f"; {len(obs) - len(types):,} cells have none, and no links" if len(types) < len(obs) else ""
    return types, f"{types.nunique()} cell types, from column {options.groupby!r}{untyped}"


def _require_known(types: pd.Series, barcodes: pd.Index, source: str) -> None:
    if not types.index.isin(barcodes).any():
        raise InputError(
            f"none of the {len(types)} barcodes in {source} is in the data: "
            f"{', '.join(types.index[:3])} against {', '.join(barcodes[:3])}",
            hint="use the same barcodes as the RNA file",
        )


def _column(obs: pd.DataFrame, name: str) -> pd.Series:
    """Return the named cells of a column as text; `InputError` where it is not one of cell types."""
    if name not in obs:
        known = ", ".join(map(str, obs.columns)) or "none"
        close = difflib.get_close_matches(name, obs.columns.astype(str), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "give the types in a table with --celltype_info"
        raise InputError(f"obs has no column {name!r}; it has {known}", hint=hint)
    types = obs[name].dropna().astype(str)
    types = types[types.str.strip() != ""]
    if types.empty:
        raise InputError(f"column {name!r} of obs is empty", hint="name another column with --groupby")
    if 2 * types.nunique() > len(types) > 10:
        raise InputError(
            f"column {name!r} of obs holds {types.nunique():,} different values for {len(types):,} cells",
            hint="name a column of cell types or clusters with --groupby",
        )
    return types


def _as_text(types: pd.Series) -> str:
    return "\n".join(f"{barcode}\t{name}" for barcode, name in types.items())
