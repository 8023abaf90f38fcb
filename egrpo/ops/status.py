"""What of a study is done, to do, or stale, and by what; and keeping what other code made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from egrpo.config.keys import digest, evaluation_key, run_key
from egrpo.config.load import load_run
from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.planning.trees import needs_plan
from egrpo.store.files import checkpoints_in, read_json, write_json
from egrpo.study import standing
from egrpo.study.identity import is_code, versions
from egrpo.study.layout import Layout

SHOWN = 3
"""Changes that one line names; of more it says how many."""


def stages_of(run: RunConfig) -> tuple[str, ...]:
    """The stages whose results are a run's own, in order."""
    return (*(("plan",) if needs_plan(run) else ()), "train", "evaluate")


def status(at: Layout) -> Iterator[str]:
    """One line a run: done, to do, or stale and by what."""
    for name, run in at.study.runs.items():
        parts = [_standing(at, stage, name) for stage in stages_of(run)]
        done = all(part.endswith("done") for part in parts)
        yield f"{name}: {'done' if done else '; '.join(parts)}"
    yield from other_libraries(at)
    at.identities.digests.save()


def _standing(at: Layout, stage: str, name: str) -> str:
    if standing.stands(at, stage, name, at.identity(stage, name)):
        return f"{stage} done"
    if (told := change(at, stage, name)) is not None:
        return told
    if stage == "train" and (there := _reached(at, name)):
        return f"train to do, from iteration {there} of {at.study.runs[name].train.iterations}"
    return f"{stage} to do"


def _reached(at: Layout, name: str) -> int:
    """The iteration that a run's training would go on from."""
    return max(checkpoints_in(standing.state_of(at, name)), default=0)


def change(at: Layout, stage: str, name: str) -> str | None:
    """What made a result stale, what is thrown away, and how to keep it; None where there is none.

    A training that only goes on throws nothing away.
    """
    run = at.study.runs[name]
    found = standing.reasons(at, stage, name, at.identities.record(stage, run))
    if found is None or found == ["it is not there"]:
        return None
    shown = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" * (len(found) > SHOWN))
    text = f"{stage} stale: {shown}"
    if stage != "train":
        return text
    if 0 < (goes_on := _reached(at, name)) <= run.train.iterations:
        return f"{text}; goes on from iteration {goes_on}"
    try:
        summary = read_json(at.run(name) / "train.json")
        hours = summary.get("seconds", 0.0) / 3600
        lost = f"{summary.get('iterations')} iterations, {hours:.2g} hours of training"
    except (UserError, AttributeError):  # it is missing or damaged
        return text
    return f"{text}; {lost}, are made anew; {_remedy(found)}"


def _remedy(found: Sequence[str]) -> str:
    """How to keep a result, by what changed."""
    if all(is_code(one.rpartition(" → ")[0].rpartition(" ")[0]) for one in found):
        return "to keep them, if the code computes the same: `egrpo keep`"
    if found[0].startswith("it does not say"):
        return "to keep them, if nothing changed since: `egrpo keep`"
    return "to keep them: undo the change, or give the run another name"


def other_libraries(at: Layout) -> Iterator[str]:
    """One line where results were made with other versions of what computes."""
    found: dict[str, list[str]] = {}
    for name in at.study.runs:
        receipt = standing.read_receipt(at, "train", name)
        if receipt is None:
            continue
        made, now = receipt.get("libraries", {}), versions()
        differ = [f"{k} {made[k]} → {now[k]}" for k in now if made.get(k, now[k]) != now[k]]
        if differ:
            found.setdefault(", ".join(differ), []).append(name)
    for what, runs in found.items():
        more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
        yield (
            f"{', '.join(runs[:3])}{more}: made with other libraries ({what}); they stay "
            "(`libraries: remake` makes them again)"
        )


def keep(at: Layout, names: Sequence[str]) -> Iterator[str]:
    """Take results as today's code's, run by run; says what was done.

    Raises:
        UserError: for a run that the study does not have.
    """
    for name in at.study.chosen(names):
        for stage in stages_of(at.study.runs[name]):
            yield f"{name}: {stage} {_keep(at, stage, name)}"
    at.identities.digests.save()


def _keep(at: Layout, stage: str, name: str) -> str:
    run = at.study.runs[name]
    record = at.identities.record(stage, run)
    if standing.stands(at, stage, name, digest(record)):
        return "stands as it is"
    receipt = standing.read_receipt(at, stage, name)
    if receipt is None:
        return _adopt(at, stage, name)
    before = receipt["record"]
    now = json.loads(json.dumps(record))  # lists for tuples
    found = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
    found = [key for key in found if not is_code(key) and key != "training"]
    if found or not standing.whole(at, receipt):
        return f"not kept: {', '.join(found[:SHOWN]) or 'files are missing'}"
    receipt |= {"identity": digest(record), "record": record, "kept": receipt["identity"]}
    write_json(at.receipt(stage, name), receipt)
    return "kept, as made by other code"


def _adopt(at: Layout, stage: str, name: str) -> str:
    """A result of a version that wrote no receipts, if its settings are today's."""
    run, outputs = at.study.runs[name], at.outputs(stage, name)
    there = [p for p in outputs if p.exists()]
    if not there:
        return "is not there"
    lacking = [p.name for p in outputs if not p.exists() and p.name != "snapshots"]
    if lacking:
        return f"is made again: it lacks {', '.join(lacking)}"
    if not at.config(name).is_file():
        return "not kept: config.yaml is missing, so its settings are not known"
    before = load_run(at.config(name))
    keys = [run_key, evaluation_key] if stage == "evaluate" else [run_key]
    if any(key(before) != key(run) for key in keys):
        return "not kept: its settings are others than today's"
    more: dict[str, Any] = {"kept": "of a version without receipts"}
    if stage == "train":
        more["weights"] = standing.tree_digest(at.run(name) / "adapter")
    elif stage == "evaluate":
        more["weights"] = standing.weights_of(at, name)
    standing.write_receipt(at, stage, name, at.identities.record(stage, run), there, **more)
    return "kept, as made by an earlier version"
