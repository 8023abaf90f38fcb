"""Shared fixtures: small runs of the shipped toy world, through the real components."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from mlflow_pages import CHROMIUM, chromium

from egrpo.cli import main
from egrpo.config.load import overlay, read_yaml
from egrpo.config.models import RunConfig
from egrpo.config.study import StudyConfig
from egrpo.config.table import Row
from egrpo.core.rollout import Rollout, TrainBatch
from egrpo.core.tree import Tree
from egrpo.jobs import make
from egrpo.models.conditioning import Embeddings
from egrpo.planning.trees import closed_form_plan
from egrpo.store.files import write_json
from egrpo.study.due import Due
from egrpo.study.identity import SETS
from egrpo.study.layout import Layout
from egrpo.study.orders import order_of_run
from egrpo.study.resolve import Study, resolve_run
from egrpo.study.standing import write_receipt

if TYPE_CHECKING:
    from subprocess import Popen

    from playwright.sync_api import Browser

    from egrpo.train.trainer import Trainer

ADAPTER = "adapter/pytorch_lora_weights.safetensors"

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

SMALL: dict[str, Any] = {
    "train": {
        "iterations": 4,
        "prompts_per_iteration": 2,
        "checkpoint_every": 1,
        "monitor_every": 2,
        "monitor_prompts": 2,
        "monitor_samples": 2,
    },
    "evaluate": {"steps": 4, "samples": 2, "prompts": 4},
    "tracking": {"enabled": False},
}


def small_run(run: str = "egrpo", **overrides: Any) -> RunConfig:
    """A resolved run of the default study, made small; ``overrides`` by dotted key."""
    shared = read_yaml(ROOT / "config/config.yaml")
    for key in StudyConfig.model_fields:
        shared.pop(key, None)
    shared = overlay(shared, SMALL)
    method = {"egrpo": {"group_size": 3, "active": 3}, "flow_grpo": {"group_size": 4, "steps": 5}}
    return resolve_run(shared, method, Row(run, overrides), "config/config.yaml", "runs.tsv")


def overflowing(folder: Path) -> dict[str, Any]:
    """Settings of the toy's model in float16, whose VAE overflows there, made in ``folder``."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(ROOT / "assets/toy/pipeline", folder)
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    for key in ("decoder.conv_in.weight", "decoder.conv_in.bias"):
        state[key] *= 3e5
    save_file(state, path, metadata={"format": "pt"})
    whole = {"model.merge_lora_for_sampling": False}
    return {"model.path": str(folder), "model.dtype": "float16", **whole}


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VAE overflows at the first image of every batch of several."""
    from egrpo.models.base import FlowModel

    plain = FlowModel.pixels

    def pixels(self: FlowModel, decoded: torch.Tensor) -> torch.Tensor:
        found = plain(self, decoded).clone()
        if len(found) > 1:
            found[0, 0, 0, 0] = torch.inf
        return found

    monkeypatch.setattr(FlowModel, "pixels", pixels)


def write_run(run: RunConfig, path: Path) -> Path:
    """The resolved settings as the workflow writes them."""
    path.write_text(yaml.safe_dump(run.model_dump(), sort_keys=False), encoding="utf-8")
    return path


def trainer_for(embeddings: Embeddings, name: str = "egrpo", **overrides: Any) -> Trainer:
    """The trainer of a small run."""
    from egrpo.train.trainer import Trainer

    run = small_run(name, **overrides)
    return Trainer(run, closed_form_plan(run), embeddings)


def sampled(trainer: Trainer, iteration: int = 1) -> tuple[Rollout, list[int], list[Tree]]:
    """The rollout of an iteration, its prompts and its trees."""
    ids, trees = trainer.trees(iteration)
    return trainer.rollout(iteration, ids, trees), ids, trees


@torch.no_grad()
def velocity_at(trainer: Trainer, ids: list[int], batch: TrainBatch) -> torch.Tensor:
    """Velocities [B, C, h, w] at the sources of a batch by the weights as they are."""
    prompts = trainer.conditioning.batch(ids, trainer.model.device).rows(batch.tree)
    return trainer.model.velocity(batch.x, trainer.sigmas[batch.start], prompts)


def run_in_process(run: RunConfig, embeddings: Embeddings, folder: Path) -> Path:
    """Train a run; returns the folder of its results, beside that of its state."""
    from egrpo.train.job import train

    state, output = folder / "state" / "key", folder / "out"
    train(run, closed_form_plan(run), embeddings, state=state, output=output)
    return output


@dataclass
class Jobs:
    """Small runs trained in this process, their files in one folder."""

    embeddings: Embeddings
    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, run: RunConfig | str, place: str = "", **overrides: Any) -> Path:
        """Train it; returns the folder of its results."""
        self.said()
        made = small_run(run, **overrides) if isinstance(run, str) else run
        return run_in_process(made, self.embeddings, self.folder / place)

    def said(self) -> str:
        """What the last one said."""
        return self.capsys.readouterr().err


@pytest.fixture
def jobs(embeddings: Embeddings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Jobs:
    """Trains small runs in this test's folder."""
    return Jobs(embeddings, tmp_path, capsys)


def job_words(stage: str, run: RunConfig, embeddings: Embeddings, folder: Path) -> list[str]:
    """A job of the workflow as words for Python, its study below ``folder``.

    All that it reads is in place.
    """
    at = Layout(Study(run.study, str(folder), {run.run: run}))
    for which, file in embeddings.items():
        place = at.embeddings(run.run, which)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(file)
    if (plan := closed_form_plan(run)) is not None:
        write_json(at.run(run.run) / "plan.json", plan.to_dict())
        write_receipt(at, "plan", run.run, at.identities.record("plan", run), [])
    order = order_of_run(at, run.run)
    return ["-m", "egrpo", "make", stage, str(order), "--threads", "1"]


def make_stages(at: Layout, run: str, *stages: str) -> None:
    """What the workflow's jobs do for a run, one after the other in this process."""
    due = Due(at)
    names = [("embed", at.identity(f"embed-{which}", run)) for which in SETS]
    for stage, name in [*names, *(due.named(stage, run) for stage in stages)]:
        make(stage, due.order(stage, name), threads=1, name=name)


def called(words: list[str]) -> Result:
    """Such a job, called in this process."""
    return CliRunner().invoke(main, words[2:])


def result_of(folder: Path) -> Path:
    """Where the one run below ``folder`` has its results."""
    (found,) = folder.glob("*/runs/*")
    return found


def wait_for(condition: Callable[[], Any], job: Popen[str] | None = None) -> None:
    """Until something is so; ``job`` must not end before."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        assert job is None or job.poll() is None, job.communicate()
        time.sleep(0.01)


@contextmanager
def modes_by(mask: int, folder: Path) -> Iterator[None]:
    """Under this umask; then all that lies in the folder has the mode of what is new."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
    wanted = {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in folder.rglob("*")}
    found = {path: path.stat().st_mode & 0o777 for path in wanted}
    assert wanted
    assert found == wanted, {str(p): oct(m) for p, m in found.items() if m != wanted[p]}


def updates_of(rollout: Rollout, kept: Collection[int] | None = None) -> list[list[TrainBatch]]:
    """Batches of each optimizer step of a rollout, those edges only that are ``kept``."""
    parts = sorted({batch.part for batch in rollout.batches})
    return [batches for part in parts if (batches := rollout.batches_of(part, kept))]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings name files relative to the repository, as the workflow runs there."""
    monkeypatch.chdir(ROOT)


def embedded(run: RunConfig, folder: Path) -> Embeddings:
    """Embeddings of both prompt files of a run, by the sets that jobs ask for; made anew."""
    from egrpo.measure.embed import embed_files

    for name in ("train", "heldout"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    return embed_files(run, folder)


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Embeddings:
    """Those of the toy's prompt files, encoded by the stock pipeline's own code."""
    with chdir(ROOT):
        return embedded(small_run(), tmp_path_factory.mktemp("embeddings"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, as installed on this machine, with a fresh profile."""
    with chromium() as started:
        if started is None:
            pytest.skip(
                f"none of {', '.join(CHROMIUM)} is installed (Debian: apt install chromium)"
            )
        yield started
