"""Transitions and log-probabilities against distributions, scores and moments derived anew."""

from __future__ import annotations

import math

import pytest
import torch
from test_tree_executor import step_by_hand
from torch import Tensor

from egrpo.core.noise import DETERMINISTIC, STD
from egrpo.core.rollout import Segment, TrainBatch
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.transitions import MEAN, dpm2_mean, log_prob, transition

GRID = shifted_sigmas(16, 3.0)
EDGES = [(0, 1), (0, 3), (1, 2), (4, 6), (7, 10), (13, 15)]
SDES = ["flow_sde", "dance_sde", "cps"]


def latents(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, v, y = torch.randn(3, 3, 4, 5, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), v.to(dtype), y.to(dtype)


def one_segment(x: Tensor, start: int, stop: int, dynamics: str) -> TrainBatch:
    """Edges from x as a batch of the training pass; old velocities are zero."""
    rows = torch.arange(len(x))
    segments = (Segment(dynamics, stop, rows, x),)
    numbers = tuple(rows.tolist())
    return TrainBatch(start, 0, x, torch.zeros_like(x), rows, segments, numbers, torch.zeros(3))


class Gaussian:
    """Data N(m, s^2) and its exact flow: x_t = (1-t) x_0 + t e."""

    def __init__(self, m: float, s: float) -> None:
        self.m, self.s = m, s

    def score(self, x: Tensor, t: float) -> Tensor:
        return -(x - (1 - t) * self.m) / ((1 - t) ** 2 * self.s**2 + t**2)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """E[e - x_0 | x_t = x]: both are jointly Gaussian with x_t."""
        score = self.score(x, t)
        return -t * score - (self.m - (1 - t) * self.s**2 * score)


@pytest.mark.parametrize(("start", "stop"), EDGES)
@pytest.mark.parametrize("dynamics", SDES)
def test_a_transition_is_its_formula_with_its_density_gradient_and_divergence(
    dynamics, start, stop
):
    x, v, y = latents()
    v.requires_grad_()
    edge, zero, t = (start, stop, dynamics), torch.zeros_like(x), GRID[start]
    wanted, above = (step_by_hand(x, v, GRID, edge, zero + n) for n in (0, 1))
    mean, std = transition(x, v, GRID, start, stop, dynamics, 0.7)
    torch.testing.assert_close(mean, wanted)
    torch.testing.assert_close(above - wanted, zero + std)
    if dynamics == "cps":  # what is kept of the noise and what is new make up the target's level
        kept = (mean - (1 - GRID[stop]) * (x - t * v)) / (x + (1 - t) * v)
        torch.testing.assert_close(kept**2 + std**2, zero + GRID[stop] ** 2)
        density = -((y - wanted) ** 2)
    else:
        density = torch.distributions.Normal(wanted, std).log_prob(y)
    ours = log_prob(y, mean, std, dynamics)
    assert ours.shape == (3,)
    torch.testing.assert_close(ours, density.reshape(3, -1).mean(1))
    gradients = (torch.autograd.grad(p.sum(), v)[0] for p in (ours, density / 100))
    torch.testing.assert_close(*gradients)
    batch, ref = one_segment(x, start, stop, dynamics), y
    p, q = (
        torch.distributions.Normal(transition(x, u, GRID, start, stop, dynamics, 0.7)[0], std)
        for u in (v.detach(), ref)
    )
    expected = torch.distributions.kl_divergence(p, q).flatten(1).mean(1)
    torch.testing.assert_close(batch.divergence(v.detach(), ref, GRID, 0.7), expected)
    assert not batch.divergence(ref, ref, GRID, 0.7).any()
    torch.testing.assert_close(batch.lengths(GRID), torch.full((3,), GRID[start] - GRID[stop]))


@pytest.mark.parametrize(("start", "stop"), EDGES)
def test_without_noise_all_are_euler_and_dance_follows_the_exact_score(start, stop):
    x, v, _ = latents()
    t, length = GRID[start], GRID[start] - GRID[stop]
    ode, std = transition(x, v, GRID, start, stop, "ode", 0.7)
    torch.testing.assert_close(ode, x - v * length, rtol=0, atol=0)
    assert std == 0.0
    for dynamics in SDES:
        mean, std = transition(x, v, GRID, start, stop, dynamics, 0.0)
        assert std == 0.0
        torch.testing.assert_close(mean, ode)
    with pytest.raises(ValueError, match="without noise"):
        log_prob(x, x, 0.0, "flow_sde")
    target = Gaussian(0.8, 0.6)
    v = target.velocity(x, t)
    mean, std = transition(x, v, GRID, start, stop, "dance_sde", 0.3)
    torch.testing.assert_close(mean, x + length * (0.3**2 / 2 * target.score(x, t) - v))
    assert std == pytest.approx(0.3 * math.sqrt(length))


@pytest.mark.parametrize("dynamics", SDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_without_overflow(dynamics, dtype):
    x, v, y = latents(dtype)
    x, y = x * 900, y * 900  # squares are beyond float16
    step = (GRID, 12, 13, dynamics, 0.7)
    mean, std = transition(x, v, *step)
    ours = log_prob(y, mean, std, dynamics)
    assert mean.dtype == ours.dtype == torch.float32
    assert torch.isfinite(ours).all()
    expected = log_prob(y.double(), *transition(x.double(), v.double(), *step), dynamics)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


# --- marginals ------------------------------------------------------------------------------------


def final_moments(
    target: Gaussian, steps: int, edges: list[tuple[int, int, str]], level: float
) -> tuple[float, float]:
    """Exact mean and variance after the edges, from N(0, 1): all transitions are affine."""
    sigmas = shifted_sigmas(steps, 3.0)
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    mean, variance = 0.0, 1.0
    for start, stop, dynamics in edges:
        v = target.velocity(probe, sigmas[start])
        image, std = transition(probe, v, sigmas, start, stop, dynamics, level)
        offset, slope = float(image[0]), float(image[1] - image[0])
        mean, variance = offset + slope * mean, slope**2 * variance + std**2
    return mean, variance


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance_sde"])
@pytest.mark.parametrize(
    ("fractions", "span"),
    [([], 1), ([1 / 4], 1), ([1 / 8, 1 / 4, 1 / 2], 1), ([1 / 8, 1 / 4, 1 / 2], 3), ([3 / 4], 4)],
)
def test_marginals_are_preserved_as_steps_grow(dynamics, fractions, span):
    def error(steps: int) -> float:
        ends = {int(f * steps): int(f * steps) + span for f in fractions}
        skipped = {i for start, stop in ends.items() for i in range(start + 1, stop)}
        edges = [
            (i, ends.get(i, i + 1), dynamics if i in ends else "ode")
            for i in range(steps)
            if i not in skipped
        ]
        mean, variance = final_moments(Gaussian(0.8, 0.5), steps, edges, 0.7)
        return abs(mean - 0.8) + abs(variance / 0.25 - 1)

    errors = [error(steps) for steps in (50, 200, 800)]
    assert errors[1] < 0.45 * errors[0]
    assert errors[2] < 0.45 * errors[1]
    assert errors[1] < 0.05


@pytest.mark.parametrize("steps", [16, 200, 3200])
def test_first_flow_sde_step_adds_a_fixed_excess_of_variance(steps):
    """At t = 1 the guard makes s^2*D = a^2 for every T: variance (1 - a^2/2)^2 + a^2 = 1 + a^4/4.

    The guarded step of the published methods is therefore not exact in the limit; its excess is.
    """
    a, drift = 0.7, 1 - shifted_sigmas(steps, 3.0)[1]
    _, variance = final_moments(Gaussian(0.0, 1.0), steps, [(0, 1, "flow_sde")], a)
    assert variance == pytest.approx(1 + a**4 / 4 - 2 * (1 - a**2 / 2) * drift + drift**2)


@pytest.mark.parametrize("level", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("steps", [3, 16])
def test_cps_keeps_the_noise_level_exactly_for_a_point_target(level, steps):
    """With all data at m, x_t is N((1-t) m, t^2): CPS stays on it however long its steps are."""
    sigmas = shifted_sigmas(steps, 3.0)
    for stop in range(1, steps):
        edges = [(i, i + 1, "cps") for i in range(stop)]
        moments = final_moments(Gaussian(0.8, 0.0), steps, edges, level)
        assert moments == pytest.approx(((1 - sigmas[stop]) * 0.8, sigmas[stop] ** 2))


# --- penalties and the second-order step ----------------------------------------------------------


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
@pytest.mark.parametrize("step", [0, 3, 8])
def test_transition_distance_is_flow_grpos_penalty(step, dynamics):
    """Its public code: ((mean - mean_ref)^2).mean() / (2 std_dev_t^2).

    std_dev_t is without the sqrt of |dt| in Flow-SDE; in CPS it is the whole std,
    sigma' * sin(a * pi/2), beside ``mean = (1-s')*(x - t*v) + s'*cos(a*pi/2)*(x + (1-t)*v)``.
    """
    sigmas = shifted_sigmas(10, 3.0)
    x, v, ref = torch.randn(3, 2, 5, dtype=torch.float64).unbind(0)
    t, then = sigmas[step], sigmas[step + 1]
    if dynamics == "cps":
        std_dev_t = then * math.sin(0.7 * math.pi / 2)
        gain = -(1 - then) * t + then * math.cos(0.7 * math.pi / 2) * (1 - t)
    else:
        std_dev_t = 0.7 * math.sqrt(t / (1 - (sigmas[1] if t == 1 else t)))
        gain = (1 + std_dev_t**2 * (1 - t) / (2 * t)) * (then - t)
    expected = ((gain * (v - ref)) ** 2).mean(1) / (2 * std_dev_t**2)
    penalty = one_segment(x, step, step + 1, dynamics).transition_distance(v, ref, sigmas, 0.7)
    torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=0)  # lengths are float32


def test_std_and_mean_know_the_same_dynamics():
    assert set(STD) == set(MEAN) == {"ode", "dpm2", "flow_sde", "dance_sde", "cps"}
    assert set(DETERMINISTIC) == {k for k in STD if STD[k](GRID, 3, 4, 0.7) == 0.0}


@pytest.mark.parametrize(("before", "start", "stop"), [(1, 2, 3), (3, 4, 7), (2, 8, 9)])
def test_second_order_step_is_exact_for_data_linear_in_log_snr(before, start, stop):
    """Variation of constants: x = s'/s*x + s' * integral of e^l * x0(l) dl over l = log(a/s).

    Where x0(l) is a straight line the midpoint form errs by O(h^3) and Euler by O(h^2).
    """
    x, slope, offset = latents()

    def errors(sigmas: list[float]) -> tuple[float, float]:
        """Of Euler and of the second-order step, by sigmas of (before, start, stop)."""
        older, here, there = (math.log((1 - s) / s) for s in sigmas)
        width = (there - here) / 4000
        nodes = [here + width * (k + 0.5) for k in range(4000)]
        total, moment = (sum(math.exp(n) * n**p * width for n in nodes) for p in (0, 1))
        exact = sigmas[2] / sigmas[1] * x + sigmas[2] * (offset * total + slope * moment)
        v = (x - (offset + slope * here)) / sigmas[1]
        of = (x, v, (1.0, *sigmas, 0.0), 2, 3)
        # before the first step there is nothing useful
        euler, second = (dpm2_mean(*of, n, offset + slope * older) for n in (0, 1))
        torch.testing.assert_close(euler, x + v * (sigmas[2] - sigmas[1]))
        return float((euler - exact).abs().max()), float((second - exact).abs().max())

    wide = [GRID[before], GRID[start], GRID[stop]]
    first_wide, second_wide = errors(wide)
    first_near, second_near = errors([wide[1] + (s - wide[1]) / 8 for s in wide])
    assert 32 < first_wide / first_near < 128  # error of a step of order 1: h^2, a factor of 64
    assert second_wide / second_near > 200  # of order 2: h^3, a factor of 512
    assert second_near < first_near / 8
