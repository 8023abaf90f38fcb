"""What earlier settings of a study left in its folder: found, counted, removed on request.

Only what the workflow made is ever named: in a folder of the study, called as the layout calls it,
with a log of the rule, and no symbolic link. What a run of today's settings wants stays, and so
does everything else.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from egrpo.config.load import read_yaml
from egrpo.errors import UserError
from egrpo.planning.plan import load_plan
from egrpo.planning.trees import needs_plan
from egrpo.store.files import lock, read_json
from egrpo.study.fingerprint import state_key
from egrpo.study.keys import KEYS
from egrpo.study.layout import Layout

KEY = "[0-9a-f]{10}"
RUN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
PROFILE_FILES = r"(entropy_profile|branches)\.parquet"
BASE_FILES = r"(scores|images)\.parquet"
RUN_FILES = (
    r"config\.yaml|plan\.json|train\.json|adapter|monitor|snapshots|suffixes\.(parquet|csv|md|html)"
    r"|(merge_plan|train_metrics|rollouts|scores|images|snapshots)\.parquet"
)
"""What rules make in the folder of a run."""
STATE_FILES = r"checkpoint-.*|journal.*|lock|monitor|snapshots|\..*\.tmp"
"""What training makes in its state folder."""


@dataclass(frozen=True)
class Leftover:
    """A file or folder that no run of today's settings wants.

    Attributes:
        path: what it is listed as.
        parts: files and folders that are removed; of a folder, those that a stage made.
        size: bytes of these.
    """

    path: Path
    parts: tuple[Path, ...]
    size: int


def leftovers(at: Layout) -> list[Leftover]:
    """What earlier settings left in the study's folder."""
    found = [_leftover(path, parts) for path, parts in _superseded(at)]
    return [one for one in found if one.parts]


def summary(found: list[Leftover]) -> str:
    """How many there are, and how large they are together."""
    if not found:
        return "nothing of earlier settings"
    size = sum(one.size for one in found)
    return f"{len(found)} files and folders of earlier settings, {size / 2**30:.2f} GiB"


def _leftover(path: Path, parts: list[Path]) -> Leftover:
    ours = tuple(part for part in parts if not part.is_symlink())
    return Leftover(path, ours, sum(map(size_of, ours)))


def _superseded(at: Layout) -> Iterator[tuple[Path, list[Path]]]:
    """(file or folder, what a stage made of it).

    That a rule made something is known by its log; of settings, by what they say.
    """
    runs, root = at.study.runs, at.root
    settings = {at.settings(stage, run) for stage in KEYS for run in runs}
    settings |= {at.target_settings(name) for name in (*at.study.tables, *at.study.figures)}
    for path in _below(root / "settings", rf"[a-z][a-z0-9_]*-{KEY}\.yaml"):
        if path not in settings and _says_what_it_is(path, at.study.name):
            yield path, [path]
    embeddings = {at.embeddings(run) for run in runs}
    for key in _logged(root, "embed"):
        path = root / "embeddings" / f"{key}.safetensors"
        if path not in embeddings and path.is_file():
            yield path, [path]
    for name, rule, files, wanted in (
        ("profiles", "profile", PROFILE_FILES, {at.profile(run).parent for run in runs}),
        ("base", "evaluate_base", BASE_FILES, {at.base(run) for run in runs}),
    ):
        for path in _below(root / name, KEY):
            if path not in wanted and path.name in _logged(root, rule):
                yield path, list(_below(path, files))
    for path in _below(root / "runs", RUN):
        if path.name not in runs and path.name in _logged(root, "run_config", "plan", "train"):
            yield path, list(_below(path, RUN_FILES))
    for folder in _below(root / "state", RUN):
        if folder.name not in _logged(root, "train"):
            continue
        kept = _states(at, folder.name) if folder.name in runs else set()
        for path in _below(folder, KEY):
            if kept is not None and path.name not in kept:
                yield path, list(_below(path, STATE_FILES))


def _logged(root: Path, *rules: str) -> set[str]:
    """Keys or runs that have a log of one of these rules."""
    logs = [log for rule in rules for log in _below(root / "logs" / rule, r".*\.log")]
    return {log.name.removesuffix(".log") for log in logs}


def _says_what_it_is(path: Path, study: str) -> bool:
    """Whether a settings file is a stage's of this study, or a table's or figure's."""
    name = path.name.rpartition("-")[0]
    try:
        data = read_yaml(path)
    except UserError:
        return False
    return data.get("study") == study if name in KEYS else data.get("name") == name


def _below(folder: Path, pattern: str) -> Iterator[Path]:
    """Entries of a folder of these names; none of a link, and no link."""
    if folder.is_symlink() or not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if re.fullmatch(pattern, path.name) and not path.is_symlink():
            yield path


def _states(at: Layout, run: str) -> set[str] | None:
    """Keys of the states that a run would go on from, and was made from; None: not known."""
    settings, plan, embeddings = at.study.runs[run], at.run(run) / "plan.json", at.embeddings(run)
    try:
        now = state_key(settings, load_plan(plan) if needs_plan(settings) else None, embeddings)
        summary = at.run(run) / "train.json"
        return {now, *([str(read_json(summary).get("key"))] if summary.exists() else [])}
    except (UserError, OSError, AttributeError):  # it is not planned yet, or a file is damaged
        return None


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as themselves."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(
        os.lstat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(path)
        for name in names
    )


def remove(at: Layout, found: list[Leftover]) -> None:
    """Remove leftovers; folders go with them where nothing else lies there.

    Raises:
        UserError: if a workflow or a job works there, before anything is removed; if a file cannot
            be removed.
    """
    with ExitStack() as held:
        _hold(held, at.root / "workflow.lock", at.root)
        states = [one.path for one in found if one.path.is_relative_to(at.root / "state")]
        for folder in states:
            _hold(held, folder / "lock", folder)
        for one in found:
            try:
                for part in one.parts:
                    if part.is_dir() and not part.is_symlink():
                        shutil.rmtree(part)
                    else:
                        part.unlink(missing_ok=True)
                if one.path.is_dir():
                    (one.path / "lock").unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{error.filename}: cannot be removed: {error.strerror}") from None
            folders = [one.path, one.path.parent] if one.path in states else [one.path]
            for folder in folders:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _hold(held: ExitStack, file: Path, folder: Path) -> None:
    handle = lock(file)
    if handle is None:
        raise UserError(f"{folder}: a job works there; wait for it or end it. Nothing was removed")
    held.callback(os.close, handle)
