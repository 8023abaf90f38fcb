"""The paper's figures: what their artists say, what they refuse, that texts stay readable."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
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

from egrpo.core.entropy import MEASURES, step_entropy
from egrpo.core.plan import make_plan
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.spread import Choice, Spread, choose_threshold
from egrpo.errors import UserError
from egrpo.figures.branches import branches_figure
from egrpo.figures.curves import arm_curves_figure, curves_figure
from egrpo.figures.image_grid import images_figure
from egrpo.figures.profile import entropy_figure
from egrpo.figures.style import wrap
from egrpo.figures.threshold import threshold_figure
from egrpo.store.tables import BRANCHES, ENTROPY_PROFILE, IMAGES, TRAIN_METRICS, write_table

GRID = shifted_sigmas(16, 3.0)
PAIRS = [[2, 1], [6, 1], [6, 4]]
LONG = "a prompt of $5 or $10 that is " + "much " * 60 + "too long"


def png(level: int, size: tuple[int, int] = (8, 8)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (level, level, level)).save(out, "PNG")
    return out.getvalue()


def by_gid(figure: Figure, gid: str) -> list[Any]:
    return [a for axes in figure.axes for a in axes.get_children() if a.get_gid() == gid]


def images_of(figure: Figure) -> list[Any]:
    """Images, row by row."""
    return [axes.images[0] for axes in figure.axes if axes.images]


def levels(figure: Figure) -> list[int]:
    return [round(float(image.get_array().mean()) * 255) for image in images_of(figure)]


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def assert_readable(figure: Figure) -> None:
    """No text beyond the edge, no figure text, title or legend over another or over an image."""
    figure.draw_without_rendering()
    free: list[Any] = [*figure.texts, *figure.legends]
    free += [axes._left_title for axes in figure.axes if axes.get_title(loc="left")]
    free += [] if figure._suptitle is None else [figure._suptitle]
    inside = [t for legend in figure.legends for t in legend.get_texts()]
    inside += [axes.xaxis.label for axes in figure.axes] + [
        axes.yaxis.label for axes in figure.axes
    ]
    for text in [*free, *inside]:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1, text  # noqa: PT018
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, text  # noqa: PT018
    solid = [(a, a.get_window_extent().padded(-1.5)) for a in dict.fromkeys(free)]
    for (a, box), (b, other) in combinations(solid, 2):
        assert not box.overlaps(other), (a, b)
    for axes in figure.axes:
        for text, box in solid:
            if axes.images:
                assert not axes.get_window_extent().padded(-1.5).overlaps(box), text


def refuses(match: str, function: Callable[..., Figure], *args: Any, **more: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        function(*args, **more)
    assert "\n" not in str(caught.value)


# --- curves of arms -------------------------------------------------------------------------------


def write_metrics(
    path: Path, run: str, values: Mapping[int, float | None], cost: int, reward: str = "quality"
) -> Path:
    rows = [
        {"run": run, "iteration": i, "nfe": i * cost, "metric": name, "value": value}
        for i, v in values.items()
        for name, value in ((f"monitor/reward/{reward}", v), (f"reward/{reward}", 0.0))
    ]
    write_table(path, TRAIN_METRICS, rows)
    return path


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, list[Path]]:
    """Arm "a" with three seeds, of which one failed to score at 20; arm "b" with one."""
    seeds = ((0.0, 90, 1.0), (1.0, 100, 2.0), (5.0, 110, None))
    a = [
        write_metrics(tmp_path / f"a{k}", f"a-s{k}", {0: v, 10: 2 * v, 20: last, 30: 3 + v}, cost)
        for k, (v, cost, last) in enumerate(seeds)
    ]
    return {"a": a, "b": [write_metrics(tmp_path / "b0", "b-s0", {0: 1.0, 10: 4.0}, 50)]}


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


def test_eleven_arms_differ_in_more_than_colour(tmp_path: Path) -> None:
    groups = {}
    for k in range(11):
        values = {i: float(k * i) for i in range(0, 310, 10)}
        path = write_metrics(tmp_path / f"{k}", f"r{k}", values, 10 * k + 10)
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


def test_arm_curves_have_a_row_for_each_reward(tmp_path: Path) -> None:
    rows = [
        {"run": "a", "iteration": i, "nfe": i, "metric": f"monitor/reward/{r}", "value": v + i}
        for i in range(3)
        for r, v in (("one", 0.0), ("two", 50.0))
    ]
    write_table(tmp_path / "m", TRAIN_METRICS, rows)
    figure = arm_curves_figure({"a": [tmp_path / "m"]}, ["two", "one"], tmp_path / "x")
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["reward: two", "reward: one"]
    tops = [line.get_ydata()[-1] for line in by_gid(figure, "monitor:a")]
    assert tops == [52.0, 52.0, 2.0, 2.0]


def test_arm_curves_refuse_what_they_cannot_average(
    arms: dict[str, list[Path]], tmp_path: Path
) -> None:
    def check(match: str, groups: dict[str, list[Path]], rewards: tuple[str, ...]) -> None:
        refuses(match, arm_curves_figure, groups, rewards, tmp_path / "x")

    one = ("quality",)
    check("arm 'b' has no value of monitor/reward/other", {"b": arms["b"]}, ("other",))
    check("at least one arm", {}, one)
    check("at least one arm and one reward", arms, ())
    check("arm 'c' has no run", {"c": []}, one)
    check("has run 'b-s0' twice", {"b": arms["b"] * 2}, one)
    check("no such file", {"b": [tmp_path / "missing"]}, one)
    apart = write_metrics(tmp_path / "apart", "b-s1", {5: 1.0}, 10)
    check("no common iteration", {"b": [*arms["b"], apart]}, one)
    failed = write_metrics(tmp_path / "failed", "b-s2", {0: None}, 10)
    check("has no value of monitor/reward/quality", {"b": [*arms["b"], failed]}, one)
    (tmp_path / "bad").write_bytes(b"PAR1")
    check("damaged Parquet", {"b": [tmp_path / "bad"]}, one)
    write_table(tmp_path / "images", IMAGES, [])
    check("expected 'train_metrics'", {"b": [tmp_path / "images"]}, one)
    write_table(tmp_path / "empty", TRAIN_METRICS, [])
    check("holds 0 runs", {"b": [tmp_path / "empty"]}, one)


# --- grids of images ------------------------------------------------------------------------------


def write_images(
    path: Path, level: int, prompts: int = 3, size: tuple[int, int] = (8, 8), text: str = "prompt"
) -> Path:
    rows = [
        {
            "run": path.name,
            "prompt_id": p,
            "prompt": f"{text} {p}",
            "sample": s,
            "png": png(level + p + 100 * s, size),
        }
        for p in range(prompts)
        for s in range(2)
    ]
    write_table(path, IMAGES, rows)
    return path


def test_images_figure_shows_prompts_by_models_as_png_and_svg(tmp_path: Path) -> None:
    base, a, b = (write_images(tmp_path / n, k) for n, k in (("base", 10), ("a", 50), ("b", 90)))
    figure = images_figure(base, [("one", a), ("two", b)], 2, tmp_path / "grid")
    assert levels(figure) == [10, 50, 90, 11, 51, 91]  # rows are prompts; sample 0
    assert all(image.get_interpolation() == "nearest" for image in images_of(figure))
    for words in ("prompt 0", "prompt 1", "base", "one", "two"):
        assert words in texts(figure)
    assert "prompt 2" not in texts(figure)
    assert (tmp_path / "grid.svg").read_text().count("<image") == 6
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    for level in (10, 51, 90):  # whole multiples of 8 pixels, edges apart
        assert (pixels == level).sum() == pytest.approx(384 * 384, rel=0.01)
    assert_readable(figure)


@pytest.mark.parametrize("size", [(32, 32), (1024, 768)])
def test_eleven_columns_fit_a_page(size: tuple[int, int], tmp_path: Path) -> None:
    base = write_images(tmp_path / "base", 10, size=size, prompts=2, text=LONG)
    names = ["granular_grpo", "tempflow-grpo", "E-GRPO, 2 steps merged", "unbroken" * 3]
    columns = [(f"{names[k % 4]}{k}", base) for k in range(11)]
    figure = images_figure(base, columns, 2, tmp_path / "grid")
    assert len(images_of(figure)) == 24
    assert figure.get_figwidth() < 10.1
    assert_readable(figure)
    assert "…" in texts(figure)  # the prompt does not run into the next row
    boxes = {round(axes.get_window_extent().width) for axes in figure.axes}
    if size[0] == 32:
        assert boxes == {192}
    embedded = (tmp_path / "grid.svg").stat().st_size
    assert embedded < 3_000_000  # large images at the size shown


def test_images_figure_refuses_what_is_not_the_bases(tmp_path: Path) -> None:
    base = write_images(tmp_path / "base", 10)
    other = write_images(tmp_path / "other", 10, text="else")
    refuses("'one' has no image of prompt 0", images_figure, base, [("one", other)], 1, tmp_path)
    refuses("no image to show", images_figure, base, [], 0, tmp_path / "x")
    refuses("no such file", images_figure, base, [("one", tmp_path / "no")], 1, tmp_path / "x")
    row = {"run": "base", "prompt_id": 0, "prompt": "p", "sample": 0, "png": b"no image"}
    write_table(tmp_path / "bad", IMAGES, [row])
    refuses("damaged image", images_figure, tmp_path / "bad", [], 1, tmp_path / "x")


# --- branches -------------------------------------------------------------------------------------


def write_branches(path: Path, drop: tuple[int, int] | None = None, size: int = 8) -> Path:
    """Two prompts, ten samples; the level of an image is 100 prompt + 20 row + sample."""
    pairs = [(2, 1), (6, 1), (6, 4), (-1, 0)]
    rows = [
        {
            "prompt_id": p,
            "prompt": LONG if p else "a prompt",
            "step": step,
            "span": span,
            "sample": s,
            "png": png(100 * p + 20 * row + s, (size, size)),
        }
        for p in (0, 1)
        for row, (step, span) in enumerate(pairs)
        for s in range(10)
        if (step, span) != drop
    ]
    write_table(path, BRANCHES, rows)
    return path


def write_profile(path: Path, spans: tuple[int, ...] = (1, 4)) -> Path:
    """Spread step/10 + span (quality) and 0.5 (flat); yardstick 1.5 + prompt and none."""
    rows = []
    for step in range(8):
        for span in spans:
            entropy = {
                m: step_entropy(GRID, step, span, noise_level=0.7, measure=m) for m in MEASURES
            }
            for prompt in (0, 1):
                for quantity in ("reward:quality", "reward:flat", "image_distance"):
                    flat = quantity == "reward:flat"
                    failed = flat and (prompt, step) == (1, 2)
                    rows.append(
                        {
                            "step": step,
                            "span": span,
                            "sigma": GRID[step],
                            "sigma_stop": GRID[step + span],
                            "std": 1.0,
                            **entropy,
                            "prompt_id": prompt,
                            "quantity": quantity,
                            "spread": None if failed else 0.5 if flat else step / 10 + span,
                            "yardstick": None if flat and prompt else 1.5 + prompt,
                        }
                    )
    write_table(path, ENTROPY_PROFILE, rows)
    return path


@pytest.mark.parametrize("size", [8, 700])
def test_branches_figure_puts_spread_beside_the_images(size: int, tmp_path: Path) -> None:
    images = write_branches(tmp_path / "b", size=size)
    profile = write_profile(tmp_path / "p")
    figure = branches_figure(images, profile, PAIRS, 6, tmp_path / "x", 0.25)
    shown = [100 * p + 20 * row + s for p in (0, 1) for row in range(4) for s in range(8)]
    assert levels(figure) == shown
    assert len(figure.axes) == len(shown) + 2 * 2  # a panel for each prompt and reward
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


def test_branches_figure_says_where_nothing_was_scored(tmp_path: Path) -> None:
    images, profile = write_branches(tmp_path / "b"), write_profile(tmp_path / "p")
    figure = branches_figure(images, profile, PAIRS, 2, tmp_path / "x", rewards=["flat"])
    assert not by_gid(figure, "yardstick:flat:1")
    assert list(by_gid(figure, "alone:flat:1")[0].get_ydata()) == [1, 2]  # neither more nor less
    assert not len(by_gid(figure, "below:flat:1")[0].get_ydata())
    panel = by_gid(figure, "alone:flat:1")[0].axes
    assert [t.get_text() for t in panel.texts] == ["no score", "0.50", "0.50", "no score"]
    assert "quality" not in texts(figure)


def test_branches_figure_shows_as_many_prompts_as_asked(tmp_path: Path) -> None:
    images, profile = write_branches(tmp_path / "b"), write_profile(tmp_path / "p")
    figure = branches_figure(images, profile, [[6, 4]], 1, tmp_path / "x")
    assert levels(figure) == [40 + s for s in range(8)] + [60 + s for s in range(8)]


def test_branches_figure_refuses_missing_rows(tmp_path: Path) -> None:
    images, profile = write_branches(tmp_path / "b"), write_profile(tmp_path / "p")

    def check(match: str, *args: Any, **more: Any) -> None:
        refuses(match, branches_figure, *args, tmp_path / "x", **more)

    check("no image of step 3, span 1 for prompt 0", images, profile, [[3, 1]], 2)
    without = write_branches(tmp_path / "c", drop=(-1, 0))
    check("no image of the yardstick", without, profile, PAIRS, 2)
    single = write_profile(tmp_path / "q", spans=(1,))
    check("step 6, span 4 for prompt 0; add the span to profile.spans", images, single, PAIRS, 2)
    check("holds no spread of beauty", images, profile, PAIRS, 2, rewards=["beauty"])
    check("holds no spread of any reward", images, profile, PAIRS, 2, rewards=[])
    check(r"\[step, span\]", images, profile, [[6]], 2)
    check(r"\[step, span\]", images, profile, [], 2)
    check("no image to show", images, profile, PAIRS, 0)
    check("no such file", tmp_path / "no", profile, PAIRS, 2)
    check("expected 'branches'", profile, profile, PAIRS, 2)


# --- entropy and threshold ------------------------------------------------------------------------


def test_entropy_figure_draws_only_wanted_spans_in_their_own_look(tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "p", spans=(1, 2, 4))
    plan = tmp_path / "plan.json"
    made = make_plan(GRID, range(8), threshold=2.2, noise_level=0.7)
    plan.write_text(json.dumps(made.to_dict()))
    looks = []
    for spans in (None, (4,)):
        figure = entropy_figure(profile, {"a": plan}, tmp_path / "x", spans=spans)
        lines: dict[Any, Any] = {line.get_label(): line for line in figure.axes[0].lines}
        assert by_gid(figure, "threshold")
        assert ("1 step" in lines, "4 steps merged" in lines) == (spans is None, True)
        looks.append((lines["4 steps merged"].get_color(), lines["4 steps merged"].get_marker()))
    assert looks[0] == looks[1]
    refuses("holds no span 6", entropy_figure, profile, {}, tmp_path / "x", spans=[1, 6])


def measured(measure: str) -> tuple[list[Spread], Choice]:
    """Points whose spread grows with entropy, with one dent, and one without a value."""
    spreads = []
    for step in range(10):
        for span in (1, 2, 4):
            entropy = {
                m: step_entropy(GRID, step, span, noise_level=0.7, measure=m) for m in MEASURES
            }
            value = entropy["exp_per_dim"] * (0.7 if (step, span) == (3, 2) else 1.0)
            spreads.append(Spread(step, span, entropy, math.inf if step == 9 else value))
    return spreads, choose_threshold(spreads, measure, 2.0)


@pytest.mark.parametrize("measure", MEASURES)
def test_threshold_figure_shows_choice_and_plan(measure: str, tmp_path: Path) -> None:
    spreads, choice = measured(measure)
    plan = make_plan(GRID, range(8), threshold=choice.threshold, noise_level=0.7, measure=measure)
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
    right = figure.axes[1]
    assert [t.get_text() for t in right.texts] == [str(span) for span in plan.spans]
    assert not by_gid(figure, "capped")
    assert f"the spread of quality: τ = {choice.threshold:g}" in texts(figure)
    assert_readable(figure)


def test_threshold_figure_marks_steps_out_of_reach(tmp_path: Path) -> None:
    spreads, choice = measured("exp_per_dim")
    plan = make_plan(GRID, range(15), threshold=choice.threshold, noise_level=0.7)
    figure = threshold_figure(spreads, choice, plan, 2.0, "a, b " * 30, tmp_path / "x")
    (merged,), (capped,) = by_gid(figure, "merged"), by_gid(figure, "capped")
    assert sorted([*merged.get_xdata(), *capped.get_xdata()]) == list(range(15))
    assert len(capped.get_xdata()) == len(plan.warnings) > 0
    assert merged.get_marker() != capped.get_marker()
    assert_readable(figure)


def test_threshold_figure_refuses_a_plan_of_another_threshold(tmp_path: Path) -> None:
    spreads, choice = measured("exp_per_dim")
    plan = make_plan(GRID, range(8), threshold=2.6, noise_level=0.7)
    refuses("plan's threshold is 2.6", threshold_figure, spreads, choice, plan, 2.0, "q", tmp_path)
    refuses("no measured spread", threshold_figure, [], choice, plan, 2.0, "q", tmp_path)
    fitting = make_plan(GRID, range(8), threshold=choice.threshold, noise_level=0.7)
    bare = [Spread(0, 1, {"variance": 1.0}, 1.0)]
    refuses(
        "no entropy in exp_per_dim", threshold_figure, bare, choice, fitting, 2.0, "q", tmp_path
    )


# --- all of them ----------------------------------------------------------------------------------


def test_same_data_gives_the_same_files_and_leaves_matplotlib_alone(
    arms: dict[str, list[Path]], tmp_path: Path
) -> None:
    before = dict(matplotlib.rcParams)
    base = write_images(tmp_path / "base", 10)
    branches, profile = write_branches(tmp_path / "branches"), write_profile(tmp_path / "profile")
    spreads, choice = measured("exp_per_dim")
    plan = make_plan(GRID, range(8), threshold=choice.threshold, noise_level=0.7)
    for n in "12":
        arm_curves_figure(arms, ["quality"], tmp_path / f"arms{n}")
        curves_figure(arms["a"], ["quality"], tmp_path / f"runs{n}")
        images_figure(base, [("one", base)], 1, tmp_path / f"images{n}")
        branches_figure(branches, profile, PAIRS, 1, tmp_path / f"branches{n}")
        threshold_figure(spreads, choice, plan, 2.0, "quality", tmp_path / f"threshold{n}")
    for name in ("arms", "runs", "images", "branches", "threshold"):
        for ending in ("png", "svg"):
            first, second = (tmp_path / f"{name}{n}.{ending}" for n in "12")
            assert first.read_bytes() == second.read_bytes()
            assert first.stat().st_size > 2000
    assert dict(matplotlib.rcParams) == before
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_figures_need_neither_torch_nor_pyplot() -> None:
    names = "branches curves profile image_grid style threshold".split()
    code = (
        f"import sys, {', '.join(f'egrpo.figures.{name}' for name in names)}\n"
        "print([m for m in ('torch', 'mlflow', 'pandas', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
