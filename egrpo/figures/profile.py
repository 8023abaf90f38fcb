"""Figures of an entropy profile: the closed form and the plans made from it, the measured spread,
and how the automatic threshold was chosen from it.

Each function writes ``<stem>.png`` and ``<stem>.svg`` and returns the figure. Null and NaN values
are left out.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from egrpo.core.plan import Plan
from egrpo.core.spread import Choice, Spread
from egrpo.errors import UserError
from egrpo.figures import style
from egrpo.figures.style import ENTROPY, INK, PALETTE, STYLE, Array, by_span, numbered, save_figure
from egrpo.planning.plan import load_plan, plan_rows
from egrpo.store.tables import ENTROPY_PROFILE

PLAN_MARKERS = "osDhp8H"
"""Wide enough for a number inside."""
DASHES = ("--", ":", "-.", (0, (1, 3)))
TAU: dict[str, Any] = {"color": INK, "lw": 1.4, "zorder": 1.5, "gid": "threshold"}
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

    Each plan (``plan.json`` by run id, for this profile's schedule) adds its threshold (gid
    "threshold") and a marker with the span of each active step (gid "plan:<run>", the first run
    where several share one plan). Without ``spans`` all of the profile are drawn. Raises UserError
    if a file is missing or damaged, or the plans measure entropy in several units.
    """
    table = style.columns(profile, ENTROPY_PROFILE)
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
        for span, series in by_span(table["span"]):
            if spans is None or span in spans:
                at = table["span"] == span
                steps, first = np.unique(table["step"][at], return_index=True)
                axes.plot(steps, table[measure][at][first], ms=4, **series)
        _draw_plans(axes, read)
        thresholds = {p.threshold for p in read.values() if p.threshold}  # 0 and None: no line
        for threshold, dashes in zip(sorted(thresholds), cycle(DASHES)):
            label = rf"threshold $\tau$ = {threshold:g}"
            axes.axhline(threshold, ls=dashes, label=label, **TAU)
        style.entropy_axis(axes, measure, "denoising step")
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


# --- the measured spread --------------------------------------------------------------------------


def spread_figure(profile: str | Path, stem: str | Path, *, noise_fraction: float = 0.1) -> Figure:
    """What a branch at each step really changes: latents, images and rewards of its samples.

    Lines are means over prompts, bands one standard error; the dashed line (gid "yardstick") is the
    spread that ``noise_fraction`` of random noise on the final image gives. Raises UserError if the
    file is missing or damaged, or holds no measured spread.
    """
    table = style.columns(profile, ENTROPY_PROFILE)
    present = set(table["quantity"][np.isfinite(table["spread"])])
    names = [q for q in SPREAD_UNITS if q in present] + sorted(present - set(SPREAD_UNITS))
    if not names:
        raise UserError(f"{profile}: holds no measured spread; delete it and run the profile again")
    with rc_context(STYLE):
        across = min(3, len(names))
        down = -(-len(names) // across)
        figure = Figure(figsize=(3.5 * across + 0.4, 3.1 * down + 0.9))
        grid = figure.subplots(down, across, squeeze=False, sharex=True).ravel()
        yardstick = f"{noise_fraction:.0%} noise on the final image"
        for axes, name in zip(grid, names, strict=False):
            part = {k: v[table["quantity"] == name] for k, v in table.items()}
            _draw_spread(axes, part, name, by_span(table["span"]), yardstick)
        for axes in grid[len(names) :]:
            axes.remove()
        for axes in grid[max(0, len(names) - across) : len(names)]:
            axes.set_xlabel("branching step (grid index)")
            axes.tick_params(labelbottom=True)
        style.shared_legend(figure, 2 * across)
        figure.suptitle(
            "Spread among samples that branch at one step (mean over prompts ± 1 standard error)"
        )
        return save_figure(figure, stem)


def _draw_spread(
    axes: Axes,
    part: Mapping[str, Array],
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
    yardstick = part["yardstick"][np.isfinite(part["yardstick"])]
    if len(yardstick):  # the same on all rows of a prompt
        axes.axhline(yardstick.mean(), color=INK, ls="--", lw=1.4, gid="yardstick", label=noise)
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


# --- the automatic threshold ----------------------------------------------------------------------


def threshold_figure(
    spreads: Sequence[Spread],
    choice: Choice,
    plan: Plan,
    factor: float,
    reward_text: str,
    stem: str | Path,
) -> Figure:
    """Left: measured spread by entropy, its monotone fit, and the threshold read from it. Right:
    the plan of that threshold, each active step's entropy alone and merged.

    Points (gid "span:<span>") are over the yardstick's spread, of the rewards in ``reward_text``;
    the fit (gid "fit") must exceed ``factor`` (gid "factor"). The plan's markers have the gid
    "single", "merged" and, below the threshold (gid "threshold"), "capped". Raises UserError if the
    plan was made with another threshold.
    """
    points = [s for s in spreads if math.isfinite(s.value)]
    if plan.threshold != choice.threshold:
        raise UserError(
            f"threshold figure: the plan's threshold is {plan.threshold}, the chosen one "
            f"{choice.threshold:g}; make the plan again"
        )
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.5))
        left, right = figure.subplots(1, 2)
        _draw_choice(left, points, choice, plan.measure, factor)
        _draw_plan(right, plan, choice.threshold)
        style.shared_legend(figure, 4)
        value = f"τ = {choice.threshold:g} in {ENTROPY[plan.measure][0]}"
        title = f"Automatic threshold from the spread of {reward_text}"
        figure.suptitle(f"{textwrap.fill(title, 80, break_on_hyphens=False)}: {value}")
        return save_figure(figure, stem)


def _draw_choice(
    axes: Axes, points: Sequence[Spread], choice: Choice, measure: str, factor: float
) -> None:
    """Points by span, the fit as steps, the factor across and the threshold down."""
    for span, series in by_span(s.span for s in points):
        x, y = zip(*((s.entropy[measure], s.value) for s in points if s.span == span), strict=True)
        axes.plot(x, y, ls="none", ms=5.5, gid=f"span:{span}", alpha=0.85, **series)
    # from an entropy on, the fit holds until the next
    fit: dict[str, Any] = {"drawstyle": "steps-post", "color": "black", "lw": 1.6, "gid": "fit"}
    axes.plot(choice.entropy, choice.fitted, label="monotone fit of all", **fit)
    wanted = f"wanted: {factor:g} times the yardstick"
    axes.axhline(factor, color=PALETTE[1], lw=1.4, ls=":", gid="factor", label=wanted)
    axes.axvline(choice.threshold, ls="--", **TAU)
    place: dict[str, Any] = {
        "xycoords": ("data", "axes fraction"),
        "textcoords": "offset points",
        "va": "top",
    }
    axes.annotate(f"τ = {choice.threshold:g}", (choice.threshold, 1.0), (4, -2), **place)
    if measure == "variance":  # a square: single steps would all lie at the left edge
        axes.set_xscale("log")
    axes.set(xlabel=ENTROPY[measure][1], ylabel="reward std in the group / the yardstick's")
    top = max(factor, *(s.value for s in points))
    axes.set_ylim(0.0, 1.16 * top)  # room for the text of the threshold
    axes.set_title("Spread of each measured branch", loc="left")


def _draw_plan(axes: Axes, plan: Plan, threshold: float) -> None:
    """Each active step from its own entropy to the merged one, which holds its span."""
    rows = plan_rows("", plan)
    steps, spans = np.array(plan.active), np.array(plan.spans)
    single = [row["single_step_entropy"] for row in rows]
    merged = np.array([row["entropy"] for row in rows])
    axes.vlines(steps, single, merged, color="#BBBBBB", lw=1.4)
    ((_, alone),) = by_span([1])
    axes.plot(steps, single, ls="none", ms=5.5, gid="single", **alone)
    reached = {"marker": "o", "gid": "merged", "label": "in the plan (number: steps merged)"}
    capped = {"marker": "s", "gid": "capped", "label": "τ out of reach: longest span"}
    for at, look, edge in (
        (merged >= threshold, reached, "black"),
        (merged < threshold, capped, PALETTE[1]),
    ):
        if at.any():
            numbered(axes, steps[at], merged[at], spans[at], ms=12.5, mew=1.3, mec=edge, **look)
    axes.axhline(threshold, ls="--", label="threshold τ", **TAU)
    axes.margins(x=0.08, y=0.12)
    style.entropy_axis(axes, plan.measure, "active step")
    axes.set_title("The plan: each step alone and merged", loc="left")
