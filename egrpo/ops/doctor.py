"""`egrpo doctor`: everything that can be checked before a long run, one line each."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from egrpo.config.models import Model, RunConfig
from egrpo.config.prompts import read_prompts, train_prompts
from egrpo.config.rewards import Custom
from egrpo.errors import UserError
from egrpo.ops.checks import problems
from egrpo.ops.clean import leftovers, size_of, summary
from egrpo.ops.disk import disk
from egrpo.ops.memory import GIB, advice, memory
from egrpo.planning.trees import check_trees, closed_form_plan, cost_of, reads_profile, tree_of
from egrpo.report.provenance import MISSING, versions
from egrpo.settings import is_hub_id
from egrpo.store.weights import Part, read_part
from egrpo.study.files import file_problems
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study, load_study

if TYPE_CHECKING:
    from egrpo.rewards import RewardModel

Level = Literal["ok", "warn", "FAIL"]

CONTEXT = 1.0
"""GiB that CUDA and its libraries take."""


LESS = {
    "checkpoints": "model.lora.rank, or the number of runs",
    "trained weights": "model.lora.rank, train.snapshots, or the number of runs",
    "prompt embeddings": "prompts.limit",
    "images": "evaluate.samples or evaluate.prompts, or raise train.monitor_every",
    "records": "train.iterations, or the number of runs",
}
"""What makes a part of the disk smaller."""


@dataclass(frozen=True)
class Finding:
    """One line: how grave, what was looked at, what was found."""

    level: Level
    what: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5} {self.what:<12} {self.text}"


def doctor(paths: tuple[Path, ...], *, rewards: bool = True) -> Iterator[Finding]:
    """Findings on a study, as they are made.

    Args:
        paths: the study's YAML; further files are laid over it.
        rewards: load every reward model, to know that its weights fit.
    """
    yield from _versions()
    yield from _cache()
    try:
        study = load_study(*paths)
        missing = list(file_problems(study, ", ".join(map(str, paths))))
        check_trees(study.runs)
    except UserError as error:
        yield Finding("FAIL", "config", str(error))
        return
    for problem in missing:
        yield Finding("FAIL", "files", problem)
    if missing:
        return
    yield Finding("ok", "config", f"{len(study.runs)} runs of study {study.name}")
    yield from _prompts(study)
    for problem in problems(study):
        what = "prompts" if problem.startswith("prompts") else "size"
        yield Finding("FAIL", what, problem)
    yield from _device(study)
    for model, run in _different(study.runs.values(), lambda r: r.model):
        yield from _model(model, run)
    if rewards:
        yield from _rewards(study)
    yield from _arithmetic(study)
    yield from _disk(study, paths)
    yield from _tracking(study)


Key = TypeVar("Key")


def _different(
    runs: Iterable[RunConfig], key: Callable[[RunConfig], Key]
) -> list[tuple[Key, RunConfig]]:
    """The first run of each different value."""
    found: dict[str, tuple[Key, RunConfig]] = {}
    for run in runs:
        value = key(run)
        found.setdefault(repr(value), (value, run))
    return list(found.values())


def _versions() -> Iterator[Finding]:
    found = versions()
    missing = [name for name, version in found.items() if version == MISSING]
    there = (f"{name} {version}" for name, version in found.items() if name not in missing)
    yield Finding("ok", "versions", ", ".join(there))
    if missing:
        yield Finding("FAIL", "versions", f"not installed: {', '.join(missing)}")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        yield Finding("FAIL", "versions", f"torchvision does not match torch: {reason}")


def _cache() -> Iterator[Finding]:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not os.access(existing(folder), os.W_OK):
        text = f"{folder}: cannot be written, and Snakemake keeps files there; set XDG_CACHE_HOME"
        yield Finding("FAIL", "cache", text)


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _prompts(study: Study) -> Iterator[Finding]:
    for (settings, guided), _ in _different(study.runs.values(), lambda r: (r.prompts, r.guided)):
        for key in ("train", "heldout"):
            path, limit = getattr(settings, key), settings.limit if key == "train" else None
            try:
                prompts = train_prompts(path, limit, settings.column)
            except UserError as error:
                yield Finding("FAIL", "prompts", str(error))
                continue
            text = f"{path}: {len(prompts)} prompts, the first is {prompts[0].text!r:.80}"
            unused = sum(bool(p.negative) for p in prompts)
            if unused and not guided:
                text += f"; {unused} negative prompts are ignored: model.guidance_scale is 1"
                yield Finding("warn", "prompts", text)
            else:
                yield Finding("ok", "prompts", text)


def _device(study: Study) -> Iterator[Finding]:
    import torch

    from egrpo.models.loading import resolve_device

    names = {run.model.device for run in study.runs.values()}
    names |= {d for run in study.runs.values() for r in run.rewards.values() if (d := _where(r))}
    for name in sorted(names):
        try:
            device = resolve_device(name)
            torch.zeros(1, device=device)
        except (UserError, RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:120]
            yield Finding("FAIL", "device", f"{name}: cannot be used: {reason}")
            continue
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            title = torch.cuda.get_device_name(device)
            yield Finding(
                "ok", "device", f"{name}: {title}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            )
        else:
            yield Finding("ok", "device", f"{name}: {device.type}, {available('cpu'):.1f} GiB free")


def _where(reward: object) -> str | None:
    return getattr(reward, "device", None)


def available(name: str) -> float:
    """Free memory of a device, GiB."""
    import psutil
    import torch

    from egrpo.models.loading import resolve_device

    device = resolve_device(name)
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] / GIB)
    return float(psutil.virtual_memory().available / GIB)


def _model(model: Model, run: RunConfig) -> Iterator[Finding]:
    if is_hub_id(model.path):
        yield Finding(
            "warn",
            "model",
            f"{model.path} at {model.revision}: a hub id; its files are not checked",
        )
        return
    try:
        parts = {name: read_part(Path(model.path), name) for name in ("transformer", "vae")}
        missing, unknown = _keys(model, parts["transformer"])
    except UserError as error:
        yield Finding("FAIL", "model", str(error))
        return
    size = parts["transformer"].parameters
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not a weight of it"
        yield Finding(
            "FAIL",
            "model",
            f"{model.path}/transformer: {len(missing)} weights missing, {len(unknown)} unknown: "
            f"{what}",
        )
        return
    yield Finding("ok", "model", f"{model.path}: {model.family}, {size / 1e9:.3g} billion weights")
    yield from _memory(model, run, parts)
    yield from _attention(model, parts["transformer"])


def _keys(model: Model, part: Part) -> tuple[list[str], list[str]]:
    """Weights that the transformer wants and lacks, and those that it does not know.

    Raises:
        UserError: if the folder holds another family.
    """
    import diffusers
    from accelerate import init_empty_weights

    from egrpo.models.families import FAMILIES

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
    return missing, [k for k in part.shapes if k not in wanted]


def _memory(model: Model, run: RunConfig, parts: dict[str, Part]) -> Iterator[Finding]:
    need = memory(run, parts["transformer"], parts["vae"])
    items = ", ".join(
        f"{name} {value:.2g}" for name, value in {**need.fixed, **need.phases}.items()
    )
    text = f"about {need.peak:.2g} GiB for training ({items})"
    try:
        free = available(model.device)
    except (UserError, RuntimeError, AssertionError):
        yield Finding("warn", "memory", text)
        return
    if need.peak + CONTEXT * (model.device != "cpu") < free:
        yield Finding("ok", "memory", text)
    else:
        remedy = advice(run, "train", need.worst)
        yield Finding("FAIL", "memory", f"{text}, {free:.2g} GiB free: {remedy}")


def _attention(model: Model, part: Part) -> Iterator[Finding]:
    """Which kernel ``auto`` takes on a CUDA device; a training job checks that it is right."""
    import torch

    from egrpo.models.attention import kernel
    from egrpo.models.loading import resolve_device

    try:
        device = resolve_device(model.device)
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    except (UserError, RuntimeError, AssertionError):  # told by `_device`
        return
    if capability is None or model.attention_backend != "auto":
        return
    config = part.config
    head = config.get("attention_head_dim") or config["dim"] // config["n_heads"]
    plain, masked = (
        kernel(capability, getattr(torch, model.dtype), head, masked=m) for m in (False, True)
    )
    text = f"{model.family}: heads of {head}: {plain}; {masked} where prompts differ in length"
    yield Finding("ok", "attention", text)


def _rewards(study: Study) -> Iterator[Finding]:
    from egrpo.rewards import load_reward

    found = {
        (name, repr(reward)): (name, reward, run)
        for run in reversed(list(study.runs.values()))
        for name, reward in run.rewards.items()
    }
    for name, reward, run in found.values():
        try:
            loaded = load_reward(reward, "cpu")
            if isinstance(reward, Custom):
                yield _scored(name, loaded, run)
                continue
        except UserError as error:
            yield Finding("FAIL", "reward", f"{name}: {error}")
        else:
            yield Finding("ok", "reward", f"{name}: {reward.kind}")


def _scored(name: str, reward: RewardModel, run: RunConfig) -> Finding:
    """Whether a function of the user's gives the first held-out prompt's image a number."""
    import torch

    from egrpo.rewards import score_all

    model, files = run.evaluation_model, run.prompts
    prompt = read_prompts(files.heldout, files.column)[0].text
    grey = torch.full((1, 3, model.height, model.width), 127, dtype=torch.uint8)
    try:
        (score,) = score_all({name: reward}, grey, [prompt])[name]
    except UserError:
        raise
    except Exception as error:  # the user's own code, which a run would end with
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return Finding("FAIL", "reward", f"{name}: cannot score a grey image: {reason}")
    about = f"{name}: custom, {score:.3g} for a grey image and prompt {prompt!r:.60}"
    if math.isnan(score):
        return Finding("warn", "reward", f"{about}: does it read such prompts and sizes?")
    return Finding("ok", "reward", about)


def _arithmetic(study: Study) -> Iterator[Finding]:
    for run in {run.arm: run for run in study.runs.values()}.values():
        t = run.train
        trained = " + ".join(f"{name} {weight:g}" for name, weight in t.rewards.items())
        if reads_profile(run):
            text = f"{run.arm}: its plan waits for the profile; trained on {trained}"
            yield Finding("ok", "batches", text)
            continue
        tree = tree_of(run, closed_form_plan(run))
        cost = cost_of(run, [tree] * t.prompts_per_iteration)
        parts = f" in {t.updates} optimizer steps" if t.updates > 1 else ""
        text = (
            f"{run.arm}: {t.prompts_per_iteration} prompts an iteration, {cost.forward} forward "
            f"and {cost.train} forward-backward evaluations{parts}; "
            f"trained on {trained}"
        )
        yield Finding("ok", "batches", text)


def _disk(study: Study, configs: tuple[Path, ...]) -> Iterator[Finding]:
    at = Layout(study)
    folder = existing(at.root.parent)
    if not os.access(folder, os.W_OK):
        text = f"{study.results}: {folder} cannot be written; let `results` name a folder that can"
        yield Finding("FAIL", "disk", text)
        return
    free = shutil.disk_usage(folder).free / GIB
    parts = {name: size / GIB for name, size in disk(study, copies=_tracked_here(study)).items()}
    old = leftovers(at)
    there = size_of(at.root) / GIB if at.root.is_dir() else 0.0
    there -= sum(one.size for one in old) / GIB
    need = max(sum(parts.values()) - there, 0.0) + 0.1
    largest = sorted(parts, key=lambda name: -parts[name])
    text = f"{free:.1f} GiB free under {study.results}, about {need:.1f} GiB to come"
    text += f" ({', '.join(f'{name} {parts[name]:.2g}' for name in largest)}"
    text += f"; {there:.1f} are there)" if there > 0.1 else ")"
    if need < free:
        yield Finding("ok", "disk", text)
    else:
        yield Finding("FAIL", "disk", f"{text}: lower {LESS[largest[0]]}")
    if old:
        words = shlex.join(["egrpo", "clean", *map(str, configs)])
        yield Finding("warn", "disk", f"{at.root}: {summary(old)}; `{words}` lists them")


def _tracked_here(study: Study) -> bool:
    """Whether MLflow's copies lie in the results folder."""
    uris = {
        run.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") for run in study.runs.values()
    }
    return uris == {None}


def _tracking(study: Study) -> Iterator[Finding]:
    from egrpo.tracking.client import in_one_line, open_client
    from egrpo.tracking.prepare import study_uri

    try:
        uri = study_uri(study, f"sqlite:///{study.results}/mlflow.db")
        shown = in_one_line(uri)
        if not any(run.tracking.enabled for run in study.runs.values()):
            yield Finding("ok", "tracking", "switched off")
            return
        if uri.startswith("sqlite:"):
            yield Finding("ok", "tracking", uri)
            return
        open_client(uri).search_experiments(max_results=1)
    except UserError as error:
        yield Finding("FAIL", "tracking", str(error))
    except Exception as error:  # MLflow's and the network's; training would go on without
        yield Finding("warn", "tracking", f"{shown} does not answer: {in_one_line(error)}")
    else:
        yield Finding("ok", "tracking", f"{shown} answers")
