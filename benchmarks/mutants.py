"""Small faults in the code: do the fast tests find them?

``python benchmarks/mutants.py [--room core] [--count 36] [--seed 0] [--tests FILE ...]``

Changes one operator or number of a room at a time, drawn by the seed, in a temporary copy of the
project, and runs the room's tests on each. A change that no test finds has survived: it is printed,
to be judged by hand, for some change nothing that can be seen. ``--append`` adds the numbers to a
table.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("egrpo", "tests", "config", "assets", "pyproject.toml")
MATHEMATICS = (
    *("test_methods*", "test_tree_executor", "test_advantage_loss", "test_schedule_plan"),
    *("test_transitions", "test_spread", "test_intervals"),
)
FAST = {
    "core": MATHEMATICS,
    "methods": MATHEMATICS,
    "planning": (*MATHEMATICS, "test_study"),
    "config": ("test_config", "test_data"),
    "rewards": ("test_models_rewards", "test_reward_models"),
}
"""Names of the test files that know a room and take less than a minute together."""

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And},
}


def mutated(node: ast.AST) -> ast.AST | None:
    """The node with another operator or number; None where it has none."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(new.op) in SWAPS:
        new.op = SWAPS[type(new.op)]()  # type: ignore[assignment]
    elif isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPS:
        new.ops[0] = SWAPS[type(new.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(new, ast.UnaryOp) and isinstance(new.op, ast.Not | ast.USub):
        return new.operand
    elif isinstance(new, ast.Constant) and type(new.value) is int:
        new.value += 1
    elif isinstance(new, ast.Constant) and type(new.value) is float:
        new.value = 2 * new.value or 1.0
    else:
        return None
    return new


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """(parent, field, position) of every node that can change; no annotation, nor what is told."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns") or isinstance(tree, ast.JoinedStr):
            continue  # the texts of errors are not computed with
        for n, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST):
                continue
            if mutated(child) is not None:
                yield tree, field, n if isinstance(value, list) else None
            yield from places(child)


def change(source: str, number: int) -> tuple[str, str]:
    """The source with its place ``number`` changed, and what was changed, in words."""
    tree = ast.parse(source)
    parent, field, n = list(places(tree))[number]
    value = getattr(parent, field)
    old = value if n is None else value[n]
    new = mutated(old)
    assert new is not None
    if n is None:
        setattr(parent, field, new)
    else:
        value[n] = new
    line = getattr(old, "lineno", 0)
    words = " ".join(f"{ast.unparse(old)} -> {ast.unparse(new)}".split())
    return ast.unparse(ast.fix_missing_locations(tree)), f"{line}: {words}"


def passes(folder: Path, tests: list[str], limit: float) -> bool:
    """Whether all tests pass in a copy of the project; what takes longer than ``limit`` s fails."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    env |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    words = ["-m", "pytest", "-qx", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
    try:
        done = subprocess.run(
            [sys.executable, *words], cwd=folder, env=env, capture_output=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode not in (0, 1, 2):
        raise SystemExit(done.stdout.decode()[-3000:] + done.stderr.decode()[-3000:])
    return done.returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--room", default="core", help="folder below egrpo/")
    parser.add_argument("--count", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="*", help="test files, where not the room's own")
    parser.add_argument("--append", type=Path, help="a Markdown table that gets a line more")
    args = parser.parse_args()
    paths = args.tests or [
        str(path.relative_to(ROOT))
        for name in FAST.get(args.room, ())
        for path in sorted(ROOT.glob(f"tests/{name}.py"))
    ]
    if not paths:
        parser.error(f"no tests are known for room {args.room!r}; name some by --tests")
    sources = {path: path.read_text() for path in sorted(ROOT.glob(f"egrpo/{args.room}/**/*.py"))}
    sites = [
        (path, n)
        for path, text in sources.items()
        for n in range(sum(1 for _ in places(ast.parse(text))))
    ]
    drawn = random.Random(args.seed).sample(sites, min(args.count, len(sites)))
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__py*"))
            else:
                shutil.copy(ROOT / part, folder / part)
        begun = time.monotonic()
        if not passes(folder, paths, 3600):
            raise SystemExit("the tests fail without any change")
        seconds = time.monotonic() - begun
        for done, (path, n) in enumerate(drawn, 1):
            text, words = change(sources[path], n)
            copied = folder / path.relative_to(ROOT)
            copied.write_text(text)
            lives = passes(folder, paths, 60 + 5 * seconds)
            copied.write_text(sources[path])
            where = f"{path.relative_to(ROOT)}:{words}"
            survived += [where] if lives else []
            print(f"{done:>3} {'SURVIVED' if lives else 'found   '} {where}", flush=True)
    found = len(drawn) - len(survived)
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in paths)
    print(f"{found} of {len(drawn)} found, {lines} lines of tests, {seconds:.0f} s")
    if args.append:
        row = f"| {args.room} | {args.seed} | {lines:,} | {seconds:.0f} | {found} of {len(drawn)} |"
        with args.append.open("a") as table:
            table.write(row + "\n")


if __name__ == "__main__":
    main()
