"""The tracking store, made once before any run uses it.

Several first users of a fresh SQLite file break the creation of its tables, so one rule does it.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from egrpo.errors import UserError, say
from egrpo.settings import without_password
from egrpo.store.files import alone, write_json
from egrpo.study.resolve import Study
from egrpo.tracking.address import in_one_line, sqlite_file, study_uri
from egrpo.tracking.client import configure, find_or_create_study, open_client
from egrpo.tracking.views import keep_views


def prepare(study: Study, output: Path) -> None:
    """Make the store ready and write to ``output`` (JSON) its ``uri``, ``experiment_id`` and
    ``parent_run_id``.

    A server that is away is no error, its ids are null: whoever reaches it first creates what is
    missing.

    Raises:
        UserError: bad ``tracking.uri``; a SQLite file that is damaged or made by a newer MLflow;
            an experiment that was deleted in MLflow.
    """
    uri = study_uri(study)
    experiment, parent = None, None
    try:
        experiment, parent = ensure(uri, study)
    except ConnectionError as error:
        say(f"tracking: {error}; runs start all the same, their metrics are delivered later")
    ids = {"experiment_id": experiment, "parent_run_id": parent}
    write_json(output, {"uri": without_password(uri), **ids})


def ensure(uri: str, study: Study, timeout: int = 10, retries: int = 1) -> tuple[str, str]:
    """Tables, experiment, its views and parent run, each created only if missing; ids of these two.

    Raises:
        UserError: as :func:`prepare`.
        ConnectionError: if the server cannot be reached or refuses, in one line.
    """
    configure(timeout, retries)
    from mlflow.exceptions import MlflowException

    file = sqlite_file(uri)
    if file is not None:
        _make_tables(uri, file)
    try:
        client = open_client(uri, timeout, retries)
        experiment, parent = find_or_create_study(client, uri, study.name)
        keep_views(client, experiment, study.runs.values())
    except (MlflowException, OSError) as error:
        why = in_one_line(error)
        if file is not None:
            raise UserError(f"{file}: the tracking store cannot be used ({why})") from None
        raise ConnectionError(f"{in_one_line(uri)} does not answer ({why})") from None
    return experiment, parent


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
                f"{file}: cannot be used as tracking store ({in_one_line(error)}); move "
                "it away and run again: all results are on disk and are delivered again"
            ) from None
