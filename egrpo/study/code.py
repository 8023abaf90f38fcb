"""Which code a stage runs: the modules that it imports, found in the source.

Rooms that compute count. What the others do is in a result's identity by value: settings are
recorded as they were resolved, grids as their sigmas, prompts as texts; what stores, tracks and
tells changes no number.
"""

from __future__ import annotations

import ast
import functools
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.util import resolve_name
from pathlib import Path

import egrpo
from egrpo.config.keys import digest
from egrpo.study.digests import Digests

COMPUTE = (
    *("core", "methods", "models", "rewards", "world", "planning", "sampling", "train", "measure"),
    "images",
)
"""Rooms whose code decides what a stage computes."""
TELL = ("report", "figures", "page", "tracking", "store")
"""Rooms whose code decides how results are told: that is made again in seconds."""

PACKAGE = Path(egrpo.__file__).parent


def imported(path: Path) -> str:
    """Names of the modules that a file imports, one a line; for type checkers alone do not count.

    ``from a import b`` names ``a`` and ``a.b``, of which one may not be a module.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    return "\n".join(sorted(set(_imports(tree))))


def _imports(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for other in node.orelse:
            yield from _imports(other)
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        yield base
        dot = "" if base.endswith(".") else "."
        yield from (f"{base}{dot}{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child)


class Code:
    """Digests of the code behind stages and rewards."""

    def __init__(self, digests: Digests) -> None:
        self.digests = digests
        self.rooms = functools.cache(self._rooms)
        self._next = functools.cache(self._neighbors)

    def _rooms(self, *roots: str, rooms: tuple[str, ...] = COMPUTE) -> dict[str, str]:
        """Digest of each room's modules that modules of this package need, themselves included."""
        found: dict[str, dict[str, str]] = {}
        for name, path in self.needed(roots, rooms).items():
            found.setdefault(name.split(".")[1], {})[name] = self.digests.code(path)
        return {f"code {room}": digest(each) for room, each in sorted(found.items())}

    def needed(self, roots: Iterable[str], rooms: tuple[str, ...] = COMPUTE) -> dict[str, Path]:
        """Modules in these rooms that some need, at any depth within them."""
        found: dict[str, Path] = {}
        left = [*roots]
        while left:
            name = left.pop()
            path = module_file(name)
            if path and name not in found and name.split(".")[1] in rooms:
                found[name] = path
                left += self._next(path)
        return found

    def _neighbors(self, path: Path) -> list[str]:
        names = self.digests.file(path, imported).split("\n")
        return [name for name in names if name.startswith("egrpo.")]

    def own(self, module: str) -> dict[str, str]:
        """Digest of each file outside the installed packages that a user's module needs."""
        found: dict[str, str] = {}
        left, seen = [module], set[str]()
        while left:
            name = left.pop()
            if name in seen:
                continue
            seen.add(name)
            for path in users_files(name, first=name == module):
                key = f"code {path.name if path.stem != '__init__' else path.parent.name}"
                found[f"{key} ({name})"] = self.digests.code(path)
                package = name if path.stem == "__init__" else name.rpartition(".")[0]
                for other in filter(None, self.digests.file(path, imported).split("\n")):
                    with suppress(ImportError):  # a relative one beyond the top
                        left.append(resolve_name(other, package))
        return found


def module_file(name: str) -> Path | None:
    """Source of a module of this package; None for what is none."""
    below = PACKAGE.joinpath(*name.split(".")[1:])
    for path in (below.with_suffix(".py") if below != PACKAGE else None, below / "__init__.py"):
        if path is not None and path.is_file():
            return path
    return None


def users_files(name: str, *, first: bool = False) -> list[Path]:
    """Files of a module, and of its packages, where Python would find it outside of what is
    installed; ``first``: or there, too."""
    parts = name.split(".")
    if parts[0] == "egrpo":
        return []
    installed = [Path(sysconfig.get_path(k)).resolve() for k in ("stdlib", "purelib", "platlib")]
    for base in (Path(entry or ".").resolve() for entry in (".", *sys.path)):
        named = {"site-packages", "dist-packages"} & set(base.parts)
        if not first and (named or any(base.is_relative_to(there) for there in installed)):
            continue
        found = []
        for count in range(1, len(parts) + 1):
            place = base.joinpath(*parts[:count])
            options = [place / "__init__.py", place.with_name(f"{place.name}.py")]
            there = [path for path in options if path.is_file()]
            if not there and not place.is_dir():
                break
            found += there[:1]
        if found:
            return found
    return []
