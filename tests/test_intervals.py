"""Intervals over seeds and prompts: closed forms, invariances and simulated coverage."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scipy import stats

from egrpo.core.intervals import CrossedInterval, crossed_interval, difference_interval

P = 48
NAN = math.nan


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw(rng: Any, seeds: int, seed: float, prompt: float, rest: float) -> np.ndarray:
    """Cells [seeds, P] of true mean 0 from the three variances."""
    parts = ((seed, (seeds, 1)), (prompt, (1, P)), (rest, (seeds, P)))
    return sum(math.sqrt(variance) * rng.normal(size=size) for variance, size in parts)


def ends(found: CrossedInterval) -> tuple[float, float]:
    return found.low, found.high


@pytest.mark.parametrize(
    ("cells", "squares", "share"),
    [
        # mean squares of seeds, prompts, rest; the component that is negative counts as 0
        ([[0.0, 3.0, 6.0], [4.0, 5.0, 6.0]], (6, 8, 2), 12.0),
        ([[0.0, 6.0, 3.0], [2.0, 4.0, 3.0]], (0, 8, 2), 8.0),
        ([[0.0, 2.0, 1.0], [5.0, 3.0, 4.0]], (13.5, 0, 2), 13.5),
        ([[1.0, -1.0], [-1.0, 1.0]], (0, 0, 4), 4.0),  # never below the noise
    ],
)
def test_small_arrays_agree_with_sums_by_hand(cells, squares, share):
    y = np.array(cells)
    (seeds, prompts), least = y.shape, min(y.shape) - 1
    freedom = (seeds - 1, prompts - 1, (seeds - 1) * (prompts - 1))
    dof = share**2 / sum(ms**2 / f for ms, f in zip(squares, freedom, strict=True))
    got = crossed_interval(cells)
    assert got.mean == y.mean()
    assert got.dof == pytest.approx(max(dof, least))
    half = stats.t.ppf(0.975, got.dof) * math.sqrt(share / y.size)
    assert ends(got) == pytest.approx((y.mean() - half, y.mean() + half))
    assert (got.seeds, got.prompts, got.invalid) == (seeds, prompts, 0)


def test_one_seed_is_students_t_over_prompts_and_a_difference_the_paired_test():
    a, b = np.random.default_rng(2).normal(size=(2, 1, 30))
    got = crossed_interval(a)
    low_high = stats.t.interval(0.95, 29, loc=a.mean(), scale=stats.sem(a[0]))
    assert ends(got) == pytest.approx(low_high)
    assert (got.seeds, got.dof) == (1, 29)
    got = difference_interval(a, b, level=0.99)
    assert ends(got) == pytest.approx(stats.ttest_rel(a[0], b[0]).confidence_interval(0.99))
    assert (got.seeds, got.prompts, got.dof) == (2, 30, 29)


def test_difference_from_one_fixed_model_is_the_interval_of_differences():
    rng = np.random.default_rng(3)
    a, base = draw(rng, 3, 0.1, 1.0, 0.5), rng.normal(size=(1, P))
    got, alone = difference_interval(a, base), crossed_interval(a - base)
    assert (*ends(got), got.dof) == pytest.approx((*ends(alone), alone.dof))
    turned = difference_interval(base, a)
    assert ends(turned) == pytest.approx((-got.high, -got.low))


def test_difference_agrees_with_its_formula():
    rng = np.random.default_rng(4)
    a, b = draw(rng, 3, 0.5, 1.0, 0.5), draw(rng, 5, 0.5, 1.0, 0.5) + 2.0
    variance = np.var(a.mean(axis=0) - b.mean(axis=0), ddof=1) / P
    terms = [(variance, P - 1)]
    for y in (a, b):
        s = len(y)
        rest = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
        noise = (rest**2).sum() / ((s - 1) * (P - 1)) / (s * P)
        seed = np.var(y.mean(axis=1), ddof=1) / s
        terms += [(seed, s - 1), (noise, (s - 1) * (P - 1))]
        variance += seed - noise
    dof = variance**2 / sum(v**2 / f for v, f in terms)
    got = difference_interval(a, b)
    assert (got.mean, got.dof) == pytest.approx((a.mean() - b.mean(), dof))
    assert got.high - got.mean == pytest.approx(stats.t.ppf(0.975, dof) * math.sqrt(variance))
    assert (got.seeds, got.prompts) == (8, P)


def test_order_shift_scale_and_level():
    rng = np.random.default_rng(5)
    y = draw(rng, 4, 0.3, 1.0, 1.0)
    y[1, 7] = NAN
    plain = crossed_interval(y)
    mixed = crossed_interval(y[rng.permutation(4)][:, rng.permutation(P)])
    assert vars(mixed) == pytest.approx(vars(plain), rel=1e-12)
    moved = crossed_interval(5.0 - 100.0 * y)
    wanted = (5 - 100 * plain.high, 5 - 100 * plain.low, plain.dof)
    assert (*ends(moved), moved.dof) == pytest.approx(wanted)
    wide = crossed_interval(y, level=0.999)
    assert wide.low < plain.low < plain.high < wide.high


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-7, 12345.6789])
def test_constant_cells_have_exactly_no_width(value):
    for seeds in (1, 3):
        got = crossed_interval(np.full((seeds, 7), value))
        assert got.low == got.mean == got.high == value
    got = difference_interval(np.full((3, 7), value), np.full((2, 7), 1.0))
    assert got.low == got.mean == got.high == value - 1.0


def test_a_prompt_that_failed_for_one_seed_is_left_out_for_all():
    y = draw(np.random.default_rng(7), 3, 0.3, 1.0, 1.0)
    whole = crossed_interval(y[:, 2:])
    y[0, 0], y[2, 1] = NAN, math.inf
    got = crossed_interval(y)
    assert (got.prompts, got.invalid) == (P - 2, 6)
    assert (got.mean, got.low, got.dof) == pytest.approx((whole.mean, whole.low, whole.dof))
    other = np.zeros((2, P))
    other[1, 3] = NAN
    assert difference_interval(y, other).invalid == 5 * 3


@pytest.mark.parametrize(
    ("cells", "mean", "prompts", "invalid"),
    [
        (np.full((3, 4), NAN), NAN, 0, 12),
        (np.ones((3, 0)), NAN, 0, 0),
        ([[1.0, 2.0], [NAN, NAN]], NAN, 0, 4),  # a seed that failed everywhere
        ([[2.0], [4.0]], 3.0, 1, 0),
        ([[3.0]], 3.0, 1, 0),
        ([[2.0, NAN], [4.0, 1.0]], 3.0, 1, 2),
    ],
)
def test_without_two_prompts_there_is_no_interval(cells, mean, prompts, invalid):
    got = crossed_interval(cells)
    assert (got.mean, *ends(got), got.dof) == pytest.approx((mean, NAN, NAN, NAN), nan_ok=True)
    assert (got.prompts, got.invalid) == (prompts, invalid)


@pytest.mark.parametrize(
    ("sides", "level", "text"),
    [
        ([[1.0, 2.0]], 0.95, "with a seed"),
        ([np.ones((0, 3))], 0.95, "with a seed"),
        ([[[1.0, 2.0]]], 1.0, "level"),
        ([[[1.0, 2.0]]], 0.0, "level"),
        ([np.ones((2, 3)), np.ones((2, 4))], 0.95, "same prompts"),
    ],
)
def test_bad_arguments_are_refused(sides, level, text):
    with pytest.raises(ValueError, match=text):
        (crossed_interval if len(sides) == 1 else difference_interval)(*sides, level=level)


# --- simulation -----------------------------------------------------------------------------------


def covers(found: CrossedInterval) -> bool:
    return found.low <= 0 <= found.high


VARIANCES = [(0, 0, 1), (0, 1, 1), (0.1, 1, 1), (1, 1, 1), (0.1, 0, 1), (1, 0, 1), (10, 1, 1)]


@pytest.mark.parametrize("variances", VARIANCES)
def test_coverage_is_near_95_percent(variances):
    # of many more trials: lowest 92.6%, at (1, 1, 1); highest 98.8%, at (0, 0, 1)
    rng = np.random.default_rng(8)
    hits = np.mean([covers(crossed_interval(draw(rng, 3, *variances))) for _ in range(6000)])
    assert 0.915 <= hits <= 0.992  # three standard errors of the trials beyond


@pytest.mark.parametrize(
    ("first", "second", "most"),
    [
        (0.0, 0.0, 0.05),
        (0.1, 0.1, 0.06),
        (1.0, 1.0, 0.06),
        (0.3, 0.03, 0.075),
        (1.0, 0.0, 0.09),  # all seed variance on one side: two degrees of freedom
    ],
)
def test_equal_arms_are_seldom_told_apart(first, second, most):
    rng = np.random.default_rng(10)
    trials, wrong, strict = 2000, 0, 0
    for _ in range(trials):
        shared = draw(rng, 1, 0.0, 2.0, 0.0)  # hard prompts are hard for both
        a, b = draw(rng, 3, first, 0.3, 1.0) + shared, draw(rng, 3, second, 0.3, 1.0) + shared
        wrong += not covers(difference_interval(a, b))
        strict += not covers(difference_interval(a, b, level=0.99))
    assert wrong / trials <= most
    assert strict / trials <= 0.035
