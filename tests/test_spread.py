"""The automatic threshold and the allocation of samples, against brute force and hand numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import small_run
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from egrpo.core.entropy import step_entropy
from egrpo.core.plan import Plan, make_plan
from egrpo.core.schedule import shifted_sigmas
from egrpo.core.spread import Spread, allocate, choose_threshold
from egrpo.core.tree import Cost
from egrpo.errors import UserError
from egrpo.methods.shapes import planned_branches
from egrpo.planning.grids import training_sigmas
from egrpo.planning.trees import plan_of, tree_of

MEASURES = ("exp_per_dim", "nats_per_dim", "variance")
GRID = shifted_sigmas(16, 3.0)


def curve(points: Sequence[tuple[float, float]]) -> list[Spread]:
    """Spreads of (entropy, value); the other measures are other monotone functions of entropy."""
    return [
        Spread(n, 1, {"exp_per_dim": e, "nats_per_dim": math.log(e), "variance": e * e / 10}, value)
        for n, (e, value) in enumerate(points)
    ]


def entropies(step: int, span: int) -> dict[str, float]:
    return {m: step_entropy(GRID, step, span, noise_level=0.7, measure=m) for m in MEASURES}


def pool_adjacent_violators(values: Sequence[float]) -> list[float]:
    """Isotonic regression by merging neighbors that fall, until none does."""
    blocks = [[value] for value in values]
    n = 0
    while n + 1 < len(blocks):
        left, right = (sum(block) / len(block) for block in blocks[n : n + 2])
        if left > right:
            blocks[n : n + 2] = [blocks[n] + blocks[n + 1]]
            n = max(n - 1, 0)
        else:
            n += 1
    return [sum(block) / len(block) for block in blocks for _ in block]


# --- threshold ------------------------------------------------------------------------------------


def test_threshold_is_the_first_entropy_whose_fit_exceeds_the_factor():
    spreads = curve([(3.0, 5.0), (1.0, 0.2), (2.5, 1.5), (1.5, 0.9), (2.0, 0.5)])  # in any order
    choice = choose_threshold(spreads, "exp_per_dim", 1.0)
    assert choice.entropy.tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert choice.fitted.tolist() == pytest.approx([0.2, 0.7, 0.7, 1.5, 5.0])
    for factor, tau in ((0.69, 1.5), (0.71, 2.5), (1.0, 2.5), (4.9, 3.0)):
        assert choose_threshold(spreads, "exp_per_dim", factor).threshold == tau
    reached = curve([(1.0, 1.0), (2.0, 1.0), (3.0, 2.0)])  # which is not to exceed it
    assert choose_threshold(reached, "exp_per_dim", 1.0).threshold == 3.0
    lucky = curve([(1.0, 3.0), (1.5, 0.1), (2.0, 0.2), (2.5, 0.3), (3.0, 4.0)])
    assert choose_threshold(lucky, "exp_per_dim", 1.0).threshold == 3.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 60).map(lambda n: n / 16), min_size=1, max_size=14),
    st.sampled_from([0.5, 1.0, 2.03]),
)
def test_threshold_by_brute_force(values, factor):
    entropy, fitted = [1.0 + n / 8 for n in range(len(values))], pool_adjacent_violators(values)
    assume(all(abs(f - factor) > 1e-9 for f in fitted))
    spreads = curve(list(zip(entropy, values, strict=True)))[::-1]
    above = [e for e, f in zip(entropy, fitted, strict=True) if f > factor]
    if above:
        choice = choose_threshold(spreads, "exp_per_dim", factor)
        assert choice.threshold == above[0]
        np.testing.assert_allclose(choice.fitted, fitted)
        return
    with pytest.raises(ValueError, match="threshold auto"):
        choose_threshold(spreads, "exp_per_dim", factor)


@pytest.mark.parametrize("measure", MEASURES)
def test_threshold_is_in_the_measure_asked_for_rounded_down_and_leaves_its_step_single(measure):
    """Rounding up would ask that very step for more entropy than it has, and merge it."""
    spreads = curve([(0.3, 0.5), (0.98765, 2.0), (2.0, 3.0)])
    exact = spreads[1].entropy[measure]
    threshold = choose_threshold(spreads, measure, 1.0).threshold
    assert threshold == math.floor(exact * 10_000) / 10_000
    assert threshold < exact < threshold + 1e-4  # nats are negative here: down, not toward 0
    for chosen in range(1, 9):
        values = [2.0 if step <= chosen else 0.5 for step in range(15)]
        spreads = [Spread(step, 1, entropies(step, 1), v) for step, v in enumerate(values)]
        tau = choose_threshold(spreads, measure, 1.0).threshold
        plan = make_plan(GRID, range(1, 10), threshold=tau, noise_level=0.7, measure=measure)
        single = [step for step, span in zip(plan.active, plan.spans, strict=True) if span == 1]
        assert single == list(range(1, chosen + 1))


def test_unmeasured_spread_is_left_out_and_a_low_curve_refused():
    spreads = curve([(1.0, math.nan), (2.0, 1.5), (3.0, math.inf), (0.5, 0.1)])
    choice = choose_threshold(spreads, "exp_per_dim", 1.0)
    assert choice.entropy.tolist() == [0.5, 2.0]
    assert choice.threshold == 2.0
    for nothing in ([], curve([(1.0, math.nan)])):
        with pytest.raises(ValueError, match="holds no measured spread"):
            choose_threshold(nothing, "exp_per_dim", 1.0)
    low = curve([(1.0, 0.2), (2.0, 0.9), (3.0, 0.5)])
    with pytest.raises(ValueError, match=r"more than 1 times the yardstick \(at most 0\.7\)"):
        choose_threshold(low, "exp_per_dim", 1.0)


# --- allocation -----------------------------------------------------------------------------------


def shares(
    spans: Sequence[int], values: dict[tuple[int, int], float], group_size: int
) -> tuple[int, ...]:
    """Samples of the first steps with these spans, by spread at (step, span)."""
    made = make_plan(GRID, range(len(spans)), span=1, noise_level=0.7)
    spreads = [Spread(step, span, {}, value) for (step, span), value in values.items()]
    return allocate(replace(made, spans=tuple(spans)), spreads, group_size)


@pytest.mark.parametrize(
    ("values", "group_size", "more"),
    [
        ((4.0, 3.0, 2.0, 1.0), 12, (16, 12, 8, 4)),
        ((4.0, 3.0, 2.0, 1.0), 2, (0, 0, 0, 0)),
        ((0.5, 0.3, 0.2), 5, (4, 3, 2)),  # of 9: 4.5, 2.7, 1.8; largest remainders first
        ((0.5, 0.3, 0.2), 4, (3, 2, 1)),  # of 6: 3, 1.8, 1.2
        ((0.0, 0.0), 7, (5, 5)),  # without any spread they share alike
    ],
)
def test_samples_beyond_two_are_in_proportion_to_spread(values, group_size, more):
    spread = {(step, 1): value for step, value in enumerate(values)}
    samples = shares([1] * len(values), spread, group_size)
    assert samples == tuple(2 + n for n in more)


def test_spread_between_measured_spans_is_interpolated_and_refused_without_any():
    """Step 0 was measured at spans 1, 2 and 4; beyond the last its value stays."""
    for span, value in ((2, 2.0), (3, 3.0), (6, 4.0)):
        samples = shares((span, 1), {(0, 4): 4.0, (0, 1): 1.0, (0, 2): 2.0, (1, 1): 1.0}, 12)
        assert sum(samples) == 24
        assert abs(samples[0] - 2 - 20 * value / (value + 1)) < 1
    for rest in ({}, {(1, 1): math.nan}):
        with pytest.raises(ValueError, match="no measured spread at step 1"):
            shares([1, 1], {(0, 1): 0.0, **rest}, 7)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 100, allow_subnormal=False), min_size=1, max_size=8), st.integers(2, 40)
)
def test_allocation_keeps_the_sum_the_least_and_the_order(values, group_size):
    n = len(values)
    samples = shares([1] * n, {(step, 1): v for step, v in enumerate(values)}, group_size)
    assert sum(samples) == group_size * n
    assert min(samples) >= 2
    if sum(values) > 1e-6:
        wanted = [(group_size - 2) * n * value / sum(values) for value in values]
        assert all(abs(s - 2 - w) < 1 + 1e-9 for s, w in zip(samples, wanted, strict=True))
    ranked = sorted(zip(values, samples, strict=True), key=lambda pair: pair[0])
    for (a, fewer), (b, more) in pairwise(ranked):
        assert fewer <= more or a == b


# --- what a run makes of it -----------------------------------------------------------------------

SPANS, SAMPLES = (1, 1, 2, 2, 2, 3, 3, 3), (30, 20, 16, 10, 8, 6, 4, 2)


def allocated() -> Plan:
    made = make_plan(GRID, range(8), threshold=2.2, noise_level=0.7)
    assert made.spans == SPANS
    return replace(made, samples=SAMPLES)


@pytest.mark.parametrize("anchors", [1, 2])
def test_a_tree_takes_its_samples_from_the_plan(anchors):
    tree = planned_branches(allocated(), 12, anchors=anchors)
    groups = Counter(tree.nodes[k].group for k in tree.trained)
    assert groups == {8 * a + i: SAMPLES[i] for a in range(anchors) for i in range(8)}
    rows = enumerate(zip(SAMPLES, SPANS, strict=True))
    suffix = sum(n * (16 - i - span) for i, (n, span) in rows)
    assert tree.cost == Cost(anchors * (8 + suffix), anchors * 8)
    drawn = [(tree.nodes[tree.nodes[k].parent].index, tree.nodes[k].sample) for k in tree.trained]
    assert len(set(drawn)) == len(drawn)  # no two branches share noise
    some = planned_branches(allocated(), 12, active=[1, 4])
    assert Counter(some.nodes[k].group for k in some.trained) == {0: 20, 1: 8}
    if anchors == 1:  # n parts give one optimizer step after each of n steps
        parts = tree.parts(8)
        assert all(tree.nodes[tree.source(edge)].index == part for edge, part in parts.items())
        assert set(parts.values()) == set(range(8))


def auto(**more: object) -> tuple[object, list[Spread]]:
    """A run whose threshold is automatic, and made-up spread: less by step, more by span."""
    run = small_run(**{"method.threshold": "auto", "method.active": 8, **more})
    pairs = [(step, span) for step in range(8) for span in (1, 2, 4)]
    return run, [Spread(*pair, entropies(*pair), pair[1] * (2.0 - pair[0] / 4)) for pair in pairs]


def test_auto_threshold_and_allocation_through_a_runs_settings():
    run, spreads = auto(**{"method.allocation": "profile", "method.group_size": 12})
    plan = plan_of(run, training_sigmas(run), spreads)
    points = sorted((s.entropy["exp_per_dim"], s.value) for s in spreads)
    fitted = pool_adjacent_violators([value for _, value in points])
    tau = next(e for (e, _), f in zip(points, fitted, strict=True) if f > 1.0)
    assert plan.threshold == math.floor(tau * 1e4) / 1e4
    assert sum(plan.samples) == 12 * 8
    tree = tree_of(run, plan)
    assert Counter(tree.nodes[k].group for k in tree.trained) == dict(enumerate(plan.samples))
    with pytest.raises(UserError, match=r"run egrpo: .*need the measured profile"):
        plan_of(run, training_sigmas(run))
    run, spreads = auto(**{"method.spread_factor": 1000.0})
    with pytest.raises(UserError, match=r"^run egrpo: method\.threshold.*lower method.spread_fac"):
        plan_of(run, training_sigmas(run), spreads)
