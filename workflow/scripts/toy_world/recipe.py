"""Builds everything in assets/toy from one seed: prompts, base model, CLIP, preference model.

    python -m toy_world.recipe --config config/toy_world.yaml --output DIR

Order: render images, train the VAE, encode latents, train the transformer, train the scorers,
measure. Each phase has its own random numbers, derived from the seed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from toy_world import train_pipeline as tp
from toy_world import train_scorers as ts
from toy_world.train_pipeline import Log

from egrpo.world.preference import load_preference, save_preference
from egrpo.world.prompts import Attributes, prompt_lines, split, to_prompt
from egrpo.world.shapes import render
from egrpo.world.verifier import verify

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0.0, le=0.1)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]

# Renders for measuring use seeds far above those of the training images.
MEASURE_SEED = 10**9


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Training(_Frozen):
    steps: Count
    batch: Count
    learning_rate: Rate


class VaeSettings(_Training):
    """Training of the VAE; kl_weight multiplies the mean KL per latent dimension in nats."""

    kl_weight: Annotated[float, Field(ge=0.0)]


class TransformerSettings(_Training):
    """Flow matching; caption_corruption is the probability that one attribute is replaced."""

    ema_decay: Probability
    caption_corruption: Probability


class ClipSettings(_Training):
    """Contrastive training; noise is the largest standard deviation, in units of [0, 1]."""

    noise: Annotated[float, Field(ge=0.0, le=1.0)]


class PreferenceSettings(_Training):
    """Bradley-Terry training; label_noise is the probability that a choice is flipped."""

    label_noise: Probability


class EvaluationSettings(_Frozen):
    """What is measured at the end and written to measured.json."""

    steps: Count
    images_per_prompt: Count
    pairs: Count


class WorldSettings(_Frozen):
    """All settings of the recipe; see config/toy_world.yaml for units and meaning."""

    seed: Annotated[int, Field(ge=0, lt=10**6)]
    threads: Count
    images: Annotated[int, Field(ge=384)]
    vae: VaeSettings
    transformer: TransformerSettings
    clip: ClipSettings
    preference: PreferenceSettings
    evaluation: EvaluationSettings


def load_settings(path: str | Path) -> WorldSettings:
    """Settings of a YAML file. Raises `pydantic.ValidationError` for unknown or wrong keys."""
    return WorldSettings.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))


def scale_steps(settings: WorldSettings, factor: float) -> WorldSettings:
    """The same recipe with fewer (or more) steps and images, for tests and first looks."""

    def scaled(value: int, least: int) -> int:
        return max(least, round(value * factor))

    tree = settings.model_dump()
    for part in ("vae", "transformer", "clip", "preference"):
        tree[part]["steps"] = scaled(tree[part]["steps"], 2)
    tree["images"] = scaled(tree["images"], 384)
    for name, least in (("pairs", 16), ("images_per_prompt", 1)):
        tree["evaluation"][name] = scaled(tree["evaluation"][name], least)
    return WorldSettings.model_validate(tree)


def training_images(combinations: Sequence[Attributes], count: int, seed: int) -> NDArray[np.uint8]:
    """uint8 [count, 32, 32, 3]; image i shows combination i % len(combinations)."""
    attributes = [combinations[i % len(combinations)] for i in range(count)]
    return render(attributes, np.arange(count, dtype=np.int64) + seed * 1_000_000)


def build(settings: WorldSettings, output_dir: str | Path, log: Log = print) -> dict[str, object]:
    """Trains and saves the whole toy world below output_dir; returns what it measured.

    Writes prompts/, pipeline/, clip.pt, preference.safetensors, measured.json, samples.png.
    """
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    start = time.monotonic()
    train, _ = split()
    write_prompts(output / "prompts")
    images = training_images(train, settings.images, settings.seed)
    log(f"world: {len(images)} images of {len(train)} combinations")

    seed = settings.seed
    build_pipeline(settings, images, output / "pipeline", log)
    torch.save(ts.train_clip(images, train, settings.clip, seed, log), output / "clip.pt")
    model = ts.train_preference(train, images[:4096], settings.preference, seed, log)
    save_preference(model, output / "preference.safetensors")

    measured = measure(settings, output)
    measured["minutes"] = round((time.monotonic() - start) / 60, 1)
    (output / "measured.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    log(f"world: {json.dumps(measured)}")
    return measured


def write_prompts(folder: Path) -> None:
    """train.txt and heldout.txt, one prompt a line."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, combinations in zip(("train", "heldout"), split(), strict=True):
        (folder / f"{name}.txt").write_text(prompt_lines(combinations), encoding="utf-8")


def build_pipeline(
    settings: WorldSettings, images: NDArray[np.uint8], folder: Path, log: Log
) -> None:
    """Trains VAE and transformer on the training images and saves the pipeline."""
    train, _ = split()
    seed = settings.seed
    vae = tp.train_vae(images, settings.vae, seed, log)
    pipeline = tp.assemble(vae, seed)
    context, pooled = tp.encode_prompts(pipeline, [to_prompt(c) for c in train])
    data = tp.TrainingSet(
        latents=tp.encode_images(vae, images),
        caption=torch.arange(len(images)) % len(train),
        context=context,
        pooled=pooled,
        table=tp.caption_table(train, settings.transformer.caption_corruption),
    )
    transformer = tp.train_transformer(data, settings.transformer, seed, log)
    pipeline.register_modules(transformer=transformer)
    tp.save_pipeline(pipeline, folder)


def measure(settings: WorldSettings, output: Path) -> dict[str, object]:
    """Quality of the files in output, each loaded as a user would; writes samples.png."""
    pipeline = tp.load_pipeline(output / "pipeline")
    train, heldout = split()
    result: dict[str, object] = {}

    everything = [*train, *heldout]
    count = settings.evaluation.images_per_prompt
    rows = np.tile(np.arange(len(everything)), count)
    renders = render([everything[r] for r in rows], MEASURE_SEED + np.arange(len(rows)))
    decoded = tp.decode_latents(pipeline.vae, tp.encode_images(pipeline.vae, renders))
    error = (decoded.astype(np.float64) - renders) / 255.0
    result["vae_rmse"] = round(float(np.sqrt((error**2).mean())), 5)
    all_prompts = [to_prompt(everything[r]) for r in rows]
    for name, pixels in (("renders", renders), ("reconstructions", decoded)):
        verdict = verify(pixels, all_prompts)
        result[f"{name}_smooth"] = round(float(verdict.smooth.mean()), 4)
        result[f"{name}_exact"] = round(float(verdict.exact.mean()), 4)

    for name, combinations in (("train", train), ("heldout", heldout)):
        samples, prompts = sample_prompts(pipeline, combinations, settings, count)
        verdict = verify(samples, prompts)
        for field in ("smooth", "exact", "color", "shape", "position", "size"):
            result[f"{name}_{field}"] = round(float(getattr(verdict, field).mean()), 4)
        if name == "heldout":
            save_grid(samples[:48], output / "samples.png", columns=12)

    names = [to_prompt(c) for c in everything]
    first, margin = ts.clip_ranking(str(output / "clip.pt"), renders, rows, names)
    result["clip_top1_of_240"] = round(float(first.mean()), 4)
    result["clip_top1_of_240_heldout"] = round(float(first[rows >= len(train)].mean()), 4)
    result["clip_margin"] = round(float(margin.mean()), 4)

    model = load_preference(output / "preference.safetensors")
    pairs = ts.synthetic_pairs(
        everything, settings.evaluation.pairs, tp.generator(settings.seed, 8)
    )
    result["preference_pair_accuracy"] = round(ts.preference_accuracy(model, pairs), 4)
    scores = model(torch.from_numpy(renders).permute(0, 3, 1, 2))
    result["preference_renders_mean"] = round(float(scores.mean()), 4)
    result["preference_renders_std"] = round(float(scores.std()), 4)
    return result


def sample_prompts(
    pipeline: StableDiffusion3Pipeline,
    combinations: Sequence[Attributes],
    settings: WorldSettings,
    repeats: int,
) -> tuple[NDArray[np.uint8], list[str]]:
    """Base samples uint8 [n, 32, 32, 3] and their prompts, `repeats` of each combination."""
    prompts = [to_prompt(c) for c in combinations]
    context, pooled = tp.encode_prompts(pipeline, prompts)
    latents = tp.sample(
        pipeline.transformer,
        context.repeat(repeats, 1, 1),
        pooled.repeat(repeats, 1),
        steps=settings.evaluation.steps,
        rng=tp.generator(settings.seed, 7),
    )
    return tp.decode_latents(pipeline.vae, latents), prompts * repeats


def save_grid(images: NDArray[np.uint8], path: Path, columns: int, zoom: int = 3) -> None:
    """PNG of images [n, H, W, 3] row by row, each pixel drawn zoom times as large."""
    rows = len(images) // columns
    _, height, width, _ = images.shape
    grid = images[: rows * columns].reshape(rows, columns, height, width, 3)
    sheet = grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    sheet = sheet.repeat(zoom, axis=0).repeat(zoom, axis=1)
    Image.fromarray(sheet).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(prog="toy_world.recipe", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, help="YAML of the settings")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    parser.add_argument(
        "--steps-scale", type=float, default=1.0, help="multiplies all steps and image counts"
    )
    options = parser.parse_args(arguments)
    settings = load_settings(options.config)
    if options.steps_scale != 1.0:
        settings = scale_steps(settings, options.steps_scale)
    build(settings, options.output, log=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
