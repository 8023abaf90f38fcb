"""Which files that a study names are not there, said before anything runs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator

from egrpo.config.models import Prompts, RunConfig
from egrpo.config.prompts import read_prompts
from egrpo.errors import UserError
from egrpo.settings import is_hub_id
from egrpo.study.resolve import Study


def check_files(study: Study, source: str) -> None:
    """Refuse a study whose prompt, reward or model files are not there, before anything runs.

    Raises UserError naming the key and the file.
    """
    for problem in file_problems(study, source):
        raise UserError(problem)


def file_problems(study: Study, source: str) -> Iterator[str]:
    """Every file that is not there, each once: key, file, and a run that asks for it."""
    of_prompts = functools.cache(lambda *given: [*_problems_of_prompts(*given)])  # files are long
    seen: set[str] = set()
    first = [name for name in study.default_runs if name in study.runs]
    for name in [*first, *(run for run in study.runs if run not in first)]:
        for problem in _problems_of(study.runs[name], of_prompts):
            if problem not in seen:
                seen.add(problem)
                yield f"{source}: {problem} (run {name})"


def _problems_of(run: RunConfig, of_prompts: Callable[[Prompts, int], list[str]]) -> Iterator[str]:
    pinned = run.model.revision is not None
    yield from _source("model.path", run.model.path, "revision", pinned, file=False)
    if run.model.lora.start is not None:
        yield from _source("model.lora.start", run.model.lora.start, None, False, file=True)
    yield from of_prompts(run.prompts, run.train.prompts_per_iteration)
    for name, reward in run.rewards.items():
        for key, path in reward.files.items():
            commit, file = reward.hub.get(key), key in reward.hub_files
            pinned = commit is not None and getattr(reward, commit) is not None
            yield from _source(f"rewards.{name}.{key}", path, commit, pinned, file=file)


def _problems_of_prompts(files: Prompts, size: int) -> Iterator[str]:
    """What is wrong with prompt files, of whose prompts an iteration takes ``size``."""
    for key in ("train", "heldout"):
        path = getattr(files, key)
        if not os.path.isfile(path):
            yield f"prompts.{key}: {path}: no such file"
            continue
        try:
            count = len(read_prompts(path, files.column))
        except UserError as error:
            yield f"prompts.{key}: {error}"
            continue
        count = min(count, files.limit or count)
        if key == "train" and count < size:
            yield f"train.prompts_per_iteration: {size} prompts, but {path} has {count}"


def _source(key: str, path: str, commit: str | None, pinned: bool, *, file: bool) -> Iterator[str]:
    """What a path lacks that is not there, unless it is a hub id whose commit is ``pinned``.

    ``commit``: the setting of the commit, None where only files will do; ``file``: no folder.
    """
    if os.path.exists(path):  # and no error where this can be no path
        return
    what, hub_id = ("file", "owner/name/file") if file else ("folder", "owner/name")
    if commit is None:
        yield f"{key}: {path}: no such file"
    elif not is_hub_id(path, file=file):
        yield f"{key}: {path}: no such {what}, and not a hub id ({hub_id})"
    elif not pinned:
        yield (
            f"{key}: {path}: no such {what}; if it is a hub id ({hub_id}), pin its commit by "
            f"{commit}, so that the run can be repeated"
        )
