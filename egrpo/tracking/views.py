"""Saved views of MLflow's runs page: what a link of ``egrpo ui`` opens, and its menu `Views` lists.

MLflow keeps a view in a tag of the experiment: a name and, deflated, the state of the page (filter,
order, columns, charts). The plain page shows a study as one collapsed row, and its charts leave out
what is collapsed; these views list training runs and evaluations by themselves.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from egrpo.config.models import RunConfig
from egrpo.tracking.client import MOST_RECORDS

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAINING, SEEDS, EVALUATIONS = "egrpo-training", "egrpo-seeds", "egrpo-evaluations"
STUDIES, DEFAULT = "egrpo-studies", "egrpo-default"
PREFIX = "mlflow.sharedViewState."
JsonObject = dict[str, Any]


def address(experiment: str, view: str = "", mode: str = "TABLE") -> str:
    """The part of an address behind the server: the runs page, as a view shows it.

    ``mode`` is TABLE, CHART, or ARTIFACT, which compares the tables of runs.
    """
    query = {"workflowType": "machine_learning", "compareRunsMode": mode}
    if view:
        query["viewStateShareKey"] = view
    return f"#/experiments/{experiment}/runs?{urlencode(query)}"


def side_by_side(experiments: Sequence[str]) -> str:
    """The address of several studies' curves; MLflow takes the view from the first of them."""
    query = {
        "experiments": json.dumps(experiments, separators=(",", ":")),
        "workflowType": "machine_learning",
    }
    query |= {"compareRunsMode": "CHART", "viewStateShareKey": STUDIES}
    return f"#/compare-experiments/s?{urlencode(query)}"


def addresses(
    experiment: str, *, default: bool = False, others: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """What is worth opening, the best first: (address, what it shows).

    ``default``: there is a view of the study's default runs alone; ``others``: experiments of
    further studies in the same store.
    """
    models = f"#/experiments/{experiment}/models?workflowType=machine_learning"
    first = [(address(experiment, DEFAULT, "CHART"), "the default runs: curves and images")]
    beside = [(side_by_side([experiment, *others]), "this and the store's other studies: means")]
    return [
        *(first if default else []),
        (address(experiment, TRAINING, "CHART"), "training runs: curves and images"),
        (address(experiment, SEEDS, "CHART"), "the same, as means over seeds"),
        (address(experiment, EVALUATIONS), "evaluations, the largest gain first"),
        (address(experiment, EVALUATIONS, "ARTIFACT"), "their images, prompt by prompt"),
        (models, "trained adapters with their evaluation"),
        *(beside if others else []),
        (address(experiment), "the tree of study, runs, evaluations: `+` opens a row"),
    ]


def keep_views(client: MlflowClient, experiment: str, runs: Iterable[RunConfig]) -> None:
    """Write the views of a study with these runs, those only that are missing or differ."""
    _write(client, experiment, _study_views(list(runs)))


def keep_default_view(
    client: MlflowClient, experiment: str, runs: Mapping[str, RunConfig], default: Collection[str]
) -> bool:
    """Write the view of the training runs in ``default``; False where they cannot be told apart:
    none is there yet, or no others are.

    MLflow's filter knows no `or`, so the view lists the runs by their ids in MLflow.
    """
    found = client.search_runs([experiment], "tags.kind = 'train'", max_results=MOST_RECORDS)
    ids = [r.info.run_id for r in found if r.data.tags.get("run") in default]
    if not 0 < len(ids) < len(found):
        return False
    state = _study_views(list(runs.values()))[TRAINING][1]
    listed = ", ".join(f"'{run_id}'" for run_id in sorted(ids))
    chosen = f"{state['searchFilter']} and attributes.run_id IN ({listed})"
    _write(client, experiment, {DEFAULT: ("Default runs", state | {"searchFilter": chosen})})
    return True


def _write(
    client: MlflowClient, experiment: str, views: Mapping[str, tuple[str, JsonObject]]
) -> None:
    held = client.get_experiment(experiment).tags
    for view, (name, state) in views.items():
        # a tag holds 5,000 characters, so the state is deflated
        packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), level=9)).decode()
        text = {"name": name, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"}
        if held.get(PREFIX + view) != json.dumps(text):
            client.set_experiment_tag(experiment, PREFIX + view, json.dumps(text))


def _study_views(runs: list[RunConfig]) -> dict[str, tuple[str, JsonObject]]:
    """Name and state of each view."""
    trained = list(dict.fromkeys(reward for run in runs for reward in run.train.rewards))
    rewards = list(dict.fromkeys([*trained, *(r for run in runs for r in run.rewards)]))
    facts = [f"tags.`{tag}`" for tag in ("method", "reward", "threshold", "seed")]

    def curves(axes: tuple[str, ...]) -> JsonObject:
        columns = [*(f"metrics.`monitor/reward/{r}`" for r in trained), "metrics.`nfe`"]
        # monitor grids with a slider over iterations
        grids = {"type": "IMAGE", "imageKeys": ["monitor"], "step": 0, "showRunParams": False}
        images = ("Images of the same prompts and noise", 1, [grids])
        found = {r: [_curve(r, axis) for axis in axes] for r in rewards}
        sections = [(f"{r}, held-out prompts", 2, own) for r, own in found.items()]
        if len(axes) == 1:  # no pairs
            sections = [("Rewards on held-out prompts", 2, [*chain(*found.values())])]
        order = {"orderByKey": "tags.`mlflow.runName`", "orderByAsc": True}
        return _page("train", order, [*facts, *columns], [*sections, images])

    gains = [f"{reward}/difference" for reward in rewards]
    cost = {
        "type": "SCATTER",
        "xaxis": {"key": "nfe", "type": "METRIC"},
        "yaxis": {"key": gains[0], "type": "METRIC"},
    }
    bars = [{"type": "BAR", "metricKey": gain} for gain in gains]
    numbers = [f"{r}/{c}" for r in trained for c in ("mean", "difference", "low", "high")]
    evaluations = _page(
        "evaluation",
        {"orderByKey": f"metrics.`{gains[0]}`", "orderByAsc": False},
        [*facts, *(f"metrics.`{name}`" for name in [*numbers, "nfe"])],
        [("Gain over the base model", 2, [cost | {"runsCountToCompare": 100}, *bars])],
    )

    # grouped curves against a metric are drawn at a wrong x by MLflow 3.17
    def means(*groups: tuple[str, str]) -> JsonObject:
        keys = [{"mode": mode, "groupByData": name} for mode, name in groups]
        grouped = {"aggregateFunction": "average", "groupByKeys": keys}
        return curves(("step",)) | {"groupBy": grouped}

    return {
        TRAINING: ("Training runs", curves(("step", "metric"))),
        SEEDS: ("Means over seeds", means(("tag", "arm"))),
        STUDIES: ("Means over seeds, by study", means(("param", "study"), ("tag", "arm"))),
        EVALUATIONS: ("Evaluations", evaluations),
    }


def _page(
    kind: str,
    order: JsonObject,
    columns: list[str],
    sections: list[tuple[str, int, list[JsonObject]]],
) -> JsonObject:
    """State of the runs page; ``sections`` have a name, columns and charts.

    Ordered by time, MLflow would fold all runs into their parents.
    """
    cards, charts = [], []
    for name, wide, drawn in sections:
        own = f"egrpo-{kind}-{name}"  # ids need only differ
        card = {"uuid": own, "name": name, "columns": wide, "cardHeight": 360}
        cards.append(card | {"display": True, "isReordered": True})
        common = {"metricSectionId": own, "deleted": False, "isGenerated": False}
        common |= {"runsCountToCompare": 20}
        charts += [common | {"uuid": f"{own}-{n}"} | chart for n, chart in enumerate(drawn)]
    return {
        "searchFilter": f"tags.kind = '{kind}'",
        **order,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunSections": cards,
        "compareRunCharts": charts,
        "isAccordionReordered": True,  # else MLflow orders sections by name
    }


def _curve(reward: str, axis: str) -> JsonObject:
    """A monitored reward against iterations (``axis`` step) or network evaluations (metric).

    On this page MLflow 3.17 calls a chart by its metric, unless it takes it for one of a node's
    load; then it loads no metric of an x axis. So one of a pair has a title of its own.
    """
    metric = f"monitor/reward/{reward}"
    title = f"{reward} over iterations"
    of_node = {"metric": title, "type": "node"}
    own = {"displayName": title, "nodeLevelSystemMetricConfiguration": of_node}
    return (own if axis == "step" else {}) | {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": axis,
        "selectedXAxisMetricKey": "nfe" if axis == "metric" else "",
        "useGlobalLineSmoothing": True,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
    }
