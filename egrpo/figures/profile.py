"""Figures of an entropy profile: the closed form and the plans made from it, the measured spread.

Each function reads Parquet or JSON, writes ``<stem>.png`` and ``<stem>.svg`` and returns the
figure. Null and NaN values are left out. Reward curves: :mod:`egrpo.figures.curves`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from egrpo.core.plan import Plan
from egrpo.errors import UserError
from egrpo.figures.style import (
    INK,
    STYLE,
    by_span,
    columns,
    entropy_axis,
    numbered,
    save_figure,
    shared_legend,
)
from egrpo.planning.plan import load_plan, plan_rows
from egrpo.store.tables import ENTROPY_PROFILE

PLAN_MARKERS = "osDhp8H"
"""Wide enough for a number inside."""
DASHES = ("--", ":", "-.", (0, (1, 3)))
SPREAD_UNITS = {
    "latent_variance": ("Final latents", "variance per dimension\n(latent units²)"),
    "image_distance": ("Images", "mean pairwise RMS distance\n(pixels in [0, 1])"),
}


def entropy_figure(
    profile: str | Path,
    plans: Mapping[str, str | Path],
    stem: str | Path,
    *,
    spans: Sequence[int] | None = None,
) -> Figure:
    """Fig. 1b of the paper: closed-form entropy of each step and span, and the plans' choices.

    Args:
        profile: ``entropy_profile.parquet``.
        plans: ``plan.json`` by run id, for this profile's schedule; each adds its threshold
            (gid "threshold") and a marker with the span of each active step (gid "plan:<run>",
            the first run where several share one plan).
        stem: output path without ending.
        spans: only these are drawn, each as in the figure of all; None: all of the profile.

    Raises:
        UserError: if a file is missing or damaged, the plans measure entropy in several units, or
            the profile lacks one of ``spans``.
    """
    table = columns(profile, ENTROPY_PROFILE)
    known = by_span(table["span"])
    lacking = sorted(set(spans or ()) - {span for span, _ in known})
    if lacking:
        raise UserError(
            f"{profile}: holds no span {lacking[0]}; change spans of the figure, or profile.spans"
        )
    read = {run: load_plan(path) for run, path in plans.items()}
    measures = {plan.measure for plan in read.values()} or {"exp_per_dim"}
    if len(measures) > 1:
        raise UserError(
            f"entropy figure: the plans measure entropy as {', '.join(sorted(measures))}; draw "
            "one figure for each measure"
        )
    measure = measures.pop()
    with rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.6))
        axes = figure.add_subplot()
        for span, series in known:
            if spans is None or span in spans:
                at = table["span"] == span
                steps, first = np.unique(table["step"][at], return_index=True)
                axes.plot(steps, table[measure][at][first], ms=4, **series)
        _draw_plans(axes, read)
        thresholds = {p.threshold for p in read.values() if p.threshold}  # 0 and None: no line
        for threshold, dashes in zip(sorted(thresholds), cycle(DASHES)):
            line: dict[str, Any] = {"color": INK, "lw": 1.4, "ls": dashes, "zorder": 1.5}
            line["label"] = rf"threshold $\tau$ = {threshold:g}"
            axes.axhline(threshold, gid="threshold", **line)
        entropy_axis(axes, measure, "denoising step")
        axes.set_title("Entropy of an SDE step, by start and number of merged steps", loc="left")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        return save_figure(figure, stem)


def _draw_plans(axes: Axes, plans: Mapping[str, Plan]) -> None:
    """A marker with its span for each active step; runs that share a plan share markers."""
    runs: dict[Plan, list[str]] = {}
    for run, plan in plans.items():
        runs.setdefault(plan, []).append(run)
    for k, (plan, names) in enumerate(runs.items()):
        # plans often agree: side by side, not stacked
        aside = min(0.45, 0.9 / len(runs)) * (k - (len(runs) - 1) / 2)
        numbered(
            axes,
            np.array(plan.active) + aside,
            [row["entropy"] for row in plan_rows(names[0], plan)],
            plan.spans,
            marker=PLAN_MARKERS[k % len(PLAN_MARKERS)],
            ms=11,
            zorder=4 + k / 10,
            gid=f"plan:{names[0]}",
            label=f"plan: {textwrap.fill(', '.join(names), 24)}\n(number: steps merged)",
        )


def spread_figure(profile: str | Path, stem: str | Path, *, noise_fraction: float = 0.1) -> Figure:
    """What a branch at each step really changes: latents, images and rewards of its samples.

    Lines are means over prompts, bands one standard error; the dashed line (gid "yardstick") is
    the spread that random noise on the final image gives.

    Args:
        profile: ``entropy_profile.parquet``.
        stem: output path without ending.
        noise_fraction: share of noise of the yardstick, for its label (``profile`` settings).

    Raises:
        UserError: if the file is missing or damaged, or holds no measured spread.
    """
    table = columns(profile, ENTROPY_PROFILE)
    measured = np.isfinite(table["spread"])
    present = set(table["quantity"][measured])
    names = [q for q in SPREAD_UNITS if q in present] + sorted(present - set(SPREAD_UNITS))
    if not names:
        raise UserError(f"{profile}: holds no measured spread; delete it and run the profile again")
    with rc_context(STYLE):
        across = min(3, len(names))
        down = -(-len(names) // across)
        figure = Figure(figsize=(3.5 * across + 0.4, 3.1 * down + 0.9))
        grid = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
        spans = by_span(table["span"])
        yardstick = f"{noise_fraction:.0%} noise on the final image"
        for axes, name in zip(grid, names, strict=False):
            part = {k: v[table["quantity"] == name] for k, v in table.items()}
            _draw_spread(axes, part, name, spans, yardstick)
        for axes in grid[len(names) :]:
            axes.remove()
        for axes in grid[max(0, len(names) - across) : len(names)]:
            axes.set_xlabel("branching step (grid index)")
            axes.tick_params(labelbottom=True)
        shared_legend(figure, 2 * across)
        figure.suptitle(
            "Spread among samples that branch at one step (mean over prompts ± 1 standard error)"
        )
        return save_figure(figure, stem)


def _draw_spread(
    axes: Axes,
    part: Mapping[str, npt.NDArray[Any]],
    name: str,
    spans: Sequence[tuple[int, dict[str, Any]]],
    noise: str,
) -> None:
    """One panel: ``part`` holds the rows of quantity ``name``; ``noise`` labels the yardstick."""
    reward = name.removeprefix("reward:")
    title, unit = SPREAD_UNITS.get(name, (f"Reward: {reward}", f"std of {reward} in the group"))
    measured = np.isfinite(part["spread"])
    for span, series in spans:
        here = part["span"] == span
        steps = np.unique(part["step"][here])
        groups = [part["spread"][here & measured & (part["step"] == s)] for s in steps]
        means = np.array([g.mean() if len(g) else np.nan for g in groups])
        errors = np.array([g.std(ddof=1) / len(g) ** 0.5 if len(g) > 1 else 0.0 for g in groups])
        axes.plot(steps, means, ms=4.5, **series)
        band = {"color": series["color"], "alpha": 0.18, "lw": 0}
        axes.fill_between(steps, means - errors, means + errors, **band)
    yardstick = part["yardstick"][
        np.isfinite(part["yardstick"])
    ]  # the same on all rows of a prompt
    if len(yardstick):
        axes.axhline(yardstick.mean(), color=INK, ls="--", lw=1.4, gid="yardstick", label=noise)
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
