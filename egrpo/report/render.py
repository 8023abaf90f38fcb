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


def pipes(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a pipe table in Markdown; numbers stand right of the first ``left`` columns."""
    ruler = "|" + "---|" * left + "--:|" * (len(head) - left)
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
    environment.filters["escaped"] = escaped
    return environment


def render(template: str, **values: Any) -> str:
    """A file of ``egrpo/report/templates``, filled.

    In ``*.html.j2`` values are escaped; in Markdown the filter ``escaped`` does it where needed.
    """
    return _templates().get_template(template).render(**values)


def html_of(markdown: str) -> Markup:
    """CommonMark with pipe tables as HTML; of tags in it only ``<u>`` stays, our tables use it."""
    made = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    for tag in ("<u>", "</u>"):
        made = made.replace(tag.replace("<", "&lt;").replace(">", "&gt;"), tag)
    return Markup(made)


def html_page(markdown: str) -> str:
    """A whole page; its title is the first heading.

    Snakemake's report and MLflow show HTML where they would only offer Markdown for download.
    """
    title = next((ln.lstrip("# ") for ln in markdown.splitlines() if ln.startswith("#")), "")
    return render("document.html.j2", title=title, body=html_of(markdown))


def write_texts(
    path: str | Path, table: Table, rows: Sequence[Mapping[str, Any]], text: str
) -> None:
    """Beside a table's Parquet file: its rows as CSV, and what people read as Markdown and HTML."""
    target = Path(path)
    write_text(target.with_suffix(".csv"), csv_text(table, rows))
    write_text(target.with_suffix(".md"), text)
    write_text(target.with_suffix(".html"), html_page(text))
