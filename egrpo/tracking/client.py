"""MLflow: the idempotent core that live tracking (``egrpo.tracking.live``) and ``publish`` share.

The journal on disk is the truth; MLflow is a view of it that may lag. Every delivery first knows
what the server holds, so a resumed or repeated one sends nothing twice. MLflow's step is the
iteration; ``nfe`` is a metric, so curves against network evaluations can be drawn.

SQLite keeps its rollback journal: write-ahead logging was measured (6 writers, 360 batches: 8.4 s
against 11.9 s, longest wait 2.7 s against 3.0 s) and does not pay for its risk on shared disks.
MLflow sets a busy timeout of 20 s itself. mlflow is imported inside functions only.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.settings import without_password
from egrpo.store.tables import git_commit
from egrpo.study.sharing import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

ITERATION_DONE = "iteration_done"
"""Metric sent last of each iteration: where it is, the iteration is complete."""
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
DATABASES = ("postgresql", "mysql", "mssql")
"""Kinds of databases that MLflow can track in, besides SQLite."""
LONGEST_VALUE = 6000  # characters of a param


# ---------------------------------------------------------------- where the store is


def resolve_uri(setting: str | None, default: str) -> str:
    """The tracking URI: ``tracking.uri``, else MLFLOW_TRACKING_URI, else ``default``.

    Raises:
        UserError: if it is none that MLflow knows here: a folder, in which MLflow no longer keeps
            its store, another kind of address, or a database without its driver.
    """
    uri = setting or os.environ.get("MLFLOW_TRACKING_URI") or default
    where = "tracking.uri" if setting else "MLFLOW_TRACKING_URI"
    kind = uri.partition("://")[0] if "://" in uri else "file"
    if kind.partition("+")[0] in DATABASES:
        _check_driver(uri, where)
    elif kind not in ("http", "https", "sqlite", *_plugins()):
        raise UserError(
            f"{where}: {without_password(uri)!r} is neither http(s)://host:port nor "
            f"sqlite:///file.db, nor a database ({', '.join(DATABASES)})"
        )
    return uri


def _plugins() -> set[str]:
    """Kinds of addresses that installed packages add to MLflow."""
    return {found.name for found in entry_points(group="mlflow.tracking_store")} - {"file"}


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


def configure(timeout: int = 10, retries: int = 1) -> None:
    """Set MLflow's environment; before its import. The user's own waiting times are kept."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    for name, value in {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(timeout),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  (it sets up its loggers when imported)

    # what fails is said once, in one line, by whoever called
    for logger, level in (("mlflow", "CRITICAL"), ("urllib3", "ERROR"), ("alembic", "WARNING")):
        logging.getLogger(logger).setLevel(level)


def open_client(uri: str, timeout: int = 10, retries: int = 1) -> MlflowClient:
    """A client, with ``timeout`` in seconds and ``retries`` for each request to a server.

    Raises:
        UserError: if the SQLite file is not there. It is never created here: several first users
            at once break the creation of its tables.
    """
    configure(timeout, retries)
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(f"{file}: no tracking store; `python -m egrpo prepare` makes it")
    return MlflowClient(uri)


def find_or_create_experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Id of the experiment, also when another process creates it at the same time.

    Raises:
        UserError: if it was deleted in MLflow.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
        if found is None:
            raise UserError(f"MLflow: experiment {name!r} can be neither created nor read")
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow: experiment {name!r} is deleted; `mlflow experiments restore "
            f"--experiment-id {found.experiment_id}` brings it back, or rename the study"
        )
    return str(found.experiment_id)


# ---------------------------------------------------------------- runs


def find_run(client: MlflowClient, experiment_id: str, kind: str, key: str) -> Run | None:
    """The oldest run with these tags: all processes agree on it even if two were created."""
    found = client.search_runs(
        [experiment_id],
        f"tags.`egrpo.kind` = '{kind}' and tags.`egrpo.key` = '{key}'",
        max_results=1,
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
    )
    return found[0] if found else None


def find_or_create(
    client: MlflowClient,
    experiment_id: str,
    kind: str,
    key: str,
    name: str,
    tags: Mapping[str, str],
) -> Run:
    """The run with this kind and key, with these tags; created as ``name`` if there is none.

    Two processes may create one each at the same time: the younger one is deleted again.
    """
    tags = {"kind": kind, **tags}
    found = find_run(client, experiment_id, kind, key)
    if found is None:
        every = {"egrpo.kind": kind, "egrpo.key": key, **origin(), **tags}
        made = client.create_run(experiment_id, tags=every, run_name=name)
        found = find_run(client, experiment_id, kind, key) or made
        if found.info.run_id != made.info.run_id:
            client.delete_run(made.info.run_id)
    keep_tags(client, found, tags)
    return found


def keep_tags(client: MlflowClient, record: Run, tags: Mapping[str, str]) -> None:
    """Set the tags that a run lacks or has otherwise."""
    from mlflow.entities import RunTag

    held = record.data.tags
    missing = [RunTag(k, v) for k, v in tags.items() if held.get(k) != v]
    if missing:
        client.log_batch(record.info.run_id, tags=missing)


def tag_warnings(client: MlflowClient, run_id: str, kinds: Iterable[str]) -> None:
    """Tag a training run with the kinds of what is wrong with it; a healthy one has no such tag."""
    record = client.get_run(run_id)
    if value := ",".join(kinds):
        keep_tags(client, record, {"warnings": value})
    elif "warnings" in record.data.tags:
        client.delete_tag(run_id, "warnings")


def find_or_create_study(client: MlflowClient, experiment_id: str, study: str) -> str:
    """Run id of the study's parent run."""
    return str(find_or_create(client, experiment_id, "study", study, study, {}).info.run_id)


def find_or_create_run(
    client: MlflowClient, experiment_id: str, run: RunConfig, key: str, parent: str | None
) -> str:
    """MLflow's id of a training run, found by ``key``; params that are missing are logged."""
    from mlflow.entities import Param

    record = find_or_create(client, experiment_id, "train", key, run.run, run_tags(run, parent))
    run_id = str(record.info.run_id)
    params = [Param(k, v) for k, v in settings(run).items() if k not in record.data.params]
    for start in range(0, len(params), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_BATCH])
    return run_id


def run_tags(run: RunConfig, parent: str | None) -> dict[str, str]:
    """What a run and its evaluation are filtered by in MLflow: names that need no quotes there."""
    tags = {
        "run": run.run,
        "arm": run.arm or run.run,
        "method": run.method.name,
        "reward": ",".join(sorted(run.train.rewards)),
        "seed": str(run.seed),
        "mlflow.parentRunId": parent or "",
    }
    threshold = getattr(run.method, "threshold", None)  # only some methods have one
    if threshold is not None:
        tags["threshold"] = str(threshold)
    return {k: v for k, v in tags.items() if v}


def origin() -> dict[str, str]:
    """What made a run, as it was when the run was created."""
    commit = git_commit()
    clean = commit.removesuffix("+dirty")
    tags = {
        "mlflow.source.name": "egrpo",
        "mlflow.source.git.commit": clean,
        "egrpo.git_commit": clean,
        "egrpo.git_dirty": str(commit != clean).lower(),
        "egrpo.slurm_job_id": os.environ.get("SLURM_JOB_ID", ""),
    }
    return {k: v for k, v in tags.items() if v}


def settings(run: RunConfig) -> dict[str, str]:
    """Resolved settings by dotted key, without secrets and without ``tracking``."""
    out: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                walk(f"{prefix}.{key}" if prefix else key, below)
        else:
            out[safe_name(prefix)] = cut(value if isinstance(value, str) else json.dumps(value))

    walk("", {k: v for k, v in without_secrets(run)[0].items() if k != "tracking"})
    return out


def cut(text: str) -> str:
    """``text`` within MLflow's limit, with a marker where something is missing."""
    if len(text) <= LONGEST_VALUE:
        return text
    marker = f"... [cut, {len(text)} characters]"
    return text[: LONGEST_VALUE - len(marker)] + marker


def safe_name(name: str) -> str:
    """A name that MLflow accepts: one bad name would have the whole batch refused."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("/.")[:250] or "_"


# ---------------------------------------------------------------- metrics


@dataclass
class Held:
    """What a server holds of one run: complete iterations, and pieces of incomplete ones."""

    done: set[int] = field(default_factory=set)
    pieces: set[tuple[str, int]] = field(default_factory=set)


def held(client: MlflowClient, run_id: str, wanted: Collection[int] | None = None) -> Held:
    """Ask the server. Needed once per connection, and again after a failed delivery.

    Args:
        wanted: where all of these iterations are complete, nothing more is asked.
    """
    names = set(client.get_run(run_id).data.metrics)
    if not names:
        return Held()
    done = {m.step for m in client.get_metric_history(run_id, ITERATION_DONE)}
    if wanted is not None and done.issuperset(wanted):
        return Held(done)
    pieces = {
        (name, metric.step)
        for name in names
        if not name.startswith("system/")
        for metric in client.get_metric_history(run_id, name)
        if metric.step not in done
    }
    return Held(done, pieces)


def deliver(
    client: MlflowClient,
    run_id: str,
    lines: Iterable[Mapping[str, Any]],
    known: Held | None = None,
) -> int:
    """Send the metrics of all iterations that the server does not have complete.

    Args:
        lines: as in the journal; ``time`` in seconds since 1970 is optional.
        known: what the server holds, updated in place; asked for if None.

    Returns:
        Number of iterations that were sent.
    """
    lines = list(lines)
    known = held(client, run_id, {x["iteration"] for x in lines}) if known is None else known
    missing: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        if line["iteration"] not in known.done:
            missing.setdefault(line["iteration"], line)
    metrics = [m for step in sorted(missing) for m in as_metrics(missing[step], known)]
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        batch = metrics[start : start + METRICS_PER_BATCH]
        client.log_batch(run_id, metrics=batch)
        known.done.update(m.step for m in batch if m.key == ITERATION_DONE)
    return len(missing)


def as_metrics(line: Mapping[str, Any], known: Held) -> list[Metric]:
    """One iteration's metrics that the server lacks; null and NaN have no place in a curve."""
    from mlflow.entities import Metric

    step = int(line["iteration"])
    stamp = int(1000 * (line.get("time") or time.time()))
    values = {**line["metrics"], "nfe": line.get("nfe")}
    values = {safe_name(k): v for k, v in values.items() if v is not None and v == v}
    values[ITERATION_DONE] = step
    return [
        Metric(name, float(value), stamp, step)
        for name, value in values.items()
        if (name, step) not in known.pieces
    ]


# ---------------------------------------------------------------- images


def images_held(client: MlflowClient, run_id: str) -> set[int]:
    """Iterations whose monitor grid the server has; the small copy is what MLflow sends last."""
    names = (posixpath.basename(f.path) for f in client.list_artifacts(run_id, "images"))
    found = (re.match(r"monitor[+%]step[+%](\d+)[+%].*\.webp$", name) for name in names)
    return {int(match[1]) for match in found if match}


def send_images(client: MlflowClient, run_id: str, folder: Path, sent: set[int]) -> None:
    """Log each ``iteration-000010.png`` that is not in ``sent`` as an image of that step."""
    from PIL import Image

    for file in sorted(folder.glob("iteration-*.png")):
        step = int(file.stem.removeprefix("iteration-"))
        if step in sent:
            continue
        try:
            with Image.open(file) as image:
                picture = image.convert("RGB")
        except (OSError, SyntaxError):  # PIL raises both for a damaged file
            continue
        client.log_image(run_id, picture, key="monitor", step=step)
        sent.add(step)
