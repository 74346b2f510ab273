"""The page as HTML: Jinja2 with autoescape, one file that asks nothing of a network and runs no script but its own."""

import base64
import hashlib
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from influence_core.report.charts import BAR_HEIGHT, HISTOGRAM_HEIGHT, LABEL_WIDTH, LINES_HEIGHT, MARGIN, WIDTH, figure
from influence_core.report.codes import ALPHABET, LONG, STEPS
from influence_core.report.content import Page


def render(page: Page) -> str:
    """The page's HTML; the same for the same page, but for the line that says when it was written."""
    style, script = _resource("page.css"), _resource("page.js")
    data = page.data | {"alphabet": ALPHABET, "steps": STEPS, "long": LONG}
    return (
        _environment()
        .get_template("page.html")
        .render(
            page=page,
            data=data,
            style=Markup(style),  # the package's own
            script=Markup(script),
            style_hash=_hash(style),
            script_hash=_hash(script),
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("influence_core.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    environment.filters["figure"] = figure
    environment.globals |= {
        "width": WIDTH,
        "histogram_height": HISTOGRAM_HEIGHT,
        "bar_height": BAR_HEIGHT,
        "label_width": LABEL_WIDTH,
        "lines_height": LINES_HEIGHT,
        "margin": MARGIN,
    }
    return environment


def _resource(name: str) -> str:
    return (files("influence_core.report") / "templates" / name).read_text("utf-8")


def _hash(text: str) -> str:
    """As a Content-Security-Policy names what it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
