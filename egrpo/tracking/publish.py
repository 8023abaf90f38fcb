"""Everything on disk into MLflow, at the end of the workflow; running it again adds nothing."""

from __future__ import annotations

from pathlib import Path

from egrpo.errors import UserError
from egrpo.figures.style import INK, PALETTE
from egrpo.settings import without_password
from egrpo.store.files import read_json, write_json
from egrpo.store.tables import RESULTS, read_table
from egrpo.study.layout import Layout
from egrpo.tracking import client as tracking
from egrpo.tracking.deliver import finish, send_files, send_note
from egrpo.tracking.notes import STUDY_NOTE
from egrpo.tracking.prepare import ensure, study_uri
from egrpo.tracking.publish_evaluation import EvaluationFiles, send_evaluation
from egrpo.tracking.publish_run import publish_run
from egrpo.tracking.superseded import mark_superseded


def publish(at: Layout, store: Path, table: Path, output: Path) -> None:
    """Deliver what is missing of every run, its evaluation, and the study's tables and figures.

    Args:
        at: the study, and where its results lie.
        store: JSON file written by ``prepare``.
        table: comparison of the study's runs with their base.
        output: JSON file: run id -> MLflow's run id, and ``uri``, ``experiment_id``.

    Raises:
        UserError: a result is missing, or the server is away.
    """
    uri = study_uri(at.study, read_json(store)["uri"])
    try:
        ids = ensure(uri, at.study, timeout=60, retries=3)
    except ConnectionError as error:
        raise _away(str(error)) from None
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    client = tracking.open_client(uri, timeout=60, retries=3)
    experiment, parent = str(ids["experiment_id"]), str(ids["parent_run_id"])
    study = at.study
    comparison = read_table(table, RESULTS).to_pylist()
    found: dict[str, str] = {}
    current: set[str] = set()
    try:
        for number, (name, run) in enumerate(study.runs.items()):
            own = [row for row in comparison if row["run"] == name]
            colour = PALETTE[number % len(PALETTE)]
            sent = publish_run(client, experiment, run, at, parent, own, colour)
            found[name] = sent[0]
            current.update(sent)
        mark_superseded(client, experiment, study.runs, current)
        bases = [EvaluationFiles.base(run, at) for run in study.runs.values()]
        for base in {files.folder: files for files in reversed(bases)}.values():
            send_evaluation(client, experiment, base, parent, INK)
        for folder in ("tables", "figures"):
            send_files(client, parent, folder, [at.root / folder])
        send_note(client, parent, STUDY_NOTE)
        finish(client, parent)
    except (MlflowException, RequestException) as error:
        raise _away(f"{tracking.in_one_line(uri)}: {tracking.in_one_line(error)}") from None
    write_json(output, {**found, "uri": without_password(uri), "experiment_id": experiment})


def _away(text: str) -> UserError:
    return UserError(f"{text}; all results are on disk, running again delivers what is missing")
