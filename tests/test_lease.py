"""`egrpo lease`: GPUs of one machine, shared out among jobs that do not know each other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

JOB = "import os, sys, time; {}; print(os.environ['CUDA_VISIBLE_DEVICES'], {}, flush=True)"
STAMP = "time.monotonic()"


def lease(
    folder: Path, gpus: int, code: str, ids: str = "0,1", **more: str
) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    env |= {"XDG_RUNTIME_DIR": str(folder), **more}
    command = [sys.executable, "-m", "egrpo", "lease", "--gpus", str(gpus), "--ids", ids]
    return subprocess.Popen(
        [*command, "--", sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def busy(seconds: float) -> str:
    """A job that says when it began, which GPUs it has, and when it ended."""
    return JOB.format(f"begun = {STAMP}; time.sleep({seconds})", f"begun, {STAMP}")


def spans(jobs: Sequence[subprocess.Popen[str]]) -> list[tuple[set[str], float, float]]:
    found = []
    for job in jobs:
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0, err
        ids, begun, ended = out.split()
        found.append((set(ids.split(",")), float(begun), float(ended)))
    return found


def test_no_two_jobs_hold_a_gpu_at_once(tmp_path):
    jobs = [lease(tmp_path, gpus, busy(0.3)) for gpus in (1, 2, 1, 1, 2, 1)]
    held = spans(jobs)
    assert sorted(len(ids) for ids, _, _ in held) == [1, 1, 1, 1, 2, 2]
    for n, (ids, begun, ended) in enumerate(held):
        for other, first, last in held[:n]:
            assert not (ids & other) or ended <= first or last <= begun


def test_a_killed_job_gives_its_gpus_back(tmp_path):
    first = lease(tmp_path, 2, "import time; print('here', flush=True); time.sleep(600)")
    assert first.stdout is not None
    assert first.stdout.readline() == "here\n"
    second = lease(tmp_path, 1, busy(0))
    assert second.stderr is not None
    assert second.stderr.readline() == "waiting for 1 of 2 GPUs\n"
    assert second.poll() is None
    first.send_signal(signal.SIGKILL)
    spans([second])
    first.communicate()


NONE = "nvidia-smi lists no GPUs; name them by --ids or CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("gpus", "ids", "more", "code", "line"),
    [
        (1, "0,1", {}, 7, ""),  # the command's own
        (3, "0,1", {}, 2, "--gpus 3, but there are 2"),
        (1, "", {"CUDA_VISIBLE_DEVICES": ""}, 2, "--gpus 1, but there are 0"),
        (2, "", {"CUDA_VISIBLE_DEVICES": "5"}, 2, "--gpus 2, but there are 1"),
        (1, "", {"PATH": "/nowhere"}, 2, f"egrpo: egrpo lease: {NONE}"),
    ],
)
def test_too_few_gpus_is_one_line_and_the_command_keeps_its_exit_code(
    gpus, ids, more, code, line, tmp_path
):
    job = lease(tmp_path, gpus, "import sys; sys.exit(7)", ids, **more)
    _, said = job.communicate(timeout=60)
    assert job.returncode == code
    assert line in said
    assert len(said.splitlines()) == bool(line)


def test_the_gpu_profile_leases_for_every_rule_that_uses_one():
    profile = yaml.safe_load((ROOT / "profiles/gpu/config.yaml").read_text())
    cluster = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    rules = {name for name, wants in profile["set-resources"].items() if wants.get("gpu")}
    assert rules == {name for name, wants in cluster["set-resources"].items() if wants.get("gpu")}
    for name in rules:
        assert profile["set-resources"][name]["launch"].startswith("egrpo lease -- ")
