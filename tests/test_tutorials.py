"""The tutorials run as they stand, and print what the pages show."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNNER = ROOT / "docs" / "run_tutorials.py"
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
FIGURE_BYTES = 100_000


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_tutorials", RUNNER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_tutorials"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["run_tutorials"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(page):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, RUNNER, page], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "Warning" not in done.stderr


def test_there_is_a_tutorial_for_each_kind_of_user_and_it_shows_small_figures(runner):
    assert {page.stem for page in PAGES} == {
        "links",
        "rna_only",
        "atac_only",
        "own_genome",
        "conditions",
        "variants",
        "regulon",
    }
    for page in PAGES:
        shown = runner.FIGURE.findall(page.read_text())
        assert shown, f"{page.name} shows no figure"
        for name in shown:
            assert (runner.FIGURES / name).stat().st_size < FIGURE_BYTES


def test_every_committed_figure_is_shown(runner):
    shown = {name for page in PAGES for name in runner.FIGURE.findall(page.read_text())}
    assert {path.name for path in runner.FIGURES.iterdir()} == shown


PAGE = """# Title

```python
n = 3
print(f"{n} cells, score {0.5:.2f}")
open("figure.png", "wb").close()
```

```text
{shown}
```

![x](../_static/tutorials/{figure}.png)

```bash
cisformer --version >version.txt
```
"""


@pytest.mark.parametrize(
    ("shown", "figure", "complaint"),
    [
        ("3 cells, score 0.48", "figure", ""),
        ("3 cells, score 0.90", "figure", "'3 cells, score 0.90' shown, '3 cells, score 0.50' printed"),
        ("3 cats, score 0.50", "figure", "shown"),
        ("3 cells, score 0.50\nmore", "figure", "2 lines shown, 1 printed"),
        ("3 cells, score 0.50", "other", "the code made no other.png"),
    ],
)
def test_a_page_that_went_stale_is_found(shown, figure, complaint, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace("{shown}", shown).replace("{figure}", figure))
    done = subprocess.run([sys.executable, RUNNER, page], capture_output=True, text=True, check=False)
    assert done.returncode == (1 if complaint else 0), done.stderr
    assert complaint in done.stdout


def test_code_that_fails_fails_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\nfalse\necho on\n```\n")
    assert subprocess.run([sys.executable, RUNNER, page], capture_output=True, check=False).returncode != 0


def test_refreshing_writes_what_was_printed_and_leaves_the_rest(runner):
    text = PAGE.replace("{shown}", "old").replace("{figure}", "figure")
    new = runner.refreshed(text, ["new\n", ""])
    assert new == text.replace("old", "new")


def test_who_wins_and_thousands_may_differ_words_may_not(runner):
    assert runner.differences("AUROC 0.62 ±0.01  0.60 +  0.62 =", "AUROC 0.62 ±0.01  0.60 +  0.63 -") == []
    assert runner.differences("The model wins.", "The model is beaten by no baseline.") == []
    assert runner.differences("wrote (1,997 links)", "wrote (2,003 links)") == []
    assert runner.differences("wrote (1,997 links)", "wrote (1,003 links)") != []
