"""What a study's page says came out: side effects, seeds of an arm, methods against each other."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from small_results import PROMPTS, config, layout, write_metrics, write_results
from test_page import ITERATIONS, opened, tile, write_all

from egrpo.config.rewards import REWARD_MODELS
from egrpo.core.intervals import crossed_interval, difference_interval
from egrpo.page.outcome import outcome
from egrpo.page.page import make_page
from egrpo.report.results import compare_arms, compare_seeds, make_comparison
from egrpo.report.text import read_rows
from egrpo.store.files import write_json
from egrpo.store.tables import IMAGES, RESULTS, SCORES, read_table, write_table
from egrpo.study.layout import Layout

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SEEDS = {"a-s0": ("a", 0.1), "a-s1": ("a", 0.2), "b-s0": ("b", 0.05)}
"""Arm and gain of each run."""
SPENT = {"nfe_forward": 12000, "nfe_train": 34, "nfe_reference": 0, "seconds": 9000.0}
OTHER = {"quality": {"kind": "verifier"}, "other": {"kind": "jpeg_compressibility"}}


def noisy(run: str) -> Any:
    """Scores that differ from prompt to prompt by what the run's name seeds."""

    def edit(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        by = np.random.default_rng([*run.encode()]).normal(0, 0.02, len(PROMPTS))
        return [row | {"value": row["value"] + by[row["prompt_id"]]} for row in rows]

    return edit


@pytest.fixture
def seeds(tmp_path: Path) -> Layout:
    """An arm of two seeds and one of one; ``other`` is compressibility, which nobody asked for."""
    runs = [
        config(name, arm=arm, seed=int(name[-1]), evaluate={"samples": 2}, rewards=OTHER)
        for name, (arm, _) in SEEDS.items()
    ]
    at = layout(tmp_path, *runs)
    write_results(at.base("a-s0"), "base", gain=0.0, level=10)
    for name, (_, gain) in SEEDS.items():
        write_results(at.run(name), name, gain=gain, level=20, edit=noisy(name))
        spent = {**SPENT, "iterations": 20, "peak_memory_mib": 900.0}
        write_json(at.run(name) / "train.json", spent)
        write_metrics(at.run(name) / "metrics.parquet", name, 9, {"reward/quality": {1: 0.5}})
    make_comparison(at, at.comparison)
    return at


def cells(at: Layout, run: str, reward: str) -> np.ndarray:
    """Mean score on each prompt, [prompts]."""
    rows = read_table(at.run(run) / "scores.parquet", SCORES).to_pylist()
    by = {p: [r["value"] for r in rows if (r["prompt_id"], r["reward"]) == (p, reward)]
          for p in range(len(PROMPTS))}  # fmt: skip
    return np.array([np.mean(by[p]) for p in range(len(PROMPTS))])


def test_an_arm_is_a_row_over_its_seeds_and_arms_are_compared_by_prompt(seeds: Layout) -> None:
    row = next(r for r in compare_seeds(["a-s0", "a-s1"], seeds) if r["reward"] == "quality")
    base = np.arange(len(PROMPTS)) / 10
    arm = np.stack([cells(seeds, run, "quality") for run in ("a-s0", "a-s1")])
    wanted = crossed_interval(arm - base)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx(
        (wanted.mean, wanted.low, wanted.high), abs=1e-12
    )
    assert (row["seeds"], row["pairs"]) == (2, 2 * 2 * len(PROMPTS))

    (found,) = compare_arms({"a": ["a-s0", "a-s1"], "b": ["b-s0"]}, seeds)
    pair = difference_interval(arm, cells(seeds, "b-s0", "quality")[None])
    assert (found["first"], found["second"], found["reward"]) == ("a", "b", "quality")
    assert (found["difference"], found["low"], found["high"]) == pytest.approx(
        (pair.mean, pair.low, pair.high), abs=1e-12
    )
    three = compare_arms({run: [run] for run in SEEDS}, seeds)
    level = 1 - 0.05 / 3  # three pairs share the 5%
    last = difference_interval(arm[1:], cells(seeds, "b-s0", "quality")[None], level=level)
    assert len(three) == 3
    assert (three[-1]["low"], three[-1]["high"]) == pytest.approx((last.low, last.high), abs=1e-12)


def test_arms_of_other_rewards_are_not_compared(seeds: Layout) -> None:
    runs = dict(seeds.study.runs)
    both = {"quality": 1.0, "other": 1.0}
    train = runs["b-s0"].train.model_copy(update={"rewards": both})
    runs["b-s0"] = runs["b-s0"].model_copy(update={"train": train})
    at = layout(seeds.root.parent, *runs.values())
    assert compare_arms({"a": ["a-s0"], "b": ["b-s0"]}, at) == []


def test_seeds_of_an_arm_stand_together(seeds: Layout) -> None:
    shown = outcome(read_rows(seeds.comparison), seeds)
    assert [(card["who"], card["seeds"]) for card in shown["cards"]] == [("a", 2), ("b", 1)]
    arm, alone = (card["trained"][0] for card in shown["cards"])
    row = next(r for r in compare_seeds(["a-s0", "a-s1"], seeds) if r["reward"] == "quality")
    assert (arm["difference"], arm["low"]) == (row["difference"], row["low"])
    assert "95% interval over seeds and prompts" in arm["says"]
    assert "95% interval over prompts" in alone["says"]
    assert arm["over"] == alone["over"] == "6 held-out prompts, 2 samples each"
    assert [run["run"] for run in arm["runs"]] == ["a-s0", "a-s1"]
    assert alone["runs"] == []
    assert shown["cards"][0]["spent"] == "12,034 network evaluations, 2.5 h of training"
    texts = [r["text"]["difference"] for r in (arm, alone, *arm["runs"])]
    assert len({len(text.partition(".")[2]) for text in texts}) == 1
    assert [part[0]["run"] for _, part in shown["comparison"]] == list(SEEDS)


def test_what_nobody_asked_for_is_neutral_and_no_sign(seeds: Layout) -> None:
    """``other`` falls by the gain of ``b``: smaller files were nobody's wish."""
    card = outcome(read_rows(seeds.comparison), seeds)["cards"][1]
    assert [row["outcome"] for row in card["trained"]] == ["better"]
    other = next(row for row in card["others"]["fell"] if row["reward"] == "other")
    assert other["outcome"] == "neutral"
    assert "other" not in card["signs"]
    assert card["distance"]["outcome"] == "neutral"
    assert card["distance"]["reward"] == "distance_to_base"


@pytest.mark.parametrize(
    ("low", "high", "way", "signs"),
    [
        (-0.3, -0.1, "fell", "Early sign of reward hacking: other fell."),
        (
            -0.1,
            0.1,
            "not shown",
            "No sign of reward hacking is shown. Not shown to have fallen: o",
        ),
        (0.1, 0.3, "rose", "No sign of reward hacking is shown. Not shown to have fallen: other."),
        (None, None, "no interval", "Nothing was measured that could show reward hacking."),
    ],
)
def test_signs_of_reward_hacking_are_what_intervals_show(
    seeds: Layout, low: float | None, high: float | None, way: str, signs: str
) -> None:
    kinds = {**OTHER, "other": {"kind": "verifier_exact"}}
    run = config("b-s0", arm="b", rewards=kinds, evaluate={"samples": 2})
    at = layout(seeds.root.parent, run)
    rows = [r for r in read_rows(seeds.comparison) if r["run"] == "b-s0"]
    rows = [r | {"low": low, "high": high} for r in rows if r["reward"] in ("quality", "other")]
    (card,) = outcome(rows, at)["cards"]
    assert list(card["others"]) == [way]
    assert card["signs"].startswith(signs)
    assert card["distance"] is None


def test_each_kind_of_reward_says_in_a_sentence_what_it_measures(seeds: Layout) -> None:
    for kind, model in REWARD_MODELS.items():
        said = model.measures()
        assert said[-1] == ".", kind
        assert not set(said) & set("`*"), kind
    first, second = (m for m in outcome(read_rows(seeds.comparison), seeds)["measures"][:2])
    assert (first["name"], first["trained"]) == ("quality", "Trained on")
    assert (second["kind"], second["trained"]) == ("jpeg_compressibility", "Not trained on")


def test_an_image_has_its_score_where_the_evaluation_sampled_the_same(
    browser: Browser, tmp_path: Path
) -> None:
    """Of the second prompt's first sample the evaluation has other pixels: no score is shown."""
    at = write_all(tmp_path)
    run, last = at.study.runs["one"], ITERATIONS["one"][-1]
    images, scores = [], []
    for p, text in enumerate(Path(run.prompts.heldout).read_text().splitlines()[:2]):
        pixels = io.BytesIO()
        Image.fromarray(tile(run, last, p, 0) // (1 + p)).save(pixels, "PNG")
        key = {"run": "one", "prompt_id": p, "prompt": text, "sample": 0}
        images.append(key | {"png": pixels.getvalue()})
        scores.append(key | {"reward": "quality", "value": 0.123 + p / 2})
    write_table(at.run("one") / "images.parquet", IMAGES, images)
    write_table(at.run("one") / "scores.parquet", SCORES, scores)
    one = layout(at.root.parent, run)
    rows = [r for r in read_rows(at.comparison) if r["run"] == "one"]
    write_table(at.comparison, RESULTS, rows)
    make_page("index", one, {}, {})
    for page in opened(browser, at.page("index")):
        shown = [page.locator(f"img[data-column='1'][data-prompt='{p}'] ~ .score") for p in (0, 1)]
        assert [score.inner_text() for score in shown] == ["0.123", ""]
        page.locator("[name=sample][value='1']").check()
        assert shown[0].inner_text() == ""
        page.locator("[name=sample][value='0']").check()
        page.locator("#iteration").focus()
        page.keyboard.press("ArrowLeft")
        assert shown[0].inner_text() == ""


def test_cards_of_several_seeds_and_methods_are_on_the_page(
    browser: Browser, tmp_path: Path
) -> None:
    at = write_all(tmp_path)
    make_page("index", at, {}, {})
    for page in opened(browser, at.page("index")):
        row = page.locator("#against tbody tr")
        assert row.inner_text().split("\t")[:2] == ["quality", "one \N{MINUS SIGN} two"]
        assert row.locator("data").get_attribute("value") == "0.5"
        assert "one is higher" in row.inner_text()
    runs = [run.model_copy(update={"arm": "both"}) for run in at.study.runs.values()]
    together = layout(at.root.parent, *runs)
    make_comparison(together, together.comparison)
    make_page("index", together, {}, {})
    for page in opened(browser, at.page("index")):
        assert page.locator(".card").count() == 1
        assert "2 training seeds" in page.locator(".card").inner_text()
        assert page.locator(".card .seeds li").count() == 2
        assert page.locator("#against").count() == 0
