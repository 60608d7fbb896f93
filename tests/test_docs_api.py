"""What `import cisformer` offers is documented as a whole."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
from numpydoc.docscrape import get_doc_object
from numpydoc.validate import validate

import cisformer
from cisformer.errors import CisformerError
from cisformer.runtime.progress import progress

ROOT = Path(__file__).resolve().parents[1]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
FUNCTIONS = [name for name in cisformer.__all__ if name != "__version__"]
LISTED = re.findall(r"(?:\.\. auto(?:function|class):: |^   )(cisformer\.[\w.]+)$", API, re.M)
WANTED = {"GL08", "SS01", "SS03", "PR01", "PR02", "PR03", "RT01", "YD01"}
"""Of numpydoc's checks: a docstring, a summary that ends, parameters as in the signature, what is returned."""
ISSUE = {"preprocess", "train", "predict", "link", "evaluate", "simulate", "plot"}


def found(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_names_that_users_were_promised_are_there():
    assert set(FUNCTIONS) >= ISSUE
    assert set(dir(cisformer)) >= set(FUNCTIONS)
    assert cisformer.plot is cisformer.plot_links
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cisformer.nothing


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_says_what_it_takes_and_gives(name):
    function = getattr(cisformer, name)
    path = f"{function.__module__}.{function.__qualname__}"
    wrong = [f"{code}: {text}" for code, text in validate(path)["errors"] if code in WANTED]
    assert wrong == []
    assert f"cisformer.{'plot_links' if name == 'plot' else name}" in LISTED


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_is_annotated(name):
    signature = inspect.signature(getattr(cisformer, name))
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_error_that_is_named_is_one_of_ours(name):
    import cisformer.errors as errors

    for raised in get_doc_object(getattr(cisformer, name))["Raises"]:
        for error in raised.type.split(", "):
            assert issubclass(getattr(errors, error), CisformerError)


@pytest.mark.parametrize("path", [path for path in LISTED if path.rpartition(".")[2][0].isupper()])
def test_every_class_on_the_page_names_its_fields(path):
    kind = found(path)
    document = get_doc_object(kind)
    assert document["Summary"]
    named = {
        name for item in document["Attributes"] + document["Parameters"] for name in item.name.split(", ")
    }
    fields = getattr(kind, "__dataclass_fields__", {})
    assert set(fields) - named == set()


def test_progress_is_a_bar_in_a_notebook(monkeypatch):
    made = []

    class Bar:
        def __init__(self, **options):
            made.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self, n):
            made.append(n)

    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    assert list(progress("abc", desc="reading", unit="letters")) == ["a", "b", "c"]
    assert made[0]["total"] == 3
    assert made[0]["desc"] == "reading"
    assert made[1:] == [1, 1, 1]
