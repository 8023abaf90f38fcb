"""What a training state depends on, so that nothing stale is ever resumed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import egrpo
from egrpo.config.load import digest, run_key
from egrpo.config.models import RunConfig
from egrpo.core.plan import Plan

CODE = ("core", "models", "rewards", "stages/train.py", "stages/sampling.py", "world/verifier.py")
WHOLE_FILE_LIMIT = 64 * 2**20
"""Larger files are named by size and time of change: hashing 24 GB at every start costs minutes."""


def code_files() -> list[Path]:
    """Source files that decide what training computes."""
    root = Path(egrpo.__file__).parent
    found = []
    for part in CODE:
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
    files = sorted(root.glob("**/*.safetensors"))
    return {str(f.relative_to(root)): file_identity(f) for f in files}


def state_key(run: RunConfig, plan: Plan | None, embeddings: Path) -> str:
    """Names the state folder of a run: settings, plan, inputs and code, or nothing is resumed."""
    return digest(
        {
            "run": run_key(run),
            "plan": plan.to_dict() if plan else None,
            "embeddings": file_identity(embeddings),
            "model": weights_identity(run.model.path),
            "rewards": [weights_identity(r.path) for r in run.rewards.values() if r.path],
            "code": [file_identity(f) for f in code_files()],
        }
    )
