"""A run again from its resolved settings alone, without a study around it."""

from __future__ import annotations

from pathlib import Path

from egrpo.config.load import load_run
from egrpo.errors import UserError
from egrpo.measure.embed import embed_files
from egrpo.measure.evaluate import evaluate
from egrpo.planning.plan import load_plan
from egrpo.planning.trees import needs_plan
from egrpo.train.job import train


def repeat(config: Path, plan: Path | None, output: Path) -> None:
    """Embed the prompts, train, evaluate, all into ``output``; started again, it goes on.

    ``config`` holds resolved settings of the run, as a bundle or the results do; ``plan`` its merge
    plan, where its method merges steps.
    """
    run = load_run(config)
    if needs_plan(run) and plan is None:
        raise UserError(f"{config}: method {run.method.name} needs --plan")
    embedded = embed_files(run, output / "embeddings")
    known = load_plan(plan) if plan is not None else None
    train(run, known, embedded, state=output / "state" / "again", output=output)
    evaluate(run, embedded, output / "adapter", output, training=output)
