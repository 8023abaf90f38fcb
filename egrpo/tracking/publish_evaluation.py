"""One evaluation into MLflow: mean rewards, gains, tables of scores and images.

The base model's evaluation is a run beside those of trained models, so that MLflow's comparison of
tables shows the same prompt and noise before and after training.
"""

from __future__ import annotations

import io
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from egrpo.config.models import RunConfig
from egrpo.report.evaluations import Row
from egrpo.store.tables import IMAGES, SCORES, read_table
from egrpo.study.layout import Layout
from egrpo.tracking.client import find_or_create, run_tags
from egrpo.tracking.deliver import digest_of, finish, send_datasets, send_values

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

PIXELS = 256
"""Most pixels of an image in a table, each way; the full ones lie in ``images.parquet``."""


def send_evaluation(
    client: MlflowClient,
    experiment: str,
    run: RunConfig,
    at: Layout,
    parent: str,
    color: str,
    comparison: list[Row] | None = None,
    model: str | None = None,
) -> str:
    """A run below ``parent``, found by the contents of its scores; its id in MLflow.

    Args:
        color: of its bars and points, as `#0072B2`.
        comparison: rows of the comparison about it, for the gains; None: it is the evaluation of
            the base model that the run is compared with.
        model: MLflow's id of the logged model that was evaluated.
    """
    base = at.base(run.run)
    folder, name, tags = at.run(run.run), f"{run.run}/evaluation", run_tags(run, parent)
    if comparison is None:
        tags = dict.fromkeys(("run", "arm", "method"), "base") | {"mlflow.parentRunId": parent}
        folder, name = base, "base/evaluation"
    file = folder / "scores.parquet"
    record = find_or_create(client, experiment, "evaluation", digest_of(file), name, tags)
    run_id: str = record.info.run_id
    scores = read_table(file, SCORES).to_pylist()
    send_values(client, record, _values(scores, comparison or []), model)
    heldout = {Path(run.prompts.heldout): "evaluation"}
    send_datasets(client, run_id, heldout, run.prompts.column)
    _send_tables(client, run_id, scores, run, folder, base)
    finish(client, run_id, color)
    return run_id


def _send_tables(
    client: MlflowClient, run_id: str, scores: list[Row], run: RunConfig, folder: Path, base: Path
) -> None:
    """Tables as MLflow compares them: the first one, by its first column, showing its second."""
    from mlflow import Image as Shown

    held = {f.path for f in client.list_artifacts(run_id)}
    shown = run.evaluate.grid_prompts
    if "images.json" not in held:  # log_table appends to one that is there
        first = _first_images(folder, shown)
        table = {
            "prompt": [prompt for _, prompt in first],
            "samples": [Shown(_two(own)) for own in first.values()],
        }
        client.log_table(run_id, table, "images.json")
    if "scores.json" not in held:
        client.log_table(run_id, _scores_table(scores, tuple(run.train.rewards)), "scores.json")
    if "before_after.png" not in held and folder != base:
        both = [_first_images(f, shown).values() for f in (base, folder)]
        grid = _grid([[own[0] for own in samples] for samples in both])
        client.log_image(run_id, grid, "before_after.png")


def _values(scores: list[Row], comparison: list[Row]) -> dict[str, float | None]:
    """Metrics of an evaluation: ``<reward>/mean``, what the comparison says of it, and the cost."""
    valid: dict[str, list[float]] = defaultdict(list)
    for row in scores:
        if row["value"] is not None:
            valid[row["reward"]].append(row["value"])
    values: dict[str, float | None] = {
        f"{reward}/mean": sum(found) / len(found) for reward, found in valid.items()
    }
    for row in comparison:
        for column in ("difference", "low", "high"):
            values[f"{row['reward']}/{column}"] = row[column]
        values["nfe"] = row["nfe"]
    return values


def _scores_table(scores: list[Row], first: tuple[str, ...]) -> dict[str, list[Any]]:
    """One row an image, named by prompt and sample, and a column for each reward."""
    rewards = sorted({row["reward"] for row in scores}, key=lambda r: (r not in first, r))
    values = {(r["prompt_id"], r["sample"], r["reward"]): r["value"] for r in scores}
    rows = sorted({(r["prompt_id"], r["sample"], r["prompt"]) for r in scores})
    return {
        "prompt [sample]": [f"{prompt} [{sample}]" for _, sample, prompt in rows],
        **{reward: [values.get((i, s, reward)) for i, s, _ in rows] for reward in rewards},
        "prompt_id": [prompt_id for prompt_id, _, _ in rows],
        "sample": [sample for _, sample, _ in rows],
    }


def _first_images(folder: Path, prompts: int) -> dict[tuple[int, str], list[Image]]:
    """All samples of the first prompts, by prompt id and prompt."""
    from PIL import Image

    table = read_table(folder / "images.parquet", IMAGES)
    first = sorted(set(table["prompt_id"].to_pylist()))[:prompts]
    chosen = table.filter(pc.field("prompt_id").isin(first))
    found: dict[tuple[int, str], list[Image.Image]] = {}
    for row in chosen.sort_by([("prompt_id", "ascending"), ("sample", "ascending")]).to_pylist():
        image = Image.open(io.BytesIO(row["png"])).convert("RGB")
        found.setdefault((row["prompt_id"], row["prompt"]), []).append(image)
    return found


def _two(samples: list[Image]) -> Image:
    """Two samples beside each other, as the upper half of a square.

    MLflow's comparison of tables cuts off the lower half of what it shows.
    """
    from PIL import Image

    small = [image.copy() for image in samples[:2]]
    for image in small:
        image.thumbnail((PIXELS, PIXELS))
    blank = Image.new("RGB", small[0].size, "white")
    return _grid([[*small, blank][:2], [blank, blank]])


def _grid(rows: list[list[Image]]) -> Image:
    """Rows of images of one size as one image."""
    from PIL import Image

    width, height = rows[0][0].size
    grid = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            grid.paste(image, (x * width, y * height))
    return grid
