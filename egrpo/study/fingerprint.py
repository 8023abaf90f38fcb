"""What a training state depends on, so that nothing stale is ever resumed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import egrpo
from egrpo.config.models import RunConfig
from egrpo.core.plan import Plan
from egrpo.study.keys import digest, run_key

SAMPLING_CODE = (
    "core/executor.py",
    "methods/shapes.py",
    "core/noise.py",
    "core/rollout.py",
    "core/schedule.py",
    "core/seeds.py",
    "core/transitions.py",
    "core/tree.py",
    "images.py",
    "models",
    "rewards",
    "sampling/sample.py",
    "world/preference.py",
    "world/prompts.py",
    "world/shapes.py",
    "world/verifier.py",
)
"""Sources that decide what a model samples and how it is scored, relative to the package."""

TRAINING_CODE = (
    *SAMPLING_CODE,
    "methods/settings.py",
    "planning/trees.py",
    "core/advantage.py",
    "core/loss.py",
    "core/plan.py",
    "train/monitor.py",
    "sampling/processes.py",
    "train/records.py",
    "train/rollouts.py",
    "train/trainer.py",
)
"""Sources that decide what training computes. The workflow lists the same ones as inputs."""

WHOLE_FILE_LIMIT = 64 * 2**20
"""Larger files are named by size and time of change: hashing 24 GB at every start costs minutes."""


def code_files() -> list[Path]:
    """Source files that decide what training computes."""
    root = Path(egrpo.__file__).parent
    found = []
    for part in TRAINING_CODE:
        path = root / part
        found += sorted(path.glob("*.py")) if path.is_dir() else [path]
    return found


def file_identity(path: Path) -> str:
    """SHA-256 of a file's content; size and time of change for large ones."""
    stat = path.stat()
    if stat.st_size > WHOLE_FILE_LIMIT:
        return f"{stat.st_size}:{stat.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_identity(path: str) -> dict[str, str]:
    """Identity of the weight files under a local folder (or of one file); a hub id names itself."""
    root = Path(path)
    if root.is_file():
        return {path: file_identity(root)}
    files = [f for ending in ("safetensors", "json") for f in sorted(root.glob(f"**/*.{ending}"))]
    return {str(f.relative_to(root)): file_identity(f) for f in files}


def state_key(run: RunConfig, plan: Plan | None, embeddings: Path) -> str:
    """Names the state folder of a run: settings, plan, inputs and code, or nothing is resumed."""
    return digest(
        {
            "run": run_key(run),
            "plan": plan.to_dict() if plan else None,
            "embeddings": file_identity(embeddings),
            "model": weights_identity(run.model.path),
            "rewards": [
                weights_identity(path) for r in run.rewards.values() for path in r.files.values()
            ],
            "code": [file_identity(f) for f in code_files()],
        }
    )
