"""Every setting as commented YAML, as JSON schema and as a page, from the settings models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.generate.text import cell, rows
from egrpo.config.models import RunConfig
from egrpo.config.rewards import REWARD_MODELS
from egrpo.config.study import FigureSpec, StudyConfig, TableSpec
from egrpo.methods import METHOD_MODELS
from egrpo.methods.base import Method
from egrpo.settings import PAPER

HEAD = """\
# Every setting, its default and where that comes from. Generated: `python -m docs.generate`.
# A study's YAML needs only what differs; `...` marks what has no default. In square brackets: the
# unit (none: a plain number, a text or a choice) and the bounds.
"""


# -- one setting -------------------------------------------------------------------------------


def extra(field: FieldInfo, key: str) -> str:
    """What ``setting`` noted of a field: ``source`` or ``unit``."""
    noted = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return str(noted.get(key, ""))


def bounds(field: FieldInfo) -> list[str]:
    """Bounds of a number, as text; of a number among other types too."""
    marks = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
    parts = [m for part in get_args(field.annotation) for m in getattr(part, "__metadata__", ())]
    return [
        f"{marks[type(m).__name__]} {getattr(m, type(m).__name__.lower())}"
        for m in [*field.metadata, *parts]
        if type(m).__name__ in marks
    ]


def choices(kind: Any) -> list[str]:
    """The words that a setting of this type may be, among others."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) in (dict, list):
        return []
    return [word for part in get_args(kind) for word in choices(part)]


def allowed(field: FieldInfo) -> str:
    """Bounds and words of a setting, for a table."""
    return ", ".join([*bounds(field), *(f"`{word}`" for word in choices(field.annotation))])


def sentence(field: FieldInfo) -> str:
    """What a setting says of itself, on one line."""
    return " ".join((field.description or "").split())


def about(field: FieldInfo, source: str | None = None) -> str:
    """A setting's sentence with its unit, bounds and the source of its default.

    ``source`` takes the place of the field's own: a method's, for what it inherits.
    """
    text = sentence(field)
    unit = extra(field, "unit")
    marks = [*([unit] if unit not in ("", "1") else []), *bounds(field)]
    if marks:
        text += f" [{', '.join(marks)}]"
    source = source or extra(field, "source")
    return f"{text} ({source})" if source and not field.is_required() else text


def section(field: FieldInfo) -> type[BaseModel] | None:
    """The settings model of a field that is a section of its own."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def named(field: FieldInfo) -> type[BaseModel] | None:
    """The settings model of the values of a field that maps names to sections."""
    return possible(field) if get_origin(field.annotation) is dict else None


def possible(field: FieldInfo) -> type[BaseModel] | None:
    """The settings model of a section that may be null, or of one by name."""
    kinds = (kind for kind in get_args(field.annotation) if isinstance(kind, type))
    return next((kind for kind in kinds if issubclass(kind, BaseModel)), None)


def inherited(model: type[BaseModel], name: str) -> str | None:
    """The source of a method's settings, for a field that the method did not write itself.

    The shared classes name E-GRPO's paper; what another method inherits is in its own.
    """
    own = name in vars(model).get("__annotations__", {})
    if own or not issubclass(model, Method) or model.source == PAPER:
        return None
    paper = extra(model.model_fields[name], "source").startswith(PAPER)
    return model.source if paper else None


def first_line(model: type[BaseModel]) -> str:
    """What a settings model is, in one line."""
    return (model.__doc__ or "").strip().splitlines()[0]


def scalar(value: Any) -> str:
    """A value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=200).split("\n...")[0].strip()


# -- YAML and JSON -----------------------------------------------------------------------------


def lines(model: type[BaseModel], indent: int = 0, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """YAML lines of one settings model, comments above the keys."""
    pad = "  " * indent
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        if below := section(field):
            yield f"{pad}# {first_line(below)}"
            yield f"{pad}{name}:"
            yield from lines(below, indent + 1)
            continue
        yield f"{pad}# {about(field, inherited(model, name))}"
        if entry := named(field):
            yield from (f"{pad}{name}:", f"{pad}  <name>:")
            yield from lines(entry, indent + 2)
            continue
        yield f"{pad}{name}: {'...' if field.is_required() else scalar(field.default)}"
        if inner := possible(field):
            yield from (f"{pad}#   {line}" for line in lines(inner))


def reference_yaml() -> str:
    """The commented reference of all settings."""
    out = [HEAD.rstrip(), ""]
    out += lines(StudyConfig, skip=("methods",))
    out += lines(RunConfig, skip=("run", "arm", "method", "rewards"))
    out += [
        "# Reward models by name; the name is what train.rewards and the tables use.",
        "rewards:",
    ]
    for kind, reward in REWARD_MODELS.items():
        out += [f"  # {first_line(reward)}", f"  <name of a {kind}>:"]
        out += [f"    kind: {kind}", *lines(reward, indent=2, skip=("kind",))]
    out += [
        "# Settings by method; a run chooses its method with the column method.name of the runs",
        "# table, and overrides single settings by columns such as method.threshold.",
        "methods:",
    ]
    for name, method in METHOD_MODELS.items():
        out += [f"  # {first_line(method)}", f"  {name}:"]
        out += lines(method, indent=2, skip=("name",))
        out += [f"    # set for this method elsewhere ({method.source}):"]
        out += [f"    #   {key}: {scalar(value)}" for key, value in method.recipe.items()]
    return "\n".join(out) + "\n"


def schema() -> str:
    """JSON schema of one resolved run; no unknown keys at any level."""
    text = json.dumps(RunConfig.model_json_schema(), indent=1)
    return text.replace("\\n", " ") + "\n"


# -- the page ----------------------------------------------------------------------------------

INTRODUCTION = """\
# Settings

Every setting, generated from the models in `egrpo/config` by `python -m docs.generate`. The same
as a YAML file with comments: [`config/reference.yaml`](../config/reference.yaml).

A study's YAML holds what differs from the defaults; the value of a run is the last one of: the
default, the method's recipe, the study's YAML (and each file laid over it), `methods.<name>` of it,
the run's line in the runs table. Keys are written with dots here, as in the heads of the runs
table. Unit `1` is a plain number; an empty one, a text, a choice or a name. Sources name the paper
or code that a default is taken from.
"""


def table(model: type[BaseModel], prefix: str = "", skip: tuple[str, ...] = ()) -> list[str]:
    """One Markdown table of a settings model's own settings."""
    body = []
    for name, field in model.model_fields.items():
        if name in skip or section(field) is not None or named(field) is not None:
            continue
        default, source = "required", ""
        if not field.is_required():
            default = f"`{scalar(field.default)}`"
            source = inherited(model, name) or extra(field, "source")
        limits, text = cell(allowed(field)), cell(sentence(field))
        shown = (f"`{prefix}{name}`", default, extra(field, "unit"), limits, text, cell(source))
        body.append(shown)
    head = ("setting", "default", "unit", "allowed", "what it is", "source of the default")
    filled = [n for n in range(len(head)) if any(line[n] for line in body)]
    return rows([head[n] for n in filled], [[line[n] for n in filled] for line in body])


def _sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Sections below a settings model, by dotted key."""
    for name, field in model.model_fields.items():
        found = section(field) or possible(field)
        if found is not None and name not in ("method", "rewards"):
            key = f"{prefix}{name}" + (".<name>" if named(field) else "")
            yield key, found
            yield from _sections(found, f"{key}.")


def settings_page() -> str:
    """Markdown page of every setting: one table for each section."""
    out = [INTRODUCTION, "## The study", "", *table(StudyConfig)]
    for name, spec in (("tables", TableSpec), ("figures", FigureSpec)):
        out += ["", f"## `{name}.<name>`", "", first_line(spec), ""]
        out += table(spec, f"{name}.<name>.")
    out += ["", "## A run", "", *table(RunConfig, skip=("method", "rewards", "run", "arm"))]
    for key, model in _sections(RunConfig):
        out += ["", f"## `{key}`", "", first_line(model), "", *table(model, f"{key}.")]
    out += ["", "## `rewards.<name>`", "", "A name of yours, and one of these kinds:"]
    for kind, reward in REWARD_MODELS.items():
        out += ["", f"### `kind: {kind}`", "", first_line(reward)]
        body = table(reward, skip=("kind",))
        out += ["", *body] if len(body) > 2 else []
    out += [
        "",
        "## `methods.<name>`",
        "",
        "A run chooses its method by `method.name`; single settings of a run are columns such as",
        "`method.threshold`. What a method explores: [methods](methods.md).",
    ]
    for name, method in METHOD_MODELS.items():
        out += ["", f"### `{name}`", "", first_line(method), "", *table(method, skip=("name",))]
        recipe = [(f"`{key}`", f"`{scalar(value)}`") for key, value in method.recipe.items()]
        out += ["", f"Set for it elsewhere ({method.source}):", ""]
        out += rows(("setting", "value"), recipe)
    return "\n".join(out) + "\n"
