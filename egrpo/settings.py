"""What all settings models share."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import unquote

from annotated_types import Ge, Gt, Lt
from pydantic import BaseModel, ConfigDict, Field, model_validator

PAPER = "E-GRPO, arXiv 2601.00423"
EXPERIMENTS = f"{PAPER}, experiments"
CHOICE = "this project's choice"

Count = Annotated[int, Ge(1)]
Batch = Count | Literal["auto"]
Fraction = Annotated[float, Gt(0.0), Lt(1.0)]

MOST = 2**53
"""No setting's whole number is larger: JSON and Parquet keep these exactly."""


def setting(default: Any, source: str = CHOICE, *, unit: str | None = None, **bounds: Any) -> Any:
    """A field with the source of its default, its unit, and its bounds.

    Its sentence is the docstring below it.

    Args:
        default: ``...`` where there is none.
        unit: every number but a seed has one; null is ``1``, a plain number's, where the default is
            a number.
    """
    if unit is None:
        unit = "1" if type(default) in (int, float) else ""
    extra: dict[str, Any] = {"source": source, **({"unit": unit} if unit else {})}
    return Field(default, json_schema_extra=extra, **bounds)


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, strict=True, use_attribute_docstrings=True
    )

    sources: ClassVar[tuple[str, ...]] = ()
    """Names of the settings that name a file or folder."""

    @model_validator(mode="after")
    def _can_be_kept(self) -> Self:
        for name in type(self).model_fields:
            wrong = unfit(getattr(self, name), name)
            if wrong:
                raise ValueError(wrong)
        for name in self.sources:
            check_path(name, getattr(self, name) or "")
        return self


_PATTERN = re.compile(r"[\x00-\x1f\x7f{}]|<[a-z][a-z0-9_]*>")


def check_path(key: str, path: str) -> None:
    """Refuse a path that the workflow's rules cannot name.

    Snakemake reads ``{x}`` and ``<x>`` in the name of a file as patterns, and knows no escape; a
    line that ends within a name ends its messages and reports.

    Raises:
        ValueError: naming what it holds.
    """
    found = _PATTERN.search(path)
    if found:
        raise ValueError(
            f"{key}: {path!r:.100} holds {found[0]!r}, which no file of a workflow's can have in "
            "its name; rename it, or link to it by another name"
        )


def unfit(value: Any, key: str) -> str | None:
    """Key and fault of a plain value, or of one within, that no file or file name could hold."""
    if isinstance(value, int) and abs(value) > MOST:
        return f"{key}: a whole number of at most {MOST} is needed"
    if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        return f"{key}: {value!r:.60} holds a character that no file name can hold"
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        parts = [*((key, name) for name in value), *((f"{key}.{k}", v) for k, v in value.items())]
    elif isinstance(value, list):
        parts = [(f"{key}.{n}", v) for n, v in enumerate(value)]
    return next((wrong for name, part in parts if (wrong := unfit(part, name))), None)


_NAMED_SECRET = re.compile(r"(pass(word|wd|phrase)?|pwd|token|secret)=", re.IGNORECASE)


def without_password(address: str) -> str:
    """A tracking address as files and logs may hold it.

    Of a server without user and password, of a database without the password; without a query that
    names a secret. A password may hold a slash or an @ itself.
    """
    scheme, mark, rest = address.partition("://") if "://" in address else ("", "", address)
    if scheme == "sqlite":
        return address  # the rest is a path
    user, _, host = rest.rpartition("@")
    name = "" if scheme in ("", "http", "https") else user.partition(":")[0]
    host, question, query = host.partition("?")
    if _NAMED_SECRET.search(unquote(query)):
        question = query = ""
    return f"{scheme}{mark}{name}{'@' if name else ''}{host}{question}{query}"


def is_hub_id(path: str, *, file: bool = False) -> bool:
    """Whether ``path`` is an ``owner/name`` and not a folder, nor a mistyped one beside folders.

    ``file``: whether it is an ``owner/name/file``, one file of such a repository.
    """
    owner = Path(path).parts[0] if path else ""
    pattern = r"[\w.-]+/[\w.-]+" + r"(/[\w.-]+)+" * file
    return not os.path.isdir(owner) and re.fullmatch(pattern, path) is not None
