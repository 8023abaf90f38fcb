"""What a rollout costs on this machine, beside the floor of the bare network.

``python benchmarks/laptop.py [--threads 1] [--write docs/benchmarks/laptop.md]``

Measured on the shipped toy with the default study's settings: 4 prompts, G = 12, 8 active steps.
Only ratios within one run mean much on a noisy machine; each figure is the best of its repeats.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import parser, table, tell, versions

from egrpo.config.models import RunConfig
from egrpo.core.advantage import Advantages
from egrpo.core.loss import clipped_objective
from egrpo.core.rollout import Rollout
from egrpo.measure.embed import embed_files
from egrpo.planning.grids import training_sigmas
from egrpo.planning.trees import plan_of
from egrpo.rewards import score_all
from egrpo.study.resolve import load_study
from egrpo.train.records import peak_memory_mib
from egrpo.train.trainer import Trainer


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def bare_forwards(trainer: Trainer) -> tuple[Callable[[], None], int]:
    """Replays exactly the batches of one rollout through the network, and nothing else."""
    calls: list[tuple[torch.Tensor, float, Any, Any]] = []
    original = trainer.model.velocity

    def record(x: Any, sigma: float, prompts: Any, module: Any = None, paths: Any = None) -> Any:
        calls.append((x.clone(), sigma, prompts, module))
        return original(x, sigma, prompts, module, paths)

    trainer.model.velocity = record  # type: ignore[method-assign]
    trainer.rollout(1, *trainer.trees(1))
    trainer.model.velocity = original  # type: ignore[method-assign]

    @torch.no_grad()
    def replay() -> None:
        for x, sigma, prompts, module in calls:
            (module or trainer.model.transformer)(
                hidden_states=x,
                encoder_hidden_states=prompts.tensors["embeds"],
                pooled_projections=prompts.tensors["pooled"],
                timestep=torch.full((len(x),), 1000.0 * sigma),
                return_dict=False,
            )

    return replay, sum(len(x) for x, *_ in calls)


def one_by_one(trainer: Trainer, iteration: int) -> None:
    """The same iteration as public reference code does it: one sample at a time, all through.

    Every latent is evaluated alone, every image decoded and scored alone, and every sample has a
    forward and backward of its own.
    """
    whole = trainer.rollouts.sampler
    trainer.rollouts.sampler = replace(whole, micro_batch=1, train_micro_batch=1)
    ids, trees = trainer.trees(iteration)
    rollout = trainer.rollout(iteration, ids, trees)
    scores: dict[str, list[float]] = {name: [] for name in trainer.rewards}
    for latent, tree in zip(rollout.leaves, rollout.leaf_tree, strict=True):
        image = trainer.model.decode(latent[None], 1)
        for name, value in score_all(trainer.rewards, image, [trainer.texts[ids[tree]]]).items():
            scores[name].append(float(value[0]))
    arrays = {name: torch.tensor(v, dtype=torch.float64).numpy() for name, v in scores.items()}
    separate_backward(trainer, rollout, ids, trainer.advantages(arrays, rollout, trees))
    trainer.rollouts.sampler = whole


def separate_backward(
    trainer: Trainer, rollout: Rollout, ids: list[int], advantage: Advantages
) -> None:
    """One forward/backward for every trained edge."""
    rows = torch.tensor(ids)
    for batch in rollout.batches:
        for edge in range(len(batch.edges)):
            prompts = trainer.conditioning.rows(rows[batch.tree])
            v = trainer.model.velocity(batch.x, trainer.sigmas[batch.start], prompts)
            new = batch.log_probs(v, trainer.sigmas, trainer.run.method.noise_level)[edge]
            value = torch.tensor([advantage.values[batch.edges[edge]]], dtype=torch.float32)
            ratio = (new - batch.log_prob[edge])[None]
            objective = clipped_objective(ratio, value, torch.ones(1), 1e-4)
            (objective.loss / len(rollout.edges)).backward()
    trainer.learner.optimizer.step()
    trainer.learner.optimizer.zero_grad()


def machine() -> str:
    """Processor, cores, memory and versions, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            ln.split(":")[1].strip()
            for ln in info.read_text().splitlines()
            if ln.startswith("model name")
        ]
        name = f"{len(models)} x {models[0]}" if models else name
    return versions(f"{name}; {torch.backends.cpu.get_cpu_capability()}")


def compiled_share(trainer: Trainer, repeats: int) -> float:
    """Time of a rollout whose twin is compiled, over that of the same one as it is; median."""
    model, plain = trainer.model, trainer.model.settings
    model.settings, model.twin = plain.model_copy(update={"compile": True}), None
    trainer.rollout(1, *trainer.trees(1))
    compiled, model.settings, model.twin = model.twin, plain, None
    trainer.rollout(1, *trainer.trees(1))
    eager, turns = model.twin, []
    for _ in range(repeats):
        pair = []
        for model.twin in (compiled, eager):
            pair.append(timed(lambda: trainer.rollout(1, *trainer.trees(1))))
        turns.append(pair[0] / pair[1])
    return statistics.median(turns)


def measure(run: RunConfig, threads: int, repeats: int) -> list[tuple[str, str, str]]:
    """Rows of the table of one E-GRPO run: (what, measured, target)."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(run, plan_of(run, training_sigmas(run)), embed_files(run, Path(folder)))
    replay, evaluations = bare_forwards(trainer)
    parts: dict[str, float] = {"time/iteration": float("inf")}

    def iteration() -> None:
        metrics, _ = trainer.step()
        if metrics["time/iteration"] < parts["time/iteration"]:
            parts.update({k: v for k, v in metrics.items() if k.startswith("time/")})

    # by turns, so that a slow moment of the machine hits all; the overhead is the median's
    works = (lambda: trainer.rollout(1, *trainer.trees(1)), replay, iteration)
    for work in works:
        work()
    turns = [[timed(work) for work in works] for _ in range(repeats)]
    rollout, bare, seconds = (min(turn[k] for turn in turns) for k in range(3))
    overhead = statistics.median(turn[0] / turn[1] for turn in turns) - 1
    memory = peak_memory_mib()
    compiled = compiled_share(trainer, repeats)
    alone = min(timed(lambda: one_by_one(trainer, 1)) for _ in range(2))
    return [
        ("network evaluations of one rollout", f"{evaluations:,}", ""),
        ("bare forward of the same batches", f"{1e3 * bare / evaluations:.3f} ms each", ""),
        ("rollout", f"{1e3 * rollout / evaluations:.3f} ms each", ""),
        ("rollout overhead, median", f"{100 * overhead:.1f} %", "at most 15 %"),
        ("rollout with model.compile, median", f"{compiled:.2f} of that", "at most 0.7"),
        ("E-GRPO iteration", f"{seconds:.2f} s", "at most 1 s"),
        *(
            (f"of it {name[5:].replace('_', ' ')}", f"{parts[name]:.2f} s", "")
            for name in ("time/rollout", "time/decode_and_reward", "time/optimize")
        ),
        ("peak memory of the process", f"{memory:,.0f} MiB", ""),
        ("the same work one sample at a time", f"{alone:.1f} s", ""),
        ("speed-up over one at a time", f"{alone / seconds:.1f} x", "at least 12 x"),
    ]


def main() -> None:
    words = parser(__doc__)
    words.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    words.add_argument("--repeats", type=int, default=12)
    given = words.parse_args()
    run = load_study("config/config.yaml").runs["egrpo-s0"]
    text = (
        "# One machine, the toy world\n\n"
        "Written by `python benchmarks/laptop.py --write docs/benchmarks/laptop.md`: 4 prompts, "
        "G = 12, 8 active steps,\nT = 16, threshold 2.2, LoRA. Best of "
        f"{given.repeats} repeats.\n\nMachine: {machine()}.\n"
    )
    for threads in given.threads:
        rows = measure(run, threads, given.repeats)
        text += f"\n## {threads} thread{'s' if threads > 1 else ''}\n\n"
        text += table(["what", "measured", "target"], rows, left=3) + "\n"
    tell(text, given.write)


if __name__ == "__main__":
    main()
