"""Memory of a GPU: an estimate before a run, and advice in one line where it ends during one.

Weights and what training adds to them are counted by the headers of the model's files, activations
by :mod:`egrpo.ops.activations`. Against what was measured on an H200: ``docs/models.md``.
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
from egrpo.models.loading import resolve_device
from egrpo.models.twin import padded_rows
from egrpo.ops.activations import Activations
from egrpo.ops.reward_sizes import reward_bytes
from egrpo.ops.weights import BYTES, lora_parameters, stored_bytes, twin_bytes, upcast_bytes
from egrpo.sampling.fit import FULL, ON_CPU, TRIED
from egrpo.sampling.sample import PIXELS
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

GIB = 2.0**30

CONTEXT = 1.0
"""GiB that CUDA and its libraries take beside torch's tensors; a round number, not measured."""

DECODER = 8
"""Feature maps of the decoder's first width at full resolution alive at once: its last block begins
with twice that width, and holds its input, a copy in the order that group norm wants, the norm's
result and the nonlinearity's."""

SMALL = 0.01
"""A remedy that saves less than this part of the need is not worth naming."""


@dataclass(frozen=True)
class Memory:
    """Estimated memory of a stage by item, GiB.

    ``fixed`` is there all the time, ``phases`` come on top of it in turn. ``growth``: batches that
    grow leave blocks that no larger one fits into, so many times what the largest needs.
    """

    fixed: Mapping[str, float]
    phases: Mapping[str, float]
    growth: float = 1.0

    @property
    def peak(self) -> float:
        """Of the largest phase: what torch's tensors take, without CUDA's context."""
        return max(map(self.during, self.phases))

    @property
    def worst(self) -> str:
        """The largest phase."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    def during(self, phase: str) -> float:
        """Everything that is there in one phase."""
        return sum(self.fixed.values()) + self.phases.get(phase, 0.0)

    @property
    def on_card(self) -> float:
        """What a card with room to spare shows, with the context.

        Torch keeps the blocks that sampling leaves, and decoding's, which are larger, come beside
        them; those of training fit into either. A card without room gets them back.
        """
        left = self.growth * self.phases["sampling"] + self.phases["decoding"]
        return sum(self.fixed.values()) + max(left, *self.phases.values()) + CONTEXT


def memory(run: RunConfig, transformer: Part, vae: Part, stage: Stage = "train") -> Memory:
    """Estimate what a stage of a run needs."""
    m = run.evaluation_model if stage == "evaluate" else run.model
    size, t = BYTES[m.dtype], run.train
    batch = {phase: _batch(run, key) for phase, key in BATCHES[stage].items()}
    # plain images, of monitors and evaluation, are decoded in batches of their own
    plain = max(1, min(batch["sampling"], PIXELS // (m.height * m.width)))
    if stage == "evaluate":
        batch["decoding"] = plain
    elif stage == "train" and t.monitor_every:
        shown = min(plain, t.monitor_prompts * t.monitor_samples)
        batch["decoding"] = max(batch["decoding"], shown)
    activations, lora = Activations(m, transformer), m.tuning == "lora"
    stored = stored_bytes(m, transformer)
    twin, merging = twin_bytes(m, transformer, adapted=stage != "profile")
    trained = lora_parameters(run, transformer) if lora else transformer.parameters
    beside = lora and stage != "profile" and not m.merge_lora_for_sampling
    first = int(vae.config.get("block_out_channels", [vae.config.get("base_dim", 96)])[0])
    side = min(m.height, 512) * min(m.width, 512) if m.vae_tiling else m.height * m.width
    at_once = 1 if m.vae_slicing or m.vae_tiling else batch["decoding"]
    fixed = {
        "transformer": stored,
        "vae": float(vae.parameters * size),
        "sampler's own weights": twin,
        "adapters": 4.0 * trained * (lora and stage != "profile"),
        "rewards": float(sum(reward_bytes(run).values())),
    }
    phases = {
        "sampling": max(batch["sampling"] * activations.working(size, beside=beside), merging),
        "decoding": float(side * first * size * DECODER * at_once),
    }
    if stage == "train":
        fixed["transformer"] += stored * (not lora and t.kl_weight > 0)
        fixed["optimizer"] = trained * (8.0 + 4.0 * (t.ema_decay is not None))
        kept = activations.kept(size, checkpointing=t.gradient_checkpointing)
        phases["training"] = (
            4.0 * trained + batch["training"] * kept + upcast_bytes(run, transformer)
        )
    fixed, phases = ({k: v / GIB for k, v in items.items() if v} for items in (fixed, phases))
    return Memory(fixed, phases, _growth(run, stage))


def _batch(run: RunConfig, key: str) -> int:
    """The setting's number of latents; of auto, which takes what fits, the least."""
    batch = setting_of(run, key)
    if batch != "auto":
        return int(batch)
    return ON_CPU if _on_cpu(run) else TRIED


def _taken(run: RunConfig, stage: Stage, phase: str) -> int:
    """The same; of auto the most that it takes, where a card has room."""
    key = BATCHES[stage][phase]
    if setting_of(run, key) != "auto" or _on_cpu(run):
        return _batch(run, key)
    m = run.evaluation_model if stage == "evaluate" else run.model
    return max(TRIED, FULL // ((m.height // TOKEN) * (m.width // TOKEN)))


def _on_cpu(run: RunConfig) -> bool:
    return resolve_device(run.model.device).type == "cpu"


def _growth(run: RunConfig, stage: Stage) -> float:
    """How many times the largest batch's memory sampling leaves behind.

    In the profile ever more branches run side by side, until batches are full.
    """
    key = BATCHES[stage]["sampling"]
    if setting_of(run, key) == "auto":
        return _taken(run, stage, "sampling") / _batch(run, key)
    if stage != "profile":
        return 1.0
    p, most, records = run.profile, _batch(run, key), [0]
    compiled = FAMILIES[run.model.family].compiles(run.model, cuda=True)
    for index in range(run.method.steps):
        live = 1 + p.samples * sum(max(0, index - span + 1) for span in p.spans)
        for size in (most, live % most) if live >= most else (live,):
            rows = padded_rows(size, most) if compiled else size
            if rows > records[-1]:
                records.append(rows)
    return sum(records) / most


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
    tried = list(remedies(run, stage, phase))
    folder = Path(run.model.path)
    if not folder.is_dir():  # a hub id
        named = [f"{key}: {_yaml(value)} (now {_yaml(now)})" for key, now, value in tried]
        return f"set {', or '.join(named)}" if named else "use a larger GPU"
    parts = read_part(folder, "transformer"), read_part(folder, "vae")
    taken = with_setting(run, BATCHES[stage]["sampling"], _taken(run, stage, "sampling"))
    before = memory(taken, *parts, stage).during(phase)
    sizes = reward_bytes(run).items()
    saved = [(size / GIB, f"rewards.{name}.device: cpu", "") for name, size in sizes]
    for key, now, value in tried:
        after = memory(with_setting(taken, key, value), *parts, stage).during(phase)
        saved.append((before - after, f"{key}: {_yaml(value)}", f"now {_yaml(now)}; "))
    found = sorted(saved, reverse=True)
    told = [f"{what} ({now}{_about(less)})" for less, what, now in found if less > SMALL * before]
    return f"set {', or '.join(told)}" if told else "no setting lowers it by much: use a larger GPU"


def remedies(run: RunConfig, stage: Stage, phase: str) -> Iterator[tuple[str, Any, Any]]:
    """(setting, value now, value to try) of what may lower the memory of a phase."""
    key = BATCHES[stage].get(phase)
    if key is not None and (size := _taken(run, stage, phase)) > 1:
        yield key, setting_of(run, key), size // 2
    switches: list[tuple[str, Any]] = [
        ("model.fp8_weights", True),
        ("model.merge_lora_for_sampling", False),
        ("model.fp8_sampling", False),
    ]
    if phase == "decoding":
        switches += [("model.vae_slicing", True), ("model.vae_tiling", True)]
    if phase == "training":
        switches += [("train.gradient_checkpointing", True), ("model.tuning", "lora")]
    for key, value in switches:
        now = setting_of(run, key)
        stored = key == "model.fp8_weights"
        if now != value and not (stored and (run.model.tuning == "full" or run.model.fp8_sampling)):
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
