"""Tables and figures of a study: which of them its runs can fill, known before anything runs."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping

from egrpo.config.keys import evaluation_key
from egrpo.config.models import RunConfig
from egrpo.config.study import FigureSpec, StudyConfig, TableSpec
from egrpo.errors import UserError
from egrpo.planning.trees import closed_form_plan, cost_of, reads_profile, tree_of

BASE = "base"
"""The untrained model, in the place of an arm."""

RESERVED = (
    *("base", "embed", "evaluate", "identity", "plan", "profile", "run", "state", "track", "train"),
    *("about", "all", "everything", "page", "paper", "plans", "publish", "settings"),
    *("comparison", "paper_runs", "all_runs", "before_after", "curves", "entropy", "spread"),
    *("evaluate_base", "figures", "prepare_store", "result_figure", "result_table", "run_config"),
    *("suffix_quality", "suffixes", "toy_world"),
)
"""Names of rules and files that a table or figure of a study must not take."""


def check_names(study: StudyConfig, runs: Mapping[str, RunConfig]) -> None:
    """Refuse seeds, default runs and names of targets that cannot be; UserError naming the key."""
    if study.seeds is not None and not 0 < len(study.seeds) == len(set(study.seeds)):
        raise UserError("seeds: distinct numbers of at least 0 are needed")
    _known("default_runs", "run", study.default_runs or (), runs)
    for name in sorted(set(study.tables) & set(study.figures)):
        raise UserError(f"figures.{name}: a table has that name")
    for name in (*study.tables, *study.figures):
        possible = re.fullmatch(r"[a-z][a-z0-9_]*", name) and not name.endswith("_runs")
        if not possible or name in RESERVED:
            raise UserError(
                f"tables, figures: {name!r} cannot be a target; use small letters, digits and _, "
                f"another end than _runs, and none of {', '.join(RESERVED)}"
            )


def _known(key: str, what: str, wanted: Iterable[str], there: Collection[str]) -> None:
    for name in (name for name in wanted if name not in there):
        near = difflib.get_close_matches(name, there, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{key}: no {what} {name!r}{hint}")


def possible_targets(
    study: StudyConfig, runs: Mapping[str, RunConfig]
) -> tuple[dict[str, TableSpec], dict[str, FigureSpec], dict[str, str]]:
    """Tables, with numbers in the place of ``cheapest``, and figures that the runs can fill.

    And what is wrong with the others and with ``paper``, by name: nobody may have asked for them.
    """
    arms = list(dict.fromkeys(run.arm for run in runs.values()))
    rewards = list(dict.fromkeys(name for run in runs.values() for name in run.rewards))
    tables: dict[str, TableSpec] = {}
    figures: dict[str, FigureSpec] = {}
    refused: dict[str, str] = {}
    costs = functools.cache(lambda arm: _cost(next(r for r in runs.values() if r.arm == arm)))
    targets: dict[str, TableSpec | FigureSpec] = {**study.tables, **study.figures}
    for name, spec in targets.items():
        key = f"{'tables' if name in study.tables else 'figures'}.{name}"
        try:
            of = "sections" if isinstance(spec, TableSpec) else "arms"
            _known(f"{key}.{of}", "arm", spec.arms, arms)
            _known(f"{key}.rewards", "reward", spec.rewards, rewards)
            if isinstance(spec, TableSpec):
                check_table(name, spec, runs)
                tables[name] = resolve_budget(name, spec, costs)
            else:
                check_figure(name, spec, runs)
                figures[name] = spec
        except UserError as error:
            refused[name] = str(error)
    every = (*study.tables, *study.figures)
    if not (every if study.paper is None else study.paper):
        refused["paper"] = "paper: the study names no tables and figures to make"
    try:
        _known("paper", "table or figure", study.paper or (), every)
    except UserError as error:
        refused["paper"] = str(error)
    return tables, figures, refused


def check_table(name: str, spec: TableSpec, runs: Mapping[str, RunConfig]) -> None:
    """Refuse a table of arms that are there, which the runs cannot fill.

    Raises UserError naming the key.
    """
    firsts: dict[str, RunConfig] = {}
    for run in runs.values():
        firsts.setdefault(run.arm, run)
    if not spec.rewards:
        raise UserError(f"tables.{name}.rewards: no reward is given")
    if not spec.sections or not all(spec.sections.values()):
        raise UserError(f"tables.{name}.sections: a section, and an arm in each, is needed")
    for heading, members in spec.sections.items():
        key = f"tables.{name}.sections.{heading}"
        for arm in members:
            if arm == BASE:
                raise UserError(f"{key}: the base model is always there; leave {arm!r} out")
            if members.count(arm) > 1:
                raise UserError(f"{key}: arm {arm!r} occurs twice")
            for reward in spec.rewards:
                if reward not in firsts[arm].rewards:
                    raise UserError(
                        f"tables.{name}.rewards: arm {arm!r} is not evaluated with {reward!r}; "
                        f"its rewards are {', '.join(firsts[arm].rewards)}"
                    )
            if evaluation_key(firsts[arm]) != evaluation_key(firsts[members[0]]):
                raise UserError(
                    f"{key}: arms {members[0]!r} and {arm!r} have different base models or "
                    "evaluations; they cannot be compared"
                )


def check_figure(name: str, spec: FigureSpec, runs: Mapping[str, RunConfig]) -> None:
    """Refuse a figure that the runs cannot fill; UserError naming the key."""
    if not spec.arms:
        raise UserError(f"figures.{name}.arms: no arm is given")
    if spec.kind in ("curves", "images"):
        return
    first = next(run for run in runs.values() if run.arm == spec.arms[0])
    method, profile = first.method, first.profile
    if not method.needs_plan:
        raise UserError(
            f"figures.{name}.arms: {spec.kind} shows a profile, and arm {spec.arms[0]!r} "
            f"({method.name}) has none"
        )
    if spec.kind == "threshold" and method.automatic is None:
        raise UserError(f"figures.{name}.arms: the threshold of arm {spec.arms[0]!r} is not auto")
    lacking = [span for span in spec.spans if span not in profile.spans]
    if spec.kind == "entropy" and lacking:
        raise UserError(f"figures.{name}.spans: {lacking[0]} is not in profile.spans")
    missing = [pair for pair in spec.pairs if pair not in profile.shown]
    if spec.kind == "branches" and missing:
        raise UserError(f"figures.{name}.pairs: {missing[0]} is not in profile.shown")


def resolve_budget(
    name: str, spec: TableSpec, costs: Callable[[str], tuple[int, int] | None]
) -> TableSpec:
    """A table with a number in the place of ``evaluations: cheapest``.

    At less than one iteration of an arm only its untrained model could be compared: there is no
    such comparison where ``cheapest`` comes to that, as in a short trial.

    Args:
        name, spec: the table.
        costs: of an arm, evaluations of its first iteration and of the run; None: its plan waits
            for a profile.

    Raises:
        UserError: if the table's own number is less than one iteration of an arm.
    """
    each = {arm: cost for arm in spec.arms if (cost := costs(arm))}
    budget, key = spec.evaluations, f"tables.{name}.evaluations"
    if budget == "cheapest":
        if not each:
            raise UserError(f"{key}: cheapest is not known yet; give a number")
        budget = min(whole for _, whole in each.values())
    caption, dearest = spec.caption, max(each, key=lambda arm: each[arm][0], default="")
    if budget is not None and each and each[dearest][0] > budget:
        less = f"{budget} is less than one iteration of arm {dearest!r} ({each[dearest][0]})"
        if spec.evaluations != "cheapest":
            raise UserError(f"{key}: {less}; give more, or null for no comparison there")
        budget, caption = None, f"{caption} Compared at the end only: cheapest, {less}."
    return spec.model_copy(update={"evaluations": budget, "caption": caption})


def _cost(run: RunConfig) -> tuple[int, int] | None:
    """Evaluations of a run's first iteration, and of all, if each costs that."""
    if reads_profile(run):
        return None
    one = cost_of(run, [tree_of(run, closed_form_plan(run))]).total
    one *= run.train.prompts_per_iteration
    return one, one * run.train.iterations


def with_snapshots(
    runs: Mapping[str, RunConfig], tables: Iterable[TableSpec]
) -> dict[str, RunConfig]:
    """Runs that keep their weights at the evaluations that tables compare them at."""
    wanted: dict[str, set[int]] = {}
    for table in tables:
        for arm in table.arms if table.evaluations else ():
            wanted.setdefault(arm, set()).add(int(table.evaluations or 0))
    out = {}
    for name, run in runs.items():
        snapshots = sorted({*run.train.snapshots, *wanted.get(run.arm, ())})
        train = run.train.model_copy(update={"snapshots": snapshots})
        out[name] = run.model_copy(update={"train": train})
    return out
