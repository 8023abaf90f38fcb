"""The page of all Parquet tables, from their schemas."""

from __future__ import annotations

from docs.generate.text import cell, rows
from egrpo.store.tables import TABLES, Table

FILES = {
    "entropy_profile": ("profiles/<key>/entropy_profile.parquet",),
    "branches": ("profiles/<key>/branches.parquet",),
    "merge_plan": ("runs/<run>/merge_plan.parquet",),
    "train_metrics": ("runs/<run>/train_metrics.parquet", "runs/<run>/metrics.parquet"),
    "rollouts": ("runs/<run>/rollouts.parquet",),
    "scores": ("runs/<run>/scores.parquet", "base/<key>/scores.parquet"),
    "images": ("runs/<run>/images.parquet", "base/<key>/images.parquet"),
    "snapshots": ("runs/<run>/snapshots.parquet",),
    "snapshot_images": ("runs/<run>/snapshot_images.parquet",),
    "results": (
        "tables/comparison.parquet",
        "tables/paper_runs.parquet",
        "tables/all_runs.parquet",
        "tables/<table>.parquet",
    ),
    "suffixes": ("runs/<run>/suffixes.parquet",),
}
"""Where each table lies in ``results/<study>/``."""

INTRODUCTION = """\
# Tables

Every Parquet table of a study, generated from `egrpo/store/tables.py` by
`python -m docs.generate`. Files lie in `results/<study>/`; `comparison`, the tables of results
and `suffixes` have a `.csv` and a `.md` of the same content beside them.

All are compressed with zstd and carry page checksums. The file's metadata says what it is: `schema`
(name of the table), `schema_version`, `description`, `egrpo_version`, `git_commit`, `units` (a JSON
object, column -> unit) and a `sha256` of these. Each column's metadata has `unit` and
`description`. A cell is null where a score failed; nothing is ever recorded as 0 in its place.
Unit `1` is a plain number; an empty one, a name, a text or a count.

Rows are sorted, so the same results give the same bytes.

## Reading one

```sql
-- DuckDB
SELECT reward, avg(value) FROM 'results/laptop/runs/*/scores.parquet' GROUP BY reward;
```

```python
import pandas as pd

scores = pd.read_parquet("results/laptop/runs/egrpo-s0/scores.parquet")
scores.groupby("reward")["value"].mean()
```

```python
import polars as pl

pl.scan_parquet("results/laptop/runs/*/scores.parquet").group_by("reward").agg(
    pl.col("value").mean()
).collect()
```

```python
import pyarrow.parquet as pq

schema = pq.read_schema("results/laptop/runs/egrpo-s0/train_metrics.parquet")
for column in schema:
    print(column.name, column.type, column.metadata[b"unit"].decode())
```
"""


def described(table: Table) -> list[str]:
    """Lines of one table's section."""
    files = ", ".join(f"`{file}`" for file in FILES[table.name])
    order = ", ".join(f"`{name}`" for name in table.sort)
    text = f"{table.description} Version {table.version}; sorted by {order}."
    body = [
        (f"`{name}`", f"`{kind}`", cell(unit), cell(of)) for name, kind, unit, of in table.columns
    ]
    columns = rows(("column", "type", "unit", "what it is"), body)
    return [f"## `{table.name}`", "", text, "", f"In {files}.", "", *columns, ""]


def tables_page() -> str:
    """Markdown page of every table."""
    return "\n".join([INTRODUCTION, *(line for t in TABLES.values() for line in described(t))])
