"""What of a study has to be made: decided when the plan is made, by what results are computed from.

A result of a run, or one that runs share, is due if it does not stand (``study/standing.py``).
What is told of several runs is due also if one of the results that it tells of is: numbers are told
of the very results that lie there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from egrpo.config.keys import digest, tracking_key
from egrpo.config.models import RunConfig
from egrpo.config.study import RESULT_FIGURES, FigureSpec, TableSpec
from egrpo.planning.trees import needs_plan
from egrpo.study.code import COMPUTE, PACKAGE, TELL
from egrpo.study.identity import SETS, Record
from egrpo.study.layout import SHARED, Layout
from egrpo.study.orders import order_of_run, order_of_target
from egrpo.study.standing import read_receipt, stands, whole

TEMPLATES = str(PACKAGE / "report" / "templates")
MODULES = {
    "prepare": "egrpo.tracking.prepare",
    "comparison": "egrpo.report.results",
    "table": "egrpo.report.results",
    "figure": "egrpo.figures.draw",
    "figures": "egrpo.figures.draw",
    "about": "egrpo.report.provenance",
    "page": "egrpo.page.page",
    "publish": "egrpo.tracking.publish",
}
"""What tells, by stage."""


class Due:
    """What of a study is due, and the orders of its jobs.

    Args:
        at: the study, and where its results lie.
        always: for a job, which does not ask: everything is due.
    """

    def __init__(self, at: Layout, *, always: bool = False) -> None:
        self.at, self.always = at, always
        self.result = functools.cache(self._result)
        self.told = functools.cache(self._told)
        runs = at.study.runs
        self.shown = functools.cache(lambda run, all: digest(shown(runs[run], whole=all)))

    # -- results of runs, and those that runs share ----------------------------------------

    def _result(self, stage: str, name: str) -> bool:
        """Whether a result is due. ``name``: of the run, or the identity of what runs share."""
        if self.always:
            return True
        identity = name if stage in SHARED else self.at.identity(stage, name)
        fresh = stands(self.at, stage, name, identity)
        # an evaluation is of the very weights that lie there
        return not fresh or (stage == "evaluate" and self.result("train", name))

    @cached_property
    def owners(self) -> dict[tuple[str, str], str]:
        """(stage, identity) of what runs share -> a run whose settings make it."""
        found: dict[tuple[str, str], str] = {}
        for name, run in self.at.study.runs.items():
            of = {f"embed-{which}": "embed" for which in SETS} | {"base": "base"}
            of |= {"profile": "profile"} if needs_plan(run) else {}
            for kind, stage in of.items():
                found.setdefault((stage, self.at.identity(kind, name)), name)
        return found

    def named(self, stage: str, run: str) -> tuple[str, str]:
        """How a run's result is named: what runs share by its identity."""
        return stage, self.at.identity(stage, run) if stage in SHARED else run

    def order(self, stage: str, name: str, *, write: bool = True) -> Path:
        """The order of a result's job, written unless nothing is to be done yet."""
        run = self.owners[stage, name] if stage in SHARED else name
        return order_of_run(self.at, run, write=write)

    # -- what is told of several runs ------------------------------------------------------

    def runs_of(self, arms: Iterable[str]) -> list[str]:
        """Runs of some arms, by seed."""
        return [run for arm in arms for run in self.at.arm(arm)]

    def run_set(self, name: str) -> list[str]:
        """Runs that are compared and delivered together."""
        study = self.at.study
        if name == "all_runs":
            return list(study.runs)
        if name == "comparison":
            return list(study.default_runs)
        arms = [arm for target in self.names(name) for arm in self.specs[target].arms]
        return self.runs_of(dict.fromkeys(arms))

    @cached_property
    def specs(self) -> dict[str, TableSpec | FigureSpec]:
        """The study's tables and figures by name."""
        return {**self.at.study.tables, **self.at.study.figures}

    def names(self, set: str) -> list[str]:
        """Names of the tables and figures that are told with a set of runs.

        With the default runs: those of no others.
        """
        study = self.at.study
        if set == "all_runs":
            return list(self.specs)
        if set == "paper_runs":
            return [name for name in study.paper if name in self.specs]
        if set == "comparison":
            return [
                name
                for name, spec in self.specs.items()
                if not {*self.runs_of(spec.arms)} - {*study.default_runs}
            ]
        return [set.removesuffix("_runs")]

    def planned(self, runs: Iterable[str]) -> list[str]:
        """Those runs that have a merge plan."""
        return [run for run in runs if needs_plan(self.at.study.runs[run])]

    def _told(self, stage: str, name: str) -> Told:
        """The job that tells something; ``name`` as in its file's."""
        return getattr(self, f"_tell_{stage}")(name)

    def _tell_prepare(self, name: str) -> Told:
        first = next(iter(self.at.study.runs.values()))
        return Told(self, "prepare", name, [first.run], uri=tracking_key(first))

    def _tell_comparison(self, name: str) -> Told:
        return Told(self, "comparison", name, self.run_set(name), BOTH)

    def _tell_table(self, name: str) -> Told:
        spec = self.at.study.tables[name]
        return Told(
            self,
            "table",
            name,
            self.runs_of(spec.arms),
            BOTH,
            targets=[name],
            spec=spec.model_dump(),
        )

    def _tell_figure(self, name: str) -> Told:
        spec = self.at.study.figures[name]
        runs, results = self.runs_of(spec.arms), spec.kind in RESULT_FIGURES
        profiled = [] if results else self.planned(runs)
        reads = BOTH if results else ()
        return Told(
            self, "figure", name, runs, reads, profiled, targets=[name], spec=spec.model_dump()
        )

    def _tell_figures(self, name: str) -> Told:
        runs = self.run_set("comparison")
        return Told(self, "figures", name, runs, BOTH, self.planned(runs))

    def _tell_about(self, name: str) -> Told:
        return Told(self, "about", name, self.run_set(name), BOTH)

    def _tell_page(self, name: str) -> Told:
        of = self.at.pages[name]
        told = self._with(of, drawn=name in ("index", "everything"))
        runs = self.run_set(of)
        return Told(
            self, "page", name, runs, BOTH, self.planned(runs), told, targets=self.names(of)
        )

    def _tell_publish(self, name: str) -> Told:
        told = self._with(name, drawn=name == "comparison")
        first = next(iter(self.at.study.runs.values()))
        return Told(
            self, "publish", name, self.run_set(name), BOTH, told=told, uri=tracking_key(first)
        )

    def _with(self, set: str, *, drawn: bool) -> list[Told]:
        """What else is told of a set of runs."""
        tables = self.at.study.tables
        found = [self.told("comparison", set)]
        found += [self.told("table" if n in tables else "figure", n) for n in self.names(set)]
        return [*found, self.told("figures", "default")] if drawn else found


BOTH = ("train", "evaluate")
WHOLE = ("about", "page", "publish")
"""What shows all settings of a run."""


class Told:
    """A job that tells of several runs.

    Attributes:
        stage, name: of ``egrpo/jobs.py``, and of what it makes.
        runs: those it tells of, in order.
        record: what it is made from.
    """

    def __init__(
        self,
        due: Due,
        stage: str,
        name: str,
        runs: list[str],
        reads: Iterable[str] = (),
        profiled: Iterable[str] = (),
        told: Iterable[Told] = (),
        **more: Any,
    ) -> None:
        """Args:
        due: of the study.
        stage, name, runs: see the class.
        reads: stages whose results of the runs it reads; with an evaluation goes the base's.
        profiled: runs whose plans and profiles it reads.
        told: what else it shows.
        more: what else it is made from.
        """
        self._due, self.stage, self.name, self.runs = due, stage, name, list(runs)
        self._told, at = list(told), due.at
        base = ["base"] if "evaluate" in reads else []
        of = [(s, run) for run in self.runs for s in (*reads, *base)]
        of += [(s, run) for run in profiled for s in ("plan", "profile")]
        self._read = list(dict.fromkeys(due.named(*one) for one in of))
        self.record: Record = {
            "reads": list(reads),
            "results": digest([at.identity(*one) for one in of]),
            "settings": digest([due.shown(r, stage in WHOLE) for r in self.runs if of]),
            "told": [digest(other.record) for other in self._told],
            **at.identities.code.rooms(MODULES[stage], rooms=(*COMPUTE, *TELL)),
            "templates": digest(at.identities.digests.files(TEMPLATES) if of else {}),
            **more,
        }

    @cached_property
    def due(self) -> bool:
        """Whether it has something to do."""
        at = self._due.at
        if self._due.always:
            return True
        receipt = read_receipt(at, self.stage, self.name)
        fresh = receipt and receipt["identity"] == digest(self.record) and whole(at, receipt)
        return (
            not fresh
            or any(self._due.result(*one) for one in self._read)
            or any(other.due for other in self._told)
        )

    def order(self, *, write: bool = True) -> Path:
        """The order of its job, written unless nothing is to be done yet."""
        name = f"{self.stage}-{self.name}"
        return order_of_target(self._due.at, name, self.runs, self.record, write=write)

    def inputs(self) -> list[Path]:
        """A file of each result that it reads: who makes one makes them all."""
        at = self._due.at
        found = [at.outputs(*one)[-1] for one in self._read]
        return [*found, *(path for other in self._told for path in other.shown())]

    def shown(self) -> list[Path]:
        """What others show of it."""
        at = self._due.at
        drawn: dict[str, Callable[[], list[Path]]] = {
            "figure": lambda: [at.figure(self.name)],
            "figures": lambda: default_figures(self._due),
        }
        return drawn.get(self.stage, lambda: [at.table(self.name)])()


def shown(run: RunConfig, *, whole: bool) -> Record:
    """The settings of a run that are told."""
    if whole:
        return run.model_dump()
    found = run.model_dump(include={"run": True, "arm": True, "seed": True, "method": True})
    found["train"] = run.train.model_dump(include={"rewards", "bounds", "iterations"})
    found["evaluate"] = run.evaluate.model_dump(exclude={"micro_batch"})
    return found


def default_figures(due: Due) -> list[Path]:
    """Pictures of the default runs."""
    planned = ["entropy", "spread"] if due.planned(due.at.study.default_runs) else []
    return [due.at.figure(name) for name in ["curves", "before_after", *planned]]
