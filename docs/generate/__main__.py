"""Writes all generated documents; run it from the repository's root."""

from __future__ import annotations

from collections.abc import Callable

from docs.generate.changes import changes_page
from docs.generate.commands import commands_page
from docs.generate.fetch import fetch_page
from docs.generate.methods import drawings, methods_page
from docs.generate.settings import reference_yaml, schema, settings_page
from docs.generate.tables import tables_page
from egrpo.store.files import write_text

DOCUMENTS: dict[str, Callable[[], str]] = {
    "config/reference.yaml": reference_yaml,
    "workflow/schemas/run.schema.json": schema,
    "docs/settings.md": settings_page,
    "docs/tables.md": tables_page,
    "docs/changes.md": changes_page,
    "docs/commands.md": commands_page,
    "docs/fetch.md": fetch_page,
    "docs/methods.md": methods_page,
    **drawings(),
}
"""Generated texts, by path from the repository's root."""


if __name__ == "__main__":
    for path, make in DOCUMENTS.items():
        write_text(path, make())
