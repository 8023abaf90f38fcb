"""What more processes, GPUs and nodes give: measured where it can be, computed beyond.

``python benchmarks/scaling.py [--write docs/benchmarks/scaling.md]``

Measures the toy in one process and in two (one thread each), the costs of talking and of saving,
and checks the model below against them. Then applies the model to FLUX.1-dev on H100s, whose cost
of one evaluation is an estimate (``flux``) until ``benchmarks/gpu.py`` has measured it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parent.parent
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


def flux(image_side: int = 720) -> Costs:
    """FLUX.1-dev, config/presets/flux_dev_hps.yaml, on H100s: every number is an estimate.

    11.9e9 weights, 19 double and 38 single blocks of width 3072 (its config); 4 * n^2 * d
    operations of attention a block; 45% of the H100's 989 TFLOP/s in bfloat16. Training: forward,
    the forward again (gradient checkpointing), backward to the activations. E-GRPO's iteration
    from `egrpo cost`: 1,004 evaluations and 8 trained sources a prompt, 96 images.
    """
    tokens = (image_side // 16) ** 2 + 512
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


def settings(folder: Path, prompts: int) -> list[str]:
    """Arguments of a training job of the default study."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import STAGES, embedded, small_run, train_words

    run = small_run(
        "egrpo",
        **{
            "method.group_size": 12,
            "method.active": 8,
            "train.iterations": 8,
            "train.prompts_per_iteration": prompts,
            "train.monitor_every": 0,
            "train.checkpoint_every": 100,
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    return [STAGES, *train_words(run, embedded(run, folder), folder)]


def placed(words: list[str], state: Path, out: Path) -> list[str]:
    """The same with a state and results of their own."""
    found = [*words]
    for option, path in (("--state", state), ("--output", out)):
        found[found.index(option) + 1] = str(path)
    return found


def trained(folder: Path, words: list[str], processes: int) -> dict[str, float]:
    """Median seconds of an iteration and its parts, and the time until the first."""
    launch = [*LAUNCH, "--num_processes", str(processes)] if processes > 1 else []
    out = folder / f"out-{processes}"
    job = placed(words, folder / f"state-{processes}", out)
    begun = time.time()
    subprocess.run(
        [sys.executable, *launch, *job],
        cwd=ROOT,
        env=ENV,
        check=True,
        capture_output=True,
    )
    total = time.time() - begun
    sums = json.loads((out / "train.json").read_text())
    return {**times(out), "start": total - sums["seconds"], **sums}


def times(out: Path) -> dict[str, float]:
    """Median seconds of an iteration and of its parts, the first left out."""
    found: dict[str, list[float]] = {}
    for row in pq.read_table(out / "train_metrics.parquet").to_pylist():
        if row["metric"].startswith("time/") and row["iteration"] > 1:
            found.setdefault(row["metric"].removeprefix("time/"), []).append(row["value"])
    return {name: statistics.median(values) for name, values in found.items()}


def side_by_side(folder: Path, words: list[str], jobs: int) -> float:
    """Median seconds of an iteration of jobs that run at once and know nothing of each other."""
    running = []
    for n in range(jobs):
        command = [sys.executable, *placed(words, folder / f"s-{n}", folder / f"o-{n}")]
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )
    assert [job.wait() for job in running] == [0] * jobs
    return statistics.median(times(folder / f"o-{n}")["iteration"] for n in range(jobs))


def worker(words: list[str]) -> None:
    """One of several processes: what talking and saving cost, as a line of JSON."""
    import torch

    from egrpo.config.load import load_run
    from egrpo.planning.trees import closed_form_plan
    from egrpo.store import checkpoint
    from egrpo.train.trainer import Trainer

    torch.set_num_threads(1)
    path, folder = (Path(words[words.index(o) + 1]) for o in ("--run-config", "--embeddings"))
    run = load_run(path)
    files = {"train": folder / "train.safetensors", "monitor": folder / "heldout.safetensors"}
    trainer = Trainer(run, closed_form_plan(run), files)
    processes = trainer.processes
    payload: Any = [(n, n) for n in range(trainer.run.train.prompts_per_iteration * 96)]
    for p in trainer.parameters:
        p.grad = torch.ones_like(p)

    def median(work: Any) -> float:
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


def talking(words: list[str]) -> dict[str, float]:
    """Costs of talking between two processes, and of a checkpoint."""
    done = subprocess.run(
        [sys.executable, *LAUNCH, "--num_processes", "2", __file__, "--worker", json.dumps(words)],
        cwd=ROOT,
        env=ENV,
        check=True,
        capture_output=True,
        text=True,
    )
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
    words = settings(folder, prompts)
    one, two = (trained(folder, words, n) for n in (1, 2))
    talk = talking(words)
    costs = toy(one, talk, prompts)
    half = side_by_side(folder / "half", settings(folder / "half", prompts // 2), 2)
    lines = [
        "# Scaling, measured and computed",
        "",
        "Written by `python benchmarks/scaling.py --write docs/benchmarks/scaling.md`.",
        "",
        "## Measured: the toy on two cores, one thread a process",
        "",
        "| what | seconds |",
        "|---|--:|",
        f"| one network evaluation | {costs.evaluation:.6f} |",
        f"| forward and backward of one source | {costs.training:.6f} |",
        f"| decoding and scoring one image | {costs.image:.5f} |",
        f"| gathering edges or rewards, 2 processes | {talk['gather']:.5f} |",
        f"| adding up {talk['bytes'] / 1e6:.1f} MB of gradients, 2 processes | "
        f"{talk['reduce']:.5f} |",
        f"| one checkpoint, synced to disk | {talk['checkpoint']:.4f} |",
        f"| start of a job | {costs.start:.1f} |",
        "",
        "| an iteration of 4 prompts | computed | measured | ratio |",
        "|---|--:|--:|--:|",
    ]
    talked = costs.parts(2)["talking"]
    computed = {
        "1 process": (costs.iteration(1), one),
        "2 processes, half the work each": (costs.iteration(2), two),
        "2 processes, as two jobs of 2 prompts side by side": (half + talked, two),
    }
    lines += [
        f"| {what} | {seconds:.3f} | {found['iteration']:.3f} | "
        f"{found['iteration'] / seconds:.2f} |"
        for what, (seconds, found) in computed.items()
    ]
    lines += [
        "",
        f"A job with 2 of the 4 prompts takes {half:.3f} s an iteration beside another one, "
        f"{half / one['iteration']:.2f} of the",
        "time of all 4: its batches are smaller, and the two share caches and memory. What is left",
        "is the waiting of two processes for each other.",
        "",
        "## Computed: FLUX.1-dev, 300 iterations of 8 prompts, E-GRPO, H100",
        "",
        "Estimated costs (see `flux` in the script), not measured. One run has work for as many",
        "processes as an iteration has prompts; more GPUs train more runs of a sweep at once.",
        "",
        "| GPUs | a run on | runs at once | hours a run | runs a day | work | waiting | talking |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    big = flux()
    for gpus in (1, 8, 64, 512):
        for processes in sorted({1, min(8, gpus)}):
            seconds = big.start + 300 * big.iteration(processes)
            parts, at_once = big.parts(processes), gpus // processes
            whole = big.iteration(processes)
            lines.append(
                f"| {gpus} | {processes} | {at_once} | {seconds / 3600:.1f} | "
                f"{at_once * 86400 / seconds:.1f} | "
                + " | ".join(
                    f"{parts[k] / whole:.1%}"
                    for k in ("work", "waiting for the busiest", "talking")
                )
                + " |"
            )
    lines += ["", "Costs used:", "", "```yaml", yaml.safe_dump(vars(big), sort_keys=False) + "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--worker")
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return 0
    with tempfile.TemporaryDirectory(prefix="egrpo-scaling-") as folder:
        text = page(Path(folder))
    print(text)
    if given.write:
        given.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
