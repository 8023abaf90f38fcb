"""Planning and configuration stay light: what a module pulls in is part of its contract."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from conftest import ROOT

from egrpo.methods import METHOD_MODELS

HEAVY = {"torch", "mlflow", "snakemake", "diffusers", "transformers"}
LIGHT_CORE = [
    "egrpo.core.schedule",
    "egrpo.core.noise",
    "egrpo.core.entropy",
    "egrpo.core.plan",
    "egrpo.core.tree",
    "egrpo.core.advantage",
    "egrpo.core.seeds",
    "egrpo.core.intervals",
    "egrpo.core.spread",
]
TORCH_CORE = [
    "egrpo.core.transitions",
    "egrpo.core.executor",
    "egrpo.core.loss",
    "egrpo.core.rollout",
]


def loaded_by(modules: list[str]) -> set[str]:
    """Names in ``sys.modules`` after importing ``modules`` in a fresh interpreter."""
    code = f"import json, sys, {', '.join(modules)}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_planning_and_configuration_import_no_heavy_package():
    loaded = loaded_by([*LIGHT_CORE, "egrpo.config.load", "egrpo.planning.trees"])
    assert {"egrpo.core.plan", "egrpo.config.load", "egrpo.methods.awm", "numpy"} <= loaded
    assert not loaded & HEAVY


def test_core_imports_no_other_room_and_no_tracker():
    loaded = loaded_by(LIGHT_CORE + TORCH_CORE)
    assert "torch" in loaded
    ours = {name.split(".")[1] for name in loaded if name.startswith("egrpo.")}
    assert ours == {"core"}
    assert not loaded & (HEAVY - {"torch"})


def test_methods_import_the_core_and_nothing_above():
    loaded = loaded_by(["egrpo.methods"])
    ours = {name.split(".")[1] for name in loaded if name.startswith("egrpo.")}
    assert ours == {"core", "methods", "settings"}
    assert not loaded & HEAVY


def test_nothing_outside_asks_which_method_it_has():
    """A method answers itself; an added one would be missing from such a question."""
    classes = "|".join(model.__name__ for model in METHOD_MODELS.values())
    asks = re.compile(rf"isinstance\([^)]*\b({classes}|Merging|Branching)\b|method\.name [!=]= \"")
    files = [p for p in ROOT.glob("egrpo/**/*.py") if p.parent.name != "methods"]
    assert len(files) > 100
    found = [p for p in [*files, *ROOT.glob("docs/generate/*.py")] if asks.search(p.read_text())]
    assert not found
