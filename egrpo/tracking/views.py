"""Saved views of MLflow's runs page: what a link of ``egrpo ui`` opens, and its menu `Views` lists.

MLflow keeps a view in a tag of the experiment: a name and, deflated, the state of the page (filter,
order, columns, charts). The plain page shows a study as one collapsed row, and its charts leave out
what is collapsed; these views list training runs and evaluations by themselves.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from egrpo.config.models import RunConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRAINING, SEEDS, EVALUATIONS = "egrpo-training", "egrpo-seeds", "egrpo-evaluations"
PREFIX = "mlflow.sharedViewState."
JsonObject = dict[str, Any]


# ---------------------------------------------------------------- addresses


def address(experiment: str, view: str = "", mode: str = "TABLE") -> str:
    """The part of an address behind the server: the runs page, as a view shows it.

    Args:
        mode: TABLE, CHART, or ARTIFACT, which compares the tables of runs.
    """
    query = {"workflowType": "machine_learning", "compareRunsMode": mode}
    if view:
        query["viewStateShareKey"] = view
    return f"#/experiments/{experiment}/runs?{urlencode(query)}"


def addresses(experiment: str) -> list[tuple[str, str]]:
    """What is worth opening, the best first: (address, what it shows)."""
    return [
        (address(experiment, TRAINING, "CHART"), "training runs: curves and images"),
        (address(experiment, SEEDS, "CHART"), "the same, as means over seeds"),
        (address(experiment, EVALUATIONS), "evaluations, the largest gain first"),
        (address(experiment, EVALUATIONS, "ARTIFACT"), "their images, prompt by prompt"),
        (
            f"#/experiments/{experiment}/models?workflowType=machine_learning",
            "trained adapters with their evaluation",
        ),
        (address(experiment), "the tree of study, runs, evaluations: `+` opens a row"),
    ]


# ---------------------------------------------------------------- views


def keep_views(client: MlflowClient, experiment: str, runs: Iterable[RunConfig]) -> None:
    """Write the views of a study with these runs, those only that are missing or differ."""
    held = client.get_experiment(experiment).tags
    for view, (name, state) in study_views(list(runs)).items():
        value = encoded(name, state)
        if held.get(PREFIX + view) != value:
            client.set_experiment_tag(experiment, PREFIX + view, value)


def encoded(name: str, state: JsonObject) -> str:
    """A view as MLflow writes it; a tag holds 5,000 characters, so the state is deflated."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode(), level=9)).decode()
    text = f"deflate;{packed}"
    return json.dumps({"name": name, "createdAt": 0, "updatedAt": 0, "state": text})


def study_views(runs: list[RunConfig]) -> dict[str, tuple[str, JsonObject]]:
    """Name and state of each view."""
    trained = list(dict.fromkeys(reward for run in runs for reward in run.train.rewards))
    others = [r for r in dict.fromkeys(r for run in runs for r in run.rewards) if r not in trained]
    number = count()
    facts = [f"tags.`{tag}`" for tag in ("method", "reward", "threshold", "seed")]

    def curves(axes: tuple[str, ...]) -> JsonObject:
        charts = [_curve(f"monitor/reward/{r}", x) for r in [*trained, *others] for x in axes]
        return _page(
            "train",
            order="tags.`mlflow.runName`",
            ascending=True,
            columns=[*facts, *(f"metrics.`monitor/reward/{r}`" for r in trained), "metrics.`nfe`"],
            sections=[
                _section(number, "Rewards on held-out prompts", charts, columns=2),
                _section(number, "Images of the same prompts and noise", [_images()], columns=1),
            ],
        )

    gains = [f"{reward}/difference" for reward in [*trained, *others]]
    bars: list[JsonObject] = [{"type": "BAR", "metricKey": gain} for gain in gains]
    numbers = [f"{r}/{c}" for r in trained for c in ("mean", "difference", "low", "high")]
    evaluations = _page(
        "evaluation",
        order=f"metrics.`{gains[0]}`",
        ascending=False,
        columns=[*facts, *(f"metrics.`{name}`" for name in [*numbers, "nfe"])],
        sections=[
            _section(number, "Gain over the base model", [_scatter(gains[0]), *bars], columns=2)
        ],
    )
    # grouped curves against a metric are drawn at a wrong x by MLflow 3.17
    by_arm = {
        "aggregateFunction": "average",
        "groupByKeys": [{"mode": "tag", "groupByData": "arm"}],
    }
    return {
        TRAINING: ("Training runs", curves(("step", "metric"))),
        SEEDS: ("Means over seeds", curves(("step",)) | {"groupBy": by_arm}),
        EVALUATIONS: ("Evaluations", evaluations),
    }


def _page(
    kind: str,
    order: str,
    ascending: bool,
    columns: list[str],
    sections: list[tuple[JsonObject, list[JsonObject]]],
) -> JsonObject:
    """State of the runs page. Ordered by time, MLflow would fold all runs into their parents."""
    return {
        "searchFilter": f"tags.kind = '{kind}'",
        "orderByKey": order,
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "runsHiddenMode": "FIRST_20_RUNS",
        "compareRunSections": [section for section, _ in sections],
        "compareRunCharts": [chart for _, charts in sections for chart in charts],
        "isAccordionReordered": True,  # else MLflow orders sections by name
    }


def _section(
    number: Iterator[int], name: str, charts: list[JsonObject], columns: int
) -> tuple[JsonObject, list[JsonObject]]:
    """A section with its charts. Ids need only differ, and must not change between writings."""
    own = f"egrpo-{next(number)}"
    section = {
        "uuid": own,
        "name": name,
        "display": True,
        "isReordered": True,
        "columns": columns,
        "cardHeight": 360,
    }
    common = {
        "metricSectionId": own,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": 20,
    }
    return section, [{"uuid": f"egrpo-{next(number)}", **common, **chart} for chart in charts]


def _curve(metric: str, axis: str) -> JsonObject:
    """A metric against iterations (``axis`` step) or against network evaluations (metric)."""
    return {
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "xAxisKey": axis,
        "selectedXAxisMetricKey": "nfe" if axis == "metric" else "",
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
        "lineSmoothness": 0,
        "xAxisScaleType": "linear",
        "scaleType": "linear",
        "range": {},
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "ignoreOutliers": False,
    }


def _images() -> JsonObject:
    """Monitor grids with a slider over iterations."""
    return {"type": "IMAGE", "imageKeys": ["monitor"], "step": 0, "showRunParams": False}


def _scatter(metric: str) -> JsonObject:
    """A metric of evaluations against what training cost."""
    return {
        "type": "SCATTER",
        "xaxis": {"key": "nfe", "type": "METRIC"},
        "yaxis": {"key": metric, "type": "METRIC"},
        "runsCountToCompare": 100,
    }
