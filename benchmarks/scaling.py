"""What more processes, GPUs and nodes give: measured where it can be, computed beyond.

``python benchmarks/scaling.py [--write docs/benchmarks/scaling.md]``

Measures the toy in one process and in two (one thread each), the costs of talking and of saving,
and checks the model below against them. Then applies the model to FLUX.1-dev on H100s, whose cost
of one evaluation is an estimate (``flux``) until ``benchmarks/gpu.py`` has measured it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from common import ROOT, parser, table, tell

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "config/accelerate/ddp.yaml"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@dataclass(frozen=True)
class Costs:
    """Seconds on one device, and what one iteration consists of.

    Attributes:
        evaluation: one network evaluation of a latent.
        training: forward and backward of one source.
        image: decoding and scoring one image.
        forward, train, images: how many of them a prompt takes.
        prompts: of an iteration; groups stay whole, so a run has work for so many processes.
        gather: exchange of edges and rewards, per doubling of the processes.
        reduce: sum of all gradients, once more than one process.
        checkpoint, checkpoint_every: saving the state, and how often.
        start: from the start of a job to its first iteration.
    """

    evaluation: float
    training: float
    image: float
    forward: int
    train: int
    images: int
    prompts: int
    gather: float
    reduce: float
    checkpoint: float
    checkpoint_every: int
    start: float

    def prompt(self) -> float:
        """One prompt's part of an iteration."""
        return (
            self.forward * self.evaluation + self.train * self.training + self.images * self.image
        )

    def parts(self, processes: int) -> dict[str, float]:
        """Seconds of one iteration on ``processes``, by what they go to."""
        work = self.prompts * self.prompt() / processes
        busiest = math.ceil(self.prompts / processes) * self.prompt()
        talk = self.gather * math.log2(processes) + (self.reduce if processes > 1 else 0.0)
        return {
            "work": work,
            "waiting for the busiest": busiest - work,
            "talking": talk,
            "saving": self.checkpoint / self.checkpoint_every,
        }

    def iteration(self, processes: int) -> float:
        """Seconds of one iteration."""
        return sum(self.parts(processes).values())


def flux() -> Costs:
    """FLUX.1-dev, config/presets/flux_dev_hps.yaml, on H100s: every number is an estimate.

    11.9e9 weights, 19 double and 38 single blocks of width 3072 (its config); 4 * n^2 * d
    operations of attention a block; 45% of the H100's 989 TFLOP/s in bfloat16. Training: forward,
    the forward again (gradient checkpointing), backward to the activations. E-GRPO's iteration
    from `egrpo cost`: 1,004 evaluations and 8 trained sources a prompt, 96 images.
    """
    tokens = (720 // 16) ** 2 + 512
    operations = 2 * 11.9e9 * tokens + 57 * 4 * tokens**2 * 3072
    evaluation = operations / (0.45 * 989e12)
    adapter = 360e6 * 4  # bytes of gradients of a rank-128 adapter
    return Costs(
        evaluation=evaluation,
        training=3 * evaluation,
        image=0.10,
        forward=1004,
        train=8,
        images=96,
        prompts=8,
        gather=0.01,
        reduce=2 * adapter / 40e9,
        checkpoint=3 * adapter / 1e9,
        checkpoint_every=5,
        start=120.0,
    )


# -- measured ------------------------------------------------------------------------------------


def job(folder: Path, prompts: int) -> list[str]:
    """Words of a training job of the default study, its results below a folder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import job_words, small_run

    from egrpo.measure.embed import embed_files

    few = {"iterations": 8, "prompts_per_iteration": prompts, "monitor_every": 0}
    of = {f"train.{key}": value for key, value in {**few, "checkpoint_every": 100}.items()}
    run = small_run("egrpo", **{"method.group_size": 12, "method.active": 8, **of})
    folder.mkdir(parents=True, exist_ok=True)
    return job_words("train", run, embed_files(run, folder), folder)


def launched(words: list[str], processes: int = 1) -> list[str]:
    """A command in so many processes."""
    launch = [*LAUNCH, "--num_processes", str(processes)] if processes > 1 else []
    return [sys.executable, *launch, *words]


def trained(folder: Path, prompts: int, processes: int) -> dict[str, float]:
    """Median seconds of an iteration and its parts, and the time until the first."""
    words = launched(job(folder, prompts), processes)
    begun = time.time()
    subprocess.run(words, cwd=ROOT, env=ENV, check=True, capture_output=True)
    total = time.time() - begun
    (out,) = folder.glob("*/runs/*")
    sums = json.loads((out / "train.json").read_text())
    return {**times(out), "start": total - sums["seconds"], **sums}


def times(out: Path) -> dict[str, float]:
    """Median seconds of an iteration and of its parts, the first left out."""
    found: dict[str, list[float]] = {}
    for row in pq.read_table(out / "train_metrics.parquet").to_pylist():
        if row["metric"].startswith("time/") and row["iteration"] > 1:
            found.setdefault(row["metric"].removeprefix("time/"), []).append(row["value"])
    return {name: statistics.median(values) for name, values in found.items()}


def side_by_side(folder: Path, prompts: int, jobs: int) -> float:
    """Median seconds of an iteration of jobs that run at once and know nothing of each other."""
    commands = [launched(job(folder / str(n), prompts)) for n in range(jobs)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(words, cwd=ROOT, env=ENV, **quiet) for words in commands]
    assert [one.wait() for one in running] == [0] * jobs
    return statistics.median(times(out)["iteration"] for out in folder.glob("*/*/runs/*"))


def worker(order: Path) -> None:
    """One of several processes: what talking and saving cost, as a line of JSON."""
    import torch

    from egrpo.planning.trees import closed_form_plan
    from egrpo.store import checkpoint
    from egrpo.study.orders import read_order
    from egrpo.train.trainer import Trainer

    torch.set_num_threads(1)
    told = read_order(order)
    files = {which: told.at.embeddings(told.run.run, which) for which in ("train", "monitor")}
    trainer = Trainer(told.run, closed_form_plan(told.run), files)
    processes = trainer.processes
    payload: Any = [(n, n) for n in range(trainer.run.train.prompts_per_iteration * 96)]
    for p in trainer.parameters:
        p.grad = torch.ones_like(p)

    def median(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(12):
            processes.wait()
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[2:])

    found = {
        "gather": median(lambda: processes.gather(payload)),
        "reduce": median(lambda: processes.add_gradients(trainer.parameters)),
    }
    if processes.main:
        with tempfile.TemporaryDirectory() as where:
            begun = time.perf_counter()
            checkpoint.save(Path(where), trainer.checkpoint())
            found["checkpoint"] = time.perf_counter() - begun
        found["bytes"] = sum(p.numel() * 4 for p in trainer.parameters)
        print(json.dumps(found), flush=True)
    processes.wait()


def talking(folder: Path, prompts: int) -> dict[str, float]:
    """Costs of talking between two processes, and of a checkpoint."""
    order = job(folder, prompts)[4]
    words = launched([__file__, "--worker", order], 2)
    done = subprocess.run(words, cwd=ROOT, env=ENV, check=True, capture_output=True, text=True)
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("{")]
    return dict(json.loads(line))


def toy(one: dict[str, float], talk: dict[str, float], prompts: int) -> Costs:
    """The model's costs from one process, and from what talking takes."""
    iterations = int(one["iterations"])
    forward, train = (int(one[f"nfe_{k}"] / iterations / prompts) for k in ("forward", "train"))
    images = 96
    return Costs(
        evaluation=one["rollout"] / forward / prompts,
        training=one["optimize"] / train / prompts,
        image=one["decode_and_reward"] / images / prompts,
        forward=forward,
        train=train,
        images=images,
        prompts=prompts,
        gather=2 * talk["gather"],  # edges, then rewards
        reduce=talk["reduce"],
        checkpoint=talk["checkpoint"],
        checkpoint_every=10,
        start=one["start"],
    )


# -- the page ------------------------------------------------------------------------------------


def page(folder: Path) -> str:
    """Measure, check, compute."""
    prompts = 4
    one, two = (trained(folder / f"{n} at once", prompts, n) for n in (1, 2))
    talk = talking(folder / "talk", prompts)
    costs = toy(one, talk, prompts)
    half = side_by_side(folder / "half", prompts // 2, 2)
    seconds = [
        ("one network evaluation", f"{costs.evaluation:.6f}"),
        ("forward and backward of one source", f"{costs.training:.6f}"),
        ("decoding and scoring one image", f"{costs.image:.5f}"),
        ("gathering edges or rewards, 2 processes", f"{talk['gather']:.5f}"),
        (
            f"adding up {talk['bytes'] / 1e6:.1f} MB of gradients, 2 processes",
            f"{talk['reduce']:.5f}",
        ),
        ("one checkpoint, synced to disk", f"{talk['checkpoint']:.4f}"),
        ("start of a job", f"{costs.start:.1f}"),
    ]
    computed = {
        "1 process": (costs.iteration(1), one),
        "2 processes, half the work each": (costs.iteration(2), two),
        "2 processes, as two jobs of 2 prompts side by side": (
            half + costs.parts(2)["talking"],
            two,
        ),
    }
    checked = [
        (what, f"{least:.3f}", f"{found['iteration']:.3f}", f"{found['iteration'] / least:.2f}")
        for what, (least, found) in computed.items()
    ]
    head = ["an iteration of 4 prompts", "computed", "measured", "ratio"]
    big = flux()
    return f"""# Scaling, measured and computed

Written by `python benchmarks/scaling.py --write docs/benchmarks/scaling.md`.

## Measured: the toy on two cores, one thread a process

{table(["what", "seconds"], seconds)}

{table(head, checked)}

A job with 2 of the 4 prompts takes {half:.3f} s an iteration beside another one, \
{half / one["iteration"]:.2f} of the
time of all 4: its batches are smaller, and the two share caches and memory. What is left
is the waiting of two processes for each other.

## Computed: FLUX.1-dev, 300 iterations of 8 prompts, E-GRPO, H100

Estimated costs (see `flux` in the script), not measured. One run has work for as many
processes as an iteration has prompts; more GPUs train more runs of a sweep at once.

{table(GPUS_HEAD, gpus(big), left=0)}

Costs used:

```yaml
{yaml.safe_dump(vars(big), sort_keys=False)}```
"""


GPUS_HEAD = "GPUs|a run on|runs at once|hours a run|runs a day|work|waiting|talking".split("|")


def gpus(costs: Costs) -> list[list[Any]]:
    """Rows: what so many GPUs give, a run on one or on eight of them."""
    rows = []
    for count in (1, 8, 64, 512):
        for processes in sorted({1, min(8, count)}):
            parts, whole = costs.parts(processes), costs.iteration(processes)
            seconds, at_once = costs.start + 300 * whole, count // processes
            row = [count, processes, at_once, f"{seconds / 3600:.1f}"]
            shares = (parts[k] / whole for k in ("work", "waiting for the busiest", "talking"))
            rows.append([*row, f"{at_once * 86400 / seconds:.1f}", *(f"{x:.1%}" for x in shares)])
    return rows


def main() -> None:
    """Command line."""
    words = parser(__doc__)
    words.add_argument("--worker", type=Path)
    given = words.parse_args()
    if given.worker:
        worker(given.worker)
        return
    with tempfile.TemporaryDirectory(prefix="egrpo-scaling-") as folder:
        tell(page(Path(folder)), given.write)


if __name__ == "__main__":
    main()
