"""Which attention kernel runs, and the check that it is right on this card.

``auto`` is torch's choice without cuDNN's kernel: on Hopper cards the backward pass through that
one ends, in FLUX's blocks, in an illegal memory access or in NaN gradients (torch 2.11, H200,
bfloat16, 24 heads of 128). Forward passes and heads of 64 were right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from egrpo.errors import UserError, one_line, refusing
from egrpo.models.modules import repeated_blocks

if TYPE_CHECKING:
    from egrpo.models.base import FlowModel
    from egrpo.models.conditioning import Conditioning

Kernel = Literal["flash", "efficient", "math"]

CHECKED = 512
"""Pixels of an image's side in the check, at most: the plain formula keeps all pairs of tokens."""

FAR = 0.1
"""Relative error in the 2-norm of a wrong kernel; bfloat16 alone gives about 0.01."""


def kernel(capability: tuple[int, int], dtype: torch.dtype, head: int, *, masked: bool) -> Kernel:
    """What ``auto`` takes on a CUDA device for heads of this size (torch, ``sdp_utils.cpp``).

    Flash attention where it can: 16 bit, heads of at most 256, no mask (prompts of different
    lengths need one), compute capability 8.0 or later. Else the memory-efficient kernel, whose
    rows must be aligned to 16 bytes; else the plain formula.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if half and head <= 256 and not masked and capability >= (8, 0):
        return "flash"
    known = dtype in (torch.float16, torch.float32) or (half and capability >= (8, 0))
    if known and head * dtype.itemsize % 16 == 0:
        return "efficient"
    return "math"


def use_attention(transformer: Any, backend: str) -> None:
    """Have ``transformer`` compute attention by ``model.attention_backend``.

    ``auto`` holds for the whole process, so that it covers what gradient checkpointing computes
    again in the backward pass, and families whose layers call torch directly.

    Raises:
        UserError: for an unknown name, a missing package, a card that is too old, or layers that
            take no other backend.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    torch.backends.cuda.enable_cudnn_sdp(backend != "auto")
    if backend in ("auto", "native"):
        for processor in _processors(transformer):  # None would take what another model set
            processor._attention_backend = AttentionBackendName.NATIVE
        return
    if not takes_backend(transformer):
        raise UserError(
            f"model.attention_backend: {backend}: the layers of {type(transformer).__name__} in "
            "diffusers take no backend; set it to auto or native"
        )
    with refusing(f"model.attention_backend: {backend}"):  # no such name, package or GPU
        transformer.set_attention_backend(backend)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Within it what is computed on CUDA has the same bits every time.

    Gradients of flash and memory-efficient attention are otherwise added up in any order.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch insists on it
    filling: Any = torch.utils.deterministic  # it fills memory that it hands out, for nothing
    before = torch.are_deterministic_algorithms_enabled()
    fills, filling.fill_uninitialized_memory = filling.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        filling.fill_uninitialized_memory = fills


def takes_backend(network: nn.Module) -> bool:
    """Whether the network's layers compute attention by diffusers' dispatcher."""
    return any(True for _ in _processors(network))


def _processors(network: nn.Module) -> Iterator[Any]:
    for module in network.modules():
        processor = getattr(module, "processor", None)
        if hasattr(processor, "_attention_backend"):
            yield processor


@contextmanager
def plain_formula(network: nn.Module) -> Iterator[None]:
    """Within it ``network`` computes ``softmax(q k^T / sqrt(d)) v`` step by step."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    kept = [(processor, processor._attention_backend) for processor in _processors(network)]
    for processor, _ in kept:
        processor._attention_backend = AttentionBackendName.NATIVE
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for processor, backend in kept:
            processor._attention_backend = backend


def check_attention(model: FlowModel, prompts: Conditioning) -> None:
    """Run the attention of one block of each kind, forward and backward, beside the plain formula.

    Args:
        model: at the start of a training job, its weights not yet sharded.
        prompts: embeddings of the training prompts; where they differ in length, the shortest and
            the longest together show the kernel that takes a mask.

    Raises:
        UserError: naming backend, block and remedy, if the two differ or the kernel fails.
    """
    lengths = prompts.tensors.get("lengths", torch.zeros(1)).tolist()
    longest, shortest = lengths.index(max(lengths)), lengths.index(min(lengths))
    wrong = ""
    try:
        for ids in ([longest],) if longest == shortest else ([longest], [longest, shortest]):
            batch = prompts.batch(ids, model.device)
            for block, call in _first_calls(model, batch).items():
                difference = _difference(*call)
                wrong = wrong or (difference and f"in {block}, {difference}")
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # an illegal access, or no kernel for these shapes
        wrong = one_line(error, 200)
    if wrong:
        backend = model.settings.attention_backend
        other = "_native_math" if takes_backend(model.transformer) else "native"
        cuda = model.device.type == "cuda"
        card = torch.cuda.get_device_name(model.device) if cuda else "cpu"
        raise UserError(
            f"model.attention_backend: {backend}: attention is wrong on {card}: "
            f"{wrong}; set it to {other if backend == 'auto' else 'auto'}"
        )


@torch.no_grad()
def _first_calls(model: FlowModel, prompts: Conditioning) -> dict[str, tuple[Any, ...]]:
    """By kind of block, its first attention and what an evaluation [B] at half noise gives it."""
    found: dict[str, tuple[Any, ...]] = {}
    hooks = []
    for block in repeated_blocks(model.transformer).values():

        def keep(module: nn.Module, *given: Any, kind: str = type(block).__name__) -> None:
            found.setdefault(kind, (module, *given))

        # a network may name other modules among its blocks
        for attention in [m for m in block.modules() if hasattr(m, "processor")][:1]:
            hooks.append(attention.register_forward_pre_hook(keep, with_kwargs=True))
    unit = model.latents.factor * model.latents.patch
    most = CHECKED // unit * unit
    height, width = (min(s, most) for s in (model.settings.height, model.settings.width))
    shape = model.latents.shape(height, width)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(prompts), *shape, generator=generator).to(model.device)
    try:
        model.velocity(x, 0.5, prompts)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _difference(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How outputs and gradients differ from the plain formula's; empty if they do not."""
    found = _pass(attention, args, kwargs)
    with plain_formula(attention):
        right = _pass(attention, args, kwargs)
    for what, a, b in zip(("output", "gradient"), found, right, strict=True):
        if not a.isfinite().all():
            return f"its {what} is not finite"
        off = float((a - b).norm() / b.norm())
        if off > FAR:
            return f"its {what} differs from the plain formula's by {off:.0%}"
    return ""


def _pass(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Outputs of an attention, and gradients of their square, each as one float32 vector."""
    inputs: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        inputs.append(value.detach().clone().requires_grad_(True))
        return inputs[-1]

    given = [leaf(value) for value in args]
    named = {key: leaf(value) for key, value in kwargs.items()}
    with torch.enable_grad():
        out = attention(*given, **named)
        out = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor)]
        outputs = torch.cat([o.float().flatten() for o in out])
        grads = torch.autograd.grad(outputs.square().sum(), inputs, allow_unused=True)
    gradient = torch.cat([g.float().flatten() for g in grads if g is not None])
    if gradient.is_cuda:
        torch.cuda.synchronize(gradient.device)  # an illegal access is told later
    return outputs.detach(), gradient
