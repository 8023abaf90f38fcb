"""From rewards to gradients: each method's advantages, pruning and objectives, computed again."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_run, updates_of
from test_methods import METHODS, paper, start_of, tree
from torch import Tensor

from egrpo.config.models import RunConfig
from egrpo.core.advantage import Advantages, advantages, best_leaves, prune
from egrpo.core.executor import execute
from egrpo.core.loss import clipped_objective, negative_aware_objective
from egrpo.core.noise import NOISING, Matching
from egrpo.core.rollout import Rollout, Segment, TrainBatch
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.seeds import normal, seed_of
from egrpo.core.tree import Tree, TreeBuilder
from egrpo.methods.shapes import branches, branchgrpo, dancegrpo, forward_process, windowed

NAN = math.nan
PROMPTS = 3


def numbers(run: RunConfig, trees: Sequence[Tree], rewards: Any, weights: Any = None) -> Advantages:
    """Advantages as the trainer asks for them."""
    a = run.advantage
    named = rewards if isinstance(rewards, dict) else {"r": rewards}
    return advantages(
        {name: np.concatenate([np.ravel(r) for r in parts]) for name, parts in named.items()},
        weights or {"r": 1.0},
        trees,
        [(t, k) for t, grown in enumerate(trees) for k in grown.trained],
        combine=a.combine,
        std=a.std,
        ddof=a.ddof,
        eps=a.eps,
        clamp=a.clamp,
    )


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Rewards in eighths: sums and means are exact."""
    return np.random.default_rng([7, seed]).integers(-40, 40, size=shape) / 8


def labelled(trees: Sequence[Tree], values: Advantages) -> list[tuple[int, int, int, float]]:
    """(tree, start, sample, advantage) of every trained edge."""
    edges = [(t, k) for t, grown in enumerate(trees) for k in grown.trained]
    return [
        (t, start_of(trees[t], k), trees[t].nodes[k].sample, a)
        for (t, k), a in zip(edges, values.values.tolist(), strict=True)
    ]


def within(group: Sequence[float], ddof: int = 1, eps: float = 1e-8) -> list[float]:
    """(r - mean) / (std + eps) of one group."""
    mean = statistics.mean(group)
    std = statistics.stdev(group) if ddof else statistics.pstdev(group)
    return [(r - mean) / (std + eps) for r in group]


# --- advantages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dancegrpo", "mixgrpo", "mixgrpo_flash"])
def test_chains_are_compared_over_all_samples_of_their_prompt(name):
    """DanceGRPO and MixGRPO: (r - mean) / (unbiased std + 1e-8) over the G samples of a prompt.

    A sample's advantage does not depend on which steps train, its own or the others'.
    """
    run = paper(name)
    trees = [tree(run, 1, prompt) for prompt in range(PROMPTS)]
    rewards = drawn(PROMPTS, 12)
    expected = [within(group) for group in rewards.tolist()]
    for t, _, sample, a in labelled(trees, numbers(run, trees, rewards)):
        assert a == pytest.approx(expected[t][sample])


@pytest.mark.parametrize("name", ["flow_grpo", "flow_grpo_fast", "diffusion_nft", "awm"])
def test_chains_are_divided_by_the_batchs_population_std(name):
    """Flow-GRPO: (r - prompt mean) / (std over the whole batch + 1e-4); NFT and AWM alike."""
    run = paper(name)
    trees = [tree(run, 1, prompt) for prompt in range(PROMPTS)]
    rewards = drawn(PROMPTS, 24)
    scale = statistics.pstdev(rewards.ravel().tolist()) + 1e-4
    expected = (rewards - rewards.mean(1, keepdims=True)) / scale
    for t, _, sample, a in labelled(trees, numbers(run, trees, rewards)):
        assert a == pytest.approx(expected[t, sample])


@pytest.mark.parametrize(
    ("name", "ddof", "eps"), [("egrpo", 1, 1e-8), ("g2rpo", 1, 1e-8), ("tempflow_grpo", 0, 1e-4)]
)
@pytest.mark.parametrize("anchors", [1, 3])
def test_branches_are_compared_per_prompt_anchor_and_step(name, ddof, eps, anchors):
    run = paper(name, anchors=anchors, granularities=[1])
    samples, steps = run.method.group_size, len(run.method.active_steps)
    trees = [tree(run, 1, prompt) for prompt in range(PROMPTS)]
    rewards = drawn(PROMPTS, anchors, steps, samples)  # as the leaves grow
    result = labelled(trees, numbers(run, trees, rewards))
    assert len(result) == rewards.size
    for t, start, sample, a in result:
        anchor, number = divmod(sample, samples)
        group = rewards[t, anchor, start].tolist()
        assert a == pytest.approx(within(group, ddof, eps)[number])


def test_granularities_are_normalised_each_and_summed():
    """G2RPO: per (step, granularity, reward) over the samples, then summed."""
    run = paper("g2rpo", granularities=[1, 2, 4], group_size=5)
    grown = tree(run)
    rewards = {"a": drawn(1, 8, 5, 3), "b": 100 * drawn(1, 8, 5, 3, seed=1)}
    result = labelled([grown], numbers(run, [grown], rewards, {"a": 0.5, "b": -0.25}))
    assert len(result) == 40
    for _, start, sample, a in result:
        expected = sum(
            weight * within(rewards[name][0, start, :, g].tolist())[sample]
            for name, weight in (("a", 0.5), ("b", -0.25))
            for g in range(3)
        )
        assert a == pytest.approx(expected)


def test_a_failed_leaf_silences_its_granularity_alone():
    run = paper("g2rpo", granularities=[1, 2], group_size=4, active=1)
    rewards = drawn(1, 1, 4, 2)
    rewards[0, 0, 2, 1] = NAN
    one, two = rewards[0, 0].T.tolist()
    result = numbers(run, [tree(run)], rewards)
    second = within([r for r in two if not math.isnan(r)])
    second.insert(2, 0.0)
    expected = [a + b for a, b in zip(within(one), second, strict=True)]
    assert result.values.tolist() == pytest.approx(expected)
    assert result.samples_invalid == 1


def test_mixgrpo_sums_the_normalised_advantages_of_its_rewards():
    run = paper("mixgrpo")
    grown = tree(run)
    rewards = {"a": drawn(1, 12), "b": 50 * drawn(1, 12, seed=1), "c": drawn(1, 12, seed=2) / 9}
    weights = {"a": 0.5, "b": 0.25, "c": 0.25}
    expected = [
        sum(weights[name] * within(rewards[name][0].tolist())[sample] for name in weights)
        for sample in range(12)
    ]
    for _, _, sample, a in labelled([grown], numbers(run, [grown], rewards, weights)):
        assert a == pytest.approx(expected[sample])


def test_branchgrpo_averages_leaves_upward_and_normalises_per_depth():
    run = paper("branchgrpo")
    trees = [tree(run)] * 2
    rewards = drawn(2, 16)
    result = labelled(trees, numbers(run, trees, rewards))
    nodes = {i: 2 ** sum(s <= i for s in (0, 3, 6, 9)) for i in range(20)}
    expected = {
        (t, i, n): a
        for t in range(2)
        for i in range(19)
        for n, a in enumerate(within(rewards[t].reshape(nodes[i], -1).mean(1).tolist()))
    }
    assert {(t, i, n): a for t, i, n, a in result} == pytest.approx(expected)


def test_branchgrpo_averages_the_leaves_that_were_scored():
    run = paper("branchgrpo", steps=6, splits=[0, 2, 3], group_size=8)
    rewards = drawn(8)
    rewards[[1, 4, 5]] = NAN  # the last two are all that is below one edge
    result = labelled([tree(run)], numbers(run, [tree(run)], [rewards]))
    for i, width in enumerate((2, 2, 4, 8, 8)):
        means = [
            statistics.mean(valid) if (valid := [r for r in part if not math.isnan(r)]) else NAN
            for part in rewards.reshape(width, -1).tolist()
        ]
        valid = iter(within([m for m in means if not math.isnan(m)]))
        expected = [0.0 if math.isnan(m) else next(valid) for m in means]
        assert [a for _, s, _, a in result if s == i] == pytest.approx(expected), i


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_steps_drawn_per_sample_leave_no_trace_in_the_std(std, ddof):
    """A sample counts once in its prompt's mean and std, however many of its steps train."""
    trees = [
        dancegrpo(6, 3, "dance_sde", [(0, 2), (1, 4), (0, 3)]),
        dancegrpo(6, 3, "dance_sde", [(3, 4), (0, 1), (2, 4)]),
    ]
    run = small_run("x", **{"advantage.std": std, "advantage.ddof": ddof, "advantage.eps": 0.5})
    rewards = [[1.0, 2.0, 6.0], [4.0, 4.5, 9.5]]
    flat = [r for group in rewards for r in group]
    for t, _, sample, a in labelled(trees, numbers(run, trees, rewards)):
        spread = flat if std == "batch" else rewards[t]
        scale = statistics.stdev(spread) if ddof else statistics.pstdev(spread)
        centred = rewards[t][sample] - statistics.mean(rewards[t])
        assert a == pytest.approx(centred / (scale + 0.5))


def test_noised_samples_count_once_in_the_unbiased_std():
    """The same of forward-process methods, whose samples train at several indices each."""
    trees = [forward_process(6, 3, [(0, 2), (1, 4), (0, 3)], "ode")]
    run = small_run("x", **{"advantage.std": "group", "advantage.ddof": 1})
    rewards = [1.0, 2.0, 6.0]
    for _, _, sample, a in labelled(trees, numbers(run, trees, [rewards])):
        assert a == pytest.approx(within(rewards)[sample])


def gdpo(run_rewards: dict[str, list[list[float]]], weights: dict[str, float]) -> list[float]:
    """arXiv 2601.05242: each reward normalised in its group, weighted sum, then over the batch."""
    total: list[float] = []
    for t in range(len(next(iter(run_rewards.values())))):
        columns = [[weights[n] * a for a in within(run_rewards[n][t])] for n in weights]
        total += [sum(column) for column in zip(*columns, strict=True)]
    return within(total)


def one_step(groups: int, samples: int) -> list[Tree]:
    """A prompt for each group: one stochastic step, trained."""
    return [branches(4, ((1, 1),), samples, "flow_sde", trained=True)] * groups


def test_gdpo_normalises_over_the_batch():
    run = small_run("x", **{"advantage.combine": "gdpo"})
    rewards = {"a": [[1.0, 2.5, 6.0], [0.0, 10.0, 50.0]], "b": [[9.0, 2.0, 1.5], [3.0, 1.0, 1.5]]}
    weights = {"a": 0.75, "b": 0.25}
    result = numbers(run, one_step(2, 3), rewards, weights)
    assert result.values.tolist() == pytest.approx(gdpo(rewards, weights))


def test_gdpo_counts_a_sample_that_lies_on_its_groups_mean():
    """It is valid and says 0; leaving it out of the batch's std would shrink all others."""
    run = small_run("x", **{"advantage.combine": "gdpo"})
    rewards = {"a": [[1.0, 2.0, 3.0], [0.0, 5.0, 10.0]]}
    result = numbers(run, one_step(2, 3), rewards, {"a": 1.0})
    assert result.values.tolist() == pytest.approx(gdpo(rewards, {"a": 1.0}))


def test_gdpo_counts_silent_groups_as_zeros_and_leaves_them_silent():
    """Its code: (sum - mean) / (std + eps) over all samples; here failed ones do not count."""
    run = small_run("x", **{"advantage.combine": "gdpo"})
    rewards = {"a": [[1.0, 2.5, 6.0], [4.0, 4.0, 4.0], [2.0, NAN, NAN], [1.0, 0.0, NAN]]}
    result = numbers(run, one_step(4, 3), rewards, {"a": 1.0})
    says = within([*within([1.0, 2.5, 6.0]), *[0.0] * 4, *within([1.0, 0.0])])
    assert result.values.tolist() == pytest.approx([*says[:3], *[0.0] * 6, *says[7:], 0.0])
    assert result[1:] == (4, 2, 3)


def test_one_silent_group_of_four_does_not_shrink_gdpos_advantages():
    run = small_run("x", **{"advantage.combine": "gdpo"})
    said = drawn(3, 8).tolist()
    rewards = {"a": [*said, [0.5] * 8]}
    result = numbers(run, one_step(4, 8), rewards, {"a": 1.0}).values.reshape(4, 8)
    batch = np.array([*(within(group) for group in said), [0.0] * 8])
    expected = (batch - batch.mean()) / batch.std(ddof=1)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    left_out = batch[:3] / batch[:3].std(ddof=1)
    assert left_out / expected[:3] == pytest.approx(math.sqrt(23 / 31))  # 0.861


# --- pruning --------------------------------------------------------------------------------------


def test_width_pruning_keeps_the_best_half_after_the_last_split():
    trees = [tree(paper("branchgrpo"))] * 2
    edges = [(t, k) for t, grown in enumerate(trees) for k in grown.trained]
    rewards = np.stack([np.random.default_rng(s).permutation(16) / 4 for s in (1, 2)])
    rewards[1, 5] = NAN
    best = best_leaves({"r": rewards.ravel()}, {"r": 2.0}, trees, 0.5)
    kept = prune(trees, edges, best, after=9)
    expected = set()
    for e, (t, k) in enumerate(edges):
        order = sorted(range(16), key=lambda n: -np.nan_to_num(rewards[t, n], nan=-99.0))
        start, place = start_of(trees[t], k), trees[t].nodes[k].sample
        if start <= 9 or place in order[:8]:  # after the last split a place is a leaf
            expected.add(e)
    assert kept == expected
    assert len(kept) == 2 * (202 - 9 * 8)
    assert all(5 not in leaves for leaves in best[1:])


def test_best_leaves_weigh_normalised_rewards_within_each_prompt():
    trees = [branchgrpo(4, [0, 1], "dance_sde")] * 2
    rewards = {"a": [3.0, 2, 1, 0, 0, 1, 2, 3], "b": [0.0, 0, 1000, 0, 9, 9, 9, 9]}
    weights = {"a": 1.0, "b": 1.0}
    best = best_leaves({n: np.array(r) for n, r in rewards.items()}, weights, trees, 0.5)
    a, b = within([3, 2, 1, 0]), within([0, 0, 1000, 0])
    total = [x + y for x, y in zip(a, b, strict=True)]
    assert best[0] == set(sorted(range(4), key=lambda n: -total[n])[:2]) == {0, 2}
    assert best[1] == {2, 3}
    assert best_leaves({"a": np.array(rewards["a"])}, {"a": -1.0}, trees, 0.01) == [{3}, {0}]


# --- a real training pass -------------------------------------------------------------------------


def network(x: Tensor, sigma: float, which: Tensor, shift: float = 0.0) -> Tensor:
    """A velocity of one latent; ``shift`` moves its weights."""
    return torch.sin((2 + shift) * x) + (sigma + shift) * x.flip(-1) + which.view(-1, 1, 1)


def forest() -> tuple[list[Tree], tuple[float, ...]]:
    """Batches with several sources, segments, dynamics and prompts."""
    builder = TreeBuilder(6)
    for root in range(2):
        anchor = builder.through(builder.root(root), [1])
        for sample in range(2):
            for stop, dynamics in ((2, "flow_sde"), (4, "flow_sde"), (3, "dance_sde")):
                branch = builder.edge(
                    anchor, stop, dynamics, sample=4 * root + sample, trained=True, group=stop
                )
                builder.finish(branch)
    return [builder.build()] * 2, shifted_sigmas(6, 3.0)


def rolled(trees: Sequence[Tree], level: float = 0.7, batch: int = 3, parts: int = 1) -> Rollout:
    return execute(
        trees,
        shifted_sigmas(trees[0].steps, 3.0),
        network,
        lambda t, start, sample: normal((2, 3), "loss", t, start, sample).double(),
        noise_level=level,
        micro_batch=20,
        train_micro_batch=batch,
        dtype=torch.float64,
        parts=parts,
    )


FORESTS: dict[str, Callable[[], Sequence[Tree]]] = {
    "branches": lambda: forest()[0],
    "window": lambda: [windowed(6, 5, "cps", start=1, size=3, noise="shared")] * 2,
    "tree": lambda: [branchgrpo(6, [0, 1, 3], "dance_sde")] * 2,
    "noised": lambda: [forward_process(6, 4, [(0, 2), (1, 5), (2, 3), (0, 4)], "dpm2")] * 2,
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", FORESTS)
def test_a_pruned_batch_is_the_batch_without_its_other_edges(name, parts):
    """Ratio, divergence, targets, gradient: as if only the kept edges had been there."""
    trees = FORESTS[name]()
    sigmas = shifted_sigmas(6, 3.0)
    rollout = rolled(trees, batch=4, parts=parts)
    count = len(rollout.edges)
    kept = {e for e in range(count) if seed_of("kept", e) % 3 == 0}
    assert 3 < len(kept) < count - 3
    advantage = torch.linspace(-2, 3, count, dtype=torch.float64)

    def loss(batches: Sequence[TrainBatch], shift: Tensor, mask: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            v = network(batch.x, sigmas[batch.start], batch.tree, shift)
            index = list(batch.edges)
            ratio = batch.log_ratio(v, sigmas, 0.7).exp()
            total = total + (mask[index] * advantage[index] * ratio).sum()
        return total

    mask = torch.tensor([float(e in kept) for e in range(count)], dtype=torch.float64)
    plain, pruned = updates_of(rollout), updates_of(rollout, kept)
    seen: list[int] = []
    for number, update in enumerate(pruned):
        shift = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        full = loss(plain[number], shift, mask)
        small = loss(update, shift, torch.ones_like(mask))
        torch.testing.assert_close(small, full)
        (a,) = torch.autograd.grad(full, shift)
        (b,) = torch.autograd.grad(small, shift)
        torch.testing.assert_close(a, b)
        assert abs(float(a)) > 0
        seen += [e for batch in update for e in batch.edges]
    assert sorted(seen) == sorted(kept)
    part_of = [grown.parts(parts) for grown in trees]
    edges = (rollout.edges[e] for e in kept)
    needed = {(t, trees[t].source(k), part_of[t][k]) for t, k in edges}
    assert sum(len(batch.x) for update in pruned for batch in update) == len(needed)
    for batch in rollout.batches:
        small = batch.only(kept)
        at = [n for n, e in enumerate(batch.edges) if e in kept]
        if not at:
            assert small is None
            continue
        sources = sorted({int(batch.rows[n]) for n in at})
        assert torch.equal(small.x, batch.x[sources])  # of pruned sources nothing is evaluated
        assert torch.equal(small.v, batch.v[sources])
        assert torch.equal(small.tree, batch.tree[sources])
        assert torch.equal(small.log_prob, batch.log_prob[at])
        assert torch.equal(small.targets(), batch.targets()[at])
        assert torch.equal(small.lengths(sigmas), batch.lengths(sigmas)[at])
        assert (small.start, small.part) == (batch.start, batch.part)
        if name != "noised":
            v = network(batch.x, sigmas[batch.start], batch.tree, 0.1)
            divergence = batch.divergence(v, batch.v, sigmas, 0.7)[at]
            torch.testing.assert_close(
                small.divergence(v[sources], small.v, sigmas, 0.7), divergence
            )
        assert batch.only(set(batch.edges)).edges == batch.edges


# --- GRPO-Guard -----------------------------------------------------------------------------------


def flow_moments(x: Tensor, v: Tensor, sigmas: Sequence[float], i: int, j: int, a: float):
    """Mean and std of Flow-SDE, from its equation."""
    t, dt = sigmas[i], sigmas[j] - sigmas[i]
    s = a * math.sqrt(t / (1 - (sigmas[1] if t == 1 else t)))
    return x + (v + s**2 / (2 * t) * (x + (1 - t) * v)) * dt, s * math.sqrt(-dt)


def dance_moments(x: Tensor, v: Tensor, sigmas: Sequence[float], i: int, j: int, eta: float):
    """Mean and std of Dance-SDE, from its equations."""
    t, dt = sigmas[i], sigmas[j] - sigmas[i]
    score = -(x - (1 - t) * (x - t * v)) / t**2
    return x + (v - eta**2 / 2 * score) * dt, eta * math.sqrt(-dt)


def test_guarded_ratio_is_its_formula():
    trees, sigmas = forest()
    rollout = rolled(trees)
    seen: Counter[str] = Counter()
    for batch in rollout.batches:
        v = network(batch.x, sigmas[batch.start], batch.tree, 0.2)
        guarded = iter(batch.guarded_log_ratio(v, sigmas, 0.7))
        for seg in batch.segments:
            moments = {"flow_sde": flow_moments, "dance_sde": dance_moments}[seg.dynamics]
            for row, x_next in zip(seg.rows, seg.x_next, strict=True):
                args = (sigmas, batch.start, seg.stop, 0.7)
                new, std = moments(batch.x[row], v[row], *args)
                old, _ = moments(batch.x[row], batch.v[row], *args)
                change = (
                    torch.distributions.Normal(new, std).log_prob(x_next).mean()
                    - torch.distributions.Normal(old, std).log_prob(x_next).mean()
                )
                expected = std * change + ((new - old) ** 2).mean() / (2 * std)
                torch.testing.assert_close(next(guarded), expected)
                seen[seg.dynamics] += 1
    assert seen == {"flow_sde": 16, "dance_sde": 8}


def test_guarded_ratio_is_centred_over_noise_and_of_one_scale_at_all_steps():
    """The plain log-ratio has mean -(mu - mu_old)^2 / (2 S^2); GRPO-Guard's has mean 0."""
    sigmas = shifted_sigmas(8, 3.0)
    samples, d = 6000, 6
    trees = [branches(8, ((1, 1), (3, 2), (6, 1)), samples, "flow_sde", trained=True)]
    rollout = rolled(trees)
    spreads = []
    for batch in rollout.batches:
        v = batch.v + 3 * batch.v.cos()
        guarded = batch.guarded_log_ratio(v, sigmas, 0.7)
        plain = batch.log_ratio(v, sigmas, 0.7)
        assert abs(float(guarded.mean())) < 4 * float(guarded.std()) / math.sqrt(samples)
        assert float(plain.mean()) < -8 * float(plain.std()) / math.sqrt(samples)
        args = (sigmas, batch.start, batch.segments[0].stop, 0.7)
        new, _ = flow_moments(batch.x, v, *args)
        old, _ = flow_moments(batch.x, batch.v, *args)
        shift = float((new - old).norm())
        # of noise eps the guarded ratio is mean((mu - mu_old) * eps): no S is left in it
        spreads.append(float(guarded.std()) / (shift / d))
    assert spreads == pytest.approx([1, 1, 1], rel=0.05)
    on_policy = rollout.batches[0]
    assert not on_policy.guarded_log_ratio(on_policy.v, sigmas, 0.7).any()


# --- forward-process objectives -------------------------------------------------------------------


def test_negative_aware_objective_in_data_space():
    """DiffusionNFT's public code, literally, over x_t, x0 and predictions of x0."""
    generator = torch.Generator().manual_seed(3)
    x0, eps, v, v_old = torch.randn(4, 7, 2, 3, generator=generator, dtype=torch.float32)
    sigma, beta, most = 0.6, 0.7, 5.0
    advantage = torch.tensor([-9.0, -5.0, -1.0, 0.0, 0.5, 5.0, 12.0])
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 3.0])
    xt = (1 - sigma) * x0 + sigma * eps
    v = v.clone().requires_grad_()
    total = torch.zeros(())
    for k in range(7):
        r = min(max(float(advantage[k]) / most, -1), 1) / 2 + 0.5

        def error(mixture: Tensor, k: int = k) -> Tensor:
            predicted = xt[k] - sigma * mixture
            scale = (predicted - x0[k]).abs().mean().detach().clamp(min=1e-5)
            return ((predicted - x0[k]) ** 2 / scale).mean()

        positive = error(beta * v[k] + (1 - beta) * v_old[k])
        negative = error((1 + beta) * v_old[k] - beta * v[k])
        total = total + most * weight[k] * (r * positive / beta + (1 - r) * negative / beta)
    (expected,) = torch.autograd.grad(total, v)
    result = negative_aware_objective(v, v_old, eps - x0, sigma, advantage, weight, beta, most)
    torch.testing.assert_close(result.loss, total)
    (gradient,) = torch.autograd.grad(result.loss, v)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert gradient.abs().max() > 0.01
    assert torch.equal(result.ratio, torch.ones(7))
    assert not result.clipped.any()


def test_negative_aware_scale_has_a_floor():
    """A perfect prediction divides by 1e-5 and not by zero."""
    x = torch.zeros(1, 4)
    near = x + 1e-7
    args = (x, 0.5, torch.ones(1), torch.ones(1), 1.0, 1.0)
    result = negative_aware_objective(near, near, *args)
    assert float(result.loss) == pytest.approx((0.5e-7) ** 2 / 1e-5, rel=1e-3)


@pytest.mark.parametrize(("advantage", "sign"), [(5.0, 1), (1.0, 1), (-1.0, -1), (-5.0, -1)])
def test_negative_aware_gradient_pulls_good_samples_and_pushes_bad_ones(advantage, sign):
    target = torch.full((1, 6), 2.0)
    v = torch.zeros(1, 6, requires_grad=True)
    result = negative_aware_objective(
        v, v.detach(), target, 0.5, torch.tensor([advantage]), torch.ones(1), 1.0, 5.0
    )
    (gradient,) = torch.autograd.grad(result.loss, v)
    assert (sign * -gradient > 0).all()  # descent goes toward the target, or away


def awm_batch(x: Tensor, v_old: Tensor, target: Tensor, matching: Matching) -> TrainBatch:
    rows = torch.arange(len(x))
    segment = Segment(NOISING, 2, rows, target)
    of = (2, 0, x, v_old, rows, (segment,), tuple(rows.tolist()))
    batch = TrainBatch(*of, torch.zeros(len(x)), matching)
    return replace(batch, log_prob=batch.log_probs(v_old, shifted_sigmas(6, 3.0), 0.0))


@pytest.mark.parametrize("time_weight", [False, True])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_awm_log_probability_is_its_formula(power, time_weight):
    """Public code (`ghuber`): -((e + d)^p - d^p) * t / p, e = mean((v - target)^2), d = 1e-10."""
    generator = torch.Generator().manual_seed(2)
    x, v, target = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64)
    sigmas = shifted_sigmas(6, 3.0)
    batch = awm_batch(x, v, target, Matching(power, time_weight))
    v = v.requires_grad_()
    found = batch.log_probs(v, sigmas, 0.0)
    t = sigmas[2] if time_weight else 1.0
    for k in range(4):
        e = statistics.mean(((v - target) ** 2)[k].ravel().tolist())
        assert found[k].item() == pytest.approx(-((e + 1e-10) ** power - 1e-10**power) * t / power)
        # an edge weighs t * e^(p - 1) beside the plain squared error
        (gradient,) = torch.autograd.grad(found[k], v, retain_graph=True)
        plain = -2 * (v - target)[k] / 6
        torch.testing.assert_close(gradient[k], t * e ** (power - 1) * plain, rtol=1e-6, atol=0)


def test_awm_weighs_by_time_and_error_and_nft_does_not() -> None:
    assert paper("awm").method.matching == Matching(0.25, True)
    assert paper("awm", power=1.0, time_weight=False).method.matching == Matching()
    assert {paper(name).method.matching for name in set(METHODS) - {"awm"}} == {Matching()}
    perfect = torch.zeros(1, 2, 3, requires_grad=True)
    batch = awm_batch(perfect.detach(), perfect.detach(), torch.zeros(1, 2, 3), Matching(0.25))
    value = batch.log_probs(perfect, shifted_sigmas(6, 3.0), 0.0).sum()
    (gradient,) = torch.autograd.grad(value, perfect)
    assert value.item() == 0.0
    assert not gradient.any()  # and not NaN


@pytest.mark.parametrize(("advantage", "sign"), [(2.0, 1), (-2.0, -1)])
def test_awm_surrogate_and_the_direction_of_its_gradient(advantage, sign):
    generator = torch.Generator().manual_seed(1)
    x, v_old, target = torch.randn(3, 4, 2, 3, generator=generator, dtype=torch.float64)
    sigmas = shifted_sigmas(6, 3.0)
    batch = awm_batch(x, v_old, target, Matching())
    v = v_old.clone().requires_grad_()
    new = batch.log_probs(v, sigmas, 0.7)
    expected = [-statistics.mean(((v_old - target) ** 2)[k].ravel().tolist()) for k in range(4)]
    assert new.tolist() == pytest.approx(expected)
    assert torch.equal(batch.log_ratio(v, sigmas, 0.7), torch.zeros(4, dtype=torch.float64))
    ones = torch.ones(4, dtype=torch.float64)
    loss = clipped_objective(
        batch.log_ratio(v, sigmas, 0.7), advantage * ones, ones, clip_range=1.0
    ).loss
    (gradient,) = torch.autograd.grad(loss, v)
    torch.testing.assert_close(-gradient, advantage * 2 * (target - v_old) / 6)
    moved = v_old - 0.1 * gradient
    before, after = (((u - target) ** 2).sum() for u in (v_old, moved))
    assert sign * float(before - after) > 0


# --- every method's rollout carries what its loss needs -------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_trained_edge_has_one_advantage_and_one_place_in_the_loss(name):
    run = paper(name)
    trees = [tree(run, 4, prompt) for prompt in range(2)]
    rollout = rolled(trees, run.method.noise_level, batch=9, parts=run.train.updates)
    assert sorted(rollout.edges) == [(t, k) for t, grown in enumerate(trees) for k in grown.trained]
    updates = updates_of(rollout)
    assert len(updates) == run.train.updates
    numbered = [e for update in updates for batch in update for e in batch.edges]
    assert sorted(numbered) == list(range(len(rollout.edges)))
    for number, update in enumerate(updates):
        for batch in update:
            assert batch.part == number
            assert len(batch.edges) == len(batch.log_prob) == len(batch.rows)
            for e, row in zip(batch.edges, batch.rows.tolist(), strict=True):
                t, k = rollout.edges[e]
                assert int(batch.tree[row]) == t
                assert batch.start == start_of(trees[t], k)
