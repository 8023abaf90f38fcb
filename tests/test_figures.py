"""Figures: what their artists say, what they refuse, that texts stay readable."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from small_results import GRID, entropies, images, png, profile_rows, refused, write_metrics

from egrpo.core.entropy import MEASURES, step_entropy
from egrpo.core.plan import Plan, make_plan
from egrpo.core.spread import Choice, Spread, choose_threshold
from egrpo.figures.branches import branches_figure
from egrpo.figures.curves import arm_curves_figure, curves_figure, trailing_mean
from egrpo.figures.image_grid import images_figure
from egrpo.figures.profile import entropy_figure, spread_figure, threshold_figure
from egrpo.figures.style import wrap
from egrpo.store.tables import BRANCHES, ENTROPY_PROFILE, IMAGES, write_table

PAIRS = [[2, 1], [6, 1], [6, 4]]
LONG = "a prompt of $5 or $10 that is " + "much " * 60 + "too long"


def by_gid(figure: Figure, gid: str) -> list[Any]:
    return [a for axes in figure.axes for a in axes.get_children() if a.get_gid() == gid]


def images_of(figure: Figure) -> list[Any]:
    """Images, row by row."""
    return [axes.images[0] for axes in figure.axes if axes.images]


def levels(figure: Figure) -> list[int]:
    shown = images_of(figure)
    assert all(image.get_interpolation() == "nearest" for image in shown)
    return [round(float(image.get_array().mean()) * 255) for image in shown]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def assert_readable(figure: Figure) -> None:
    """No text beyond the edge, no figure text, title or legend over another or over an image."""
    figure.draw_without_rendering()
    free: list[Any] = [*figure.texts, *figure.legends]
    free += [axes._left_title for axes in figure.axes if axes.get_title(loc="left")]
    free += [] if figure._suptitle is None else [figure._suptitle]
    inside = [t for legend in figure.legends for t in legend.get_texts()]
    inside += [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    for text in [*free, *inside]:
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= -1, text
        assert max(box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) <= 1, text
    solid = [(a, a.get_window_extent().padded(-1.5)) for a in dict.fromkeys(free)]
    for (a, box), (b, other) in combinations(solid, 2):
        assert not box.overlaps(other), (a, b)
    for axes in figure.axes:
        for text, box in solid:
            if axes.images:
                assert not axes.get_window_extent().padded(-1.5).overlaps(box), text


def assert_drawn(stem: Path, endings: Iterable[str] = ("png", "svg")) -> None:
    for ending in endings:
        assert Path(f"{stem}.{ending}").stat().st_size > 2000
    pixels = np.asarray(Image.open(f"{stem}.png").convert("RGB"))
    assert min(pixels.shape[:2]) > 200
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert (pixels != 255).any(axis=2).mean() > 0.01


def refuses(match: str, function: Callable[..., Figure], *args: Any, **more: Any) -> None:
    with refused(match):
        function(*args, **more)


def write_run(path: Path, run: str, values: dict[int, float | None], cost: int) -> Path:
    both = {"monitor/reward/quality": values, "reward/quality": dict.fromkeys(values, 0.0)}
    return write_metrics(path, run, cost, both)


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, list[Path]]:
    """Arm "a" with three seeds, of which one failed to score at 20; arm "b" with one."""
    seeds = ((0.0, 90, 1.0), (1.0, 100, 2.0), (5.0, 110, None))
    a = [
        write_run(tmp_path / f"a{k}", f"a-s{k}", {0: v, 10: 2 * v, 20: last, 30: 3 + v}, cost)
        for k, (v, cost, last) in enumerate(seeds)
    ]
    return {"a": a, "b": [write_run(tmp_path / "b0", "b-s0", {0: 1.0, 10: 4.0}, 50)]}


def test_curves_show_both_costs_of_every_run(tmp_path: Path) -> None:
    metrics = {
        "reward/quality": {i: None if i == 4 else float(i) for i in range(1, 21)},
        "monitor/reward/quality": {i: 100.0 + i for i in (0, 10, 20)},
    }
    costs = {"a": 100, "b": 7}
    paths = [write_metrics(tmp_path / run, run, cost, metrics) for run, cost in costs.items()]
    figure = curves_figure(paths, ["quality"], tmp_path / "curves")
    assert_drawn(tmp_path / "curves")
    left, right = figure.axes
    assert left.get_shared_y_axes().joined(left, right)
    on_left, on_right = by_gid(figure, "monitor:a")
    assert [list(on_left.get_xdata()), list(on_left.get_ydata())] == [[0, 10, 20], [100, 110, 120]]
    assert list(on_right.get_xdata()) == [0, 1000, 2000]
    assert on_left.get_marker() not in ("", "None", None)
    training = by_gid(figure, "training:b")[0]
    assert list(training.get_xdata())[:4] == [1, 2, 3, 5]  # iteration 4 has no value
    np.testing.assert_allclose(training.get_ydata()[:5], [1, 1.5, 2, 11 / 4, 17 / 5])
    assert training.get_linewidth() < on_left.get_linewidth()
    assert training.get_color() != on_left.get_color()
    assert "last 10 iterations" in texts(figure)
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {"a", "b"}
    refuses("no run has the metric", curves_figure, paths, ["missing"], tmp_path / "x")
    for window, known in ((1, [4, 2, 6, 0]), (2, [4, 3, 4, 3]), (9, [4, 3, 4, 3])):
        np.testing.assert_allclose(trailing_mean(np.array([4.0, 2.0, 6.0, 0.0]), window), known)


def test_arm_curves_show_mean_interval_and_both_costs(
    arms: dict[str, list[Path]], tmp_path: Path
) -> None:
    figure = arm_curves_figure(arms, ["quality"], tmp_path / "arms")
    left, right = by_gid(figure, "monitor:a")
    assert list(left.get_xdata()) == [0, 10, 30]  # at 20 not every seed has a value
    np.testing.assert_allclose(left.get_ydata(), [2, 4, 5])
    np.testing.assert_allclose(right.get_xdata(), [0, 1000, 3000])  # mean of 90, 100, 110
    for band in by_gid(figure, "band:a"):
        corners = band.get_paths()[0].vertices
        at = np.isclose(corners[:, 0], (10, 1000)[band.axes is right.axes])
        # seeds 0, 2, 10; 4.302653 is the 97.5% quantile of Student's t with 2 degrees of freedom
        half = 4.302653 * np.std([0, 2, 10], ddof=1) / np.sqrt(3)
        np.testing.assert_allclose(sorted(set(corners[at, 1])), [4 - half, 4 + half], rtol=1e-6)
        assert band.axes.get_ylim() == pytest.approx((-0.5, 10.5))  # every seed, not every band
    assert len(by_gid(figure, "band:a")) == 2
    assert not by_gid(figure, "band:b")  # one seed
    assert not by_gid(figure, "training:a")
    assert "mean of 1 to 3 seeds; band: its 95% interval over seeds" in texts(figure)
    assert_readable(figure)
    one = arm_curves_figure({"b": arms["b"]}, ["quality"], tmp_path / "one")
    assert "band" not in texts(one)
    rewards = {"one": 0, "two": 50}  # a row each
    values = {f"monitor/reward/{r}": {i: v + i for i in range(3)} for r, v in rewards.items()}
    path = write_metrics(tmp_path / "m", "a", 1, values)
    figure = arm_curves_figure({"a": [path]}, ["two", "one"], tmp_path / "x")
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["reward: two", "reward: one"]
    tops = [line.get_ydata()[-1] for line in by_gid(figure, "monitor:a")]
    assert tops == [52.0, 52.0, 2.0, 2.0]


def test_eleven_arms_differ_in_more_than_color(tmp_path: Path) -> None:
    groups = {}
    for k in range(11):
        values: dict[int, float | None] = {i: float(k * i) for i in range(0, 310, 10)}
        path = write_run(tmp_path / f"{k}", f"r{k}", values, 10 * k + 10)
        groups[f"{'long_name_of_an_' * 2}arm_{k}"] = [path]
    figure = arm_curves_figure(groups, ["quality"], tmp_path / "arms")
    lines = [by_gid(figure, f"monitor:{arm}")[0] for arm in groups]
    assert len({line.get_marker() for line in lines}) == 11
    assert len({(to_hex(x.get_color()), str(x._dash_pattern)) for x in lines}) == 11
    assert all(len(line.get_markevery()) == 2 for line in lines)
    assert len({line.get_markevery()[0] for line in lines[:4]}) == 4  # not all at one point
    (legend,) = figure.legends
    assert [t.get_text().replace("\n", "") for t in legend.get_texts()] == list(groups)
    assert [h.get_marker() for h in legend.legend_handles] == [x.get_marker() for x in lines]
    assert_readable(figure)
    bottom = min(axes.get_tightbbox().y0 for axes in figure.axes)
    assert legend.get_window_extent().y1 <= bottom + 1


def test_arm_curves_refuse_what_they_cannot_average(
    arms: dict[str, list[Path]], tmp_path: Path
) -> None:
    (tmp_path / "bad").write_bytes(b"PAR1")
    write_table(tmp_path / "images", IMAGES, [])
    apart = write_run(tmp_path / "apart", "b-s1", {5: 1.0}, 10)
    failed = write_run(tmp_path / "failed", "b-s2", {0: None}, 10)
    for match, more, reward in (
        ("arm 'b' has no value of monitor/reward/other", [], "other"),
        ("no such file", [tmp_path / "missing"], "quality"),
        ("no common iteration", [apart], "quality"),
        ("has no value of monitor/reward/quality", [failed], "quality"),
        ("damaged Parquet", [tmp_path / "bad"], "quality"),
        ("expected 'train_metrics'", [tmp_path / "images"], "quality"),
    ):
        groups = {"b": [*arms["b"], *more]}
        refuses(match, arm_curves_figure, groups, [reward], tmp_path / "x")


def write_images(path: Path, level: int, text: str = "prompt", **look: Any) -> Path:
    names = [f"{text} {p}" for p in range(3)]
    shown = images(path.name, lambda p, s: level + p + 100 * s, names, 2, **look)
    write_table(path, IMAGES, shown)
    return path


@pytest.mark.parametrize(("page", "width", "edge"), [(True, 384, 0.01), (False, 192, 0.02)])
def test_grids_show_prompts_by_models_and_keep_their_pixels(
    page: bool, width: int, edge: float, tmp_path: Path
) -> None:
    figure_of = partial(images_figure, page=page)
    base, a, b = (write_images(tmp_path / n, k) for n, k in (("base", 10), ("a", 50), ("b", 90)))
    figure = figure_of(base, [("one", a), ("two", b)], 2, tmp_path / "grid")
    assert levels(figure) == [10, 50, 90, 11, 51, 91]  # rows are prompts; sample 0
    assert {"prompt 0", "prompt 1", "base", "one", "two"} <= set(texts(figure).split("\n"))
    assert "prompt 2" not in texts(figure)
    vectors = [file.read_text() for file in tmp_path.glob("*.svg")]
    assert [text.count("<image") for text in vectors] == [6] * page
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    for level in (10, 51, 90):  # whole multiples of 8 pixels, edges apart
        assert (pixels == level).sum() == pytest.approx(width**2, rel=edge)
    assert_readable(figure)
    refuses("no such file", figure_of, base, [("one", tmp_path / "no")], 1, tmp_path / "x")
    other = write_images(tmp_path / "other", 10, "else")
    match = r"'one' has no image of prompt 0 \('prompt 0'\)"
    refuses(match, figure_of, base, [("one", other)], 1, tmp_path / "x")
    row = {"run": "base", "prompt_id": 0, "prompt": "p", "sample": 0, "png": b"no image"}
    write_table(tmp_path / "bad", IMAGES, [row])
    refuses("damaged image", figure_of, tmp_path / "bad", [], 1, tmp_path / "x")
    crossed = write_images(tmp_path / "crossed", 110, opacity=0)
    below = levels(figure_of(crossed, [], 2, tmp_path / "grid"))
    assert below == [110, 111]  # of what is no image; neither black nor a hole


@pytest.mark.parametrize("size", [(32, 32), (1024, 768)])
def test_eleven_columns_fit_a_page(size: tuple[int, int], tmp_path: Path) -> None:
    base = write_images(tmp_path / "base", 10, LONG, size=size)
    names = ["granular_grpo", "tempflow-grpo", "E-GRPO, 2 steps merged", "unbroken" * 3]
    columns = [(f"{names[k % 4]}{k}", base) for k in range(11)]
    figure = images_figure(base, columns, 2, tmp_path / "grid")
    assert len(images_of(figure)) == 24
    assert figure.get_figwidth() < 10.1
    assert_readable(figure)
    assert "…" in texts(figure)  # the prompt does not run into the next row
    boxes = {round(axes.get_window_extent().width) for axes in figure.axes}
    assert size[0] > 32 or boxes == {192}
    embedded = (tmp_path / "grid.svg").stat().st_size
    assert embedded < 3_000_000  # large images at the size shown


def write_branches(path: Path, drop: tuple[int, int] | None = None, size: int = 8) -> Path:
    """Two prompts, ten samples; the level of an image is 100 prompt + 20 row + sample."""
    pairs = [(2, 1), (6, 1), (6, 4), (-1, 0)]
    rows = [
        {"prompt_id": p, "prompt": LONG if p else "a prompt", "step": step, "span": span}
        | {"sample": s, "png": png(100 * p + 20 * row + s, (size, size))}
        for p in (0, 1)
        for row, (step, span) in enumerate(pairs)
        for s in range(10)
        if (step, span) != drop
    ]
    write_table(path, BRANCHES, rows)
    return path


def by_step(step: int, span: int, prompt: int, entropy: float) -> dict[str, Any]:
    """Spread step/10 + span (quality) and 0.5 (flat); yardstick 1.5 + prompt and none."""
    flat = None if (prompt, step) == (1, 2) else 0.5, None if prompt else 1.5
    other = step / 10 + span, 1.5 + prompt
    return {"reward:quality": other, "reward:flat": flat, "image_distance": other}


def write_profile(path: Path, spans: tuple[int, ...] = (1, 4)) -> Path:
    write_table(path, ENTROPY_PROFILE, profile_rows(spans, 2, by_step))
    return path


@pytest.mark.parametrize("size", [8, 400])
def test_branches_figure_puts_spread_beside_the_images(size: int, tmp_path: Path) -> None:
    shown = write_branches(tmp_path / "b", size=size)
    profile = write_profile(tmp_path / "p")
    figure = branches_figure(shown, profile, PAIRS, 6, tmp_path / "x", 0.25)
    known = [100 * p + 20 * row + s for p in (0, 1) for row in range(4) for s in range(8)]
    assert levels(figure) == known
    assert len(figure.axes) == len(known) + 2 * 2  # a panel for each prompt and reward
    (above,) = by_gid(figure, "above:quality:0")
    (below,) = by_gid(figure, "below:quality:0")
    assert [list(x) for x in above.get_data()] == [[1.6, 4.6], [1, 2]]  # yardstick 1.5
    assert [list(x) for x in below.get_data()] == [[1.2], [0]]
    assert [list(x.get_xdata()) for x in by_gid(figure, "above:quality:1")] == [[4.6]]
    assert above.get_markerfacecolor() != below.get_markerfacecolor()
    (yardstick,) = by_gid(figure, "yardstick:quality:1")
    assert list(yardstick.get_xdata()) == [2.5, 2.5]
    assert yardstick.get_linestyle() == "--"
    quality = [a for a in figure.axes if any("quality" in str(x.get_gid()) for x in a.lines)]
    assert len({axes.get_xlim() for axes in quality}) == 1  # prompts can be compared
    for row, axes in enumerate(figure.axes[4::8][:4]):  # dots stand beside their row
        middle = axes.get_window_extent().y0 + axes.get_window_extent().height / 2
        assert quality[0].transData.transform((0, row))[1] == pytest.approx(middle, abs=1)
    for words in ("SDE at step 2", "6,\n4 steps merged", "25% noise\n(yardstick)", "std of\nflat"):
        assert words in texts(figure)
    assert_readable(figure)
    svg = (tmp_path / "x.svg").read_text()
    assert svg.count("<image") == 64
    assert 'id="yardstick:quality:0"' in svg


def test_branches_figure_shows_what_was_asked_and_says_where_nothing_was_scored(
    tmp_path: Path,
) -> None:
    shown, profile = write_branches(tmp_path / "b"), write_profile(tmp_path / "p")
    figure = branches_figure(shown, profile, [[6, 4]], 1, tmp_path / "x")
    assert levels(figure) == [40 + s for s in range(8)] + [60 + s for s in range(8)]
    figure = branches_figure(shown, profile, PAIRS, 2, tmp_path / "x", rewards=["flat"])
    assert not by_gid(figure, "yardstick:flat:1")
    (alone,) = by_gid(figure, "alone:flat:1")
    assert list(alone.get_ydata()) == [1, 2]  # neither more nor less
    assert not len(by_gid(figure, "below:flat:1")[0].get_ydata())
    assert [t.get_text() for t in alone.axes.texts] == ["no score", "0.50", "0.50", "no score"]
    assert "quality" not in texts(figure)


def test_branches_figure_refuses_missing_rows(tmp_path: Path) -> None:
    shown, profile = write_branches(tmp_path / "b"), write_profile(tmp_path / "p")
    without = write_branches(tmp_path / "c", drop=(-1, 0))
    single = write_profile(tmp_path / "q", spans=(1,))
    for match, *args in (
        ("no image of step 3, span 1 for prompt 0", shown, profile, [[3, 1]], 2),
        ("no image of the yardstick", without, profile, PAIRS, 2),
        ("step 6, span 4 for prompt 0; add the span to profile.spans", shown, single, PAIRS, 2),
        (r"\[step, span\]", shown, profile, [], 2),
        ("no image to show", shown, profile, PAIRS, 0),
        ("no such file", tmp_path / "no", profile, PAIRS, 2),
        ("expected 'branches'", profile, profile, PAIRS, 2),
    ):
        refuses(match, branches_figure, *args, tmp_path / "x")
    for match, rewards in (("beauty", ["beauty"]), ("any reward", [])):
        match = f"holds no spread of {match}"
        refuses(match, branches_figure, shown, profile, PAIRS, 2, tmp_path / "x", rewards=rewards)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    write_table(tmp_path / "profile.parquet", ENTROPY_PROFILE, profile_rows())
    return tmp_path / "profile.parquet"


def plan_of(threshold: float, measure: str = "exp_per_dim", steps: int = 8) -> Plan:
    return make_plan(GRID, range(steps), threshold=threshold, noise_level=0.7, measure=measure)


def write_plan(path: Path, threshold: float, measure: str = "exp_per_dim") -> Path:
    path.write_text(json.dumps(plan_of(threshold, measure).to_dict()))
    return path


def test_entropy_figure_shows_lines_threshold_and_plan(profile: Path, tmp_path: Path) -> None:
    plans = {"one": write_plan(tmp_path / "a.json", 2.2), "two": write_plan(tmp_path / "b", 2.2)}
    figure = entropy_figure(profile, plans, tmp_path / "entropy")
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
    beside = axes.get_legend().get_window_extent().x0
    assert beside >= axes.get_window_extent().x1  # not over the data
    assert 'id="threshold"' in (tmp_path / "entropy.svg").read_text()


def test_entropy_figure_tells_plans_apart(profile: Path, tmp_path: Path) -> None:
    plans = {f"tau{t}": write_plan(tmp_path / f"{t}.json", t) for t in (0.0, 1.8, 2.2)}
    figure = entropy_figure(profile, plans, tmp_path / "entropy")
    assert [line.get_ydata()[0] for line in by_gid(figure, "threshold")] == [1.8, 2.2]
    marks = [by_gid(figure, f"plan:tau{t}")[0] for t in (0.0, 1.8, 2.2)]
    assert len({m.get_marker() for m in marks}) == 3
    assert len({float(m.get_xdata()[0]) for m in marks}) == 3  # side by side
    nats = write_plan(tmp_path / "n.json", math.log(2.2), "nats_per_dim")
    refuses("nats_per_dim", entropy_figure, profile, plans | {"n": nats}, tmp_path / "x")
    axes: Any = entropy_figure(profile, {"one": nats}, tmp_path / "entropy").axes[0]
    assert "nats" in axes.get_ylabel()  # the plan's measure
    assert axes.lines[0].get_ydata()[0] == pytest.approx(math.log(2.8929), abs=1e-4)
    (tmp_path / "bad.json").write_text('{"sigmas": [1, 0]}')
    refuses("not a plan", entropy_figure, profile, {"a": tmp_path / "bad.json"}, tmp_path / "x")


def test_entropy_figure_draws_only_wanted_spans_in_their_own_look(
    profile: Path, tmp_path: Path
) -> None:
    plan = write_plan(tmp_path / "plan.json", 2.2)
    looks = []
    for spans in (None, (4,)):
        figure = entropy_figure(profile, {"a": plan}, tmp_path / "x", spans=spans)
        lines: dict[Any, Any] = {line.get_label(): line for line in figure.axes[0].lines}
        assert by_gid(figure, "threshold")
        assert ("1 step" in lines, "4 steps merged" in lines) == (spans is None, True)
        looks.append((lines["4 steps merged"].get_color(), lines["4 steps merged"].get_marker()))
    assert looks[0] == looks[1]


def test_spread_figure_has_a_panel_each_and_the_yardstick(profile: Path, tmp_path: Path) -> None:
    figure = spread_figure(profile, tmp_path / "spread", noise_fraction=0.25)
    assert_drawn(tmp_path / "spread")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Final latents", "Images", "Reward: quality"]
    yardsticks = by_gid(figure, "yardstick")
    assert len(yardsticks) == 2  # none for latents, whose yardstick is null
    assert all(line.get_ydata()[0] == 2.0 and line.get_linestyle() == "--" for line in yardsticks)
    assert "25% noise on the final image" in texts(figure)
    assert all(axes.get_ylabel() and axes.get_xlabel() for axes in figure.axes)
    panel: Any = figure.axes[1]
    single, *_, widest, _ = panel.lines
    entropy, third = (step_entropy(GRID, step, 1, noise_level=0.7) for step in (0, 2))
    assert single.get_ydata()[0] == pytest.approx(2 * entropy)
    assert single.get_ydata()[2] == pytest.approx(2.5 * third)  # prompt 0 failed
    assert math.isnan(widest.get_ydata()[5])
    band = panel.collections[0].get_paths()[0].vertices
    top = band[np.isclose(band[:, 0], 0.0), 1].max()
    assert top == pytest.approx(2 * entropy + entropy / math.sqrt(3))
    write_table(profile, ENTROPY_PROFILE, [r | {"spread": None} for r in profile_rows()])
    refuses("no measured spread", spread_figure, profile, tmp_path / "x")


def measured(measure: str) -> tuple[list[Spread], Choice]:
    """Points whose spread grows with entropy, with one dent, and one without a value."""
    spreads = []
    for step in range(10):
        for span in (1, 2, 4):
            entropy = entropies(step, span)
            value = entropy["exp_per_dim"] * (0.7 if (step, span) == (3, 2) else 1.0)
            spreads.append(Spread(step, span, entropy, math.inf if step == 9 else value))
    return spreads, choose_threshold(spreads, measure, 2.0)


@pytest.mark.parametrize("measure", MEASURES)
def test_threshold_figure_shows_choice_and_plan(measure: str, tmp_path: Path) -> None:
    spreads, choice = measured(measure)
    plan = plan_of(choice.threshold, measure)
    figure = threshold_figure(spreads, choice, plan, 2.0, "quality", tmp_path / "x")
    points = [by_gid(figure, f"span:{span}")[0] for span in (1, 2, 4)]
    assert sum(len(line.get_xdata()) for line in points) == 27  # the infinite ones are left out
    assert points[1].get_xdata()[3] == spreads[10].entropy[measure]
    assert points[1].get_ydata()[3] == spreads[10].value
    assert len({line.get_marker() for line in points}) == 3
    (fit,) = by_gid(figure, "fit")
    assert fit.get_drawstyle() == "steps-post"
    np.testing.assert_array_equal(fit.get_ydata(), choice.fitted)
    assert list(by_gid(figure, "factor")[0].get_ydata()) == [2.0, 2.0]
    down, across = by_gid(figure, "threshold")
    assert list(down.get_xdata()) == [choice.threshold] * 2 == list(across.get_ydata())
    (merged,) = by_gid(figure, "merged")
    assert list(merged.get_xdata()) == list(plan.active)
    assert (merged.get_ydata() >= choice.threshold).all()
    np.testing.assert_allclose(by_gid(figure, "single")[0].get_ydata(), plan.entropy[:8])
    assert [t.get_text() for t in figure.axes[1].texts] == [str(span) for span in plan.spans]
    assert not by_gid(figure, "capped")
    assert f"the spread of quality: τ = {choice.threshold:g}" in texts(figure)
    assert_readable(figure)


def test_threshold_figure_marks_steps_out_of_reach_and_refuses_another_plan(tmp_path: Path) -> None:
    spreads, choice = measured("exp_per_dim")
    plan = plan_of(choice.threshold, steps=15)
    figure = threshold_figure(spreads, choice, plan, 2.0, "a, b " * 30, tmp_path / "x")
    (merged,), (capped,) = by_gid(figure, "merged"), by_gid(figure, "capped")
    assert sorted([*merged.get_xdata(), *capped.get_xdata()]) == list(range(15))
    assert len(capped.get_xdata()) == len(plan.warnings) > 0
    assert merged.get_marker() != capped.get_marker()
    assert_readable(figure)
    other = spreads, choice, plan_of(2.6), 2.0, "q", tmp_path / "x"
    refuses("plan's threshold is 2.6", threshold_figure, *other)


def test_same_data_gives_the_same_files_and_leaves_matplotlib_alone(
    arms: dict[str, list[Path]], tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    base = write_images(tmp_path / "base", 10)
    branches, flat = write_branches(tmp_path / "branches"), write_profile(tmp_path / "flat")
    spreads, choice = measured("exp_per_dim")
    plan = plan_of(choice.threshold)
    draw: dict[str, Callable[[Path], Figure]] = {
        "arms": lambda stem: arm_curves_figure(arms, ["quality"], stem),
        "images": lambda stem: images_figure(base, [("one", base)], 1, stem),
        "branches": lambda stem: branches_figure(branches, flat, PAIRS, 1, stem),
        "threshold": lambda stem: threshold_figure(spreads, choice, plan, 2.0, "quality", stem),
    }
    for name, figure in draw.items():
        files = []
        for folder in (tmp_path / "1", tmp_path / "2"):
            folder.mkdir(exist_ok=True)
            figure(folder / name)
            files.append([(folder / f"{name}{e}").read_bytes() for e in (".png", ".svg")])
        assert files[0] == files[1]
        assert min(map(len, files[0])) > 2000
    assert dict(matplotlib.rcParams) == before
    assert len(list((tmp_path / "1").iterdir())) == 2 * len(draw), "no temporary file is left"


@pytest.mark.parametrize(
    ("text", "width", "lines", "wrapped"),
    [
        ("granular_grpo", 9, None, "granular_\ngrpo"),
        ("mix_grpo", 9, None, "mix_grpo"),
        ("tau 2.2 of-all", 7, None, "tau 2.2\nof-all"),
        ("unbroken", 3, None, "unb\nrok\nen"),
        ("one two three", 5, 2, "one\ntwo…"),
        ("one seven three", 5, 2, "one\nseve…"),
        ("one  two ", 20, 1, "one two"),
        ("", 5, None, ""),
    ],
)
def test_wrap_breaks_names_at_their_joints(
    text: str, width: int, lines: int | None, wrapped: str
) -> None:
    assert wrap(text, width, lines) == wrapped
    assert max(map(len, wrapped.split("\n"))) <= width
    kept = re.sub(r"\s|…", "", wrapped)
    assert re.sub(r"\s", "", text).startswith(kept)
