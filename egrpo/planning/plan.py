"""The merge plan of a run, from the grid of its entropy profile. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egrpo.config.keys import run_key
from egrpo.config.models import RunConfig
from egrpo.core.entropy import MEASURES
from egrpo.core.noise import DETERMINISTIC, STD
from egrpo.core.plan import Plan
from egrpo.core.schedule import Sigmas, check_sigmas
from egrpo.core.spread import Spread
from egrpo.errors import UserError, say
from egrpo.planning.trees import check_parts, plan_of, reads_profile
from egrpo.store.files import read_json, write_json
from egrpo.store.tables import ENTROPY_PROFILE, MERGE_PLAN, metadata_of, read_table, write_table


def plan(run: RunConfig, profile: Path, output: Path, table: Path) -> None:
    """Write ``plan.json`` and ``merge_plan.parquet`` of a run, over the grid of its profile.

    Steps that cannot reach the threshold are said on stderr.
    """
    sigmas, *_ = grid_of(profile)
    spreads = measured_spread(profile, run.train.rewards) if reads_profile(run) else ()
    made = plan_of(run, sigmas, spreads)
    check_parts(run, made)
    for warning in made.warnings:
        say(f"{run.run}: {warning}")
    write_json(output, made.to_dict())
    head = {"config_hash": run_key(run)}
    write_table(table, MERGE_PLAN, plan_rows(run.run, made), metadata=head)


def plan_rows(run: str, made: Plan) -> list[dict[str, Any]]:
    """Rows of the merge_plan table."""
    return [
        {
            "run": run,
            "step": start,
            "span": span,
            "sigma": made.sigmas[start],
            "sigma_stop": made.sigmas[start + span],
            "entropy": merged,
            "single_step_entropy": made.entropy[start],
            "threshold": made.threshold,
            "measure": made.measure,
        }
        for start, span, merged in zip(made.active, made.spans, made.merged_entropy, strict=True)
    ]


def grid_of(profile: str | Path) -> tuple[Sigmas, str, float]:
    """Grid, dynamics and noise level that a profile was measured with.

    Raises UserError if the file is missing or damaged, or does not say them.
    """
    metadata = metadata_of(read_table(profile, ENTROPY_PROFILE))
    try:
        sigmas = check_sigmas(json.loads(metadata["sigmas"]))
        dynamics, level = metadata["dynamics"], float(metadata["noise_level"])
        if dynamics not in STD or dynamics in DETERMINISTIC or not 0 < level < math.inf:
            raise ValueError(f"dynamics {dynamics!r} at noise level {level}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{profile}: does not say its grid (sigmas, dynamics, noise_level): {error}; delete it "
            "and run again"
        ) from None
    return sigmas, dynamics, level


def measured_spread(profile: str | Path, rewards: Mapping[str, float]) -> list[Spread]:
    """Spread of the rewards by step and span, from a profile.

    Per reward the mean over prompts of the spread within groups, over that of the yardstick; of
    several rewards the mean by weight. Raises UserError if the file is missing or damaged, or a
    yardstick is 0.
    """
    groups: dict[tuple[int, int], dict[str, list[tuple[float, float]]]] = {}
    entropy: dict[tuple[int, int], dict[str, float]] = {}
    for row in read_table(profile, ENTROPY_PROFILE).to_pylist():
        at, reward = (row["step"], row["span"]), row["quantity"].removeprefix("reward:")
        entropy[at] = {measure: row[measure] for measure in MEASURES}
        if None in entropy[at].values():
            raise UserError(f"{profile}: has steps without entropy; delete it and run again")
        pair = row["spread"], row["yardstick"]
        if row["quantity"].startswith("reward:") and reward in rewards and None not in pair:
            groups.setdefault(at, {}).setdefault(reward, []).append(pair)
    out = []
    for at, found in sorted(groups.items()):
        total = 0.0
        for reward, pairs in found.items():
            spread, yardstick = (sum(values) for values in zip(*pairs, strict=True))
            if yardstick == 0:
                raise UserError(
                    f"{profile}: noise on the image does not move reward {reward!r}: its yardstick "
                    "is 0, and no spread can be compared with it; plan by another reward"
                )
            total += abs(rewards[reward]) * spread / yardstick
        weight = sum(abs(rewards[reward]) for reward in found)
        out.append(Spread(*at, entropy[at], total / weight))
    return out


def load_plan(path: str | Path) -> Plan:
    """Read a plan; a UserError if the file is missing or damaged."""
    try:
        return Plan.from_dict(read_json(path))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a plan: {error}; delete it and run again") from None
