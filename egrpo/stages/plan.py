"""The merge plan of a run, from the grid of its entropy profile. Needs no torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from egrpo.config.keys import plan_key
from egrpo.config.models import RunConfig
from egrpo.config.trees import plan_of
from egrpo.core.entropy import step_entropy
from egrpo.core.plan import Plan
from egrpo.core.schedule import check_sigmas
from egrpo.errors import UserError
from egrpo.store.files import read_json, write_json
from egrpo.store.tables import ENTROPY_PROFILE, MERGE_PLAN, read_table, write_table


def plan(run: RunConfig, profile: Path, output: Path, table: Path) -> None:
    """Write ``plan.json`` and ``merge_plan.parquet`` of a run.

    The grid is the one that the profile was measured on, so that a profile of any model gives
    its own plan. Steps that cannot reach the threshold are said on stderr.
    """
    metadata = read_table(profile, ENTROPY_PROFILE).schema.metadata
    made = plan_of(run, check_sigmas(json.loads(metadata[b"sigmas"])))
    for warning in made.warnings:
        print(f"{run.run}: {warning}", file=sys.stderr)
    write_json(output, made.to_dict())
    head = {"config_hash": plan_key(run)}
    write_table(table, MERGE_PLAN, plan_rows(run.run, made), metadata=head)


def plan_rows(run: str, made: Plan) -> list[dict[str, Any]]:
    """Rows of the merge_plan table."""

    def entropy(start: int, span: int) -> float:
        return step_entropy(
            made.sigmas,
            start,
            span,
            noise_level=made.noise_level,
            dynamics=made.dynamics,
            measure=made.measure,
        )

    return [
        {
            "run": run,
            "step": start,
            "span": span,
            "sigma": made.sigmas[start],
            "sigma_stop": made.sigmas[start + span],
            "entropy": entropy(start, span),
            "single_step_entropy": entropy(start, 1),
            "threshold": made.threshold,
            "measure": made.measure,
        }
        for start, span in zip(made.active, made.spans, strict=True)
    ]


def load_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        UserError: if the file is missing or damaged.
    """
    try:
        return Plan.from_dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a plan: {error}; delete it and run again") from None
