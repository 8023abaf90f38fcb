"""What earlier settings of a study left in its folder: found, counted, removed on request.

Only what the workflow made is ever named: in a folder of the study, called as the layout calls it,
with a log of the rule, and no symbolic link. What a run of today's settings wants stays, and so
does everything else.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from egrpo.config.load import read_yaml
from egrpo.errors import UserError
from egrpo.store.files import lock, read_json
from egrpo.study.due import Due
from egrpo.study.layout import SHARED, Layout
from egrpo.study.orders import order_of_run

KEY = "[0-9a-f]{10}"
RUN = r"[A-Za-z0-9][A-Za-z0-9._-]*"
STATE_FILES = r"checkpoint-.*|journal.*|lock|monitor|snapshots|until-\d+|identity\.json|\..*\.tmp"
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
    found = [(path, parts) for path, parts in _superseded(at) if parts]
    return [Leftover(path, parts, sum(map(size_of, parts))) for path, parts in found]


def summary(found: list[Leftover]) -> str:
    """How many there are, and how large they are together."""
    if not found:
        return "nothing of earlier settings"
    size = sum(one.size for one in found)
    return f"{len(found)} files and folders of earlier settings, {size / 2**30:.2f} GiB"


def _superseded(at: Layout) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """(file or folder, what a stage made of it).

    That a stage made something is known by its receipt, or by the log of its rule; of orders, by
    their names.
    """
    runs, root = at.study.runs, at.root
    orders = {order_of_run(at, run, write=False).name for run in runs}
    for path in _below(root / "settings", rf"{RUN}-{KEY}\.(json|yaml)"):
        if path.name not in orders and _is_old_order(path, at.study.name, orders):
            yield path, (path,)
    for path in _below(root / ".made", r".+"):
        yield path, (path,)
    wanted = Due(at).owners
    for stage in SHARED:
        for name in _made(root, stage, "evaluate_base" if stage == "base" else stage):
            path = at.outputs(stage, name)[0] if stage == "embed" else at.folder(stage, name)
            if (stage, name) not in wanted and re.fullmatch(KEY, name) and not path.is_symlink():
                yield path, _there(at.outputs(stage, name))
    of_runs = _made(root, "train", "train", "plan", "run_config") | _made(root, "plan", "plan")
    for path in _below(root / "runs", RUN):
        if path.name not in runs and path.name in of_runs:
            own = ("plan", "train", "evaluate", "suffixes")
            yield path, _there(file for stage in own for file in at.outputs(stage, path.name))
    for folder in _below(root / "state", RUN):
        if folder.name in of_runs:
            kept = _states(at, folder.name) if folder.name in runs else set()
            for path in _below(folder, KEY):
                if path.name not in kept:
                    yield path, _below(path, STATE_FILES)


def _made(root: Path, stage: str, *rules: str) -> set[str]:
    """Names of what a stage made: those with a receipt, or with a log of one of its rules."""
    receipts = {p.stem for p in _below(root / "identity" / stage, r".*\.json")}
    logs = {log for rule in rules for log in _below(root / "logs" / rule, r".*\.log")}
    return receipts | {log.name.removesuffix(".log") for log in logs}


def _is_old_order(path: Path, study: str, orders: set[str]) -> bool:
    """Whether a file is an order of a job, and of settings that are not today's."""
    try:
        found = read_yaml(path) if path.suffix == ".yaml" else read_json(path)
    except UserError:
        return False
    if not isinstance(found, dict):
        return False
    if path.suffix == ".yaml":  # of versions that had a file of settings for each stage
        return found.get("study") == study
    told = found.get("runs")
    if isinstance(told, list):
        return "record" in found and not set(told) <= orders
    return {"settings", "identities"} <= found.keys()


def _below(folder: Path, pattern: str) -> tuple[Path, ...]:
    """Entries of a folder of these names; none of a link, and no link."""
    if folder.is_symlink() or not folder.is_dir():
        return ()
    found = (path for path in sorted(folder.iterdir()) if re.fullmatch(pattern, path.name))
    return tuple(path for path in found if not path.is_symlink())


def _there(outputs: Iterable[Path]) -> tuple[Path, ...]:
    """Those that are there, and no link."""
    return tuple(path for path in sorted(outputs) if path.exists() and not path.is_symlink())


def _states(at: Layout, run: str) -> set[str]:
    """Keys of the states that a run would go on from, and was made from."""
    kept = {at.identity("trajectory", run)}
    with suppress(UserError, AttributeError):  # it is not trained yet, or the file is damaged
        kept.add(str(read_json(at.run(run) / "train.json").get("key")))
    return kept


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count as themselves."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    files = (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(os.lstat(file).st_size for file in files)


def remove(at: Layout, found: list[Leftover]) -> None:
    """Remove leftovers; folders go with them where nothing else lies there.

    Raises:
        UserError: if a workflow or a job works there, before anything is removed; if a file cannot
            be removed.
    """
    with ExitStack() as held:
        states = [one.path for one in found if one.path.is_relative_to(at.root / "state")]
        for folder, name in ((at.root, "workflow.lock"), *((state, "lock") for state in states)):
            if (handle := lock(folder / name)) is None:
                text = "a job works there; wait for it or end it. Nothing was removed"
                raise UserError(f"{folder}: {text}")
            held.callback(os.close, handle)
        for one in found:
            try:
                for part in one.parts:
                    if part.is_dir():
                        shutil.rmtree(part)
                    else:
                        part.unlink(missing_ok=True)
                if one.path.is_dir():
                    (one.path / "lock").unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{error.filename}: cannot be removed: {error.strerror}") from None
            for folder in [one.path, one.path.parent] if one.path in states else [one.path]:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
