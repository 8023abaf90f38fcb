"""What all settings models share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

PAPER = "E-GRPO, arXiv 2601.00423"
CHOICE = "this project's choice"


def setting(default: Any, text: str, source: str = CHOICE, **bounds: Any) -> Any:
    """A field with its sentence (unit included), the source of its default, and its bounds."""
    return Field(default, description=text, json_schema_extra={"source": source}, **bounds)


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)
