"""Small results with known numbers, for tests of tables, figures and pages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from egrpo.config.models import RunConfig
from egrpo.core.entropy import MEASURES, step_entropy
from egrpo.core.schedule import shifted_sigmas
from egrpo.errors import UserError
from egrpo.store.tables import IMAGES, SCORES, TRAIN_METRICS, write_table
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study

GRID = shifted_sigmas(16, 3.0)
PROMPTS = [f"prompt number {i}" for i in range(6)]
Rows = list[dict[str, Any]]
Edit = Callable[[Rows], Rows]


@contextmanager
def refused(match: str) -> Iterator[None]:
    """A UserError in one line."""
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


def config(run: str, **top: Any) -> RunConfig:
    """A run that is trained on `quality` and evaluated with `other` too."""
    prompts = {name: f"assets/toy/prompts/{name}.txt" for name in ("train", "heldout")}
    settings: dict[str, Any] = {
        "run": run,
        "study": "small",
        "model": {"path": "model"},
        "prompts": prompts,
        "rewards": {"quality": {"kind": "verifier"}, "other": {"kind": "verifier_exact"}},
        "train": {"rewards": {"quality": 1.0}},
    }
    return RunConfig.model_validate(settings | top)


def layout(folder: Path, *runs: RunConfig) -> Layout:
    """The study of these runs, with its results in ``folder``."""
    return Layout(Study("small", str(folder), {run.run: run for run in runs}))


def png(level: int, size: tuple[int, int] = (8, 8), opacity: int = 255) -> bytes:
    """One gray; transparent where it is no image."""
    picture = Image.new("RGB", size, (level, level, level))
    if opacity < 255:
        picture.putalpha(opacity)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def images(
    run: str, level: Callable[[int, int], int], prompts: Sequence[str], samples: int, **look: Any
) -> Rows:
    """Rows of IMAGES, the level by prompt and sample."""
    return [
        {"run": run, "prompt_id": p, "prompt": text, "sample": s, "png": png(level(p, s), **look)}
        for p, text in enumerate(prompts)
        for s in range(samples)
    ]


def write_results(
    folder: Path,
    run: str,
    gain: float,
    level: int,
    samples: int = 2,
    edit: Edit = list,
    size: int = 8,
    lost: Collection[tuple[int, int]] = (),
) -> None:
    """Scores: quality = prompt/10 + gain, other = 1 - gain. Images: uniform, ``level`` apart."""
    shown = images(run, lambda p, s: 100 + level * (1 + s), PROMPTS, samples, size=(size, size))
    scores = [
        {k: row[k] for k in ("run", "prompt_id", "prompt", "sample")}
        | {"reward": reward, "value": value}
        for row in shown
        for reward, value in (("quality", row["prompt_id"] / 10 + gain), ("other", 1.0 - gain))
    ]
    for row in shown:
        if (row["prompt_id"], row["sample"]) in lost:
            row["png"] = png(100 + level * (1 + row["sample"]), (size, size), 0)
    write_table(folder / "scores.parquet", SCORES, edit(scores))
    write_table(folder / "images.parquet", IMAGES, shown)


def write_metrics(
    path: Path, run: str, cost: int, values: Mapping[str, Mapping[int, float | None]]
) -> Path:
    """Training metrics: value by name and iteration; ``cost`` evaluations an iteration."""
    rows = [
        {"run": run, "iteration": i, "nfe": i * cost, "metric": name, "value": value}
        for name, of in values.items()
        for i, value in of.items()
    ]
    write_table(path, TRAIN_METRICS, rows)
    return path


Spread = Callable[[int, int, int, float], Mapping[str, tuple[float | None, float | None]]]


def by_entropy(
    step: int, span: int, prompt: int, entropy: float
) -> dict[str, tuple[float | None, float | None]]:
    """Spread (1 + prompt) times the entropy; some failed, latents have no yardstick."""
    failed = (step, prompt) == (2, 0) or (step, span) == (5, 6)
    spread = None if failed else entropy * (1 + prompt)
    return {
        "reward:quality": (spread, 1.0 + prompt),
        "latent_variance": (spread, None),
        "image_distance": (spread, 1.0 + prompt),
    }


def profile_rows(
    spans: Sequence[int] = (1, 2, 4, 6),
    prompts: int = 3,
    spread: Spread = by_entropy,
    steps: int = 8,
) -> Rows:
    """Rows of ENTROPY_PROFILE: closed forms, and (spread, yardstick) by quantity."""
    return [
        {"step": step, "span": span, "sigma": GRID[step], "sigma_stop": GRID[step + span]}
        | {"std": entropy["exp_per_dim"] / math.sqrt(2 * math.pi * math.e), **entropy}
        | {"prompt_id": p, "quantity": name, "spread": value, "yardstick": yardstick}
        for step in range(steps)
        for span in spans
        if step + span <= 15
        for entropy in [entropies(step, span)]
        for p in range(prompts)
        for name, (value, yardstick) in spread(step, span, p, entropy["exp_per_dim"]).items()
    ]


def entropies(step: int, span: int) -> dict[str, float]:
    """Closed forms of a step of GRID, by measure."""
    return {m: step_entropy(GRID, step, span, noise_level=0.7, measure=m) for m in MEASURES}
