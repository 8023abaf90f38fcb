"""What ``publish`` delivers to MLflow, each once: files, values, datasets, notes, models.

A tag ``egrpo.sent.<what>`` holds the digest of what was sent: the same again is skipped, and what
somebody edited in MLflow since is left alone until it changes here.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from egrpo.config.models import RunConfig
from egrpo.config.prompts import read_prompts
from egrpo.errors import UserError, command
from egrpo.tracking.client import run_tags, settings
from egrpo.tracking.curves import plain

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run


def finish(client: MlflowClient, run_id: str, color: str | None = None) -> None:
    """Set the status, and the color in MLflow's charts, which would be chance, unless set."""
    record = client.get_run(run_id)
    if color and "mlflow.runColor" not in record.data.tags:
        client.set_tag(run_id, "mlflow.runColor", color)
    if record.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")


def _once(
    client: MlflowClient, run_id: str, what: str, digest: str, send: Callable[[], object]
) -> None:
    tag = f"egrpo.sent.{what}"
    if client.get_run(run_id).data.tags.get(tag) != digest:
        send()
        client.set_tag(run_id, tag, digest)


def send_files(client: MlflowClient, run_id: str, target: str, paths: list[Path]) -> None:
    """Upload files, or folders with all they hold, to the artifact folder ``target``."""
    found = _named(paths)

    def send() -> None:
        for file, name in found.items():
            client.log_artifact(run_id, str(file), _folder(Path(target, name)))

    if found:
        _once(client, run_id, target or "settings", digest_of(*found), send)


def send_text(client: MlflowClient, run_id: str, name: str, text: str) -> None:
    """Upload a text as the artifact ``name``."""
    _once(client, run_id, name, _sum_of(text), lambda: client.log_text(run_id, text, name))


def send_note(client: MlflowClient, run_id: str, text: str) -> None:
    """Set the description of a run, which MLflow shows on its page; Markdown."""
    tag = "mlflow.note.content"
    _once(client, run_id, "note", _sum_of(text), lambda: client.set_tag(run_id, tag, text))


def send_values(
    client: MlflowClient, record: Run, values: Mapping[str, float | None], model: str | None = None
) -> None:
    """Log the values that the run does not have, or has otherwise; also as those of ``model``."""
    from mlflow.entities import Metric

    now, held = int(1000 * time.time()), record.data.metrics
    new = {k: v for k, v in plain(values).items() if held.get(k) != v}
    metrics = [Metric(k, v, now, 0, model_id=model) for k, v in new.items()]
    client.log_batch(record.info.run_id, metrics=metrics)


def _sum_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(*files: Path) -> str:
    """Digest of names and contents.

    Raises:
        UserError: if a file is missing.
    """
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + b"\0")
        try:
            with open(file, "rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; `{command((), file)}` makes it") from None
    return total.hexdigest()[:16]


def _named(paths: Iterable[Path]) -> dict[Path, str]:
    """Each file, with its name below the folder that holds it; hidden ones are Snakemake's own."""
    found = {
        file: str(file.relative_to(path.parent if path == file else path))
        for path in paths
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
    }
    return {f: name for f, name in found.items() if f.is_file() and not f.name.startswith(".")}


def _folder(name: Path) -> str | None:
    """The folder of an artifact; None for the top."""
    return str(name.parent).lstrip(".") or None


# ---------------------------------------------------------------- datasets and models


def send_datasets(
    client: MlflowClient, run_id: str, files: Mapping[Path, str], column: str
) -> None:
    """Log inputs of a run: file -> what it is for; ``column`` is that of prompts."""
    inputs = client.get_run(run_id).inputs.dataset_inputs
    held = {(i.dataset.name, i.dataset.digest) for i in inputs}
    datasets = [_dataset(file, context, column) for file, context in files.items()]
    missing = [d for d in datasets if (d.dataset.name, d.dataset.digest) not in held]
    if missing:
        client.log_inputs(run_id, datasets=missing)


def _dataset(file: Path, context: str, column: str) -> DatasetInput:
    """A prompt file or a Parquet table, with its number of rows and its columns."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as table:
            rows = table.metadata.num_rows
            columns = {field.name: str(field.type) for field in table.schema_arrow}
    else:
        rows, columns = len(read_prompts(file, column)), {"prompt": "string"}
    # a path that says nothing about the machine, where that is possible
    below = file.is_relative_to(Path.cwd())
    source = json.dumps({"uri": str(file.relative_to(Path.cwd()) if below else file)})
    schema = json.dumps({"mlflow_colspec": [{"name": k, "type": v} for k, v in columns.items()]})
    profile = json.dumps({"num_rows": rows})
    dataset = Dataset(file.name, digest_of(file), "local", source, schema, profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def send_model(
    client: MlflowClient, experiment: str, run_id: str, run: RunConfig, folder: Path
) -> str | None:
    """The trained weights as the logged model of a run; its id, None where there are no weights.

    No flavour of MLflow's: the files are what diffusers reads, ``models:/<id>`` fetches them.
    """
    from mlflow.entities import LoggedModelOutput

    found = _named([folder])
    if not found:
        return None
    models = client.search_logged_models([experiment], f"source_run_id = '{run_id}'", max_results=1)
    if not models:
        tags = {k: v for k, v in run_tags(run, None).items() if k != "run"}
        params = {k: v for k, v in settings(run).items() if k.startswith("model.")}
        name = run.run.replace(".", "_")  # MLflow takes no dot
        of = experiment, name, run_id, tags, params, run.model.tuning
        models = [client.create_logged_model(*of)]
    model: str = models[0].model_id

    def send() -> None:
        for file, name in found.items():
            client.log_model_artifact(model, str(file), _folder(Path(name)))
        client.finalize_logged_model(model, "READY")
        outputs = client.get_run(run_id).outputs
        if model not in {m.model_id for m in outputs.model_outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(model, run.train.iterations)])

    _once(client, run_id, "model", digest_of(*found), send)
    return model
