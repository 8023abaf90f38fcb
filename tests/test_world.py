"""The toy world: grammar, renderer, verifier, recipe and the shipped weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from conftest import modes_by
from numpy.typing import NDArray

from egrpo.world import prompts as grammar
from egrpo.world.prompts import Attributes, all_combinations, parse_prompt, split, to_prompt
from egrpo.world.shapes import AREA_FACTORS, coverage, render, uniforms
from egrpo.world.verifier import Verdict, read_attributes, verify

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "assets" / "toy"
CONFIG = ROOT / "config" / "toy_world.yaml"
VALUES = {
    "size": grammar.SIZES,
    "colour": grammar.COLOURS,
    "shape": grammar.SHAPES,
    "position": grammar.POSITIONS,
}
FIELDS = tuple(VALUES)

Truth = tuple[list[Attributes], NDArray[np.uint8]]


@pytest.fixture(scope="module")
def truth() -> Truth:
    """Two renders of each of the 240 combinations, with seeds that no training used."""
    combinations = all_combinations() * 2
    return combinations, render(combinations, np.arange(len(combinations)) + 5 * 10**9)


def verdict_of(images: NDArray[np.uint8], combinations: list[Attributes]) -> Verdict:
    return verify(images, [to_prompt(c) for c in combinations])


# --- grammar ---


def test_prompts_round_trip_and_have_seven_words() -> None:
    combinations = all_combinations()
    assert len(set(combinations)) == 240
    for attributes in combinations:
        prompt = to_prompt(attributes)
        assert len(prompt.split()) == 7
        assert parse_prompt(prompt) == attributes
        assert parse_prompt("  " + prompt.upper() + " ") == attributes


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a small red circle",
        "one small red circle on the left",
        "a tiny red circle on the left",
        "a small pink circle on the left",
        "a small red circle at the left",
        "a small red circle on the left side",
        "a red small circle on the left",
    ],
)
def test_prompts_outside_the_grammar_are_named(prompt: str) -> None:
    with pytest.raises(ValueError, match="outside the toy grammar") as caught:
        parse_prompt(prompt)
    assert repr(prompt) in str(caught.value)


def test_split_is_a_balanced_partition() -> None:
    train, heldout = split()
    assert (len(train), len(heldout)) == (192, 48)
    assert set(train).isdisjoint(heldout)
    assert set(train) | set(heldout) == set(all_combinations())
    for field in FIELDS:
        counts = Counter(getattr(c, field) for c in heldout)
        assert set(counts) == set(VALUES[field])
        assert max(counts.values()) - min(counts.values()) <= 1
    # Each (size, colour, shape) is trained in four positions and held out in one.
    assert len({(c.size, c.colour, c.shape) for c in heldout}) == 48


def test_shipped_prompt_files_are_in_step_with_the_split() -> None:
    for name, combinations in zip(("train", "heldout"), split(), strict=True):
        text = (TOY / "prompts" / f"{name}.txt").read_text(encoding="utf-8")
        assert text == grammar.prompt_lines(combinations)


# --- renderer ---


def test_an_image_depends_on_its_own_seed_alone(truth: Truth) -> None:
    combinations, images = truth
    again = render(combinations[7:10], np.arange(7, 10) + 5 * 10**9)
    assert np.array_equal(again, images[7:10])
    other = render(combinations[7:8], [1])
    assert not np.array_equal(other[0], images[7])
    with pytest.raises(ValueError, match="seeds"):
        render(combinations[:3], [1, 2])


def test_uniform_numbers_fill_the_unit_interval_without_repeats() -> None:
    u = uniforms(np.arange(4000), 3)
    assert u.min() >= 0.0
    assert u.max() < 1.0
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.003
    assert np.abs(np.corrcoef(u, rowvar=False) - np.eye(3)).max() < 0.05
    assert len(np.unique(u)) > 11_900


@pytest.mark.parametrize("shape", range(4))
def test_coverage_has_the_closed_form_area_and_centroid(shape: int) -> None:
    x, y, radius = (np.array([v], dtype=np.float32) for v in (15.3, 16.6, 7.0))
    mask = coverage(shape, x, y, radius)[0]
    assert mask.sum() == pytest.approx(AREA_FACTORS[shape] * 49, rel=0.03)
    grid = np.arange(32) + 0.5
    assert (mask.sum(0) @ grid) / mask.sum() == pytest.approx(15.3, abs=0.1)
    assert (mask.sum(1) @ grid) / mask.sum() == pytest.approx(16.6, abs=0.1)


# --- verifier ---


def test_verifier_accepts_ground_truth(truth: Truth) -> None:
    combinations, images = truth
    verdict = verdict_of(images, combinations)
    assert verdict.exact.mean() > 0.98
    assert verdict.smooth.mean() > 0.9
    assert verdict.smooth.dtype == np.float32
    assert verdict.smooth.shape == (480,)
    product = verdict.colour * verdict.shape * verdict.position * verdict.size
    np.testing.assert_allclose(verdict.smooth, product**0.25, rtol=1e-4)


@pytest.mark.parametrize("field", FIELDS)
def test_verifier_rejects_a_wrong_attribute_and_only_that(truth: Truth, field: str) -> None:
    combinations, images = truth
    values = VALUES[field]
    wrong = [
        dataclasses.replace(
            c, **{field: values[(values.index(getattr(c, field)) + 1) % len(values)]}
        )
        for c in combinations
    ]
    verdict = verdict_of(images, wrong)
    assert verdict.exact.max() == 0.0
    assert verdict.smooth.mean() < 0.6
    assert getattr(verdict, field).mean() < 0.15
    for other in set(FIELDS) - {field}:
        assert getattr(verdict, other).mean() > 0.85


def test_verifier_probabilities_are_distributions(truth: Truth) -> None:
    reading = read_attributes(truth[1])
    for table in (reading.size, reading.colour, reading.shape, reading.position):
        np.testing.assert_allclose(table.sum(1), reading.presence, atol=1e-3)


def test_verifier_grades_imperfect_images(truth: Truth) -> None:
    combinations, images = truth
    shifted = [verdict_of(np.roll(images, s, axis=2), combinations).smooth.mean() for s in range(5)]
    assert all(a > b for a, b in itertools.pairwise(shifted))
    blurred = images.astype(np.float64)
    scores = []
    for _ in range(3):
        scores.append(verdict_of(np.rint(blurred).astype(np.uint8), combinations).smooth.mean())
        for axis in (1, 2):
            for _ in range(2):
                blurred = 0.5 * (blurred + np.roll(blurred, 1, axis))
                blurred = 0.5 * (blurred + np.roll(blurred, -1, axis))
    assert scores[0] > scores[1] > scores[2] > 0.2
    noise = np.random.default_rng(0).normal(0.0, 25.5, images.shape)
    noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
    assert verdict_of(noisy, combinations).smooth.mean() > 0.85


@pytest.mark.parametrize("kind", ["black", "white", "grey", "noise", "half"])
def test_verifier_is_finite_and_low_without_a_shape(kind: str) -> None:
    images = np.zeros((48, 32, 32, 3), dtype=np.uint8)
    if kind == "noise":
        images = np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)
    elif kind == "half":
        images[:, :, :16] = 255
    else:
        images += {"black": 0, "white": 255, "grey": 128}[kind]
    verdict = verdict_of(images, split()[1])
    for field in dataclasses.fields(verdict):
        assert np.isfinite(getattr(verdict, field.name)).all()
    assert verdict.smooth.max() < 0.3
    assert verdict.exact.max() == 0.0


def test_verifier_refuses_wrong_input(truth: Truth) -> None:
    combinations, images = truth
    prompt = to_prompt(combinations[0])
    with pytest.raises(ValueError, match="1 images but 2 prompts"):
        verify(images[:1], [prompt, prompt])
    with pytest.raises(ValueError, match="expected uint8"):
        verify(images[:1].astype(np.float32), [prompt])
    with pytest.raises(ValueError, match="expected uint8"):
        verify(images[:1].transpose(0, 3, 1, 2), [prompt])
    with pytest.raises(ValueError, match="outside the toy grammar"):
        verify(images[:1], ["a dog"])


def test_verifier_is_vectorised(truth: Truth) -> None:
    """A batch costs less than its images one by one (0.03 s against 0.3 s on an idle core)."""
    combinations, images = truth
    prompts = [to_prompt(c) for c in combinations[:384]]

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def one_by_one() -> None:
        for k in range(384):
            verify(images[k : k + 1], prompts[k : k + 1])

    together = min(seconds(lambda: verify(images[:384], prompts)) for _ in range(3))
    assert together < min(seconds(one_by_one) for _ in range(2)) / 2


# --- shipped weights ---


def test_assets_are_small_and_hold_no_pickles_but_clip() -> None:
    files = [path for path in TOY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    unsafe = {p.name for p in files if p.suffix in {".pt", ".bin", ".pth", ".pkl", ".ckpt"}}
    assert unsafe == {"clip.pt"}


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    from diffusers import StableDiffusion3Pipeline

    # Stock loading; the absent T5 has to be named, as for SD3 without it.
    loaded = StableDiffusion3Pipeline.from_pretrained(
        str(TOY / "pipeline"), text_encoder_3=None, tokenizer_3=None
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_stock_pipeline_draws_what_it_is_asked_for_in_part(
    pipeline: StableDiffusion3Pipeline,
) -> None:
    assert pipeline.text_encoder_3 is None
    prompts = [to_prompt(c) for c in split()[1]]
    import torch

    images = pipeline(
        prompts,
        generator=torch.Generator().manual_seed(3),
        height=32,
        width=32,
        num_inference_steps=16,
        guidance_scale=1.0,
        max_sequence_length=0,
        output_type="np",
    ).images
    verdict = verify(np.rint(images * 255).astype(np.uint8), prompts)
    assert 0.4 < verdict.smooth.mean() < 0.8
    assert 0.1 < verdict.exact.mean() < 0.8


def test_prompt_embeddings_tell_the_words_apart(pipeline: StableDiffusion3Pipeline) -> None:
    from toy_world.train_pipeline import encode_prompts

    tokenizer = pipeline.tokenizer
    assert tokenizer.model_max_length == 9
    assert len(tokenizer("a small red circle on the left").input_ids) == 9
    assert (
        tokenizer.decode(
            tokenizer("a large purple cross in the center").input_ids, skip_special_tokens=True
        )
        == "a large purple cross in the center"
    )
    assert len(tokenizer("Zwölf naïve 東 ☃").input_ids) > 2  # bytes, not a crash
    base = "a small red circle on the left"
    others = [
        "a large red circle on the left",
        "a small blue circle on the left",
        "a small red cross on the left",
        "a small red circle on the right",
    ]
    context, pooled = encode_prompts(pipeline, [base, *others])
    assert context.shape == (5, 9, 64)
    assert pooled.shape == (5, 64)
    changed = (context[1:] - context[:1]).norm(dim=-1) / context[0].norm(dim=-1)
    # The encoder is causal: the changed word and what follows it differ, nothing before it.
    for row, word in enumerate((2, 3, 4, 7)):
        assert float(changed[row, :word].max()) < 1e-5
        assert float(changed[row, word]) > 0.5
    assert float((pooled[1:] - pooled[:1]).norm(dim=-1).min()) > 0.5


def test_vae_reconstructs_and_its_latents_are_standard(truth: Truth) -> None:
    from diffusers import AutoencoderKL
    from toy_world.train_pipeline import decode_latents, encode_images

    vae = AutoencoderKL.from_pretrained(str(TOY / "pipeline" / "vae"))
    combinations, images = truth
    latents = encode_images(vae, images)
    assert latents.shape == (480, 4, 8, 8)
    assert abs(float(latents.mean())) < 0.1
    assert abs(float(latents.std()) - 1.0) < 0.1
    decoded = decode_latents(vae, latents)
    assert np.sqrt(np.mean(((decoded.astype(float) - images) / 255) ** 2)) < 0.03
    assert verdict_of(decoded, combinations).exact.mean() > 0.97


def test_clip_loads_with_its_own_library_and_ranks_prompts(truth: Truth) -> None:
    import torch
    from toy_world.train_scorers import clip_ranking, clip_text_features

    state = torch.load(TOY / "clip.pt", weights_only=True)
    assert state["token_embedding.weight"].shape == (49408, 64)
    assert {value.dtype for key, value in state.items() if "." in key} == {torch.float16}
    _, images = truth
    names = [to_prompt(c) for c in all_combinations()]
    own = np.tile(np.arange(240), 2)
    accuracy, margin = clip_ranking(str(TOY / "clip.pt"), images, own, names)
    assert accuracy.mean() > 0.9
    assert margin.mean() > 0.02

    import clip

    model, _ = clip.load(str(TOY / "clip.pt"), device="cpu", jit=False)
    tokens = clip.tokenize(names[:8])
    with torch.no_grad():
        full = model.encode_text(tokens)
        short = clip_text_features(model, tokens[:, :16])
    torch.testing.assert_close(full, short, rtol=1e-4, atol=1e-5)


def test_preference_orders_synthetic_pairs_and_ignores_the_prompt(truth: Truth) -> None:
    import torch
    from toy_world.train_scorers import blur, preference_accuracy, synthetic_pairs

    from egrpo.world.preference import load_preference

    model = load_preference(TOY / "preference.safetensors")
    pairs = synthetic_pairs(all_combinations(), 500, torch.Generator().manual_seed(99))
    assert preference_accuracy(model, pairs) > 0.85
    combinations, images = truth
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    scores = model(batch)
    assert scores.shape == (480,)
    assert scores.dtype == torch.float32
    assert abs(float(scores.mean())) < 0.3
    assert 0.7 < float(scores.std()) < 1.3
    soft = blur(batch / 255.0, torch.full((480,), 1.5)) * 255.0
    assert float((model(soft) < scores).float().mean()) > 0.9
    centred = torch.tensor([c.position == "in the center" for c in combinations])
    assert scores[centred].mean() > scores[~centred].mean() + 0.5


def test_preference_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from egrpo.world.preference import FORMAT, load_preference

    with pytest.raises(ValueError, match="not found"):
        load_preference(tmp_path / "absent.safetensors")
    tensors = load_file(TOY / "preference.safetensors")
    path = tmp_path / "p.safetensors"
    save_file(tensors, path)
    with pytest.raises(ValueError, match="no format"):
        load_preference(path)
    metadata = {"format": FORMAT, "channels": "16,32,32"}
    del tensors["head.1.bias"]
    save_file({**tensors, "extra": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"head\.1\.bias.*extra"):
        load_preference(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a safetensors"):
        load_preference(path)


# --- recipe ---


def test_captions_never_name_a_heldout_prompt() -> None:
    import torch
    from toy_world.train_pipeline import caption_table

    train, _ = split()
    table = caption_table(train, 0.2)
    torch.testing.assert_close(table.sum(1), torch.ones(192))
    torch.testing.assert_close(caption_table(train, 0.0), torch.eye(192))
    # Own caption: 0.8**4 of all 240, a little more after the held-out ones are taken out.
    own = table.diagonal()
    assert bool((own > 0.8**4).all())
    assert bool((own < 0.55).all())


def test_settings_refuse_unknown_keys_and_bad_values() -> None:
    from pydantic import ValidationError
    from toy_world.recipe import WorldSettings, load_settings

    settings = load_settings(CONFIG)
    tree = settings.model_dump()
    with pytest.raises(ValidationError, match="surprise"):
        WorldSettings.model_validate({**tree, "surprise": 1})
    with pytest.raises(ValidationError, match="caption_corruption"):
        WorldSettings.model_validate(
            {**tree, "transformer": {**tree["transformer"], "caption_corruption": 1.5}}
        )
    with pytest.raises(ValidationError, match="frozen"):
        settings.seed = 3  # type: ignore[misc]


def test_recipe_runs_end_to_end_and_repeats(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from toy_world.recipe import build, load_settings, main, scale_steps

    arguments = ["--config", str(CONFIG), "--steps-scale", "0.001", "--output"]
    with modes_by(0o027, tmp_path):
        main([*arguments, str(tmp_path / "a")])
    measured = json.loads((tmp_path / "a" / "measured.json").read_text(encoding="utf-8"))
    assert 0.0 <= measured["heldout_smooth"] <= 1.0
    assert measured["renders_exact"] > 0.98
    shipped = {p.relative_to(TOY) for p in TOY.rglob("*") if p.is_file()}
    written = {p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert shipped - written == {Path("README.md")}
    assert written <= shipped

    lines: list[str] = []
    build(scale_steps(load_settings(CONFIG), 0.001), tmp_path / "b", log=lines.append)
    assert any("left" in line for line in lines)
    for name in (
        "pipeline/transformer/diffusion_pytorch_model.safetensors",
        "pipeline/vae/diffusion_pytorch_model.safetensors",
        "preference.safetensors",
    ):
        first, second = (load_file(tmp_path / d / name) for d in ("a", "b"))
        assert first.keys() == second.keys()
        for key in first:
            np.testing.assert_allclose(first[key], second[key], rtol=1e-4, atol=1e-5)
