"""The page of the architecture against the code: rooms, what each imports, and no circle.

Planning and configuration stay light: what a module pulls in is part of its contract.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter

from conftest import ROOT

from egrpo.methods import METHOD_MODELS
from egrpo.study.code import imported, module_file

HEAVY = {"torch", "mlflow", "snakemake", "diffusers", "transformers"}
TORCH_CORE = {f"egrpo.core.{name}" for name in ("transitions", "executor", "loss", "rollout")}
CORE = {f"egrpo.core.{p.stem}" for p in ROOT.glob("egrpo/core/[a-z]*.py")}


def rooms_on_the_page() -> dict[str, set[str]]:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([a-z_ ]+) \|$", text, re.MULTILINE)
    return {room: set(names.split()) - {"nothing"} for room, names in rows}


def rooms_in_the_code() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "egrpo").rglob("*.py")):
        room = path.relative_to(ROOT / "egrpo").with_suffix("").parts[0]
        if room == "__init__":
            continue
        names = [n for n in imported(path).split("\n") if n.startswith("egrpo.")]
        others = {n.split(".")[1] for n in names if module_file(n)} - {room}
        found.setdefault(room, set()).update(others)
    return found


def test_rooms_and_arrows_are_those_of_the_code():
    assert rooms_on_the_page() == rooms_in_the_code()


def test_no_room_imports_one_that_imports_it():
    order = list(TopologicalSorter(rooms_in_the_code()).static_order())
    assert order.index("core") < order.index("train") < order.index("jobs") < order.index("cli")


def test_no_room_is_above_a_sixth_of_the_house():
    lines: dict[str, int] = {}
    for path in (ROOT / "egrpo").rglob("*.py"):
        room = path.relative_to(ROOT / "egrpo").with_suffix("").parts[0]
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    assert 6 * max(lines.values()) <= sum(lines.values()), lines


def loaded_by(modules: Iterable[str]) -> set[str]:
    """Names in ``sys.modules`` after importing ``modules`` in a fresh interpreter."""
    code = f"import json, sys, {', '.join(modules)}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_planning_and_configuration_import_no_heavy_package_and_core_torch_alone():
    light = {*CORE - TORCH_CORE, "egrpo.config.load", "egrpo.methods.awm", "egrpo.planning.trees"}
    loaded = loaded_by(light)
    assert light <= loaded
    assert not loaded & HEAVY
    assert loaded_by(CORE) & HEAVY == {"torch"}


def test_nothing_outside_asks_which_method_it_has():
    """A method answers itself; an added one would be missing from such a question."""
    classes = "|".join(model.__name__ for model in METHOD_MODELS.values())
    asks = re.compile(rf"isinstance\([^)]*\b({classes}|Merging|Branching)\b|method\.name [!=]= \"")
    files = [p for p in ROOT.glob("egrpo/**/*.py") if p.parent.name != "methods"]
    assert len(files) > 100
    found = [p for p in [*files, *ROOT.glob("docs/generate/*.py")] if asks.search(p.read_text())]
    assert not found
