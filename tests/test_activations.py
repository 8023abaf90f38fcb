"""What is kept and alive in blocks of full width, counted on meta tensors, against the estimate."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import full_size
import pytest
import torch
from full_size import FLUX_DEV, SD35_MEDIUM, Architecture
from test_memory import META, part_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from egrpo.models import trainable
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Conditioning
from egrpo.models.families import FAMILIES
from egrpo.ops.activations import Activations


class Fused(torch.autograd.Function):
    """RMS norm in one kernel, as on CUDA: keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return torch.empty_like(gradients[0]), None


class Alive(TorchDispatchMode):
    """Bytes of the tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone(_: Any) -> None:
            del self.known[key]
            self.now -= size

        self.known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on meta tensors as CUDA has them."""

    def flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **more: Any) -> Tensor:
        scale = more.get("scale")
        found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return found[0]

    names = torch.nn.functional
    monkeypatch.setattr(names, "scaled_dot_product_attention", flash)
    monkeypatch.setattr(names, "rms_norm", lambda x, shape, w=None, eps=None: Fused.apply(x, w))
    monkeypatch.setattr(trainable, "normal", lambda shape, *_: torch.zeros(shape, device=META))


QWEN = {"patch_size": 2, "in_channels": 64, "out_channels": 16, "attention_head_dim": 128}
QWEN |= {"num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56)}
Z = {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 3840}
Z |= {"n_refiner_layers": 1, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560}
Z |= {"axes_dims": [32, 48, 48], "axes_lens": [1024, 512, 512]}
OF_FULL_WIDTH = {
    "flux": (FLUX_DEV, {"num_layers": 2, "num_single_layers": 2}),
    "sd3": (SD35_MEDIUM, {"num_layers": 12, "dual_attention_layers": tuple(range(6))}),
    "qwen_image": (Architecture(FAMILIES["qwen_image"], QWEN, 512, 3584, 0), {"num_layers": 3}),
    "z_image": (Architecture(FAMILIES["z_image"], Z, 512, 2560, 0), {"n_layers": 3}),
}


def small(family: str, side: int) -> tuple[FlowModel, Conditioning, Activations]:
    a, config = OF_FULL_WIDTH[family]
    a = replace(a, config=a.config | config)
    more = {"merge_lora_for_sampling": False, "attention_backend": "native"}
    model = full_size.build(a, META, torch.bfloat16, side, side, **more)
    made: dict[str, Tensor] = {
        "embeds": torch.empty(1, a.text, a.width, device=META, dtype=torch.bfloat16)
    }
    if a.pooled:
        made["pooled"] = torch.empty(1, a.pooled, device=META, dtype=torch.bfloat16)
    else:
        made["lengths"] = torch.tensor([a.text])
    part = part_of(model.transformer)
    return model, Conditioning(made, {}), Activations(model.settings, part)


@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize("family", OF_FULL_WIDTH)
def test_what_blocks_keep_for_the_backward_pass(family, side, on_meta):
    model, prompt, activations = small(family, side)
    model.prepare_training(0)
    own = {t.untyped_storage()._cdata for t in model.transformer.state_dict().values()}
    saved: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    x = torch.empty(1, *model.image_shape, device=META)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        v = model.velocity(x, 0.7, prompt)
    found = sum(storage.nbytes() for storage in saved.values())
    assert activations.kept(2, checkpointing=False) == pytest.approx(found, rel=0.07)
    assert v.requires_grad


@pytest.mark.parametrize("side", [512, 720, 1024])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("family", OF_FULL_WIDTH)
def test_what_an_evaluation_needs(family, beside, side, on_meta):
    model, prompt, activations = small(family, side)
    if beside:
        model.prepare_training(0)
    alive, rows = Alive(), 4
    for tensor in model.transformer.state_dict().values():
        alive.see(tensor)
    before = alive.now
    prompts = prompt.rows(torch.zeros(rows, dtype=torch.int64, device=META))
    if "lengths" in prompts.tensors:
        prompts.tensors["lengths"] = prompt.tensors["lengths"].expand(rows)
    x = torch.empty(rows, *model.image_shape, device=META)
    with alive, torch.no_grad():
        model.velocity(x, 0.7, prompts)
    found = (alive.peak - before) / rows
    assert activations.working(2, beside=beside) == pytest.approx(found, rel=0.17)
