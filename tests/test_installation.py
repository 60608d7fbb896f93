"""The package beside the published tool, whose distribution is called `cisformer`."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import cisformer
from cisformer.runtime.installation import _AUTHOR, DISTRIBUTION

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def install(folder: Path, author: str) -> None:
    """Make `folder`, put on the path, look as if it held a distribution called cisformer."""
    about = folder / "cisformer-1.1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: cisformer\nVersion: 1.1.2\nAuthor: {author}\n"
    )


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["inspect", "nothing.h5ad"]])
def test_the_published_tool_in_the_same_environment_is_told_in_one_line(words, tmp_path):
    install(tmp_path, "Somebody Else")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['cisformer', *{words!r}]\n" + (
        "from cisformer.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "published tool cisformer 1.1.2" in said[0]
    assert "pip uninstall cisformer" in said[0]
    assert "--force-reinstall" in said[0]
    assert done.returncode == (words[0] == "inspect")


def test_this_package_under_its_former_name_is_no_clash(tmp_path):
    install(tmp_path, _AUTHOR)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['cisformer', '--version']\n" + (
        "from cisformer.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_name_is_the_one_that_is_installed_and_no_text_sends_users_to_the_other():
    assert PROJECT["name"] == DISTRIBUTION
    assert PROJECT["authors"] == [{"name": _AUTHOR}]
    assert PROJECT["scripts"] == {"cisformer": "cisformer.__main__:main"}
    texts = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/tutorials/*.md"),
        *ROOT.glob("src/*/*.py"),
    ]
    wrong = [
        path.name
        for path in texts
        for quote in ("", '"', "'")
        if f"pip install {quote}cisformer[" in path.read_text()
    ]
    assert wrong == []


# ---------------------------------------------------------------- the files that GitHub and Read the Docs read


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_test_matrix_is_what_the_package_says_it_runs_on():
    matrix = read_yaml(".github/workflows/test.yml")["jobs"]["newest"]["strategy"]["matrix"]
    prefix = "Programming Language :: Python :: 3."
    said = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)]
    assert matrix["python"] == [f"3.{minor}" for minor in said]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}"
    assert set(matrix["os"]) == {"ubuntu", "macos", "windows"}


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_no_workflow_names_a_host_or_a_secret(path):
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert "secrets." not in text
    actions = re.findall(r"uses: ([\w-]+)/", text)
    assert set(actions) <= {"actions", "pypa"}


def test_a_release_is_published_by_a_trusted_publisher_after_the_wheel_was_tried():
    jobs = read_yaml(".github/workflows/release.yml")["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["needs"] == "try"
    assert jobs["try"]["needs"] == "build"


def test_extras_that_services_install_exist():
    extras = set(PROJECT["optional-dependencies"])
    install = read_yaml(".readthedocs.yaml")["python"]["install"][0]
    assert set(install["extra_requirements"]) <= extras
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for named in re.findall(r'"\.\[([\w,]+)\]"', path.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= extras


def test_what_ci_pins_is_all_that_the_project_asks_for():
    pinned = {re.split(r"==", line)[0].lower().replace("_", "-") for line in
              (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}  # fmt: skip
    asked = [
        *PROJECT["dependencies"],
        *(name for names in PROJECT["optional-dependencies"].values() for name in names),
    ]
    names = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in asked}
    assert names - pinned == set()


def test_what_the_package_offers_is_strictly_typed():
    mypy = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert mypy["strict"]
    relaxed, strict = (set(override["module"]) for override in mypy["overrides"])
    offered = {f"cisformer.{module}" for module in cisformer._FUNCTIONS.values()}
    inside = {module for module in offered if f"{module.rpartition('.')[0]}.*" in relaxed}
    assert inside - strict == set()


def test_the_lowest_versions_are_those_that_the_package_allows():
    """`constraints-lowest.txt` names the lower bound of every dependency."""
    wanted = {}
    extras = PROJECT["optional-dependencies"]
    for text in (
        *PROJECT["dependencies"],
        *(name for extra in ("io", "tracks", "dask", "tensorboard") for name in extras[extra]),
    ):
        name, bound = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", text).groups()
        wanted[name] = bound
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    lowest = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert set(lowest) == set(wanted)
    for name, bound in wanted.items():
        padded = bound.split(".") + ["0"] * (3 - len(bound.split(".")))
        assert lowest[name].split(".") == padded or name == "torch", name
