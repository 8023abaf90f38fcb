"""Evaluation of models, base or trained: all rewards and all images in one job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from egrpo.config.keys import evaluation_key, scoring_key
from egrpo.config.models import RunConfig
from egrpo.config.trees import evaluation_sigmas
from egrpo.models import load_model
from egrpo.models.conditioning import load_conditioning
from egrpo.rewards import load_rewards, score_all
from egrpo.stages.progress import Progress
from egrpo.stages.sampling import png_of, sample_images
from egrpo.store.files import read_json
from egrpo.store.tables import IMAGES, SCORES, SNAPSHOTS, write_table

PROMPTS_AT_ONCE = 32
"""Bounds memory; noise depends on prompt and sample alone, so it changes no image's noise."""

Row = dict[str, Any]


class Evaluator:
    """Held-out prompts and rewards, loaded once for all models of a run."""

    def __init__(self, run: RunConfig, embeddings: Path) -> None:
        self.run = run
        self.texts, self.conditioning = load_conditioning(embeddings, "heldout")
        self.rewards: dict[str, Any] | None = None

    def score(self, adapter: Path | None, what: str) -> tuple[list[Row], list[tuple[Row, Tensor]]]:
        """Sample and score one model: the base (None), or what training wrote to ``adapter``.

        Returns:
            Rows of scores, and (head of a row, uint8 [3, h, w]) of every image.
        """
        run, e = self.run, self.run.evaluate
        model = load_model(run.evaluation_model)
        if adapter is not None:
            model.load(adapter)
        if self.rewards is None:
            self.rewards = load_rewards(run.rewards, str(model.device))
        ids = list(range(min(e.prompts or len(self.texts), len(self.texts))))
        rows: list[Row] = []
        found: list[tuple[Row, Tensor]] = []
        with Progress(len(ids), f"evaluate {what}", unit="prompt") as progress:
            for begin in range(0, len(ids), PROMPTS_AT_ONCE):
                part = ids[begin : begin + PROMPTS_AT_ONCE]
                images, _ = sample_images(
                    model,
                    self.conditioning,
                    part,
                    evaluation_sigmas(run),
                    samples=e.samples,
                    micro_batch=e.micro_batch,
                )
                heads = [
                    {"prompt_id": i, "prompt": self.texts[i], "sample": s}
                    for i in part
                    for s in range(e.samples)
                ]
                scores = score_all(self.rewards, images, [str(head["prompt"]) for head in heads])
                for n, (head, pixels) in enumerate(zip(heads, images, strict=True)):
                    found.append((head, pixels))
                    rows += [
                        {**head, "reward": reward, "value": values[n]}
                        for reward, values in scores.items()
                    ]
                progress.step(count=len(part))
        return rows, found


def evaluate(
    run: RunConfig,
    embeddings: Path,
    adapter: Path | None,
    scores_path: Path,
    images_path: Path,
    snapshots: Path | None = None,
    snapshots_path: Path | None = None,
) -> None:
    """Sample the held-out prompts and score them.

    Args:
        run: settings; of the run that the base is compared with where ``adapter`` is None.
        adapter: folder that training wrote; None evaluates the base model as run ``base``.
        scores_path, images_path: the two Parquet files to write.
        snapshots: folder of the weights that training kept on its way; their scores go to
            ``snapshots_path``.

    Raises:
        UserError: for missing or wrong weights or embeddings.
    """
    name = run.run if adapter is not None else "base"
    key = evaluation_key(run) if adapter is None else scoring_key(run)
    evaluator = Evaluator(run, embeddings)
    rows, images = evaluator.score(adapter, name)
    write_table(
        scores_path, SCORES, [{"run": name, **row} for row in rows], metadata={"config_hash": key}
    )
    pictures = [{"run": name, **head, "png": png_of(pixels)} for head, pixels in images]
    write_table(images_path, IMAGES, pictures, metadata={"config_hash": key})
    if snapshots is None or snapshots_path is None:
        return
    kept: list[Row] = []
    for limit in run.train.snapshots:
        record = read_json(snapshots / str(limit) / "snapshot.json")
        spent = {key: record[key] for key in ("nfe", "iteration", "seconds")}
        head = {"run": name, "evaluations": limit, **spent}
        same = record["iteration"] == run.train.iterations  # the model just scored
        found = rows if same else evaluator.score(snapshots / str(limit), f"{name} at {limit}")[0]
        kept += [{**head, **row} for row in found]
    write_table(snapshots_path, SNAPSHOTS, kept, metadata={"config_hash": key})
