"""MLflow as it is used: a real SQLite store, and a real server behind a switchable proxy."""

from __future__ import annotations

import base64
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, modes_by, small_run, wait_for
from PIL import Image
from tracked import (
    HARMLESS_OPTIONS,
    SECRET_OPTIONS,
    SECRETS,
    SERVICE,
    TRACKING,
    found_in,
    line,
    picture,
    prompts_of,
    results_of,
    run_config,
    study_of,
    write_evaluation,
    write_metrics,
)

from egrpo.config.keys import tracking_key
from egrpo.config.load import load_run
from egrpo.config.measuring import Tracking
from egrpo.config.models import Model, RunConfig
from egrpo.config.rewards import Custom, Remote, Verifier
from egrpo.config.table import Row
from egrpo.errors import UserError
from egrpo.ops import doctor
from egrpo.settings import without_password
from egrpo.store import journal
from egrpo.store.files import read_json, write_json, write_text
from egrpo.study.layout import Layout
from egrpo.study.resolve import Study, resolve_run
from egrpo.tracking import address, curves, live, pictures
from egrpo.tracking import client as tracking
from egrpo.tracking.client import open_client
from egrpo.tracking.curves import deliver
from egrpo.tracking.deliver import digest_of
from egrpo.tracking.live import LiveTracker
from egrpo.tracking.prepare import prepare
from egrpo.tracking.publish import publish, publish_run
from egrpo.tracking.ui import free_port, serve
from egrpo.tracking.views import keep_default_view

REQUEST_TIMEOUT = 10.0
"""Seconds of `tracking.configure`: whatever waits for a server that hangs takes at least that."""


def curve(client: Any, run_id: str) -> Counter[tuple[str, int]]:
    """How often each (metric, step) is stored, the machine's load left out."""
    names = [n for n in client.get_run(run_id).data.metrics if not n.startswith("system/")]
    return Counter((n, m.step) for n in names for m in client.get_metric_history(run_id, n))


def once(*iterations: int) -> Counter[tuple[str, int]]:
    names = ("reward/verifier", "loss", "nfe", "iteration_done")
    return Counter((name, i) for i in iterations for name in names)


def opened(store: Path) -> tuple[Any, str]:
    """A client of a prepared store, and the id of its experiment."""
    ids = read_json(store)
    return open_client(ids["uri"]), ids["experiment_id"]


def train_run(client: Any, store: Path) -> str:
    (found,) = client.search_runs([read_json(store)["experiment_id"]], "tags.kind = 'train'")
    return str(found.info.run_id)


def new_run(store: Path, key: str = "k", **fields: Any) -> tuple[Any, str]:
    client, experiment = opened(store)
    parent = read_json(store)["parent_run_id"]
    run = run_config(**fields)
    return client, tracking.find_or_create_run(client, experiment, run, key, parent)


def published(study: Study, store: Path) -> Path:
    """All of a study delivered; the file that says so."""
    at, out = Layout(study), store.with_name("published.json")
    publish(at, store, at.comparison, out)
    return out


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")


@pytest.fixture(scope="module")
def tables_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: MLflow's migrations take 6 s, once is enough.

    Where a group shares its files, its members may write the store too.
    """
    folder = tmp_path_factory.mktemp("template")
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    with modes_by(0o007, folder):
        prepare(study_of(folder), folder / "first.json")
    client, experiment = opened(folder / "first.json")
    client.rename_experiment(experiment, "template")  # its artifacts lie elsewhere
    return folder / "results" / "mlflow.db"


def store_in(folder: Path, tables_file: Path) -> Path:
    (folder / "results").mkdir(parents=True)
    shutil.copy(tables_file, folder / "results" / "mlflow.db")
    prepare(study_of(folder), folder / "store.json")
    return folder / "store.json"


@pytest.fixture
def store(tmp_path: Path, tables_file: Path) -> Path:
    """A prepared store of the study `small` on a SQLite file of its own."""
    return store_in(tmp_path, tables_file)


def test_preparing_twice_changes_nothing(store: Path, tmp_path: Path) -> None:
    first = read_json(store)
    prepare(study_of(tmp_path), store)
    assert read_json(store) == first
    client = open_client(first["uri"])
    (run,) = client.search_runs([first["experiment_id"]])
    assert run.info.run_id == first["parent_run_id"]
    assert run.data.tags["egrpo.kind"] == "study"
    location = client.get_experiment(first["experiment_id"]).artifact_location
    assert location.endswith("/results/mlartifacts/small")


def test_artifacts_lie_beside_the_store_whatever_its_folder_is_called(
    tables_file: Path, tmp_path: Path
) -> None:
    """MLflow decodes %41 in a plain path, and would write to a folder of another name."""
    folder = tmp_path / "50%41 #1; ü"
    store = store_in(folder, tables_file)
    opened(store)[0].log_text(read_json(store)["parent_run_id"], "text", "note.txt")
    assert list(tmp_path.iterdir()) == [folder]
    assert {path.name for path in folder.rglob("*")} >= {"mlflow.db", "note.txt", "mlartifacts"}


def test_a_deleted_experiment_is_named(store: Path, tmp_path: Path) -> None:
    client, experiment = opened(store)
    client.delete_experiment(experiment)
    remedy = f"'small' is deleted.*--experiment-id {experiment}"
    with pytest.raises(UserError, match=remedy):
        prepare(study_of(tmp_path), store)


def test_a_damaged_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mlflow.db").write_text("not a database " * 100)
    with pytest.raises(UserError, match=r"mlflow\.db: cannot be used.*move it away"):
        prepare(study_of(tmp_path), tmp_path / "store.json")
    with pytest.raises(UserError, match=r"tracking\.uri: 'mlruns'"):
        prepare(study_of(tmp_path, run_config(uri="mlruns")), tmp_path / "store.json")
    two = run_config("a", "http://127.0.0.1:1"), run_config("b", "http://127.0.0.1:2")
    with pytest.raises(UserError, match="one store"):
        prepare(study_of(tmp_path, *two), tmp_path / "store.json")


def test_a_server_that_is_away_does_not_stop_the_workflow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port(0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    start = time.monotonic()
    prepare(study_of(tmp_path, run_config()), tmp_path / "store.json")
    assert time.monotonic() - start < 4 * REQUEST_TIMEOUT
    assert read_json(tmp_path / "store.json") == {
        "uri": f"http://127.0.0.1:{port}",
        "experiment_id": None,
        "parent_run_id": None,
    }
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not answer" in error
    assert "secret" not in error


def test_a_run_is_found_by_its_key_and_params_are_logged_once(store: Path) -> None:
    long = "/".join(["weights"] * 1000)
    client, run_id = new_run(store, model=Model(path=long))
    value = client.get_run(run_id).data.params["model.path"]
    assert len(value) == 6000
    assert value.endswith(f"... [cut, {len(long)} characters]")
    assert new_run(store, model=Model(path=long))[1] == run_id
    assert new_run(store, key="other")[1] != run_id
    assert not any(k.startswith("tracking") for k in client.get_run(run_id).data.params)


def test_null_and_nan_are_left_out_and_bad_names_are_mended(store: Path) -> None:
    client, run_id = new_run(store)
    odd = {"a": None, "b": float("nan"), "reward/x(1)": 1.0, "c//d": 2.0}
    assert deliver(client, run_id, [line(1, **odd)]) == 1
    assert curve(client, run_id) == once(1) + Counter([("reward/x_1_", 1), ("c/d", 1)])


def test_more_metrics_than_a_batch_holds(store: Path) -> None:
    client, run_id = new_run(store)
    many, known = {f"m{i}": float(i) for i in range(700)}, curves.Held()
    assert deliver(client, run_id, [line(1, **many), line(2, **many)], known) == 2
    assert known.done == {1, 2}
    assert len(client.get_run(run_id).data.metrics) == 704
    assert [m.step for m in client.get_metric_history(run_id, "m699")] == [1, 2]


def test_a_half_delivered_iteration_is_completed(store: Path) -> None:
    from mlflow.entities import Metric

    client, run_id = new_run(store)
    deliver(client, run_id, [line(1)])
    client.log_batch(run_id, metrics=[Metric("loss", -0.5, 1, 2), Metric("nfe", 200.0, 1, 2)])
    # the resumed journal reaches iteration 2 only at a later delivery on the same connection
    known = curves.held(client, run_id)
    assert deliver(client, run_id, [line(1)], known) == 0
    assert deliver(client, run_id, [line(1), line(2)], known) == 1
    assert curve(client, run_id) == once(1, 2)


PASSWORD = "planted-pass"


@pytest.mark.parametrize(
    ("uri", "plain"),
    [
        ("http://host:5000", "http://host:5000"),
        (f"http://me:{PASSWORD}@host:5000/x", "http://host:5000/x"),
        (f"https://{PASSWORD}@host", "https://host"),
        (f"http://me:{PASSWORD}/a@b?c@host/x", "http://host/x"),
        (f"postgresql://me:{PASSWORD}@host/db", "postgresql://me@host/db"),
        ("postgresql://me@host/db?sslmode=require", "postgresql://me@host/db?sslmode=require"),
        (f"postgresql://host/db?user=me&password={PASSWORD}", "postgresql://host/db"),
        (f"mssql+pyodbc:///?odbc_connect=UID%3Dme%3BPWD%3D{PASSWORD}", "mssql+pyodbc:///"),
        ("sqlite:////a@b:c/mlflow.db", "sqlite:////a@b:c/mlflow.db"),
        (f"me:{PASSWORD}@host", "host"),
    ],
)
def test_settings_hold_no_password_of_tracking(uri: str, plain: str) -> None:
    assert without_password(uri) == plain
    if "://" in uri:
        assert PASSWORD not in address.in_one_line(f"cannot connect to {uri}, no route")
    if uri == plain:
        assert small_run(**{"tracking.uri": uri}).tracking.uri == uri
        return
    shared = small_run().model_dump(exclude={"run", "method", "arm"}) | {"tracking": {"uri": uri}}
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as told:
        resolve_run(shared, {}, Row("a", {}), "study.yaml", "runs.tsv")
    assert str(told.value).startswith("study.yaml: tracking.uri: holds a user or a password")
    assert PASSWORD not in str(told.value)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"postgresql://me:{PASSWORD}@host/db", "the Python package psycopg2, which speaks to it"),
        (f"mysql+pymysql://me:{PASSWORD}@host/db", "the Python package pymysql, which speaks to"),
        (f"foo://me:{PASSWORD}@host", "'foo://me@host' is neither http"),
        (f"postgresql+foo://me:{PASSWORD}@host", "postgresql+foo://me@host: not the address of a"),
        ("mlruns", "'mlruns' is neither http"),
        ("file:///mlruns", "'file:///mlruns' is neither http"),
    ],
)
def test_an_address_that_cannot_be_used_is_said_before_training(
    uri: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: ") as told:
        prepare(study_of(tmp_path), tmp_path / "store.json")
    assert message in str(told.value)
    assert PASSWORD not in str(told.value)
    off = study_of(tmp_path, run_config().model_copy(update={"tracking": Tracking(enabled=False)}))
    with pytest.raises(UserError) as again:
        list(doctor._tracking(off))
    assert str(again.value) == str(told.value)


def test_the_password_of_a_server_is_used_and_written_nowhere(
    server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:{server}")
    run = run_config(prompts=prompts_of(tmp_path)).model_copy(update={"study": "secret"})
    study = replace(results_of(tmp_path, run), name="secret")
    (tmp_path / "results/small").rename(tmp_path / "results/secret")
    store, log, key = tmp_path / "store.json", tmp_path / "journal.jsonl", tracking_key(run)
    prepare(study, store)
    with LiveTracker(run, "k", store, log, tmp_path):
        journal.append(log, line(0))
    for file in (store, published(study, store)):
        assert read_json(file)["uri"] == f"http://127.0.0.1:{server}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{PASSWORD}@127.0.0.1:9")
    prepare(study, tmp_path / "away.json")  # says that the server is away
    assert found_in(tmp_path, [PASSWORD]) == []
    said = capsys.readouterr()
    assert "http://127.0.0.1:9 does not answer" in said.err
    assert PASSWORD not in said.out + said.err
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server}")
    assert tracking_key(run) == key, "no digest tells a password either"


def test_live_metrics_and_images_arrive_while_the_journal_grows(
    store: Path, tmp_path: Path
) -> None:
    log, images, run = tmp_path / "journal.jsonl", tmp_path / "monitor", run_config()
    client, experiment = opened(store)
    with LiveTracker(run, "k", store, log, images):
        for i in range(3):
            journal.append(log, line(i))
        picture(images / "iteration-000002.png")
        (images / "iteration-000003.png").write_bytes(b"damaged")
        wait_for(lambda: len(client.search_runs([experiment], "metrics.iteration_done = 2")) == 1)
        run_id = train_run(client, store)
        assert client.get_run(run_id).info.status == "RUNNING"
        journal.append(log, line(3))
    assert client.get_run(run_id).info.status == "FINISHED"
    assert curve(client, run_id) == once(0, 1, 2, 3)
    assert "system/cpu_utilization_percentage" in client.get_run(run_id).data.metrics
    # started again: nothing to do, nothing sent
    with LiveTracker(run, "k", store, log, images):
        pass
    assert curve(client, run_id) == once(0, 1, 2, 3)
    assert curves.images_held(client, run_id) == {2}
    assert len(client.list_artifacts(run_id, "images")) == 2  # full size and small


def test_killed_rewound_and_resumed_sends_each_value_once(store: Path, tmp_path: Path) -> None:
    from mlflow.entities import Metric

    log, run = tmp_path / "journal.jsonl", run_config()
    for i in range(8):
        journal.append(log, line(i))
    with pytest.raises(KeyboardInterrupt), LiveTracker(run, "k", store, log, tmp_path):
        raise KeyboardInterrupt
    client, _ = opened(store)
    run_id = train_run(client, store)
    assert client.get_run(run_id).info.status == "KILLED"
    assert curve(client, run_id) == once(*range(8))
    client.log_batch(run_id, metrics=[Metric("loss", -2.0, 1, 8)])  # killed within a batch
    with open(log, "a") as handle:
        handle.write('{"iteration": 8, "ti')  # and within a line
    journal.rewind(log, 4)
    with LiveTracker(run, "k", store, log, tmp_path):
        time.sleep(0.3)
        for i in range(5, 12):
            journal.append(log, line(i))
            time.sleep(0.05)
    assert curve(client, run_id) == once(*range(12))
    assert client.get_run(run_id).info.status == "FINISHED"


def test_warnings_are_a_tag_while_training_and_after(store: Path, tmp_path: Path) -> None:
    run = run_config(prompts=prompts_of(tmp_path))
    study, log = results_of(tmp_path, run), tmp_path / "journal.jsonl"
    client, run_id = new_run(store, prompts=run.prompts)

    def tag() -> str | None:
        return client.get_run(run_id).data.tags.get("warnings")

    def deliver_again() -> str | None:
        published(study, store)
        return tag()

    with LiveTracker(run, "k", store, log, tmp_path / "monitor") as tracker:
        tracker.warnings = ("equal_rewards", "bound/reward/verifier")
        wait_for(lambda: tag() == "equal_rewards,bound/reward/verifier")
        tracker.warnings = ()
        wait_for(lambda: tag() is None)
        tracker.warnings = ("unmoved",)
    assert tag() == "unmoved"
    assert deliver_again() is None  # what it ended with counts
    masked = line(1, groups=4.0, groups_masked=4.0, grad_norm=0.0)
    write_metrics(tmp_path / "results/small/runs/a", [line(0), masked])
    assert deliver_again() == "equal_rewards"
    found = client.search_runs([read_json(store)["experiment_id"]], "tags.warnings LIKE '%equal%'")
    assert [r.info.run_id for r in found] == [run_id]


def test_rewound_while_it_is_read(tmp_path: Path) -> None:
    log = tmp_path / "journal.jsonl"
    tail = live.Tail(log)
    assert tail.read() == ([], False)
    for i in range(4):
        journal.append(log, line(i))
    first, again = tail.read()
    assert again
    assert [x["iteration"] for x in first] == [0, 1, 2, 3]
    assert "rollouts" not in first[0]
    assert tail.read() == ([], False)
    journal.rewind(log, 1)
    journal.append(log, line(2))
    lines, again = tail.read()
    assert (again, [x["iteration"] for x in lines]) == (True, [0, 1, 2])


# ---------------------------------------------------------------- a server


class Proxy:
    """Forwards to a server, or hangs, or is away: the states of a real server, at once."""

    def __init__(self, port: int) -> None:
        self.target, self.state = port, "up"
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _accept(self) -> None:
        self.kept = []
        while True:
            inner, _ = self.socket.accept()
            if self.state == "away":
                inner.close()
            elif self.state == "hang":
                self.kept.append(inner)
            else:
                outer = socket.create_connection(("127.0.0.1", self.target))
                for pair in ((inner, outer), (outer, inner)):
                    threading.Thread(target=self._copy, args=pair, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.state != "up":
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def server(tables_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real MLflow server, started and ended as `make ui` does; its port."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "results").mkdir()
    shutil.copy(tables_file, folder / "results" / "mlflow.db")
    ids = {"uri": "sqlite:///results/mlflow.db", "experiment_id": "1", "parent_run_id": None}
    write_json(folder / "store.json", ids)
    code = (  # nohup has the interrupt ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from egrpo.tracking.ui import serve; from pathlib import Path\n"
        "serve(Path('store.json'), 5000, '')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None
    address = job.stdout.readline()
    match = re.match(r"http://127\.0\.0\.1:(\d+)/#/experiments/1/runs\?workflowType=", address)
    assert match, address
    yield int(match[1])
    job.send_signal(signal.SIGINT)
    assert job.wait(timeout=120) == 0
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(match[1])), timeout=2)
    assert not (folder / "mlruns").exists()


def server_study(folder: Path, proxy: Proxy, name: str) -> tuple[RunConfig, Study, Path]:
    run = run_config(uri=proxy.uri).model_copy(update={"study": name})
    return run, Study(name, str(folder / "results"), {"a": run}), folder / "store.json"


def test_a_server_away_and_back(
    server: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy, log = Proxy(server), tmp_path / "journal.jsonl"
    run, study, store = server_study(tmp_path, proxy, "away")
    proxy.state = "away"
    prepare(study, store)
    assert read_json(store)["experiment_id"] is None
    capsys.readouterr()
    with LiveTracker(run, "k", store, log, tmp_path):
        slowest = 0.0
        for i in range(10):
            start = time.monotonic()
            journal.append(log, line(i))
            slowest = max(slowest, time.monotonic() - start)
            time.sleep(0.05)
        assert slowest < REQUEST_TIMEOUT / 2, "an append waited for the server"
        proxy.state = "up"
        client = open_client(proxy.uri)
        wait_for(lambda: client.get_experiment_by_name("away") is not None)
        experiment = client.get_experiment_by_name("away").experiment_id
        wait_for(lambda: len(client.search_runs([experiment], "metrics.iteration_done = 9")) == 1)
        proxy.state = "away"
        journal.append(log, line(10))
        time.sleep(0.5)
        proxy.state = "up"
        journal.append(log, line(11))
    (found,) = client.search_runs([experiment], "tags.kind = 'train'")
    assert curve(client, found.info.run_id) == once(*range(12))
    assert found.info.status == "FINISHED"
    said = capsys.readouterr().err.splitlines()
    assert [("sent later" in s, "is back" in s) for s in said][:2] == [(True, False), (False, True)]
    assert len(said) in (2, 4)  # away twice, if the second time was noticed
    prepare(study, store)
    assert found.data.tags["mlflow.parentRunId"] == read_json(store)["parent_run_id"]


def test_a_server_that_hangs_does_not_hold_up_the_end(
    server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "EXIT_WAIT", 1.0)
    proxy, log = Proxy(server), tmp_path / "journal.jsonl"
    run, study, store = server_study(tmp_path, proxy, "hang")
    prepare(study, store)
    proxy.state = "hang"
    with LiveTracker(run, "k", store, log, tmp_path):
        start = time.monotonic()
        for i in range(20):
            journal.append(log, line(i))
        assert time.monotonic() - start < REQUEST_TIMEOUT / 2
        start = time.monotonic()
    assert time.monotonic() - start < REQUEST_TIMEOUT / 2
    assert "`publish` delivers them" in capsys.readouterr().err


def one_job(folder: Path, name: str) -> None:
    """Finds or makes its run, then logs 15 iterations while the others do the same."""
    os.chdir(folder)
    client, run_id = new_run(Path("store.json"), name, run=name)
    for begin in range(0, 15, 5):
        deliver(client, run_id, [line(i) for i in range(begin, begin + 5)])


@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_eight_jobs_log_at_once(
    where: str, store: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Every value arrives, once."""
    ids = read_json(store) | {"uri": "sqlite:///results/mlflow.db"}  # relative, as in a workflow
    if where == "server":
        uri = f"http://127.0.0.1:{request.getfixturevalue('server')}"
        client = open_client(uri)
        ids |= {"uri": uri, "experiment_id": client.create_experiment("eight jobs")}
        ids["parent_run_id"] = client.create_run(ids["experiment_id"]).info.run_id
    write_json(store, ids)
    # one process that has imported MLflow and forks the others: they start together, and fast
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow.store.tracking.sqlalchemy_store"])
    jobs = [context.Process(target=one_job, args=(tmp_path, f"run{i}")) for i in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(timeout=120)
    assert [job.exitcode for job in jobs] == [0] * 8
    if where == "sqlite":
        client = open_client(f"sqlite:///{tmp_path}/results/mlflow.db")
    runs = client.search_runs([ids["experiment_id"]], "tags.kind = 'train'")
    assert sorted(r.info.run_name for r in runs) == [f"run{i}" for i in range(8)]
    for r in runs:
        assert curve(client, r.info.run_id) == once(*range(15))
        assert r.data.params["method.threshold"] == "2.2"
        assert r.data.tags["mlflow.parentRunId"] == ids["parent_run_id"]
    assert not (tmp_path / "mlruns").exists()


# ---------------------------------------------------------------- publish


def files(client: Any, run_id: str, path: str | None = None) -> list[str]:
    """All artifacts of a run, or those below a folder."""
    out = []
    for found in client.list_artifacts(run_id, path):
        out += files(client, run_id, found.path) if found.is_dir else [found.path]
    return sorted(out)


def everything(client: Any, experiment: str) -> dict[str, Any]:
    """All that MLflow shows of an experiment."""

    def history(run_id: str, name: str) -> list[Any]:
        found = client.get_metric_history(run_id, name)
        return [(m.step, m.value, m.timestamp) for m in found]

    return {
        r.info.run_id: {
            "name": r.info.run_name,
            "status": r.info.status,
            "end": r.info.end_time,
            "tags": r.data.tags,
            "params": r.data.params,
            "files": files(client, r.info.run_id),
            "inputs": [
                (i.dataset.name, i.dataset.digest, i.dataset.source, i.tags[0].value)
                for i in r.inputs.dataset_inputs
            ],
            "metrics": {name: history(r.info.run_id, name) for name in r.data.metrics},
        }
        for r in client.search_runs([experiment])
    }


def test_publishing_twice_adds_nothing(store: Path, tmp_path: Path) -> None:
    prompts = prompts_of(tmp_path)
    study = results_of(tmp_path, run_config(prompts=prompts))
    client, live = new_run(store, prompts=prompts)
    deliver(client, live, [line(0), line(1)])  # what a live tracker got through
    out = published(study, store)
    ids, first = read_json(out), everything(client, read_json(store)["experiment_id"])
    published(study, store)
    assert everything(client, ids["experiment_id"]) == first
    known = {k: v for k, v in read_json(store).items() if k != "parent_run_id"}
    assert read_json(out) == ids == {"a": live, **known}
    by_name = {v["name"]: v for v in first.values()}
    assert sorted(by_name) == ["a", "a/evaluation", "base/evaluation", "small"]
    assert {v["status"] for v in first.values()} == {"FINISHED"}
    assert curve(client, live) == once(*range(6))
    assert by_name["small"]["files"] == ["figures/curves.png", "tables/comparison.parquet"]
    train = by_name["a"]
    records = [f for f in train["files"] if not f.startswith("images/")]
    assert records == ["config.yaml", "plan.json", "train.json"]
    assert len(train["files"]) == 5  # and one monitor grid in two sizes
    assert sorted(i[3] for i in train["inputs"]) == ["monitoring", "planning", "training"]
    assert "lies above 0: better than the base model" in train["tags"]["mlflow.note.content"]
    evaluation = by_name["a/evaluation"]
    assert {k: v[0][1] for k, v in evaluation["metrics"].items()} == {
        "verifier/mean": 0.75,
        "verifier/difference": 0.25,
        "verifier/low": 0.125,
        "verifier/high": 0.5,
        "nfe": 500,
    }
    shown = [f for f in evaluation["files"] if not f.startswith("table_images/")]
    assert shown == ["before_after.png", "images.json", "scores.json"]
    assert evaluation["tags"]["mlflow.parentRunId"] == live
    assert evaluation["params"]["prompts.heldout"] == prompts.heldout
    of = ("run", "evaluate.steps", "evaluate.samples")
    assert [evaluation["params"][key] for key in of] == ["a", "50", "1"]
    assert by_name["base/evaluation"]["params"]["run"] == "base"
    note = evaluation["tags"]["mlflow.note.content"]
    assert "The model that run `a` trained (method `egrpo`, on verifier, seed 0)." in note
    assert f"1 held-out prompts of `{prompts.heldout}`, 3 samples of each" in note
    facts = {"run": "a", "arm": "a", "method": "egrpo", "reward": "verifier", "seed": "0"}
    for found, kind in ((train, "train"), (evaluation, "evaluation")):
        expected = facts | {"kind": kind, "threshold": "2.2"}
        assert {k: found["tags"].get(k) for k in expected} == expected


def test_mlflow_gets_no_secret(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in params, tags, notes or names, nor in any file that it hands out."""
    from mlflow.artifacts import download_artifacts

    rewards = {
        "own": Custom(kind="custom", function="mine:score", options=SECRET_OPTIONS),
        "far": Remote(kind="remote", url=SERVICE, reward="clip"),
    }
    run = run_config(prompts=prompts_of(tmp_path), rewards=rewards)
    study = results_of(tmp_path, run)
    write_text(Layout(study).config("a"), yaml.safe_dump(run.model_dump()))  # it has them all
    config = load_run(Layout(study).config("a"))
    told = repr(config) + TRACKING
    assert not [word for word in SECRETS if word not in told]
    published(study, store)

    # as after delivery to a server: the same, with an address of tracking
    tracked = run.model_copy(update={"tracking": Tracking(uri=TRACKING)})
    client, experiment = opened(store)
    publish_run(client, experiment, tracked, Layout(study), "", [], "#000000")
    shown = repr(everything(client, experiment)) + repr(client.search_logged_models([experiment]))
    assert "method.threshold" in shown
    assert not [word for word in SECRETS if word in shown]
    params = client.get_run(train_run(client, store)).data.params
    assert params["rewards.far.url"] == "https://gpu7.example:8800/v1"
    assert params["rewards.own.options.deep.rate"] == "0.5"
    assert params["rewards.own.options.apikey"] == "null"

    downloaded = tmp_path / "downloaded"
    for record in client.search_runs([experiment]):
        own = downloaded / record.info.run_id
        own.mkdir(parents=True)
        for file in client.list_artifacts(record.info.run_id):
            client.download_artifacts(record.info.run_id, file.path, str(own))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", read_json(store)["uri"])
    for model in client.search_logged_models([experiment]):
        download_artifacts(f"models:/{model.model_id}", dst_path=str(downloaded / model.model_id))
    names = {path.name for path in downloaded.rglob("*")}
    assert {"config.yaml", "train.json", "scores.json"} <= names
    assert found_in(downloaded, SECRETS) == []
    (settings,) = downloaded.rglob("config.yaml")
    sent = load_run(settings)
    assert sent.rewards["own"].options == HARMLESS_OPTIONS  # type: ignore[union-attr]
    assert sent.prompts == run.prompts  # paths stay: the store is the user's own
    assert "# tracking.uri: left out" in settings.read_text()


def test_a_missing_result_is_named_with_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`snakemake --cores all '.*/my scores.parquet'` makes it"):
        digest_of(tmp_path / "my scores.parquet")


def kinds(client: Any, experiment: str) -> dict[tuple[str, str], str]:
    """(name, key) of each training and evaluation -> the tag that views ask for."""
    return {
        (r.info.run_name, r.data.tags["egrpo.key"]): r.data.tags["kind"]
        for r in client.search_runs([experiment])
        if r.data.tags["kind"] != "study"
    }


def test_what_is_trained_again_supersedes_what_was(store: Path, tmp_path: Path) -> None:
    prompts = prompts_of(tmp_path)
    runs = run_config("a", prompts=prompts), run_config("b", prompts=prompts)
    study = results_of(tmp_path, *runs)
    client, experiment = opened(store)
    own = Layout(study).run("a")

    def deliver_again(key: str, values: tuple[float | None, ...]) -> dict[tuple[str, str], str]:
        write_json(own / "train.json", {"run": "a", "key": key})
        write_evaluation(own, 200, values)
        published(study, store)
        found, before = kinds(client, experiment), everything(client, experiment)
        published(study, store)
        assert everything(client, experiment) == before
        return found

    first = deliver_again("k", (0.5, 1.0, None))
    assert set(first.values()) == {"train", "evaluation"}
    (old,) = [key for name, key in first if name == "a/evaluation"]

    second = deliver_again("edited", (0.25, 0.5, None))  # the settings of `a` were edited
    (new,) = [key for name, key in second if name == "a/evaluation" and key != old]
    replaced = {("a", "k"): "superseded", ("a/evaluation", old): "superseded"}
    current = {("a", "edited"): "train", ("a/evaluation", new): "evaluation"}
    assert second == first | replaced | current  # `b` and the base model's stay as they are
    tags = {r.info.run_id: r.data.tags for r in client.search_runs([experiment])}
    for record in client.search_runs([experiment], "tags.kind = 'superseded'"):
        above = record.data.tags["mlflow.parentRunId"]  # the tree is kept
        assert tags[above]["egrpo.key"] == ("k" if "/" in record.info.run_name else "small")

    # the edit is put back: trained, and delivered, under the old key
    with LiveTracker(runs[0], "k", store, tmp_path / "journal.jsonl", tmp_path):
        pass
    third = deliver_again("k", (0.5, 1.0, None))
    assert third == first | dict.fromkeys(current, "superseded")
    for view in ("train", "evaluation"):
        found = client.search_runs([experiment], f"tags.kind = '{view}' and tags.run = 'a'")
        assert len(found) == 1


def test_more_records_than_one_search_gives(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [new_run(store, key=f"k{i}") for i in range(5)]
    client, experiment = ids[0][0], read_json(store)["experiment_id"]
    tracking.mark_superseded(client, experiment, ["other"], [])
    assert set(kinds(client, experiment).values()) == {"train"}
    tracking.mark_superseded(client, experiment, ["a"], [ids[3][1]])
    assert kinds(client, experiment) == {
        ("a", f"k{i}"): "train" if i == 3 else "superseded" for i in range(5)
    }


def test_the_adapter_is_one_logged_model_with_its_evaluation(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.artifacts import download_artifacts

    study = results_of(tmp_path, run_config(prompts=prompts_of(tmp_path)))
    published(study, store)
    client, experiment = opened(store)
    (model,) = client.search_logged_models([experiment])
    assert (model.name, model.status.value) == ("a", "READY")
    assert {m.key: m.value for m in model.metrics}["verifier/difference"] == 0.25
    run = client.get_run(model.source_run_id)
    assert run.info.run_name == "a"
    assert [m.model_id for m in run.outputs.model_outputs] == [model.model_id]
    files = client.list_logged_model_artifacts(model.model_id)
    assert [f.path for f in files] == ["pytorch_lora_weights.safetensors"]
    assert f"models:/{model.model_id}" in run.data.tags["mlflow.note.content"]
    client.set_tag(run.info.run_id, "mlflow.note.content", "my own words")
    # trained again to other weights, under the same key: they are replaced
    adapter = Layout(study).run("a") / "adapter" / "pytorch_lora_weights.safetensors"
    write_text(adapter, "others")
    published(study, store)
    assert [m.model_id for m in client.search_logged_models([experiment])] == [model.model_id]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", read_json(store)["uri"])
    folder = download_artifacts(f"models:/{model.model_id}")
    assert (Path(folder) / adapter.name).read_text() == "others"
    tags = client.get_run(run.info.run_id).data.tags
    assert tags["mlflow.note.content"] == "my own words", "what somebody edited stays"


def test_views_fit_their_tags_and_change_only_with_the_study(store: Path, tmp_path: Path) -> None:
    client, experiment = opened(store)

    def held() -> dict[str, str]:
        tags = client.get_experiment(experiment).tags
        return {k: v for k, v in tags.items() if k.startswith("mlflow.sharedViewState.")}

    first = held()
    assert sorted(first) == [
        f"mlflow.sharedViewState.egrpo-{view}"
        for view in ("evaluations", "seeds", "studies", "training")
    ]
    assert all(len(value) < 5000 for value in first.values())
    prepare(study_of(tmp_path), store)
    assert held() == first
    # forty rewards still fit
    rewards = {f"reward_number_{i}": Verifier(kind="verifier") for i in range(40)}
    many = run_config().model_copy(update={"rewards": rewards})
    prepare(study_of(tmp_path, many), store)
    assert held() != first
    assert all(len(value) < 5000 for value in held().values())


def test_the_view_of_the_default_runs(store: Path) -> None:
    run = run_config()
    client, experiment = opened(store)
    assert not keep_default_view(client, experiment, {"a": run}, ["a"])  # not there yet
    first = new_run(store)[1]
    assert not keep_default_view(client, experiment, {"a": run}, ["a"])  # no others are
    new_run(store, key="other", run="b")
    assert keep_default_view(client, experiment, {"a": run}, ["a"])
    held = json.loads(
        client.get_experiment(experiment).tags["mlflow.sharedViewState.egrpo-default"]
    )
    state = json.loads(zlib.decompress(base64.b64decode(held["state"].removeprefix("deflate;"))))
    (found,) = client.search_runs([experiment], state["searchFilter"])
    assert found.info.run_id == first


def test_captions_hold_prompt_and_scores() -> None:
    values = {"verifier": 0.12345, "clip": None}
    assert pictures.caption(values) == ["verifier 0.123", "clip -"]
    image = Image.new("RGB", (32, 32), "red")
    shown = pictures.pair(7, "a red square", {0: image, 2: image}, {(7, 0): values})
    assert shown.size == (512, 512)  # what MLflow cuts off is text
    assert shown.getpixel((511, 255)) == (255, 0, 0)
    below = [shown.crop((left, 256, left + 256, 512)) for left in (0, 256)]
    assert all(part.convert("L").getextrema()[0] < 128 for part in below)
    assert below[0].tobytes() != below[1].tobytes()


def test_publish_says_that_results_are_kept(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port(0)}"
    study = results_of(tmp_path, run_config(uri=uri, prompts=prompts_of(tmp_path)))
    prepare(study, tmp_path / "store.json")
    with pytest.raises(UserError, match="all results are on disk, running again delivers") as error:
        published(study, tmp_path / "store.json")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "published.json").exists()


def test_ui_without_a_store_and_with_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="`make demo`"):
        serve(tmp_path / "store.json", 5000, "make demo")
    ids = {"uri": "http://u:secret@host:5000/", "experiment_id": "7", "parent_run_id": "x"}
    write_json(tmp_path / "store.json", ids)
    serve(tmp_path / "store.json", 5000, "make demo")
    printed = capsys.readouterr().out
    found = [line for line in printed.splitlines() if line.startswith("http")]
    assert all(line.startswith("http://host:5000/#/experiments/7/") for line in found)
    assert len(found) == 6
    assert "secret" not in printed
    (tmp_path / "studies").mkdir()
    for name, uri in (("first", "http://host:5000"), ("other", "http://host:5000"), ("far", "x")):
        own = {"uri": uri, "experiment_id": name, "parent_run_id": "x"}
        write_json(tmp_path / "studies" / name / "store.json", own)
    serve(tmp_path / "studies/first/store.json", 5000, "make demo")
    assert "compare-experiments/s?experiments=%5B%22first%22%2C%22other%22%5D" in (
        capsys.readouterr().out
    )


def test_a_taken_port_is_replaced() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert free_port(port) != port
