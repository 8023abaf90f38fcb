"""The grammar of the toy world: 240 prompts of exactly seven words.

    a {size} {color} {shape} {position}        "a small red circle on the left"

One fifth of the combinations is held out of all training, so that evaluation asks for
combinations that no model of the toy world has seen.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

COLORS: tuple[str, ...] = ("red", "yellow", "green", "cyan", "blue", "purple")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
POSITIONS: tuple[str, ...] = (
    *("on the left", "on the right", "at the top", "at the bottom", "in the center"),
)
SIZES: tuple[str, ...] = ("small", "large")
GRAMMAR = {"size": SIZES, "color": COLORS, "shape": SHAPES, "position": POSITIONS}


@dataclass(frozen=True, slots=True)
class Attributes:
    """What one prompt asks for; each field is a value of the tuples above.

    Raises `ValueError` when a value is not in the grammar.
    """

    size: str
    color: str
    shape: str
    position: str

    def __post_init__(self) -> None:
        for name, known in GRAMMAR.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; expected one of {', '.join(known)}")

    @property
    def indices(self) -> tuple[int, ...]:
        """(size, color, shape, position) as positions in SIZES, COLORS, SHAPES, POSITIONS."""
        return tuple(known.index(getattr(self, name)) for name, known in GRAMMAR.items())


def to_prompt(attributes: Attributes) -> str:
    """The one prompt of these attributes."""
    return f"a {' '.join(getattr(attributes, name) for name in GRAMMAR)}"


def parse_prompt(prompt: str) -> Attributes:
    """The inverse of `to_prompt`; case and surplus white space are ignored.

    Raises `ValueError` when the prompt is outside the grammar.
    """
    words = prompt.lower().split()
    try:
        if len(words) != 7 or words[0] != "a":
            raise ValueError("expected seven words that start with 'a'")
        return Attributes(words[1], words[2], words[3], " ".join(words[4:]))
    except ValueError as error:
        raise ValueError(
            f"prompt {prompt!r} is outside the toy grammar "
            f"'a SIZE COLOR SHAPE POSITION' (as in 'a small red circle on the left'): {error}"
        ) from None


def all_combinations() -> list[Attributes]:
    """All 240 combinations, in the order size, color, shape, position (position fastest)."""
    return [Attributes(*values) for values in itertools.product(*GRAMMAR.values())]


def is_heldout(attributes: Attributes) -> bool:
    """Whether this combination is held out: one position of each (size, color, shape).

    The linear code below spreads the held-out positions, so that each attribute value occurs
    equally often among the held-out prompts (positions 9 or 10 times, as 5 does not divide 48).
    """
    size, color, shape, position = attributes.indices
    return position == (2 * size + color + 2 * shape) % len(POSITIONS)


def split() -> tuple[list[Attributes], list[Attributes]]:
    """(training, held-out) combinations, 192 and 48, always the same."""
    every = all_combinations()
    return [c for c in every if not is_heldout(c)], [c for c in every if is_heldout(c)]


def prompt_lines(combinations: Sequence[Attributes]) -> str:
    """The text of a prompt file: one prompt a line, with a final newline.

    In a fixed mixed order, since monitors, profiles and grids take the first prompts of a file.
    """
    mixed = random.Random(2601).sample(list(combinations), len(combinations))
    return "".join(to_prompt(c) + "\n" for c in mixed)
