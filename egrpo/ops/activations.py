"""Memory of activations: what a network keeps for its backward pass, and needs while it runs.

All in bytes a token and unit of width. Tensors were counted on meta tensors with the real blocks at
full width (``tests/test_activations.py`` counts again): those that autograd saves, and those alive
at once. Attention is fused and the type 16 bit; in float32 both are taken as twice as much.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from egrpo.config.models import TOKEN, Model
from egrpo.models.families import FAMILIES
from egrpo.models.twin import SMALL as MODULATION
from egrpo.ops.rates import layers_and_width
from egrpo.store.weights import Part

KEPT: Mapping[str, Mapping[str, int]] = {
    "flux": {"num_layers": 24, "num_single_layers": 22},
    "sd3": {"num_layers": 32, "dual_attention_layers": 20},
    "qwen_image": {"num_layers": 32},
    "z_image": {"n_layers": 60, "n_refiner_layers": 60},
}
"""What a block keeps whose weights are frozen, by the setting that counts the blocks.

* attention: query, key, value and result, 8; the norms of query and key their inputs, 4 in one
  kernel (FLUX), 12 step by step in float32;
* MLP: its hidden layer before the nonlinearity, 4 widths, 8; Z-Image's gated one 3 x 2.67 widths,
  16; layer norms: their inputs, 2 each, RMS norms step by step 6;
* SD3's second attention, of image tokens alone: 8 + 12.

Frozen linear layers keep nothing, nor does a product with a modulation that is not trained."""

CLIP_TOKENS = 77
"""Text tokens that SD3 has beside those of ``max_sequence_length``, if its tokenizer says nothing
else, as the toy's does."""

COPY = 4
"""An adapted layer keeps its input, which the adapter reads in float32."""

WORKING: Mapping[str, tuple[int, int]] = {
    "flux": (35, 13),
    "sd3": (27, 19),
    "qwen_image": (28, 17),
    "z_image": (32, 20),
}
"""Alive at once in an evaluation without gradients: without adapters, and beside the largest
adapted layer. Fitted: the counts at 512 to 1024 pixels, rounded up. Compiled blocks need less."""

TEXT = re.compile(r"add_|context|txt_")
JOINT = re.compile(r"^(single_transformer_blocks|layers)\.")
"""Names of linear layers that see text alone, and text and image together; others: the image."""

BLOCK = re.compile(r"(?:blocks|layers|refiner)\.\d+\.")
"""Names of weights in repeated blocks."""


@dataclass(frozen=True)
class Activations:
    """Of one network on one image; ``guidance`` doubles the rows."""

    model: Model
    part: Part

    @property
    def image(self) -> int:
        """Image tokens."""
        return (self.model.height // TOKEN) * (self.model.width // TOKEN)

    @property
    def text(self) -> int:
        """Text tokens, at most; ``max_sequence_length`` does not count SD3's of CLIP."""
        given = self.model.max_sequence_length
        tokens = FAMILIES[self.model.family].tokens if given is None else given
        return tokens + CLIP_TOKENS * (self.model.family == "sd3")

    def working(self, size: int, *, beside: bool) -> float:
        """Bytes of an evaluation without gradients; ``beside``: adapters are not merged.

        An adapted layer has its result, the adapter's in float32, and their sum in float32.
        """
        merged, rest = WORKING[self.model.family]
        row, rows = self._row * size / 2, self.model.evaluations_per_velocity
        if not beside:
            return rows * merged * row
        layers = trained_layers(self.model, self.part)
        largest = max((self._tokens(name) * out for name, out, _ in layers), default=0)
        return rows * max(merged * row, rest * row + (size + 8) * largest)

    def kept(self, size: int, *, checkpointing: bool) -> float:
        """Bytes of a forward pass that are there when its backward pass begins.

        With checkpointing each block keeps its input, and one at a time is computed again.
        """
        config, total = self.part.config, 0.0
        layers, width = layers_and_width(config)
        for key, kept in KEPT[self.model.family].items():
            found = config.get(key) or 0
            blocks = found if isinstance(found, int) else len(found)
            tokens = self.image if key == "dual_attention_layers" else self.image + self.text
            total += blocks * kept * tokens * width * size / 2
        for name, _, inputs in trained_layers(self.model, self.part):
            total += COPY * inputs * self._tokens(name)
        if checkpointing:
            total = layers * size * self._row + total / layers
        return self.model.evaluations_per_velocity * total

    @property
    def _row(self) -> int:
        """Tokens times width."""
        return (self.image + self.text) * layers_and_width(self.part.config)[1]

    def _tokens(self, name: str) -> int:
        if JOINT.search(name):
            return self.image + self.text
        return self.text if TEXT.search(name) else self.image


def trained_layers(
    model: Model, part: Part, tuning: str | None = None
) -> Iterator[tuple[str, int, int]]:
    """(name, outputs, inputs) of the linear layers with an adapter; of all, where all are trained.

    Without those that see a row an image, not one a token. ``tuning``: None is the model's.
    """
    targets = tuple(model.lora.targets or FAMILIES[model.family].lora_targets)
    for name, shape in part.shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) != 2 or layer == name:
            continue
        if (tuning or model.tuning) == "full":
            wanted = BLOCK.search(name) is not None and not MODULATION.search(layer)
        else:
            wanted = any(layer == t or layer.endswith(f".{t}") for t in targets)
        if wanted:
            yield layer, shape[0], shape[1]
