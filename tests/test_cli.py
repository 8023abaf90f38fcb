"""The command line as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from egrpo.study.layout import Layout
from egrpo.study.orders import order_of_run
from egrpo.study.resolve import Study


def egrpo(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "egrpo", *map(str, words)], cwd=cwd, capture_output=True, text=True
    )


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit status not 0, one line on stderr with these parts, no traceback."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("egrpo: ")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]


def test_plan_json_contract() -> None:
    done = egrpo(
        "plan", "--steps", 16, "--shift", 3, "--noise-level", 0.7, "--threshold", 2.2,
        "--active", 8, "--json",
    )  # fmt: skip
    assert done.returncode == 0
    plan = json.loads(done.stdout)
    assert len(plan["sigmas"]) == 17
    assert len(plan["entropy"]) == 15
    assert plan["spans"] == [1, 1, 2, 2, 2, 3, 3, 3]
    assert plan["nfe"] == {"anchor": 8, "suffix_per_sample": 83, "train": 8}
    assert round(plan["entropy"][0], 4) == 2.8929


@pytest.fixture
def default_study(tmp_path: Path) -> list[str]:
    """The default study's files, with results that nobody has made yet."""
    top = tmp_path / "top.yaml"
    top.write_text(f"results: {tmp_path / 'results'}\n")
    return ["config/config.yaml", str(top)]


def test_plan_and_cost_import_no_torch(default_study: list[str]) -> None:
    for words in (["plan", "--json"], ["cost", *default_study, "--json"]):
        code = (
            "import sys\nfrom egrpo.cli import main\n"
            f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\n"
            "heavy = {'torch', 'mlflow', 'snakemake', 'diffusers', 'pandas'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["plan", "--threshold", "5", "--on-unreachable", "error"], ["step 7", "out of reach"]),
        (["plan", "--active", "16"], ["active step 15", "0..14"]),
        (["plan", "--active", "0"], ["--active"]),
        (["plan", "--measure", "bits"], ["--measure", "exp_per_dim"]),
        (["plan", "--dynamics", "ode"], ["--dynamics", "flow_sde"]),
        (["plan", "--on-unreachable", "maybe"], ["on_unreachable", "cap"]),
        (["plan", "--steps", "0"], ["steps must be at least 1"]),
        (["plan", "--shift", "-1"], ["--shift"]),
        (["plan", "--noise-level", "0"], ["--noise-level"]),
        (["plan", "--noise-level", "nan"], ["--noise-level"]),
        (["plan", "--threshold", "nan"], ["--threshold"]),
        (["plan", "--shift", "1e-320"], ["--shift"]),
        (["plan", "--dynamics", "cps"], ["--threshold", "cps"]),
        (["cost", "absent.yaml"], ["absent.yaml: no such file"]),
        (["report", "--config", "absent.yaml"], ["absent.yaml: no such file"]),
    ],
)
def test_bad_input_is_one_line(words: list[str], parts: list[str]) -> None:
    refused(egrpo(*words), *parts)


def test_unreachable_threshold_is_said_and_capped() -> None:
    done = egrpo("plan", "--threshold", "5.0", "--json")
    assert done.returncode == 0
    assert "step 7: threshold 5.0 (exp_per_dim) is out of reach, span capped at 8" in done.stderr
    assert json.loads(done.stdout)["spans"][-1] == 8


def test_cost_of_the_default_study(default_study: list[str]) -> None:
    costs = json.loads(egrpo("cost", *default_study, "--json").stdout)
    per_prompt = {
        run: (cost["prompt"]["forward"], cost["prompt"]["train"])
        for run, cost in costs.items()
        if cost
    }
    assert per_prompt["egrpo-s0"] == per_prompt["egrpo-s2"] == (1004, 8)
    assert per_prompt["dancegrpo-s0"] == (192, 108)
    assert per_prompt["mixgrpo-s0"] == (300, 48)
    assert per_prompt["flow_grpo-s0"] == (240, 216)
    assert costs["egrpo-s0"]["run"]["total"] == 60 * 4 * (1004 + 8)
    assert costs["egrpo_auto-s0"] is None  # its profile is not measured


def test_cost_shows_the_arms_side_by_side(default_study: list[str]) -> None:
    text = egrpo("cost", *default_study).stdout
    (pruned,) = [ln for ln in text.splitlines() if ln.startswith("branchgrpo_pruned")]
    assert "<=" in pruned
    assert "egrpo-s1" not in text
    assert "of several seeds the first is shown" in text
    assert "needs its profile; `snakemake --cores all plans` makes it" in text


def test_a_job_reads_no_results_but_those_that_it_was_planned_for(tmp_path: Path) -> None:
    from conftest import small_run

    run = small_run().model_copy(update={"study": "small"})
    at = Layout(Study("small", str(tmp_path), {run.run: run}))
    order = order_of_run(at, run.run)
    refused(egrpo("make", "train", order), "holds no result of these settings (plan egrpo: wanted")
    refused(egrpo("make", "evaluate", order), "(train egrpo: wanted", "start the workflow again")
    profile = at.profile(run.run)
    refused(egrpo("make", "plan", order), f"{profile}: no such file")
    assert not at.run(run.run).exists()


def test_beginners_mistakes_are_answered(tmp_path: Path) -> None:
    """What is forgotten first: the study below an overlay, the project's folder, the run's seed."""
    refused(
        egrpo("cost", "config/presets/flux_dev_hps.yaml"),
        "runs: is missing",
        "a file that is laid over another one? name that one before it",
    )
    refused(egrpo("cost", cwd=tmp_path), "config/config.yaml: no such file", "not the project's")
    refused(egrpo("export", "egrpo"), "did you mean egrpo-s0, egrpo-s1, egrpo-s2?")
    (tmp_path / "top.yaml").write_text(f"results: {tmp_path / 'results'}\n")
    words = ("--config", "config/config.yaml", "--config", tmp_path / "top.yaml")
    remedy = f"`snakemake --cores all --configfile config/config.yaml {tmp_path / 'top.yaml'}`"
    for command in ("report", "ui"):
        refused(egrpo(command, *words), str(tmp_path / "results/laptop"), remedy)


def test_the_default_study_need_not_be_named(default_study: list[str]) -> None:
    assert egrpo("cost").stdout == egrpo("cost", default_study[0]).stdout != ""
