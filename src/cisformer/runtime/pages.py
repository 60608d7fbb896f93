"""HTML pages made from templates; names that come from data are escaped."""

from __future__ import annotations

import json
from typing import Any


def render_page(package: str, template: str, /, *, within: str = "templates", **values: Any) -> str:
    """Return a page.

    Parameters
    ----------
    package, within
        Where the template is: a folder of a package. What it includes, such as `page.css`, may also stand in
        `cisformer/resources`.
    template
        Its file name.
    values
        What it shows. Each is escaped.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(package, within), PackageLoader("cisformer", "resources")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)


def json_for_html(value: Any) -> str:
    """Return JSON for use in a script element: no text in it can end the element.

    Examples
    --------
    >>> json_for_html({"a": "</script>"})
    '{"a":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
