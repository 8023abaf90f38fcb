"""Live metrics in MLflow while training: a thread that delivers the growing journal."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egrpo.config.models import RunConfig
from egrpo.errors import say
from egrpo.settings import without_password
from egrpo.store import journal as journals
from egrpo.store.files import read_json
from egrpo.tracking.address import in_one_line, resolve_uri
from egrpo.tracking.client import (
    configure,
    find_or_create_run,
    find_or_create_study,
    open_client,
    tag_warnings,
)
from egrpo.tracking.curves import Held, deliver, held, images_held, send_images

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXIT_WAIT = 10.0  # seconds
LONGEST_PAUSE = 60.0  # seconds between attempts while the server is away
SYSTEM_EVERY = 10.0  # seconds between samples of the machine's load


class LiveTracker:
    """Delivers a growing journal to MLflow from a thread of its own.

    Training is never stopped or slowed by it: every error is caught and said once, and what could
    not be delivered is still in the journal, for the next attempt or for ``publish``.

    Args:
        key: of the training state; it names the MLflow run.
        store: JSON file written by ``prepare``.
        images: folder of monitor grids ``iteration-000010.png``, each written atomically.

    Attributes:
        warnings: kinds of what is wrong with the run so far, for its tag; training sets them.
    """

    def __init__(self, run: RunConfig, key: str, store: Path, journal: Path, images: Path) -> None:
        self.run, self.key, self.store, self.images = run, key, store, images
        self._tail = Tail(journal)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._client: MlflowClient | None = None
        self._load: SystemLoad | None = None
        self._run_id = ""
        self._held, self._sent = Held(), set[int]()
        self._pending: list[dict[str, Any]] = []
        self._failures = 0
        self._outcome = "FINISHED"
        self.warnings: tuple[str, ...] = ()
        self._tagged: tuple[str, ...] | None = None

    def __enter__(self) -> LiveTracker:
        if not self.run.tracking.enabled:
            return self
        try:
            # imported here, not in the thread: two threads that import share half-made modules
            configure()
            import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
        except Exception as error:  # whatever is wrong with MLflow, training goes on
            self._say(f"MLflow cannot be loaded ({in_one_line(error)}); no live metrics")
            return self
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        if kind is not None:
            self._outcome = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._stop.set()
        self._thread.join(EXIT_WAIT)
        if self._thread.is_alive() or self._failures:
            self._say("the last metrics are not delivered yet; `publish` delivers them")

    def _say(self, text: str) -> None:
        say(f"{self.run.run}: tracking: {text}")

    def _loop(self) -> None:
        every, pause, last = self.run.tracking.every_seconds, 0.0, False
        while not last:
            last = self._stop.wait(pause)
            try:
                self._deliver()
                if last and self._client:
                    self._client.set_terminated(self._run_id, self._outcome)
            except Exception as error:  # away, slow, full, refused: training goes on
                self._client = None  # ask again what it holds: it may have kept a part
                self._failures += 1
                pause = min(LONGEST_PAUSE, every * 2**self._failures)
                if self._failures == 1:
                    self._say(f"{in_one_line(error)}; metrics stay on disk and are sent later")
                continue
            if self._failures:
                self._say("the server is back; all metrics are delivered")
            self._failures, pause = 0, every

    def _deliver(self) -> None:
        client = self._client or self._connect()
        lines, again = self._tail.read()
        self._pending = lines if again else self._pending + lines
        deliver(client, self._run_id, self._pending, self._held)
        self._pending = []
        send_images(client, self._run_id, self.images, self._sent)
        if (warnings := self.warnings) != self._tagged:
            tag_warnings(client, self._run_id, warnings)
            self._tagged = warnings
        if self._load:
            self._load.send()
        self._client = client

    def _connect(self) -> MlflowClient:
        ids = read_json(self.store)
        uri = resolve_uri(self.run.tracking.uri, ids["uri"])
        client = open_client(uri)
        experiment, parent = ids["experiment_id"], ids["parent_run_id"]
        if experiment is None or without_password(uri) != ids["uri"]:
            experiment, parent = find_or_create_study(client, uri, self.run.study)
        self._run_id = find_or_create_run(client, experiment, self.run, self.key, parent)
        client.update_run(self._run_id, status="RUNNING")
        self._held = held(client, self._run_id)
        self._sent = images_held(client, self._run_id)
        with contextlib.suppress(ImportError):  # psutil
            self._load = SystemLoad(client, self._run_id)
        return client


class Tail:
    """Complete new lines of a journal, also after it was rewound."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.inode = path, 0, -1

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """New lines without their rollouts, and whether they begin with the journal's first."""
        try:
            with open(self.path, "rb") as handle:
                status = os.fstat(handle.fileno())
                if status.st_ino != self.inode or status.st_size < self.offset:
                    self.inode, self.offset = status.st_ino, 0
                again = self.offset == 0
                handle.seek(self.offset)
                # the last is torn: being written, or cut off by a kill
                complete = handle.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return [], False
        self.offset += sum(len(raw) + 1 for raw in complete)
        # damaged ones are passed over, those behind them are whole
        lines = [line for raw in complete if (line := journals.line_of(raw)) is not None]
        # rollouts are large, and not for MLflow
        return [{k: v for k, v in x.items() if k != "rollouts"} for x in lines], again


class SystemLoad:
    """CPU, memory, disk, network and GPU, under ``system/`` as MLflow's own monitor names them.

    MLflow's monitor ends at the first failed request and may block at exit; this one does not. It
    goes on counting where the run's last one ended.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.client, self.run_id, self.next = client, run_id, 0.0
        old = client.get_metric_history(run_id, "system/cpu_utilization_percentage")
        self.step = 1 + max((m.step for m in old), default=-1)
        self.monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no NVIDIA GPU or no nvidia-ml-py
            self.monitors.append(GPUMonitor())

    def send(self) -> None:
        """Log one sample, at most every ``SYSTEM_EVERY`` seconds."""
        from mlflow.entities import Metric

        if time.monotonic() < self.next:
            return
        self.next = time.monotonic() + SYSTEM_EVERY
        stamp, values = int(1000 * time.time()), {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            values.update(monitor.aggregate_metrics())
            monitor.clear_metrics()
        batch = [Metric(f"system/{k}", float(v), stamp, self.step) for k, v in values.items()]
        self.client.log_batch(self.run_id, metrics=batch)
        self.step += 1
