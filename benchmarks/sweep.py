"""Sweeps of many runs: how long a plan takes, and a real one on a cluster of emulated nodes.

``python benchmarks/sweep.py [--dry 1000] [--slurm 200] [--write docs/benchmarks/sweep.md]``

``--slurm`` needs root and Debian's slurm-wlm and munge: it starts its own SLURM on this machine
(tests/slurm/cluster.sh), with 4 nodes of 2 pretended GPUs and 4 processors each.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml
from common import ROOT, parser, snakemake, study, table, tell

CLUSTER = ROOT / "tests/slurm/cluster.sh"
NODES = 4

SHORT: dict[str, Any] = {
    "study": "sweep",
    "methods": {"egrpo": {"group_size": 3, "active": 3}, "flow_grpo": {"group_size": 4}},
    "train": {"iterations": 2, "prompts_per_iteration": 2, "monitor_every": 0},
    "evaluate": {"steps": 4, "samples": 1, "prompts": 4},
    "tracking": {"enabled": False},
}


def sweep(folder: Path, runs: int) -> Path:
    """A study of ``runs`` arms: methods, thresholds, learning rate scales and seeds."""
    names = []
    lines = ["run\tmethod.name\tmethod.threshold\ttrain.learning_rate_scale\tseed"]
    grid = itertools.product(range(runs), ("egrpo", "flow_grpo"), (1.0, 3.0, 10.0), (2.0, 2.2, 2.6))
    for seed, method, scale, threshold in itertools.islice(grid, runs):
        tau = str(threshold) if method == "egrpo" else ""
        names.append(f"{method}_{len(names)}")
        lines.append(f"{names[-1]}\t{method}\t{tau}\t{scale}\t{seed}")
    return study(folder, SHORT | {"default_runs": names}, "\n".join(lines) + "\n")


def measured(command: list[str], log: Path, env: dict[str, str] | None = None) -> tuple[float, int]:
    """Seconds, and the largest memory in bytes of the process itself; fails with the command."""
    begun, most = time.monotonic(), 0
    with log.open("wb") as out:
        job = psutil.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
        while job.poll() is None:
            try:
                most = max(most, job.memory_info().rss)
            except psutil.Error:
                break
            time.sleep(0.05)
    if job.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed, see {log}")
    return time.monotonic() - begun, most


def dry(folder: Path, runs: int) -> list[Any]:
    """A row of the table: the plan of a sweep."""
    config = sweep(folder, runs)
    command = snakemake(config, "--cores", "2", "--dry-run", "--quiet", "rules")
    seconds, memory = measured(command, folder / "dry.log")
    jobs = [x for x in (folder / "dry.log").read_text().splitlines() if x.startswith("total")]
    return [f"{runs:,}", jobs[-1].split()[1], f"{seconds:.1f}", f"{memory / 2**20:.0f}"]


def slurm(folder: Path, runs: int) -> str:
    """Lines about a real sweep."""
    config = sweep(folder, runs)
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    profile |= {
        "jobs": 16,
        "latency-wait": 15,
        "slurm-init-seconds-before-status-checks": 2,
        "default-resources": {"slurm_partition": "cpu", "mem_mb": 1200, "runtime": 20},
    }
    profile["set-threads"] = dict.fromkeys(profile["set-threads"], 1)
    for rule in profile["set-resources"].values():
        rule.update({"mem_mb": 1200, "runtime": 20})
    (folder / "profile").mkdir()
    (folder / "profile/config.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    env |= {"SLURM_CONF": str(folder / "cluster/slurm.conf"), "OMP_NUM_THREADS": "1"}
    subprocess.run([CLUSTER, "up", folder / "cluster", str(NODES), "2", "4"], check=True, env=env)
    try:
        command = snakemake(config, "--profile", str(folder / "profile"))
        seconds, memory = measured(command, folder / "slurm.log", env)
    finally:
        subprocess.run([CLUSTER, "down", folder / "cluster"], check=False, env=env)
    whole = 0
    for path in sorted((folder / "results/sweep/runs").iterdir()):
        ended = json.loads((path / "train.json").read_text())
        whole += ended["iterations"] == 2 and pq.read_table(path / "scores.parquet").num_rows > 0
    nothing = subprocess.run(
        snakemake(config, "--cores", "1", "--dry-run"), cwd=ROOT, capture_output=True, text=True
    )
    log = (folder / "slurm.log").read_text()
    submitted = log.count("has been submitted with SLURM jobid")
    idle = "Nothing to be done" in nothing.stdout + nothing.stderr
    return (
        f"{runs} runs over {NODES} nodes: {submitted} jobs in the queue, {seconds / 60:.0f} min "
        f"on\n{os.cpu_count()} real cores, {memory / 2**20:.0f} MiB for snakemake itself. {whole} "
        f"runs\nare complete, {log.count('Trying to restart')} jobs were started again. Asked once "
        f"more, snakemake {'has nothing to do' if idle else 'WOULD DO MORE'}.\n"
    )


def main() -> None:
    """Command line."""
    words = parser(__doc__)
    words.add_argument("--dry", type=int, default=1000)
    words.add_argument("--slurm", type=int, default=0)
    words.add_argument("--folder", type=Path)
    given = words.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="egrpo-sweep-"))
    rows = [dry(folder / f"dry-{runs}", runs) for runs in sorted({10, 100, given.dry})]
    text = (
        "# Sweeps of many runs\n\n"
        f"Written by `python benchmarks/sweep.py --dry {given.dry} --slurm {given.slurm}`.\n\n"
        f"{table(['runs', 'jobs', 'dry run, s', 'memory, MiB'], rows, left=0)}\n"
    )
    tell(text + (f"\n{slurm(folder / 'slurm', given.slurm)}" if given.slurm else ""), given.write)


if __name__ == "__main__":
    main()
