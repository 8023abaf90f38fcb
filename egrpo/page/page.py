"""The story of a study on one page: question, outcome, images, entropy, plans, curves, tables.

A page is one file that asks for nothing else: images and figures are data URIs, styles and script
are part of it. It works without the script, which only moves the gallery's slider.

``results/index.html`` is the way in for everybody: with one page below it, its script leads there
at once, but leaves those who come from that page's link to ``#list``; with several it lists them.
It is no declared output of the workflow, for several studies share it: whoever makes a page writes
it anew from the pages that are there. A lost one comes back with the next page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import date
from html import unescape
from pathlib import Path
from urllib.parse import quote

from egrpo import __version__
from egrpo.config.study import FigureSpec, TableSpec
from egrpo.page import parts
from egrpo.page.gallery import make_gallery
from egrpo.page.outcome import outcome
from egrpo.planning.trees import needs_plan
from egrpo.report.provenance import versions
from egrpo.report.render import render
from egrpo.report.text import COSTS, HOW_TO_READ, read_rows, warning_lines
from egrpo.store.files import write_text
from egrpo.store.tables import RESULTS, metadata_of, read_table
from egrpo.study.layout import PAGES, Layout

SHOWN = {
    "index": "the default runs",
    "paper": "the tables and figures under `paper`",
    "everything": "everything",
}
"""What each page tells of; others of the table or figure that has their name."""
HEAD = 4096
"""Bytes of a page that hold what the list of pages says of it."""
META = re.compile(r'<meta name="([^"]*)" content="([^"]*)">')
"""As the template of a page writes it."""


def make_page(
    name: str, at: Layout, tables: Mapping[str, TableSpec], figures: Mapping[str, FigureSpec]
) -> None:
    """Write one page of a study, of :attr:`egrpo.study.layout.Layout.pages`, and the first page of
    the results folder. Beside the comparison of the runs these tables and figures stand on it.

    Raises:
        UserError: if a result is missing or damaged.
    """
    table = at.table(at.pages[name])
    rows = read_rows(table)
    left = dict(figures)
    lead = {kind: _lead(kind, name, at, left) for kind in ("entropy", "curves")}
    images = [spec.arms for spec in figures.values() if spec.kind == "images"]
    arms = images[0] if images else [run.arm for run in at.study.runs.values()]
    content = {
        "study": at.study.name,
        "name": name,
        "shown": SHOWN.get(name, name),
        "runs": at.study.runs,
        "date": date.fromtimestamp(table.stat().st_mtime),
        **outcome(rows, at),
        "warnings": warning_lines(rows),
        "lead": lead,
        "plans": parts.plan_views(at),
        "tables": [parts.result_view(key, spec, at) for key, spec in tables.items()],
        "figures": [(key, _picture(key, spec, at)) for key, spec in left.items()],
        "gallery": make_gallery(at, list(dict.fromkeys(arms))),
        "settings": parts.settings_rows(at),
        "how_to_read": HOW_TO_READ,
        "cost_heads": list(COSTS.values()),
        "head": metadata_of(read_table(table, RESULTS)),
        "version": __version__,
        "versions": versions(),
    }
    write_text(at.page(name), render("page.html.j2", **content))
    write_root(at.root.parent)


def _picture(key: str, spec: FigureSpec, at: Layout) -> parts.Picture:
    return parts.picture(at.figure(key).with_suffix(""), spec.kind, spec.caption)


def _lead(kind: str, name: str, at: Layout, figures: dict[str, FigureSpec]) -> parts.Picture | None:
    """The figure of the story: the study's first of its kind, which leaves ``figures``, or the one
    of the default runs, which the paper's runs may not be."""
    for key in (key for key, spec in figures.items() if spec.kind == kind):
        return _picture(key, figures.pop(key), at)
    stem = at.figures / kind
    wanted = kind == "curves" or any(needs_plan(run) for run in at.study.runs.values())
    there = name == "index" or (name == "everything" and stem.with_suffix(".png").exists())
    return parts.picture(stem, kind) if wanted and there else None


# --- the first page of all studies ----------------------------------------------------------------


def pages(results: Path) -> Iterator[dict[str, str]]:
    """The pages of all studies below a results folder: address, study, what each shows, date."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        found = {path.stem: path for path in sorted(folder.glob("*.html")) if path.is_file()}
        for name in sorted(found, key=lambda name: [*PAGES, *found].index(name)):
            path = found[name]
            with path.open(encoding="utf-8", errors="replace") as file:
                meta = dict(META.findall(file.read(HEAD)))
            if meta.get("generator", "").startswith("egrpo ") and "egrpo-shown" in meta:
                href = f"{quote(folder.name)}/{name}.html"
                shown, made = (unescape(meta.get(key, "")) for key in ("egrpo-shown", "date"))
                yield {"href": href, "study": folder.name, "shown": shown, "date": made}


def write_root(results: Path) -> None:
    """Write ``index.html`` of a results folder from the pages below it.

    Two workflows may do so at once. Each looks again after it wrote: whoever writes last has seen
    the other's page.
    """
    path, written = results / "index.html", ""
    while (text := render("root.html.j2", pages=list(pages(results)))) != written:
        write_text(path, text)
        written = text
