"""All tables, figures and pages of a small study, and Snakemake's report of it."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
from small_study import EVALUATIONS, KINDS, planned, results, snakemake, study

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow
TARGETS = ("paper", "suffixes", "everything")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study with all that anyone can ask of it."""
    config = study(tmp_path_factory.mktemp("study"))
    assert planned(config, "the_threshold").get("train", 0) == 0, "a plan needs no training"
    assert planned(config, *TARGETS)["train"] == 6, "two arms of the paper are default runs too"
    done = snakemake(config, *TARGETS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert planned(config, *TARGETS) == {}
    assert not {"train", "evaluate", "profile"} & set(planned(config))
    return config


def test_paper_makes_every_table_and_figure(finished: Path) -> None:
    at = results(finished)
    for kind in KINDS:
        assert (at / f"figures/the_{kind}.png").stat().st_size > 5000
        assert (at / f"figures/the_{kind}.svg").read_text().startswith("<?xml")
    rows = pq.read_table(at / "tables/scores_of_all.parquet").to_pylist()
    assert {(r["at"], r["arm"]) for r in rows} == {
        (when, arm) for when in ("end", "evaluations") for arm in ("base", "one", "two", "three")
    }
    for row in rows:
        assert row["mean_low"] <= row["mean"] <= row["mean_high"]
        if row["arm"] != "base":
            assert row["low"] <= row["difference"] <= row["high"]
            assert row["seeds"] == 2
            assert 0 < row["nfe"] <= (EVALUATIONS if row["at"] == "evaluations" else 2000)
            assert row["peak_memory_mib"] > 100
    assert pq.read_table(at / "runs/one-s0/suffixes.parquet").num_rows
    page = (at / "paper.html").read_text()
    for name in ("scores_of_all", "the_branches", "the_images"):
        assert f'<h3 id="{name}">' in page
    assert page.count("data:image/") > len(KINDS)
    assert "small/paper.html" in (at.parent / "index.html").read_text()
    text = (at / "tables/scores_of_all.md").read_text()
    assert f"## At equal network evaluations ({EVALUATIONS})" in text
    assert (at / "tables/scores_of_all.csv").read_text().count("\n") == len(rows) + 1
    published = json.loads((at / "published-paper_runs.json").read_text())
    assert {f"{arm}-s{seed}" for arm in ("one", "two", "three") for seed in (0, 1)} <= set(
        published
    )


def test_report_is_one_file_that_shows_everything_offline(finished: Path, browser: Browser) -> None:
    file = finished.parent / "report.html"
    done = snakemake(finished, "paper", "suffixes", "--report", str(file))
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
    page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)

    def opened(*way: str) -> list[list[str]]:
        """Rows of the table of results behind these entries of the menu."""
        page.goto(file.as_uri())
        for entry in way:
            page.get_by_text(entry, exact=True).last.click()
        page.locator("table tbody tr").first.wait_for()
        rows = page.locator("table tr").all()
        return [[c.strip() for c in r.locator("th,td").all_inner_texts()] for r in rows]

    def shown(row: int) -> Any:
        page.locator("table tbody tr").nth(row).locator("a").first.click()
        return page.frame_locator("iframe")

    def drawn(spec: str) -> str:
        """What one of the report's own charts, drawn on a canvas, is made from."""
        page.locator("canvas").first.wait_for()
        return file.read_text().partition(f"var {spec} =")[2].partition("</script>")[0]

    page.goto(file.as_uri())
    page.get_by_text("Which denoising steps should").wait_for()
    rules = ("profile", "plan", "train", "evaluate", "result_table", "about")
    assert all(f'"{rule}"' in drawn("rulegraph_spec") for rule in rules)

    head, *tables = opened("Paper", "Tables")
    assert [h.lower() for h in head[:4]] == ["shows", "method", "reward", "seed"]
    assert tables[0][:4] == ["scores_of_all", "egrpo, flow_grpo", "verifier", "0, 1"]
    frame = shown(0)
    frame.locator("h3", has_text="second").first.wait_for()
    row = frame.locator("tr", has=frame.get_by_role("cell", name="three")).first.inner_text()
    texts = (results(finished) / "tables/scores_of_all.md").read_text().splitlines()
    line = next(ln for ln in texts if ln.startswith("| three |"))
    wanted = [cell.strip().replace("*", "").replace("\\", "") for cell in line.split("|")[1:-1]]
    assert [cell.strip().replace("*", "") for cell in row.split("\t")] == wanted
    page.locator("table tbody tr").first.locator("a").nth(1).click()
    page.get_by_text("Best and second best are marked only where").wait_for()

    _, *figures = opened("Paper", "Figures")
    assert [row[0] for row in figures] == sorted(f"the_{kind}" for kind in KINDS)
    page.locator("table tbody tr").first.locator("a").first.click()
    image = page.locator("img[src^='data:image/png']")
    image.wait_for()
    assert image.evaluate("e => e.naturalWidth") > 500

    _, *measured = opened("Entropy")
    assert [row[0] for row in measured] == ["suffixes"]
    shown(0).get_by_role("cell", name="dpm2").first.wait_for()

    opened("Configuration and versions")
    frame = shown(0)
    frame.locator("summary", has_text="one-s0").click()
    text = frame.locator("body").inner_text()
    assert "learning_rate_scale: 5.0" in text
    assert f"torch\t{version('torch')}" in text
    assert "one-s1" in text, "a run of the paper"
    page.goto(file.as_uri())
    page.get_by_text("Statistics", exact=True).click()
    assert '"evaluate_base"' in drawn("runtimes_spec")
    page.close()
    assert set(asked) == {file.as_uri()}, "nothing comes over the network"
    assert not wrong


def test_everything_has_a_page_too_and_the_first_page_lists_all(finished: Path) -> None:
    text = (results(finished) / "everything.html").read_text()
    for run in ("one-s0", "two-s1", "three-s1"):
        assert run in text
    assert "scores_of_all" in text
    for kind in KINDS:
        assert f"The {kind}." in text
    first = (results(finished).parent / "index.html").read_text()
    for name in ("paper", "everything"):
        assert f'href="small/{name}.html"' in first
