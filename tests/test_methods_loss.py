"""From rewards to gradients: pruning, and each method's objective, computed again."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from conftest import updates_of
from test_advantage_loss import within
from test_methods import METHODS, edges_of, paper, start_of, tree
from test_tree_executor import run
from torch import Tensor

from egrpo.core.advantage import best_leaves
from egrpo.core.loss import negative_aware_objective
from egrpo.core.noise import NOISING, Matching
from egrpo.core.rollout import Rollout, Segment, TrainBatch
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.seeds import normal, seed_of
from egrpo.core.transitions import transition
from egrpo.core.tree import Node, Tree, TreeBuilder
from egrpo.methods.shapes import Steps, chains, noised, split_tree

SIGMAS = shifted_sigmas(6, 3.0)


# --- pruning --------------------------------------------------------------------------------------


def test_width_pruning_keeps_the_best_half_after_the_last_split():
    method = paper("branchgrpo", width_share=0.5).method
    trees = [tree(paper("branchgrpo"))] * 2
    edges = edges_of(trees)
    rewards = np.stack([np.random.default_rng(s).permutation(16) / 4 for s in (1, 2)])
    rewards[1, 5] = np.nan
    scores = {"r": rewards.ravel()}
    kept = method.keep(scores, {"r": 2.0}, trees, edges)
    expected = set()
    for e, (t, k) in enumerate(edges):
        order = np.argsort(-np.nan_to_num(rewards[t], nan=-99.0))
        start, place = start_of(trees[t], k), trees[t].nodes[k].sample
        if start <= 9 or place in order[:8]:  # after the last split a place is a leaf
            expected.add(e)
    assert kept == expected
    assert len(kept) == 2 * (202 - 9 * 8)
    assert 5 not in best_leaves(scores, {"r": 2.0}, trees, 0.5)[1]
    assert method.prunes
    for name in METHODS:  # by default nothing is pruned
        assert not paper(name).method.prunes
        assert paper(name).method.keep(scores, {"r": 2.0}, trees, edges) is None


def test_best_leaves_weigh_normalized_rewards_within_each_prompt():
    trees = [split_tree(4, (0, 1), "dance_sde", (0, 1, 2))] * 2
    a, b = np.array([3.0, 2, 1, 0, 0, 1, 2, 3]), np.array([0.0, 0, 1000, 0, 9, 9, 9, 9])
    best = best_leaves({"a": a, "b": b}, {"a": 1.0, "b": 1.0}, trees, 0.5)
    total = np.add(within(a[:4].tolist()), within(b[:4].tolist()))
    assert best[0] == set(np.argsort(-total)[:2].tolist()) == {0, 2}
    assert best[1] == {2, 3}
    assert best_leaves({"a": a}, {"a": -1.0}, trees, 0.01) == [{3}, {0}]


# --- a real training pass -------------------------------------------------------------------------


def network(x: Tensor, sigma: float, which: Tensor, shift: float = 0.0) -> Tensor:
    """A velocity of one latent; ``shift`` moves its weights."""
    return torch.sin((2 + shift) * x) + (sigma + shift) * x.flip(-1) + which.view(-1, 1, 1)


def forest() -> list[Tree]:
    """Batches with several sources, segments, dynamics and prompts."""
    builder = TreeBuilder(6)
    for root in range(2):
        anchor = builder.through(builder.root(root), [1])
        for sample in range(4 * root, 4 * root + 2):
            for stop, dynamics in ((2, "flow_sde"), (4, "flow_sde"), (3, "dance_sde")):
                edge = Node(anchor, stop, dynamics, sample, trained=True, group=stop)
                builder.through(builder.add(edge), range(stop + 1, 7))
    return [builder.build()] * 2


def rolled(trees: Sequence[Tree], level: float = 0.7, batch: int = 3, parts: int = 1) -> Rollout:
    noise = lambda t, start, sample: normal((2, 3), "loss", t, start, sample).double()
    how = {"velocity": network, "noise": noise, "noise_level": level, "micro_batch": 20}
    return run(trees, train_micro_batch=batch, parts=parts, **how)[0]


WINDOW: Steps = (1, 2, 3)
FORESTS: dict[str, Callable[[], Sequence[Tree]]] = {
    "branches": forest,
    "window": lambda: (
        [chains(6, 5, "cps", stochastic=WINDOW, trained=(WINDOW,) * 5, noise="shared")] * 2
    ),
    "tree": lambda: [split_tree(6, (0, 1, 3), "dance_sde", (0, 1, 2, 3, 4))] * 2,
    "noised": lambda: [noised(6, ((0, 2), (1, 5), (2, 3), (0, 4)), "dpm2")] * 2,
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", FORESTS)
def test_a_pruned_batch_is_the_batch_without_its_other_edges(name, parts):
    """Ratio, divergence, targets, gradient: as if only the kept edges had been there."""
    trees = FORESTS[name]()
    rollout = rolled(trees, batch=4, parts=parts)
    count = len(rollout.edges)
    kept = {e for e in range(count) if seed_of("kept", e) % 3 == 0}
    assert 3 < len(kept) < count - 3
    advantage = torch.linspace(-2, 3, count, dtype=torch.float64)

    def loss(batches: Sequence[TrainBatch], shift: Tensor, mask: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            v = network(batch.x, SIGMAS[batch.start], batch.tree, shift)
            index = list(batch.edges)
            ratio = batch.log_ratio(v, SIGMAS, 0.7).exp()
            total = total + (mask[index] * advantage[index] * ratio).sum()
        return total

    mask = torch.tensor([float(e in kept) for e in range(count)], dtype=torch.float64)
    plain, pruned = updates_of(rollout), updates_of(rollout, kept)
    for whole, update in zip(plain, pruned, strict=True):
        shift = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
        losses = loss(whole, shift, mask), loss(update, shift, torch.ones_like(mask))
        torch.testing.assert_close(*losses)
        a, b = (torch.autograd.grad(each, shift)[0] for each in losses)
        torch.testing.assert_close(a, b)
        assert abs(float(a)) > 0
    assert sorted(e for u in pruned for batch in u for e in batch.edges) == sorted(kept)
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
        sources = sorted({int(batch.rows[n]) for n in at})  # of others nothing is evaluated
        for key in ("x", "v", "tree"):
            assert torch.equal(getattr(small, key), getattr(batch, key)[sources])
        assert torch.equal(small.log_prob, batch.log_prob[at])
        assert torch.equal(small.targets(), batch.targets()[at])
        assert torch.equal(small.lengths(SIGMAS), batch.lengths(SIGMAS)[at])
        assert (small.start, small.part) == (batch.start, batch.part)
        if name != "noised":
            v = network(batch.x, SIGMAS[batch.start], batch.tree, 0.1)
            whole = batch.divergence(v, batch.v, SIGMAS, 0.7)[at]
            part = small.divergence(v[sources], small.v, SIGMAS, 0.7)
            torch.testing.assert_close(part, whole)
        assert batch.only(set(batch.edges)).edges == batch.edges


# --- GRPO-Guard -----------------------------------------------------------------------------------


def test_guarded_ratio_is_its_formula():
    """GRPO-Guard: S * change of the log-density + mean((mu - mu_old)^2) / (2 S)."""
    seen: Counter[str] = Counter()
    for batch in rolled(forest()).batches:
        v = network(batch.x, SIGMAS[batch.start], batch.tree, 0.2)
        guarded = iter(batch.guarded_log_ratio(v, SIGMAS, 0.7))
        for seg in batch.segments:
            step = (SIGMAS, batch.start, seg.stop, seg.dynamics, 0.7)  # see test_transitions
            new, std = transition(batch.x[seg.rows], v[seg.rows], *step)
            old, _ = transition(batch.x[seg.rows], batch.v[seg.rows], *step)
            densities = (
                torch.distributions.Normal(m, std).log_prob(seg.x_next) for m in (new, old)
            )
            change = torch.sub(*(density.flatten(1).mean(1) for density in densities))
            expected = std * change + ((new - old) ** 2).flatten(1).mean(1) / (2 * std)
            for wanted in expected:
                torch.testing.assert_close(next(guarded), wanted)
                seen[seg.dynamics] += 1
    assert seen == {"flow_sde": 16, "dance_sde": 8}


# --- forward-process objectives -------------------------------------------------------------------


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_negative_aware_objective_in_data_space():
    """DiffusionNFT's public code, literally, over x_t, x0 and predictions of x0."""
    x0, eps, v, v_old = torch.randn(4, 7, 2, 3, generator=generator(3), dtype=torch.float32)
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
    x, one = torch.zeros(1, 4), torch.ones(1)
    result = negative_aware_objective(x + 1e-7, x + 1e-7, x, 0.5, one, one, 1.0, 1.0)
    assert float(result.loss) == pytest.approx((0.5e-7) ** 2 / 1e-5, rel=1e-3)


@pytest.mark.parametrize("time_weight", [False, True])
@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_awm_log_probability_is_its_formula(power, time_weight):
    """Public code (`ghuber`): -((e + d)^p - d^p) * t / p, e = mean((v - target)^2), d = 1e-10."""
    x, v, target = torch.randn(3, 4, 2, 3, generator=generator(2), dtype=torch.float64)
    rows = torch.arange(4)
    of = (2, 0, x, v, rows, (Segment(NOISING, 2, rows, target),), (0, 1, 2, 3))
    batch = TrainBatch(*of, torch.zeros(4), Matching(power, time_weight))
    found = batch.log_probs(v.requires_grad_(), SIGMAS, 0.0)
    t = SIGMAS[2] if time_weight else 1.0
    assert torch.equal(batch.targets(), target)
    for k in range(4):
        e = statistics.mean(((v - target) ** 2)[k].ravel().tolist())
        assert found[k].item() == pytest.approx(-((e + 1e-10) ** power - 1e-10**power) * t / power)
        # an edge weighs t * e^(p - 1) beside the plain squared error
        (gradient,) = torch.autograd.grad(found[k], v, retain_graph=True)
        plain = -2 * (v - target)[k] / 6
        torch.testing.assert_close(gradient[k], t * e ** (power - 1) * plain, rtol=1e-6, atol=0)
    perfect = target.clone().requires_grad_()
    value = batch.log_probs(perfect, SIGMAS, 0.0).sum()
    (gradient,) = torch.autograd.grad(value, perfect)
    assert value.item() == 0.0
    assert not gradient.any()  # and not NaN


def test_awm_weighs_by_time_and_error_and_nft_does_not():
    assert paper("awm").method.matching == Matching(0.25, True)
    assert paper("awm", power=1.0, time_weight=False).method.matching == Matching()
    assert {paper(name).method.matching for name in set(METHODS) - {"awm"}} == {Matching()}


# --- every method's rollout carries what its loss needs -------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_the_objective_is_the_one_that_is_asked_for(name):
    settings = paper(name)
    method, sigmas = settings.method, shifted_sigmas(settings.method.steps, 3.0)
    batch = rolled([tree(settings, 2)], method.noise_level).batches[0]
    advantage = torch.linspace(-1, 4, len(batch.edges), dtype=torch.float64)
    weight, how = 2 * advantage.abs(), {"clip_range": 0.1, "clamp": 3.0}
    for loss, far in product(method.losses, (0.0, 0.2)):
        if loss == "guarded" and method.dynamics == "cps":
            continue  # refused
        v = (batch.v + far * batch.v.cos()).requires_grad_()
        found = method.objective(batch, v, sigmas, advantage, weight, loss=loss, **how)
        if loss == "negative_aware":
            velocities = (v[batch.rows], batch.v[batch.rows], batch.targets())
            rest = (advantage, weight, method.beta, 3.0)
            wanted = negative_aware_objective(*velocities, sigmas[batch.start], *rest).loss
            ratio = torch.ones_like(advantage)
        else:
            log_ratio = batch.guarded_log_ratio if loss == "guarded" else batch.log_ratio
            ratio = log_ratio(v, sigmas, method.noise_level).exp().detach()
            length = batch.lengths(sigmas) if loss == "guarded" else 1.0
            either = torch.stack([ratio, ratio.clamp(0.9, 1.1)])
            wanted = ((-advantage * either).amax(0) * weight / length).sum()
            assert torch.equal(ratio, torch.ones_like(ratio)) is (far == 0)
        torch.testing.assert_close(found.loss, wanted)
        assert torch.equal(found.ratio, ratio)
        assert far or not found.clipped.any()
        assert torch.autograd.grad(found.loss, v)[0].any() or far
