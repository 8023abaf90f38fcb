"""One training run into MLflow: curves, grids, inputs, settings, adapter, description."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.planning.trees import needs_plan
from egrpo.store import journal
from egrpo.store.files import read_json
from egrpo.store.tables import TRAIN_METRICS, read_table
from egrpo.study.layout import Layout
from egrpo.study.sharing import shown_yaml, without_secrets
from egrpo.tracking.client import find_or_create_run, tag_warnings
from egrpo.tracking.curves import deliver, images_held, send_images
from egrpo.tracking.deliver import (
    finish,
    send_datasets,
    send_files,
    send_model,
    send_note,
    send_text,
)
from egrpo.tracking.notes import run_note
from egrpo.tracking.publish_evaluation import send_evaluation
from egrpo.train.warnings import warnings_in

if TYPE_CHECKING:
    from mlflow import MlflowClient

Row = dict[str, Any]


def publish_run(
    client: MlflowClient,
    experiment: str,
    run: RunConfig,
    at: Layout,
    parent: str,
    comparison: list[Row],
    colour: str,
) -> tuple[str, str]:
    """Deliver what is missing of a training run and of its evaluation.

    Args:
        at: where the study's results lie.
        parent: MLflow's id of the study's run.
        comparison: rows of the comparison about this run.
        colour: of its curves, as `#0072B2`.

    Returns:
        MLflow's ids of the training run and of its evaluation.

    Raises:
        UserError: if a result is missing.
    """
    folder = at.run(run.run)
    key = read_json(folder / "train.json").get("key")
    if not key:
        raise UserError(f"{folder / 'train.json'}: `key` is missing; train the run again")
    run_id = find_or_create_run(client, experiment, run, key, parent)
    deliver(client, run_id, _lines(at, run.run, key))
    send_images(client, run_id, folder / "monitor", images_held(client, run_id))
    tag_warnings(client, run_id, warnings_in(folder / "metrics.parquet", run))
    inputs = {Path(run.prompts.train): "training", Path(run.prompts.heldout): "monitoring"}
    if needs_plan(run) and at.profile(run.run).exists():
        inputs[at.profile(run.run)] = "planning"
    send_datasets(client, run_id, inputs, run.prompts.column)
    send_text(client, run_id, "config.yaml", shown_yaml(run, *without_secrets(run)))
    records = [folder / f for f in ("plan.json", "train.json")]
    send_files(client, run_id, "", [f for f in records if f.exists()])
    model = send_model(client, experiment, run_id, run, folder / "adapter")
    given = run, at, run_id, colour, comparison, model
    evaluation = send_evaluation(client, experiment, *given)
    send_note(client, run_id, run_note(run, comparison, model))
    finish(client, run_id, colour)
    return run_id, evaluation


def _lines(at: Layout, run: str, key: str) -> list[Row]:
    """The table of metrics as journal lines, with the journal's times while it exists.

    Equal times let MLflow itself refuse a second copy of what a slow server took late.
    """
    log = at.state(run) / key / "journal.jsonl"
    times = {line["iteration"]: line.get("time") for line in journal.read(log)}
    file = at.run(run) / "metrics.parquet"
    lines: dict[int, Row] = {}
    for row in read_table(file, TRAIN_METRICS).to_pylist():
        step = row["iteration"]
        stamp = times.get(step) or file.stat().st_mtime
        new = {"iteration": step, "time": stamp, "nfe": row["nfe"], "metrics": {}}
        lines.setdefault(step, new)["metrics"][row["metric"]] = row["value"]
    return list(lines.values())
