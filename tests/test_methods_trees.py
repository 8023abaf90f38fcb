"""What each method samples: leaves and trained edges against walks of one trajectory at a time.

The walks know the papers' formulas and a method's settings, but no tree: noise is named by what it
is for, (grid index, sample), and every trajectory is followed alone from its initial noise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from test_methods import METHODS, paper, start_of, starts, tree
from test_tree_executor import run as execute
from test_tree_executor import solver_by_hand, step_by_hand
from torch import Tensor

from egrpo.config.models import RunConfig
from egrpo.core.noise import NOISING
from egrpo.core.rollout import Rollout, Segment
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.seeds import normal
from egrpo.core.tree import Node, Tree
from egrpo.methods.shapes import thinned

PLAN_SPANS = (1, 1, 2, 2, 2, 3, 3, 3)  # of tau 2.2 at T = 16, Table 4 of E-GRPO


def field(x: Tensor, sigma: float) -> Tensor:
    """A velocity that is a nonlinear function of one latent and its sigma."""
    return torch.sin(2 * x + 3 * sigma) + sigma * x.flip(-1)


def noise(start: int, sample: int) -> Tensor:
    """Standard normal of one latent's shape."""
    return normal((2, 3), "walk", start, sample).double()


def sampled(run: RunConfig, grown: Tree) -> tuple[Rollout, int]:
    """The executor's rollout of one prompt, and the latents that it had evaluated."""
    seen = []

    def velocity(x: Tensor, sigma: float, which: Tensor) -> Tensor:
        seen.append(len(x))
        return field(x, sigma)

    how = {"velocity": velocity, "noise": lambda which, start, sample: noise(start, sample)}
    level = {"noise_level": run.method.noise_level}
    return execute([grown], micro_batch=50, train_micro_batch=7, **how, **level)[0], sum(seen)


def recorded(rollout: Rollout, grown: Tree) -> Iterator[tuple[Node, int, Segment, Tensor, Tensor]]:
    """Every trained edge: (node, start, segment, source, what it led to)."""
    for batch in rollout.batches:
        edges = iter(batch.edges)
        for segment in batch.segments:
            for row, x_next in zip(segment.rows, segment.x_next, strict=True):
                node = grown.nodes[rollout.edges[next(edges)][1]]
                yield node, batch.start, segment, batch.x[row], x_next


class Walk:
    """One trajectory after another over one grid."""

    def __init__(self, run: RunConfig) -> None:
        self.steps = run.method.steps
        self.dynamics, self.level = run.method.dynamics, run.method.noise_level
        uniform = [(self.steps - i) / self.steps for i in range(self.steps + 1)]
        self.sigmas = [3 * t / (1 + 2 * t) for t in uniform]

    def ode(self, x: Tensor, stops: Sequence[int]) -> Tensor:
        """Euler through grid indices; the first is where x is."""
        for i, j in pairwise(stops):
            x = x + field(x, self.sigmas[i]) * (self.sigmas[j] - self.sigmas[i])
        return x

    def sde(self, x: Tensor, i: int, j: int, sample: int) -> Tensor:
        """One stochastic step, with the noise of (i, sample)."""
        edge = (i, j, self.dynamics)
        v, eps = field(x, self.sigmas[i]), noise(i, sample)
        return step_by_hand(x, v, self.sigmas, edge, eps, self.level)

    def second_order(self, x: Tensor, stops: Sequence[int]) -> Tensor:
        """DPM-Solver++(2M): first and last step of first order."""
        before: Tensor | None = None
        for n in range(1, len(stops)):
            data = x - self.sigmas[stops[n - 1]] * field(x, self.sigmas[stops[n - 1]])
            x = solver_by_hand(x, data, before, self.sigmas, stops[max(n - 2, 0) : n + 1])
            before = data
        return x

    def grid(self, start: int) -> range:
        """Every index from ``start`` to T."""
        return range(start, self.steps + 1)


# --- one function per shape, by the papers --------------------------------------------------------


def branching(
    run: RunConfig, spans: Sequence[int], steps: Sequence[int] | None = None
) -> list[Tensor]:
    """Anchors by ODE; at each step, or at ``steps``, G SDE steps of its span; then suffixes."""
    walk, m = Walk(run), run.method
    out = []
    for anchor in range(m.anchors):
        for i, span in enumerate(spans):
            if steps is not None and i not in steps:
                continue
            for sample in range(m.group_size):
                x = walk.ode(noise(-1, anchor), range(i + 1))
                x = walk.sde(x, i, i + span, anchor * m.group_size + sample)
                for g in m.granularities:
                    at = i + span
                    grid = [*range(at + 1), *range(at + 1, m.steps + 1, g)]  # sigmas[:k+2]+[k+2::g]
                    stops = [n for n in dict.fromkeys([*grid, m.steps]) if n >= at]
                    out.append((walk.ode if m.suffix == "ode" else walk.second_order)(x, stops))
    return out


def chain(
    run: RunConfig, window: Sequence[int], stops: Sequence[int] | None = None
) -> list[Tensor]:
    """ODE, SDE in the window, then ODE at every index or second-order steps through ``stops``."""
    walk = Walk(run)
    out = []
    for sample in range(run.method.group_size):
        x = noise(-1, sample if run.method.initial_noise == "own" else 0)
        x = walk.ode(x, range(window[0] + 1))
        for i in window:
            x = walk.sde(x, i, i + 1, sample)
        end = window[-1] + 1
        out.append(walk.ode(x, walk.grid(end)) if stops is None else walk.second_order(x, stops))
    return out


def split(run: RunConfig) -> list[Tensor]:
    """SDE on all steps but the last; a leaf's number in binary says where it goes at a split.

    The last step predicts the data, as what the public code decodes.
    """
    walk, m = Walk(run), run.method
    out = []
    for leaf in range(m.group_size):
        x, place, passed = noise(-1, 0), 0, 0
        for i in range(m.steps):
            if i in m.splits:
                passed += 1
                place = 2 * place + (leaf >> (len(m.splits) - passed) & 1)
            last = i == m.steps - 1
            x = walk.ode(x, range(i, i + 2)) if last else walk.sde(x, i, i + 1, place)
        out.append(x)
    return out


def free(run: RunConfig) -> list[Tensor]:
    """Deterministic samples from own noise."""
    walk = Walk(run)
    solve = walk.ode if run.method.solver == "ode" else walk.second_order
    return [solve(noise(-1, k), walk.grid(0)) for k in range(run.method.group_size)]


def flash_stops(run: RunConfig, start: int) -> list[int]:
    """Evenly spaced indices from ``start``, int((T - last SDE step) * ratio) - 1 intervals."""
    count = max(1, int((run.method.steps - start + 1) * run.method.suffix_ratio) - 1)
    return [start + round((run.method.steps - start) * n / count) for n in range(count + 1)]


WALKS: dict[str, Callable[[RunConfig, Tree], list[Tensor]]] = {
    "egrpo": lambda run, grown: branching(run, PLAN_SPANS),
    "egrpo_efficient": lambda run, grown: branching(run, PLAN_SPANS, starts(grown)),
    "g2rpo": lambda run, grown: branching(run, [1] * 8),
    "tempflow_grpo": lambda run, grown: branching(run, [1] * 9),
    "flow_grpo": lambda run, grown: chain(run, range(10)),
    "dancegrpo": lambda run, grown: chain(run, range(15)),  # decodes the last prediction of data
    "flow_grpo_fast": lambda run, grown: chain(run, starts(grown)),
    "mixgrpo": lambda run, grown: chain(run, starts(grown)),
    "mixgrpo_flash": lambda run, grown: chain(
        run, starts(grown), flash_stops(run, starts(grown)[-1] + 1)
    ),
    "branchgrpo": lambda run, grown: split(run),
    "diffusion_nft": lambda run, grown: free(run),
    "awm": lambda run, grown: free(run),
}

OTHER: list[tuple[str, dict[str, Any]]] = [  # settings beside the papers' own
    ("egrpo", {"anchors": 2, "granularities": [1, 3], "group_size": 2, "active": 8}),
    ("egrpo", {"suffix": "dpm2", "granularities": [2, 1], "group_size": 2}),
    ("g2rpo", {"granularities": [3, 1, 2], "suffix": "dpm2", "group_size": 2}),
    ("g2rpo", {"dynamics": "cps", "anchors": 2, "group_size": 2}),
    ("tempflow_grpo", {"dynamics": "dance_sde", "noise_level": 0.3}),
    ("flow_grpo", {"initial_noise": "same", "dynamics": "cps"}),
    ("flow_grpo", {"initial_noise": "shared"}),
    ("dancegrpo", {"initial_noise": "own", "dynamics": "flow_sde", "noise_level": 0.7}),
    ("dancegrpo", {"initial_noise": "shared"}),
    ("flow_grpo_fast", {"initial_noise": "own", "dynamics": "flow_sde"}),
    ("mixgrpo", {"initial_noise": "shared"}),
    ("mixgrpo_flash", {"suffix_ratio": 0.2, "initial_noise": "own"}),
    ("mixgrpo_flash", {"suffix_ratio": 1.0}),
    ("branchgrpo", {"splits": [1, 2, 7], "group_size": 8, "dynamics": "flow_sde"}),
    ("awm", {"solver": "dpm2"}),
    ("diffusion_nft", {"solver": "ode"}),
]
CASES = [(name, {}) for name in METHODS] + OTHER


@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
@pytest.mark.parametrize("iteration", [1, 213])
def test_leaves_and_edges_are_those_of_trajectories_walked_alone(name, settings, iteration):
    """Each recorded edge: from its source, one step with the noise of its sample; each once."""
    run = paper(name, **settings)
    grown, walk = tree(run, iteration, 5), Walk(run)
    rollout, evaluated = sampled(run, grown)
    expected = torch.stack(WALKS[name](run, grown))
    torch.testing.assert_close(rollout.leaves, expected, rtol=1e-9, atol=1e-9)
    assert expected.flatten(1).std(0).min() > 1e-3  # the leaves differ
    assert rollout.forward == evaluated == grown.cost.forward
    assert sum(len(batch.x) for batch in rollout.batches) == grown.cost.train
    assert rollout.leaf_tree == (0,) * len(expected)
    seen = Counter((start, node.sample) for node, start, *_ in recorded(rollout, grown))
    assert seen == Counter((start_of(grown, k), grown.nodes[k].sample) for k in grown.trained)
    assert set(seen.values()) == {1}
    for node, start, segment, x, x_next in recorded(rollout, grown):
        if node.dynamics != NOISING:
            assert (segment.dynamics, segment.stop) == (run.method.dynamics, node.index)
            step = walk.sde(x, start, node.index, node.sample)
            torch.testing.assert_close(x_next, step, rtol=1e-9, atol=1e-9)
            continue
        leaf, eps = expected[node.sample], noise(-2 - start, node.sample)
        torch.testing.assert_close(x, (1 - walk.sigmas[start]) * leaf + walk.sigmas[start] * eps)
        torch.testing.assert_close(x_next, eps - leaf)


# --- an oracle for the second-order solver --------------------------------------------------------


def diffusers_solution(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """diffusers' own DPM-Solver++ over explicit sigmas, in its float32."""
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        lower_order_final=True,
    )
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(sigmas) - 1)
    scheduler.set_begin_index(0)
    for n, sigma in enumerate(sigmas[:-1]):
        x = scheduler.step(field(x, sigma), scheduler.timesteps[n], x).prev_sample
    return x


@pytest.mark.parametrize("steps", [4, 10, 20])
def test_second_order_samples_are_those_of_diffusers(steps):
    run = paper("diffusion_nft", steps=steps, times_per_sample=1, group_size=4)
    rollout, _ = sampled(run, tree(run))
    sigmas = shifted_sigmas(steps, 3.0)
    expected = diffusers_solution(torch.stack([noise(-1, k) for k in range(4)]), sigmas)
    torch.testing.assert_close(rollout.leaves, expected, rtol=2e-5, atol=2e-5)
    euler = paper("diffusion_nft", steps=steps, times_per_sample=1, group_size=4, solver="ode")
    assert (sampled(euler, tree(euler))[0].leaves - expected).abs().max() > 1e-3


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4, 0.6, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("steps", [6, 25, 50])
def test_flash_grid_is_even_ends_at_data_and_keeps_the_codes_number(ratio, steps):
    """Its code keeps int((T - last) * ratio) of the T - last points from ``last`` + 1 to T."""
    for start in range(4, steps - 1):
        stops = [start, *thinned(start, steps, ratio)]
        assert stops[-1] == steps
        gaps = [b - a for a, b in pairwise(stops)]
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1
        even = [start + (steps - start) * n / len(gaps) for n in range(len(stops))]
        assert max(abs(a - b) for a, b in zip(stops, even, strict=True)) <= 0.5
        count = max(2, int((steps - start + 1) * ratio)) if ratio < 1 else steps - start + 1
        assert len(stops) == count
