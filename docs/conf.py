"""Sphinx configuration; the command and configuration references are written from the code before each build."""

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
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_title = "cisformer"
html_static_path = ["_static"]
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
nitpicky = True
# Types of other packages: their inventories are on the network, and the pages build without one.
nitpick_ignore_regex = [
    ("py:.*", r"(?!cisformer).*"),
    ("py:class", r"cisformer\.model\.(cis|documented_task)\..*"),
]

reference_pages.write(Path(__file__).parent / "generated")
