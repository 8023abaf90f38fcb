"""Settings of the rewards, one class each; ``egrpo.rewards`` computes them."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from egrpo.settings import Count, Settings, setting

HPS = "HPSv2, arXiv 2306.09341 and its public code"
PICK = "PickScore, arXiv 2305.01569 and its model card"
IMAGE_REWARD = "ImageReward, arXiv 2304.05977 and its public code"
LAION = "LAION, improved-aesthetic-predictor"
UNIFIED = "UnifiedReward, arXiv 2503.05236; asked as in Flow-GRPO's public code"

FINAL_SCORE = r"(?is)\A.*Final Score[\s*_]*:[\s*_]*([-+]?\d+(?:\.\d+)?)"
"""The last number after `Final Score:`, with or without Markdown's emphasis."""
FINAL_SCALE = (1.0, 5.0)
"""What UnifiedReward's published question asks for."""


class RewardSettings(Settings):
    """What every reward has."""

    module: ClassVar[str]
    """Module of ``egrpo.rewards`` that computes it, by a class of the same name."""
    unscored: ClassVar[frozenset[str]] = frozenset({"device", "batch", "token_file"})
    """Settings that change no score."""
    hub: ClassVar[dict[str, str]] = {}
    """Those of `sources` that may be a hub id -> the setting of its commit."""
    hub_files: ClassVar[tuple[str, ...]] = ()
    """Those of them that are one file of it: owner/name/file."""
    wanted: ClassVar[bool] = True
    """Whether a higher number is better also for a run that was not trained on it."""

    @classmethod
    def measures(cls) -> str:
        """What it measures: the first line of the class's docstring, a sentence for readers."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @property
    def files(self) -> dict[str, str]:
        """Files and folders that the reward reads, by setting."""
        named = {name: getattr(self, name) for name in self.sources}
        return {name: path for name, path in named.items() if path is not None}


class NetworkReward(RewardSettings):
    """What every reward has that is a network."""

    device: str | None = setting(None, pattern=r"^[a-z]+(:\d+)?$")
    """torch device (cpu, cuda:1); null: the model's."""
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32")
    """Type of the network's matrix products; weights and scores stay float32."""
    batch: Count = setting(64, unit="images")
    """Most images scored at once."""


class FileReward(NetworkReward):
    """What every reward has whose weights are one file."""

    sources: ClassVar[tuple[str, ...]] = ("path",)
    hub: ClassVar[dict[str, str]] = {"path": "revision"}
    hub_files: ClassVar[tuple[str, ...]] = ("path",)

    revision: str | None = setting(None)
    """Commit, where `path` is a file of a hub id: owner/name/file."""


class Verifier(RewardSettings):
    """How well color, shape, position and size fit a toy prompt: their geometric mean, 0 to 1."""

    module = "verifier"
    kind: Literal["verifier"]


class VerifierExact(RewardSettings):
    """1 where color, shape, position and size are all as a toy prompt asks, else 0."""

    module = "verifier"
    kind: Literal["verifier_exact"]


class Jpeg(RewardSettings):
    """How small a file an image makes: minus its kB as JPEG at quality 95 (arXiv 2305.13301)."""

    wanted = False
    module = "jpeg"
    kind: Literal["jpeg_compressibility"]


class Preference(RewardSettings):
    """How crisp, centered and saturated a toy image is to a small network, whatever the prompt."""

    module = "preference"
    sources = ("path",)

    kind: Literal["preference"]
    path: str = setting(...)
    """File of its weights, safetensors."""


class Clip(FileReward):
    """How well image and prompt match: raw cosine by a CLIP model of OpenAI's (clip-anytorch)."""

    module = "clip"

    kind: Literal["clip"]
    path: str = setting(...)
    """File of its weights in OpenAI's format, such as ViT-L-14.pt."""


class OpenClip(FileReward):
    """How well image and prompt match: raw cosine by a model of open_clip."""

    module = "open_clip"

    kind: Literal["open_clip"]
    path: str = setting(...)
    """File of its weights, such as open_clip_pytorch_model.bin."""
    architecture: str = setting(
        "ViT-H-14-378-quickgelu", source="the E-GRPO paper's CLIP is DFN5B ViT-H"
    )
    """Name of the architecture in open_clip, or a .json file of open_clip's format."""
    tag: str | None = setting("dfn5b", source="open_clip")
    """open_clip's name of the weights, which decides the preprocessing; null: the architecture's
    own."""


class Hps(FileReward):
    """HPSv2.1, learned from people's choices: cosine with the prompt, about 0.31 for FLUX.1-dev.

    A raw cosine; images are padded, not cropped.
    """

    module = "open_clip"

    kind: Literal["hpsv2"]
    path: str = setting(...)
    """HPS_v2.1_compressed.pt (hub: xswu/HPSv2)."""
    architecture: str = setting("ViT-H-14", source=HPS)
    """Name of the architecture in open_clip, or a .json file of open_clip's format."""


class PickScore(NetworkReward):
    """PickScore, learned from people's choices: scaled cosine with the prompt, about 23 undivided.

    The scale is exp(logit_scale); the E-GRPO paper divides by 100.
    """

    module = "pickscore"
    sources = ("path", "processor")
    hub: ClassVar[dict[str, str]] = {"path": "revision", "processor": "processor_revision"}

    kind: Literal["pickscore"]
    path: str = setting(...)
    """Folder of the model, or a hub id (yuvalkirstain/PickScore_v1)."""
    revision: str | None = setting(None)
    """Commit of the hub id."""
    processor: str | None = setting(None, source=PICK)
    """Folder or hub id of the processor (laion/CLIP-ViT-H-14-laion2B-s32B-b79K); null: `path`."""
    processor_revision: str | None = setting(None)
    """Commit of the processor's hub id."""
    divide_by: PositiveFloat = setting(1.0)
    """The score is divided by this; the paper's tables: 100."""


class ImageReward(FileReward):
    """ImageReward, learned from people's rankings of images for a prompt, normalized as published.

    BLIP with a head of linear layers.
    """

    module = "imagereward"
    sources = ("path", "tokenizer", "med_config")
    hub: ClassVar[dict[str, str]] = {"path": "revision", "tokenizer": "tokenizer_revision"}

    kind: Literal["imagereward"]
    path: str = setting(...)
    """ImageReward.pt (hub: THUDM/ImageReward)."""
    tokenizer: str = setting(...)
    """Folder of the tokenizer, or a hub id (bert-base-uncased)."""
    tokenizer_revision: str | None = setting(None)
    """Commit of the tokenizer's hub id."""
    med_config: str | None = setting(None, source=IMAGE_REWARD)
    """med_config.json beside the weights; null: the published values."""


class Aesthetic(FileReward):
    """LAION's aesthetic score of the image alone, about 1 to 10: a linear head on CLIP ViT-L/14."""

    module = "clip"
    sources = ("path", "clip")
    hub: ClassVar[dict[str, str]] = {"path": "revision", "clip": "clip_revision"}
    hub_files: ClassVar[tuple[str, ...]] = ("path", "clip")

    kind: Literal["aesthetic"]
    path: str = setting(..., source=LAION)
    """sac+logos+ava1-l14-linearMSE.pth."""
    clip: str = setting(..., source=LAION)
    """ViT-L-14.pt in OpenAI's format."""
    clip_revision: str | None = setting(None)
    """Commit, where `clip` is a file of a hub id."""


class UnifiedReward(RewardSettings):
    """The score that a vision-language model behind an OpenAI-style endpoint gives when asked.

    Of vLLM, SGLang or others.
    """

    module = "unifiedreward"
    unscored = RewardSettings.unscored | {"seconds", "attempts", "concurrency"}

    kind: Literal["unifiedreward"]
    url: str = setting(..., pattern=r"^https?://.+")
    """Address of the endpoint, such as http://127.0.0.1:17140/v1."""
    model: str = setting("UnifiedReward-7b-v1.5", source=UNIFIED)
    """Name of the model there."""
    question: str | None = setting(None, source=UNIFIED)
    """What is asked, with {prompt}; null: UnifiedReward's published question."""
    pattern: str = setting(
        FINAL_SCORE, source="this project's choice; Flow-GRPO's public code takes the first"
    )
    """Where the answer has the score: a number within the scale, else the score is NaN. The default
    takes the last one."""
    least: float | None = setting(None, unit="1")
    """Least score of the scale; null: 1 with the default `pattern`, else none."""
    most: float | None = setting(None, unit="1")
    """Largest score of the scale; null: 5 with the default `pattern`, else none."""
    divide_by: PositiveFloat = setting(5.0, source=UNIFIED)
    """The score is divided by this."""
    side: int = setting(512, source=UNIFIED, unit="pixels", ge=16)
    """Images are resized to this many pixels square."""
    seconds: PositiveFloat = setting(120.0, source=UNIFIED, unit="s")
    """Time-out of one request, seconds."""
    attempts: Count = setting(5, unit="tries")
    """Tries of one image; after them its score is NaN."""
    concurrency: Count = setting(16, unit="requests")
    """Requests at once."""
    token_file: str | None = setting(None)
    """File with the token of the service."""

    @model_validator(mode="after")
    def _usable(self) -> Self:
        try:
            groups = re.compile(self.pattern).groups
        except (re.error, OverflowError) as error:
            raise ValueError(f"pattern: not a regular expression: {error}") from None
        except RecursionError:
            raise ValueError("pattern: brackets are nested too deeply") from None
        if groups != 1:
            raise ValueError("pattern: needs one group in brackets, the score")
        if self.question is not None and "{prompt}" not in self.question:
            raise ValueError("question: must contain {prompt}")
        least, most = self.scale
        if least >= most:
            raise ValueError(f"most: {most:g} is not above the least score, {least:g}")
        return self

    @property
    def scale(self) -> tuple[float, float]:
        """Least and largest score that an answer may give."""
        usual = FINAL_SCALE if self.pattern == FINAL_SCORE else (-math.inf, math.inf)
        least, most = self.least, self.most
        return usual[0] if least is None else least, usual[1] if most is None else most


class Remote(RewardSettings):
    """What a reward on another GPU or machine measures, where egrpo serve-rewards computes it."""

    module = "remote"
    unscored = RewardSettings.unscored | {"seconds", "patience", "concurrency", "encoding"}

    kind: Literal["remote"]
    url: str = setting(..., pattern=r"^https?://.+")
    """Address of the service, such as http://127.0.0.1:8800."""
    reward: str = setting(...)
    """Name of the reward there."""
    encoding: Literal["png", "raw"] = setting("png")
    """How images travel: compressed without loss, or as bytes with their shape."""
    batch: Count = setting(32, unit="images")
    """Most images in one request."""
    concurrency: Count = setting(2, unit="requests")
    """Requests at once."""
    seconds: PositiveFloat = setting(300.0, unit="s")
    """Time-out of one request, seconds."""
    patience: NonNegativeFloat = setting(1800.0, unit="s")
    """How long a run waits for a service that is away, seconds; then it ends."""
    token_file: str | None = setting(None)
    """File with the token of the service."""


class Custom(RewardSettings):
    """What a function of your own returns, a number for each image and its prompt."""

    module = "custom"
    kind: Literal["custom"]
    function: str = setting(..., pattern=r"^[\w.]+:\w+$")
    """module:function, called with (images, prompts, **options) and returns n numbers; images are
    uint8 [n, 3, height, width]. A class is made once with the
    options and then called."""
    options: dict[str, Any] = setting({})
    """Further arguments."""


_Reward = (
    Verifier | VerifierExact | Jpeg | Preference | Clip | OpenClip | Hps | PickScore
    | ImageReward | Aesthetic | UnifiedReward | Remote | Custom
)  # fmt: skip
AnyReward = Annotated[_Reward, Field(discriminator="kind")]

REWARD_MODELS: dict[str, type[RewardSettings]] = {
    get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(_Reward)
}
"""Settings model of each reward, by kind."""
