"""Templates of pages and model cards, and Markdown as a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup

from egrpo.store.files import write_text
from egrpo.store.tables import Table, csv_text

PUNCTUATION = re.compile(r"([\\`*_\[\]<>#|~$&@])")
"""What Markdown would take as its own."""


def escaped(text: str) -> str:
    """A user's text within a line of Markdown: shown as it is, whatever it holds."""
    return PUNCTUATION.sub(r"\\\1", " ".join(text.split()))


def line(text: str) -> str:
    """Text as one line that may stand in a pipe table."""
    return " ".join(text.split()).replace("|", "\\|")


def pipes(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a pipe table in Markdown; numbers stand right of the first column."""
    ruler = "|---|" + "--:|" * (len(head) - 1)
    head_line, *body = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [head_line, ruler, *body]


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("egrpo.report"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"escaped": escaped, "line": line}
    return environment


def render(template: str, **values: Any) -> str:
    """A file of ``egrpo/report/templates``, filled.

    In ``*.html.j2`` values are escaped; in Markdown the filter ``escaped`` does it where needed.
    """
    return _templates().get_template(template).render(**values)


def write_texts(
    path: str | Path, table: Table, rows: Sequence[Mapping[str, Any]], text: str
) -> None:
    """Beside a table's Parquet file: its rows as CSV, and what people read as Markdown and HTML.

    Snakemake's report and MLflow show HTML where they would only offer Markdown for download. Of
    tags in the Markdown only ``<u>`` stays, which our tables use.
    """
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = re.sub(r"&lt;(/?u)&gt;", r"<\1>", body)
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
    page = render("document.html.j2", title=title, body=Markup(body))
    for ending, content in ((".csv", csv_text(table, rows)), (".md", text), (".html", page)):
        write_text(Path(path).with_suffix(ending), content)
