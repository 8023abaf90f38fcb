"""Every Parquet table: schema, units, provenance. Written with pyarrow, zstd, atomically."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from egrpo import __version__
from egrpo.errors import UserError, command, one_line
from egrpo.store.files import replacing

TEXT = pa.string()
INT = pa.int32()
BIG = pa.int64()
REAL = pa.float64()
FLAG = pa.bool_()
BYTES = pa.binary()


Column = tuple[str, pa.DataType, str, str]
"""Name, type, unit, description."""


@dataclass(frozen=True)
class Table:
    """One table: its columns, and the order of its rows."""

    name: str
    description: str
    columns: tuple[Column, ...]
    sort: tuple[str, ...]
    version: int = 1

    def schema(self, metadata: Mapping[str, str] | None = None) -> pa.Schema:
        """Arrow schema with unit and description on each field.

        The file's own metadata has them too, for readers that show none of a field: ``units`` and
        ``descriptions``, and both under the name that pandas takes its ``attrs`` from.
        """
        fields = [
            pa.field(name, kind, metadata={"unit": unit, "description": text})
            for name, kind, unit, text in self.columns
        ]
        about = {
            "units": {name: unit for name, _, unit, _ in self.columns},
            "descriptions": {name: text for name, _, _, text in self.columns},
        }
        head = {
            "schema": self.name,
            "schema_version": str(self.version),
            "description": self.description,
            **{key: json.dumps(texts) for key, texts in about.items()},
            "PANDAS_ATTRS": json.dumps(about),
            "egrpo_version": __version__,
            "git_commit": git_commit(),
            **(metadata or {}),
        }
        return pa.schema(fields, metadata={**head, "sha256": head_checksum(head)})


def head_checksum(head: Mapping[str, str]) -> str:
    """SHA-256 of a table's metadata, of which Parquet itself keeps no sum."""
    return hashlib.sha256(json.dumps(sorted(head.items())).encode()).hexdigest()


RUN = ("run", TEXT, "", "run id")
RUN_OR_BASE = ("run", TEXT, "", "run id, or `base`")
ITERATION = ("iteration", INT, "iterations", "counted from 1")
STEP = ("step", INT, "grid index", "where the branch starts")
SPAN = ("span", INT, "grid intervals", "intervals covered by the one SDE step")
SIGMA = ("sigma", REAL, "1", "flow time at the start")
REWARD = ("reward", TEXT, "", "name of the reward")
BUDGET = ("evaluations", BIG, "network evaluations", "the budget that the weights stay within")
PICTURE = (
    ("prompt_id", INT, "row of the prompt file", "held-out prompt"),
    ("prompt", TEXT, "", "its text"),
    ("sample", INT, "", "image of the prompt"),
)
PNG = ("png", BYTES, "PNG file", "the image, lossless; transparent if it is NaN or infinite")
SCORE = (
    REWARD,
    ("value", REAL, "see reward", "score; null where there is none"),
)
BY_PICTURE = ("prompt_id", "sample")
BY_BUDGET = ("run", "evaluations", *BY_PICTURE)

ENTROPY_PROFILE = Table(
    "entropy_profile",
    "Entropy of each step and span: closed form, and the spread measured by branching.",
    (
        STEP,
        SPAN,
        SIGMA,
        ("sigma_stop", REAL, "1", "flow time at the end of the step"),
        ("std", REAL, "latent units", "standard deviation of the transition"),
        ("exp_per_dim", REAL, "latent units", "closed form exp(h/d)"),
        ("nats_per_dim", REAL, "nats per dimension", "closed form h/d"),
        ("variance", REAL, "1", "closed form (std / noise level)^2"),
        ("prompt_id", INT, "row of the prompt file", "profiled prompt"),
        ("quantity", TEXT, "", "latent_variance, image_distance, or reward:<name>"),
        (
            "spread",
            REAL,
            "see quantity",
            "variance per dimension of the final latents; mean "
            "pairwise RMS distance of images in [0,1]; std of the reward within the group",
        ),
        ("yardstick", REAL, "see quantity", "the same for the noisy copies of one final image"),
    ),
    ("prompt_id", "step", "span", "quantity"),
)
BRANCHES = Table(
    "branches",
    "Images of some profiled groups, to look at what a branch changes.",
    (
        ("prompt_id", INT, "row of the prompt file", "profiled prompt"),
        ("prompt", TEXT, "", "its text"),
        ("step", INT, "grid index", "where the branch starts; -1 for the noisy yardstick"),
        ("span", INT, "grid intervals", "intervals covered by the one SDE step; 0 for it"),
        ("sample", INT, "", "sample within the group"),
        PNG,
    ),
    ("prompt_id", "step", "span", "sample"),
)
MERGE_PLAN = Table(
    "merge_plan",
    "Active steps and their spans.",
    (
        RUN,
        ("step", INT, "grid index", "active step"),
        ("span", INT, "grid intervals", "intervals merged into its SDE step"),
        SIGMA,
        ("sigma_stop", REAL, "1", "flow time at the end"),
        ("entropy", REAL, "see measure", "closed-form entropy of the merged step"),
        ("single_step_entropy", REAL, "see measure", "of the step alone"),
        ("threshold", REAL, "see measure", "tau"),
        ("measure", TEXT, "", "unit of entropy and threshold"),
    ),
    ("run", "step"),
)
TRAIN_METRICS = Table(
    "train_metrics",
    "Training metrics, one row per iteration and metric.",
    (
        RUN,
        ITERATION,
        ("nfe", BIG, "network evaluations", "so far: forward, forward+backward and KL reference"),
        ("metric", TEXT, "", "name, as in MLflow"),
        ("value", REAL, "see metric", "value"),
    ),
    ("run", "iteration", "metric"),
)
ROLLOUTS = Table(
    "rollouts",
    "One row per trained edge and reward.",
    (
        RUN,
        ITERATION,
        ("prompt_id", INT, "row of the prompt file", "training prompt"),
        ("step", INT, "grid index", "where the stochastic edge starts"),
        ("span", INT, "grid intervals", "intervals it covers"),
        ("sample", INT, "", "sample within its group"),
        REWARD,
        (
            "value",
            REAL,
            "see reward",
            "mean reward of the leaves below; null where none has a score",
        ),
        ("advantage", REAL, "1", "advantage of the edge, all rewards combined"),
        ("log_prob", REAL, "nats per dimension", "under the weights that sampled"),
        ("nfe", BIG, "network evaluations", "of the run at the end of this iteration"),
    ),
    ("run", "iteration", "prompt_id", "step", "sample", "reward"),
)
SCORES = Table(
    "scores",
    "Rewards of evaluation images.",
    (RUN_OR_BASE, *PICTURE, *SCORE),
    ("run", *BY_PICTURE, "reward"),
)
IMAGES = Table("images", "Evaluation images.", (RUN_OR_BASE, *PICTURE, PNG), ("run", *BY_PICTURE))
SNAPSHOTS = Table(
    "snapshots",
    "Rewards of evaluation images of weights kept during training, at given evaluations.",
    (
        RUN,
        BUDGET,
        ("nfe", BIG, "network evaluations", "spent on training by then"),
        ("iteration", INT, "iterations", "done by then"),
        ("seconds", REAL, "s", "of training by then"),
        *PICTURE,
        *SCORE,
    ),
    (*BY_BUDGET, "reward"),
)
SNAPSHOT_IMAGES = Table(
    "snapshot_images",
    "Evaluation images of weights kept during training, so that another reward can score them.",
    (RUN, BUDGET, *PICTURE, PNG),
    BY_BUDGET,
)
RESULTS = Table(
    "results",
    "Trained against base on the held-out prompts, paired by prompt and sample: single runs, or "
    "arms over their seeds.",
    (
        ("table", TEXT, "", "name of the table"),
        ("section", TEXT, "", "heading that the row stands under; empty in a comparison of runs"),
        ("arm", TEXT, "", "row of the runs table, or `base`"),
        ("run", TEXT, "", "run id; empty: all seeds of the arm"),
        ("method", TEXT, "", "method of the arm; empty for the base model"),
        ("at", TEXT, "", "`end` of training, or `evaluations`: at the table's equal evaluations"),
        ("reward", TEXT, "", "name of the reward, or diversity / distance_to_base"),
        ("trained_on", FLAG, "", "whether the arm was trained on it"),
        ("base", REAL, "see reward", "mean of the base model over the same pairs"),
        ("mean", REAL, "see reward", "over seeds, prompts and samples"),
        ("mean_low", REAL, "see reward", "lower end of its 95% interval"),
        ("mean_high", REAL, "see reward", "upper end"),
        ("difference", REAL, "see reward", "mean minus base; null for the base model"),
        ("low", REAL, "see reward", "lower end of the 95% interval of the difference"),
        ("high", REAL, "see reward", "upper end"),
        ("mark", TEXT, "", "`best` or `second` of its section where the data show it"),
        ("seeds", INT, "", "training seeds"),
        ("pairs", INT, "", "pairs that were used: image and base's image have a score"),
        ("invalid", INT, "", "pairs left out, a score of which is missing"),
        ("iterations", REAL, "iterations", "of training, mean over seeds"),
        ("nfe", REAL, "network evaluations", "of training: forward, forward+backward, reference"),
        ("seconds", REAL, "s", "of training, over all starts, mean over seeds"),
        ("peak_memory_mib", REAL, "MiB", "of training, largest over seeds"),
        ("warnings", TEXT, "", "what was wrong with the training, in words; null: nothing"),
    ),
    ("table", "at", "section", "arm", "run", "reward"),
    version=2,
)
SUFFIXES = Table(
    "suffixes",
    "Cheaper rollouts against the exact one, from the same branches of the base model.",
    (
        ("run", TEXT, "", "run whose plan was used"),
        ("granularity", INT, "grid intervals", "stride of the suffix"),
        ("solver", TEXT, "", "ode (Euler) or dpm2 (second-order DPM-Solver++)"),
        (
            "network",
            TEXT,
            "",
            "exact, features <n> (evaluated every n-th step), fp8 or fp8 products",
        ),
        REWARD,
        ("rank_correlation", REAL, "1", "Spearman's, with the exact suffix, mean over groups"),
        ("low", REAL, "1", "lower end of its 95% interval over prompts"),
        ("high", REAL, "1", "upper end"),
        ("spread", REAL, "see reward", "std within groups, mean; null without two scores in one"),
        ("spread_exact", REAL, "see reward", "the same of the exact suffix"),
        ("nfe", REAL, "network evaluations", "of one prompt's rollout"),
        ("nfe_exact", REAL, "network evaluations", "of the exact one"),
        ("seconds", REAL, "s", "of one prompt's rollout, median"),
        ("seconds_exact", REAL, "s", "of the exact one"),
        ("groups", INT, "", "groups with a rank correlation"),
        ("groups_equal", INT, "", "groups without: one side's rewards are equal, or missing"),
    ),
    ("run", "granularity", "solver", "network", "reward"),
)
TABLES = {found.name: found for found in tuple(globals().values()) if isinstance(found, Table)}


@cache
def git_commit() -> str:
    """Commit of the package's checkout, ``+dirty`` when edited, "" outside of git."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_table(
    path: str | Path,
    table: Table,
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write rows (or columns) sorted, with units and provenance, atomically; NaN becomes null."""
    schema = table.schema(metadata)
    if isinstance(rows, Mapping):
        data = pa.table({f.name: pa.array(rows[f.name], f.type) for f in schema}, schema=schema)
    else:
        data = pa.Table.from_pylist(list(rows), schema=schema)
    for at, column in enumerate(schema):
        if column.type == REAL:
            data = data.set_column(
                at, column, pc.if_else(pc.is_nan(data[at]), pa.scalar(None, REAL), data[at])
            )
    data = data.sort_by([(name, "ascending") for name in table.sort])
    strings = [f.name for f in schema if f.type == TEXT]
    with replacing(path) as temporary:
        how = {"compression": "zstd", "use_dictionary": strings, "write_page_checksum": True}
        pq.write_table(data, temporary, **how)


def metadata_of(data: pa.Table) -> dict[str, str]:
    """What a table's file says of itself: schema, units, commit, and what its writer added."""
    return {key.decode(): text.decode() for key, text in (data.schema.metadata or {}).items()}


def csv_text(table: Table, rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of a table as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [name for name, *_ in table.columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_table(path: str | Path, table: Table) -> pa.Table:
    """Read a table; UserError if the file is missing, damaged, or holds another one."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            data = file.read()
        data.validate(full=True)  # text is UTF-8, and offsets stay inside
        head = metadata_of(data)
        known = head.pop("sha256", None)  # tables of earlier versions have none
        if known is not None and known != head_checksum(head):
            raise ValueError("the checksum of its metadata does not match")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `{command((), path)}` makes it") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise UserError(f"{path}: damaged Parquet ({reason}); delete it and run again") from None
    found = head.get("schema", "unknown")
    if found != table.name:
        raise UserError(f"{path}: holds table {found!r}, expected {table.name!r}")
    for name, kind, *_ in table.columns:
        there = name in data.schema.names
        if not there or data.schema.field(name).type != kind:
            what = f"is {data.schema.field(name).type}, not {kind}" if there else "is missing"
            raise UserError(f"{path}: column {name} {what}; delete it and run again")
        if name in table.sort and data[name].null_count:
            raise UserError(f"{path}: column {name} has empty cells; delete it and run again")
    return data
