"""Evaluation of models, base or trained: images of held-out prompts, and every reward of them.

Images and scores are kept with what they were made from. An evaluation that follows another one
samples what is not there and scores what is not scored: one more reward costs its scores, one more
prompt its images.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from egrpo.config.keys import run_key
from egrpo.config.models import RunConfig
from egrpo.errors import UserError, say
from egrpo.images import Images, check
from egrpo.measure.monitors import score_monitors
from egrpo.models import load_model
from egrpo.models.conditioning import Embeddings, load_conditioning
from egrpo.models.loading import resolve_device
from egrpo.planning.grids import evaluation_sigmas
from egrpo.progress import Progress
from egrpo.rewards import RewardModel, load_reward, score_all
from egrpo.rewards.network import png_of
from egrpo.sampling.processes import Processes
from egrpo.sampling.sample import Sampler
from egrpo.store.checkpoint import read_snapshot
from egrpo.store.tables import TABLES, Table, metadata_of, read_table, write_table
from egrpo.study.identity import Sources

PROMPTS_AT_ONCE = 32
"""Bounds memory; noise depends on prompt and sample alone, so it changes no image's noise."""

Row = dict[str, Any]
Sample = Callable[[list[int]], Images]
"""From prompt ids to images, all samples of each."""


@dataclass(frozen=True)
class Kept:
    """Images [samples] by prompt id, and scores [samples] by reward and prompt id."""

    images: dict[int, Images] = field(default_factory=dict)
    scores: dict[str, dict[int, npt.NDArray[np.float64]]] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        folder: Path,
        tables: tuple[Table, Table],
        sources: Sources,
        samples: int,
        limit: int | None = None,
    ) -> Kept:
        """Of an earlier evaluation in a folder what was made from the same; nothing if damaged.

        ``tables`` hold its scores and its images, of snapshots those of one ``limit``.
        """
        try:
            found = [read_table(folder / f"{table.name}.parquet", table) for table in tables]
            heads = [metadata_of(table) for table in found]
            prompts, rewards = (json.loads(heads[0][k]) for k in ("prompts_of", "rewards_of"))
            if any(head["images_of"] != sources.images for head in heads):
                return cls()
        except (UserError, KeyError, ValueError):
            return cls()
        shared = {
            i for i, (a, b) in enumerate(zip(prompts, sources.prompts, strict=False)) if a == b
        }
        rows, shown = (
            [r for r in t.to_pylist() if r["prompt_id"] in shared and r.get("evaluations") == limit]
            for t in found
        )
        pictures: dict[int, list[Any]] = {}
        for row in sorted(shown, key=lambda row: row["sample"]):
            png = Image.open(io.BytesIO(row["png"])).convert("RGBA")
            pictures.setdefault(row["prompt_id"], []).append(np.array(png))
        images = {
            i: Images.from_rgba(torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2))
            for i, made in pictures.items()
            if len(made) == samples
        }
        scores: dict[str, dict[int, Any]] = {}
        for row in rows:
            name, i = row["reward"], row["prompt_id"]
            if i in images and rewards.get(name) == sources.rewards.get(name):
                values = scores.setdefault(name, {}).setdefault(i, np.full(samples, np.nan))
                values[row["sample"]] = np.nan if row["value"] is None else row["value"]
        return cls(images, scores)


def evaluate(
    run: RunConfig,
    embeddings: Embeddings,
    adapter: Path | None,
    output: Path,
    *,
    training: Path | None = None,
    sources: Sources | None = None,
    before: Sequence[Path] = (),
) -> None:
    """Sample the held-out prompts and score them.

    Args:
        run: settings; of a run that is compared with the base where ``adapter`` is None.
        adapter: folder that training wrote; None evaluates the base model as run ``base``.
        output: folder for scores.parquet and images.parquet.
        training: folder of the training's results, whose snapshots and monitors are scored too,
            into snapshots.parquet, snapshot_images.parquet and metrics.parquet.
        sources: what images and scores are made from; None: nothing is taken over.
        before: folders where an earlier evaluation may lie.

    Raises UserError for missing or wrong weights or embeddings.
    """
    name = run.run if adapter is not None else "base"
    evaluator = Evaluator(run, embeddings)
    metadata = {"config_hash": run_key(run), **(sources.head() if sources else {})}

    def kept(scores: str, images: str, limit: int | None = None) -> Kept:
        if sources is None:
            return Kept()
        tables, samples = (TABLES[scores], TABLES[images]), run.evaluate.samples
        found = (Kept.read(folder, tables, sources, samples, limit) for folder in before)
        return next((one for one in found if one.images), Kept())

    def write(table: str, rows: list[Row]) -> None:
        if evaluator.processes.main:
            rows = [{"run": name, **row} for row in rows]
            write_table(output / f"{table}.parquet", TABLES[table], rows, metadata=metadata)

    rows, images = evaluator.evaluate(adapter, name, kept("scores", "images"))
    write("scores", rows)
    write("images", images)
    if training is None:
        return
    scored: list[Row] = []
    shown: list[Row] = []
    for limit in run.train.snapshots:
        weights = training / "snapshots" / str(limit)
        record = read_snapshot(weights)
        found, pictures = rows, images
        if record["iteration"] != run.train.iterations:  # else it is the model just scored
            there = kept("snapshots", "snapshot_images", limit)
            found, pictures = evaluator.evaluate(weights, f"{name} at {limit}", there)
        scored += [{"evaluations": limit, **record, **row} for row in found]
        shown += [{"evaluations": limit, **row} for row in pictures]
    write("snapshots", scored)
    write("snapshot_images", shown)
    if evaluator.processes.main:
        score_monitors(run, training, output / "metrics.parquet", evaluator.score)


class Evaluator:
    """Held-out prompts and rewards, loaded once for all models of a run, where they are needed."""

    def __init__(self, run: RunConfig, embeddings: Embeddings) -> None:
        self.run = run
        self.device = resolve_device(run.model.device)
        self.processes = Processes(self.device)
        self.texts, self.conditioning = load_conditioning(embeddings["heldout"])
        self.rewards: dict[str, RewardModel] = {}

    def score(self, names: Sequence[str], images: Images, prompts: Sequence[str]) -> dict[str, Any]:
        """Some rewards of images [n]: name -> [n]."""
        for name in names:
            if name not in self.rewards:
                self.rewards[name] = load_reward(self.run.rewards[name], str(self.device))
        return score_all({name: self.rewards[name] for name in names}, images, prompts)

    def evaluate(self, adapter: Path | None, what: str, kept: Kept) -> tuple[list[Row], list[Row]]:
        """Rows of scores and of images of one model: the base (None), or what training wrote.

        Processes share out the prompts. ``what`` is how messages call the model, ``kept`` what was
        made of it before. Raises UserError if it makes no image at all: its evaluation is none.
        """
        e, processes = self.run.evaluate, self.processes
        sample = self._sampling(adapter)
        count = min(e.prompts or len(self.texts), len(self.texts))
        kept = self._exact(kept, sample, count)
        ids = list(range(count))[processes.share(count)]
        rows: list[Row] = []
        shown: list[Row] = []
        faults: list[int] = []
        title = f"evaluate {what}"
        with Progress(len(ids), title, unit="prompt", shown=processes.main) as progress:
            for begin in range(0, len(ids), PROMPTS_AT_ONCE):
                part = ids[begin : begin + PROMPTS_AT_ONCE]
                images = self._images(part, sample, kept)
                faults += images.faults.tolist()
                scores = self._scores(part, images, kept)
                for n, picture in enumerate(images.to_files()):
                    i = part[n // e.samples]
                    head = {"prompt_id": i, "prompt": self.texts[i], "sample": n % e.samples}
                    shown.append({**head, "png": png_of(picture)})
                    rows += [{**head, "reward": r, "value": v[n]} for r, v in scores.items()]
                progress.step(count=len(part))
        check(
            processes.joined(faults),
            title if adapter is None else f"{title} ({adapter})",
            self.run.evaluation_model,
            trained=adapter is not None,
            told=processes.main,
        )
        return processes.joined(rows), processes.joined(shown)

    def _sampling(self, adapter: Path | None) -> Sample:
        """Makes images by some weights, which are loaded when it has to make one."""
        run = self.run

        @cache
        def sampler() -> Sampler:
            model = load_model(run.evaluation_model)
            if adapter is not None:
                model.load(adapter)
            grid = evaluation_sigmas(run)
            return Sampler(model, self.conditioning, grid, run.evaluate.micro_batch)

        return lambda ids: sampler().images(ids, run.evaluate.samples)[0]

    def _exact(self, kept: Kept, sample: Sample, count: int) -> Kept:
        """What was kept, if the model still makes it, bit for bit, in other company.

        Only asked where some prompts have images and others do not: of one that has.
        """
        there = [i for i in range(count) if i in kept.images]
        if not there or len(there) == count:
            return kept
        same = torch.equal(sample(there[:1]).pixels, kept.images[there[0]].pixels)
        if all(self.processes.gather(same)):
            return kept
        if self.processes.main:
            say("evaluate: images depend on their batch here: all are made anew")
        return Kept()

    def _images(self, ids: list[int], sample: Sample, kept: Kept) -> Images:
        new, samples = [i for i in ids if i not in kept.images], self.run.evaluate.samples
        found = dict(kept.images)
        if new:
            made = sample(new)
            found |= {i: made[n * samples : (n + 1) * samples] for n, i in enumerate(new)}
        return Images.joined([found[i] for i in ids])

    def _scores(self, ids: list[int], images: Images, kept: Kept) -> dict[str, Any]:
        """Scores of the images of some prompts: those kept, and those of the rest."""
        samples = self.run.evaluate.samples
        out: dict[str, Any] = {}
        missing: dict[tuple[int, ...], list[str]] = {}
        for name in self.run.rewards:
            known = kept.scores.get(name, {})
            missing.setdefault(tuple(i for i in ids if i not in known), []).append(name)
            values = [known.get(i, np.full(samples, np.nan)) for i in ids]
            out[name] = np.concatenate(values)
        for left, names in missing.items():
            if left:
                where = np.repeat([i in left for i in ids], samples)
                prompts = [self.texts[i] for i in left for _ in range(samples)]
                for name, values in self.score(names, images[where], prompts).items():
                    out[name][where] = values
        return out
