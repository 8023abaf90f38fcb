"""A small study of the shipped toy, and real snakemake processes that run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT

from egrpo.config.load import overlay, read_yaml

TABLE = "run\tmethod.name\ttrain.learning_rate_scale\tmethod.threshold\n"
RUNS = TABLE + "one\tegrpo\t\ntwo\tflow_grpo\t\nthree\tegrpo\t\tauto\n"
EVALUATIONS = 400  # one iteration of E-GRPO, all of Flow-GRPO
KINDS = ("branches", "entropy", "spread", "threshold", "curves", "images")

SMALL: dict[str, Any] = {
    "study": "small",
    "seeds": [0, 1],
    "default_runs": ["one-s0", "two-s0"],
    "paper": ["scores_of_all", *(f"the_{kind}" for kind in KINDS)],
    "methods": {
        "egrpo": {"group_size": 3, "active": 4, "spread_factor": 0.01},
        "flow_grpo": {"group_size": 4, "steps": 5},
    },
    "profile": {"prompts": 2, "samples": 3, "spans": [1, 2], "shown": [[2, 1], [3, 2]]},
    "train": {
        "iterations": 3,
        "prompts_per_iteration": 2,
        "checkpoint_every": 1,
        "monitor_every": 2,
        "monitor_prompts": 2,
        "monitor_samples": 2,
    },
    "evaluate": {"steps": 4, "samples": 2, "prompts": 6, "grid_prompts": 3},
}


def study(folder: Path, runs: str = RUNS, **changes: Any) -> Path:
    """A small study's YAML and runs table in ``folder``, results there too."""
    settings = overlay(read_yaml(ROOT / "config/config.yaml"), SMALL)
    settings |= {"results": str(folder / "results"), "runs": str(folder / "runs.tsv")}
    settings["tables"] = {
        "scores_of_all": {
            "caption": "All arms.",
            "sections": {"first": ["one", "two"], "second": ["three"]},
            "rewards": ["verifier", "clip"],
            "evaluations": EVALUATIONS,
        }
    }
    settings["figures"] = {
        f"the_{kind}": {
            "kind": kind,
            "caption": f"The {kind}.",
            "arms": ["three"] if kind in ("spread", "threshold") else ["one", "three"],
            "pairs": [[2, 1], [3, 2]],
            "spans": [1, 2],
            "prompts": 2,
        }
        for kind in KINDS
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings = overlay(settings, {section: {name: value}} if name else {section: value})
    (folder / "runs.tsv").write_text(runs)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def snakemake(
    config: Path | None, *words: str, where: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    extra = ["--configfile", str(config)] if config else []
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = f"{ROOT / 'tests/noted'}{os.pathsep}{env.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", *words, *extra],
        cwd=where,
        env=env,
        capture_output=True,
        text=True,
    )


def planned(config: Path | None, *words: str, where: Path = ROOT) -> dict[str, int]:
    """Jobs of a dry run: rule -> count."""
    done = snakemake(config, "--dry-run", *words, where=where)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^job +count\n-+ +-+\n(.*?)^total", done.stdout + done.stderr, re.M | re.S)
    return {k: int(v) for k, v in (ln.split() for ln in found[1].splitlines())} if found else {}


def results(config: Path) -> Path:
    return config.parent / "results" / "small"
