"""What a study will execute, before anything runs. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from egrpo.config.models import RunConfig
from egrpo.config.prompts import train_prompts
from egrpo.core.plan import Plan
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
NOTE = (
    "forward: evaluations while sampling; train: forward+backward passes; reference: forwards of "
    "the base model and of the averaged weights, for their penalties; prompt: one prompt of the "
    "first iteration"
)


def study_cost(
    study: Study, names: Iterable[str] | None = None
) -> dict[str, dict[str, Any] | None]:
    """Cost of runs (None: all); None where a plan waits for a profile that is not measured yet.

    Raises:
        UserError: if a prompt file is missing or a plan damaged.
    """
    at = Layout(study)
    files = {run.prompts for run in study.runs.values()}
    counts = {of: len(train_prompts(of.train, of.limit, of.column)) for of in files}

    def shown(cost: RunCost) -> dict[str, int]:
        return {**cost._asdict(), "total": cost.total}

    out: dict[str, dict[str, Any] | None] = {}
    for name in names or study.runs:
        run = study.runs[name]
        plan, count = known_plan(run, at), counts[run.prompts]
        if plan is None and needs_plan(run):
            out[name] = None
            continue
        tree = tree_of(run, plan, 1, prompt_ids(run, 1, count)[0])
        out[name] = {
            "method": run.method.name,
            "prompt": shown(cost_of(run, [tree])),
            "run": shown(run_cost(run, plan, count)),
            "train_at_most": run.method.prunes,
        }
    return out


def known_plan(run: RunConfig, at: Layout) -> Plan | None:
    """The plan of a run: computed, or read where it was made from a profile; None for no plan."""
    if not reads_profile(run):
        return closed_form_plan(run)
    made = stands(at, "plan", run.run, at.identity("plan", run.run))
    return load_plan(at.run(run.run) / "plan.json") if made else None


def cost_table(study: Study) -> str:
    """The costs side by side; of an arm with several seeds those of the first."""
    firsts = {run.arm: name for name, run in reversed(study.runs.items())}
    costs = study_cost(study, [name for name in study.runs if name in firsts.values()])
    rows = [["run", "method", *(title for title, *_ in COLUMNS)]]
    for name, cost in costs.items():
        cells = ["needs its profile; `snakemake --cores all plans` makes it"]
        if cost is not None:
            most = {"train": "<=", "total": "<="} if cost["train_at_most"] else {}
            cells = [f"{most.get(part, '')}{cost[of][part]:,}" for _, of, part in COLUMNS]
        rows.append([name, study.runs[name].method.name, *cells])
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = []
    for row in rows:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=False)]
        lines.append("  ".join(names + numbers))
    seeds = "" if len(firsts) == len(study.runs) else "; of several seeds the first is shown"
    return "\n".join([*lines, NOTE + seeds])
