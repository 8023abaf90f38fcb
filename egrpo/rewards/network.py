"""What the rewards that are networks share: device, batches, text features, loading."""

from __future__ import annotations

import io
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from egrpo.config.rewards import NetworkReward
from egrpo.errors import UserError, during, refusing
from egrpo.rewards.torchscript import is_torchscript, read_torchscript
from egrpo.settings import is_hub_id

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and std of OpenAI's CLIP, which all these networks were trained with."""


class Network(ABC):
    """Scores batches of images against prompts."""

    def __init__(self, settings: NetworkReward, device: str) -> None:
        self.settings = settings
        self.device = torch.device(settings.device or device)

    @abstractmethod
    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[n] scores of one batch of images uint8 [n, 3, h, w]."""

    @during("scoring")
    def score(self, images: Tensor, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[n] float32 scores of images uint8 [n, 3, h, w]."""
        size, dtype, parts = self.settings.batch, getattr(torch, self.settings.dtype), []
        reduced = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        with torch.no_grad(), reduced:
            for begin in range(0, len(images), size):
                some = slice(begin, begin + size)
                parts.append(self.scores(images[some], list(prompts[some])).float().cpu())
        return torch.cat(parts).numpy()


class Cosine(Network):
    """A cosine of two encoders; the features of a prompt are computed once."""

    def __init__(self, settings: NetworkReward, device: str) -> None:
        super().__init__(settings, device)
        self.texts: dict[str, Tensor] = {}

    @abstractmethod
    def image_features(self, images: Tensor) -> Tensor:
        """[n, D] of images uint8 [n, 3, h, w]; not normalized."""

    @abstractmethod
    def text_features(self, prompts: list[str]) -> Tensor:
        """[n, D], not normalized."""

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        """[n] raw cosines."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.texts]
        if new:
            features = normalized(self.text_features(new))
            self.texts.update(zip(new, features, strict=True))
        text = torch.stack([self.texts[p] for p in prompts])
        return (normalized(self.image_features(images)) * text).sum(-1)


def place(module: Any, device: torch.device) -> Any:
    """A network on its device, for inference."""
    with refusing(f"device {device} cannot be used"):
        return module.to(device).eval().requires_grad_(False)


def pictures(images: Tensor) -> list[Image.Image]:
    """PIL images of uint8 [n, 3, h, w], or [n, 4, h, w] with opacity."""
    return [Image.fromarray(p) for p in images.permute(0, 2, 3, 1).cpu().numpy()]


def png_of(image: Tensor, side: int | None = None) -> bytes:
    """A PNG file of one image uint8 [3 or 4, h, w]; a square of ``side`` pixels if given."""
    (picture,) = pictures(image[None])
    buffer = io.BytesIO()
    (picture if side is None else picture.resize((side, side))).save(buffer, format="PNG")
    return buffer.getvalue()


def normalized(features: Tensor) -> Tensor:
    """Rows of length 1, float32."""
    return torch.nn.functional.normalize(features.float(), dim=-1)


def read_state(path: str, revision: str | None = None) -> dict[str, Tensor]:
    """Tensors of a checkpoint: safetensors, torch's format, TorchScript; none of its code runs.

    Where the checkpoint holds them under ``state_dict``, beside other things, those.

    Args:
        path: a file, or ``owner/name/file`` of a hub id, which is fetched.
        revision: the hub id's commit.

    Raises:
        UserError: if there is no such file, or it is damaged or holds more than tensors.
    """
    if Path(path).is_file():
        file = path
    elif is_hub_id(path, file=True):
        from huggingface_hub import hf_hub_download

        owner, repository, name = path.split("/", 2)
        with refusing(f"{path} at {revision}: cannot be fetched"):
            file = hf_hub_download(f"{owner}/{repository}", name, revision=revision)
    else:
        raise UserError(f"{path}: no such file, and not one of a hub id (owner/name/file)")
    with refusing(f"{path}: cannot be read as weights"):
        state = _state(file)
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a table of weights")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"{path}: {key!r:.60} is a {type(value).__name__}, not weights")
    return dict(state)


def _state(path: str) -> Any:
    """What a checkpoint holds, whose parts are checked where its format has sums to check."""
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            # torch checks no sums, and takes nothing at all from a part that is marked as a folder
            folders = (part.filename for part in archive.infolist() if part.external_attr & 0x10)
            spoilt = next(folders, None) or archive.testzip()
        if spoilt is not None:
            raise ValueError(f"its part {spoilt} is damaged")
    if is_torchscript(path):
        return read_torchscript(path)
    return torch.load(path, map_location="cpu", weights_only=True)


NO_CODE = {"trust_remote_code": False}
"""What else transformers would ask about, and wait."""


def loaded(cls: Any, key: str, source: str, revision: str | None, **more: Any) -> Any:
    """What the folder or hub id under a setting holds, in transformers' format."""
    local = Path(source).is_dir()
    with refusing(f"{key}: {source}: cannot be loaded"):
        found = cls.from_pretrained(source, revision=revision, local_files_only=local, **more)
        if "output_loading_info" not in more:
            return found
        model, report = found
        if report["missing_keys"]:
            raise ValueError(f"{min(report['missing_keys'])} is missing")
        return model


def load_strictly(module: Any, state: Mapping[str, Tensor], path: str) -> None:
    """Fill a network; every weight must be there and fit.

    Raises:
        UserError: naming a weight that is missing, unknown or of another shape.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [f"{key} is missing" for key in expected if key not in given]
    wrong += [f"{key} is not a weight of this network" for key in given if key not in expected]
    both = [(key, given[key], shape) for key, shape in expected.items() if key in given]
    wrong += [f"{key} has shape {has}, not {shape}" for key, has, shape in both if has != shape]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(f"{path}: does not fit: {wrong[0]}{more}")
    with refusing(f"{path}: does not fit"):
        module.load_state_dict(state)


def linear_head(state: Mapping[str, Tensor], path: str) -> torch.nn.Sequential:
    """The chain of linear layers ``layers.<n>.weight`` that LAION and ImageReward publish.

    Nothing stands between the layers: the dropouts there are for training.

    Raises:
        UserError: if there is no such chain.
    """
    layers: list[torch.nn.Linear] = []
    with refusing(f"{path}: the head does not fit"):
        numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.")})
        for n in numbers:
            weight, bias = state[f"layers.{n}.weight"], state[f"layers.{n}.bias"]
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
            if layers and layers[-1].out_features != layer.in_features:
                raise ValueError(f"layers.{n} does not take what the layer before it gives")
            layers.append(layer)
    if not layers or layers[-1].out_features != 1:
        raise UserError(f"{path}: no head `layers.<n>.weight` that ends in one number")
    return torch.nn.Sequential(*layers)
