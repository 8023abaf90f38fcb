"""What people see in MLflow: `egrpo ui` in a browser, on a study that was really delivered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from conftest import ROOT
from mlflow_pages import Pages, interface
from PIL import Image
from tracked import line, picture, prompts_of, results_of, run_config, study_of, write_metrics

from egrpo.config.models import RunConfig
from egrpo.methods.egrpo import Egrpo
from egrpo.methods.flow_grpo import FlowGrpo
from egrpo.store.files import read_json
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study
from egrpo.tracking import client as tracking
from egrpo.tracking.client import open_client
from egrpo.tracking.curves import deliver
from egrpo.tracking.prepare import prepare
from egrpo.tracking.publish import publish
from egrpo.tracking.views import TRAINING, address, side_by_side

if TYPE_CHECKING:
    from playwright.sync_api import Browser

STEPS = (0, 2, 4)  # iterations that are monitored
COST = {"egrpo-s0": 400, "egrpo-s1": 400, "flow_grpo-s0": 150}  # evaluations an iteration
MANY = 60  # runs of the large study, and as many evaluations: more than MLflow loads at once


def shown_reward(run: str, step: int) -> float:
    """Monitored reward that the results hold: every value differs."""
    return 0.5 + step / 16 + list(COST).index(run) / 128


def runs_of(folder: Path) -> list[RunConfig]:
    prompts = prompts_of(folder)
    return [
        run_config("egrpo-s0", arm="egrpo", seed=0, prompts=prompts),
        run_config("egrpo-s1", arm="egrpo", seed=1, prompts=prompts, method=Egrpo(threshold=1.8)),
        run_config("flow_grpo-s0", arm="flow_grpo", prompts=prompts, method=FlowGrpo()),
    ]


def small_study(folder: Path) -> Study:
    """Three runs with curves of their own, and monitor grids that grow redder."""
    study = results_of(folder, *runs_of(folder))
    for run in study.runs:
        own = Layout(study).run(run)
        lines = [line(step) | {"nfe": COST[run] * step} for step in range(STEPS[-1] + 1)]
        for step in STEPS:
            lines[step]["metrics"]["monitor/reward/verifier"] = shown_reward(run, step)
        write_metrics(own, lines)
        for step in STEPS:
            picture(own / "monitor" / f"iteration-{step:06d}.png", 50 * step)
    return study


def large_study(folder: Path) -> None:
    """Many runs and evaluations beside the small study, by the functions that jobs use."""
    study = replace(study_of(folder), name="large")
    prepare(study, folder / "large.json")
    ids = read_json(folder / "large.json")
    client, experiment = open_client(ids["uri"]), ids["experiment_id"]
    for i in range(MANY):
        run = run_config(f"run-{i:03d}", arm=f"arm-{i // 3}", seed=i % 3)
        run_id = tracking.find_or_create_run(client, experiment, run, f"k{i}", ids["parent_run_id"])
        if i % 20 == 0:
            monitor = {"monitor/reward/verifier": i / 64}
            deliver(client, run_id, [line(j, **monitor) for j in (0, 1)])
        tags = tracking.run_tags(run, run_id)
        tracking.find_or_create(client, experiment, "evaluation", f"e{i}", f"{run.run}/e", tags)


@pytest.fixture(scope="module")
def study(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Both studies delivered to one store; not without a browser."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    study = small_study(folder)
    at = Layout(study)
    prepare(study, at.store)
    for _ in range(2):  # the second time adds nothing that would be seen twice
        publish(at, at.store, at.comparison, folder / "published.json")
    large_study(folder)
    if before is not None:
        os.environ["MLFLOW_TRACKING_URI"] = before
    return study


@pytest.fixture(scope="module")
def addresses(study: Study) -> Iterator[list[str]]:
    """`egrpo ui` on that store: what it prints."""
    settings = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config = Path(study.results).parent / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"study": "small", "results": study.results}))
    with interface(config) as printed:
        yield printed


@pytest.fixture
def pages(browser: Browser) -> Iterator[Pages]:
    window = Pages(browser)
    yield window
    window.close()


def server(addresses: list[str]) -> str:
    return addresses[1].partition("#")[0]


# ---------------------------------------------------------------- training runs


def test_the_first_address_shows_the_curves_of_the_default_runs(
    addresses: list[str], pages: Pages
) -> None:
    pages.open(addresses[0])
    assert pages.runs(["egrpo-s0", "flow_grpo-s0"]) == ["egrpo-s0", "flow_grpo-s0"]
    curves = dict(pages.chart("monitor/reward/verifier", "nfe"))
    assert set(curves) == {"egrpo-s0", "flow_grpo-s0"}


def test_the_second_address_shows_the_curves_of_all_training_runs(
    addresses: list[str], pages: Pages
) -> None:
    pages.open(addresses[1])
    assert pages.runs(list(COST)) == list(COST)
    expected = {run: {step: shown_reward(run, step) for step in STEPS} for run in COST}
    assert dict(pages.chart("monitor/reward/verifier", "Step")) == expected
    assert dict(pages.chart("verifier over iterations", "Step")) == expected  # by its title
    assert dict(pages.chart("monitor/reward/verifier", "nfe")) == {
        run: {cost * step: expected[run][step] for step in STEPS} for run, cost in COST.items()
    }


def test_grids_at_successive_iterations(addresses: list[str], pages: Pages) -> None:
    pages.open(addresses[1])
    for step in STEPS:
        shown = pages.images_at(step)
        assert len(shown) == len(COST)
        for color in shown:
            assert color == pytest.approx([50 * step, 0, 0], abs=3)  # MLflow compresses them


def test_means_over_seeds(addresses: list[str], pages: Pages) -> None:
    pages.open(addresses[2])
    for group in ("Group: egrpo", "Group: flow_grpo"):
        pages.page.get_by_text(group, exact=True).wait_for()
    curves = [points for _, points in pages.chart("monitor/reward/verifier", "Step")]
    first, second, other = ({step: shown_reward(run, step) for step in STEPS} for run in COST)
    assert {step: first[step] / 2 + second[step] / 2 for step in STEPS} in curves
    assert other in curves


def test_filters_by_method_reward_threshold_and_seed(addresses: list[str], pages: Pages) -> None:
    """Those that the docs give, and some more."""
    pages.open(server(addresses) + address("1", TRAINING))
    assert pages.runs(list(COST)) == list(COST)
    assert pages.rows()[0]["metrics.`monitor/reward/verifier`"] == str(shown_reward("egrpo-s0", 4))
    first, second, other = COST
    evaluations = [f"{first}/evaluation", f"{second}/evaluation"]
    expected = {
        "tags.kind = 'train' and tags.method = 'egrpo'": [first, second],
        "tags.kind = 'train' and tags.reward = 'verifier' and tags.seed = '0'": [first, other],
        "tags.kind = 'train' and tags.threshold = '2.2'": [first],
        "tags.kind = 'evaluation' and tags.arm = 'egrpo'": evaluations,
        "tags.reward LIKE '%clip%'": [],
        "tags.warnings LIKE '%equal_rewards%'": [],
        "params.`method.threshold` = '2.2'": [first],
        "metrics.`verifier/difference` > 0.1": evaluations,
    }
    docs = (ROOT / "docs/mlflow.md").read_text().partition("## Find runs")[2]
    assert docs.split("```")[1].split("\n")[1:-1] == list(expected)
    more = {"metrics.`monitor/reward/verifier` > 0.755 and params.arm = 'egrpo'": [second]}
    for text, names in (expected | more).items():
        pages.filter(text)
        assert pages.runs(names) == names, text


def test_the_tree_of_study_runs_and_evaluations(addresses: list[str], pages: Pages) -> None:
    pages.open(addresses[-1])
    pages.matching(8)
    assert pages.runs(["small"]) == ["small"]
    below = ["base/evaluation", "flow_grpo-s0", "egrpo-s1", "egrpo-s0"]  # the latest first
    pages.expand("small")
    assert pages.runs(["small", *below]) == ["small", *below]
    pages.expand("egrpo-s0")
    everything = ["small", *below, "egrpo-s0/evaluation"]
    assert pages.runs(everything) == everything


def test_training_runs_are_seen_among_more_than_a_hundred(
    addresses: list[str], pages: Pages
) -> None:
    pages.open(server(addresses) + address("2", TRAINING, "CHART"))
    pages.matching(MANY)
    pages.page.get_by_role("link", name="run-000", exact=True).wait_for()
    curves = dict(pages.chart("monitor/reward/verifier", "Step"))
    assert curves["run-000"] == {0: 0.0, 1: 0.0}
    pages.filter("tags.kind = 'train' and tags.seed = '2'")
    pages.matching(MANY // 3)
    pages.page.get_by_role("link", name="run-002", exact=True).wait_for()


def test_two_studies_side_by_side(addresses: list[str], pages: Pages) -> None:
    pages.open(server(addresses) + side_by_side(["1", "2"]))
    pages.matching(len(COST) + MANY)
    curves = [points for _, points in pages.chart("verifier over iterations", "Step")]
    first, second = ({step: shown_reward(run, step) for step in STEPS} for run in list(COST)[:2])
    assert {step: first[step] / 2 + second[step] / 2 for step in STEPS} in curves
    assert {0: 0.0, 1: 0.0} in curves  # of the other study


# ---------------------------------------------------------------- evaluations


def test_evaluations_by_gain(addresses: list[str], pages: Pages) -> None:
    pages.open(addresses[3])
    best = [f"{run}/evaluation" for run in (*COST, "base")]
    assert pages.runs(best) == best
    rows = pages.rows()
    gains = [row["metrics.`verifier/difference`"] for row in rows]
    assert gains == ["0.25", "0.125", str(0.25 / 3), "-"]
    assert [row["metrics.`verifier/mean`"] for row in rows] == ["0.75", "0.75", "0.75", "0.5"]
    assert [row["tags.`method`"] for row in rows] == ["egrpo", "egrpo", "flow_grpo", "base"]


def test_images_prompt_by_prompt(addresses: list[str], pages: Pages) -> None:
    pages.open(addresses[4])
    pages.page.get_by_text("a red square").wait_for()
    images = pages.page.locator("img[src*='table_images']")
    images.nth(1).wait_for()
    # the base model's samples are black here, the others red; the lower half of a square is white
    assert pages.mean_color(images.first)[0] > pages.mean_color(images.first)[1] > 0


def run_page(addresses: list[str], study: Study, name: str) -> str:
    published = read_json(Path(study.results).parent / "published.json")
    return f"{server(addresses)}#/experiments/1/runs/{published[name]}"


def test_an_evaluation_table(addresses: list[str], study: Study, pages: Pages) -> None:
    client = open_client(read_json(Layout(study).store)["uri"])
    (run,) = client.search_runs(["1"], "tags.kind = 'evaluation' and tags.run = 'egrpo-s1'")
    page = f"#/experiments/1/runs/{run.info.run_id}/artifacts/scores.json"
    pages.open(server(addresses) + page)
    pages.page.get_by_text("a red square [1]").wait_for()
    cells = pages.page.get_by_role("cell").all_inner_texts()
    at = [cells.index(f"a red square [{sample}]") for sample in (0, 1)]
    assert [cells[i + 1] for i in at] == ["0.5", "1"]


# ---------------------------------------------------------------- one run


def test_the_page_of_a_run(addresses: list[str], study: Study, pages: Pages) -> None:
    pages.open(run_page(addresses, study, "egrpo-s0"))
    page = pages.page
    page.get_by_text("lies above 0: better than the base model").first.wait_for()
    for text in ("Method egrpo, threshold 2.2, trained on verifier, seed 0", "train.txt"):
        page.get_by_text(text).first.wait_for()
    page.get_by_text("+2", exact=True).click()  # the other datasets
    for name in ("heldout.csv", "entropy_profile.parquet"):
        page.get_by_text(name).first.wait_for()
    pages.open(run_page(addresses, study, "egrpo-s0"))
    page.get_by_text("Logged models", exact=False).first.scroll_into_view_if_needed()


def test_the_adapter_and_the_settings(addresses: list[str], study: Study, pages: Pages) -> None:
    pages.open(run_page(addresses, study, "egrpo-s0") + "/artifacts")
    for name in ("config.yaml", "plan.json", "train.json"):
        pages.page.get_by_text(name, exact=True).wait_for()
    pages.open(addresses[5])
    pages.page.get_by_role("link", name="egrpo-s0").first.click()
    pages.page.get_by_text("verifier/difference").wait_for()
    pages.page.get_by_text("Artifacts", exact=True).click()
    pages.page.get_by_text("pytorch_lora_weights.safetensors").wait_for()


# ---------------------------------------------------------------- pictures of the docs


def test_the_pictures_of_the_docs_can_be_taken(
    addresses: list[str], pages: Pages, tmp_path: Path
) -> None:
    curves, grids, samples = (tmp_path / f"{name}.png" for name in ("curves", "grids", "samples"))
    pages.picture_of_curves(addresses[1], "monitor/reward/verifier", curves)
    pages.picture_of_grids(addresses[1], [STEPS[0], STEPS[-1]], grids)
    pages.picture_of_samples(addresses[4], samples)
    for file in (curves, grids, samples):
        with Image.open(file) as image:
            assert image.width > 500
            assert len(image.getcolors(1 << 24)) > 20  # not an empty page
        assert file.stat().st_size < 300_000
