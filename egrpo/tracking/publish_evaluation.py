"""One evaluation into MLflow: mean rewards, gains, tables of scores and images.

The base model's evaluation is a run beside those of trained models, so that MLflow's comparison of
tables shows the same prompt and noise before and after training.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egrpo.config.models import RunConfig
from egrpo.report.evaluations import Row
from egrpo.store.tables import SCORES, read_table
from egrpo.study.layout import Layout
from egrpo.tracking.client import find_or_create, keep_params, run_tags, settings
from egrpo.tracking.deliver import digest_of, finish, send_datasets, send_note, send_values
from egrpo.tracking.notes import evaluation_note
from egrpo.tracking.pictures import before_after, first_images, pair, scores_by_image

if TYPE_CHECKING:
    from mlflow import MlflowClient

ASKED = (
    *("evaluate.", "prompts.heldout", "prompts.column", "model.family", "model.path"),
    *("model.revision", "model.dtype", "model.height", "model.width", "model.guidance_scale"),
)
"""Settings that an evaluation is made with, by the beginnings of their keys."""


def send_evaluation(
    client: MlflowClient,
    experiment: str,
    run: RunConfig,
    at: Layout,
    parent: str,
    color: str,
    comparison: list[Row] | None = None,
    model: str | None = None,
) -> str:
    """A run below ``parent``, found by the contents of its scores; its id in MLflow.

    Args:
        color: of its bars and points, as `#0072B2`.
        comparison: rows of the comparison about it, for the gains; None: it is the evaluation of
            the base model that the run is compared with.
        model: MLflow's id of the logged model that was evaluated.
    """
    base = at.base(run.run)
    folder, name, tags = at.run(run.run), f"{run.run}/evaluation", run_tags(run, parent)
    if comparison is None:
        tags = dict.fromkeys(("run", "arm", "method"), "base") | {"mlflow.parentRunId": parent}
        folder, name = base, "base/evaluation"
    file = folder / "scores.parquet"
    record = find_or_create(client, experiment, "evaluation", digest_of(file), name, tags)
    run_id: str = record.info.run_id
    scores = read_table(file, SCORES).to_pylist()
    asked = {k: v for k, v in settings(run).items() if k.startswith(ASKED)}
    keep_params(client, record, {"run": tags["run"], **asked})
    send_note(client, run_id, evaluation_note(run, scores, comparison))
    send_values(client, record, _values(scores, comparison or []), model)
    heldout = {Path(run.prompts.heldout): "evaluation"}
    send_datasets(client, run_id, heldout, run.prompts.column)
    _send_tables(client, run_id, scores, run, folder, base)
    finish(client, run_id, color)
    return run_id


def _send_tables(
    client: MlflowClient, run_id: str, scores: list[Row], run: RunConfig, folder: Path, base: Path
) -> None:
    """Tables as MLflow compares them: the first one, by its first column, showing its last."""
    from mlflow import Image as Shown

    held = {f.path for f in client.list_artifacts(run_id)}
    shown, trained = run.evaluate.grid_prompts, tuple(run.train.rewards)
    by_image = scores_by_image(scores, trained)
    if "images.json" not in held:  # log_table appends to one that is there
        first = first_images(folder, shown)
        table = {
            "prompt": [prompt for _, prompt in first],
            "samples": [Shown(pair(*of, own, by_image)) for of, own in first.items()],
        }
        client.log_table(run_id, table, "images.json")
    if "scores.json" not in held:
        client.log_table(run_id, _scores_table(scores, trained), "scores.json")
    if "before_after.png" not in held and folder != base:
        untrained = read_table(base / "scores.parquet", SCORES).to_pylist()
        both = {base: scores_by_image(untrained, trained), folder: by_image}
        client.log_image(run_id, before_after(base, folder, shown, both), "before_after.png")


def _values(scores: list[Row], comparison: list[Row]) -> dict[str, float | None]:
    """Metrics of an evaluation: ``<reward>/mean``, what the comparison says of it, and the cost."""
    valid: dict[str, list[float]] = defaultdict(list)
    for row in scores:
        if row["value"] is not None:
            valid[row["reward"]].append(row["value"])
    values: dict[str, float | None] = {
        f"{reward}/mean": sum(found) / len(found) for reward, found in valid.items()
    }
    for row in comparison:
        for column in ("difference", "low", "high"):
            values[f"{row['reward']}/{column}"] = row[column]
        values["nfe"] = row["nfe"]
    return values


def _scores_table(scores: list[Row], first: tuple[str, ...]) -> dict[str, list[Any]]:
    """One row an image, named by prompt and sample, and a column for each reward."""
    rewards = sorted({row["reward"] for row in scores}, key=lambda r: (r not in first, r))
    values = {(r["prompt_id"], r["sample"], r["reward"]): r["value"] for r in scores}
    rows = sorted({(r["prompt_id"], r["sample"], r["prompt"]) for r in scores})
    return {
        "prompt [sample]": [f"{prompt} [{sample}]" for _, sample, prompt in rows],
        **{reward: [values.get((i, s, reward)) for i, s, _ in rows] for reward in rewards},
        "prompt_id": [prompt_id for prompt_id, _, _ in rows],
        "sample": [sample for _, sample, _ in rows],
    }
