"""The documentation keeps up with the code: commands, options, keys, files, formats, links."""

import importlib
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
import yaml

import cisformer
from cisformer.cli import COMMANDS
from cisformer.cli import cisformer as group
from cisformer.config import DIRECTIONS, Config, default_config, dump_config, load_config, type_of_section

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("tutorials/*.md")),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
FOREIGN_OPTIONS = {
    "--constraint",
    "--machine_rank",
    "--num_processes",
    "--main_process_ip",
    "--nnodes",
    "--help",
}
HEAVY = ("torch", "anndata", "scipy", "pandas", "matplotlib", "sklearn", "accelerate")

ids = [str(page.relative_to(ROOT)) for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=ids)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(read(page)) if found == language]


def prose(page: Path) -> str:
    return FENCE.sub("", read(page))


def command_lines(page: Path) -> list[list[str]]:
    """Every `cisformer …` line of a page's shell blocks and code spans, as words without `cisformer`."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [span for span in SPAN.findall(prose(page)) if span.startswith("cisformer ")]
    words = (shlex.split(line, comments=True) for line in lines if line.startswith("cisformer "))
    return [line[1 : line.index("2>&1")] if "2>&1" in line else line[1:] for line in words]


def command_named(name: str) -> click.Command:
    command = group.get_command(click.Context(group), name)
    assert command is not None, f"there is no command {name}"
    return command


def options() -> list[tuple[str, click.Parameter]]:
    return [(name, parameter) for name in COMMANDS for parameter in command_named(name).params]


@pytest.fixture(scope="module")
def reference_pages():
    sys.path.insert(0, str(DOCS))
    yield importlib.import_module("reference_pages")
    sys.path.remove(str(DOCS))


# ---------------------------------------------------------------- commands and options


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_says_what_it_does_on_the_page_of_commands(name, reference_pages):
    page = reference_pages.commands_page().split(f"\n## {name}\n")[1].split("\n## ")[0]
    command = command_named(name)
    assert command.help
    assert command.help.splitlines()[0] in page
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"
            row = next(line for line in page.splitlines() if f"`{parameter.opts[0]}`" in line)
            assert parameter.help.replace("|", "/") in row


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example(name):
    assert any(line[0] == name for page in PAGES for line in command_lines(page))


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"demo"}))
def test_every_command_calls_the_function_that_python_offers(name):
    rows = [line for line in read(DOCS / "api.md").splitlines() if line.startswith("|")]
    row = next(line for line in rows if f"`{name}`" in line)
    functions = re.findall(r"`~cisformer\.(\w+)`", row)
    assert functions
    assert set(functions) <= set(cisformer.__all__)
    source = Path(importlib.import_module(f"cisformer.cli.{COMMANDS[name]}").__file__).read_text()
    assert re.search(rf"import (\w+, )*{functions[0]}\b", source)


@every_page
def test_command_lines_are_ones_that_the_commands_take(page):
    """Names, options, choices and required options; what needs files is left to the commands."""
    for words in command_lines(page):
        if (
            words[0].startswith("-") or words[0].isupper()
        ):  # `cisformer --version`, `cisformer --debug COMMAND …`
            continue
        name, *arguments = words
        if not arguments and command_named(name):  # a command's name in passing
            continue
        command_named(name).make_context(name, arguments)


@every_page
def test_options_named_in_passing_exist(page):
    known = {
        opt for _, parameter in options() for opt in (*parameter.opts, *parameter.secondary_opts)
    } | FOREIGN_OPTIONS
    known |= {opt for parameter in group.params for opt in (*parameter.opts, *parameter.secondary_opts)}
    spans = [span for span in SPAN.findall(prose(page)) if not span.startswith("python ")]
    named = {option for span in spans for option in re.findall(r"(?<!\S)--[\w-]+", span)}
    assert named - known == set()


@every_page
def test_settings_named_in_passing_exist(page):
    keys = {key for section in Config.model_fields for key in type_of_section(section).model_fields}
    named = {
        span.split(":")[0] for span in SPAN.findall(prose(page)) if re.fullmatch(r"[A-Za-z_]+: [\w.]+", span)
    }
    assert named - keys == set()


# ---------------------------------------------------------------- configuration


def test_every_configuration_key_is_explained_with_its_defaults(reference_pages):
    page = reference_pages.configuration_page()
    for section in Config.model_fields:
        for key, field in type_of_section(section).model_fields.items():
            assert field.description, f"{section}.{key} has no description"
            row = next(line for line in page.splitlines() if line.startswith(f"| `{key}` |"))
            assert field.description in row
            for direction in DIRECTIONS:
                assert str(getattr(getattr(default_config(direction), section), key)) in row


@pytest.mark.parametrize("preset", ["default", "small"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_configurations_we_write_are_read_back(direction, preset, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(default_config(direction, preset)), encoding="utf-8")
    assert set(yaml.safe_load(path.read_text())) == set(Config.model_fields)
    assert load_config(path, direction) == default_config(direction, preset)


def test_every_yaml_file_parses():
    found = [
        path
        for suffix in ("*.yaml", "*.yml", "*.cff")
        for path in ROOT.rglob(suffix)
        if not {".venv", ".git", "_build", "build"} & set(path.relative_to(ROOT).parts)
    ]
    assert ROOT / "CITATION.cff" in found
    for path in found:
        assert yaml.safe_load(read(path)), path


# ---------------------------------------------------------------- README


def test_the_commands_of_the_readme_run(tiny_files, tiny_config, tmp_path):
    """With the shell, as they stand; a small configuration is there, as the README advises for laptops."""
    for name in ("rna.h5ad", "atac.h5ad"):
        shutil.copy(tiny_files / name, tmp_path / name)
    shutil.copy(tiny_files / "celltype_info.tsv", tmp_path / "celltypes.tsv")
    (tmp_path / "cisformer_config").mkdir()
    small = dump_config(tiny_config("atac2rna", epoch=1))
    (tmp_path / "cisformer_config" / "atac2rna_config.yaml").write_text(small)
    code = "\n".join(block for block in blocks(ROOT / "README.md", "bash") if "cisformer " in block)
    shell = f'cisformer() {{ "{sys.executable}" -m cisformer "$@"; }}\n{code}'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", shell], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "index.html").is_file()
    assert (tmp_path / "out" / "cisformer_link" / "links.tsv.gz").is_file()
    made = {path.name for path in (tmp_path / "output" / "cisformer_link").iterdir()}
    assert "links.tsv.gz" in made
    assert any(name.endswith(".interact") for name in made)
    assert any(name.endswith("_correlation_matrix.h5ad") for name in made)


def test_the_python_of_the_readme_runs(tiny_files, tmp_path, monkeypatch):
    for name, source in (("rna.h5ad", "rna.h5ad"), ("atac.h5ad", "atac.h5ad"), ("my_rna.h5ad", "rna.h5ad")):
        shutil.copy(tiny_files / source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["atac"].n_obs == 160
    assert names["atac"].X.max() <= 1


def test_make_targets_and_extras_that_are_named_exist():
    makefile = read(ROOT / "Makefile")
    for page in PAGES:
        for target in re.findall(r"(?:^|`)make ([\w-]+)", read(page), re.M):
            assert f"\n{target}:" in makefile, f"{page.name}: make {target}"
        for extras in re.findall(r"pip install \"[^\"]*\[([\w,]+)\]\"", read(page)):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])


@every_page
def test_no_page_holds_an_unfinished_merge(page):
    assert not re.findall(r"^(?:<{7} .*|={7}|>{7} .*)$", read(page), re.M)


@every_page
def test_links_to_files_lead_somewhere(page):
    text = FENCE.sub("", read(page))
    targets = re.findall(r"!?\[[^\]]*\]\(([^)#\s]+)", text) + re.findall(r"^```\{figure\} (\S+)", text, re.M)
    lost = [t for t in targets if not re.match(r"https?://", t) and not (page.parent / t).exists()]
    assert lost == []


# ---------------------------------------------------------------- formats, package


def test_every_format_is_listed_with_its_version():
    page = read(DOCS / "formats.md")
    names = [name for _, name, _ in pkgutil.walk_packages(cisformer.__path__, "cisformer.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    sources = {
        Path(m.__file__).read_text(): m.FORMAT_VERSION for m in modules if hasattr(m, "FORMAT_VERSION")
    }
    defined = {
        text: version for text, version in sources.items() if "\nFORMAT_VERSION = " in text
    }  # not imported
    assert len(defined) >= 6
    for text, version in defined.items():
        name = re.search(r"\"(cisformer-\w+)\"", text)[1]
        assert f"| `{name}` | {version} |" in page


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert citation["version"] == PROJECT["version"] == cisformer.__version__
    assert citation["license"] == PROJECT["license"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert f"## {cisformer.__version__}" in read(ROOT / "CHANGELOG.md")


def test_extras_are_those_that_the_documentation_names():
    named = set(re.findall(r'"\.\[(\w+)\]"', read(DOCS / "installation.md")))
    assert named == set(PROJECT["optional-dependencies"])


def test_help_loads_nothing_heavy():
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr))\n"
        "sys.argv = ['cisformer', '--help']\n"
        "from cisformer.__main__ import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "data_preprocess" in done.stdout
    assert done.stderr.strip() == "[]"
