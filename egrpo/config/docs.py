"""Documents generated from the settings: commented reference YAML, JSON schema, settings page.

``python -m egrpo.config.docs`` writes them; a test keeps them in step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from egrpo.config.load import METHOD_MODELS
from egrpo.config.methods import Method
from egrpo.config.models import RunConfig, StudyConfig
from egrpo.config.rewards import REWARD_MODELS

HEAD = """\
# Every setting, its default and where that comes from. Generated: `python -m egrpo.config.docs`.
# A study's YAML needs only what differs; `...` marks what has no default.
"""


def about(field: FieldInfo, source: str | None = None) -> str:
    """A setting's sentence with the bounds and the source of its default.

    ``source`` takes the place of the field's own: a method's, for what it inherits.
    """
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    marks = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
    bounds = [
        f"{marks[type(m).__name__]} {getattr(m, type(m).__name__.lower())}"
        for m in field.metadata
        if type(m).__name__ in marks
    ]
    text = field.description or ""
    if bounds:
        text += f" [{', '.join(bounds)}]"
    source = source or str(extra.get("source", ""))
    return f"{text} ({source})" if source and not field.is_required() else text


def section(field: FieldInfo) -> type[BaseModel] | None:
    """The settings model of a field that is a section of its own."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def named(field: FieldInfo) -> type[BaseModel] | None:
    """The settings model of the values of a field that maps names to sections."""
    kinds = get_args(field.annotation) if get_origin(field.annotation) is dict else ()
    kind = kinds[1] if kinds else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def inherited(model: type[BaseModel], name: str) -> str | None:
    """The source of a method's settings, for a field that the method did not write itself."""
    own = name in vars(model).get("__annotations__", {})
    return None if own or not issubclass(model, Method) else model.source


def lines(model: type[BaseModel], indent: int = 0, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """YAML lines of one settings model, comments above the keys."""
    pad = "  " * indent
    for name, field in model.model_fields.items():
        if name in skip:
            continue
        below = section(field)
        if below is not None:
            yield f"{pad}# {(below.__doc__ or '').strip().splitlines()[0]}"
            yield f"{pad}{name}:"
            yield from lines(below, indent + 1)
            continue
        yield f"{pad}# {about(field, inherited(model, name))}"
        entry = named(field)
        if entry is not None:
            yield f"{pad}{name}:"
            yield f"{pad}  <name>:"
            yield from lines(entry, indent + 2)
            continue
        value = "..." if field.is_required() else _scalar(field.default)
        yield f"{pad}{name}: {value}"


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=200).split("\n...")[0].strip()


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
        out += [f"  # {(reward.__doc__ or '').strip().splitlines()[0]}", f"  <name of a {kind}>:"]
        out += [f"    kind: {kind}", *lines(reward, indent=2, skip=("kind",))]
    out += [
        "# Settings by method; a run chooses its method with the column method.name of the runs",
        "# table, and overrides single settings by columns such as method.threshold.",
        "methods:",
    ]
    for name, method in METHOD_MODELS.items():
        out += [f"  # {(method.__doc__ or '').strip().splitlines()[0]}", f"  {name}:"]
        out += lines(method, indent=2, skip=("name",))
        out += [f"    # set for this method elsewhere ({method.source}):"]
        out += [f"    #   {key}: {_scalar(value)}" for key, value in method.recipe.items()]
    return "\n".join(out) + "\n"


def schema() -> str:
    """JSON schema of one resolved run; no unknown keys at any level."""
    return json.dumps(RunConfig.model_json_schema(), indent=1) + "\n"


def settings_page() -> str:
    """Markdown table of every setting."""
    out = [
        "# Settings",
        "",
        "Generated from `egrpo/config/models.py` and `methods.py` by "
        "`python -m egrpo.config.docs`.",
        "",
        "| setting | default | what it is |",
        "|---|---|---|",
    ]

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            below, entry = section(field), named(field)
            if below is not None:
                walk(below, f"{prefix}{name}.")
            elif entry is not None:
                walk(entry, f"{prefix}{name}.<name>.")
            elif name not in ("method", "rewards", "kind"):
                default = "required" if field.is_required() else f"`{_scalar(field.default)}`"
                text = about(field, inherited(model, name))
                out.append(f"| `{prefix}{name}` | {default} | {text} |")

    walk(StudyConfig, "")
    walk(RunConfig, "")
    for kind, reward in REWARD_MODELS.items():
        out.append(
            f"| `rewards.<name>.kind: {kind}` | | {(reward.__doc__ or '').splitlines()[0]} |"
        )
        walk(reward, "rewards.<name>.")
    for name, method in METHOD_MODELS.items():
        walk(method, f"methods.{name}.")
        out.extend(
            f"| `{key}` ({name}) | `{_scalar(value)}` | the method's recipe ({method.source}) |"
            for key, value in method.recipe.items()
        )
    return "\n".join(out) + "\n"


DOCUMENTS = {
    "config/reference.yaml": reference_yaml,
    "workflow/schemas/run.schema.json": schema,
    "docs/settings.md": settings_page,
}
"""Generated files, by path from the repository's root."""


if __name__ == "__main__":
    for path, make in DOCUMENTS.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(make(), encoding="utf-8")
