"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

from typing import Any

import gpu
import pytest
import torch
from torch.nn.attention import SDPBackend

from egrpo.errors import UserError
from egrpo.models import attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


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


def flux(**more: Any) -> Any:
    """FLUX.1-dev's layers at full size, one of each kind, with prompts."""
    one = {"num_layers": 1, "num_single_layers": 1}
    few = gpu.replace(gpu.FLUX_DEV, config=gpu.FLUX_DEV.config | one)
    bench = gpu.Bench(torch.device("cuda"), torch.bfloat16, 1)
    model = gpu.build(few, bench, 720, 720, **more)
    return model, gpu.prompts(few, bench, 1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_full_size_flux_blocks_are_finite(checkpointing: bool) -> None:
    model, prompts = flux()
    parameters = model.prepare_training(0)
    if checkpointing:
        model.enable_gradient_checkpointing()
    attention.check_attention(model, prompts)
    x = torch.randn(1, *model.image_shape, device="cuda", dtype=torch.bfloat16)
    model.velocity(x, 0.7, prompts).float().square().mean().backward()
    norms = torch.stack([p.grad.float().norm() for p in parameters if p.grad is not None])
    assert norms.isfinite().all()
    assert (norms > 0).any()


def test_attention_that_cannot_run_is_told() -> None:
    model, prompts = flux(attention_backend="_native_flash", dtype="float32")
    model.transformer.float()  # flash takes 16 bit alone
    model.dtype = torch.float32
    with pytest.raises(UserError, match=r"_native_flash: attention is wrong on .*set it to auto"):
        attention.check_attention(model, prompts)
