"""Evaluation of models, base or trained: all rewards and all images in one job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.images import check
from egrpo.models import load_model
from egrpo.models.base import resolve_device
from egrpo.models.conditioning import load_conditioning
from egrpo.planning.trees import evaluation_sigmas
from egrpo.progress import Progress
from egrpo.rewards import load_rewards, score_all
from egrpo.rewards.network import png_of
from egrpo.sampling.processes import Processes
from egrpo.sampling.sample import sample_images
from egrpo.store.checkpoint import read_snapshot
from egrpo.store.tables import IMAGES, SCORES, SNAPSHOTS, write_table
from egrpo.study.keys import evaluation_key, scoring_key

PROMPTS_AT_ONCE = 32
"""Bounds memory; noise depends on prompt and sample alone, so it changes no image's noise."""

Row = dict[str, Any]


class Evaluator:
    """Held-out prompts and rewards, loaded once for all models of a run."""

    def __init__(self, run: RunConfig, embeddings: Path) -> None:
        self.run = run
        self.world = Processes(resolve_device(run.model.device))
        self.texts, self.conditioning = load_conditioning(embeddings, "heldout")
        self.rewards: dict[str, Any] | None = None

    def score(
        self, adapter: Path | None, what: str, *, pictures: bool = False
    ) -> tuple[list[Row], list[Row]]:
        """Sample and score one model: the base (None), or what training wrote to ``adapter``.

        Processes share out the prompts.

        Returns:
            Rows of scores, and rows of images if ``pictures`` are asked for.

        Raises:
            UserError: if the model makes no image at all: its evaluation is none.
        """
        run, e = self.run, self.run.evaluate
        model = load_model(run.evaluation_model)
        if adapter is not None:
            model.load(adapter)
        if self.rewards is None:
            self.rewards = load_rewards(run.rewards, str(model.device))
        count = min(e.prompts or len(self.texts), len(self.texts))
        ids = list(range(count))[self.world.share(count)]
        rows: list[Row] = []
        shown: list[Row] = []
        faults: list[int] = []
        title = f"evaluate {what}"
        with Progress(len(ids), title, unit="prompt", shown=self.world.main) as progress:
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
                faults += images.faults.tolist()
                scores = score_all(self.rewards, images, [str(head["prompt"]) for head in heads])
                for n, (head, picture) in enumerate(zip(heads, images.to_files(), strict=True)):
                    if pictures:
                        shown.append({**head, "png": png_of(picture)})
                    rows += [
                        {**head, "reward": reward, "value": values[n]}
                        for reward, values in scores.items()
                    ]
                progress.step(count=len(part))
        check(
            self.world.joined(faults),
            title if adapter is None else f"{title} ({adapter})",
            run.evaluation_model,
            trained=adapter is not None,
            say=self.world.main,
        )
        return self.world.joined(rows), self.world.joined(shown)


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
    main = evaluator.world.main
    rows, images = evaluator.score(adapter, name, pictures=True)
    if main:
        for path, schema, found in ((scores_path, SCORES, rows), (images_path, IMAGES, images)):
            named = [{"run": name, **row} for row in found]
            write_table(path, schema, named, metadata={"config_hash": key})
    if snapshots is None or snapshots_path is None:
        return
    kept: list[Row] = []
    for limit in run.train.snapshots:
        record = read_snapshot(snapshots / str(limit))
        head = {"run": name, "evaluations": limit, **record}
        same = record["iteration"] == run.train.iterations  # the model just scored
        found = rows if same else evaluator.score(snapshots / str(limit), f"{name} at {limit}")[0]
        kept += [{**head, **row} for row in found]
    if main:
        write_table(snapshots_path, SNAPSHOTS, kept, metadata={"config_hash": key})
