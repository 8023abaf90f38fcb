"""Advantages and the clipped loss, by hand and by invariance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from egrpo.core.advantage import Advantages, advantages, best_leaves, edge_values, normalise
from egrpo.core.loss import clipped_objective, velocity_distance
from egrpo.core.tree import Tree, TreeBuilder
from egrpo.methods.shapes import branches, chains

NAN = math.nan


def edges_of(trees: Sequence[Tree]) -> list[tuple[int, int]]:
    return [(t, k) for t, tree in enumerate(trees) for k in tree.trained]


def two_groups(samples: int = 3) -> list[Tree]:
    """One prompt, two active steps of ``samples`` samples; leaves in the order of the edges."""
    return [branches(4, ((0, 1), (1, 2)), samples, "flow_sde", trained=True)]


def compute(
    rewards: Sequence[float] | Mapping[str, Sequence[float]],
    trees: Sequence[Tree],
    weights: Mapping[str, float] | None = None,
    **how,
) -> Advantages:
    named = rewards if isinstance(rewards, Mapping) else {"r": rewards}
    arrays_ = {name: np.array(values, dtype=np.float64) for name, values in named.items()}
    return advantages(arrays_, weights or {"r": 1.0}, trees, edges_of(trees), **how)


def by_hand(group: Sequence[float]) -> list[float]:
    mean, std = statistics.mean(group), statistics.stdev(group)
    return [(r - mean) / (std + 1e-8) for r in group]


# --- advantages -----------------------------------------------------------------------------------


def test_groups_are_normalised_by_their_own_mean_and_unbiased_std():
    result = compute([1, 2, 6, 10, 10, 40], two_groups())
    np.testing.assert_allclose(result.values, by_hand([1, 2, 6]) + by_hand([10, 10, 40]))
    assert result[1:] == (2, 0, 0)


def test_prompts_are_groups_of_their_own():
    trees = [branches(4, ((1, 1),), 2, "flow_sde", trained=True)] * 2
    result = compute([0, 1, 100, 300], trees)
    np.testing.assert_allclose(result.values, np.array([-1, 1, -1, 1]) * math.sqrt(0.5), rtol=1e-6)
    assert result.groups == 2


def test_eps_is_added_to_the_std():
    result = compute([0, 0, 3, 1, 1, 1 + 3e-6], two_groups(), eps=0.5)
    std = math.sqrt(3)
    np.testing.assert_allclose(result.values[:3], np.array([-1, -1, 2]) / (std + 0.5))
    assert np.abs(result.values[3:]).max() < 1e-5


def test_advantages_are_clamped_after_the_weighted_sum():
    rewards = {"a": [0] * 39 + [1], "b": [0] * 39 + [1]}
    trees = [branches(4, ((1, 1),), 40, "flow_sde", trained=True)]
    top = 0.975 / statistics.stdev(rewards["a"])
    assert top > 5
    single = compute(rewards, trees, {"a": 1.0}, clamp=5.0).values
    assert single[-1] == 5.0
    assert single.min() == pytest.approx(-0.025 / 0.975 * top)
    both = compute(rewards, trees, {"a": 0.25, "b": 0.25}, clamp=5.0).values
    assert both[-1] == pytest.approx(top / 2)
    assert compute(rewards, trees, {"a": -2.0}, clamp=3.0).values[-1] == -3.0


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_failed_rewards_leave_mean_and_std_and_get_no_say(bad):
    result = compute([1, bad, 5, 10, 20, 60], two_groups())
    np.testing.assert_allclose(
        result.values, [*by_hand([1, 5])[:1], 0.0, *by_hand([1, 5])[1:], *by_hand([10, 20, 60])]
    )
    assert result[1:] == (2, 0, 1)


@pytest.mark.parametrize("first", [[NAN, NAN, NAN], [3, NAN, NAN], [3, 3, 3], [3, 3, NAN]])
def test_groups_without_a_contrast_are_zero_and_counted(first):
    result = compute([*first, 10, 20, 60], two_groups())
    assert not result.values[:3].any()
    np.testing.assert_allclose(result.values[3:], by_hand([10, 20, 60]))
    assert result.groups == 2
    assert result.groups_masked == 1
    assert result.samples_invalid == sum(math.isnan(r) for r in first)


@pytest.mark.parametrize("std", ["group", "batch"])
def test_nothing_valid_at_all_gives_zeros(std):
    result = compute([NAN] * 6, two_groups(), std=std)
    assert not result.values.any()
    assert result[1:] == (2, 2, 6)


def test_batch_std_divides_all_groups_alike():
    rewards = [1, 2, 6, 10, 10, 40]
    result = compute(rewards, two_groups(), std="batch", ddof=0, eps=1e-4)
    scale = statistics.pstdev(rewards) + 1e-4
    centred = [r - 3 for r in rewards[:3]] + [r - 20 for r in rewards[3:]]
    np.testing.assert_allclose(result.values, np.array(centred) / scale)


def test_batch_std_ignores_failures_and_still_masks_equal_groups():
    result = compute([5, 5, 5, 10, NAN, 40], two_groups(), std="batch", ddof=0, eps=1e-4)
    scale = statistics.pstdev([5, 5, 5, 10, 40]) + 1e-4
    np.testing.assert_allclose(result.values, [0, 0, 0, -15 / scale, 0, 15 / scale])
    assert result.groups_masked == 1


def test_several_rewards_are_normalised_each_then_summed():
    rewards = {"a": [1, 2, 6, 10, 10, 40], "b": [0.1, 0.3, 0.2, 0.5, 0.5, 0.5], "unused": [NAN] * 6}
    result = compute(rewards, two_groups(), {"a": 0.7, "b": -2.0})
    a = by_hand([1, 2, 6]) + by_hand([10, 10, 40])
    b = [*by_hand([0.1, 0.3, 0.2]), 0, 0, 0]
    np.testing.assert_allclose(result.values, 0.7 * np.array(a) - 2.0 * np.array(b))
    assert result[1:] == (4, 1, 0)


def test_several_rewards_are_summed_then_normalised():
    rewards = {"a": [1, 2, 6, 10, 10, 40], "b": [0.1, 0.3, 0.2, 0.5, 0.5, NAN]}
    result = compute(rewards, two_groups(), {"a": 0.7, "b": -2.0}, combine="rewards")
    total = [0.7 * a - 2.0 * b for a, b in zip(*rewards.values(), strict=True)]
    np.testing.assert_allclose(result.values[:3], by_hand(total[:3]))
    assert not result.values[3:].any()  # two equal sums and a failure
    assert result[1:] == (2, 1, 1)


def test_a_failure_in_one_reward_keeps_the_say_of_the_other():
    rewards = {"a": [1, 2, 6, 10, 10, 40], "b": [NAN, 0.3, 0.2, 0.1, 0.5, 0.4]}
    result = compute(rewards, two_groups(), {"a": 1.0, "b": 1.0})
    assert result.values[0] == pytest.approx(by_hand([1, 2, 6])[0])
    assert result.samples_invalid == 1


@pytest.mark.parametrize("combine", ["advantages", "rewards", "gdpo"])
def test_a_reward_may_apply_to_some_prompts_only(combine):
    """Of three prompts one is scored by the first reward, one by the second, one by both."""
    trees = [branches(4, ((1, 1),), 3, "flow_sde", trained=True)] * 3
    a, b = [1, 2, 6, NAN, NAN, NAN, 0, 1, 5], [NAN, NAN, NAN, 10, 10, 40, 2, 0, 0]
    result = compute({"a": a, "b": b}, trees, {"a": 0.5, "b": 2.0}, combine=combine)
    if combine == "rewards":  # whatever the weight, a single reward is normalised
        wanted = by_hand(a[:3]) + by_hand(b[3:6]) + by_hand([4, 0.5, 2.5])
    else:
        first, second = by_hand(a[:3]) + by_hand(a[6:]), by_hand(b[3:6]) + by_hand(b[6:])
        wanted = [0.5 * x for x in first[:3]] + [2.0 * x for x in second[:3]]
        wanted += [0.5 * x + 2.0 * y for x, y in zip(first[3:], second[3:], strict=True)]
    if combine == "gdpo":
        wanted = by_hand(wanted)
    np.testing.assert_allclose(result.values, wanted, atol=1e-6)
    assert result.samples_invalid == 0


def test_a_failure_is_invalid_in_the_raw_sum_where_others_of_the_prompt_have_a_score():
    trees = [branches(4, ((1, 1),), 3, "flow_sde", trained=True)] * 2
    rewards = {"a": [1, 2, 6, 3, 4, 8], "b": [NAN, NAN, NAN, 1, NAN, 7]}
    result = compute(rewards, trees, {"a": 1.0, "b": 1.0}, combine="rewards")
    high, _, low = *by_hand([15, 4])[:1], 0.0, by_hand([15, 4])[1]
    np.testing.assert_allclose(result.values, [*by_hand([1, 2, 6]), low, 0.0, high])
    assert result.samples_invalid == 1


def test_the_best_leaves_are_those_by_the_rewards_that_apply():
    trees = [branches(4, ((1, 1),), 4, "flow_sde", trained=True)] * 3
    rewards = {
        "a": np.array([NAN, NAN, NAN, NAN, 1, 2, 3, 4, NAN, NAN, NAN, NAN]),
        "b": np.array([1, 4, 2, 3, 9, 9, 9, NAN, NAN, NAN, NAN, NAN]),
    }
    best = best_leaves(rewards, {"a": 1.0, "b": 1.0}, trees, 0.5)
    assert best == [{1, 3}, {1, 2}, {0, 1}]  # a failure comes last; with none valid, the first


def binary_tree() -> Tree:
    """Root, two nodes at 2, four leaves at 4; all edges trained, group = depth."""
    builder = TreeBuilder(4)
    root = builder.root()
    middle = [builder.edge(root, 2, "dance_sde", sample=k, trained=True) for k in range(2)]
    for m, parent in enumerate(middle):
        for k in range(2):
            builder.edge(parent, 4, "dance_sde", sample=2 * m + k, trained=True, group=1)
    return builder.build()


def test_edge_value_is_the_mean_of_the_valid_leaves_below():
    trees = [binary_tree(), binary_tree()]
    rewards = np.array([1, 3, 10, NAN, NAN, NAN, 7, 9.0])
    edges = [(1, 2), (0, 1), (0, 2), (1, 1), (0, 4), (0, 6), (1, 5)]
    expected = [8, 2, 10, NAN, 3, NAN, 7]
    np.testing.assert_array_equal(edge_values(rewards, trees, edges), expected)


def test_advantages_of_a_binary_tree_are_normalised_per_depth():
    result = compute([1, 3, 10, 2], [binary_tree()])
    np.testing.assert_allclose(result.values, by_hand([2, 6]) + by_hand([1, 3, 10, 2]))


@pytest.mark.parametrize("std", ["group", "batch"])
def test_every_trained_step_of_a_chain_gets_its_samples_advantage(std):
    trees = [chains(4, 3, "flow_sde", trained=((0, 1, 2),) * 3)] * 2
    rewards = [1.0, 2.0, 6.0, 0.0, 0.5, 0.1]
    result = compute(rewards, trees, std=std, ddof=0, eps=1e-4)
    spread = statistics.pstdev(rewards)
    expected = []
    for prompt in (rewards[:3], rewards[3:]):
        scale = statistics.pstdev(prompt) if std == "group" else spread
        mean = statistics.mean(prompt)
        expected += [a for r in prompt for a in [(r - mean) / (scale + 1e-4)] * 3]
    np.testing.assert_allclose(result.values, expected)
    assert result.groups == 2


REWARDS = arrays(np.float64, 12, elements=st.integers(-50, 50).map(lambda n: n / 8))


@settings(max_examples=60, deadline=None)
@given(REWARDS, st.integers(-40, 40), st.sampled_from([0.25, 2.0, 64.0]))
def test_advantages_ignore_shift_and_scale_of_a_reward(rewards, shift, scale):
    trees = two_groups(6)
    plain = compute(rewards, trees)
    moved = compute(rewards * scale + shift, trees)
    np.testing.assert_allclose(moved.values, plain.values, rtol=1e-5, atol=1e-9)
    assert moved[1:] == plain[1:]
    np.testing.assert_allclose(compute(-rewards, trees).values, -plain.values, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(REWARDS, st.permutations(range(12)))
def test_advantages_follow_their_edges_through_any_order(rewards, order):
    trees = two_groups(6)
    edges = edges_of(trees)
    plain = advantages({"r": rewards}, {"r": 1.0}, trees, edges)
    shuffled = advantages({"r": rewards}, {"r": 1.0}, trees, [edges[k] for k in order])
    np.testing.assert_allclose(shuffled.values, plain.values[list(order)], atol=1e-12)
    assert shuffled[1:] == plain[1:]


@settings(max_examples=60, deadline=None)
@given(REWARDS)
def test_advantages_of_a_group_have_mean_zero_and_unit_std(rewards):
    groups = np.repeat([4, 9], 6)
    values, count, masked = normalise(rewards, groups)
    assert count == 2
    live = 0
    for g in (4, 9):
        mine = values[groups == g]
        if np.ptp(rewards[groups == g]) == 0:
            assert np.isnan(mine).all(), "equal rewards say nothing"
        else:
            live += 1
            assert mine.sum() == pytest.approx(0, abs=1e-9)
            assert np.std(mine, ddof=1) == pytest.approx(1, rel=1e-6)
    assert masked == 2 - live


# --- loss -----------------------------------------------------------------------------------------


def ppo(new: float, old: float, advantage: float, weight: float, clip: float) -> float:
    ratio = math.exp(new - old)
    return weight * max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip), 1 + clip))


CASES = [  # log-probability change, advantage, is the gradient clipped away?
    (0.0, 1.5, False),
    (0.05, 1.5, False),
    (0.5, 1.5, True),
    (-0.5, 1.5, False),
    (0.5, -1.5, False),
    (-0.5, -1.5, True),
    (0.5, 0.0, False),
]


def test_loss_gradient_and_clip_flags_by_hand():
    clip, old = 0.1, torch.linspace(-2.0, 1.0, len(CASES), dtype=torch.float64)
    change, advantage, clipped = (list(column) for column in zip(*CASES, strict=True))
    new = (old + torch.tensor(change, dtype=torch.float64)).requires_grad_()
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    result = clipped_objective(
        new - old, torch.tensor(advantage, dtype=torch.float64), weight, clip
    )
    expected = sum(
        ppo(float(old[k]) + change[k], float(old[k]), advantage[k], float(weight[k]), clip)
        for k in range(len(CASES))
    )
    assert result.loss.item() == pytest.approx(expected)
    assert result.clipped.tolist() == clipped
    np.testing.assert_allclose(result.ratio.numpy(), np.exp(change))
    result.loss.backward()
    slopes = [
        0.0 if clipped[k] else -float(weight[k]) * advantage[k] * math.exp(change[k])
        for k in range(len(CASES))
    ]
    np.testing.assert_allclose(new.grad.numpy(), slopes, atol=1e-12)
    assert not (result.ratio.requires_grad)
    assert not (result.clipped.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_gradient_is_the_policy_gradient_and_clipping_inert(dtype):
    old = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=dtype)
    advantage = torch.linspace(-5, 5, 64, dtype=dtype)
    weight = torch.linspace(0.5, 2, 64, dtype=dtype)
    new = old.clone().requires_grad_()
    result = clipped_objective(new - old, advantage, weight, 1e-4)
    result.loss.backward()
    assert torch.equal(new.grad, -advantage * weight)
    assert torch.equal(result.ratio, torch.ones_like(old))
    assert not result.clipped.any()
    torch.testing.assert_close(result.loss, -(advantage * weight).sum())


def test_the_papers_clip_range_works_in_float32():
    old = torch.zeros(4)
    new = torch.tensor([0.9e-4, 1.1e-4, -0.9e-4, -1.1e-4])
    result = clipped_objective(new - old, torch.tensor([1.0, 1, -1, -1]), torch.ones(4), 1e-4)
    assert result.clipped.tolist() == [False, True, False, True]


def test_kl_is_the_mean_squared_difference_of_velocities():
    v = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.5]]])
    v_ref = torch.tensor([[[1.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(velocity_distance(v, v_ref), torch.tensor([13 / 4, 0.0625]))
    half = velocity_distance(v.half() * 300, v_ref.half() * 300)
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()
