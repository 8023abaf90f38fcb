"""What the workflow plans and refuses: dry runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from small_study import RUNS, TABLE, planned, snakemake, study

from egrpo.config.load import read_yaml
from egrpo.errors import UserError
from egrpo.ops.checks import check_study
from egrpo.study.layout import Layout
from egrpo.study.orders import order_of_run, read_order
from egrpo.study.resolve import load_study


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
def test_bad_settings_are_refused(
    runs: str, changes: dict[str, Any], parts: list[str], tmp_path: Path
) -> None:
    path = str(study(tmp_path, runs, **changes))
    with pytest.raises(UserError) as error:
        check_study(load_study(path), path)
    (line,) = str(error.value).splitlines()
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"train__iterations": 0}, "train.iterations"), ({"evaluate__width": 72}, "evaluate.width")],
)
def test_what_is_refused_stops_before_anything_runs(
    changes: dict[str, Any], part: str, tmp_path: Path
) -> None:
    done = snakemake(study(tmp_path, **changes), "--dry-run")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    assert sum(part in line for line in said.splitlines()) == 1
    assert not (tmp_path / "results").exists()


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
