"""SIGKILL at random moments: does the workflow still end with the same results?

``python benchmarks/kills.py [--kills 50] [--seed 0] [--write docs/benchmarks/kills.md]``

Runs a small study of the toy twice: undisturbed, and while stages are killed at seeded random
moments. Then compares weights, tables and tracked metrics, number by number.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from common import ROOT, parser, snakemake, study, table, tell

STAGES = ("train", "profile", "evaluate", "publish")
OFTEN = 0.75
"""Probability that a start of a stage is killed."""

SMALL: dict[str, Any] = {
    "study": "kills",
    "profile": {"prompts": 4, "samples": 4, "spans": [1, 2, 3]},
    "train": {
        "iterations": 12,
        "prompts_per_iteration": 2,
        "checkpoint_every": 1,
        "monitor_every": 4,
        "monitor_prompts": 2,
        "monitor_samples": 2,
    },
    "evaluate": {"samples": 2, "prompts": 16},
}
RUNS = "run\tmethod.name\tmethod.group_size\none\tegrpo\t6\ntwo\tflow_grpo\t6\nthree\tawm\t6\n"


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    """The workflow, in the background."""
    words = snakemake(config, "--cores", "2", "--retries", "3", "--rerun-incomplete")
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log.open("ab"))


def stages_below(job: subprocess.Popen[bytes]) -> Iterator[tuple[psutil.Process, str]]:
    """Running stages of a workflow until it ends, each again and again."""
    while job.poll() is None:
        try:
            children = psutil.Process(job.pid).children(recursive=True)
        except psutil.Error:  # it has just ended
            children = []
        for process in children:
            try:
                words = process.cmdline()
            except psutil.Error:
                continue
            if words[1:4] == ["-m", "egrpo", "make"] and words[4] in STAGES:
                yield process, words[4]
        time.sleep(0.2)


def watched(job: subprocess.Popen[bytes]) -> dict[str, float]:
    """Wait for an undisturbed workflow; the longest seconds of each stage."""
    begun: dict[psutil.Process, float] = {}
    longest = dict.fromkeys(STAGES, 0.0)
    for process, name in stages_below(job):
        since = begun.setdefault(process, time.monotonic())
        longest[name] = max(longest[name], time.monotonic() - since)
    return longest


def disturbed(
    config: Path, kills: int, usual: dict[str, float], rng: random.Random, log: Path
) -> Counter[str]:
    """Run the workflow to its end, killing up to ``kills`` stages on the way; how many of each.

    Each start of a stage is killed with probability ``OFTEN``, at a moment drawn from the time
    that the stage usually takes.
    """
    killed = Counter[str]()
    while True:
        job = start(config, log)
        end: dict[psutil.Process, float] = {}
        for process, name in stages_below(job):
            if process not in end:
                wait = rng.uniform(0.0, usual[name]) if rng.random() < OFTEN else math.inf
                end[process] = time.monotonic() + wait
            if time.monotonic() > end[process] and killed.total() < kills:
                process.kill()
                killed[name] += 1
                end[process] = math.inf
        if job.returncode == 0:
            return killed


def tables(results: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of every Parquet file below ``results``, without times."""
    found = {}
    for path in sorted(results.glob("kills/**/*.parquet")):
        rows = pq.read_table(path).to_pylist()
        for row in rows:
            for key in ("seconds", "peak_memory_mib"):
                row.pop(key, None)
        found[str(path.relative_to(results))] = [
            r for r in rows if not str(r.get("metric", "")).startswith("time/")
        ]
    return found


def weights(results: Path) -> dict[str, bytes]:
    """Every trained adapter."""
    files = sorted(results.glob("kills/runs/*/adapter/*.safetensors"))
    return {str(path.relative_to(results)): path.read_bytes() for path in files}


def tracked(results: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(run, metric) -> its (step, value) in MLflow, without times."""
    from egrpo.tracking.client import configure, open_client

    configure()
    client = open_client(f"sqlite:///{results}/mlflow.db")
    out = {}
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id], max_results=1000):
            name = str(run.info.run_name)
            for metric in run.data.metrics:
                if metric.startswith(("time/", "system/")) or "seconds" in metric:
                    continue
                history = client.get_metric_history(run.info.run_id, metric)
                out[name, metric] = sorted((m.step, m.value) for m in history)
    return out


def compare(one: Path, other: Path) -> tuple[dict[str, int], list[str]]:
    """How much was compared, and what differs."""
    counts, more, wrong = {}, {}, []
    for what, read in (("weight files", weights), ("tables", tables), ("metrics", tracked)):
        first, second = read(one / "results"), read(other / "results")
        counts[what] = len(first)
        if what != "weight files":
            more["table rows" if what == "tables" else "metric values"] = sum(
                map(len, first.values())
            )
        keys = sorted({*first, *second}, key=str)
        wrong += [str(k) for k in keys if repr(first.get(k)) != repr(second.get(k))]
    return counts | more, wrong


def main() -> int:
    """Run both and compare."""
    words = parser(__doc__)
    words.add_argument("--kills", type=int, default=50)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--folder", type=Path)
    given = words.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="egrpo-kills-"))
    begun = time.monotonic()
    job = start(study(folder / "straight", SMALL, RUNS), folder / "straight.log")
    usual = watched(job)
    if job.returncode != 0:
        print(f"the undisturbed run failed, see {folder}/straight.log", file=sys.stderr)
        return 1
    alone = time.monotonic() - begun
    begun = time.monotonic()
    rng, killed, rounds, wrong = random.Random(f"kills {given.seed}"), Counter[str](), 0, []
    while killed.total() < given.kills:
        rounds += 1
        where = folder / f"killed-{rounds}"
        config = study(where, SMALL, RUNS)
        killed += disturbed(config, given.kills - killed.total(), usual, rng, where / "log")
        counts, found = compare(folder / "straight", where)
        wrong += [f"round {rounds}: {name}" for name in found]
    with_kills = (time.monotonic() - begun) / rounds
    by_stage = ", ".join(f"{stage} {killed[stage]}" for stage in STAGES)
    for name in wrong:
        print(f"differs: {name}", file=sys.stderr)
    tell(
        "# The workflow under SIGKILL\n\n"
        f"Written by `python benchmarks/kills.py --kills {given.kills} --seed {given.seed}`.\n"
        f"{killed.total()} stages were killed at random moments, in {rounds} runs of the same\n"
        f"study: {by_stage}. The undisturbed workflow took {alone:.0f} s, one of the others\n"
        f"{with_kills:.0f} s on average.\n\n"
        f"{table(['compared with the undisturbed workflow', 'count'], counts.items())}\n\n"
        f"In all {rounds} runs together {len(wrong)} of them differ.\n",
        None if wrong else given.write,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
