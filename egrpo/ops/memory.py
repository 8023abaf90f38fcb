"""Memory of a GPU: an estimate before a run, and advice in one line where it ends during one.

The estimate counts what is known exactly (weights, trained parameters, their optimizer) and
approximates activations; each term says how. It is meant to find runs that cannot fit, not to
find the last gigabyte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from egrpo.config.models import TOKEN, RunConfig
from egrpo.errors import UserError
from egrpo.models.families import FAMILIES
from egrpo.ops.rates import layers_and_width
from egrpo.store.weights import Part, read_part

Stage = Literal["train", "profile", "evaluate"]

BATCHES: dict[Stage, dict[str, str]] = {
    "train": {
        "sampling": "train.micro_batch",
        "decoding": "train.decode_batch",
        "training": "train.train_micro_batch",
    },
    "profile": {"sampling": "profile.micro_batch", "decoding": "profile.decode_batch"},
    "evaluate": {"sampling": "evaluate.micro_batch", "decoding": "evaluate.micro_batch"},
}
"""The phases of a stage and the setting that bounds the batch of each."""

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2.0**30

SAVED = 34
"""Bytes of activations that a transformer layer keeps for the backward pass, per token and unit of
width, in 16 bit with fused attention (Korthikanti et al., arXiv 2205.05198, eq. 2)."""

WORKING = 24
"""Bytes that one layer needs while it runs: its input, qkv, and the two halves of its MLP."""

DECODER = 6
"""Feature maps of the decoder's first width at full resolution that are alive at once."""

SMALL = 0.01
"""A remedy that saves less than this part of the need is not worth naming."""


@dataclass(frozen=True)
class Memory:
    """Estimated memory of a stage by item, GiB, without rewards and CUDA's context.

    ``fixed`` is there all the time, ``phases`` come on top of it in turn.
    """

    fixed: Mapping[str, float]
    phases: Mapping[str, float]

    @property
    def peak(self) -> float:
        """Of the largest phase."""
        return max(map(self.during, self.phases))

    @property
    def worst(self) -> str:
        """The largest phase."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    def during(self, phase: str) -> float:
        """Everything that is there in one phase."""
        return sum(self.fixed.values()) + self.phases.get(phase, 0.0)


def lora_parameters(run: RunConfig, part: Part) -> int:
    """Parameters of the adapters: rank times inputs plus outputs of each adapted layer."""
    targets = tuple(run.model.lora.targets or FAMILIES[run.model.family].lora_targets)
    rank, total = run.model.lora.rank, 0
    for name, shape in part.shapes.items():
        layer = name.removesuffix(".weight")
        if len(shape) == 2 and any(layer == t or layer.endswith(f".{t}") for t in targets):
            total += rank * (shape[0] + shape[1])
    return total


def memory(run: RunConfig, transformer: Part, vae: Part, stage: Stage = "train") -> Memory:
    """Estimate what a stage of a run needs."""
    m = run.evaluation_model if stage == "evaluate" else run.model
    size, t = BYTES[m.dtype], run.train
    config = transformer.config
    layers, width = layers_and_width(config)
    text = FAMILIES[m.family].tokens if m.max_sequence_length is None else m.max_sequence_length
    tokens = (m.height // TOKEN) * (m.width // TOKEN) + text
    # of one image: a layer's unit of activations is two bytes in 16 bit
    row = tokens * width * size / 2 * (2 if m.guidance_scale > 1 else 1)
    stored = transformer.parameters * (1 if m.fp8_weights else size)
    fixed = {"transformer": float(stored), "vae": float(vae.parameters * size)}
    batch = {phase: setting_of(run, key) for phase, key in BATCHES[stage].items()}
    first = int(vae.config.get("block_out_channels", [vae.config.get("base_dim", 96)])[0])
    side = min(m.height, 512) * min(m.width, 512) if m.vae_tiling else m.height * m.width
    at_once = 1 if m.vae_slicing or m.vae_tiling else batch["decoding"]
    phases = {
        "sampling": row * batch["sampling"] * WORKING,
        "decoding": side * first * size * DECODER * at_once,
    }
    if stage == "train":
        lora = m.tuning == "lora"
        copies = m.merge_lora_for_sampling if lora else t.kl_weight > 0
        fixed["transformer"] += stored * copies
        trained = lora_parameters(run, transformer) if lora else transformer.parameters
        # gradient and two moments, all float32; LoRA's weights are float32 and not in `stored`
        fixed["trained parameters, gradients, optimizer"] = trained * (
            (16 if lora else 12) + 4 * (t.ema_decay is not None)
        )
        kept = layers * 2 + SAVED if t.gradient_checkpointing else layers * SAVED
        phases["training"] = row * batch["training"] * kept
    return Memory(*({k: v / GIB for k, v in items.items()} for items in (fixed, phases)))


@contextmanager
def advice_where_memory_ends(run: RunConfig, stage: Stage) -> Iterator[None]:
    """Turn CUDA's out-of-memory error into one line.

    Raises:
        UserError: naming what was being done, and the settings that lower its memory. What was
            written before stays: after a change of ``keys.CUT`` a run goes on from there, while
            the other settings change what it computes.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        notes = getattr(error, "__notes__", [])
        phase = notes[0].removeprefix("while ") if notes else "working"
        used = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0
        raise UserError(
            f"run {run.run}: the GPU's memory ran out while {phase} ({used:.3g} GiB in use at "
            f"most); {advice(run, stage, phase)}"
        ) from None


def advice(run: RunConfig, stage: Stage, phase: str) -> str:
    """The settings that lower the memory of a phase, the one that saves most first."""
    tried = [
        (key, value, f"{key}: {_yaml(value)}", f"now {_yaml(now)}")
        for key, now, value in remedies(run, stage, phase)
    ]
    folder = Path(run.model.path)
    if not folder.is_dir():  # a hub id
        named = [f"{setting} ({now})" for *_, setting, now in tried]
        return f"set {', or '.join(named)}" if named else "use a larger GPU"
    parts = read_part(folder, "transformer"), read_part(folder, "vae")
    before = memory(run, *parts, stage).during(phase)
    saved: list[tuple[float, str, str]] = []
    for key, value, setting, now in tried:
        after = memory(with_setting(run, key, value), *parts, stage).during(phase)
        saved.append((before - after, setting, now))
    for name, reward in run.rewards.items():  # those that share the model's GPU could leave it
        if getattr(reward, "device", "elsewhere") is None:
            size = sum(Path(p).stat().st_size for p in reward.files.values() if Path(p).is_file())
            saved.append((size / GIB, f"rewards.{name}.device: cpu", ""))
    told = [
        f"{setting} ({'; '.join(filter(None, (now, _about(less))))})"
        for less, setting, now in sorted(saved, reverse=True)
        if less > SMALL * before
    ]
    return f"set {', or '.join(told)}" if told else "no setting lowers it by much: use a larger GPU"


def remedies(run: RunConfig, stage: Stage, phase: str) -> Iterator[tuple[str, Any, Any]]:
    """(setting, value now, value to try) of what may lower the memory of a phase."""
    key = BATCHES[stage].get(phase)
    if key is not None and setting_of(run, key) > 1:
        yield key, setting_of(run, key), setting_of(run, key) // 2
    switches: list[tuple[str, Any]] = [
        ("model.fp8_weights", True),
        ("model.merge_lora_for_sampling", False),
    ]
    if phase == "decoding":
        switches += [("model.vae_slicing", True), ("model.vae_tiling", True)]
    if phase == "training":
        switches += [("train.gradient_checkpointing", True), ("model.tuning", "lora")]
    for key, value in switches:
        now = setting_of(run, key)
        if now != value and not (key == "model.fp8_weights" and run.model.tuning == "full"):
            yield key, now, value


def setting_of(run: RunConfig, key: str) -> Any:
    """The value of ``section.name``."""
    section, name = key.split(".")
    return getattr(getattr(run, section), name)


def with_setting(run: RunConfig, key: str, value: Any) -> RunConfig:
    """The run with another value of ``section.name``."""
    section, name = key.split(".")
    changed = getattr(run, section).model_copy(update={name: value})
    return run.model_copy(update={section: changed})


def _yaml(value: object) -> str:
    """As it would stand in a settings file."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _about(gib: float) -> str:
    return f"about {gib:.2g} GiB less" if gib > 0.1 else f"about {1024 * gib:.2g} MiB less"
