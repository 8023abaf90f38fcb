"""What an evaluation is computed from, in parts that are kept apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sources:
    """Digests of what an evaluation is computed from.

    Attributes:
        images: weights, settings, code: all but the prompts.
        prompts: one of each prompt.
        rewards: one of each reward, by name.
    """

    images: str
    prompts: tuple[str, ...]
    rewards: Mapping[str, str]

    def head(self) -> dict[str, str]:
        """As tables hold them."""
        return {
            "images_of": self.images,
            "prompts_of": json.dumps(self.prompts),
            "rewards_of": json.dumps(dict(self.rewards)),
        }
