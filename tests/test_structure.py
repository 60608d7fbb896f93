"""The order in which modules may know each other, and what importing costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cisformer

ROOT = Path(cisformer.__file__).parent
ORDER = {
    "": ["errors", "config"],
    "runtime": ["ahead", "files", "pages", "archive", "provenance", "installation", "journal", "progress", "device"],
    "parallel": ["processes", "launch"],
    "data": [
        "genome", "features", "annotation", "reference", "known_genomes", "own_reference", "alignment", "hdf5",
        "matrices", "slots", "tables", "barcodes", "fragments", "containers", "sources", "h5ad", "pairing", "shards",
        "manifest", "store", "preprocess", "inspect", "batches",
    ],
    "model": [
        "attention", "likeness", "projection", "target_states", "cell_rows", "link_function", "closed_form_atac",
        "closed_form", "closed_form_cis", "cell_encoder", "cis_path", "cis", "bf16_attention", "published",
        "documented", "documented_task", "checkpoint_manifest", "weights", "checkpoint", "pack",
    ],
    "training": [
        "loss_plot", "split", "reliability", "follow", "closed_form_start", "run_folder", "row_gradient", "loop",
    ],
    "prediction": [
        "cells", "compact", "likeness", "predictor", "predict", "groups", "tracks", "transfer", "mosaic", "complete",
    ],
    "links": [
        "statistics", "prior", "weights", "inputs", "evidence", "measure", "shared", "type_scores", "formats", "files",
        "gene", "scorer", "score", "precision", "truth", "benchmark", "plot",
    ],
    "evaluation": [
        "matrices", "ranking", "like_frequency", "probabilities", "correlation", "pseudobulk", "bootstrap",
        "training_cells", "baselines", "scores", "verdict", "case", "case_files", "case_store", "figures", "evaluate",
        "svg", "report",
    ],
    "analysis": [
        "stored", "read_variants", "enrichment", "variant_genes", "peaks", "browse", "candidates", "groups", "coupling",
        "moderated", "volcano", "contrasts", "sequences", "motifs", "drivers", "networks", "regulon",
    ],
    "top": ["tissue", "simulation", "sparse_cells", "run_summary", "workflow", "demo"],
    "cli": [
        "common", "data", "model", "prediction", "links", "annotation", "contrasts", "evaluation", "run", "",
    ],
    "main": ["__main__"],
}  # fmt: skip
"""Folder → its modules, each above those that may import it; "" and "top" are the modules beside the folders."""

BESIDE = {"", "top", "main"}
PLACES = [
    ".".join(part for part in ("" if folder in BESIDE else folder, name) if part)
    for folder, names in ORDER.items()
    for name in names
]


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
    folders = set(ORDER) | {"resources", "__init__"}
    names = {module_name(p) for p in ROOT.rglob("*.py")}
    assert names - set(PLACES) - folders == set()


def test_a_module_imports_only_from_modules_above_it():
    place = {name: i for i, name in enumerate(PLACES)}
    wrong = [
        f"{module_name(path)} imports {other}"
        for path in ROOT.rglob("*.py")
        for other in imported(path)
        if module_name(path) in place and other in place and place[other] >= place[module_name(path)]
    ]
    assert wrong == []


def test_the_map_for_newcomers_names_files_that_exist():
    page = Path(__file__).parent.parent / "CONTRIBUTING.md"
    named = set(re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")))
    assert len(named) > 40
    assert {name for name in named if not any((f / name).is_file() for f in (ROOT, page.parent))} == set()


def test_importing_the_package_and_the_command_line_loads_nothing_heavy():
    code = (
        "import sys, cisformer, cisformer.cli, cisformer.cli.model, cisformer.cli.data, cisformer.cli.links;"
        "print([m for m in ('torch', 'anndata', 'scipy', 'pandas', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


MOST_PARAMETERS = 6
PUBLIC_CLASSES = {"H5adWriter"}
"""Classes whose constructors people call with keywords, as they call the public functions."""


def parameters(node: ast.FunctionDef) -> int:
    given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return len([name for name in given if name.arg not in ("self", "cls")])


def inner_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield functions that are neither part of the Python API nor commands, and their number of parameters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = {
        part
        for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name in PUBLIC_CLASSES
        for part in node.body if getattr(part, "name", "") == "__init__"
    }  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name not in cisformer.__all__ and node not in public:
            yield f"{path.relative_to(ROOT)}: {node.name}", parameters(node)


def test_inner_functions_have_few_parameters():
    paths = [path for path in ROOT.rglob("*.py") if path.parent.name != "cli"]
    found = dict(one for path in paths for one in inner_functions(path))
    assert len(found) > 500
    assert {name: n for name, n in found.items() if n > MOST_PARAMETERS} == {}
