"""Planning and configuration stay light: what a module pulls in is part of its contract."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable

from conftest import ROOT

from egrpo.methods import METHOD_MODELS

HEAVY = {"torch", "mlflow", "snakemake", "diffusers", "transformers"}
TORCH_CORE = {f"egrpo.core.{name}" for name in ("transitions", "executor", "loss", "rollout")}
CORE = {f"egrpo.core.{p.stem}" for p in ROOT.glob("egrpo/core/[a-z]*.py")}


def loaded_by(modules: Iterable[str]) -> set[str]:
    """Names in ``sys.modules`` after importing ``modules`` in a fresh interpreter."""
    code = f"import json, sys, {', '.join(modules)}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_planning_and_configuration_import_no_heavy_package():
    loaded = loaded_by([*CORE - TORCH_CORE, "egrpo.config.load", "egrpo.planning.trees"])
    assert {"egrpo.core.plan", "egrpo.config.load", "egrpo.methods.awm", "numpy"} <= loaded
    assert not loaded & HEAVY


def test_core_and_methods_import_nothing_above_them_and_no_tracker():
    for modules, rooms, heavy in (
        (CORE, {"core"}, {"torch"}),
        (["egrpo.methods"], {"core", "methods", "settings"}, set()),
    ):
        loaded = loaded_by(modules)
        assert {name.split(".")[1] for name in loaded if name.startswith("egrpo.")} == rooms
        assert loaded & HEAVY == heavy


def test_nothing_outside_asks_which_method_it_has():
    """A method answers itself; an added one would be missing from such a question."""
    classes = "|".join(model.__name__ for model in METHOD_MODELS.values())
    asks = re.compile(rf"isinstance\([^)]*\b({classes}|Merging|Branching)\b|method\.name [!=]= \"")
    files = [p for p in ROOT.glob("egrpo/**/*.py") if p.parent.name != "methods"]
    assert len(files) > 100
    found = [p for p in [*files, *ROOT.glob("docs/generate/*.py")] if asks.search(p.read_text())]
    assert not found
