"""Prompt embeddings of both prompt files, so that no later job loads a text encoder."""

from __future__ import annotations

from pathlib import Path

from egrpo.config.models import RunConfig
from egrpo.config.prompts import read_prompts, train_prompts
from egrpo.models import load_model
from egrpo.models.conditioning import save_conditioning


def embed(run: RunConfig, output: Path) -> None:
    """Encode ``prompts.train`` and ``prompts.heldout`` with the run's model.

    Raises:
        UserError: if a prompt file or the model is missing or wrong.
    """
    files = run.prompts
    sets = {
        "train": train_prompts(files.train, files.limit, files.column),
        "heldout": read_prompts(files.heldout, files.column),
    }
    model = load_model(run.model)
    parts = {name: (p, model.encode(p, negative=run.guided)) for name, p in sets.items()}
    save_conditioning(output, parts)
