"""Who wants to be told is told, and a command that fails breaks nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import small_run

from egrpo.ops import notify as module
from egrpo.ops.notify import notify
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study

FAILED = ["What happened: a.log", "What is done and what is to do: `egrpo status`"]


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    run = small_run()
    return Layout(Study("laptop", str(tmp_path), {run.run: run}))


def with_command(at: Layout, command: str | None) -> Layout:
    return Layout(replace(at.study, notify=command))


@pytest.mark.parametrize(("outcome", "more"), [("finished", []), ("failed", FAILED)])
def test_a_command_reads_the_summary(at, tmp_path, outcome, more):
    file = tmp_path / "told"
    at = with_command(at, f"(echo $EGRPO_STUDY $EGRPO_OUTCOME; cat) > '{file}'")
    assert notify(at, outcome, "a.log") is None
    first, second, *rest = file.read_text().splitlines()
    assert first == f"laptop {outcome}"
    assert second == f"egrpo: study laptop {outcome}: {at.root.absolute()}"
    assert rest == more


def test_a_command_that_fails_is_told_in_one_line(at, monkeypatch):
    assert notify(at, "finished", "a.log") is None, "nobody asked"
    told = notify(with_command(at, "echo no such host >&2; exit 7"), "finished", "a.log")
    assert told is not None
    assert told.endswith("ended with status 7: no such host")
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    told = notify(with_command(at, "sleep 5"), "finished", "a.log")
    assert told is not None
    assert "timed out" in told
