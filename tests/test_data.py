"""The Parquet tables in DuckDB, pandas, polars and pyarrow: values, types, nulls and units."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from PIL import Image

from egrpo.core.plan import make_plan
from egrpo.core.schedule import shifted_sigmas
from egrpo.errors import UserError
from egrpo.store import tables
from egrpo.store.files import write_json
from egrpo.store.tables import TABLES, Table, head_checksum, read_table, write_table

PROMPTS = ("a red circle", "狐狸 — \"quoted\", 'ünïcode'\n|pipe|, 🦊", "")
OF_TYPE: dict[Any, tuple[Any, ...]] = {
    tables.TEXT: PROMPTS,
    tables.INT: (-1, 0, 2**31 - 1),
    tables.BIG: (0, 2**53, 1),
    tables.REAL: (-1.5, 1e-300, 0.1 + 0.2),
    tables.FLAG: (True, False, True),
    tables.BYTES: (b"\x89PNG\r\n\x1a\n\x00\xff", b"", bytes(range(256))),
}
DUCKDB_TYPES = {
    tables.TEXT: "VARCHAR", tables.INT: "INTEGER", tables.BIG: "BIGINT", tables.REAL: "DOUBLE",
    tables.FLAG: "BOOLEAN", tables.BYTES: "BLOB",
}  # fmt: skip
POLARS_TYPES = {
    tables.TEXT: pl.String, tables.INT: pl.Int32, tables.BIG: pl.Int64, tables.REAL: pl.Float64,
    tables.FLAG: pl.Boolean, tables.BYTES: pl.Binary,
}  # fmt: skip


def rows_of(table: Table) -> list[dict[str, Any]]:
    """Three rows with the extremes of each type, and one with a null wherever one may be."""
    rows = [{name: OF_TYPE[kind][n] for name, kind, *_ in table.columns} for n in range(3)]
    rows.append(
        {name: OF_TYPE[kind][0] if name in table.sort else None for name, kind, *_ in table.columns}
    )
    return rows


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


def same(found: list[dict[str, Any]], table: Table) -> None:
    """The rows that were written, in any order, each value of its own type."""
    names = [name for name, *_ in table.columns]

    def comparable(rows: list[dict[str, Any]]) -> list[str]:
        return sorted(repr([row[name] for name in names]) for row in rows)

    assert comparable(found) == comparable(rows_of(table))


def wanted(table: Table, entry: int) -> dict[str, str]:
    """Unit (2) or description (3) of each column."""
    return {column[0]: str(column[entry]) for column in table.columns}


@pytest.mark.parametrize("name", TABLES)
def test_duckdb(name: str, files: dict[str, Path], offline: duckdb.DuckDBPyConnection) -> None:
    table = TABLES[name]
    found = offline.sql(f"SELECT * FROM read_parquet('{files[name]}')")
    assert [str(t) for t in found.types] == [DUCKDB_TYPES[kind] for _, kind, *_ in table.columns]
    same([dict(zip(found.columns, row, strict=True)) for row in found.fetchall()], table)
    head = offline.sql(
        "SELECT decode(key), decode(value) FROM "
        f"parquet_kv_metadata('{files[name]}') WHERE decode(key) NOT LIKE 'ARROW%'"
    ).fetchall()
    metadata = dict(head)
    assert json.loads(metadata["units"]) == wanted(table, 2)
    assert json.loads(metadata["descriptions"]) == wanted(table, 3)
    assert metadata["schema"] == name


@pytest.mark.parametrize("name", TABLES)
def test_pandas(name: str, files: dict[str, Path]) -> None:
    table = TABLES[name]
    frame = pd.read_parquet(files[name])
    assert frame.attrs["units"] == wanted(table, 2)
    assert frame.attrs["descriptions"] == wanted(table, 3)
    for column, kind, *_ in table.columns:
        if kind == tables.REAL:
            assert frame[column].dtype == np.float64
    whole = pd.read_parquet(files[name], dtype_backend="pyarrow")
    rows = [
        {k: None if v is pd.NA else v for k, v in row.items()} for row in whole.to_dict("records")
    ]
    same(rows, table)


@pytest.mark.parametrize("name", TABLES)
def test_polars(name: str, files: dict[str, Path]) -> None:
    table = TABLES[name]
    frame = pl.read_parquet(files[name])
    assert dict(frame.schema) == {name: POLARS_TYPES[kind] for name, kind, *_ in table.columns}
    same(frame.to_dicts(), table)
    metadata = pl.read_parquet_metadata(files[name])
    assert json.loads(metadata["units"]) == wanted(table, 2)
    assert json.loads(metadata["descriptions"]) == wanted(table, 3)


@pytest.mark.parametrize("name", TABLES)
def test_pyarrow_and_our_own_reader(name: str, files: dict[str, Path]) -> None:
    table = TABLES[name]
    schema = pq.read_schema(files[name])
    units = {field.name: field.metadata[b"unit"].decode() for field in schema}
    assert units == wanted(table, 2)
    assert [field.type for field in schema] == [kind for _, kind, *_ in table.columns]
    same(pq.read_table(files[name]).to_pylist(), table)
    same(read_table(files[name], table).to_pylist(), table)


def rewritten(path: Path, target: Path, change: dict[str, str | None]) -> Path:
    """The table with other metadata; None takes a key away."""
    data = pq.read_table(path)
    head = {k.decode(): v.decode() for k, v in data.schema.metadata.items()}
    head = {k: v for k, v in {**head, **change}.items() if v is not None}
    pq.write_table(data.replace_schema_metadata(head), target)
    return target


def test_tables_of_earlier_versions_are_still_read(files: dict[str, Path], tmp_path: Path) -> None:
    head = {
        k.decode(): v.decode()
        for k, v in pq.read_schema(files["scores"]).metadata.items()
        if k not in (b"units", b"descriptions", b"PANDAS_ATTRS", b"sha256")
    }
    gone: dict[str, str | None] = dict.fromkeys(("units", "descriptions", "PANDAS_ATTRS"))
    old = rewritten(
        files["scores"], tmp_path / "old.parquet", {**gone, "sha256": head_checksum(head)}
    )
    same(read_table(old, tables.SCORES).to_pylist(), tables.SCORES)
    older = rewritten(files["scores"], tmp_path / "older.parquet", {**gone, "sha256": None})
    same(read_table(older, tables.SCORES).to_pylist(), tables.SCORES)


@pytest.mark.parametrize("columns", [True, False])
def test_a_missing_number_is_null_in_the_file(columns: bool, tmp_path: Path) -> None:
    rows = [
        row | {"value": value}
        for row, value in zip(rows_of(tables.SCORES)[:3], (0.5, float("nan"), None), strict=True)
    ]
    written = {name: [row[name] for row in rows] for name in rows[0]} if columns else rows
    write_table(tmp_path / "x.parquet", tables.SCORES, written)
    values = pq.read_table(tmp_path / "x.parquet")["value"].to_pylist()
    assert sorted(values, key=str) == [0.5, None, None]


def test_a_changed_unit_is_seen(files: dict[str, Path], tmp_path: Path) -> None:
    wrong = rewritten(files["scores"], tmp_path / "wrong.parquet", {"units": '{"value": "kg"}'})
    with pytest.raises(UserError, match=r"wrong\.parquet: damaged Parquet \(the checksum"):
        read_table(wrong, tables.SCORES)


# -- the page's snippets ------------------------------------------------------------------------


def snippets(page: Path) -> list[tuple[str, str, str]]:
    """(heading, language, code) of each fenced block of a page."""
    heading, found = "", []
    for head, language, code in re.findall(
        r"^#+ ([^\n]+)$|^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S
    ):
        heading = head or heading
        if language:
            found.append((heading, language, code))
    return found


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
    for run in ("egrpo-s0", "flow_grpo-s0"):
        folder = root / "results/laptop/runs" / run
        common = {"run": run, "iteration": 1, "prompt_id": 0, "span": 1, "log_prob": 0.0, "nfe": 9}
        rows = [
            {
                **common,
                "step": step,
                "sample": n,
                "reward": reward,
                "value": value,
                "advantage": 0.0,
            }
            for reward in ("verifier", "clip")
            for step, values in VALUES.items()
            for n, value in enumerate(values if reward == "verifier" else (7.0, 7.0))
        ]
        write_table(folder / "rollouts.parquet", tables.ROLLOUTS, rows)
        png = io.BytesIO()
        Image.new("RGB", (5, 3)).save(png, "PNG")
        image = {"run": run, "prompt_id": 0, "prompt": "a fox", "sample": 0, "png": png.getvalue()}
        write_table(folder / "images.parquet", tables.IMAGES, [image])
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
        answer = offline.sql(code).fetchall()
        assert answer == [("egrpo-s0", 1, 0.5), ("flow_grpo-s0", 1, 0.5)]
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
