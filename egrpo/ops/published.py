"""What others publish and presets read: where it is, its license, and how many prompts it holds.

``published.tsv`` beside this module is the list. Nothing here fetches anything: `egrpo doctor
--fetch-plan` prints commands of the hub's own client and of curl, `egrpo prompts` reads the files.
"""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.config.prompts import read_prompts
from egrpo.errors import UserError, refusing
from egrpo.store.files import write_text
from egrpo.study.resolve import Study

TABLE = Path(__file__).with_name("published.tsv")
GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Published:
    """One thing to fetch.

    Attributes:
        path: where presets look for it.
        source: a hub id, ``dataset:`` and a hub id, ``github:owner/name@commit/path``, or a URL.
        files: what of a repository on the hub: files, or options of ``hf download``.
        gib: size in GiB, estimated from numbers of weights.
        license: of weights or prompts, as noted here; the publisher's page decides.
        prompts: how many prompts it holds, each once; None: weights, or not known.
        counted: whether that was counted in the published file, and not taken from its paper.
        column: which column or key holds them; empty for weights.
    """

    path: str
    source: str
    files: str
    gib: float
    license: str
    prompts: int | None
    counted: bool
    column: str

    @property
    def name(self) -> str:
        """Of a set of prompts, as `egrpo prompts` is given it."""
        return Path(self.path).stem

    @property
    def count(self) -> str:
        """Its number of prompts: counted, ``~`` from a publication, ``?`` not known."""
        return "?" if self.prompts is None else f"{'' if self.counted else '~'}{self.prompts}"

    def is_at(self, path: str) -> bool:
        """Whether a setting's path means this: below another folder it is the same."""
        _, *tail = Path(self.path).parts
        return list(Path(path).parts[-len(tail) :]) == tail

    def commands(self, path: str) -> list[str]:
        """The shell's commands that bring it to ``path``."""
        to = Path(path)
        kind, _, rest = self.source.partition(":")
        if kind in ("https", "github"):
            url = self.source
            if kind == "github":
                repository, _, where = rest.partition("@")
                url = f"{GITHUB}/{repository}/{where}"
            file = to
            if self.column:
                file = to.parent / "published" / f"{self.name}{Path(rest).suffix or '.csv'}"
            got = [f"curl -fL --create-dirs -o {shlex.quote(str(file))} {shlex.quote(url)}"]
            return got + self._converted([str(file)], path)
        hub_id = rest if kind == "dataset" else self.source
        folder = to
        if kind == "dataset":
            folder = to.parent / hub_id.partition("/")[2]
        elif self.files and not self.files.startswith("--"):
            folder = to.parent
        words = f"hf download {hub_id} {self.files}{' --repo-type dataset' * (kind == 'dataset')}"
        got = [f"{words} --local-dir {shlex.quote(str(folder))}"]
        names = [w for w in shlex.split(self.files) if w != "--include"]
        files = [f"{shlex.quote(str(folder))}/{name}" for name in names]  # which may be patterns
        return got + self._converted(files, path)

    def _converted(self, files: list[str], path: str) -> list[str]:
        if not self.column:
            return []
        return [f"egrpo prompts {self.name} {' '.join(files)} --to {shlex.quote(path)}"]


def published() -> list[Published]:
    """All of the list."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    out = []
    for path, source, files, gib, of, n, column in rows:
        count = int(n.removeprefix("~")) if n else None
        out.append(Published(path, source, files, float(gib), of, count, n[:1] != "~", column))
    return out


def fetch_plan(study: Study, there: Callable[[str], bool] = os.path.exists) -> Iterator[str]:
    """Lines of a shell script that brings what the runs of a study name and is not there."""
    every, seen, gib = published(), set(), 0.0
    for run in study.runs.values():
        for key, path in _named(run):
            if path in seen or there(path):
                continue
            seen.add(path)
            item = next((item for item in every if item.is_at(path)), None)
            if item is None:
                yield f"# {key}: {path}: yours to bring"
                continue
            gib += item.gib
            yield f"# {key}: {item.gib:g} GiB; license: {item.license}"
            yield from item.commands(path)
    yield f"# {gib:.1f} GiB in all" if seen else "# nothing is missing"


def _named(run: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, path) of the files of a run that are no hub ids with a commit."""
    named: list[tuple[str, str, Any]] = [("model.path", run.model.path, run.model.revision)]
    if run.model.lora.start is not None:
        named.append(("model.lora.start", run.model.lora.start, None))
    for name, reward in run.rewards.items():
        for key, path in reward.files.items():
            commit = reward.hub.get(key)
            pinned = commit and getattr(reward, commit)
            named.append((f"rewards.{name}.{key}", path, pinned))
    named += [(f"prompts.{key}", getattr(run.prompts, key), None) for key in ("train", "heldout")]
    for key, path, commit in named:
        if commit is None:
            yield key, path


def convert(name: str, files: Sequence[Path], to: Path | None) -> str:
    """Write the prompts of a published set, each once, as a prompt file; returns what to say.

    Args:
        name: of the list.
        files: as they were published; also Parquet.
        to: .txt, or .jsonl where a prompt has several lines; None: where presets look for it.

    Raises:
        UserError: if there is no such set, or the files do not hold as many prompts as were counted
            in it; another number than its paper's is said only.
    """
    sets = {item.name: item for item in published() if item.column}
    if name not in sets:
        raise UserError(f"no set of prompts {name!r}; there are {', '.join(sets)}")
    item = sets[name]
    found = list(dict.fromkeys(text for file in files for text in _texts(file, item.column)))
    given = ", ".join(map(str, files))
    other = item.prompts is not None and len(found) != item.prompts
    if other and item.counted:
        raise UserError(
            f"{given}: {len(found)} different prompts, but {name} has {item.prompts}; is a file "
            "missing, or of another version?"
        )
    to = to or Path(item.path)
    broken = [number for number, text in enumerate(found, start=1) if "\n" in text]
    if to.suffix == ".jsonl":
        import json

        lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in found]
    elif to.suffix != ".txt":
        raise UserError(f"--to {to}: expected a name that ends in .txt or .jsonl")
    elif broken:
        raise UserError(
            f"{given}: prompt {broken[0]} has several lines; write --to {to.with_suffix('.jsonl')}"
        )
    else:
        lines = found
    write_text(to, "".join(f"{line}\n" for line in lines))
    checked = "as published" if item.prompts else "how many there are is not known"
    if other:
        checked = f"but {item.prompts} by its publication: is a file missing?"
    return f"{to}: {len(found)} prompts, {checked}"


def _texts(file: Path, column: str) -> Iterator[str]:
    if file.suffix != ".parquet":
        yield from (prompt.text for prompt in read_prompts(file, column))
        return
    import pyarrow.parquet as pq

    with refusing(f"{file}: cannot be read"):
        texts = pq.read_table(file, columns=[column]).column(column).to_pylist()
    yield from (text.strip() for text in texts if text and text.strip())


def table() -> str:
    """The sets of prompts, for people."""
    rows = [("set", "prompts", "license", "from")] + [
        (item.name, item.count, item.license, item.source) for item in published() if item.column
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, [*widths, 0], strict=True)).rstrip()
        for row in rows
    )
