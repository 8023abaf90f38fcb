"""What came out, arm by arm: trained rewards, what else moved, and arms against each other.

Numbers are those of the comparison; of an arm with several seeds its row over them, by the same
statistic. A reward has the same decimals and one scale of its bars on the whole page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from egrpo.report import text
from egrpo.report.evaluations import MEASURED, Row
from egrpo.report.results import compare_arms, compare_seeds
from egrpo.study.layout import Layout

NOT = "Not trained on"
UNKNOWN = "no interval"
"""What moved where no interval says so."""
MOST_NAMED = 4
"""Arms of which is said by name that they were trained on a reward."""
Arms = Mapping[str, Sequence[str]]
"""Runs by arm, as the comparison has them."""


def arms_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The arms of a comparison and their runs, one for each seed."""
    runs: dict[str, list[str]] = {}
    for run, part in groupby(rows, key=lambda row: str(row["run"])):
        runs.setdefault(next(part)["arm"], []).append(run)
    return runs


def comparison(rows: Sequence[Row], at: Layout) -> list[tuple[str, list[Row]]]:
    """Rows of each run below its heading, with their texts (``text``, ``digits``), ``outcome`` (a
    key of ``VERDICTS``, or ``neutral`` where a number has no better or worse), what ``moved``, and
    the ends of their bar in percent."""
    reach: dict[str, float] = {}
    for row in rows:
        name, numbers = row["reward"], (row["low"], row["high"], row["difference"])
        reach[name] = max([reach.get(name, 0.0), *(abs(n) for n in numbers if n is not None)])
    digits = _digits(rows)

    def view(row: Row) -> Row:
        name, found, bar = row["reward"], text.outcome(row), None
        if row["low"] is not None and reach[name] > 0:
            ends = (row["low"], row["high"], row["difference"])
            bar = [round(50 + 48 * value / reach[name], 2) for value in ends]
        moved = UNKNOWN if row["low"] is None else text.MOVED[found]
        shown = text.readable(row, digits.get(name))
        seen = {"text": shown, "digits": digits.get(name), "moved": moved, "bar": bar}
        return {**row, **seen, "outcome": found if judged(row, at) else "neutral"}

    return [(heading, [view(row) for row in part]) for heading, part in text.by_run(rows)]


def _digits(rows: Sequence[Row]) -> dict[str, int]:
    """Decimals of each reward: what its narrowest interval needs."""
    digits: dict[str, int] = {}
    for row in rows:
        if row["low"] is not None and row["low"] < row["high"]:
            most = digits.get(row["reward"], 0)
            digits[row["reward"]] = max(most, text.decimals(row["low"], row["high"]))
    return digits


def judged(row: Row, at: Layout) -> bool:
    """Whether a higher number is better: not what images measure, nor a reward that nobody asked
    for more of."""
    if row["trained_on"] or row["reward"] in MEASURED:
        return bool(row["trained_on"])
    run = row["run"] if row["run"] in at.study.runs else at.arm(row["arm"])[0]
    reward = at.study.runs[run].rewards.get(row["reward"])
    return reward is None or reward.wanted


def outcome(rows: Sequence[Row], at: Layout) -> dict[str, Any]:
    """What the page shows of a comparison: ``comparison`` of its runs, a card of each arm,
    arms ``against`` each other, and what rewards are measures of.

    Raises:
        UserError: if a result of an arm with several seeds, or scores of one of several arms, are
            missing or damaged.
    """
    arms, own = arms_of(rows), list(rows)
    for arm, runs in arms.items():
        if len(runs) > 1:
            head = {"run": _name(arm, runs), "warnings": None}
            own += [row | head for row in compare_seeds(runs, at)]
    groups = comparison(text.in_order(own), at)  # one call: decimals and scales are of all rows
    found = {part[0]["run"]: part for _, part in groups}
    return {
        "comparison": [group for group in groups if group[1][0]["run"] in at.study.runs],
        "cards": [_card(arm, runs, found, at) for arm, runs in arms.items()],
        "against": against(rows, at),
        "measures": measures(rows, at),
    }


def _name(arm: str, runs: Sequence[str]) -> str:
    """What an arm's rows go by: its only run, or what no run can be called."""
    return runs[0] if len(runs) == 1 else f"{arm}: {len(runs)} seeds"


def _card(
    arm: str, runs: Sequence[str], found: Mapping[str, list[Row]], at: Layout
) -> dict[str, Any]:
    """Of an arm ``who`` it is, ``method``, number of ``seeds``, what training ``spent``, its rows
    of ``trained`` rewards, with what they say (``says``), of how many images (``over``), and their
    rows of each of several ``runs``; ``others`` by how they moved, ``distance`` to the base, and in
    ``signs`` what they say of reward hacking."""
    rows, samples = found[_name(arm, runs)], at.study.runs[runs[0]].evaluate.samples
    trained = []
    for row in (row for row in rows if row["trained_on"]):
        prompts = (row["pairs"] + row["invalid"]) // (samples * len(runs))
        over = text.counted(prompts, "held-out prompt", samples)
        of_runs = [r for run in runs for r in found[run] if r["reward"] == row["reward"]]
        says = text.verdict(row, row["digits"])
        own = of_runs if len(runs) > 1 else []
        trained.append({**row, "says": says, "over": over, "runs": own})
    left = [row for row in rows if not row["trained_on"]]
    others = [row for row in left if row["reward"] != "distance_to_base"]
    ways = *text.MOVED.values(), UNKNOWN
    moved = {way: [row for row in others if row["moved"] == way] for way in ways}
    return {
        "who": arm,
        "method": rows[0]["method"],
        "seeds": len(runs),
        "spent": text.spent(rows[0]),
        "trained": trained,
        "others": {way: part for way, part in moved.items() if part},
        "distance": next((row for row in left if row not in others), None),
        "signs": signs(others),
    }


def signs(others: Sequence[Row]) -> str:
    """What rewards that were not trained on, and diversity, say of reward hacking, in words."""
    telling = [r for r in others if r["outcome"] != "neutral" or r["reward"] == "diversity"]
    fell = [row["reward"] for row in telling if row["moved"] == "fell"]
    held = [r["reward"] for r in telling if r["moved"] not in ("fell", UNKNOWN)]
    if not fell and not held:
        return "Nothing was measured that could show reward hacking."
    said = "No sign of reward hacking is shown."
    if fell:
        what = "Early signs" if len(fell) > 1 else "Early sign"
        said = f"{what} of reward hacking: {', '.join(fell)} fell."
    return f"{said} Not shown to have fallen: {', '.join(held)}." if held else said


def against(rows: Sequence[Row], at: Layout) -> list[Row]:
    """:func:`egrpo.report.results.compare_arms` with the texts of their numbers and what they
    ``says``; a reward has the same decimals in all rows.

    Raises:
        UserError: if scores of an arm are missing or damaged.
    """
    found, out = compare_arms(arms_of(rows), at), []
    digits = _digits(found)
    for row in found:
        unknown = dict.fromkeys(("base", "mean", "mean_low", "mean_high", *text.COSTS))
        shown = text.readable(unknown | row, digits.get(row["reward"]))
        higher = {"better": row["first"], "worse": row["second"]}.get(text.outcome(row))
        says = f"{higher} is higher" if higher else "no difference is shown"
        if row["low"] is None:
            says = UNKNOWN
        out.append({**row, "text": shown, "says": says})
    return out


def measures(rows: Sequence[Row], at: Layout) -> list[dict[str, str]]:
    """Of each reward its ``name``, ``kind``, ``what`` it measures, and who was ``trained`` on it;
    then what images measure."""
    names = list(dict.fromkeys(row["reward"] for row in rows if row["reward"] not in MEASURED))
    arms, out = arms_of(rows), []
    for name in names:
        runs = [at.study.runs[own[0]] for own in arms.values()]
        settings = next((run.rewards[name] for run in runs if name in run.rewards), None)
        on = [arm for arm, own in arms.items() if name in at.study.runs[own[0]].train.rewards]
        trained = "Trained on" if on else NOT
        if on and len(on) < len(arms):
            more = f" and {len(on) - MOST_NAMED} more" if len(on) > MOST_NAMED else ""
            trained += f" by {', '.join(on[:MOST_NAMED])}{more}"
        kind = getattr(settings, "kind", "")
        what = settings.measures() if settings else ""
        out.append({"name": name, "kind": kind, "what": what, "trained": trained})
    for name in dict.fromkeys(row["reward"] for row in rows if row["reward"] in MEASURED):
        what = f"{MEASURED[name]}, 0 to 1."
        what = what[0].upper() + what[1:]
        out.append({"name": name, "kind": "", "what": what, "trained": NOT})
    return out
