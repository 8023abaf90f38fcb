"""Tables of results: arms by rewards, at the end of training and at equal network evaluations.

An arm is trained once per seed; means and intervals are over seeds and prompts
(:mod:`egrpo.core.intervals`). The best and the second of a section are marked only where paired
differences support it (:func:`marks`). Every reward is better when higher.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from egrpo.config.models import TableSpec
from egrpo.core.intervals import crossed_interval, difference_interval
from egrpo.errors import UserError
from egrpo.page.render import write_texts
from egrpo.report.provenance import made_at
from egrpo.report.results_text import markdown
from egrpo.report.tables import (
    Key,
    Row,
    evaluations,
    read_scores,
    same_keys,
    scores_of,
    train_record,
)
from egrpo.store.tables import RESULTS, SCORES, SNAPSHOTS, read_table, write_table
from egrpo.study.keys import digest, run_key
from egrpo.study.layout import Layout
from egrpo.study.targets import BASE, check_table

LEVEL = 0.95
Matrix = npt.NDArray[np.float64]
Scores = dict[str, dict[Key, float]]
"""By reward and by (prompt id, sample, prompt); NaN where scoring failed."""


@dataclass(frozen=True)
class Model:
    """Scores of one model and what its training cost, null for the base model.

    Attributes:
        path: file of the scores, for messages.
        iterations, nfe, seconds: of training until these weights.
        peak_memory_mib: of the whole training.
    """

    path: Path
    scores: Scores
    iterations: int | None = None
    nfe: int | None = None
    seconds: float | None = None
    peak_memory_mib: float | None = None


def write_result_table(name: str, spec: TableSpec, at: Layout) -> None:
    """Write one table as Parquet, CSV, Markdown and HTML.

    Raises:
        UserError: as :func:`make_table`; no file is then written.
    """
    rows = make_table(name, spec, at)
    runs = [run for arm in spec.arms for run in at.arm(arm)]
    metadata = {
        "config_hash": digest({run: run_key(at.study.runs[run]) for run in runs}),
        "caption": spec.caption,
        "interval_level": str(LEVEL),
    }
    commits = {made_at(at.run(run) / "scores.parquet", SCORES) for run in runs}
    source = ", ".join(sorted(commits))
    origin = f"Study {at.study.name}, scored at {source}, settings {metadata['config_hash']}."
    path = at.table(name)
    write_table(path, RESULTS, rows, metadata=metadata)
    write_texts(path, RESULTS, rows, markdown(name, spec, rows, origin))


def make_table(name: str, spec: TableSpec, at: Layout) -> list[Row]:
    """Rows of RESULTS: by time of the comparison, section, arm (the base model first) and reward.

    Args:
        name: of the table, for messages and the rows.
        spec: its sections, rewards and equal evaluations.
        at: the study and where its results lie.

    Raises:
        UserError: one line, for an arm or reward that the study lacks, a missing or damaged file,
            weights not kept at ``spec.evaluations``, or scores of different prompts.
    """
    check_table(name, spec, at.study.runs)
    ends = {arm: [_at_end(run, at) for run in at.arm(arm)] for arm in spec.arms}
    times = {"end": ends}
    if spec.evaluations is not None:
        times["evaluations"] = {
            arm: [
                _at_budget(name, int(spec.evaluations), at.run(run), end)
                for run, end in zip(at.arm(arm), models, strict=True)
            ]
            for arm, models in ends.items()
        }
    bases = {path: Model(path, read_scores(path)) for path in _base_paths(spec, at).values()}
    rows = []
    for when, trained in times.items():
        for heading, path in _base_paths(spec, at).items():
            arms = {BASE: [bases[path]]} | {arm: trained[arm] for arm in spec.sections[heading]}
            head = {"table": name, "section": heading, "at": when}
            rows += [head | row for row in _section(arms, spec.rewards, at)]
    return rows


def marks(cells: Mapping[str, Matrix], level: float = LEVEL) -> dict[str, str]:
    """Which arms are ``best`` or ``second`` as far as the data show it.

    ``best`` is an arm that is shown to be better than every other one, ``second`` an arm that is
    shown to be better than every other but one. If the first two cannot be told apart but stand
    above the rest, both are ``second`` and none is ``best``. Of two arms none is ``second``.

    Better is shown by an interval of the difference above 0
    (:func:`egrpo.core.intervals.difference_interval`), at a level that Bonferroni's correction
    raises to ``1 - (1 - level) / (arms - 1)``. Choosing the highest mean among many then does no
    harm: an arm that is wrongly ``best`` has beaten the truly best arm in one of ``arms - 1``
    comparisons, each of which errs in that direction with half its error rate. The chance of a
    wrong ``best``, and that of a wrong ``second``, is thus at most ``1 - level`` as far as the
    intervals keep theirs. Simulated with 3 seeds: at most 3% in sections of six rows, 6% where one
    arm faces the base model alone.

    Args:
        cells: by arm, [seeds, prompts] with the same prompts; NaN without a valid score. An arm
            whose interval has no mean takes no part.
        level: of the whole section, in (0, 1).

    Returns:
        Mark by arm. None where an arm but the base model was trained once: how much another seed
        would differ is not known, and two arms that are equal in expectation would get a ``best``
        in up to 71% of such tables.
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


def _base_paths(spec: TableSpec, at: Layout) -> dict[str, Path]:
    """Scores of the base model by section."""
    return {
        heading: at.base(at.arm(arms[0])[0]) / "scores.parquet"
        for heading, arms in spec.sections.items()
    }


def _at_end(run: str, at: Layout) -> Model:
    """The model at the end of its training."""
    folder = at.run(run)
    train = train_record(folder / "train.json")
    path = folder / "scores.parquet"
    return Model(
        path=path,
        scores=read_scores(path),
        iterations=train["iterations"],
        nfe=evaluations(train),
        seconds=train["seconds"],
        peak_memory_mib=train.get("peak_memory_mib"),
    )


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
    iteration, nfe, seconds = spent.pop()
    return Model(path, scores_of(rows, path), iteration, nfe, seconds, end.peak_memory_mib)


# --- rows -----------------------------------------------------------------------------------------


def _section(arms: Mapping[str, Sequence[Model]], rewards: Sequence[str], at: Layout) -> list[Row]:
    """Rows of one section without what they share: arms in order, all rewards of each."""
    columns = {reward: _column(arms, reward) for reward in rewards}
    rows = []
    for arm, models in arms.items():
        config = None if arm == BASE else at.study.runs[at.arm(arm)[0]]
        peaks = [m.peak_memory_mib for m in models if m.peak_memory_mib is not None]
        common = {
            "arm": arm,
            "method": config.method.name if config else "",
            "iterations": _mean(m.iterations for m in models),
            "nfe": _mean(m.nfe for m in models),
            "seconds": _mean(m.seconds for m in models),
            "peak_memory_mib": max(peaks, default=None),
        }
        for reward in rewards:
            on = config is not None and reward in config.train.rewards
            rows.append(common | {"reward": reward, "trained_on": on} | columns[reward][arm])
    return rows


def _column(arms: Mapping[str, Sequence[Model]], reward: str) -> dict[str, Row]:
    """Mean, interval, mark, seeds and failures of one reward, by arm."""
    (base,) = arms[BASE]
    cells: dict[str, Matrix] = {}
    rows: dict[str, Row] = {}
    for arm, models in arms.items():
        seeds = [_by_prompt(model, base, reward) for model in models]
        cells[arm] = np.array([means for means, _ in seeds])
        valid = np.array([counts for _, counts in seeds])  # images
        interval = crossed_interval(cells[arm], level=LEVEL)
        used = valid[:, np.isfinite(cells[arm]).all(axis=0)].sum()
        ends = {"mean": interval.mean, "low": interval.low, "high": interval.high}
        rows[arm] = {
            **{k: None if math.isnan(v) else v for k, v in ends.items()},
            "seeds": interval.seeds,
            "invalid": len(models) * len(base.scores[reward]) - int(used),
        }
    shown = marks(cells)
    return {arm: row | {"mark": shown.get(arm)} for arm, row in rows.items()}


def _by_prompt(model: Model, base: Model, reward: str) -> tuple[list[float], list[int]]:
    """Mean over the valid samples of each prompt, NaN without one, and how many there are."""
    for side in (base, model):
        if reward not in side.scores:
            raise UserError(f"{side.path}: has no reward {reward!r}; delete it and evaluate again")
    scores = model.scores[reward]
    values: dict[int, list[float]] = {}
    for key in same_keys(base.scores[reward], scores, base.path, model.path):
        found = values.setdefault(key[0], [])
        if math.isfinite(scores[key]):
            found.append(scores[key])
    means = [math.fsum(v) / len(v) if v else math.nan for v in values.values()]
    return means, [len(v) for v in values.values()]


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is known."""
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None
