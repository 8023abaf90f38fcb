"""Settings: what wins, what is refused and how it is said, and what names what."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from egrpo.config.keys import digest, evaluation_key, run_key
from egrpo.config.load import load_run, put
from egrpo.config.models import RunConfig
from egrpo.config.prompts import train_prompts
from egrpo.errors import UserError
from egrpo.methods.egrpo import Egrpo
from egrpo.methods.flow_grpo import FlowGrpo
from egrpo.planning.grids import learning_rate, training_sigmas
from egrpo.study.resolve import Study, load_study

BASE: dict[str, Any] = {
    "results": "results",
    "model": {"path": "assets/tiny"},
    "prompts": {"train": "train.txt", "heldout": "heldout.txt"},
    "rewards": {"verifier": {"kind": "verifier"}, "jpeg": {"kind": "jpeg_compressibility"}},
    "train": {"rewards": {"verifier": 1.0}},
}
ONE_RUN = "run\nfirst\n"


class Folder:
    """A study's two files in a temporary folder."""

    def __init__(self, path: Path) -> None:
        self.yaml, self.table = path / "study.yaml", path / "runs.tsv"

    def load(self, table: str = ONE_RUN, **settings: Any) -> Study:
        data = {**BASE, "runs": str(self.table), **settings}
        self.yaml.write_text(yaml.safe_dump(data), encoding="utf-8")
        self.table.write_text(table, encoding="utf-8")
        return load_study(self.yaml)

    def over(self, top: str, **given: Any) -> Study:
        """The study as it was written last, with a file over it."""
        path = self.yaml.with_name("top.yaml")
        path.write_text(top)
        return load_study(self.yaml, path, **given)

    def run(self, table: str = ONE_RUN, **settings: Any) -> RunConfig:
        (run,) = self.load(table, **settings).runs.values()
        return run

    def refusal(self, table: str = ONE_RUN, **settings: Any) -> str:
        """The message, checked to be one line; file names are cut to their last part."""
        with pytest.raises(UserError) as caught:
            self.load(table, **settings)
        text = str(caught.value)
        assert "\n" not in text
        assert text.strip() == text
        return text.replace(f"{self.yaml.parent}/", "")


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def train(**settings: Any) -> dict[str, Any]:
    return {**BASE["train"], **settings}


def test_row_wins_over_study_over_recipe_over_default(study):
    table = (
        "run\tmethod.name\ttrain.learning_rate_lora\tadvantage.eps\n"
        "plain\t\t\t\n"
        "flow\tflow_grpo\t\t\n"
        "own\tflow_grpo\t0.5\t0.25\n"
    )
    runs = study.load(table).runs
    assert [r.train.learning_rate_lora for r in runs.values()] == [6e-5, 3e-4, 0.5]
    assert [r.advantage.eps for r in runs.values()] == [1e-8, 1e-4, 0.25]
    assert [r.train.kl_weight for r in runs.values()] == [0.0, 0.04, 0.04]
    shared = study.load(table, train=train(learning_rate_lora=0.125)).runs
    assert [r.train.learning_rate_lora for r in shared.values()] == [0.125, 0.125, 0.5]
    assert [r.train.kl_weight for r in shared.values()] == [0.0, 0.04, 0.04]


def test_methods_section_applies_to_runs_of_that_method_below_the_row(study):
    table = "run\tmethod.name\tmethod.group_size\na\tegrpo\t\nb\tegrpo\t3\nc\tflow_grpo\t\n"
    runs = study.load(table, methods={"egrpo": {"group_size": 7, "threshold": 1.8}}).runs
    assert [r.method.group_size for r in runs.values()] == [7, 3, 24]
    assert isinstance(runs["a"].method, Egrpo)
    assert runs["a"].method.threshold == 1.8
    assert isinstance(runs["c"].method, FlowGrpo)
    assert runs["c"].method.steps == 10


def test_defaults_are_those_of_the_paper(study):
    run = study.run()
    assert isinstance(run.method, Egrpo)
    assert (run.method.steps, run.schedule.shift, run.method.noise_level) == (16, 3.0, 0.7)
    assert (run.method.threshold, run.method.group_size) == (2.2, 12)
    assert run.method.active_steps == list(range(8))
    assert (run.train.clip_range, run.train.iterations, run.train.weight_decay) == (1e-4, 300, 1e-4)
    assert run.train.learning_rate_full == 2e-6
    assert run.train.kl_weight == 0.0
    assert (run.advantage.clamp, run.advantage.ddof, run.advantage.eps) == (5.0, 1, 1e-8)
    assert (run.model.tuning, learning_rate(run)) == ("lora", 6e-5)
    full = study.run(model={"path": "x", "tuning": "full", "dtype": "float32"})
    assert learning_rate(full) == 2e-6


def test_exponents_without_a_point_are_numbers_everywhere(study):
    study.load("run\ttrain.weight_decay\nfirst\t5e-2\n")
    run = study.over("train: {clip_range: 2e-4, rewards: {verifier: 1E0}}").runs["first"]
    assert (run.train.clip_range, run.train.weight_decay) == (2e-4, 0.05)
    assert run.train.rewards == {"verifier": 1.0}


def test_empty_cells_comments_and_short_lines_override_nothing(study):
    table = "# runs\nrun\tseed\tmethod.threshold\n\na\t\t1.8\nb\t3\n# off\t9\t9\nc\t \t\n"
    runs = study.load(table).runs
    assert [(r.seed, r.method.threshold) for r in runs.values()] == [(0, 1.8), (3, 2.2), (0, 2.2)]
    assert list(runs) == ["a", "b", "c"]


def test_cells_are_yaml(study):
    head = "run\tmethod.active\tevaluate.prompts\ttracking.enabled"
    run = study.run(f"{head}\nx\t[0, 2, 5]\tnull\tfalse\n", evaluate={"prompts": 4})
    assert run.method.active_steps == [0, 2, 5]
    assert run.evaluate.prompts is None
    assert run.tracking.enabled is False


def test_settings_are_frozen(study):
    run = study.run()
    with pytest.raises(ValueError, match="frozen"):
        run.seed = 3


# --- what is refused, and how ---------------------------------------------------------------------

REFUSED_IN_STUDY = r"""
train.clip_rnge: 1 -> train.clip_rnge: unknown setting; did you mean `clip_range`?
trian: {} -> trian: unknown setting; did you mean `train`?
model.lora.rnk: 4 -> model.lora.rnk: unknown setting; did you mean `rank`?
rewards.verifier.pth: x -> rewards.verifier.pth: unknown setting; known here: kind
methods.egrpo.treshold: 2 -> methods.egrpo.treshold: unknown setting; did you mean `threshold`?
methods.egrpo: null -> methods.egrpo: Input should be a valid dictionary
methods.ergpo: {} -> methods.ergpo: unknown method; known: egrpo
train.iterations: many -> train.iterations: Input should be a valid integer, got 'many'
train.iterations: true -> train.iterations: Input should be a valid integer, got True
train.iterations: 0 -> train.iterations: Input should be greater than or equal to 1, got 0
train.clip_range: .nan -> train.clip_range: Input should be a finite number
train: {rewrds: {}} -> train.rewrds: unknown setting; did you mean `rewards`? (and 1 more)
"1": 2 -> 1: unknown setting; known here: run, study
iterations: 5 -> iterations: unknown setting; did you mean `train.iterations`?
samples: 5 -> samples: unknown setting; did you mean `profile.samples` or `evaluate.sam
tabels: {} -> tabels: unknown setting; did you mean `tables`?
train: {} -> train.rewards: is missing
model: {} -> model.path: is missing
model: null -> model: Input should be a valid dictionary
train.rewards: {} -> train.rewards: at least one reward must be trained
train.rewards: {hps: 1.0} -> train.rewards: 'hps' is not defined under rewards (jpeg, verifier)
rewards.c: {kind: clip} -> rewards.c.path: is missing
methods.egrpo.group_size: 1 -> methods.egrpo.group_size: Input should be greater than or equal to 2
methods.egrpo.active: [3, 20] -> methods.egrpo.active: step 20 lies beyond the schedule; steps: 16
methods.egrpo.active: 16 -> methods.egrpo.active: step 15 lies beyond the schedule
methods.egrpo.active: [] -> methods.egrpo.active: no step branches
methods.egrpo.active: [3, 2] -> methods.egrpo.active: grid indices must be distinct, ascending
methods.egrpo.active: half -> methods.egrpo.active: Input should be a valid integer, got 'half'
methods.egrpo: {dynamics: cps, noise_level: 1.5, threshold: 0.0} -> methods.egrpo.noise_level: cps \
needs a value in (0, 1]
profile.spans: [30] -> profile.spans: 30 does not fit 16 steps
profile.spans: [0] -> profile.spans: distinct whole numbers
method: {name: egrpo} -> method: belongs in the runs table
run: x -> run: belongs in the runs table
runs: 3 -> runs: Input should be a valid string, got 3
results: "a{b}" -> results: 'a{b}' holds '{', which no file of a workflow's can have
results: a<logs> -> results: 'a<logs>' holds '<logs>', which no file
results: "a\nb" -> results: 'a\nb' holds '\n', which no file
results: "a\0b" -> results: 'a\x00b' holds a character that no file name
results: a?b -> results: 'a?b' holds '?', which MLflow cannot read
results: -a -> results: is no folder that a command can name
model.path: "a{b}" -> model.path: 'a{b}' holds '{'
prompts.train: "{a}.txt" -> prompts.train: '{a}.txt' holds '{'
rewards.c: {kind: clip, path: <a>.pt} -> rewards.c.path: '<a>.pt' holds '<a>'
"""


def cases(text: str) -> list[tuple[str, str]]:
    """Lines of ``settings -> message``."""
    lines = text.strip().replace("\\\n", "").split("\n")
    return [(left, right) for left, right in (line.split(" -> ") for line in lines)]


@pytest.mark.parametrize(("settings", "message"), cases(REFUSED_IN_STUDY))
def test_refusals_name_the_study_file_and_the_key(study, settings, message):
    ((key, value),) = yaml.safe_load(settings).items()
    tree = copy.deepcopy(BASE)
    put(tree, key, value)
    assert study.refusal(**tree).startswith(f"study.yaml: {message}")


REFUSED_CELLS = """
train.iteratons: 3 -> train.iteratons: unknown setting; did you mean `iterations`?
train.iterations: many -> train.iterations: Input should be a valid integer, got 'many'
method.group_size: 1 -> method.group_size: Input should be greater than or equal to 2, got 1
method.active: [0, 15] -> method.active: step 15 lies beyond the schedule; steps: 16
method.steps: 8 -> method.active: step 7 lies beyond the schedule; steps: 8
method.active: half -> method.active: Input should be a valid integer, got 'half'
train.rewards.hps: 1.0 -> train.rewards: 'hps' is not defined under rewards
profile.spans: [30] -> profile.spans: 30 does not fit 16 steps
method.dynamics: cps; method.threshold: 0.0; method.noise_level: 2 -> method.noise_level: cps needs
method.name: flow_grpo; method.threshold: 2 -> method.threshold: unknown setting
train: 3 -> train: Input should be a valid dictionary
method: 3 -> method:
seed.a: 3 -> seed: Input should be a valid integer
"""


@pytest.mark.parametrize(("cells", "message"), cases(REFUSED_CELLS))
def test_refusals_name_the_runs_table_the_run_and_the_column(study, cells, message):
    columns, values = zip(*(cell.split(": ") for cell in cells.split("; ")), strict=True)
    table = "\t".join(["run", *columns]) + "\n" + "\t".join(["x", *values]) + "\n"
    assert study.refusal(table).startswith(f"runs.tsv, run 'x': {message}")


REFUSED_TABLES = [
    ("run\tseed\t\nx\t3\t\n", ": a column has no name"),
    ("run\tmethod.name\nx\tegpro\n", ": run 'x', column method.name: unknown method 'egpro'; kno"),
    ("run\tmethod.name\nx\t[egrpo]\n", ": run 'x', column method.name: unknown method ['egrpo']"),
    ("run\tseed\nbad id\t3\n", ", run 'bad id': run: String should match pattern"),
    ("run\n../up\n", ", run '../up': run: String should match pattern"),
    ("run\tseed\n\t3\n", ", run '': run: String should match pattern"),
    ("run\tseed\nx\t[1,\n", ": run 'x', column seed: cannot read '[1,'"),
    ("run\tseed\nx\t2026-13-45\n", ": run 'x', column seed: cannot read '2026-13-45'"),
    ("run\tseed\nx\t1\nx\t2\n", ": run id 'x' occurs twice; ids must be unique"),
    ("run\tseed\nx\t1\t2\n", ": run 'x' has 3 cells, the header 2"),
    ("run\tseed\tseed\nx\t1\t2\n", ": a column is named twice"),
    ("run seed\nx 1\n", ": the first column must be `run` (columns are split by tabs)"),
    ("run\tseed\n", ": the runs table has no run"),
    ("# nothing\n", ": the runs table is empty"),
    ("run\tstudy\na\tone\nb\ttwo\n", ": column study: all runs of a table share one study"),
]


@pytest.mark.parametrize(("table", "message"), REFUSED_TABLES)
def test_refusals_name_the_runs_table_and_what_is_wrong_with_it(study, table, message):
    assert study.refusal(table).startswith(f"runs.tsv{message}")


def test_fault_of_the_study_is_not_blamed_on_an_innocent_row(study):
    table = "run\tmethod.name\tmethod.threshold\ttrain.iterations\nx\tegrpo\t1.8\t5\n"
    for settings, message in (
        ({"methods": {"egrpo": {"active": [20]}}}, "methods.egrpo.active: step 20"),
        ({"train": train(clip_range=-1)}, "train.clip_range"),
    ):
        assert study.refusal(table, **settings).startswith(f"study.yaml: {message}")


def test_method_is_named_in_one_place_only(study):
    message = "runs.tsv, run 'first': method.name is 'egrpo' but the settings of the method say"
    assert study.refusal(methods={"egrpo": {"name": "flow_grpo"}}).startswith(message)
    assert study.refusal("run\tmethod\nfirst\t{name: flow_grpo}\n").startswith(message)


def test_a_table_saved_by_a_spreadsheet_is_read(study):
    assert study.run("\ufeffrun\tseed\r\nfirst\t4\r\n").seed == 4


def test_row_may_repair_a_fault_of_the_study(study):
    table = "run\ttrain.iterations\nx\t5\n"
    assert study.run(table, train=train(iterations=0)).train.iterations == 5


def test_further_problems_are_counted(study):
    text = study.refusal(train=train(iterations=0, clip_range=-1))
    assert text.endswith("(and 1 more)")
    assert "more)" not in study.refusal(methods={"egrpo": {"active": "half"}})


def test_missing_files_are_named(study, tmp_path):
    for load in (load_study, load_run):
        with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
            load(tmp_path / "nowhere.yaml")
    assert "gone.tsv" in study.refusal(runs="gone.tsv")
    with pytest.raises(UserError, match="cannot be read"):
        load_study(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00model", "cannot be read"),
        ("model: [1,\n", "not valid YAML: .*line 2"),
        ("a: b: c\n", "not valid YAML: .*line 1"),
        ("- a\n- b\n", "expected settings as `key: value` lines"),
        ("", "expected settings as `key: value` lines"),
        ("just words\n", "expected settings as"),
        ("seed: 2026-13-45\n", "not valid YAML"),
    ],
)
def test_what_is_no_settings_file_is_refused_in_one_line(study, text, message):
    study.yaml.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"study\.yaml: {message}") as caught:
        load_study(study.yaml)
    assert "\n" not in str(caught.value)


def test_resolved_run_with_a_fault_is_refused_by_file_and_key(study, tmp_path):
    data = study.run().model_dump()
    data["train"]["iterations"] = -1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=r"config\.yaml: train\.iterations: .*, got -1"):
        load_run(path)


@pytest.mark.parametrize("method", ["egrpo", "flow_grpo"])
def test_resolved_run_survives_yaml(study, tmp_path, method):
    run = study.run(f"run\tmethod.name\tadvantage.eps\nx\t{method}\t1e-8\n")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run.model_dump()))
    again = load_run(path)
    assert again == run
    assert run_key(again) == run_key(run)


def test_digest_ignores_the_order_of_keys_and_nothing_else():
    turned = {"b": {"d": [3, 4], "c": 2}, "a": 1}
    assert digest({"a": 1, "b": {"c": 2, "d": [3, 4]}}) == digest(turned)
    values: list[Any] = [{"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]}, {}]
    assert len({digest(v) for v in values}) == len(values)
    assert all(len(digest(v)) == 10 and int(digest(v), 16) >= 0 for v in values)


def test_keys_do_not_depend_on_the_order_of_the_files(study):
    first = study.run(rewards=BASE["rewards"])
    turned = study.run(rewards=dict(reversed(BASE["rewards"].items())))
    assert run_key(first) == run_key(turned)
    assert evaluation_key(first) == evaluation_key(turned)


def test_methods_that_sample_on_another_grid_have_profiles_of_their_own(study):
    arms = [(name, family) for name in ("g2rpo", "tempflow_grpo") for family in ("sd3", "flux")]
    rows = "".join(f"{name}-{family}\t{name}\t{family}\n" for name, family in arms)
    methods = {"tempflow_grpo": {"steps": 16}}
    runs = study.load(f"run\tmethod.name\tmodel.family\n{rows}", methods=methods).runs
    grids = {name: training_sigmas(run) for name, run in runs.items()}
    assert grids["g2rpo-sd3"] != grids["tempflow_grpo-sd3"]
    assert grids["g2rpo-flux"] == grids["tempflow_grpo-flux"]
    assert len({evaluation_key(run) for run in runs.values()}) == 2


def test_limit_draws_the_same_prompts_once(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {n}\n" for n in range(50)))
    everything = [p.text for p in train_prompts(path, None)]
    some = [p.text for p in train_prompts(path, 10)]
    assert len(set(some)) == 10
    assert some == [text for text in everything if text in some]  # in the file's order
    assert some != everything[:10]
    assert some == [p.text for p in train_prompts(path, 10)]
    assert everything == [p.text for p in train_prompts(path, 50)]
