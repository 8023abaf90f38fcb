"""Stages of a run as commands with paths of their own, for tests without a workflow."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from egrpo.cli import OneLineErrors
from egrpo.config.load import load_run
from egrpo.ops.memory import advice_where_memory_ends
from egrpo.planning.plan import load_plan

FILE = click.Path(path_type=Path)


@click.group(cls=OneLineErrors)
@click.option("--run-config", type=FILE, required=True)
@click.option("--embeddings", type=FILE, required=True, help="Folder of `conftest.embedded`.")
@click.option("--output", type=FILE, required=True, help="Folder.")
@click.option("--threads", type=int)
@click.pass_context
def main(
    ctx: click.Context, run_config: Path, embeddings: Path, output: Path, threads: int | None
) -> None:
    """What all stages are given."""
    import signal

    import torch

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if threads:
        torch.set_num_threads(threads)
    sets = {"train": "train", "profile": "train", "heldout": "heldout", "monitor": "heldout"}
    files = {name: embeddings / f"{file}.safetensors" for name, file in sets.items()}
    ctx.obj = load_run(run_config), files, output


@main.command()
@click.option("--plan", "path", type=FILE)
@click.option("--state", type=FILE, required=True)
@click.pass_obj
def train(obj: tuple, path: Path | None, state: Path) -> None:
    from egrpo.train.job import train

    run, embeddings, output = obj
    with advice_where_memory_ends(run, "train"):
        plan = load_plan(path) if path else None
        train(run, plan, embeddings, state=state / "key", output=output)


@main.command()
@click.option("--adapter", type=FILE)
@click.pass_obj
def evaluate(obj: tuple, adapter: Path | None) -> None:
    from egrpo.measure.evaluate import evaluate

    run, embeddings, output = obj
    with advice_where_memory_ends(run, "evaluate"):
        evaluate(run, embeddings, adapter, output)


@main.command()
@click.pass_obj
def profile(obj: tuple) -> None:
    from egrpo.measure.profile import profile

    run, embeddings, output = obj
    profile(run, embeddings, output / "profile.parquet", output / "branches.parquet")


@main.command()
@click.option("--plan", "path", type=FILE, required=True)
@click.pass_obj
def suffixes(obj: tuple, path: Path) -> None:
    from egrpo.measure.suffixes import suffixes

    run, embeddings, output = obj
    suffixes(run, load_plan(path), embeddings, output / "suffixes.parquet")


if __name__ == "__main__":
    main()
