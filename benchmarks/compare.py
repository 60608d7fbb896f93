"""Compare cisformer with its closed form, the baselines and other tools: every set, one run, one table.

    python benchmarks/compare.py [WORK] --data ../shared/data [--sets sim_2000 bmmc_starter_A …]
        [--multivi ENV/bin/python] [--scbutterfly ENV/bin/python] [--minutes 15] [--seed 0]

Each set goes through the commands that a user would type (`data_preprocess --reference dataset`, `*_train` with
the small preset, and again with `epoch: 0` for the closed form); the test cells are scored by the package's own
`evaluate_case`, all methods in one bootstrap. Results are kept in WORK/results.json, so that a second run adds
what is missing; the tables go to WORK/results.md, the first of them whole in the README. Times are wall-clock and
CPU seconds of the whole process, memory its largest resident set.
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

from cisformer.config import DIRECTIONS, Direction, default_config, dump_config
from cisformer.data.store import CellStore, find_split
from cisformer.evaluation.baselines import ORACLE
from cisformer.evaluation.case import Case
from cisformer.evaluation.case_store import case_of_store
from cisformer.evaluation.evaluate import EvaluationReport, evaluate_case
from cisformer.evaluation.probabilities import PROBABILITY_FLOOR
from cisformer.evaluation.scores import METRICS
from cisformer.evaluation.verdict import MODEL, score_text
from cisformer.model.checkpoint import load_checkpoint
from cisformer.prediction.predict import predict
from cisformer.simulation import simulate

HERE = Path(__file__).parent
SIMULATED = {"sim_2000": (2000, 5000, 40_000), "sim_500": (500, 1000, 6000)}
SETS = [
    "snareseq_mop_10309",
    "scicar_a549_2641",
    "bmmc_starter_A",
    "bmmc_starter_B",
    "scpoem_S1_300",
    *SIMULATED,
]
SHOWN = {
    "rna2atac": (
        "log_loss",
        "ccre_auroc",
        "ccre_auprc",
        "cell_auroc",
        "cell_auprc",
        "cell_auroc_residual",
        "ece",
        "pseudobulk",
    ),
    "atac2rna": (
        "r2",
        "gene_pearson",
        "gene_spearman",
        "cell_pearson",
        "cell_pearson_residual",
        "pseudobulk",
    ),
}
OURS, LINEAR = "cisformer", "closed form"
ARROWS = {"rna2atac": "RNA→ATAC", "atac2rna": "ATAC→RNA"}
IN_OVERVIEW = (
    "log_loss", "ccre_auroc", "cell_auprc", "cell_auroc_residual", "r2", "gene_pearson", "cell_pearson_residual",
)  # fmt: skip


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
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
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
    parser.add_argument("--split_by", help="column of obs, such as batch: its values are kept together")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for name in options.sets:
        for direction in options.directions:
            key = f"{name} {direction}"
            if key not in results:
                print(f"== {key}", flush=True)
                results[key] = run_set(name, direction, options)
                kept.write_text(json.dumps(results, indent=1))
    text = "\n\n".join(table(key, result) for key, result in results.items())
    (options.work / "results.md").write_text(f"{overview(results)}\n\n{text}\n")
    print(f"{overview(results)}\n\n{text}")


# ---------------------------------------------------------------------------------------------- one set


def run_set(name: str, direction: Direction, options: argparse.Namespace) -> dict[str, Any]:
    """Prepare, train, predict and score one set in one direction."""
    folder = (options.work / name).resolve()
    rna, atac = source(name, folder, options)
    data = folder / direction
    costs = {"preprocess": run(
        ["data_preprocess", "-r", rna, "-a", atac, "-s", data, "--reference", "dataset", "--force",
         "--seed", options.seed, *(["--atac2rna"] if direction == "atac2rna" else []),
         *(["--split-by", options.split_by] if options.split_by else [])], folder)[0]}  # fmt: skip
    checkpoints = {}
    for method, epochs in ((OURS, None), (LINEAR, 0)):
        costs[method], checkpoints[method] = train(data, direction, method, epochs, options.seed, folder)
    case = case_of_store(data, load_checkpoint(checkpoints[OURS]))
    columns = load_checkpoint(checkpoints[OURS]).layout.target_index
    linear = predict(
        load_checkpoint(checkpoints[LINEAR]), find_split(data, "test"), min_prob=PROBABILITY_FLOOR
    )
    others = {LINEAR: linear.X[:, columns]}
    for tool, interpreter in (("MultiVI", options.multivi), ("scButterfly", options.scbutterfly)):
        if interpreter is not None:
            costs[tool], found = other_tool(tool, interpreter, data, direction, case, folder, options)
            others |= found
    started = time.process_time()
    report = evaluate_case(case, others=others, seed=options.seed)
    costs["baselines and scoring"] = Cost(report.facts["seconds"], time.process_time() - started, peak_gb())
    metrics = load_checkpoint(checkpoints[OURS]).metrics
    return {"report": slim(report), "costs": {k: asdict(v) for k, v in costs.items()}, "checkpoint": metrics}


def source(name: str, folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """Return the files of a set, simulating it where it is simulated."""
    if name not in SIMULATED:
        return options.data.resolve() / name / "rna.h5ad", options.data.resolve() / name / "atac.h5ad"
    if not (folder / "rna.h5ad").exists():
        simulate(*SIMULATED[name], seed=options.seed).write(folder)
    return folder / "rna.h5ad", folder / "atac.h5ad"


def train(
    data: Path, direction: Direction, method: str, epochs: int | None, seed: int, folder: Path
) -> tuple[Cost, Path]:
    """Train with the small preset; return what it took and the best checkpoint."""
    config = default_config(direction, "small")
    changes = {"SEED": seed} | ({} if epochs is None else {"epoch": epochs})
    config = config.model_copy(update={"training": config.training.model_copy(update=changes)})
    file = folder / f"{direction}_{method.replace(' ', '_')}.yaml"
    file.write_text(dump_config(config))
    splits = [find_split(data, part, direction) for part in ("train", "val")]
    given = ["-t", splits[0], "-v", splits[1]] if direction == "rna2atac" else ["-d", data]
    cost, said = run([f"{direction}_train", *given, "-n", method, "-s", folder / "save", "-c", file], folder)
    wrote = [line.removeprefix("wrote ") for line in said.splitlines() if line.startswith("wrote ")]
    return cost, folder / wrote[-1]


def run(arguments: list[Any], folder: Path) -> tuple[Cost, str]:
    """Run one cisformer command in `folder`; return what it took and its standard output."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cisformer", *map(str, arguments)]
    print("$ cisformer", *map(str, arguments), flush=True)
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


# ---------------------------------------------------------------------------------------------- tables


def table(key: str, result: dict[str, Any]) -> str:
    """Return the scores and costs of one set in markdown; bold is the best value."""
    report, direction = result["report"], key.split()[1]
    methods = list(report["scores"])
    facts = report["facts"]
    titles = [OURS if method == MODEL else method for method in methods]
    lines = [
        f"### {key}",
        f"{facts['training_cells']:,} training and {facts['test_cells']:,} test cells, {facts['features']:,} features; "
        f"best epoch {result['checkpoint']['epoch']}; seed {facts['seed']}. {report['verdict']}",
        "",
        f"| score | {' | '.join(titles)} | who wins |",
        "|" + "---|" * (len(titles) + 2),
    ]
    for metric in METRICS[direction]:
        if metric.key in SHOWN[direction] and metric.key in report["scores"][MODEL]:
            cells = [cell(report, metric, method) for method in methods]
            arrow = "↑" if metric.better == "higher" else "↓"
            lines.append(f"| {metric.name} {arrow} | {' | '.join(cells)} | {winner(report, metric)} |")
    lines += ["", "| process | wall s | CPU s | peak GB |", "|---|---|---|---|"]
    lines += [
        f"| {k} | {c['wall_s']:.0f} | {c['cpu_s']:.0f} | {c['peak_gb']:.2f} |"
        for k, c in result["costs"].items()
    ]
    return "\n".join(lines)


def cell(report: dict[str, Any], metric: Any, method: str) -> str:
    """Return a score with its interval (ours) or how ours does against it."""
    score = report["scores"][method].get(metric.key)
    if score is None or score["value"] is None:
        return "–"
    values = [s[metric.key]["value"] for m, s in report["scores"].items() if m != ORACLE and metric.key in s]
    known = [value for value in values if value is not None]
    best = (max if metric.better == "higher" else min)(known)
    text = score_text(score["value"])
    text = f"**{text}**" if text == score_text(best) and method != ORACLE else text
    if method == MODEL and score["high"] is not None:
        return f"{text} ±{score_text(score['high'] - score['value'], score['value'])}"
    marks = {"better": "+", "tie": "=", "worse": "−"}
    found = [c for c in report["comparisons"] if c["metric"] == metric.key and c["baseline"] == method]
    ours = report["scores"][MODEL][metric.key]["value"]
    same = score_text(ours) == score_text(score["value"])  # the closed form itself, but for rounding
    return f"{text} {'=' if same else marks[found[0]['outcome']]}" if found else text


def winner(report: dict[str, Any], metric: Any) -> str:
    """Return who is best on a score: ours, those it cannot be told apart from, or those that beat it."""
    against = [c for c in report["comparisons"] if c["metric"] == metric.key]
    worse = [c for c in against if c["outcome"] == "worse"]
    if worse:
        return min(worse, key=lambda c: c["gain"])["baseline"]
    ties = [c["baseline"] for c in against if c["outcome"] == "tie"]
    return f"tie: {OURS}, {', '.join(ties)}" if ties else OURS


def overview(results: dict[str, Any]) -> str:
    """Return the one table: every set, direction, score and method; bold is the best value."""
    methods: list[str] = []
    for result in results.values():
        methods += [m for m in result["report"]["scores"] if m not in (*methods, ORACLE)]
    titles = [OURS if method == MODEL else method for method in methods]
    lines = [
        f"| set | direction | score | {' | '.join(titles)} | who wins |",
        "|" + "---|" * (len(titles) + 4),
    ]
    for key, result in results.items():
        name, direction = key.split()
        report = result["report"]
        for metric in METRICS[direction]:
            if metric.key in IN_OVERVIEW and metric.key in report["scores"][MODEL]:
                cells = [cell(report, metric, m) if m in report["scores"] else "–" for m in methods]
                arrow = "↑" if metric.better == "higher" else "↓"
                row = [name, ARROWS[direction], f"{metric.name} {arrow}", *cells, winner(report, metric)]
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
