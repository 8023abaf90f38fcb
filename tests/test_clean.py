"""What earlier settings left: found, and removed without anything that is wanted or not ours."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import ROOT

from egrpo.cli import main
from egrpo.ops.clean import leftovers
from egrpo.ops.doctor import doctor
from egrpo.store.files import lock, write_json, write_text
from egrpo.study.due import Due
from egrpo.study.layout import SHARED, Layout
from egrpo.study.orders import order_of_run
from egrpo.study.resolve import load_study
from egrpo.study.standing import write_receipt


def settings(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Files of a small study whose results lie in ``folder``."""
    (folder / "runs.tsv").write_text(changes.pop("rows", "run\tmethod.name\none\tegrpo\n"))
    top = {
        "study": "mine",
        "results": str(folder / "results"),
        "runs": str(folder / "runs.tsv"),
        **dict.fromkeys(("paper", "default_runs", "tables", "figures")),
        "seeds": [0, 1],
        **changes,
    }
    (folder / "top.yaml").write_text(yaml.safe_dump(top))
    return ROOT / "config/config.yaml", folder / "top.yaml"


def layout(files: tuple[Path, ...]) -> Layout:
    return Layout(load_study(*files))


def finish(at: Layout) -> None:
    """Write what the workflow writes for all runs, with contents of a few bytes."""
    due = Due(at)
    for name, run in at.study.runs.items():
        order_of_run(at, name)
        for kind in ("embed-train", "profile", "base", "plan", "train", "evaluate"):
            stage = kind.partition("-")[0]
            name_of = at.identity(kind, name) if stage in SHARED else name
            outputs = at.outputs(stage, name_of)
            for path in outputs:
                write_text(path if path.suffix else path / "file", f"made for {path}")
            write_receipt(at, stage, name_of, at.identities.record(kind, run), outputs)
        key = at.identity("trajectory", name)
        write_json(at.run(name) / "train.json", {"run": name, "key": key})
        for file in ("checkpoint-000001.safetensors", "journal.jsonl", "lock", "monitor/a.png"):
            write_text(at.state(name) / key / file, f"state of {name}")
    due.told("about", "all_runs").order()


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}


def clean(files: tuple[Path, ...], *words: str) -> Result:
    return CliRunner().invoke(main, ["clean", *map(str, files), *words])


def cleaned(files: tuple[Path, ...], *words: str) -> str:
    done = clean(files, *words)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize(
    ("changes", "gone"),
    [
        ({}, set()),
        ({"rewards": {"jpeg": None}}, {"settings", "profiles", "base"}),
        ({"seeds": [0]}, {"settings", "runs", "state"}),
        ({"prompts": {"limit": 8}}, {"settings", "embeddings", "profiles", "state"}),
        ({"evaluate": {"samples": 1}}, {"settings", "base"}),
        ({"tracking": {"every_seconds": 9.0}}, {"settings"}),
    ],
)
def test_what_no_run_wants_is_listed_then_removed_and_nothing_else(
    changes: dict[str, Any], gone: set[str], tmp_path: Path
) -> None:
    finish(layout(settings(tmp_path)))
    files = settings(tmp_path, **changes)
    at = layout(files)
    finish(at)
    there = files_below(at.root)
    *lines, last = cleaned(files).splitlines()
    assert files_below(at.root) == there, "a list removes nothing"
    assert {line.split("results/mine/")[1].split("/")[0] for line in lines} == gone
    words = shlex.join(["egrpo", "clean", *map(str, files), "--yes"])
    assert (f"`{words}` removes them" in last) == bool(gone)
    cleaned(files, "--yes")
    left = files_below(at.root)
    assert {file.split("/")[0] for file in there - left} == gone
    finish(at)
    assert files_below(at.root) == left, "nothing that is wanted was lost"
    assert leftovers(at) == []
    assert "nothing of earlier settings" in cleaned(files, "--yes")


@pytest.mark.parametrize(
    "path",
    [
        "mine/runs/one-s1/notes.txt",  # a user's, in a folder that goes
        "mine/state/backup/0123456789/checkpoint-000001.safetensors",  # no rule has a log of it
        "mine/profiles/0123456789/entropy_profile.parquet",
        "mine/settings/my_notes-0123456789.yaml",
        "mine/export/one-s1/README.md",
        "other/runs/one-s1/train.json",
    ],
)
def test_what_we_did_not_make_stays(path: str, tmp_path: Path) -> None:
    at = layout(settings(tmp_path))
    finish(at)
    write_text(tmp_path / "results" / path, "precious: 1")
    cleaned(settings(tmp_path, seeds=[0]), "--yes")
    assert (tmp_path / "results" / path).read_text() == "precious: 1"
    assert not (at.run("one-s1") / "adapter").exists()


@pytest.mark.parametrize("where", ["runs", "runs/one-s1", "runs/one-s1/adapter", "state/one-s1"])
def test_links_are_not_followed(where: str, tmp_path: Path) -> None:
    at = layout(settings(tmp_path))
    finish(at)
    elsewhere, link = tmp_path / "elsewhere", at.root / where
    link.rename(elsewhere)
    link.symlink_to(elsewhere)
    before = files_below(elsewhere)
    cleaned(settings(tmp_path, seeds=[0]), "--yes")
    assert files_below(elsewhere) == before
    assert link.is_symlink()


@pytest.mark.parametrize("where", ["workflow.lock", "state/one-s1"])
def test_nothing_is_removed_while_a_job_works(where: str, tmp_path: Path) -> None:
    at = layout(settings(tmp_path))
    finish(at)
    file = at.root / where
    if file.is_dir():
        (folder,) = file.iterdir()
        file = folder / "lock"
    held = lock(file)
    assert held is not None
    before = files_below(at.root)
    files = settings(tmp_path, seeds=[0])
    try:
        refused = clean(files, "--yes")
        assert refused.exit_code == 2
        assert "a job works there; wait for it or end it. Nothing was removed" in refused.output
        assert before == files_below(at.root) - {"workflow.lock"} | ({"workflow.lock"} & before)
    finally:
        os.close(held)
    cleaned(files, "--yes")
    assert not (at.root / "state/one-s1").exists()


def test_the_state_that_the_results_came_from_is_kept(tmp_path: Path) -> None:
    """After an edit of the code, say, until the run is trained again."""
    files = settings(tmp_path)
    at = layout(files)
    finish(at)
    old = at.root / "state/one-s0/0123456789/checkpoint-000002.safetensors"
    write_text(old, "of other code")
    write_json(at.run("one-s0") / "train.json", {"run": "one-s0", "key": "0123456789"})
    assert leftovers(at) == []


def test_doctor_says_how_much_there_is(tmp_path: Path) -> None:
    finish(layout(settings(tmp_path)))
    files = settings(tmp_path, seeds=[0])
    lines = [f for f in doctor(files, rewards=False) if f.what == "disk"]
    assert [line.level for line in lines] == ["ok", "warn"]
    count = len(leftovers(layout(files)))
    assert f"{count} files and folders of earlier settings, 0.00 GiB" in lines[1].text
    assert shlex.join(["egrpo", "clean", *map(str, files)]) in lines[1].text
