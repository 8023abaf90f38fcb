"""HTML that needs nothing beside itself: templates, and Markdown as a page."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("egrpo.stages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    """A file of ``egrpo/stages/templates`` with its values, which are escaped."""
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
