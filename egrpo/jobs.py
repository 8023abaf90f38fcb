"""The jobs of the workflow: each reads its order, computes, and puts its result into its place.

``python -m egrpo make STAGE ORDER`` is what every rule calls. A stage of a run computes into a
folder of its own, which is delivered at the end (``study/standing.py``); what stands already and is
right is kept.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egrpo.errors import one_line, say
from egrpo.store.files import checkpoints_in, lock, read_json, write_json
from egrpo.study import standing
from egrpo.study.identity import SETS, changes
from egrpo.study.layout import SHARED, Layout
from egrpo.study.orders import Order, check_inputs, read_order

if TYPE_CHECKING:
    from egrpo.config.models import RunConfig
    from egrpo.core.plan import Plan
    from egrpo.ops.memory import Stage


def make(stage: str, path: Path, *, threads: int | None = None, name: str = "") -> None:
    """Do what an order asks of a stage, of :data:`RUN_STAGES` or :data:`TOLD`.

    ``threads`` of the CPU are for torch, which chooses itself where they are None; ``name`` is the
    identity of what is shared, or the name of what is told.

    Raises:
        UserError: for bad input; files or code that changed since the order was written; results
            of others that are not those it was written for.
    """
    order = read_order(path)
    if stage in TOLD:
        _tell(stage, order, name)
        return
    if threads and stage != "plan":  # that needs no torch
        import torch

        torch.set_num_threads(threads)
    _compute(stage, order, name)


# -- what is computed of a run --------------------------------------------------------------


def _compute(stage: str, order: Order, name: str) -> None:
    at, run = order.at, order.run
    kind = stage
    if stage == "embed":
        kind = f"embed-{_set_of(at, run, name)}"
    name = name or (at.identity(stage, run.run) if stage in SHARED else run.run)
    record = check_inputs(order, kind)
    if standing.stands(at, stage, name, at.identity(kind, run.run)):
        say(f"{stage} {name}: kept, it is of these settings, files and code")
        return
    with _room(at, stage, name) as made, ExitStack() as advised:
        if stage in MEMORY:
            from egrpo.ops.memory import advice_where_memory_ends

            advised.enter_context(advice_where_memory_ends(run, MEMORY[stage]))
        more = RUN_STAGES[stage](at, run, made)
        if _main_process():
            standing.deliver(at, stage, name, record, made, **(more or {}))


@contextmanager
def _room(at: Layout, stage: str, name: str) -> Iterator[Path]:
    """A folder for what a job makes until it is delivered, the same for all its processes."""
    first = os.environ.get("MASTER_PORT", "") if "RANK" in os.environ else str(os.getpid())
    folder = at.root / ".made" / f"{stage}-{name}-{first}"
    if _main_process():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if _main_process():
            shutil.rmtree(folder, ignore_errors=True)


def _main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _set_of(at: Layout, run: RunConfig, name: str) -> str:
    """The set of a run's prompts whose embeddings have this identity."""
    return next(which for which in SETS if at.identity(f"embed-{which}", run.run) == name)


def _embedded(at: Layout, run: RunConfig, *sets: str) -> dict[str, Path]:
    return {which: at.embeddings(run.run, which) for which in sets}


def _plan(at: Layout, run: RunConfig) -> Plan | None:
    from egrpo.planning.plan import load_plan
    from egrpo.planning.trees import needs_plan

    if not needs_plan(run):
        return None
    standing.require(at, "plan", run.run, at.identity("plan", run.run))
    return load_plan(at.run(run.run) / "plan.json")


def embed(at: Layout, run: RunConfig, made: Path) -> None:
    """Encode a set of prompts, so that no later job loads a text encoder."""
    from egrpo.measure.embed import embed

    name = made.name.split("-")[1]
    embed(run, at.identities.prompts(run, _set_of(at, run, name)), made / f"{name}.safetensors")


def profile(at: Layout, run: RunConfig, made: Path) -> None:
    """Measure the entropy profile of the base model."""
    from egrpo.measure.profile import profile

    files = made / "entropy_profile.parquet", made / "branches.parquet"
    profile(run, _embedded(at, run, "profile"), *files)


def plan(at: Layout, run: RunConfig, made: Path) -> None:
    """Choose, by an entropy threshold, how many steps each SDE step merges."""
    from egrpo.planning.plan import plan

    plan(run, at.profile(run.run), made / "plan.json", made / "merge_plan.parquet")


def suffixes(at: Layout, run: RunConfig, made: Path) -> None:
    """Compare cheaper suffixes of the branches with the exact one, on the base model."""
    from egrpo.measure.suffixes import suffixes
    from egrpo.report.render import write_texts
    from egrpo.store.tables import SUFFIXES

    plan = _plan(at, run)
    assert plan is not None  # the rule is for runs with one
    table = made / "suffixes.parquet"
    rows, text = suffixes(run, plan, _embedded(at, run, "profile"), table)
    write_texts(table, SUFFIXES, rows, text)


def train(at: Layout, run: RunConfig, made: Path) -> dict[str, Any]:
    """Train one run, from wherever its state is."""
    from egrpo.tracking.live import LiveTracker
    from egrpo.train.job import train

    plan, files = _plan(at, run), _embedded(at, run, "train", "monitor")
    state = at.state(run.run) / at.identity("trajectory", run.run)
    if _main_process():
        _begin_state(at, run, state)

    def live(key: str, journal: Path, images: Path) -> LiveTracker:
        return LiveTracker(run, key, at.store, journal, images)

    train(run, plan, files, state=state, output=made, live=live)
    return {"weights": standing.tree_digest(made / "adapter")} if _main_process() else {}


def _begin_state(at: Layout, run: RunConfig, state: Path) -> None:
    """Say beside a state what it is of; of a new one, which others are left and why."""
    record = at.identities.record("trajectory", run)
    there = standing.state_of(at, run.run)
    if there != state:
        _copy_state(run, there, state)
    elif not checkpoints_in(state):
        for other in sorted(at.state(run.run).glob("*/identity.json")):
            reached = max(checkpoints_in(other.parent), default=0)
            if other.parent != state and reached:
                why = ", ".join(changes(read_json(other), json.loads(json.dumps(record)))[:3])
                say(f"{run.run}: a state of {reached} iterations is left in {other.parent} ({why})")
    state.mkdir(parents=True, exist_ok=True)
    write_json(state / "identity.json", record)


def _copy_state(run: RunConfig, there: Path, state: Path) -> None:
    """Go on from another run's state, whole or not at all: that run may be training."""
    new = state.with_name(f".{state.name}.{os.getpid()}")
    try:
        shutil.copytree(there, new, ignore=shutil.ignore_patterns("lock"))
        shutil.rmtree(state, ignore_errors=True)
        new.rename(state)
        say(f"{run.run}: its state is that of {there}")
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        say(f"{run.run}: the state in {there} cannot be taken over ({one_line(error)})")


def evaluate(at: Layout, run: RunConfig, made: Path) -> dict[str, Any]:
    """Sample the held-out prompts with a trained run's weights, and score all that it made."""
    from egrpo.config.load import yaml_of
    from egrpo.measure.evaluate import evaluate
    from egrpo.store.files import write_text

    standing.require(at, "train", run.run, at.identity("train", run.run))
    folder, weights = at.run(run.run), standing.weights_of(at, run.run)
    evaluate(
        run,
        _embedded(at, run, "heldout"),
        folder / "adapter",
        made,
        training=folder,
        sources=at.identities.sources(run, weights),
        before=standing.same_weights(at, run.run),
    )
    if _main_process():
        write_text(made / "config.yaml", yaml_of(run.model_dump()))
    return {"weights": weights}


def base(at: Layout, run: RunConfig, made: Path) -> None:
    """Sample the held-out prompts with the base model and score them."""
    from egrpo.measure.evaluate import evaluate

    evaluate(
        run,
        _embedded(at, run, "heldout"),
        None,
        made,
        sources=at.identities.sources(run, None),
        before=sorted((at.root / SHARED["base"]).glob("*/")),
    )


RUN_STAGES: dict[str, Callable[[Layout, RunConfig, Path], dict[str, Any] | None]] = {
    stage.__name__: stage for stage in (embed, profile, plan, suffixes, train, evaluate, base)
}
MEMORY: dict[str, Stage] = {
    **{"profile": "profile", "suffixes": "profile", "train": "train"},
    **{"evaluate": "evaluate", "base": "evaluate"},
}
"""Stages that fill a GPU, and which memory they need."""


# -- what is told of several runs -----------------------------------------------------------


def _tell(stage: str, order: Order, name: str) -> None:
    at = order.at
    for run in at.study.runs:
        for made in order.record.get("reads", ()):
            standing.require(at, made, run, at.identity(made, run))
    standing.write_receipt(at, stage, name, order.record, TOLD[stage](at, name))


def comparison(at: Layout, name: str) -> list[Path]:
    """Compare every run with its base model."""
    from egrpo.report.results import make_comparison

    make_comparison(at, at.table(name))
    return _texts(at, name)


def table(at: Layout, name: str) -> list[Path]:
    """One table of results, over seeds and prompts."""
    from egrpo.report.results import write_result_table

    write_result_table(name, at.study.tables[name], at)
    return _texts(at, name)


def _texts(at: Layout, name: str) -> list[Path]:
    """A table and its forms as text."""
    return [at.table(name).with_suffix(ending) for ending in (".parquet", ".csv", ".md", ".html")]


def figure(at: Layout, name: str) -> list[Path]:
    """One figure of the study."""
    from egrpo.figures.draw import draw_figure

    draw_figure(name, at.study.figures[name], at)
    return [at.figure(name), at.figure(name).with_suffix(".svg")]


def figures(at: Layout, name: str) -> list[Path]:
    """Entropy, spread, reward curves and the before/after grid of the default runs."""
    from egrpo.figures.draw import draw

    draw(at)
    names = ("curves", "before_after", "entropy", "spread")
    return [path for name in names if (path := at.figure(name)).exists()]


def about(at: Layout, name: str) -> list[Path]:
    """Versions, commits and all settings of some runs as one page."""
    from egrpo.report.provenance import write_about

    write_about(at, at.about(name))
    return [at.about(name)]


def page(at: Layout, name: str) -> list[Path]:
    """Tell the story of a study on one page that needs no network."""
    from egrpo.page.page import make_page

    make_page(name, at, at.study.tables, at.study.figures)
    return [at.page(name)]


def prepare(at: Layout, name: str) -> list[Path]:
    """Prepare the MLflow store before any run uses it."""
    from egrpo.tracking.prepare import prepare

    prepare(at.study, at.store)
    return [at.store]


def publish(at: Layout, name: str) -> list[Path]:
    """Deliver to MLflow whatever it does not have yet; doing it again adds nothing."""
    from egrpo.tracking.publish import publish

    held = lock(at.root / ".publish.lock", wait=True)  # several sets may share runs
    publish(at, at.store, at.table(name), at.published(name))
    if held is not None:
        os.close(held)
    return [at.published(name)]


TOLD: dict[str, Callable[[Layout, str], list[Path]]] = {
    stage.__name__: stage
    for stage in (comparison, table, figure, figures, about, page, prepare, publish)
}
