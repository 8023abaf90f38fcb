"""What a study's page shows of given numbers, plans and figures, and how it looks in Chromium."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import write_run
from PIL import Image
from small_results import GRID, layout
from test_page import config, image_of, opened, write_all

from egrpo.config.study import FigureSpec
from egrpo.core.plan import make_plan
from egrpo.page.page import make_page, write_root
from egrpo.page.parts import LARGE, WIDE
from egrpo.planning.plan import plan_rows
from egrpo.report.provenance import write_about
from egrpo.store.files import write_json
from egrpo.store.tables import MERGE_PLAN, RESULTS, SCORES, read_table, write_table
from egrpo.study.layout import Layout

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

INTERVALS = {
    ("one", "quality"): (0.1, 0.3, 0.4, "better"),
    ("two", "quality"): (-0.35, -0.2, -0.1, "worse"),
    ("one", "other"): (-0.1, 0.05, 0.3, "open"),
    ("two", "other"): (0.2, 0.6, 0.7, "better"),
    ("one", "diversity"): (-0.04, -0.03, -0.01, "neutral"),
}
"""Low, difference, high, and what is said of it; none lies evenly around its middle."""
SAMPLES = {0: 5, 1: 4, 2: 3, 3: 2}
FIGURES = {
    "large": FigureSpec(kind="images", caption="Large photographs.", arms=["one", "two"]),
    "few": FigureSpec(kind="images", caption="Few photographs.", arms=["one", "two"]),
    "by_step": FigureSpec(kind="spread", caption="A chart.", arms=["one"]),
}
PHONE: dict[str, Any] = {"viewport": {"width": 375, "height": 740}, "is_mobile": True}


def write_plan(at: Layout, run: str, threshold: float, **changes: Any) -> None:
    made = make_plan(GRID, range(4), threshold=threshold, noise_level=0.7)
    made = dataclasses.replace(made, **changes)
    write_json(at.run(run) / "plan.json", made.to_dict())
    write_table(at.run(run) / "merge_plan.parquet", MERGE_PLAN, plan_rows(run, made))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Four runs; the third has the plan of the first, the fourth samples of its own."""
    first = write_all(tmp_path_factory.mktemp("look"))
    runs = dict(first.study.runs)
    heldout = Path(runs["one"].prompts.heldout)
    runs |= {name: config(name, heldout) for name in ("three", "four")}
    at = layout(first.root.parent, *runs.values())
    for name in ("three", "four"):
        shutil.copytree(at.run("one"), at.run(name))
        write_run(runs[name], at.run(name) / "config.yaml")
    write_plan(at, "three", 2.2)
    write_plan(at, "four", 2.2, samples=tuple(SAMPLES.values()))
    for table in map(at.table, ("comparison", "paper_runs")):
        rows = read_table(table, RESULTS).to_pylist()
        for row in rows:
            low, middle, high, _ = INTERVALS.get((row["run"], row["reward"]), (-1, 0, 2, ""))
            row.update(low=low, difference=middle, high=high, pairs=row["pairs"] - 1, invalid=1)
        write_table(table, RESULTS, rows, metadata={"config_hash": "edited"})
    for name, size in (("large", (2400, 120)), ("few", (60, 30))):
        noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(noise).save(at.figure(name))
    assert at.figure("large").stat().st_size > LARGE
    shutil.copyfile(at.figures / "curves.svg", at.figures / "by_step.svg")
    make_page("index", at, {}, {})
    make_page("paper", at, {}, FIGURES)
    return at


@pytest.fixture
def page(browser: Browser, shown: Layout) -> Iterator[Page]:
    yield from opened(browser, shown.page("index"))


def test_outcome_says_which_side_of_0_the_interval_lies_on(page: Page, shown: Layout) -> None:
    cards = page.locator(".card")
    assert [c.get_attribute("class") for c in cards.all()] == ["card better", "card worse"]
    colors = []
    for (run, reward), (*_, said) in INTERVALS.items():
        row = page.locator(f"tr[data-run='{run}'][data-reward='{reward}']")
        assert said in (row.get_attribute("class") or "").split()
        colors.append(row.locator(".bar").evaluate("e => getComputedStyle(e).color"))
    better, worse, unclear, again, neutral = colors
    assert (better, unclear) == (again, neutral)
    assert len({better, worse, unclear}) == 3

    scores = read_table(shown.run("one") / "scores.parquet", SCORES)
    prompts = len(set(scores["prompt_id"].to_pylist()))
    assert prompts > 1
    for card in cards.all_inner_texts():  # what the means are over
        assert f"Over {prompts} held-out prompts, 2 samples each." in card
    said = page.locator("#gallery").inner_text()
    assert "mean quality over the 3 monitored prompts, 2 samples each, at that iteration" in said


BAR = """bar => {
  const line = getComputedStyle(bar, "::before"), point = getComputedStyle(bar, "::after");
  const width = bar.clientWidth, left = parseFloat(line.left);
  const middle = parseFloat(point.left) + parseFloat(point.width) / 2;
  const zero = getComputedStyle(bar).backgroundPositionX;
  return {zero, width, ends: [left, middle, left + parseFloat(line.width)].map(x => x - width / 2)};
}"""
"""Ends and point of a drawn interval, in pixels right of the line at 0."""


@pytest.mark.parametrize("width", [1100, 375])
def test_bars_lie_where_their_numbers_are(browser: Browser, shown: Layout, width: int) -> None:
    for page in opened(browser, shown.page("index"), viewport={"width": width, "height": 800}):
        points: dict[str, list[tuple[float, float]]] = {}
        for (run, reward), (*numbers, _) in INTERVALS.items():
            if reward == "diversity":
                continue  # alone of its kind but for the other run's, which is not listed
            row = page.locator(f"tr[data-run='{run}'][data-reward='{reward}']")
            drawn = row.locator(".bar").evaluate(BAR)
            assert drawn["zero"] == "50%"
            assert all(abs(x) <= drawn["width"] / 2 for x in drawn["ends"])
            points.setdefault(reward, []).extend(zip(numbers, drawn["ends"], strict=True))
        for k, run in enumerate(("one", "two")):
            drawn = page.locator(".card .bar").nth(k).evaluate(BAR)
            numbers = INTERVALS[run, "quality"][:3]
            points.setdefault("cards", []).extend(zip(numbers, drawn["ends"], strict=True))
        assert {reward: len(found) for reward, found in points.items()} == {
            "quality": 6, "other": 6, "cards": 6,
        }  # fmt: skip
        for found in points.values():  # one scale for all rows of a reward, to a pixel
            most, there = max(found, key=lambda point: abs(point[0]))
            assert there / most > 40, "negative to the left, positive to the right"
            for number, x in found:
                assert x == pytest.approx(number * there / most, abs=1), (number, x)


def test_plans_name_their_runs_and_samples(page: Page) -> None:
    assert page.locator("#plan h3").all_inner_texts() == ["one, three", "four"]
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    heads = page.locator("#plan table").nth(1).locator("thead th").all_inner_texts()
    assert heads[-1] == "samples"
    rows = page.locator("tr[data-plan=four]").all()
    found = {int(r.locator("th").inner_text()): r.locator("td").last.inner_text() for r in rows}
    assert found == {step: str(count) for step, count in SAMPLES.items()}
    assert "samples" not in page.locator("#plan table").first.inner_text()


def test_large_photographs_are_made_smaller(browser: Browser, shown: Layout) -> None:
    for page in opened(browser, shown.page("paper")):
        image = page.locator("#figures img")
        assert image_of(image.nth(0)).size == (WIDE, 120 * WIDE // 2400)
        sources = [(i.get_attribute("src") or "").partition(";")[0] for i in image.all()]
        assert sources == ["data:image/webp", "data:image/png", "data:image/svg+xml"]


def test_dark_pages_turn_over_charts_and_no_photographs(browser: Browser, shown: Layout) -> None:
    def filters(name: str, where: str, scheme: Any) -> list[str]:
        look = "all => all.map(e => getComputedStyle(e).filter)"
        for page in opened(browser, shown.page(name), color_scheme=scheme):
            return list(page.locator(f"{where} .view").evaluate_all(look))
        return []

    turned = "invert(0.92) hue-rotate(180deg)"
    assert filters("paper", "#figures", "dark") == ["none", "none", turned]
    assert filters("paper", "#figures", "light") == ["none"] * 3
    assert filters("index", "main", "dark") == [turned] * 2


def test_a_study_of_the_paper_leads_with_its_own_figures_only(
    browser: Browser, shown: Layout, tmp_path: Path
) -> None:
    """The figures of the default runs are there, and may be of other runs than the paper's."""
    assert (shown.figures / "entropy.png").exists()
    for page in opened(browser, shown.page("paper")):
        assert page.locator("#entropy, #curves").count() == 0
        assert page.locator("nav").get_by_text("Entropy").count() == 0
    shutil.copytree(shown.root.parent, tmp_path / "results")
    at = layout(tmp_path / "results", *shown.study.runs.values())
    shutil.copyfile(at.figures / "entropy.png", at.figure("own"))
    spec = FigureSpec(kind="entropy", caption="The paper's own.", arms=["one"])
    make_page("paper", at, {}, {"own": spec})
    for page in opened(browser, at.page("paper")):
        assert page.locator("#entropy figcaption").inner_text() == "The paper's own."
        assert page.locator("#curves, #figures").count() == 0


def test_a_phone_shows_intervals_and_that_figures_go_on(browser: Browser, shown: Layout) -> None:
    for page in opened(browser, shown.page("index"), **PHONE):
        for row in page.locator("#comparison tr[data-run]").all():
            for part in (row.locator("td").nth(1), row.locator(".bar")):
                box = part.bounding_box()
                assert box
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= 375
        for figure in page.locator("figure.plot").all():
            view = figure.locator(".view")
            assert view.evaluate("e => e.scrollWidth > e.clientWidth")
            assert view.evaluate("e => getComputedStyle(e).backgroundImage").count("gradient") == 4
            assert "scrolls sideways" in figure.inner_text()
    for page in opened(browser, shown.page("index")):
        assert not page.locator(".hint").first.is_visible()
        fits = "all => all.every(e => e.scrollWidth <= e.clientWidth)"
        assert page.locator(".view").evaluate_all(fits)


def test_settings_of_all_runs_are_closed_and_fit_a_phone(
    browser: Browser, shown: Layout, tmp_path: Path
) -> None:
    write_about(shown, tmp_path / "about.html")
    phone = browser.new_page(**PHONE)
    phone.goto((tmp_path / "about.html").as_uri())
    assert phone.locator("details").count() == 4
    assert phone.locator("details[open]").count() == 0
    assert "learning_rate_scale" not in phone.locator("body").inner_text()
    phone.locator("summary", has_text="three").click()
    assert "learning_rate_scale" in phone.locator("body").inner_text()
    assert phone.evaluate("document.documentElement.scrollWidth") == 375
    runs = phone.locator("table").nth(1)
    assert runs.evaluate("e => e.scrollWidth > e.clientWidth")
    assert runs.evaluate("e => getComputedStyle(e).backgroundImage").count("gradient") == 4
    phone.close()


@pytest.mark.parametrize("script", [True, False])
def test_the_list_of_pages_is_reached_where_there_is_one(
    browser: Browser, shown: Layout, tmp_path: Path, script: bool
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(shown.root, folder / "small")
    (folder / "small/paper.html").unlink()
    write_root(folder)
    own = browser.new_context(java_script_enabled=script)
    page = own.new_page()
    page.goto((folder / "small/index.html").as_uri())
    assert "in its results folder" in page.locator("footer").inner_text()
    page.get_by_role("link", name="all pages").click()
    page.wait_for_url("**/results/index.html#list")
    page.wait_for_timeout(300)  # longer than a forward would take
    assert page.locator("h1").inner_text() == "Results"
    page.locator("li a").click()
    page.wait_for_url("**/small/index.html")
    own.close()
