"""Everything on disk into MLflow, at the end of the workflow; running it again adds nothing."""

from __future__ import annotations

from pathlib import Path

from egrpo.errors import UserError
from egrpo.figures.style import INK, PALETTE
from egrpo.settings import without_password
from egrpo.store.files import read_json, write_json
from egrpo.store.tables import RESULTS, read_table
from egrpo.study.layout import Layout
from egrpo.tracking.address import in_one_line, study_uri
from egrpo.tracking.client import mark_superseded, open_client
from egrpo.tracking.deliver import finish, send_files, send_note
from egrpo.tracking.notes import STUDY_NOTE
from egrpo.tracking.prepare import ensure
from egrpo.tracking.publish_evaluation import send_evaluation
from egrpo.tracking.publish_run import publish_run


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
    study = at.study
    uri = study_uri(study, read_json(store)["uri"])
    later = "all results are on disk, running again delivers what is missing"
    try:
        ids = ensure(uri, study, timeout=60, retries=3)
    except ConnectionError as error:
        raise UserError(f"{error}; {later}") from None
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    client = open_client(uri, timeout=60, retries=3)
    experiment, parent = str(ids["experiment_id"]), str(ids["parent_run_id"])
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
        for run in {at.base(run.run): run for run in reversed(study.runs.values())}.values():
            send_evaluation(client, experiment, run, at, parent, INK)
        for folder in ("tables", "figures"):
            send_files(client, parent, folder, [at.root / folder])
        send_note(client, parent, STUDY_NOTE)
        finish(client, parent)
    except (MlflowException, RequestException) as error:
        raise UserError(f"{in_one_line(uri)}: {in_one_line(error)}; {later}") from None
    write_json(output, {**found, "uri": without_password(uri), "experiment_id": experiment})
