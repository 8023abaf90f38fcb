"""What a person sees: boxes and bars on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import ROOT

CRASH = (
    "import egrpo.study.resolve as load, egrpo.cli as cli\n"
    "def broken(*paths):\n"
    "    raise ZeroDivisionError('what nobody expected')\n"
    "load.load_study = broken\n"
    "cli.main(['report'])\n"
)
WORK = (
    "import time\n"
    "from egrpo.progress import Progress\n"
    "with Progress(5, 'train', done=1) as progress:\n"
    "    for _ in range(4):\n"
    "        time.sleep(0.15)\n"
    "        progress.step('verifier 0.61')\n"
)


def run(*words: str, terminal: bool) -> tuple[int, str]:
    """Exit status and what python said on stderr, which is a terminal of 100 columns or a pipe."""
    command = [sys.executable, *words]
    env = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    if not terminal:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stderr
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    return process.wait(), said.decode()


@pytest.mark.parametrize("terminal", [True, False])
def test_bad_input_is_one_line_or_a_box(terminal):
    code, said = run("-m", "egrpo", "cost", "nowhere.yaml", terminal=terminal)
    assert code == 2
    assert "nowhere.yaml" in said
    assert "Traceback" not in said
    if terminal:
        assert re.search(r"╭─+ ?egrpo", re.sub(r"\x1b\[[0-9;]*m", "", said))
    else:
        assert re.fullmatch(r"egrpo: nowhere\.yaml: [^\n]+\n", said)
        assert "\x1b" not in said


@pytest.mark.parametrize("terminal", [True, False])
def test_a_crash_shows_its_source(terminal):
    code, said = run("-c", CRASH, terminal=terminal)
    assert code == 1
    assert "ZeroDivisionError: what nobody expected" in re.sub(r"\x1b\[[0-9;]*m", "", said)
    assert said.startswith("Traceback") is not terminal
    assert ("╭" in said) is terminal


def test_progress_is_a_bar_with_rate_and_time_left_on_a_terminal():
    code, said = run("-c", WORK, terminal=True)
    assert code == 0
    frames = said.split("\r")
    assert len(frames) > 3, "one line, drawn again and again"
    assert any("train:  40%|" in frame for frame in frames)
    assert re.search(r"train: 100%\|.*5/5 \[00:\d\d<00:00, .*it.*verifier 0\.61\]", frames[-2])


def test_progress_is_plain_lines_in_a_log():
    code, said = run("-c", WORK, terminal=False)
    assert code == 0
    lines = said.splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "3/5", "4/5", "5/5"]
    for line in lines:
        assert re.fullmatch(r"train \d/5  \d+\.\d\d it/s  \d+ s left  verifier 0\.61", line)
