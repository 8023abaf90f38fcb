"""Jobs of a real run, one after the other as the workflow calls them: one writer, nothing lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, make_stages

from egrpo import jobs
from egrpo.config.load import overlay, put, read_yaml
from egrpo.errors import UserError
from egrpo.jobs import make
from egrpo.ops.status import keep, status
from egrpo.sampling.sample import Sampler
from egrpo.study.due import Due
from egrpo.study.layout import Layout
from egrpo.study.resolve import load_study
from egrpo.study.standing import want
from egrpo.train.trainer import Trainer

SMALL: dict[str, Any] = {
    "study": "small",
    "seeds": [0],
    "runs": "runs.tsv",
    "results": "results",
    "default_runs": ["one-s0"],
    "paper": [],
    "methods": {"flow_grpo": {"group_size": 3, "steps": 3}},
    "rewards": {"clip": None, "preference": None, "jpeg": None, "verifier_exact": None},
    "profile": {"prompts": 1, "samples": 2, "spans": [1], "shown": [[1, 1]]},
    "train": {"rewards": {"verifier": 1.0}, "iterations": 1, "prompts_per_iteration": 1},
    "evaluate": {"steps": 2, "samples": 2, "prompts": 3, "grid_prompts": 1},
    "tracking": {"enabled": False},
}


class Small:
    """A study of one run in a folder, and what its jobs do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = "one-s0"

    def set(self, key: str, value: Any) -> None:
        settings = read_yaml("study.yaml")
        put(settings, key, value)
        Path("study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))

    def plan(self) -> Layout:
        """What happens when the workflow begins: newer settings say what they want."""
        at = Layout(load_study("study.yaml"))
        want(at)
        return at

    def order(self, at: Layout, stage: str) -> Path:
        return Due(at).order(*Due(at).named(stage, self.run))

    def do(self, *stages: str) -> Layout:
        """Plan, then do the jobs of some stages."""
        at = self.plan()
        make_stages(at, self.run, *stages)
        return at

    def scores(self) -> dict[tuple[str, int, int], Any]:
        rows = pq.read_table(f"results/small/runs/{self.run}/scores.parquet").to_pylist()
        return {(r["reward"], r["prompt_id"], r["sample"]): r["value"] for r in rows}

    def images(self) -> dict[tuple[int, int], bytes]:
        rows = pq.read_table(f"results/small/runs/{self.run}/images.parquet").to_pylist()
        return {(r["prompt_id"], r["sample"]): r["png"] for r in rows}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("jobs") / "study"
    root.mkdir()
    (root / "assets").symlink_to(ROOT / "assets")
    shutil.copy(ROOT / "assets/toy/prompts/heldout.txt", root / "heldout.txt")
    (root / "runs.tsv").write_text("run\tmethod.name\none\tflow_grpo\n")
    shared = read_yaml(ROOT / "config/config.yaml") | {"tables": {}, "figures": {}, "methods": {}}
    settings = overlay(shared, SMALL)
    settings["prompts"]["heldout"] = "heldout.txt"
    settings["evaluate"]["prompts"] = None
    lines = (root / "heldout.txt").read_text().splitlines()[:3]
    (root / "heldout.txt").write_text("\n".join(lines) + "\n")
    (root / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Small(root).do("train", "evaluate")
    return root


@pytest.fixture
def small(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    shutil.copytree(evaluated, tmp_path / "study", symlinks=True)
    monkeypatch.chdir(tmp_path / "study")
    return Small(tmp_path / "study")


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Prompts that were sampled, call by call."""
    calls: list[list[int]] = []
    images = Sampler.images

    def counted(self: Sampler, ids: list[int], samples: int) -> Any:
        calls.append(list(ids))
        return images(self, ids, samples)

    monkeypatch.setattr(Sampler, "images", counted)
    return calls


def test_one_more_reward_is_scored_over_the_images_that_are_there(small, sampled):
    scores, images = small.scores(), small.images()
    small.set("rewards.jpeg", {"kind": "jpeg_compressibility"})
    small.do("evaluate")
    assert sampled == []
    assert small.images() == images
    after = small.scores()
    assert {key: value for key, value in after.items() if key[0] != "jpeg"} == scores
    assert sum(key[0] == "jpeg" for key in after) == len(images)


def test_one_more_prompt_is_sampled_alone_beside_a_witness(small, sampled):
    scores, images = small.scores(), small.images()
    with open("heldout.txt", "a") as file:
        file.write("a large green circle on the left\n")
    small.do("evaluate")
    assert sampled == [[0], [3]]
    assert {key: png for key, png in small.images().items() if key[0] < 3} == images
    assert {key: value for key, value in small.scores().items() if key[1] < 3} == scores
    assert len(small.images()) == 8


def test_a_run_of_another_name_goes_on_from_what_is_there(small, sampled, monkeypatch):
    images = small.images()
    Path("runs.tsv").write_text("run\tmethod.name\nother\tflow_grpo\n")
    small.set("default_runs", ["other-s0"])
    small.run = "other-s0"
    (line,) = status(small.plan())
    assert line.startswith("other-s0: train to do, from iteration 1 of 1; evaluate")
    monkeypatch.setattr(Trainer, "step", None)
    small.do("train", "evaluate")
    assert sampled == []
    assert small.images() == images
    rows = pq.read_table("results/small/runs/other-s0/rollouts.parquet").to_pylist()
    assert {row["run"] for row in rows} == {"other-s0"}


def test_a_state_that_cannot_be_copied_is_left(small, capsys):
    run = small.plan().study.runs["one-s0"]
    state = Path("results/small/state/one-s0/new")
    jobs._copy_state(run, Path("results/gone"), state)
    assert "the state in results/gone cannot be taken over" in capsys.readouterr().err
    assert not list(state.parent.glob("*new*"))


def test_what_was_made_by_other_weights_is_no_result_to_take_over(small, sampled):
    small.set("train.learning_rate_scale", 30.0)
    small.do("train", "evaluate")
    assert [0, 1, 2] in sampled


def test_a_job_left_over_writes_nothing_over_what_newer_settings_want(small):
    small.set("advantage.clamp", 3.0)
    old = small.order(small.plan(), "train")  # a snakemake was killed here, and its job goes on
    small.set("advantage.clamp", 4.0)
    new = small.do("train")
    made = Path("results/small/runs/one-s0/train.json").read_bytes()
    with pytest.raises(UserError, match="newer settings want another result there"):
        make("train", old)
    assert Path("results/small/runs/one-s0/train.json").read_bytes() == made
    assert not Due(new).result("train", "one-s0")
    with pytest.raises(UserError, match="holds no result of these settings"):
        make("evaluate", old)  # nor is what lies there told as its own
    assert not list(Path("results/small/.made").glob("*"))


def test_a_job_whose_files_change_after_its_plan_does_not_begin(small):
    small.set("advantage.clamp", 3.0)
    order = small.order(small.plan(), "evaluate")
    Path("heldout.txt").write_text("a large green circle on the left\n")
    with pytest.raises(UserError, match="files or code changed since this job was planned"):
        make("evaluate", order)


SEEN = """
from pathlib import Path
class Reward:
    def __call__(self, images, prompts):
        run = Path("results/small/runs/one-s0")
        there = [(run / name).read_bytes() for name in ("train.json", "scores.parquet")]
        Path("seen").write_bytes(b"".join(there))
        return images.float().mean((1, 2, 3))
"""


def test_the_old_result_is_there_until_the_new_one_is_complete(small):
    run = Path("results/small/runs/one-s0")
    before = (run / "train.json").read_bytes() + (run / "scores.parquet").read_bytes()
    Path("seen_reward.py").write_text(SEEN)
    small.set("rewards.seen", {"kind": "custom", "function": "seen_reward:Reward"})
    small.set("train.rewards", {"seen": 1.0})
    small.do("train")
    assert Path("seen").read_bytes() == before
    assert (run / "train.json").read_bytes() not in before


def test_results_of_a_version_without_receipts_are_kept_by_hand(small):
    shutil.rmtree("results/small/identity")
    shutil.rmtree("results/small/state")
    at = small.plan()
    (line,) = status(at)
    assert "train stale: it does not say what it was computed from" in line
    assert "to keep them, if nothing changed since: `egrpo keep`" in line
    said = list(keep(at, ()))
    assert said == [
        f"one-s0: {s} kept, as made by an earlier version" for s in ("train", "evaluate")
    ]
    assert list(status(small.plan())) == ["one-s0: done"]
    # of other settings: not
    shutil.rmtree("results/small/identity")
    small.set("advantage.clamp", 3.0)
    assert "one-s0: train not kept: its settings are others than today's" in list(
        keep(small.plan(), ())
    )
    # of a version that wrote fewer files: training stays
    small.set("advantage.clamp", at.study.runs["one-s0"].advantage.clamp)
    Path("results/small/runs/one-s0/metrics.parquet").unlink()
    assert list(keep(small.plan(), ())) == [
        "one-s0: train kept, as made by an earlier version",
        "one-s0: evaluate is made again: it lacks metrics.parquet",
    ]
