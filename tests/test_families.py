"""Every model family against its stock pipeline, on tiny pipelines with all components."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from conftest import embedded, sampled, small_run, velocity_at
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters

from egrpo.bundle.loading import loading
from egrpo.config.models import OWN_GRID, Model, RunConfig, Schedule
from egrpo.config.prompts import Prompt
from egrpo.core.executor import Executor
from egrpo.core.rollout import Rollout
from egrpo.core.schedule import Sigmas, shifted_sigmas, stock_end
from egrpo.errors import UserError
from egrpo.methods.shapes import chains
from egrpo.models import attention, load_model
from egrpo.models.adapter import ADAPTER_FILE, CONFIG, read_adapter
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Embeddings, load_conditioning, save_conditioning
from egrpo.models.families import FAMILIES as ADAPTERS
from egrpo.models.families import packed, token_positions
from egrpo.models.latents import size_problems
from egrpo.ops import timing
from egrpo.planning.grids import evaluation_sigmas, training_sigmas
from egrpo.planning.trees import closed_form_plan
from egrpo.train.trainer import Trainer

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


FOLDERS: dict[str, Path] = {}
"""The pipeline of each family."""


@pytest.fixture(scope="session", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("families")
    FOLDERS.update({name: tiny_models.save(name, root / name) for name in FAMILIES})
    (root / "prompts.txt").write_text("a red fox\na small cat\na blue bird\na dog in the snow\n")


def settings(family: str, **more: Any) -> Model:
    path, lora = str(FOLDERS.get(family, "x")), {"rank": 4, "alpha": 8}
    given = {"height": HEIGHT, "width": WIDTH, "dtype": "float32", "device": "cpu", "lora": lora}
    return Model.model_validate({"family": family, "path": path, **given, **more})


def loaded(family: str, **more: Any) -> FlowModel:
    return load_model(settings(family, **more))


def stock(family: str) -> Any:
    import diffusers

    pipe = getattr(diffusers, ADAPTERS[family].pipeline).from_pretrained(FOLDERS[family])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def grid(family: str) -> Sigmas:
    """The grid of the stock pipeline at this size."""
    tokens = (HEIGHT // 4) * (WIDTH // 4)  # these VAEs halve once, patches once
    if family == "sd3":
        return shifted_sigmas(STEPS, 3.0, end=stock_end(3.0, dynamic=False))
    if family == "z_image":
        return shifted_sigmas(STEPS, 3.0)
    most, at, terminal = (1.15, 4096, None) if family == "flux" else (0.9, 8192, 0.02)
    mu = 0.5 + (most - 0.5) * (tokens - 256) / (at - 256)
    return shifted_sigmas(STEPS, float(torch.tensor(mu).exp()), terminal)


def ours(model: FlowModel, noise: Tensor, prompts: list[Prompt], sigmas: Sigmas) -> Tensor:
    """Images uint8 of a plain ODE from ``noise`` [n, C, h, w]."""
    guided = model.settings.guidance_scale > 1
    conditioning = model.encode(prompts, negative=guided).batch(range(len(prompts)), model.device)
    forest = Executor(
        [chains(len(sigmas) - 1, 1)] * len(prompts),
        sigmas,
        lambda x, sigma, tree: model.velocity(x, sigma, conditioning.rows(tree)),
        lambda tree, start, sample: noise[tree],
        noise_level=0.0,
        micro_batch=8,
    )
    return model.decode(forest.rollout().leaves, 2).pixels


def theirs(pipe: Any, family: str, noise: Tensor, prompt: Prompt, guidance: float) -> Tensor:
    """The stock pipeline's image of one prompt from the same noise, uint8 [1, 3, h, w].

    Called as its users call it: with a number of steps, and no sigmas.
    """
    call: dict[str, Any] = {
        **{"prompt": prompt.text, "negative_prompt": prompt.negative},
        **{"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS},
        **{"latents": noise, "output_type": "pt"},
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


def same_as_stock(
    pipe: Any, family: str, images: Tensor, noise: Tensor, prompts: list[Prompt], scale: float
) -> None:
    """Whether the stock pipeline draws these images, but for rounding to 8 bits."""
    expected = [theirs(pipe, family, noise[[i]], p, scale) for i, p in enumerate(prompts)]
    difference = (images.int() - torch.cat(expected).int()).abs()
    assert difference.max() <= 1, difference.amax((1, 2, 3))


@pytest.mark.parametrize("guidance", ["none", "usual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ode_equals_the_stock_pipeline(family, guidance):
    scale = {"none": 1.0, "usual": max(GUIDANCE[family], 2.5)}[guidance]
    model = loaded(family, guidance_scale=scale)
    noise = torch.randn(len(PROMPTS), *model.image_shape, generator=torch.manual_seed(3))
    images = ours(model, noise, PROMPTS, grid(family))
    assert images.shape == (len(PROMPTS), 3, HEIGHT, WIDTH)
    assert images.float().std() > 5  # there is something to compare
    same_as_stock(stock(family), family, images, noise, PROMPTS, scale)


def test_positions_are_fluxs_own():
    from diffusers import FluxPipeline

    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    assert torch.equal(token_positions(6, 10, torch.device("cpu")), ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_conditioning_equals_fresh_encoding(tmp_path, family):
    model = loaded(family, guidance_scale=2.0)
    made = load_model(model.settings, text=True).encode(PROMPTS, negative=True)
    save_conditioning(tmp_path / "e.safetensors", PROMPTS, made)
    texts, cached = load_conditioning(tmp_path / "e.safetensors")
    assert texts == [p.text for p in PROMPTS]
    for i in (1, 0):  # a short one alone is not padded to the longest of the file
        fresh = model.encode([PROMPTS[i]], negative=True)
        batch = cached.batch([i], model.device)
        for group in ("tensors", "negative"):
            stored, new = getattr(batch, group), getattr(fresh, group)
            assert stored.keys() == new.keys()
            for name in new:
                assert torch.equal(stored[name], new[name]), (group, name)


def family_run(family: str, **more: Any) -> RunConfig:
    model = {"family": family, "path": str(FOLDERS[family]), "height": 16, "width": 16}
    model |= {"max_sequence_length": None, "lora.rank": 4}
    train = {"train.rewards": {"jpeg": 1.0}, "train.learning_rate_lora": 3e-3}
    few = str(FOLDERS[family].with_name("prompts.txt"))  # all of the toy's take minutes to encode
    train |= {"prompts.train": few, "prompts.heldout": few}
    return small_run("egrpo", **{f"model.{k}": v for k, v in model.items()}, **train, **more)


@cache
def family_embeddings(family: str, guidance: float) -> Embeddings:
    """Those that trainers of such runs read."""
    folder = FOLDERS[family].with_name(f"{family}-{guidance}")
    return embedded(family_run(family, **{"model.guidance_scale": guidance}), folder)


def family_trainer(family: str, **more: Any) -> Trainer:
    run = family_run(family, **more)
    embeddings = family_embeddings(family, run.model.guidance_scale)
    return Trainer(run, closed_form_plan(run), embeddings)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_the_loss_and_its_adapter_loads_in_stock_diffusers(tmp_path, family):
    guidance = GUIDANCE[family]
    given = {"model.guidance_scale": guidance}
    trainer = family_trainer(family, **given)
    rollout, ids, trees = sampled(trainer)
    values = torch.randn(len(rollout.edges), generator=torch.manual_seed(0)).tolist()
    before, deviation = loss_of(trainer, rollout, ids, values)
    assert deviation == 0.0  # every ratio is exactly 1
    again = family_trainer(family, **given, **{"train.gradient_checkpointing": True})
    for each in (trainer, again):
        assert each.model.transformer.is_gradient_checkpointing is (each is again)
        each.learner.optimize(1, rollout, ids, trees, values)
    torch.testing.assert_close(again.parameters, trainer.parameters, rtol=1e-4, atol=1e-6)
    assert loss_of(trainer, rollout, ids, values)[0] < before
    trainer.model.save(tmp_path / "adapter")

    trained = load_model(trainer.run.model.model_copy(update={"height": HEIGHT, "width": WIDTH}))
    noise = torch.randn(2, *trained.image_shape, generator=torch.manual_seed(4))
    base = ours(trained, noise, PROMPTS[:2], grid(family))
    trained.load(tmp_path / "adapter")
    images = ours(trained, noise, PROMPTS[:2], grid(family))
    assert not torch.equal(images, base)
    pipe = stock(family)
    pipe.load_lora_weights(tmp_path / "adapter")
    same_as_stock(pipe, family, images, noise, PROMPTS[:2], guidance)


@pytest.mark.parametrize("family", FAMILIES)
def test_measuring_gives_the_network_what_training_gives_it(monkeypatch, family):
    """Embeddings of the shape that encoding makes, and times of all that a rate holds."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    kept = {} if family == "z_image" else {"model.feature_cache": {"interval": 2}}
    run = family_run(family, **{"model.guidance_scale": GUIDANCE[family], **kept})
    encoded = load_model(run.model, text=True).encode(PROMPTS[:1], negative=False).tensors
    made = timing.random_prompt(load_model(run.model)).tensors
    assert made.keys() == encoded.keys()
    for name, tensor in encoded.items():
        free = name == "embeds" and "lengths" in encoded
        assert made[name].shape[free + 1 :] == tensor.shape[free + 1 :], name
    lines: list[str] = []
    rate = timing.measure_run(run, lines.append)
    assert rate.model.startswith(f"{family}-")
    assert min(rate.sampling_ms, rate.training_ms or 0, rate.decoding_ms or 0) > 0
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        *("loading", "sampling", "training", "decoding")
    ]


def loss_of(trainer: Trainer, rollout: Rollout, ids: list[int], values: list[float]) -> Any:
    """The unclipped surrogate -mean(A * ratio), and the largest deviation of a ratio from 1."""
    total, worst, level = 0.0, 0.0, trainer.run.method.noise_level
    for batch in rollout.batches:
        ratio = batch.log_ratio(velocity_at(trainer, ids, batch), trainer.sigmas, level).exp()
        total -= float((torch.tensor([values[e] for e in batch.edges]) * ratio).sum())
        worst = max(worst, float((ratio - 1).abs().max()))
    return total / len(values), worst


def with_metadata(folder: Path, untrained: Any) -> None:
    """diffusers, which reads peft's settings in the file's metadata."""
    untrained.load_lora_adapter(folder, weight_name=ADAPTER_FILE, prefix="transformer")


def without_metadata(folder: Path, untrained: Any) -> None:
    """diffusers before it knew the metadata: alpha is the rank."""
    untrained.load_lora_adapter(load_file(folder / ADAPTER_FILE), prefix="transformer")


def by_peft(folder: Path, untrained: Any) -> None:
    """peft, told the rank and the layers that the tensors have."""
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    state = load_file(folder / ADAPTER_FILE)
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    factors = {n.removesuffix(".lora_A.weight"): len(t) for n, t in state.items() if "lora_A" in n}
    rank = next(iter(factors.values()))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors))
    inject_adapter_in_model(config, untrained)
    assert not set_peft_model_state_dict(untrained, state).unexpected_keys


def by_names_alone(folder: Path, untrained: Any) -> None:
    """W + B A, scaled by `<layer>.alpha` / rank where there is one: ComfyUI, kohya's tools."""
    state = load_file(folder / ADAPTER_FILE)
    for name, down in state.items():
        layer, found, _ = name.partition(".lora_A.weight")
        if found:
            up, alpha = state[f"{layer}.lora_B.weight"], state.get(f"{layer}.alpha", len(down))
            linear = untrained.get_submodule(layer.removeprefix("transformer."))
            linear.weight.data += float(alpha) / len(down) * (up @ down)


@pytest.mark.parametrize(
    ("family", "rank", "alpha"),
    [
        ("sd3", 4, 8), ("sd3", 3, 7), ("sd3", 5, 1),
        ("flux", 3, 7), ("qwen_image", 6, 7), ("z_image", 3, 10),
    ],
)  # fmt: skip
def test_every_reader_applies_an_adapter_as_strongly_as_it_was_trained(
    tmp_path, family, rank, alpha
):
    """float32: what a reader adds to the velocity differs by less than 1e-5 of its size."""
    given = settings(family, lora={"rank": rank, "alpha": alpha})
    model = load_model(given)
    weights = model.prepare_training(0)
    generator = torch.Generator().manual_seed(1)
    for tensor in weights:
        tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    before = [tensor.clone() for tensor in weights]
    model.save(tmp_path)
    assert all(map(torch.equal, weights, before)), "training goes on with the weights it has"
    tensors, config = read_adapter(tmp_path / ADAPTER_FILE)
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (rank, rank)

    x = torch.randn(2, *model.image_shape, generator=generator)
    prompts = model.encode(PROMPTS[:2], negative=False)

    @torch.no_grad()
    def velocity(module: Any) -> Tensor:
        return model.velocity(x, 0.7, prompts, module)

    untrained = velocity(load_model(given).transformer)
    learnt = velocity(model.transformer) - untrained
    assert learnt.norm() > 0.02 * untrained.norm()
    (tmp_path / "old").mkdir()  # as earlier versions saved it: the scale in the metadata alone
    old = {k: v * rank / alpha if "lora_B" in k else v for k, v in tensors.items()}
    config["transformer.lora_alpha"] = alpha
    save_file(old, tmp_path / "old" / ADAPTER_FILE, metadata={CONFIG: json.dumps(config)})
    for read in (with_metadata, without_metadata, by_peft, by_names_alone, None):
        for folder in (tmp_path,) if read else (tmp_path, tmp_path / "old"):
            reader = load_model(given)
            if read is None:
                reader.load(folder)
            else:
                read(folder, reader.transformer)
            found = velocity(reader.transformer) - untrained
            assert (found - learnt).norm() < 1e-5 * learnt.norm(), (read, folder)


@pytest.mark.parametrize(
    ("family", "tuning", "schedule"),
    [
        *((family, "lora", {}) for family in FAMILIES),
        ("flux", "full", {}),
        ("sd3", "lora", {"end": "uniform"}),
        ("sd3", "lora", {"shift": "dynamic", "base_shift": 0.8, "max_shift": 0.8}),
    ],
)
def test_the_snippet_of_a_model_card_draws_what_we_draw(
    tmp_path, family, tuning, schedule, monkeypatch
):
    """Python for stock diffusers alone, with the run's own grid, guidance, size and weights."""
    # one mu at all sizes: these VAEs halve once, so that a token is smaller than a real model's
    dynamic = {"shift": "dynamic", "base_shift": 0.8, "max_shift": 0.8}
    grids = {"flux": dynamic, "qwen_image": {**dynamic, "terminal": 0.02}}
    sections = {
        "model": {"guidance_scale": GUIDANCE[family], "tuning": tuning, "dtype": "float32"},
        "evaluate": {"steps": STEPS, "height": HEIGHT, "width": WIDTH},
        "schedule": {**grids.get(family, {"shift": 2.0}), **schedule},
    }
    given = {f"{name}.{k}": v for name, section in sections.items() for k, v in section.items()}
    run = family_run(family, **given)
    model, trained, base = (load_model(run.evaluation_model) for _ in range(3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.prepare_training(0):
            weights.add_(0.05 * torch.randn(weights.shape, generator=generator))
    model.save(tmp_path / ("transformer" if tuning == "full" else ""))
    trained.load(tmp_path / ("transformer" if tuning == "full" else ""))
    noise = torch.randn(1, *base.image_shape, generator=torch.manual_seed(4))
    prompt = Prompt(PROMPTS[0].text)
    images, untrained = (
        ours(m, noise, [prompt], evaluation_sigmas(run))[0].permute(1, 2, 0).int().numpy()
        for m in (trained, base)
    )
    assert abs(images - untrained).max() > 8
    (tmp_path / FOLDERS[family].name).symlink_to(FOLDERS[family])
    monkeypatch.chdir(tmp_path)
    seeded = "generator=torch.Generator().manual_seed(0)"
    code = loading(run, None, prompt.text)
    assert seeded in code
    stock = family in OWN_GRID and "end" not in schedule  # needs nothing but a number of steps
    assert ("sigmas=" in code) is not stock
    latents = packed(noise) if family in ("flux", "qwen_image") else noise
    exec(code.replace(seeded, "latents=latents"), {"latents": latents})
    assert abs(np.asarray(Image.open("image.png"), int) - images).max() <= 1


def test_dynamic_shift_follows_the_size():
    shifts = {side: Schedule(shift="dynamic").shift_at(side, side) for side in (256, 1024)}
    assert shifts == pytest.approx({256: math.exp(0.5), 1024: math.exp(1.15)})
    run = small_run(**{"schedule.shift": "dynamic", "model.height": 1024, "model.width": 512})
    shift = Schedule(shift="dynamic").shift_at(1024, 512)
    assert training_sigmas(run) == shifted_sigmas(run.method.steps, shift)
    assert Schedule().shift_at(1024, 1024) == 3.0


# -- bad input -------------------------------------------------------------------------------


def refused(match: str, model: Model) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_model(model)
    assert "\n" not in str(caught.value)


FLUX_ITS_CLASS = r"model\.family: flux has a FluxTransformer2DModel, but"
BACKENDS = (("flux", "nonsense"), ("sd3", "_native_flash"), ("sd3", "nonsense"))


def test_settings_that_do_not_fit_the_weights():
    for family, name in BACKENDS:
        refused(f"attention_backend: {name}", settings(family, attention_backend=name))
    other = settings("flux", path=str(FOLDERS["sd3"]))
    refused(FLUX_ITS_CLASS, other)
    nowhere = settings("sd3", path="models/nowhere/at/all")
    for model, match in ((other, FLUX_ITS_CLASS), (nowhere, r"model\.path: .*: no such folder")):
        with pytest.raises(UserError, match=match):  # the text encoders alone
            load_model(model, text=True).encode(PROMPTS[:1], negative=False)
    with pytest.raises(ValueError, match="feature_cache: diffusers offers none for z_image"):
        settings("z_image", feature_cache={})


def test_half_a_download(tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(FOLDERS["flux"], broken)
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["x_embedder.weight"]
    save_file(state, weights)
    refused("x_embedder.weight", settings("flux", path=str(broken)))
    weights.unlink()
    refused("model.path: .*transformer: cannot be loaded", settings("flux", path=str(broken)))


def test_hub_id_with_its_revision_and_with_a_wrong_one(tmp_path, monkeypatch):
    right = "a" * 40
    cache = tmp_path / "models--someone--tiny"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(right)
    (cache / "snapshots" / right).symlink_to(FOLDERS["sd3"], target_is_directory=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load_model(settings("sd3", path="someone/tiny", revision=right))
    wrong = settings("sd3", path="someone/tiny", revision="b" * 40)
    refused("model.path: someone/tiny/transformer: cannot be loaded", wrong)


@pytest.mark.parametrize(
    ("family", "most"), [("sd3", 64), ("flux", None), ("qwen_image", None), ("z_image", 128)]
)
def test_sizes_end_where_the_positions_do(family, most):
    """By the loaded model, by its files alone, and by the network itself."""
    largest = most or 256
    model = loaded(family, height=largest, width=8)
    conditioning = model.encode([Prompt("cat")], negative=False)

    def velocity(rows: int) -> torch.Tensor:
        x = torch.zeros(1, model.latents.channels, rows, 4)
        with torch.no_grad():
            return model.velocity(x, 0.5, conditioning.batch([0], torch.device("cpu")))

    channels, rows, columns = model.image_shape
    assert (rows, columns) == (largest // 2, 4), "these VAEs halve once"
    assert velocity(rows).shape == (1, channels, rows, columns)
    path = {"model.family": family, "model.path": str(FOLDERS[family])}

    def found(height: int, width: int) -> list[str]:
        size = {"evaluate.height": height, "evaluate.width": width}
        return list(size_problems(small_run(**path, **size)))

    assert found(largest, 8) == []
    assert found(18, 9) == [f"evaluate.height: 18 is not a multiple of 4 ({FOLDERS[family]})"]
    if most is None:
        return
    for height, width, key in ((most + 4, 8, "height"), (8, most + 4, "width")):
        (problem,) = found(height, width)
        assert problem.startswith(f"evaluate.{key}: {most + 4} is more than {most}, where")
    with pytest.raises(UserError, match=f"model.height: {most + 4} is more than {most}"):
        _ = loaded(family, height=most + 4).image_shape
    with pytest.raises((ValueError, IndexError)):
        velocity(rows + 2)


def gaussian_adapter(family: str, folder: Path, **lora: Any) -> tuple[FlowModel, dict[str, Tensor]]:
    """A model with an adapter that changes much, and what its file holds."""
    model = loaded(family, lora={"rank": 4, "alpha": 8, **lora})
    for n, tensor in enumerate(model.prepare_training(0)):
        tensor.data.copy_(0.3 * torch.randn(tensor.shape, generator=torch.manual_seed(n)))
    model.save(folder)
    return model, load_file(folder / ADAPTER_FILE)


def velocity_of(model: FlowModel) -> Tensor:
    x = torch.randn(2, *model.image_shape, generator=torch.manual_seed(7))
    with torch.no_grad():
        return model.velocity(x, 0.7, model.encode(PROMPTS[:2], negative=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_goes_on_from_an_adapter(tmp_path, family):
    """Base model and training begin as it is, whatever rank and alpha are trained with."""
    made, _ = gaussian_adapter(family, tmp_path)
    for rank, alpha in ((4, 8), (6, 3)):
        lora = {"rank": rank, "alpha": alpha, "start": str(tmp_path / ADAPTER_FILE)}
        model = loaded(family, lora=lora)
        assert not any(p.requires_grad for p in model.transformer.parameters())
        near = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(velocity_of(model), velocity_of(made), **near)
        parameters = model.prepare_training(1)
        assert len(parameters) == 2 * len(list(model.lora_layers()))
        torch.testing.assert_close(velocity_of(model), velocity_of(made), **near)
        model.save(tmp_path / str(rank))
        again = loaded(family, lora=lora)
        again.load(tmp_path / str(rank))
        torch.testing.assert_close(velocity_of(again), velocity_of(made), **near)


def test_kohya_s_keys_are_a_start_too(tmp_path):
    _, state = gaussian_adapter("flux", tmp_path)
    names = {"txt_attn_proj": "attn.to_add_out", "img_attn_proj": "attn.to_out.0"}
    names["img_mlp_0"] = "ff.net.0.proj"
    kohya, same = {}, {k: torch.zeros_like(v) for k, v in state.items()}
    for theirs, ours in names.items():
        key, head = (
            f"transformer.transformer_blocks.0.{ours}",
            f"lora_unet_double_blocks_0_{theirs}",
        )
        down, up = (state[f"{key}.lora_{part}.weight"] for part in "AB")
        kohya |= {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up}
        kohya[f"{head}.alpha"] = torch.tensor(2.0)
        same |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up * 2.0 / len(down)}
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(same, tmp_path / ADAPTER_FILE)
    found = [
        velocity_of(loaded("flux", lora={"rank": 4, "alpha": 8, "start": str(tmp_path / name)}))
        for name in ("kohya.safetensors", ADAPTER_FILE)
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], velocity_of(loaded("flux")), rtol=1e-2)


def test_a_start_that_does_not_fit_is_refused(tmp_path):
    gaussian_adapter("flux", tmp_path)
    start = str(tmp_path / ADAPTER_FILE)
    with pytest.raises(UserError, match=r"has rank 4; set model\.lora\.rank to that, or more"):
        loaded("flux", lora={"rank": 2, "alpha": 2, "start": start})
    with pytest.raises(UserError, match=r"adapts .*to_k, which is not among model\.lora\.targets"):
        loaded("flux", lora={"rank": 4, "alpha": 2, "targets": ["attn.to_q"], "start": start})
    (tmp_path / "text.safetensors").write_text("not an adapter")
    for name in ("text.safetensors", ADAPTER_FILE):
        with pytest.raises(UserError, match=r"model\.lora\.start: .*adapt"):
            loaded("sd3", lora={"rank": 4, "alpha": 2, "start": str(tmp_path / name)})


def test_adapter_of_another_rank_or_family_or_without_a_layer(tmp_path):
    model = loaded("flux")
    model.prepare_training(0)
    model.save(tmp_path)
    other = loaded("flux", lora={"rank": 8, "alpha": 8})
    with pytest.raises(UserError, match=r"rank 4, but model.lora.rank is 8"):
        other.load(tmp_path)
    with pytest.raises(UserError, match=r"does not fit|cannot be loaded"):
        loaded("sd3").load(tmp_path)
    state = load_file(tmp_path / ADAPTER_FILE)
    state.pop(min(state))
    save_file(state, tmp_path / ADAPTER_FILE)
    with pytest.raises(UserError, match="does not fit this model"):
        loaded("flux").load(tmp_path)


CHEAPER = {  # settings, what the network is stored in, and how near it must be
    "bfloat16": ({"dtype": "bfloat16"}, torch.bfloat16, 0.05),
    "float16": ({"dtype": "float16"}, torch.float16, 0.05),
    "fp8": ({"fp8_weights": True}, torch.float8_e4m3fn, 0.2),
    "the same": ({"vae_slicing": True, "vae_tiling": True}, torch.float32, 0.0),  # one tile
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CHEAPER)
def test_fewer_bits_are_near(family, name):
    given, dtype, near = CHEAPER[name]
    whole, small = (loaded(family, **g) for g in ({}, given))
    stored = {p.dtype for p in small.transformer.parameters()}
    assert stored == {dtype} if name != "fp8" else dtype in stored
    prompts = whole.encode(PROMPTS[:2], negative=False).batch([0, 1], whole.device)
    x = torch.randn(2, *whole.image_shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        exact, found = (m.velocity(x, 0.7, prompts).float() for m in (whole, small))
    error = float((exact - found).norm() / exact.norm())
    assert 0 < error < near if near else error == 0
    images, others = (m.decode(x, 2).pixels for m in (whole, small))
    assert images.dtype == others.dtype == torch.uint8
    assert near or (images.int() - others.int()).abs().max() <= 1  # other batches round otherwise


# -- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "masked", "right"),
    [
        ((9, 0), torch.bfloat16, 128, False, "flash"),  # FLUX.1, Qwen-Image, Z-Image
        ((9, 0), torch.bfloat16, 64, False, "flash"),  # SD3.5
        ((8, 0), torch.float16, 256, False, "flash"),
        ((9, 0), torch.bfloat16, 128, True, "efficient"),  # prompts of different lengths
        ((9, 0), torch.float32, 128, False, "efficient"),
        ((9, 0), torch.bfloat16, 264, False, "efficient"),
        ((7, 5), torch.float16, 64, False, "efficient"),
        ((7, 5), torch.bfloat16, 64, False, "math"),
        ((9, 0), torch.float32, 6, True, "math"),  # 24 bytes are not aligned
    ],
)
def test_kernel_that_auto_takes(capability, dtype, head, masked, right):
    assert attention.kernel(capability, dtype, head, masked=masked) == right


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_attention_leaves_out_cudnn_and_asks_no_default(family, monkeypatch):
    """DIFFUSERS_ATTN_BACKEND may name another one, which a model sets for all that come after."""
    from diffusers.models import attention_dispatch as dispatch

    flash, registry = dispatch.AttentionBackendName("_native_flash"), "_AttentionBackendRegistry"
    monkeypatch.setattr(f"{dispatch.__name__}.{registry}._active_backend", flash)
    native = loaded(family, attention_backend="native")
    assert torch.backends.cuda.cudnn_sdp_enabled()
    auto = loaded(family)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    prompts = auto.encode(PROMPTS, negative=False)
    batch = prompts.batch(range(len(PROMPTS)), auto.device)
    x = torch.randn(len(PROMPTS), *auto.image_shape, generator=torch.manual_seed(0))
    with torch.no_grad():
        plain, named = (model.velocity(x, 0.5, batch) for model in (native, auto))
    assert torch.equal(plain, named)
    if family == "qwen_image":
        model = loaded(family, attention_backend="_native_flash")
        with pytest.raises(UserError, match=r"_native_flash: .*attn_mask.* not supported.* to aut"):
            attention.check_attention(model, prompts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_attention_passes_its_check(family, dtype):
    model = loaded(family, dtype=dtype, compile=family == "flux")
    parameters, compiled = model.prepare_training(0), counters["stats"]["unique_graphs"]
    state = torch.get_rng_state()
    attention.check_attention(model, model.encode(PROMPTS, negative=GUIDANCE[family] > 1))
    assert all(p.grad is None for p in parameters)
    assert torch.equal(state, torch.get_rng_state())
    assert counters["stats"]["unique_graphs"] == compiled
    assert not any(block._forward_pre_hooks for block in model.transformer.modules())


class _Wrong(torch.autograd.Function):
    """Attention's output, whose gradient is spoilt."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.factor, None


def _illegal(out: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nfurther lines")


@pytest.mark.parametrize(
    ("family", "backend", "spoil", "parts"),
    [
        ("flux", "auto", lambda out: _Wrong.apply(out, float("nan")),
         ["on cpu: in FluxTransformerBlock, its gradient is not", "set it to _native_math"]),
        ("flux", "native", _illegal, ["illegal memory access", "set it to auto"]),
        ("sd3", "auto", lambda out: -out, ["output differs", "set it to native"]),
        ("qwen_image", "auto", lambda out: _Wrong.apply(out, -3.0),
         ["gradient differs from the plain formula's by"]),
        ("z_image", "auto", lambda out: out * float("inf"), ["output is not finite"]),
    ],
)  # fmt: skip
def test_wrong_attention_is_told_before_training(monkeypatch, family, backend, spoil, parts):
    right = torch.nn.functional.scaled_dot_product_attention

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = right(*args, **kwargs)
        fused = torch.backends.cuda.flash_sdp_enabled()  # not within the plain formula
        return spoil(out) if fused and torch.is_grad_enabled() else out

    model = loaded(family, attention_backend=backend)
    prompts = model.encode(PROMPTS[:2], negative=GUIDANCE[family] > 1)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    with pytest.raises(UserError) as told:
        attention.check_attention(model, prompts)
    message = str(told.value)
    assert message.startswith(f"model.attention_backend: {backend}: attention is wrong on cpu: ")
    assert all(part in message for part in parts), message
    assert "learning_rate" not in message


UNMERGED = {"model.merge_lora_for_sampling": False}


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image"])
def test_feature_cache_spares_the_blocks_and_leaves_training_exact(family):
    exact, kept = (
        family_trainer(family, **{**UNMERGED, "model.feature_cache": cache})
        for cache in (None, {"interval": 2})
    )
    with kept.model.sampling() as network:
        assert network is not kept.model.transformer
    twin = dict(network.named_parameters())
    assert all(twin[name] is p for name, p in kept.model.transformer.named_parameters())
    names, calls = kept.model.transformer._no_split_modules, Counter[str]()
    network.register_forward_pre_hook(lambda *_: calls.update(["network"]))
    block = next(m for m in network.modules() if type(m).__name__ in names)
    inside = next(iter(block.children()))  # called whenever the block really runs
    inside.register_forward_pre_hook(lambda *_: calls.update(["block"]))
    rollout, ids, trees = sampled(kept)
    assert 0 < calls["block"] < calls["network"]
    plain, _, _ = sampled(exact)
    for mine, reference in zip(rollout.batches, plain.batches, strict=True):
        assert mine.start == reference.start
    first = rollout.batches[0], plain.batches[0]
    assert torch.equal(first[0].v, first[1].v)
    assert torch.equal(first[0].log_prob, first[1].log_prob)
    difference = (rollout.leaves - plain.leaves).norm() / plain.leaves.norm()
    assert 0 < difference < 0.5
    assert kept.model.twin is not None
    assert kept.model.twin.features is not None
    assert kept.model.twin.features.now == set()  # nothing is kept between rollouts
    values = [(-1.0) ** e for e in range(len(rollout.edges))]
    metrics = kept.learner.optimize(1, rollout, ids, trees, values)
    assert metrics["on_policy_ratio_deviation"] == 0.0
