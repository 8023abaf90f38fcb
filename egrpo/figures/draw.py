"""Figures of a study, from the results that its layout names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from egrpo.config.models import FigureSpec
from egrpo.core.spread import choose_threshold
from egrpo.errors import UserError
from egrpo.figures.branches import branches_figure
from egrpo.figures.curves import arm_curves_figure, curves_figure
from egrpo.figures.image_grid import before_after, images_figure
from egrpo.figures.profile import entropy_figure, spread_figure
from egrpo.figures.threshold import threshold_figure
from egrpo.methods.settings import Merging
from egrpo.planning.plan import load_plan, measured_spread
from egrpo.planning.trees import needs_plan
from egrpo.study.layout import Layout


def draw(at: Layout) -> None:
    """Write curves, before_after and, where a run has a plan, entropy and spread.

    A study with several profiles or bases (several models or schedules) shows the first of each.
    """
    runs = at.study.runs
    first = next(iter(runs))
    metrics = [at.run(run) / "train_metrics.parquet" for run in runs]
    rewards = list(dict.fromkeys(name for run in runs.values() for name in run.train.rewards))
    curves_figure(metrics, rewards, at.figures / "curves")
    same_base = [run for run in runs if at.base(run) == at.base(first)]
    images = [(run, at.run(run) / "images.parquet") for run in same_base]
    before_after(
        at.base(first) / "images.parquet",
        images,
        runs[first].evaluate.grid_prompts,
        at.figures / "before_after",
    )
    planned = [run for run in runs if needs_plan(runs[run])]
    if planned:
        profile = at.profile(planned[0])
        plans = {run: at.run(run) / "plan.json" for run in planned if at.profile(run) == profile}
        entropy_figure(profile, plans, at.figures / "entropy")
        fraction = runs[planned[0]].profile.noise_fraction
        spread_figure(profile, at.figures / "spread", noise_fraction=fraction)


# -- the figures of a study, by kind -----------------------------------------------------------


def _branches(spec: FigureSpec, at: Layout, stem: Path) -> None:
    run = at.study.runs[at.arm(spec.arms[0])[0]]
    branches_figure(
        at.branches(run.run),
        at.profile(run.run),
        spec.pairs,
        spec.prompts,
        stem,
        run.profile.noise_fraction,
        rewards=spec.rewards or None,
    )


def _entropy(spec: FigureSpec, at: Layout, stem: Path) -> None:
    firsts = {arm: at.arm(arm)[0] for arm in spec.arms}
    profile = at.profile(next(iter(firsts.values())))
    plans = {arm: at.run(run) / "plan.json" for arm, run in firsts.items()}
    entropy_figure(profile, plans, stem, spans=spec.spans)


def _spread(spec: FigureSpec, at: Layout, stem: Path) -> None:
    run = at.study.runs[at.arm(spec.arms[0])[0]]
    spread_figure(at.profile(run.run), stem, noise_fraction=run.profile.noise_fraction)


def _threshold(spec: FigureSpec, at: Layout, stem: Path) -> None:
    run = at.study.runs[at.arm(spec.arms[0])[0]]
    method = run.method
    if not isinstance(method, Merging) or method.threshold != "auto":
        raise UserError(f"run {run.run}: method.threshold: its figure needs auto")
    spreads = measured_spread(at.profile(run.run), run.train.rewards)
    try:
        choice = choose_threshold(spreads, method.measure, method.spread_factor)
    except ValueError as error:
        raise UserError(f"run {run.run}: {error}") from None
    threshold_figure(
        spreads,
        choice,
        load_plan(at.run(run.run) / "plan.json"),
        method.spread_factor,
        ", ".join(run.train.rewards),
        stem,
    )


def _curves(spec: FigureSpec, at: Layout, stem: Path) -> None:
    groups = {
        arm: [at.run(run) / "train_metrics.parquet" for run in at.arm(arm)] for arm in spec.arms
    }
    runs = (at.study.runs[run] for arm in spec.arms for run in at.arm(arm))
    trained = dict.fromkeys(name for run in runs for name in run.train.rewards)
    arm_curves_figure(groups, spec.rewards or list(trained), stem)


def _images(spec: FigureSpec, at: Layout, stem: Path) -> None:
    firsts = [(arm, at.arm(arm)[0]) for arm in spec.arms]
    columns = [(arm, at.run(run) / "images.parquet") for arm, run in firsts]
    images_figure(at.base(firsts[0][1]) / "images.parquet", columns, spec.prompts, stem)


KINDS: dict[str, Callable[[FigureSpec, Layout, Path], None]] = {
    "branches": _branches,
    "entropy": _entropy,
    "spread": _spread,
    "threshold": _threshold,
    "curves": _curves,
    "images": _images,
}
"""How each kind of figure finds what it draws; of several seeds images show the first."""


def draw_figure(name: str, spec: FigureSpec, at: Layout) -> None:
    """Write one figure of a study as PNG and SVG.

    Raises:
        UserError: if an input is missing or damaged, or the arms cannot be shown so.
    """
    KINDS[spec.kind](spec, at, at.figure(name).with_suffix(""))
