"""Reward curves: of single runs, and of arms whose runs differ in their seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from egrpo.core.intervals import crossed_interval
from egrpo.errors import UserError
from egrpo.figures.style import LINES, STYLE, Array, columns, look, save_figure, wrap
from egrpo.store.tables import TRAIN_METRICS

Columns = Mapping[str, Array]
WIDTH = 9.5
"""Inches."""
WINDOW = 10
"""Iterations of the trailing mean of training samples."""
MOST_MARKERS = 8
"""Of one line; more would hide each other and the dashes."""


class Curve(NamedTuple):
    """One line of a panel, of a run or an arm; [n] by iteration, finite values [seeds, n]; ``kind``
    is "training" (samples) or "monitor" (fixed held-out prompts)."""

    name: str
    kind: str
    iteration: Array
    nfe: Array
    seeds: Array


def curves_figure(
    metrics: Sequence[str | Path], rewards: Sequence[str], stem: str | Path
) -> Figure:
    """Reward against iterations and against network evaluations, one row of panels a reward.

    Thin lines: mean of the training samples over the last WINDOW iterations (gid "training:<run>").
    Markers: mean on fixed held-out prompts (gid "monitor:<run>"). Raises UserError if a file is
    missing or damaged, or no run has any of the rewards.
    """
    tables = [columns(path, TRAIN_METRICS) for path in metrics]
    curves = {r: [c for table in tables for c in _run_curves(table, r)] for r in rewards}
    if not any(curves.values()):
        raise UserError(
            f"curves: no run has the metric reward/<name> of {', '.join(rewards) or 'any reward'}"
        )
    title = (
        "Reward during training (markers: fixed held-out prompts; thin lines: "
        f"training samples, mean of last {WINDOW} iterations)"
    )
    return _draw(curves, title, stem)


def _run_curves(table: Columns, reward: str) -> Iterator[Curve]:
    """Training and monitor curve of each run in a table."""
    for run in dict.fromkeys(table["run"]):
        part = {name: column[table["run"] == run] for name, column in table.items()}
        for kind, metric in (("training", "reward/"), ("monitor", "monitor/reward/")):
            iteration, nfe, value = _series(part, f"{metric}{reward}")
            if len(value):
                shown = trailing_mean(value, WINDOW) if kind == "training" else value
                yield Curve(run, kind, iteration, nfe, shown[None])


def arm_curves_figure(
    groups: Mapping[str, Sequence[str | Path]], rewards: Sequence[str], stem: str | Path
) -> Figure:
    """Fig. 1c and 4 of the paper: reward on fixed held-out prompts, arm by arm, over seeds.

    Lines (gid "monitor:<arm>") are means over the seeds of an arm, where every seed was measured;
    bands (gid "band:<arm>") the 95% intervals of these means over seeds (Student's t), which an arm
    with one seed lacks. The axes show every seed; with few seeds bands may leave them. Left against
    iterations, right against the mean network evaluations of the seeds; a row of panels a reward.
    Raises UserError if a file is missing or damaged, or if an arm lacks a reward.
    """
    tables = {
        arm: {f"{path}": columns(path, TRAIN_METRICS) for path in paths}
        for arm, paths in groups.items()
    }
    curves = {r: [_arm_curve(arm, seeds, r) for arm, seeds in tables.items()] for r in rewards}
    counts = sorted({len(seeds) for seeds in tables.values()})
    title = "Reward on fixed held-out prompts during training"
    if counts[-1] > 1:
        several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
        title += f" (line: mean of {several} seeds; band: its 95% interval over seeds)"
    return _draw(curves, title, stem)


def _arm_curve(arm: str, tables: Mapping[str, Columns], reward: str) -> Curve:
    """The seeds of an arm, where all of them were measured."""
    seeds = {path: _series(table, f"monitor/reward/{reward}") for path, table in tables.items()}
    for path, (_, _, value) in seeds.items():
        if not len(value):
            raise UserError(
                f"{path}: arm {arm!r} has no value of monitor/reward/{reward}; is it among its "
                "rewards, and train.monitor_every above 0?"
            )
    shared = reduce(np.intersect1d, [iteration for iteration, *_ in seeds.values()])
    if not len(shared):
        raise UserError(f"curves: seeds of arm {arm!r} were monitored at no common iteration")
    at = [np.searchsorted(iteration, shared) for iteration, *_ in seeds.values()]
    nfe, value = (
        np.array([s[k][i] for s, i in zip(seeds.values(), at, strict=True)], float) for k in (1, 2)
    )
    return Curve(arm, "monitor", shared, nfe.mean(0), value)


def _series(table: Columns, metric: str) -> tuple[Array, Array, Array]:
    """Iterations, network evaluations and finite values of one metric, by iteration."""
    at = (table["metric"] == metric) & np.isfinite(table["value"])
    order = np.argsort(table["iteration"][at], kind="stable")
    iteration, nfe, value = (table[name][at][order] for name in ("iteration", "nfe", "value"))
    return iteration, nfe, value


def trailing_mean(values: Array, window: int) -> Array:
    """Mean of each value and up to ``window`` - 1 before it, [n]; fewer at the start."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return np.asarray((sums[stop] - sums[start]) / (stop - start))


def _draw(curves: Mapping[str, Sequence[Curve]], title: str, stem: str | Path) -> Figure:
    """A row of two panels for each reward, and one legend of all names below."""
    names = list(dict.fromkeys(curve.name for found in curves.values() for curve in found))
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4 * len(curves) + 0.9))
        grid = figure.subplots(len(curves), 2, squeeze=False, sharey="row", sharex="col")
        for (left, right), (reward, found) in zip(grid, curves.items(), strict=True):
            for curve in found:
                _draw_curve(left, curve.iteration, curve, names.index(curve.name))
                _draw_curve(right, curve.nfe, curve, names.index(curve.name))
            left.set_ylabel(f"reward: {reward}")
            if found:  # every seed, with a margin
                low = min(float(curve.seeds.min()) for curve in found)
                high = max(float(curve.seeds.max()) for curve in found)
                margin = 0.05 * (high - low) or 0.05
                left.set_ylim(low - margin, high + margin)
        left, right = grid[-1]
        left.set_xlabel("training iterations")
        right.set_xlabel("network evaluations (forward, forward-backward, reference)")
        left.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        right.xaxis.set_major_formatter(EngFormatter(sep=""))
        grid[0][0].set_title("at equal iterations", loc="left")
        grid[0][1].set_title("at equal network evaluations", loc="left")
        _legend(figure, names)
        figure.suptitle(title, fontsize=11)
        return save_figure(figure, stem)


def _draw_curve(axes: Axes, x: Array, curve: Curve, at: int) -> None:
    """A line, and over several seeds the 95% interval of their mean (Student's t)."""
    style = _look(at) | {"gid": f"{curve.kind}:{curve.name}", "zorder": 3}
    if curve.kind == "training":
        style |= {"ls": "-", "marker": None, "lw": 0.9, "alpha": 0.5, "zorder": 2}
    else:
        every = -(-len(x) // MOST_MARKERS)
        # each series begins with another point, so that markers of near curves stand apart
        style["markevery"] = at % every, every
    axes.plot(x, curve.seeds.mean(0), **style)
    if len(curve.seeds) > 1:
        ends = [crossed_interval(values[None]) for values in curve.seeds.T]
        band = {"color": style["color"], "alpha": 0.13, "lw": 0, "gid": f"band:{curve.name}"}
        axes.fill_between(x, [i.low for i in ends], [i.high for i in ends], **band)


def _look(at: int) -> dict[str, Any]:
    """Color, dashes, and a marker whose white edge stands out of lines; stars are larger, for
    they fill less of their size."""
    own = look(at)
    size = 10 if own["marker"] == "*" else 6.5
    return own | {"ls": LINES[at % len(LINES)], "ms": size, "mec": "white", "mew": 0.7}


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """Below the panels, in as many columns as the names leave room for."""
    labels = [wrap(name, 28) for name in names]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    room = int(WIDTH / (0.75 + 0.08 * longest))  # inches: the sample of the line, the characters
    shown = [Line2D([], [], label=label, **_look(i)) for i, label in enumerate(labels)]
    ncols = min(room, len(shown), 6)
    figure.legend(handles=shown, loc="outside lower center", ncols=ncols, handlelength=3.4)
