"""Writes the report of a suite: one HTML file that loads nothing, and the leaderboard as Markdown and JSON.

The page holds its style and its pictures. Its content policy allows this one style sheet by hash and no script at all:
a hostile sample could do nothing even if it were not escaped; it is escaped too.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

import unroll
from unroll.files import new_folder
from unroll.report import tables, view
from unroll.report.leaderboard import Leaderboard, load

_HERE = Path(__file__).parent

# Outlines of the markers of `plots.MARKERS` in the legend, in a box of 34 x 14.
_SHAPES = (
    "M12.8 7a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0",
    "M13.2 3.2h7.6v7.6h-7.6z",
    "M17 2.2l4.8 8.6h-9.6z",
    "M17 2l4.6 5l-4.6 5l-4.6 -5z",
    "M17 11.8l4.8 -8.6h-9.6z",
    "M15.4 2.6h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z",
    "M14 2l3 3l3 -3l2 2l-3 3l3 3l-2 2l-3 -3l-3 3l-2 -2l3 -3l-3 -3z",
    "M17 1.5l1.5 3.9l4.1 .2l-3.2 2.6l1.1 4l-3.5 -2.3l-3.5 2.3l1.1 -4l-3.2 -2.6l4.1 -.2z",
)


def build(suite: str, results: Path, evaluations: Path, out: Path, expected: Sequence[str] = ()) -> Path:
    """Write `index.html`, `leaderboard.md` and `leaderboard.json` of one suite; the same inputs give the same bytes.

    Args:
        suite: its name, shown as the title.
        results: the suite's folder of `<recipe>.json`.
        evaluations: the suite's folder of `<recipe>/` with statistics, history and samples.
        out: the report's folder, replaced as a whole.
        expected: recipes of the suite; those that have no results yet are named in the report.

    Returns:
        The path of the page.

    Raises:
        UserError: no such suite, no results in it, or a damaged file.
    """
    board = load(suite, results, evaluations, expected)
    pages = {"index.html": html, "leaderboard.md": tables.markdown, "leaderboard.json": tables.as_json}
    with new_folder(out) as folder:
        for name, write in pages.items():
            (folder / name).write_text(write(board), encoding="utf-8", newline="\n")
    return out / "index.html"


def html(board: Leaderboard) -> str:
    """The page of a suite."""
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return _template().render(
        view.page(board),
        style=Markup(style),
        policy=f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'",
        shapes=_SHAPES,
        version=unroll.__version__,
    )


@functools.cache
def _template() -> jinja2.Template:
    """The page's template; every value put into it is escaped, and a missing one is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("index.html")
