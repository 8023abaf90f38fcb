"""Reading, merging and validating settings.

Order of merging, later wins: model defaults, the method's own recipe, the study's YAML files,
snakemake's ``--config``, the run's row in the runs table.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from egrpo.config.methods import AnyMethod, Method
from egrpo.config.models import FigureSpec, Prompts, RunConfig, StudyConfig, TableSpec
from egrpo.config.prompts import read_prompts
from egrpo.config.rewards import REWARD_MODELS
from egrpo.config.targets import check_targets, resolve_budgets, with_snapshots
from egrpo.errors import UserError

Tree = dict[str, Any]

METHOD_MODELS: dict[str, type[Method]] = {
    model.model_fields["name"].default: model for model in get_args(get_args(AnyMethod)[0])
}
"""Settings model of each method, by name."""

TAGGED: dict[str, type[BaseModel]] = {**METHOD_MODELS, **REWARD_MODELS}
"""What pydantic puts into the place of a setting whose name or kind chooses its model."""

_UNION_MEMBERS = ("int", "float", "list[int]", "constrained-int", "constrained-float")

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}")

_ANCIENT = re.compile(r"[+-]?0[0-7_]+|.*:.*")
"""Numbers that YAML 1.1 reads as others: 010 as 8, 1:30 as 90."""


@dataclass(frozen=True)
class Study:
    """A study with all its runs resolved."""

    name: str
    results: str
    runs: dict[str, RunConfig]
    default_runs: tuple[str, ...] = ()
    paper: tuple[str, ...] = ()
    tables: Mapping[str, TableSpec] = field(default_factory=dict)
    figures: Mapping[str, FigureSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the runs table."""

    run: str
    overrides: dict[str, Any]


class Loader(yaml.SafeLoader):
    """Plain YAML of which nothing is lost, and no number read as another than it looks like."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses a key that is given twice, of which YAML would take the last."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None
            if name in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is given twice", problem_mark=key.start_mark
                )
            if name is not None:
                seen.add(name)
        return node

    def number(self, node: yaml.ScalarNode) -> float:
        """A number; refused where its digits say another to people."""
        if _ANCIENT.fullmatch(node.value):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} would be read as another number; write it plainly",
                problem_mark=node.start_mark,
            )
        kind = node.tag.rsplit(":", 1)[1]
        return self.construct_yaml_int(node) if kind == "int" else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.number)


def parse(text: str) -> Any:
    """What YAML text says.

    Raises:
        ValueError: if it is not plain YAML, in one line.
    """
    try:
        data = yaml.load(text, Loader)
        numbers(data)  # comes to no end in what holds itself
    except yaml.YAMLError as error:
        where = str(error).replace('in "<unicode string>", ', "at ")
        raise ValueError(" ".join(where.split())) from None
    except RecursionError:
        raise ValueError("nested too deeply, or within itself") from None
    return data


def numbers(value: Any) -> Any:
    """``1e-4`` is a number to people and a string to YAML 1.1: make it a number, at any depth."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def yaml_of(settings: Tree) -> str:
    """Settings as YAML, by libyaml where it is there: four times faster."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(settings, Dumper=dumper, sort_keys=False))


def read_yaml(path: str | Path) -> Tree:
    """A YAML file as a dictionary.

    Raises:
        UserError: if the file is missing, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        away = "" if os.path.isdir("egrpo") else f"; {os.getcwd()} is not the project's folder"
        raise UserError(f"{path}: no such file{away}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        data = parse(text)
    except ValueError as error:  # also a date that does not exist
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected settings as `key: value` lines")
    return data


def without_nulls(data: Tree) -> Tree:
    """``null`` takes away what a file below has set: a reward, a table, a figure, a bound.

    Elsewhere null is a value like others (``train.ema_decay: null``).
    """
    out = dict(data)
    for key in ("rewards", "tables", "figures", "train.rewards", "train.bounds"):
        named = at(out, key)
        if isinstance(named, dict):
            section, dot, last = key.rpartition(".")
            there = {name: value for name, value in named.items() if value is not None}
            out |= {section: {**out[section], last: there}} if dot else {key: there}
    return out


def at(tree: Any, dotted: str) -> Any:
    """``tree[a][b][c]`` for the key ``a.b.c``; None where it is not there."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def read_runs(path: str | Path) -> list[Row]:
    """The runs table: tab-separated, column ``run`` and one column per overridden dotted key.

    An empty cell overrides nothing; lines that start with # are comments.

    Raises:
        UserError: naming the line and what is wrong with it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets write a byte-order mark
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no name of a file
        raise UserError(f"{path}: runs table cannot be read: {error}") from None
    lines = [ln for ln in text.split("\n") if ln.strip() and not ln.startswith("#")]
    if not lines:
        raise UserError(f"{path}: the runs table is empty; its first line must name the columns")
    header, *body = (line.split("\t") for line in lines)
    if header[0] != "run":
        raise UserError(f"{path}: the first column must be `run` (columns are split by tabs)")
    if not all(name.strip() for name in header):
        raise UserError(f"{path}: a column has no name (is there a tab at the end of the header?)")
    if len(set(header)) != len(header):
        raise UserError(f"{path}: a column is named twice")
    for key in header:
        section = next((name for name in header if key.startswith(f"{name}.")), None)
        if section is not None:
            raise UserError(f"{path}: column {section} holds column {key}; keep one of them")
    if not body:
        raise UserError(f"{path}: the runs table has no run")
    rows: dict[str, Row] = {}
    for cells in body:
        if len(cells) > len(header):
            raise UserError(
                f"{path}: run {cells[0]!r} has {len(cells)} cells, the header {len(header)}"
            )
        run = cells[0].strip()
        if run in rows:
            raise UserError(f"{path}: run id {run!r} occurs twice; ids must be unique")
        overrides = {}
        for key, cell in zip(header[1:], cells[1:], strict=False):
            if not cell.strip():
                continue
            try:
                overrides[key] = numbers(parse(cell))
            except ValueError as error:
                raise UserError(
                    f"{path}: run {run!r}, column {key}: cannot read {shown(cell)}: {error}"
                ) from None
        rows[run] = Row(run, overrides)
    return list(rows.values())


def options_of(given: Mapping[str, Any]) -> Tree:
    """Snakemake's ``--config`` with its values as the same words in a file mean them.

    Snakemake makes numbers at the top only, and texts below: ``{"train": {"iterations": "5"}}``.

    Raises:
        UserError: if a text would be refused in a file.
    """
    # jobs are given `--config key=` as `key=None`
    return {key: None if v == "None" else _option(v, key) for key, v in given.items()}


def _option(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _option(below, f"{key}.{name}") for name, below in value.items()}
    if isinstance(value, list):
        return [_option(below, f"{key}.{n}") for n, below in enumerate(value)]
    if not isinstance(value, str):
        return value
    loader = Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, value, (True, False))
        return numbers(loader.construct_object(yaml.ScalarNode(tag, value)))
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise UserError(f"--config {key}: cannot read {shown(value)}: {reason}") from None


def put(tree: Tree, dotted: str, value: Any) -> None:
    """Set ``tree[a][b][c]`` for the key ``a.b.c``, in place.

    Raises:
        KeyError: if a part of the key is not a section.
    """
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise KeyError(section)
    tree[last] = value


BELONGS = {
    "function": "options",
    "path": "revision",
    **{key: f"{key}_revision" for key in ("processor", "tokenizer", "clip")},
}
"""Settings of a model or reward -> what belongs to their value and goes with it."""


def overlay(base: Tree, top: Mapping[str, Any], where: tuple[str, ...] = ()) -> Tree:
    """``base`` with ``top`` laid over it, section by section; neither is changed.

    Args:
        base, top: settings; what is defined by name (rewards, tables, bounds ...) is merged, one
            choice or another definition replaces what is below (:func:`kept`).
        where: the section that they are.
    """
    out = dict(base)
    for key, value in top.items():
        below, here = out.get(key), (*where, str(key))
        if isinstance(value, Mapping) and isinstance(below, dict):
            out[key] = overlay(kept(below, value, here), value, here)
        else:
            out[key] = value
    return out


def kept(below: Tree, top: Mapping[str, Any], where: tuple[str, ...]) -> Tree:
    """What of a section stays where ``top`` is laid over it."""

    others = {key for key, value in below.items() if top.get(key, value) != value}
    match where:
        case ("train", "rewards") | ("tables", _, "sections"):  # one choice
            return {}
        case ("rewards" | "figures", _) if "kind" in others:
            return {}
        case ("model",) | ("rewards", _):
            gone = {BELONGS[key] for key in others if key in BELONGS}
            return {key: value for key, value in below.items() if key not in gone}
    return below


def resolve(data: Tree, source: str) -> Study:
    """All runs of a study from its settings (as read from YAML).

    Args:
        data: the study's YAML; ``source`` is its name for messages.

    Raises:
        UserError: one line naming file, key and remedy.
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
    if not os.path.isfile(study.runs):
        raise UserError(f"{source}: runs: {study.runs}: no such file")
    runs: dict[str, RunConfig] = {}
    for row in read_runs(study.runs):
        for arm, one in seeded(row, study):
            runs[one.run] = resolve_run(shared, study.methods, one, source, study.runs, arm)
    for name in sorted(set(study.methods) - {run.method.name for run in runs.values()}):
        try:  # no run says whether these settings are right
            METHOD_MODELS[name].model_validate({"name": name, **study.methods[name]})
        except ValidationError as error:
            text = explain(error, METHOD_MODELS[name])
            raise UserError(f"{source}: methods.{name}.{text}") from None
    names = {run.study for run in runs.values()}
    if len(names) > 1:
        raise UserError(f"{study.runs}: column study: all runs of a table share one study")
    check_targets(study, runs, source)
    try:
        tables = resolve_budgets(study.tables, runs)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return Study(
        names.pop(),
        study.results,
        with_snapshots(runs, tables.values()),
        tuple(runs if study.default_runs is None else study.default_runs),
        tuple((*study.tables, *study.figures) if study.paper is None else study.paper),
        tables,
        study.figures,
    )


def seeded(row: Row, study: StudyConfig) -> Iterator[tuple[str, Row]]:
    """(arm, row) of each run that a line of the runs table stands for."""
    if study.seeds is None:
        yield row.run, row
        return
    if "seed" in row.overrides:
        raise UserError(
            f"{study.runs}: run {row.run!r}, column seed: the study's `seeds` give every run its "
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
    """Read and resolve a study's YAML; later files are laid over the first.

    Args:
        paths: the files.
        options: snakemake's ``--config``, laid over them.
    """
    data: Tree = {}
    for path in paths:
        data = overlay(data, read_yaml(path))
    given = options or {}
    return resolve(overlay(data, options_of(given)), source_of(paths, given))


def source_of(paths: Iterable[str | Path], options: Collection[str] = ()) -> str:
    """Where settings come from, for messages."""
    return ", ".join([*map(str, paths), *(["--config"] if options else [])])


def check_files(study: Study, source: str) -> None:
    """Refuse a study whose prompt, reward or model files are not there, before anything runs.

    Raises:
        UserError: naming the key and the file.
    """
    for problem in file_problems(study, source):
        raise UserError(problem)


def file_problems(study: Study, source: str) -> Iterator[str]:
    """Every file that is not there, each once: key, file, and a run that asks for it."""
    of_prompts = functools.cache(lambda *given: [*_problems_of_prompts(*given)])  # files are long
    seen: set[str] = set()
    first = [name for name in study.default_runs if name in study.runs]
    for name in [*first, *(run for run in study.runs if run not in first)]:
        for problem in _problems_of(study.runs[name], of_prompts):
            if problem not in seen:
                seen.add(problem)
                yield f"{source}: {problem} (run {name})"


def _problems_of(run: RunConfig, of_prompts: Callable[[Prompts, int], list[str]]) -> Iterator[str]:
    pinned = run.model.revision is not None
    yield from _source("model.path", run.model.path, "revision", pinned, file=False)
    yield from of_prompts(run.prompts, run.train.prompts_per_iteration)
    for name, reward in run.rewards.items():
        for key, path in reward.files.items():
            commit, file = reward.hub.get(key), key in reward.hub_files
            pinned = commit is not None and getattr(reward, commit) is not None
            yield from _source(f"rewards.{name}.{key}", path, commit, pinned, file=file)


def _problems_of_prompts(files: Prompts, size: int) -> Iterator[str]:
    """What is wrong with prompt files, of whose prompts an iteration takes ``size``."""
    for key in ("train", "heldout"):
        path = getattr(files, key)
        if not os.path.isfile(path):
            yield f"prompts.{key}: {path}: no such file"
            continue
        try:
            count = len(read_prompts(path, files.column))
        except UserError as error:
            yield f"prompts.{key}: {error}"
            continue
        count = min(count, files.limit or count)
        if key == "train" and count < size:
            yield f"train.prompts_per_iteration: {size} prompts, but {path} has {count}"


def _source(key: str, path: str, commit: str | None, pinned: bool, *, file: bool) -> Iterator[str]:
    """What a path lacks that is not there, unless it is a hub id with its commit.

    Args:
        key, path: setting and its value.
        commit: the setting of a hub id's commit; None where only files will do.
        pinned: whether that is set.
        file: whether it is one file, and not a folder.
    """
    if os.path.exists(path):  # and no error where this can be no path
        return
    what, hub_id = ("file", "owner/name/file") if file else ("folder", "owner/name")
    if commit is None:
        yield f"{key}: {path}: no such file"
    elif not is_hub_id(path, file=file):
        yield f"{key}: {path}: no such {what}, and not a hub id ({hub_id})"
    elif not pinned:
        yield (
            f"{key}: {path}: no such {what}; if it is a hub id ({hub_id}), pin its commit by "
            f"{commit}, so that the run can be repeated"
        )


def is_hub_id(path: str, *, file: bool = False) -> bool:
    """Whether ``path`` is an ``owner/name`` and not a folder, nor a mistyped one beside folders.

    ``file``: whether it is an ``owner/name/file``, one file of such a repository.
    """
    owner = Path(path).parts[0] if path else ""
    pattern = r"[\w.-]+/[\w.-]+" + r"(/[\w.-]+)+" * file
    return not os.path.isdir(owner) and re.fullmatch(pattern, path) is not None


def load_run(path: str | Path) -> RunConfig:
    """Read the resolved settings of one run, as the workflow wrote them."""
    data = read_yaml(path)
    settings = numbers(data)
    for key in ("run", "arm"):
        if key in data:
            settings[key] = data[key]  # a run may be called 1e-4
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, RunConfig)}") from None


Target = TypeVar("Target", TableSpec, FigureSpec)


def load_target(path: str | Path, model: type[Target]) -> tuple[str, Target]:
    """Name and settings of a table or figure, as the workflow wrote them."""
    data = read_yaml(path)
    name = str(data.pop("name", ""))
    try:
        return name, model.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, model)}") from None


def first_problem(error: ValidationError) -> ErrorDetails:
    """The problem to tell: a misspelt key before others, for it may be why they are missing."""
    problems = error.errors(include_url=False)
    return next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])


def key_of(loc: tuple[int | str, ...]) -> str:
    """The dotted key of a problem, without pydantic's names for members of a union."""
    tag = {"method": 1, "rewards": 2}.get(str(loc[0]) if loc else "")
    parts = loc if tag is None else loc[:tag] + loc[tag + 1 :]
    return ".".join(str(p) for p in parts if p not in _UNION_MEMBERS)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem as one line: key, what is wrong, what would be right."""
    first = first_problem(error)
    key = key_of(first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown setting{did_you_mean(model, first['loc'])}"
    elif first["type"] == "missing":
        text = "is missing"
    else:
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":
            text += f", got {shown(first['input'])}"
    # errors of a whole section carry their own key
    separator = "." if first["type"] == "value_error" else ": "
    joined = f"{key}{separator}{text}" if key else text
    problems = error.errors(include_url=False)
    others = len({key_of(p["loc"]) for p in problems}) - 1
    joined = f"{joined} (and {others} more)" if others else joined
    if sum(p["type"] == "missing" for p in problems) > 1:
        joined += "; a file that is laid over another one? name that one before it"
    return joined


def shown(value: Any) -> str:
    """A value as a message shows it: one may hold a whole section."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of thousands of digits
        text = "a number too long to show"
    return text if len(text) <= 200 else f"{text[:200]}…"


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


def did_you_mean(model: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """``; did you mean `x`?`` for a key that nearly exists, else the list of keys."""
    current: Any = model
    for part in loc[:-1]:
        if get_origin(current) is dict:
            current = get_args(current)[1]
            continue
        if part in TAGGED:
            current = TAGGED[str(part)]
            continue
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return ""
        current = field.annotation
    fields, key = getattr(current, "model_fields", {}), str(loc[-1])
    names = list(fields)
    beside = StudyConfig.model_fields if current is RunConfig else ()
    meant = [
        f"{name}.{key}"
        for name, field in fields.items()
        if key in getattr(field.annotation, "model_fields", {})
    ] or difflib.get_close_matches(key, [*names, *beside], n=1)
    if meant:
        return f"; did you mean `{'` or `'.join(meant)}`?"
    return f"; known here: {', '.join(names)}" if names else ""
