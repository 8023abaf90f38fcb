"""The model card of a bundle: YAML front matter for model hubs, and a page for people."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from egrpo.config.keys import run_key
from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.planning.grids import learning_rate
from egrpo.planning.plan import load_plan, plan_rows
from egrpo.planning.trees import needs_plan
from egrpo.report.evaluations import MEASURED, Row
from egrpo.report.render import render
from egrpo.report.text import counted, read_rows, readable, verdict
from egrpo.settings import is_hub_id
from egrpo.store.files import read_json
from egrpo.store.tables import SCORES, TRAIN_METRICS, metadata_of, read_table
from egrpo.study.sharing import shareable, without_folder

TASK = "text-to-image"


class Sample(NamedTuple):
    """One image shown by itself: what it was drawn from, and its name in the bundle."""

    prompt: str
    file: str


def model_card(
    run: RunConfig,
    folder: Path,
    samples: Sequence[Sample],
    made_by: str,
    license: str | None,
    base_model: str | None,
) -> str:
    """README.md of a bundle, from its tables and plan in ``folder``, where the samples lie too.

    ``made_by`` is the command that makes the run's results, ``base_model`` the base model's hub id,
    for settings that name a folder. Without ``license`` the card says that it is open.

    Raises:
        UserError: if ``base_model`` is no hub id.
    """
    from egrpo.bundle.loading import loading  # torch

    if base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base_model):
        raise UserError(f"--base-model: {base_model!r} is no hub id (owner/name)")
    hub_id = base_model or base_on_hub(run)
    plan = load_plan(folder / "plan.json") if needs_plan(run) else None
    rows, train = read_rows(folder / "comparison.parquet"), read_json(folder / "train.json")
    prompts = len(set(read_table(folder / "scores.parquet", SCORES)["prompt_id"].to_pylist()))
    page = render(
        "model_card.md.j2",
        run=run,
        samples=samples,
        license=license,
        hub_id=hub_id,
        base=hub_id or without_folder(run.model.path),
        loading=loading(run, hub_id, samples[0].prompt),
        method=_first_line(run.method),
        train=train,
        learning_rate=learning_rate(run),
        plan=plan,
        plan_rows=plan_rows(run.run, plan) if plan else [],
        rewards=[_reward(run, name) for name in run.rewards],
        rows=[{**row, "text": readable(row)} for row in rows],
        verdicts=[(row["reward"], verdict(row)) for row in rows if row["trained_on"]],
        measured={row["reward"]: readable(row) for row in rows if row["reward"] in MEASURED},
        invalid=sum(row["invalid"] for row in rows),
        over=counted(prompts, "held-out prompt", run.evaluate.samples),
        warnings=rows[0]["warnings"],
        made_by=made_by,
        digest=run_key(run),
        made=metadata_of(read_table(folder / "train_metrics.parquet", TRAIN_METRICS)),
        notes=shareable(run)[1],
    )
    return f"---\n{_front_matter(run, rows, samples, license, hub_id, prompts)}\n---\n{page}"


def base_on_hub(run: RunConfig) -> str | None:
    """The base model's hub id; None where the settings name a folder."""
    model = run.model
    local = Path(model.path).exists() or model.revision is None
    return None if local or not is_hub_id(model.path) else model.path


def _front_matter(
    run: RunConfig,
    rows: Sequence[Row],
    samples: Sequence[Sample],
    license: str | None,
    hub_id: str | None,
    prompts: int,
) -> str:
    """What a hub reads of the card, with the trained model's means as results, each with the
    base's, the difference and its 95% interval."""
    from huggingface_hub import EvalResult, ModelCardData

    lora, name = run.model.tuning == "lora", Path(run.prompts.heldout).name
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=re.sub(r"[^a-z0-9]+", "-", Path(name).stem.lower()).strip("-")
            or "prompts",
            dataset_name=f"held-out prompts ({name})",
            dataset_args={"prompts": prompts, "samples": run.evaluate.samples},
            metric_type=row["reward"],
            metric_name=f"{row['reward']}, mean",
            metric_value=row["mean"],
            metric_args={key: row[key] for key in ("base", "difference", "low", "high", "pairs")},
        )
        for row in rows
        if row["mean"] is not None
    ]
    tags = [TASK, "diffusers", "flow-matching", "grpo", "egrpo"]
    kind = "adapter" if lora else "finetune"
    relation: dict[str, Any] = {"base_model_relation": kind} if hub_id else {}
    return ModelCardData(
        base_model=hub_id,
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=[*tags, *(["lora", "template:sd-lora"] if lora else [])],
        model_name=f"{run.study} {run.run}",
        eval_results=results,
        widget=[{"text": s.prompt, "output": {"url": s.file}} for s in samples],
        **relation,
    ).to_yaml()


def _reward(run: RunConfig, name: str) -> dict[str, Any]:
    """Name, kind, weights and part in training of one reward."""
    settings = run.rewards[name]
    path = str(getattr(settings, "path", "") or getattr(settings, "function", ""))
    return {
        "name": name,
        "kind": settings.kind,
        "what": settings.measures(),
        "path": without_folder(path),
        "weight": run.train.rewards.get(name),
    }


def _first_line(settings: object) -> str:
    return (type(settings).__doc__ or "").strip().splitlines()[0]
