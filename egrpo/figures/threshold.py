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
from matplotlib.ticker import MaxNLocator

from egrpo.core.entropy import step_entropy
from egrpo.core.plan import Plan
from egrpo.core.spread import Choice, Spread
from egrpo.errors import UserError
from egrpo.figures.style import (
    ENTROPY_UNITS,
    INK,
    PALETTE,
    STYLE,
    by_span,
    look,
    save_figure,
    span_label,
)

MEASURES = {
    "exp_per_dim": "$e^{h/d}$",
    "nats_per_dim": "$h/d$",
    "variance": r"$(\mathrm{std}/a)^2$",
}
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
        shown: dict[str, Any] = {}
        for axes in (left, right):  # both draw single steps: said once
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                shown.setdefault(label, handle)
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4)
        value = f"τ = {choice.threshold:g} in {MEASURES[plan.measure]}"
        title = f"Automatic threshold from the spread of {reward_text}"
        figure.suptitle(f"{textwrap.fill(title, 80, break_on_hyphens=False)}: {value}")
        return save_figure(figure, stem)


def _draw_choice(
    axes: Axes, points: Sequence[Spread], choice: Choice, measure: str, factor: float
) -> None:
    """Points by span, the fit as steps, the factor across and the threshold down."""
    for span, series in by_span(s.span for s in points):
        at = [(s.entropy[measure], s.value) for s in points if s.span == span]
        x, y = zip(*at, strict=True)
        label = span_label(span)
        axes.plot(x, y, ls="none", ms=5.5, label=label, gid=f"span:{span}", alpha=0.85, **series)
    axes.plot(
        choice.entropy,
        choice.fitted,
        drawstyle="steps-post",  # from an entropy on, the fit holds until the next
        color="black",
        lw=1.6,
        gid="fit",
        label="monotone fit of all",
    )
    axes.axhline(
        factor,
        color=PALETTE[1],
        lw=1.4,
        ls=":",
        gid="factor",
        label=f"wanted: {factor:g} times the yardstick",
    )
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
    axes.set(xlabel=ENTROPY_UNITS[measure], ylabel="reward std in the group / the yardstick's")
    top = max(factor, *(s.value for s in points))
    axes.set_ylim(0.0, 1.16 * top)  # room for the text of the threshold
    axes.set_title("Spread of each measured branch", loc="left")


def _draw_plan(axes: Axes, plan: Plan, threshold: float) -> None:
    """Each active step from its own entropy to the merged one, which holds its span."""

    def entropy(step: int, span: int) -> float:
        return step_entropy(
            plan.sigmas,
            step,
            span,
            noise_level=plan.noise_level,
            dynamics=plan.dynamics,
            measure=plan.measure,
        )

    steps = np.array(plan.active)
    single = np.array([entropy(step, 1) for step in plan.active])
    merged = np.array([entropy(i, n) for i, n in zip(plan.active, plan.spans, strict=True)])
    reached = merged >= threshold
    axes.vlines(steps, single, merged, color="#BBBBBB", lw=1.4)
    axes.plot(steps, single, ls="none", ms=5.5, gid="single", label=span_label(1), **look(0))
    numbered: dict[str, Any] = {"ls": "none", "ms": 13, "mfc": "white", "mew": 1.3, "zorder": 4}
    axes.plot(
        steps[reached],
        merged[reached],
        marker="o",
        mec="black",
        gid="merged",
        label="in the plan (number: steps merged)",
        **numbered,
    )
    if not reached.all():
        axes.plot(
            steps[~reached],
            merged[~reached],
            marker="s",
            mec=PALETTE[1],
            gid="capped",
            label="τ out of reach: longest span",
            **numbered,
        )
    for step, value, span in zip(steps, merged, plan.spans, strict=True):
        axes.text(step, value, str(span), ha="center", va="center_baseline", fontsize=9, zorder=5)
    axes.axhline(threshold, label="threshold τ", **TAU)
    axes.set(xlabel="active step (grid index)", ylabel=ENTROPY_UNITS[plan.measure])
    axes.margins(x=0.08, y=0.12)
    if plan.measure != "nats_per_dim":
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("The plan: each step alone and merged", loc="left")
