"""What a study will execute, before anything runs. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.config.prompts import train_prompts
from egrpo.core.plan import Plan
from egrpo.ops.hours import LEFT_OUT, TOGETHER, known_rates, time_of, together
from egrpo.ops.rates import Rate, find_rate
from egrpo.planning.plan import load_plan
from egrpo.planning.trees import (
    RunCost,
    closed_form_plan,
    cost_of,
    needs_plan,
    prompt_ids,
    reads_profile,
    run_cost,
    tree_of,
)
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study
from egrpo.study.standing import stands

COLUMNS = (
    ("forward/prompt", "prompt", "forward"),
    ("train/prompt", "prompt", "train"),
    ("forward/run", "run", "forward"),
    ("train/run", "run", "train"),
    ("reference/run", "run", "reference"),
    ("all/run", "run", "total"),
)
TIMES = ("s/iteration", "h/run")
NOTE = (
    "forward: evaluations while sampling; train: forward+backward passes; reference: forwards of "
    "the base model and of the averaged weights, for their penalties; prompt: one prompt of the "
    "first iteration"
)
WAITS = "needs its profile; `snakemake --cores all plans` makes it"

Costs = dict[str, dict[str, Any] | None]


def study_cost(study: Study, names: Iterable[str] = (), card: str | None = None) -> Costs:
    """Cost of runs (none named: all); None where a plan waits for a profile not measured yet.

    Where rates are known (``card``, or measured for this study) each has its ``time``, None
    without a rate of its model, and the sum of these stands under :data:`TOGETHER`.

    Raises:
        UserError: if a run or card is unknown, a prompt file missing, a plan or a table damaged.
    """
    rates = known_rates(Layout(study), card)
    costs = run_costs(study, study.chosen(names), rates)
    return {**costs, TOGETHER: together(costs)} if rates else costs


def run_costs(study: Study, names: Sequence[str], rates: Sequence[Rate]) -> Costs:
    """Cost of runs, with their time if there are rates; UserError as above."""
    at = Layout(study)
    files = {study.runs[name].prompts for name in names}
    counts = {of: len(train_prompts(of.train, of.limit, of.column)) for of in files}

    def shown(cost: RunCost) -> dict[str, int]:
        return {**cost._asdict(), "total": cost.total}

    out: Costs = {}
    for name in names:
        run = study.runs[name]
        plan, count = known_plan(run, at), counts[run.prompts]
        if plan is None and needs_plan(run):
            out[name] = None
            continue
        tree = tree_of(run, plan, 1, prompt_ids(run, 1, count)[0])
        whole, images = run_cost(run, plan, count)
        out[name] = {
            "method": run.method.name,
            "prompt": shown(cost_of(run, [tree])),
            "run": shown(whole),
            "train_at_most": run.method.prunes,
            **({"time": time_of(run, whole, images, rates)} if rates else {}),
        }
    return out


def known_plan(run: RunConfig, at: Layout) -> Plan | None:
    """The plan of a run: computed, or read where it was made from a profile; None for no plan."""
    if not reads_profile(run):
        return closed_form_plan(run)
    made = stands(at, "plan", run.run, at.identity("plan", run.run))
    return load_plan(at.run(run.run) / "plan.json") if made else None


def cost_table(study: Study, names: Sequence[str] = (), card: str | None = None) -> str:
    """The costs side by side: of the runs named, or of each arm those of its first seed.

    With rates the last line sums up the hours of all seeds. UserError as :func:`study_cost`.
    """
    rates = known_rates(Layout(study), card)
    wanted = study.chosen(names)
    firsts = {run.arm: name for name, run in reversed(study.runs.items())}.values()
    shown = wanted if names else [name for name in wanted if name in firsts]
    costs = run_costs(study, wanted if rates else shown, rates)
    rows = [["run", "method", *(title for title, *_ in COLUMNS), *(TIMES if rates else ())]]
    for name in shown:
        rows.append([name, study.runs[name].method.name, *_cells(costs[name])])
    seeds = "" if len(shown) == len(wanted) else "; of several seeds the first is shown"
    lines = [*_aligned(rows), NOTE + seeds]
    return "\n".join([*lines, *_time_notes(study, costs, rates)] if rates else lines)


def _cells(cost: Mapping[str, Any] | None) -> list[str]:
    """The numbers of a run, as they are shown."""
    if cost is None:
        return [WAITS]
    most = {"train": "<=", "total": "<="} if cost["train_at_most"] else {}
    cells = [f"{most.get(part, '')}{cost[of][part]:,}" for _, of, part in COLUMNS]
    if "time" not in cost:
        return cells
    if cost["time"] is None:
        return [*cells, *("?" for _ in TIMES)]
    bound, time = most.get("total", ""), cost["time"]
    numbers = time["seconds_per_iteration"], time["hours"]
    return [*cells, *(bound + _digits(number) for number in numbers)]


def _digits(number: float) -> str:
    """Three digits at least, and none below a point that is not known."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, whose first two columns are words; a row may end early."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=False)]
        lines.append("  ".join(names + numbers))
    return lines


def _time_notes(study: Study, costs: Costs, rates: Sequence[Rate]) -> list[str]:
    """What the times mean, what of them is estimated, and their sum."""
    known = [cost["time"] for cost in costs.values() if cost and cost["time"]]
    estimated = (note for time in known for note in time["notes"])
    lacking = (
        find_rate(rates, study.runs[name].model)[1]
        for name, cost in costs.items()
        if cost and not cost["time"]
    )
    whole = together(costs)
    rest = f"; not counted: {len(whole['without'])}" if whole["without"] else ""
    return [
        LEFT_OUT,
        *dict.fromkeys(f"measured: {time['source']}" for time in known),
        *dict.fromkeys([*estimated, *lacking]),
        f"runs together: {whole['runs']}, {_digits(whole['hours'])} h on one {rates[0].card}{rest}",
    ]
