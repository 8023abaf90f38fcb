"""A study's runs, resolved from its settings.

Order of merging, later wins: model defaults, the method's own recipe, the study's YAML files,
snakemake's ``--config``, the run's row in the runs table.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from egrpo.config.explain import explain, first_problem
from egrpo.config.load import Tree, at, numbers, options_of, overlay, put, read_yaml, without_nulls
from egrpo.config.models import RunConfig
from egrpo.config.study import FigureSpec, StudyConfig, TableSpec
from egrpo.config.table import Row, read_runs, sweep_rows
from egrpo.errors import UserError
from egrpo.methods import METHOD_MODELS
from egrpo.study.targets import check_names, possible_targets, with_snapshots


@dataclass(frozen=True)
class Study:
    """A study with all its runs resolved.

    ``refused``: what is wrong with tables, figures and ``paper``, by name; whoever asks for one is
    told.
    """

    name: str
    results: str
    runs: dict[str, RunConfig]
    default_runs: tuple[str, ...] = ()
    paper: tuple[str, ...] = ()
    tables: Mapping[str, TableSpec] = field(default_factory=dict)
    figures: Mapping[str, FigureSpec] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    libraries: str = "warn"
    notify: str | None = None

    def chosen(self, names: Iterable[str]) -> list[str]:
        """The runs that ``--run`` names, or all where it names none; UserError for no run."""
        wanted = list(dict.fromkeys(names)) or list(self.runs)
        for name in wanted:
            if name not in self.runs:
                raise UserError(f"--run {name}: the study has no such run")
        return wanted


def resolve(data: Tree, source: str) -> Study:
    """All runs of a study from its settings (as read from YAML), of that name for messages.

    Raises UserError, one line naming file, key and remedy.
    """
    study_keys = set(StudyConfig.model_fields)
    data = without_nulls(numbers(data))
    data = {k: v for k, v in data.items() if v is not None or k not in study_keys}
    try:
        study = StudyConfig.model_validate({k: v for k, v in data.items() if k in study_keys})
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, StudyConfig)}") from None
    unknown = sorted(set(study.methods) - set(METHOD_MODELS))
    if unknown:
        raise UserError(
            f"{source}: methods.{unknown[0]}: unknown method; known: {', '.join(METHOD_MODELS)}"
        )
    shared = {k: v for k, v in data.items() if k not in study_keys}
    for key in ("run", "arm", "method"):
        if key in shared:
            raise UserError(
                f"{source}: {key}: belongs in the runs table (method.name, method.…) or under "
                "`methods`, not at the top of a study"
            )
    if study.sweep:
        rows, table = sweep_rows({k: v for k, v in study.sweep.items() if k != "seed"}), "sweep"
        study = _of_sweep(study, [row.run for row in rows], shared)
    elif os.path.isfile(study.runs):
        rows, table = read_runs(study.runs), study.runs
    else:
        raise UserError(f"{source}: runs: {study.runs}: no such file")
    runs: dict[str, RunConfig] = {}
    for row in rows:
        for arm, one in seeded(row, study, table):
            runs[one.run] = resolve_run(shared, study.methods, one, source, table, arm)
    for name in sorted(set(study.methods) - {run.method.name for run in runs.values()}):
        try:  # no run says whether these settings are right
            METHOD_MODELS[name].model_validate({"name": name, **study.methods[name]})
        except ValidationError as error:
            text = explain(error, METHOD_MODELS[name])
            raise UserError(f"{source}: methods.{name}.{text}") from None
    names = {run.study for run in runs.values()}
    if len(names) > 1:
        raise UserError(f"{study.runs}: column study: all runs of a table share one study")
    try:
        check_names(study, runs)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    tables, figures, refused = possible_targets(study, runs)
    return Study(
        names.pop(),
        study.results,
        with_snapshots(runs, tables.values()),
        tuple(runs if study.default_runs is None else study.default_runs),
        tuple((*study.tables, *study.figures) if study.paper is None else study.paper),
        tables,
        figures,
        {name: f"{source}: {problem}" for name, problem in refused.items()},
        study.libraries,
        study.notify,
    )


def _of_sweep(study: StudyConfig, arms: list[str], shared: Tree) -> StudyConfig:
    """A study whose runs are its sweep's, with a table and a figure of them."""
    trained = at(shared, "train.rewards")
    first = list(trained) if isinstance(trained, dict) else []
    every = [name for name, reward in (shared.get("rewards") or {}).items() if reward is not None]
    caption = f"Every combination of {', '.join(k for k in study.sweep if k != 'seed')}."
    table = TableSpec(
        caption=caption,
        sections={"sweep": arms},
        rewards=list(dict.fromkeys([*first, *every])),
        evaluations="cheapest",
    )
    curves = FigureSpec(kind="curves", caption=caption, arms=arms, rewards=first)
    update = {
        "seeds": study.sweep.get("seed", study.seeds),
        "default_runs": None,
        "paper": ["sweep", "sweep_curves"],
        "tables": {"sweep": table, **study.tables},
        "figures": {"sweep_curves": curves, **study.figures},
    }
    return study.model_copy(update=update)


def seeded(row: Row, study: StudyConfig, table: str) -> Iterator[tuple[str, Row]]:
    """(arm, row) of each run that a line of the runs table stands for."""
    if study.seeds is None:
        yield row.run, row
        return
    if "seed" in row.overrides:
        raise UserError(
            f"{table}: run {row.run!r}, column seed: the study's `seeds` give every run its "
            "seed; leave one of them out"
        )
    for seed in study.seeds:
        yield row.run, Row(f"{row.run}-s{seed}", {**row.overrides, "seed": seed})


def resolve_run(
    shared: Tree,
    methods: Mapping[str, Tree],
    row: Row,
    source: str,
    table: str,
    arm: str | None = None,
) -> RunConfig:
    """One run: its method's recipe, the study's settings, then its own overrides."""
    name = row.overrides.get("method.name", "egrpo")
    if not isinstance(name, str) or name not in METHOD_MODELS:
        raise UserError(
            f"{table}: run {row.run!r}, column method.name: unknown method {name!r}; "
            f"known: {', '.join(METHOD_MODELS)}"
        )
    tree: Tree = {}
    for key, value in METHOD_MODELS[name].recipe.items():
        put(tree, key, value)
    tree = overlay(tree, shared)
    own = {"run": row.run, "arm": arm or row.run}
    base = overlay(tree, {**own, "method": {"name": name, **methods.get(name, {})}})
    over: Tree = {}
    for key, value in row.overrides.items():
        if key.startswith("train.rewards.") and at(over, "train.rewards") is None:
            trained = at(base, "train.rewards")  # of which the column sets one
            put(over, "train.rewards", dict(trained) if isinstance(trained, dict) else {})
        put(over, key, value)
    tree = without_nulls(overlay(base, over))
    try:
        run = RunConfig.model_validate(tree)
    except ValidationError as error:
        text, problem = explain(error, RunConfig), first_problem(error)
        if problem["loc"] != ("run",) and without_row(base, problem):
            text = re.sub(r"^method(?=\.\w|:)", f"methods.{name}", text)
            raise UserError(f"{source}: {text}") from None
        raise UserError(f"{table}, run {row.run!r}: {text}") from None
    if run.method.name != name:  # its recipe would be another method's
        raise UserError(
            f"{table}, run {row.run!r}: method.name is {name!r} but the settings of the method "
            f"say {run.method.name!r}; set it in column method.name only"
        )
    return run


def load_study(*paths: str | Path, options: Mapping[str, Any] | None = None) -> Study:
    """Read and resolve a study's YAML; later files are laid over the first, then ``--config``."""
    data: Tree = {}
    for path in paths:
        data = overlay(data, read_yaml(path))
    given = options or {}
    return resolve(overlay(data, options_of(given)), source_of(paths, given))


def source_of(paths: Iterable[str | Path], options: Collection[str] = ()) -> str:
    """Where settings come from, for messages."""
    return ", ".join([*map(str, paths), *(["--config"] if options else [])])


def without_row(base: Tree, problem: ErrorDetails) -> bool:
    """Whether a problem is there before the row's overrides: then the study is at fault."""

    def same(p: ErrorDetails) -> tuple[Any, ...]:
        value = None if isinstance(p["input"], dict) else p["input"]
        return p["loc"], p["type"], p["msg"], value

    try:
        RunConfig.model_validate(base)
    except ValidationError as error:
        return same(problem) in [same(p) for p in error.errors(include_url=False)]
    return False
