"""Advantages and losses: against the papers' formulas in plain Python, by hand, by invariance."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_methods import METHODS, edges_of, paper, start_of, tree
from test_tree_executor import binary_tree

from egrpo.config.models import RunConfig
from egrpo.core.advantage import Advantages, advantages, best_leaves, edge_values
from egrpo.core.loss import clipped_objective, velocity_distance
from egrpo.core.tree import Tree
from egrpo.methods.shapes import branches, chains, noised

NAN, INF = math.nan, math.inf
Groups = Sequence[Sequence[float]]


def within(group: Sequence[float], ddof: int = 1, eps: float = 1e-8) -> list[float]:
    """(r - mean) / (std + eps) of one group."""
    std = statistics.stdev(group) if ddof else statistics.pstdev(group)
    return [(r - statistics.mean(group)) / (std + eps) for r in group]


def of_one(groups: Groups, std: str, ddof: int, eps: float) -> list[float]:
    """One reward's advantages: failures and groups without a contrast say NaN."""
    finite = [[r for r in group if math.isfinite(r)] for group in groups]
    batch = [r for group in finite for r in group]
    out: list[float] = []
    for group, valid in zip(groups, finite, strict=True):
        if len(set(valid)) < 2:
            out += [NAN] * len(group)
            continue
        spread = valid if std == "group" else batch
        scale = (statistics.stdev if ddof else statistics.pstdev)(spread) + eps
        mean = statistics.mean(valid)
        out += [(r - mean) / scale if math.isfinite(r) else NAN for r in group]
    return out


def by_papers(
    rewards: Mapping[str, Groups],
    weights: Mapping[str, float],
    combine: str = "advantages",
    std: str = "group",
    ddof: int = 1,
    eps: float = 1e-8,
    clamp: float = 5.0,
) -> list[float]:
    """Advantages of single steps: GRPO's, MixGRPO's sum, and GDPO's (arXiv 2601.05242)."""
    flat = {name: [r for group in rewards[name] for r in group] for name in weights}
    each = {name: of_one(rewards[name], std, ddof, eps) for name in weights}
    total = [
        sum(w * (0.0 if math.isnan(each[n][e]) else each[n][e]) for n, w in weights.items())
        for e in range(len(next(iter(flat.values()))))
    ]
    if combine == "gdpo":  # what is valid counts, be it 0; what says nothing stays silent
        valid = [any(math.isfinite(flat[n][e]) for n in weights) for e in range(len(total))]
        said = [any(not math.isnan(each[n][e]) for n in weights) for e in range(len(total))]
        counted = iter(within([a for a, v in zip(total, valid, strict=True) if v], ddof, eps))
        normal = [next(counted) if v else 0.0 for v in valid]
        total = [a if s else 0.0 for a, s in zip(normal, said, strict=True)]
    return [min(max(a, -clamp), clamp) for a in total]


def one_step(groups: int, samples: int) -> list[Tree]:
    """A prompt for each group: one stochastic step, trained."""
    return [branches(4, ((1, 1),), samples, "flow_sde", trained=True)] * groups


def two_steps(samples: int) -> list[Tree]:
    """One prompt, two active steps of ``samples`` samples; leaves in the order of the edges."""
    return [branches(4, ((0, 1), (1, 2)), samples, "flow_sde", trained=True)]


def compute(rewards: Any, trees: Sequence[Tree], weights: Any = None, **how: Any) -> Advantages:
    named = rewards if isinstance(rewards, Mapping) else {"r": rewards}
    flat = {n: np.concatenate([np.ravel(group) for group in r]) for n, r in named.items()}
    return advantages(flat, weights or {"r": 1.0}, trees, edges_of(trees), **how)


# --- single steps: every way of normalizing and combining -----------------------------------------

PLAIN = [[1, 2, 6], [10, 10, 40]]
SPARSE = [[0.1, 0.3, 0.2], [0.5, 0.5, 0.5]]
SAID, WELL = [1.0, 2.5, 6.0], [10, 20, 60]
BATCH = {"std": "batch", "ddof": 0, "eps": 1e-4}
PEAK = [[0] * 39 + [1]]
A, B = {"r": 1.0}, {"a": 0.7, "b": -2.0}
CASES: list[tuple[dict[str, Groups], dict[str, float], dict[str, Any], tuple[int, int, int]]] = [
    # rewards by group, weights, how; groups, those masked, invalid samples
    ({"r": PLAIN}, A, {}, (2, 0, 0)),
    ({"r": PLAIN}, A, {"ddof": 0, "eps": 1e-4}, (2, 0, 0)),
    ({"r": [[0, 0, 3], [1, 1, 1 + 3e-6]]}, A, {"eps": 0.5}, (2, 0, 0)),
    *(({"r": [[1, bad, 5], WELL]}, A, {}, (2, 0, 1)) for bad in (NAN, INF, -INF)),
    *(
        ({"r": [first, WELL]}, A, {"combine": combine}, (2, 1, sum(map(math.isnan, first))))
        for first in ([NAN] * 3, [3, NAN, NAN], [3, 3, 3], [3, 3, NAN])
        for combine in ("advantages", "gdpo")
    ),
    *(({"r": [[NAN] * 3] * 2}, A, {"std": std}, (2, 2, 6)) for std in ("group", "batch")),
    ({"r": PLAIN}, A, BATCH, (2, 0, 0)),
    ({"r": PLAIN}, A, {**BATCH, "ddof": 1}, (2, 0, 0)),
    ({"r": [[5, 5, 5], [10, NAN, 40]]}, A, BATCH, (2, 1, 1)),
    ({"a": PLAIN, "b": SPARSE, "unused": [[NAN] * 3] * 2}, B, {}, (4, 1, 0)),
    ({"a": PLAIN, "b": [[NAN, 0.3, 0.2], [0.1, 0.5, 0.4]]}, B, {}, (4, 0, 1)),
    ({"r": PEAK}, A, {}, (1, 0, 0)),
    ({"a": PEAK, "b": PEAK}, {"a": 0.25, "b": 0.25}, {}, (2, 0, 0)),
    ({"r": PEAK}, {"r": -2.0}, {"clamp": 3.0}, (1, 0, 0)),
    ({"a": PLAIN, "b": [SAID, [3.0, 1.0, 1.5]]}, B, {"combine": "gdpo"}, (4, 0, 0)),
    ({"r": [[1, 2, 3], [0, 5, 10]]}, A, {"combine": "gdpo"}, (2, 0, 0)),  # two lie on their means
    ({"r": [SAID, [4] * 3, [2, NAN, NAN], [1, 0, NAN]]}, A, {"combine": "gdpo"}, (4, 2, 3)),
    *(  # of three prompts one is scored by the first reward, one by the second, one by both
        (
            {"a": [PLAIN[0], [NAN] * 3, [0, 1, 5]], "b": [[NAN] * 3, PLAIN[1], [2, 0, 0]]},
            {"a": 0.5, "b": 2.0},
            {"combine": combine},
            (6, 2, 0),
        )
        for combine in ("advantages", "gdpo")
    ),
]


@pytest.mark.parametrize(("rewards", "weights", "how", "counts"), CASES)
def test_advantages_of_single_steps(rewards, weights, how, counts):
    """Groups are prompts, or the two steps of one prompt; both alike."""
    groups = next(iter(rewards.values()))
    size, wanted = len(groups[0]), by_papers(rewards, weights, **how)
    for trees in (one_step(len(groups), size), *([two_steps(size)] if len(groups) == 2 else [])):
        result = compute(rewards, trees, weights, **how)
        np.testing.assert_allclose(result.values, wanted, atol=1e-9)
        assert result[1:] == counts


def test_one_valid_score_of_a_batch_says_nothing():
    """Nothing to normalize by, over the batch either; and no warning of it."""
    rewards = {"r": [[1.0, NAN, NAN], [NAN] * 3]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compute(rewards, one_step(2, 3), A, combine="gdpo")
    assert not result.values.any()


def test_rewards_are_summed_then_normalized_where_they_apply():
    """A failure is invalid in the raw sum where others of the prompt have a score."""
    weights = {"a": 0.7, "b": -2.0}
    rewards = {"a": PLAIN, "b": [SPARSE[0], [0.5, 0.5, NAN]]}
    total = [
        [0.7 * a - 2.0 * b for a, b in zip(x, y, strict=True)]
        for x, y in zip(*rewards.values(), strict=True)
    ]
    result = compute(rewards, two_steps(3), weights, combine="rewards")
    np.testing.assert_allclose(result.values, [*within(total[0]), 0, 0, 0])  # two equal, a failure
    assert result[1:] == (2, 1, 1)
    rewards = {"a": [[1, 2, 6], [3, 4, 8]], "b": [[NAN] * 3, [1, NAN, 7]]}
    result = compute(rewards, one_step(2, 3), {"a": 1.0, "b": 1.0}, combine="rewards")
    high, low = within([15, 4])
    np.testing.assert_allclose(result.values, [*within([1, 2, 6]), low, 0.0, high])
    assert result.samples_invalid == 1
    rewards = {"a": [[1, 2, 6], [NAN] * 3, [0, 1, 5]], "b": [[NAN] * 3, PLAIN[1], [2, 0, 0]]}
    result = compute(rewards, one_step(3, 3), {"a": 0.5, "b": 2.0}, combine="rewards")
    wanted = within([1, 2, 6]) + within(PLAIN[1]) + within([4, 0.5, 2.5])  # whatever the weight
    np.testing.assert_allclose(result.values, wanted, atol=1e-6)
    assert result.samples_invalid == 0


# --- each method's groups -------------------------------------------------------------------------

PROMPTS = 3


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    """Rewards in eighths: sums and means are exact."""
    return np.random.default_rng([7, seed]).integers(-40, 40, size=shape) / 8


def labeled(
    run: RunConfig, trees: Sequence[Tree], rewards: Any, weights: Any = None
) -> list[tuple[int, int, int, float]]:
    """(tree, start, sample, advantage) of every trained edge, as the trainer asks for them."""
    a = run.advantage
    how = {"combine": a.combine, "std": a.std, "ddof": a.ddof, "eps": a.eps, "clamp": a.clamp}
    values = compute(rewards, trees, weights, **how).values.tolist()
    return [
        (t, start_of(trees[t], k), trees[t].nodes[k].sample, value)
        for (t, k), value in zip(edges_of(trees), values, strict=True)
    ]


BRANCHING = ("egrpo", "egrpo_efficient", "g2rpo", "tempflow_grpo")


@pytest.mark.parametrize("name", sorted(set(METHODS) - {*BRANCHING, "branchgrpo"}))
def test_chains_are_compared_over_all_samples_of_their_prompt(name):
    """DanceGRPO, MixGRPO: unbiased std + 1e-8 of the G samples of a prompt. Flow-GRPO, NFT, AWM:
    population std of the whole batch + 1e-4. Which steps train plays no part.
    """
    run = paper(name)
    trees = [tree(run, 1, prompt) for prompt in range(PROMPTS)]
    rewards = drawn(PROMPTS, run.method.group_size)
    batch = name not in ("dancegrpo", "mixgrpo", "mixgrpo_flash")
    scale = statistics.pstdev(rewards.ravel().tolist()) + 1e-4
    expected = (rewards - rewards.mean(1, keepdims=True)) / scale
    if not batch:
        expected = np.array([within(group) for group in rewards.tolist()])
    for t, _, sample, a in labeled(run, trees, rewards):
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
    result = labeled(run, trees, rewards)
    assert len(result) == rewards.size
    for t, start, sample, a in result:
        anchor, number = divmod(sample, samples)
        assert a == pytest.approx(within(rewards[t, anchor, start].tolist(), ddof, eps)[number])


def test_granularities_are_normalized_each_and_summed():
    """G2RPO: per (step, granularity, reward), then summed; a failed leaf silences its own alone."""
    run = paper("g2rpo", granularities=[1, 2, 4], group_size=5)
    rewards = {"a": drawn(1, 8, 5, 3), "b": 100 * drawn(1, 8, 5, 3, seed=1)}
    rewards["a"][0, 2, 1, 1] = NAN
    weights = {"a": 0.5, "b": -0.25}
    result = labeled(run, [tree(run)], rewards, weights)
    assert len(result) == 40
    for _, start, sample, a in result:
        columns = ((w, rewards[n][0, start, :, g]) for n, w in weights.items() for g in range(3))
        each = (w * of_one([c.tolist()], "group", 1, 1e-8)[sample] for w, c in columns)
        assert a == pytest.approx(np.nansum([*each]))
    assert compute(rewards, [tree(run)], weights).samples_invalid == 1


@pytest.mark.parametrize("failed", [[], [1, 4, 5]])  # the last two are all below one edge
def test_branchgrpo_averages_leaves_upward_and_normalizes_per_depth(failed):
    run = paper("branchgrpo", steps=6, splits=[0, 2, 3], group_size=8)
    rewards = drawn(2, 8)
    rewards[:, failed] = NAN
    result = labeled(run, [tree(run)] * 2, rewards)
    for t in range(2):
        for i, width in enumerate((2, 2, 4, 8, 8)):
            parts = rewards[t].reshape(width, -1)
            means = [
                float(np.mean(p[~np.isnan(p)])) if not np.isnan(p).all() else NAN for p in parts
            ]
            valid = iter(within([m for m in means if not math.isnan(m)]))
            expected = [0.0 if math.isnan(m) else next(valid) for m in means]
            assert [a for n, s, _, a in result if (n, s) == (t, i)] == pytest.approx(expected)


@pytest.mark.parametrize("std", ["group", "batch"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_trained_steps_of_a_sample_share_its_advantage_and_leave_no_trace_in_the_std(std, ddof):
    """A sample counts once in its prompt's mean and std, however many of its steps train."""
    steps = ((0, 2), (1, 4), (0, 3)), ((3, 4), (0, 1), (2, 4))
    rewards = [[1.0, 2.0, 6.0], [4.0, 4.5, 9.5]]
    for trees in (
        [chains(6, 3, "dance_sde", trained=some) for some in steps],
        [chains(6, 3, "flow_sde", trained=((0, 1, 2),) * 3)] * 2,
        [noised(6, some) for some in steps],
    ):
        result = compute(rewards, trees, std=std, ddof=ddof, eps=0.5)
        wanted = by_papers({"r": rewards}, A, std=std, ddof=ddof, eps=0.5)
        for (t, k), a in zip(edges_of(trees), result.values, strict=True):
            assert a == pytest.approx(wanted[3 * t + trees[t].nodes[k].sample])
        assert result.groups == 2


def test_edges_of_a_binary_tree():
    """The mean of the valid leaves below; normalized per depth."""
    rewards = np.array([1, 3, 10, NAN, NAN, NAN, 7, 9.0])
    edges = [(1, 2), (0, 1), (0, 2), (1, 1), (0, 4), (0, 6), (1, 5)]
    values = edge_values(rewards, [binary_tree()] * 2, edges)
    np.testing.assert_array_equal(values, [8, 2, 10, NAN, 3, NAN, 7])
    result = compute([[1, 3, 10, 2]], [binary_tree()])
    np.testing.assert_allclose(result.values, within([2, 6]) + within([1, 3, 10, 2]))


def test_the_best_leaves_are_those_by_the_rewards_that_apply():
    rewards = {
        "a": np.array([NAN, NAN, NAN, NAN, 1, 2, 3, 4, NAN, NAN, NAN, NAN]),
        "b": np.array([1, 4, 2, 3, 9, 9, 9, NAN, NAN, NAN, NAN, NAN]),
    }
    best = best_leaves(rewards, {"a": 1.0, "b": 1.0}, one_step(3, 4), 0.5)
    assert best == [{1, 3}, {1, 2}, {0, 1}]  # a failure comes last; with none valid, the first


# --- invariance -----------------------------------------------------------------------------------

REWARDS = arrays(np.float64, 12, elements=st.integers(-50, 50).map(lambda n: n / 8))


@settings(max_examples=60, deadline=None)
@given(
    REWARDS, st.integers(-40, 40), st.sampled_from([0.25, 2.0, 64.0]), st.permutations(range(12))
)
def test_advantages_ignore_shift_and_scale_and_follow_their_edges(rewards, shift, scale, order):
    trees = two_steps(6)
    plain = compute([rewards], trees)
    moved = compute([rewards * scale + shift], trees)
    np.testing.assert_allclose(moved.values, plain.values, rtol=1e-5, atol=1e-9)
    assert moved[1:] == plain[1:]
    np.testing.assert_allclose(compute([-rewards], trees).values, -plain.values, atol=1e-12)
    edges = [edges_of(trees)[k] for k in order]
    shuffled = advantages({"r": rewards}, A, trees, edges)
    np.testing.assert_allclose(shuffled.values, plain.values[list(order)], atol=1e-12)
    assert shuffled[1:] == plain[1:]


# --- loss -----------------------------------------------------------------------------------------

CLIPPING = [  # log-probability change, advantage, weight, is the gradient clipped away?
    *((0.0, 1.5, 1.0, False), (0.05, 1.5, 0.5, False), (0.5, 1.5, 2.0, True)),
    *((-0.5, 1.5, 1.0, False), (0.5, -1.5, 3.0, False), (-0.5, -1.5, 1.0, True)),
    (0.5, 0.0, 1.0, False),
]


def test_loss_gradient_and_clip_flags_by_hand():
    change, advantage, weight, clipped = (list(column) for column in zip(*CLIPPING, strict=True))
    new = torch.tensor(change, dtype=torch.float64, requires_grad=True)
    factors = (torch.tensor(numbers, dtype=torch.float64) for numbers in (advantage, weight))
    result = clipped_objective(new, *factors, 0.1)
    loss, slopes = 0.0, []
    for c, a, w, flat in CLIPPING:
        loss += w * max(-a * math.exp(c), -a * min(max(math.exp(c), 0.9), 1.1))
        slopes.append(0.0 if flat else -w * a * math.exp(c))
    assert result.loss.item() == pytest.approx(loss)
    assert result.clipped.tolist() == clipped
    np.testing.assert_allclose(result.ratio.numpy(), np.exp(change))
    assert not result.ratio.requires_grad
    result.loss.backward()
    np.testing.assert_allclose(new.grad.numpy(), slopes, atol=1e-12)


def test_the_papers_clip_range_works_in_float32():
    change = torch.tensor([0.9e-4, 1.1e-4, -0.9e-4, -1.1e-4])
    result = clipped_objective(change, torch.tensor([1.0, 1, -1, -1]), torch.ones(4), 1e-4)
    assert result.clipped.tolist() == [False, True, False, True]


def test_kl_is_the_mean_squared_difference_of_velocities():
    v = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.5]]])
    v_ref = torch.tensor([[[1.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(velocity_distance(v, v_ref), torch.tensor([13 / 4, 0.0625]))
    half = velocity_distance(v.half() * 300, v_ref.half() * 300)
    assert half.dtype == torch.float32
    assert torch.isfinite(half).all()
