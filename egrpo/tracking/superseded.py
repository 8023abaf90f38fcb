"""Runs of MLflow that a later training or evaluation of the same run has replaced.

They stay, with the tag ``kind`` = ``superseded``, which no saved view asks for. Which ones they are
is known only when the results are: at each delivery.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SUPERSEDED = "superseded"
KINDS = ("train", "evaluation")
AT_ONCE = 1000  # records of one search


def mark_superseded(
    client: MlflowClient, experiment: str, runs: Collection[str], current: Collection[str]
) -> None:
    """Tag all records of these runs: those in ``current`` with their own kind, others as replaced.

    Args:
        runs: run ids, as in the tag ``run``.
        current: MLflow's ids of what was delivered of them now.
    """
    for kind in KINDS:
        for record in _all(client, experiment, kind):
            tags, own = record.data.tags, record.info.run_id
            wanted = kind if own in current else SUPERSEDED
            if tags.get("run") in runs and tags.get("kind") != wanted:
                client.set_tag(own, "kind", wanted)


def _all(client: MlflowClient, experiment: str, kind: str) -> Iterator[Run]:
    """Every record that was made as this kind, whatever it is tagged as since."""
    token = None
    while True:
        found = client.search_runs(
            [experiment], f"tags.`egrpo.kind` = '{kind}'", max_results=AT_ONCE, page_token=token
        )
        yield from found
        token = found.token
        if not token:
            return
