"""Results from small files with known numbers: comparisons of runs, tables of arms, and words."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import stats
from small_results import PROMPTS as TEXTS
from small_results import Edit, Rows, config, layout, refused, write_metrics, write_results

from egrpo.config.study import TableSpec
from egrpo.core.distance import diversity, rms
from egrpo.core.intervals import crossed_interval
from egrpo.report import report
from egrpo.report.evaluations import decode_png
from egrpo.report.results import make_comparison, make_table, marks, write_result_table
from egrpo.report.text import read_rows, readable
from egrpo.store.tables import RESULTS, SCORES, SNAPSHOTS, read_table, write_table
from egrpo.study.layout import Layout
from egrpo.study.targets import check_table
from egrpo.tracking.notes import run_note

PROMPTS, SAMPLES, SEEDS, BUDGET = 12, 2, 3, 500
REWARDS = ("quality", "other")
GAINS = {"good": 0.6, "fair": 0.3, "same": 0.02}
"""What training adds to `quality`, by arm; `other` stays as it is."""
SPENT = {"nfe_forward": 1000, "nfe_train": 24, "nfe_reference": 7, "nfe_monitor": 5000}


def study(folder: Path, seeds: int = SEEDS) -> Layout:
    """Arms with their seeds, and all results."""
    methods = dict.fromkeys(GAINS, "egrpo") | {"fair": "flow_grpo"}
    configs = [
        config(f"{arm}-s{seed}", arm=arm, seed=seed, method={"name": methods[arm]})
        for arm, seed in product(GAINS, range(seeds))
    ]
    at = layout(folder, *configs)
    for run, settings in at.study.runs.items():
        write_run(at, run, GAINS[settings.arm])
    write_table(at.base(run) / "scores.parquet", SCORES, scores("base", 0.0))
    return at


def value(name: str, reward: str, prompt: int, sample: int, gain: float) -> float:
    """Prompts differ much, trainings and images a little."""
    noise = np.random.default_rng([*name.encode(), prompt, sample, len(reward)]).normal()
    offset = np.random.default_rng([*name.encode(), len(reward)]).normal() * (name != "base")
    gain = gain if reward == "quality" else 0.0
    return math.sin(prompt) + gain + 0.01 * offset + 0.05 * noise


def scores(name: str, gain: float) -> Rows:
    return [
        {"run": name, "prompt_id": p, "prompt": f"prompt number {p}", "sample": s, "reward": reward}
        | {"value": value(name, reward, p, s, gain)}
        for p, s, reward in product(range(PROMPTS), range(SAMPLES), REWARDS)
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
    train = SPENT | {"iterations": 20 + seed, "nfe_train": 200, "nfe_reference": 30 + seed}
    train |= {"seconds": 60.5, "peak_memory_mib": 900.0 + seed, "stopped": {}}
    (folder / "train.json").write_text(json.dumps(train))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """To be read."""
    return study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def at(whole: Layout, tmp_path: Path) -> Layout:
    """A copy to spoil."""
    shutil.copytree(whole.root.parent, tmp_path / "study", dirs_exist_ok=True)
    return layout(tmp_path / "study", *whole.study.runs.values())


@pytest.fixture
def one(tmp_path: Path) -> Layout:
    """One run and its base, with images."""
    at = layout(tmp_path / "results", config("one"))
    write_results(at.base("one"), "base", gain=0.0, level=10)
    write_results(at.run("one"), "one", gain=0.25, level=30)
    train = SPENT | {"iterations": 7, "seconds": 61.5, "peak_memory_mib": None}
    (at.run("one") / "train.json").write_text(json.dumps(train))
    write_groups(at, masked=0.0)
    return at


def write_groups(at: Layout, masked: float) -> None:
    """Metrics of two iterations with four groups each."""
    values = {"groups": 4.0, "groups_masked": masked, "grad_norm": 0.1}
    metrics = {name: {1: value, 2: value} for name, value in values.items()}
    write_metrics(at.run("one") / "metrics.parquet", "one", 9, metrics)


def table_spec(**changes: Any) -> TableSpec:
    given = {"caption": "Three arms.", "sections": {"All": list(GAINS)}, "rewards": list(REWARDS)}
    return TableSpec.model_validate(given | changes)


def table_of(at: Layout, **changes: Any) -> Rows:
    return make_table("main", table_spec(**changes), at)


def by_arm(rows: Rows, reward: str = "quality", when: str = "end") -> dict[str, dict[str, Any]]:
    return {r["arm"]: r for r in rows if (r["reward"], r["at"]) == (reward, when)}


def edit(path: Path, table: Any, change: Edit) -> None:
    write_table(path, table, change(read_table(path, table).to_pylist()))


def compared(at: Layout) -> dict[str, dict[str, Any]]:
    make_comparison(at, at.comparison)
    return {row["reward"]: row for row in read_table(at.comparison, RESULTS).to_pylist()}


def picked(row: dict[str, Any], keys: str) -> list[Any]:
    return [row[key] for key in keys.split()]


def test_comparison_holds_the_numbers_of_both_models(one: Layout) -> None:
    rows = compared(one)
    assert set(rows) == {"quality", "other", "diversity", "distance_to_base"}
    found = picked(rows["quality"], "base mean difference low high pairs invalid seeds")
    assert found == pytest.approx([0.25, 0.5, 0.25, 0.25, 0.25, 12, 0, 1])
    assert [row["trained_on"] for row in rows.values()] == [name == "quality" for name in rows]
    assert rows["other"]["difference"] == pytest.approx(-0.25)
    for row in rows.values():
        names = picked(row, "table run arm method at mark")
        assert names == ["comparison", "one", "one", "egrpo", "end", None]
        costs = picked(row, "iterations nfe seconds peak_memory_mib")
        assert costs == [7, 1031, 61.5, None]  # without the monitor's evaluations


@pytest.mark.parametrize(
    ("lost_of_base", "lost", "distance", "diverse"),
    [
        ([], [], (12, 0), (6, 0)),
        # sample 0 is 20 levels apart, sample 1 is 40; left are 4 of the first and 4 of the second
        ([(1, 0)], [(2, 0), (2, 1), (3, 1)], (8, 4), (3, 3)),
    ],
)
def test_distances_are_measured_between_images_that_are_some(
    one: Layout, lost_of_base: Any, lost: Any, distance: Any, diverse: Any
) -> None:
    write_results(one.base("one"), "base", 0.0, 10, lost=lost_of_base)
    write_results(one.run("one"), "one", 0.0, 30, lost=lost)
    rows = compared(one)
    far, apart = (
        picked(rows[n], "pairs invalid base mean") for n in ("distance_to_base", "diversity")
    )
    assert far == pytest.approx([*distance, 0.0, 30 / 255], rel=1e-5)
    assert apart == pytest.approx([*diverse, 10 / 255, 30 / 255], rel=1e-5)  # `level` apart


def test_diversity_is_the_rms_distance_of_pairs(one: Layout) -> None:
    images = [np.full((2, 2, 3), v, np.float32) for v in (0.0, 0.0, 0.6)]
    assert diversity(images) == pytest.approx(0.4)
    assert math.isnan(diversity([images[0], np.full((2, 2, 3), math.nan, np.float32)]))
    half = np.zeros((2, 2, 3), np.float32)
    half[0] = 1.0
    assert rms(half, images[0]) == pytest.approx(math.sqrt(0.5))
    for folder in (one.base("one"), one.run("one")):  # one sample a prompt has none
        write_results(folder, folder.name, 0.0, 10, samples=1)
    assert set(compared(one)) == {"quality", "other", "distance_to_base"}


def test_failed_scores_are_left_out_with_their_pair(one: Layout) -> None:
    def fail(rows: Rows) -> Rows:
        for row in rows:
            if row["reward"] == "other":
                row["value"] = None
            elif row["prompt_id"] == 0:
                row["value"] = None if row["sample"] else math.nan
            elif (row["prompt_id"], row["sample"]) == (1, 0):
                row["value"] = 77.0  # no matter: the base's image has no score
        return rows

    def fail_one(rows: Rows) -> Rows:
        return [r | {"value": None} if (r["prompt_id"], r["sample"]) == (1, 0) else r for r in rows]

    write_results(one.base("one"), "base", 0.0, 10, edit=fail_one)
    write_results(one.run("one"), "one", 0.25, 30, edit=fail)
    rows = compared(one)
    found = picked(rows["quality"], "pairs invalid base difference")
    assert found == pytest.approx([9, 3, 0.3, 0.25])  # all of the same pairs, without prompt 0
    assert picked(rows["other"], "pairs difference") == [0, None]
    assert "| - |" in one.comparison.with_suffix(".md").read_text()


def test_interval_of_one_run_is_students_t_over_prompts_not_samples(one: Layout) -> None:
    gains = np.random.default_rng(0).normal(size=(len(TEXTS), 2))
    path = one.base("one") / "scores.parquet"
    edit(path, SCORES, lambda rows: [r | {"value": 0.0} for r in rows])
    scored = read_table(path, SCORES).to_pylist()
    moved = [r | {"value": gains[r["prompt_id"], r["sample"]]} for r in scored]
    write_table(one.run("one") / "scores.parquet", SCORES, moved)
    known = stats.ttest_1samp(gains.mean(axis=1), 0.0).confidence_interval(0.95)
    found = picked(compared(one)["quality"], "low high mean_low mean_high")
    assert found == pytest.approx([known.low, known.high] * 2)


def test_rows_hold_means_and_intervals_of_their_files(whole: Layout) -> None:
    rows = table_of(whole)

    def cells(name: str, reward: str, gain: float) -> Any:
        each = [[value(name, reward, p, s, gain) for s in range(SAMPLES)] for p in range(PROMPTS)]
        return np.mean(each, axis=1)

    for reward in REWARDS:
        base = cells("base", reward, 0.0)
        for arm, row in by_arm(rows, reward).items():
            names = ["base"] if arm == "base" else [f"{arm}-s{s}" for s in range(SEEDS)]
            y = np.array([cells(name, reward, GAINS.get(arm, 0.0)) for name in names])
            known, gain = crossed_interval(y), crossed_interval(y - base)
            found = picked(row, "mean mean_low mean_high base")
            assert found == pytest.approx([known.mean, known.low, known.high, base.mean()])
            assert picked(row, "seeds invalid run pairs") == [len(y), 0, "", y.size * SAMPLES]
            change = [None] * 3 if arm == "base" else [gain.mean, gain.low, gain.high]
            assert picked(row, "difference low high") == pytest.approx(change)


def test_rows_stand_in_order_with_what_training_cost(at: Layout) -> None:
    for s in range(SEEDS):  # ended early, its memory was not measured
        path = at.run(f"same-s{s}") / "snapshots.parquet"
        edit(path, SNAPSHOTS, lambda rows: [r | {"nfe": 200} for r in rows])
        path = at.run(f"same-s{s}") / "train.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"peak_memory_mib": None}))
    rows = table_of(at, sections={"B": ["same", "good"], "A": ["fair"]}, evaluations=BUDGET)
    assert [tuple(picked(r, "at section arm reward")) for r in rows] == [
        (when, section, arm, reward)
        for when in ("end", "evaluations")
        for section, arms in (("B", ("base", "same", "good")), ("A", ("base", "fair")))
        for arm in arms
        for reward in REWARDS
    ]
    assert {r["table"] for r in rows} == {"main"}
    costs = "method iterations nfe seconds peak_memory_mib"
    for when, known in (("end", [21, 1231, 60.5, 902]), ("evaluations", [6, 493, 10, 902])):
        found = by_arm(rows, when=when)
        assert picked(found["base"], costs) == ["", None, None, None, None]
        assert picked(found["good"], costs) == ["egrpo", *known]
        assert picked(found["fair"], costs) == ["flow_grpo", *known]
    assert picked(by_arm(rows, when="evaluations")["same"], "nfe peak_memory_mib") == [200, None]
    trained = {(r["arm"], r["reward"]) for r in rows if r["trained_on"]}
    assert trained == {(arm, "quality") for arm in GAINS}


def test_equal_evaluations_use_the_weights_kept_there_and_marks_follow_the_numbers(
    whole: Layout,
) -> None:
    rows = table_of(whole, evaluations=BUDGET)
    end, equal = by_arm(rows), by_arm(rows, when="evaluations")
    for arm, gain in GAINS.items():
        assert equal[arm]["mean"] == pytest.approx(end[arm]["mean"] - gain / 2)
    assert end["base"] | {"at": ""} == equal["base"] | {"at": ""}
    assert [r["at"] for r in table_of(whole)] == ["end"] * 8
    known = {"base": None, "good": "best", "fair": "second", "same": None}
    for found in (end, equal):
        assert {arm: row["mark"] for arm, row in found.items()} == known
    # intervals of single arms overlap widely, for prompts differ; pairs tell them apart
    assert end["good"]["mean_low"] < end["fair"]["mean_high"]
    assert {row["mark"] for row in by_arm(rows, "other").values()} == {None}


def test_images_without_a_score_are_left_out_and_counted(whole: Layout, at: Layout) -> None:
    def fail(rows: Rows) -> Rows:
        for r in rows:
            if r["reward"] == "quality" and (r["prompt_id"] == 0 or r["sample"] == r["prompt_id"]):
                r["value"] = None if r["sample"] else math.nan
        return rows

    edit(at.run("good-s1") / "scores.parquet", SCORES, fail)
    rows = table_of(at)
    # prompt 0 leaves every seed, of prompt 1 one image of the one seed
    y = [
        [value(f"good-s{s}", "quality", p, k, 0.6) for k in range(1 if (s, p) == (1, 1) else 2)]
        for s, p in product(range(SEEDS), range(1, PROMPTS))
    ]
    assert by_arm(rows)["good"]["mean"] == pytest.approx(np.mean([np.mean(v) for v in y]))
    assert by_arm(rows)["fair"] | {"mark": ""} == by_arm(table_of(whole))["fair"] | {"mark": ""}
    assert by_arm(rows, "other")["good"]["invalid"] == 0


def test_an_arm_that_could_not_be_scored_has_no_numbers_and_no_say(at: Layout) -> None:
    path = at.run("good-s0") / "scores.parquet"  # one seed is enough
    edit(path, SCORES, lambda rows: [r | {"value": None} for r in rows])
    rows = by_arm(table_of(at))
    numbers = picked(rows["good"], "mean mean_low mean_high base difference low high mark")
    assert numbers == [None] * 8
    assert picked(rows["good"], "pairs invalid") == [0, SEEDS * SAMPLES * PROMPTS]
    assert rows["fair"]["mark"] == "best"


def test_one_seed_gives_intervals_over_prompts_and_no_mark(tmp_path: Path) -> None:
    at = study(tmp_path, seeds=1)
    write_result_table("main", table_spec(), at)
    rows = table_of(at)
    y = [np.mean([value("good-s0", "quality", p, s, 0.6) for s in (0, 1)]) for p in range(PROMPTS)]
    known = stats.t.interval(0.95, PROMPTS - 1, loc=np.mean(y), scale=stats.sem(y))
    found = picked(by_arm(rows)["good"], "mean_low mean_high seeds")
    assert found == pytest.approx([*known, 1])
    text = at.table("main").with_suffix(".md").read_text()
    for words in ("trained once", "95% interval over held-out prompts", "is not known, so no arm"):
        assert words in text
    assert "Bold" not in text
    assert {row["mark"] for row in rows} == {None}


def cells(rng: np.random.Generator, mean: float, seeds: int = 3, seed_std: float = 0.02) -> Any:
    noise = 0.05 * rng.normal(size=(seeds, 40)) + seed_std * rng.normal(size=(seeds, 1))
    return mean + 2.0 * np.sin(np.arange(40.0)) + noise


EVEN = np.array([[-0.02], [0.0], [0.02]])
"""Equal arms with equal seeds: no luck."""


FIRST, SECOND = {"a": "best"}, {"a": "best", "b": "second"}


@pytest.mark.parametrize(
    ("means", "known"),
    [
        ({"a": 1.0, "b": 0.5, "c": 0.0}, SECOND),
        ({"c": 0.0, "b": 0.5, "a": 1.0}, SECOND),
        ({"a": 1.0, "b": 0.0, "c": 0.0}, FIRST),  # nobody is second
        ({"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.2}, dict.fromkeys("ab", "second")),
        ({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}, {}),
        ({"a": 1.0, "b": 0.0}, FIRST),
        ({"a": 1.0, "b": 0.0, "failed": math.nan}, FIRST),  # takes no part
        ({"a": 1.0, "b": 1.0}, {}),
        ({"a": 1.0}, {}),
        ({}, {}),
    ],
)
def test_marks_of_clear_and_tied_arms(means: dict[str, float], known: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    assert marks({a: cells(rng, mean, seed_std=0.0) + EVEN for a, mean in means.items()}) == known


def test_a_lucky_seed_is_no_winner() -> None:
    steady = cells(np.random.default_rng(1), 0.0)
    lucky = steady + np.array([[3.0], [0.1], [0.1]])  # ahead on every prompt, by one seed
    assert marks({"lucky": lucky, "steady": steady}) == {}
    clear = {"top": steady + 9.0, "steady": steady}
    assert marks(clear | {"base": steady[:1] - 9.0}) == {"top": "best", "steady": "second"}
    assert marks(clear | {"once": lucky[:1]}) == {}


def test_more_arms_ask_for_clearer_differences() -> None:
    other = cells(np.random.default_rng(2), 0.0, seed_std=0.0) + EVEN
    found = {"top": other + 0.06, "other": other}  # standard error of a difference: 0.016
    assert marks(found) == {"top": "best"}
    assert marks(found, level=1 - 0.05 / 8) == {}
    found |= {f"arm{i}": other for i in range(7)}
    assert marks(found) == {}
    assert marks(found, level=0.6) == {"top": "best"}


@pytest.mark.parametrize("seed_std", [0.0, 0.02, 0.3])
def test_equal_arms_are_seldom_marked(seed_std: float) -> None:
    rng = np.random.default_rng(4)
    best = second = wrong = 0
    for _ in range(300):
        found = {f"arm{i}": cells(rng, 0.0, 3, seed_std) for i in range(5)}
        given = list(marks(found | {"base": cells(rng, 0.0, 1, 0.0)}).values())
        best += "best" in given
        second += "second" in given
        means = {"a": 0.0, "b": 0.0, "c": -9.0, "d": -9.0}  # of the two best none is better
        given = list(marks({a: cells(rng, m, 3, seed_std) for a, m in means.items()}).values())
        wrong += "best" in given
    assert best <= 0.025 * 300
    assert second <= 0.05 * 300
    assert wrong <= 0.05 * 300


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path.with_suffix(".csv"), newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert list(rows[0]) == [name for name, *_ in RESULTS.columns]
    return rows


def test_files_say_the_same(at: Layout) -> None:
    spec, path, found = table_spec(evaluations=BUDGET), at.table("main"), []
    rows = make_table("main", spec, at)
    for _ in range(2):
        write_result_table("main", spec, at)
        found.append([path.with_suffix(e).read_bytes() for e in (".parquet", ".csv", ".md")])
        for run in at.study.runs:  # the order of a file's rows does not matter
            data = read_table(file := at.run(run) / "scores.parquet", SCORES)
            pq.write_table(data.take(list(reversed(range(len(data))))), file)
    assert found[0] == found[1]
    in_order = sorted(rows, key=lambda r: [r[name] for name in RESULTS.sort])
    assert read_table(path, RESULTS).to_pylist() == in_order
    shown = [(t["arm"], t["reward"], t["mark"], float(t["mean_low"])) for t in read_csv(path)]
    assert shown == [(r["arm"], r["reward"], r["mark"] or "", r["mean_low"]) for r in rows]
    metadata = pq.read_schema(path).metadata
    assert (metadata[b"interval_level"], metadata[b"caption"]) == (b"0.95", b"Three arms.")
    assert len(metadata[b"config_hash"]) == 10


def test_csv_and_markdown_of_a_comparison_say_the_same(one: Layout) -> None:
    rows = compared(one)
    read = {row["reward"]: row for row in read_csv(one.comparison)}
    assert float(read["other"]["difference"]) == rows["other"]["difference"]
    text = one.comparison.with_suffix(".md").read_text()
    assert "| one | egrpo | **quality** | 0.2500 | 0.5000 | +0.2500 |" in text
    assert "| 12 | 0 | 7 | 1,031 | 62 |" in text
    body = [line for line in text.splitlines() if line.startswith("| one")]
    order = ["**quality**", "other", "distance_to_base", "diversity"]
    assert [line.split(" | ")[2] for line in body] == order
    metadata = pq.read_schema(one.comparison).metadata
    assert metadata[b"interval_level"] == b"0.95"
    assert f"settings {metadata[b'config_hash'].decode()}." in text.splitlines()[-1]


def test_markdown_of_a_small_table(at: Layout) -> None:
    levels = {"good": 3.0, "fair": 2.0, "same": 1.0}
    for run, settings in at.study.runs.items():  # constant but for the seed: checked by eye
        level = levels[settings.arm] + 0.01 * settings.seed
        for name, table in (("scores", SCORES), ("snapshots", SNAPSHOTS)):
            path = at.run(run) / f"{name}.parquet"
            edit(path, table, lambda rows, level=level: [r | {"value": level} for r in rows])
    edit(
        at.base("good-s0") / "scores.parquet",
        SCORES,
        lambda rows: [r | {"value": 0.5 if r["prompt_id"] + r["sample"] else None} for r in rows],
    )
    sections = {"a | b": ["good", "fair"]}
    given = {"caption": "Three\narms.", "sections": sections, "rewards": ["quality"]}
    write_result_table("main", table_spec(**given, evaluations=BUDGET), at)
    head, end, equal = at.table("main").with_suffix(".md").read_text().split("\n## ")
    assert head.splitlines()[:3] == ["# main", "", "Three arms."]
    assert "Training seeds of an arm: 3." in head
    half = stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    high, low = (f"[{m - half:.3f}, {m + half:.3f}]" for m in (3.01, 2.01))
    columns = "arm | method | quality | iterations | network evaluations | seconds"
    left_out = "Image pairs without both scores, left out: base, quality: 1; good, quality: 3; "

    def known(costs: str) -> str:
        return f"""
### a \\| b

| {columns} | peak memory (MiB) |
|---|---|--:|--:|--:|--:|--:|
| base | - | 0.5000 [0.5000, 0.5000] | - | - | - | - |
| good | egrpo | **3.010** {high}\\* | {costs} | 902 |
| fair | flow_grpo | <u>2.010</u> {low}\\* | {costs} | 902 |

{left_out}fair, quality: 3.
"""

    assert end == f"At the end of training\n{known('21 | 1,231 | 60')}"
    equal, origin = equal.rsplit("\n\n", 1)
    assert f"{equal}\n" == (
        "At equal network evaluations (500)\n\n"
        "The last weights within 500 network evaluations of training; an arm whose training ended "
        f"before shows its own, smaller cost.\n{known('6 | 493 | 10')}"
    )
    assert origin.startswith(f"Study {at.study.name}, scored at ")
    assert origin.rstrip()[-11:-1].isalnum()  # the digest of the settings


def test_digits_follow_the_width_of_the_interval(at: Layout) -> None:
    write_result_table("main", table_spec(), at)
    row = by_arm(table_of(at), "other")["good"]
    assert 0.1 < row["mean_high"] - row["mean_low"] < 1
    lines = at.table("main").with_suffix(".md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| good |")]
    shown = f"| {row['mean']:.2f} [{row['mean_low']:.2f}, {row['mean_high']:.2f}] |"
    assert shown in line  # not trained on it: no star
    wide = readable(row | {"low": -100.0, "high": 300.0})
    assert wide["interval"] == "[-100, +300]"
    narrow = readable(row | {"low": 0.0991, "high": 0.1009, "base": 0.5})
    assert (narrow["interval"], narrow["base"]) == ("[+0.0991, +0.1009]", "0.5000")


def test_a_run_that_learned_nothing_is_named_wherever_runs_are_compared(one: Layout) -> None:
    path, rich = one.comparison, io.StringIO()
    assert {row["warnings"] for row in compared(one).values()} == {None}
    assert "warning" not in report.short_table(path) + path.with_suffix(".md").read_text()
    write_groups(one, masked=4.0)
    text = "in 2 of 2 iterations all groups had equal rewards, so nothing was learned"
    assert {row["warnings"] for row in compared(one).values()} == {text}
    report.print_report(path, Console(file=rich, force_terminal=True, width=200))
    pages = [path.with_suffix(end).read_text() for end in (".md", ".html")]
    note = run_note(one.study.runs["one"], read_rows(path), None)
    for shown in (report.short_table(path), rich.getvalue(), note, *pages):
        assert shown.count(f"one: warning: {text}") == 1
    (one.run("one") / "metrics.parquet").unlink()
    with refused(r"metrics\.parquet: no such file"):
        compared(one)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "comparison.parquet"
    head = {"table": "comparison", "at": "end", "section": "", "arm": "", "method": "egrpo"}
    head |= {"base": 0.5, "mean": 0.6, "difference": 0.1, "pairs": 20, "invalid": 0}
    head |= {"iterations": 3.0, "nfe": 123456.0, "seconds": 77.7}
    rows = [
        ("a", "aesthetic", False, 0.04, 0.16),
        ("a", "quality", True, 0.04, 0.16),
        ("a", "diversity", False, -0.2, 0.1),
        ("a", "zeal", False, 0.04, 0.16),
        ("b", "quality", True, -0.04, 0.16),
        ("c", "quality", True, -0.26, -0.04),
        ("egrpo", "quality", True, None, None),
    ]
    names = ("run", "reward", "trained_on", "low", "high")
    write_table(path, RESULTS, [head | dict(zip(names, row, strict=True)) for row in rows])
    return path


def test_short_table_marks_the_trained_reward_and_judges_its_interval(table: Path) -> None:
    text = report.short_table(table)
    lines = text.splitlines()
    assert lines[2] == "a (egrpo): 123,456 network evaluations, 78 s of training"
    assert lines[3].split() == ["quality", "*", "0.50", "0.60", "+0.10", "[+0.04,", "+0.16]"]
    assert [line.split()[0] for line in lines[4:7]] == ["aesthetic", "zeal", "diversity"]
    assert lines[11].startswith("egrpo: ")  # run and method of one name: said once
    assert len({len(lines[i]) for i in (0, 1, 3, 4, 5, 6, 8)}) == 1
    verdicts = [line for line in lines if ", quality:" in line]
    known = ("above 0", "contains 0", "below 0", "no interval")
    assert all(words in line for line, words in zip(verdicts, known, strict=True))
    assert "aesthetic:" not in text  # only what was trained is judged
    assert "make ui" in lines[-1]
    plain, rich = io.StringIO(), io.StringIO()
    report.print_report(table, Console(file=plain, width=40))
    assert plain.getvalue() == text  # not broken at 40 columns
    report.print_report(table, Console(file=rich, force_terminal=True, width=80))
    assert all(words in rich.getvalue() for words in ("\x1b[", "[+0.04, +0.16]", "make ui"))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sections": {"All": ["good", "good"]}}, ".*'good' occurs twice"),
        ({"sections": {"All": ["base"]}}, ".*always there"),
        ({"sections": {"All": []}}, "sections: "),
        ({"sections": {}}, "sections: "),
        ({"sections": {"All": ["good", "apart"]}}, ".*arms 'good' and 'apart' have different"),
        ({"rewards": []}, "rewards: no reward"),
        ({"rewards": ["beauty"]}, "rewards: arm 'good' .*'beauty'.*quality, other"),
    ],
)
def test_a_table_that_the_study_cannot_fill_is_refused(
    whole: Layout, changes: dict[str, Any], text: str
) -> None:
    apart = {"apart-s0": config("apart-s0", arm="apart", evaluate={"samples": 3})}
    with refused(r"tables\.main\." + text):
        check_table("main", table_spec(**changes), whole.study.runs | apart)


WITHOUT_QUALITY: Edit = lambda rows: [r for r in rows if r["reward"] == "other"]
MISFITS: list[tuple[Edit, str]] = [
    (lambda rows: [r for r in rows if r["prompt_id"] != 3], r"prompt 3 .*missing from .*{run}"),
    (lambda rows: [r for r in rows if r["sample"] == 0], r"sample 1 is missing"),
    (lambda rows: [*rows, rows[0] | {"prompt_id": 99}], r"{run}.*prompt 99 .*same prompts"),
    (lambda rows: [r | {"prompt": r["prompt"] + "!"} for r in rows], r"prompt 0 \('prompt"),
    (lambda rows: rows + rows[:1], r"{run}.*occurs twice"),
]


@pytest.mark.parametrize(
    ("change", "text"), [*MISFITS, (WITHOUT_QUALITY, r"{run}.*no reward 'quality'")]
)
@pytest.mark.parametrize(("name", "table"), [("scores", SCORES), ("snapshots", SNAPSHOTS)])
def test_scores_that_do_not_fit_are_refused(
    at: Layout, name: str, table: Any, change: Edit, text: str
) -> None:
    at_budget: Edit = lambda rows: [r for r in rows if r.get("evaluations", BUDGET) == BUDGET]
    edit(at.run("fair-s1") / f"{name}.parquet", table, lambda rows: change(at_budget(rows)))
    with refused(text.format(run="fair-s1")):
        table_of(at, evaluations=BUDGET)


@pytest.mark.parametrize(
    ("change", "text"),
    [*MISFITS, (WITHOUT_QUALITY, r"rewards other, but"), (lambda rows: [], r"holds no score")],
)
def test_scores_of_other_prompts_are_not_compared(one: Layout, change: Edit, text: str) -> None:
    write_results(one.run("one"), "one", 0.25, 30, edit=change)
    with refused(text.format(run="one")):
        compared(one)
    assert not one.comparison.parent.exists()


def test_a_comparison_of_damaged_inputs_is_one_line(one: Layout) -> None:
    write_results(one.run("one"), "one", 0.25, 30, size=16)
    with refused("differ in size"):
        compared(one)
    (one.run("one") / "train.json").write_text('{"iterations": 3}')
    with refused("nfe_forward"):
        compared(one)
    with refused("damaged image"):
        decode_png(b"no png", one.root)
    with refused("no run"):
        make_comparison(layout(one.root), one.comparison)


@pytest.mark.parametrize("name", ["scores.parquet", "snapshots.parquet", "train.json"])
def test_missing_and_damaged_files_are_one_line(at: Layout, name: str) -> None:
    path = at.run("same-s2") / name
    for content, what in ((b"damaged", "damaged"), (None, "no such file")):
        path.write_bytes(content) if content else path.unlink()
        with refused(f"{path}.*{what}"):
            table_of(at, evaluations=BUDGET)


def test_what_a_table_cannot_know_is_refused(at: Layout) -> None:
    path = at.run("good-s0") / "snapshots.parquet"
    edit(path, SNAPSHOTS, lambda rows: [r | {"nfe": r["nfe"] + r["sample"]} for r in rows])
    with refused("500 evaluations stand for different weights"):
        table_of(at, evaluations=BUDGET)
    with refused(r"tables\.main\.evaluations: .*good-s0.*train\.snapshots"):
        write_result_table("main", table_spec(evaluations=501), at)
    assert not at.table("main").parent.exists()
    (at.base("good-s0") / "scores.parquet").unlink()
    with refused(r"base/\w+/scores\.parquet: no such file"):
        table_of(at)


@pytest.mark.parametrize(
    ("names", "heavy"),
    [
        ("egrpo.report.results, egrpo.report.report, egrpo.page.page", ("matplotlib",)),
        ("egrpo.figures.draw", ("matplotlib.pyplot",)),
    ],
)
def test_results_are_told_without_heavy_packages(names: str, heavy: tuple[str, ...]) -> None:
    unwanted = ("torch", "mlflow", "pandas", *heavy)
    code = f"import sys, {names}\nprint([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
