"""Figures of a study: entropy, measured spread, reward curves.

Each function reads Parquet or JSON, writes ``<stem>.png`` (and ``<stem>.svg``) and returns the
figure. Artists that carry a finding have a ``gid`` ("threshold", "yardstick", …), which is also
their id in the SVG. Null and NaN values are left out.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from egrpo.core.entropy import step_entropy
from egrpo.core.plan import Plan
from egrpo.errors import UserError
from egrpo.stages.plan import load_plan
from egrpo.store.files import replacing
from egrpo.store.tables import ENTROPY_PROFILE, TRAIN_METRICS, Table, read_table

Real = npt.NDArray[np.float64]
Curve = tuple[str, str, npt.NDArray[Any], npt.NDArray[Any], Real]
"""(run, "training" or "monitor", iterations, network evaluations, values)."""

# Okabe and Ito, "Color Universal Design" (2008); yellow is left out, too pale for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
INK = "#444444"
MARKERS = "osDhp8H"
DASHES = ("--", ":", "-.", (0, (1, 3)))
DPI = 150
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "legend.fontsize": 9,
    "figure.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "egrpo",
}

ENTROPY_UNITS = {
    "exp_per_dim": r"entropy $e^{h/d}$ (latent units)",
    "nats_per_dim": "entropy $h/d$ (nats per dimension)",
    "variance": r"variance $(\mathrm{std}/a)^2$",
}
SPREAD_UNITS = {
    "latent_variance": ("Final latents", "variance per dimension\n(latent units²)"),
    "image_distance": ("Images", "mean pairwise RMS distance\n(pixels in [0, 1])"),
}


def entropy_figure(
    profile: str | Path, plans: Mapping[str, str | Path], stem: str | Path
) -> Figure:
    """Fig. 1b of the paper: closed-form entropy of each step and span, and the plans' choices.

    Args:
        profile: ``entropy_profile.parquet``.
        plans: ``plan.json`` by run id, for this profile's schedule; each adds its threshold
            (gid "threshold") and a marker with the span of each active step (gid "plan:<run>",
            the first run where several share one plan).
        stem: output path without ending.

    Raises:
        UserError: if a file is missing or damaged, or the plans measure entropy in several units.
    """
    table = _columns(profile, ENTROPY_PROFILE)
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
        for colour, span in _coloured(np.unique(table["span"])):
            at = table["span"] == span
            steps, first = np.unique(table["step"][at], return_index=True)
            label = "1 step" if span == 1 else f"{span} steps merged"
            axes.plot(steps, table[measure][at][first], "-o", ms=3, color=colour, label=label)
        _draw_plans(axes, read)
        thresholds = {p.threshold for p in read.values() if p.threshold}  # 0 and None: no line
        for threshold, dashes in zip(sorted(thresholds), cycle(DASHES)):
            axes.axhline(
                threshold,
                color=INK,
                lw=1.4,
                ls=dashes,
                gid="threshold",
                zorder=1.5,
                label=rf"threshold $\tau$ = {threshold:g}",
            )
        axes.set(xlabel="denoising step (grid index)", ylabel=ENTROPY_UNITS[measure])
        if measure != "nats_per_dim":
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("Entropy of an SDE step, by start and number of merged steps", loc="left")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
        return save_figure(figure, stem)


def _draw_plans(axes: Axes, plans: Mapping[str, Plan]) -> None:
    """A marker with its span for each active step; runs that share a plan share markers."""
    runs: dict[Plan, list[str]] = {}
    for run, plan in plans.items():
        runs.setdefault(plan, []).append(run)
    for k, (plan, names) in enumerate(runs.items()):
        chosen = list(zip(plan.active, plan.spans, strict=True))
        entropy = [
            step_entropy(
                plan.sigmas,
                i,
                span,
                noise_level=plan.noise_level,
                dynamics=plan.dynamics,
                measure=plan.measure,
            )
            for i, span in chosen
        ]
        aside = 0.26 * (k - (len(runs) - 1) / 2)  # plans often agree: side by side, not stacked
        label = f"plan: {textwrap.fill(', '.join(names), 24)}\n(number: steps merged)"
        axes.plot(
            np.array(plan.active) + aside,
            entropy,
            MARKERS[k % len(MARKERS)],
            ls="none",
            ms=12,
            mfc="white",
            mec="black",
            zorder=4,
            gid=f"plan:{names[0]}",
            label=label,
        )
        for (step, span), value in zip(chosen, entropy, strict=True):
            axes.text(
                step + aside,
                value,
                str(span),
                ha="center",
                va="center_baseline",
                fontsize=8.5,
                zorder=5,
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
    table = _columns(profile, ENTROPY_PROFILE)
    measured = np.isfinite(table["spread"])
    present = set(table["quantity"][measured])
    names = [q for q in SPREAD_UNITS if q in present] + sorted(present - set(SPREAD_UNITS))
    if not names:
        raise UserError(f"{profile}: holds no measured spread; delete it and run the profile again")
    with rc_context(STYLE):
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure = Figure(figsize=(3.5 * columns + 0.4, 3.1 * rows + 0.9))
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        colours = list(_coloured(np.unique(table["span"])))
        yardstick = f"{noise_fraction:.0%} noise on the final image"
        for axes, name in zip(grid, names, strict=False):
            part = {k: v[table["quantity"] == name] for k, v in table.items()}
            _draw_spread(axes, part, name, colours, yardstick)
        for axes in grid[len(names) :]:
            axes.remove()
        for axes in grid[max(0, len(names) - columns) : len(names)]:
            axes.set_xlabel("branching step (grid index)")
            axes.tick_params(labelbottom=True)
        shown: dict[str, Any] = {}
        for axes in figure.axes:  # a panel may lack the yardstick
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                shown.setdefault(label, handle)
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2 * columns)
        figure.suptitle(
            "Spread among samples that branch at one step (mean over prompts ± 1 standard error)"
        )
        return save_figure(figure, stem)


def _draw_spread(
    axes: Axes,
    part: Mapping[str, npt.NDArray[Any]],
    name: str,
    spans: Iterable[tuple[str, int]],
    noise: str,
) -> None:
    """One panel: ``part`` holds the rows of quantity ``name``; ``noise`` labels the yardstick."""
    reward = name.removeprefix("reward:")
    title, unit = SPREAD_UNITS.get(name, (f"Reward: {reward}", f"std of {reward} in the group"))
    for colour, span in spans:
        here = part["span"] == span
        steps = np.unique(part["step"][here])
        groups = [_finite(part["spread"][here & (part["step"] == s)]) for s in steps]
        means = np.array([g.mean() if len(g) else np.nan for g in groups])
        errors = np.array([g.std(ddof=1) / len(g) ** 0.5 if len(g) > 1 else 0.0 for g in groups])
        label = "1 step" if span == 1 else f"{span} steps merged"
        axes.plot(steps, means, "-o", ms=3.5, color=colour, label=label)
        axes.fill_between(steps, means - errors, means + errors, color=colour, alpha=0.18, lw=0)
    yardstick = _finite(part["yardstick"])  # the same on all rows of a prompt
    if len(yardstick):
        axes.axhline(yardstick.mean(), color=INK, ls="--", lw=1.4, gid="yardstick", label=noise)
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def curves_figure(
    metrics: Sequence[str | Path], rewards: Sequence[str], stem: str | Path, *, window: int = 10
) -> Figure:
    """Reward against iterations and against network evaluations, one row of panels a reward.

    Thin lines: mean of the training samples, trailing mean of up to ``window`` iterations (gid
    "training:<run>"). Markers: mean on fixed held-out prompts (gid "monitor:<run>").

    Args:
        metrics: ``train_metrics.parquet`` of each run.
        rewards: names of the rewards to draw, as in the metrics ``reward/<name>``.
        stem: output path without ending.
        window: iterations of the trailing mean, at least 1.

    Raises:
        UserError: if a file is missing or damaged, or no run has any of the rewards.
    """
    tables = [_columns(path, TRAIN_METRICS) for path in metrics]
    curves = {r: [c for table in tables for c in _curves(table, r)] for r in rewards}
    if not any(curves.values()):
        raise UserError(
            f"curves: no run has the metric reward/<name> of {', '.join(rewards) or 'any reward'}"
        )
    runs = list(dict.fromkeys(run for found in curves.values() for run, *_ in found))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 3.4 * len(rewards) + 0.9))
        grid = figure.subplots(len(rewards), 2, squeeze=False, sharey="row", sharex="col")
        for (left, right), reward in zip(grid, rewards, strict=True):
            for run, kind, iteration, nfe, value in curves[reward]:
                at = runs.index(run)
                look: dict[str, Any] = {"color": PALETTE[at % len(PALETTE)], "gid": f"{kind}:{run}"}
                if kind == "training":
                    value = trailing_mean(value, window)
                    look |= {"lw": 0.9, "alpha": 0.5, "zorder": 2}
                else:
                    mark = MARKERS[at % len(MARKERS)]
                    look |= {"marker": mark, "ms": 5.5, "mec": "white", "zorder": 3}
                left.plot(iteration, value, **look)
                right.plot(nfe, value, **look)
            left.set_ylabel(f"reward: {reward}")
        grid[-1][0].set_xlabel("training iterations")
        grid[-1][1].set_xlabel("network evaluations (forward, forward-backward, reference)")
        grid[-1][0].xaxis.set_major_locator(MaxNLocator(integer=True))
        grid[-1][1].xaxis.set_major_formatter(EngFormatter(sep=""))
        grid[0][0].set_title("at equal iterations", loc="left")
        grid[0][1].set_title("at equal network evaluations", loc="left")
        shown = [
            Line2D(
                [], [], color=PALETTE[i % len(PALETTE)], marker=MARKERS[i % len(MARKERS)], label=run
            )
            for i, run in enumerate(runs)
        ]
        figure.legend(handles=shown, loc="outside lower center", ncols=min(5, len(shown)))
        figure.suptitle(
            "Reward during training (markers: fixed held-out prompts; thin lines: "
            f"training samples, mean of last {window} iterations)",
            fontsize=11,
        )
        return save_figure(figure, stem)


def _curves(table: Mapping[str, npt.NDArray[Any]], reward: str) -> list[Curve]:
    """Training and monitor curve of each run in a table, by iteration; finite values only."""
    out: list[Curve] = []
    for run in dict.fromkeys(table["run"]):
        for kind, metric in (
            ("training", f"reward/{reward}"),
            ("monitor", f"monitor/reward/{reward}"),
        ):
            at = (table["run"] == run) & (table["metric"] == metric) & np.isfinite(table["value"])
            order = np.argsort(table["iteration"][at], kind="stable")
            if len(order):
                x, nfe, y = (table[name][at][order] for name in ("iteration", "nfe", "value"))
                out.append((run, kind, x, nfe, y))
    return out


def trailing_mean(values: Real, window: int) -> Real:
    """Mean of each value and up to ``window`` - 1 before it, [n]; fewer at the start.

    Raises:
        ValueError: if ``window`` is less than 1.
    """
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(stop - window, 0)
    return np.asarray((sums[stop] - sums[start]) / (stop - start))


def _coloured(values: Iterable[Any]) -> Iterable[tuple[str, int]]:
    return ((PALETTE[i % len(PALETTE)], int(value)) for i, value in enumerate(values))


def _finite(values: Real) -> Real:
    return values[np.isfinite(values)]


def _columns(path: str | Path, table: Table) -> dict[str, npt.NDArray[Any]]:
    """Columns as arrays; null numbers become NaN."""
    data = read_table(path, table)
    return {name: data[name].to_numpy() for name in data.column_names}


def save_figure(
    figure: Figure, stem: str | Path, endings: Sequence[str] = ("png", "svg")
) -> Figure:
    """Write ``<stem>.<ending>`` atomically; the same data gives the same bytes."""
    for ending in endings:
        metadata = {"Date": None} if ending == "svg" else None
        with replacing(f"{stem}.{ending}") as temporary:
            figure.savefig(temporary, format=ending, dpi=DPI, metadata=metadata)
    return figure
