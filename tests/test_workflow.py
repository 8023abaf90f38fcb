"""The workflow through real snakemake processes, on a small study of the shipped toy."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT

from egrpo.config.load import overlay, read_yaml
from egrpo.methods import METHOD_MODELS
from egrpo.store.tables import TABLES
from egrpo.study.code import COMPUTE, Code, module_file
from egrpo.study.digests import Digests
from egrpo.study.layout import Layout
from egrpo.study.orders import order_of_run, read_order
from egrpo.study.resolve import load_study

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TABLE = "run\tmethod.name\ttrain.learning_rate_scale\tmethod.threshold\n"
RUNS = TABLE + "one\tegrpo\t\ntwo\tflow_grpo\t\nthree\tegrpo\t\tauto\n"
EVALUATIONS = 400  # one iteration of E-GRPO, all of Flow-GRPO
KINDS = ("branches", "entropy", "spread", "threshold", "curves", "images")

SMALL: dict[str, Any] = {
    "study": "small",
    "seeds": [0, 1],
    "default_runs": ["one-s0", "two-s0"],
    "paper": ["scores_of_all", *(f"the_{kind}" for kind in KINDS)],
    "methods": {
        "egrpo": {"group_size": 3, "active": 4, "spread_factor": 0.01},
        "flow_grpo": {"group_size": 4, "steps": 5},
    },
    "profile": {"prompts": 2, "samples": 3, "spans": [1, 2], "shown": [[2, 1], [3, 2]]},
    "train": {
        "iterations": 3,
        "prompts_per_iteration": 2,
        "checkpoint_every": 1,
        "monitor_every": 2,
        "monitor_prompts": 2,
        "monitor_samples": 2,
    },
    "evaluate": {"steps": 4, "samples": 2, "prompts": 6, "grid_prompts": 3},
}


def study(folder: Path, runs: str = RUNS, **changes: Any) -> Path:
    """A small study's YAML and runs table in ``folder``, results there too."""
    settings = overlay(read_yaml(ROOT / "config/config.yaml"), SMALL)
    settings |= {"results": str(folder / "results"), "runs": str(folder / "runs.tsv")}
    settings["tables"] = {
        "scores_of_all": {
            "caption": "All arms.",
            "sections": {"first": ["one", "two"], "second": ["three"]},
            "rewards": ["verifier", "clip"],
            "evaluations": EVALUATIONS,
        }
    }
    settings["figures"] = {
        f"the_{kind}": {
            "kind": kind,
            "caption": f"The {kind}.",
            "arms": ["three"] if kind in ("spread", "threshold") else ["one", "three"],
            "pairs": [[2, 1], [3, 2]],
            "spans": [1, 2],
            "prompts": 2,
        }
        for kind in KINDS
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        settings = overlay(settings, {section: {name: value}} if name else {section: value})
    (folder / "runs.tsv").write_text(runs)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def snakemake(
    config: Path | None, *words: str, where: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    extra = ["--configfile", str(config)] if config else []
    env = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env["PYTHONPATH"] = f"{ROOT / 'tests/noted'}{os.pathsep}{env.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", "--nolock", *words, *extra],
        cwd=where,
        env=env,
        capture_output=True,
        text=True,
    )


def planned(config: Path | None, *words: str, where: Path = ROOT) -> dict[str, int]:
    """Jobs of a dry run: rule -> count."""
    done = snakemake(config, "--dry-run", *words, where=where)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^job +count\n-+ +-+\n(.*?)^total", done.stdout + done.stderr, re.M | re.S)
    return {k: int(v) for k, v in (ln.split() for ln in found[1].splitlines())} if found else {}


def test_dry_run_of_the_default_study_lists_the_jobs() -> None:
    jobs = planned(None, "--forceall")
    assert jobs == {
        "all": 1,
        "prepare_store": 1,
        "embed": 4,
        "profile": 1,
        "plan": 1,
        "train": 2,
        "evaluate": 2,
        "evaluate_base": 1,
        "about": 1,
        "comparison": 1,
        "figures": 1,
        "page": 1,
        "publish": 1,
    }


def test_another_model_gets_the_same_targets_by_a_config(tmp_path: Path) -> None:
    """Model, prompts and rewards change; arms, tables and figures stay."""
    wanted = planned(None, "--forceall", "paper")
    assert wanted["train"] == wanted["evaluate"] == 72
    assert wanted["page"] == 1
    mine = read_yaml(ROOT / "config/my_model.yaml")
    for path in (mine["model"]["path"], mine["prompts"]["train"], mine["rewards"]["clip"]["path"]):
        assert not (ROOT / path).exists(), "files that a user brings"
    rows = tmp_path / "rows.txt"
    rows.write_text("a cat\na dog\n" * 8)
    there = {
        "results": str(tmp_path / "results"),
        "model": {"path": "assets/toy/pipeline", "height": 64, "width": 64},
        "prompts": {"train": str(rows), "heldout": str(rows)},
        "rewards": {"clip": {"path": "assets/toy/clip.pt"}},
    }
    (tmp_path / "there.yaml").write_text(yaml.safe_dump(there))
    files = ["config/config.yaml", "config/my_model.yaml", str(tmp_path / "there.yaml")]
    done = snakemake(None, "--dry-run", "paper", "--configfile", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    for rule in ("train", "evaluate", "plan", "result_table", "result_figure"):
        assert f"{rule} {wanted[rule]} " in " ".join(done.stdout.split())
    refused = snakemake(None, "--dry-run", "paper", "--configfile", *files[:2])
    wanted = f"model.path: {mine['model']['path']}: no such folder"
    assert wanted in refused.stdout + refused.stderr, "the model first"


def test_files_and_options_lie_over_each_other_as_in_the_commands(tmp_path: Path) -> None:
    top = {
        "results": str(tmp_path / "results"),
        "default_runs": ["egrpo-s1"],
        "rewards": {"red": {"kind": "custom", "function": "json:dumps"}},
        "train": {"rewards": {"red": 1.0}},
    }
    (tmp_path / "top.yaml").write_text(yaml.safe_dump(top))
    files = ["config/config.yaml", str(tmp_path / "top.yaml")]
    words = ["seeds=[1]", 'train={"iterations": 5}']
    done = snakemake(None, "--dry-run", "--configfile", *files, "--config", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    made = load_study(*files, options={"seeds": [1], "train": {"iterations": 5}})
    assert made.runs["egrpo-s1"].train.rewards == {"red": 1.0}
    assert not (tmp_path / "results/laptop/settings").exists(), "a dry run writes no order"
    (tmp_path / "results/laptop/settings").mkdir(parents=True)
    order = order_of_run(Layout(made), "egrpo-s1", write=False)
    assert str(order) in done.stdout + done.stderr


def test_every_word_of_a_command_is_quoted() -> None:
    """But for the launcher, which is a command of several words, and the number of threads."""
    found = []
    for path in sorted((ROOT / "workflow").rglob("*.smk")):
        for shell in re.findall(r"^ +shell:\n((?: {8,}[^ ].*\n)+)", path.read_text(), re.MULTILINE):
            found += re.findall(r"\{([^{}]*)\}", shell)
    assert len(found) > 12
    assert {w for w in found if not w.endswith(":q")} == {"resources.launch", "threads"}


def test_recipe_of_the_toy_weights_is_a_rule() -> None:
    assert planned(None, "--forceall", "toy_world") == {"toy_world": 1}


@pytest.mark.parametrize(
    ("runs", "changes", "parts"),
    [
        (RUNS, {"train__iteratoins": 5}, ["config.yaml", "train.iteratoins", "did you mean"]),
        (RUNS, {"train__iterations": "many"}, ["config.yaml", "train.iterations", "'many'"]),
        (RUNS, {"train__iterations": 0}, ["train.iterations", "greater than or equal to 1"]),
        (RUNS + "one\tegrpo\t\n", {}, ["runs.tsv", "'one' occurs twice"]),
        (TABLE + "x\tegrpo\t-1\n", {}, ["runs.tsv", "'x-s0'", "train.learning_rate_scale"]),
        (RUNS, {"default_runs": ["one"]}, ["config.yaml: default_runs: no run 'one'; did you"]),
        (RUNS, {"train__updates": 5}, ["run one-s0: train.updates", "into 4 parts only, not 5"]),
        (RUNS, {"train__loss": "negative_aware"}, ["train.loss: negative_aware is not for method"]),
        (RUNS, {"methods__flow_grpo": {"dynamics": "cps", "noise_level": 2.0}}, ["(0, 1]"]),
        (TABLE + "x\tppo\t\n", {}, ["runs.tsv", "unknown method 'ppo'"]),
        (RUNS, {"methods__egrpo": {"group_size": 1}}, ["methods.egrpo.group_size", "to 2"]),
        (RUNS, {"methods__egrpo": {"active": 16}}, ["methods.egrpo.active", "beyond the schedule"]),
        (RUNS, {"prompts__train": "no.txt"}, ["prompts.train: no.txt: no such file"]),
        (RUNS, {"model__path": "x/y/z"}, ["model.path", "no such folder"]),
        (RUNS, {"model__height": 36}, ["config.yaml: model.height: 36 is not a multiple of 8"]),
        (RUNS, {"evaluate__width": 72}, ["evaluate.width: 72 is more than 64, where the model's"]),
        (
            RUNS,
            {"prompts__heldout": "requirements.txt"},
            ["prompts.heldout: requirements.txt, prompt 1", "outside the toy grammar"],
        ),
        (RUNS, {"rewards__clip": {"kind": "clip", "path": "no.pt"}}, ["rewards.clip.path: no.pt"]),
    ],
)
def test_bad_settings_stop_before_anything_runs(
    runs: str, changes: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    done = snakemake(study(tmp_path, runs, **changes), "--dry-run")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    line = next(ln for ln in said.splitlines() if parts[-1] in ln)
    for part in parts:
        assert part in line
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study, run to its end."""
    folder = tmp_path_factory.mktemp("study")
    before = Path.cwd()
    os.chdir(ROOT)
    config = study(folder)
    os.chdir(before)
    (folder / "loaded").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTED", str(folder / "loaded"))
        done = snakemake(config)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return config


def results(config: Path) -> Path:
    return config.parent / "results" / "small"


@pytest.mark.slow
def test_whole_study_gives_every_result(finished: Path) -> None:
    at = results(finished)
    for name in ("curves", "before_after", "entropy", "spread"):
        assert (at / f"figures/{name}.png").stat().st_size > 5000
    assert {p.name for p in (at / "runs").iterdir()} == {"one-s0", "two-s0"}, "default runs only"
    assert 100_000 < (at / "index.html").stat().st_size < 2_000_000
    assert 'location.replace("small/index.html")' in (at.parent / "index.html").read_text()
    found = {}
    for path in sorted(at.rglob("*.parquet")):
        schema = pq.read_schema(path)
        name = schema.metadata[b"schema"].decode()
        found[name] = path
        assert schema.metadata[b"schema_version"].decode() == str(TABLES[name].version)
        for field in schema:
            assert {b"unit", b"description"} <= set(field.metadata)
    assert set(found) == set(TABLES) - {"suffixes"}
    for run in ("one-s0", "two-s0"):
        summary = json.loads((at / f"runs/{run}/train.json").read_text())
        assert summary["iterations"] == 3
        assert (at / f"runs/{run}/adapter/pytorch_lora_weights.safetensors").exists()
    costs = subprocess.run(
        [sys.executable, "-m", "egrpo", "cost", str(finished), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    costs = json.loads(costs)
    assert costs["three-s0"] is None, "its profile is there, its plan is not"
    for run in ("one-s0", "two-s0"):
        summary = json.loads((at / f"runs/{run}/train.json").read_text())
        for name in ("forward", "train", "reference"):
            assert summary[f"nfe_{name}"] == costs[run]["run"][name]
    report = subprocess.run(
        [sys.executable, "-m", "egrpo", "report", "--config", str(finished)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "verifier" in report
    assert "make ui" in report
    assert f"The story on one page: {at / 'index.html'}" in report


ROOTS = {"plan": "planning.plan", "train": "train.job", "base": "measure.evaluate"}
BY_VALUE = {
    *("egrpo.planning.grids", "egrpo.planning.trees", "egrpo.planning.plan", "egrpo.methods"),
    *(method.__module__ for method in METHOD_MODELS.values()),
}
"""What every job loads to read its settings: sigmas, plans and trees are in identities by value."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["embed", "profile", "plan", "train", "evaluate", "base"])
def test_what_a_job_loads_is_in_its_identity(finished: Path, stage: str, tmp_path: Path) -> None:
    code = Code(Digests(tmp_path / "digests.json"))
    noted = list((finished.parent / "loaded").glob(f"{stage}-*"))
    assert noted
    for path in noted:
        order, *loaded = path.read_text().split("\n")
        run = read_order(Path(order.split()[0])).run
        rewards = [f"egrpo.rewards.{reward.module}" for reward in run.rewards.values()]
        root = f"egrpo.{ROOTS.get(stage, f'measure.{stage}')}"
        covered = set(code.needed([root, type(run.method).__module__, *rewards]))
        computes = {name for name in loaded if name.split(".")[1] in COMPUTE}
        left = computes - covered - BY_VALUE
        assert {name for name in left if len(ast.parse(source(name)).body) > 1} == set()


def source(module: str) -> str:
    path = module_file(module)
    assert path is not None
    return path.read_text()


@pytest.mark.slow
def test_mlflow_holds_every_metric_once(finished: Path) -> None:
    import mlflow

    at = results(finished)
    published = json.loads((at / "published-comparison.json").read_text())
    client = mlflow.MlflowClient(published["uri"])
    for run in ("one-s0", "two-s0"):
        run_id = published[run]
        data = client.get_run(run_id)
        assert data.info.status == "FINISHED"
        assert data.data.tags["mlflow.parentRunId"]
        assert data.data.params["train.iterations"] == "3"
        assert {i.dataset.name for i in data.inputs.dataset_inputs} >= {"train.txt", "heldout.txt"}
        history = client.get_metric_history(run_id, "reward/verifier")
        assert sorted(m.step for m in history) == [1, 2, 3]
        history = client.get_metric_history(run_id, "monitor/reward/clip")
        assert sorted(m.step for m in history) == [0, 2, 3]
        children = client.search_runs(
            [published["experiment_id"]], f"tags.`mlflow.parentRunId` = '{run_id}'"
        )
        assert len(children) == 1
        assert "verifier/difference" in children[0].data.metrics


@pytest.mark.slow
def test_running_again_does_nothing_and_edits_rerun_only_what_they_touch(finished: Path) -> None:
    assert planned(finished) == {}
    folder = finished.parent
    study(folder, evaluate__samples=3)
    jobs = planned(finished)
    assert "evaluate" in jobs
    assert not {"train", "profile", "embed", "plan"} & set(jobs)
    study(folder, RUNS.replace("two\tflow_grpo\t", "two\tflow_grpo\t2.0"))
    assert planned(finished)["train"] == 1
    study(
        folder,
        TABLE + "zero\tegrpo\t0.5\n" + RUNS.removeprefix(TABLE),
        default_runs=["zero-s0", "one-s0", "two-s0"],
    )
    assert planned(finished)["train"] == 1
    study(folder, train__rewards={"verifier": 1.0, "clip": 0.5})
    jobs = planned(finished)
    assert jobs["train"] == 2
    assert not {"profile", "embed", "evaluate_base"} & set(jobs)
    study(folder, train__iterations=5)
    assert planned(finished)["train"] == 2
    study(folder)
    assert planned(finished) == {}


@pytest.mark.slow
def test_an_edit_of_the_code_runs_again_what_it_decides(finished: Path, tmp_path: Path) -> None:
    """In a copy of the repository that knows nothing of earlier runs but their results."""
    for name in ("config", "assets", "profiles"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("workflow", "egrpo"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy2(ROOT / "Snakefile", tmp_path)
    assert planned(finished, where=tmp_path) == {}
    with (tmp_path / "egrpo/report/templates/page.css").open("a") as source:
        source.write("/* edited */\n")
    told = {"figures", "comparison", "about", "page", "publish", "all"}
    assert set(planned(finished, where=tmp_path)) <= told
    shutil.copy2(ROOT / "egrpo/report/templates/page.css", tmp_path / "egrpo/report/templates")
    with (tmp_path / "egrpo/core/loss.py").open("a") as source:
        source.write("# edited\n")
    assert planned(finished, where=tmp_path) == {}
    with (tmp_path / "egrpo/core/loss.py").open("a") as source:
        source.write("EDITED = True\n")
    jobs = planned(finished, where=tmp_path)
    assert jobs["train"] == 2
    assert not {"profile", "embed", "evaluate_base"} & set(jobs)


@pytest.mark.slow
def test_a_lost_result_is_made_again_from_the_state(finished: Path) -> None:
    """Outputs deleted, state kept: the job resumes at the end and trains nothing twice."""
    at = results(finished)
    before = (at / "runs/one-s0/adapter/pytorch_lora_weights.safetensors").read_bytes()
    (at / "runs/one-s0/train.json").unlink()
    done = snakemake(finished)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    log = (at / "logs/train/one-s0.log").read_text()
    assert "going on after iteration 3" in log
    assert (at / "runs/one-s0/adapter/pytorch_lora_weights.safetensors").read_bytes() == before


def test_settings_of_the_default_study_do_not_leak_into_another(tmp_path: Path) -> None:
    config = study(tmp_path)
    settings = yaml.safe_load(config.read_text())
    del settings["rewards"]["preference"]
    config.write_text(yaml.safe_dump(settings))
    without = tmp_path / "without.yaml"
    without.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != "model"}))
    done = snakemake(without, "--dry-run")
    assert done.returncode != 0
    assert "without.yaml: model: is missing" in done.stdout + done.stderr
    at = Layout(load_study(str(config)))
    assert snakemake(config, str(at.embeddings("one-s0", "profile"))).returncode == 0
    orders = [read_order(path).run for path in (at.root / "settings").glob("*-s*.json")]
    assert orders
    assert all("preference" not in run.rewards for run in orders)


@pytest.mark.slow
def test_paper_makes_every_table_and_figure_and_trains_shared_runs_once(finished: Path) -> None:
    at = results(finished)
    jobs = planned(finished, "paper")
    assert jobs["train"] == 4, "two of the six runs are there"
    assert planned(finished, "the_threshold").get("train", 0) == 0, "a plan needs no training"
    done = snakemake(finished, "paper", "suffixes")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
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
    assert planned(finished, "paper") == {}
    assert planned(finished) == {}


@pytest.mark.slow
def test_report_is_one_file_that_shows_everything_offline(finished: Path, browser: Browser) -> None:
    wanted = ("paper", "suffixes")
    done = snakemake(finished, *wanted)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    file = finished.parent / "report.html"
    done = snakemake(finished, *wanted, "--report", str(file))
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


@pytest.mark.slow
def test_everything_has_a_page_too_and_the_first_page_lists_all(finished: Path) -> None:
    done = snakemake(finished, "everything")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    text = (results(finished) / "everything.html").read_text()
    for run in ("one-s0", "two-s1", "three-s1"):
        assert run in text
    assert "scores_of_all" in text
    for kind in KINDS:
        assert f"The {kind}." in text
    first = (results(finished).parent / "index.html").read_text()
    for name in ("index", "paper", "everything"):
        assert f'href="small/{name}.html"' in first
    assert planned(finished, "everything") == {}


@pytest.mark.slow
def test_moved_results_are_delivered_again_and_nothing_else_is_made(finished: Path) -> None:
    """As docs/mlflow.md says of results that were copied elsewhere."""
    at = results(finished)
    for path in (at / "store.json", at.parent / "mlflow.db", *at.glob("published-*.json")):
        path.unlink()
    shutil.rmtree(at.parent / "mlartifacts")
    assert planned(finished) == {"prepare_store": 1, "publish": 1, "all": 1}
    done = snakemake(finished)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    with sqlite3.connect(at.parent / "mlflow.db") as store:  # MLflow keeps the lost one open
        names = {name for (name,) in store.execute("SELECT name FROM runs")}
        (steps,) = store.execute(
            "SELECT count(*) FROM metrics JOIN runs USING (run_uuid)"
            " WHERE name = 'one-s0' AND key = 'reward/verifier'"
        ).fetchone()
    assert {"one-s0", "two-s0/evaluation", "base/evaluation"} <= names
    assert steps == 3, "each iteration once"
