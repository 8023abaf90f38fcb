"""What a job of a study would refuse, known from settings and files alone; needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.config.prompts import Prompt, read_prompts, train_prompts
from egrpo.config.rewards import Preference, Verifier, VerifierExact
from egrpo.errors import UserError
from egrpo.models.latents import size_problems
from egrpo.planning.trees import check_trees, needs_plan
from egrpo.study.files import check_files
from egrpo.study.resolve import Study
from egrpo.world.prompts import parse_prompt
from egrpo.world.shapes import IMAGE_SIZE


def check_study(study: Study, source: str) -> None:
    """Refuse a study that a job of it would refuse, before anything runs.

    Raises:
        UserError: naming the setting and a run.
    """
    check_files(study, source)
    check_trees(study.runs)
    for problem in problems(study):
        raise UserError(f"{source}: {problem}")


def problems(study: Study) -> Iterator[str]:
    """Image sizes that a model cannot make, prompts and sizes that a reward cannot read.

    Each once, with the first run that has it.
    """
    said: set[str] = set()
    # a sweep's runs differ elsewhere
    for run in different(
        study.runs.values(), lambda r: (r.model, r.prompts, r.rewards, r.train.rewards, r.evaluate)
    ):
        for problem in (*size_problems(run), *reward_problems(run)):
            if problem not in said:
                said.add(problem)
                yield f"{problem} (run {run.run})"


def different(runs: Iterable[RunConfig], key: Callable[[RunConfig], Any]) -> Iterable[RunConfig]:
    """The first run of each different value."""
    found: dict[str, RunConfig] = {}
    for run in runs:
        found.setdefault(repr(key(run)), run)
    return found.values()


def reward_problems(run: RunConfig) -> Iterator[str]:
    """Images and prompts that the toy world's rewards cannot read."""
    readers = [n for n, r in run.rewards.items() if isinstance(r, Verifier | VerifierExact)]
    small = [n for n, r in run.rewards.items() if n in readers or isinstance(r, Preference)]
    size = IMAGE_SIZE, IMAGE_SIZE
    for section, model in {"model": run.model, "evaluate": run.evaluation_model}.items():
        if small and (model.height, model.width) != size:
            yield (
                f"{section}.height, {section}.width: {model.height} x {model.width}, but "
                f"rewards {', '.join(small)} read {IMAGE_SIZE} x {IMAGE_SIZE} pixels only; leave "
                "them out by null"
            )
            break
    for key, prompts in _scored_prompts(run, readers).items() if readers else ():
        for number, prompt in enumerate(prompts, start=1):
            try:
                parse_prompt(prompt.text)
            except ValueError as error:
                yield (
                    f"prompts.{key}: {getattr(run.prompts, key)}, prompt {number}: {error}; "
                    f"rewards {', '.join(readers)} read no others; leave them out by null"
                )
                break


def _scored_prompts(run: RunConfig, rewards: list[str]) -> dict[str, list[Prompt]]:
    """Those prompts of each file whose images some of these rewards see."""
    files = run.prompts
    train = train_prompts(files.train, files.limit, files.column)
    if not set(rewards) & set(run.train.rewards):  # the profile asks all of them
        train = train[: run.profile.prompts] if needs_plan(run) else []
    count = run.evaluate.prompts and max(run.evaluate.prompts, run.train.monitor_prompts)
    return {"train": train, "heldout": read_prompts(files.heldout, files.column)[:count]}
