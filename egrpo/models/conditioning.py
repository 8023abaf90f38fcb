"""Prompt files, and prompt embeddings as they are stored between jobs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from egrpo.errors import UserError
from egrpo.store.files import replacing


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file; its id is its row."""

    text: str
    negative: str = ""


def read_prompts(path: str | Path) -> list[Prompt]:
    """A .txt file (one prompt a line) or .jsonl file (`prompt`, optional `negative_prompt`).

    Empty lines are left out, so ids count prompts.

    Raises:
        UserError: if the file is missing, empty, or a line cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such prompt file (prompts.train, prompts.heldout)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: prompt file cannot be read as UTF-8: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if Path(path).suffix != ".jsonl":
            prompts.append(Prompt(line.strip()))
            continue
        try:
            record = json.loads(line)
            found = Prompt(record["prompt"], record.get("negative_prompt") or "")
            if not (isinstance(found.text, str) and isinstance(found.negative, str)):
                raise TypeError
            prompts.append(found)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(
                f'{path}, line {number}: expected a JSON object whose "prompt" is text'
            ) from None
    if not prompts:
        raise UserError(f"{path}: holds no prompt")
    return prompts


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of N prompts.

    Attributes:
        tensors: name -> [N, ...]; the names are the family's own.
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

    def to(self, device: torch.device) -> Conditioning:
        """A copy on ``device``."""
        return Conditioning(
            {k: v.to(device) for k, v in self.tensors.items()},
            {k: v.to(device) for k, v in self.negative.items()},
        )


def save_conditioning(
    path: str | Path, parts: dict[str, tuple[list[Prompt], Conditioning]]
) -> None:
    """Store named prompt sets with their texts in one safetensors file."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    for part, (prompts, conditioning) in parts.items():
        texts[part] = json.dumps([p.text for p in prompts])
        for kind, group in (("prompt", conditioning.tensors), ("negative", conditioning.negative)):
            for name, tensor in group.items():
                tensors[f"{part}/{kind}/{name}"] = tensor.contiguous()
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=texts)


def load_conditioning(path: str | Path, part: str) -> tuple[list[str], Conditioning]:
    """Texts and embeddings of one prompt set.

    Raises:
        UserError: if the file is missing, damaged, or lacks the set.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as handle:
            texts = (handle.metadata() or {}).get(part)
            if texts is None:
                raise UserError(f"{path}: holds no prompt set {part!r}; delete it and run again")
            groups: dict[str, dict[str, Tensor]] = {"prompt": {}, "negative": {}}
            for key in handle.keys():  # noqa: SIM118  (not a mapping)
                owner, kind, name = key.split("/")
                if owner == part:
                    groups[kind][name] = handle.get_tensor(key)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the `embed` rule makes it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged embeddings ({error}); delete it and run again") from None
    return json.loads(texts), Conditioning(groups["prompt"], groups["negative"])
