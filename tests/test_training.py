"""An iteration of the trainer on the shipped toy model: ratios, updates, averages, images."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ADAPTER, sampled, small_run, trainer_for, velocity_at
from safetensors.torch import load_file

from egrpo.core.rollout import Rollout
from egrpo.errors import UserError
from egrpo.images import DECODED, FINE, LATENT, Images
from egrpo.measure.monitors import load_grid, measure, save_grid
from egrpo.planning.trees import iteration_cost
from egrpo.store import checkpoint as checkpoints
from egrpo.store.tables import TRAIN_METRICS, read_table
from egrpo.train import learner
from egrpo.train.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = yaml.safe_load("""
egrpo: {}
egrpo bfloat16: {model.dtype: bfloat16}
egrpo unmerged: {model.merge_lora_for_sampling: false}
egrpo full tuning: {model.tuning: full, train.kl_weight: 0.1}
egrpo small micro-batches: {train.micro_batch: 5, train.train_micro_batch: 1}
egrpo checkpointed: {train.gradient_checkpointing: true}
egrpo cps: {method.dynamics: cps, method.threshold: 0.0}
egrpo dance_sde: {method.dynamics: dance_sde, method.threshold: 0.0}
egrpo, a step of the optimizer after each active step as in its public code: {train.updates: 3}
egrpo subset, coarse second-order suffix, updates: {method.active_per_iteration: 2,
  method.granularities: [2], method.suffix: dpm2, train.updates: 2}
flow_grpo: {method.name: flow_grpo}
flow_grpo guarded: {method.name: flow_grpo, train.loss: guarded}
flow_grpo bfloat16: {method.name: flow_grpo, model.dtype: bfloat16}
g2rpo: {method.name: g2rpo, method.active: 3, method.group_size: 3}
tempflow_grpo: {method.name: tempflow_grpo, method.active: 3, method.anchors: 2}
flow_grpo_fast: {method.name: flow_grpo_fast, method.group_size: 4}
dancegrpo: {method.name: dancegrpo, method.group_size: 3, method.steps: 6}
mixgrpo_flash: {method.name: mixgrpo_flash, method.group_size: 4, method.steps: 9}
branchgrpo: {method.name: branchgrpo, method.steps: 5, method.splits: [0, 2],
  method.group_size: 4, train.updates: 4}
diffusion_nft: {method.name: diffusion_nft, method.group_size: 3}
awm: {method.name: awm, method.group_size: 3}
""")


def copies(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.parameters]


def learn(trainer: Trainer, score: Any) -> tuple[Rollout, list[int], Any]:
    """The first iteration with scores of its leaves; its rollout, prompts and advantages."""
    rollout, ids, trees = sampled(trainer)
    scores = {"verifier": score(len(rollout.leaves))}
    values = trainer.advantages(scores, rollout, trees).values
    trainer.learner.optimize(1, rollout, ids, trees, values)
    return rollout, ids, values


def equal(these: Any, those: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_ratio_is_exactly_one_at_the_first_update_and_counts_are_predicted(name, embeddings):
    trainer = trainer_for(embeddings, **VARIANTS[name])
    before, updates = copies(trainer), trainer.run.train.updates
    metrics, rows = trainer.step()
    assert metrics["on_policy_ratio_deviation"] == 0.0
    if updates == 1:
        assert metrics["clip_fraction"] == 0.0
    assert not equal(before, trainer.parameters)
    state = trainer.learner.optimizer.state_dict()["state"]
    assert {int(s["step"]) for s in state.values()} == {updates}
    cost = iteration_cost(trainer.run, trainer.plan, 1, len(trainer.texts))
    assert {k: trainer.counts[k] for k in ("forward", "train", "reference")} == cost._asdict()
    _, trees = trainer.trees(1)
    assert len(rows["step"]) == sum(len(tree.trained) for tree in trees)


@pytest.mark.parametrize("merge", [True, False])
def test_changed_weights_move_the_ratio_and_sample_at_once(merge, embeddings):
    """The exactness above is no tautology; and nothing must be told of a change."""
    trainer = trainer_for(embeddings, **{"model.merge_lora_for_sampling": merge})
    rollout, ids, trees = sampled(trainer)
    model, before = trainer.model, copies(trainer)
    with torch.no_grad():
        for p in trainer.parameters:
            p.data.add_(0.01 * torch.randn_like(p))
    batch, level = rollout.batches[0], trainer.run.method.noise_level
    new = batch.log_probs(velocity_at(trainer, ids, batch), trainer.sigmas, level)
    assert (new - batch.log_prob).abs().max() > 1e-6
    live = trainer.rollout(1, ids, trees).leaves
    assert (live - rollout.leaves).abs().max() > 1e-3
    with model.sampling() as network, torch.no_grad():
        assert (network is model.transformer) is not merge
        of = torch.randn(2, *model.image_shape), 0.7
        prompts = trainer.conditioning.batch([0, 1], model.device)
        pair = model.velocity(*of, prompts), model.velocity(*of, prompts, network)
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    for p, value in zip(trainer.parameters, before, strict=True):
        p.data.copy_(value)
    assert torch.equal(trainer.rollout(1, ids, trees).leaves, rollout.leaves)


def test_an_update_makes_good_samples_likelier(embeddings):
    trainer = trainer_for(embeddings, **{"method.group_size": 8, "method.active": 4})
    rollout, ids, values = learn(trainer, lambda n: np.random.default_rng(0).normal(size=n))
    gain = 0.0
    for batch in rollout.batches:
        v, level = velocity_at(trainer, ids, batch), trainer.run.method.noise_level
        moved = batch.log_ratio(v, trainer.sigmas, level)
        gain += float((torch.tensor(values[list(batch.edges)]) * moved).sum())
    assert gain > 0


def test_accumulated_gradient_equals_that_of_one_batch(embeddings):
    gradients = []
    for size in (1, 16):
        trainer = trainer_for(embeddings, **{"train.train_micro_batch": size})
        trainer.learner.optimizer.zero_grad = lambda: None
        learn(trainer, lambda n: np.arange(n) ** 1.5)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-7)
    assert gradients[0].abs().max() > 1e-5


def test_a_gradient_that_is_not_finite_stops_the_run(embeddings):
    trainer = trainer_for(embeddings)
    before, (rollout, ids, trees) = copies(trainer), sampled(trainer)
    with pytest.raises(UserError, match="the gradient of iteration 1 is"):
        trainer.learner.optimize(1, rollout, ids, trees, [np.inf] * len(rollout.edges))
    assert equal(before, trainer.parameters)


def test_pruned_leaves_need_no_training(embeddings):
    method = {"name": "branchgrpo", "steps": 6, "splits": [0, 1], "group_size": 4}
    of = {f"method.{k}": v for k, v in {**method, "width_share": 0.5}.items()}
    trainer = trainer_for(embeddings, **of, **{"train.updates": 1})
    most = iteration_cost(trainer.run, trainer.plan, 1, len(trainer.texts))
    metrics, _ = trainer.step()
    # per prompt: 1 + 2 sources up to the last split, then 2 of 4 leaves for the 3 steps after it
    assert trainer.counts["train"] == 2 * (1 + 2 + 2 * 3) < most.train == 2 * (1 + 2 + 4 * 3)
    assert metrics["on_policy_ratio_deviation"] < 1e-5  # smaller chunks round otherwise


def test_prompts_of_an_epoch_are_each_seen_once(embeddings):
    trainer = trainer_for(embeddings, **{"train.prompts_per_iteration": 4})
    per_epoch = len(trainer.texts) // 4
    seen = [i for k in range(1, per_epoch + 1) for i in trainer.trees(k)[0]]
    assert sorted(seen) == sorted(set(seen))
    assert trainer.trees(1)[0] != trainer.trees(per_epoch + 1)[0]
    with pytest.raises(UserError, match=r"train\.prompts_per_iteration: 500 prompts, but"):
        trainer_for(embeddings, **{"train.prompts_per_iteration": 500})


def test_attention_is_checked_before_the_first_iteration(embeddings, monkeypatch):
    asked: list[Any] = []
    monkeypatch.setattr(learner, "check_attention", lambda *of: asked.append(of))
    trainer = trainer_for(embeddings)
    assert asked == [(trainer.model, trainer.conditioning)]


# -- averaged weights ------------------------------------------------------------------------


def test_average_follows_the_weights_and_is_what_is_saved(jobs):
    trainer = trainer_for(jobs.embeddings, **{"train.ema_decay": 0.5})
    before = copies(trainer)
    trainer.step()
    live, means = copies(trainer), trainer.average.weights
    assert means is not None
    for old, new, mean in zip(before, live, means, strict=True):
        torch.testing.assert_close(mean, 0.5 * old + 0.5 * new)
    with trainer.average.applied():
        assert equal(means, trainer.parameters)
    assert equal(live, trainer.parameters)
    saved = load_file(jobs(trainer.run) / ADAPTER)
    kept = checkpoints.latest(next((jobs.folder / "state").iterdir()))
    assert kept is not None
    lora = trainer.run.model.lora
    names = [n for n, p in trainer.model.transformer.named_parameters() if p.requires_grad]
    both = [[kept.tensors[f"{kind}/{n}"] for n in range(len(names))] for kind in ("ema", "weight")]
    for name, mean in zip(names, both[0], strict=True):
        scale = lora.alpha / lora.rank if "lora_B" in name else 1.0
        assert torch.equal(saved[f"transformer.{name.replace('.default', '')}"], scale * mean)
    assert not equal(*both)


def test_average_of_flow_grpos_lineage_warms_up_and_moves_at_every_eighth_step(embeddings):
    """Its public code: where (n + 1) % 8 == 0, with decay min((1 + n) / (10 + n), 0.9)."""
    for name in ("flow_grpo", "flow_grpo_fast", "tempflow_grpo"):
        t = small_run("x", **{"method.name": name}).train
        assert (t.ema_decay, t.ema_ramp, t.ema_every) == (0.9, "warm_up", 8), name
    of = {"method.name": "flow_grpo", "train.ema_decay": 0.5, "train.ema_every": 4}
    trainer = trainer_for(embeddings, **of)
    mean, steps = copies(trainer), 0

    def follow(*of: Any) -> None:
        nonlocal mean, steps
        steps += 1
        if steps in (3, 7, 11):
            decay = {3: 4 / 13, 7: 8 / 17, 11: 0.5}[steps]
            pairs = zip(mean, copies(trainer), strict=True)
            mean = [decay * m + (1 - decay) * p for m, p in pairs]

    trainer.learner.optimizer.register_step_post_hook(follow)
    for _ in range(6):
        trainer.step()
    assert steps == trainer.learner.steps == 12
    for found, expected in zip(trainer.average.weights or [], mean, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("iterations", "short"), [(3, True), (4, False)])
def test_a_run_too_short_for_its_average_says_so(iterations, short, jobs):
    of = {"method.name": "flow_grpo", "train.monitor_every": 0, "train.iterations": iterations}
    record = json.loads((jobs("r", **of) / "train.json").read_text())
    said = (
        ""
        if not short
        else (
            "r: train.ema_every: the averaged weights, which are kept and evaluated, first move "
            "after optimizer step 7, and this run takes 6: its result is the untrained model\n"
        )
    )
    assert "".join(x for x in jobs.said().splitlines(True) if "ema_every" in x) == said
    assert record["nfe_monitor"] == small_run().evaluate.steps, "one image, for the weights' sake"


def test_penalty_of_awm_is_the_distance_to_the_averaged_weights(embeddings):
    """Its public code: 1 * mean((v - v_average)^2), average min(0.3, 0.001 n) of the old one."""
    of = {"method.name": "awm", "method.group_size": 3}
    t = small_run("x", **of).train
    assert (t.ema_weight, t.ema_decay, t.ema_ramp, t.kl_weight) == (1.0, 0.3, 0.001, 1e-4)
    alone = {"train.ema_ramp": 0.3, "train.kl_weight": 0.0, "train.ema_weight": 2.0}
    trainer = trainer_for(embeddings, **of, **alone)
    for _ in range(2):
        trainer.step()
    rollout, ids, trees = sampled(trainer, 3)
    live, total, count = copies(trainer), 0.0, 0
    for batch in rollout.batches:
        v = velocity_at(trainer, ids, batch)
        with trainer.average.applied():
            mean = velocity_at(trainer, ids, batch)
        total += float(((v - mean) ** 2).mean((1, 2, 3)).sum())
        count += len(batch.x)
    assert total > 0
    assert equal(live, trainer.parameters)
    nothing = [0.0] * len(rollout.edges)  # but the penalty is left
    metrics = trainer.learner.optimize(3, rollout, ids, trees, nothing)
    assert metrics["loss"] == pytest.approx(2 * total / count, rel=1e-4)
    assert metrics["grad_norm"] > 0
    assert metrics["on_policy_ratio_deviation"] == 0.0


def test_averaged_weights_sample_where_asked(embeddings):
    """DiffusionNFT's slow policy: after an update its velocities differ from the trained ones."""
    of = {"method.name": "diffusion_nft", "method.group_size": 3}
    trainer = trainer_for(embeddings, **of, **{"train.ema_ramp": 0.9, "train.ema_decay": 0.9})
    trainer.step()
    rollout, ids, _ = sampled(trainer, 2)
    slow = rollout.batches[0]
    with trainer.average.applied():
        assert torch.equal(velocity_at(trainer, ids, slow), slow.v)
    assert not torch.allclose(velocity_at(trainer, ids, slow), slow.v, atol=1e-6)


# -- rewards and images that are none ----------------------------------------------------------


@pytest.mark.parametrize("trained", [["verifier"], ["verifier", "clip"]])
def test_nan_rewards_are_counted_and_all_nan_is_refused(trained, embeddings):
    trainer = trainer_for(embeddings, **{"train.rewards": dict.fromkeys(trained, 1.0)})
    rollout, _, trees = sampled(trainer)
    scores = np.random.default_rng(0).normal(size=len(rollout.leaves))
    scores[::5] = np.nan
    some = trainer.advantages(dict.fromkeys(trained, scores), rollout, trees)
    assert some.samples_invalid == len(scores[::5])
    assert np.isfinite(some.values).all()
    nothing = dict.fromkeys(trained, np.full_like(scores, np.nan))
    with pytest.raises(UserError, match=rf"rewards\.{', '.join(trained)}: every image of iterati"):
        trainer.advantages(nothing, rollout, trees)


def test_a_reward_may_apply_to_some_of_the_prompts(jobs, monkeypatch):
    """One prompt an iteration, and so of one kind; each kind has a reward of its own."""
    (jobs.folder / "by_kind.py").write_text(
        "def score(images, prompts, small):\n"
        "    red = images[:, 0].float().mean((1, 2)).tolist()\n"
        "    return [r if ('small' in p) == small else None for r, p in zip(red, prompts)]\n"
    )
    monkeypatch.syspath_prepend(jobs.folder)
    own = {"small": True, "large": False}
    custom = {"kind": "custom", "function": "by_kind:score"}
    given = {f"rewards.{n}": {**custom, "options": {"small": is_so}} for n, is_so in own.items()}
    few: dict[str, Any] = {"prompts_per_iteration": 1, "iterations": 6, "monitor_every": 6}
    few["rewards"] = {"small": 1.0, "large": 1.0, "verifier": None}
    out = jobs("mixed", **given, **{f"train.{k}": v for k, v in few.items()})
    found: dict[str, list[Any]] = {}
    for row in read_table(out / "train_metrics.parquet", TRAIN_METRICS).to_pylist():
        found.setdefault(row["metric"], []).append(row["value"])
    counts = list(zip(found["reward_valid/small"], found["reward_valid/large"], strict=True))
    assert set(counts) == {(9.0, 0.0), (0.0, 9.0)}, "3 steps of 3 samples"
    said = jobs.said()
    for name, valid in zip(own, zip(*counts, strict=True), strict=True):
        means = found[f"reward/{name}"]
        assert [mean is None for mean in means] == [count == 0 for count in valid]
        assert found[f"monitor/reward/{name}"][-1] > 0, "a mean over what it applies to"
        assert said.count(f"rewards.{name}: every image of iteration") == 1
    assert "reward/verifier" not in found
    assert not any(found["samples_invalid"])
    assert min(found["advantage_abs_mean"]) > 0.1, "every iteration teaches something"


@pytest.mark.parametrize(("every", "what"), [(1, "monitor"), (0, "one image")])
def test_a_last_iteration_that_destroys_the_weights_is_no_success(every, what, jobs):
    far = {"train.learning_rate_scale": 1e30, "train.iterations": 1, "train.monitor_every": every}
    for _ in range(2):  # started again it is none either
        with pytest.raises(UserError, match=f"run far: {what} of iteration 1: .* have diverged; "):
            jobs("far", **far)
    assert not (jobs.folder / "out").exists()


@pytest.mark.usefixtures("spoilt")
def test_images_that_are_none_have_no_say(embeddings, capsys):
    trainer = trainer_for(embeddings, **{"train.decode_batch": 6, "train.micro_batch": 2})
    for _ in range(2):
        metrics, _ = trainer.step()
        assert metrics["samples_invalid"] == 3, "the first of each batch of 6"
        assert metrics["reward_valid/verifier"] == 15
        assert np.isfinite(list(metrics.values())).all()
    measured, images = trainer.monitor.look(trainer.iteration)
    assert images.valid.tolist() == [False, True] * 2
    assert measured["monitor/images_invalid"] == 2
    assert np.isfinite(measured["monitor/reward/verifier"])
    assert np.isnan(measured["monitor/diversity"]), "no prompt has two images"
    assert measured["monitor/distance_to_base"] == 0.0
    said = capsys.readouterr().err
    assert "monitor of iteration 2: 2 of 4 images are NaN or infinite" in said
    assert said.count("NaN or infinite") == 1, "in iterations they are counted"


def test_distances_are_between_images():
    pixels, base = torch.randint(0, 256, (2, 6, 3, 5, 7), dtype=torch.uint8)
    some = Images(pixels, np.array([FINE, LATENT, FINE, FINE, DECODED, FINE], np.int8))
    other = Images(base, np.array([FINE, FINE, LATENT, FINE, FINE, FINE], np.int8))
    found = measure({}, some, other, 3)

    def rms(*pairs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        each = [((a.double() - b.double()) / 255).square().mean().sqrt() for a, b in pairs]
        return pytest.approx(float(torch.stack(each).mean()))

    a_pair_of_each_prompt = (pixels[0], pixels[2]), (pixels[3], pixels[5])
    assert found["monitor/diversity"] == rms(*a_pair_of_each_prompt)
    assert found["monitor/distance_to_base"] == rms(*((pixels[n], base[n]) for n in (0, 3, 5)))
    assert found["monitor/images_invalid"] == 2
    lost = Images(pixels, np.full(6, LATENT, np.int8))
    nothing = measure({}, lost, Images.whole(base), 3)
    assert np.isnan([nothing[f"monitor/{m}"] for m in ("diversity", "distance_to_base")]).all()


def test_monitor_grid_survives_its_file(tmp_path):
    pixels = torch.randint(0, 256, (6, 3, 5, 7), dtype=torch.uint8)
    for faults in ([FINE] * 6, [FINE, LATENT, FINE, FINE, FINE, DECODED]):
        images = Images(pixels, np.array(faults, np.int8))
        save_grid(tmp_path / "grid.png", images, 2)
        again = load_grid(tmp_path / "grid.png", 2, 5, 7)
        assert torch.equal(again.pixels, pixels)
        assert again.valid.tolist() == images.valid.tolist()
