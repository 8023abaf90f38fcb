"""What pydantic refuses, as one line: key, what is wrong, what would be right."""

from __future__ import annotations

import difflib
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from egrpo.config.models import RunConfig
from egrpo.config.rewards import REWARD_MODELS
from egrpo.config.study import StudyConfig
from egrpo.methods import METHOD_MODELS

_UNION_MEMBERS = ("int", "float", "list[int]", "constrained-int", "constrained-float")


TAGGED: dict[str, type[BaseModel]] = {**METHOD_MODELS, **REWARD_MODELS}
"""What pydantic puts into the place of a setting whose name or kind chooses its model."""


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
