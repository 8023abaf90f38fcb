"""Prompt embeddings as they are stored between jobs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from egrpo.errors import UserError, one_line
from egrpo.store.checkpoint import checksum, read_tensors
from egrpo.store.files import replacing

if TYPE_CHECKING:
    from egrpo.config.prompts import Prompt


KINDS = ("prompt", "negative")


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of N prompts.

    Attributes:
        tensors: name -> [N, ...]: ``embeds`` [N, L, D], and what else the family has; ``lengths``
            [N] where prompts differ in theirs.
        negative: the same names for the negative prompts; empty without guidance.
    """

    tensors: dict[str, Tensor]
    negative: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts at ``index`` [B] int64, in that order."""
        return Conditioning(
            {k: v[index] for k, v in self.tensors.items()},
            {k: v[index] for k, v in self.negative.items()},
        )

    def batch(self, ids: Sequence[int], device: torch.device) -> Conditioning:
        """The prompts ``ids`` on ``device``, padded no further than the longest of them.

        All prompts together stay on the CPU: FLUX.1's embeddings take 4 MiB each.
        """
        rows = self.rows(torch.tensor(list(ids)))
        groups = trimmed(rows.tensors), trimmed(rows.negative)
        return Conditioning(*({k: v.to(device) for k, v in group.items()} for group in groups))


def padded(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all parts, one below the other; ``embeds`` [n, L, D] get zeros to the longest L."""
    if not parts:
        return {}
    longest = max(part["embeds"].shape[1] for part in parts)
    rows = {name: [part[name] for part in parts] for name in parts[0]}
    rows["embeds"] = [
        torch.nn.functional.pad(e, (0, 0, 0, longest - e.shape[1])) for e in rows["embeds"]
    ]
    return {name: torch.cat(tensors) for name, tensors in rows.items()}


def trimmed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without padding that no prompt needs; nothing where prompts have no lengths."""
    if "lengths" not in tensors:
        return tensors
    return tensors | {"embeds": tensors["embeds"][:, : int(tensors["lengths"].max())]}


Embeddings = Mapping[str, Path]
"""Files of embedded prompts, by the set of prompts: train, monitor, heldout, profile."""


def save_conditioning(
    path: str | Path, prompts: Sequence[Prompt], conditioning: Conditioning
) -> None:
    """Store a set of prompts with its texts in one safetensors file."""
    from safetensors.torch import save_file

    groups = zip(KINDS, (conditioning.tensors, conditioning.negative), strict=True)
    tensors = {
        f"{kind}/{name}": tensor.contiguous()
        for kind, group in groups
        for name, tensor in group.items()
    }
    texts = json.dumps([p.text for p in prompts])
    head = {"texts": texts, "sha256": checksum(tensors, texts)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=head)


def load_conditioning(path: str | Path) -> tuple[list[str], Conditioning]:
    """Texts and embeddings of a set of prompts.

    Raises:
        UserError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError

    groups: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    try:
        tensors, head = read_tensors(path)
        for key, tensor in tensors.items():
            kind, name = key.split("/")
            groups[kind][name] = tensor
        texts = json.loads(head["texts"])
        if checksum(tensors, head["texts"]) != head["sha256"]:
            raise ValueError("checksum does not match")
        _check(texts, groups)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the `embed` rule makes it") from None
    except (SafetensorError, OSError, ValueError, LookupError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged embeddings ({one_line(error)}); delete it and run again"
        ) from None
    return texts, Conditioning(groups["prompt"], groups["negative"])


def _check(texts: Any, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise ValueError unless there is a row of each tensor for each text."""
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("no list of texts")
    if "embeds" not in groups["prompt"]:
        raise ValueError("no embeds")
    for kind, group in groups.items():
        for name, tensor in group.items():
            if tensor.ndim == 0 or len(tensor) != len(texts):
                raise ValueError(f"{kind}/{name} has no row for each of {len(texts)} texts")
