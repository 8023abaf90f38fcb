"""One training job in several processes: the same trajectory, images and scores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ADAPTER, ROOT, job_words, overflowing, result_of, small_run, wait_for
from safetensors.torch import load_file

from egrpo.config.models import RunConfig
from egrpo.models.conditioning import Embeddings

VARIANTS: dict[str, dict[str, Any]] = yaml.safe_load("""
egrpo: {method.group_size: 3}
gdpo over two rewards: {method.name: flow_grpo, method.group_size: 4, advantage.combine: gdpo,
  train.rewards: {verifier: 1.0, preference: 1.0}, train.kl_weight: 0.01,
  train.ema_decay: null, train.ema_ramp: null}
batch statistics: {method.name: flow_grpo, method.group_size: 4, advantage.std: batch,
  train.updates: 2, train.ema_decay: null, train.ema_ramp: null}
pruned: {method.name: branchgrpo, method.steps: 6, method.splits: [0, 1], method.group_size: 4,
  method.width_share: 0.5, train.updates: 2}
averaged: {method.name: awm, method.group_size: 4, train.ema_ramp: 0.3}
""")
"""Without an average the weights themselves are compared; it would not have moved yet."""


def start(command: list[str], processes: int, config: str = "ddp") -> subprocess.Popen[str]:
    """A command of egrpo, alone or under accelerate with the shipped settings."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        launch += ["--config_file", str(ROOT / f"config/accelerate/{config}.yaml")]
    return subprocess.Popen(
        [*launch, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(job: subprocess.Popen[str]) -> str:
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output
    return output


def variant(name: str, **more: Any) -> RunConfig:
    few = {} if name == "egrpo" else {"train.iterations": 2}
    return small_run("egrpo", **few, **VARIANTS[name], **more, **{"train.prompts_per_iteration": 4})


Trained = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(embeddings: Embeddings, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    @cache
    def train(name: str, processes: int, config: str = "ddp", **more: Any) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        words = job_words("train", variant(name, **more), embeddings, folder)
        finished(start(words, processes, config))
        return result_of(folder)

    return train


def same(one: Path, other: Path) -> None:
    """Weights, losses, rollouts and counts agree to float tolerance."""
    a, b = load_file(one / ADAPTER), load_file(other / ADAPTER)
    assert a.keys() == b.keys()
    assert max(float(value.abs().max()) for value in a.values()) > 1e-3
    for key, value in a.items():
        # as a whole: where a gradient is nearly 0, Adam makes much of its rounding
        assert float((value - b[key]).norm()) <= 4e-3 * float(value.norm()), key
    first, second, rolled, rolled_again = (
        pq.read_table(folder / f"{name}.parquet").to_pydict()
        for name in ("train_metrics", "rollouts")
        for folder in (one, other)
    )
    assert (first["iteration"], first["metric"]) == (second["iteration"], second["metric"])
    for metric, value, again in zip(first["metric"], first["value"], second["value"], strict=True):
        # of few scores, some of which jump with a rounding of one pixel
        near = 2e-2 if metric.startswith("monitor_std/") else 2e-3
        if not metric.startswith("time/"):
            np.testing.assert_allclose(again, value, rtol=near, atol=2e-5, err_msg=metric)
    for column, x in rolled.items():
        y = rolled_again[column]
        if isinstance(x[0], float):
            np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3, err_msg=column)
        else:
            assert x == y, column
    heads = [json.loads((folder / "train.json").read_text()) for folder in (one, other)]
    for key in ("iterations", "nfe_forward", "nfe_train", "nfe_reference", "nfe_monitor"):
        assert heads[0][key] == heads[1][key], key


CUT = {"train.prompts_at_once": 1, "train.train_micro_batch": 5, "train.micro_batch": 7}
WHOLE = {"model.merge_lora_for_sampling": False}
SHARDED = {**WHOLE, "train.updates": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "config", "alone", "more"),
    [
        # 4 prompts on one process, 2 on each of two, 1 on each of four
        *(("egrpo", processes, "ddp", {}, {}) for processes in (2, 4)),
        *((name, 2, "ddp", {}, {}) for name in list(VARIANTS)[1:]),
        # prompts sampled one after the other, and other batches, on processes of 2, 1 and 1
        ("egrpo", 3, "ddp", {}, CUT),
        # FSDP2; processes with unequal work keep in step
        ("egrpo", 3, "fsdp2", {}, WHOLE),
        ("gdpo over two rewards", 2, "fsdp2", SHARDED, SHARDED),
        ("averaged", 3, "fsdp2", SHARDED, SHARDED),
    ],
)
def test_a_trajectory_does_not_depend_on_processes_or_how_the_work_is_cut(
    name, processes, config, alone, more, trained
):
    same(trained(name, 1, **alone), trained(name, processes, config, **more))


@pytest.mark.slow
def test_a_preempted_job_goes_on_with_another_number_of_processes(trained, embeddings, tmp_path):
    """SIGTERM to the launcher: saved after the iteration, in one line; then one process ends it."""
    command = job_words("train", variant("egrpo"), embeddings, tmp_path)
    job = start(command, 2)
    wait_for(lambda: list(tmp_path.rglob("checkpoint-000001.safetensors")), job)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "saved after iteration" in output
    assert "going on after iteration" in finished(start(command, 1))
    same(trained("egrpo", 1), result_of(tmp_path))


def test_workers_die_with_their_launcher(embeddings, tmp_path):
    job = start(job_words("train", variant("egrpo"), embeddings, tmp_path), 2)
    wait_for(lambda: list(tmp_path.rglob("checkpoint-*.safetensors")), job)
    workers = psutil.Process(job.pid).children(recursive=True)
    assert len(workers) >= 2
    job.kill()
    assert not psutil.wait_procs(workers, timeout=20)[1]
    job.communicate()


@pytest.mark.slow
def test_images_and_scores_do_not_depend_on_the_number_of_processes(trained, embeddings, tmp_path):
    run = variant("egrpo", **{"evaluate.prompts": 5})
    found = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        shutil.copytree(trained("egrpo", 1).parents[2], folder, symlinks=True)
        finished(start(job_words("evaluate", run, embeddings, folder), processes))
        names = ("scores.parquet", "images.parquet")
        found.append([pq.read_table(result_of(folder) / name).to_pydict() for name in names])
    (one, pictures), (three, same_pictures) = found
    assert pictures == same_pictures
    np.testing.assert_allclose(one.pop("value"), three.pop("value"), rtol=1e-5, atol=1e-6)
    assert one == three
    assert len(one["run"]) == 5 * 2 * len(small_run().rewards)


FEWER = "train.prompts_per_iteration"


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("train.monitor_every", 0, "iteration 1: 18 of 18 images are NaN or infinite"),
        (FEWER, 1, f"{FEWER}: 1 prompts for 2 processes"),
    ],
)
def test_processes_that_cannot_go_on_end_together(key, value, line, embeddings, tmp_path):
    run = small_run("black", **overflowing(tmp_path / "model"), **{key: value})
    job = start(job_words("train", run, embeddings, tmp_path), 2)
    output, _ = job.communicate(timeout=300)
    assert job.returncode not in (0, None)
    assert line in output
