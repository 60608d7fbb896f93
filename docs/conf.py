"""Sphinx configuration; the command and configuration references are written from the code before each build."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import reference_pages

from cisformer import __version__

project = "cisformer"
author = "The cisformer authors"
copyright = "2026, the cisformer authors"
release = version = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_title = f"cisformer {version}"  # each version has pages of its own, made from its tag
html_static_path = ["_static"]
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
autosummary_generate = True
# The inventories of other packages are on the network; without it the pages build, with their types unlinked.
intersphinx_mapping = {
    name: (f"{home}/", None)
    for name, home in {
        "python": "https://docs.python.org/3",
        "numpy": "https://numpy.org/doc/stable",
        "scipy": "https://docs.scipy.org/doc/scipy",
        "pandas": "https://pandas.pydata.org/docs",
        "torch": "https://pytorch.org/docs/stable",
        "anndata": "https://anndata.readthedocs.io/en/stable",
    }.items()
    if os.environ.get("READTHEDOCS") or os.environ.get("CISFORMER_INTERSPHINX")
}
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!cisformer).*"),
    ("py:class", r"cisformer\.model\.(cis|documented_task)\..*"),
    ("py:class", r"cisformer\.links\.inputs\.LinkKeywords"),  # its fields are those of LinkOptions
]

reference_pages.write(Path(__file__).parent / "generated")
