"""Studies: arms and seeds, tables and figures as targets, snapshots, plans from a profile."""

from __future__ import annotations

import copy
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, small_run
from small_results import GRID, profile_rows
from test_cli import egrpo, refused
from test_config import BASE, Folder, cases

from egrpo.config.load import options_of
from egrpo.config.models import RunConfig
from egrpo.config.prompts import read_prompts
from egrpo.core.spread import Spread
from egrpo.errors import UserError
from egrpo.planning.grids import training_sigmas
from egrpo.planning.plan import measured_spread
from egrpo.planning.trees import (
    check_trees,
    iteration_cost,
    plan_of,
    prompt_ids,
    run_cost,
    tree_of,
)
from egrpo.store.files import read_json, write_json
from egrpo.store.tables import ENTROPY_PROFILE, read_table, write_table
from egrpo.study import files as load
from egrpo.study.due import Due
from egrpo.study.layout import Layout
from egrpo.study.orders import order_of_target, read_order
from egrpo.study.resolve import load_study

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


CURVES = {"kind": "curves", "caption": "c", "arms": ["a"], "rewards": ["jpeg"]}
BELOW: dict[str, Any] = {
    "seeds": [0, 7],
    "default_runs": ["a-s0"],
    "model": {"path": "own/er", "revision": "abc", "lora": {"rank": 3}},
    "rewards": {
        **BASE["rewards"],
        "own": {"kind": "custom", "function": "json:dumps", "options": {"a": 1, "b": 2}},
        "hub": {"kind": "pickscore", "path": "own/er", "revision": "abc", "divide_by": 2.0},
    },
    "train": {**TRAIN, "bounds": {"diversity": {"least": 0.1}}},
    "tables": {"t": TABLE},
    "figures": {"f": CURVES},
}
LAID = """
train: {rewards: {jpeg: 1.0}} -> train.rewards: {jpeg: 1.0}
train: {rewards: {verifier: null, jpeg: 1.0}} -> train.rewards: {jpeg: 1.0}
train: {iterations: 5} -> train.rewards: {verifier: 1.0}
train: {bounds: {diversity: {most: 0.5}}} -> train.bounds.diversity.least: 0.1
train: {bounds: {distance_to_base: {most: 0.2}}} -> train.bounds.diversity.least: 0.1
train: {bounds: {distance_to_base: {most: 0.2}}} -> train.bounds.distance_to_base.most: 0.2
rewards: {new: {kind: verifier}} -> rewards.own.options: {a: 1, b: 2}
rewards: {new: {kind: verifier}} -> rewards.new.kind: verifier
rewards: {hub: null} -> rewards.hub: null
rewards: {own: {options: {b: 3}}} -> rewards.own.options: {a: 1, b: 3}
rewards: {own: {function: "json:loads"}} -> rewards.own.options: {}
rewards: {own: {kind: verifier}} -> rewards.own: {kind: verifier}
rewards: {hub: {divide_by: 3.0}} -> rewards.hub.revision: abc
rewards: {hub: {path: an/other}} -> rewards.hub.revision: null
rewards: {hub: {path: an/other}} -> rewards.hub.divide_by: 2.0
model: {path: an/other} -> model.revision: null
model: {path: an/other} -> model.lora.rank: 3
tables: {t: {sections: {mine: [b]}}} -> tables.t.sections: {mine: [b]}
tables: {u: {caption: x, sections: {s: [a]}, rewards: [jpeg]}} -> tables.t.caption: x
tables: {u: {caption: x, sections: {s: [a]}, rewards: [jpeg]}} -> tables.u.rewards: [jpeg]
tables: {t: null} -> tables: {}
figures: {f: {arms: [b]}} -> figures.f.rewards: [jpeg]
figures: {f: {kind: images, caption: i, arms: [b]}} -> figures.f.rewards: []
{seeds: null, default_runs: null} -> runs: [a, b]
"""


@pytest.mark.parametrize(("top", "wanted"), cases(LAID))
def test_choices_are_replaced_definitions_merged_and_null_takes_away(
    study: Folder, top: str, wanted: str
) -> None:
    study.load(TWO, **BELOW)
    made = study.over(top)
    found: Any = next(iter(made.runs.values())).model_dump() | {"runs": list(made.runs)}
    for name in ("tables", "figures"):
        found[name] = {key: spec.model_dump() for key, spec in getattr(made, name).items()}
    ((where, value),) = yaml.safe_load(wanted).items()
    for key in where.split("."):
        found = found.get(key)
    assert found == value


def test_a_figure_of_another_kind_keeps_no_caption(study: Folder) -> None:
    study.load(TWO, **BELOW)
    with pytest.raises(UserError, match=r"figures\.f\.caption: is missing"):
        study.over("figures: {f: {kind: images}}")


@pytest.mark.parametrize(
    ("columns", "cells", "wanted"),
    [
        ("train.rewards", "{jpeg: 1.0}", {"jpeg": 1.0}),
        ("train", "{rewards: {jpeg: 1.0}}", {"jpeg": 1.0}),
        ("train.rewards.jpeg", "0.5", {"verifier": 1.0, "jpeg": 0.5}),
        ("train.rewards.jpeg\ttrain.rewards.verifier", "0.5\tnull", {"jpeg": 0.5}),
        ("train.iterations\ttrain.rewards.jpeg", "5\t", {"verifier": 1.0}),
    ],
)
def test_a_cell_replaces_what_is_trained_and_a_dotted_column_sets_one(
    study: Folder, columns: str, cells: str, wanted: dict[str, float]
) -> None:
    assert study.run(f"run\t{columns}\na\t{cells}\n").train.rewards == wanted


def test_columns_of_one_reward_are_one_definition(study: Folder) -> None:
    table = "run\trewards.jpeg.path\trewards.jpeg.kind\na\tx.pt\tclip\n"
    jpeg = study.run(table).rewards["jpeg"]
    assert (jpeg.kind, jpeg.files) == ("clip", {"path": "x.pt"})


def test_the_documented_reward_is_what_is_trained_on(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/your_own.md").read_text(), re.DOTALL)
    (mine,) = (block for block in blocks if "my_rewards:redness" in block)
    (tmp_path / "mine.yaml").write_text(mine)
    made = load_study(ROOT / "config/config.yaml", tmp_path / "mine.yaml")
    assert made.runs["egrpo-s0"].train.rewards == {"red": 1.0}
    assert made.runs["egrpo_clip-s0"].train.rewards == {"red": 1.0, "clip": 1.0}


SD35 = "config/presets/sd35_medium_pickscore.yaml"


@pytest.mark.parametrize(
    ("files", "trained"),
    [
        ([], "verifier"),
        (["config/my_model.yaml"], "jpeg"),
        (["config/presets/flux_dev_hps.yaml"], "hps"),
        ([SD35], "pickscore"),
        ([SD35, "config/presets/sd35_medium_ocr.yaml"], "ocr"),
    ],
)
def test_what_the_studies_of_the_repository_train_on(files: list[str], trained: str) -> None:
    runs = load_study("config/config.yaml", *files).runs
    assert runs["egrpo-s0"].train.rewards == {trained: 1.0}
    assert runs["egrpo_clip-s0"].train.rewards == {trained: 1.0, "clip": 1.0}


OPTIONS = [  # a word of snakemake's --config, and what it says
    ("seeds=[0]", [0]),
    ("seeds=[0, 7]", [0, 7]),
    ('train={"iterations": 5}', {"iterations": 5}),
    ("train={iterations: 5, clip_range: 1e-4}", {"iterations": 5, "clip_range": 1e-4}),
    ('train={"rewards": {"own": 0.5, "jpeg": null}}', {"rewards": {"own": 0.5, "jpeg": None}}),
    ("tracking={enabled: false, uri: null}", {"enabled": False, "uri": None}),
    ("profile={shown: [[2, 1], [3, 1]]}", {"shown": [[2, 1], [3, 1]]}),
    ('tables={t: {caption: "a # of [two]"}}', {"t": {"caption": "a # of [two]"}}),
    ('model={"path": "/data/a b", "revision": "0c1"}', {"path": "/data/a b", "revision": "0c1"}),
    ('rewards={own: {function: "a.b:c"}}', {"own": {"function": "a.b:c"}}),
    ("results=/tmp/x", "/tmp/x"),
    ("results=./x-1.5", "./x-1.5"),
    ("study=v1.2.3", "v1.2.3"),
    ("study=1e4", 1e4),  # as in a file, where a text needs quotes
    ("seed=3", 3),
    ("default_runs=null", None),
    ("default_runs=", None),
    ("tables={}", {}),
]


@pytest.mark.parametrize(("word", "wanted"), OPTIONS)
def test_options_of_snakemake_say_what_they_say_in_a_file(word: str, wanted: Any) -> None:
    from snakemake.cli import parse_config
    from snakemake.common import dict_to_key_value_args

    given = parse_config([word])
    for_jobs = parse_config(dict_to_key_value_args(given, quote_str=False, repr_obj=True))
    for parsed in (given, for_jobs):
        ((key, value),) = options_of(parsed).items()
        assert key == word.partition("=")[0]
        assert repr(value) == repr(wanted)  # 5 is not 5.0, at any depth


def test_options_lie_over_the_files_and_texts_of_files_stay(study: Folder) -> None:
    study.load(TWO, train={"rewards": {"verifier": 1.0, "jpeg": 1.0}, "iterations": 7})
    given = {"train": {"rewards": {"jpeg": "2"}}, "seeds": ["4"]}
    made = load_study(study.yaml, options=given)
    run = made.runs["a-s4"]
    assert (run.train.rewards, run.train.iterations, run.seed) == ({"jpeg": 2.0}, 7, 4)
    with pytest.raises(UserError, match=r"train\.iterations: .* valid integer, got '5'"):
        study.over('train: {iterations: "5"}', options={"seeds": ["4"]})


REFUSED_OPTIONS = """
{iterations: 5} -> study.yaml, --config: iterations: .* did you mean `train.iterations`
{trian: {iterations: "5"}} -> study.yaml, --config: trian: .* did you mean `train`
{train: {iterations: "010"}} -> --config train.iterations: cannot read '010': 010 would
{seeds: ["1:30"]} -> --config seeds.0: cannot read '1:30': 1:30 would be read as another
{study: "2026-13-45"} -> --config study: cannot read '2026-13-45': month must be in
{seeds: "<<"} -> --config seeds: cannot read '<<'
"""


@pytest.mark.parametrize(("given", "message"), cases(REFUSED_OPTIONS))
def test_options_that_are_refused(study: Folder, given: str, message: str) -> None:
    study.load(TWO)
    with pytest.raises(UserError, match=message) as caught:
        load_study(study.yaml, options=yaml.safe_load(given))
    assert "\n" not in str(caught.value)


def test_a_prompt_file_is_read_once_however_many_runs_name_it(
    study: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(path: str, column: str) -> Any:
        read.append(Path(path).name)
        return read_prompts(path, column)

    monkeypatch.setattr(load, "read_prompts", counted)
    (tmp_path / "p.csv").write_text("caption\na cat\n")
    (tmp_path / "q.parquet").write_text("x")
    files = {"train": str(tmp_path / "p.csv"), "heldout": str(tmp_path / "q.parquet")}
    made = study.load(TWO, seeds=[0, 1, 2], prompts=files)
    found = [p.replace(f"{tmp_path}/", "") for p in load.file_problems(made, "study.yaml")]
    assert read == ["p.csv", "q.parquet"]
    train, heldout = (p for p in found if "prompts" in p)
    assert train == (
        "study.yaml: prompts.train: p.csv, line 1: no column 'prompt'; there are 'caption': "
        "name one in prompts.column (run a-s0)"
    )
    assert heldout.startswith("study.yaml: prompts.heldout: q.parquet: .parquet is not read as a")


def test_tables_at_equal_evaluations_ask_their_arms_for_snapshots(study: Folder) -> None:
    tables = {
        "one": {**TABLE, "evaluations": 20000},
        "two": {**TABLE, "sections": {"s": ["a"]}, "evaluations": 9000},
        "three": TABLE,
    }
    runs = study.load(TWO, tables=tables, train={**TRAIN, "snapshots": [9]}).runs
    assert runs["a"].train.snapshots == [9, 9000, 20000]
    assert runs["b"].train.snapshots == [9, 20000]
    assert study.load(TWO).runs["a"].train.snapshots == []


def test_cheapest_is_what_the_cheapest_arm_spends(study: Folder) -> None:
    made = study.load(TWO, tables={"t": {**TABLE, "evaluations": "cheapest"}})
    flow = 300 * 8 * (240 + 216 + 216)  # forward, train, reference, at the papers' settings
    assert made.tables["t"].evaluations == flow
    assert made.runs["a"].train.snapshots == [flow]
    said = study.load(TWO, tables={"t": {**TABLE, "evaluations": 8000}}).refused["t"]
    assert "tables.t.evaluations: 8000 is less than one iteration of arm 'a' (8096)" in said
    assert "give more, or null" in said


def test_a_trial_of_some_iterations_needs_no_change_of_tables(study: Folder) -> None:
    """Where the cheapest arm ends before another's first iteration, nothing is equal to compare."""
    tables = {"t": {**TABLE, "evaluations": "cheapest"}}
    made = study.load(TWO, tables=tables, train={**TRAIN, "iterations": 1})
    assert made.tables["t"].evaluations is None
    assert made.tables["t"].caption == (
        "x Compared at the end only: cheapest, 5376 is less than one iteration of arm 'a' (8096)."
    )
    assert made.runs["a"].train.snapshots == []


def test_a_cell_may_leave_a_reward_out(study: Folder) -> None:
    both = {"rewards": {"verifier": 1.0, "jpeg": 0.5}}
    table = "run\ttrain.rewards.verifier\na\tnull\nb\t\n"
    runs = study.load(table, train=both).runs
    assert runs["a"].train.rewards == {"jpeg": 0.5}
    assert runs["b"].train.rewards == both["rewards"]
    said = study.refusal(table.replace("null", "0.0"), train=both)
    assert "has weight 0 and trains nothing" in said


WHEN_ASKED = """
figures.f: {kind: spread, arms: [b]} -> figures.f.arms: spread shows a profile, and arm 'b' (flow
figures.f: {kind: threshold, arms: [a]} -> the threshold of arm 'a' is not auto
figures.f: {kind: entropy, arms: [a], spans: [5]} -> figures.f.spans: 5 is not in profile.spans
figures.f: {kind: branches, arms: [a], pairs: [[1, 1]]} -> figures.f.pairs: [1, 1] is not in prof
figures.f: {kind: curves, arms: []} -> no arm is given
figures.f: {kind: curves, arms: [z]} -> figures.f.arms: no arm 'z'
tables.u: {sections: {s: [A]}} -> tables.u.sections: no arm 'A'
tables.u: {rewards: [hps]} -> tables.u.rewards: no reward 'hps'
paper: [tt] -> did you mean 't'?
"""
AT_ONCE = """
figures.f: {kind: pie, arms: [a]} -> figures.f.kind: Input should be 'branches'
figures.t: {kind: curves, arms: [a]} -> figures.t: a table has that name
tables.paper_runs: {} -> 'paper_runs' cannot be a target
tables.track: {} -> 'track' cannot be a target
tables.plan: {} -> 'plan' cannot be a target
tables.../x: {} -> '../x' cannot be a target
tables.small_runs: {} -> 'small_runs' cannot be a target
tables.u: {sections: null} -> tables.u.sections: is missing
methods.egrpo: {threshold: high} -> methods.egrpo.threshold: Input should be
train.bounds: {distance_to_base: {collapse: 1.0}} -> train.bounds: distance_to_base begins at 0 and
train.bounds: {diversity: {action: stop}} -> least, most, fall or collapse: one of them is needed
train.monitor_samples: 1 -> train.bounds: diversity needs train.monitor_samples
seeds: [] -> seeds: distinct numbers of at least 0
seeds: [1, 1] -> seeds: distinct numbers of at least 0
default_runs: [c] -> default_runs: no run 'c'
"""


@pytest.mark.parametrize(
    ("settings", "message", "at_once"),
    [*((*c, True) for c in cases(AT_ONCE)), *((*c, False) for c in cases(WHEN_ASKED))],
)
def test_refusals_name_the_study_and_the_key(
    study: Folder, settings: str, message: str, at_once: bool
) -> None:
    """What nobody may have asked for is refused when somebody does, and blocks nothing else."""
    ((key, value),) = yaml.safe_load(settings).items()
    section, _, name = key.partition(".")
    tree = copy.deepcopy(BELOW) | {"methods": {}}
    if section == "tables":
        value = {k: v for k, v in {**TABLE, **value}.items() if v is not None}
    elif section == "figures":
        value = {"caption": "x", **value}
    within, key = (tree[section], name) if name else (tree, section)
    within[key] = value
    if at_once:
        said = study.refusal(TWO, **tree)
    else:
        made = study.load(TWO, **tree)
        said = made.refused[name or key].replace(f"{study.yaml.parent}/", "")
        assert name not in {**made.tables, **made.figures}
        assert made.tables["t"], "others stay"
    assert said.startswith("study.yaml: ")
    assert message in said


def test_a_sweep_is_a_study_of_its_own(study: Folder) -> None:
    """Every combination is an arm; what is told of the runs table is refused when asked for."""
    names, thresholds = ["egrpo", "egrpo_efficient"], [1.8, 2.2]
    grid = {"method.name": names, "method.threshold": thresholds}
    made = study.load(TWO, sweep={**grid, "seed": [3, 5]}, default_runs=["a"], tables={"t": TABLE})
    arms = [f"{name}_threshold{t}" for name in names for t in thresholds]
    assert list(made.runs) == [f"{arm}-s{seed}" for arm in arms for seed in (3, 5)]
    assert made.runs["egrpo_efficient_threshold2.2-s5"].method.threshold == 2.2
    assert made.default_runs == tuple(made.runs)
    assert made.tables["sweep"].sections == {"sweep": arms}
    assert made.figures["sweep_curves"].arms == arms
    assert "no arm 'a'" in made.refused["t"]
    due = Due(Layout(made), always=True)
    assert due.names("comparison") == ["sweep", "sweep_curves"]
    assert study.refusal(sweep={"method.treshold": [1]}).startswith(
        "sweep, run 'treshold1': method"
    )
    for values in ([], [1, 1]):
        assert "sweep.seed: expected a list of different" in study.refusal(sweep={"seed": values})


def test_a_seed_is_given_once(study: Folder) -> None:
    said = study.refusal("run\tseed\na\t3\n", seeds=[0])
    assert said.startswith("runs.tsv: run 'a', column seed:")


def test_settings_survive_the_order_of_a_job(study: Folder, tmp_path: Path) -> None:
    made = replace(study.load(TWO, tables={"t": TABLE}), results=str(tmp_path))
    at = Layout(made, lambda stage, run: f"{stage} of {run}")
    path = order_of_target(at, "table-t", list(made.runs), {"targets": ["t"]})
    order = read_order(path)
    assert order.at.study.tables == made.tables
    assert order.at.study.runs == made.runs
    assert order.at.identity("train", "b") == "train of b"
    told = read_json(path)
    del told["tables"]["t"]["sections"]
    write_json(path, told)
    with pytest.raises(UserError, match=r"table-t-.*: damaged order of a job .*sections"):
        read_order(path)


def test_more_optimizer_steps_than_the_tree_has_parts() -> None:
    run = small_run("many", **{"train.updates": 9})
    with pytest.raises(UserError, match=r"run many: train\.updates: .* into 3 parts only, not 9"):
        check_trees({"many": run})
    check_trees({"few": small_run("few", **{"train.updates": 3})})


def test_a_trained_step_has_noise() -> None:
    cps = {"method.name": "flow_grpo", "method.dynamics": "cps"}
    with pytest.raises(UserError, match=r"run last: method\.dynamics: cps adds no noise"):
        check_trees({"last": small_run("last", **cps, **{"method.trained_fraction": 1.0})})
    check_trees({"others": small_run("others", **cps)})


@pytest.mark.parametrize("method", ["flow_grpo_fast", "dancegrpo", "mixgrpo"])
def test_predicted_cost_of_a_run_sums_its_iterations(method: str) -> None:
    run = small_run("x", **{"method.name": method, "train.iterations": 30})
    whole, images = run_cost(run, None, 50)
    leaves = len(tree_of(run, None, 1, 0).leaves)
    assert images == 30 * run.train.prompts_per_iteration * leaves
    each = [iteration_cost(run, None, n, 50).total for n in range(1, 31)]
    assert whole.total == sum(each) > 0
    other, _ = run_cost(run.model_copy(update={"seed": 1}), None, 50)
    assert (whole == other) == (method != "flow_grpo_fast"), "random windows cost differently"


def test_prompts_of_an_epoch() -> None:
    run = small_run("x", **{"train.prompts_per_iteration": 3})
    epoch = [i for n in range(1, 4) for i in prompt_ids(run, n, 10)]
    assert len(set(epoch)) == 9
    assert prompt_ids(run, 1, 10) != prompt_ids(run, 4, 10)


def a_profile(path: Path, run: RunConfig, spread: dict[str, float]) -> Path:
    """A profile whose spread grows with entropy: spread[reward] * entropy; the yardstick is 1."""

    def found(step: int, span: int, prompt: int, entropy: float) -> Any:
        scale = entropy * (0.5 + prompt)
        return {f"reward:{name}": (factor * scale, 1.0) for name, factor in spread.items()}

    assert training_sigmas(run) == GRID
    head = {"sigmas": json.dumps(GRID), "dynamics": "flow_sde", "noise_level": "0.7"}
    write_table(path, ENTROPY_PROFILE, profile_rows((1, 2, 4), 2, found, 15), metadata=head)
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
    spreads = measured_spread(path, {"verifier": 1.0})
    wanted = min(e for s in spreads if (e := s.entropy["exp_per_dim"]) > 2.2)
    assert plan.threshold is not None
    assert wanted - 1e-4 < plan.threshold <= wanted
    with pytest.raises(UserError, match=r"run auto: method\.threshold: auto .* need the measured"):
        plan_of(run, training_sigmas(run))
    with pytest.raises(UserError, match=r"lower method\.spread_factor"):
        plan_of(auto(**{"method.spread_factor": 50.0}), training_sigmas(run), spreads)


def test_samples_follow_measured_spread(tmp_path: Path) -> None:
    method = {"method.allocation": "profile", "method.active": 8, "method.group_size": 9}
    run = small_run("alloc", **method)
    flat = [Spread(i, 1, {"exp_per_dim": 1.0}, 1.0 + (i == 0)) for i in range(8)]
    plan = plan_of(run, training_sigmas(run), flat)
    assert plan.samples is not None
    assert sum(plan.samples) == 9 * 8
    assert min(plan.samples) >= 2
    assert plan.samples[0] == max(plan.samples) > plan.samples[1]


def test_a_profile_is_enough_for_a_plan_at_the_command_line(tmp_path: Path) -> None:
    path = a_profile(tmp_path / "p.parquet", auto(), {"verifier": 0.5, "clip": 0.1})

    wanted = ("--threshold", "auto", "--rewards", "verifier", "--factor", "1.1", "--json")
    made = json.loads(egrpo("plan", "--profile", path, *wanted).stdout)
    assert 2.2 < made["threshold"] < 2.4
    assert made["spans"][0] == 1 < made["spans"][-1]
    for words, message in (
        (("--threshold", "auto", "--rewards", "hps"), "--rewards:"),
        (("--threshold", "auto", "--factor", "99"), "no step's rewards spread more than 99"),
        (("--threshold", "much"), "--threshold: a number or auto is needed, got 'much'"),
    ):
        done = egrpo("plan", "--profile", path, *words)
        refused(done, message)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
