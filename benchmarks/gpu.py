"""Full-size models with random weights on a GPU: what an evaluation, a rollout and a step cost.

``python benchmarks/gpu.py [--models sd35_medium flux_dev] [--sizes 512 720 1024]
[--write docs/benchmarks/gpu.md]``

Needs torch, diffusers, transformers, peft and accelerate, and of this package ``core`` and
``models`` alone: no weights, no network, no tracking. TFLOP/s are *model* FLOPs (the formula is
:func:`forward_flops`) over time, beside the ceiling of one large matrix product measured in the
same run. Everything runs through the adapter and the executor that training uses. An iteration
here has one active step (``--active``): the paper's eight take about eight times as long, with the
same kind of work.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from common import parser, table, tell, versions

from egrpo.config.models import Model
from egrpo.core.executor import Executor
from egrpo.core.plan import make_plan
from egrpo.core.schedule import shifted_sigmas
from egrpo.methods.shapes import planned_branches
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.models.families import FAMILIES, SD3, Flux

GIB = 2.0**30

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
"""The VAE of FLUX.1; SD3's has the same shape."""


@dataclass(frozen=True)
class Architecture:
    """One model: its adapter, the transformer's config, and its prompt embeddings."""

    family: type[FlowModel]
    config: dict[str, Any]
    text: int
    width: int
    pooled: int
    vae: dict[str, Any] = field(default_factory=lambda: VAE)

    def tiny(self, **config: Any) -> Architecture:
        """The same family, small."""
        few = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 32}
        few |= {"pooled_projection_dim": 32, **config}
        vae = VAE | {"block_out_channels": [32] * 4, "layers_per_block": 1}
        return Architecture(self.family, self.config | few, text=8, width=32, pooled=32, vae=vae)


SD35_MEDIUM = Architecture(  # stabilityai/stable-diffusion-3.5-medium, transformer/config.json
    SD3,
    {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    text=333,  # 77 of CLIP and 256 of T5
    width=4096,
    pooled=2048,
)
FLUX_DEV = Architecture(  # black-forest-labs/FLUX.1-dev, transformer/config.json
    Flux,
    {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    text=512,
    width=4096,
    pooled=768,
)
TINY_SD3 = {"sample_size": 16, "num_layers": 2, "caption_projection_dim": 64}
TINY_SD3 |= {"pos_embed_max_size": 32, "dual_attention_layers": (0,)}
ARCHITECTURES = {
    "sd35_medium": SD35_MEDIUM,
    "flux_dev": FLUX_DEV,
    "tiny": FLUX_DEV.tiny(num_layers=1, num_single_layers=1, axes_dims_rope=(8, 12, 12)),
    "tiny_sd3": SD35_MEDIUM.tiny(**TINY_SD3),
}


def forward_flops(architecture: Architecture, height: int, width: int) -> float:
    """Model FLOPs of one network evaluation; a multiply-add counts two.

    With d = model width, I image tokens, L text tokens, N = I + L:

    * linear layers of a double block: 12 d^2 weights (qkv 3, output 1, MLP 8) a token, of image and
      text stream alike; SD3's last block has no text output and MLP: 9 d^2 less a text token;
      its dual attention adds 4 d^2 an image token;
    * linear layers of a single block (FLUX): 12 d^2 (qkv 3, MLP 4, output 5) a token;
    * attention: two products of N x N x d in every block, 4 N^2 d FLOPs; dual: 4 I^2 d more;
    * embeddings: patches, text, and the output layer. Modulation, once per image, is left out
      except for its weights: 6 d^2 a stream and double block, 3 d^2 a single block.
    """
    c = architecture.config
    d = c["attention_head_dim"] * c["num_attention_heads"]
    image, text = (height // 16) * (width // 16), architecture.text
    both, double = image + text, c["num_layers"]
    single = c.get("num_single_layers", 0)
    linear = 12.0 * d * d * both * (double + single)
    attention = 4.0 * both * both * d * (double + single)
    modulation = 12.0 * d * d * double + 3.0 * d * d * single
    if architecture.family is SD3:
        dual = len(c["dual_attention_layers"])
        linear += 4.0 * d * d * image * dual - 9.0 * d * d * text
        attention += 4.0 * image * image * d * dual
        modulation += 3.0 * d * d * dual - 4.0 * d * d  # the last block's text has 2, not 6
    patch = c["in_channels"] * (4 if architecture.family is SD3 else 1)
    linear += d * (2.0 * patch * image + c["joint_attention_dim"] * text)
    return 2.0 * (linear + modulation) + attention


@dataclass
class Bench:
    """A device, and how to time on it."""

    device: torch.device
    dtype: torch.dtype
    repeats: int

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], warm: int = 1) -> float:
        """Best of the repeats."""
        for _ in range(warm):
            work()
        times = []
        for _ in range(self.repeats):
            with self.timed() as took:
                work()
            times.append(took["s"])
        return min(times)

    @contextmanager
    def timed(self) -> Iterator[dict[str, float]]:
        """Seconds within."""
        self.sync()
        out, begun = {"s": 0.0}, time.perf_counter()
        yield out
        self.sync()
        out["s"] = time.perf_counter() - begun

    @contextmanager
    def memory(self) -> Iterator[dict[str, float]]:
        """Peak of the allocated memory within, GiB (CUDA; 0 elsewhere)."""
        out = {"gib": 0.0}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield out
        if self.device.type == "cuda":
            out["gib"] = torch.cuda.max_memory_allocated(self.device) / GIB

    def ceiling(self) -> float:
        """TFLOP/s of one large matrix product in the model's type."""
        n = 8192 if self.device.type == "cuda" else 512
        a = torch.randn(n, n, device=self.device).to(self.dtype)
        best = self.seconds(lambda: a @ a, warm=3)
        return 2.0 * n**3 / best / 1e12


def build(a: Architecture, bench: Bench, height: int, width: int, **more: Any) -> FlowModel:
    """The adapter around a network and a VAE with random weights."""
    settings: dict[str, Any] = {
        "path": "random",
        "family": next(name for name, family in FAMILIES.items() if family is a.family),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "device": str(bench.device),
        "height": height,
        "width": width,
        "guidance_scale": 1.0,
        "embedded_guidance": 3.5,
        "lora": {"rank": 32, "alpha": 64},
        "vae_slicing": True,
    }
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)  # 12 billion float32 weights would not fit first
    try:
        with torch.device(bench.device):
            network = getattr(diffusers, a.family.transformer_class)(**a.config)
            vae = diffusers.AutoencoderKL(**a.vae)
    finally:
        torch.set_default_dtype(before)
    for module in (network, vae):
        module.eval().requires_grad_(False)
    return a.family(Model.model_validate(settings | more), parts=(network, vae))


def prompts(architecture: Architecture, bench: Bench, count: int) -> Conditioning:
    """Random embeddings of ``count`` prompts."""
    shape = (count, architecture.text, architecture.width)
    generator = torch.Generator().manual_seed(0)
    made = {
        "embeds": torch.randn(shape, generator=generator),
        "pooled": torch.randn(count, architecture.pooled, generator=generator),
    }
    return Conditioning({k: v.to(bench.device, bench.dtype) for k, v in made.items()}, {})


def evaluation(model: FlowModel, a: Architecture, bench: Bench, batch: int) -> tuple[float, float]:
    """Seconds of one network evaluation at a micro-batch, and peak memory in GiB."""
    x = torch.randn(batch, *model.image_shape, device=bench.device)
    cond = prompts(a, bench, 1).rows(torch.zeros(batch, dtype=torch.int64, device=bench.device))
    with torch.no_grad(), bench.memory() as used:
        seconds = bench.seconds(lambda: model.velocity(x, 0.7, cond))
    return seconds / batch, used["gib"]


@dataclass(frozen=True)
class Work:
    """An iteration's size: steps of the sampler, how many of them branch, samples of a branch,
    most latents in one evaluation, latents decoded at once."""

    steps: int
    active: int
    group: int
    batch: int
    decode: int = 4


@dataclass
class Iteration:
    """What one E-GRPO iteration of one prompt took: seconds by part, evaluations, memory."""

    seconds: dict[str, float]
    inside: float
    forward: int
    sources: int
    gib: float


def iteration(
    model: FlowModel, a: Architecture, bench: Bench, parameters: Any, work: Work
) -> Iteration:
    """Rollout, decoding, and one optimizer step, as the trainer does them, for one prompt."""
    sigmas = shifted_sigmas(work.steps, 3.0)
    plan = make_plan(sigmas, list(range(work.active)), threshold=2.2, noise_level=0.7)
    cond = prompts(a, bench, 1)
    inside, seconds = 0.0, {}

    def velocity(x: Any, sigma: float, rows: Any) -> Any:
        nonlocal inside
        with bench.timed() as took:
            v = model.velocity(x, sigma, cond.rows(rows))
        inside += took["s"]
        return v

    def noise(tree: int, start: int, sample: int) -> Any:
        generator = torch.Generator().manual_seed(1000 * start + sample)
        return torch.randn(model.image_shape, generator=generator)

    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    with bench.memory() as used:
        with bench.timed() as seconds["rollout"]:
            rollout = Executor(
                [planned_branches(plan, work.group)],
                sigmas,
                velocity,
                noise,
                noise_level=0.7,
                micro_batch=work.batch,
                train_micro_batch=1,
                dtype=bench.dtype,
                device=bench.device,
            ).rollout()
        with bench.timed() as seconds["decode"]:
            model.decode(rollout.leaves, work.decode)
        with bench.timed() as seconds["train"]:
            for part in rollout.batches:
                v = model.velocity(part.x, sigmas[part.start], cond.rows(part.tree))
                part.log_ratio(v, sigmas, 0.7).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    sources = sum(len(part.x) for part in rollout.batches)
    parts = {name: took["s"] for name, took in seconds.items()}
    return Iteration(parts, inside, rollout.forward, sources, used["gib"])


EVALUATION_HEAD = "model|pixels|mode|batch|ms an evaluation|TFLOP/s|of the ceiling|peak GiB".split(
    "|"
)
ITERATION_HEAD = (
    "model|pixels|batch|checkpointing|evaluations forward / trained|rollout s|of the ceiling|"
    "outside the network|decode s|train s|of the ceiling|peak GiB"
).split("|")


def filled(row: list[str], head: list[str]) -> list[str]:
    """A row that may end early."""
    return row + [""] * (len(head) - len(row))


def measure(
    name: str, bench: Bench, sizes: list[int], batches: list[int], work: Work, *, compiled: bool
) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of the two tables of one model: evaluations, and iterations."""
    a, ceiling = ARCHITECTURES[name], bench.ceiling()
    evaluations, iterations = [], []
    for side in sizes:
        flops = forward_flops(a, side, side)
        for mode in ("eager", "compiled") if compiled else ("eager",):
            model = build(a, bench, side, side, compile=mode == "compiled")
            times: dict[int, float] = {}
            for batch in batches:
                row = [name, str(side), mode, str(batch)]
                try:
                    times[batch], gib = evaluation(model, a, bench, batch)
                except torch.OutOfMemoryError:
                    evaluations.append(filled([*row, "out of memory"], EVALUATION_HEAD))
                    break
                rate = flops / times[batch] / 1e12
                row += [f"{1000 * times[batch]:.1f}", f"{rate:.3g}"]
                evaluations.append([*row, f"{100 * rate / ceiling:.0f} %", f"{gib:.1f}"])
            if mode == "eager":
                sized = replace(work, batch=min(times, key=times.__getitem__, default=batches[0]))
                iterations += _iterations(model, name, bench, side, sized, flops / 1e12 / ceiling)
            del model
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    return evaluations, iterations


def _iterations(
    model: FlowModel, name: str, bench: Bench, side: int, work: Work, least: float
) -> list[list[str]]:
    """All together; with gradient checkpointing; and one sample at a time, as public code does.

    ``least``: seconds of an evaluation at the ceiling.
    """
    parameters = model.prepare_training(0)
    rows = []
    alone = replace(work, batch=1, decode=1)
    for sized, checkpointing in ((work, "no"), (alone, "no"), (work, "yes")):
        if checkpointing == "yes":
            model.enable_gradient_checkpointing()
        row = [name, str(side), str(sized.batch), checkpointing]
        try:
            found = iteration(model, ARCHITECTURES[name], bench, parameters, sized)
        except torch.OutOfMemoryError:
            rows.append(filled([*row, "out of memory"], ITERATION_HEAD))
            continue
        took = found.seconds
        # frozen weights need no gradient: the backward pass is one forward's FLOPs, not two
        training = 2.0 * least * found.sources / took["train"]
        row += [f"{found.forward} / {found.sources}", f"{took['rollout']:.2f}"]
        row += [f"{100 * least * found.forward / took['rollout']:.0f} %"]
        row += [f"{100 * (1 - found.inside / took['rollout']):.1f} %", f"{took['decode']:.2f}"]
        rows.append([*row, f"{took['train']:.2f}", f"{100 * training:.0f} %", f"{found.gib:.1f}"])
    return rows


def machine(device: torch.device) -> str:
    """Device and versions, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return f"{versions(name or platform.machine())}, diffusers {diffusers.__version__}"


def main() -> None:
    """Measure and print, or write."""
    words = parser(__doc__)
    words.add_argument("--models", nargs="+", default=["sd35_medium", "flux_dev"])
    words.add_argument("--sizes", nargs="+", type=int, default=[512, 720, 1024])
    words.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 12])
    words.add_argument("--steps", type=int, default=16)
    words.add_argument("--active", type=int, default=1)
    words.add_argument("--group", type=int, default=12)
    words.add_argument("--repeats", type=int, default=3)
    words.add_argument("--compile", action="store_true")
    given = words.parse_args()
    kind = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    bench = Bench(torch.device(kind[0]), kind[1], given.repeats)
    work = Work(given.steps, given.active, given.group, 1)
    evaluations, iterations = [], []
    for name in given.models:
        of_one = measure(name, bench, given.sizes, given.batches, work, compiled=given.compile)
        evaluations += of_one[0]
        iterations += of_one[1]
    tell(
        "# Full-size models with random weights\n\n"
        f"Written by `python benchmarks/gpu.py`. {machine(bench.device)}.\n"
        f"Ceiling: {bench.ceiling():.0f} TFLOP/s of a matrix product in {bench.dtype}.\n\n"
        f"## Network evaluations\n\n{table(EVALUATION_HEAD, evaluations)}\n\n"
        f"## E-GRPO iterations: one prompt, {given.active} of {given.steps} steps active, "
        f"groups of {given.group}, LoRA of rank 32\n\n{table(ITERATION_HEAD, iterations)}\n",
        given.write,
    )


if __name__ == "__main__":
    main()
