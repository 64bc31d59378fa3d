"""A page as one HTML file: no network, nothing beside it, and every word of it readable where scripts do not run.

A template makes the page and escapes what it is given. A content security policy in it lets nothing run but the page's own
script and style, by their digests: a name from a hostile file stays a name.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from corral.cli.formats import size


def render_page(name: str, *, script: str | None = None, **values: Any) -> str:
    """The page of the template `name`.html, which extends page.html, with `values`, in the style of page.css and `name`.css.

    `script` is what runs in it, by default `name`.js.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(page_file),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["size"] = size
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    style = page_file("page.css") + page_file(f"{name}.css")
    script = page_file(f"{name}.js") if script is None else script
    return environment.get_template(f"{name}.html").render(
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        **values,
    )


def page_file(name: str) -> str:
    """A file that lies beside this one."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
