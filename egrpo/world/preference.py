"""A preference-like score of the toy world: a small CNN that sees the image alone.

It stands for the aesthetic models that the paper trains on (HPS-v2.1, PickScore): learnt from
noisy pairwise choices, blind to the verifier, and open to reward hacking. It likes crisp,
centered and saturated shapes, whatever the prompt says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from egrpo.store.checkpoint import read_tensors
from egrpo.store.files import replacing

FORMAT = "egrpo-toy-preference-1"


class PreferenceModel(nn.Module):
    """Scores uint8 images [n, 3, 32, 32] (or float in [0, 255]); float32 [n].

    channels: width of the three convolutions, each of stride 2. The score is shifted and scaled
    by the buffers `mean` and `std`, so that clean renders have about mean 0 and deviation 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: Sequence[int] = (16, 32, 32)) -> None:
        super().__init__()
        self.channels = tuple(channels)
        layers: list[nn.Module] = []
        for before, after in pairwise((3, *self.channels)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.features = nn.Sequential(*layers)
        flat = self.channels[-1] * 16
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(flat, 32), nn.GELU(), nn.Linear(32, 1))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        """Raises `ValueError` for images of another shape."""
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, 32, 32):
            raise ValueError(f"expected images [n, 3, 32, 32], got {list(images.shape)}")
        pixels = images.to(self.mean.dtype) / 127.5 - 1.0
        raw: Tensor = self.head(self.features(pixels))[:, 0]
        return (raw - self.mean) / self.std


def save_preference(model: PreferenceModel, path: str | Path) -> None:
    """Weights as safetensors; the widths go into the file's metadata."""
    from safetensors.torch import save_file

    metadata = {"format": FORMAT, "channels": ",".join(map(str, model.channels))}
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_preference(path: str | Path) -> PreferenceModel:
    """The model of a file written by `save_preference`, frozen, in evaluation mode.

    Raises `ValueError` when the file is missing, of another format, or lacks weights.
    """
    from safetensors import SafetensorError

    where = Path(path)
    if not where.is_file():
        raise ValueError(f"preference weights not found at {where}; see assets/toy/README.md")
    try:
        tensors, metadata = read_tensors(where)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where} is not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "no format")
        raise ValueError(f"{where} holds {found}, expected {FORMAT}")
    widths = metadata.get("channels", "")
    if not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3}){2}", widths, re.ASCII):
        raise ValueError(f"{where}: channels {widths!r} are not three widths")
    model = PreferenceModel([int(c) for c in widths.split(",")])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from None
    return model.eval().requires_grad_(False)
