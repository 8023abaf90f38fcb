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
from egrpo.core.rollout import Rollout, joined
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.seeds import normal, seed_of
from egrpo.core.tree import ROOT, Node, Tree, TreeBuilder
from egrpo.methods.shapes import branches, chains, noised, planned_branches, split_tree

LEVEL = 0.7
SINGLE = ((0, 1), (2, 1), (4, 1))
SMALL = make_plan(shifted_sigmas(8, 3.0), [0, 2, 3], threshold=2.0, noise_level=LEVEL)


def binary_tree() -> Tree:
    """Splits at 0 and 2 of 4 steps: 0 -> 1, 2 -> 3..6; every edge is trained, group = depth."""
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
    "spans": [branches(8, ((1, 1), (1, 3), (2, 1)), 4, "flow_sde", trained=True)],
    "plain ode": [chains(8, 4)] * 2,
}
REPEATED = {"some steps": {-1}, "window": {-1}, "mixed": {2}, "spans": {1}}
"""Starts whose noise several edges share: equal initial noise, or spans of one start."""
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
    assert repeated == REPEATED.get(name, set())
    trained = [(t, k) for t, tree in enumerate(trees) for k in tree.trained]
    assert Counter(rollout.edges) == Counter(trained)
    assert [e for b in rollout.batches for e in b.edges] == list(range(len(rollout.edges)))
    for batch in rollout.batches:
        segments = batch.segments
        edges = [(s, *e) for s in segments for e in zip(s.rows, s.x_next, strict=True)]
        for e, (seg, row, x_next), log_prob in zip(batch.edges, edges, batch.log_prob, strict=True):
            t, k = rollout.edges[e]
            node, source = trees[t].nodes[k], trees[t].source(k)
            assert (seg.dynamics, seg.stop, int(batch.tree[row])) == (node.dynamics, node.index, t)
            assert batch.start == trees[t].nodes[source].index
            torch.testing.assert_close(batch.x[row], latents[t][source])
            wanted = edge_by_hand(trees[t], k, t, latents[t])
            torch.testing.assert_close((batch.v[row], x_next, log_prob), wanted)


def edge_by_hand(
    tree: Tree, k: int, prompt: int, latents: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Velocity at the source of a recorded edge, its end and log-probability."""
    node, sigmas, source = tree.nodes[k], shifted_sigmas(tree.steps, 3.0), tree.source(k)
    start, x = tree.nodes[source].index, latents[source]
    v = PerRow()(x[None], sigmas[start], torch.tensor([prompt]))[0]
    if node.dynamics == NOISING:
        target = Noise()(prompt, -2 - node.index, node.sample) - latents[node.parent]
        return v, target, -((v - target) ** 2).mean()
    edge, zero = (start, node.index, node.dynamics), torch.zeros_like(x)
    mean, above = (step_by_hand(x, v, sigmas, edge, zero + n) for n in (0, 1))
    if node.dynamics == "cps":
        return v, latents[k], -((latents[k] - mean) ** 2).mean()
    density = torch.distributions.Normal(mean, above - mean).log_prob(latents[k])
    return v, latents[k], density.mean()


def by_edge(rollout: Rollout) -> dict[tuple[int, int], float]:
    return dict(zip(rollout.edges, rollout.log_probs(), strict=True))


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


def test_suffixes_are_evaluated_apart_and_paths_name_the_same_samples_from_step_to_step():
    """The cheaper velocity serves only latents without trained edges; along a path every latent
    is the Euler step of the one before, and branches begin new paths."""
    trees = [planned_branches(SMALL, 3)] * 2 + [chains(8, 2), mixed_tree_of_eight()]
    velocity, suffix = PerRow(), PerRow()
    seen: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def cheaper(x, sigma, tree, paths):
        assert len(paths) == len(set(paths)) == len(x)
        v = suffix(x, sigma, tree)
        for path, *row in zip(paths, x, v, strict=True):
            seen.setdefault(path, []).append((SMALL.sigmas.index(sigma), *row))
        return v

    how = {"micro_batch": 6, "train_micro_batch": 2, "suffix_velocity": cheaper}
    rollout, _, _ = run(trees, velocity=velocity, **how)
    expected: dict[bool, Counter[float]] = {True: Counter(), False: Counter()}
    for tree in trees:
        for node, after in zip(tree.nodes, tree.children, strict=True):
            trains = any(tree.nodes[c].trained for c in after)
            expected[trains][SMALL.sigmas[node.index]] += bool(after)
    assert (velocity.rows(), suffix.rows()) == (expected[True], +expected[False])
    assert max(n for _, n in velocity.calls) == 2
    assert max(n for _, n in suffix.calls) <= 6
    assert rollout.forward == (velocity.rows() + suffix.rows()).total()
    assert [len(b.x) for b in rollout.batches] == [n for _, n in velocity.calls]
    for steps in seen.values():
        for (i, x, v), (j, after, _) in pairwise(steps):
            assert torch.equal(after, x + v * (SMALL.sigmas[j] - SMALL.sigmas[i]))
    # 9 branches twice, 2 samples, and the two trajectories before and after the stochastic step
    assert len(seen) >= 18 + 2 + 2


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
        ends = {s.x_next.dtype for s in batch.segments if s.dynamics != NOISING}
        assert {batch.x.dtype, *ends} == {dtype}
        v = crowded(batch.x, sigmas[batch.start], batch.tree)  # with gradients this time
        assert torch.equal(v, batch.v)
        new = batch.log_probs(v, sigmas, LEVEL)
        assert new.requires_grad
        assert new.dtype == torch.float32
        assert torch.equal(new, batch.log_prob)
        assert torch.equal(batch.log_ratio(v, sigmas, LEVEL).exp(), torch.ones_like(new))


def test_execute_refuses_a_tree_of_another_grid():
    with pytest.raises(ValueError, match="tree 1 has 6 steps, the schedule 8"):
        run([planned_branches(SMALL, 2), mixed_tree()])


# --- seeds ----------------------------------------------------------------------------------------


def test_seeds_are_functions_of_their_parts_alone():
    parts: list[Any] = [(1, 23), (12, 3), ("1", 23), (1, 2, 3), (23, 1), (1, "23")]
    parts += [("a", "bc"), ("ab", "c")]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(*p) < 2**63 for p in parts)
    from_numpy: Any = np.int64(7)
    known = 5977941803489654255
    assert seed_of(7, "root", 0) == seed_of(from_numpy, "root", 0) == known, "published runs"


def test_noise_keeps_128_bits_of_what_it_is_for():
    """torch's generator keeps 32 bits of a seed: this pair was the same tensor."""
    pair = (33_712, 126_006)
    key = int.from_bytes(hashlib.blake2b(b"int:7\x1fstr:root", digest_size=16).digest(), "little")
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal((2, 3), np.float32)
    assert normal((2, 3), 7, "root").numpy().tobytes() == expected.tobytes()
    generators = [torch.Generator().manual_seed(seed_of(n)) for n in pair]
    assert torch.equal(*(torch.randn(4, generator=g) for g in generators))
    assert not torch.equal(*(normal((4,), n) for n in pair))
    assert normal((), "scalar").shape == ()
