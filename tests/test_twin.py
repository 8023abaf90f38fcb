"""The twin that samples: cheaper, and near enough; what trains stays exact."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import trainer_for
from test_families import PROMPTS, family_trainer, loaded, sampled
from test_families import _folders as _folders  # their pipelines
from torch._dynamo.utils import counters

from egrpo.errors import UserError
from egrpo.models.twin import rounded
from egrpo.sampling import fit
from egrpo.train.trainer import Trainer

LOW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def velocities(trainer: Trainer, *, exact: bool) -> torch.Tensor:
    """[4, C, h, w] in float64, by the transformer or by what samples."""
    model = trainer.model
    x = torch.randn(4, *model.image_shape, generator=torch.manual_seed(3))
    prompts = trainer.conditioning.batch([0, 1, 2, 3], model.device)
    with torch.no_grad(), model.sampling(batch=4) as network:
        return model.velocity(x, 0.7, prompts, None if exact else network).double()


@pytest.mark.parametrize("dtype", LOW)
def test_rounding_is_right_in_the_mean_and_never_further_than_a_neighbor(dtype):
    generator = torch.manual_seed(0)
    value = torch.randn(64, generator=generator)
    many = value.repeat(20_000, 1)
    low = rounded(many, dtype, generator).double()
    gap = torch.finfo(dtype).eps * value.double().abs()
    assert ((low - value).abs() <= gap).all()
    assert len(low[:, 0].unique()) == 2
    error = (low.mean(0) - value).abs() / (gap / 20_000**0.5)
    assert error.max() < 3  # a rounding's std is half a gap at most
    assert torch.equal(rounded(low.float()[0], dtype, generator).double(), low[0])


def moved(trainer: Trainer, size: float) -> None:
    """An update as training makes it: the second factors leave zero."""
    generator = torch.manual_seed(1)
    for _, layer in trainer.model.lora_layers():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(size * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("size", [1e-4, 1e-3])
def test_small_updates_are_not_lost_in_16_bit(size, embeddings):
    """Merged weights hold all of an update, in the mean; rounded to the nearest they do not."""
    for dtype in ("float32", "bfloat16"):
        trainer = trainer_for(embeddings, **{"model.dtype": dtype})
        moved(trainer, size)
        velocities(trainer, exact=False)  # makes the twin, and merges
        twin = trainer.model.twin
        assert twin is not None
        layers = [(layer.get_base_layer().weight, layer, mine) for layer, mine in twin.adapted]
        parts = [(b, layer.get_delta_weight("default"), mine.weight) for b, layer, mine in layers]
        update = torch.cat([(w.double() - b.double()).flatten() for b, _, w in parts])
        true = torch.cat([d.flatten().double() for _, d, _ in parts])
        slope = float(update @ true / (true @ true))
        assert slope == pytest.approx(1.0, abs=1e-5 if dtype == "float32" else 0.1)
    nearest = torch.cat(
        [((b.float() + d).bfloat16().double() - b.double()).flatten() for b, d, _ in parts]
    )
    assert float(nearest @ true / (true @ true)) < 0.9


@pytest.mark.slow
def test_compiled_for_real_the_ratio_is_one_and_nothing_is_compiled_twice():
    of = {"model.compile": True, "train.micro_batch": 8}
    trainer = family_trainer("flux", **of)
    plain = family_trainer("flux", **{**of, "model.compile": False})
    counters.clear()
    rollout, ids, trees = sampled(trainer)
    twin = trainer.model.twin
    assert twin is not None
    assert twin.compiled
    assert 0 < len(twin.seen) <= 2
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    values = [(-1.0) ** e for e in range(len(rollout.edges))]
    metrics = trainer.learner.optimize(1, rollout, ids, trees, values)
    assert metrics["on_policy_ratio_deviation"] == 0.0
    sampled(trainer)
    assert counters["stats"]["unique_graphs"] == compiled
    same, _, _ = sampled(plain)
    torch.testing.assert_close(rollout.leaves, same.leaves, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_padding_changes_no_image():
    models = [loaded("sd3", compile=compiled) for compiled in (True, False)]
    prompts = models[0].encode(PROMPTS[:3], negative=False).batch([0, 1, 2], models[0].device)
    x = torch.randn(3, *models[0].image_shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        found = []
        for model in models:
            with model.sampling(batch=8) as network:
                found.append(model.velocity(x, 0.7, prompts, network))
    assert {shape[0] for shape in models[0].twin.seen} == {8}  # type: ignore[union-attr]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


# -- the batch that fits ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("each", "loaded", "side", "latents"),
    [(2.0, 40.0, 90, 16), (0.5, 10.0, 90, 32), (0.001, 1.0, 16, 1024), (200.0, 1.0, 90, 1)],
)
def test_auto_takes_what_fits_and_no_more_than_fills_the_card(
    each, loaded, side, latents, monkeypatch, capsys
):
    """A card of 100 GiB, with GiB of each latent and of what is loaded; 2 x 2 latents a token."""
    card = SimpleNamespace(total_memory=100 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: card)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: loaded * 2**30)
    monkeypatch.setattr(fit, "_peak", lambda _, __, rows: (3 + rows * each) * 2**30)
    model: Any = SimpleNamespace(
        device=torch.device("cuda"),
        image_shape=(16, side, side),
        latents=SimpleNamespace(patch=2),
        sampling=nullcontext,
        fits=None,
    )
    conditioning: Any = None
    assert fit.batch_of(model, conditioning, "auto") == latents
    assert f"micro_batch: auto: {latents} latents" in capsys.readouterr().err
    assert fit.batch_of(model, conditioning, "auto") == latents  # measured once
    assert capsys.readouterr().err == ""
    assert fit.batch_of(model, conditioning, 7) == 7


def test_auto_is_chosen_before_a_state_is_restored(embeddings, monkeypatch):
    """What a checkpoint brings to the card must not change the batches of what follows."""
    asked: list[int] = []
    monkeypatch.setattr(fit, "largest_batch", lambda *_: asked.append(1) or 12)
    trainer = trainer_for(embeddings)
    assert trainer.run.train.micro_batch == "auto"
    assert asked == [1]
    sampled(trainer)
    trainer.monitor.look(0)
    assert asked == [1]


FP8 = {"model.dtype": "bfloat16", "model.fp8_sampling": True}


@pytest.mark.parametrize("merge", [True, False])
def test_float8_is_near_and_follows_the_adapter(merge, embeddings):
    pytest.importorskip("torchao")
    trainer = trainer_for(embeddings, **FP8, **{"model.merge_lora_for_sampling": merge})
    before = [velocities(trainer, exact=exact) for exact in (True, False)]
    assert 0 < (before[0] - before[1]).norm() < 0.2 * before[0].norm()
    moved(trainer, 0.05)
    after = [velocities(trainer, exact=exact) for exact in (True, False)]
    one, other = (a - b for a, b in zip(after, before, strict=True))
    cosine = float((one * other).sum() / (one.norm() * other.norm()))
    assert cosine > 0.5
    rollout, ids, trees = sampled(trainer)
    values = [(-1.0) ** e for e in range(len(rollout.edges))]
    metrics = trainer.learner.optimize(1, rollout, ids, trees, values)
    assert metrics["on_policy_ratio_deviation"] == 0.0


def test_float8_needs_bfloat16_without_float8_storage(embeddings):
    with pytest.raises(UserError, match="fp8_sampling: needs dtype: bfloat16"):
        trainer_for(embeddings, **{"model.fp8_sampling": True})
