"""With what results were made: versions of the software, commits and digests of the settings."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egrpo import __version__
from egrpo.config.keys import run_key
from egrpo.config.load import yaml_of
from egrpo.config.models import RunConfig
from egrpo.planning.grids import learning_rate
from egrpo.report.evaluations import evaluations, train_record
from egrpo.report.render import render
from egrpo.store.files import write_text
from egrpo.store.tables import SCORES, git_commit, metadata_of, read_table
from egrpo.study.identity import installed
from egrpo.study.layout import Layout
from egrpo.study.sharing import shareable

PACKAGES = (
    *("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate"),
    *("open_clip_torch", "clip-anytorch", "mlflow", "snakemake", "pyarrow", "numpy"),
)
"""What results depend on."""


def versions() -> dict[str, str]:
    """Name -> version of this package, Python and what results depend on; no import of any."""
    found = {"egrpo": f"{__version__} {git_commit()}".strip(), "python": platform.python_version()}
    return found | {name: installed(name) for name in PACKAGES}


def scored_at(at: Layout, run: str) -> str:
    """The commit that a run's scores were written at, else the version."""
    head = metadata_of(read_table(at.run(run) / "scores.parquet", SCORES))
    return head.get("git_commit") or f"egrpo {head.get('egrpo_version', '?')}"


def facts(run: RunConfig, train: Mapping[str, Any]) -> dict[str, str]:
    """What matters of a run's settings, and what its training (``train.json``) cost, by heading."""
    weights, model, memory = run.train.rewards, run.model, train.get("peak_memory_mib")
    wanted = "" if train["iterations"] == run.train.iterations else f" of {run.train.iterations}"
    return {
        "run": run.run,
        "method": run.method.name,
        "trained on": ", ".join(n if w == 1 else f"{n} ({w:g})" for n, w in weights.items()),
        "seed": str(run.seed),
        "iterations": f"{train['iterations']}{wanted}",
        "learning rate": f"{learning_rate(run):.3g}",
        "network evaluations": f"{evaluations(train):,}",
        "seconds": f"{train['seconds']:,.0f}",
        "peak memory (MiB)": "-" if memory is None else f"{memory:,.0f}",
        "base model": f"{model.family}, {Path(model.path).name}",
        "pixels": f"{model.width} x {model.height}",
        "settings": run_key(run),
    }


def write_about(at: Layout, output: str | Path) -> None:
    """Write one HTML page: versions, runs with their commits, and all settings of each arm."""
    rows, settings, arms = [], {}, set()
    for name, run in at.study.runs.items():
        row = facts(run, train_record(at.run(name) / "train.json"))
        rows.append({**row, "scored at": scored_at(at, name)})
        if run.arm not in arms:
            settings[name] = yaml_of(shareable(run)[0])
        arms.add(run.arm)
    title = f"Study {at.study.name}: versions and settings"
    page = render("about.html.j2", title=title, versions=versions(), runs=rows, settings=settings)
    write_text(output, page)
