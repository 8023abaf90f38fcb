"""Addresses of tracking stores: which are taken, and how they are shown."""

from __future__ import annotations

import os
import re
from importlib.metadata import entry_points
from pathlib import Path

from egrpo.errors import UserError
from egrpo.settings import without_password
from egrpo.study.resolve import Study

DATABASES = ("postgresql", "mysql", "mssql")
"""Kinds of databases that MLflow can track in, besides SQLite."""


def study_uri(study: Study, default: str | None = None) -> str:
    """The one tracking URI of a study; ``default`` None is the SQLite file among its results.

    Raises:
        UserError: if its runs name several; see :func:`resolve_uri`.
    """
    found = {run.tracking.uri for run in study.runs.values()}
    if len(found) > 1:
        raise UserError("tracking.uri: all runs of a study report to one store; set it once")
    return resolve_uri(next(iter(found), None), default or f"sqlite:///{study.results}/mlflow.db")


def resolve_uri(setting: str | None, default: str) -> str:
    """The tracking URI: ``tracking.uri``, else MLFLOW_TRACKING_URI, else ``default``.

    Raises:
        UserError: if MLflow does not know it here: a folder, another kind of address, or a
            database without its driver.
    """
    uri = setting or os.environ.get("MLFLOW_TRACKING_URI") or default
    where = "tracking.uri" if setting else "MLFLOW_TRACKING_URI"
    kind = uri.partition("://")[0] if "://" in uri else "file"
    plugins = {found.name for found in entry_points(group="mlflow.tracking_store")} - {"file"}
    if kind.partition("+")[0] in DATABASES:
        _check_driver(uri, where)
    elif kind not in ("http", "https", "sqlite", *plugins):
        raise UserError(
            f"{where}: {without_password(uri)!r} is neither http(s)://host:port nor "
            f"sqlite:///file.db, nor a database ({', '.join(DATABASES)})"
        )
    return uri


def _check_driver(uri: str, where: str) -> None:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    shown = without_password(uri)
    try:
        make_url(uri).get_dialect().import_dbapi()
    except ImportError as error:
        raise UserError(
            f"{where}: {shown}: the Python package {error.name}, which speaks to it, is not "
            "installed; install it, or track on a server (http://host:port)"
        ) from None
    except (ArgumentError, ValueError):
        raise UserError(f"{where}: {shown}: not the address of a database") from None


def sqlite_file(uri: str) -> Path | None:
    """The file behind a SQLite URI, None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def artifact_folder(uri: str, study: str) -> str | None:
    """Where a study's artifacts go: beside a SQLite file, or None where the server decides."""
    file = sqlite_file(uri)
    # as a URI: in a plain path MLflow would read %20 as a space
    return (file.parent / "mlartifacts" / study).absolute().as_uri() if file else None


def in_one_line(error: BaseException | str) -> str:
    """First line of a message, shortened, without the password of a URL."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    # a password may hold a slash or an @
    text = re.sub(r"\w+://\S+", lambda address: without_password(address[0]), text)
    return text if len(text) <= 200 else text[:197] + "..."
