"""What a run says of itself: that it learned nothing, or that a reward collapsed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import small_run

from egrpo.config.training import Bound
from egrpo.train.warnings import crossed, training_warnings, warnings_in


def test_a_fall_is_measured_from_the_untrained_model():
    bounds = {"reward/clip": Bound(fall=0.1, action="stop"), "distance_to_base": Bound(most=0.5)}
    start, *now = (
        {"monitor/reward/clip": clip, "monitor/distance_to_base": distance}
        for clip, distance in ((0.7, 0.0), (0.61, 0.5), (0.59, 0.51), (None, 0.0))
    )
    expected = [], list(bounds), ["reward/clip"]  # NaN is null in the journal
    assert tuple(list(crossed(bounds, each, start)) for each in now) == expected


def monitored(scores: Any, name: str = "reward/clip") -> dict[str, float | None]:
    values = np.asarray(scores, dtype=np.float64)
    return {
        f"monitor/{name}": float(values.mean()),
        f"monitor_std/{name}": float(values.std(ddof=1)),
        f"monitor_count/{name}": values.size,
        "monitor/distance_to_base": 0.1,
    }


SCORES = np.linspace(0.0, 0.72, 16)  # mean 0.36
COLLAPSES: dict[str, tuple[Any, Any, bool]] = {
    "to nothing": (SCORES, np.full(16, 7e-12), True),
    "to nothing, in other units": (1e4 * SCORES - 5e5, np.full(16, -5e5), True),
    "of four, far below all": ([0.7, 0.72, 0.68, 0.75], [0.1, -0.1, 0.3, 0.0], True),
    "of what was perfect": (np.ones(16), np.zeros(16), True),
    "one in 32 misses": (np.ones(32), np.r_[np.ones(31), 0.0], False),
    "of three": ([0.9, 0.91, 0.92], [0.0, 0.01, 0.02], False),
    "of four, within their spread": ([0.9, 0.8, 0.1, 0.9], [0.1, 0.0, 0.9, 0.0], False),
    "half a std, of very many": (np.tile(SCORES, 64), np.tile(SCORES - 0.11, 64), False),
    "a gain": (SCORES, SCORES + 1.0, False),
}


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_collapse_is_told_from_noise_in_any_unit(name):
    start, now, expected = COLLAPSES[name]
    history = [(0, monitored(start)), (10, monitored(now))]
    found = training_warnings(small_run("any"), history)
    assert list(found) == ["bound/reward/clip"] * expected
    own = small_run("own", **{"train.bounds": {"reward/clip": {"fall": 1e9}}})  # in its place
    assert not training_warnings(own, history)


@pytest.mark.parametrize("count", [4, 16, 32])
def test_noise_alone_seems_a_collapse_once_in_two_hundred_draws_at_most(count):
    """Even where each image is drawn anew and scores are only high or low."""
    rng, run = np.random.default_rng(count), small_run("noise")
    draws = rng.random((2, 1000, count)) < 0.5
    wrong = sum(
        bool(training_warnings(run, [(0, monitored(a)), (10, monitored(b))]))
        for a, b in zip(*draws, strict=True)
    )
    assert wrong <= 5


def test_diversity_may_shrink_but_not_vanish():
    run, start = small_run("diversity"), monitored([0.1, 0.12, 0.14, 0.18] * 2, "diversity")
    for now, expected in ((0.06, []), (0.01, ["bound/diversity"])):
        after = monitored(now + 0.01 * np.arange(8), "diversity")
        assert list(training_warnings(run, [(0, start), (10, after)])) == expected


def step(groups: int = 4, masked: int = 0, **metrics: float) -> dict[str, float | None]:
    return {"groups": groups, "groups_masked": masked, "grad_norm": 1.0, **metrics}


def both(verifier: float, clip: float, **more: float) -> dict[str, float | None]:
    """An iteration with two rewards: their std within groups."""
    return step(4, 2, **{"reward_std/verifier": verifier, "reward_std/clip": clip}, **more)


APART = both(0.1, np.nan, **{"reward_valid/clip": 0})
SILENT: dict[str, tuple[list[dict[str, float | None]], dict[str, str]]] = {
    "nothing wrong": ([step()] * 10, {}),
    "one group in three": ([step(3, 1)] * 10, {}),
    "one iteration in twenty": ([step(4, 4), *[step()] * 19], {}),
    "one in ten": (
        [step(4, 4, grad_norm=0.0), *[step()] * 9],
        {"equal_rewards": "in 1 of 10 iterations all groups had equal rewards, so nothing was "},
    ),
    "most groups": (
        [step(4, 3)] * 10,
        {"equal_rewards": "30 of 40 groups had equal rewards, which taught nothing"},
    ),
    "scores that failed": (
        [step(4, 4, samples_invalid=7)],
        {"equal_rewards": "all groups had equal rewards or fewer than two valid scores"},
    ),
    "no gradient": (
        [step(grad_norm=0.0), step()],
        {"no_gradient": "in 1 of 2 iterations the gradient was 0 although rewards differed"},
    ),
    "one of two rewards": (
        [both(0.1, 0.0)] * 3,
        {"equal_rewards/clip": "in 3 of the 3 iterations with a valid score of clip all groups"},
    ),
    "a reward that applies to some prompts": ([both(0.1, 0.1), *[APART] * 3], {}),
    "a reward that never applies": (
        [APART] * 3,
        {"equal_rewards/clip": "no image of 3 iterations has a valid score of clip"},
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_iterations_that_taught_nothing_are_counted(name):
    steps, expected = SILENT[name]
    rewards = {"train.rewards": {"verifier": 1.0, "clip": 1.0}}
    run = small_run("silent", **(rewards if "reward_std/clip" in steps[0] else {}))
    found = training_warnings(run, list(enumerate(steps, start=1)))
    assert list(found) == list(expected)
    assert all(text in found[kind] for kind, text in expected.items())


def flat(images: Any, prompts: list[str]) -> list[float]:
    """A reward that is saturated."""
    return [1.0] * len(prompts)


OWN = {"kind": "custom", "function": "test_warnings:flat"}
TAUGHT_NOTHING: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "healthy, though slow": ({"train.learning_rate_scale": 0.1}, {}),
    "equal rewards": (
        {"rewards.own": OWN, "train.rewards": {"verifier": None, "own": 1.0}},
        {"equal_rewards": "in 2 of 2 iterations all groups had equal rewards"},
    ),
    "rewards that cancel": (
        {"rewards.again": {"kind": "verifier"}, "train.rewards": {"verifier": 1.0, "again": -1.0}},
        {"no_gradient": "in 2 of 2 iterations the gradient was 0"},
    ),
    "a learning rate that moves nothing": (
        {"train.learning_rate_scale": 1e-30},
        {"unmoved": "so nothing was learned (train.learning_rate_scale 1e-30)"},
    ),
    "weights averaged too slowly": (
        {"train.ema_decay": 1.0 - 1e-9},
        {"unmoved": "bit for bit those of the untrained model"},
    ),
    "a learning rate that destroys": (
        {"train.learning_rate_scale": 1e6, "train.monitor_samples": 8},
        {"bound/reward/verifier": "(train.bounds.reward/verifier.collapse)"},
    ),
}


@pytest.mark.parametrize("name", TAUGHT_NOTHING)
def test_a_run_says_that_it_learned_nothing_or_collapsed(name, jobs):
    """When it begins and at the end, not in each iteration; and from its results for ever."""
    settings, expected = TAUGHT_NOTHING[name]
    run = small_run("said", **({"train.iterations": 2, "train.monitor_every": 1} | settings))
    out = jobs(run)
    said = [line for line in jobs.said().splitlines() if line.startswith("said: ")]
    found = warnings_in(out / "train_metrics.parquet", run)
    assert bool(said) == bool(found) == bool(expected)
    for kind, text in expected.items():
        assert text in found[kind]
    for text in found.values():
        assert any(line.endswith((text, f"{text}; training goes on")) for line in said)
    begun = [line for line in said if line.endswith("; training goes on")]
    assert len(begun) >= len(found)
    assert len(said) <= 2 * len(begun)
    if "equal_rewards" in expected:
        assert [line.split(":")[1].strip() for line in said] == ["iteration 1", "at the end"]
        assert list(found) == ["equal_rewards"]  # which explains that nothing moved
