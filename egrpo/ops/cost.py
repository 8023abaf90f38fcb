"""What a study will execute, before anything runs, and how long it takes. Needs no torch.

Evaluations are counted. With measured rates of a card they give seconds of an iteration and hours
of a run: of rollouts, training passes, penalties, decoding and monitors.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from egrpo.config.load import read_yaml
from egrpo.config.models import RunConfig
from egrpo.config.prompts import train_prompts
from egrpo.core.plan import Plan
from egrpo.errors import UserError
from egrpo.ops.rates import Rate, find_rate, on_card, read_rates
from egrpo.planning import trees
from egrpo.planning.plan import load_plan
from egrpo.study.due import Due
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

LEFT_OUT = (
    "s/iteration: rollout, decoding, training, penalties; h/run: with monitors. Left out: loading, "
    "compiling, rewards, optimizer, checkpoints, profile, evaluation"
)
MS_PER_HOUR = 3.6e6
TOGETHER = "all runs"
"""Of costs by run, the key of their sum: no run has a space in its name."""

Costs = dict[str, dict[str, Any] | None]


def study_cost(study: Study, names: Iterable[str] = (), card: str | None = None) -> Costs:
    """Cost of runs (none named: all); None where a plan waits for a profile not measured yet.

    Where rates are known (``card``, or measured for this study) each has its ``time``, None
    without a rate of its model, and the sum of these stands under :data:`TOGETHER`.

    Neither weights nor prompts need to be there: a file that is not counts as one whose prompts
    all iterations take once.

    Raises:
        UserError: if a run or card is unknown, a prompt file, a plan or a table damaged.
    """
    rates = known_rates(Layout(study), card)
    costs = run_costs(study, study.chosen(names), rates)
    return {**costs, TOGETHER: together(costs)} if rates else costs


def run_costs(study: Study, names: Sequence[str], rates: Sequence[Rate]) -> Costs:
    """Cost of runs, with their time if there are rates; UserError as above."""
    at = Layout(study)
    counts = functools.cache(lambda of: len(train_prompts(of.train, of.limit, of.column)))

    def shown(cost: trees.RunCost) -> dict[str, int]:
        return {**cost._asdict(), "total": cost.total}

    out: Costs = {}
    for name in names:
        run = study.runs[name]
        plan, count = known_plan(run, at), run.train.iterations * run.train.prompts_per_iteration
        if os.path.exists(run.prompts.train):
            count = counts(run.prompts)
        if plan is None and trees.needs_plan(run):
            out[name] = None
            continue
        tree = trees.tree_of(run, plan, 1, trees.prompt_ids(run, 1, count)[0])
        whole, images = trees.run_cost(run, plan, count)
        out[name] = {
            "method": run.method.name,
            "prompt": shown(trees.cost_of(run, [tree])),
            "run": shown(whole),
            "train_at_most": run.method.prunes,
            **({"time": time_of(run, whole, images, rates)} if rates else {}),
        }
    return out


def known_plan(run: RunConfig, at: Layout) -> Plan | None:
    """The plan of a run: computed, or read where it was made from a profile; None for no plan."""
    if not trees.reads_profile(run):
        return trees.closed_form_plan(run)
    path = at.run(run.run) / "plan.json"
    made = path.exists() and stands(at, "plan", run.run, at.identity("plan", run.run))
    return load_plan(path) if made else None


def asked_for(study: Study, names: Sequence[str], target: str | None) -> list[str]:
    """The runs that ``--run`` names and ``--target`` needs; all where neither is given.

    Raises:
        UserError: if the study has no such run or target, or cannot make it of its runs.
    """
    if target is None:
        return study.chosen(names)
    due = Due(Layout(study), always=True)
    sets = {"all": "comparison", "paper": "paper_runs", "everything": "all_runs"}
    if target in study.refused:
        raise UserError(study.refused[target])
    if target not in {**sets, **due.specs}:
        raise UserError(f"--target {target}: there are {', '.join({**sets, **due.specs})}")
    if target not in {**sets, **due.at.pages}:
        raise UserError(f"--target {target}: shows a profile, and trains nothing")
    runs = due.run_set(sets.get(target, f"{target}_runs"))
    return list(dict.fromkeys([*(study.chosen(names) if names else ()), *runs]))


def cost_table(
    study: Study,
    names: Sequence[str] = (),
    card: str | None = None,
    *,
    price: float | None = None,
    profile: Path | None = None,
) -> str:
    """The costs side by side: of the runs named, or of each arm those of its first seed.

    With rates the last lines sum up the hours of all seeds, and money at ``price`` an hour; and say
    which runs a SLURM ``profile`` would end. UserError as :func:`study_cost`.
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
    if rates:
        lines += _time_notes(study, costs, rates, price)
        lines += _cut_off(costs, profile) if profile else []
    elif price is not None or profile is not None:
        raise UserError("--price and --profile need hours: give --card, or run `egrpo measure`")
    return "\n".join(lines)


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


def _cut_off(costs: Costs, profile: Path) -> list[str]:
    """Which runs a profile of Snakemake's leaves too little time, all tries together."""
    path = profile / "config.yaml" if profile.is_dir() else profile
    of = read_yaml(path)
    try:
        resources = [of.get("default-resources", {}), of.get("set-resources", {}).get("train", {})]
        minutes = float(str({**resources[0], **resources[1]}["runtime"]))
        tries = 1 + int(of.get("retries") or 0)
    except (KeyError, ValueError, TypeError, AttributeError):
        raise UserError(
            f"{path}: set-resources.train.runtime: expected minutes, and retries a number"
        ) from None
    allowed = minutes / 60 * tries
    hours = {name: cost["time"]["hours"] for name, cost in costs.items() if cost and cost["time"]}
    longer = {name: hour for name, hour in hours.items() if hour > allowed}
    said = f"{path}: {minutes / 60:.3g} h a try and {tries} tries are {allowed:.3g} h"
    if not longer:
        return [f"{said}, enough for each run's training on one card"]
    name, most = max(longer.items(), key=lambda each: each[1])
    return [
        f"{said}, too little for {len(longer)} of {len(hours)} runs on one card; {name} takes "
        f"{_digits(most)} h: raise runtime or retries, or give a run several cards"
    ]


def _time_notes(
    study: Study, costs: Costs, rates: Sequence[Rate], price: float | None
) -> list[str]:
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
    money = f", {_digits(price * whole['hours'])} at {price:g} an hour" if price else ""
    return [
        LEFT_OUT,
        *dict.fromkeys(f"measured: {time['source']}" for time in known),
        *dict.fromkeys([*estimated, *lacking]),
        f"runs together: {whole['runs']}, {_digits(whole['hours'])} h on one {rates[0].card}{money}"
        f"{rest}",
    ]


# -- hours on a card ------------------------------------------------------------------------------


def known_rates(at: Layout, card: str | None) -> list[Rate]:
    """The rates of a card by its name or a part of it; later ones count more.

    The study's own measurements count more than those that ship. None is the card that was measured
    last for this study; empty where none was.

    Raises:
        UserError: if the card is not known, or the study's table is damaged.
    """
    own = read_rates(at.rates) if at.rates.exists() else []
    if card is None:
        return [rate for rate in own if rate.card == own[-1].card]
    return on_card([*read_rates(), *own], card)


def time_of(
    run: RunConfig, cost: trees.RunCost, images: int, rates: Sequence[Rate]
) -> dict[str, Any] | None:
    """What a run takes on the card of ``rates``; None without a rate of its model.

    ``cost`` and ``images``, which are decoded, are of all iterations.

    Returns:
        ``card``, ``seconds_per_iteration`` (mean), ``hours`` of one card, with monitors,
        ``source`` of the rate, and ``notes``: what is estimated, one sentence each.

    Raises:
        UserError: if the folder of the model has no readable config.json.
    """
    rate, note = find_rate(rates, run.model)
    if rate is None:
        return None
    passes = forward_passes(run)
    training, notes = rate.training_ms, [note]
    if training is None:
        training = passes * rate.sampling_ms
        notes.append(
            f"training of {rate.model} is not measured there: a forward and backward is taken as "
            f"{passes} sampling evaluations"
        )
    if rate.decoding_ms is None:
        notes.append(f"decoding of {rate.model} is not measured there, and left out")
    sampling, decoding = rate.sampling_ms, rate.decoding_ms or 0.0
    # what training repeats is sampled in its batches, by the transformer without a merged LoRA
    repeated = min(cost.train, cost.forward)
    plain = (repeated + cost.reference) * training / passes
    rollout = (cost.forward - repeated) * sampling + images * decoding
    iterations = rollout + plain + cost.train * training
    shown = trees.monitor_images(run)
    evaluations = shown * run.evaluate.steps * run.model.evaluations_per_velocity
    monitors = evaluations * sampling + shown * decoding
    return {
        "card": rate.card,
        "seconds_per_iteration": iterations / 1000 / run.train.iterations,
        "hours": (iterations + monitors) / MS_PER_HOUR,
        "source": rate.source,
        "notes": [text for text in notes if text],
    }


def forward_passes(run: RunConfig) -> int:
    """Forward passes whose work one forward and backward of training is.

    The backward pass takes one for the gradients of activations, and another one for those of
    weights, which a LoRA spares; checkpointing runs the forward pass again.
    """
    return 2 + (run.model.tuning == "full") + run.train.gradient_checkpointing


def together(costs: Mapping[str, dict[str, Any] | None]) -> dict[str, Any]:
    """The sum over runs whose time is known: ``hours``, ``runs``; ``without``: the other runs."""
    hours = {name: cost["time"]["hours"] for name, cost in costs.items() if cost and cost["time"]}
    return {
        "hours": sum(hours.values()),
        "runs": len(hours),
        "without": [name for name in costs if name not in hours],
    }
