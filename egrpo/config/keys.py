"""Digests of settings alone: what tables and pages name a run's settings by."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.settings import without_password


def digest(value: Any) -> str:
    """Ten hexadecimal digits that name a JSON-like value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def run_key(run: RunConfig) -> str:
    """Names the settings of a training run; how it is evaluated and tracked does not matter."""
    beside = dict.fromkeys(("tracking", "evaluate", "profile", "arm"), True)
    return digest(run.model_dump(exclude=beside))


def evaluation_key(run: RunConfig) -> str:
    """Names the base model and how it is evaluated: runs that share it can be compared."""
    tuned = {"tuning", "lora", "merge_lora_for_sampling", "feature_cache", "compile"}
    return digest(
        {
            "model": run.model.model_dump(exclude=tuned),
            "schedule": run.schedule.model_dump(),
            "rewards": {k: r.model_dump() for k, r in run.rewards.items()},
            "evaluate": run.evaluate.model_dump(
                exclude={"bootstrap", "grid_prompts", "micro_batch"}
            ),
            "prompts": [run.prompts.heldout, run.prompts.column],
        }
    )


def tracking_key(run: RunConfig) -> str:
    """Names where a study is tracked."""
    uri = run.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return digest({"study": run.study, "uri": uri and without_password(uri)})
