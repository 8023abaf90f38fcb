"""Disk that a study takes, by settings and the headers of its model's files: an estimate."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path

from egrpo.config.keys import evaluation_key
from egrpo.config.models import Model, RunConfig
from egrpo.config.prompts import read_prompts, train_prompts
from egrpo.errors import UserError
from egrpo.models.families import FAMILIES
from egrpo.ops.weights import BYTES, lora_parameters
from egrpo.planning import trees
from egrpo.store.checkpoint import KEEP
from egrpo.store.weights import Part, read_part
from egrpo.study.resolve import Study

PIXEL = 1.5
"""Bytes of a pixel of a PNG, about."""

RECORD = 35, 40
"""Bytes of a trained edge in journal and rollouts table: itself, and each trained reward of it."""


def disk(study: Study, *, copies: bool) -> dict[str, float]:
    """Bytes that all runs of a study take in the end, by what takes them.

    ``copies``: whether MLflow keeps its copies on this disk too.
    """
    found: dict[str, float] = defaultdict(float)
    seen: set[tuple[str, str]] = set()
    part_of, arms = cache(_transformer), {run.arm: run for run in study.runs.values()}
    records = {arm: record_bytes(run) for arm, run in arms.items()}

    def first(what: str, key: str) -> bool:
        known = (what, key) in seen
        seen.add((what, key))
        return not known

    for run in study.runs.values():
        part = part_of(run.model.path)
        if part is not None:
            for what, size in trained_bytes(run, part, copies=copies).items():
                found[what] += size
            if first("embeddings", repr((run.model.path, run.prompts, run.guided))):
                found["prompt embeddings"] += embedding_bytes(run, part)
        found["images"] += monitor_bytes(run) * (2 + copies) + evaluation_bytes(run)
        if first("base", evaluation_key(run)):
            found["images"] += evaluation_bytes(run)
        if trees.needs_plan(run) and first("profile", repr((run.model, run.profile, run.rewards))):
            shown = run.profile.shown_prompts * len(run.profile.shown) * run.profile.samples
            found["images"] += shown * _png_bytes(run.model)
        found["records"] += records[run.arm]
    return dict(found)


def _transformer(path: str) -> Part | None:
    try:
        return read_part(Path(path), "transformer")
    except UserError:  # a hub id, whose weights are not known
        return None


def trained_bytes(run: RunConfig, part: Part, *, copies: bool) -> dict[str, float]:
    """Checkpoints (weights, two moments, their average, float32), and weights at the end.

    Snapshots are kept in the state and among the results.
    """
    full = run.model.tuning == "full"
    weights = 4.0 * (part.parameters if full else lora_parameters(run, part))
    kept = 3 + (run.train.ema_decay is not None)
    return {
        "checkpoints": KEEP * kept * weights,
        "trained weights": (1 + 2 * len(run.train.snapshots) + copies) * weights,
    }


def embedding_bytes(run: RunConfig, part: Part) -> float:
    """Prompt embeddings of a run; 0 where the model's files do not say their width."""
    m, config = run.model, part.config
    files = run.prompts
    prompts = len(train_prompts(files.train, files.limit, files.column))
    prompts += len(read_prompts(files.heldout, files.column))
    width = config.get("joint_attention_dim") or config.get("cap_feat_dim") or 0
    tokens = FAMILIES[m.family].tokens if m.max_sequence_length is None else m.max_sequence_length
    return float(prompts * tokens * width * BYTES[m.dtype] * (2 if run.guided else 1))


def _png_bytes(model: Model) -> float:
    """One image."""
    return model.height * model.width * PIXEL


def monitor_bytes(run: RunConfig) -> float:
    """The monitors' images of a run."""
    return trees.monitor_images(run) * _png_bytes(run.model)


def evaluation_bytes(run: RunConfig) -> float:
    """The images of one evaluation."""
    e, prompts = run.evaluate, len(read_prompts(run.prompts.heldout, run.prompts.column))
    return min(e.prompts or prompts, prompts) * e.samples * _png_bytes(run.evaluation_model)


def record_bytes(run: RunConfig) -> float:
    """Journal and rollouts table; 0 where the plan waits for a profile."""
    if trees.reads_profile(run):
        return 0.0
    tree = trees.tree_of(run, trees.closed_form_plan(run))
    edges = run.train.iterations * run.train.prompts_per_iteration * tree.cost.train
    edge, reward = RECORD
    return float(edges * (edge + reward * len(run.train.rewards)))
