"""The page of the architecture against the code: rooms, what each imports, and no circle."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter

from conftest import ROOT

from egrpo.study.code import imported, module_file

LARGEST = 1 / 6
"""Of the house, that a room may be."""


def rooms_on_the_page() -> dict[str, set[str]]:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([a-z_ ]+) \|$", text, re.MULTILINE)
    return {room: set(names.split()) - {"nothing"} for room, names in rows}


def rooms_in_the_code() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "egrpo").rglob("*.py")):
        room = path.relative_to(ROOT / "egrpo").with_suffix("").parts[0]
        if room == "__init__":
            continue
        names = [n for n in imported(path).split("\n") if n.startswith("egrpo.")]
        others = {n.split(".")[1] for n in names if module_file(n)} - {room}
        found.setdefault(room, set()).update(others)
    return found


def test_rooms_and_arrows_are_those_of_the_code() -> None:
    assert rooms_on_the_page() == rooms_in_the_code()


def test_no_room_imports_one_that_imports_it() -> None:
    order = list(TopologicalSorter(rooms_in_the_code()).static_order())
    assert order.index("core") < order.index("train") < order.index("jobs") < order.index("cli")


def test_no_room_is_above_a_sixth_of_the_house() -> None:
    lines: dict[str, int] = {}
    for path in (ROOT / "egrpo").rglob("*.py"):
        room = path.relative_to(ROOT / "egrpo").with_suffix("").parts[0]
        lines[room] = lines.get(room, 0) + len(path.read_text().splitlines())
    assert max(lines.values()) <= LARGEST * sum(lines.values()), lines
