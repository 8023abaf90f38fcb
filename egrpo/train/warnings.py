"""What a training run must say of itself: that it learned nothing, or that a reward collapsed.

All of it follows from the recorded metrics, so the job's log, tables, pages and MLflow agree, while
it trains and long after. A method that learns nothing is a result: only a bound can end a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from scipy.special import stdtrit

from egrpo.config.models import RunConfig
from egrpo.config.training import Bound
from egrpo.store.tables import TRAIN_METRICS, read_table

Metrics = Mapping[str, float | None]
"""Of one iteration, by name; NaN, or null where they were stored, for what has no value."""
History = Sequence[tuple[int, Metrics]]
"""(iteration, metrics) in order; iteration 0 is the untrained model's monitor."""

DISTANCE = "monitor/distance_to_base"
"""What every monitor measures."""
SHARE = 0.1
"""Of the iterations: if fewer taught nothing, that is chance, as with rewards of few values."""
CHANCE = 1e-3
"""How often one look takes noise for a fall, if every image were drawn anew. A run looks at some
rewards some tens of times, but at the same prompts and noise: it errs less."""
FEWEST = 4
"""Scores below which no fall is told from noise: two or three of a reward that is either high or
low turn over by chance."""


def training_warnings(run: RunConfig, history: History) -> dict[str, str]:
    """What is wrong with a run so far: kind -> one sentence.

    Kinds: ``equal_rewards`` (with several trained rewards also ``equal_rewards/<name>``),
    ``no_gradient``, ``unmoved``, and ``bound/<monitor>`` where the last monitor crosses a bound.
    """
    steps = [m for _, m in history if "groups" in m]
    equal = [_number(m, "groups_masked") >= _number(m, "groups") for m in steps]
    still = [
        not flat and _number(m, "grad_norm") == 0 for m, flat in zip(steps, equal, strict=True)
    ]
    out = _equal_rewards(run, steps, equal)
    if _matters(sum(still), steps):
        out["no_gradient"] = (
            f"in {sum(still)} of {len(steps)} iterations the gradient was 0 although rewards "
            "differed, so nothing was learned"
        )
    moved = [_number(m, DISTANCE) != 0 for i, m in history if i > 0 and DISTANCE in m]
    if moved and not moved[-1] and sum(equal) + sum(still) < len(steps):
        out["unmoved"] = (
            "the monitored images are bit for bit those of the untrained model, so nothing was "
            f"learned (train.learning_rate_scale {run.train.learning_rate_scale:g})"
        )
    beyond = beyond_bounds(run, history)
    return out | {f"bound/{name}": f"monitor {name}: {text}" for name, text in beyond.items()}


def warnings_in(metrics: Path, run: RunConfig) -> dict[str, str]:
    """The same of a finished run by its ``train_metrics.parquet``; UserError if that is damaged."""
    history: dict[int, dict[str, float | None]] = {}
    for row in read_table(metrics, TRAIN_METRICS).to_pylist():
        history.setdefault(row["iteration"], {})[row["metric"]] = row["value"]
    return training_warnings(run, sorted(history.items()))


def beyond_bounds(run: RunConfig, history: History) -> dict[str, str]:
    """Bounds that the last monitor crosses: name of the monitor -> what happened, in words."""
    monitors = {n: m for n, m in history if DISTANCE in m}
    last = max(monitors, default=0)
    # a later monitor than the untrained model's would be no start
    return crossed(run.bounds, monitors[last], monitors[0]) if last and 0 in monitors else {}


def crossed(bounds: Mapping[str, Bound], now: Metrics, start: Metrics) -> dict[str, str]:
    """Monitors beyond their bound: name -> what happened, in words.

    One that is NaN, as all its scores failed, is beyond any bound, but cannot fall from NaN.
    """
    out = {}
    for name, bound in bounds.items():
        if f"monitor/{name}" not in now:
            continue
        value, base = (_number(m, f"monitor/{name}") for m in (now, start))
        limits = {"least": bound.least}
        if bound.fall is not None:
            limits["fall"] = base - bound.fall
        if bound.collapse is not None:
            limits["collapse"] = base - _honest_fall(bound.collapse, name, now, start)
        known = {k: v for k, v in limits.items() if v is not None and not math.isnan(v)}
        key = max(known, key=known.__getitem__, default="")
        if math.isnan(value):
            if known or bound.most is not None:
                out[name] = f"all scores failed (train.bounds.{name})"
        elif key and value < known[key]:
            fell = "" if key == "least" else f", down from {base:.4g},"
            low = f"{known[key]:.4g} (train.bounds.{name}.{key})"
            out[name] = f"{value:.4g}{fell} is below {low}"
        elif bound.most is not None and value > bound.most:
            out[name] = f"{value:.4g} is above {bound.most:.4g} (train.bounds.{name}.most)"
    return out


def _honest_fall(collapse: float, name: str, now: Metrics, start: Metrics) -> float:
    """How far a monitor may fall: by ``collapse`` stds of its scores (Cohen's d), and by what noise
    does to means of so few (Student's t); infinite where they are too few, NaN where unknown."""
    s0, s1 = (_number(m, f"monitor_std/{name}") for m in (start, now))
    n0, n1 = (_number(m, f"monitor_count/{name}") for m in (start, now))
    if min(n0, n1) < FEWEST:
        return math.inf
    noise = float(stdtrit(n0 + n1 - 2, 1 - CHANCE)) * math.sqrt(s0**2 / n0 + s1**2 / n1)
    return max(collapse * math.sqrt((s0**2 + s1**2) / 2), noise)


def _equal_rewards(run: RunConfig, steps: Sequence[Metrics], equal: list[bool]) -> dict[str, str]:
    n, of, kind = len(steps), "had equal rewards", "equal_rewards"
    if any(_number(m, "samples_invalid") > 0 for m in steps):
        of += " or fewer than two valid scores"
    groups, masked = (sum(_number(m, k) for m in steps) for k in ("groups", "groups_masked"))
    out = {}
    if _matters(sum(equal), steps):
        out[kind] = f"in {sum(equal)} of {n} iterations all groups {of}, so nothing was learned"
    elif masked > groups / 2:
        out[kind] = f"{masked:.0f} of {groups:.0f} groups {of}, which taught nothing"
    for name in run.train.rewards if len(run.train.rewards) > 1 else ():
        applied = [m for m in steps if _number(m, f"reward_valid/{name}") != 0]
        flat = sum(not _number(m, f"reward_std/{name}") > 0 for m in applied)
        if steps and not applied:
            text = f"no image of {n} iterations has a valid score of {name}"
        elif _matters(flat, applied) and flat > sum(equal):
            text = f"in {flat} of the {len(applied)} iterations with a valid score of {name} all "
            text += f"groups {of} of it"
        else:
            continue
        out[f"{kind}/{name}"] = f"{text}, which taught nothing"
    return out


def _matters(count: int, steps: Sequence[Metrics]) -> bool:
    return count > 0 and count >= SHARE * len(steps)


def _number(metrics: Metrics, name: str) -> float:
    value = metrics.get(name)
    return math.nan if value is None else value
