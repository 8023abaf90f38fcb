"""How the automatic threshold was chosen, and the plan that it gives."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from egrpo.core.plan import Plan
from egrpo.core.spread import Choice, Spread
from egrpo.errors import UserError
from egrpo.figures.style import (
    ENTROPY,
    INK,
    PALETTE,
    STYLE,
    by_span,
    entropy_axis,
    numbered,
    save_figure,
    shared_legend,
)
from egrpo.planning.plan import plan_rows

TAU: dict[str, Any] = {"color": INK, "lw": 1.4, "ls": "--", "zorder": 1.5, "gid": "threshold"}


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

    Args:
        spreads: one point each (gid "span:<span>"), spread over the yardstick's; those that are
            not finite are left out.
        choice: what was chosen from them; gid "fit" and "threshold".
        plan: made with that threshold; gid "single", "merged" and, below the threshold, "capped".
        factor: the fit must exceed it; gid "factor".
        reward_text: whose spread it is, for title and axis.
        stem: output path without ending.

    Raises:
        UserError: if nothing was measured, or the plan was made with another threshold.
    """
    points = [s for s in spreads if math.isfinite(s.value)]
    if not points:
        raise UserError("threshold figure: the profile holds no measured spread")
    if plan.threshold != choice.threshold:
        raise UserError(
            f"threshold figure: the plan's threshold is {plan.threshold}, the chosen one "
            f"{choice.threshold:g}; make the plan again"
        )
    lacking = [s for s in points if plan.measure not in s.entropy]
    if lacking:
        raise UserError(f"threshold figure: no entropy in {plan.measure}, the plan's measure")
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.5))
        left, right = figure.subplots(1, 2)
        _draw_choice(left, points, choice, plan.measure, factor)
        _draw_plan(right, plan, choice.threshold)
        shared_legend(figure, 4)
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
    axes.axvline(choice.threshold, **TAU)
    axes.annotate(
        f"τ = {choice.threshold:g}",
        (choice.threshold, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
    )
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
    reached = merged >= threshold
    looks: list[tuple[Any, dict[str, Any]]] = [
        (reached, {"marker": "o", "gid": "merged", "label": "in the plan (number: steps merged)"}),
        (~reached, {"marker": "s", "gid": "capped", "label": "τ out of reach: longest span"}),
    ]
    for (at, look), edge in zip(looks, ("black", PALETTE[1]), strict=True):
        if at.any():
            numbered(axes, steps[at], merged[at], spans[at], ms=12.5, mew=1.3, mec=edge, **look)
    axes.axhline(threshold, label="threshold τ", **TAU)
    axes.margins(x=0.08, y=0.12)
    entropy_axis(axes, plan.measure, "active step")
    axes.set_title("The plan: each step alone and merged", loc="left")
