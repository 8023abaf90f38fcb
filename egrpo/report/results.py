"""The results of a study, all as rows of one table: how far each model is from its base.

A row is one reward of one run (the comparisons) or of one arm, trained once per seed, at the end of
training or at equal network evaluations (the tables of a study). An image counts where it and the
base model's image of the same prompt and noise have a score: mean, base and difference are over the
same pairs. Intervals are over seeds and prompts (:mod:`egrpo.core.intervals`); of one run over
prompts alone. Every reward is better when higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from egrpo.config.keys import digest, run_key
from egrpo.config.models import RunConfig
from egrpo.config.study import TableSpec
from egrpo.core.intervals import crossed_interval, difference_interval
from egrpo.errors import UserError
from egrpo.report import evaluations as inputs
from egrpo.report.evaluations import Row, Scores
from egrpo.report.provenance import scored_at
from egrpo.report.render import write_texts
from egrpo.report.text import COSTS, comparison_text, in_order, table_text
from egrpo.store.tables import RESULTS, SNAPSHOTS, read_table, write_table
from egrpo.study.layout import Layout
from egrpo.study.targets import BASE
from egrpo.train.warnings import warnings_in

LEVEL = 0.95
Cells = npt.NDArray[np.float64]
"""Mean score of each seed on each prompt, [seeds, prompts]; NaN without a valid pair."""


@dataclass(frozen=True)
class Model:
    """Scores of one model, their file, and by COSTS what training until these weights cost, but
    peak memory of the whole training; nothing for the base model."""

    path: Path
    scores: Scores
    costs: Mapping[str, float | None] = field(default_factory=dict)


def make_comparison(at: Layout, output: str | Path) -> None:
    """Write runs against their base model as Parquet, and CSV, Markdown and HTML beside it.

    Raises UserError if a file is missing or damaged, or if trained and base results are not of
    the same prompts, samples, rewards and image size; no file is then written.
    """
    if not at.study.runs:
        raise UserError("comparison: no run is given; the runs table needs at least one")
    path = Path(output)
    rows = [{"table": path.stem} | row for run in at.study.runs for row in compare_run(run, at)]
    rows = in_order(rows)
    origin = _origin(at.study.runs, at)
    _write(path, rows, comparison_text(rows, origin["origin"]), origin)


def write_result_table(name: str, spec: TableSpec, at: Layout) -> None:
    """Write one table of a study as Parquet, CSV, Markdown and HTML.

    Raises UserError as :func:`make_table`; no file is then written.
    """
    rows = make_table(name, spec, at)
    origin = _origin([run for arm in spec.arms for run in at.arm(arm)], at)
    text = table_text(name, spec, rows, origin["origin"])
    _write(at.table(name), rows, text, origin | {"caption": spec.caption})


def _origin(runs: Iterable[str], at: Layout) -> dict[str, str]:
    """Where numbers come from: digest of the settings, and a sentence for the end of a table."""
    known = {run: run_key(at.study.runs[run]) for run in runs}
    commits, key = sorted({scored_at(at, run) for run in known}), digest(known)
    text = f"Study {at.study.name}, scored at {', '.join(commits)}, settings {key}."
    return {"config_hash": key, "origin": text}


def _write(path: Path, rows: Sequence[Row], text: str, metadata: Mapping[str, str]) -> None:
    write_table(path, RESULTS, rows, metadata={**metadata, "interval_level": str(LEVEL)})
    write_texts(path, RESULTS, rows, text)


# --- rows -----------------------------------------------------------------------------------------


def compare_run(run: str, at: Layout) -> list[Row]:
    """Rows of one run without ``table``, one for each reward and for what is measured."""
    wrong = warnings_in(at.run(run) / "metrics.parquet", at.study.runs[run]).values()
    warnings = "; ".join(wrong) or None
    return [row | {"run": run, "warnings": warnings} for row in compare_seeds([run], at)]


def compare_seeds(runs: Sequence[str], at: Layout) -> list[Row]:
    """Rows of an arm over these runs, its seeds, as :func:`compare_run`, without ``warnings``."""
    config, base = at.study.runs[runs[0]], _base(runs[0], at)
    models = [_at_end(run, at) for run in runs]
    scored = set(base.scores)
    for model in models:
        if scored != set(model.scores):
            raise UserError(
                f"{model.path}: rewards {', '.join(sorted(model.scores))}, but {base.path} has "
                f"{', '.join(sorted(scored))}; evaluate both again with the same rewards"
            )
        images = [side.path.with_name("images.parquet") for side in (base, model)]
        for side, scores in zip((base, model), inputs.measured(*images), strict=True):
            side.scores.update({name: found for name, found in scores.items() if found})
    head = {"section": "", "run": "", "at": "end", "mark": None}
    return [
        _arm_row(config.arm or runs[0], config, models, name)
        | head
        | _numbers(models, base, name)[0]
        for name in models[0].scores
    ]


def compare_arms(arms: Mapping[str, Sequence[str]], at: Layout) -> list[Row]:
    """Differences at the end of training between arms, ``runs`` by arm: each pair that was trained
    on the same rewards and is compared with the same base model, for each of these rewards.

    Rows have ``reward``, ``first``, ``second``, ``difference`` (first minus second), ``low`` and
    ``high``, None where there is none, and ``seeds`` of both. The intervals are paired by prompt
    and hold for all rows together: Bonferroni's correction raises the level of each to
    ``1 - (1 - LEVEL) / rows``, which leaves a single row's at LEVEL.
    """
    alike: dict[tuple[Path, tuple[str, ...]], list[str]] = {}
    for arm, runs in arms.items():
        rewards = tuple(sorted(at.study.runs[runs[0]].train.rewards))
        alike.setdefault((at.base(runs[0]), rewards), []).append(arm)
    cells: dict[tuple[str, str], Cells] = {}
    for (_, rewards), names in alike.items():
        for arm in names if len(names) > 1 else ():
            models, base = [_at_end(run, at) for run in arms[arm]], _base(arms[arm][0], at)
            cells |= {(reward, arm): _numbers(models, base, reward)[1] for reward in rewards}
    pairs = [
        (reward, *pair)
        for (_, rewards), names in alike.items()
        for reward in rewards
        for pair in combinations(names, 2)
    ]
    rows = []
    for reward, one, other in pairs:
        level = 1.0 - (1.0 - LEVEL) / len(pairs)
        found = difference_interval(cells[reward, one], cells[reward, other], level=level)
        numbers = {"difference": found.mean, "low": found.low, "high": found.high}
        row: Row = {k: None if math.isnan(v) else v for k, v in numbers.items()}
        rows.append(row | {"reward": reward, "first": one, "second": other, "seeds": found.seeds})
    return rows


def make_table(name: str, spec: TableSpec, at: Layout) -> list[Row]:
    """Rows of one table: by time of the comparison, section, arm (the base first) and reward.

    Raises UserError for a missing or damaged file, weights not kept at ``spec.evaluations``, or
    scores of different prompts.
    """
    times = {"end": {arm: {run: _at_end(run, at) for run in at.arm(arm)} for arm in spec.arms}}
    if spec.evaluations is not None:
        budget = int(spec.evaluations)
        times["evaluations"] = {
            arm: {run: _at_budget(name, budget, at.run(run), end) for run, end in models.items()}
            for arm, models in times["end"].items()
        }
    bases = {heading: _base(at.arm(arms[0])[0], at) for heading, arms in spec.sections.items()}
    rows = []
    for when, trained in times.items():
        for heading, base in bases.items():
            arms = {BASE: [base]}
            arms |= {arm: list(trained[arm].values()) for arm in spec.sections[heading]}
            head = {"table": name, "section": heading, "at": when, "run": "", "warnings": None}
            rows += [head | row for row in _section(arms, spec.rewards, at)]
    return rows


def _section(arms: Mapping[str, Sequence[Model]], rewards: Sequence[str], at: Layout) -> list[Row]:
    """Rows of one section without what they share: arms in order, all rewards of each."""
    columns: dict[str, dict[str, Row]] = {}
    for reward in rewards:
        found = {arm: _numbers(models, arms[BASE][0], reward) for arm, models in arms.items()}
        shown = marks({arm: cells for arm, (_, cells) in found.items()})
        columns[reward] = {arm: row | {"mark": shown.get(arm)} for arm, (row, _) in found.items()}
    rows = []
    for arm, models in arms.items():
        config = None if arm == BASE else at.study.runs[at.arm(arm)[0]]
        unknown = dict.fromkeys(("difference", "low", "high")) if arm == BASE else {}
        for reward in rewards:
            rows.append(_arm_row(arm, config, models, reward) | columns[reward][arm] | unknown)
    return rows


def _arm_row(arm: str, config: RunConfig | None, models: Sequence[Model], reward: str) -> Row:
    """What was trained on what, and what that cost."""
    costs = {key: [v for m in models if (v := m.costs.get(key)) is not None] for key in COSTS}
    peaks = costs.pop("peak_memory_mib")
    return {
        "arm": arm,
        "method": config.method.name if config else "",
        "reward": reward,
        "trained_on": config is not None and reward in config.train.rewards,
        **{key: math.fsum(v) / len(v) if v else None for key, v in costs.items()},
        "peak_memory_mib": max(peaks, default=None),
    }


def _numbers(models: Sequence[Model], base: Model, reward: str) -> tuple[Row, Cells]:
    """Means, intervals and counts of one reward of an arm, and the means by seed and prompt."""
    seeds = [_by_prompt(model, base, reward) for model in models]
    before, after, change, valid = np.stack(seeds, axis=1)
    own, gain = (crossed_interval(cells, level=LEVEL) for cells in (after, change))
    numbers = {
        "base": crossed_interval(before).mean,
        **{"mean": own.mean, "mean_low": own.low, "mean_high": own.high},
        **{"difference": gain.mean, "low": gain.low, "high": gain.high},
    }
    row: dict[str, Any] = {k: None if math.isnan(v) else v for k, v in numbers.items()}
    used = int(valid[:, np.isfinite(after).all(axis=0)].sum())
    count = len(models) * len(base.scores[reward])
    return row | {"seeds": own.seeds, "pairs": used, "invalid": count - used}, after


def _by_prompt(model: Model, base: Model, reward: str) -> Cells:
    """Of each prompt the means of base, model and their difference, NaN without a pair of two
    scores, and of how many pairs they are, [4, prompts]."""
    for side in (base, model):
        if reward not in side.scores:
            raise UserError(f"{side.path}: has no reward {reward!r}; delete it and evaluate again")
    before, after = base.scores[reward], model.scores[reward]
    pairs: dict[int, list[tuple[float, float, float]]] = {}
    for key in inputs.same_keys(before, after, base.path, model.path):
        found = pairs.setdefault(key[0], [])
        if math.isfinite(before[key]) and math.isfinite(after[key]):
            found.append((before[key], after[key], after[key] - before[key]))
    columns = [
        [*(math.fsum(part) / len(found) for part in zip(*found, strict=True)), len(found)]
        if found
        else [math.nan, math.nan, math.nan, 0]
        for found in pairs.values()
    ]
    return np.array(columns, dtype=np.float64).T


def marks(cells: Mapping[str, Cells], level: float = LEVEL) -> dict[str, str]:
    """Which arms are ``best`` or ``second`` as far as the data show it.

    ``best`` is shown to be better than every other arm, ``second`` than every other but one; two
    that cannot be told apart but stand above the rest are both ``second``, and of two arms none is.
    Shown is what an interval of the difference above 0 shows, at a level that Bonferroni's
    correction raises to ``1 - (1 - level) / (arms - 1)``: a wrong ``best`` has beaten the truly
    best arm in one of ``arms - 1`` comparisons, so its chance is at most ``1 - level`` as far as
    the intervals keep theirs, and so is a wrong ``second``'s. Simulated with 3 seeds: at most 3% in
    sections of six rows, 6% where one arm faces the base model alone.

    ``cells`` by arm, [seeds, prompts], are of the same prompts; an arm whose interval has no mean
    takes no part. No marks where an arm but the base model was trained once: how much another seed
    would differ is not known, and two equal arms would get a ``best`` in up to 71% of tables.
    """
    if any(len(c) == 1 for arm, c in cells.items() if arm != BASE):
        return {}
    able = {arm: c for arm, c in cells.items() if crossed_interval(c).prompts}
    if len(able) < 2:
        return {}
    corrected = 1.0 - (1.0 - level) / (len(able) - 1)
    ahead = {arm: len(able) - 1 for arm in able}  # arms that it is not shown to be better than
    for one, other in combinations(able, 2):
        difference = difference_interval(able[one], able[other], level=corrected)
        ahead[one] -= difference.low > 0
        ahead[other] -= difference.high < 0
    names = {0: "best", 1: "second"} if len(able) > 2 else {0: "best"}
    return {arm: names[count] for arm, count in ahead.items() if count in names}


# --- reading --------------------------------------------------------------------------------------


def _base(run: str, at: Layout) -> Model:
    """The base model that a run is compared with."""
    path = at.base(run) / "scores.parquet"
    return Model(path, inputs.read_scores(path))


def _at_end(run: str, at: Layout) -> Model:
    """The model at the end of its training."""
    path, train = at.run(run) / "scores.parquet", inputs.train_record(at.run(run) / "train.json")
    costs = {key: train.get(key) for key in COSTS} | {"nfe": inputs.evaluations(train)}
    return Model(path, inputs.read_scores(path), costs)


def _at_budget(name: str, budget: int, folder: Path, end: Model) -> Model:
    """The weights that were kept at ``budget`` network evaluations of one run."""
    path = folder / "snapshots.parquet"
    data = read_table(path, SNAPSHOTS)
    rows = data.filter(pc.equal(data["evaluations"], budget)).to_pylist()
    if not rows:
        raise UserError(
            f"tables.{name}.evaluations: {path} has no scores at {budget} evaluations; add "
            f"{budget} to train.snapshots and run again"
        )
    spent = {(row["iteration"], row["nfe"], row["seconds"]) for row in rows}
    if len(spent) > 1:
        raise UserError(
            f"{path}: {budget} evaluations stand for different weights; delete it and run again"
        )
    costs = dict(zip(COSTS, spent.pop(), strict=False))
    return Model(path, inputs.scores_of(rows, path), {**end.costs, **costs})
