"""`egrpo doctor`: everything that can be checked before a long run, one line each."""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

from egrpo.config.models import RunConfig
from egrpo.config.prompts import read_prompts, train_prompts
from egrpo.config.rewards import AnyReward, Custom
from egrpo.errors import UserError, one_line
from egrpo.ops.checks import different, problems
from egrpo.ops.clean import leftovers, size_of, summary
from egrpo.ops.disk import disk
from egrpo.ops.doctor_model import Finding, Level, model_findings, usable
from egrpo.ops.memory import GIB
from egrpo.planning.trees import check_trees, closed_form_plan, cost_of, reads_profile, tree_of
from egrpo.report.provenance import versions
from egrpo.study.files import file_problems
from egrpo.study.identity import MISSING
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study, load_study

Told = Iterator[tuple[Level, str]]

LESS = {
    "checkpoints": "model.lora.rank, or the number of runs",
    "trained weights": "model.lora.rank, train.snapshots, or the number of runs",
    "prompt embeddings": "prompts.limit",
    "images": "evaluate.samples or evaluate.prompts, or raise train.monitor_every",
    "records": "train.iterations, or the number of runs",
}
"""What makes a part of the disk smaller."""


def doctor(paths: tuple[Path, ...], *, rewards: bool = True) -> Iterator[Finding]:
    """Findings on a study, as they are made.

    With ``rewards`` every reward model is loaded, to know that its weights fit.
    """
    yield from _findings("versions", _versions())
    yield from _findings("cache", _cache())
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
    if study.refused:
        why = next(iter(study.refused.values()))
        names = ", ".join(study.refused)
        yield Finding("warn", "targets", f"not of these runs: {names}; the first: {why}")
    runs = study.runs.values()
    for run in different(runs, lambda run: (run.prompts, run.guided)):
        for key in ("train", "heldout"):
            yield from _findings("prompts", _prompts(run, key))
    for problem in problems(study):
        what = "prompts" if problem.startswith("prompts") else "size"
        yield Finding("FAIL", what, problem)
    devices = {run.model.device for run in runs}
    devices |= {getattr(r, "device", None) or "" for run in runs for r in run.rewards.values()}
    for name in sorted(devices - {""}):
        yield from _findings("device", _device(name))
    for run in different(runs, lambda run: run.model):
        yield from model_findings(run)
    asked = {(n, repr(r)): (n, r, run) for run in runs for n, r in run.rewards.items()}
    for name, reward, run in asked.values() if rewards else ():
        yield from _findings("reward", _reward(name, reward, run))
    for run in {run.arm: run for run in runs}.values():
        yield Finding("ok", "batches", f"{run.arm}: {_arithmetic(run)}")
    yield from _findings("disk", _disk(study, paths))
    yield from _findings("tracking", _tracking(study))


def _findings(what: str, told: Told) -> Iterator[Finding]:
    try:
        for level, text in told:
            yield Finding(level, what, text)
    except UserError as error:
        yield Finding("FAIL", what, str(error))


def _versions() -> Told:
    found = versions()
    missing = [name for name, version in found.items() if version == MISSING]
    yield "ok", ", ".join(f"{name} {found[name]}" for name in found if name not in missing)
    if missing:
        yield "FAIL", f"not installed: {', '.join(missing)}"
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        yield "FAIL", f"torchvision does not match torch: {one_line(error, 120)}"


def _cache() -> Told:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if not os.access(_existing(folder), os.W_OK):
        why = "cannot be written, and Snakemake keeps files there; set XDG_CACHE_HOME"
        yield "FAIL", f"{folder}: {why}"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _prompts(run: RunConfig, key: str) -> Told:
    files = run.prompts
    path, limit = getattr(files, key), files.limit if key == "train" else None
    prompts = train_prompts(path, limit, files.column)
    text = f"{path}: {len(prompts)} prompts, the first is {prompts[0].text!r:.80}"
    unused = sum(bool(p.negative) for p in prompts)
    if unused and not run.guided:
        ignored = "negative prompts are ignored: model.guidance_scale is 1"
        yield "warn", f"{text}; {unused} {ignored}"
    else:
        yield "ok", text


def _device(name: str) -> Told:
    device, free = usable(name)
    if device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory / GIB
        title = torch.cuda.get_device_name(device)
        yield "ok", f"{name}: {title}, {free:.1f} of {total:.1f} GiB free"
    else:
        yield "ok", f"{name}: {device.type}, {free:.1f} GiB free"


def _reward(name: str, settings: AnyReward, run: RunConfig) -> Told:
    """Whether its weights fit; a function of the user's must score the first held-out prompt."""
    import torch

    from egrpo.rewards import load_reward, score_all

    try:
        reward = load_reward(settings, "cpu")
        if not isinstance(settings, Custom):
            yield "ok", f"{name}: {settings.kind}"
            return
        model, files = run.evaluation_model, run.prompts
        prompt = read_prompts(files.heldout, files.column)[0].text
        gray = torch.full((1, 3, model.height, model.width), 127, dtype=torch.uint8)
        (score,) = score_all({name: reward}, gray, [prompt])[name]
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:
        if not isinstance(settings, Custom):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield "FAIL", f"{name}: cannot score a gray image: {reason}"
        return
    about = f"{name}: custom, {score:.3g} for a gray image and prompt {prompt!r:.60}"
    if math.isnan(score):
        yield "warn", f"{about}: does it read such prompts and sizes?"
    else:
        yield "ok", about


def _arithmetic(run: RunConfig) -> str:
    t = run.train
    trained = f"trained on {' + '.join(f'{name} {part:g}' for name, part in t.rewards.items())}"
    if reads_profile(run):
        return f"its plan waits for the profile; {trained}"
    count = t.prompts_per_iteration
    cost = cost_of(run, [tree_of(run, closed_form_plan(run))] * count)
    parts = f" in {t.updates} optimizer steps" if t.updates > 1 else ""
    return (
        f"{count} prompts an iteration, {cost.forward} forward and {cost.train} forward-backward "
        f"evaluations{parts}; {trained}"
    )


def _disk(study: Study, configs: tuple[Path, ...]) -> Told:
    root = Layout(study).root
    folder = _existing(root.parent)
    if not os.access(folder, os.W_OK):
        where = f"{study.results}: {folder} cannot be written"
        yield "FAIL", f"{where}; let `results` name a folder that can"
        return
    stores = {r.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") for r in study.runs.values()}
    copies = stores == {None}  # MLflow's, in the results folder
    parts = {name: size / GIB for name, size in disk(study, copies=copies).items()}
    old = leftovers(Layout(study))
    there = ((size_of(root) if root.is_dir() else 0) - sum(one.size for one in old)) / GIB
    need = max(sum(parts.values()) - there, 0.0) + 0.1
    free = shutil.disk_usage(folder).free / GIB
    largest = sorted(parts, key=lambda name: -parts[name])
    text = f"{free:.1f} GiB free under {study.results}, about {need:.1f} GiB to come"
    text += f" ({', '.join(f'{name} {parts[name]:.2g}' for name in largest)}"
    text += f"; {there:.1f} are there)" if there > 0.1 else ")"
    yield ("ok", text) if need < free else ("FAIL", f"{text}: lower {LESS[largest[0]]}")
    if old:
        words = shlex.join(["egrpo", "clean", *map(str, configs)])
        yield "warn", f"{root}: {summary(old)}; `{words}` lists them"


def _tracking(study: Study) -> Told:
    from egrpo.tracking.address import in_one_line, study_uri
    from egrpo.tracking.client import open_client

    uri = study_uri(study)
    if not any(run.tracking.enabled for run in study.runs.values()):
        yield "ok", "switched off"
    elif uri.startswith("sqlite:"):
        yield "ok", uri
    else:
        try:
            open_client(uri).search_experiments(max_results=1)
        except UserError:
            raise
        except Exception as error:  # MLflow's and the network's; training would go on without
            yield "warn", f"{in_one_line(uri)} does not answer: {in_one_line(error)}"
        else:
            yield "ok", f"{in_one_line(uri)} answers"
