"""Shared fixtures: small runs of the shipped toy world, through the real components."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from mlflow_pages import CHROMIUM, chromium

from egrpo.config.load import Row, overlay, read_yaml
from egrpo.config.models import RunConfig, StudyConfig
from egrpo.core.rollout import Rollout, TrainBatch
from egrpo.study.resolve import resolve_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

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
    return [batches for part in parts if (batches := rollout.update(part, kept))]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings name files relative to the repository, as the workflow runs there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompt embeddings of the toy's prompt files, encoded by the stock pipeline's own code."""
    from egrpo.measure.embed import embed

    path = tmp_path_factory.mktemp("embeddings") / "embeddings.safetensors"
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        embed(small_run(), path)
    finally:
        os.chdir(before)
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, as installed on this machine, with a fresh profile."""
    with chromium() as started:
        if started is None:
            pytest.skip(
                f"none of {', '.join(CHROMIUM)} is installed (Debian: apt install chromium)"
            )
        yield started
