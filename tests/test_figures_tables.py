"""The comparison, its report and the figures, from small tables with known numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from egrpo.config.load import load_run
from egrpo.config.models import RunConfig
from egrpo.core.entropy import step_entropy
from egrpo.core.plan import make_plan
from egrpo.core.schedule import shifted_sigmas
from egrpo.errors import UserError
from egrpo.figures import image_grid
from egrpo.figures import profile as figures
from egrpo.report import report, tables
from egrpo.report.tables import RunFiles, make_comparison
from egrpo.store.tables import (
    COMPARISON,
    ENTROPY_PROFILE,
    IMAGES,
    SCORES,
    TRAIN_METRICS,
    read_table,
    write_table,
)
from egrpo.tracking.notes import run_note

GRID = shifted_sigmas(16, 3.0)
PROMPTS = [f"prompt number {i}" for i in range(6)]
Edit = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


def same(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return rows


def png(level: int, size: int = 8, opacity: int = 255) -> bytes:
    picture = Image.fromarray(np.full((size, size, 3), level, np.uint8))
    if opacity < 255:  # what is no image
        picture.putalpha(opacity)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def write_results(
    folder: Path,
    run: str,
    gain: float,
    level: int,
    samples: int = 2,
    edit: Edit = same,
    size: int = 8,
    lost: Collection[tuple[int, int]] = (),
) -> None:
    """Scores: quality = prompt/10 + gain, other = 1 - gain. Images: uniform, ``level`` apart."""
    keys = [(p, s) for p in range(len(PROMPTS)) for s in range(samples)]
    head: list[dict[str, Any]] = [
        {"run": run, "prompt_id": p, "prompt": PROMPTS[p], "sample": s} for p, s in keys
    ]
    scores = [
        {**h, "reward": reward, "value": value}
        for h in head
        for reward, value in (("quality", h["prompt_id"] / 10 + gain), ("other", 1.0 - gain))
    ]
    images = [
        {
            **h,
            "png": png(
                100 + level * (1 + h["sample"]),
                size,
                0 if (h["prompt_id"], h["sample"]) in lost else 255,
            ),
        }
        for h in head
    ]
    write_table(folder / "scores.parquet", SCORES, edit(scores))
    write_table(folder / "images.parquet", IMAGES, images)


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": "one",
            "model": {"path": "model"},
            "prompts": {"train": "a.txt", "heldout": "b.txt"},
            "rewards": {"quality": {"kind": "verifier"}, "other": {"kind": "verifier_exact"}},
            "train": {"rewards": {"quality": 1.0}},
            "evaluate": {"bootstrap": 200},
        }
    )


@pytest.fixture
def files(tmp_path: Path, config: RunConfig) -> RunFiles:
    run, base = tmp_path / "run", tmp_path / "base"
    write_results(base, "base", gain=0.0, level=10)
    write_results(run, "one", gain=0.25, level=30)
    train = {
        "iterations": 7,
        "nfe_forward": 1000,
        "nfe_train": 24,
        "nfe_reference": 7,
        "nfe_monitor": 5000,
        "seconds": 61.5,
        "trainable_parameters": 10,
        "peak_memory_mib": None,
    }
    (run / "train.json").write_text(json.dumps(train))
    (run / "config.yaml").write_text(json.dumps(config.model_dump()))
    write_groups(run, masked=0.0)
    return RunFiles.at(run, base)


def write_groups(run: Path, masked: float) -> None:
    """Metrics of two iterations with four groups each."""
    values = {"groups": 4.0, "groups_masked": masked, "grad_norm": 0.1}
    rows = [
        {"run": "one", "iteration": i, "nfe": 9 * i, "metric": name, "value": value}
        for i in (1, 2)
        for name, value in values.items()
    ]
    write_table(run / "train_metrics.parquet", TRAIN_METRICS, rows)


def comparison(files: RunFiles, folder: Path) -> dict[str, dict[str, Any]]:
    make_comparison({"one": files}, folder / "comparison.parquet")
    rows = read_table(folder / "comparison.parquet", COMPARISON).to_pylist()
    return {row["reward"]: row for row in rows}


# --- tables ---------------------------------------------------------------------------------------


def test_comparison_holds_the_numbers_of_both_models(files: RunFiles, tmp_path: Path) -> None:
    rows = comparison(files, tmp_path / "tables")
    assert set(rows) == {"quality", "other", "diversity", "distance_to_base"}
    quality = rows["quality"]
    assert quality["base"] == pytest.approx(0.25)
    assert quality["trained"] == pytest.approx(0.5)
    assert quality["difference"] == pytest.approx(0.25)
    assert quality["low"] == pytest.approx(0.25)
    assert quality["high"] == pytest.approx(0.25)
    assert (quality["pairs"], quality["invalid"]) == (12, 0)
    assert quality["trained_on"]
    assert not rows["other"]["trained_on"]
    assert rows["other"]["difference"] == pytest.approx(-0.25)
    for row in rows.values():
        assert (row["run"], row["method"], row["iterations"]) == ("one", "egrpo", 7)
        assert (row["nfe"], row["seconds"]) == (1031, 61.5)  # without the monitor's evaluations


def test_diversity_and_distance_are_rms_of_pixels(files: RunFiles, tmp_path: Path) -> None:
    rows = comparison(files, tmp_path)
    # samples of a prompt are `level` apart; the runs differ by 20 and 40 levels
    assert rows["diversity"]["base"] == pytest.approx(10 / 255, rel=1e-5)
    assert rows["diversity"]["trained"] == pytest.approx(30 / 255, rel=1e-5)
    assert rows["diversity"]["pairs"] == len(PROMPTS)
    assert rows["distance_to_base"]["base"] == 0.0
    assert rows["distance_to_base"]["trained"] == pytest.approx(30 / 255, rel=1e-5)
    assert rows["distance_to_base"]["pairs"] == 2 * len(PROMPTS)


def test_diversity_averages_over_pairs_not_over_samples() -> None:
    images = [np.full((2, 2, 3), v, np.float32) for v in (0.0, 0.0, 0.6)]
    assert tables.diversity(images) == pytest.approx(0.4)
    half = np.zeros((2, 2, 3), np.float32)
    half[0] = 1.0
    assert tables.rms(half, np.zeros_like(half)) == pytest.approx(math.sqrt(0.5))


def test_one_sample_a_prompt_has_no_diversity(files: RunFiles, tmp_path: Path) -> None:
    write_results(files.base_scores.parent, "base", 0.0, 10, samples=1)
    write_results(files.scores.parent, "one", 0.25, 30, samples=1)
    assert set(comparison(files, tmp_path)) == {"quality", "other", "distance_to_base"}


def test_failed_scores_are_left_out_and_counted(files: RunFiles, tmp_path: Path) -> None:
    def fail(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            if row["reward"] == "quality" and row["prompt_id"] == 0:
                row["value"] = None if row["sample"] else math.nan
            if row["reward"] == "other":
                row["value"] = None
        return rows

    write_results(files.scores.parent, "one", 0.25, 30, edit=fail)
    rows = comparison(files, tmp_path)
    assert (rows["quality"]["pairs"], rows["quality"]["invalid"]) == (10, 2)
    assert rows["quality"]["base"] == pytest.approx(0.3)  # of the same pairs, without prompt 0
    assert (rows["other"]["pairs"], rows["other"]["difference"]) == (0, None)
    assert "| - |" in (tmp_path / "comparison.md").read_text()


def test_no_distance_is_measured_to_what_is_no_image(files: RunFiles, tmp_path: Path) -> None:
    for folder, run, level, lost in (
        (files.base_scores.parent, "base", 10, [(1, 0)]),
        (files.scores.parent, "one", 30, [(2, 0), (2, 1), (3, 1)]),
    ):
        write_results(folder, run, 0.0, level, lost=lost)
    rows = comparison(files, tmp_path)
    distance, diversity = rows["distance_to_base"], rows["diversity"]
    assert (distance["pairs"], distance["invalid"]) == (8, 4)
    # sample 0 is 20 levels apart, sample 1 is 40; left are 4 of the first and 4 of the second
    assert distance["trained"] == pytest.approx(30 / 255, rel=1e-5)
    assert (diversity["pairs"], diversity["invalid"]) == (3, 3)
    assert diversity["trained"] == pytest.approx(30 / 255, rel=1e-5)


def test_interval_resamples_prompts(files: RunFiles, tmp_path: Path) -> None:
    def by_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [r | {"value": 10.0 if r["prompt_id"] == 0 else 0.0} for r in rows]

    write_results(
        files.base_scores.parent,
        "base",
        0.0,
        10,
        edit=lambda rows: [r | {"value": 0.0} for r in rows],
    )
    write_results(files.scores.parent, "one", 0.0, 30, edit=by_prompt)
    row = comparison(files, tmp_path)["quality"]
    # prompt 0 is drawn k of 6 times: the mean is 10 k / 6, in steps that samples would halve
    assert row["low"] == 0.0
    assert row["high"] * 6 / 10 == pytest.approx(round(row["high"] * 6 / 10))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda rows: [r for r in rows if r["prompt_id"] != 3], r"prompt 3 .*same prompts"),
        (lambda rows: [r for r in rows if r["sample"] == 0], r"sample 1 is missing"),
        (
            lambda rows: [*rows, rows[0] | {"prompt_id": 9}],
            r"run/.*prompt 9 .*missing",
        ),
        (lambda rows: [r | {"prompt": r["prompt"] + "!"} for r in rows], r"prompt 0 \('prompt"),
        (lambda rows: [r for r in rows if r["reward"] == "other"], r"rewards other, but"),
        (lambda rows: rows + rows[:1], r"occurs twice"),
        (lambda rows: [], r"holds no score"),
    ],
)
def test_scores_of_other_prompts_are_refused(
    files: RunFiles, tmp_path: Path, edit: Edit, text: str
) -> None:
    write_results(files.scores.parent, "one", 0.25, 30, edit=edit)
    with pytest.raises(UserError, match=text) as caught:
        comparison(files, tmp_path / "tables")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tables").exists()


def test_damaged_inputs_are_one_line(files: RunFiles, tmp_path: Path) -> None:
    write_results(files.scores.parent, "one", 0.25, 30, size=16)
    with pytest.raises(UserError, match="differ in size"):
        comparison(files, tmp_path)
    files.train.write_text('{"iterations": 3}')
    with pytest.raises(UserError, match="nfe_forward"):
        comparison(files, tmp_path)
    with pytest.raises(UserError, match="damaged image"):
        tables.decode_png(b"no png", tmp_path)
    with pytest.raises(UserError, match="no run"):
        make_comparison({}, tmp_path / "comparison.parquet")


def test_csv_and_markdown_say_the_same(files: RunFiles, tmp_path: Path) -> None:
    rows = comparison(files, tmp_path)
    with open(tmp_path / "comparison.csv", newline="") as handle:
        read = {row["reward"]: row for row in csv.DictReader(handle)}
    assert set(read["quality"]) == {name for name, *_ in COMPARISON.columns}
    assert float(read["other"]["difference"]) == rows["other"]["difference"]
    text = (tmp_path / "comparison.md").read_text()
    assert "| one | egrpo | **quality** | 0.2500 | 0.5000 | +0.2500 |" in text
    assert "| one | egrpo | other |" in text
    assert "| 1,031 | 62 |" in text
    body = [line for line in text.splitlines() if line.startswith("| one")]
    assert [line.split(" | ")[2] for line in body] == [
        "**quality**",
        "other",
        "distance_to_base",
        "diversity",
    ]
    metadata = pq.read_schema(tmp_path / "comparison.parquet").metadata
    assert metadata[b"interval_level"] == b"0.95"
    assert metadata[b"config_hash"]


# --- report ---------------------------------------------------------------------------------------


def row(run: str, reward: str, on: bool, low: float | None, high: float | None) -> dict[str, Any]:
    return {
        "run": run,
        "method": "egrpo",
        "reward": reward,
        "trained_on": on,
        "base": 0.5,
        "trained": 0.6,
        "difference": 0.1,
        "low": low,
        "high": high,
        "pairs": 20,
        "invalid": 0,
        "iterations": 3,
        "nfe": 123456,
        "seconds": 77.7,
    }


def test_a_run_that_learned_nothing_is_named_wherever_runs_are_compared(
    files: RunFiles, tmp_path: Path
) -> None:
    assert {row["warnings"] for row in comparison(files, tmp_path).values()} == {None}
    assert "warning" not in report.short_table(tmp_path / "comparison.parquet")
    assert "warning" not in (tmp_path / "comparison.md").read_text()
    write_groups(files.metrics.parent, masked=4.0)
    text = "in 2 of 2 iterations all groups had equal rewards, so nothing was learned"
    assert {row["warnings"] for row in comparison(files, tmp_path).values()} == {text}
    path, rich = tmp_path / "comparison.parquet", io.StringIO()
    report.print_report(path, Console(file=rich, force_terminal=True, width=200))
    pages = [(tmp_path / f"comparison{end}").read_text() for end in (".md", ".html")]
    note = run_note(load_run(files.metrics.with_name("config.yaml")), report.read_rows(path), None)
    for shown in (report.short_table(path), rich.getvalue(), note, *pages):
        assert shown.count(f"one: warning: {text}") == 1
    files.metrics.unlink()
    with pytest.raises(UserError, match=r"train_metrics\.parquet: no such file"):
        comparison(files, tmp_path)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "comparison.parquet"
    rows = [
        row("a", "aesthetic", False, 0.04, 0.16),
        row("a", "quality", True, 0.04, 0.16),
        row("a", "diversity", False, -0.2, 0.1),
        row("a", "zeal", False, 0.04, 0.16),
        row("b", "quality", True, -0.04, 0.16),
        row("c", "quality", True, -0.26, -0.04),
        row("egrpo", "quality", True, None, None),
    ]
    write_table(path, COMPARISON, rows)
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
    assert ["above 0" in verdicts[0], "contains 0" in verdicts[1], "below 0" in verdicts[2]] == [
        True,
        True,
        True,
    ]
    assert "no interval" in verdicts[3]
    assert "aesthetic:" not in text  # only what was trained is judged
    assert "make ui" in lines[-1]


def test_readable_keeps_two_digits_of_the_interval() -> None:
    wide = tables.readable(row("a", "r", True, -100.0, 300.0))
    assert wide["interval"] == "[-100, +300]"
    narrow = tables.readable(row("a", "r", True, 0.0991, 0.1009))
    assert narrow["interval"] == "[+0.0991, +0.1009]"
    assert narrow["base"] == "0.5000"


def test_print_report_is_plain_off_a_terminal_and_rich_on_one(table: Path) -> None:
    plain, rich = io.StringIO(), io.StringIO()
    report.print_report(table, Console(file=plain, width=40))
    assert plain.getvalue() == report.short_table(table)  # not broken at 40 columns
    report.print_report(table, Console(file=rich, force_terminal=True, width=80))
    assert "\x1b[" in rich.getvalue()
    assert "[+0.04, +0.16]" in rich.getvalue()
    assert "make ui" in rich.getvalue()


# --- figures --------------------------------------------------------------------------------------


def by_gid(figure: Figure, gid: str) -> list[Any]:
    return [line for axes in figure.axes for line in axes.lines if line.get_gid() == gid]


def texts(figure: Figure) -> str:
    found: Iterable[Any] = figure.findobj(lambda artist: hasattr(artist, "get_text"))
    return "\n".join(artist.get_text() for artist in found)


def assert_drawn(stem: Path, endings: tuple[str, ...] = ("png", "svg")) -> None:
    for ending in endings:
        assert Path(f"{stem}.{ending}").stat().st_size > 2000
    pixels = np.asarray(Image.open(f"{stem}.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert (pixels != 255).any(axis=2).mean() > 0.01


def profile_rows() -> list[dict[str, Any]]:
    rows = []
    for step in range(8):
        for span in (1, 2, 4, 6):
            entropy = step_entropy(GRID, step, span, noise_level=0.7)
            for prompt in (0, 1, 2):
                for quantity in ("reward:quality", "latent_variance", "image_distance"):
                    failed = (step, prompt) == (2, 0) or (step, span) == (5, 6)
                    rows.append(
                        {
                            "step": step,
                            "span": span,
                            "sigma": GRID[step],
                            "sigma_stop": GRID[step + span],
                            "std": entropy / 4.1327,
                            "exp_per_dim": entropy,
                            "nats_per_dim": math.log(entropy),
                            "variance": 1.0,
                            "prompt_id": prompt,
                            "quantity": quantity,
                            "spread": None if failed else entropy * (1 + prompt),
                            "yardstick": None if quantity == "latent_variance" else 1.0 + prompt,
                        }
                    )
    return rows


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.parquet"
    write_table(path, ENTROPY_PROFILE, profile_rows())
    return path


def write_plan(path: Path, threshold: float, measure: str = "exp_per_dim") -> Path:
    plan = make_plan(GRID, range(8), threshold=threshold, noise_level=0.7, measure=measure)
    path.write_text(json.dumps(plan.to_dict()))
    return path


def test_entropy_figure_shows_lines_threshold_and_plan(profile: Path, tmp_path: Path) -> None:
    plans = {"one": write_plan(tmp_path / "a.json", 2.2), "two": write_plan(tmp_path / "b", 2.2)}
    figure = figures.entropy_figure(profile, plans, tmp_path / "entropy")
    assert_drawn(tmp_path / "entropy")
    axes: Any = figure.axes[0]
    single = next(line for line in axes.lines if line.get_label() == "1 step")
    np.testing.assert_allclose(single.get_ydata()[:3], [2.8929, 2.9885, 2.1366], atol=1e-4)
    assert len([line for line in axes.lines if "merged" in line.get_label()]) == 3 + 1
    (threshold,) = by_gid(figure, "threshold")
    assert list(threshold.get_ydata()) == [2.2, 2.2]
    (marks,) = by_gid(figure, "plan:one")  # both runs have this plan
    assert "one, two" in marks.get_label()
    assert [t.get_text() for t in axes.texts] == list("11222333")
    assert marks.get_ydata()[5] == pytest.approx(step_entropy(GRID, 5, 3, noise_level=0.7))
    assert axes.get_xlabel()
    assert "latent units" in axes.get_ylabel()
    figure.draw_without_rendering()
    assert (
        axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
    )  # beside the data
    assert 'id="threshold"' in (tmp_path / "entropy.svg").read_text()


def test_entropy_figure_tells_plans_apart(profile: Path, tmp_path: Path) -> None:
    plans = {f"tau{t}": write_plan(tmp_path / f"{t}.json", t) for t in (0.0, 1.8, 2.2)}
    figure = figures.entropy_figure(profile, plans, tmp_path / "entropy")
    assert [line.get_ydata()[0] for line in by_gid(figure, "threshold")] == [1.8, 2.2]
    marks = [by_gid(figure, f"plan:tau{t}")[0] for t in (0.0, 1.8, 2.2)]
    assert len({m.get_marker() for m in marks}) == 3
    assert len({float(m.get_xdata()[0]) for m in marks}) == 3  # side by side
    plans["nats"] = write_plan(tmp_path / "n.json", 0.5, "nats_per_dim")
    with pytest.raises(UserError, match="nats_per_dim"):
        figures.entropy_figure(profile, plans, tmp_path / "x")


def test_entropy_figure_follows_the_plans_measure(profile: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "n.json", math.log(2.2), "nats_per_dim")
    figure = figures.entropy_figure(profile, {"one": plan}, tmp_path / "entropy")
    assert "nats" in figure.axes[0].get_ylabel()
    axes: Any = figure.axes[0]
    assert axes.lines[0].get_ydata()[0] == pytest.approx(math.log(2.8929), abs=1e-4)
    (tmp_path / "bad.json").write_text('{"sigmas": [1, 0]}')
    with pytest.raises(UserError, match="not a plan"):
        figures.entropy_figure(profile, {"one": tmp_path / "bad.json"}, tmp_path / "x")


def test_spread_figure_has_a_panel_each_and_the_yardstick(profile: Path, tmp_path: Path) -> None:
    figure = figures.spread_figure(profile, tmp_path / "spread", noise_fraction=0.25)
    assert_drawn(tmp_path / "spread")
    assert len(figure.axes) == 3
    assert [a.get_title(loc="left") for a in figure.axes] == [
        "Final latents",
        "Images",
        "Reward: quality",
    ]
    yardsticks = by_gid(figure, "yardstick")
    assert len(yardsticks) == 2  # none for latents, whose yardstick is null
    assert all(line.get_ydata()[0] == 2.0 and line.get_linestyle() == "--" for line in yardsticks)
    assert "25% noise on the final image" in texts(figure)
    assert all(axes.get_ylabel() and axes.get_xlabel() for axes in figure.axes)
    panel: Any = figure.axes[1]
    single, *_, widest, _ = panel.lines
    entropy = step_entropy(GRID, 0, 1, noise_level=0.7)
    assert single.get_ydata()[0] == pytest.approx(2 * entropy)
    third = step_entropy(GRID, 2, 1, noise_level=0.7)
    assert single.get_ydata()[2] == pytest.approx(2.5 * third)  # prompt 0 failed
    assert math.isnan(widest.get_ydata()[5])
    band = panel.collections[0].get_paths()[0].vertices
    top = band[np.isclose(band[:, 0], 0.0), 1].max()
    assert top == pytest.approx(2 * entropy + entropy / math.sqrt(3))


def test_spread_figure_needs_a_measured_spread(tmp_path: Path) -> None:
    rows = [r | {"spread": None} for r in profile_rows()]
    write_table(tmp_path / "p.parquet", ENTROPY_PROFILE, rows)
    with pytest.raises(UserError, match="no measured spread"):
        figures.spread_figure(tmp_path / "p.parquet", tmp_path / "x")


def write_metrics(path: Path, run: str, cost: int) -> Path:
    rows = []
    for i in range(21):
        nfe = i * cost
        if i:
            value = None if i == 4 else float(i)
            rows.append((i, nfe, "reward/quality", value))
        if i % 10 == 0:
            rows.append((i, nfe, "monitor/reward/quality", 100.0 + i))
    keys = ("iteration", "nfe", "metric", "value")
    write_table(
        path, TRAIN_METRICS, [{"run": run, **dict(zip(keys, r, strict=True))} for r in rows]
    )
    return path


def test_curves_show_both_costs_of_every_run(tmp_path: Path) -> None:
    paths = [write_metrics(tmp_path / f"{r}.parquet", r, c) for r, c in (("a", 100), ("b", 7))]
    figure = figures.curves_figure(paths, ["quality"], tmp_path / "curves", window=3)
    assert_drawn(tmp_path / "curves")
    left, right = figure.axes
    assert left.get_shared_y_axes().joined(left, right)
    on_left, on_right = by_gid(figure, "monitor:a")
    assert list(on_left.get_xdata()) == [0, 10, 20]
    assert list(on_left.get_ydata()) == [100, 110, 120]
    assert list(on_right.get_xdata()) == [0, 1000, 2000]
    assert on_left.get_marker() not in ("", "None", None)
    training = by_gid(figure, "training:b")[0]
    assert list(training.get_xdata())[:4] == [1, 2, 3, 5]  # iteration 4 has no value
    np.testing.assert_allclose(training.get_ydata()[:5], [1, 1.5, 2, 10 / 3, 14 / 3])
    assert training.get_linewidth() < on_left.get_linewidth()
    assert training.get_color() != on_left.get_color()
    assert "last 3 iterations" in texts(figure)
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"a", "b"}
    with pytest.raises(UserError, match="no run has the metric"):
        figures.curves_figure(paths, ["missing"], tmp_path / "x")


def test_trailing_mean() -> None:
    values = np.array([4.0, 2.0, 6.0, 0.0])
    np.testing.assert_allclose(figures.trailing_mean(values, 1), values)
    np.testing.assert_allclose(figures.trailing_mean(values, 2), [4, 3, 4, 3])
    np.testing.assert_allclose(figures.trailing_mean(values, 9), [4, 3, 4, 3])
    with pytest.raises(ValueError, match="window"):
        figures.trailing_mean(values, 0)


def test_before_after_pairs_images_and_keeps_their_pixels(tmp_path: Path) -> None:
    write_results(tmp_path / "base", "base", 0.0, 10)
    write_results(tmp_path / "run", "one", 0.0, 60)
    base, run = (tmp_path / name / "images.parquet" for name in ("base", "run"))
    figure = image_grid.before_after(base, [("a run", run)], 3, tmp_path / "grid")
    assert not (tmp_path / "grid.svg").exists()
    shown: list[Any] = [axes.images[0] for axes in figure.axes]
    levels = [round(float(image.get_array().mean()) * 255) for image in shown]
    assert levels == [110, 160] * 3  # rows are prompts, columns base and run; sample 0
    assert all(image.get_interpolation() == "nearest" for image in shown)
    assert "prompt number 2" in texts(figure)
    assert "prompt number 3" not in texts(figure)
    assert "base" in texts(figure)
    assert "a run" in texts(figure)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    for level in (110, 160):  # three squares of 192 x 192 pixels, edges apart
        assert (pixels == level).sum() == pytest.approx(3 * 192 * 192, rel=0.02)


def test_before_after_shows_what_lies_below_an_image_that_is_none(tmp_path: Path) -> None:
    write_results(tmp_path / "base", "base", 0.0, 10, lost=[(1, 0)])
    figure = image_grid.before_after(tmp_path / "base/images.parquet", [], 2, tmp_path / "grid")
    shown: list[Any] = [axes.images[0] for axes in figure.axes]
    levels = [round(float(image.get_array().mean()) * 255) for image in shown]
    assert levels == [110, 110]  # the cross of a real one; neither black nor a hole


def test_before_after_refuses_images_of_other_prompts(tmp_path: Path) -> None:
    write_results(tmp_path / "base", "base", 0.0, 10, samples=1)
    rows = [{"run": "one", "prompt_id": 0, "prompt": "other", "sample": 0, "png": png(1)}]
    write_table(tmp_path / "i.parquet", IMAGES, rows)
    base = tmp_path / "base" / "images.parquet"
    with pytest.raises(UserError, match=r"'one' has no image of prompt 0 \('prompt number 0'\)"):
        image_grid.before_after(base, [("one", tmp_path / "i.parquet")], 1, tmp_path / "x")
    with pytest.raises(UserError, match="no image to show"):
        image_grid.before_after(base, [], 0, tmp_path / "x")


def test_same_data_gives_the_same_file(profile: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        figures.spread_figure(profile, tmp_path / name)
    for ending in ("png", "svg"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_tables_figures_and_report_need_neither_torch_nor_trackers() -> None:
    code = (
        "import sys, egrpo.report.tables, egrpo.figures.profile, egrpo.report.report\n"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
