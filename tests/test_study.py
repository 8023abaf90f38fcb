"""Studies: arms and seeds, tables and figures as targets, snapshots, plans from a profile."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_run
from test_config import Folder

from egrpo.config.keys import run_key, training_key
from egrpo.config.layout import Layout
from egrpo.config.load import load_study, load_target, yaml_of
from egrpo.config.models import RunConfig, TableSpec
from egrpo.config.trees import (
    check_trees,
    iteration_cost,
    plan_of,
    prompt_ids,
    run_cost,
    training_sigmas,
)
from egrpo.core.entropy import MEASURES, step_entropy
from egrpo.core.spread import Spread
from egrpo.errors import UserError
from egrpo.stages.plan import measured_spread
from egrpo.store.tables import ENTROPY_PROFILE, read_table, write_table

TWO = "run\tmethod.name\na\tegrpo\nb\tflow_grpo\n"
TRAIN = {"rewards": {"verifier": 1.0}}
TABLE = {"caption": "x", "sections": {"s": ["a", "b"]}, "rewards": ["verifier"]}


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_every_arm_is_trained_once_per_seed(study: Folder) -> None:
    made = study.load(TWO, seeds=[0, 7])
    assert list(made.runs) == ["a-s0", "a-s7", "b-s0", "b-s7"]
    assert [(r.arm, r.seed) for r in made.runs.values()] == [("a", 0), ("a", 7), ("b", 0), ("b", 7)]
    assert Layout(made).arm("b") == ["b-s0", "b-s7"]
    assert made.default_runs == tuple(made.runs)
    alone = study.load(TWO)
    assert list(alone.runs) == ["a", "b"]
    assert alone.runs["a"].arm == "a"


def test_null_takes_away_what_a_file_below_has_set(study: Folder, tmp_path: Path) -> None:
    study.load(TWO, seeds=[0, 7], default_runs=["a-s0"])
    (tmp_path / "top.yaml").write_text("seeds: null\ndefault_runs: null\n")
    assert list(load_study(study.yaml, tmp_path / "top.yaml").runs) == ["a", "b"]
    study.load(TWO, tables={"t": TABLE, "u": TABLE})
    (tmp_path / "top.yaml").write_text(
        "rewards: {verifier: null}\ntrain: {rewards: {verifier: null, jpeg: 1.0}}\n"
        "tables: {t: null, u: {rewards: [jpeg]}}\n"
    )
    made = load_study(study.yaml, tmp_path / "top.yaml")
    assert made.runs["a"].train.rewards == {"jpeg": 1.0}
    assert list(made.runs["a"].rewards) == ["jpeg"]
    assert list(made.tables) == ["u"]


def test_tables_at_equal_evaluations_ask_their_arms_for_snapshots(study: Folder) -> None:
    tables = {
        "one": {**TABLE, "evaluations": 20000},
        "two": {**TABLE, "sections": {"s": ["a"]}, "evaluations": 9000},
        "three": TABLE,
    }
    runs = study.load(
        TWO, tables=tables, train={"rewards": {"verifier": 1.0}, "snapshots": [9]}
    ).runs
    assert runs["a"].train.snapshots == [9, 9000, 20000]
    assert runs["b"].train.snapshots == [9, 20000]
    plain = study.load(TWO).runs
    assert run_key(runs["a"]) == run_key(plain["a"]), "a table must not train a run anew"
    assert training_key(runs["a"]) != training_key(plain["a"])


def test_cheapest_is_what_the_cheapest_arm_spends(study: Folder) -> None:
    made = study.load(TWO, tables={"t": {**TABLE, "evaluations": "cheapest"}})
    flow = 300 * 8 * (240 + 216 + 216)  # forward, train, reference, at the papers' settings
    assert made.tables["t"].evaluations == flow
    assert made.runs["a"].train.snapshots == [flow]
    said = study.refusal(TWO, tables={"t": {**TABLE, "evaluations": 8000}})
    assert "tables.t.evaluations: 8000 is less than one iteration of arm 'a' (8096)" in said


def test_a_cell_may_leave_a_reward_out(study: Folder) -> None:
    both = {"rewards": {"verifier": 1.0, "jpeg": 0.5}}
    table = "run\ttrain.rewards.verifier\na\tnull\nb\t\n"
    runs = study.load(table, train=both).runs
    assert runs["a"].train.rewards == {"jpeg": 0.5}
    assert runs["b"].train.rewards == both["rewards"]
    assert "has weight 0 and trains nothing" in study.refusal(
        table.replace("null", "0.0"), train=both
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"figures": {"f": {"kind": "spread", "caption": "x", "arms": ["b"]}}},
            "figures.f.arms: spread shows a profile, and arm 'b' (flow_grpo) has none",
        ),
        (
            {"figures": {"f": {"kind": "threshold", "caption": "x", "arms": ["a"]}}},
            "the threshold of arm 'a' is not auto",
        ),
        (
            {"figures": {"f": {"kind": "entropy", "caption": "x", "arms": ["a"], "spans": [5]}}},
            "figures.f.spans: 5 is not in profile.spans",
        ),
        (
            {
                "figures": {
                    "f": {"kind": "branches", "caption": "x", "arms": ["a"], "pairs": [[1, 1]]}
                }
            },
            "figures.f.pairs: [1, 1] is not in profile.shown",
        ),
        ({"figures": {"f": {"kind": "curves", "caption": "x", "arms": []}}}, "no arm is given"),
        ({"tables": {"paper_runs": TABLE}}, "'paper_runs' cannot be a target"),
        ({"tables": {"track": TABLE}}, "'track' cannot be a target"),
        ({"methods": {"egrpo": {"threshold": "high"}}}, "methods.egrpo.threshold: Input should be"),
        (
            {"train": {**TRAIN, "monitor_samples": 1, "bounds": {"diversity": {"least": 0.1}}}},
            "train.bounds: diversity needs train.monitor_samples",
        ),
        ({"seeds": []}, "seeds: distinct numbers of at least 0"),
        ({"seeds": [1, 1]}, "seeds: distinct numbers of at least 0"),
        ({"default_runs": ["c"]}, "default_runs: no run 'c'"),
        ({"paper": ["tabel1"], "tables": {"table1": TABLE}}, "did you mean 'table1'?"),
        (
            {"tables": {"t": {**TABLE, "sections": {"s": ["A"]}}}},
            "tables.t.sections: no line of the runs table 'A'",
        ),
        (
            {"tables": {"t": {**TABLE, "rewards": ["hps"]}}},
            "tables.t.rewards: no reward 'hps'",
        ),
        (
            {"figures": {"f": {"kind": "curves", "caption": "x", "arms": ["z"]}}},
            "figures.f.arms: no line of the runs table 'z'",
        ),
        ({"tables": {"plan": TABLE}}, "'plan' cannot be a target"),
        ({"tables": {"../x": TABLE}}, "'../x' cannot be a target"),
        (
            {
                "tables": {"t": TABLE},
                "figures": {"t": {"kind": "curves", "caption": "x", "arms": ["a"]}},
            },
            "figures.t: a table has that name",
        ),
        ({"tables": {"t": {"caption": "x"}}}, "tables.t.sections: is missing"),
        (
            {"figures": {"f": {"kind": "pie", "caption": "x", "arms": ["a"]}}},
            "figures.f.kind: Input should be 'branches'",
        ),
    ],
)
def test_refusals_name_the_study_and_the_key(
    study: Folder, settings: dict[str, Any], message: str
) -> None:
    said = study.refusal(TWO, **settings)
    assert said.startswith("study.yaml: ")
    assert message in said


def test_a_seed_is_given_once(study: Folder) -> None:
    said = study.refusal("run\tseed\na\t3\n", seeds=[0])
    assert said.startswith("runs.tsv: run 'a', column seed:")


def test_target_settings_survive_the_workflow(study: Folder, tmp_path: Path) -> None:
    made = study.load(TWO, tables={"t": TABLE})
    settings = {"name": "t", **made.tables["t"].model_dump()}
    (tmp_path / "t.yaml").write_text(yaml_of(settings))
    assert load_target(tmp_path / "t.yaml", TableSpec) == ("t", made.tables["t"])
    (tmp_path / "t.yaml").write_text("name: t\ncaption: x\n")
    with pytest.raises(UserError, match=r"t\.yaml: sections: is missing"):
        load_target(tmp_path / "t.yaml", TableSpec)


def test_more_optimizer_steps_than_the_tree_has_parts() -> None:
    run = small_run("many", **{"train.updates": 9})
    with pytest.raises(UserError, match=r"run many: train\.updates: .* into 3 parts only, not 9"):
        check_trees({"many": run})
    check_trees({"few": small_run("few", **{"train.updates": 3})})


@pytest.mark.parametrize("method", ["flow_grpo_fast", "dancegrpo", "mixgrpo"])
def test_predicted_cost_of_a_run_sums_its_iterations(method: str) -> None:
    run = small_run("x", **{"method.name": method, "train.iterations": 30})
    whole = run_cost(run, None, 50)
    each = [iteration_cost(run, None, n, 50).total for n in range(1, 31)]
    assert whole.total == sum(each) > 0
    other = run_cost(run.model_copy(update={"seed": 1}), None, 50)
    assert (whole == other) == (method != "flow_grpo_fast"), "random windows cost differently"


def test_prompts_of_an_epoch() -> None:
    run = small_run("x", **{"train.prompts_per_iteration": 3})
    epoch = [i for n in range(1, 4) for i in prompt_ids(run, n, 10)]
    assert len(set(epoch)) == 9
    assert prompt_ids(run, 1, 10) != prompt_ids(run, 4, 10)


# -- plans from a profile ----------------------------------------------------------------------


def a_profile(path: Path, run: RunConfig, spread: dict[str, float]) -> Path:
    """A profile whose spread grows with entropy: spread[reward] * entropy; the yardstick is 1."""
    sigmas = training_sigmas(run)
    rows = []
    for step in range(15):
        for span in (1, 2, 4):
            if step + span > 15:
                continue
            entropy = {
                m: step_entropy(sigmas, step, span, noise_level=0.7, measure=m) for m in MEASURES
            }
            for prompt in range(2):
                for reward, factor in spread.items():
                    rows.append(
                        {
                            "step": step,
                            "span": span,
                            "sigma": sigmas[step],
                            "sigma_stop": sigmas[step + span],
                            "std": 1.0,
                            **entropy,
                            "prompt_id": prompt,
                            "quantity": f"reward:{reward}",
                            "spread": factor * entropy["exp_per_dim"] * (0.5 + prompt),
                            "yardstick": 1.0,
                        }
                    )
    head = {"sigmas": json.dumps(sigmas), "dynamics": "flow_sde", "noise_level": "0.7"}
    write_table(path, ENTROPY_PROFILE, rows, metadata=head)
    return path


def auto(**overrides: Any) -> RunConfig:
    return small_run("auto", **{"method.threshold": "auto", "method.active": 8, **overrides})


def test_spread_of_a_profile_is_weighted_by_the_trained_rewards(tmp_path: Path) -> None:
    path = a_profile(tmp_path / "p.parquet", auto(), {"verifier": 0.5, "clip": 0.1, "jpeg": 9.0})
    found = measured_spread(path, {"verifier": 1.0, "clip": 3.0})
    for s in found:
        assert s.value == pytest.approx((0.5 + 3 * 0.1) / 4 * s.entropy["exp_per_dim"])
    assert {(s.step, s.span) for s in found} >= {(0, 1), (14, 1), (11, 4)}


def test_spread_of_a_reward_is_over_the_prompts_that_it_applies_to(tmp_path: Path) -> None:
    path = a_profile(tmp_path / "p.parquet", auto(), {"verifier": 0.5, "clip": 0.1})
    rows = read_table(path, ENTROPY_PROFILE).to_pylist()
    whole = measured_spread(path, {"verifier": 1.0})
    for row in rows:
        if row["quantity"] == "reward:clip" or row["prompt_id"] == 0:
            row["spread"] = row["yardstick"] = math.nan
    write_table(path, ENTROPY_PROFILE, rows)
    found = measured_spread(path, {"verifier": 1.0, "clip": 1.0})
    # of both prompts 1 * entropy / 2 on average, of the second alone 1.5
    assert [s.value for s in found] == pytest.approx([1.5 * s.value for s in whole])


def test_automatic_threshold_is_the_least_entropy_with_enough_spread(tmp_path: Path) -> None:
    run = auto(**{"method.spread_factor": 1.1})
    path = a_profile(tmp_path / "p.parquet", run, {"verifier": 0.5})
    plan = plan_of(run, training_sigmas(run), measured_spread(path, run.train.rewards))
    wanted = min(
        s.entropy["exp_per_dim"]
        for s in measured_spread(path, {"verifier": 1.0})
        if s.entropy["exp_per_dim"] > 2.2
    )
    assert plan.threshold is not None
    assert wanted - 1e-4 < plan.threshold <= wanted
    with pytest.raises(UserError, match=r"run auto: method\.threshold: auto .* need the measured"):
        plan_of(run, training_sigmas(run))
    hard, spreads = auto(**{"method.spread_factor": 50.0}), measured_spread(path, {"verifier": 1.0})
    with pytest.raises(UserError, match=r"lower method\.spread_factor"):
        plan_of(hard, training_sigmas(run), spreads)


def test_samples_follow_measured_spread(tmp_path: Path) -> None:
    run = small_run(
        "alloc", **{"method.allocation": "profile", "method.active": 8, "method.group_size": 9}
    )
    flat = [Spread(i, 1, {"exp_per_dim": 1.0}, 1.0 + (i == 0)) for i in range(8)]
    plan = plan_of(run, training_sigmas(run), flat)
    assert plan.samples is not None
    assert sum(plan.samples) == 9 * 8
    assert min(plan.samples) >= 2
    assert plan.samples[0] == max(plan.samples) > plan.samples[1]


def test_a_profile_is_enough_for_a_plan_at_the_command_line(tmp_path: Path) -> None:
    path = a_profile(tmp_path / "p.parquet", auto(), {"verifier": 0.5, "clip": 0.1})

    def egrpo(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "egrpo", "plan", "--profile", str(path), *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    wanted = ("--threshold", "auto", "--rewards", "verifier", "--factor", "1.1", "--json")
    made = json.loads(egrpo(*wanted).stdout)
    assert 2.2 < made["threshold"] < 2.4
    assert made["spans"][0] == 1 < made["spans"][-1]
    for words, message in (
        (("--threshold", "auto", "--rewards", "hps"), "--rewards:"),
        (("--threshold", "auto", "--factor", "99"), "no step's rewards spread more than 99"),
        (("--threshold", "much"), "--threshold: a number or auto is needed, got 'much'"),
    ):
        done = egrpo(*words)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
