"""The order in which modules may know each other, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import cisformer

ROOT = Path(cisformer.__file__).parent
ORDER = [
    "errors", "config", "runtime", "team",
    "data.genome", "data.features", "data.annotation", "data.reference", "data.alignment",
    "data.hdf5", "data.matrices", "data.sources", "data.io", "data.pairing", "data.spool",
    "data.manifest", "data.store", "data.preprocess", "data.inspect", "data.batches",
    "model.attention", "model.linear", "model.local", "model.cis",
    "model.fused", "model.published", "model.full", "model.full_task",
    "model.checkpoint",
    "simulation", "metrics", "resampling", "baselines", "curves", "cells", "start", "training", "prediction", "launch",
    "link_statistics", "link_evidence", "link_formats", "links_io", "gene_links", "linking",
    "link_evaluation", "plotting",
    "comparison", "verdict", "matching", "figure_data", "evaluation", "charts", "report", "demo",
    "cli.common", "cli.data", "cli.model", "cli.links", "cli.evaluation", "cli", "__main__",
]  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__" or len(parts) == 1)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cisformer."):
            found.add(node.module.removeprefix("cisformer."))
    return found


def test_every_module_has_its_place():
    names = {module_name(p) for p in ROOT.rglob("*.py")} - {"__init__", "data", "model", "resources"}
    assert names - set(ORDER) == set()


def test_a_module_imports_only_from_modules_above_it():
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{module_name(path)} imports {other}"
        for path in ROOT.rglob("*.py")
        for other in imported(path)
        if module_name(path) in place and other in place and place[other] >= place[module_name(path)]
    ]
    assert wrong == []


def test_importing_the_package_and_the_command_line_loads_nothing_heavy():
    code = (
        "import sys, cisformer, cisformer.cli, cisformer.cli.model, cisformer.cli.data, cisformer.cli.links;"
        "print([m for m in ('torch', 'anndata', 'scipy', 'pandas', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
