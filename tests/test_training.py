"""The trainer on the shipped toy model: on-policy ratio, resume after SIGKILL, formats, hygiene."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, overflowing, small_run, write_run
from safetensors.torch import load_file

from egrpo.config.models import Bound, RunConfig
from egrpo.core.plan import Plan
from egrpo.errors import UserError
from egrpo.images import DECODED, FINE, LATENT, Images
from egrpo.planning.trees import iteration_cost, needs_plan, plan_of, training_sigmas, tree_of
from egrpo.store import checkpoint as checkpoints
from egrpo.store import journal
from egrpo.store.files import write_json
from egrpo.store.tables import ROLLOUTS, TRAIN_METRICS, read_table
from egrpo.study.fingerprint import state_key
from egrpo.train import job as train_run
from egrpo.train.job import train
from egrpo.train.monitor import load_grid, measure, save_grid
from egrpo.train.trainer import Trainer
from egrpo.train.warnings import crossed, training_warnings, warnings_in


def plan_for(run: RunConfig) -> Plan | None:
    return plan_of(run, training_sigmas(run)) if needs_plan(run) else None


def trainer_for(embeddings: Path, name: str = "egrpo", **overrides: Any) -> Trainer:
    run = small_run(name, **overrides)
    return Trainer(run, plan_for(run), embeddings)


VARIANTS: dict[str, dict[str, Any]] = {
    "egrpo": {},
    "egrpo bfloat16": {"model.dtype": "bfloat16"},
    "egrpo unmerged": {"model.merge_lora_for_sampling": False},
    "egrpo full tuning": {"model.tuning": "full", "train.kl_weight": 0.1},
    "egrpo small micro-batches": {"train.micro_batch": 5, "train.train_micro_batch": 1},
    "egrpo checkpointed": {"train.gradient_checkpointing": True},
    "egrpo cps": {"method.dynamics": "cps", "method.threshold": 0.0},
    "egrpo dance_sde": {"method.dynamics": "dance_sde", "method.threshold": 0.0},
    "egrpo subset, coarse second-order suffix, updates": {
        "method.active_per_iteration": 2,
        "method.granularities": [2],
        "method.suffix": "dpm2",
        "train.updates": 2,
    },
    "flow_grpo": {"method.name": "flow_grpo"},
    "flow_grpo guarded": {"method.name": "flow_grpo", "train.loss": "guarded"},
    "g2rpo": {"method.name": "g2rpo", "method.active": 3, "method.group_size": 3},
    "tempflow_grpo": {"method.name": "tempflow_grpo", "method.active": 3, "method.anchors": 2},
    "flow_grpo_fast": {"method.name": "flow_grpo_fast", "method.group_size": 4},
    "dancegrpo": {"method.name": "dancegrpo", "method.group_size": 3, "method.steps": 6},
    "mixgrpo_flash": {"method.name": "mixgrpo_flash", "method.group_size": 4, "method.steps": 9},
    "branchgrpo": {
        "method.name": "branchgrpo",
        "method.steps": 5,
        "method.splits": [0, 2],
        "method.group_size": 4,
        "train.updates": 4,
    },
    "diffusion_nft": {"method.name": "diffusion_nft", "method.group_size": 3},
    "awm": {"method.name": "awm", "method.group_size": 3},
    "flow_grpo bfloat16": {"method.name": "flow_grpo", "model.dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_ratio_is_exactly_one_at_the_first_update_and_counts_are_predicted(
    name: str, embeddings: Path
) -> None:
    trainer = trainer_for(embeddings, **VARIANTS[name])
    before = [p.detach().clone() for p in trainer.parameters]
    metrics, rows = trainer.step()
    assert metrics["on_policy_ratio_deviation"] == 0.0
    if trainer.run.train.updates == 1:
        assert metrics["clip_fraction"] == 0.0
    changed = [not torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True)]
    assert any(changed)
    cost = iteration_cost(trainer.run, trainer.plan, 1, len(trainer.texts))
    assert {k: trainer.counts[k] for k in ("forward", "train", "reference")} == vars(cost)
    _, trees = trainer.trees(1)
    assert len(rows["step"]) == sum(len(tree.trained) for tree in trees)


def test_ratio_moves_when_the_weights_moved(embeddings: Path) -> None:
    """The exactness above is no tautology: other weights give other ratios."""
    trainer = trainer_for(embeddings)
    ids, trees = trainer.trees(1)
    rollout = trainer.rollout(1, ids, trees)
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(0.01 * torch.randn_like(p))
    batch = rollout.batches[0]
    rows = torch.tensor(ids)[batch.tree]
    v = trainer.model.velocity(
        batch.x, trainer.sigmas[batch.start], trainer.conditioning.rows(rows)
    )
    new = batch.log_probs(v, trainer.sigmas, trainer.run.method.noise_level)
    assert (new - batch.log_prob).abs().max() > 1e-6


def test_an_update_makes_good_samples_likelier(embeddings: Path) -> None:
    trainer = trainer_for(embeddings, **{"method.group_size": 8, "method.active": 4})
    ids, trees = trainer.trees(1)
    rollout = trainer.rollout(1, ids, trees)
    rng = np.random.default_rng(0)
    scores = {"verifier": rng.normal(size=len(rollout.leaves))}
    advantage = trainer.advantages(scores, rollout, trees)
    trainer.optimise(rollout, ids, trees, advantage)
    gain = 0.0
    for batch in rollout.batches:
        rows = torch.tensor(ids)[batch.tree]
        with torch.no_grad():
            v = trainer.model.velocity(
                batch.x, trainer.sigmas[batch.start], trainer.conditioning.rows(rows)
            )
            new = batch.log_probs(v, trainer.sigmas, trainer.run.method.noise_level)
        gain += float(
            (torch.tensor(advantage.values[list(batch.edges)]) * (new - batch.log_prob)).sum()
        )
    assert gain > 0


def test_accumulated_gradient_equals_that_of_one_batch(embeddings: Path) -> None:
    """Prompts in one forward/backward or one by one: the same gradient, to float tolerance."""
    gradients = []
    for size in (1, 16):
        trainer = trainer_for(embeddings, **{"train.train_micro_batch": size})
        trainer.optimizer.zero_grad = lambda: None
        ids, trees = trainer.trees(1)
        rollout = trainer.rollout(1, ids, trees)
        scores = {"verifier": np.arange(len(rollout.leaves), dtype=float) ** 1.5}
        trainer.optimise(rollout, ids, trees, trainer.advantages(scores, rollout, trees))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-7)
    assert gradients[0].abs().max() > 1e-5


@pytest.mark.parametrize("updates", [1, 3])
def test_optimizer_steps_of_an_iteration(updates: int, embeddings: Path) -> None:
    """With one part per active step E-GRPO takes a step after each, as its public code does."""
    trainer = trainer_for(embeddings, **{"train.updates": updates})
    trainer.step()
    steps = {int(s["step"]) for s in trainer.optimizer.state_dict()["state"].values()}
    assert steps == {updates}


def test_ema_follows_the_weights_and_is_what_is_saved(embeddings: Path, tmp_path: Path) -> None:
    trainer = trainer_for(embeddings, **{"train.ema_decay": 0.5})
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.step()
    assert trainer.ema is not None
    for old, new, mean in zip(before, trainer.parameters, trainer.ema, strict=True):
        torch.testing.assert_close(mean, 0.5 * old + 0.5 * new.detach())
    live = [p.detach().clone() for p in trainer.parameters]
    out = run_in_process(trainer.run, embeddings, tmp_path)
    state = next((tmp_path / "state").iterdir())
    kept = checkpoints.latest(state)
    assert kept is not None
    saved = load_file(out / "adapter/pytorch_lora_weights.safetensors")
    names = [n for n, p in trainer.model.transformer.named_parameters() if p.requires_grad]
    scale = trainer.run.model.lora.alpha / trainer.run.model.lora.rank
    for n, name in enumerate(names):
        key = f"transformer.{name.replace('.default', '')}"
        mean = kept.tensors[f"ema/{n}"]
        assert torch.equal(saved[key], scale * mean if "lora_B" in name else mean)
    assert any(
        not torch.equal(kept.tensors[f"ema/{n}"], kept.tensors[f"weight/{n}"])
        for n in range(len(names))
    )
    with trainer.averaged():
        assert all(torch.equal(a, b) for a, b in zip(trainer.ema, trainer.parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(live, trainer.parameters, strict=True))


def test_average_of_flow_grpos_lineage_warms_up_and_moves_at_every_eighth_step(
    embeddings: Path,
) -> None:
    """Its public code: where (n + 1) % 8 == 0, with decay min((1 + n) / (10 + n), 0.9)."""
    for name in ("flow_grpo", "flow_grpo_fast", "tempflow_grpo"):
        t = small_run("x", **{"method.name": name}).train
        assert (t.ema_decay, t.ema_ramp, t.ema_every) == (0.9, "warm_up", 8), name
    trainer = trainer_for(
        embeddings, **{"method.name": "flow_grpo", "train.ema_decay": 0.5, "train.ema_every": 4}
    )
    mean, steps = [p.detach().clone() for p in trainer.parameters], 0

    def follow(*of: Any) -> None:
        nonlocal mean, steps
        steps += 1
        if steps in (3, 7, 11):
            decay = {3: 4 / 13, 7: 8 / 17, 11: 0.5}[steps]
            now = [p.detach() for p in trainer.parameters]
            mean = [decay * m + (1 - decay) * p for m, p in zip(mean, now, strict=True)]

    trainer.optimizer.register_step_post_hook(follow)
    for _ in range(6):
        trainer.step()
    assert steps == trainer.optimizer_steps == 12
    assert trainer.ema is not None
    for found, expected in zip(trainer.ema, mean, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["flow_grpo", "awm"])
def test_a_checkpoint_holds_all_that_the_average_depends_on(name: str, embeddings: Path) -> None:
    of = {"method.name": name, "method.group_size": 3, "train.ema_every": 4}
    straight, before, after = (trainer_for(embeddings, **of) for _ in range(3))
    for trainer, count in ((straight, 4), (before, 2)):
        for _ in range(count):
            trainer.step()
    after.restore(before.checkpoint())
    for _ in range(2):
        after.step()
    for a, b in zip(straight.ema or [], after.ema or [], strict=True):
        assert torch.equal(a, b)
    assert straight.optimizer_steps == after.optimizer_steps == 4 * straight.run.train.updates


def test_a_run_too_short_for_its_average_says_so(
    embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of = {"method.name": "flow_grpo", "train.monitor_every": 0}
    run_in_process(small_run("short", **of, **{"train.iterations": 3}), embeddings, tmp_path / "3")
    assert (
        "short: train.ema_every: the averaged weights, which are kept and evaluated, first move "
        "after optimizer step 7, and this run takes 6: its result is the untrained model"
    ) in capsys.readouterr().err
    run_in_process(small_run("long", **of, **{"train.iterations": 4}), embeddings, tmp_path / "4")
    assert "train.ema_every" not in capsys.readouterr().err


def test_penalty_of_awm_is_the_distance_to_the_averaged_weights(embeddings: Path) -> None:
    """Its public code: 1 * mean((v - v_average)^2), average min(0.3, 0.001 n) of the old one."""
    overrides = {"method.name": "awm", "method.group_size": 3}
    t = small_run("x", **overrides).train
    assert (t.ema_weight, t.ema_decay, t.ema_ramp, t.kl_weight) == (1.0, 0.3, 0.001, 1e-4)
    trainer = trainer_for(
        embeddings,
        **{**overrides, "train.ema_ramp": 0.3, "train.kl_weight": 0.0, "train.ema_weight": 2.0},
    )
    for _ in range(2):
        trainer.step()
    ids, trees = trainer.trees(3)
    rollout = trainer.rollout(3, ids, trees)
    scores = {"verifier": np.zeros(len(rollout.leaves))}  # nothing but the penalty is left
    advantage = trainer.advantages(scores, rollout, trees)
    live = [p.detach().clone() for p in trainer.parameters]

    def distance() -> float:
        """Mean over the noised samples."""
        total = count = 0.0
        for batch in rollout.batches:
            rows = torch.tensor(ids)[batch.tree]
            of = (batch.x, trainer.sigmas[batch.start], trainer.conditioning.rows(rows))
            with torch.no_grad():
                v = trainer.model.velocity(*of)
                with trainer.averaged():
                    mean = trainer.model.velocity(*of)
            total += float(((v - mean) ** 2).mean((1, 2, 3)).sum())
            count += len(batch.x)
        return total / count

    before = distance()
    assert before > 0
    assert all(torch.equal(a, b) for a, b in zip(live, trainer.parameters, strict=True))
    metrics = trainer.optimise(rollout, ids, trees, advantage)
    assert metrics["loss"] == pytest.approx(2 * before, rel=1e-4)
    assert metrics["grad_norm"] > 0
    assert metrics["on_policy_ratio_deviation"] == 0.0


def test_prompts_of_an_epoch_are_each_seen_once(embeddings: Path) -> None:
    trainer = trainer_for(embeddings, **{"train.prompts_per_iteration": 4})
    per_epoch = len(trainer.texts) // 4
    seen = [i for k in range(1, per_epoch + 1) for i in trainer.trees(k)[0]]
    assert sorted(seen) == sorted(set(seen))
    assert trainer.trees(1)[0] != trainer.trees(per_epoch + 1)[0]


def test_nan_rewards_are_counted_and_all_nan_is_refused(embeddings: Path) -> None:
    trainer = trainer_for(embeddings)
    ids, trees = trainer.trees(1)
    rollout = trainer.rollout(1, ids, trees)
    scores = np.random.default_rng(0).normal(size=len(rollout.leaves))
    scores[::5] = np.nan
    some = trainer.advantages({"verifier": scores}, rollout, trees)
    assert some.samples_invalid == len(scores[::5])
    assert np.isfinite(some.values).all()
    with pytest.raises(UserError, match=r"rewards\.verifier: every image of iteration 1"):
        trainer.advantages({"verifier": np.full_like(scores, np.nan)}, rollout, trees)


def test_a_reward_may_apply_to_some_of_the_prompts(
    embeddings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One prompt an iteration, and so of one kind; each kind has a reward of its own."""
    (tmp_path / "by_kind.py").write_text(
        "def score(images, prompts, small):\n"
        "    red = images[:, 0].float().mean((1, 2)).tolist()\n"
        "    return [r if ('small' in p) == small else None for r, p in zip(red, prompts)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = {
        name: {"kind": "custom", "function": "by_kind:score", "options": {"small": small}}
        for name, small in (("small", True), ("large", False))
    }
    run = small_run(
        "mixed",
        **{f"rewards.{name}": settings for name, settings in own.items()},
        **{"train.rewards": {"small": 1.0, "large": 1.0, "verifier": None}},
        **{"train.prompts_per_iteration": 1, "train.iterations": 6, "train.monitor_every": 6},
    )
    assert set(run.train.rewards) == set(own)
    out = run_in_process(run, embeddings, tmp_path)
    rows = read_table(out / "train_metrics.parquet", TRAIN_METRICS).to_pylist()
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row["metric"], []).append(row["value"])
    counts = list(zip(found["reward_valid/small"], found["reward_valid/large"], strict=True))
    assert set(counts) == {(9.0, 0.0), (0.0, 9.0)}, "3 steps of 3 samples"
    for name, valid in zip(own, zip(*counts, strict=True), strict=True):
        means = found[f"reward/{name}"]
        assert [mean is None for mean in means] == [count == 0 for count in valid]
        assert found[f"monitor/reward/{name}"][-1] > 0, "a mean over what it applies to"
    assert not any(found["samples_invalid"])
    assert min(found["advantage_abs_mean"]) > 0.1, "every iteration teaches something"
    said = capsys.readouterr().err
    for name in own:
        assert said.count(f"rewards.{name}: every image of iteration") == 1
    trainer = Trainer(run, plan_for(run), embeddings)
    ids, trees = trainer.trees(1)
    rollout = trainer.rollout(1, ids, trees)
    nothing = np.full(len(rollout.leaves), np.nan)
    with pytest.raises(UserError, match=r"rewards\.small, large: every image of iteration 1 was"):
        trainer.advantages(dict.fromkeys(own, nothing), rollout, trees)


# -- images that are none ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "what"), [(2, "monitor of iteration 0: 4 of 4"), (0, "iteration 1: 18 of 18")]
)
def test_a_vae_that_overflows_ends_the_run_in_one_line(
    every: int, what: str, embeddings: Path, tmp_path: Path
) -> None:
    run = small_run("black", **overflowing(tmp_path / "model"), **{"train.monitor_every": every})
    with pytest.raises(UserError) as caught:
        run_in_process(run, embeddings, tmp_path)
    assert str(caught.value) == (
        f"run black: {what} images are NaN or infinite: their latents are finite, but not what the "
        "VAE makes of them: the VAE overflows in model.dtype float16; set it to bfloat16 or float32"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("every", "what"), [(1, "monitor"), (0, "one image")])
def test_a_last_iteration_that_destroys_the_weights_is_no_success(
    every: int, what: str, embeddings: Path, tmp_path: Path
) -> None:
    far = {"train.learning_rate_scale": 1e30, "train.iterations": 1, "train.monitor_every": every}
    run = small_run("far", **far)
    for _ in range(2):  # started again it is none either
        with pytest.raises(UserError, match=f"run far: {what} of iteration 1: .* have diverged; "):
            run_in_process(run, embeddings, tmp_path)
    assert not (tmp_path / "out").exists()


def test_without_monitors_one_image_shows_that_the_weights_are_fit(
    embeddings: Path, tmp_path: Path
) -> None:
    run = small_run("fit", **{"train.iterations": 1, "train.monitor_every": 0})
    out = run_in_process(run, embeddings, tmp_path)
    assert json.loads((out / "train.json").read_text())["nfe_monitor"] == run.evaluate.steps


@pytest.mark.usefixtures("spoilt")
def test_images_that_are_none_have_no_say(
    embeddings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_for(embeddings, **{"train.decode_batch": 6, "train.micro_batch": 2})
    for _ in range(2):
        metrics, _ = trainer.step()
        assert metrics["samples_invalid"] == 3, "the first of each batch of 6"
        assert metrics["reward_valid/verifier"] == 15
        assert np.isfinite(list(metrics.values())).all()
    measured, images = trainer.monitor()
    assert images.valid.tolist() == [False, True] * 2
    assert measured["monitor/images_invalid"] == 2
    assert np.isfinite(measured["monitor/reward/verifier"])
    assert np.isnan(measured["monitor/diversity"]), "no prompt has two images"
    assert measured["monitor/distance_to_base"] == 0.0
    said = capsys.readouterr().err
    assert "monitor of iteration 2: 2 of 4 images are NaN or infinite" in said
    assert said.count("NaN or infinite") == 1, "in iterations they are counted"


def test_distances_are_between_images() -> None:
    pixels = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8)
    base = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8)
    some = Images(pixels, np.array([FINE, LATENT, FINE, FINE, DECODED, FINE], np.int8))
    other = Images(base, np.array([FINE, FINE, LATENT, FINE, FINE, FINE], np.int8))
    found = measure({}, some, other, 3)
    whole = [
        measure({}, Images.whole(x), Images.whole(y), 2)
        for x, y in ((pixels[[0, 2]], base[[0, 2]]), (pixels[[3, 5]], base[[3, 5]]))
    ]
    both = measure({}, Images.whole(pixels[[0, 3, 5]]), Images.whole(base[[0, 3, 5]]), 3)
    wanted = np.mean([w["monitor/diversity"] for w in whole])
    assert found["monitor/diversity"] == pytest.approx(wanted)
    assert found["monitor/distance_to_base"] == pytest.approx(both["monitor/distance_to_base"])
    assert found["monitor/images_invalid"] == 2
    lost = Images(pixels, np.full(6, LATENT, np.int8))
    nothing = measure({}, lost, Images.whole(base), 3)
    assert np.isnan([nothing[f"monitor/{m}"] for m in ("diversity", "distance_to_base")]).all()


# -- resume --------------------------------------------------------------------------------


def command(folder: Path, run: RunConfig, embeddings: Path, name: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    config = write_run(run, folder / "run.yaml")
    words = [
        sys.executable,
        "-m",
        "egrpo",
        "train",
        "--run-config",
        config,
        "--embeddings",
        embeddings,
        "--state",
        folder / f"state-{name}",
        "--output",
        folder / f"out-{name}",
        "--threads",
        "1",
    ]
    plan = plan_for(run)
    if plan is not None:
        write_json(folder / "plan.json", plan.to_dict())
        words += ["--plan", folder / "plan.json"]
    return [str(w) for w in words]


def kill_after_checkpoint(words: list[str], state: Path, count: int, delay: float) -> int:
    """Start, wait for the ``count``-th checkpoint, wait ``delay`` seconds, SIGKILL."""
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            names = sorted(state.glob("*/checkpoint-*.safetensors"))
            if names and int(names[-1].stem.split("-")[1]) >= count:
                time.sleep(delay)
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        return process.wait(timeout=120)
    finally:
        process.kill()


def comparable(path: Path) -> list[dict[str, Any]]:
    table = TRAIN_METRICS if "metrics" in path.name else ROLLOUTS
    rows = read_table(path, table).to_pylist()
    return [r for r in rows if not str(r.get("metric", "")).startswith("time/")]


@pytest.mark.parametrize("method", ["egrpo", "flow_grpo", "diffusion_nft"])
def test_killed_and_started_again_ends_bit_identical(
    method: str, embeddings: Path, tmp_path: Path
) -> None:
    overrides = {
        "method.name": method,
        "train.ema_decay": 0.9,
        "train.iterations": 7,
        "train.checkpoint_every": 2,
        "train.snapshots": [1, 800, 10**9],
    }
    run = small_run("victim", **overrides)
    straight = command(tmp_path, run, embeddings, "straight")
    killed = command(tmp_path, run, embeddings, "killed")
    subprocess.run(straight, cwd=ROOT, check=True, capture_output=True)
    rng = random.Random(f"{method} kills")
    codes = [
        kill_after_checkpoint(killed, tmp_path / "state-killed", count, rng.uniform(0, 0.4))
        for count in (0, 2, 4)
    ]
    assert -signal.SIGKILL in codes
    subprocess.run(killed, cwd=ROOT, check=True, capture_output=True)
    files = [
        "adapter/pytorch_lora_weights.safetensors",
        *(
            str(p.relative_to(tmp_path / "out-straight"))
            for p in sorted((tmp_path / "out-straight").glob("[ms][on]*/**/*.[ps][na]*"))
        ),
    ]
    assert len(files) == 1 + 5 + 3
    for name in files:
        a, b = (tmp_path / f"out-{x}" / name for x in ("straight", "killed"))
        assert a.read_bytes() == b.read_bytes(), name
    for name in ("train_metrics.parquet", "rollouts.parquet"):
        a, b = (tmp_path / f"out-{x}" / name for x in ("straight", "killed"))
        assert comparable(a) == comparable(b)
    a, b = (
        json.loads((tmp_path / f"out-{x}/train.json").read_text()) for x in ("straight", "killed")
    )
    for key in ("nfe_forward", "nfe_train", "nfe_reference", "nfe_monitor", "iterations", "key"):
        assert a[key] == b[key]


def test_pruned_leaves_need_no_training(embeddings: Path) -> None:
    """Width pruning: fewer forward/backward passes than the tree allows, and ratios still 1."""
    trainer = trainer_for(
        embeddings,
        **{
            "method.name": "branchgrpo",
            "method.steps": 6,
            "method.splits": [0, 1],
            "method.group_size": 4,
            "method.width_share": 0.5,
            "train.updates": 1,
        },
    )
    most = iteration_cost(trainer.run, trainer.plan, 1, len(trainer.texts))
    metrics, _ = trainer.step()
    # per prompt: 1 + 2 sources up to the last split, then 2 of 4 leaves for the 3 steps after it
    assert trainer.counts["train"] == 2 * (1 + 2 + 2 * 3) < most.train == 2 * (1 + 2 + 4 * 3)
    assert metrics["on_policy_ratio_deviation"] < 1e-5  # smaller chunks round otherwise


def test_guarded_loss_is_divided_by_the_length_of_its_step(embeddings: Path) -> None:
    """GRPO-Guard: normalised ratio, clipped, times 1/|dt| (public code of arXiv 2510.22319)."""
    trainer = trainer_for(
        embeddings,
        **{"method.name": "flow_grpo", "train.loss": "guarded", "train.clip_range": 0.2},
    )
    ids, trees = trainer.trees(1)
    batch = trainer.rollout(1, ids, trees).batches[1]
    advantage = torch.linspace(-1, 1, len(batch.edges))
    noise = torch.randn(batch.v.shape, generator=torch.Generator().manual_seed(0))
    v = batch.v + 0.5 * noise
    found = trainer.objective(batch, v, advantage, torch.ones_like(advantage))
    ratio = torch.exp(batch.guarded_log_ratio(v, trainer.sigmas, 0.7))
    plain = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).sum()
    length = trainer.sigmas[batch.start] - trainer.sigmas[batch.start + 1]
    torch.testing.assert_close(found.loss, plain / length)
    assert not torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)


def test_averaged_weights_sample_where_asked(embeddings: Path) -> None:
    """DiffusionNFT's slow policy: after an update its velocities differ from the trained ones."""
    trainer = trainer_for(
        embeddings,
        **{
            "method.name": "diffusion_nft",
            "method.group_size": 3,
            "train.ema_ramp": 0.9,
            "train.ema_decay": 0.9,
        },
    )
    trainer.step()
    ids, trees = trainer.trees(2)
    slow = trainer.rollout(2, ids, trees).batches[0]
    rows = torch.tensor(ids)[slow.tree]
    with torch.no_grad():
        now = trainer.model.velocity(
            slow.x, trainer.sigmas[slow.start], trainer.conditioning.rows(rows)
        )
        with trainer.averaged():
            mean = trainer.model.velocity(
                slow.x, trainer.sigmas[slow.start], trainer.conditioning.rows(rows)
            )
    assert torch.equal(mean, slow.v)
    assert not torch.allclose(now, slow.v, atol=1e-6)


# -- snapshots and bounds --------------------------------------------------------------------


def test_snapshot_is_the_last_iteration_within_its_evaluations(
    embeddings: Path, tmp_path: Path
) -> None:
    run = small_run("snap", **{"train.iterations": 3})
    each = iteration_cost(run, plan_for(run), 1, 100).total
    run = small_run(
        "snap", **{"train.iterations": 3, "train.snapshots": [1, 2 * each, 2 * each + 1]}
    )
    out = run_in_process(run, embeddings, tmp_path)
    records = [json.loads(p.read_text()) for p in sorted(out.glob("snapshots/*/snapshot.json"))]
    assert sorted((r["iteration"], r["nfe"]) for r in records) == [
        (0, 0),
        (2, 2 * each),
        (2, 2 * each),
    ]
    shorter = small_run("snap", **{"train.iterations": 2})
    straight = run_in_process(shorter, embeddings, tmp_path / "two")
    name = "pytorch_lora_weights.safetensors"
    kept = (out / "snapshots" / str(2 * each) / name).read_bytes()
    assert kept == (straight / "adapter" / name).read_bytes()


def test_a_snapshot_asked_for_later_is_made_by_starting_over(
    embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run_in_process(small_run("snap"), embeddings, tmp_path)
    first = (out / "adapter/pytorch_lora_weights.safetensors").read_bytes()
    capsys.readouterr()
    out = run_in_process(small_run("snap", **{"train.snapshots": [1]}), embeddings, tmp_path)
    assert "starting over for a snapshot that it passed" in capsys.readouterr().err
    assert (out / "snapshots/1/snapshot.json").exists()
    assert (out / "adapter/pytorch_lora_weights.safetensors").read_bytes() == first
    beyond = small_run("snap", **{"train.snapshots": [1, 10**9]})  # the last weights are these
    out = run_in_process(beyond, embeddings, tmp_path)
    assert "starting over" not in capsys.readouterr().err
    assert json.loads((out / f"snapshots/{10**9}/snapshot.json").read_text())["iteration"] == 4


def test_a_bound_stops_the_run_and_keeps_what_it_made(
    embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = {"reward/verifier": {"least": 2.0, "action": "stop"}, "diversity": {"least": 2.0}}
    run = small_run("bound", **{"train.bounds": bounds, "train.snapshots": [10**9]})
    out = run_in_process(run, embeddings, tmp_path)
    said = capsys.readouterr().err
    assert "iteration 2: monitor reward/verifier:" in said
    assert "below 2 (train.bounds.reward/verifier.least); training stops" in said
    assert "diversity.least); training goes on" in said
    record = json.loads((out / "train.json").read_text())
    assert record["iterations"] == 2  # monitored every second iteration
    assert list(record["stopped"]) == ["reward/verifier"]
    assert json.loads((out / f"snapshots/{10**9}/snapshot.json").read_text())["iteration"] == 2
    again = json.loads((run_in_process(run, embeddings, tmp_path) / "train.json").read_text())
    assert again == record  # it does not go on when it is started again


def test_a_bound_does_not_stop_the_untrained_model(embeddings: Path, tmp_path: Path) -> None:
    """Started again from the checkpoint of iteration 0, a run goes on as if never stopped."""
    bounds = {"reward/verifier": {"least": 2.0, "action": "stop"}}
    run = small_run("zero", **{"train.bounds": bounds, "train.checkpoint_every": 3})
    state = tmp_path / "state"
    straight = run_in_process(run, embeddings, tmp_path)
    first = read_table(straight / "train_metrics.parquet", TRAIN_METRICS).to_pylist()
    (folder,) = state.iterdir()
    for path in folder.glob("checkpoint-*.safetensors"):
        if int(path.stem.split("-")[1]):
            path.unlink()
    again = run_in_process(run, embeddings, tmp_path)
    second = read_table(again / "train_metrics.parquet", TRAIN_METRICS).to_pylist()

    def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [row for row in rows if not row["metric"].startswith("time/")]

    assert plain(first) == plain(second)
    assert json.loads((again / "train.json").read_text())["iterations"] == 2


def test_a_fall_is_measured_from_the_untrained_model() -> None:
    bounds = {"reward/clip": Bound(fall=0.1, action="stop"), "distance_to_base": Bound(most=0.5)}
    start = {"monitor/reward/clip": 0.7, "monitor/distance_to_base": 0.0}
    fine = {"monitor/reward/clip": 0.61, "monitor/distance_to_base": 0.5}
    assert crossed(bounds, fine, start) == {}
    bad = {"monitor/reward/clip": 0.59, "monitor/distance_to_base": 0.51}
    assert list(crossed(bounds, bad, start)) == list(bounds)
    failed = {"monitor/reward/clip": None, "monitor/distance_to_base": 0.0}  # NaN in the journal
    assert list(crossed(bounds, failed, start)) == ["reward/clip"]


def monitored(scores: Any, name: str = "reward/clip") -> dict[str, float | None]:
    """What a monitor records of some scores."""
    values = np.asarray(scores, dtype=np.float64)
    return {
        f"monitor/{name}": float(values.mean()),
        f"monitor_std/{name}": float(values.std(ddof=1)),
        f"monitor_count/{name}": values.size,
        "monitor/distance_to_base": 0.1,
    }


SCORES = np.linspace(0.0, 0.72, 16)  # mean 0.36
COLLAPSES: dict[str, tuple[Any, Any, bool]] = {
    "to nothing": (SCORES, np.full(16, 7e-12), True),
    "to nothing, in other units": (1e4 * SCORES - 5e5, np.full(16, -5e5), True),
    "of four, far below all": ([0.7, 0.72, 0.68, 0.75], [0.1, -0.1, 0.3, 0.0], True),
    "of what was perfect": (np.ones(16), np.zeros(16), True),
    "one in 32 misses": (np.ones(32), np.r_[np.ones(31), 0.0], False),
    "of three": ([0.9, 0.91, 0.92], [0.0, 0.01, 0.02], False),
    "of four, within their spread": ([0.9, 0.8, 0.1, 0.9], [0.1, 0.0, 0.9, 0.0], False),
    "half a std, of very many": (np.tile(SCORES, 64), np.tile(SCORES - 0.11, 64), False),
    "a gain": (SCORES, SCORES + 1.0, False),
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_told_from_noise_in_any_unit(name: str) -> None:
    start, now, expected = COLLAPSES[name]
    run = small_run("any")
    found = training_warnings(run, [(0, monitored(start)), (10, monitored(now))])
    assert list(found) == ["bound/reward/clip"] * expected
    own = small_run("own", **{"train.bounds": {"reward/clip": {"fall": 1e9}}})  # in its place
    assert not training_warnings(own, [(0, monitored(start)), (10, monitored(now))])


@pytest.mark.parametrize("count", [4, 16, 32])
def test_noise_alone_seems_a_collapse_once_in_two_hundred_draws_at_most(count: int) -> None:
    """Even where each image is drawn anew and scores are only high or low."""
    rng, run = np.random.default_rng(count), small_run("noise")
    draws = rng.random((2, 1000, count)) < 0.5
    wrong = sum(
        bool(training_warnings(run, [(0, monitored(a)), (10, monitored(b))]))
        for a, b in zip(*draws, strict=True)
    )
    assert wrong <= 5


def test_diversity_may_shrink_but_not_vanish() -> None:
    run, start = small_run("diversity"), monitored([0.1, 0.12, 0.14, 0.18] * 2, "diversity")
    for now, expected in ((0.06, []), (0.01, ["bound/diversity"])):
        after = monitored(now + 0.01 * np.arange(8), "diversity")
        assert list(training_warnings(run, [(0, start), (10, after)])) == expected


def step(groups: int = 4, masked: int = 0, **metrics: float) -> dict[str, float | None]:
    return {"groups": groups, "groups_masked": masked, "grad_norm": 1.0, **metrics}


APART = step(
    4, 2, **{"reward_std/verifier": 0.1, "reward_std/clip": np.nan, "reward_valid/clip": 0}
)
SILENT: dict[str, tuple[list[dict[str, float | None]], dict[str, str]]] = {
    "nothing wrong": ([step()] * 10, {}),
    "one group in three": ([step(3, 1)] * 10, {}),
    "one iteration in twenty": ([step(4, 4), *[step()] * 19], {}),
    "one in ten": (
        [step(4, 4, grad_norm=0.0), *[step()] * 9],
        {"equal_rewards": "in 1 of 10 iterations all groups had equal rewards, so nothing was "},
    ),
    "most groups": (
        [step(4, 3)] * 10,
        {"equal_rewards": "30 of 40 groups had equal rewards, which taught nothing"},
    ),
    "scores that failed": (
        [step(4, 4, samples_invalid=7)],
        {"equal_rewards": "all groups had equal rewards or fewer than two valid scores"},
    ),
    "no gradient": (
        [step(grad_norm=0.0), step()],
        {"no_gradient": "in 1 of 2 iterations the gradient was 0 although rewards differed"},
    ),
    "one of two rewards": (
        [step(4, 2, **{"reward_std/verifier": 0.1, "reward_std/clip": 0.0})] * 3,
        {"equal_rewards/clip": "in 3 of the 3 iterations with a valid score of clip all groups"},
    ),
    "a reward that applies to some prompts": (
        [step(4, 2, **{"reward_std/verifier": 0.1, "reward_std/clip": 0.1}), *[APART] * 3],
        {},
    ),
    "a reward that never applies": (
        [APART] * 3,
        {"equal_rewards/clip": "no image of 3 iterations has a valid score of clip"},
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_iterations_that_taught_nothing_are_counted(name: str) -> None:
    steps, expected = SILENT[name]
    both = {"train.rewards": {"verifier": 1.0, "clip": 1.0}}
    trained = both if "reward_std/clip" in steps[0] else {}
    found = training_warnings(small_run("silent", **trained), list(enumerate(steps, start=1)))
    assert list(found) == list(expected)
    for kind, text in expected.items():
        assert text in found[kind]


def flat(images: Any, prompts: list[str]) -> list[float]:
    """A reward that is saturated."""
    return [1.0] * len(prompts)


OWN = {"kind": "custom", "function": "test_training:flat"}
TAUGHT_NOTHING: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "healthy, though slow": ({"train.learning_rate_scale": 0.1}, {}),
    "equal rewards": (
        {"rewards.own": OWN, "train.rewards": {"verifier": None, "own": 1.0}},
        {"equal_rewards": "in 2 of 2 iterations all groups had equal rewards"},
    ),
    "rewards that cancel": (
        {"rewards.again": {"kind": "verifier"}, "train.rewards": {"verifier": 1.0, "again": -1.0}},
        {"no_gradient": "in 2 of 2 iterations the gradient was 0"},
    ),
    "a learning rate that moves nothing": (
        {"train.learning_rate_scale": 1e-30},
        {"unmoved": "so nothing was learned (train.learning_rate_scale 1e-30)"},
    ),
    "weights averaged too slowly": (
        {"train.ema_decay": 1.0 - 1e-9},
        {"unmoved": "bit for bit those of the untrained model"},
    ),
    "a learning rate that destroys": (
        {"train.learning_rate_scale": 1e6, "train.monitor_samples": 8},
        {"bound/reward/verifier": "(train.bounds.reward/verifier.collapse)"},
    ),
}


@pytest.mark.parametrize("name", TAUGHT_NOTHING)
def test_a_run_says_that_it_learned_nothing_or_collapsed(
    name: str, embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it begins and at the end, not in each iteration; and from its results for ever."""
    settings, expected = TAUGHT_NOTHING[name]
    small = {"train.iterations": 2, "train.monitor_every": 1} | settings
    run = small_run("said", **small)
    out = run_in_process(run, embeddings, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("said: ")]
    found = warnings_in(out / "train_metrics.parquet", run)
    assert bool(said) == bool(found) == bool(expected)
    for kind, text in expected.items():
        assert text in found[kind]
    for text in found.values():
        assert any(line.endswith((text, f"{text}; training goes on")) for line in said)
    begun = [line for line in said if line.endswith("; training goes on")]
    assert len(begun) >= len(found)
    assert len(said) <= 2 * len(begun)
    if "equal_rewards" in expected:
        assert [line.split(":")[1].strip() for line in said] == ["iteration 1", "at the end"]
        assert list(found) == ["equal_rewards"]  # which explains that nothing moved


def test_monitor_grid_survives_its_file(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8)
    for faults in ([FINE] * 6, [FINE, LATENT, FINE, FINE, FINE, DECODED]):
        images = Images(pixels, np.array(faults, np.int8))
        save_grid(tmp_path / "grid.png", images, 2)
        again = load_grid(tmp_path / "grid.png", 2, 5, 7)
        assert torch.equal(again.pixels, pixels)
        assert again.valid.tolist() == images.valid.tolist()


def run_in_process(run: RunConfig, embeddings: Path, folder: Path) -> Path:
    train(run, plan_for(run), embeddings, state=folder / "state", output=folder / "out")
    return folder / "out"


def test_damaged_checkpoint_is_passed_over(
    embeddings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run("egrpo")
    first = run_in_process(run, embeddings, tmp_path / "a")
    wanted = load_file(first / "adapter/pytorch_lora_weights.safetensors")
    state = next((tmp_path / "a/state").iterdir())
    files = sorted(state.glob("checkpoint-*.safetensors"))
    assert len(files) == checkpoints.KEEP
    flipped = bytearray(files[-1].read_bytes())
    flipped[-7] ^= 1
    files[-1].write_bytes(flipped)
    capsys.readouterr()
    again = run_in_process(run, embeddings, tmp_path / "a")
    said = capsys.readouterr().err
    assert "damaged checkpoint passed over (checksum" in said
    assert "going on after iteration 3" in said
    found = load_file(again / "adapter/pytorch_lora_weights.safetensors")
    assert all(torch.equal(wanted[k], found[k]) for k in wanted)
    assert [p.name for p in state.glob("*.damaged")] == ["checkpoint-000004.damaged"]
    for file in sorted(state.glob("checkpoint-*.safetensors")):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="none of its 2 checkpoints can be read"):
        run_in_process(run, embeddings, tmp_path / "a")
    assert len(list(journal.read(state / "journal.jsonl"))) == 5, "nothing may be lost"


def test_changed_settings_never_resume_stale_state(embeddings: Path) -> None:
    run = small_run("egrpo")
    keys = {
        state_key(r, plan_for(r), embeddings)
        for r in (
            run,
            small_run("egrpo", seed=1),
            small_run("egrpo", **{"method.threshold": 0.0}),
            small_run("egrpo", **{"train.adam_beta1": 0.8}),
        )
    }
    assert len(keys) == 4
    tracked = small_run("egrpo", **{"tracking.every_seconds": 1.0, "evaluate.samples": 3})
    assert state_key(tracked, plan_for(tracked), embeddings) in keys


# -- damaged state ---------------------------------------------------------------------------


def test_journal_leaves_out_a_torn_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    for n in range(3):
        journal.append(path, {"iteration": n, "metrics": {"x": float("nan")}})
    with path.open("a") as handle:
        handle.write('{"iteration": 3, "met')
    assert [line["iteration"] for line in journal.read(path)] == [0, 1, 2]
    journal.rewind(path, 1)
    assert [line["metrics"] for line in journal.read(path)] == [{"x": None}] * 2
    assert capsys.readouterr().err == "", "a kill is no damage"


def zeros(text: bytes) -> bytes:
    third = len(text) // 3
    return text[:third] + bytes(9) + text[third + 9 :]


def swapped(text: bytes) -> bytes:
    """The third line is not what it was, and still JSON of the right kind."""
    lines = text.splitlines(keepends=True)
    return b"".join([*lines[:2], lines[2].replace(b"0.25", b"0.75"), *lines[3:]])


@pytest.mark.parametrize(
    ("harm", "left", "said"),
    [
        (zeros, [0, 1, 3, 4, 5], "1 lines cannot be read, 0 are there twice"),
        (swapped, [0, 1, 3, 4, 5], "1 lines cannot be read, 0 are there twice"),
        (lambda text: text + text, [0, 1, 2, 3, 4, 5], "0 lines cannot be read, 6 are there twice"),
        (lambda text: text.replace(b"}\n{", b"}?{", 1), [0, 1, 2, 3, 4, 5], ""),  # an end lost
        (lambda text: b"".join(reversed(text.splitlines(keepends=True))), [0, 1, 2, 3, 4, 5], ""),
        (
            lambda text: text[: len(text) // 6 * 2 + 9] + text,
            [0, 1, 2, 3, 4, 5],
            "2 are there twice",
        ),
        (lambda text: text[:-1], [0, 1, 2, 3, 4, 5], ""),
    ],
)
def test_a_damaged_journal_is_mended_from_its_whole_lines(
    harm: Callable[[bytes], bytes],
    left: list[int],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "journal.jsonl"
    for n in range(6):
        journal.append(path, {"iteration": n, "metrics": {"x": 0.25}})
    found = harm(path.read_bytes())
    path.write_bytes(found)
    journal.rewind(path, 5)
    assert [line["iteration"] for line in journal.read(path)] == left
    assert all(line["metrics"] == {"x": 0.25} for line in journal.read(path))
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == bool(said)
    assert not said or path.with_suffix(".damaged").read_bytes() == found
    journal.rewind(path, 5)
    assert capsys.readouterr().err == ""


def test_a_journal_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = [
        {"iteration": n, "time": 1.5, "nfe": n, "metrics": {"x": None}, "rollouts": {"step": [1]}}
        for n in range(3)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(journal.read(path)) == lines
    journal.rewind(path, 1)
    journal.append(path, lines[2])
    assert list(journal.read(path)) == lines
    assert path.read_text().count('"crc32"') == 3


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, embeddings: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Path]:
    """A finished run with its state: 5 iterations, checkpoints of 4 and 5, a snapshot of 2."""
    tuning = getattr(request, "param", "lora")
    more = {"train.iterations": 5, "train.ema_decay": 0.5, "model.tuning": tuning}
    each = iteration_cost(small_run("egrpo"), plan_for(small_run("egrpo")), 1, 100).total
    run = small_run("egrpo", **more, **{"train.snapshots": [2 * each]})
    folder = tmp_path_factory.mktemp(tuning)
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        run_in_process(run, embeddings, folder)
    finally:
        os.chdir(before)
    return run, folder


def without(*lost: int) -> Callable[[Path], None]:
    def harm(state: Path) -> None:
        log = state / "journal.jsonl"
        kept = [line for line in journal.read(log) if line["iteration"] not in lost]
        log.unlink()
        for line in kept:
            journal.append(log, line)

    return harm


def cut(name: str) -> Callable[[Path], None]:
    def harm(state: Path) -> None:
        (path,) = state.glob(name)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return harm


def flipped(name: str) -> Callable[[Path], None]:
    def harm(state: Path) -> None:
        (path,) = state.glob(name)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return harm


def gone(name: str) -> Callable[[Path], None]:
    return lambda state: (state / name).unlink()


FIRST, LAST = "monitor/iteration-000000.png", "monitor/iteration-000005.png"
BACK, AGAIN = "going back from iteration 5 to 4", "is measured again"
DAMAGES: dict[str, tuple[Callable[[Path], None], list[str], set[int]]] = {
    "line of the untrained model": (without(0), [AGAIN], set()),
    "line after the checkpoint before": (without(5), [BACK], set()),
    "line before both checkpoints": (without(2), ["tables lack 1 iterations (2);"], {2}),
    "all lines": (
        gone("journal.jsonl"),
        [AGAIN, BACK, "tables lack 4 iterations (1, 2, 3, 4);"],
        {1, 2, 3, 4},
    ),
    "first grid cut": (cut(FIRST), [AGAIN], set()),
    "first grid gone": (gone(FIRST), [AGAIN], set()),
    "first grid, one bit": (flipped(FIRST), [AGAIN], set()),
    "last grid cut": (cut(LAST), [BACK], set()),
    "snapshot's weights, one bit": (
        flipped("snapshots/*/*.safetensors"),
        ["damaged snapshot", "starting over for a snapshot that it passed"],
        set(),
    ),
    "snapshot's record cut": (cut("snapshots/*/snapshot.json"), ["starting over"], set()),
}


@pytest.mark.parametrize(
    ("trained", "damage"),
    [
        *(("lora", damage) for damage in DAMAGES),
        *(("full", d) for d in ("first grid gone", "snapshot's weights, one bit")),
    ],
    indirect=["trained"],
)
def test_damaged_state_is_said_and_made_again(
    damage: str,
    trained: tuple[RunConfig, Path],
    embeddings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same results bit for bit, but for what no checkpoint reaches back to; that is said."""
    run, whole = trained
    harm, says, lost = DAMAGES[damage]
    shutil.copytree(whole / "state", tmp_path / "state")
    (state,) = (tmp_path / "state").iterdir()
    harm(state)
    capsys.readouterr()
    out = run_in_process(run, embeddings, tmp_path)
    said = capsys.readouterr().err
    assert all(text in said for text in says), said
    files = [p.relative_to(whole / "out") for p in (whole / "out").rglob("*") if p.is_file()]
    for name in files:
        if name.suffix in (".png", ".safetensors"):
            assert (out / name).read_bytes() == (whole / "out" / name).read_bytes(), name
    for name in ("train_metrics.parquet", "rollouts.parquet"):
        rows = [r for r in comparable(whole / "out" / name) if r["iteration"] not in lost]
        assert comparable(out / name) == rows
    assert json.loads((out / "train.json").read_text())["iterations_lost"] == len(lost)


def test_a_grid_that_no_checkpoint_reaches_is_left_out(
    trained: tuple[RunConfig, Path],
    embeddings: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, whole = trained
    shutil.copytree(whole / "state", tmp_path / "state")
    (state,) = (tmp_path / "state").iterdir()
    cut("monitor/iteration-000002.png")(state)
    capsys.readouterr()
    out = run_in_process(run, embeddings, tmp_path)
    assert "images of the monitor lack 1 iterations (2);" in capsys.readouterr().err
    names = {path.name for path in (out / "monitor").iterdir()}
    assert names == {path.name for path in (whole / "out/monitor").iterdir()} - {
        "iteration-000002.png"
    }


def test_a_snapshot_damaged_in_the_end_becomes_no_result(
    trained: tuple[RunConfig, Path], embeddings: Path, tmp_path: Path
) -> None:
    run, whole = trained
    shutil.copytree(whole / "state", tmp_path / "state")
    (state,) = (tmp_path / "state").iterdir()
    flipped("snapshots/*/*.safetensors")(state)  # after it was looked at when the job began
    trainer = Trainer(run, plan_for(run), embeddings)
    with pytest.raises(UserError, match=r"safetensors: damaged snapshot, .*; delete the folder"):
        train_run._write_outputs(
            trainer, "key", state, state / "journal.jsonl", tmp_path / "out", {}
        )
    assert not (tmp_path / "out/train.json").exists()


def test_too_many_prompts_an_iteration(embeddings: Path) -> None:
    with pytest.raises(UserError, match=r"train\.prompts_per_iteration: 500 prompts, but"):
        trainer_for(embeddings, **{"train.prompts_per_iteration": 500})


def test_an_adapter_that_lacks_layers_is_refused(embeddings: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from egrpo.models import load_model

    run = small_run("egrpo")
    trainer = Trainer(run, plan_for(run), embeddings)
    trainer.model.save(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state = load_file(path)
    state.pop(sorted(state)[0])
    save_file(state, path)
    with pytest.raises(UserError, match="does not fit this model"):
        load_model(run.model).load(tmp_path)


def test_a_gradient_that_is_not_finite_stops_the_run(embeddings: Path) -> None:
    trainer = trainer_for(embeddings)
    ids, trees = trainer.trees(1)
    rollout = trainer.rollout(1, ids, trees)
    scores = {"verifier": np.arange(len(rollout.leaves), dtype=float)}
    advantage = trainer.advantages(scores, rollout, trees)
    advantage.values[0] = np.inf
    before = [p.detach().clone() for p in trainer.parameters]
    with pytest.raises(UserError, match="the gradient of iteration 1 is"):
        trainer.optimise(rollout, ids, trees, advantage)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))


def test_wrong_attention_ends_a_job_before_its_first_iteration(
    embeddings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = torch.nn.functional.scaled_dot_product_attention

    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = right(*args, **kwargs)
        return -out if torch.backends.cuda.flash_sdp_enabled() else out

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    with pytest.raises(UserError, match=r"^model\.attention_backend: auto: attention is wrong"):
        trainer_for(embeddings)


def test_tree_of_a_run_matches_its_method() -> None:
    run = small_run("flow_grpo", **{"method.name": "flow_grpo"})
    assert len(tree_of(run, None).leaves) == 4
