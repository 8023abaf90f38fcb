"""Trees, their cost, and the executor against a walk of one trajectory at a time."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import updates_of
from torch import Tensor

from egrpo.core.executor import Executor
from egrpo.core.noise import NOISING
from egrpo.core.plan import make_plan
from egrpo.core.rollout import Rollout, TrainBatch, joined
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.seeds import normal, seed_of
from egrpo.core.transitions import transition
from egrpo.core.tree import ROOT, Cost, Node, Tree, TreeBuilder
from egrpo.methods.shapes import branches, chains, noised, planned_branches, split_tree

LEVEL = 0.7
SINGLE = ((0, 1), (2, 1), (4, 1))
SMALL = make_plan(shifted_sigmas(8, 3.0), [0, 2, 3], threshold=2.0, noise_level=LEVEL)


def binary_tree() -> Tree:
    """Splits at 0 and 2 of 4 steps; every SDE edge is trained, group = depth.

    0 -> 1, 2 at index 2; 1 -> 3, 4 and 2 -> 5, 6 at index 4.
    """
    sdes = [(0, 2, 0), (0, 2, 1), (1, 4, 0), (1, 4, 1), (2, 4, 2), (2, 4, 3)]
    edges = (Node(p, i, "dance_sde", k, trained=True, group=i // 4) for p, i, k in sdes)
    return Tree(4, (Node(ROOT, 0), *edges))


def mixed_tree() -> Tree:
    """All dynamics, two roots, trained and untrained edges, two spans from one latent."""
    builder = TreeBuilder(6)
    first, second = builder.root(), builder.root(sample=1)
    anchor = builder.through(first, [1, 2])
    edges = []
    for sample in range(2):
        edges += [Node(anchor, 3, "flow_sde", sample, trained=True)]
        edges += [Node(anchor, 5, "flow_sde", sample, trained=True, group=1)]
        edges += [Node(anchor, 3, "cps", 5 + sample)]
    for edge in (*edges, Node(second, 4, "dance_sde", 7, trained=True, group=2)):
        builder.through(builder.add(edge), range(edge.index + 1, 7))
    return builder.build()


def windows(steps: int, dynamics: str, noise: str, suffix: Any = None) -> list[Tree]:
    """A window of stochastic steps at another place for each of two prompts."""
    places = ((2, 3, 4), (0, 1))
    return [
        chains(
            *(steps, 3, dynamics),
            stochastic=window,
            trained=(window,) * 3,
            noise=noise,
            suffix=suffix and (suffix, (*range(window[-1] + 2, steps, 2), steps)),
        )
        for window in places
    ]


def some_steps(*trained: tuple[int, int]) -> Tree:
    """Three chains from one noise, of which each trains some steps of its own."""
    return chains(6, 3, "dance_sde", stochastic=tuple(range(5)), trained=trained, noise="same")


FORESTS: dict[str, list[Tree]] = {
    "merged": [planned_branches(SMALL, 3)] * 3,
    "granularities": [
        branches(8, SINGLE, 3, "flow_sde", trained=True, anchors=2, granularities=(1, 2))
    ]
    * 2,
    "second order": [
        branches(9, SINGLE, 2, "cps", trained=True, granularities=(1, 2, 3), suffix="dpm2")
    ],
    "chains": [chains(8, 3, "flow_sde", trained=(tuple(range(7)),) * 3)] * 2,
    "shared beginning": windows(8, "cps", "shared"),
    "window": windows(12, "flow_sde", "same", "dpm2"),
    "some steps": [some_steps((0, 2), (1, 4), (0, 3)), some_steps((3, 4), (0, 1), (2, 4))],
    "split": [split_tree(6, (0, 2, 3), "dance_sde", (0, 1, 2, 3, 5))] * 2,
    "noised": [noised(6, ((0, 2), (1, 5), (2, 3), (0, 4)), "dpm2")] * 2,
    "binary": [binary_tree()] * 2,
    "mixed": [mixed_tree(), mixed_tree()],
    "plain ode": [chains(8, 4)] * 2,
}
TRAINED = sorted(set(FORESTS) - {"plain ode"})


class PerRow:
    """A velocity that is a nonlinear function of the row, its sigma and its prompt alone."""

    def __init__(self, prompts: Sequence[int] = range(100)) -> None:
        self.prompts = torch.tensor(list(prompts))
        self.calls: list[tuple[float, int]] = []

    def __call__(self, x: Tensor, sigma: float, tree: Tensor) -> Tensor:
        self.calls.append((sigma, len(x)))
        assert len(x) == len(tree)
        prompt = self.prompts[tree].to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return torch.sin(2 * x + prompt) + sigma * x.flip(-1)

    def rows(self) -> Counter[float]:
        """Evaluated latents by sigma."""
        return sum((Counter({sigma: n}) for sigma, n in self.calls), Counter())


class Noise:
    """Noise by (prompt, start, sample), with a record of what was asked for."""

    def __init__(self, prompts: Sequence[int] = range(100)) -> None:
        self.prompts = list(prompts)
        self.asked: Counter[tuple[int, int, int]] = Counter()

    def __call__(self, tree: int, start: int, sample: int) -> Tensor:
        self.asked[tree, start, sample] += 1
        return normal((2, 3), "noise", self.prompts[tree], start, sample).double()


def run(
    trees: Sequence[Tree],
    prompts: Sequence[int] = range(100),
    velocity: Any = None,
    noise: Any = None,
    **how: Any,
) -> tuple[Rollout, Any, Any]:
    """The executor over the shifted grid; its rollout, and the velocity and noise that it asked."""
    velocity, noise = velocity or PerRow(prompts), noise or Noise(prompts)
    settings = {"noise_level": LEVEL, "micro_batch": 7, "dtype": torch.float64, **how}
    sigmas = shifted_sigmas(trees[0].steps, 3.0)
    return Executor(trees, sigmas, velocity, noise, **settings).rollout(), velocity, noise


def step_by_hand(
    x: Tensor,
    v: Tensor,
    sigmas: Sequence[float],
    edge: tuple[int, int, str],
    eps: Tensor,
    level: float = LEVEL,
) -> Tensor:
    """One transition written from scores: x' = x + v*dt - s^2/2*score*dt + s*sqrt(D)*eps.

    ``edge`` is (start, stop, dynamics). Flow-SDE: Flow-GRPO, eq. 9; Dance-SDE and CPS: their codes.
    """
    start, stop, dynamics = edge
    t, end = sigmas[start], sigmas[stop]
    data, noise = x - t * v, x + (1 - t) * v
    if dynamics == "cps":
        angle = level * math.pi / 2
        return (1 - end) * data + end * (math.cos(angle) * noise + math.sin(angle) * eps)
    guarded = t / (1 - (sigmas[1] if t == 1 else t))
    scale2 = level**2 * {"ode": 0.0, "dance_sde": 1.0, "flow_sde": guarded}[dynamics]
    score = -noise / t  # of x = (1 - t) * data + t * noise
    return x + (v - scale2 / 2 * score) * (end - t) + math.sqrt(scale2 * (t - end)) * eps


def solver_by_hand(
    x: Tensor, data: Tensor, before: Tensor | None, sigmas: Sequence[float], indices: Sequence[int]
) -> Tensor:
    """DPM-Solver++(2M), Algorithm 2 of arXiv 2211.01095, with alpha = 1 - sigma.

    ``indices`` are those of (``before``, ``data``, the result); before is None: first order.
    """

    def half_log_snr(index: int) -> float:
        sigma = sigmas[index]
        return -math.inf if sigma == 1 else math.inf if sigma == 0 else math.log(1 / sigma - 1)

    i, j = indices[-2:]
    h = half_log_snr(j) - half_log_snr(i)
    if before is not None and sigmas[j] > 0:
        r = (half_log_snr(i) - half_log_snr(indices[0])) / h
        data = data + (data - before) / (2 * r)
    return sigmas[j] / sigmas[i] * x - (1 - sigmas[j]) * math.expm1(-h) * data


def latents_by_hand(tree: Tree, prompt: int) -> list[Tensor]:
    """Every latent of a tree, each from its parent's, one row at a time."""
    sigmas, noise = shifted_sigmas(tree.steps, 3.0), Noise()
    out: list[Tensor] = []
    predictions: dict[int, Tensor] = {}
    for node in tree.nodes:
        if node.parent == ROOT:
            out.append(noise(prompt, -1, node.sample))
            continue
        x, parent = out[node.parent], tree.nodes[node.parent]
        start, t = parent.index, sigmas[parent.index]
        if node.dynamics == NOISING:
            eps = noise(prompt, -2 - node.index, node.sample)
            out.append((1 - sigmas[node.index]) * x + sigmas[node.index] * eps)
            continue
        v = PerRow()(x[None], t, torch.tensor([prompt]))[0]
        if node.dynamics == "dpm2":
            predictions[node.parent] = x - t * v
            older = parent.parent if parent.dynamics == "dpm2" else None
            before = None if older is None else predictions[older]
            indices = [start if older is None else tree.nodes[older].index, start, node.index]
            out.append(solver_by_hand(x, x - t * v, before, sigmas, indices))
            continue
        edge = (start, node.index, node.dynamics)
        out.append(step_by_hand(x, v, sigmas, edge, noise(prompt, start, node.sample)))
    return out


# --- trees ---------------------------------------------------------------------------------------

START = Node(ROOT, 0)
LEAF = [START, Node(0, 4, "ode")]
BACK = Node(1, 2, NOISING, trained=True)
REFUSED: list[tuple[list[Node], str]] = [
    ([Node(ROOT, 1)], "node 0: a root is untrained noise at index 0"),
    ([Node(ROOT, 0, trained=True)], "node 0: a root is untrained"),
    ([START, Node(2, 4, "ode"), Node(0, 2, "ode")], "node 1: parent 2 must come"),
    ([START, Node(1, 4, "ode")], "node 1: parent 1 must come before"),
    ([START, Node(-2, 4, "ode")], "node 1: parent -2"),
    ([START, Node(0, 2, "ode"), Node(1, 2, "ode")], "node 2: edge 2 -> 2 must go"),
    ([START, Node(0, 3, "ode"), Node(1, 1, "ode")], "node 2: edge 3 -> 1 must go"),
    ([START, Node(0, 5, "ode")], "node 1: edge 0 -> 5 must go forward"),
    ([START, Node(0, 4, "sde")], "node 1: unknown dynamics 'sde'"),
    ([START, Node(0, 4, "ode", trained=True)], "node 1: an ODE edge has no log-prob"),
    ([START, Node(0, 4, "dpm2", trained=True)], "node 1: an ODE edge has no log-prob"),
    ([*LEAF, Node(1, 2, NOISING)], "node 2: a noising edge is trained and leads from a leaf"),
    ([*LEAF, Node(0, 2, NOISING, trained=True)], "node 2: a noising edge .* not 0 -> 2"),
    ([*LEAF, Node(1, 4, NOISING, trained=True)], "node 2: a noising edge .* not 4 -> 4"),
    ([*LEAF, Node(1, -1, NOISING, trained=True)], "node 2: a noising edge .* not 4 -> -1"),
    ([*LEAF, BACK, Node(2, 4, "ode")], "node 2: nothing follows a noising edge"),
    ([START], "node 0: the branch ends at index 0, not at sigma 0"),
    ([START, Node(0, 3, "ode")], "node 1: the branch ends at index 3"),
]


@pytest.mark.parametrize(("nodes", "message"), REFUSED)
def test_trees_that_cannot_be_run_are_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        Tree(4, tuple(nodes))


def test_leaves_below_a_binary_tree():
    tree = binary_tree()
    assert tree.leaves == (3, 4, 5, 6)
    assert tree.leaves_below == {1: (0, 1), 2: (2, 3), 3: (0,), 4: (1,), 5: (2,), 6: (3,)}
    assert [tree.nodes[k].group for k in tree.trained] == [0, 0, 1, 1, 1, 1]
    assert tree.cost == Cost(forward=3, train=3)


# --- executor: what is computed -------------------------------------------------------------------


def asked_of(tree: Tree, t: int) -> Counter[tuple[int, int, int]]:
    """What noise a tree needs: once for every root, stochastic edge and noised latent."""
    starts = (-1 if n.parent == ROOT else tree.nodes[n.parent].index for n in tree.nodes)
    return Counter(
        (t, -2 - node.index if node.dynamics == NOISING else start, node.sample)
        for start, node in zip(starts, tree.nodes, strict=True)
        if node.dynamics not in ("ode", "dpm2")
    )


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 1000])
@pytest.mark.parametrize("name", FORESTS)
def test_a_rollout_is_its_trajectories_walked_one_by_one(name, micro_batch):
    """Whatever is evaluated together: leaves, edges, evaluations and noise are those of each."""
    trees = FORESTS[name]
    rollout, velocity, noise = run(trees, micro_batch=micro_batch)
    latents = [latents_by_hand(tree, t) for t, tree in enumerate(trees)]
    leaves = [latents[t][leaf] for t, tree in enumerate(trees) for leaf in tree.leaves]
    torch.testing.assert_close(rollout.leaves, torch.stack(leaves))
    assert rollout.leaf_tree == tuple(t for t, tree in enumerate(trees) for _ in tree.leaves)
    assert rollout.forward == velocity.rows().total() == sum(tree.cost.forward for tree in trees)
    assert max(n for _, n in velocity.calls) <= micro_batch
    assert sum(len(b.x) for b in rollout.batches) == sum(tree.cost.train for tree in trees)
    assert noise.asked == sum((asked_of(tree, t) for t, tree in enumerate(trees)), Counter())
    repeated = {start for (_, start, _), count in noise.asked.items() if count > 1}
    if name != "mixed":  # its two spans share noise
        assert repeated == ({-1} if name in ("some steps", "window") else set())
    trained = [(t, k) for t, tree in enumerate(trees) for k in tree.trained]
    assert Counter(rollout.edges) == Counter(trained)
    assert [e for b in rollout.batches for e in b.edges] == list(range(len(rollout.edges)))
    for batch in rollout.batches:
        rows = [
            (seg, int(row), x)
            for seg in batch.segments
            for row, x in zip(seg.rows, seg.x_next, strict=True)
        ]
        for e, (seg, row, x_next), log_prob in zip(batch.edges, rows, batch.log_prob, strict=True):
            t, k = rollout.edges[e]
            node = trees[t].nodes[k]
            assert (seg.dynamics, seg.stop, int(batch.tree[row])) == (node.dynamics, node.index, t)
            at = {"batch": batch, "row": row, "latents": latents[t], "tree": trees[t]}
            check_edge(k, x_next, log_prob, prompt=t, **at)


def check_edge(
    k: int,
    x_next: Tensor,
    log_prob: Tensor,
    *,
    prompt: int,
    batch: TrainBatch,
    row: int,
    latents: list[Tensor],
    tree: Tree,
) -> None:
    """Source, velocity, end and log-probability of one recorded edge."""
    node, sigmas = tree.nodes[k], shifted_sigmas(tree.steps, 3.0)
    source = tree.source(k)
    x = latents[source]
    assert batch.start == tree.nodes[source].index
    torch.testing.assert_close(batch.x[row], x)
    v = PerRow()(x[None], sigmas[batch.start], torch.tensor([prompt]))[0]
    torch.testing.assert_close(batch.v[row], v)
    if node.dynamics == NOISING:
        eps = Noise()(prompt, -2 - node.index, node.sample)
        torch.testing.assert_close(x_next, eps - latents[node.parent])
        torch.testing.assert_close(log_prob, -((v - x_next) ** 2).mean())
        return
    torch.testing.assert_close(x_next, latents[k])
    zero = torch.zeros(2, 3, dtype=torch.float64)
    edge = (batch.start, node.index, node.dynamics)
    mean, above = (step_by_hand(x, v, sigmas, edge, zero + n) for n in (0, 1))
    density = torch.distributions.Normal(mean, above - mean).log_prob(latents[k]).mean()
    if node.dynamics == "cps":
        density = -((latents[k] - mean) ** 2).mean()
    torch.testing.assert_close(log_prob, density)


def by_edge(rollout: Rollout) -> dict[tuple[int, int], float]:
    numbers = [float(p) for batch in rollout.batches for p in batch.log_prob]
    return dict(zip(rollout.edges, numbers, strict=True))


@pytest.mark.parametrize("name", FORESTS)
def test_prompts_together_equal_each_prompt_alone(name):
    tree, prompts = FORESTS[name][0], [4, 0, 9]
    together, _, _ = run([tree] * 3, prompts)
    again = joined([run([tree], [prompt])[0] for prompt in prompts], [1, 1, 1])
    torch.testing.assert_close(again.leaves, together.leaves)
    assert by_edge(again) == pytest.approx(by_edge(together))
    assert (again.leaf_tree, again.forward) == (together.leaf_tree, together.forward)
    for batch in again.batches:
        assert [again.edges[e][0] for e in batch.edges] == batch.tree[batch.rows].tolist()


# --- executor: noise, suffix, storage -------------------------------------------------------------


def test_spans_of_one_start_share_noise_and_nothing_else_does():
    _, _, noise = run([branches(8, ((1, 1), (1, 3), (2, 1)), 4, "flow_sde", trained=True)])
    once = {(0, -1, 0): 1, **{(0, 2, k): 1 for k in range(4)}}
    assert noise.asked == {**once, **{(0, 1, k): 2 for k in range(4)}}


def leads_to_training(tree: Tree, k: int) -> bool:
    return any(tree.nodes[c].trained for c in tree.children[k])


def test_suffix_velocity_serves_only_latents_without_trained_edges():
    trees = [planned_branches(SMALL, 3)] * 2 + [mixed_tree_of_eight()]
    suffix = PerRow()

    def cheaper(x, sigma, tree, paths):
        assert len(paths) == len(set(paths)) == len(x)
        return suffix(x, sigma, tree)

    rollout, velocity, _ = run(trees, micro_batch=6, train_micro_batch=2, suffix_velocity=cheaper)
    expected: dict[bool, Counter[float]] = {True: Counter(), False: Counter()}
    for tree in trees:
        for k, node in enumerate(tree.nodes):
            if tree.children[k]:
                expected[leads_to_training(tree, k)][SMALL.sigmas[node.index]] += 1
    assert (velocity.rows(), suffix.rows()) == (expected[True], expected[False])
    assert max(n for _, n in velocity.calls) == 2
    assert max(n for _, n in suffix.calls) <= 6
    assert rollout.forward == (velocity.rows() + suffix.rows()).total()
    assert [len(b.x) for b in rollout.batches] == [n for _, n in velocity.calls]


def test_paths_name_the_same_samples_from_step_to_step():
    """Along a path every latent is the Euler step of the one before; branches begin new paths."""
    trees = [planned_branches(SMALL, 3), chains(8, 2), mixed_tree_of_eight()]
    seen: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def suffix(x, sigma, tree, paths):
        v = x.cos() * sigma
        for path, *row in zip(paths, x, v, strict=True):
            seen.setdefault(path, []).append((SMALL.sigmas.index(sigma), *row))
        return v

    run(trees, velocity=lambda x, sigma, _: x.cos() * sigma, suffix_velocity=suffix)
    assert sum(len(steps) for steps in seen.values()) == sum(
        bool(tree.children[k]) and not leads_to_training(tree, k)
        for tree in trees
        for k in range(len(tree.nodes))
    )
    for steps in seen.values():
        for (i, x, v), (j, after, _) in pairwise(steps):
            assert torch.equal(after, x + v * (SMALL.sigmas[j] - SMALL.sigmas[i]))
    # 9 branches, 2 samples, and the two trajectories before and after the stochastic step
    assert len(seen) >= 9 + 2 + 2


def mixed_tree_of_eight() -> Tree:
    """One trained and one untrained trajectory from two noises."""
    builder = TreeBuilder(8)
    for sample, trained in enumerate((True, False)):
        edge = Node(builder.root(sample), 3, "flow_sde", sample, trained)
        builder.through(builder.add(edge), range(4, 9))
    return builder.build()


def network(dtype: torch.dtype) -> tuple[Any, Tensor]:
    """A velocity of [B, 2, 3] latents, sigma and prompt, and its weights."""
    weights = normal((6, 6), "weights").to(dtype).requires_grad_()
    prompts = normal((8, 6), "prompts").to(dtype)
    return lambda x, sigma, tree: torch.tanh(
        x.flatten(1) @ weights + sigma + prompts[tree]
    ).view_as(x), weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_micro_batch", [1, 2, 16])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("name", TRAINED)
def test_on_policy_ratio_is_exactly_one(name, parts, dtype, train_micro_batch):
    trees, (velocity, _) = FORESTS[name], network(dtype)
    sigmas = shifted_sigmas(trees[0].steps, 3.0)

    def crowded(x: Tensor, sigma: float, tree: Tensor) -> Tensor:
        """Other numbers in a batch of another size: only equal batches give equal numbers."""
        return velocity(x, sigma, tree) * (1 + len(x) / 8)

    how = {"train_micro_batch": train_micro_batch, "dtype": dtype, "parts": parts}
    rollout, _, _ = run(trees, velocity=crowded, micro_batch=5, **how)
    assert rollout.leaves.dtype == dtype
    updates = updates_of(rollout)
    assert 1 <= len(updates) <= parts
    assert sorted(e for u in updates for b in u for e in b.edges) == list(range(len(rollout.edges)))
    sizes: dict[tuple[int, int], list[int]] = {}
    for batch in rollout.batches:
        sizes.setdefault((batch.start, batch.part), []).append(len(batch.x))
    for here in sizes.values():  # no more batches than are needed
        assert len(here) == math.ceil(sum(here) / train_micro_batch)
    for batch in (batch for update in updates for batch in update):
        assert len(batch.x) <= train_micro_batch
        v = crowded(batch.x, sigmas[batch.start], batch.tree)  # with gradients this time
        assert torch.equal(v, batch.v)
        new = batch.log_probs(v, sigmas, LEVEL)
        assert new.requires_grad
        assert new.dtype == torch.float32
        assert torch.equal(new, batch.log_prob)
        assert torch.equal(batch.log_ratio(v, sigmas, LEVEL).exp(), torch.ones_like(new))


def test_latents_are_stored_rounded_before_their_log_probability():
    how = {"velocity": network(torch.bfloat16)[0], "dtype": torch.bfloat16}
    rollout, velocity, noise = run([planned_branches(SMALL, 3)], **how)
    for batch in rollout.batches:
        v = velocity(batch.x, SMALL.sigmas[batch.start], batch.tree).detach()
        samples = iter(range(3))
        for seg in batch.segments:
            assert seg.x_next.dtype == batch.x.dtype == torch.bfloat16
            step = (batch.start, seg.stop, seg.dynamics, LEVEL)
            mean, std = transition(batch.x, v, SMALL.sigmas, *step)
            eps = torch.stack([noise(0, batch.start, next(samples)) for _ in seg.rows]).float()
            unrounded = mean + std * eps
            assert torch.equal(seg.x_next, unrounded.bfloat16())
            exact = torch.distributions.Normal(mean, std).log_prob(unrounded).flatten(1).mean(1)
            assert (exact - batch.log_prob).abs().max() > 1e-4  # beyond the clip range


def test_gradient_of_the_shared_forward_equals_separate_forwards():
    velocity, parameters = network(torch.float64)
    rollout, _, _ = run([planned_branches(SMALL, 6)] * 2, velocity=velocity)
    weight = torch.linspace(-1.0, 2.0, len(rollout.edges), dtype=torch.float64)
    shared, separate = torch.zeros(2, dtype=torch.float64)
    for batch in rollout.batches:
        sigma = SMALL.sigmas[batch.start]
        log_probs = batch.log_probs(velocity(batch.x, sigma, batch.tree), SMALL.sigmas, LEVEL)
        shared = shared + (weight[list(batch.edges)] * log_probs).sum()
        edges = iter(batch.edges)
        for seg in batch.segments:
            step = (batch.start, seg.stop, seg.dynamics, LEVEL)
            for row, x_next in zip(seg.rows, seg.x_next, strict=True):
                x = batch.x[row][None]
                v = velocity(x, sigma, batch.tree[row][None])
                mean, std = transition(x, v, SMALL.sigmas, *step)
                density = torch.distributions.Normal(mean, std).log_prob(x_next[None]).mean()
                separate = separate + weight[next(edges)] * density
    torch.testing.assert_close(shared, separate)
    ours, theirs = (torch.autograd.grad(loss, parameters)[0] for loss in (shared, separate))
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 0


def test_execute_refuses_a_tree_of_another_grid():
    with pytest.raises(ValueError, match="tree 1 has 6 steps, the schedule 8"):
        run([planned_branches(SMALL, 2), mixed_tree()])


# --- seeds ----------------------------------------------------------------------------------------


def test_seeds_are_functions_of_their_parts_alone():
    parts: list[tuple[int | str, ...]] = [
        (1, 23),
        (12, 3),
        ("1", 23),
        (1, 2, 3),
        (23, 1),
        (1, "23"),
    ]
    parts += [("a", "bc"), ("ab", "c")]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(*p) < 2**63 for p in parts)
    assert seed_of(7, "root", 0) == 5977941803489654255, "seeds of published runs changed"
    from_numpy: Any = np.int64(7)
    assert seed_of(from_numpy, "root", 0) == seed_of(7, "root", 0)


def test_noise_keeps_128_bits_of_what_it_is_for():
    """torch's generator keeps 32 bits of a seed: these pairs were the same tensor."""
    seen: dict[int, list[int]] = {}
    for n in range(160_000):
        seen.setdefault(seed_of(n) & 0xFFFFFFFF, []).append(n)
    pairs = [pair for pair in seen.values() if len(pair) == 2]
    assert pairs
    for pair in pairs:
        generators = [torch.Generator().manual_seed(seed_of(n)) for n in pair]
        assert torch.equal(*(torch.randn(4, generator=g) for g in generators))
        assert not torch.equal(*(normal((4,), n) for n in pair))
    key = int.from_bytes(hashlib.blake2b(b"int:7\x1fstr:root", digest_size=16).digest(), "little")
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal((2, 3), np.float32)
    assert normal((2, 3), 7, "root").numpy().tobytes() == expected.tobytes()
    some = normal((100, 1000), "moments").double()
    assert abs(some.mean()) < 0.01
    assert abs(some.std() - 1) < 0.01
    assert normal((), "scalar").shape == ()
