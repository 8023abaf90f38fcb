"""Full-size networks with random weights on a GPU: evaluations, rollouts, training, iterations.

``python benchmarks/gpu.py [--quick] [--models flux_dev sd35_medium] [--limit SECONDS]
[--write docs/benchmarks/gpu.md]``

Each row is shown and written when it is measured, so that a case that fails, or a time that is
over, loses no other. Shares are of the *model* FLOPs (``full_size.forward_flops``) in the matrix
product of 8192 that is measured first. Needs torch, diffusers, transformers, peft, pydantic, and
torchao for float8; no weights, no network.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import parser, table, versions
from full_size import ARCHITECTURES, Architecture, build, forward_flops, prompts

from egrpo.core.schedule import shifted_sigmas
from egrpo.methods import METHOD_MODELS
from egrpo.methods.base import Context
from egrpo.models.attention import repeatable
from egrpo.models.base import FlowModel
from egrpo.sampling.sample import Sampler

GIB = 2.0**30
GROUP = 12
SIZES = {"flux_dev": (720,), "sd35_medium": (512, 1024), "tiny": (64,), "tiny_sd3": (64,)}
METHODS = "egrpo egrpo_efficient flow_grpo mixgrpo".split()
HEAD = "model|pixels|what|batch|evaluations|seconds|ms each|of the product|peak GiB".split("|")

OFF = {"compile": False, "merge_lora_for_sampling": False, "fp8_sampling": False}
EAGER = {**OFF, "merge_lora_for_sampling": True}
SHIPPED = {**EAGER, "compile": True}
UNMERGED = {**OFF, "compile": True}
FLOAT8 = {**SHIPPED, "fp8_sampling": True}


@dataclass
class Bench:
    """A device, the pages written so far, and the time that is left."""

    device: torch.device
    dtype: torch.dtype
    ends: float
    page: Path | None
    ceiling: float = 0.0
    rows: list[list[str]] = field(default_factory=list)

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, work: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.sync()
        begun = time.perf_counter()
        work()
        self.sync()
        return time.perf_counter() - begun

    def best(self, work: Callable[[], Any], repeats: int = 2) -> float:
        """Of some calls, after one that compiles and warms up."""
        self.once(work)
        return min(self.once(work) for _ in range(repeats))

    def measure_ceiling(self) -> None:
        """FLOP/s of one large matrix product in the model's type."""
        n = 8192 if self.device.type == "cuda" else 512
        a = torch.randn(n, n, device=self.device).to(self.dtype)
        self.ceiling = 2.0 * n**3 / self.best(lambda: a @ a, 10)

    def row(self, of: tuple[str, int], what: str, batch: int, measured: Callable[[], Cost]) -> None:
        """Measure and keep one row; of a failing case what it said."""
        if time.monotonic() > self.ends:
            cells = ["time is over"]
        else:
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            try:
                cells = self._cells(measured())
            except Exception as error:  # one case loses no other
                cells = [f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"]
        peak = torch.cuda.max_memory_allocated() / GIB if self.device.type == "cuda" else 0.0
        cells += [""] * (4 - len(cells)) + [f"{peak:.1f}"]
        self.rows.append([of[0], str(of[1]), what, str(batch), *cells])
        print(" | ".join(self.rows[-1]), flush=True)
        if self.page:
            self.page.parent.mkdir(parents=True, exist_ok=True)
            self.page.write_text(self.text(), encoding="utf-8")

    def _cells(self, cost: Cost) -> list[str]:
        share = cost.flops / cost.seconds / self.ceiling
        each = 1000 * cost.seconds / cost.count
        return [
            str(cost.count),
            f"{cost.seconds:.3g}",
            f"{each:.4g}",
            f"{100 * share:.0f} %" if cost.flops else "",
        ]

    def text(self) -> str:
        """The page."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else platform.machine()
        return (
            "# Full-size networks on a GPU\n\n"
            "Written by `python benchmarks/gpu.py`, random weights. "
            f"{versions(name)}, diffusers {diffusers.__version__}; {time.strftime('%Y-%m-%d')}. "
            f"Matrix product in {str(self.dtype).removeprefix('torch.')}: "
            f"{self.ceiling / 1e12:.0f} TFLOP/s.\n\n{table(HEAD, self.rows, 3)}\n"
        )


@dataclass
class Cost:
    """What some evaluations (or images) took."""

    count: int
    seconds: float
    flops: float = 0.0


class Case:
    """One network at one size, with an adapter."""

    def __init__(self, bench: Bench, name: str, side: int, rank: int) -> None:
        self.bench, self.name, self.side = bench, name, side
        self.a: Architecture = ARCHITECTURES[name]
        self.flops = forward_flops(self.a, side, side)
        lora = {"rank": rank, "alpha": 2 * rank}
        more = {"lora": lora, "compile": False}
        self.model: FlowModel = build(self.a, bench.device, bench.dtype, side, side, **more)
        self.parameters = self.model.prepare_training(0)
        for _, layer in self.model.lora_layers():  # as after some updates
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=1e-3)
        self.sigmas = shifted_sigmas(16, 3.0)

    def row(self, what: str, batch: int, measured: Callable[[], Cost]) -> None:
        """See :meth:`Bench.row`."""
        self.bench.row((self.name, self.side), what, batch, measured)

    def use(self, **settings: Any) -> None:
        """Sample by other settings from now on."""
        self.model.settings = self.model.settings.model_copy(update=settings)
        self.model.twin = None
        gc.collect()
        if self.bench.device.type == "cuda":
            torch.cuda.empty_cache()

    def evaluation(self, batch: int) -> Cost:
        """Network evaluations as suffixes have them."""
        m, bench = self.model, self.bench
        x = torch.randn(batch, *m.image_shape, device=bench.device)
        rows = prompts(self.a, bench.device, bench.dtype, 1)
        cond = rows.rows(torch.zeros(batch, dtype=torch.int64, device=bench.device))
        with torch.no_grad(), m.sampling(batch=batch) as network:
            seconds = bench.best(lambda: m.velocity(x, 0.7, cond, network))
        return Cost(batch, seconds, self.flops * batch)

    def sampler(self, batch: int, sigmas: Any = None) -> Sampler:
        """The sampler of one random prompt."""
        cond = prompts(self.a, torch.device("cpu"), self.bench.dtype, 1)
        of = self.model, cond, sigmas or self.sigmas, batch
        return Sampler(*of, noise_level=0.7, train_micro_batch=1)

    def grown(self, method: str, **settings: Any) -> tuple[Any, Any]:
        """A method's grid and its tree of one prompt in the first iteration."""
        made = METHOD_MODELS[method].model_validate({"name": method, **settings})
        sigmas = shifted_sigmas(made.steps, 3.0)
        plan = made.plan(sigmas, ()) if made.needs_plan else None
        return sigmas, made.tree(Context(plan, sigmas, 1, (0, "tree", 1, 0)))

    def rollout(self, batch: int, active: int) -> Cost:
        """A rollout of E-GRPO, after an evaluation that compiled what it needs."""
        sigmas, tree = self.grown("egrpo", group_size=GROUP, active=list(range(active)))
        sampler = self.sampler(batch, sigmas)
        seconds = self.bench.once(lambda: sampler.rollout([0], [tree], "bench"))
        return Cost(tree.cost.forward, seconds, self.flops * tree.cost.forward)

    def train(self, count: int, *, deterministic: bool) -> Cost:
        """Forward and backward passes of single branch points.

        Frozen weights need no gradient: a backward pass has one forward's FLOPs, not two.
        """
        m, bench = self.model, self.bench
        x = torch.randn(1, *m.image_shape, device=bench.device)
        cond = prompts(self.a, bench.device, bench.dtype, 1)

        def work() -> None:
            with repeatable(bench.device) if deterministic else nullcontext():
                m.velocity(x, 0.7, cond).float().square().mean().backward()

        seconds = bench.best(lambda: [work() for _ in range(count)], 1)
        return Cost(count, seconds, 2 * self.flops * count)

    def decode(self, count: int, batch: int) -> Cost:
        """Decoding."""
        z = torch.randn(count, *self.model.image_shape, device=self.bench.device)
        return Cost(count, self.bench.best(lambda: self.model.decode(z, batch), 1))

    def iteration(self, method: str, batch: int) -> Cost:
        """Rollout, decoding and training pass of one prompt, as the trainer does them."""
        sigmas, tree = self.grown(method)
        sampler, m = self.sampler(batch, sigmas), self.model
        cond = prompts(self.a, self.bench.device, self.bench.dtype, 1)

        def work() -> None:
            found = sampler.rollout([0], [tree], "bench")
            m.decode(found.leaves, 4)
            for part in found.batches:
                v = m.velocity(part.x, sigmas[part.start], cond.rows(part.tree))
                part.log_ratio(v, sigmas, 0.7).mean().backward()

        return Cost(tree.cost.forward + tree.passes(1), self.bench.once(work))


@contextmanager
def cudnn() -> Iterator[None]:
    """Attention by cuDNN's kernel, which only the sampler could use."""
    torch._dynamo.reset()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch._dynamo.reset()


def measure(case: Case, *, quick: bool) -> None:
    """All rows of one network at one size; the most important ones first."""
    case.use(**OFF)
    case.row("evaluation: neither merged nor compiled", GROUP, lambda: case.evaluation(GROUP))
    case.use(**SHIPPED)
    case.row("evaluation as shipped: merged, compiled", GROUP, lambda: case.evaluation(GROUP))
    case.row("rollout as shipped", GROUP, lambda: case.rollout(GROUP, 1))
    if not quick and case.side == 512:
        for method in METHODS:
            what = f"iteration of {method}"
            case.row(what, GROUP, lambda method=method: case.iteration(method, GROUP))
    case.use(**FLOAT8)
    case.row("evaluation: merged, compiled, float8", GROUP, lambda: case.evaluation(GROUP))
    case.row("rollout with float8", GROUP, lambda: case.rollout(GROUP, 1))
    case.use(**OFF)
    case.row("decoding", 4, lambda: case.decode(4 if quick else 12, 4))
    if case.side != 512:
        for deterministic in (True, False):
            what = f"training pass, {'' if deterministic else 'not '}deterministic"
            case.row(what, 1, lambda d=deterministic: case.train(2, deterministic=d))
    case.model.enable_gradient_checkpointing()
    what = "training pass, checkpointing, deterministic"
    case.row(what, 1, lambda: case.train(2, deterministic=True))
    case.model.transformer.disable_gradient_checkpointing()
    case.model.transformer.eval()
    if quick:
        return
    case.row("evaluation: one sample at a time", 1, lambda: case.evaluation(1))
    case.use(**EAGER)
    case.row("evaluation: merged", GROUP, lambda: case.evaluation(GROUP))
    if torch.cuda.is_available():
        case.use(**SHIPPED, cuda_graphs=True)
        case.row("evaluation as shipped, CUDA graphs", GROUP, lambda: case.evaluation(GROUP))
    with cudnn():
        case.use(**SHIPPED)
        case.row("evaluation as shipped, cuDNN", GROUP, lambda: case.evaluation(GROUP))
        case.use(**FLOAT8)
        case.row("evaluation: float8, cuDNN", GROUP, lambda: case.evaluation(GROUP))
    case.use(**UNMERGED)
    case.row("evaluation: compiled", GROUP, lambda: case.evaluation(GROUP))


def main() -> None:
    """Measure everything that is asked for."""
    words = parser(__doc__)
    words.add_argument("--models", nargs="+", default=["flux_dev", "sd35_medium"])
    words.add_argument("--quick", action="store_true")
    words.add_argument("--limit", type=float, default=360.0)
    given = words.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, torch.bfloat16, time.monotonic() + given.limit, given.write)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as attention_backend: auto
    bench.measure_ceiling()
    for name in given.models:
        for side in SIZES[name][-1:] if given.quick else SIZES[name]:
            if time.monotonic() > bench.ends:
                break
            case = Case(bench, name, side, rank=128 if name == "flux_dev" else 32)
            measure(case, quick=given.quick)
            case.use(**OFF)
            del case
            gc.collect()
    print(bench.text())


if __name__ == "__main__":
    main()
