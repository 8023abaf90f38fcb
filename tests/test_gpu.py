"""What only a CUDA device can show: ``make test-gpu``; skipped where there is none.

They need torch, diffusers, transformers, peft, accelerate, pydantic, and the packages of the toy's
rewards; no network. ``EGRPO_TEST_DEVICE=cpu`` rehearses all that a CPU can run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import full_size
import pytest
import tiny_models
import torch
from conftest import sampled, small_run, trainer_for
from torch import Tensor
from torch.nn.attention import SDPBackend

from egrpo.config.models import Model
from egrpo.errors import UserError
from egrpo.models import attention
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning, Embeddings, load_conditioning
from egrpo.models.families import FAMILIES
from egrpo.ops.memory import advice_where_memory_ends
from egrpo.rewards import load_reward
from egrpo.train.trainer import Trainer

DEVICE = os.environ.get("EGRPO_TEST_DEVICE", "cuda")
CUDA = torch.cuda.is_available()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not CUDA, reason="no CUDA device"),
]
on_cuda_alone = pytest.mark.skipif(not CUDA, reason="no CUDA device")

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


# -- attention --------------------------------------------------------------------------------


@on_cuda_alone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head", [6, 64, 128, 256, 264])
@pytest.mark.parametrize("masked", [False, True])
def test_torch_takes_the_kernel_that_auto_promises(
    dtype: torch.dtype, head: int, masked: bool
) -> None:
    attention.use_attention(torch.nn.Identity(), "auto")
    q = torch.randn(2, 4, 32, head, device="cuda", dtype=dtype, requires_grad=True)
    mask = torch.ones(2, 1, 1, 32, device="cuda", dtype=torch.bool) if masked else None
    promised = attention.kernel(torch.cuda.get_device_capability(), dtype, head, masked=masked)
    assert torch._fused_sdp_choice(q, q, q, mask) == BACKENDS[promised].value


def few(family: str, device: str, dtype: str, **more: Any) -> FlowModel:
    """A network with the family's own heads and few layers; the same weights every time."""
    torch.manual_seed(0)
    pipe = tiny_models.FAMILIES[family](full_size.HEADS[family])
    pipe.transformer.to(device, getattr(torch, dtype)).eval().requires_grad_(False)
    settings = {"family": family, "path": "random", "device": device, "dtype": dtype, **more}
    settings["embedded_guidance"] = 4.0
    settings = {"height": 32, "width": 48, "lora": {"rank": 8, "alpha": 16}, **settings}
    parts = pipe.transformer, pipe.vae.to(device)
    return FAMILIES[family](Model.model_validate(settings), parts=parts)


def conditioning(model: FlowModel, lengths: tuple[int, ...]) -> Conditioning:
    """Random embeddings of as many tokens."""
    c, generator = model.config, torch.Generator().manual_seed(1)
    width = c.get("joint_attention_dim") or c["cap_feat_dim"]
    longest = max(lengths)
    made = {"embeds": torch.randn(len(lengths), longest, width, generator=generator)}
    if model.equal_lengths:
        of = c["pooled_projection_dim"]
        made["pooled"] = torch.randn(len(lengths), of, generator=generator)
    else:
        made["lengths"] = torch.tensor(lengths)
    return Conditioning(made, {})


def passed(model: FlowModel, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Velocity, and gradient of its square by all adapters, as float64 on the CPU."""
    parameters = model.prepare_training(0)
    generator = torch.Generator().manual_seed(2)
    for _, layer in model.lora_layers():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    prompts = conditioning(model, lengths).batch(range(len(lengths)), model.device)
    x = torch.randn(len(lengths), *model.image_shape, generator=generator).to(model.device)
    v = model.velocity(x, 0.5, prompts)  # a time, and a guidance, that bfloat16 has
    v.float().square().mean().backward()
    gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
    return v.detach().double().cpu(), torch.cat(gradients).double().cpu()


OFFERED = ["auto", "native", "_native_flash", "_native_efficient", "_native_math"]


@pytest.mark.parametrize("backend", OFFERED)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_forward_and_backward_are_those_of_float32_on_the_cpu(family: str, backend: str) -> None:
    if family not in ("flux", "qwen_image") and backend not in ("auto", "native"):
        pytest.skip("its layers take no backend")
    if not CUDA and backend in ("_native_flash", "_native_efficient"):
        pytest.skip("a kernel for GPUs")
    lengths = (7, 7) if backend == "_native_flash" or FAMILIES[family].equal_lengths else (7, 5)
    given = {"attention_backend": backend}
    torch.backends.cuda.enable_cudnn_sdp(False)
    if backend == "native" and CUDA and torch.cuda.get_device_capability() >= (9, 0):
        pytest.skip("it may take cuDNN's kernel, whose backward pass fails here")
    found = passed(few(family, DEVICE, "bfloat16", **given), lengths)
    right = passed(few(family, "cpu", "float32"), lengths)
    for a, b in zip(found, right, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() < 0.05 * b.norm()


@pytest.fixture(scope="module")
def flux() -> Iterator[tuple[FlowModel, Conditioning]]:
    """FLUX.1-dev's layers at full size, one of each kind, with a prompt."""
    one = {"num_layers": 1, "num_single_layers": 1}
    a = full_size.replace(full_size.FLUX_DEV, config=full_size.FLUX_DEV.config | one)
    device = torch.device("cuda")
    model = full_size.build(a, device, torch.bfloat16, 720, 720, compile=False)
    model.prepare_training(0)
    yield model, full_size.prompts(a, device, torch.bfloat16, 1)
    torch.cuda.empty_cache()


def gradients(model: FlowModel, prompts: Conditioning) -> Tensor:
    """Of all adapters, after one pass at 720 pixels."""
    parameters = [p for p in model.transformer.parameters() if p.requires_grad]
    x = torch.randn(1, *model.image_shape, generator=torch.manual_seed(0)).to(model.device)
    model.velocity(x, 0.7, prompts).float().square().mean().backward()
    found = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    model.transformer.zero_grad()
    return found


@on_cuda_alone
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_full_size_flux_blocks_are_finite_and_the_same_bits_twice(
    checkpointing: bool, flux: tuple[FlowModel, Conditioning]
) -> None:
    model, prompts = flux
    if checkpointing:
        model.enable_gradient_checkpointing()
    attention.check_attention(model, prompts)
    with attention.repeatable(model.device):
        one, other = (gradients(model, prompts) for _ in range(2))
    assert one.isfinite().all()
    assert one.norm() > 0
    assert torch.equal(one, other)


@on_cuda_alone
def test_attention_that_cannot_run_is_told() -> None:
    model = few("flux", "cuda", "float32", attention_backend="_native_flash")
    with pytest.raises(UserError, match=r"_native_flash: attention is wrong on .*set it to auto"):
        attention.check_attention(model, conditioning(model, (7,)))


# -- training ---------------------------------------------------------------------------------


def toy(embeddings: Embeddings, name: str = "egrpo", **more: Any) -> Trainer:
    return trainer_for(embeddings, name, **{"model.device": DEVICE, **more})


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().float().cpu().flatten() for p in trainer.parameters])


FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model.dtype": "bfloat16"},
    "bfloat16 compiled": {"model.dtype": "bfloat16", "model.compile": True},
    "graphs": {"model.cuda_graphs": True},
    "checkpointing": {"model.dtype": "bfloat16", "train.gradient_checkpointing": True},
    "float8": {"model.dtype": "bfloat16", "model.fp8_sampling": True, "model.compile": True},
    "unmerged": {"model.dtype": "bfloat16", "model.merge_lora_for_sampling": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_ratios_are_one_and_a_killed_training_ends_with_the_same_bits(
    form: str, embeddings: Embeddings
) -> None:
    """Four iterations, against two, a new process's trainer, and two more."""
    of = {"model.compile": False, **FORMS[form]}
    if of.get("model.fp8_sampling"):
        pytest.importorskip("torchao")
    straight, killed = toy(embeddings, **of), toy(embeddings, **of)
    for _ in range(4):
        metrics, _ = straight.step()
        assert metrics["on_policy_ratio_deviation"] == 0.0
    for _ in range(2):
        killed.step()
    checkpoint = killed.checkpoint()
    again = toy(embeddings, **of)
    again.restore(checkpoint)
    for _ in range(2):
        again.step()
    assert torch.equal(weights(again), weights(straight))


@pytest.mark.parametrize("name", ["flow_grpo", "mixgrpo", "branchgrpo", "diffusion_nft", "awm"])
def test_two_trainings_of_other_methods_end_with_the_same_bits(
    name: str, embeddings: Embeddings
) -> None:
    of = {"model.dtype": "bfloat16", "train.deterministic": True, "model.compile": False}
    found = []
    for _ in range(2):
        trainer = toy(embeddings, **{"method.name": name, **of})
        for _ in range(2):
            metrics, _ = trainer.step()
            assert metrics["on_policy_ratio_deviation"] == 0.0
        found.append(weights(trainer))
    assert torch.equal(*found)


def test_padding_changes_no_image(embeddings: Embeddings) -> None:
    found = []
    for compiled in (True, False):
        model = toy(embeddings, **{"model.compile": compiled}).model
        x = torch.randn(3, *model.image_shape, generator=torch.manual_seed(0)).to(model.device)
        prompts = load_conditioning(embeddings["train"])[1].batch([0, 1, 2], model.device)
        with torch.no_grad(), model.sampling(batch=8) as network:
            found.append(model.velocity(x, 0.7, prompts, network))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_gradient_that_is_no_number_is_told(embeddings: Embeddings) -> None:
    trainer = toy(embeddings)
    rollout, ids, trees = sampled(trainer)
    with pytest.raises(UserError, match="the gradient of iteration 1 is"):
        trainer.learner.optimize(1, rollout, ids, trees, [float("inf")] * len(rollout.edges))


@on_cuda_alone
def test_memory_that_ends_is_told_with_what_to_set(embeddings: Embeddings) -> None:
    trainer = toy(embeddings)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**20) / total)
    try:
        told = pytest.raises(UserError, match=r"GPU's memory ran out while sampling.*micro_batch")
        with told, advice_where_memory_ends(trainer.run, "train"):
            trainer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# -- rewards ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["verifier", "verifier_exact", "preference", "jpeg"])
def test_rewards_on_the_card_are_those_on_the_cpu(name: str) -> None:
    run = small_run()
    pixels = torch.randint(0, 256, (6, 3, run.model.height, run.model.width), dtype=torch.uint8)
    prompts = ["a small red circle on the left"] * 6
    near, far = (load_reward(run.rewards[name], device) for device in ("cpu", DEVICE))
    one, other = (reward.score(pixels, prompts) for reward in (near, far))
    assert torch.allclose(torch.as_tensor(one), torch.as_tensor(other), rtol=1e-3, atol=1e-3)
