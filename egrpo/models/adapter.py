"""The file of a trained LoRA, in diffusers' format, which every reader applies at full strength."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from egrpo.errors import UserError, refusing
from egrpo.store.checkpoint import checksum, read_tensors
from egrpo.store.files import replacing

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
CONFIG = "lora_adapter_metadata"
"""Where diffusers looks for peft's settings in the file's metadata."""
SUM = "sha256"
"""Key of the file's checksum among them, where diffusers passes over it."""


def write_adapter(path: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a LoRA so that every reader applies it as strongly as it was trained.

    peft multiplies it by alpha / rank, but alpha stands in the metadata alone, which not all
    readers know: ComfyUI and older diffusers take alpha = rank. So the scale goes into ``lora_B``,
    each number rounded once to float32, and alpha is the rank.

    Args:
        tensors: ``transformer.<layer>.lora_A.weight`` [rank, in] and ``.lora_B.weight``
            [out, rank] of each layer.
        config: peft's settings that hold for them, each key below ``transformer.``; without alpha
            it is the rank.
    """
    from safetensors.torch import save_file

    rank = next(len(v) for k, v in tensors.items() if k.endswith(".lora_A.weight"))
    scale = config.get("transformer.lora_alpha", rank) / rank
    tensors = {k: v * scale if k.endswith(".lora_B.weight") else v for k, v in tensors.items()}
    config = {**config, "transformer.r": rank, "transformer.lora_alpha": rank}
    config[SUM] = checksum(tensors, json.dumps(config, sort_keys=True))
    # one entry: safetensors writes several in any order
    metadata = {CONFIG: json.dumps(config, sort_keys=True)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and peft's settings of a file, as :func:`write_adapter` takes them.

    Files of earlier versions have another alpha than their rank, and some no checksum.

    Raises:
        UserError: if it cannot be read, or its checksum does not match.
    """
    with refusing(f"{path}: cannot be loaded"):
        tensors, metadata = read_tensors(path)
        config = json.loads(metadata.get(CONFIG, "{}"))
        known = config.pop(SUM, None)
    if known and known != checksum(tensors, json.dumps(config, sort_keys=True)):
        raise UserError(f"{path}: damaged, its checksum does not match; train the run again")
    return tensors, config
