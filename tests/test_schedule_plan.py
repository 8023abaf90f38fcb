"""Schedule, closed-form entropy and merge plan: the paper's table and a second derivation."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from egrpo.core.entropy import step_entropy
from egrpo.core.noise import STD
from egrpo.core.plan import Plan, make_plan
from egrpo.core.schedule import check_sigmas, shifted_sigmas, stock_end
from egrpo.methods.shapes import planned_branches

GRID = shifted_sigmas(16, 3.0)
SINGLE = """2.8929 2.9885 2.1366 1.7631 1.5423 1.3921 1.2810 1.1934 1.1204 1.0563 0.9966 0.9369
0.8722 0.7950 0.6915"""
"""Published entropy of the single steps."""
MEASURES = {"exp_per_dim": (0.05, 6), "nats_per_dim": (-2, 2), "variance": (0.01, 4)}
"""Thresholds to draw from."""


def planned(active: Any = range(8), **how: Any) -> Plan:
    return make_plan(GRID, active, **{"noise_level": 0.7, **how})


def entropy_table(steps: int, shift: float, level: float, measure: str) -> np.ndarray:
    """Entropy [start, stop] of every Flow-SDE step, from scratch; NaN where stop <= start."""
    t_hat = np.linspace(1.0, 0.0, steps + 1)
    sigma = shift * t_hat / (1.0 + (shift - 1.0) * t_hat)
    from_data = 1.0 - sigma
    from_data[0] = from_data[1]
    length = sigma[:, None] - sigma[None, :]
    length[length <= 0] = np.nan
    variance = level**2 * (sigma / from_data)[:, None] * length
    nats = 0.5 * np.log(2 * np.pi * np.e * variance)
    table = {"exp_per_dim": np.exp(nats), "nats_per_dim": nats, "variance": variance / level**2}
    return table[measure]


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "spans", "evaluations"),  # of the steps 0..7; evaluations after the branches
    [
        (0.0, (1, 1, 1, 1, 1, 1, 1, 1), 92),
        (1.8, (1, 1, 1, 2, 2, 2, 2, 3), 86),
        (2.0, (1, 1, 1, 2, 2, 2, 3, 3), 85),
        (2.2, (1, 1, 2, 2, 2, 3, 3, 3), 83),
        (2.6, (1, 1, 2, 3, 3, 4, 4, 4), 78),
    ],
)
def test_plan_and_entropy_equal_those_of_the_paper(tau, spans, evaluations):
    plan = planned(threshold=tau)
    assert (plan.active, plan.spans, plan.warnings) == (tuple(range(8)), spans, ())
    assert plan.nfe() == {"anchor": 8, "suffix_per_sample": evaluations, "train": 8}
    np.testing.assert_allclose(plan.entropy, [*map(float, SINGLE.split())], atol=5e-5, rtol=0)


@st.composite
def plan_settings(draw: st.DrawFn) -> dict[str, Any]:
    measure = draw(st.sampled_from(sorted(MEASURES)))
    steps = draw(st.integers(4, 40))
    active = draw(st.sets(st.integers(0, steps - 2), min_size=1, max_size=12))
    of = {"steps": steps, "shift": draw(st.floats(0.5, 8)), "level": draw(st.floats(0.1, 1.5))}
    tau = draw(st.floats(*MEASURES[measure]))
    return {**of, "measure": measure, "active": sorted(active), "tau": tau}


def made(s: dict[str, Any], tau: float) -> Plan:
    how = {"threshold": tau, "noise_level": s["level"], "measure": s["measure"]}
    return make_plan(shifted_sigmas(s["steps"], s["shift"]), s["active"], **how)


@settings(max_examples=150, deadline=None)
@given(plan_settings(), st.floats(0.0, 3.0), st.integers(1, 4))
def test_spans_are_the_least_that_reach_the_threshold(s, more, samples):
    """They never shrink as it rises; the plan's evaluations are those of its tree."""
    table = entropy_table(s["steps"], s["shift"], s["level"], s["measure"])
    assume(np.nanmin(np.abs(table - s["tau"])) > 1e-9 and s["tau"] != 0)
    expected, out_of_reach = [], []
    for i in s["active"]:
        reached = np.flatnonzero(table[i, i + 1 : s["steps"]] >= s["tau"])
        out_of_reach += [] if reached.size else [i]
        expected.append(int(reached[0]) + 1 if reached.size else s["steps"] - 1 - i)
    plan = made(s, s["tau"])
    assert list(plan.spans) == expected
    assert [int(re.match(r"step (\d+):", w)[1]) for w in plan.warnings] == out_of_reach
    assert all(plan.sigmas[i + n] > 0 for i, n in zip(plan.active, plan.spans, strict=True))
    singles = [table[i, i + 1] for i in range(s["steps"] - 1)]
    np.testing.assert_allclose(plan.entropy, singles, rtol=1e-9, atol=1e-9)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    if s["tau"] + more != 0:
        higher = made(s, s["tau"] + more)
        assert all(a <= b for a, b in zip(plan.spans, higher.spans, strict=True))
    nfe, cost = plan.nfe(), planned_branches(plan, samples).cost
    assert cost.forward == nfe["anchor"] + samples * nfe["suffix_per_sample"]
    assert cost.train == nfe["train"] == len(plan.active)


def test_fixed_spans_of_table_2_and_a_threshold_of_zero():
    for span in (1, 2, 4, 6):
        plan = planned(span=span)
        assert (plan.spans, plan.threshold) == ((span,) * 8, None)
        assert plan.nfe()["suffix_per_sample"] == sum(16 - i - span for i in range(8))
    reached = step_entropy(GRID, 3, 1, noise_level=0.7)  # which is enough
    assert planned([3], threshold=reached).spans == (1,)
    for measure in MEASURES:
        plan = planned(range(15), threshold=0, noise_level=0.05, measure=measure)
        assert plan.spans == (1,) * 15


def test_steps_out_of_reach_are_capped_dropped_or_refused():
    plan = planned(range(8, 15), threshold=2.6)
    reach = entropy_table(16, 3.0, 0.7, "exp_per_dim")[:, 15]
    beyond = [i for i in range(8, 15) if not reach[i] >= 2.6]
    assert 0 < len(beyond) < 7
    why = "threshold 2.6 (exp_per_dim) is out of reach"
    assert plan.warnings == tuple(f"step {i}: {why}, span capped at {15 - i}" for i in beyond)
    assert all(plan.active[k] + plan.spans[k] == 15 for k in range(7) if 8 + k in beyond)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.to_dict()["nfe"] == plan.nfe()
    dropped = planned(range(8, 15), threshold=2.6, on_unreachable="drop")
    assert set(dropped.active) == set(range(8, 15)) - set(beyond)
    assert dropped.warnings == tuple(f"step {i}: {why}, step left out" for i in beyond)
    fixed = planned([8, 12], span=6)
    assert fixed.spans == (6, 3)
    assert fixed.warnings == ("step 12: span 6 would land on sigma = 0, span capped at 3",)


@pytest.mark.parametrize(
    ("active", "change", "message"),
    [
        ([15], {}, r"active step 15 lies beyond the schedule: 16 steps allow 0\.\.14"),
        ([40], {}, "active step 40 lies beyond the schedule"),
        ([-1, 2], {}, "active step -1 lies beyond"),
        ([3, 2], {}, "ascending"),
        ([2, 2], {}, "distinct"),
        ([2], {"on_unreachable": "hope"}, "on_unreachable must be one of"),
        ([2], {"measure": "bits"}, "measure must be one of"),
        ([2], {"span": 2}, "either a threshold or a fixed span"),
        ([2], {"threshold": None}, "either a threshold or a fixed span"),
        ([2], {"threshold": None, "span": 0}, "a fixed span must be at least 1, got 0"),
        ([2], {"threshold": None, "span": -3}, "a fixed span must be at least 1, got -3"),
        ([14], {"threshold": 2.6, "on_unreachable": "error"}, r"14: .* 2\.6 .*longest span is 1"),
        (
            range(8),
            {"threshold": None, "span": 9, "on_unreachable": "error"},
            "step 7: span 9 would land on sigma = 0",
        ),
        ([13, 14], {"threshold": 9.0, "on_unreachable": "drop"}, "no active step is left"),
    ],
)
def test_impossible_plans_are_refused(active, change, message):
    with pytest.raises(ValueError, match=message):
        planned(active, **{"threshold": 2.2, **change})


DAMAGED = [  # key, what is said, of which values
    ("sigmas", "fall strictly", [[1.0, 0.5, 0.6, 0.0], [1.0, *[math.nan] * 15, 0.0]]),
    ("sigmas", "start at 1 and end at 0", [[0.9, 0.5, 0.0], [1.0, 0.5], "1"]),
    ("sigmas", "convert string to float", [[1, "x", 0]]),
    *((key, "wrong type", [3]) for key in ("sigmas", "active", "spans", "samples", "warnings")),
    *((key, "wrong type", [None, 3]) for key in ("sigmas", "active", "spans", "entropy")),
    ("entropy", "2 entropy values for 16 steps; 15 are needed", [[1.0, 2.0]]),
    ("active", "7 active steps but 8 spans", [[*range(7)]]),
    ("active", "active step 15 lies beyond", [[*range(7), 15]]),
    ("active", "active step -1 lies beyond", [[-1, *range(7)]]),
    ("active", "ascending", [[*range(7, -1, -1)], [0, 0, *range(6)]]),
    ("spans", r"span 9 at step 7 must be 1\.\.8", [[1, 1, 2, 2, 2, 3, 3, 9]]),
    ("spans", "span 0 at step 7", [[1, 1, 2, 2, 2, 3, 3, 0]]),
    ("spans", "whole numbers", [[1, 1, 2, 2, 2, 3, 3, 2.5], [True] * 8]),
    ("active", "whole numbers", [[0.5], [True], "01", {"a": 1}]),
    ("samples", "whole numbers", ["x", [2.0] * 8]),
    ("samples", "7 samples for 8 steps", [[2] * 7]),
    ("samples", "at least 2", [[2] * 7 + [1], [-3] * 8]),
    ("entropy", "finite numbers", [[x] * 15 for x in ("x", None, math.nan)]),
    ("threshold", "finite numbers", ["x", [1], math.inf, True]),
    ("noise_level", "finite numbers", ["0.7", None, math.nan]),
    ("dynamics", "unknown dynamics 'flowsde'|unhashable", ["flowsde", []]),
    ("measure", "measure '?(bits|None|{})", ["bits", None, {}]),
    ("warnings", "must be text", [[3]]),
]


@pytest.mark.parametrize(("key", "message", "values"), DAMAGED)
def test_damaged_plans_are_refused(key, message, values):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=message):
            Plan.from_dict(planned(threshold=2.2).to_dict() | {key: value})


def test_plans_that_lack_a_key_are_refused():
    whole = planned(threshold=2.2).to_dict()
    for key in whole.keys() - {"warnings", "samples", "nfe"}:
        with pytest.raises(ValueError, match=f"no key '{key}'"):
            Plan.from_dict({k: v for k, v in whole.items() if k != key})


# --- grids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [None, 0.02])
@pytest.mark.parametrize("shift", [1.0, 3.0, 6.5, "dynamic"])
@pytest.mark.parametrize("steps", [10, 40, 50])
def test_grids_are_those_of_diffusers(steps, shift, terminal):
    dynamic, mu = shift == "dynamic", 0.8
    shift = 1.0 if dynamic else shift
    how = {"use_dynamic_shifting": dynamic, "shift_terminal": terminal}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **how)
    given = {"mu": mu if dynamic else None}
    shift = math.exp(mu) if dynamic else shift
    even = np.linspace(1.0, 1.0 / steps, steps).tolist()
    for end, asked in (
        (None, {"sigmas": even}),
        (stock_end(shift, dynamic=dynamic), {"num_inference_steps": steps}),
    ):
        scheduler.set_timesteps(**asked, **given)
        ours = shifted_sigmas(steps, shift, terminal, end)
        np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)
        assert check_sigmas(ours) == ours


def test_stock_grid_of_ten_steps():
    end = stock_end(3.0, dynamic=False)
    assert end == pytest.approx(0.002994, abs=1e-6)
    known = (1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0)
    grid = shifted_sigmas(10, 3.0, end=end)
    assert grid == pytest.approx(known, abs=5e-5)
    one = shifted_sigmas(1, 3.0, end=end)
    assert check_sigmas(one) == one == (1.0, 0.0)
    # Flow-GRPO's last, untrained step adds this much noise to the rewarded latent
    assert STD["flow_sde"](grid, 9, 10, 0.7) == pytest.approx(0.0063, abs=5e-5)
    assert STD["flow_sde"](shifted_sigmas(10, 3.0), 9, 10, 0.7) == pytest.approx(0.202, abs=5e-4)


IMPOSSIBLE = [
    *(((steps, 3.0), "steps must be at least 1") for steps in (0, -4)),
    *(((16, shift), "shift must be a positive") for shift in (0.0, -1.0, math.inf, math.nan)),
    *(((9, 3.0, None, end), "end must lie") for end in (0.0, 1.0, -0.1, math.nan)),
    *(((9, 3.0, last), "terminal must lie") for last in (0.0, 1.0)),
    ((1, 3.0, 0.1), "terminal must lie in"),
]
NO_GRIDS = [[1.0], [], [1, 0.5, 0.5, 0], [1, math.nan, 0], [1, 0.2], [0.9, 0.0]]


def test_impossible_schedules_and_grids_are_refused():
    for arguments, message in IMPOSSIBLE:
        with pytest.raises(ValueError, match=message):
            shifted_sigmas(*arguments)
    for grid in NO_GRIDS:
        with pytest.raises(ValueError, match="sigmas must"):
            check_sigmas(grid)


# --- entropy --------------------------------------------------------------------------------------


def test_entropy_of_other_dynamics_and_of_no_noise():
    grid, unit = shifted_sigmas(10, 2.0), math.sqrt(2 * math.pi * math.e)
    dance = step_entropy(grid, 3, 2, noise_level=0.3, dynamics="dance_sde")
    assert dance == pytest.approx(unit * 0.3 * math.sqrt(grid[3] - grid[5]))
    cps = step_entropy(grid, 3, 2, noise_level=0.5, dynamics="cps")
    assert cps == pytest.approx(unit * grid[5] * math.sqrt(0.5))
    for measure, nothing in (("exp_per_dim", 0.0), ("variance", 0.0), ("nats_per_dim", -math.inf)):
        assert step_entropy(grid, 3, 2, noise_level=0.0, measure=measure) == nothing
    for start, span in ((0, 0), (-1, 2), (8, 3), (10, 1)):
        with pytest.raises(ValueError, match="leaves the schedule"):
            step_entropy(grid, start, span, noise_level=0.7)
