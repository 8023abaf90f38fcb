"""Paired cluster bootstrap: closed forms, invariances and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from egrpo.core import bootstrap
from egrpo.core.bootstrap import Interval, paired_interval


def interval(
    base: object, trained: object, clusters: object, resamples: int = 2000, seed: int = 0
) -> Interval:
    return paired_interval(base, trained, clusters, resamples=resamples, seed=seed)  # type: ignore[arg-type]


def test_means_and_difference_of_known_pairs() -> None:
    got = interval([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 5.0, 5.0], [0, 0, 1, 1])
    assert (got.mean_base, got.mean_trained, got.difference) == (2.5, 3.5, 1.0)
    assert (got.pairs, got.invalid) == (4, 0)


def test_two_clusters_have_the_interval_that_enumeration_gives() -> None:
    # clusters of means 0.5 (2 pairs) and 2 (1 pair): resamples (a,a) (a,b) (b,a) (b,b), each 1/4
    got = interval([0.0, 0.0, 0.0], [0.0, 1.0, 2.0], ["a", "a", "b"])
    assert (got.low, got.high) == (0.5, 2.0)
    half = paired_interval(
        [0.0] * 3, [0.0, 1.0, 2.0], ["a", "a", "b"], resamples=4000, seed=1, level=0.3
    )
    assert half.low == half.high == 1.0  # (a, b) holds 3 pairs of sum 3: a ratio, not 1.25


def test_pairs_that_are_not_finite_are_removed_and_counted() -> None:
    base = [0.0, math.nan, 1.0, 5.0, 2.0]
    trained = [1.0, 3.0, math.nan, math.inf, 4.0]
    got = interval(base, trained, [0, 1, 2, 3, 4])
    assert (got.pairs, got.invalid) == (2, 3)
    assert (got.mean_base, got.mean_trained, got.difference) == (1.0, 2.5, 1.5)
    assert got == Interval(1.0, 2.5, 1.5, 1.0, 2.0, 2, 3)


def test_no_valid_pair_gives_nan() -> None:
    got = interval([math.nan], [1.0], [0])
    assert (got.pairs, got.invalid) == (0, 1)
    assert all(math.isnan(v) for v in (got.mean_base, got.difference, got.low, got.high))
    assert interval([], [], []).pairs == 0


def test_one_cluster_has_a_difference_but_no_interval() -> None:
    got = interval([0.0, 0.0], [1.0, 2.0], [7, 7])
    assert got.difference == 1.5
    assert math.isnan(got.low)
    assert math.isnan(got.high)


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e-7, 12345.6789])
def test_constant_differences_have_exactly_no_width(value: float) -> None:
    base = np.zeros(37)
    got = interval(base, base + value, np.arange(37) // 3)
    assert got.low == got.difference == got.high == value


def test_order_of_pairs_changes_nothing() -> None:
    rng = np.random.default_rng(5)
    base, trained = rng.normal(size=(2, 60))
    clusters = rng.integers(12, size=60)
    base[3] = math.nan
    first = interval(base, trained, clusters)
    for _ in range(3):
        order = rng.permutation(60)
        assert interval(base[order], trained[order], clusters[order]) == first


def test_seed_and_chunks_decide_only_the_resampling(monkeypatch: pytest.MonkeyPatch) -> None:
    base, trained = np.random.default_rng(2).normal(size=(2, 40))
    first, other = (interval(base, trained, range(40), seed=s) for s in (1, 2))
    assert first == interval(base, trained, range(40), seed=1)
    assert first.difference == other.difference
    assert first.low != other.low
    monkeypatch.setattr(bootstrap, "_CHUNK", 400)
    small = interval(base, trained, range(40), seed=1)
    assert small.low == pytest.approx(first.low, abs=0.05)
    assert small.difference == first.difference


def test_shift_and_sign_carry_over() -> None:
    base, trained = np.random.default_rng(3).normal(size=(2, 50))
    plain = interval(base, trained, range(50))
    moved = interval(base, trained + 2.0, range(50))
    assert moved.low == pytest.approx(plain.low + 2.0)
    turned = interval(trained, base, range(50))
    assert turned.low == pytest.approx(-plain.high, abs=0.03)


def test_samples_of_one_prompt_do_not_count_as_independent() -> None:
    # 30 prompts of 20 identical differences: as uncertain as 30 numbers, not as 600
    effect = np.random.default_rng(4).normal(size=30)
    by_prompt = interval(np.zeros(600), np.repeat(effect, 20), np.repeat(np.arange(30), 20))
    alone = interval(np.zeros(30), effect, np.arange(30))
    naive = interval(np.zeros(600), np.repeat(effect, 20), np.arange(600))
    assert by_prompt.high - by_prompt.low == pytest.approx(alone.high - alone.low)
    ratio = (by_prompt.high - by_prompt.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(math.sqrt(20), rel=0.08)


def test_agrees_with_normal_theory_for_many_pairs() -> None:
    rng = np.random.default_rng(6)
    base = rng.normal(size=2000)
    trained = base + rng.exponential(size=2000)
    got = interval(base, trained, range(2000), resamples=4000)
    half = 1.959964 * float(np.std(trained - base, ddof=1)) / math.sqrt(2000)
    assert got.low == pytest.approx(got.difference - half, abs=0.06 * half)
    assert got.high == pytest.approx(got.difference + half, abs=0.06 * half)


def test_coverage_of_clustered_data_is_near_95_percent() -> None:
    # Student's t on the 40 prompt means is exact here; the percentile interval is a little narrower
    rng = np.random.default_rng(7)
    clusters = np.repeat(np.arange(40), 4)
    trials, hits, exact, naive = 500, 0, 0, 0
    for trial in range(trials):
        effect = 0.3 + np.repeat(rng.normal(size=40), 4) + 0.5 * rng.normal(size=160)
        got = interval(np.zeros(160), effect, clusters, resamples=500, seed=trial)
        hits += got.low <= 0.3 <= got.high
        means = effect.reshape(40, 4).mean(axis=1)
        exact += abs(means.mean() - 0.3) <= 2.0227 * means.std(ddof=1) / math.sqrt(40)
        got = interval(np.zeros(160), effect, np.arange(160), resamples=200, seed=trial)
        naive += got.low <= 0.3 <= got.high
    assert 0.90 <= hits / trials <= 0.98
    assert abs(hits - exact) / trials < 0.035
    assert naive / trials < 0.80


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"trained": [1.0]}, "one length"),
        ({"clusters": [[0, 1]]}, "one length"),
        ({"resamples": 0}, "resamples"),
        ({"level": 1.0}, "level"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], text: str) -> None:
    given: dict[str, object] = {
        "base": [1.0, 2.0],
        "trained": [1.0, 2.0],
        "clusters": [0, 1],
        "resamples": 10,
        "seed": 0,
    }
    with pytest.raises(ValueError, match=text):
        paired_interval(**{**given, **change})  # type: ignore[arg-type]
