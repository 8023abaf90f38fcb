"""Prompt embeddings of a set of prompts, so that no later job loads a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from egrpo.config.models import RunConfig
from egrpo.config.prompts import Prompt
from egrpo.models import load_model
from egrpo.models.conditioning import save_conditioning


def embed(run: RunConfig, prompts: Sequence[Prompt], output: Path) -> None:
    """Encode prompts with the run's model; UserError if that is missing or wrong."""
    encoded = load_model(run.model).encode(prompts, negative=run.guided)
    save_conditioning(output, prompts, encoded)
