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

from egrpo.core.executor import execute
from egrpo.core.noise import NOISING
from egrpo.core.plan import make_plan
from egrpo.core.rollout import Rollout
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.seeds import normal, seed_of
from egrpo.core.transitions import transition
from egrpo.core.tree import ROOT, Cost, Node, Tree, TreeBuilder
from egrpo.methods.shapes import (
    branches,
    branchgrpo,
    chains,
    dancegrpo,
    egrpo,
    flow_grpo,
    forward_process,
    g2rpo,
    tempflow_grpo,
    windowed,
)

LEVEL = 0.7
PAPER = make_plan(shifted_sigmas(16, 3.0), range(8), threshold=2.2, noise_level=LEVEL)
SMALL = make_plan(shifted_sigmas(8, 3.0), [0, 2, 3], threshold=2.0, noise_level=LEVEL)


def binary_tree() -> Tree:
    """Splits at 0 and 2 of 4 steps; every SDE edge is trained, group = depth.

    0 -> 1, 2 at index 2; 1 -> 3, 4 and 2 -> 5, 6 at index 4.
    """
    builder = TreeBuilder(4)
    root = builder.root()
    middle = [builder.edge(root, 2, "dance_sde", sample=k, trained=True, group=0) for k in range(2)]
    for m, parent in enumerate(middle):
        for k in range(2):
            builder.edge(parent, 4, "dance_sde", sample=2 * m + k, trained=True, group=1)
    return builder.build()


def mixed_tree() -> Tree:
    """All dynamics, two roots, trained and untrained edges, two spans from one latent."""
    builder = TreeBuilder(6)
    first, second = builder.root(), builder.root(sample=1)
    anchor = builder.through(first, [1, 2])
    for sample in range(2):
        builder.finish(builder.edge(anchor, 3, "flow_sde", sample=sample, trained=True))
        builder.finish(builder.edge(anchor, 5, "flow_sde", sample=sample, trained=True, group=1))
        builder.finish(builder.edge(anchor, 3, "cps", sample=5 + sample))
    builder.finish(builder.edge(second, 4, "dance_sde", sample=7, trained=True, group=2))
    return builder.build()


def windows(steps: int, dynamics: str, noise: str, **suffix: Any) -> list[Tree]:
    """A window of stochastic steps at another place for each of two prompts."""
    return [
        windowed(steps, 3, dynamics, start=start, size=size, noise=noise, **suffix)
        for start, size in ((2, 3), (0, 2))
    ]


FORESTS = {
    "egrpo": [egrpo(SMALL, 3)] * 3,
    "g2rpo": [g2rpo(8, 3, "flow_sde", active=[0, 2, 4], anchors=2, granularities=[1, 2])] * 2,
    "g2rpo, second order": [
        g2rpo(9, 2, "flow_sde", active=[0, 3], granularities=[1, 2, 3], suffix="dpm2")
    ],
    "tempflow_grpo": [
        tempflow_grpo(SMALL.sigmas, 2, "flow_sde", LEVEL, active=range(7), anchors=2)
    ],
    "flow_grpo": [flow_grpo(8, 3, "flow_sde", 0.99)] * 2,
    "flow_grpo_fast": windows(8, "cps", "shared"),
    "dancegrpo": [
        dancegrpo(6, 3, "dance_sde", [(0, 2), (1, 4), (0, 3)]),
        dancegrpo(6, 3, "dance_sde", [(3, 4), (0, 1), (2, 4)]),
    ],
    "mixgrpo": windows(8, "flow_sde", "same"),
    "mixgrpo_flash": windows(12, "flow_sde", "same", suffix="dpm2", suffix_ratio=0.6),
    "branchgrpo": [branchgrpo(6, [0, 2, 3], "dance_sde", untrained=[4])] * 2,
    "diffusion_nft": [forward_process(6, 4, [(0, 2), (1, 5), (2, 3), (0, 4)], "dpm2")] * 2,
    "awm": [forward_process(6, 2, [(0, 1, 3), (1, 3, 4)], "ode")] * 3,
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

    def rows(self) -> int:
        return sum(n for _, n in self.calls)


class Noise:
    """Noise by (prompt, start, sample), with a record of what was asked for."""

    def __init__(
        self, prompts: Sequence[int] = range(100), shape: tuple[int, ...] = (2, 3)
    ) -> None:
        self.prompts, self.shape = list(prompts), shape
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, tree: int, start: int, sample: int) -> Tensor:
        self.asked.append((tree, start, sample))
        return normal(self.shape, "noise", self.prompts[tree], start, sample).double()


def run(
    trees: Sequence[Tree], prompts: Sequence[int] = range(100), micro_batch: int = 7
) -> tuple[Rollout, PerRow, Noise]:
    velocity, noise = PerRow(prompts), Noise(prompts)
    rollout = execute(
        trees,
        shifted_sigmas(trees[0].steps, 3.0),
        velocity,
        noise,
        noise_level=LEVEL,
        micro_batch=micro_batch,
        dtype=torch.float64,
    )
    return rollout, velocity, noise


def step_by_hand(
    x: Tensor, v: Tensor, sigmas: Sequence[float], node: Node, start: int, eps: Tensor
) -> Tensor:
    """One transition written from scores: x' = x + v*dt - s^2/2*score*dt + s*sqrt(D)*eps."""
    t, end = sigmas[start], sigmas[node.index]
    if node.dynamics == "cps":
        angle = LEVEL * math.pi / 2
        data, noise = x - t * v, x + (1 - t) * v
        return (1 - end) * data + end * (math.cos(angle) * noise + math.sin(angle) * eps)
    scale2 = {
        "ode": 0.0,
        "dance_sde": LEVEL**2,
        "flow_sde": LEVEL**2 * t / (1 - (sigmas[1] if start == 0 else t)),
    }[node.dynamics]
    score = -(x + (1 - t) * v) / t
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
        eps = noise(prompt, start, node.sample)
        out.append(step_by_hand(x, v, sigmas, node, start, eps))
    return out


# --- trees ---------------------------------------------------------------------------------------

LEAF = [Node(ROOT, 0), Node(0, 4, "ode")]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node(ROOT, 1)], "node 0: a root is untrained noise at index 0"),
        ([Node(ROOT, 0, trained=True)], "node 0: a root is untrained"),
        ([Node(ROOT, 0), Node(2, 4, "ode"), Node(0, 2, "ode")], "node 1: parent 2 must come"),
        ([Node(ROOT, 0), Node(1, 4, "ode")], "node 1: parent 1 must come before"),
        ([Node(ROOT, 0), Node(-2, 4, "ode")], "node 1: parent -2"),
        ([Node(ROOT, 0), Node(0, 2, "ode"), Node(1, 2, "ode")], "node 2: edge 2 -> 2 must go"),
        ([Node(ROOT, 0), Node(0, 3, "ode"), Node(1, 1, "ode")], "node 2: edge 3 -> 1 must go"),
        ([Node(ROOT, 0), Node(0, 5, "ode")], "node 1: edge 0 -> 5 must go forward"),
        ([Node(ROOT, 0), Node(0, 4, "sde")], "node 1: unknown dynamics 'sde'"),
        ([Node(ROOT, 0), Node(0, 4, "ode", trained=True)], "node 1: an ODE edge has no log-prob"),
        ([Node(ROOT, 0), Node(0, 4, "dpm2", trained=True)], "node 1: an ODE edge has no log-prob"),
        ([*LEAF, Node(1, 2, NOISING)], "node 2: a noising edge is trained and leads from a leaf"),
        ([*LEAF, Node(0, 2, NOISING, trained=True)], "node 2: a noising edge .* not 0 -> 2"),
        ([*LEAF, Node(1, 4, NOISING, trained=True)], "node 2: a noising edge .* not 4 -> 4"),
        (
            [*LEAF, Node(1, 2, NOISING, trained=True), Node(2, 4, "ode")],
            "node 2: nothing follows a noising edge",
        ),
        ([Node(ROOT, 0)], "node 0: the branch ends at index 0, not at sigma 0"),
        ([Node(ROOT, 0), Node(0, 3, "ode")], "node 1: the branch ends at index 3"),
    ],
)
def test_trees_that_cannot_be_run_are_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        Tree(4, tuple(nodes))


def test_cost_at_the_papers_settings():
    assert egrpo(PAPER, 12).cost == Cost(forward=1004, train=8)
    assert flow_grpo(10, 24, "flow_sde", 0.99).cost == Cost(forward=240, train=216)
    assert chains(50, 1).cost == Cost(forward=50, train=0)


def group_sizes(tree: Tree) -> Counter[int]:
    """Number of trained edges in each group."""
    return Counter(tree.nodes[k].group for k in tree.trained)


def test_egrpo_branches_share_anchors_and_go_on_from_the_end_of_the_span():
    tree = egrpo(PAPER, 12)
    assert group_sizes(tree) == dict.fromkeys(range(8), 12)
    assert len(tree.leaves) == 96
    assert sum(node.parent == ROOT for node in tree.nodes) == 1
    for k in tree.trained:
        node = tree.nodes[k]
        start = tree.nodes[node.parent].index
        assert node.index == start + PAPER.spans[start]
        assert node.group == start
        after = [tree.nodes[c] for c in tree.children[k]]
        assert [(n.index, n.dynamics) for n in after] == [(node.index + 1, "ode")]
    sources = {tree.nodes[k].parent for k in tree.trained}
    assert len(sources) == 8
    assert tree.sources == sources
    assert {tree.nodes[s].dynamics for s in sources} == {"", "ode"}


def test_flow_grpo_trains_all_but_the_last_step_of_independent_trajectories():
    tree = flow_grpo(10, 24, "flow_sde", 0.99)
    assert [n.sample for n in tree.nodes if n.parent == ROOT] == list(range(24))
    assert group_sizes(tree) == {0: 9 * 24}, "samples are compared, not steps"
    assert {tree.nodes[tree.nodes[k].parent].index for k in tree.trained} == set(range(9))
    assert {n.dynamics for n in tree.nodes if n.parent != ROOT} == {"flow_sde"}


def test_leaves_below_a_binary_tree():
    tree = binary_tree()
    assert tree.leaves == (3, 4, 5, 6)
    assert tree.leaves_below == {1: (0, 1), 2: (2, 3), 3: (0,), 4: (1,), 5: (2,), 6: (3,)}
    assert group_sizes(tree) == {0: 2, 1: 4}
    assert tree.cost == Cost(forward=3, train=3)


# --- executor: what is computed -------------------------------------------------------------------


@pytest.mark.parametrize("name", FORESTS)
def test_leaves_equal_trajectories_walked_one_by_one(name):
    trees = FORESTS[name]
    rollout, _, _ = run(trees)
    expected = [
        latents_by_hand(tree, t)[leaf] for t, tree in enumerate(trees) for leaf in tree.leaves
    ]
    torch.testing.assert_close(rollout.leaves, torch.stack(expected))
    assert rollout.leaf_tree == tuple(t for t, tree in enumerate(trees) for _ in tree.leaves)


@pytest.mark.parametrize("name", FORESTS)
def test_recorded_edges_equal_those_walked_one_by_one(name):
    trees = FORESTS[name]
    rollout, _, _ = run(trees, micro_batch=4)
    assert Counter(rollout.edges) == Counter(
        (t, k) for t, tr in enumerate(trees) for k in tr.trained
    )
    assert [e for b in rollout.batches for e in b.edges] == list(range(len(rollout.edges)))
    latents = [latents_by_hand(tree, t) for t, tree in enumerate(trees)]
    sigmas = shifted_sigmas(trees[0].steps, 3.0)
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
            noising = node.dynamics == NOISING
            x = latents[t][k if noising else node.parent]
            assert batch.start == (node.index if noising else trees[t].nodes[node.parent].index)
            torch.testing.assert_close(batch.x[row], x)
            v = PerRow()(x[None], sigmas[batch.start], torch.tensor([t]))[0]
            torch.testing.assert_close(batch.v[row], v)
            if noising:
                eps = Noise()(t, -2 - node.index, node.sample)
                torch.testing.assert_close(x_next, eps - latents[t][node.parent])
                torch.testing.assert_close(log_prob, -((v - x_next) ** 2).mean())
                continue
            torch.testing.assert_close(x_next, latents[t][k])
            zero = torch.zeros(2, 3, dtype=torch.float64)
            mean = step_by_hand(x, v, sigmas, node, batch.start, zero)
            one = step_by_hand(x, v, sigmas, node, batch.start, zero + 1) - mean
            density = torch.distributions.Normal(mean, one).log_prob(latents[t][k]).mean()
            if node.dynamics == "cps":
                density = -((latents[t][k] - mean) ** 2).mean()
            torch.testing.assert_close(log_prob, density)


@pytest.mark.parametrize("name", FORESTS)
def test_evaluations_equal_the_prediction(name):
    trees = FORESTS[name]
    rollout, velocity, _ = run(trees)
    assert rollout.forward == velocity.rows() == sum(tree.cost.forward for tree in trees)
    assert max(n for _, n in velocity.calls) <= 7
    assert sum(len(b.x) for b in rollout.batches) == sum(tree.cost.train for tree in trees)


def test_branches_share_the_velocity_of_their_anchor():
    rollout, velocity, _ = run([egrpo(PAPER, 12)], micro_batch=1000)
    rows: Counter[float] = Counter()
    for sigma, n in velocity.calls:
        rows[sigma] += n
    for i, sigma in enumerate(PAPER.sigmas[:-1]):
        behind = sum(
            start + span <= i for start, span in zip(PAPER.active, PAPER.spans, strict=True)
        )
        assert rows[sigma] == (i <= 7) + 12 * behind
    assert rollout.forward == 1004
    assert [(b.start, len(b.x), len(b.edges)) for b in rollout.batches] == [
        (i, 1, 12) for i in range(8)
    ]


def test_merged_step_skips_the_grid_points_inside_it():
    tree = branches(8, ((2, 3),), 1, "flow_sde", trained=True)
    rollout, velocity, _ = run([tree])
    sigmas = shifted_sigmas(8, 3.0)
    assert [sigma for sigma, _ in velocity.calls] == [sigmas[i] for i in (0, 1, 2, 5, 6, 7)]
    assert rollout.batches[0].segments[0].stop == 5


# --- executor: what the result does not depend on -------------------------------------------------


def by_edge(rollout: Rollout) -> dict[tuple[int, int], float]:
    numbers = [float(p) for batch in rollout.batches for p in batch.log_prob]
    return dict(zip(rollout.edges, numbers, strict=True))


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("micro_batch", [1, 3, 1000])
def test_result_does_not_depend_on_micro_batch(name, micro_batch):
    whole, _, _ = run(FORESTS[name], micro_batch=5)
    parts, _, _ = run(FORESTS[name], micro_batch=micro_batch)
    torch.testing.assert_close(parts.leaves, whole.leaves)
    assert by_edge(parts) == pytest.approx(by_edge(whole))


@pytest.mark.parametrize("name", FORESTS)
def test_prompts_together_equal_each_prompt_alone(name):
    tree = FORESTS[name][0]
    prompts = [4, 0, 9]
    together, _, _ = run([tree] * 3, prompts)
    log_probs = by_edge(together)
    for t, prompt in enumerate(prompts):
        alone, _, _ = run([tree], [prompt])
        rows = [r for r, owner in enumerate(together.leaf_tree) if owner == t]
        torch.testing.assert_close(alone.leaves, together.leaves[rows])
        mine = {(0, k): p for (owner, k), p in log_probs.items() if owner == t}
        assert by_edge(alone) == pytest.approx(mine)


# --- executor: noise, suffix, storage -------------------------------------------------------------


@pytest.mark.parametrize("name", FORESTS)
def test_noise_is_asked_once_for_every_stochastic_edge(name):
    trees = FORESTS[name]
    _, _, noise = run(trees)
    expected: Counter[tuple[int, int, int]] = Counter()
    for t, tree in enumerate(trees):
        for node in tree.nodes:
            start = -1 if node.parent == ROOT else tree.nodes[node.parent].index
            if node.dynamics == NOISING:
                start = -2 - node.index
            if node.dynamics not in ("ode", "dpm2"):
                expected[t, start, node.sample] += 1
    assert Counter(noise.asked) == expected
    repeated = {start for (_, start, _), count in Counter(noise.asked).items() if count > 1}
    if name != "mixed":  # its two spans share noise
        same = name in ("dancegrpo", "mixgrpo", "mixgrpo_flash")  # from the same initial noise
        assert repeated == ({-1} if same else set())


def test_spans_of_one_start_share_noise_and_nothing_else_does():
    _, _, noise = run([branches(8, ((1, 1), (1, 3), (2, 1)), 4, "flow_sde", trained=True)])
    counts = Counter(noise.asked)
    assert counts == {
        (0, -1, 0): 1,
        **{(0, 1, k): 2 for k in range(4)},
        **{(0, 2, k): 1 for k in range(4)},
    }


def test_suffix_velocity_serves_only_latents_without_trained_edges():
    trees = [egrpo(SMALL, 3)] * 2 + [mixed_tree_of_eight()]
    sigmas = shifted_sigmas(8, 3.0)
    velocity, suffix = PerRow(), PerRow()

    def cheaper(x, sigma, tree, paths):
        assert len(paths) == len(set(paths)) == len(x)
        return suffix(x, sigma, tree)

    rollout = execute(
        trees,
        sigmas,
        velocity,
        Noise(),
        noise_level=LEVEL,
        micro_batch=6,
        train_micro_batch=2,
        dtype=torch.float64,
        suffix_velocity=cheaper,
    )
    trained: Counter[float] = Counter()
    every: Counter[float] = Counter()
    for tree in trees:
        for k, node in enumerate(tree.nodes):
            if tree.children[k]:
                every[sigmas[node.index]] += 1
            if any(tree.nodes[c].trained for c in tree.children[k]):
                trained[sigmas[node.index]] += 1
    for calls, expected in ((velocity.calls, trained), (suffix.calls, every - trained)):
        rows: Counter[float] = Counter()
        for sigma, n in calls:
            rows[sigma] += n
        assert rows == expected
    assert max(n for _, n in velocity.calls) == 2
    assert max(n for _, n in suffix.calls) <= 6
    assert rollout.forward == velocity.rows() + suffix.rows()
    assert [len(b.x) for b in rollout.batches] == [n for _, n in velocity.calls]


def test_paths_name_the_same_samples_from_step_to_step():
    """Along a path every latent is the Euler step of the one before; branches begin new paths."""
    trees = [egrpo(SMALL, 3), chains(8, 2), mixed_tree_of_eight()]
    sigmas = shifted_sigmas(8, 3.0)
    seen: dict[int, list[tuple[int, Tensor, Tensor]]] = {}

    def suffix(x, sigma, tree, paths):
        v = x.cos() * sigma
        for path, *row in zip(paths, x, v, strict=True):
            seen.setdefault(path, []).append((sigmas.index(sigma), *row))
        return v

    execute(
        trees,
        sigmas,
        lambda x, sigma, tree: x.cos() * sigma,
        Noise(),
        noise_level=LEVEL,
        micro_batch=4,
        dtype=torch.float64,
        suffix_velocity=suffix,
    )
    assert sum(len(steps) for steps in seen.values()) == sum(
        bool(tree.children[k]) and not any(tree.nodes[c].trained for c in tree.children[k])
        for tree in trees
        for k in range(len(tree.nodes))
    )
    for steps in seen.values():
        for (i, x, v), (j, after, _) in pairwise(steps):
            assert torch.equal(after, x + v * (sigmas[j] - sigmas[i]))
    # 9 branches, 2 samples, and the two trajectories before and after the stochastic step
    assert len(seen) >= 9 + 2 + 2


def mixed_tree_of_eight() -> Tree:
    """One trained and one untrained trajectory from two noises."""
    builder = TreeBuilder(8)
    builder.finish(builder.edge(builder.root(), 3, "flow_sde", trained=True))
    builder.finish(builder.edge(builder.root(1), 3, "flow_sde", sample=1))
    return builder.build()


class Network(torch.nn.Module):
    """A small velocity network over [B, 2, 3] latents, conditioned on sigma and prompt."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.prompts = torch.nn.Embedding(8, 4, dtype=dtype)
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(11, 32), torch.nn.SiLU(), torch.nn.Linear(32, 6)
            ).to(dtype)

    def forward(self, x: Tensor, sigma: float, tree: Tensor) -> Tensor:
        time = torch.full((len(x), 1), sigma, dtype=x.dtype)
        joined = torch.cat([x.flatten(1), time, self.prompts(tree)], 1)
        return self.layers(joined).view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train_micro_batch", [1, 2, 16])
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("name", TRAINED)
def test_on_policy_ratio_is_exactly_one(name, parts, dtype, train_micro_batch):
    trees, network = FORESTS[name], Network(dtype)
    sigmas = shifted_sigmas(trees[0].steps, 3.0)

    def crowded(x: Tensor, sigma: float, tree: Tensor) -> Tensor:
        """Other numbers in a batch of another size: only equal batches give equal numbers."""
        return network(x, sigma, tree) * (1 + len(x) / 8)

    rollout = execute(
        trees,
        sigmas,
        crowded,
        Noise(),
        noise_level=LEVEL,
        micro_batch=5,
        train_micro_batch=train_micro_batch,
        dtype=dtype,
        parts=parts,
    )
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
    tree, network = egrpo(SMALL, 3), Network(torch.bfloat16)
    rollout = execute(
        [tree],
        SMALL.sigmas,
        network,
        Noise(),
        noise_level=LEVEL,
        micro_batch=5,
        dtype=torch.bfloat16,
    )
    for batch in rollout.batches:
        v = network(batch.x, SMALL.sigmas[batch.start], batch.tree).detach()
        samples = iter(range(3))
        for seg in batch.segments:
            assert seg.x_next.dtype == batch.x.dtype == torch.bfloat16
            mean, std = transition(
                batch.x, v, SMALL.sigmas, batch.start, seg.stop, seg.dynamics, LEVEL
            )
            eps = torch.stack([Noise()(0, batch.start, next(samples)) for _ in seg.rows]).float()
            unrounded = mean + std * eps
            assert torch.equal(seg.x_next, unrounded.bfloat16())
            exact = torch.distributions.Normal(mean, std).log_prob(unrounded).flatten(1).mean(1)
            assert (exact - batch.log_prob).abs().max() > 1e-4  # beyond the clip range


def test_gradient_of_the_shared_forward_equals_separate_forwards():
    network = Network(torch.float64)
    trees = [egrpo(SMALL, 6)] * 2
    rollout = execute(
        trees,
        SMALL.sigmas,
        network,
        Noise(),
        noise_level=LEVEL,
        micro_batch=8,
        dtype=torch.float64,
    )
    weight = torch.linspace(-1.0, 2.0, len(rollout.edges), dtype=torch.float64)

    def gradient(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(network.parameters())))

    shared = torch.zeros((), dtype=torch.float64)
    separate = torch.zeros((), dtype=torch.float64)
    for batch in rollout.batches:
        sigma = SMALL.sigmas[batch.start]
        v = network(batch.x, sigma, batch.tree)
        shared = (
            shared + (weight[list(batch.edges)] * batch.log_probs(v, SMALL.sigmas, LEVEL)).sum()
        )
        edges = iter(batch.edges)
        for seg in batch.segments:
            for row, x_next in zip(seg.rows, seg.x_next, strict=True):
                x = batch.x[row][None]
                v1 = network(x, sigma, batch.tree[row][None])
                mean, std = transition(
                    x, v1, SMALL.sigmas, batch.start, seg.stop, seg.dynamics, LEVEL
                )
                density = torch.distributions.Normal(mean, std).log_prob(x_next[None]).mean()
                separate = separate + weight[next(edges)] * density
    torch.testing.assert_close(shared, separate)
    for ours, theirs in zip(gradient(shared), gradient(separate), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 0


def test_execute_refuses_a_tree_of_another_grid():
    with pytest.raises(ValueError, match="tree 1 has 6 steps, the schedule 8"):
        execute(
            [egrpo(SMALL, 2), mixed_tree()],
            SMALL.sigmas,
            PerRow(),
            Noise(),
            noise_level=LEVEL,
            micro_batch=4,
        )


# --- marginals, by simulation ---------------------------------------------------------------------


def gaussian_velocity(m: float, s: float):
    """Exact velocity E[e - x_0 | x_t] of data N(m, s^2)."""

    def velocity(x: Tensor, t: float, tree: Tensor) -> Tensor:
        variance = (1 - t) ** 2 * s**2 + t**2
        return (x - (1 - t) * m) * (t - (1 - t) * s**2) / variance - m

    return velocity


def simulate(tree: Tree) -> Tensor:
    """Leaves [L, d] for N(0.8, 0.5^2); every one of the d dimensions is a sample."""
    rollout = execute(
        [tree],
        shifted_sigmas(tree.steps, 3.0),
        gaussian_velocity(0.8, 0.5),
        lambda t, start, sample: normal((20_000,), "marginal", start, sample),
        noise_level=LEVEL,
        micro_batch=16,
    )
    return rollout.leaves


def assert_has_the_targets_moments(leaves: Tensor, bias: float) -> None:
    """Within five standard errors plus ``bias``, the discretisation's share."""
    d = leaves.shape[1]
    for leaf in leaves.double():
        assert abs(float(leaf.mean()) - 0.8) < 5 * 0.5 / math.sqrt(d) + bias
        assert abs(float(leaf.var()) / 0.25 - 1) < 5 * math.sqrt(2 / d) + bias


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde"])
def test_branches_keep_the_marginal_at_200_steps(dynamics):
    spans = ((40, 1), (40, 5), (100, 1), (100, 8), (150, 20))
    assert_has_the_targets_moments(
        simulate(branches(200, spans, 1, dynamics, trained=False)), bias=0.03
    )


def test_sde_chains_keep_the_marginal_at_200_steps():
    assert_has_the_targets_moments(simulate(chains(200, 2, "dance_sde")), bias=0.03)


def test_mixed_trajectory_keeps_the_marginal_and_coarse_steps_do_not():
    def mixed(steps: int, span: int) -> Tree:
        builder = TreeBuilder(steps)
        node = builder.through(builder.root(), range(1, steps // 8 + 1))
        for sample in range(3):
            begin = builder.nodes[node].index
            node = builder.edge(node, begin + span, "flow_sde", sample=sample)
            node = builder.through(node, range(begin + span + 1, begin + 2 * span + 1))
        builder.finish(node)
        return builder.build()

    def error(leaves: Tensor) -> float:
        return abs(float(leaves.mean()) - 0.8) + abs(float(leaves.var()) / 0.25 - 1)

    fine, coarse = simulate(mixed(200, 6)), simulate(mixed(16, 2))
    assert_has_the_targets_moments(fine, bias=0.03)
    assert error(coarse) > 3 * error(fine)


# --- seeds ----------------------------------------------------------------------------------------


def test_seeds_are_functions_of_their_parts_alone():
    assert seed_of(1, "branch", 2, 3) == seed_of(1, "branch", 2, 3)
    parts: list[tuple[int | str, ...]] = [
        (1, 23),
        (12, 3),
        ("1", 23),
        (1, 2, 3),
        (23, 1),
        (1, "23"),
        ("a", "bc"),
        ("ab", "c"),
    ]
    assert len({seed_of(*p) for p in parts}) == len(parts)
    assert all(0 <= seed_of(*p) < 2**63 for p in parts)
    assert seed_of(7, "root", 0) == 5977941803489654255, "seeds of published runs changed"
    from_numpy: Any = np.int64(7)
    assert seed_of(from_numpy, "root", 0) == seed_of(7, "root", 0)
    torch.testing.assert_close(normal((3,), 1, 2), normal((3,), 1, 2), rtol=0, atol=0)


def test_noise_keeps_128_bits_of_what_it_is_for():
    """torch's generator keeps 32 bits of a seed: these pairs were the same tensor."""
    seen: dict[int, int] = {}
    pairs = []
    for n in range(160_000):
        low = seed_of(n) & 0xFFFFFFFF
        if low in seen:
            pairs.append((seen[low], n))
        seen[low] = n
    assert pairs
    for a, b in pairs:
        torches = [
            torch.randn(4, generator=torch.Generator().manual_seed(seed_of(x))) for x in (a, b)
        ]
        assert torch.equal(*torches)
        assert not torch.equal(normal((4,), a), normal((4,), b))
    key = int.from_bytes(hashlib.blake2b(b"int:7\x1fstr:root", digest_size=16).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    expected = generator.standard_normal((2, 3), dtype=np.float32)
    assert normal((2, 3), 7, "root").numpy().tobytes() == expected.tobytes()
    some = normal((100, 1000), "moments").double()
    assert abs(some.mean()) < 0.01
    assert abs(some.std() - 1) < 0.01
    assert normal((), "scalar").shape == ()
