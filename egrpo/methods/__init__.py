"""The compared methods: one file each, and one line each in :data:`METHODS`.

What they share is in ``base`` and ``shared``; the shapes of their trees are in ``shapes``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from egrpo.methods.base import Method

METHODS = (
    "egrpo.Egrpo",
    "egrpo.EgrpoEfficient",
    "flow_grpo.FlowGrpo",
    "flow_grpo.FlowGrpoFast",
    "dancegrpo.DanceGrpo",
    "mixgrpo.MixGrpo",
    "mixgrpo.MixGrpoFlash",
    "g2rpo.G2rpo",
    "branchgrpo.BranchGrpo",
    "tempflow_grpo.TempflowGrpo",
    "diffusion_nft.DiffusionNft",
    "awm.Awm",
)
"""File and class of every method, in the order of the reference of settings."""


def _classes() -> dict[str, type[Method]]:
    found: dict[str, type[Method]] = {}
    for line in METHODS:
        module, name = line.split(".")
        model = getattr(import_module(f"{__name__}.{module}"), name)
        found[model.model_fields["name"].default] = model
    return found


METHOD_MODELS = _classes()
"""Class of each method, by name."""

if TYPE_CHECKING:
    AnyMethod = Method
else:
    AnyMethod = Annotated[Union[tuple(METHOD_MODELS.values())], Field(discriminator="name")]  # noqa: UP007
"""Settings of any method: its name says which class reads them."""
