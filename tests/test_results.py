"""Tables of results, from small files with known numbers."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from egrpo.config.models import RunConfig, TableSpec
from egrpo.errors import UserError
from egrpo.report.results import make_table, marks, write_result_table
from egrpo.store.tables import RESULTS, SCORES, SNAPSHOTS, read_table, write_table
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study

PROMPTS = 12
SAMPLES = 2
SEEDS = 3
BUDGET = 500
REWARDS = ("quality", "other")
GAINS = {"good": 0.6, "fair": 0.3, "same": 0.02}
"""What training adds to `quality`, by arm; `other` stays as it is."""
Rows = list[dict[str, Any]]
Edit = Callable[[Rows], Rows]


def config(arm: str, seed: int | None, **top: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": arm if seed is None else f"{arm}-s{seed}",
            "study": "small",
            "arm": arm,
            "seed": seed or 0,
            "model": {"path": "model"},
            "prompts": {"train": "a.txt", "heldout": "b.txt"},
            "method": {"name": "flow_grpo" if arm == "fair" else "egrpo"},
            "rewards": {"quality": {"kind": "verifier"}, "other": {"kind": "verifier_exact"}},
            "train": {"rewards": {"quality": 1.0}},
            **top,
        }
    )


def study(folder: Path, seeds: int | None = SEEDS) -> Layout:
    numbers = [None] if seeds is None else range(seeds)
    runs = [config(arm, seed) for arm in GAINS for seed in numbers]
    return Layout(Study("small", str(folder), {run.run: run for run in runs}))


def value(name: str, reward: str, prompt: int, sample: int, gain: float) -> float:
    """Prompts differ much, trainings and images a little."""
    noise = np.random.default_rng([*name.encode(), prompt, sample, len(reward)]).normal()
    offset = 0.0
    if name != "base":
        offset = 0.01 * np.random.default_rng([*name.encode(), len(reward)]).normal()
    return math.sin(prompt) + (gain if reward == "quality" else 0.0) + offset + 0.05 * noise


def scores(name: str, gain: float) -> Rows:
    return [
        {
            "run": name,
            "prompt_id": p,
            "prompt": f"prompt number {p}",
            "sample": s,
            "reward": reward,
            "value": value(name, reward, p, s, gain),
        }
        for p in range(PROMPTS)
        for s in range(SAMPLES)
        for reward in REWARDS
    ]


def write_run(at: Layout, run: str, gain: float) -> None:
    """Scores, half the gain at 500 evaluations and a quarter at 100, and what training cost."""
    folder, seed = at.run(run), at.study.runs[run].seed
    write_table(folder / "scores.parquet", SCORES, scores(run, gain))
    kept = [
        {"evaluations": budget, "nfe": budget - 7, "iteration": 5 + seed, "seconds": 10.0, **row}
        for budget, part in ((100, 0.25), (BUDGET, 0.5))
        for row in scores(run, gain * part)
    ]
    write_table(folder / "snapshots.parquet", SNAPSHOTS, kept)
    train = {
        "run": run,
        "iterations": 20 + seed,
        "nfe_forward": 1000,
        "nfe_train": 200,
        "nfe_reference": 30 + seed,
        "seconds": 60.5,
        "peak_memory_mib": 900.0 + seed,
        "stopped": {},
    }
    (folder / "train.json").write_text(json.dumps(train))


@pytest.fixture
def at(tmp_path: Path) -> Layout:
    at = study(tmp_path)
    write_all(at)
    return at


def write_all(at: Layout) -> None:
    for run, settings in at.study.runs.items():
        write_run(at, run, GAINS[settings.arm])
    base = at.base(next(iter(at.study.runs)))
    write_table(base / "scores.parquet", SCORES, scores("base", 0.0))


def table_spec(**changes: Any) -> TableSpec:
    given: dict[str, Any] = {
        "caption": "Three arms.",
        "sections": {"All": ["good", "fair", "same"]},
        "rewards": ["quality", "other"],
    }
    return TableSpec.model_validate(given | changes)


def by_arm(rows: Rows, reward: str = "quality", when: str = "end") -> dict[str, dict[str, Any]]:
    return {r["arm"]: r for r in rows if (r["reward"], r["at"]) == (reward, when)}


def edit(path: Path, table: Any, change: Edit) -> None:
    write_table(path, table, change(read_table(path, table).to_pylist()))


# --- numbers --------------------------------------------------------------------------------------


def test_rows_hold_means_and_intervals_of_their_files(at: Layout) -> None:
    rows = make_table("main", table_spec(), at)
    for reward in REWARDS:
        for arm, row in by_arm(rows, reward).items():
            names = ["base"] if arm == "base" else [f"{arm}-s{s}" for s in range(SEEDS)]
            gain = GAINS.get(arm, 0.0)
            y = np.array(
                [
                    [
                        np.mean([value(n, reward, p, s, gain) for s in range(SAMPLES)])
                        for p in range(PROMPTS)
                    ]
                    for n in names
                ]
            )
            s, p = y.shape
            variance, dof = y.mean(axis=0).var(ddof=1) / p, p - 1.0
            if s > 1:
                rest = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
                noise = (rest**2).sum() / ((s - 1) * (p - 1)) / (s * p)
                seed = y.mean(axis=1).var(ddof=1) / s
                total = variance + max(seed - noise, 0.0)
                squares = variance**2 / dof + seed**2 / 2 + noise**2 / (2 * (p - 1))
                variance, dof = total, total**2 / squares
            half = stats.t.ppf(0.975, dof) * math.sqrt(variance)
            assert row["mean"] == pytest.approx(y.mean())
            assert (row["low"], row["high"]) == pytest.approx((y.mean() - half, y.mean() + half))
            assert (row["seeds"], row["invalid"]) == (s, 0)


def test_rows_stand_in_order_with_what_training_cost(at: Layout) -> None:
    spec = table_spec(sections={"B": ["same", "good"], "A": ["fair"]}, evaluations=BUDGET)
    rows = make_table("main", spec, at)
    assert [(r["at"], r["section"], r["arm"], r["reward"]) for r in rows] == [
        (when, section, arm, reward)
        for when in ("end", "evaluations")
        for section, arms in (("B", ("base", "same", "good")), ("A", ("base", "fair")))
        for arm in arms
        for reward in REWARDS
    ]
    assert {r["table"] for r in rows} == {"main"}
    costs = ("method", "iterations", "nfe", "seconds", "peak_memory_mib")
    for when, known in (("end", (21, 1231, 60.5, 902)), ("evaluations", (6, 493, 10, 902))):
        found = by_arm(rows, when=when)
        assert [found["base"][k] for k in costs] == ["", None, None, None, None]
        assert [found["good"][k] for k in costs] == ["egrpo", *known]
        assert [found["fair"][k] for k in costs] == ["flow_grpo", *known]
    assert {(r["arm"], r["reward"]) for r in rows if r["trained_on"]} == {
        (arm, "quality") for arm in GAINS
    }


def test_equal_evaluations_use_the_weights_kept_there(at: Layout) -> None:
    rows = make_table("main", table_spec(evaluations=BUDGET), at)
    end, equal = by_arm(rows), by_arm(rows, when="evaluations")
    for arm, gain in GAINS.items():
        assert equal[arm]["mean"] == pytest.approx(end[arm]["mean"] - gain / 2)
    assert {k: v for k, v in end["base"].items() if k != "at"} == {
        k: v for k, v in equal["base"].items() if k != "at"
    }
    assert [r["at"] for r in make_table("main", table_spec(), at)] == ["end"] * 8


def test_an_arm_that_ended_early_shows_its_own_cost(at: Layout) -> None:
    for s in range(SEEDS):
        path = at.run(f"good-s{s}") / "snapshots.parquet"
        edit(path, SNAPSHOTS, lambda rows: [r | {"nfe": 200} for r in rows])
    rows = make_table("main", table_spec(evaluations=BUDGET), at)
    assert by_arm(rows, when="evaluations")["good"]["nfe"] == 200
    assert by_arm(rows, when="evaluations")["fair"]["nfe"] == 493


def test_images_without_a_score_are_left_out_and_counted(at: Layout) -> None:
    def fail(rows: Rows) -> Rows:
        for r in rows:
            if r["reward"] == "quality" and (r["prompt_id"] == 0 or r["sample"] == r["prompt_id"]):
                r["value"] = None if r["sample"] else math.nan
        return rows

    whole = by_arm(make_table("main", table_spec(), at))
    edit(at.run("good-s1") / "scores.parquet", SCORES, fail)
    rows = make_table("main", table_spec(), at)
    good = by_arm(rows)["good"]
    # prompt 0 leaves every seed, of prompt 1 one image of the one seed
    assert good["invalid"] == SEEDS * SAMPLES + 1
    values = [
        [
            [
                value(f"good-s{s}", "quality", p, n, 0.6)
                for n in range(SAMPLES)
                if (s, p, n) != (1, 1, 1)
            ]
            for p in range(1, PROMPTS)
        ]
        for s in range(SEEDS)
    ]
    assert good["mean"] == pytest.approx(np.mean([[np.mean(v) for v in part] for part in values]))
    assert {k: v for k, v in by_arm(rows)["fair"].items() if k != "mark"} == {
        k: v for k, v in whole["fair"].items() if k != "mark"
    }
    assert by_arm(rows, "other")["good"]["invalid"] == 0


def test_an_arm_that_could_not_be_scored_has_no_numbers_and_no_say(at: Layout) -> None:
    def fail(rows: Rows) -> Rows:
        return [r | {"value": None} for r in rows]

    edit(at.run("good-s0") / "scores.parquet", SCORES, fail)  # one seed is enough
    rows = by_arm(make_table("main", table_spec(), at))
    assert [rows["good"][k] for k in ("mean", "low", "high", "mark")] == [None] * 4
    assert rows["good"]["invalid"] == SEEDS * SAMPLES * PROMPTS
    assert rows["fair"]["mark"] == "best"


def test_one_seed_gives_intervals_over_prompts(tmp_path: Path) -> None:
    at = study(tmp_path, seeds=None)
    write_all(at)
    write_result_table("main", table_spec(), at)
    row = by_arm(make_table("main", table_spec(), at))["good"]
    y = [np.mean([value("good", "quality", p, s, 0.6) for s in range(2)]) for p in range(PROMPTS)]
    low, high = stats.t.interval(0.95, PROMPTS - 1, loc=np.mean(y), scale=stats.sem(y))
    assert (row["low"], row["high"], row["seeds"]) == pytest.approx((low, high, 1))
    text = at.table("main").with_suffix(".md").read_text()
    assert "trained once" in text
    assert "95% interval over held-out prompts" in text
    assert "another training seed would differ is not known, so no arm is marked" in text
    assert "Bold" not in text
    assert {row["mark"] for row in make_table("main", table_spec(), at)} == {None}


# --- marks ----------------------------------------------------------------------------------------


def test_marks_stand_where_the_numbers_support_them(at: Layout) -> None:
    rows = make_table("main", table_spec(evaluations=BUDGET), at)
    for when in ("end", "evaluations"):
        found = {arm: row["mark"] for arm, row in by_arm(rows, when=when).items()}
        assert found == {"base": None, "good": "best", "fair": "second", "same": None}
    # intervals of single arms overlap widely, for prompts differ; pairs tell them apart
    first = by_arm(rows)
    assert first["good"]["low"] < first["fair"]["high"]
    assert {row["mark"] for row in by_arm(rows, "other").values()} == {None}


def cells(rng: np.random.Generator, mean: float, seeds: int = 3, seed_std: float = 0.02) -> Any:
    prompts = 2.0 * np.sin(np.arange(40.0))
    return (
        mean
        + prompts
        + seed_std * rng.normal(size=(seeds, 1))
        + 0.05 * rng.normal(size=(seeds, 40))
    )


@pytest.mark.parametrize(
    ("means", "known"),
    [
        ({"a": 1.0, "b": 0.5, "c": 0.0}, {"a": "best", "b": "second"}),
        ({"c": 0.0, "b": 0.5, "a": 1.0}, {"a": "best", "b": "second"}),
        ({"a": 1.0, "b": 0.0, "c": 0.0}, {"a": "best"}),  # nobody is second
        ({"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.2}, {"a": "second", "b": "second"}),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}, {}),
        ({"a": 1.0, "b": 0.0}, {"a": "best"}),
        ({"a": 1.0, "b": 1.0}, {}),
        ({"a": 1.0}, {}),
        ({}, {}),
    ],
)
def test_marks_of_clear_and_tied_arms(means: dict[str, float], known: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    seeds = np.array([[-0.02], [0.0], [0.02]])  # equal arms have equal seeds here: no luck
    given = {arm: cells(rng, mean, seed_std=0.0) + seeds for arm, mean in means.items()}
    assert marks(given) == known


def test_a_lucky_seed_is_no_winner() -> None:
    rng = np.random.default_rng(1)
    steady = cells(rng, 0.0)
    lucky = steady + np.array([[3.0], [0.1], [0.1]])  # ahead on every prompt, by one seed
    assert marks({"lucky": lucky, "steady": steady}) == {}
    clear = {"top": steady + 9.0, "steady": steady}
    assert marks(clear | {"base": steady[:1] - 9.0}) == {"top": "best", "steady": "second"}
    assert marks(clear | {"once": lucky[:1]}) == {}


def test_more_arms_ask_for_clearer_differences() -> None:
    seeds = np.array([[-0.02], [0.0], [0.02]])  # standard error of a difference: 0.016
    other = cells(np.random.default_rng(2), 0.0, seed_std=0.0) + seeds
    found = {"top": other + 0.06, "other": other}
    assert marks(found) == {"top": "best"}
    assert marks(found, level=1 - 0.05 / 8) == {}
    assert marks(found | {f"arm{i}": other for i in range(7)}) == {}
    assert marks(found | {f"arm{i}": other for i in range(7)}, level=0.6) == {"top": "best"}


def test_an_arm_without_scores_takes_no_part() -> None:
    rng = np.random.default_rng(3)
    found = {"a": cells(rng, 1.0), "b": cells(rng, 0.0), "none": np.full((3, 40), math.nan)}
    assert marks(found) == {"a": "best"}


@pytest.mark.parametrize("seed_std", [0.0, 0.02, 0.3])
def test_equal_arms_are_seldom_marked(seed_std: float) -> None:
    rng = np.random.default_rng(4)
    best = second = 0
    for _ in range(300):
        found = {f"arm{i}": cells(rng, 0.0, 3, seed_std) for i in range(5)}
        given = list(marks(found | {"base": cells(rng, 0.0, 1, 0.0)}).values())
        best += "best" in given
        second += "second" in given
    assert best <= 0.025 * 300
    assert second <= 0.05 * 300


@pytest.mark.parametrize("seed_std", [0.02, 0.3])
def test_of_two_best_arms_and_two_poor_ones_neither_is_best(seed_std: float) -> None:
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(300):
        means = {"a": 0.0, "b": 0.0, "c": -9.0, "d": -9.0}
        given = marks({arm: cells(rng, mean, 3, seed_std) for arm, mean in means.items()})
        wrong += "best" in given.values()
    assert wrong <= 0.05 * 300


# --- files ----------------------------------------------------------------------------------------


def test_files_say_the_same(at: Layout) -> None:
    spec = table_spec(evaluations=BUDGET)
    rows = make_table("main", spec, at)
    write_result_table("main", spec, at)
    path = at.table("main")
    read = read_table(path, RESULTS).to_pylist()
    order = [name for name in RESULTS.sort if name != "table"]
    assert read == sorted(rows, key=lambda r: [r[name] for name in order])
    with open(path.with_suffix(".csv"), newline="") as handle:
        text = list(csv.DictReader(handle))
    assert list(text[0]) == [name for name, *_ in RESULTS.columns]
    assert [(t["arm"], t["reward"], t["mark"]) for t in text] == [
        (r["arm"], r["reward"], r["mark"] or "") for r in rows
    ]
    assert [float(t["low"]) for t in text] == [r["low"] for r in rows]
    metadata = pq.read_schema(path).metadata
    assert metadata[b"interval_level"] == b"0.95"
    assert metadata[b"caption"] == b"Three arms."
    assert len(metadata[b"config_hash"]) == 10


def test_same_files_give_the_same_bytes(at: Layout) -> None:
    spec = table_spec(evaluations=BUDGET)
    found = []
    for _ in range(2):
        write_result_table("main", spec, at)
        found.append(
            [at.table("main").with_suffix(e).read_bytes() for e in (".parquet", ".csv", ".md")]
        )
        for run in at.study.runs:  # the order of a file's rows does not matter
            path = at.run(run) / "scores.parquet"
            data = read_table(path, SCORES)
            pq.write_table(data.take(list(reversed(range(len(data))))), path)
    assert found[0] == found[1]


def test_markdown_of_a_small_table(at: Layout) -> None:
    levels = {"good": 3.0, "fair": 2.0, "same": 1.0}
    for run, settings in at.study.runs.items():  # constant but for the seed: checked by eye
        level = levels[settings.arm] + 0.01 * settings.seed
        for name, table in (("scores", SCORES), ("snapshots", SNAPSHOTS)):
            path = at.run(run) / f"{name}.parquet"
            write_table(
                path,
                table,
                [r | {"value": level} for r in read_table(path, table).to_pylist()],
            )
    edit(
        at.base("good-s0") / "scores.parquet",
        SCORES,
        lambda rows: [r | {"value": 0.5 if r["prompt_id"] + r["sample"] else None} for r in rows],
    )
    spec = table_spec(
        caption="Three\narms.",
        sections={"a | b": ["good", "fair"]},
        rewards=["quality"],
        evaluations=BUDGET,
    )
    write_result_table("main", spec, at)
    text = at.table("main").with_suffix(".md").read_text()
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    high, low = (f"[{m - half:.3f}, {m + half:.3f}]" for m in (3.01, 2.01))
    head, body = text.split("\n## ", 1)
    body, origin = body.rsplit("\n\n", 1)
    body += "\n"
    assert origin.startswith(f"Study {at.study.name}, scored at ")
    assert origin.rstrip()[-11:-1].isalnum()  # the digest of the settings
    assert head.splitlines()[:3] == ["# main", "", "Three arms."]
    assert "Training seeds of an arm: 3." in head
    columns = "arm | method | quality | iterations | network evaluations | seconds"
    assert (
        body
        == f"""At the end of training

### a \\| b

| {columns} | peak memory (MiB) |
|---|---|--:|--:|--:|--:|--:|
| base | - | 0.5000 [0.5000, 0.5000] | - | - | - | - |
| good | egrpo | **3.010** {high}\\* | 21 | 1,231 | 60 | 902 |
| fair | flow_grpo | <u>2.010</u> {low}\\* | 21 | 1,231 | 60 | 902 |

Images without a score, left out: base, quality: 1.

## At equal network evaluations (500)

The last weights within 500 network evaluations of training; an arm whose training ended before \
shows its own, smaller cost.

### a \\| b

| {columns} | peak memory (MiB) |
|---|---|--:|--:|--:|--:|--:|
| base | - | 0.5000 [0.5000, 0.5000] | - | - | - | - |
| good | egrpo | **3.010** {high}\\* | 6 | 493 | 10 | 902 |
| fair | flow_grpo | <u>2.010</u> {low}\\* | 6 | 493 | 10 | 902 |

Images without a score, left out: base, quality: 1.
"""
    )


def test_digits_follow_the_width_of_the_interval(at: Layout) -> None:
    write_result_table("main", table_spec(), at)
    row = by_arm(make_table("main", table_spec(), at), "other")["good"]
    assert 0.1 < row["high"] - row["low"] < 1
    lines = at.table("main").with_suffix(".md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| good |")]
    shown = f"| {row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}] |"
    assert shown in line  # not trained on it: no star


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"sections": {"All": ["good", "gone"]}},
            r"tables\.main\.sections\.All: no arm 'gone'.*fair",
        ),
        ({"sections": {"All": ["good", "good"]}}, "'good' occurs twice"),
        ({"sections": {"All": ["base"]}}, "always there"),
        ({"sections": {"All": []}}, r"tables\.main\.sections: "),
        ({"sections": {}}, r"tables\.main\.sections: "),
        ({"rewards": []}, r"tables\.main\.rewards: no reward"),
        ({"rewards": ["beauty"]}, r"tables\.main\.rewards: arm 'good' .*'beauty'.*quality, other"),
        ({"evaluations": 501}, r"tables\.main\.evaluations: .*good-s0.*train\.snapshots"),
    ],
)
def test_a_table_that_the_study_cannot_fill_is_refused(
    at: Layout, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text) as caught:
        write_result_table("main", table_spec(**changes), at)
    assert "\n" not in str(caught.value)
    assert not at.table("main").parent.exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda rows: [r for r in rows if r["prompt_id"] != 3],
            r"prompt 3 .*missing from .*fair-s1",
        ),
        (lambda rows: [r for r in rows if r["sample"] == 0], r"sample 1 is missing"),
        (lambda rows: [*rows, rows[0] | {"prompt_id": 99}], r"fair-s1.*prompt 99 "),
        (lambda rows: [r | {"prompt": r["prompt"] + "!"} for r in rows], r"prompt 0 \('prompt"),
        (lambda rows: [r for r in rows if r["reward"] == "other"], r"fair-s1.*no reward 'quality'"),
        (lambda rows: rows + rows[:1], r"fair-s1.*occurs twice"),
    ],
)
@pytest.mark.parametrize(("name", "table"), [("scores", SCORES), ("snapshots", SNAPSHOTS)])
def test_scores_that_do_not_fit_are_refused(
    at: Layout, name: str, table: Any, change: Edit, text: str
) -> None:
    at_budget: Edit = lambda rows: [r for r in rows if r.get("evaluations", BUDGET) == BUDGET]
    edit(at.run("fair-s1") / f"{name}.parquet", table, lambda rows: change(at_budget(rows)))
    with pytest.raises(UserError, match=text) as caught:
        make_table("main", table_spec(evaluations=BUDGET), at)
    assert "\n" not in str(caught.value)


def test_arms_of_different_evaluations_are_not_compared(tmp_path: Path) -> None:
    at = study(tmp_path)
    other = config("other", 0, evaluate={"samples": 3})
    at = Layout(Study("small", str(tmp_path), {**at.study.runs, other.run: other}))
    with pytest.raises(UserError, match=r"sections\.All: arms 'good' and 'other' have different"):
        make_table("main", table_spec(sections={"All": ["good", "other"]}), at)


@pytest.mark.parametrize("name", ["scores.parquet", "snapshots.parquet", "train.json"])
def test_missing_and_damaged_files_are_one_line(at: Layout, name: str) -> None:
    path = at.run("same-s2") / name
    spec = table_spec(evaluations=BUDGET)
    for content in (b"damaged", None):
        path.write_bytes(content) if content else path.unlink()
        with pytest.raises(UserError, match="damaged" if content else "no such file") as caught:
            make_table("main", spec, at)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_training_record_without_a_cost_is_refused(at: Layout) -> None:
    (at.run("good-s0") / "train.json").write_text('{"iterations": 3}')
    with pytest.raises(UserError, match="nfe_forward"):
        make_table("main", table_spec(), at)


def test_one_budget_means_one_set_of_weights(at: Layout) -> None:
    path = at.run("good-s0") / "snapshots.parquet"
    edit(path, SNAPSHOTS, lambda rows: [r | {"nfe": r["nfe"] + r["sample"]} for r in rows])
    with pytest.raises(UserError, match="500 evaluations stand for different weights"):
        make_table("main", table_spec(evaluations=BUDGET), at)


def test_a_missing_base_is_named(at: Layout) -> None:
    (at.base("good-s0") / "scores.parquet").unlink()
    with pytest.raises(UserError, match=r"base/\w+/scores\.parquet: no such file"):
        make_table("main", table_spec(), at)


def test_peak_memory_may_be_unknown(at: Layout) -> None:
    for run in at.study.runs:
        path = at.run(run) / "train.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peak_memory_mib": None}))
    rows = make_table("main", table_spec(), at)
    assert {r["peak_memory_mib"] for r in rows} == {None}


def test_results_need_neither_torch_nor_trackers() -> None:
    code = (
        "import sys, egrpo.report.results\n"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
