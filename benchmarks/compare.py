"""Compare cisformer with its closed form, the baselines and other tools: every set, one run, two tables.

    python benchmarks/compare.py [WORK] --data ../shared/data [--sets sim_2000 mop_without_Astro …]
        [--multivi ENV/bin/python] [--scbutterfly ENV/bin/python] [--minutes 15] [--seed 0]

Each set goes through the commands that a user would type (`data_preprocess --reference dataset`, `*_train` with
the small preset, and again with `epoch: 0` for the closed form); the test cells are scored by the package's own
`evaluate_case`, all methods in one bootstrap. The second table is of cells unlike those that were trained on: batches
kept together (`--split-by`), or a donor or cell type that training has not seen. Results are kept in WORK/results.json,
so that a second run adds what is missing; WORK/results.md has the tables, a brief form of them for the README, and each
set at length. Times are wall-clock and CPU seconds of the whole process, memory its largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from compare_tables import LINEAR, OURS, pages

from cisformer.config import DIRECTIONS, Direction, default_config, dump_config
from cisformer.data.store import CellStore, find_split
from cisformer.evaluation.case import Case
from cisformer.evaluation.case_files import TrainingFiles, case_of_files
from cisformer.evaluation.case_store import case_of_store
from cisformer.evaluation.evaluate import EvaluationReport, evaluate_case
from cisformer.evaluation.probabilities import PROBABILITY_FLOOR
from cisformer.model.checkpoint import Checkpoint, load_checkpoint
from cisformer.prediction.predict import predict
from cisformer.simulation import simulate

HERE = Path(__file__).parent
SIMULATED = {"sim_2000": (2000, 5000, 40_000), "sim_500": (500, 1000, 6000)}


@dataclass(frozen=True)
class DataSet:
    """Cells of a folder of DATA, or simulated, and which are tested on: a fifth at random unless `column` is given.

    Attributes
    ----------
    name, source
        What the table calls it; the folder.
    column
        Column of obs: its values are kept together.
    left_out
        The value of it that is tested on, all others being trained on; by default a fifth is drawn.
    """

    name: str
    source: str
    column: str | None = None
    left_out: str | None = None


REAL = ("snareseq_mop_10309", "scicar_a549_2641", "bmmc_starter_A", "bmmc_starter_B", "scpoem_S1_300")
RANDOM = [DataSet(name, name) for name in (*REAL, *SIMULATED)]
SHIFTED = [
    DataSet("mop_by_batch", "snareseq_mop_10309", "batch"),
    DataSet("mop_without_Astro", "snareseq_mop_10309", "cell_type", "Astro"),
    DataSet("bmmc_A_without_CD14+_Mono", "bmmc_starter_A", "cell_type", "CD14+ Mono"),
    DataSet("bmmc_A_s1d1_to_s1d2", "bmmc_starter_A", "batch", "s1d2"),
    DataSet("bmmc_A_s1d2_to_s1d1", "bmmc_starter_A", "batch", "s1d1"),
    DataSet("bmmc_B_s1d1_to_s1d2", "bmmc_starter_B", "batch", "s1d2"),
    DataSet("bmmc_B_s1d2_to_s1d1", "bmmc_starter_B", "batch", "s1d1"),
]
SETS = {one.name: one for one in (*RANDOM, *SHIFTED)}


@dataclass(frozen=True)
class Cost:
    """What a process took."""

    wall_s: float
    cpu_s: float
    peak_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, nargs="?", default=Path("compare"))
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--directions", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--multivi", type=Path, help="python of an environment with scvi-tools")
    parser.add_argument("--scbutterfly", type=Path, help="python of an environment with scButterfly")
    parser.add_argument(
        "--minutes",
        type=float,
        default=15,
        help="most CPU minutes that MultiVI trains; others are ended at twice that",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.sets:
        for direction in options.directions:
            key = f"{name} {direction}"
            if key not in results:
                print(f"== {key}", flush=True)
                results[key] = run_set(SETS[name], direction, options)
                kept.write_text(json.dumps(results, indent=1))
    text = pages(results, [one.name for one in RANDOM], [one.name for one in SHIFTED])
    (options.work / "results.md").write_text(text)
    print(text)


# ---------------------------------------------------------------------------------------------- one set


def run_set(one: DataSet, direction: Direction, options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, train, predict and score one set in one direction."""
    folder = (options.work / one.name).resolve()
    files = source(one, folder, options)
    data = folder / direction
    if one.left_out is not None:
        test, files = leave_out(one, files, folder)
    asked = ["--manually"] if one.left_out is not None else ["--split-by", one.column] if one.column else []
    costs = {"preprocess": cisformer(
        ["data_preprocess", "-r", files["rna"], "-a", files["atac"], "-s", data, "--reference", "dataset", "--force",
         "--seed", options.seed, *(["--atac2rna"] if direction == "atac2rna" else []), *asked], folder)[0]}  # fmt: skip
    models = {}
    for method, epochs in ((OURS, None), (LINEAR, 0)):
        costs[method], path = train(data, direction, method, epochs, options.seed, folder)
        models[method] = load_checkpoint(path)
    if one.left_out is None:
        case, cells = case_of_store(data, models[OURS]), find_split(data, "test")
    else:
        case, cells = case_of_left_out(models[OURS], test, files), test[direction.split("2")[0]]
    linear = predict(models[LINEAR], cells, min_prob=PROBABILITY_FLOOR)
    others = {LINEAR: linear.X[:, linear.var_names.get_indexer(case.features)]}
    for tool, interpreter in (("MultiVI", options.multivi), ("scButterfly", options.scbutterfly)):
        if interpreter is not None and one.left_out is None:
            costs[tool], found = other_tool(tool, interpreter, data, direction, case, folder, options)
            others |= found
    started = time.process_time()
    report = evaluate_case(case, others=others, seed=options.seed)
    costs["baselines and scoring"] = Cost(report.facts["seconds"], time.process_time() - started, peak_gb())
    return {
        "report": slim(report),
        "costs": {k: asdict(v) for k, v in costs.items()},
        "checkpoint": models[OURS].metrics,
    }


def source(one: DataSet, folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """Return the files of a set, simulating it where it is simulated."""
    if one.source in SIMULATED and not (folder / "rna.h5ad").exists():
        simulate(*SIMULATED[one.source], seed=options.seed).write(folder)
    where = folder if one.source in SIMULATED else options.data.resolve() / one.source
    return {modality: where / f"{modality}.h5ad" for modality in ("rna", "atac")}


def leave_out(one: DataSet, files: dict[str, Path], folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Write test and training cells of a set to files of their own, and return these."""
    folder.mkdir(parents=True, exist_ok=True)
    obs = ad.read_h5ad(files["rna"], backed="r").obs
    tested = obs.index[obs[one.column].astype(str) == one.left_out]
    written: dict[str, dict[str, Path]] = {"test": {}, "train": {}}
    for modality, path in files.items():
        cells = ad.read_h5ad(path)
        for part, paths in written.items():
            paths[modality] = folder / f"{part}_{modality}.h5ad"
            cells[cells.obs_names.isin(tested) == (part == "test")].copy().write_h5ad(paths[modality])
    return written["test"], written["train"]


def case_of_left_out(model: Checkpoint, test: dict[str, Path], learned: dict[str, Path]) -> Case:
    """Predict cells of files, and match them with the truth and with the training cells."""
    given, wanted = model.direction.split("2")
    predicted = predict(model, test[given], min_prob=PROBABILITY_FLOOR)
    training = TrainingFiles(learned[given], learned[wanted], test[given])
    return case_of_files(predicted, test[wanted], training, direction=model.direction)


def train(
    data: Path, direction: Direction, method: str, epochs: int | None, seed: int, folder: Path
) -> tuple[Cost, Path]:
    """Train with the small preset; return what it took and the best checkpoint."""
    config = default_config(direction, "small")
    changes = {"SEED": seed} | ({} if epochs is None else {"epoch": epochs})
    config = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    file = folder / f"{direction}_{method.replace(' ', '_')}.yaml"
    file.write_text(dump_config(config))
    save, whole = folder / "save", data / f"{direction}_all"
    if (
        whole.is_dir()
    ):  # --manually: `train` sets a tenth of the cells aside for validation; the command wants them apart
        code = f"import cisformer; print('wrote', cisformer.train({str(whole)!r}, {method!r}, direction={direction!r}, "
        cost, said = run(["-c", code + f"save={str(save)!r}, config={str(file)!r}).folder)"], folder)
    else:
        splits = [find_split(data, part, direction) for part in ("train", "val")]
        given = ["-d", data] if direction == "atac2rna" else ["-t", splits[0], "-v", splits[1]]
        cost, said = cisformer([f"{direction}_train", *given, "-n", method, "-s", save, "-c", file], folder)
    wrote = [line.removeprefix("wrote ") for line in said.splitlines() if line.startswith("wrote ")]
    return cost, folder / wrote[-1]


def cisformer(arguments: list[Any], folder: Path) -> tuple[Cost, str]:
    """Run one cisformer command in `folder`; return what it took and its standard output."""
    print("$ cisformer", *map(str, arguments), flush=True)
    return run(["-m", "cisformer", *arguments], folder)


def run(arguments: list[Any], folder: Path) -> tuple[Cost, str]:
    """Run Python in `folder`; return what it took and its standard output."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *map(str, arguments)]
    cost, code, said = measured(command, folder)
    if code:
        raise SystemExit(f"{' '.join(command)} failed")
    return cost, said


def measured(command: list[str], folder: Path, cpu_limit_s: float | None = None) -> tuple[Cost, int, str]:
    """Run a process to its end; return cost, exit code and standard output."""
    import resource

    def limit() -> None:
        if cpu_limit_s is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_limit_s), int(cpu_limit_s) + 5))

    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, preexec_fn=limit)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    cost = Cost(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)
    return cost, process.returncode, said


def peak_gb() -> float:
    """Return the largest resident set of this process."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def slim(report: EvaluationReport) -> dict[str, Any]:
    """Return a report without the numbers of its figures."""
    return replace(report, figures={}).to_dict()


# ---------------------------------------------------------------------------------------------- other tools


def other_tool(
    tool: str, interpreter: Path, data: Path, direction: Direction, case: Case, folder: Path,
    options: argparse.Namespace,
) -> tuple[Cost, dict[str, np.ndarray]]:  # fmt: skip
    """Run another tool on the same cells; return what it took and, if it came to an end in time, its prediction.

    scButterfly learns both directions at once: what it wrote for one is there for the other.
    """
    exchange = folder / (tool if tool == "scButterfly" else f"{direction}_{tool}")
    exchange.mkdir(exist_ok=True)
    names = export(data, direction, exchange)
    kept = exchange / "cost.json"
    if tool != "scButterfly" or not kept.exists():
        cost = run_other_tool(tool, interpreter, direction, exchange, options)
        kept.write_text(json.dumps(asdict(cost)))
    cost = Cost(**json.loads(kept.read_text()))
    written = exchange / f"predicted_{'atac' if direction == 'rna2atac' else 'rna'}.h5ad"
    if not written.exists():
        return cost, {}
    predicted = ad.read_h5ad(written)[case.barcodes]
    columns = names[direction].get_indexer(case.features)
    return cost, {tool: np.asarray(predicted[:, names[direction][columns]].X, dtype=np.float32)}


def run_other_tool(
    tool: str, interpreter: Path, direction: Direction, exchange: Path, options: argparse.Namespace
) -> Cost:
    """Run another tool's script on the files in `exchange`."""
    script = str((HERE / f"{tool.lower()}.py").resolve())
    arguments = [str(exchange), "--seed", str(options.seed)]
    if tool == "MultiVI":  # it can stop by itself and still predict
        arguments += ["--minutes", str(options.minutes), direction]
    print("$", script, *arguments, flush=True)
    command = [str(interpreter), "-W", "ignore", script, *arguments]
    cost, code, said = measured(command, exchange, options.minutes * 120)
    print(said.strip(), flush=True)
    if code:
        print(f"{tool} did not finish: exit code {code} after {cost.cpu_s:.0f} CPU s", flush=True)
    return cost


def export(data: Path, direction: Direction, exchange: Path) -> dict[str, Any]:
    """Write the cells of a store as h5ad files with obs["split"]; return target names by direction."""
    parts = {split: CellStore.open(find_split(data, split, direction)) for split in ("train", "val", "test")}
    reference = parts["train"].reference
    obs = ad.AnnData(obs={"split": np.repeat(
        ["train", "train", "test"], [parts[split].n_cells for split in ("train", "val", "test")])}).obs  # fmt: skip
    obs.index = np.concatenate([parts[split].barcodes for split in ("train", "val", "test")])
    names = {"atac": reference.ccre_labels, "rna": reference.gene_labels}
    for modality, labels in names.items():
        rows = [getattr(store, modality)(np.arange(store.n_cells)) for store in parts.values()]
        adata = ad.AnnData(sp.vstack(rows, format="csr"), obs=obs.copy())
        adata.var_names = labels.astype(str)
        if modality == "atac":
            adata.var["chrom"] = reference.ccres["chrom"].to_numpy(str)
        adata.write_h5ad(exchange / f"{modality}.h5ad")
        names[modality] = adata.var_names
    return {"rna2atac": names["atac"], "atac2rna": names["rna"]}


if __name__ == "__main__":
    main()
