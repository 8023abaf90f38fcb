"""The workflow on a real SLURM: several emulated nodes with pretended GPUs on this machine.

Skipped, with the reason, where SLURM is not installed or this is not root's machine to set up.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, make_stages
from small_study import study
from test_processes import same

from egrpo.planning.trees import needs_plan
from egrpo.study.layout import Layout
from egrpo.study.resolve import load_study

CLUSTER = ROOT / "tests/slurm/cluster.sh"
NODES, GPUS, CPUS = 4, 2, 4
PROGRAMS = ("slurmctld", "slurmd", "munged")


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [
        name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "the cluster's daemons run as root"
    config = Path("/etc/slurm/slurm.conf")
    if config.exists() and not config.is_symlink():
        return "this machine has a SLURM of its own (/etc/slurm/slurm.conf)"
    return ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    up = [str(CLUSTER), "up", str(folder), str(NODES), str(GPUS), str(CPUS)]
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    subprocess.run(up, check=True, env=env)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield folder
    finally:
        subprocess.run([str(CLUSTER), "down", str(folder)], check=False, env=env)
        del os.environ["SLURM_CONF"]


RUNS = "run\tmethod.name\ttrain.iterations\n" + "".join(
    f"{name}\t{method}\t{iterations}\n"
    for name, method, iterations in [
        ("on_two_nodes", "flow_grpo", 6),
        ("cancelled", "flow_grpo", 20),
        ("requeued", "egrpo", 20),
        ("on_a_lost_node", "flow_grpo", 20),
        ("too_long", "egrpo", 100),
        ("too_big", "flow_grpo", 6),
    ]
)
NAMES = [line.split("\t")[0] for line in RUNS.splitlines()[1:]]


def sweep_of(folder: Path, seconds: float = 0.4) -> Path:
    """A small study whose training waits for a slow reward, so that faults hit it."""
    folder.mkdir(exist_ok=True)
    reward = {"kind": "custom", "function": "tests.slurm.patient:brightness"}
    return study(
        folder,
        RUNS,
        seeds=None,
        default_runs=NAMES,
        tables=None,
        figures=None,
        paper=None,
        rewards__patient={**reward, "options": {"seconds": seconds}},
        train__rewards={"verifier": 1.0, "patient": 0.1},
        train__monitor_every=20,
    )


def profile(folder: Path, train: dict[str, Any] | None = None) -> Path:
    """The shipped profile, for small jobs and a quick cluster."""
    settings = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    settings |= {
        "jobs": 16,
        "latency-wait": 15,
        "slurm-init-seconds-before-status-checks": 2,
        "default-resources": {"slurm_partition": "cpu", "mem_mb": 1500, "runtime": 20},
    }
    settings["set-threads"] = dict.fromkeys(settings["set-threads"], 1)
    for rule in settings["set-resources"].values():
        rule.update({"mem_mb": 1500, "runtime": 20})
    settings["set-resources"]["train"].update(train or {})
    path = folder / "profile/config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path.parent


def start(config: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--nolock", "--configfile", str(config), *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(job: subprocess.Popen[str], seconds: float = 900.0) -> str:
    output, _ = job.communicate(timeout=seconds)
    assert job.returncode == 0, output[-6000:]
    return output


def slurm(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def training(results: Path) -> dict[str, tuple[str, str]]:
    """Job id and node of the runs that have trained for an iteration and still train."""
    found = {}
    for line in slurm("squeue", "--noheader", "--states=RUNNING", "--format=%i|%N|%k").split():
        number, node, comment = line.split("|")
        run = comment.removeprefix("rule_train_wildcards_")
        if list(results.glob(f"*/state/{run}/*/checkpoint-*.safetensors")):
            found[run] = number, node
    return found


def at_once(*numbers: str) -> None:
    """Start requeued jobs now, and wait until they run; SLURM would wait two minutes.

    One that ended at that moment is not waited for.
    """
    until = time.monotonic() + 60
    while time.monotonic() < until:
        lines = slurm("squeue", "--noheader", "--format=%i|%T").split()
        states = dict(line.split("|") for line in lines)
        here = {number: states[number] for number in numbers if number in states}
        if all(state == "RUNNING" for state in here.values()):
            return
        for number, state in here.items():
            if state == "PENDING":  # or no longer, which the next round sees
                subprocess.run(
                    ["scontrol", "update", f"jobid={number}", "StartTime=now"], capture_output=True
                )
        time.sleep(0.5)
    raise AssertionError(f"requeued jobs do not run: {here}")


def requeue(number: str, node: str) -> None:
    """SLURM starts the job again under its old number."""
    slurm("scontrol", "requeue", number)
    at_once(number)


def take_down(number: str, node: str) -> None:
    """A node is lost, with its jobs, which SLURM starts again elsewhere."""
    there = slurm("squeue", "--noheader", f"--nodelist={node}", "--format=%i").split()
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    at_once(*there)


FAULTS: dict[str, Callable[[str, str], object]] = {
    "requeued": requeue,
    "cancelled": lambda number, node: slurm("scancel", number),
    "on_a_lost_node": take_down,
}
"""What happens to a run once it trains, given its job's id and node."""


@dataclass
class Sweep:
    """What came out of the sweep on the cluster, and on this machine alone."""

    cluster: Path
    alone: Path
    two_nodes: Path
    gpus: list[list[str]]
    output: str
    daemons: str


def start_on_two_nodes(folder: Path) -> subprocess.Popen[str]:
    """The training of one run, in two processes."""
    launch = "env ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 workflow/scripts/srun_accelerate.sh"
    config = sweep_of(folder)
    train = {"launch": f"{launch} config/accelerate/ddp.yaml 1", "mpi": "srun", "gpu": 2}
    where = profile(folder, {**train, "nodes": 2, "tasks": 2, "tasks_per_gpu": 0})
    target = str(folder / "results/small/runs/on_two_nodes/train.json")
    return start(config, "--profile", str(where), "--", target)


def without_faults(config: Path) -> None:
    """The same runs in this process: rewards that come at once are the same rewards."""
    at = Layout(load_study(config, options={"tracking": {"enabled": False}}))
    for run in NAMES:
        plan = ["profile", "plan"] if needs_plan(at.study.runs[run]) else []
        with chdir(ROOT):
            make_stages(at, run, *plan, "train", "evaluate")


@pytest.fixture(scope="module")
def sweep(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The workflow, with everything that happens to jobs on a cluster."""
    folder = tmp_path_factory.mktemp("sweep")
    config = sweep_of(folder)
    results = folder / "results"
    chosen = profile(
        folder,
        {
            "launch": shlex.join([f"{ROOT}/tests/slurm/launch.sh", str(folder), "python"]),
            "slurm_extra": "'--signal=TERM@10'",
            "runtime": "attempt if wildcards.run == 'too_long' else 20",
            "mem_mb": "1500 if wildcards.run != 'too_big' or attempt > 1 else 400",
        },
    )
    job = start(config, "--profile", str(chosen))
    beside = start_on_two_nodes(folder / "two_nodes")
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(job.stdout or []))
    reader.start()
    try:
        to_do, until = dict(FAULTS), time.monotonic() + 300
        while to_do:
            assert time.monotonic() < until, f"{list(to_do)} did not train"
            for run, (number, node) in training(results).items():
                if run in to_do:
                    to_do.pop(run)(number, node)
            time.sleep(0.2)
        down = slurm("sinfo", "--noheader", "--states=down", "--format=%N").split()[0]
        slurm("scontrol", "update", f"nodename={down}", "state=resume")
        without_faults(sweep_of(folder / "alone", seconds=0.0))
        finished(beside)
        job.wait(timeout=900)
    finally:
        job.kill()
        beside.kill()
        reader.join()
    output = "".join(log)
    (folder / "snakemake.log").write_text(output)
    assert job.returncode == 0, output[-6000:]
    notes = [line.split() for line in (folder / "gpus").read_text().splitlines()]
    daemons = "".join(log.read_text() for log in (cluster / "log").glob("slurm*.log"))
    return Sweep(
        results, folder / "alone/results", folder / "two_nodes/results", notes, output, daemons
    )


@pytest.mark.parametrize("run", NAMES)
def test_every_run_is_what_it_is_without_faults(run: str, sweep: Sweep) -> None:
    """Weights bit for bit, every row of every table."""
    one, other = (folder / "small/runs" / run for folder in (sweep.cluster, sweep.alone))
    name = "adapter/pytorch_lora_weights.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    for table in ("scores", "rollouts", "images"):
        a, b = (pq.read_table(f / f"{table}.parquet").to_pylist() for f in (one, other))
        assert a == b
        assert a
    a, b = (
        [
            row
            for row in pq.read_table(f / "train_metrics.parquet").to_pylist()
            if not row["metric"].startswith("time/")
        ]
        for f in (one, other)
    )
    assert a == b


def test_tables_and_deliveries_are_whole(sweep: Sweep) -> None:
    for name in ("tables/comparison.parquet", "published-comparison.json"):
        assert (sweep.cluster / "small" / name).exists()


def test_jobs_see_gpus_of_their_own(sweep: Sweep) -> None:
    assert not [note for note in sweep.gpus if "CLASH" in note]
    assert len(sweep.gpus) > len(NAMES)  # some started again
    assert {ids for _, ids in sweep.gpus} == {"0", "1"}


@pytest.mark.parametrize("run", [*FAULTS, "too_long"])
def test_a_run_that_was_hit_went_on_from_its_state(run: str, sweep: Sweep) -> None:
    log = sweep.cluster / f"small/logs/train/{run}.log"
    assert "going on after iteration" in log.read_text()


def test_the_faults_did_happen(sweep: Sweep) -> None:
    assert "SLURM status is: 'CANCELLED'" in sweep.output
    assert "reason set to: lost" in sweep.daemons
    assert "exceeded memory limit" in sweep.daemons


def test_one_training_job_on_two_nodes(sweep: Sweep) -> None:
    """Processes of two nodes meet by SLURM's variables; the trajectory is that of one process."""
    name = "small/runs/on_two_nodes"
    same(sweep.alone / name, sweep.two_nodes / name)
