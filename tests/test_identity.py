"""Which results stand after a change, by the table that docs/changes.md shows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from docs.generate.changes import GROUPS, RULES, Change, marks
from egrpo.config.load import overlay, put, read_yaml
from egrpo.ops.status import keep
from egrpo.study import code
from egrpo.study.due import Due
from egrpo.study.identity import SETS
from egrpo.study.layout import Layout
from egrpo.study.resolve import load_study
from egrpo.study.standing import write_receipt

COLUMN = {
    **{rule: rule for rule in RULES},
    "base": "evaluate_base",
    "suffixes": "suffix_quality",
    "comparison": "tables",
    "table": "tables",
    "figure": "figures",
    "page": "pages",
    "about": "pages",
}
"""Columns of the page by stage."""
TOLD = (
    *(("comparison", "comparison"), ("table", "t"), ("figure", "f"), ("figures", "default")),
    *(("about", "comparison"), ("page", "index"), ("publish", "comparison")),
)
SETTINGS: dict[str, Any] = {
    "study": "small",
    "runs": "runs.tsv",
    "results": "results",
    "seeds": [0],
    "default_runs": ["fixed-s0", "auto-s0"],
    "paper": [],
    "methods": {"egrpo": {"group_size": 3, "active": 2, "steps": 5}},
    "model": {"path": "toy/pipeline"},
    "prompts": {"train": "toy/prompts/train.txt", "heldout": "toy/prompts/heldout.txt"},
    "rewards": {
        "clip": {"path": "toy/clip.pt"},
        "preference": None,
        "own": {"kind": "custom", "function": "own_reward:Reward"}
        | {"options": {"table": "table.json"}},
    },
    "train": {"rewards": {"verifier": 1.0}, "iterations": 3, "prompts_per_iteration": 2}
    | {"monitor_every": 2, "monitor_prompts": 2},
    "profile": {"prompts": 2, "samples": 3, "spans": [1, 2], "shown": [[1, 1]]},
    "evaluate": {"steps": 4, "samples": 1},
    "tables": {
        "t": {"caption": "All.", "sections": {"all": ["fixed", "auto"]}, "rewards": ["clip"]}
    },
    "figures": {"f": {"kind": "entropy", "caption": "One.", "arms": ["auto"], "spans": [1, 2]}},
}


@dataclass
class Finished:
    """A study in a folder, with receipts as if it had been finished, and a copy of the code."""

    root: Path

    def study(self) -> Layout:
        return Layout(load_study(self.root / "study.yaml"))

    def settle(self) -> None:
        """Receipts of all results, for what is there now."""
        at = self.study()
        due = Due(at)
        for run in at.study.runs:
            for stage in ("plan", "profile", "base", "train", "evaluate", "suffixes"):
                self._finish(at, stage, *due.named(stage, run), run)
            for which in SETS:
                self._finish(at, f"embed-{which}", "embed", at.identity(f"embed-{which}", run), run)
        for stage, name in TOLD:
            told = due.told(stage, name)
            files = told.shown() if stage in ("table", "comparison", "figure") else []
            for path in files:
                _write(path)
            write_receipt(at, stage, name, told.record, files)

    def _finish(self, at: Layout, kind: str, stage: str, name: str, run: str) -> None:
        record = at.identities.record(kind, at.study.runs[run])
        outputs = at.outputs(stage, name)
        for path in outputs:
            _write(path / "file" if path.name in ("adapter", "monitor", "snapshots") else path)
        more = {"weights": "w"} if stage in ("train", "evaluate") else {}
        write_receipt(at, stage, name, record, outputs, **more)

    def rules(self) -> dict[str, set[str]]:
        """Columns that have something to do -> the arms whose results these are."""
        at = self.study()
        due = Due(at)
        found: dict[str, set[str]] = {}
        for run, settings in at.study.runs.items():
            if not run.endswith("-s0"):
                continue
            named = [due.named(s, run) for s in ("profile", "base", "plan", "train", "evaluate")]
            named += [("suffixes", run)]
            named += [("embed", at.identity(f"embed-{which}", run)) for which in SETS]
            for stage, name in named:
                if due.result(stage, name):
                    found.setdefault(COLUMN[stage], set()).add(settings.arm)
        for stage, name in TOLD:
            if due.told(stage, name).due:
                found.setdefault(COLUMN[stage], set()).update({"fixed", "auto"})
        return found


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a result")


def expected(change: Change) -> dict[str, set[str]]:
    arms = {"x": {"fixed", "auto"}}
    return {rule: arms.get(only, {only}) for rule, only in marks(change).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study; each change is made to a copy."""
    root = tmp_path_factory.mktemp("identity") / "study"
    shutil.copytree(ROOT / "assets/toy", root / "toy")
    (root / "toy/pipeline/README.md").write_text("A toy.\n")
    (root / "toy/pipeline/extra").mkdir()
    (root / "toy/pipeline/extra/w.safetensors").write_text("weights of something else")
    (root / "own_reward.py").write_text(
        '"""A reward."""\nimport own_helper\n\nclass Reward:\n    def __init__(self, table): ...\n'
        "    def __call__(self, images, prompts):\n        return [own_helper.K * 0.5] * 9\n"
    )
    (root / "own_helper.py").write_text("K = 1.0\n")
    (root / "table.json").write_text("[1]\n")
    (root / "runs.tsv").write_text(
        "run\tmethod.name\tmethod.threshold\nfixed\tegrpo\t\nauto\tegrpo\tauto\n"
    )
    shared = read_yaml(ROOT / "config/config.yaml") | {"tables": {}, "figures": {}, "methods": {}}
    (root / "study.yaml").write_text(yaml.safe_dump(overlay(shared, SETTINGS), sort_keys=False))
    shutil.copytree(ROOT / "egrpo", root / "egrpo", ignore=shutil.ignore_patterns("__pycache__"))
    with chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "PACKAGE", Path("egrpo").resolve())
        Finished(root).settle()
    return root


@pytest.fixture
def study(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finished:
    shutil.copytree(finished, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    monkeypatch.setattr(code, "PACKAGE", Path("egrpo").resolve())
    return Finished(tmp_path / "study")


def _set(study: Finished, change: Change) -> None:
    settings = read_yaml("study.yaml")
    section, _, name = change.where.rpartition(".")
    if isinstance(change.value, dict) or change.where == "model.device":
        settings[section][name] = change.value
    else:
        put(settings, change.where, change.value)
    Path("study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def _edit(study: Finished, change: Change) -> None:
    (path,) = Path().glob(change.where)
    if change.value is None:
        data = bytearray(path.read_bytes())
        if path.suffix == ".json":
            data += b"\n"
        else:
            data[-5] ^= 1
        path.write_bytes(data)
        return
    how, *words = change.value
    text = path.read_text()
    if how == "append":
        path.write_text(text + f"{words[0]}\n")
        return
    old, new = words
    assert old in (text.splitlines()[0] if how == "first" else text)
    path.write_text(text.replace(old, new, 1 if how == "first" else -1))


def _code(study: Finished, change: Change) -> None:
    path = Path("egrpo", change.where)
    path.write_text(path.read_text() + "\n_CHANGED = 1\n")


def _touch(study: Finished, change: Change) -> None:
    for path in Path().rglob("*"):
        if path.is_file():
            when = path.stat().st_mtime + (change.value or 1e5)
            os.utime(path, (when, when))


def _copy(study: Finished, change: Change) -> None:
    shutil.copytree("results", "other", copy_function=shutil.copyfile)
    shutil.rmtree("results")
    Path("other").rename("results")


def _move(study: Finished, change: Change) -> None:
    Path("elsewhere").mkdir()
    Path("toy").rename("elsewhere/toy")
    text = Path("study.yaml").read_text()
    Path("study.yaml").write_text(text.replace(" toy/", " elsewhere/toy/"))


def _older(study: Finished, change: Change) -> None:
    path = Path(change.where)
    before = path.stat().st_mtime
    path.write_text(path.read_text().replace("red", "blue") + "a large red circle\n")
    os.utime(path, (before - 1e7, before - 1e7))


def _lose(study: Finished, change: Change) -> None:
    for run in ("fixed-s0", "auto-s0"):
        path = study.study().run(run) / change.where
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _cut(study: Finished, change: Change) -> None:
    for run in ("fixed-s0", "auto-s0"):
        (study.study().run(run) / change.where).write_text("a")


def _everywhere(edit: Callable[[str], str]) -> Callable[[Finished, Change], None]:
    def made(study: Finished, change: Change) -> None:
        for path in Path("egrpo").rglob("*.py"):
            path.write_text(edit(path.read_text()))

    return made


HOW: dict[str, Callable[[Finished, Change], None]] = {
    "set": _set,
    "edit": _edit,
    "code": _code,
    "touch": _touch,
    "copy": _copy,
    "move": _move,
    "older": _older,
    "lose": _lose,
    "cut": _cut,
    "comment": _everywhere(lambda text: text + "\n# a remark\n"),
    "docstring": _everywhere(lambda text: text.replace('"""', '""" In other words: ', 1)),
}
CHANGES = [change for changes in GROUPS.values() for change in changes]


@pytest.mark.parametrize("change", CHANGES, ids=[c.what for c in CHANGES])
def test_a_change_makes_run_again_what_depends_on_it_and_nothing_else(
    study: Finished, change: Change
) -> None:
    HOW[change.how](study, change)
    assert study.rules() == expected(change)


def test_there_is_nothing_to_do_without_a_change(study: Finished) -> None:
    assert study.rules() == {}
    assert len(CHANGES) >= 60


def test_results_of_other_code_are_kept_if_asked_and_of_other_settings_never(
    study: Finished,
) -> None:
    _code(study, Change("", "", "code", "core/loss.py"))
    assert "train" in study.rules()
    said = list(keep(study.study(), ()))
    assert "fixed-s0: train kept, as made by other code" in said
    assert not {"plan", "train", "evaluate"} & set(study.rules())
    for key, value in (("rewards.own.options.table", "other code core"), ("advantage.clamp", 3.0)):
        _set(study, Change("", "", "set", key, value))
        said = [line for line in keep(study.study(), ["fixed-s0"]) if "not kept" in line]
        assert said, key
    assert {"train", "evaluate"} <= set(study.rules())
