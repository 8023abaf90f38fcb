"""Figures of a study, from the results that its layout names."""

from __future__ import annotations

from collections.abc import Iterable
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


def draw_figure(name: str, spec: FigureSpec, at: Layout) -> None:
    """Write one figure of a study as PNG and SVG.

    Of several seeds images and plans are the first's; profile and base those of the first arm.
    Raises UserError if an input is missing or damaged, or the arms cannot be shown so.
    """
    stem = at.figure(name).with_suffix("")
    firsts = {arm: at.arm(arm)[0] for arm in spec.arms}
    run = at.study.runs[firsts[spec.arms[0]]]
    if spec.kind == "curves":
        groups = {arm: _metrics(at, at.arm(arm)) for arm in spec.arms}
        runs = (at.study.runs[run] for arm in spec.arms for run in at.arm(arm))
        arm_curves_figure(groups, spec.rewards or _trained(runs), stem)
        return
    if spec.kind == "images":
        columns = [(arm, at.run(firsts[arm]) / "images.parquet") for arm in spec.arms]
        images_figure(at.base(run.run) / "images.parquet", columns, spec.prompts, stem)
        return
    profile, fraction = at.profile(run.run), run.profile.noise_fraction
    if spec.kind == "branches":
        files, shown = (profile.with_name("branches.parquet"), profile), (spec.pairs, spec.prompts)
        branches_figure(*files, *shown, stem, fraction, rewards=spec.rewards or None)
    elif spec.kind == "entropy":
        plans = {arm: at.run(first) / "plan.json" for arm, first in firsts.items()}
        entropy_figure(profile, plans, stem, spans=spec.spans)
    elif spec.kind == "spread":
        spread_figure(profile, stem, noise_fraction=fraction)
    else:
        _threshold(run, profile, at.run(run.run) / "plan.json", stem)


def _threshold(run: RunConfig, profile: Path, plan: Path, stem: Path) -> None:
    automatic, rewards = run.method.automatic, run.train.rewards
    assert automatic is not None, "check_figure refuses others"
    spreads = measured_spread(profile, rewards)
    try:
        choice = choose_threshold(spreads, *automatic)
    except ValueError as error:
        raise UserError(f"run {run.run}: {error}") from None
    reward_text = ", ".join(rewards)
    threshold_figure(spreads, choice, load_plan(plan), automatic.factor, reward_text, stem)
