"""What `egrpo doctor` says of a model's files: its weights, its memory, its attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from egrpo.config.models import Model, RunConfig
from egrpo.errors import UserError, one_line
from egrpo.models.families import FAMILIES
from egrpo.ops.memory import CONTEXT, GIB, Memory, Stage, advice, memory
from egrpo.planning.trees import needs_plan
from egrpo.settings import is_hub_id
from egrpo.store.weights import Part, read_part

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "warn", "FAIL"]


class Finding(NamedTuple):
    """One line: how grave, what was looked at, what was found."""

    level: Level
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5} {self.what:<12} {self.text}"


def model_findings(run: RunConfig) -> Iterator[Finding]:
    """What is right and wrong with a run's model and its memory."""
    import torch

    model = run.model
    if is_hub_id(model.path):
        text = f"{model.path} at {model.revision}: a hub id; its files are not checked"
        yield Finding("warn", "model", text)
        return
    try:
        parts = {name: read_part(Path(model.path), name) for name in ("transformer", "vae")}
        _check_weights(model, parts["transformer"])
    except UserError as error:
        yield Finding("FAIL", "model", str(error))
        return
    billions = parts["transformer"].parameters / 1e9
    yield Finding("ok", "model", f"{model.path}: {model.family}, {billions:.3g} billion weights")
    try:
        device, free = usable(model.device)
    except UserError:  # told of the device
        yield _memory(run, parts, None)
        return
    yield _memory(run, parts, free)
    if device.type == "cuda" and model.attention_backend == "auto":
        yield attention(model, parts["transformer"], torch.cuda.get_device_capability(device))


def usable(name: str) -> tuple[torch.device, float]:
    """A device that can be used, and its free memory in GiB.

    Raises:
        UserError: why it cannot.
    """
    import psutil
    import torch

    from egrpo.models.loading import resolve_device

    try:
        device = resolve_device(name)
        torch.zeros(1, device=device)
        cuda = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    except (UserError, RuntimeError, AssertionError) as error:
        raise UserError(f"{name}: cannot be used: {one_line(error, 120)}") from None
    return device, free / GIB


def _check_weights(model: Model, part: Part) -> None:
    """Raise UserError if the folder holds another family, or not the weights of this one."""
    import diffusers
    from accelerate import init_empty_weights

    name = FAMILIES[model.family].transformer_class
    found = part.config.get("_class_name", name)
    if found != name:
        raise UserError(
            f"model.family: {model.family} has a {name}, but {model.path}/transformer is a "
            f"{found}; set model.family to the family of these weights"
        )
    with init_empty_weights():
        network = getattr(diffusers, name).from_config(dict(part.config))
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    missing = [k for k, shape in wanted.items() if part.shapes.get(k) != shape]
    unknown = [k for k in part.shapes if k not in wanted]
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not a weight of it"
        raise UserError(
            f"{model.path}/transformer: {len(missing)} weights missing, {len(unknown)} unknown: "
            f"{what}"
        )


def _memory(run: RunConfig, parts: dict[str, Part], free: float | None) -> Finding:
    stages: list[Stage] = ["train", "evaluate"]
    if needs_plan(run):
        stages.append("profile")
    needs = {stage: memory(run, parts["transformer"], parts["vae"], stage) for stage in stages}
    stage = max(stages, key=lambda stage: needs[stage].peak)
    need, card = needs[stage], run.model.device != "cpu"
    text = _needs(needs)
    if card:
        text += f"; on a card with room up to {max(n.on_card for n in needs.values()):.2g}"
    if free is None:
        return Finding("warn", "memory", text)
    if need.peak + CONTEXT * card < free:
        return Finding("ok", "memory", text)
    remedy = advice(run, stage, need.worst)
    return Finding("FAIL", "memory", f"{text}, {free:.2g} GiB free: {remedy}")


def _needs(needs: Mapping[Stage, Memory]) -> str:
    train = needs["train"]
    items = ", ".join(f"{k} {v:.2g}" for k, v in {**train.fixed, **train.phases}.items())
    names: dict[Stage, str] = {"evaluate": "evaluation", "profile": "the profile"}
    others = [f"{needs[s].peak:.2g} for {name}" for s, name in names.items() if s in needs]
    return f"about {train.peak:.2g} GiB for training ({items}), {', '.join(others)}"


def attention(model: Model, part: Part, capability: tuple[int, int]) -> Finding:
    """Which kernel ``auto`` takes on a CUDA device; a training job checks that it is right."""
    import torch

    from egrpo.models.attention import kernel

    head = part.config.get("attention_head_dim") or part.config["dim"] // part.config["n_heads"]
    dtype = getattr(torch, model.dtype)
    plain, masked = (kernel(capability, dtype, head, masked=m) for m in (False, True))
    text = f"{model.family}: heads of {head}: {plain}; {masked} where prompts differ in length"
    return Finding("ok", "attention", text)
