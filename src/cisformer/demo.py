"""All steps on simulated cells: preprocess, train, predict and evaluate in both directions, and link.

Every step is the command that a user would type, run in a process of its own and printed before it runs.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

from cisformer.errors import CisformerError
from cisformer.runtime.files import refuse_existing

logger = logging.getLogger(__name__)
SIZES = {False: (1_000, 2_000, 12_000), True: (200, 200, 1_200)}
"""Cells, genes and cCREs of the demo, and of the quick one."""


def run_demo(folder: str | Path, *, quick: bool = False, seed: int = 0, force: bool = False) -> list[Path]:
    """Run the demo in `folder` and return what it made.

    Parameters
    ----------
    quick
        A fifth of the cells and a tenth of the features, one epoch: does it run at all?

    Raises
    ------
    OutputExistsError
        `folder` has something in it and `force` is not given.
    CisformerError
        A step failed.
    """
    folder = Path(folder)
    refuse_existing(folder, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for step in demo_commands(quick=quick, seed=seed):
        _run([_latest_run(folder, word) if word.startswith("save/") else word for word in step], folder)
    logger.info("the demo took %.0f s", time.monotonic() - started)
    return [path for path in demo_results(folder) if path.exists()]


def demo_commands(*, quick: bool, seed: int) -> list[list[str]]:
    """Return the commands of the demo, without the leading `cisformer`, to be run in its folder.

    A word `save/NAME` stands for the newest training run in there.
    """
    n_cells, n_genes, n_ccres = SIZES[quick]
    simulate = ["simulate", "-o", "data", "--n_cells", str(n_cells), "--n_genes", str(n_genes),
                "--n_ccres", str(n_ccres), "--seed", str(seed), "--force"]  # fmt: skip
    commands = [simulate, ["generate_default_config", "--preset", "small", "--force"]]
    for direction, flag in (("rna2atac", []), ("atac2rna", ["--atac2rna"])):
        commands.append(["data_preprocess", "-r", "data/rna.h5ad", "-a", "data/atac.h5ad", "-s", "preprocessed",
                         "--reference", "dataset", "--force", *flag])  # fmt: skip
        given = (["-t", "preprocessed/rna2atac_train", "-v", "preprocessed/rna2atac_val"]
                 if direction == "rna2atac" else ["-d", "preprocessed"])  # fmt: skip
        commands.append([f"{direction}_train", *given, "-n", direction])
    commands += [
        ["rna2atac_predict", "-r", "preprocessed/rna2atac_test", "-m", "save/rna2atac", "-o", "output",
         "--batch_size", "64", "--force"],
        ["atac2rna_predict", "-d", "preprocessed/atac2rna_test", "-m", "save/atac2rna", "-o", "output", "--force"],
        ["evaluate", "--data", "preprocessed", "-m", "save/rna2atac", "-o", "output/evaluate_rna2atac", "--force"],
        ["evaluate", "--data", "preprocessed", "-m", "save/atac2rna", "-o", "output/evaluate_atac2rna", "--force"],
        ["atac2rna_link", "-d", "preprocessed/atac2rna_train/atac2rna_0.pt", "-c", "data/celltype_info.tsv",
         "-m", "save/atac2rna", "-o", "output", "-n", "200", "--formats", "bedpe,interact", "--force"],
    ]  # fmt: skip
    return commands


def demo_results(folder: Path) -> list[Path]:
    """Return the files to open after the demo."""
    output = folder / "output"
    return [
        output / "cisformer_predicted_atac.h5ad",
        output / "cisformer_predicted_rna.h5ad",
        output / "evaluate_rna2atac" / "report.html",
        output / "evaluate_atac2rna" / "report.html",
        output / "cisformer_link" / "links.tsv.gz",
        *sorted((output / "cisformer_link").glob("*.interact*")),
        *sorted((output / "cisformer_link").glob("*.bedpe*")),
    ]


def _run(step: list[str], folder: Path) -> None:
    print(f"$ cisformer {' '.join(step)}", flush=True)  # noqa: T201
    finished = subprocess.run([sys.executable, "-m", "cisformer", *step], cwd=folder, check=False)
    if finished.returncode:
        raise CisformerError(
            f"`cisformer {' '.join(step)}` ended with exit code {finished.returncode}",
            hint="see the lines above",
        )


def _latest_run(folder: Path, save: str) -> str:
    """Return the newest run of a name; run folders are called `<date>_<name>`."""
    name = save.removeprefix("save/")
    runs = sorted(path for path in (folder / "save").glob(f"*_{name}") if (path / "best").is_dir())
    if not runs:
        raise CisformerError(
            f"no finished training run '{name}' in {folder / 'save'}", hint="see the lines above"
        )
    return str(runs[-1].relative_to(folder))
