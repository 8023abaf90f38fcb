"""The toy world: grammar, renderer, verifier, recipe and the shipped weights."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import clip
import numpy as np
import pytest
import torch
from conftest import ROOT, modes_by
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from toy_world.recipe import WorldSettings, build, load_settings, main, scale_steps
from toy_world.train_pipeline import caption_table, decode_latents, encode_images, encode_prompts
from toy_world.train_scorers import (
    blur,
    clip_ranking,
    clip_text_features,
    preference_accuracy,
    synthetic_pairs,
)

from egrpo.world import prompts as grammar
from egrpo.world.preference import FORMAT, load_preference
from egrpo.world.prompts import GRAMMAR, all_combinations, parse_prompt, split, to_prompt
from egrpo.world.shapes import AREA_FACTORS, coverage, render, uniforms
from egrpo.world.verifier import Verdict, read_attributes, verify

TOY, CONFIG = ROOT / "assets/toy", ROOT / "config/toy_world.yaml"


@pytest.fixture(scope="module")
def truth() -> Any:
    """Two renders of each of the 240 combinations, with seeds that no training used."""
    combinations = all_combinations() * 2
    return combinations, render(combinations, np.arange(len(combinations)) + 5 * 10**9)


def verdict_of(images: np.ndarray, combinations: list[grammar.Attributes]) -> Verdict:
    return verify(images, [to_prompt(c) for c in combinations])


# --- grammar --------------------------------------------------------------------------------------


def test_prompts_round_trip_and_their_split_is_a_balanced_partition():
    every, (train, heldout) = all_combinations(), split()
    assert len(set(every)) == 240
    for attributes in every:
        prompt = to_prompt(attributes)
        assert len(prompt.split()) == 7
        assert parse_prompt(prompt) == parse_prompt(f"  {prompt.upper()} ") == attributes
    assert (len(train), len(heldout)) == (192, 48)
    assert {*train, *heldout} == set(every)
    for field, values in GRAMMAR.items():
        counts = Counter(getattr(c, field) for c in heldout)
        assert set(counts) == set(values)
        assert max(counts.values()) - min(counts.values()) <= 1
    # Each (size, color, shape) is trained in four positions and held out in one.
    assert len({(c.size, c.color, c.shape) for c in heldout}) == 48
    for name, some in (("train", train), ("heldout", heldout)):  # shipped files are in step
        text = (TOY / f"prompts/{name}.txt").read_text(encoding="utf-8")
        assert text == grammar.prompt_lines(some)


OUTSIDE = """
a small red circle
one small red circle on the left
a tiny red circle on the left
a small pink circle on the left
a small red circle at the left
a small red circle on the left side
a red small circle on the left""".split("\n")


@pytest.mark.parametrize("prompt", OUTSIDE)
def test_prompts_outside_the_grammar_are_named(prompt):
    with pytest.raises(ValueError, match="outside the toy grammar") as caught:
        parse_prompt(prompt)
    assert repr(prompt) in str(caught.value)


# --- renderer -------------------------------------------------------------------------------------


def test_an_image_depends_on_its_own_seed_alone(truth):
    combinations, images = truth
    again = render(combinations[7:10], np.arange(7, 10) + 5 * 10**9)
    assert np.array_equal(again, images[7:10])
    assert not np.array_equal(render(combinations[7:8], [1])[0], images[7])
    with pytest.raises(ValueError, match="seeds"):
        render(combinations[:3], [1, 2])


def test_uniform_numbers_fill_the_unit_interval_without_repeats():
    u = uniforms(np.arange(4000), 3)
    assert 0.0 <= u.min() <= u.max() < 1.0
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.003
    assert np.abs(np.corrcoef(u, rowvar=False) - np.eye(3)).max() < 0.05
    assert len(np.unique(u)) > 11_900


@pytest.mark.parametrize("shape", range(4))
def test_coverage_has_the_closed_form_area_and_centroid(shape):
    x, y, radius = (np.array([v], dtype=np.float32) for v in (15.3, 16.6, 7.0))
    mask, grid = coverage(shape, x, y, radius)[0], np.arange(32) + 0.5
    assert mask.sum() == pytest.approx(AREA_FACTORS[shape] * 49, rel=0.03)
    assert (mask.sum(0) @ grid) / mask.sum() == pytest.approx(15.3, abs=0.1)
    assert (mask.sum(1) @ grid) / mask.sum() == pytest.approx(16.6, abs=0.1)


# --- verifier -------------------------------------------------------------------------------------


def test_verifier_accepts_ground_truth_by_probabilities_that_are_distributions(truth):
    verdict, reading = verdict_of(*truth[::-1]), read_attributes(truth[1])
    assert verdict.exact.mean() > 0.98
    assert verdict.smooth.mean() > 0.9
    assert (verdict.smooth.dtype, verdict.smooth.shape) == (np.float32, (480,))
    product = verdict.color * verdict.shape * verdict.position * verdict.size
    np.testing.assert_allclose(verdict.smooth, product**0.25, rtol=1e-4)
    for table in (reading.size, reading.color, reading.shape, reading.position):
        np.testing.assert_allclose(table.sum(1), reading.presence, atol=1e-3)


@pytest.mark.parametrize("field", GRAMMAR)
def test_verifier_rejects_a_wrong_attribute_and_only_that(truth, field):
    combinations, images = truth
    following = dict(zip(GRAMMAR[field], np.roll(GRAMMAR[field], -1).tolist(), strict=True))
    wrong = [dataclasses.replace(c, **{field: following[getattr(c, field)]}) for c in combinations]
    verdict = verdict_of(images, wrong)
    assert verdict.exact.max() == 0.0
    assert verdict.smooth.mean() < 0.6
    assert getattr(verdict, field).mean() < 0.15
    assert all(getattr(verdict, other).mean() > 0.85 for other in GRAMMAR.keys() - {field})


def test_verifier_grades_imperfect_images(truth):
    combinations, images = truth

    def smooth(changed: np.ndarray) -> float:
        return float(verdict_of(changed, combinations).smooth.mean())

    shifted = [smooth(np.roll(images, s, axis=2)) for s in range(5)]
    assert all(a > b for a, b in itertools.pairwise(shifted))
    blurred, scores = images.astype(np.float64), []
    for _ in range(3):
        scores.append(smooth(np.rint(blurred).astype(np.uint8)))
        for axis, step in itertools.product((1, 2), (1, -1, 1, -1)):
            blurred = 0.5 * (blurred + np.roll(blurred, step, axis))
    assert scores[0] > scores[1] > scores[2] > 0.2
    noise = np.random.default_rng(0).normal(0.0, 25.5, images.shape)
    assert smooth(np.clip(images + noise, 0, 255).astype(np.uint8)) > 0.85


@pytest.mark.parametrize("kind", ["black", "white", "gray", "noise", "half"])
def test_verifier_is_finite_and_low_without_a_shape(kind):
    images = np.zeros((48, 32, 32, 3), dtype=np.uint8)
    if kind == "noise":
        images = np.random.default_rng(1).integers(0, 256, images.shape, dtype=np.uint8)
    images[:, :, : 16 if kind == "half" else 32] += np.uint8(
        {"white": 255, "gray": 128, "half": 255}.get(kind, 0)
    )
    verdict = vars(verdict_of(images, split()[1]))
    assert all(np.isfinite(values).all() for values in verdict.values())
    assert verdict["smooth"].max() < 0.3
    assert verdict["exact"].max() == 0.0


def test_verifier_refuses_wrong_input(truth):
    prompt, image = to_prompt(truth[0][0]), truth[1][:1]
    for images, prompts, message in (
        (image, [prompt] * 2, "1 images but 2 prompts"),
        (image.astype(np.float32), [prompt], "expected uint8"),
        (image.transpose(0, 3, 1, 2), [prompt], "expected uint8"),
        (image, ["a dog"], "outside the toy grammar"),
    ):
        with pytest.raises(ValueError, match=message):
            verify(images, prompts)


# --- shipped weights ------------------------------------------------------------------------------


def test_assets_are_small_and_hold_no_pickles_but_clip():
    files = [path for path in TOY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12e6
    unsafe = {p.name for p in files if p.suffix in {".pt", ".bin", ".pth", ".pkl", ".ckpt"}}
    assert unsafe == {"clip.pt"}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """Stock loading; the absent T5 has to be named, as for SD3 without it."""
    parts = {"text_encoder_3": None, "tokenizer_3": None}
    loaded = StableDiffusion3Pipeline.from_pretrained(str(TOY / "pipeline"), **parts)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_stock_pipeline_draws_what_it_is_asked_for_in_part(pipeline):
    prompts = [to_prompt(c) for c in split()[1]]
    how = {"height": 32, "width": 32, "num_inference_steps": 16, "guidance_scale": 1.0}
    how |= {"max_sequence_length": 0, "generator": torch.Generator().manual_seed(3)}
    images = pipeline(prompts, output_type="np", **how).images
    verdict = verify(np.rint(images * 255).astype(np.uint8), prompts)
    assert 0.4 < verdict.smooth.mean() < 0.8
    assert 0.1 < verdict.exact.mean() < 0.8


def test_prompt_embeddings_tell_the_words_apart(pipeline):
    tokenizer = pipeline.tokenizer
    base, large = "a small red circle on the left", "a large purple cross in the center"
    assert tokenizer.model_max_length == len(tokenizer(base).input_ids) == 9
    assert tokenizer.decode(tokenizer(large).input_ids, skip_special_tokens=True) == large
    assert len(tokenizer("Zwölf naïve 東 ☃").input_ids) > 2  # bytes, not a crash
    changes = {2: ("small", "large"), 3: ("red", "blue"), 4: ("circle", "cross")}
    changes |= {7: ("left", "right")}
    context, pooled = encode_prompts(
        pipeline, [base, *(base.replace(*c) for c in changes.values())]
    )
    assert (context.shape, pooled.shape) == ((5, 9, 64), (5, 64))
    changed = (context[1:] - context[:1]).norm(dim=-1) / context[0].norm(dim=-1)
    # The encoder is causal: the changed word and what follows it differ, nothing before it.
    for row, word in zip(changed, changes, strict=True):
        assert float(row[:word].max()) < 1e-5
        assert float(row[word]) > 0.5
    assert float((pooled[1:] - pooled[:1]).norm(dim=-1).min()) > 0.5


def test_vae_reconstructs_and_its_latents_are_standard(truth):
    vae = AutoencoderKL.from_pretrained(str(TOY / "pipeline/vae"))
    combinations, images = truth
    latents = encode_images(vae, images)
    assert latents.shape == (480, 4, 8, 8)
    assert abs(float(latents.mean())) < 0.1
    assert abs(float(latents.std()) - 1.0) < 0.1
    decoded = decode_latents(vae, latents)
    assert np.sqrt(np.mean(((decoded.astype(float) - images) / 255) ** 2)) < 0.03
    assert verdict_of(decoded, combinations).exact.mean() > 0.97


def test_clip_loads_with_its_own_library_and_ranks_prompts(truth):
    path = str(TOY / "clip.pt")
    state = torch.load(path, weights_only=True)
    assert state["token_embedding.weight"].shape == (49408, 64)
    assert {value.dtype for key, value in state.items() if "." in key} == {torch.float16}
    names = [to_prompt(c) for c in all_combinations()]
    accuracy, margin = clip_ranking(path, truth[1], np.tile(np.arange(240), 2), names)
    assert accuracy.mean() > 0.9
    assert margin.mean() > 0.02
    model, _ = clip.load(path, device="cpu", jit=False)
    tokens = clip.tokenize(names[:8])
    with torch.no_grad():
        full, short = model.encode_text(tokens), clip_text_features(model, tokens[:, :16])
    torch.testing.assert_close(full, short, rtol=1e-4, atol=1e-5)


def test_preference_orders_synthetic_pairs_and_ignores_the_prompt(truth):
    model = load_preference(TOY / "preference.safetensors")
    pairs = synthetic_pairs(all_combinations(), 500, torch.Generator().manual_seed(99))
    assert preference_accuracy(model, pairs) > 0.85
    combinations, images = truth
    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    scores = model(batch)
    assert (scores.shape, scores.dtype) == ((480,), torch.float32)
    assert abs(float(scores.mean())) < 0.3
    assert 0.7 < float(scores.std()) < 1.3
    soft = blur(batch / 255.0, torch.full((480,), 1.5)) * 255.0
    assert float((model(soft) < scores).float().mean()) > 0.9
    centered = torch.tensor([c.position == "in the center" for c in combinations])
    assert scores[centered].mean() > scores[~centered].mean() + 0.5


def test_preference_files_that_do_not_fit_are_named(tmp_path):
    path, head = tmp_path / "p.safetensors", {"format": FORMAT, "channels": "16,32,32"}
    whole = load_file(TOY / "preference.safetensors")
    other = {k: v for k, v in whole.items() if k != "head.1.bias"} | {"extra": torch.zeros(1)}

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_preference(path)

    refused("not found")
    for tensors, metadata, message in (
        (whole, None, "no format"),
        (whole, head | {"channels": "16,0,32"}, "are not three widths"),
        (whole, head | {"channels": "16,32,33"}, "size mismatch"),
        (other, head, r"head\.1\.bias.*extra"),
    ):
        save_file(tensors, path, metadata=metadata)
        refused(message)
    path.write_bytes(b"nothing")
    refused("not a safetensors")


# --- recipe ---------------------------------------------------------------------------------------


def test_captions_never_name_a_heldout_prompt():
    table = caption_table(split()[0], 0.2)
    torch.testing.assert_close(table.sum(1), torch.ones(192))
    torch.testing.assert_close(caption_table(split()[0], 0.0), torch.eye(192))
    # Own caption: 0.8**4 of all 240, a little more after the held-out ones are taken out.
    assert 0.8**4 < float(table.diagonal().min()) <= float(table.diagonal().max()) < 0.55


def test_settings_refuse_unknown_keys_and_bad_values():
    tree = load_settings(CONFIG).model_dump()
    corrupted = {"transformer": {**tree["transformer"], "caption_corruption": 1.5}}
    for change, key in (({"surprise": 1}, "surprise"), (corrupted, "caption_corruption")):
        with pytest.raises(ValidationError, match=key):
            WorldSettings.model_validate({**tree, **change})


def test_recipe_runs_end_to_end_and_repeats(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    with modes_by(0o027, tmp_path):
        main(["--config", str(CONFIG), "--steps-scale", "0.001", "--output", str(first)])
    measured = json.loads((first / "measured.json").read_text(encoding="utf-8"))
    assert 0.0 <= measured["heldout_smooth"] <= 1.0
    assert measured["renders_exact"] > 0.98
    shipped, written = (
        {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} for folder in (TOY, first)
    )
    assert shipped - written == {Path("README.md")}
    assert written <= shipped
    lines: list[str] = []
    build(scale_steps(load_settings(CONFIG), 0.001), second, log=lines.append)
    assert any("left" in line for line in lines)
    weights = "diffusion_pytorch_model.safetensors"
    for name in (
        f"pipeline/transformer/{weights}",
        f"pipeline/vae/{weights}",
        "preference.safetensors",
    ):
        torch.testing.assert_close(
            load_file(first / name), load_file(second / name), rtol=1e-4, atol=1e-5
        )
