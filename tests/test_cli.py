"""The command line as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT, small_run

from egrpo.cli import main
from egrpo.errors import UserError
from egrpo.ops import timing
from egrpo.ops.rates import Rate, architecture, find_rate, read_rates, write_rates
from egrpo.study.layout import Layout
from egrpo.study.orders import order_of_run
from egrpo.study.resolve import Study


def egrpo(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command in this process; an error that it does not tell of is raised."""
    with chdir(cwd):
        done = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
    return subprocess.CompletedProcess(words, done.exit_code, done.stdout, done.stderr)


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit status not 0, one line on stderr with these parts."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("egrpo: ")]
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]


def test_plan_json_contract() -> None:
    words = "--steps 16 --shift 3 --noise-level 0.7 --threshold 2.2 --active 8 --json".split()
    command = [sys.executable, "-m", "egrpo", "plan", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
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
    cost = ["cost", *default_study, "--json"]
    for words in (["plan", "--json"], cost, [*cost, "--run", "egrpo-s0", "--card", "H200"]):
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
        ("plan --threshold 5 --on-unreachable error", ["step 7", "out of reach"]),
        ("plan --active 16", ["active step 15", "0..14"]),
        ("plan --active 0", ["--active"]),
        ("plan --measure bits", ["--measure", "exp_per_dim"]),
        ("plan --dynamics ode", ["--dynamics", "flow_sde"]),
        ("plan --on-unreachable maybe", ["on_unreachable", "cap"]),
        ("plan --steps 0", ["steps must be at least 1"]),
        ("plan --shift -1", ["--shift"]),
        ("plan --shift 1e-320", ["--shift"]),
        ("plan --noise-level 0", ["--noise-level"]),
        ("plan --noise-level nan", ["--noise-level"]),
        ("plan --threshold nan", ["--threshold"]),
        ("plan --dynamics cps", ["--threshold", "cps"]),
        ("cost absent.yaml", ["absent.yaml: no such file"]),
        ("report --config absent.yaml", ["absent.yaml: no such file"]),
    ],
)
def test_bad_input_is_one_line(words: str, parts: list[str]) -> None:
    refused(egrpo(*words.split()), *parts)


def test_unreachable_threshold_is_said_and_capped() -> None:
    done = egrpo("plan", "--threshold", "5.0", "--json")
    assert done.returncode == 0
    assert "step 7: threshold 5.0 (exp_per_dim) is out of reach, span capped at 8" in done.stderr
    assert json.loads(done.stdout)["spans"][-1] == 8


def test_cost_of_the_default_study(default_study: list[str]) -> None:
    costs = json.loads(egrpo("cost", *default_study, "--json").stdout)
    for run, known in {
        "egrpo-s0": (1004, 8),
        "egrpo-s2": (1004, 8),
        "dancegrpo-s0": (192, 108),
        "mixgrpo-s0": (300, 48),
        "flow_grpo-s0": (240, 216),
    }.items():
        assert (costs[run]["prompt"]["forward"], costs[run]["prompt"]["train"]) == known
    assert costs["egrpo-s0"]["run"]["total"] == 60 * 4 * (1004 + 8)
    assert costs["egrpo_auto-s0"] is None  # its profile is not measured
    text = egrpo("cost", *default_study).stdout  # the arms side by side
    (pruned,) = [ln for ln in text.splitlines() if ln.startswith("branchgrpo_pruned")]
    assert "<=" in pruned
    assert "egrpo-s1" not in text
    assert "of several seeds the first is shown" in text
    assert "needs its profile; `snakemake --cores all plans` makes it" in text


TOY = Rate("card A", "sd3-3x64", "", 32, 32, "float32", 0.5, 1.5, 2.0, "a test")


def test_rates_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rates.tsv"
    other = replace(TOY, card="card B", training_ms=None, decoding_ms=None)
    write_rates(path, [TOY, other])
    assert read_rates(path) == [TOY, other]
    faster = replace(TOY, sampling_ms=0.25)
    write_rates(path, [faster])
    assert read_rates(path) == [other, faster], "a new row takes the place of the old one"


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        ("card\t", "name\t", ["the first line must name the columns"]),
        ("\t0.5\t", "\t\t", ["line 2", "sampling_ms is needed"]),
        ("\t0.5\t", "\t-1\t", ["line 2", "above 0"]),
        ("\t0.5\t", "\tnan\t", ["line 2", "above 0"]),
        ("\t32\t32", "\t32\tx", ["line 2", "invalid literal"]),
        ("\ta test", "", ["line 2", "`egrpo measure` writes such a file again"]),
    ],
)
def test_a_damaged_table_of_rates_is_one_line(
    tmp_path: Path, before: str, after: str, parts: list[str]
) -> None:
    path = tmp_path / "rates.tsv"
    write_rates(path, [TOY])
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(UserError) as told:
        read_rates(path)
    for part in (str(path), *parts):
        assert part in str(told.value)


def test_the_shipped_rates_are_of_models_as_their_configs_say() -> None:
    import full_size

    rates = read_rates()
    assert len({rate.key for rate in rates}) == len(rates) >= 3
    known = {
        "stabilityai/stable-diffusion-3.5-medium": ("sd3", full_size.SD35_MEDIUM),
        "black-forest-labs/FLUX.1-dev": ("flux", full_size.FLUX_DEV),
    }
    for rate in rates:
        family, of = known[rate.name]
        assert rate.model == architecture(family, of.config)


def test_a_rate_is_found_by_shape_by_name_and_by_size() -> None:
    toy = small_run().model
    newer = replace(TOY, sampling_ms=0.25)
    assert find_rate([TOY, newer], toy)[0] == newer
    assert find_rate([replace(TOY, dtype="bfloat16"), replace(TOY, model="sd3-4x64")], toy) == (
        None,
        "no rate of sd3-3x64 in float32: `egrpo measure` on such a card makes one",
    )
    wide = toy.model_copy(update={"width": 64})
    rate, note = find_rate([replace(TOY, height=512), TOY, replace(TOY, height=8)], wide)
    assert rate == replace(TOY, width=64, sampling_ms=1.0, training_ms=3.0, decoding_ms=4.0)
    assert note == "sd3-3x64 in float32 at 32x64: the rate of 32x32, scaled by pixels"
    flux = replace(TOY, model="flux-57x3072", name="black-forest-labs/FLUX.1-dev")
    for path, there in (
        ("black-forest-labs/FLUX.1-dev", True),
        ("models/FLUX.1-dev", True),  # not downloaded yet
        ("models/FLUX.1-schnell", False),
    ):
        named = toy.model_copy(update={"path": path, "family": "flux"})
        assert (find_rate([TOY, flux], named)[0] == flux) == there


def test_hours_are_evaluations_times_rates(default_study: list[str], tmp_path: Path) -> None:
    write_rates(tmp_path / "results/laptop/rates.tsv", [TOY])
    names = ["egrpo-s0", "egrpo-s1", "flow_grpo-s0", "egrpo_auto-s0"]
    words = [word for name in names for word in ("--run", name)]
    costs = json.loads(egrpo("cost", *default_study, "--json", *words).stdout)
    assert list(costs) == [*names, "all runs"]
    egrpo_s, flow = (costs[name]["time"]["seconds_per_iteration"] for name in names[1:3])
    # of 4 prompts: 8 of the 1,004 evaluations in the batches of training, 96 images
    assert egrpo_s == pytest.approx(4 * (996 * 0.5 + 8 * 0.75 + 8 * 1.5 + 96 * 2.0) / 1000)
    # 24 of 240 by the sampler; 216 sampled, trained, and seen by the base model; 24 images
    assert flow == pytest.approx(4 * (24 * 0.5 + 216 * (0.75 + 1.5 + 0.75) + 24 * 2.0) / 1000)
    # monitors: before, and after each tenth iteration; 8 prompts, 4 samples, 50 steps
    monitors = 7 * 8 * 4 * (50 * 0.5 + 2.0) / 1000
    assert costs["egrpo-s0"]["time"]["hours"] == pytest.approx((60 * egrpo_s + monitors) / 3600)
    whole = costs["all runs"]
    assert whole["hours"] == pytest.approx((120 * egrpo_s + 60 * flow + 3 * monitors) / 3600)
    assert (whole["runs"], whole["without"]) == (3, ["egrpo_auto-s0"])
    text = egrpo("cost", *default_study, *words).stdout
    assert "s/iteration" in text
    assert f"runs together: 3, {whole['hours']:.3g} h on one card A; not counted: 1" in text


def test_hours_on_a_card_say_what_they_estimate(default_study: list[str], tmp_path: Path) -> None:
    rates = [replace(TOY, training_ms=None, decoding_ms=None), replace(TOY, card="card B")]
    write_rates(tmp_path / "results/laptop/rates.tsv", rates)
    words = ("cost", *default_study, "--run", "egrpo-s0")
    text = egrpo(*words, "--card", "card a").stdout
    refused(egrpo(*words, "--card", "card"), "several cards; known: card A; card B")
    refused(egrpo(*words, "--card", "T4"), "no rates of such a card; known: NVIDIA H200", "card A")
    refused(egrpo("cost", *default_study, "--run", "x"), "--run x: the study has no such run")
    assert "a forward and backward is taken as 2 sampling evaluations" in text
    assert "decoding of sd3-3x64 is not measured there, and left out" in text
    text = egrpo(*words, "--card", "h200").stdout
    assert "no rate of sd3-3x64 in float32" in text
    assert "runs together: 0, 0 h on one NVIDIA H200; not counted: 1" in text
    assert "card B" in egrpo(*words).stdout, "without --card: what was measured last"


def test_cost_of_a_preset_needs_neither_weights_nor_prompts(tmp_path: Path) -> None:
    preset = ["config/config.yaml", "config/presets/flux_dev_hps.yaml"]
    words = ["cost", *preset, "--card", "H200", "--target", "all"]
    done = egrpo(*words, "--price", "2.5", "--profile", "profiles/slurm")
    assert done.returncode == 0, done.stderr
    row, *_, money, time = done.stdout.splitlines()[1:]
    assert row.split()[:6] == ["egrpo-s0", "egrpo", "1,004", "8", "2,409,600", "19,200"]
    hours = float(row.split()[-1])
    assert f"runs together: 1, {hours:.0f} h on one NVIDIA H200, {2.5 * hours:.0f} at 2.5" in money
    assert "24 h a try and 4 tries are 96 h, too little for 1 of 1 runs" in time
    (tmp_path / "config.yaml").write_text("retries: 5\nset-resources: {train: {runtime: 2880}}\n")
    assert "are 288 h, enough" in egrpo(*words, "--profile", tmp_path).stdout
    (tmp_path / "config.yaml").write_text("retries: 5\n")
    refused(egrpo(*words, "--profile", tmp_path), "set-resources.train.runtime: expected minutes")
    refused(egrpo("cost", *preset[:1], "--price", "1"), "--price and --profile need hours")


def test_cost_of_a_target_is_that_of_its_runs(default_study: list[str]) -> None:
    def runs(*words: str) -> set[str]:
        return set(json.loads(egrpo("cost", *default_study, "--json", *words).stdout))

    assert runs("--target", "all") == {"egrpo-s0", "flow_grpo-s0"}
    arms = ("egrpo", "egrpo_span2", "egrpo_span4", "egrpo_span6")
    merged = {f"{arm}-s{seed}" for arm in arms for seed in range(3)}
    assert runs("--target", "table2") == merged
    assert runs("--target", "table2", "--run", "awm-s0") == {*merged, "awm-s0"}
    assert len(runs("--target", "paper")) == 72
    refused(egrpo("cost", *default_study, "--target", "fig1b"), "shows a profile, and trains noth")
    refused(egrpo("cost", *default_study, "--target", "x"), "--target x: there are all, paper, ev")


def test_measured_rates_are_kept_for_cost(
    default_study: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    words = [*default_study, "--run", "egrpo-s0", "--run", "flow_grpo-s1"]
    done = egrpo("measure", *words)
    assert done.returncode == 0, done.stderr
    (rate,) = read_rates(tmp_path / "results/laptop/rates.tsv")  # one model, one size: once
    assert (rate.model, rate.height, rate.width, rate.dtype) == ("sd3-3x64", 32, 32, "float32")
    assert None not in (rate.training_ms, rate.decoding_ms)
    assert "batches 96/16/96" in rate.source
    assert f"h on one {rate.card}" in egrpo("cost", *words).stdout
    gone = tmp_path / "gone.yaml"
    gone.write_text("model: {path: nowhere/to/be/found}\n")
    refused(egrpo("measure", *words[:2], gone), "model.path: nowhere/to/be/found: no such folder")


def test_a_job_reads_no_results_but_those_that_it_was_planned_for(tmp_path: Path) -> None:
    run = small_run().model_copy(update={"study": "small"})
    at = Layout(Study("small", str(tmp_path), {run.run: run}))
    order = order_of_run(at, run.run)
    refused(egrpo("make", "train", order), "holds no result of these settings (plan egrpo: wanted")
    refused(egrpo("make", "evaluate", order), "(train egrpo: wanted", "start the workflow again")
    profile = at.profile(run.run)
    refused(egrpo("make", "plan", order), f"{profile}: no such file")
    assert not at.run(run.run).exists()


def test_beginners_mistakes_are_answered(default_study: list[str], tmp_path: Path) -> None:
    """What is forgotten first: the study below an overlay, the project's folder, the run's seed."""
    below = "a file that is laid over another one? name that one before it"
    refused(egrpo("cost", "config/presets/flux_dev_hps.yaml"), "runs: is missing", below)
    refused(egrpo("cost", cwd=tmp_path), "config/config.yaml: no such file", "not the project's")
    refused(egrpo("export", "egrpo"), "did you mean egrpo-s0, egrpo-s1, egrpo-s2?")
    words = [word for path in default_study for word in ("--config", path)]
    remedy = f"`snakemake --cores all --configfile {' '.join(default_study)}`"
    for command in ("report", "ui"):
        refused(egrpo(command, *words), str(tmp_path / "results/laptop"), remedy)


def test_the_default_study_need_not_be_named(default_study: list[str]) -> None:
    assert egrpo("cost").stdout == egrpo("cost", default_study[0]).stdout != ""
