"""Evaluation of models, base or trained: images of held-out prompts, and every reward of them.

Images and scores are kept with what they were made from. An evaluation that follows another one
samples what is not there and scores what is not scored: one more reward costs its scores, one more
prompt its images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from egrpo.config.keys import run_key
from egrpo.config.models import RunConfig
from egrpo.images import Images, check
from egrpo.measure.kept import Kept
from egrpo.measure.monitors import score_monitors
from egrpo.models import load_model
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Embeddings, load_conditioning
from egrpo.models.loading import resolve_device
from egrpo.planning.grids import evaluation_sigmas
from egrpo.progress import Progress
from egrpo.rewards import RewardModel, load_reward, score_all
from egrpo.rewards.network import png_of
from egrpo.sampling.processes import Processes
from egrpo.sampling.sample import Sampler
from egrpo.store.checkpoint import read_snapshot
from egrpo.store.tables import IMAGES, SCORES, SNAPSHOT_IMAGES, SNAPSHOTS, write_table
from egrpo.study.sources import Sources

PROMPTS_AT_ONCE = 32
"""Bounds memory; noise depends on prompt and sample alone, so it changes no image's noise."""

Row = dict[str, Any]


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
        """Sample and score one model: the base (None), or what training wrote to ``adapter``.

        Processes share out the prompts.

        Args:
            adapter, what: weights, and how messages call them.
            kept: images and scores that were made of these weights before.

        Returns:
            Rows of scores and rows of images.

        Raises:
            UserError: if the model makes no image at all: its evaluation is none.
        """
        e, main = self.run.evaluate, self.processes.main
        model = _Weights(self, adapter)
        count = min(e.prompts or len(self.texts), len(self.texts))
        kept = self._exact(kept, model, count)
        ids = list(range(count))[self.processes.share(count)]
        rows: list[Row] = []
        shown: list[Row] = []
        faults: list[int] = []
        title = f"evaluate {what}"
        with Progress(len(ids), title, unit="prompt", shown=main) as progress:
            for begin in range(0, len(ids), PROMPTS_AT_ONCE):
                part = ids[begin : begin + PROMPTS_AT_ONCE]
                images = self._images(part, model, kept)
                heads = [
                    {"prompt_id": i, "prompt": self.texts[i], "sample": s}
                    for i in part
                    for s in range(e.samples)
                ]
                faults += images.faults.tolist()
                scores = self._scores(part, images, kept)
                for n, (head, picture) in enumerate(zip(heads, images.to_files(), strict=True)):
                    shown.append({**head, "png": png_of(picture)})
                    rows += [
                        {**head, "reward": reward, "value": values[n]}
                        for reward, values in scores.items()
                    ]
                progress.step(count=len(part))
        check(
            self.processes.joined(faults),
            title if adapter is None else f"{title} ({adapter})",
            self.run.evaluation_model,
            trained=adapter is not None,
            say=main,
        )
        return self.processes.joined(rows), self.processes.joined(shown)

    def _exact(self, kept: Kept, model: _Weights, count: int) -> Kept:
        """What was kept, if the model still makes it, bit for bit, in other company.

        Only asked where some prompts have images and others do not: of one that has.
        """
        there = [i for i in range(count) if i in kept.images]
        if not there or len(there) == count:
            return kept
        again = model.sample([there[0]])
        same = torch.equal(again.pixels, kept.images[there[0]].pixels)
        if all(self.processes.gather(same)):
            return kept
        if self.processes.main:
            print("evaluate: images depend on their batch here: all are made anew", flush=True)
        return Kept()

    def _images(self, ids: list[int], model: _Weights, kept: Kept) -> Images:
        new = [i for i in ids if i not in kept.images]
        samples = self.run.evaluate.samples
        made = model.sample(new) if new else None
        parts = []
        for i in ids:
            if i in kept.images:
                parts.append(kept.images[i])
            elif made is not None:
                begin = new.index(i) * samples
                parts.append(made[begin : begin + samples])
        return Images.joined(parts)

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


class _Weights:
    """One model of an evaluation, loaded when it has to make an image."""

    def __init__(self, evaluator: Evaluator, adapter: Path | None) -> None:
        self.evaluator, self.adapter = evaluator, adapter

    @cached_property
    def model(self) -> FlowModel:
        """With the adapter's weights."""
        model = load_model(self.evaluator.run.evaluation_model)
        if self.adapter is not None:
            model.load(self.adapter)
        return model

    def sample(self, ids: list[int]) -> Images:
        """Images of some prompts, all samples of each."""
        run, prompts = self.evaluator.run, self.evaluator.conditioning
        sampler = Sampler(self.model, prompts, evaluation_sigmas(run), run.evaluate.micro_batch)
        return sampler.images(ids, run.evaluate.samples)[0]


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
        run: settings; of the run that the base is compared with where ``adapter`` is None.
        adapter: folder that training wrote; None evaluates the base model as run ``base``.
        output: folder for scores.parquet and images.parquet.
        training: folder of the training's results, where the weights that it kept on its way and
            its monitors are scored too: snapshots.parquet, snapshot_images.parquet and
            metrics.parquet.
        sources: what images and scores are made from; None: nothing is taken over.
        before: folders where an earlier evaluation may lie.

    Raises:
        UserError: for missing or wrong weights or embeddings.
    """
    name = run.run if adapter is not None else "base"
    evaluator = Evaluator(run, embeddings)
    main, samples = evaluator.processes.main, run.evaluate.samples
    head = {"config_hash": run_key(run), **(sources.head() if sources else {})}

    def kept(tables: tuple[str, str], limit: int | None = None) -> Kept:
        found = (Kept.read(f, tables, sources, samples, limit) for f in before if sources)
        return next((one for one in found if one.images), Kept())

    rows, images = evaluator.evaluate(adapter, name, kept(("scores.parquet", "images.parquet")))
    if main:
        _write(output / "scores.parquet", SCORES, {"run": name}, rows, head)
        _write(output / "images.parquet", IMAGES, {"run": name}, images, head)
    if training is None:
        return
    scored: list[Row] = []
    shown: list[Row] = []
    for limit in run.train.snapshots:
        weights = training / "snapshots" / str(limit)
        record = read_snapshot(weights)
        found, pictures = rows, images
        if record["iteration"] != run.train.iterations:  # else it is the model just scored
            tables = ("snapshots.parquet", "snapshot_images.parquet")
            found, pictures = evaluator.evaluate(weights, f"{name} at {limit}", kept(tables, limit))
        scored += [{"evaluations": limit, **record, **row} for row in found]
        shown += [{"evaluations": limit, **row} for row in pictures]
    if main:
        _write(output / "snapshots.parquet", SNAPSHOTS, {"run": name}, scored, head)
        _write(output / "snapshot_images.parquet", SNAPSHOT_IMAGES, {"run": name}, shown, head)
        score_monitors(run, training, output / "metrics.parquet", evaluator.score)


def _write(
    path: Path, table: Any, first: Row, rows: Sequence[Row], metadata: Mapping[str, str]
) -> None:
    write_table(path, table, [{**first, **row} for row in rows], metadata=metadata)
