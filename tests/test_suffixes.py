"""Cheaper suffixes compared with the exact one, on the shipped toy model."""

from __future__ import annotations

import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import small_run
from scipy.stats import spearmanr

from egrpo.measure.suffixes import mean_spread, rank_correlation, suffixes
from egrpo.planning.grids import training_sigmas
from egrpo.planning.trees import plan_of


def test_rank_correlation_is_spearmans_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 30), rng.normal(size=30)
    assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(a, a**3) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1.0, 1.0], [0.0, 2.0]))
    nan = math.nan
    assert rank_correlation([1.0, 5.0, nan, 2.0], [0.0, 2.0, 9.0, nan]) == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1.0, nan, nan], [0.0, 2.0, 9.0]))
    assert math.isnan(rank_correlation([nan, nan], [nan, nan]))


def test_spread_is_over_groups_that_have_scores():
    nan = math.nan
    groups = [[[1.0, 3.0, nan], [nan, nan, nan]], [[0.0, nan, nan], [nan, nan, nan]]]
    assert mean_spread([np.array(prompt) for prompt in groups]) == pytest.approx(math.sqrt(2))
    assert mean_spread([np.array(groups[1])]) is None


def test_exact_suffix_agrees_with_itself_and_others_cost_less(embeddings, tmp_path):
    of = """{profile.prompts: 2, profile.samples: 4, profile.strides: [1, 3],
      profile.solvers: [ode, dpm2], profile.features: [3], profile.fp8_sampling: true,
      model.dtype: bfloat16}"""
    run = small_run("s", **yaml.safe_load(of))
    out = tmp_path / "suffixes.parquet"
    _, text = suffixes(run, plan_of(run, training_sigmas(run)), embeddings, out)
    rows = {
        (r["granularity"], r["solver"], r["network"]): r
        for r in pq.read_table(out).to_pylist()
        if r["reward"] == "clip"
    }
    others = {n: rows.pop((1, "ode", n)) for n in ("features 3", "fp8", "fp8 products")}
    for row in others.values():  # as many evaluations, if not whole ones
        assert row["nfe"] == row["nfe_exact"]
        assert 0.3 < row["rank_correlation"] <= 1.0
        assert row["spread"] != row["spread_exact"]
        assert row["seconds"] > 0
    rows = {key[:2]: row for key, row in rows.items()}
    assert set(rows) == {(1, "ode"), (3, "ode"), (1, "dpm2"), (3, "dpm2")}
    exact = rows[1, "ode"]
    assert exact["rank_correlation"] == pytest.approx(1.0)
    assert exact["spread"] == exact["spread_exact"] > 0
    assert exact["nfe"] == exact["nfe_exact"] == rows[1, "dpm2"]["nfe"]
    for solver in ("ode", "dpm2"):
        assert rows[3, solver]["nfe"] < 0.6 * exact["nfe"]
        assert rows[3, solver]["rank_correlation"] <= 1.0
    assert rows[3, "ode"]["spread"] != rows[3, "dpm2"]["spread"] != exact["spread"]

    assert "| 3 | dpm2 | exact | clip |" in text
    assert "| 1 | ode | fp8 | clip |" in text
