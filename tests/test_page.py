"""A study's page, made from small results and looked at in Chromium."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import write_run
from page_screenshot import take
from PIL import Image
from small_results import GRID, layout, profile_rows, refused, write_metrics, write_results
from small_results import config as config_of

from egrpo.config.models import RunConfig
from egrpo.config.study import TableSpec
from egrpo.core.plan import make_plan
from egrpo.figures.curves import curves_figure
from egrpo.figures.profile import entropy_figure
from egrpo.images import Images
from egrpo.measure.monitors import save_grid
from egrpo.page.gallery import MOST_ARMS, MOST_LARGE, MOST_SMALL, make_gallery
from egrpo.page.page import make_page, pages, write_root
from egrpo.planning.plan import plan_rows
from egrpo.report.results import make_comparison
from egrpo.store.files import write_json
from egrpo.store.tables import ENTROPY_PROFILE, MERGE_PLAN, RESULTS, read_table, write_table
from egrpo.study.layout import Layout

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

HOSTILE = '<script>document.title="owned"</script> & "quotes" \'</style> {{ 7 * 7 }} ${1}'
PROMPTS = ["a cat", HOSTILE, "a very long prompt " * 12, "never monitored"]
SIZE = 24, 16  # width, height
SAMPLES = 2
ITERATIONS = {"one": (0, 10, 20), "two": (0, 15)}
REWARDS = {"one": (0.5, 0.625, 0.75), "two": (0.5, None)}
"""Mean of `quality` at those iterations."""
SPEC = TableSpec(
    caption="Two arms <b>& a caption</b>.",
    sections={"All": ["two", "one"]},
    rewards=["quality", "other"],
    evaluations=500,
)


def config(run: str, heldout: Path, **top: Any) -> RunConfig:
    monitors = {"monitor_prompts": 3, "monitor_samples": SAMPLES}
    settings: dict[str, Any] = {
        "arm": run,
        "model": {"path": "models/base", "width": SIZE[0], "height": SIZE[1]},
        "prompts": {"train": "assets/toy/prompts/train.txt", "heldout": str(heldout)},
        "method": {"name": "flow_grpo" if run == "two" else "egrpo"},
        "train": {"rewards": {"quality": 1.0}, "iterations": 20, **monitors},
        "evaluate": {"samples": 2},
    }
    return config_of(run, **settings | top)


def pixels(run: RunConfig, iteration: int) -> torch.Tensor:
    """Monitor images, uint8 [prompts * samples, 3, h, w]: noise; at iteration 0 the base's."""
    name = run.run if iteration else "base"
    count = run.train.monitor_prompts * run.train.monitor_samples
    shape = count, 3, run.model.height, run.model.width
    noise = np.random.default_rng([*name.encode(), iteration]).integers(0, 256, shape, np.uint8)
    return torch.from_numpy(noise)


def write_monitors(at: Layout, run: RunConfig, iterations: tuple[int, ...], rewards: Any) -> None:
    folder = at.run(run.run)
    for i in iterations:
        grid = folder / "monitor" / f"iteration-{i:06d}.png"
        save_grid(grid, Images.whole(pixels(run, i)), run.train.monitor_samples)
    metrics = {
        "monitor/reward/quality": dict(zip(iterations, rewards, strict=True)),
        "reward/quality": {i: 0.5 + i / 100 for i in range(1, iterations[-1] + 1)},
    }
    write_metrics(folder / "metrics.parquet", run.run, 9, metrics)


def write_all(folder: Path) -> Layout:
    heldout = folder / "heldout.txt"
    heldout.write_text("\n".join(PROMPTS))
    at = layout(folder / "results", *(config(name, heldout) for name in ITERATIONS))
    for k, (name, run) in enumerate(at.study.runs.items()):
        path = at.run(name)
        path.mkdir(parents=True)
        write_run(run, path / "config.yaml")
        write_results(path, name, gain=0.25 - 0.5 * k, level=30)
        spent = {"iterations": 20, "nfe_forward": 12000, "nfe_train": 34, "nfe_reference": 0}
        write_json(path / "train.json", {**spent, "seconds": 61.5, "peak_memory_mib": 900.0})
        write_monitors(at, run, ITERATIONS[name], REWARDS[name])
    write_results(at.base("one"), "base", gain=0.0, level=10)
    made = make_plan(GRID, range(4), threshold=2.2, noise_level=0.7)
    write_json(at.run("one") / "plan.json", made.to_dict())
    write_table(at.run("one") / "merge_plan.parquet", MERGE_PLAN, plan_rows("one", made))
    write_table(at.profile("one"), ENTROPY_PROFILE, profile_rows())
    for name in ("comparison", "paper_runs"):
        make_comparison(at, at.table(name))
    plans = {"one": at.run("one") / "plan.json"}
    entropy_figure(at.profile("one"), plans, at.figures / "entropy")
    metrics = [at.run(name) / "metrics.parquet" for name in at.study.runs]
    curves_figure(metrics, ["quality"], at.figures / "curves")
    write_table(at.table("main"), RESULTS, result_rows())
    return at


def result_rows() -> list[dict[str, Any]]:
    marks = {("one", "quality"): "best", ("two", "quality"): "second"}
    costs = {"iterations": 20.0, "nfe": 12034.0, "seconds": 61.5, "peak_memory_mib": 900.0}
    head = {"table": "main", "section": "All", "run": "", "seeds": 1}
    return [
        head
        | {"arm": arm, "method": "" if arm == "base" else "egrpo", "at": when, "reward": reward}
        | {"trained_on": arm != "base" and reward == "quality", "mark": marks.get((arm, reward))}
        | {"mean": mean + (reward == "other"), "mean_low": mean - 0.04, "mean_high": mean + 0.04}
        | {"invalid": 3 if (arm, reward) == ("two", "other") else 0}
        | (dict.fromkeys(costs) if arm == "base" else costs)
        for when in ("end", "evaluations")
        for arm, mean in {"base": 0.25, "one": 0.513, "two": 0.3}.items()
        for reward in ("quality", "other")
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Results of two runs, and their pages."""
    at = write_all(tmp_path_factory.mktemp("page"))
    make_page("index", at, {}, {})
    make_page("paper", at, {"main": SPEC}, {})
    return at


@pytest.fixture
def results(finished: Layout, tmp_path: Path) -> Layout:
    """A copy to spoil."""
    shutil.copytree(finished.root.parent, tmp_path / "results")
    return layout(tmp_path / "results", *finished.study.runs.values())


@pytest.fixture
def page(browser: Browser, finished: Layout) -> Iterator[Page]:
    """The first page, on a desktop; whatever it asks for or complains of fails the test."""
    yield from opened(browser, finished.page("index"))


def opened(browser: Browser, path: Path, **context: Any) -> Iterator[Page]:
    own = browser.new_context(**context)
    own.set_default_timeout(10_000)
    page, said = own.new_page(), []
    page.on("request", lambda request: said.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    yield page
    outside = [text for text in said if not text.startswith("data:")]
    own.close()
    assert outside == [path.as_uri()]


def decoded(uri: str) -> Image.Image:
    kind, _, content = uri.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == f"data:image/{str(image.format).lower()}"
    return image.convert("RGB")


def image_of(locator: Locator) -> Image.Image:
    return decoded(locator.get_attribute("src") or "")


def tile(run: RunConfig, iteration: int, prompt: int, sample: int) -> Any:
    """What was sampled: [h, w, 3]."""
    image = pixels(run, iteration)[prompt * run.train.monitor_samples + sample]
    return image.permute(1, 2, 0).numpy()


def shown_iteration(name: str, wanted: int) -> int:
    return max(i for i in ITERATIONS[name] if i <= wanted)


def check_images(page: Page, at: Layout, iteration: int, sample: int) -> None:
    """Every image is the one of its column, iteration, prompt and sample."""
    columns = {"base": ("one", 0)} | {n: (n, shown_iteration(n, iteration)) for n in ITERATIONS}
    for c, (name, (run, i)) in enumerate(columns.items()):
        for p in range(3):
            image = page.locator(f"img[data-column='{c}'][data-prompt='{p}']")
            assert (image.get_attribute("alt") or "").startswith(f"{name}: {PROMPTS[p][:6]}")
            assert np.array_equal(image_of(image), tile(at.study.runs[run], i, p, sample))


def test_page_names_a_run_that_learned_nothing(results: Layout) -> None:
    text = "in 2 of 2 iterations all groups had equal rewards, so nothing was learned"
    path = results.table("comparison")
    rows = read_table(path, RESULTS).to_pylist()
    assert "warning" not in results.page("index").read_text()
    for row in rows:
        row["warnings"] = text if row["run"] == "two" else None
    write_table(path, RESULTS, rows)
    make_page("index", results, {}, {})
    assert results.page("index").read_text().count(f"two: warning: {text}") == 1


def test_page_tells_the_story_in_order(page: Page) -> None:
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").inner_text().startswith("Which denoising steps should")
    assert page.locator("h2").all_inner_texts() == [
        "What came out", "The same prompts and noise", "Where the entropy is", "The plan",
        "Training", "Against the base model", "Settings",
    ]  # fmt: skip
    cards = page.locator(".card").all_inner_texts()
    assert [c.split()[0] for c in cards] == ["one", "two"]
    assert "lies above 0: better than the base model" in cards[0]
    assert "lies below 0: worse than the base model" in cards[1]
    assert all("12,034 network evaluations, 62 s of training" in card for card in cards)
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href") or "-").count() == 1
    for image in page.locator("img").all():
        assert image.get_attribute("alt")
        assert image.evaluate("i => i.complete && i.naturalWidth > 0")
    settings = page.locator("tr[data-settings=one]").inner_text().split()
    assert settings[:6] == ["one", "egrpo", "quality", "0", "20", "6e-05"]
    assert "12,034" in settings
    assert "61" in settings or "62" in settings


def test_slider_moves_images_and_rewards(page: Page, finished: Layout) -> None:
    slider = page.locator("#iteration")
    every = [0, 10, 15, 20]
    assert slider.get_attribute("max") == "3"
    said = {("one", 0): "0.500", ("one", 10): "0.625", ("one", 20): "0.750", ("two", 0): "0.500"}
    for position in (3, 2, 1, 0):
        page.wait_for_function(f"document.getElementById('iteration').value == {position}")
        assert page.locator("#shown").inner_text() == str(every[position])
        assert slider.get_attribute("aria-valuetext") == f"iteration {every[position]}"
        for sample in range(SAMPLES):
            page.locator(f"[name=sample][value='{sample}']").check()
            check_images(page, finished, every[position], sample)
        for k, name in enumerate(ITERATIONS, start=1):
            own = shown_iteration(name, every[position])
            stat = page.locator(f"[data-stat='{k}']")
            assert stat.locator("[data-at]").inner_text() == str(own)
            assert stat.locator("[data-reward]").inner_text() == said.get((name, own), "-")
        assert page.locator("[data-stat='0'] [data-reward]").inner_text() == "0.500"
        slider.focus()
        page.keyboard.press("ArrowLeft")


def test_without_script_the_last_iteration_is_shown(browser: Browser, finished: Layout) -> None:
    for page in opened(browser, finished.page("index"), java_script_enabled=False):
        check_images(page, finished, 20, 0)
        assert not page.locator("#iteration").is_visible()
        assert "Shown is iteration 20" in page.locator("noscript").inner_text()
        assert page.locator("[data-stat='1'] [data-reward]").inner_text() == "0.750"


@pytest.mark.parametrize("name", ["index", "paper"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_tables_not_the_page(
    browser: Browser, finished: Layout, name: str, scheme: Any
) -> None:
    phone = {"viewport": {"width": 375, "height": 740}, "color_scheme": scheme, "is_mobile": True}
    for page in opened(browser, finished.page(name), **phone):
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == 375
        assert page.evaluate("innerWidth") == 375  # the viewport was not widened either
        box = page.locator(".scroll", has=page.locator("#comparison"))
        assert box.evaluate("e => e.scrollWidth > e.clientWidth")
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", color)[:3])) < 150) == (scheme == "dark")


def test_prompts_are_text_and_small_images_enlarged_by_whole_pixels(
    page: Page, finished: Layout
) -> None:
    assert "owned" not in page.title()
    assert HOSTILE in page.locator(".prompt figcaption").all_inner_texts()
    assert page.locator("img[data-prompt='1']").first.get_attribute("alt") == f"base: {HOSTILE}"
    assert finished.page("index").read_text().count("<script") == 2
    frames = json.loads(page.locator("script[type='application/json']#frames").inner_text())
    assert frames["iterations"] == [0, 10, 15, 20]
    image = page.locator("img[data-column]").first
    assert image.evaluate("i => getComputedStyle(i).imageRendering") == "pixelated"
    assert image.evaluate("i => [i.width, i.height]") == [4 * SIZE[0], 4 * SIZE[1]]


def number_in(cell: Locator) -> float:
    return float(cell.locator("data").get_attribute("value") or "nan")


def test_tables_hold_the_numbers_of_their_files(browser: Browser, finished: Layout) -> None:
    for page in opened(browser, finished.page("paper")):
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        for row in read_table(finished.table("paper_runs"), RESULTS).to_pylist():
            line = page.locator(f"tr[data-run='{row['run']}'][data-reward='{row['reward']}']")
            found = [number_in(line.locator("td").nth(k)) for k in (0, 2, 3)]
            assert found == [row["difference"], row["base"], row["mean"]]
            assert ("*" in line.locator("th").inner_text()) == row["trained_on"]
        heading = page.locator("#comparison .group").first.inner_text()
        assert heading == "one (egrpo): 12,034 network evaluations, 62 s of training"
        rows = read_table(finished.run("one") / "merge_plan.parquet", MERGE_PLAN).to_pylist()
        lines = page.locator("tr[data-plan=one]").all()
        for row, line in zip(rows, lines, strict=True):
            found = [number_in(line.locator("td").nth(k)) for k in range(5)]
            names = ("span", "sigma", "sigma_stop", "single_step_entropy", "entropy")
            assert found == [row[name] for name in names]
        bars = page.locator(".plan .sde").all_inner_texts()
        assert bars == [str(row["span"]) for row in rows]


def test_result_tables_mark_what_is_marked(browser: Browser, finished: Layout) -> None:
    for page in opened(browser, finished.page("paper")):
        assert "Two arms <b>& a caption</b>." in page.locator("#main").inner_text()
        lines = page.locator("tr[data-table=main]")
        arms = [line.get_attribute("data-arm") for line in lines.all()]
        assert arms == ["base", "two", "one"] * 2, "in the order of the study, at both times"
        rows = {(r["arm"], r["reward"]): r for r in result_rows()}
        for line in lines.all():
            for k, reward in enumerate(SPEC.rewards, start=1):
                row = rows[line.get_attribute("data-arm"), reward]
                cell = line.locator("td").nth(k)
                assert number_in(cell) == row["mean"]
                assert cell.get_attribute("data-mark") == (row["mark"] or "")
                look = cell.locator("span").evaluate(
                    "e => [getComputedStyle(e).fontWeight, getComputedStyle(e).textDecorationLine]"
                )
                assert (int(look[0]) >= 600) == (row["mark"] == "best")
                assert (look[1] == "underline") == (row["mark"] == "second")
        first = lines.nth(2).inner_text().split("\t")
        assert first[2:4] == ["0.513* [0.473, 0.553]", "1.513 [0.473, 0.553]"]
        assert first[4:] == ["20", "12,034", "62", "900"]
        assert (
            "without both scores, left out: two, other: 3" in page.locator("#tables").inner_text()
        )
        assert "At equal network evaluations (500)" in page.locator("h4").all_inner_texts()


def test_picture_for_the_documentation_can_be_taken(
    browser: Browser, finished: Layout, tmp_path: Path
) -> None:
    take(browser, finished.page("index"), tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        assert image.width == 1600
        assert len(image.convert("RGB").getcolors(256) or []) > 50


def gallery_of(
    folder: Path, *runs: RunConfig, iterations: tuple[int, ...] = (0, 10)
) -> dict[str, Any]:
    at = layout(folder, *runs)
    for run in runs:
        if run.seed == 0:  # of others nothing is read
            write_monitors(at, run, iterations, [0.5] * len(iterations))
    made = make_gallery(at, list(dict.fromkeys(run.arm for run in runs)))
    assert made
    return made


def heldout(folder: Path, count: int) -> Path:
    path = folder / "heldout.txt"
    path.write_text("\n".join(f"prompt {i}" for i in range(count)))
    return path


def train(**settings: Any) -> dict[str, Any]:
    return {"rewards": {"quality": 1.0}, "monitor_prompts": 2, "monitor_samples": 2} | settings


@pytest.mark.parametrize(("size", "limit"), [(8, MOST_SMALL), (65, MOST_LARGE)])
def test_many_runs_are_cut_to_what_a_page_bears(tmp_path: Path, size: int, limit: int) -> None:
    path = heldout(tmp_path, 12)
    monitored = train(monitor_prompts=12, monitor_samples=4)
    top = {"model": {"path": "m", "width": size, "height": size}, "train": monitored}
    names = [(f"r{k}", s) for k in range(10) for s in (0, 1)]
    runs = [config(f"{arm}-s{s}", path, arm=arm, seed=s, **top) for arm, s in names]
    made = gallery_of(tmp_path, *runs, iterations=tuple(range(0, 100, 10)))
    assert [c["name"] for c in made["columns"][1:]] == [f"r{k}-s0" for k in range(MOST_ARMS)]
    assert len(made["prompts"]) == 8
    assert (made["iterations"][0], made["iterations"][-1]) == (0, 90)
    assert len(made["iterations"]) >= 7
    assert len(made["images"]) <= limit
    said = " ".join(made["left_out"])
    prompts, samples = "8 of 12 monitored prompts", f"{made['samples']} of 4 monitored samples"
    for words in ("first 8 of 10 arms", "several seeds the first", prompts, samples):
        assert words in said
    assert made["small"] == (size == 8)


@pytest.mark.parametrize(("size", "shown"), [((640, 320), (256, 128)), ((80, 400), (51, 256))])
def test_large_images_become_thumbnails(
    tmp_path: Path, size: tuple[int, int], shown: tuple[int, int]
) -> None:
    model = {"path": "m", "width": size[0], "height": size[1]}
    made = gallery_of(tmp_path, config("big", heldout(tmp_path, 2), model=model, train=train()))
    assert not made["small"]
    assert (made["width"], made["height"]) == shown
    for uri in made["images"]:
        assert uri.startswith("data:image/webp;")
        assert decoded(uri).size == shown


def test_the_gallery_names_prompts_by_their_column(tmp_path: Path) -> None:
    path = tmp_path / "heldout.csv"
    path.write_text("prompt,caption\nx,a cat\ny,a dog\n")
    files = {"train": "assets/toy/prompts/train.txt", "heldout": str(path)}
    runs = [config("one", path, train=train(), prompts={**files, "column": "caption"})]
    assert gallery_of(tmp_path, *runs)["prompts"] == ["a cat", "a dog"]
    runs.append(config("two", path, train=train(), prompts=files))
    assert "differ from these runs': two." in " ".join(gallery_of(tmp_path, *runs)["left_out"])


def test_only_runs_with_the_same_monitors_stand_together(tmp_path: Path) -> None:
    path = heldout(tmp_path, 2)
    runs = [config(name, path, train=train()) for name in ("a", "b")]
    other = {"path": "m", "width": 32, "height": 16}
    runs += [config("wide", path, train=train(), model=other), config("blind", path, train=train())]
    at = layout(tmp_path, *runs)
    for run in runs[:3]:
        write_monitors(at, run, (0, 10), (0.5, 0.6))
    (at.run("blind") / "monitor").mkdir(parents=True)
    made = make_gallery(at, ["wide", "a", "blind", "b"])
    assert made
    assert [c["name"] for c in made["columns"]] == ["base", "a", "b"]
    said = " ".join(made["left_out"])
    assert "differ from these runs': wide." in said
    assert "Not monitored (train.monitor_every): blind." in said
    assert len(made["images"]) == 2 * 2 * 3, "equal images are kept once: the first iterations are"
    assert make_gallery(at, ["blind"]) is None


def test_a_study_without_monitors_has_a_page(results: Layout) -> None:
    for grid in results.root.glob("runs/*/monitor/*"):
        grid.unlink()
    make_page("index", results, {}, {})
    text = results.page("index").read_text()
    assert "No run was monitored" in text
    assert "<script" not in text


def other_size(grid: Path) -> None:
    Image.new("RGB", (10, 10)).save(grid)


def truncate(grid: Path) -> None:
    grid.write_bytes(grid.read_bytes()[:-300])


def without_two(table: Path) -> None:
    write_table(table, RESULTS, [row for row in result_rows() if row["arm"] != "two"])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("tables/paper_runs.parquet", Path.unlink, r"paper_runs\.parquet: no such file"),
        ("tables/main.parquet", b"x", r"main\.parquet: damaged Parquet"),
        ("tables/main.parquet", without_two, r"main\.parquet: section 'All' has no quality of two"),
        ("runs/one/monitor", shutil.rmtree, "one/monitor: no such folder.*makes it"),
        ("runs/one/monitor/iteration-000020.png", b"PNG", r"000020\.png: damaged image"),
        ("runs/one/monitor/iteration-000010.png", truncate, r"010\.png: damaged image.*delete it"),
        ("runs/two/monitor/iteration-000015.png", other_size, r"015\.png: is 10 x 10.*72 x 32"),
        ("runs/one/plan.json", b"{}", r"plan\.json: not a plan"),
        ("runs/one/merge_plan.parquet", Path.unlink, r"merge_plan\.parquet: no such file"),
        ("runs/two/train.json", b"{}", r"train\.json: has no 'iterations'"),
        ("runs/two/metrics.parquet", b"", r"metrics\.parquet: damaged"),
    ],
)
def test_missing_and_damaged_results_are_one_line(
    results: Layout, file: str, change: bytes | Callable[[Path], Any], message: str
) -> None:
    before, path = results.page("paper").read_bytes(), results.root / file
    path.write_bytes(change) if isinstance(change, bytes) else change(path)
    with refused(message):
        make_page("paper", results, {"main": SPEC}, {})
    assert results.page("paper").read_bytes() == before


def test_a_page_made_again_is_the_same(results: Layout, finished: Layout) -> None:
    results.page("index").unlink()
    stamp = finished.table("comparison").stat().st_mtime
    os.utime(results.table("comparison"), (stamp, stamp))
    make_page("index", results, {}, {})
    assert results.page("index").read_bytes() == finished.page("index").read_bytes()
    for file in results.figures.glob("entropy.*"):
        file.unlink()
    with refused(r"figures/entropy\.png: no such figure.*makes it"):
        make_page("index", results, {}, {})


def test_one_page_is_where_the_results_folder_leads(
    browser: Browser, results: Layout, tmp_path: Path
) -> None:
    results.page("paper").unlink()
    folder = tmp_path / "results"
    results.root.rename(folder / "a study & more")
    write_root(folder)
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    page.wait_for_url("**/index.html", wait_until="load")
    page.wait_for_function("document.querySelector('h1').textContent.startsWith('Which')")
    assert "a%20study%20%26%20more/index.html" in page.url
    page.close()


def test_several_pages_are_listed(browser: Browser, results: Layout, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results.root, folder / "second")
    (folder / "second/paper.html").unlink()
    (folder / "strange").mkdir()
    (folder / "strange/index.html").write_text("<title>not ours</title>")
    write_root(folder)
    for page in opened(browser, folder / "index.html"):
        links = page.locator("li a")
        assert links.all_inner_texts() == [
            "second, the default runs: 2 runs",
            "small, the default runs: 2 runs",
            "small, the tables and figures under `paper`: 2 runs",
        ]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", page.locator("li small").first.inner_text())
        for link in links.all():
            assert (folder / str(link.get_attribute("href"))).is_file()


def test_two_studies_that_finish_at_once_are_both_listed(
    results: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other page appears after ours looked, and before it wrote."""
    folder = tmp_path / "results"

    def late(found: Path) -> Iterator[dict[str, str]]:
        yield from list(pages(found))
        if not (folder / "second").exists():
            shutil.copytree(results.root, folder / "second")

    monkeypatch.setattr("egrpo.page.page.pages", late)
    write_root(folder)
    assert "second/index.html" in (folder / "index.html").read_text()
