"""What a file holds, by its digest; each file is read once, ever.

A digest is kept under the file's path, size, times and inode: any write changes one of them. A
file that was changed within the last seconds is not kept, for the next write could be of the same
moment.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from egrpo.errors import UserError
from egrpo.store.files import write_text

RECENT = 2.0
"""Seconds within which a file system may give two writes the same time."""

UNREAD = frozenset(
    ".md .png .jpg .jpeg .gif .webp .svg .pdf .html .onnx .msgpack .h5 .ot .tflite .gguf".split()
)
"""Suffixes of what lies in folders of models and is no part of what is loaded from them."""
PICKLED = frozenset(".bin .pt .pth .ckpt".split())
"""Weights that nobody reads where safetensors lie beside them."""


class Digests:
    """Digests of files, kept in a JSON file between processes.

    Where that cannot be written, each process reads for itself.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.known: dict[str, list[Any]] = {}
        with suppress(OSError, ValueError):
            known = json.loads(cache.read_text(encoding="utf-8"))
            self.known = known if isinstance(known, dict) else {}
        self.grown = False

    def file(self, path: Path, read: Callable[[Path], str] | None = None) -> str:
        """Ten digits of a file's bytes, or what ``read`` finds; UserError if it cannot be read."""
        name = f"{os.path.realpath(path)}{f' {read.__name__}' if read else ''}"
        try:
            stat = os.stat(path)
            state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            known = self.known.get(name)
            if known is not None and known[1:] == state:
                return str(known[0])
            found = (read or _bytes)(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if time.time() - max(stat.st_mtime, stat.st_ctime) > RECENT:
            self.known[name] = [found, *state]
            self.grown = True
        return found

    def files(self, path: str) -> dict[str, str]:
        """Digests of what is loaded from a file or a folder, by name below it.

        Of a hub id, whose commit says what it is, nothing.
        """
        root = Path(path)
        if root.is_file():
            return {"": self.file(root)}
        return {f.relative_to(root).as_posix(): self.file(f) for f in loaded_files(root)}

    def code(self, path: Path) -> str:
        """Digest of what Python source does: without comments, docstrings and formatting."""
        return self.file(path, code_digest)

    def save(self) -> None:
        """Keep what was read."""
        if self.grown:
            with suppress(UserError, OSError):
                write_text(self.cache, json.dumps(self.known))
            self.grown = False


def _bytes(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:10]


def loaded_files(root: Path) -> Iterator[Path]:
    """Files of a model's folder that a loader reads.

    Of a pipeline (``model_index.json``) those of its parts.
    """
    index = root / "model_index.json"
    folders = [root]
    if index.is_file():
        yield index
        try:
            parts = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            parts = {}
        names = sorted(parts) if isinstance(parts, dict) else []
        folders = [root / name for name in names if (root / name).is_dir()]
    for folder in folders:
        yield from _below(folder)


def _below(folder: Path) -> Iterator[Path]:
    entries = sorted(folder.iterdir())
    safe = any(path.suffix == ".safetensors" for path in entries)
    for path in entries:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _below(path)
        elif path.suffix.lower() not in UNREAD and not (safe and path.suffix in PICKLED):
            yield path


def code_digest(path: Path) -> str:
    """Ten digits of a Python file's syntax tree without docstrings."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # not of this Python: then every byte counts
        return _bytes(path)
    sha = hashlib.sha256()
    _add(sha, tree)
    return sha.hexdigest()[:10]


def _add(sha: Any, node: Any) -> None:
    """A syntax tree into a digest; what is absent adds nothing, as Pythons differ in naming it."""
    if isinstance(node, ast.AST):
        sha.update(f"({type(node).__name__}".encode())
        for name, value in ast.iter_fields(node):
            if value is None or value == [] or name in ("type_comment", "kind"):
                continue
            if isinstance(value, list):
                value = [one for one in value if not _is_text(one)]
            sha.update(f" {name}=".encode())
            _add(sha, value)
        sha.update(b")")
    elif isinstance(node, list):
        for one in node:
            _add(sha, one)
    else:
        sha.update(f"{type(node).__name__} {node!r}".encode())


def _is_text(node: Any) -> bool:
    """Whether a statement is a docstring, of a name too: text that nobody uses."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
