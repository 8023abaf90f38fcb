"""The default runs of a small study, through real snakemake processes, and what runs again."""

from __future__ import annotations

import ast
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from small_study import RUNS, TABLE, planned, results, snakemake, study

from egrpo.methods import METHOD_MODELS
from egrpo.store.tables import TABLES
from egrpo.study.code import COMPUTE, Code, module_file
from egrpo.study.digests import Digests
from egrpo.study.orders import read_order

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study, run to its end."""
    folder = tmp_path_factory.mktemp("study")
    config = study(folder)
    (folder / "loaded").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NOTED", str(folder / "loaded"))
        done = snakemake(config)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return config


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
