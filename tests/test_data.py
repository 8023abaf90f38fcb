"""The Parquet tables in DuckDB, pandas, polars and pyarrow: values, types, nulls and units."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from small_results import images

from egrpo.core.plan import make_plan
from egrpo.core.schedule import shifted_sigmas
from egrpo.errors import UserError
from egrpo.store import tables
from egrpo.store.files import write_json
from egrpo.store.tables import TABLES, Table, head_checksum, metadata_of, read_table, write_table

PROMPTS = ("a red circle", "狐狸 — \"quoted\", 'ünïcode'\n|pipe|, 🦊", "")
TYPES: dict[Any, tuple[tuple[Any, ...], str, Any]] = {
    tables.TEXT: (PROMPTS, "VARCHAR", pl.String),
    tables.INT: ((-1, 0, 2**31 - 1), "INTEGER", pl.Int32),
    tables.BIG: ((0, 2**53, 1), "BIGINT", pl.Int64),
    tables.REAL: ((-1.5, 1e-300, 0.1 + 0.2), "DOUBLE", pl.Float64),
    tables.FLAG: ((True, False, True), "BOOLEAN", pl.Boolean),
    tables.BYTES: ((b"\x89PNG\r\n\x1a\n\x00\xff", b"", bytes(range(256))), "BLOB", pl.Binary),
}
"""Values of each type, and its name in DuckDB and polars."""
Rows = list[dict[str, Any]]


def rows_of(table: Table) -> Rows:
    """Three rows with the extremes of each type, and one with a null wherever one may be."""
    rows = [{name: TYPES[kind][0][n] for name, kind, *_ in table.columns} for n in range(3)]
    last = {k: TYPES[kind][0][0] if k in table.sort else None for k, kind, *_ in table.columns}
    return [*rows, last]


@pytest.fixture(scope="module")
def offline() -> duckdb.DuckDBPyConnection:
    """DuckDB with what is built into it, which never asks anybody for more."""
    off = {"autoinstall_known_extensions": False, "autoload_known_extensions": False}
    return duckdb.connect(config={**off, "lock_configuration": True})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tables")
    paths = {name: folder / f"{name}.parquet" for name in TABLES}
    for name, path in paths.items():
        write_table(path, TABLES[name], rows_of(TABLES[name]), metadata={"config_hash": "abc"})
    return paths


def same(found: Rows, table: Table) -> None:
    """The rows that were written, in any order, each value of its own type."""
    names = [name for name, *_ in table.columns]
    first, second = (
        sorted(repr([row[name] for name in names]) for row in rows)
        for rows in (found, rows_of(table))
    )
    assert first == second


def described(head: Mapping[str, str], table: Table) -> None:
    """Units and descriptions of all columns stand in a file's metadata."""
    for key, entry in (("units", 2), ("descriptions", 3)):
        assert json.loads(head[key]) == {column[0]: column[entry] for column in table.columns}


@pytest.mark.parametrize("name", TABLES)
def test_every_reader_finds_values_types_and_units(
    name: str, files: dict[str, Path], offline: duckdb.DuckDBPyConnection
) -> None:
    table, path = TABLES[name], files[name]
    kinds = {name: kind for name, kind, *_ in table.columns}
    found = offline.sql(f"SELECT * FROM read_parquet('{path}')")
    assert [str(t) for t in found.types] == [TYPES[kind][1] for kind in kinds.values()]
    same([dict(zip(found.columns, row, strict=True)) for row in found.fetchall()], table)
    words = f"SELECT decode(key), decode(value) FROM parquet_kv_metadata('{path}')"
    head = dict(offline.sql(words).fetchall())
    described(head, table)
    assert head["schema"] == name

    frame = pd.read_parquet(path)
    described({key: json.dumps(value) for key, value in frame.attrs.items()}, table)
    assert all(frame[k].dtype == np.float64 for k, kind in kinds.items() if kind == tables.REAL)
    whole = pd.read_parquet(path, dtype_backend="pyarrow").to_dict("records")
    same([{k: None if v is pd.NA else v for k, v in row.items()} for row in whole], table)

    polar = pl.read_parquet(path)
    assert dict(polar.schema) == {name: TYPES[kind][2] for name, kind in kinds.items()}
    same(polar.to_dicts(), table)
    described(pl.read_parquet_metadata(path), table)

    schema = pq.read_schema(path)
    units = {field.name: field.metadata[b"unit"].decode() for field in schema}
    assert units == {column[0]: column[2] for column in table.columns}
    assert {field.name: field.type for field in schema} == kinds
    same(pq.read_table(path).to_pylist(), table)
    same(read_table(path, table).to_pylist(), table)


def rewritten(path: Path, target: Path, change: dict[str, str | None]) -> Path:
    """The table with other metadata; None takes a key away."""
    data = pq.read_table(path)
    head = {k.decode(): v.decode() for k, v in data.schema.metadata.items()}
    head = {k: v for k, v in {**head, **change}.items() if v is not None}
    pq.write_table(data.replace_schema_metadata(head), target)
    return target


def test_tables_of_earlier_versions_are_still_read(files: dict[str, Path], tmp_path: Path) -> None:
    gone: dict[str, str | None] = dict.fromkeys(("units", "descriptions", "PANDAS_ATTRS", "sha256"))
    older = rewritten(files["scores"], tmp_path / "older.parquet", gone)
    same(read_table(older, tables.SCORES).to_pylist(), tables.SCORES)
    known = head_checksum(metadata_of(pq.read_table(older)))
    old = rewritten(older, tmp_path / "old.parquet", {"sha256": known})
    same(read_table(old, tables.SCORES).to_pylist(), tables.SCORES)


@pytest.mark.parametrize("columns", [True, False])
def test_a_missing_number_is_null_in_the_file(columns: bool, tmp_path: Path) -> None:
    values = (0.5, float("nan"), None)
    rows = [r | {"value": v} for r, v in zip(rows_of(tables.SCORES)[:3], values, strict=True)]
    written = {name: [row[name] for row in rows] for name in rows[0]} if columns else rows
    write_table(tmp_path / "x.parquet", tables.SCORES, written)
    found = pq.read_table(tmp_path / "x.parquet")["value"].to_pylist()
    assert sorted(found, key=str) == [0.5, None, None]


def test_a_changed_unit_is_seen(files: dict[str, Path], tmp_path: Path) -> None:
    wrong = rewritten(files["scores"], tmp_path / "wrong.parquet", {"units": '{"value": "kg"}'})
    with pytest.raises(UserError, match=r"wrong\.parquet: damaged Parquet \(the checksum"):
        read_table(wrong, tables.SCORES)


def snippets(page: Path) -> Iterator[tuple[str, str, str]]:
    """(heading, language, code) of each fenced block of a page."""
    heading, text = "", page.read_text(encoding="utf-8")
    parts = re.findall(r"^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    for head, language, code in parts:
        heading = head or heading
        if language:
            yield heading, language, code


SNIPPETS = [
    (heading, language, code)
    for heading, language, code in snippets(ROOT / "docs/data.md")
    if language in ("python", "sql") and heading != "A run for others"  # tests/test_export.py
]
VALUES = {2: (0.25, 0.75), 6: (1.0, 0.0, None)}
"""Rewards by step: a mean of 0.5 at both."""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results that the page's snippets read."""
    root = tmp_path_factory.mktemp("study")
    same = {"iteration": 1, "prompt_id": 0, "span": 1, "log_prob": 0.0, "advantage": 0.0, "nfe": 9}
    for run in ("egrpo-s0", "flow_grpo-s0"):
        folder = root / "results/laptop/runs" / run
        rows = [
            {**same, "run": run, "step": step, "sample": n, "reward": reward, "value": value}
            for reward in ("verifier", "clip")
            for step, values in VALUES.items()
            for n, value in enumerate(values if reward == "verifier" else (7.0, 7.0))
        ]
        write_table(folder / "rollouts.parquet", tables.ROLLOUTS, rows)
        image = images(run, lambda prompt, sample: 0, ["a fox"], 1, size=(5, 3))
        write_table(folder / "images.parquet", tables.IMAGES, image)
        plan = make_plan(shifted_sigmas(16, 3.0), noise_level=0.7, threshold=2.2, active=range(8))
        write_json(folder / "plan.json", plan.to_dict())
    return root


EXPECTED = {
    "DuckDB": ["0.5", "see reward"],
    "pandas": ["2    0.5", "6    0.5", "see reward - mean reward"],
    "polars": ["0.5", "see reward"],
    "pyarrow": ["0.5", "see reward"],
    "Images": ["a fox (5, 3)"],
    "The other files": ["step 0: 1 merged, sigma 1.000", "step 7: 3 merged"],
}


@pytest.mark.parametrize(("heading", "language", "code"), SNIPPETS, ids=[s[0] for s in SNIPPETS])
def test_snippets_of_the_page_run_and_answer(
    heading: str,
    language: str,
    code: str,
    study: Path,
    monkeypatch: pytest.MonkeyPatch,
    offline: duckdb.DuckDBPyConnection,
) -> None:
    monkeypatch.chdir(study)
    if language == "sql":
        assert offline.sql(code).fetchall() == [("egrpo-s0", 1, 0.5), ("flow_grpo-s0", 1, 0.5)]
        return
    duckdb.execute("SET autoinstall_known_extensions = false")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"docs/data.md: {heading}", "exec"), {"__name__": "snippet"})
    for part in EXPECTED[heading]:
        assert part in printed.getvalue()


def test_every_library_of_the_page_has_a_snippet() -> None:
    assert set(EXPECTED) == {heading for heading, *_ in SNIPPETS}
    assert {language for _, language, _ in SNIPPETS} == {"python", "sql"}
