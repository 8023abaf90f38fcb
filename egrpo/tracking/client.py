"""MLflow's experiments and runs: each is found, or made once, whoever comes first.

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
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.store.tables import git_commit
from egrpo.study.sharing import without_secrets
from egrpo.tracking.address import artifact_folder, sqlite_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LONGEST_VALUE = 6000  # characters of a param
MOST_RECORDS = 50_000  # that MLflow gives in one search


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
        UserError: if the SQLite file is not there; only :mod:`egrpo.tracking.prepare` makes it.
    """
    configure(timeout, retries)
    from mlflow import MlflowClient

    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(f"{file}: no tracking store; `snakemake --cores 1 prepare_store` makes it")
    return MlflowClient(uri)


def find_or_create_study(client: MlflowClient, uri: str, study: str) -> tuple[str, str]:
    """Ids of a study's experiment and of its parent run, made where they are missing, also when
    another process makes them at the same time.

    Raises:
        UserError: if the experiment was deleted in MLflow.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(study)
    if found is None:
        try:
            client.create_experiment(study, artifact_location=artifact_folder(uri, study))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(study)
    if found is None:
        raise UserError(f"MLflow: experiment {study!r} can be neither created nor read")
    experiment = found.experiment_id
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow: experiment {study!r} is deleted; `mlflow experiments restore "
            f"--experiment-id {experiment}` brings it back, or rename the study"
        )
    return experiment, find_or_create(client, experiment, "study", study, study, {}).info.run_id


def find_or_create(
    client: MlflowClient, experiment: str, kind: str, key: str, name: str, tags: Mapping[str, str]
) -> Run:
    """The run with this kind and key, with these tags; created as ``name`` if there is none.

    Two processes may create one each at the same time: the younger one is deleted again.
    """
    tags = {"kind": kind, **tags}
    found = _find_run(client, experiment, kind, key)
    if found is None:
        every = {"egrpo.kind": kind, "egrpo.key": key, **_origin(), **tags}
        made = client.create_run(experiment, tags=every, run_name=name)
        found = _find_run(client, experiment, kind, key) or made
        if found.info.run_id != made.info.run_id:
            client.delete_run(made.info.run_id)
    keep_tags(client, found, tags)
    return found


def _find_run(client: MlflowClient, experiment: str, kind: str, key: str) -> Run | None:
    """The oldest run with these tags: all processes agree on it even if two were created."""
    found = client.search_runs(
        [experiment],
        f"tags.`egrpo.kind` = '{kind}' and tags.`egrpo.key` = '{key}'",
        max_results=1,
        order_by=["attributes.start_time ASC", "attributes.run_id ASC"],
    )
    return found[0] if found else None


def find_or_create_run(
    client: MlflowClient, experiment: str, run: RunConfig, key: str, parent: str | None
) -> str:
    """MLflow's id of a training run, found by ``key``; params that are missing are logged."""
    record = find_or_create(client, experiment, "train", key, run.run, run_tags(run, parent))
    keep_params(client, record, settings(run))
    return record.info.run_id


# ---------------------------------------------------------------- tags and params


def keep_params(client: MlflowClient, record: Run, params: Mapping[str, str]) -> None:
    """Log the params that a run lacks; MLflow lets none be changed."""
    from mlflow.entities import Param

    missing = [Param(k, v) for k, v in params.items() if k not in record.data.params]
    client.log_batch(record.info.run_id, params=missing)


def keep_tags(client: MlflowClient, record: Run, tags: Mapping[str, str]) -> None:
    """Set the tags that a run lacks or has otherwise."""
    from mlflow.entities import RunTag

    held = record.data.tags
    missing = [RunTag(k, v) for k, v in tags.items() if held.get(k) != v]
    client.log_batch(record.info.run_id, tags=missing)


def tag_warnings(client: MlflowClient, run_id: str, kinds: Iterable[str]) -> None:
    """Tag a training run with the kinds of what is wrong with it; a healthy one has no such tag."""
    record = client.get_run(run_id)
    if value := ",".join(kinds):
        keep_tags(client, record, {"warnings": value})
    elif "warnings" in record.data.tags:
        client.delete_tag(run_id, "warnings")


def run_tags(run: RunConfig, parent: str | None) -> dict[str, str]:
    """What a run and its evaluation are filtered by in MLflow: names that need no quotes there."""
    threshold = getattr(run.method, "threshold", None)  # only some methods have one
    tags = {
        "run": run.run,
        "arm": run.arm or run.run,
        "method": run.method.name,
        "reward": ",".join(sorted(run.train.rewards)),
        "seed": str(run.seed),
        "threshold": "" if threshold is None else str(threshold),
        "mlflow.parentRunId": parent or "",
    }
    return {k: v for k, v in tags.items() if v}


def _origin() -> dict[str, str]:
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

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
        if isinstance(value, dict) and value:
            for key, below in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, below)
        else:
            yield safe_name(prefix), _cut(value if isinstance(value, str) else json.dumps(value))

    return dict(walk("", {k: v for k, v in without_secrets(run)[0].items() if k != "tracking"}))


def _cut(text: str) -> str:
    """``text`` within MLflow's limit, with a marker where something is missing."""
    if len(text) <= LONGEST_VALUE:
        return text
    marker = f"... [cut, {len(text)} characters]"
    return text[: LONGEST_VALUE - len(marker)] + marker


def safe_name(name: str) -> str:
    """A name that MLflow accepts: one bad name would have the whole batch refused."""
    return posixpath.normpath(re.sub(r"[^/\w.\- :]", "_", name)).lstrip("/.")[:250] or "_"


# ---------------------------------------------------------------- superseded runs


def mark_superseded(
    client: MlflowClient, experiment: str, runs: Collection[str], current: Collection[str]
) -> None:
    """Give what a later training or evaluation of these runs replaced the kind ``superseded``.

    No saved view asks for it. ``current``: MLflow's ids of what was delivered of them now, which
    have, or get again, their own kind.
    """
    for record in client.search_runs(
        [experiment], "tags.`egrpo.kind` != 'study'", max_results=MOST_RECORDS
    ):
        tags, here = record.data.tags, record.info.run_id in current
        if tags.get("run") in runs:
            keep_tags(client, record, {"kind": tags["egrpo.kind"] if here else "superseded"})
