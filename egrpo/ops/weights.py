"""Weights on a GPU by the shapes in a model's files: stored, adapted, held by the twin."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

from egrpo.config.models import Model, RunConfig
from egrpo.models.families import FAMILIES
from egrpo.ops.activations import trained_layers
from egrpo.ops.rates import layers_and_width
from egrpo.store.weights import Part

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MERGING = 20
"""Bytes a weight while an adapted layer is merged: its update, the sum and the rounding's random
numbers in 32 bit, twice."""


def lora_parameters(run: RunConfig, part: Part) -> int:
    """Parameters of the adapters: rank times inputs plus outputs of each adapted layer."""
    layers = trained_layers(run.model, part, "lora")
    return run.model.lora.rank * sum(outputs + inputs for _, outputs, inputs in layers)


def stored_bytes(model: Model, part: Part) -> float:
    """The transformer's weights; with ``fp8_weights`` diffusers leaves some layers as they are."""
    size = BYTES[model.dtype]
    if not model.fp8_weights:
        return float(part.parameters * size)
    return sum(prod(shape) * (1 if cast else size) for shape, cast in _cast(model, part))


def _cast(model: Model, part: Part) -> Iterator[tuple[tuple[int, ...], bool]]:
    """(shape, whether it is stored as float8) of each weight."""
    import diffusers

    network: Any = getattr(diffusers, FAMILIES[model.family].transformer_class)
    left = network._skip_layerwise_casting_patterns or ()
    for name, shape in part.shapes.items():
        yield shape, len(shape) > 0 and not any(pattern in name for pattern in left)


def twin_bytes(model: Model, part: Part, *, adapted: bool) -> tuple[float, float]:
    """What the twin that samples has for itself, and what merging its largest layer needs.

    Merged layers in ``dtype``, and with ``fp8_sampling`` the blocks' linear layers in a byte a
    weight. ``adapted``: whether there are adapters.
    """
    merged = adapted and model.tuning == "lora" and model.merge_lora_for_sampling
    own = {name: o * i for name, o, i in trained_layers(model, part)} if merged else {}
    held = {name: weights * BYTES[model.dtype] for name, weights in own.items()}
    if model.fp8_sampling:
        blocks = trained_layers(model, part, "full")
        held |= {name: o * i for name, o, i in blocks if o % 16 == i % 16 == 0}
    return float(sum(held.values())), float(MERGING * max(own.values(), default=0))


def upcast_bytes(run: RunConfig, part: Part) -> float:
    """Layers stored as float8 that the backward pass keeps as ``dtype``: all without checkpointing.

    One block's with it, about a layer's share.
    """
    if not run.model.fp8_weights:
        return 0.0
    cast = sum(prod(shape) for shape, is_cast in _cast(run.model, part) if is_cast)
    layers, _ = layers_and_width(part.config)
    share = layers if run.train.gradient_checkpointing else 1
    return BYTES[run.model.dtype] * cast / share
