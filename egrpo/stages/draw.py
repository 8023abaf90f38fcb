"""All figures of a study, from the results that its layout names."""

from __future__ import annotations

from egrpo.config.layout import Layout
from egrpo.config.trees import needs_plan
from egrpo.stages.figures import curves_figure, entropy_figure, spread_figure
from egrpo.stages.image_grid import before_after


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
