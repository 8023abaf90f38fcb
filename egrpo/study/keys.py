"""Keys: digests of the settings that a stage depends on, so that equal keys mean equal work."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.settings import without_password


def digest(value: Any) -> str:
    """Ten hexadecimal digits that name a JSON-like value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def base_model(run: RunConfig) -> dict[str, Any]:
    """The settings that say what the untrained model computes."""
    tuned = {"tuning", "lora", "merge_lora_for_sampling", "feature_cache"}
    return run.model.model_dump(exclude=tuned)


def embedding_key(run: RunConfig) -> str:
    """Names the prompt embeddings that a run needs."""
    model = run.model
    return digest(
        {
            "path": model.path,
            "revision": model.revision,
            "dtype": model.dtype,
            "max_sequence_length": model.max_sequence_length,
            "negative": run.guided,
            "prompts": run.prompts.model_dump(),
        }
    )


def profile_key(run: RunConfig) -> str:
    """Names the entropy profile that a run's plan is made from."""
    method = run.method
    return digest(
        {
            "model": base_model(run),
            "schedule": run.schedule.model_dump(),
            "end": run.schedule.end_at(run.model, stock=method.stock_grid),
            "steps": method.steps,
            "dynamics": method.dynamics,
            "noise_level": method.noise_level,
            "rewards": {k: r.model_dump() for k, r in run.rewards.items()},
            "profile": run.profile.model_dump(exclude={"strides", "solvers", "features", "fp8"}),
            "prompts": [run.prompts.train, run.prompts.limit, run.prompts.column],
        }
    )


def evaluation_key(run: RunConfig) -> str:
    """Names the evaluation of the base model that a run is compared with."""
    return digest(
        {
            "model": base_model(run),
            "schedule": run.schedule.model_dump(),
            "rewards": {k: r.model_dump() for k, r in run.rewards.items()},
            "evaluate": run.evaluate.model_dump(exclude={"bootstrap"}),
            "prompts": [run.prompts.heldout, run.prompts.column],
        }
    )


def plan_key(run: RunConfig) -> str:
    """Names what a run's merge plan is made from."""
    return digest(
        {
            "run": run.run,
            "schedule": run.schedule.model_dump(),
            "method": run.method.model_dump(),
            "rewards": run.train.rewards,  # whose spread the plan may depend on
        }
    )


CUT = {
    "train": {"micro_batch", "train_micro_batch", "decode_batch", "gradient_checkpointing"},
    "model": {"vae_slicing"},
}
"""How the work is cut to fit the memory: it changes roundings and nothing else, so a run goes on
from its state after a change."""


def run_key(run: RunConfig) -> str:
    """Names what a training run computes; how it is cut, evaluated and tracked does not matter."""
    beside: Any = {
        **dict.fromkeys(("tracking", "evaluate", "profile", "arm"), True),
        **CUT,
        "train": {"snapshots", *CUT["train"]},
    }
    return digest({**run.model_dump(exclude=beside), "monitor_steps": run.evaluate.steps})


def training_key(run: RunConfig) -> str:
    """Names what a training job does: the run, the weights kept on its way, live tracking."""
    return digest(
        {
            "run": run_key(run),
            "cut": run.model_dump(include=CUT),
            "snapshots": run.train.snapshots,
            "tracking": run.tracking.model_dump(exclude={"uri"}),
        }
    )


def scoring_key(run: RunConfig) -> str:
    """Names how a trained run is evaluated."""
    return digest(
        {
            "run": run.run,
            "model": run.model.model_dump(include={"tuning", "lora"}),
            "evaluation": evaluation_key(run),
            "snapshots": run.train.snapshots,
            "iterations": run.train.iterations,  # a snapshot may be the last iteration's
        }
    )


def suffixes_key(run: RunConfig) -> str:
    """Names how a run's suffixes are compared."""
    profile = run.profile.model_dump()
    return digest({"run": run.run, "profile": profile_key(run), "settings": profile})


def tracking_key(run: RunConfig) -> str:
    """Names where a study is tracked."""
    uri = run.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return digest({"study": run.study, "uri": uri and without_password(uri)})


def settings_key(run: RunConfig) -> str:
    """Names all settings of a run."""
    return digest(run.model_dump())


KEYS: dict[str, Callable[[RunConfig], str]] = {
    "embed": embedding_key,
    "profile": profile_key,
    "suffixes": suffixes_key,
    "plan": plan_key,
    "train": training_key,
    "evaluate": scoring_key,
    "base": evaluation_key,
    "track": tracking_key,
    "run": settings_key,
}
"""What each stage depends on, by stage: equal keys mean equal work."""
