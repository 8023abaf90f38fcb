"""Prompt embeddings of a set of prompts, so that no later job loads a text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from egrpo.config.models import RunConfig
from egrpo.config.prompts import Prompt, read_prompts, train_prompts
from egrpo.models import load_model
from egrpo.models.conditioning import Embeddings, save_conditioning


def embed(run: RunConfig, prompts: Sequence[Prompt], output: Path) -> None:
    """Encode prompts with the run's model; UserError if that is missing or wrong."""
    encoded = load_model(run.model, text=True).encode(prompts, negative=run.guided)
    save_conditioning(output, prompts, encoded)


def embed_files(run: RunConfig, folder: Path) -> Embeddings:
    """Embeddings of a run's two prompt files, by the sets that its jobs ask for.

    Those that lie in the folder are not made again.
    """
    files = run.prompts
    found = {
        "train": train_prompts(files.train, files.limit, files.column),
        "heldout": read_prompts(files.heldout, files.column),
    }
    paths = {name: folder / f"{name}.safetensors" for name in found}
    for name, prompts in found.items():
        if not paths[name].exists():
            embed(run, prompts, paths[name])
    return {**paths, "profile": paths["train"], "monitor": paths["heldout"]}
