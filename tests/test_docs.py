"""The documents: generated ones in step, the site builds, links lead somewhere, commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from egrpo.config.load import METHOD_MODELS
from egrpo.config.models import FigureSpec, RunConfig, StudyConfig, TableSpec
from egrpo.config.rewards import REWARD_MODELS
from egrpo.documents.__main__ import DOCUMENTS
from egrpo.documents.commands import TARGETS
from egrpo.documents.settings import extra, named, possible, section
from egrpo.documents.tables import FILES
from egrpo.store.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
RULES = "\n".join(p.read_text() for p in (ROOT / "workflow/rules").glob("*.smk"))


# --- generated documents --------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS)
def test_generated_document_is_in_step(path):
    assert (ROOT / path).read_text() == DOCUMENTS[path](), "run `python -m egrpo.documents`"


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A settings model and all below it."""
    found = {model}
    for name, field in model.model_fields.items():
        below = section(field) or named(field) or possible(field)
        if below is not None and name not in ("method", "rewards"):
            found |= models(below)
    return found


SETTINGS = {
    *models(RunConfig),
    *(StudyConfig, TableSpec, FigureSpec),
    *METHOD_MODELS.values(),
    *REWARD_MODELS.values(),
}


def numeric(kind: object) -> bool:
    """Whether a setting of this type holds a number."""
    return kind in (int, float) or any(numeric(part) for part in get_args(kind) if part is not bool)


def test_every_number_but_a_seed_has_a_unit():
    seen = 0
    for model in SETTINGS:
        for name, field in model.model_fields.items():
            if numeric(field.annotation) and not section(field) and not named(field):
                seen += 1
                assert bool(extra(field, "unit")) == (name not in ("seed", "seeds")), (model, name)
    assert seen > 150


def test_every_setting_and_every_source_is_on_its_page():
    page = (ROOT / "docs/settings.md").read_text()
    for model in SETTINGS:
        for name, field in model.model_fields.items():
            if section(field) or named(field) or name in ("kind", "name", "run", "arm"):
                continue
            if model is RunConfig and name in ("method", "rewards"):
                continue
            assert re.search(rf"^\| `([a-z_<>.]+\.)?{name}` \|", page, re.MULTILINE), name
            assert field.is_required() or extra(field, "source") in page


def test_every_table_names_files_that_rules_make():
    assert set(FILES) == set(TABLES)
    for files in FILES.values():
        for file in files:
            last = file.rpartition("/")[2]
            made = last.replace("<table>", "{{table}}")
            if "tables/" in file and "<" not in file:
                assert last.removesuffix(".parquet") in RULES
                made = "{{set}}.parquet"
            assert f"/{made}" in RULES, file


def test_every_target_of_the_page_is_a_rule():
    for target in TARGETS:
        assert f"rule {target}:" in RULES + (ROOT / "Snakefile").read_text()
