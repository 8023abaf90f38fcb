"""MLflow's browser interface on a study's store."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from egrpo.errors import UserError
from egrpo.store.files import read_json
from egrpo.study.resolve import Study
from egrpo.tracking.address import in_one_line, sqlite_file, study_uri
from egrpo.tracking.client import open_client
from egrpo.tracking.views import addresses, keep_default_view

START_WAIT = 120.0  # seconds; usually 5 to 8, once 36 were seen

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # spares 480 MB
    "MLFLOW_SQLALCHEMYSTORE_POOLCLASS": "NullPool",  # the default loses concurrent writes
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


def serve(store: Path, port: int, made_by: str, study: Study | None = None) -> None:
    """Serve the interface on 127.0.0.1 until Ctrl-C; for a server, only print its addresses.

    ``store`` is the file that ``prepare`` wrote, ``made_by`` the command for it, ``study`` says
    which runs are shown first; None: all of them. A free port is taken if the wanted one is in use.

    Raises:
        UserError: if there is no store yet, or MLflow does not start.
    """
    if not store.exists():
        raise UserError(f"{store}: no tracking store yet; `{made_by}` makes it")
    ids = read_json(store)
    uri, experiment = ids["uri"], ids["experiment_id"]
    file = sqlite_file(uri)
    if file is None:
        print(_pages(in_one_line(uri).rstrip("/"), experiment, store, study))
        return
    if not file.exists():
        raise UserError(f"{file}: no tracking store yet; `{made_by}` makes it")
    port = free_port(port)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = _start(uri, file, port)
    try:
        _wait_until_healthy(server, port)
        pages = _pages(f"http://127.0.0.1:{port}", experiment, store, study)
        print(f"{pages}\nCtrl-C ends it", flush=True)
        server.wait()
        raise UserError(f"MLflow ended by itself with status {server.returncode}")
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        _end(server)
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)


def _pages(server: str, experiment: str | None, store: Path, study: Study | None) -> str:
    """Addresses worth opening, each with what it shows."""
    if experiment is None:  # the server was away when the store was prepared
        return f"{server}/#/"
    default = study is not None and _has_default_view(read_json(store)["uri"], experiment, study)
    found = addresses(experiment, default=default, others=_others(store))
    return "\n".join(f"{server}/{page}\n    {what}" for page, what in found)


def _others(store: Path) -> list[str]:
    """Experiments of the other studies in the folder of results that report to the same store."""
    own = read_json(store)
    every = [read_json(file) for file in sorted(store.parent.parent.glob(f"*/{store.name}"))]
    ids = [ids["experiment_id"] for ids in every if ids["uri"] == own["uri"]]
    return [found for found in ids if found not in (None, own["experiment_id"])]


def _has_default_view(uri: str, experiment: str, study: Study) -> bool:
    """Whether the view of the study's default runs is there now; they may be all that it has."""
    if set(study.default_runs) >= set(study.runs):
        return False
    client = open_client(study_uri(study, uri))
    from mlflow.exceptions import MlflowException

    try:
        return keep_default_view(client, experiment, study.runs, study.default_runs)
    except (MlflowException, OSError):  # a server that is away, or lets this user write nothing
        return False


def free_port(wanted: int) -> int:
    """``wanted`` if nobody listens there, else one that is free."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return int(probe.getsockname()[1])
    raise UserError("no free port on 127.0.0.1")


def _start(uri: str, file: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, *"-m mlflow server --host 127.0.0.1 --workers 1".split()]
    command += ["--port", str(port), "--uvicorn-opts", "--log-level error"]
    command += ["--backend-store-uri", uri]
    command += ["--artifacts-destination", str(file.parent / "mlartifacts")]
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("MLFLOW_TRACKING_URI", None)
    # a session of its own: Ctrl-C reaches this process alone, which then ends the whole group
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL
    )


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_WAIT
    while time.monotonic() < end:
        if server.poll() is not None:
            raise UserError(f"MLflow did not start (status {server.returncode}); see above")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.3)
    raise UserError(f"MLflow did not answer on port {port} within {START_WAIT:.0f} s")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server's process group, by force after 5 s."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
            server.wait(timeout=5)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
