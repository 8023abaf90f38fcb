"""Cheaper rollouts against the exact one: do they rank the samples of a group alike?

From the same branches, with the same noise, each kind of suffix and each form of the network
finishes the samples; within every group the rewards it gives are compared with those of the exact
rollout: Euler at every grid index, the network as it is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from egrpo.config.keys import run_key
from egrpo.config.models import FeatureCache, Model, RunConfig
from egrpo.core.intervals import crossed_interval
from egrpo.core.plan import Plan
from egrpo.images import check
from egrpo.methods.shapes import planned_branches
from egrpo.models import load_model
from egrpo.models.base import FlowModel
from egrpo.models.conditioning import Embeddings, load_conditioning
from egrpo.progress import Progress
from egrpo.rewards import RewardModel, load_rewards, score_all
from egrpo.sampling.sample import Sampler
from egrpo.store.tables import SUFFIXES, write_table


class Variant(NamedTuple):
    """One way to finish the samples: stride and solver of the suffix, and form of the network.

    That is "exact", "features <n>" (really evaluated every n-th step), "fp8" (weights are
    stored so), or "fp8 products" (multiplied so).
    """

    granularity: int = 1
    solver: str = "ode"
    network: str = "exact"

    def __str__(self) -> str:
        return f"stride {self.granularity}, solver {self.solver}, network {self.network}"


EXACT = Variant()
FLOAT8 = {"fp8": "fp8_weights", "fp8 products": "fp8_sampling"}
"""Settings of the model that make these networks."""


class Outcome(NamedTuple):
    """One prompt's rewards by name, [active steps, samples], network evaluations, and seconds."""

    scores: dict[str, npt.NDArray[np.float64]]
    forward: int
    seconds: float


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Spearman's rank correlation of two samples [n], over pairs of two finite values.

    NaN where one side has no spread among them, or fewer than two are left.
    """
    from scipy.stats import rankdata

    pairs = np.array([first, second], dtype=np.float64)
    ranks = [rankdata(x) for x in pairs[:, np.isfinite(pairs).all(0)]]
    if min((np.ptp(r) for r in ranks if len(r)), default=0) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def suffixes(
    run: RunConfig, plan: Plan, embeddings: Embeddings, output: Path
) -> tuple[list[dict[str, Any]], str]:
    """Measure every stride with every solver of ``profile``.

    Writes Parquet to ``output``; returns its rows, and what Markdown says of them. Raises UserError
    for missing weights or embeddings, or a variant that makes no image of a prompt.
    """
    texts, conditioning = load_conditioning(embeddings["profile"])
    plain = run.model.model_copy(update={"feature_cache": None, "fp8_sampling": False})
    model = load_model(plain)
    rewards = load_rewards(run.rewards, str(model.device))
    ids = list(range(min(run.profile.prompts, len(texts))))
    wanted = variants(run)
    found: dict[Variant, list[Outcome]] = {variant: [] for variant in wanted}
    with Progress(len(ids) * len(wanted), "suffixes", unit="rollout") as progress:
        for network, group in groupby(wanted, key=lambda v: v.network):
            model = _network(plain, network, model)
            batch, level = run.profile.micro_batch, plan.noise_level
            sampler = Sampler(model, conditioning, plan.sigmas, batch, noise_level=level)
            for variant, prompt_id in product(list(group), ids):
                prompt = prompt_id, texts[prompt_id]
                found[variant].append(_finish(run, sampler, rewards, plan, *prompt, variant))
                progress.step()
    rows = [
        row for variant in wanted for row in _rows(run.run, variant, found[variant], found[EXACT])
    ]
    write_table(output, SUFFIXES, rows, metadata={"config_hash": run_key(run)})
    return rows, _markdown(run, len(ids), rows)


def variants(run: RunConfig) -> list[Variant]:
    """The exact rollout, and what ``profile`` asks for, by network."""
    p = run.profile
    networks = [f"features {n}" for n in p.features if run.model.family != "z_image"]
    networks += ["fp8"] * p.fp8 + ["fp8 products"] * p.fp8_sampling
    suffix = (Variant(stride, solver) for stride, solver in product(p.strides, p.solvers))
    return list(dict.fromkeys([EXACT, *suffix, *(Variant(network=n) for n in networks)]))


def _network(settings: Model, network: str, loaded: FlowModel) -> FlowModel:
    """The base model in one of its forms; ``loaded`` where that is the exact one."""
    if network == "exact":
        return loaded
    if network in FLOAT8:
        return load_model(settings.model_copy(update={FLOAT8[network]: True}))
    cache = FeatureCache(interval=int(network.split()[1]))
    return load_model(settings.model_copy(update={"feature_cache": cache}))


def _finish(
    run: RunConfig,
    sampler: Sampler,
    rewards: Mapping[str, RewardModel],
    plan: Plan,
    prompt_id: int,
    text: str,
    variant: Variant,
) -> Outcome:
    """Rewards [active steps, samples] of one prompt's branches with one suffix, and its cost."""
    samples = run.profile.samples
    tree = planned_branches(
        plan, samples, granularities=(variant.granularity,), suffix=variant.solver
    )
    begun = time.monotonic()
    rollout = sampler.rollout([prompt_id], [tree], "suffix")
    seconds = time.monotonic() - begun
    images = sampler.model.decode(rollout.leaves, run.profile.decode_batch)
    what = f"suffixes: prompt {prompt_id}, {variant}"
    check(images.faults.tolist(), what, sampler.model.settings, trained=False)
    scores = score_all(rewards, images, [text] * len(images))
    return Outcome(
        {name: v.reshape(-1, samples) for name, v in scores.items()}, rollout.forward, seconds
    )


def _rows(
    run: str, variant: Variant, found: Sequence[Outcome], exact: Sequence[Outcome]
) -> Iterator[dict[str, Any]]:
    """One row a reward: means over the groups of a prompt, then over prompts, with intervals."""
    cost: dict[str, float] = {}
    for ending, outcomes in (("", found), ("_exact", exact)):
        cost[f"nfe{ending}"] = float(np.mean([o.forward for o in outcomes]))
        # the median: the first rollout of a network is slower
        cost[f"seconds{ending}"] = float(np.median([o.seconds for o in outcomes]))
    for reward in found[0].scores:
        pairs = [(f.scores[reward], e.scores[reward]) for f, e in zip(found, exact, strict=True)]
        ranks = [[rank_correlation(*each) for each in zip(*pair, strict=True)] for pair in pairs]
        known = [[r for r in prompt if not np.isnan(r)] for prompt in ranks]
        interval = crossed_interval(np.array([[np.mean(k) if k else np.nan for k in known]]))
        groups = sum(map(len, known))
        yield {
            "run": run,
            **variant._asdict(),
            "reward": reward,
            "rank_correlation": none_for_nan(interval.mean),
            "low": none_for_nan(max(interval.low, -1.0)),  # a correlation ends there
            "high": none_for_nan(min(interval.high, 1.0)),
            "spread": mean_spread([first for first, _ in pairs]),
            "spread_exact": mean_spread([second for _, second in pairs]),
            **cost,
            "groups": groups,
            "groups_equal": sum(map(len, ranks)) - groups,
        }


def mean_spread(scores: Sequence[npt.NDArray[np.float64]]) -> float | None:
    """Mean std within the groups of a prompt [groups, samples], then over prompts.

    Over groups with two scores at least; None without one.
    """
    valid = [[group[np.isfinite(group)] for group in prompt] for prompt in scores]
    stds = [[np.std(x, ddof=1) for x in prompt if len(x) > 1] for prompt in valid]
    means = [np.mean(found) for found in stds if found]
    return float(np.mean(means)) if means else None


def none_for_nan(value: float) -> float | None:
    """NaN travels as null."""
    return None if np.isnan(value) else value


def _markdown(run: RunConfig, prompts: int, rows: Sequence[dict[str, Any]]) -> str:
    text = (
        "# Cheaper rollouts\n\n"
        f"Base model, plan of run {run.run}, {prompts} prompts, groups of {run.profile.samples} "
        "samples. Network: exact; `features n`, really evaluated every n-th step of a suffix "
        "(TaylorSeer); fp8, weights rounded to float8; fp8 products, multiplied in "
        "float8. Rank correlation (Spearman) of a group's "
        "rewards with those of the exact rollout from the same branches, mean over groups, 95% "
        "interval over prompts; spread: std of the reward within a group, evaluations and seconds "
        "of the rollout, each over that of the exact one.\n\n"
        "| stride | solver | network | reward | rank correlation | spread | evaluations | seconds "
        "| groups | without spread |\n"
        "|--:|---|---|---|--:|--:|--:|--:|--:|--:|\n"
    )
    for r in rows:
        ranks = "-" if r["rank_correlation"] is None else f"{r['rank_correlation']:.3f}"
        if r["low"] is not None:
            ranks += f" [{r['low']:.3f}, {r['high']:.3f}]"
        known = r["spread_exact"] and r["spread"] is not None
        spread = f"{r['spread'] / r['spread_exact']:.3f}" if known else "-"
        text += (
            f"| {r['granularity']} | {r['solver']} | {r['network']} | {r['reward']} | {ranks} "
            f"| {spread} | {r['nfe'] / r['nfe_exact']:.3f} "
            f"| {r['seconds'] / r['seconds_exact']:.2f} | {r['groups']} | {r['groups_equal']} |\n"
        )
    return text
