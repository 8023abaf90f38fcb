"""Evaluation of one model, base or trained: all rewards and all images in one job."""

from __future__ import annotations

import io
from pathlib import Path

from egrpo.config.keys import evaluation_key, scoring_key
from egrpo.config.models import RunConfig
from egrpo.models import load_model
from egrpo.models.conditioning import load_conditioning
from egrpo.rewards import load_rewards, score_all
from egrpo.stages.progress import Progress
from egrpo.stages.sampling import sample_images
from egrpo.store.tables import IMAGES, SCORES, write_table

PROMPTS_AT_ONCE = 32
"""Bounds memory; noise depends on prompt and sample alone, so it changes no image's noise."""


def evaluate(
    run: RunConfig, embeddings: Path, adapter: Path | None, scores_path: Path, images_path: Path
) -> None:
    """Sample the held-out prompts and score them.

    Args:
        run: settings; of the run that the base is compared with where ``adapter`` is None.
        adapter: folder that training wrote; None evaluates the base model as run ``base``.
        scores_path, images_path: the two Parquet files to write.

    Raises:
        UserError: for missing or wrong weights or embeddings.
    """
    from PIL import Image

    texts, conditioning = load_conditioning(embeddings, "heldout")
    model = load_model(run.model)
    if adapter is not None:
        model.load(adapter)
    conditioning = conditioning.to(model.device)
    rewards = load_rewards(run.rewards, str(model.device))
    e, name = run.evaluate, run.run if adapter is not None else "base"
    ids = list(range(min(e.prompts or len(texts), len(texts))))
    score_rows, image_rows = [], []
    with Progress(len(ids), f"evaluate {name}", unit="prompt") as progress:
        for begin in range(0, len(ids), PROMPTS_AT_ONCE):
            part = ids[begin : begin + PROMPTS_AT_ONCE]
            images, _ = sample_images(
                model,
                conditioning,
                part,
                steps=e.steps,
                shift=run.schedule.shift,
                samples=e.samples,
                micro_batch=e.micro_batch,
            )
            heads = [
                {"run": name, "prompt_id": i, "prompt": texts[i], "sample": s}
                for i in part
                for s in range(e.samples)
            ]
            scores = score_all(rewards, images, [str(head["prompt"]) for head in heads])
            for row, (head, pixels) in enumerate(zip(heads, images, strict=True)):
                buffer = io.BytesIO()
                Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
                image_rows.append({**head, "png": buffer.getvalue()})
                for reward, values in scores.items():
                    score_rows.append({**head, "reward": reward, "value": values[row]})
            progress.step(count=len(part))
    key = evaluation_key(run) if adapter is None else scoring_key(run)
    write_table(scores_path, SCORES, score_rows, metadata={"config_hash": key})
    write_table(images_path, IMAGES, image_rows, metadata={"config_hash": key})
