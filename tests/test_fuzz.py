"""Mutated settings and runs tables: accepted and meaning what they say, or refused in one line.

What a study says is read a second time here, by plain YAML and a split at tabs, and compared with
every setting of every run. Damaged and hostile files: ``test_fuzz_files.py``.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from click.testing import CliRunner
from conftest import ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic.fields import FieldInfo
from test_fuzz_files import damaged, refusal

from docs.generate.settings import section
from egrpo.cli import main
from egrpo.config.load import numbers, overlay
from egrpo.config.models import RunConfig
from egrpo.config.study import StudyConfig
from egrpo.methods import METHOD_MODELS
from egrpo.planning.trees import check_trees
from egrpo.study.files import check_files
from egrpo.study.resolve import Study, load_study

METHODS = {"one": "egrpo", "two": "mixgrpo", "three": "branchgrpo", "four": "diffusion_nft"}
ROWS = "run\tmethod.name\ttrain.iterations\tmethod.steps\n" + "".join(
    f"{run}\t{method}\t{7 if run == 'one' else ''}\t\n" for run, method in METHODS.items()
)
BARE: dict[str, Any] = yaml.safe_load("""
runs: RUNS
model: {path: assets/toy/pipeline}
prompts: {train: assets/toy/prompts/train.txt, heldout: assets/toy/prompts/heldout.txt}
rewards: {verifier: {kind: verifier}}
train: {rewards: {verifier: 1.0}}
""")
MORE = """
study: s
results: results
seeds: null
default_runs: [one]
paper: [scores, pictures]
model: {dtype: float32, height: 32, lora: {rank: 4}, feature_cache: {interval: 3}}
rewards:
  clip: {kind: clip, path: assets/toy/clip.pt, batch: 8}
  preference: {kind: preference, path: assets/toy/preference.safetensors}
  judge: {kind: unifiedreward, url: "http://127.0.0.1:1/v1", divide_by: 5.0}
  mine: {kind: custom, function: "json:dumps", options: {a: [1, {b: x}]}}
train:
  {rewards: {verifier: 1.0, clip: 0.5}, prompts_per_iteration: 4, iterations: 60,
    bounds: {diversity: {least: 0.1}}}
schedule: {shift: 3.0}
profile: {spans: [1, 2, 4], shown: [[2, 1]]}
evaluate: {samples: 4}
methods: {egrpo: {threshold: 2.2, active: 8}, mixgrpo: {window_every: 5}}
tables:
  scores: {caption: c, sections: {all: [one, two]}, rewards: [verifier]}
figures:
  pictures: {kind: images, caption: c, arms: [one]}
  lines: {kind: entropy, caption: c, arms: [one], spans: [1, 2]}
"""
BASE = overlay(BARE, yaml.safe_load(MORE))

Key = tuple[str, ...]
Bare = dict[str, dict[Key, Any]]


def leaves(tree: Any, above: Key = ()) -> dict[Key, Any]:
    """Values of nested settings by key; a list is one value."""
    if not isinstance(tree, dict) or not tree:
        return {above: tree} if above else {}
    out: dict[Key, Any] = {}
    for key, below in tree.items():
        out |= leaves(below, (*above, key))
    return out


def fields_of(model: Any, above: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    for name, field in model.model_fields.items():
        yield (*above, name), field
        if section(field) is not None:
            yield from fields_of(section(field), (*above, name))


FIELDS: dict[Key, FieldInfo] = {
    **dict(fields_of(RunConfig)),
    **dict(fields_of(StudyConfig)),
    **{
        key: field
        for name, method in METHOD_MODELS.items()
        for key, field in fields_of(method, ("methods", name))
    },
}
KEYS = sorted({*FIELDS, *(key[:n] for key in leaves(BASE) for n in range(1, len(key) + 1))})

# -- what a study says, read a second time ---------------------------------------------------------


def plain_rows(text: str) -> dict[str, dict[str, Any]]:
    """Overrides by run, of a table that is known to be good."""
    lines = [ln for ln in text.split("\n") if ln.strip() and ln[0] != "#"]
    header, *body = (line.split("\t") for line in lines)
    return {
        cells[0].strip(): {
            key: numbers(yaml.safe_load(cell))
            for key, cell in zip(header[1:], cells[1:], strict=False)
            if cell.strip()
        }
        for cells in body
    }


def said(tree: dict[str, Any], row: dict[str, Any], method: str) -> dict[Key, Any]:
    """Every setting that the study or the row gives a run; null removes a reward or a bound."""
    out: dict[Key, Any] = {}
    parts = {k: v for k, v in tree.items() if k not in StudyConfig.model_fields}
    for over in (parts, {"method": (tree.get("methods") or {}).get(method, {})}):
        out |= leaves(over)
    for dotted, value in row.items():
        new = leaves(value, tuple(dotted.split(".")))
        if dotted == "train.rewards":  # one choice, which replaces another
            out = {k: v for k, v in out.items() if k[:2] != ("train", "rewards")}
        for key in new:  # a value in the place of a section, or the other way round
            out = {k: v for k, v in out.items() if k[: len(key)] != key and key[: len(k)] != k}
        out |= new
    removable = [("rewards",), ("train", "rewards"), ("train", "bounds")]
    return {k: v for k, v in out.items() if v is not None or k[:-1] not in removable}


def same(now: Any, meant: Any) -> bool:
    """Whether a setting is what was written, its type included; 1 may become 1.0."""
    if isinstance(now, bool) or isinstance(meant, bool):
        return now is meant
    if isinstance(now, float) and isinstance(meant, (int, float)):
        return now == float(meant) or repr(now) == repr(meant)
    if isinstance(now, list) and isinstance(meant, list):
        return len(now) == len(meant) and all(map(same, now, meant))
    return type(now) is type(meant) and now == meant


def resolve_text(study: bytes, table: bytes, folder: Path) -> Study | str:
    """The study, or the line that refuses it."""
    path, rows = folder / "study.yaml", folder / "runs.tsv"
    path.write_bytes(study.replace(b"RUNS", str(rows).encode()))
    rows.write_bytes(table)
    read: list[Study] = []

    def load() -> None:
        read.append(load_study(path))
        check_files(read[0], str(path))
        check_trees(read[0].runs)

    found = refusal(load, "")
    assert found is None or found.startswith((str(folder), "run ")), found
    return found or read[0]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    """Defaults of every method: what is resolved where a study says next to nothing."""
    rows = "run\tmethod.name\n" + "".join(f"{name}\t{name}\n" for name in METHOD_MODELS)
    here = tmp_path_factory.mktemp("bare")
    (here / "study.yaml").write_text(yaml.safe_dump({**BARE, "runs": str(here / "r.tsv")}))
    (here / "r.tsv").write_text(rows)
    return {
        name: leaves(run.model_dump()) for name, run in load_study(here / "study.yaml").runs.items()
    }


def check_meaning(found: Study, study: bytes, table: bytes, bare: Bare) -> None:
    """Every setting of every run is what row, study or defaults say, in this order."""
    text = table.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    tree, rows = numbers(yaml.safe_load(study.decode())), plain_rows(text)
    seeds = tree.get("seeds")
    names = [n if seeds is None else f"{n}-s{s}" for n in rows for s in (seeds or [None])]
    assert list(found.runs) == names
    for run in found.runs.values():
        arm = run.run if seeds is None else run.run.rpartition("-s")[0]
        row = rows[arm]
        method = row.get("method.name", "egrpo")
        meant, now = said(tree, row, method), leaves(run.model_dump())
        if seeds is not None:
            meant["seed",] = int(run.run.rpartition("-s")[2])
        snapshots = meant.pop(("train", "snapshots"), [])
        assert set(snapshots) <= set(run.train.snapshots)  # tables add theirs
        for key, value in meant.items():
            if value == {} and key not in now:
                continue  # a section of which nothing is said
            assert key in now, (run.run, key, value)
            assert same(now[key], value), (run.run, key, value, now[key])
        for key, value in now.items():
            above = [key[:n] for n in range(1, len(key) + 1)]
            if key not in bare[method] or any(part in meant for part in above):
                continue
            if key not in [("run",), ("arm",), ("train", "snapshots")]:
                assert same(value, bare[method][key]), (run.run, key, value)
    assert found.results == (tree.get("results") or "results")
    assert found.default_runs == tuple(
        names if tree.get("default_runs") is None else tree["default_runs"]
    )
    for kind, specs in (("tables", found.tables), ("figures", found.figures)):
        wanted = {k: v for k, v in (tree.get(kind) or {}).items() if v is not None}
        assert list(specs) == [name for name in wanted if name not in found.refused]
        for name, spec in specs.items():
            now = leaves(spec.model_dump())
            for key, value in leaves(wanted[name]).items():
                assert same(now[key], value) or value == "cheapest", (kind, name, key)


# -- mutations -------------------------------------------------------------------------------------

plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.integers(-(2**70), 2**70),
    st.floats(0, 2),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        [
            *("auto", "1e-4", "../x", "cpu", "sd3", "verifier", "egrpo", "0", "nan", "", " ", "~"),
            *("cps", "uniform", "profile", "dynamic"),
            *("a\nb", "\x00", "\ud800", "\x1b[2J", "a" * 5000),
            *(1e308, 1e-308, 2**31, 1000),
        ]
    ),
)
values = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def get(tree: Any, key: Key) -> Any:
    for part in key:
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def nudged(draw: st.DrawFn, key: Key, value: Any) -> Any:
    """A value near one that is known to be good, or another of a few that a setting may have."""
    field = FIELDS.get(key)
    if field is not None and get_origin(field.annotation) is Literal:
        return draw(st.sampled_from(get_args(field.annotation)))
    if value is None and field is not None and not field.is_required():
        value = field.default
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        near = [value + 1, value * 2, value * 0.9, value, -value, str(value), [value]]
        return draw(st.sampled_from([*near, int(value)]))
    if isinstance(value, list):
        return draw(st.sampled_from([value[::-1], value[:1], value[1:], value * 2, [*value, None]]))
    if isinstance(value, str):
        return draw(st.sampled_from([value, f"{value} ", value.upper(), [value], value[:-1]]))
    if isinstance(value, dict) and value:
        gone = draw(st.sampled_from(sorted(value, key=str)))
        return {k: v for k, v in value.items() if k != gone}
    return draw(values)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[dict[str, Any], list[Key]]:
    """A study with one to three settings changed, removed or misspelt, and their keys."""
    study = copy.deepcopy(BASE)
    changed: list[Key] = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        key = draw(st.sampled_from(KEYS))
        how = draw(st.sampled_from([*["nudge"] * 5, "value", "value", "remove", "misspell"]))
        place: Any = study
        for part in key[:-1]:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            continue
        if how == "remove":
            place.pop(key[-1], None)
        elif how == "misspell":
            key = (*key[:-1], key[-1] + draw(st.sampled_from(["s", "_", " ", "é", ".", "\n"])))
            place[key[-1]] = draw(plain)
        elif how == "nudge":
            place[key[-1]] = nudged(draw, key, get(study, key))
        else:
            place[key[-1]] = draw(values)
        changed.append(key)
    return study, changed


def named(message: str, keys: list[Key]) -> bool:
    """Whether a refusal names one of the keys that were changed, what holds it, or what it held."""
    parts = {part for key in keys for part in key[-2:]}
    parts |= {part for key in keys for below in leaves(get(BASE, key)) for part in below}
    both = {text for p in map(str, parts) for text in (p, p.encode("unicode_escape").decode())}
    return any(text in message for text in both)


FUZZ = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


Check = Callable[[str], object]
"""Asserts that a refusal is about what was changed."""


@st.composite
def changed_studies(draw: st.DrawFn) -> tuple[bytes, bytes, Check]:
    study, changed = draw(mutated())
    assume(changed)
    text = json.dumps(study) if draw(st.booleans()) else yaml.safe_dump(study, sort_keys=False)

    def about(message: str) -> None:
        unread = ("cannot be read", "not valid YAML")
        assert named(message, changed) or any(u in message for u in unread), (message, changed)

    return text.encode("utf-8", "surrogatepass"), ROWS.encode(), about


def flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


COLUMNS = sorted(
    {".".join(key) for key, _ in fields_of(RunConfig)}
    | {f"method.{key[2]}" for key in KEYS if key[0] == "methods" and len(key) == 3}
    | {f"rewards.{key[1]}.{key[2]}" for key in KEYS if key[0] == "rewards" and len(key) == 3}
    | {"results", "runs", "nothing.here", "", "method..steps", "train.", "run.x", "rewards.jpeg"}
)
raw = st.one_of(
    st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=("Cs",)), max_size=10),
    st.sampled_from(
        [
            *("010", "1:30", "1_0", "0x10", "1e-4", "yes", "null", "~", "-", "=", "# x", "3 # x"),
            *("[0, 1]", "{a: 1}", "{a: 1, a: 2}", "&a [*a]", "*a", "'", '"', "--- 3", "2026-13-45"),
            *("!!python/name:os.system", "\x85", "\u2028", "a\x0bb", "x" * 200_000, "[" * 3000),
            *("0x" + "f" * 6000, "9" * 5000),
        ]
    ),
)


@st.composite
def tables(draw: st.DrawFn) -> str:
    """A runs table: columns that a study may have or not, cells good, near good, or hostile."""
    columns = ["run", "method.name", *draw(st.lists(st.sampled_from(COLUMNS), max_size=3))]
    if draw(st.integers(0, 9)) == 0:
        columns = draw(st.permutations(columns))
    lines = ["\t".join(columns)]
    for number in range(draw(st.integers(0, 3))):
        name = draw(
            st.sampled_from([f"run{number}"] * 9 + ["one", "", "1e-4", "../x", "# c", "a b"])
        )
        method = draw(st.sampled_from([*METHODS.values(), *METHODS.values(), "", "egpro", "null"]))
        cells = [name, method]
        for column in columns[2:]:
            key = tuple(column.split("."))
            good = get(BASE, key) if key[0] != "method" else draw(st.integers(2, 20))
            how = draw(st.sampled_from(["good", "near", "near", "raw"]))
            near = nudged(draw, key, good) if how == "near" else good
            cells.append(draw(raw) if how == "raw" else flow(near))
        lines.append("\t".join(cells[: draw(st.integers(1, 9))]))
    end = draw(st.sampled_from(["\n", "\n", "\r\n"]))
    return draw(st.sampled_from(["", "", "\ufeff"])) + end.join(lines) + end


@st.composite
def changed_tables(draw: st.DrawFn) -> tuple[bytes, bytes, Check]:
    study = {**BASE, "default_runs": None, "paper": None, "tables": {}, "figures": {}}
    text = draw(tables())

    def about(message: str) -> None:
        names = {part for name in text.split("\n")[0].split("\t") for part in name.split(".")}
        names |= {"column", "run id", "run: ", "runs table", "cells", "cannot be read"}
        assert any(part.strip() and part.strip() in message for part in names), message

    return yaml.safe_dump(study).encode(), text.encode("utf-8", "surrogatepass"), about


@pytest.mark.parametrize(("cases", "examples"), [(changed_studies(), 400), (changed_tables(), 300)])
def test_mutated_studies_and_tables(cases, examples, tmp_path, bare):
    """Refused in one line, or meaning what they say; some of each."""
    seen: Counter[str] = Counter()

    @settings(FUZZ, max_examples=examples)
    @given(cases)
    def check(case: tuple[bytes, bytes, Check]) -> None:
        study, table, about = case
        found = resolve_text(study, table, tmp_path)
        if isinstance(found, str):
            about(found)
        else:
            check_meaning(found, study, table, bare)
        seen[type(found).__name__] += 1

    check()
    assert seen["Study"] > examples / 15
    assert seen["str"] > examples / 4


def test_damaged_studies(tmp_path, bare):
    good = yaml.safe_dump(BASE, sort_keys=False).encode(), ROWS.encode()
    seen: Counter[str] = Counter()
    for study, table in [
        *((study, good[1]) for study in damaged(good[0], 100)),
        *((good[0], table) for table in damaged(good[1], 100)),
    ]:
        found = resolve_text(study, table, tmp_path)
        seen[type(found).__name__] += 1
        if isinstance(found, Study):
            check_meaning(found, study, table, bare)
    assert min(seen["Study"], seen["str"]) > 20


HOSTILE = {  # added to a study -> what refuses it
    "advantage: &a {std: *a}": "not valid YAML: nested too deeply, or within itself",
    f"advantage: {'[' * 3000}{']' * 3000}": "not valid YAML: nested too deeply",
    "study: other": "not valid YAML: 'study' is given twice at line",
    "advantage: {std: group, std: batch}": "'std' is given twice",
    "seed: 010": "010 would be read as another number",
    "seed: 1:30": "1:30 would be read as another number",
    "tracking: {every_seconds: 1:30.5}": "1:30.5 would be read as another number",
    f"seed: 0x{'f' * 6000}": "seed: Input should be less than 2147483648, got a number too long",
    f"seed: {'9' * 6000}": "not valid YAML: Exceeds the limit",
    "seed: !!python/object/apply:os.mkdir [went-off]": "not valid YAML: could not determine",
    "seed: !!python/name:os.mkdir": "not valid YAML: could not determine",
    "seed: !!binary aGVsbG8=": "seed: Input should be a valid integer",
    "seed: 2020-01-01": "seed: Input should be a valid integer",
    "1: 2": "1: Keys should be strings",
    "~: 2": "None: Keys should be strings",
    "? [1]\n: 2": "not valid YAML: while constructing a mapping",
    '"a\\nb": 2': "a\\nb: unknown setting",
    '"a\\u2028\\e[2Jb": 2': "a\\u2028\\x1b[2Jb: unknown setting",
    "seed: 1\n--- \nseed: 2": "not valid YAML: expected a single document",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_yaml(text, tmp_path, monkeypatch):
    study = yaml.safe_dump(BASE) + text + "\n"
    found = resolve_text(study.encode(), ROWS.encode(), tmp_path)
    assert isinstance(found, str)
    assert f"study.yaml: {HOSTILE[text]}" in found or HOSTILE[text] in found.partition(" ")[2]
    assert not (ROOT / "went-off").exists()


EXTREMES: dict[str, list[Any]] = {
    "methods.egrpo.active": [10**11, 2**52, -5],
    "methods.egrpo.anchors": [10**9],
    "train.prompts_per_iteration": [10**11],
    "evaluate.steps": [10**10],
    "schedule.shift": [1e308, 1e-300],
    "schedule": [{"shift": "dynamic", "base_shift": b} for b in (1e6, -1e6, 1e308)],
    "schedule.terminal": [1e-300, 1 - 1e-16],
    "rewards.judge.pattern": [
        *("(a{99999999999})", "(" * 5000, "(" * 2000 + ")" * 2000, "x", "(a)(b)")
    ],
    "rewards.mine": [{"kind": "custom", "function": f} for f in ("..a", "a:b c")],
    "seeds": [[2**70], [-1], [1, 1], []],
    "tables.scores.evaluations": [1],
}


@pytest.mark.parametrize("key", EXTREMES)
def test_extremes_are_refused_by_their_key(key, tmp_path):
    for value in EXTREMES[key]:
        study = copy.deepcopy(BASE)
        *above, last = key.split(".")
        get(study, tuple(above))[last] = value
        found = resolve_text(yaml.safe_dump(study).encode(), ROWS.encode(), tmp_path)
        if isinstance(found, Study):
            (found,) = found.refused.values()
        assert last in found, (value, found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "damaged JSON"),
        ("[]", "damaged order of a job"),
        ("{}", "damaged order of a job"),
        ('{"runs": []}', "damaged order of a job"),
        ('{"settings": {"run": "x"}, "identities": {}}', "model: is missing"),
        ('{"settings": 3, "identities": {}}', "damaged order of a job"),
        ("[" * 10**5, "damaged JSON"),
    ],
)
def test_a_job_refuses_a_damaged_order(text, message, tmp_path):
    path = tmp_path / "order.json"
    path.write_text(text)
    for stage in ("train", "page"):
        done = CliRunner().invoke(main, ["make", stage, str(path)])
        assert done.exit_code == 2
        assert done.output.startswith(f"egrpo: {path}: {message}"), done.output
        assert done.output.count("\n") == 1
