"""Cheaper suffixes against the exact one: do they rank the samples of a group alike?

From the same branches, with the same noise, each suffix finishes the samples; within every group
the rewards it gives are compared with those of Euler at every grid index.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from egrpo.config.keys import suffixes_key
from egrpo.config.models import RunConfig
from egrpo.core.executor import execute
from egrpo.core.intervals import crossed_interval
from egrpo.core.methods import egrpo
from egrpo.core.plan import Plan
from egrpo.core.seeds import normal
from egrpo.models import load_model
from egrpo.models.conditioning import load_conditioning
from egrpo.rewards import load_rewards, score_all
from egrpo.stages.progress import Progress
from egrpo.store.files import write_text
from egrpo.store.tables import SUFFIXES, csv_text, write_table

EXACT = (1, "ode")
Scores = dict[str, npt.NDArray[np.float64]]


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Spearman's rank correlation of two samples [n]; NaN where one of them has no spread."""
    from scipy.stats import rankdata

    ranks = [rankdata(x) for x in (first, second)]
    if min(np.ptp(r) for r in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def suffixes(run: RunConfig, plan: Plan, embeddings: Path, output: Path) -> None:
    """Measure every stride with every solver of ``profile``.

    Writes Parquet to ``output``, CSV and Markdown beside it.

    Raises:
        UserError: for missing weights or embeddings.
    """
    texts, conditioning = load_conditioning(embeddings, "train")
    model = load_model(run.model)
    rewards = load_rewards(run.rewards, str(model.device))
    conditioning = conditioning.to(model.device)
    ids = list(range(min(run.profile.prompts, len(texts))))
    asked = product(run.profile.strides, run.profile.solvers)
    wanted = list(dict.fromkeys([EXACT, *asked]))
    found: dict[tuple[int, str], list[tuple[Scores, int]]] = {key: [] for key in wanted}
    with Progress(len(ids) * len(wanted), "suffixes", unit="rollout") as progress:
        for prompt_id in ids:
            prompt = conditioning.rows(torch.tensor([prompt_id], device=model.device))
            for granularity, solver in wanted:
                scores = _finish(
                    run,
                    model,
                    rewards,
                    plan,
                    prompt,
                    prompt_id,
                    texts[prompt_id],
                    granularity,
                    solver,
                )
                found[granularity, solver].append(scores)
                progress.step()
    rows = [
        row
        for key in wanted
        for row in _rows(run.run, key, found[key], found[EXACT], len(plan.active))
    ]
    write_table(output, SUFFIXES, rows, metadata={"config_hash": suffixes_key(run)})
    write_text(output.with_suffix(".csv"), csv_text(SUFFIXES, rows))
    write_text(output.with_suffix(".md"), _markdown(run, len(ids), rows))


def _finish(
    run: RunConfig,
    model: Any,
    rewards: Any,
    plan: Plan,
    prompt: Any,
    prompt_id: int,
    text: str,
    granularity: int,
    solver: str,
) -> tuple[Scores, int]:
    """Rewards [active steps, samples] of one prompt's branches with one suffix, and its cost."""
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    samples = run.profile.samples

    def noise(tree: int, start: int, sample: int) -> Tensor:
        return normal(model.image_shape, "suffix", prompt_id, start, sample)

    rollout = execute(
        [egrpo(plan, samples, granularities=(granularity,), suffix=solver)],
        plan.sigmas,
        lambda x, sigma, trees: model.velocity(x, sigma, prompt.rows(zero.expand(len(x)))),
        noise,
        noise_level=plan.noise_level,
        micro_batch=run.profile.micro_batch,
        dtype=model.dtype,
        device=model.device,
    )
    images = model.decode(rollout.leaves, run.profile.decode_batch)
    scores = score_all(rewards, images, [text] * len(images))
    return {name: v.reshape(-1, samples) for name, v in scores.items()}, rollout.forward


def _rows(
    run: str,
    key: tuple[int, str],
    found: Sequence[tuple[Scores, int]],
    exact: Sequence[tuple[Scores, int]],
    groups: int,
) -> list[dict[str, Any]]:
    """One row a reward: means over the groups of a prompt, then over prompts, with intervals."""
    rows = []
    for reward in found[0][0]:
        pairs = [(f[reward], e[reward]) for (f, _), (e, _) in zip(found, exact, strict=True)]
        ranks = [
            [rank_correlation(a, b) for a, b in zip(first, second, strict=True)]
            for first, second in pairs
        ]
        known = [[r for r in prompt if not np.isnan(r)] for prompt in ranks]
        interval = crossed_interval(np.array([[np.mean(k) if k else np.nan for k in known]]))
        spread = [np.nanmean(np.nanstd(first, axis=1, ddof=1)) for first, _ in pairs]
        wanted = [np.nanmean(np.nanstd(second, axis=1, ddof=1)) for _, second in pairs]
        rows.append(
            {
                "run": run,
                "granularity": key[0],
                "solver": key[1],
                "reward": reward,
                "rank_correlation": none_for_nan(interval.mean),
                "low": none_for_nan(max(interval.low, -1.0)),  # a correlation ends there
                "high": none_for_nan(min(interval.high, 1.0)),
                "spread": float(np.mean(spread)),
                "spread_exact": float(np.mean(wanted)),
                "nfe": float(np.mean([n for _, n in found])),
                "nfe_exact": float(np.mean([n for _, n in exact])),
                "groups": sum(map(len, known)),
                "groups_equal": groups * len(found) - sum(map(len, known)),
            }
        )
    return rows


def none_for_nan(value: float) -> float | None:
    """NaN travels as null."""
    return None if np.isnan(value) else value


def _markdown(run: RunConfig, prompts: int, rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Cheaper suffixes",
        "",
        f"Base model, plan of run {run.run}, {prompts} prompts, groups of {run.profile.samples} "
        "samples. Rank correlation (Spearman) of a group's rewards with those of the exact suffix "
        "from the same branches, mean over groups, 95% interval over prompts; spread: std of the "
        "reward within a group, over that of the exact suffix; evaluations: of the rollout, over "
        "those of the exact one.",
        "",
        "| stride | solver | reward | rank correlation | spread | evaluations | groups | without "
        "spread |",
        "|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        ranks = "-"
        if r["rank_correlation"] is not None:
            ranks = f"{r['rank_correlation']:.3f}"
            if r["low"] is not None:
                ranks += f" [{r['low']:.3f}, {r['high']:.3f}]"
        spread = f"{r['spread'] / r['spread_exact']:.3f}" if r["spread_exact"] else "-"
        lines.append(
            f"| {r['granularity']} | {r['solver']} | {r['reward']} | {ranks} | {spread} "
            f"| {r['nfe'] / r['nfe_exact']:.3f} | {r['groups']} | {r['groups_equal']} |"
        )
    return "\n".join(lines) + "\n"
