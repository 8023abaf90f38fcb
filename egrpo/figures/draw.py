"""Figures of a study, from the results that its layout names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from egrpo.config.models import RunConfig
from egrpo.config.study import FigureSpec
from egrpo.core.spread import choose_threshold
from egrpo.errors import UserError
from egrpo.figures.branches import branches_figure
from egrpo.figures.curves import arm_curves_figure, curves_figure
from egrpo.figures.image_grid import images_figure
from egrpo.figures.profile import entropy_figure, spread_figure, threshold_figure
from egrpo.planning.plan import load_plan, measured_spread
from egrpo.planning.trees import needs_plan
from egrpo.study.layout import Layout


def draw(at: Layout) -> None:
    """Write curves, before_after and, where a run has a plan, entropy and spread.

    A study with several profiles or bases (several models or schedules) shows the first of each.
    """
    runs = at.study.runs
    curves_figure(_metrics(at, runs), _trained(runs.values()), at.figures / "curves")
    first, *_ = runs.values()
    base = at.base(first.run)
    same_base = [(run, at.run(run) / "images.parquet") for run in runs if at.base(run) == base]
    shown = base / "images.parquet", same_base, first.evaluate.grid_prompts
    images_figure(*shown, at.figures / "before_after", page=False)
    if planned := [run for run in runs if needs_plan(runs[run])]:
        profile = at.profile(planned[0])
        plans = {run: at.run(run) / "plan.json" for run in planned if at.profile(run) == profile}
        entropy_figure(profile, plans, at.figures / "entropy")
        fraction = runs[planned[0]].profile.noise_fraction
        spread_figure(profile, at.figures / "spread", noise_fraction=fraction)


def _metrics(at: Layout, runs: Iterable[str]) -> list[Path]:
    return [at.run(run) / "metrics.parquet" for run in runs]


def _trained(runs: Iterable[RunConfig]) -> list[str]:
    """Rewards that the runs are trained on, each once."""
    return list(dict.fromkeys(name for run in runs for name in run.train.rewards))


# -- the figures of a study, by kind; `run` is the first seed of the first arm --------------------


def _branches(spec: FigureSpec, run: RunConfig, at: Layout, stem: Path) -> None:
    profile = at.profile(run.run)
    files, shown = (profile.with_name("branches.parquet"), profile), (spec.pairs, spec.prompts)
    fraction, rewards = run.profile.noise_fraction, spec.rewards or None
    branches_figure(*files, *shown, stem, fraction, rewards=rewards)


def _entropy(spec: FigureSpec, run: RunConfig, at: Layout, stem: Path) -> None:
    plans = {arm: at.run(at.arm(arm)[0]) / "plan.json" for arm in spec.arms}
    entropy_figure(at.profile(run.run), plans, stem, spans=spec.spans)


def _spread(spec: FigureSpec, run: RunConfig, at: Layout, stem: Path) -> None:
    spread_figure(at.profile(run.run), stem, noise_fraction=run.profile.noise_fraction)


def _threshold(spec: FigureSpec, run: RunConfig, at: Layout, stem: Path) -> None:
    automatic, rewards = run.method.automatic, run.train.rewards
    assert automatic is not None, "check_figure refuses others"
    spreads = measured_spread(at.profile(run.run), rewards)
    try:
        choice = choose_threshold(spreads, *automatic)
    except ValueError as error:
        raise UserError(f"run {run.run}: {error}") from None
    plan = load_plan(at.run(run.run) / "plan.json")
    threshold_figure(spreads, choice, plan, automatic.factor, ", ".join(rewards), stem)


def _curves(spec: FigureSpec, run: RunConfig, at: Layout, stem: Path) -> None:
    groups = {arm: _metrics(at, at.arm(arm)) for arm in spec.arms}
    runs = (at.study.runs[run] for arm in spec.arms for run in at.arm(arm))
    arm_curves_figure(groups, spec.rewards or _trained(runs), stem)


def _images(spec: FigureSpec, run: RunConfig, at: Layout, stem: Path) -> None:
    columns = [(arm, at.run(at.arm(arm)[0]) / "images.parquet") for arm in spec.arms]
    images_figure(at.base(run.run) / "images.parquet", columns, spec.prompts, stem)


KINDS: dict[str, Callable[[FigureSpec, RunConfig, Layout, Path], None]] = {
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

    Raises UserError if an input is missing or damaged, or the arms cannot be shown so.
    """
    first = at.study.runs[at.arm(spec.arms[0])[0]]
    KINDS[spec.kind](spec, first, at, at.figure(name).with_suffix(""))
