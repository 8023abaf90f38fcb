"""The tracking store, made once before any run uses it.

Several first users of a fresh SQLite file break the creation of its tables, so one rule does it.
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import TypedDict

from egrpo.errors import UserError
from egrpo.settings import without_password
from egrpo.store.files import alone, write_json
from egrpo.study.resolve import Study
from egrpo.tracking import client as tracking
from egrpo.tracking.views import keep_views


class Store(TypedDict):
    """Where a study's runs are tracked; ids are None while the server is away."""

    uri: str
    experiment_id: str | None
    parent_run_id: str | None


def prepare(study: Study, output: Path) -> None:
    """Make the store ready and write its address and ids to ``output`` (JSON).

    A server that is away is no error: whoever reaches it first creates what is missing.

    Raises:
        UserError: bad ``tracking.uri``; a SQLite file that is damaged or made by a newer MLflow;
            an experiment that was deleted in MLflow.
    """
    uri = study_uri(study, f"sqlite:///{study.results}/mlflow.db")
    try:
        store = ensure(uri, study)
    except ConnectionError as error:
        print(
            f"tracking: {error}; runs start all the same, their metrics are delivered later",
            file=sys.stderr,
        )
        store = Store(uri=without_password(uri), experiment_id=None, parent_run_id=None)
    write_json(output, store)


def study_uri(study: Study, default: str) -> str:
    """The one tracking URI of a study.

    Raises:
        UserError: if its runs name several.
    """
    found = {run.tracking.uri for run in study.runs.values()}
    if len(found) > 1:
        raise UserError("tracking.uri: all runs of a study report to one store; set it once")
    return tracking.resolve_uri(next(iter(found), None), default)


def ensure(uri: str, study: Study, timeout: int = 10, retries: int = 1) -> Store:
    """Tables, experiment, its views and parent run, each created only if missing.

    Args:
        timeout, retries: seconds and repetitions of each request to a server.

    Raises:
        UserError: as :func:`prepare`.
        ConnectionError: if the server cannot be reached or refuses, in one line.
    """
    tracking.configure(timeout, retries)
    from mlflow.exceptions import MlflowException

    file = tracking.sqlite_file(uri)
    if file is not None:
        _make_tables(uri, file)
    try:
        client = tracking.open_client(uri, timeout, retries)
        folder = tracking.artifact_folder(uri, study.name)
        experiment = tracking.find_or_create_experiment(client, study.name, folder)
        keep_views(client, experiment, study.runs.values())
        parent = tracking.find_or_create_study(client, experiment, study.name)
    except (MlflowException, OSError) as error:
        why = tracking.in_one_line(error)
        if file is not None:
            raise UserError(f"{file}: the tracking store cannot be used ({why})") from None
        raise ConnectionError(f"{tracking.in_one_line(uri)} does not answer ({why})") from None
    return Store(uri=without_password(uri), experiment_id=experiment, parent_run_id=parent)


def _make_tables(uri: str, file: Path) -> None:
    """What ``mlflow db upgrade`` does, one process at a time."""
    import mlflow.db
    from alembic.util.exc import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    file.parent.mkdir(parents=True, exist_ok=True)
    # two studies may share the file and start at the same time
    with alone(file.with_name(f".{file.name}.lock")):
        if not file.exists():
            file.touch()  # SQLite would make it without the group's right to write
        try:
            # asked first: SQLAlchemy would retry a damaged file for minutes
            with sqlite3.connect(file) as connection:
                connection.execute("PRAGMA schema_version").fetchone()
            connection.close()
            mlflow.db.upgrade.callback(uri)
        except (sqlite3.Error, SQLAlchemyError, MlflowException, CommandError) as error:
            raise UserError(
                f"{file}: cannot be used as tracking store ({tracking.in_one_line(error)}); move "
                "it away and run again: all results are on disk and are delivered again"
            ) from None
