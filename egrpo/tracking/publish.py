"""Everything on disk into MLflow, at the end of the workflow; running it again adds nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.figures.style import INK, PALETTE
from egrpo.planning.trees import needs_plan
from egrpo.report.evaluations import Row
from egrpo.settings import without_password
from egrpo.store import journal
from egrpo.store.files import read_json, write_json
from egrpo.store.tables import RESULTS, TRAIN_METRICS, read_table
from egrpo.study.layout import Layout
from egrpo.study.sharing import shown_yaml, without_secrets
from egrpo.tracking import deliver as once
from egrpo.tracking.address import in_one_line, study_uri
from egrpo.tracking.client import find_or_create_run, mark_superseded, open_client, tag_warnings
from egrpo.tracking.curves import deliver, images_held, send_images
from egrpo.tracking.notes import STUDY_NOTE, run_note
from egrpo.tracking.prepare import ensure
from egrpo.tracking.publish_evaluation import send_evaluation
from egrpo.train.warnings import warnings_in

if TYPE_CHECKING:
    from mlflow import MlflowClient


def publish(at: Layout, store: Path, table: Path, output: Path) -> None:
    """Deliver what is missing of every run, its evaluation, and the study's tables and figures.

    ``store`` is the file that ``prepare`` wrote, ``table`` compares the runs with their base.
    ``output`` is JSON: run id -> MLflow's run id, and ``uri``, ``experiment_id``.

    Raises:
        UserError: a result is missing, or the server is away.
    """
    study = at.study
    uri = study_uri(study, read_json(store)["uri"])
    later = "all results are on disk, running again delivers what is missing"
    try:
        experiment, parent = ensure(uri, study, timeout=60, retries=3)
    except ConnectionError as error:
        raise UserError(f"{error}; {later}") from None
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    client = open_client(uri, timeout=60, retries=3)
    comparison = read_table(table, RESULTS).to_pylist()
    found: dict[str, str] = {}
    current: set[str] = set()
    try:
        for number, (name, run) in enumerate(study.runs.items()):
            own = [row for row in comparison if row["run"] == name]
            color = PALETTE[number % len(PALETTE)]
            sent = publish_run(client, experiment, run, at, parent, own, color)
            found[name] = sent[0]
            current.update(sent)
        mark_superseded(client, experiment, study.runs, current)
        for run in {at.base(run.run): run for run in reversed(study.runs.values())}.values():
            send_evaluation(client, experiment, run, at, parent, INK)
        for folder in ("tables", "figures"):
            once.send_files(client, parent, folder, [at.root / folder])
        once.send_note(client, parent, STUDY_NOTE)
        once.finish(client, parent)
    except (MlflowException, RequestException) as error:
        raise UserError(f"{in_one_line(uri)}: {in_one_line(error)}; {later}") from None
    write_json(output, {**found, "uri": without_password(uri), "experiment_id": experiment})


def publish_run(
    client: MlflowClient,
    experiment: str,
    run: RunConfig,
    at: Layout,
    parent: str,
    comparison: list[Row],
    color: str,
) -> tuple[str, str]:
    """Deliver what is missing of a training run and of its evaluation; their ids in MLflow.

    ``parent`` is MLflow's id of the study's run, ``comparison`` has the rows about this one,
    ``color`` is that of its curves, as `#0072B2`.
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
    once.send_datasets(client, run_id, inputs, run.prompts.column)
    once.send_text(client, run_id, "config.yaml", shown_yaml(run, *without_secrets(run)))
    records = [folder / f for f in ("plan.json", "train.json")]
    once.send_files(client, run_id, "", [f for f in records if f.exists()])
    model = once.send_model(client, experiment, run_id, run, folder / "adapter")
    evaluation = send_evaluation(client, experiment, run, at, run_id, color, comparison, model)
    once.send_note(client, run_id, run_note(run, comparison, model))
    once.finish(client, run_id, color)
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
