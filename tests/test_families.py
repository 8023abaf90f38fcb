"""Every model family against its stock pipeline, on tiny pipelines with all components."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import small_run
from PIL import Image
from torch import Tensor

from egrpo.config.models import Model, RunConfig, Schedule
from egrpo.config.prompts import Prompt
from egrpo.config.trees import evaluation_sigmas, training_sigmas
from egrpo.core.executor import execute
from egrpo.core.methods import chains
from egrpo.core.schedule import Sigmas, shifted_sigmas
from egrpo.errors import UserError
from egrpo.models import load_model
from egrpo.models.base import ADAPTER_FILE, FlowModel
from egrpo.models.packing import packed, token_positions, unpacked
from egrpo.stages.loading import loading
from egrpo.stages.train import Trainer

FAMILIES = list(tiny_models.FAMILIES)
PROMPTS = [
    Prompt("a red fox in the snow, at dawn", "blurry"),
    Prompt("cat"),
    Prompt("", "a long negative prompt, much longer than the prompt itself"),
    Prompt("狐狸 in 雪 — ünïcode"),
    Prompt("very long " * 60),
]
STEPS = 3
HEIGHT, WIDTH = 16, 24  # not square
GUIDANCE = {"sd3": 1.0, "flux": 1.0, "qwen_image": 3.0, "z_image": 3.0}
"""What each family is usually sampled with; CFG where it is no distilled model."""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: tiny_models.save(name, root / name) for name in FAMILIES}


def settings(path: Path, family: str, **more: Any) -> Model:
    lora = {"rank": 4, "alpha": 8}
    given = {"height": HEIGHT, "width": WIDTH, "dtype": "float32", "device": "cpu", "lora": lora}
    return Model.model_validate({"family": family, "path": str(path), **given, **more})


def stock(path: Path, family: str) -> Any:
    import diffusers

    from egrpo.models.families import FAMILIES as ADAPTERS

    pipe = getattr(diffusers, ADAPTERS[family].pipeline).from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def grid(family: str) -> Sigmas:
    """The grid that the stock pipeline makes of uniform sigmas at this size."""
    tokens = (HEIGHT // 4) * (WIDTH // 4)  # these VAEs halve once, patches once
    if family in ("sd3", "z_image"):
        return shifted_sigmas(STEPS, 3.0)
    most, at, terminal = (1.15, 4096, None) if family == "flux" else (0.9, 8192, 0.02)
    mu = 0.5 + (most - 0.5) * (tokens - 256) / (at - 256)
    return shifted_sigmas(STEPS, float(torch.tensor(mu).exp()), terminal)


def ours(model: FlowModel, noise: Tensor, prompts: list[Prompt], sigmas: Sigmas) -> Tensor:
    """Images uint8 of a plain ODE from ``noise`` [n, C, h, w]."""
    guided = model.settings.guidance_scale > 1
    conditioning = model.encode(prompts, negative=guided).batch(range(len(prompts)), model.device)
    rollout = execute(
        [chains(len(sigmas) - 1, 1)] * len(prompts),
        sigmas,
        lambda x, sigma, tree: model.velocity(x, sigma, conditioning.rows(tree)),
        lambda tree, start, sample: noise[tree],
        noise_level=0.0,
        micro_batch=8,
        dtype=torch.float32,
        device="cpu",
    )
    return model.decode(rollout.leaves, 2).pixels


def theirs(pipe: Any, family: str, noise: Tensor, prompt: Prompt, guidance: float) -> Tensor:
    """The stock pipeline's image of one prompt from the same noise, uint8 [1, 3, h, w]."""
    uniform = [1.0 - i / STEPS for i in range(STEPS)]
    call: dict[str, Any] = {
        "prompt": prompt.text,
        "negative_prompt": prompt.negative or "",
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "sigmas": uniform,
        "latents": noise,
        "output_type": "pt",
    }
    if family == "sd3":
        call["guidance_scale"] = guidance
    elif family == "flux":
        call |= {"guidance_scale": 3.5, "true_cfg_scale": guidance, "latents": packed(noise)}
    elif family == "qwen_image":
        call |= {"true_cfg_scale": guidance, "latents": packed(noise)}
    else:
        call["guidance_scale"] = guidance - 1.0  # Z-Image counts from 0
    return (pipe(**call).images * 255).round().to(torch.uint8)


@pytest.mark.parametrize("guidance", ["none", "usual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ode_equals_the_stock_pipeline(
    folders: dict[str, Path], family: str, guidance: str
) -> None:
    scale = {"none": 1.0, "usual": max(GUIDANCE[family], 2.5)}[guidance]
    model = load_model(settings(folders[family], family, guidance_scale=scale))
    pipe = stock(folders[family], family)
    noise = torch.randn(len(PROMPTS), *model.image_shape, generator=torch.manual_seed(3))
    images = ours(model, noise, PROMPTS, grid(family))
    expected = torch.cat(
        [theirs(pipe, family, noise[[i]], p, scale) for i, p in enumerate(PROMPTS)]
    )
    assert images.shape == (len(PROMPTS), 3, HEIGHT, WIDTH)
    assert images.float().std() > 5  # there is something to compare
    difference = (images.int() - expected.int()).abs()
    assert difference.max() <= 1, difference.amax((1, 2, 3))


def test_packing_is_fluxs_own() -> None:
    from diffusers import FluxPipeline

    x = torch.randn(2, 4, 6, 10)
    tokens = packed(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 4, 6, 10))
    assert torch.equal(unpacked(tokens, 6, 10), x)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(token_positions(6, 10, torch.device("cpu")), ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_conditioning_equals_fresh_encoding(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    from egrpo.models.conditioning import load_conditioning, save_conditioning

    model = load_model(settings(folders[family], family, guidance_scale=2.0))
    made = model.encode(PROMPTS, negative=True)
    save_conditioning(tmp_path / "e.safetensors", {"train": (PROMPTS, made)})
    texts, cached = load_conditioning(tmp_path / "e.safetensors", "train")
    assert texts == [p.text for p in PROMPTS]
    for i in (1, 0):  # a short one alone is not padded to the longest of the file
        fresh = model.encode([PROMPTS[i]], negative=True)
        batch = cached.batch([i], model.device)
        for group in ("tensors", "negative"):
            stored, new = getattr(batch, group), getattr(fresh, group)
            assert stored.keys() == new.keys()
            for name in new:
                assert torch.equal(stored[name], new[name]), (group, name)


def family_run(folder: Path, family: str, **more: Any) -> RunConfig:
    overrides = {
        "model.family": family,
        "model.path": str(folder),
        "model.height": 16,
        "model.width": 16,
        "model.max_sequence_length": None,
        "model.lora.rank": 4,
        "train.rewards": {"jpeg": 1.0},
        "train.learning_rate_lora": 3e-3,
        **more,
    }
    return small_run("egrpo", **overrides)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_the_loss_and_its_adapter_loads_in_stock_diffusers(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    from egrpo.stages.embed import embed

    guidance = GUIDANCE[family]
    run = family_run(folders[family], family, **{"model.guidance_scale": guidance})
    embed(run, tmp_path / "e.safetensors")
    trainer = Trainer(run, _plan(run), tmp_path / "e.safetensors")
    ids, trees = trainer.trees(1)
    rollout = trainer.rollout(1, ids, trees)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(rollout.edges), generator=generator).tolist()
    losses = [_loss(trainer, rollout, ids, trees, values)]
    assert losses[0][1] == 0.0  # every ratio is exactly 1
    trainer.model.save(tmp_path / "before")
    _step(trainer, rollout, ids, trees, values)
    losses.append(_loss(trainer, rollout, ids, trees, values))
    assert losses[1][0] < losses[0][0]
    trainer.model.save(tmp_path / "adapter")

    trained = load_model(trainer.run.model.model_copy(update={"height": HEIGHT, "width": WIDTH}))
    noise = torch.randn(2, *trained.image_shape, generator=torch.manual_seed(4))
    base = ours(trained, noise, PROMPTS[:2], grid(family))
    trained.load(tmp_path / "adapter")
    images = ours(trained, noise, PROMPTS[:2], grid(family))
    assert not torch.equal(images, base)
    pipe = stock(folders[family], family)
    pipe.load_lora_weights(tmp_path / "adapter")
    expected = torch.cat(
        [theirs(pipe, family, noise[[i]], p, guidance) for i, p in enumerate(PROMPTS[:2])]
    )
    assert (images.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("family", "tuning"), [*((family, "lora") for family in FAMILIES), ("flux", "full")]
)
def test_the_snippet_of_a_model_card_draws_what_we_draw(
    folders: dict[str, Path],
    tmp_path: Path,
    family: str,
    tuning: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python for stock diffusers alone, with the run's own grid, guidance, size and weights."""
    # one mu at all sizes: these VAEs halve once, so that a token is smaller than a real model's
    dynamic = {"shift": "dynamic", "base_shift": 0.8, "max_shift": 0.8}
    grids = {"flux": dynamic, "qwen_image": {**dynamic, "terminal": 0.02}}
    run = family_run(
        folders[family],
        family,
        **{
            "model.guidance_scale": GUIDANCE[family],
            "model.tuning": tuning,
            "model.dtype": "float32",
            "evaluate.steps": STEPS,
            "evaluate.height": HEIGHT,
            "evaluate.width": WIDTH,
            **{f"schedule.{k}": v for k, v in grids.get(family, {"shift": 2.0}).items()},
        },
    )
    model = load_model(run.evaluation_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.prepare_training(0):
            weights.add_(0.05 * torch.randn(weights.shape, generator=generator))
    model.save(tmp_path / ("transformer" if tuning == "full" else ""))
    trained, base = load_model(run.evaluation_model), load_model(run.evaluation_model)
    trained.load(tmp_path / ("transformer" if tuning == "full" else ""))
    noise = torch.randn(1, *base.image_shape, generator=torch.manual_seed(4))
    prompt = Prompt(PROMPTS[0].text)
    images, untrained = (
        ours(m, noise, [prompt], evaluation_sigmas(run))[0].permute(1, 2, 0).int().numpy()
        for m in (trained, base)
    )
    assert abs(images - untrained).max() > 8
    (tmp_path / folders[family].name).symlink_to(folders[family])
    monkeypatch.chdir(tmp_path)
    seeded = "generator=torch.Generator().manual_seed(0)"
    code = loading(run, None, prompt.text)
    assert seeded in code
    latents = packed(noise) if family in ("flux", "qwen_image") else noise
    exec(code.replace(seeded, "latents=latents"), {"latents": latents})
    assert abs(np.asarray(Image.open("image.png"), int) - images).max() <= 1


def _plan(run: RunConfig) -> Any:
    from egrpo.config.trees import closed_form_plan

    return closed_form_plan(run)


class Chosen:
    """Advantages that a test chose."""

    def __init__(self, values: list[float]) -> None:
        self.values = values


def _step(trainer: Trainer, rollout: Any, ids: Any, trees: Any, values: list[float]) -> None:
    trainer.optimise(rollout, ids, trees, Chosen(values))


def _loss(
    trainer: Trainer, rollout: Any, ids: Any, trees: Any, values: list[float]
) -> tuple[float, float]:
    """The unclipped surrogate -mean(A * ratio), and the largest deviation of a ratio from 1."""
    prompts = trainer.conditioning.batch(ids, trainer.model.device)
    total, worst = 0.0, 0.0
    with torch.no_grad():
        for batch in rollout.batches:
            v = trainer.model.velocity(
                batch.x, trainer.sigmas[batch.start], prompts.rows(batch.tree)
            )
            log_ratio = batch.log_ratio(v, trainer.sigmas, trainer.run.method.noise_level)
            advantage = torch.tensor([values[e] for e in batch.edges])
            total -= float((advantage * log_ratio.exp()).sum())
            worst = max(worst, float((log_ratio.exp() - 1).abs().max()))
    return total / len(values), worst


def test_dynamic_shift_follows_the_size() -> None:
    s = Schedule(shift="dynamic")
    assert s.shift_at(1024, 1024) == pytest.approx(float(torch.tensor(1.15).exp()))
    assert s.shift_at(256, 256) == pytest.approx(float(torch.tensor(0.5).exp()))
    run = small_run(
        "egrpo", **{"schedule.shift": "dynamic", "model.height": 1024, "model.width": 512}
    )
    shift = s.shift_at(1024, 512)
    assert training_sigmas(run) == shifted_sigmas(run.method.steps, shift)
    assert Schedule().shift_at(1024, 1024) == 3.0


@pytest.mark.parametrize("steps", [4, 16, 50])
def test_terminal_is_diffusers_own(steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=0.8)
    grid = shifted_sigmas(steps, float(torch.tensor(0.8, dtype=torch.float64).exp()), 0.02)
    assert list(grid) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="terminal"):
        shifted_sigmas(1, 3.0, 0.02)


# -- bad input -------------------------------------------------------------------------------


def refused(match: str, model: Model) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


def test_weights_of_another_family(folders: dict[str, Path]) -> None:
    refused(
        "model.family: flux has a FluxTransformer2DModel, but", settings(folders["sd3"], "flux")
    )


def test_half_a_download(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folders["flux"], broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused("cannot be loaded", settings(broken, "flux"))
    state = load_file(folders["flux"] / "transformer" / weights.name)
    del state["x_embedder.weight"]
    save_file(state, weights)
    refused("x_embedder.weight", settings(broken, "flux"))
    weights.unlink()
    refused("model.path: .*transformer: cannot be loaded", settings(broken, "flux"))


def test_hub_id_with_its_revision_and_with_a_wrong_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A hub id whose files lie in the cache; a revision that is not there is one line."""
    right, wrong = "a" * 40, "b" * 40
    cache = tmp_path / "hub/models--someone--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(right)
    (cache / "snapshots" / right).symlink_to(folders["sd3"], target_is_directory=True)
    code = (
        "import sys\n"
        "from egrpo.config.models import Model\n"
        "from egrpo.models import load_model\n"
        "given = {'family': 'sd3', 'path': 'someone/tiny', 'device': 'cpu'}\n"
        "load_model(Model.model_validate({**given, 'revision': sys.argv[1]}))\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for revision, fine in ((right, True), (wrong, False)):
        done = subprocess.run(
            [sys.executable, "-c", code, revision], env=env, capture_output=True, text=True
        )
        assert (done.returncode == 0) == fine, done.stderr
        if not fine:
            assert (
                "UserError: model.path: someone/tiny/transformer: cannot be loaded" in done.stderr
            )


def test_size_that_does_not_divide(folders: dict[str, Path]) -> None:
    model = load_model(settings(folders["flux"], "flux", height=18))
    with pytest.raises(UserError, match=r"model.height: 18 is not a multiple of 4"):
        _ = model.image_shape


def test_adapter_of_another_rank_or_family(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(settings(folders["flux"], "flux"))
    model.prepare_training(0)
    model.save(tmp_path)
    other = load_model(settings(folders["flux"], "flux", lora={"rank": 8, "alpha": 8}))
    with pytest.raises(UserError, match=r"rank 4, but model.lora.rank is 8"):
        other.load(tmp_path)
    with pytest.raises(UserError, match=r"does not fit|cannot be loaded"):
        load_model(settings(folders["sd3"], "sd3")).load(tmp_path)
    (tmp_path / ADAPTER_FILE).write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(settings(folders["flux"], "flux")).load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    from egrpo.stages.embed import embed

    after = []
    for checkpointing in (False, True):
        run = family_run(folders[family], family, **{"train.gradient_checkpointing": checkpointing})
        if not checkpointing:
            embed(run, tmp_path / "e.safetensors")
        trainer = Trainer(run, _plan(run), tmp_path / "e.safetensors")
        assert trainer.model.transformer.is_gradient_checkpointing is checkpointing
        ids, trees = trainer.trees(1)
        rollout = trainer.rollout(1, ids, trees)
        _step(trainer, rollout, ids, trees, [(-1.0) ** e for e in range(len(rollout.edges))])
        after.append(torch.cat([p.detach().flatten() for p in trainer.parameters]))
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_compile_is_asked_of_every_repeated_block(
    folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling takes a minute and a compiler; here it is only seen to be asked for."""
    asked: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: asked.append(type(self).__name__))
    load_model(settings(folders[family], family))
    assert asked == []
    model = load_model(settings(folders[family], family, compile=True))
    assert set(asked) == set(model.transformer._no_split_modules) & set(asked)
    assert len(asked) >= 2
    blocks = len(asked)
    model.settings = model.settings.model_copy(update={"merge_lora_for_sampling": True})
    model.prepare_training(0)
    assert len(asked) == 2 * blocks  # the copy for sampling too


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_near(folders: dict[str, Path], family: str, dtype: str) -> None:
    whole = load_model(settings(folders[family], family))
    half = load_model(settings(folders[family], family, dtype=dtype))
    assert {p.dtype for p in half.transformer.parameters()} == {getattr(torch, dtype)}
    prompts = whole.encode(PROMPTS[:2], negative=False).batch([0, 1], whole.device)
    x = torch.randn(2, *whole.image_shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        exact, near = (m.velocity(x, 0.7, prompts).float() for m in (whole, half))
        images = half.decode(x, 2).pixels
    assert 0 < (exact - near).norm() < 0.05 * exact.norm()
    assert images.dtype == torch.uint8


@pytest.mark.parametrize("family", FAMILIES)
def test_native_attention_is_the_default(folders: dict[str, Path], family: str) -> None:
    plain = load_model(settings(folders[family], family))
    named = load_model(settings(folders[family], family, attention_backend="native"))
    prompts = plain.encode(PROMPTS[:2], negative=False).batch([0, 1], plain.device)
    x = torch.randn(2, *plain.image_shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain.velocity(x, 0.5, prompts), named.velocity(x, 0.5, prompts))


def test_unknown_attention_backend(folders: dict[str, Path]) -> None:
    refused(
        "model.attention_backend: nonsense",
        settings(folders["flux"], "flux", attention_backend="nonsense"),
    )


# -- cheaper or smaller -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_vae_slicing_changes_nothing(folders: dict[str, Path], family: str) -> None:
    plain = load_model(settings(folders[family], family))
    sliced = load_model(settings(folders[family], family, vae_slicing=True, vae_tiling=True))
    z = torch.randn(3, *plain.image_shape, generator=torch.manual_seed(0))
    whole, parts = (model.decode(z, 3).pixels.int() for model in (plain, sliced))  # one tile
    assert int((whole - parts).abs().max()) <= 1  # other batches round otherwise


@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_weights_are_near(folders: dict[str, Path], family: str) -> None:
    plain = load_model(settings(folders[family], family))
    small = load_model(settings(folders[family], family, fp8_weights=True))
    stored = {p.dtype for p in small.transformer.parameters()}
    assert torch.float8_e4m3fn in stored
    prompts = plain.encode(PROMPTS[:2], negative=False).batch([0, 1], plain.device)
    x = torch.randn(2, *plain.image_shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        exact, near = (m.velocity(x, 0.7, prompts) for m in (plain, small))
    assert not torch.equal(exact, near)
    assert (exact - near).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image"])
def test_feature_cache_spares_the_blocks_and_leaves_training_exact(
    folders: dict[str, Path], tmp_path: Path, family: str
) -> None:
    from egrpo.stages.embed import embed

    def trainer(**more: Any) -> Trainer:
        run = family_run(folders[family], family, **more)
        if not (tmp_path / "e.safetensors").exists():
            embed(run, tmp_path / "e.safetensors")
        return Trainer(run, _plan(run), tmp_path / "e.safetensors")

    merged = {"model.merge_lora_for_sampling": False}
    exact, kept = trainer(**merged), trainer(**merged, **{"model.feature_cache": {"interval": 2}})
    assert kept.model.sampler is not None
    twin = dict(kept.model.sampler.named_parameters())
    assert all(twin[name] is p for name, p in kept.model.transformer.named_parameters())
    calls = {"network": 0, "block": 0}
    kept.model.sampler.register_forward_pre_hook(
        lambda *_: calls.__setitem__("network", calls["network"] + 1)
    )
    block = next(
        m
        for m in kept.model.sampler.modules()
        if type(m).__name__ in kept.model.transformer._no_split_modules
    )
    inside = next(iter(block.children()))  # called whenever the block really runs
    inside.register_forward_pre_hook(lambda *_: calls.__setitem__("block", calls["block"] + 1))
    rollout = kept.rollout(1, *kept.trees(1))
    assert 0 < calls["block"] < calls["network"]
    plain = exact.rollout(1, *exact.trees(1))
    for mine, reference in zip(rollout.batches, plain.batches, strict=True):
        assert mine.start == reference.start
    first = rollout.batches[0], plain.batches[0]
    assert torch.equal(first[0].v, first[1].v)
    assert torch.equal(first[0].log_prob, first[1].log_prob)
    difference = (rollout.leaves - plain.leaves).norm() / plain.leaves.norm()
    assert 0 < difference < 0.5
    assert kept.model.features is not None
    assert kept.model.features.now == set()  # nothing is kept between rollouts
    values = [(-1.0) ** e for e in range(len(rollout.edges))]
    metrics = kept.optimise(rollout, *kept.trees(1), Chosen(values))  # type: ignore[arg-type]
    assert metrics["on_policy_ratio_deviation"] == 0.0


def test_feature_cache_is_refused_where_diffusers_has_none() -> None:
    with pytest.raises(ValueError, match="feature_cache: diffusers offers none for z_image"):
        settings(Path("x"), "z_image", feature_cache={})
