"""Everything on disk into MLflow, at the end of the workflow; running it again adds nothing."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from egrpo.config.keys import evaluation_key, profile_key
from egrpo.config.load import Study
from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.stages.prepare import ensure, study_uri
from egrpo.store import journal, tracking
from egrpo.store.files import read_json, write_json
from egrpo.store.tables import COMPARISON, IMAGES, SCORES, TRAIN_METRICS, read_table

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from PIL.Image import Image

Row = dict[str, Any]


def publish(study: Study, store: Path, table: Path, output: Path) -> None:
    """Deliver what is missing of every run, its evaluation, and the study's tables and figures.

    Args:
        study: its results are expected as in ``docs/architecture.md``.
        store: JSON file written by ``prepare``.
        table: comparison of the study's runs with their base.
        output: JSON file: run id -> MLflow's run id, and ``uri``, ``experiment_id``.

    Raises:
        UserError: a result is missing, or the server is away.
    """
    uri = study_uri(study, read_json(store)["uri"])
    try:
        ids = ensure(uri, study.name, timeout=60, retries=3)
    except ConnectionError as error:
        raise _away(str(error)) from None
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    client = tracking.open_client(uri, timeout=60, retries=3)
    root = Path(study.results) / study.name
    comparison = read_table(table, COMPARISON).to_pylist()
    found: dict[str, Any] = {}
    try:
        for name, run in study.runs.items():
            own = [row for row in comparison if row["run"] == name]
            found[name] = _Run(client, ids["experiment_id"], run, root).publish(
                ids["parent_run_id"], own
            )
        for folder in ("tables", "figures"):
            _send_files(client, ids["parent_run_id"], folder, [root / folder])
        _finish(client, ids["parent_run_id"])
    except (MlflowException, RequestException) as error:
        raise _away(f"{tracking.in_one_line(uri)}: {tracking.in_one_line(error)}") from None
    write_json(output, {**found, "uri": uri, "experiment_id": ids["experiment_id"]})


def _away(text: str) -> UserError:
    return UserError(f"{text}; all results are on disk, running again delivers what is missing")


class _Run:
    """One run's files, and how each of them is sent."""

    def __init__(self, client: MlflowClient, experiment_id: Any, run: RunConfig, root: Path):
        self.client, self.experiment_id, self.run, self.root = client, experiment_id, run, root
        self.folder = root / "runs" / run.run

    def publish(self, parent: Any, comparison: list[Row]) -> str:
        """Training run and its evaluation; returns the id of the former."""
        client, run, folder = self.client, self.run, self.folder
        key = read_json(folder / "train.json").get("key")
        if not key:
            raise UserError(f"{folder / 'train.json'}: `key` is missing; train the run again")
        run_id = tracking.find_or_create_run(client, self.experiment_id, run, key, parent)
        tracking.deliver(client, run_id, self.lines(key))
        sent = tracking.images_held(client, run_id)
        tracking.send_images(client, run_id, folder / "monitor", sent)
        self.send_inputs(run_id)
        _send_files(client, run_id, "adapter", [folder / "adapter"])
        records = [folder / f for f in ("config.yaml", "plan.json", "train.json")]
        _send_files(client, run_id, "", [f for f in records if f.exists()])
        self.send_evaluation(run_id, comparison)
        _finish(client, run_id)
        return run_id

    def lines(self, key: str) -> Iterable[Row]:
        """The table of metrics as journal lines, with the journal's times while it exists.

        Equal times let MLflow itself refuse a second copy of what a slow server took late.
        """
        log = self.root / "state" / self.run.run / key / "journal.jsonl"
        times = {line["iteration"]: line.get("time") for line in journal.read(log)}
        file = self.folder / "train_metrics.parquet"
        lines: dict[int, Row] = {}
        for row in read_table(file, TRAIN_METRICS).to_pylist():
            step = row["iteration"]
            stamp = times.get(step) or file.stat().st_mtime
            line = lines.setdefault(
                step, {"iteration": step, "time": stamp, "nfe": row["nfe"], "metrics": {}}
            )
            line["metrics"][row["metric"]] = row["value"]
        return lines.values()

    def send_inputs(self, run_id: str) -> None:
        """Prompt files and entropy profile as MLflow datasets."""
        prompts = self.run.prompts
        profile = self.root / "profiles" / profile_key(self.run) / "entropy_profile.parquet"
        files = [(Path(prompts.train), "training"), (Path(prompts.heldout), "evaluation")]
        if profile.exists():  # only methods that plan by entropy have one
            files.append((profile, "profile"))
        inputs = self.client.get_run(run_id).inputs.dataset_inputs
        held = {(i.dataset.name, i.dataset.digest) for i in inputs}
        missing = [
            dataset
            for dataset in (_dataset(file, context) for file, context in files)
            if (dataset.dataset.name, dataset.dataset.digest) not in held
        ]
        if missing:
            self.client.log_inputs(run_id, datasets=missing)

    def send_evaluation(self, parent: str, comparison: list[Row]) -> None:
        """A run below ``parent``: mean rewards, differences, the scores, before/after images."""
        client, run, file = self.client, self.run, self.folder / "scores.parquet"
        scores = read_table(file, SCORES)
        record = tracking.find_or_create(
            client,
            self.experiment_id,
            "evaluation",
            _digest(file),
            f"{run.run}/evaluation",
            tracking.run_tags(run, parent),
        )
        run_id = str(record.info.run_id)
        if record.data.tags.get("mlflow.parentRunId") != parent:
            client.set_tag(run_id, "mlflow.parentRunId", parent)
        _send_values(client, run_id, record.data.metrics, _values(scores, comparison))
        held = {f.path for f in client.list_artifacts(run_id)}
        if "scores.json" not in held:  # log_table appends to one that is there
            client.log_table(run_id, scores.to_pydict(), "scores.json")
        if "before_after.png" not in held:
            base = self.root / "base" / evaluation_key(run) / "images.parquet"
            grid = before_after(base, self.folder / "images.parquet", run.evaluate.grid_prompts)
            client.log_image(run_id, grid, "before_after.png")
        _finish(client, run_id)


def _values(scores: Any, comparison: list[Row]) -> dict[str, float | None]:
    """Metrics of an evaluation: ``<reward>/mean`` and what the comparison says of it."""
    values: dict[str, float | None] = {}
    for reward in sorted(set(scores["reward"].to_pylist())):
        own = scores.filter(pc.equal(scores["reward"], reward))["value"]
        values[f"{reward}/mean"] = pc.mean(own).as_py()  # nulls, where scoring failed, are left out
    for row in comparison:
        for column in ("difference", "low", "high"):
            values[f"{row['reward']}/{column}"] = row[column]
    return values


def _send_values(
    client: MlflowClient, run_id: str, held: Mapping[str, float], values: Mapping[str, float | None]
) -> None:
    """Log the values that the run does not have, or has otherwise."""
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    named = {tracking.safe_name(k): v for k, v in values.items() if v is not None and v == v}
    batch = [Metric(k, v, now, 0) for k, v in named.items() if held.get(k) != v]
    for start in range(0, len(batch), tracking.METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=batch[start : start + tracking.METRICS_PER_BATCH])


def before_after(base: Path, trained: Path, prompts: int) -> Image:
    """Two rows of images, the base model's above: sample 0 of the first prompts."""
    from PIL import Image

    rows = []
    for file in (base, trained):
        table = read_table(file, IMAGES)
        first = table.filter(pc.equal(table["sample"], 0)).sort_by("prompt_id")
        pngs = first["png"].to_pylist()[:prompts]
        rows.append([Image.open(io.BytesIO(png)).convert("RGB") for png in pngs])
    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * 2))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (x * width, y * height))
    return grid


def _dataset(file: Path, context: str) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": _relative(file)})
    dataset = Dataset(file.name, _digest(file), "local", source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _relative(file: Path) -> str:
    """A path that says nothing about the machine, where that is possible."""
    if file.is_absolute() and file.is_relative_to(Path.cwd()):
        return str(file.relative_to(Path.cwd()))
    return str(file)


def _digest(*files: Path) -> str:
    """Digest of names and contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + b"\0")
        try:
            with open(file, "rb") as handle:
                total.update(hashlib.file_digest(handle, "sha256").digest())
        except FileNotFoundError:
            raise UserError(f"{file}: no such file; the workflow makes it") from None
    return total.hexdigest()[:16]


def _send_files(client: MlflowClient, run_id: Any, target: str, paths: list[Path]) -> None:
    """Upload files, or folders with all they hold, to the artifact folder ``target``.

    A tag names what was sent: the same again is skipped, after a change all are replaced.
    """
    found = {f: p.name if p.is_file() else str(f.relative_to(p)) for p in paths for f in _below(p)}
    tag, digest = f"egrpo.sent.{target or 'settings'}", _digest(*found)
    if not found or client.get_run(run_id).data.tags.get(tag) == digest:
        return
    for file, name in found.items():
        client.log_artifact(run_id, str(file), str(Path(target, name).parent).lstrip(".") or None)
    client.set_tag(run_id, tag, digest)


def _below(path: Path) -> list[Path]:
    """The file itself, or a folder's files; hidden ones are Snakemake's own."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [f for f in files if f.is_file() and not f.name.startswith(".")]


def _finish(client: MlflowClient, run_id: Any) -> None:
    if client.get_run(run_id).info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")
