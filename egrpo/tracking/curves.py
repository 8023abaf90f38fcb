"""Metrics and monitor grids in MLflow, each sent once: by live tracking and by ``publish``.

The journal on disk is the truth; MLflow is a view of it that may lag. Every delivery first knows
what the server holds, so a resumed or repeated one sends nothing twice. MLflow's step is the
iteration; ``nfe`` is a metric, so curves against network evaluations can be drawn.
"""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from egrpo.tracking.client import safe_name

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

ITERATION_DONE = "iteration_done"
"""Metric sent last of each iteration: where it is, the iteration is complete."""


@dataclass
class Held:
    """What a server holds of one run: complete iterations, and pieces of incomplete ones."""

    done: set[int] = field(default_factory=set)
    pieces: set[tuple[str, int]] = field(default_factory=set)


def held(client: MlflowClient, run_id: str, wanted: Collection[int] | None = None) -> Held:
    """Ask the server; where all ``wanted`` iterations are complete, nothing more is asked.

    Needed once per connection, and again after a failed delivery.
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
    client: MlflowClient, run_id: str, lines: Sequence[Mapping[str, Any]], known: Held | None = None
) -> int:
    """Send the metrics of all iterations that the server does not have complete; their number.

    Args:
        lines: as in the journal; ``time`` in seconds since 1970 is optional.
        known: what the server holds, updated in place; asked for if None.
    """
    known = held(client, run_id, {x["iteration"] for x in lines}) if known is None else known
    missing = {x["iteration"]: x for x in reversed(lines) if x["iteration"] not in known.done}
    metrics = [m for step in sorted(missing) for m in _metrics(missing[step], known)]
    client.log_batch(run_id, metrics=metrics)
    known.done.update(missing)
    return len(missing)


def plain(values: Mapping[str, float | None]) -> dict[str, float]:
    """Values by names that MLflow accepts; null and NaN have no place in a curve."""
    return {safe_name(k): float(v) for k, v in values.items() if v is not None and v == v}


def _metrics(line: Mapping[str, Any], known: Held) -> list[Metric]:
    """One iteration's metrics that the server lacks."""
    from mlflow.entities import Metric

    step = int(line["iteration"])
    stamp = int(1000 * (line.get("time") or time.time()))
    values = {**plain({**line["metrics"], "nfe": line.get("nfe")}), ITERATION_DONE: float(step)}
    return [Metric(k, v, stamp, step) for k, v in values.items() if (k, step) not in known.pieces]


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
