"""The ``egrpo`` command: one sub-command per stage; each imports its stage when it is called."""

from __future__ import annotations

import json
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from egrpo import __version__
from egrpo.errors import UserError

if TYPE_CHECKING:
    from egrpo.config.load import Study

FILE = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


class OneLineErrors(click.Group):
    """Prints a :class:`UserError` as one line and exits with status 2, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"egrpo: {error}", err=True)
        except Exception as error:
            from egrpo.store.files import full_disk, no_space

            if not no_space(error):
                raise
            where = getattr(error, "filename", None) or "results"
            click.echo(f"egrpo: {full_disk(where)}", err=True)
        sys.exit(2)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Which denoising steps should reinforcement learning explore?"""
    # preempted jobs end like interrupted ones: files closed, tracking told
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@main.command("plan")
@click.option("--steps", type=int, default=16, show_default=True, help="Sampling steps T.")
@click.option("--shift", type=float, default=3.0, show_default=True, help="Timestep shift s.")
@click.option("--noise-level", type=float, default=0.7, show_default=True, help="a, or eta.")
@click.option("--threshold", type=float, default=2.2, show_default=True, help="tau; 0: no merging.")
@click.option("--active", type=int, default=8, show_default=True, help="First steps that branch.")
@click.option("--measure", default="exp_per_dim", show_default=True, help="Unit of the threshold.")
@click.option("--dynamics", default="flow_sde", show_default=True, help="SDE of the branches.")
@click.option("--on-unreachable", default="cap", show_default=True, help="cap, drop or error.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.option("--run-config", type=EXISTING, help="Resolved settings of a run (workflow).")
@click.option("--profile", type=EXISTING, help="Its entropy profile (workflow).")
@click.option("--output", type=FILE, help="plan.json to write (workflow).")
@click.option("--table", type=FILE, help="merge_plan.parquet to write (workflow).")
def plan_command(
    run_config: Path | None,
    profile: Path | None,
    output: Path | None,
    table: Path | None,
    **options: Any,
) -> None:
    """Choose, by an entropy threshold, how many steps each SDE step merges. Needs no torch."""
    if run_config is not None:
        if profile is None or output is None or table is None:
            raise UserError("egrpo plan --run-config needs --profile, --output and --table")
        from egrpo.config.load import load_run
        from egrpo.stages.plan import plan

        plan(load_run(run_config), profile, output, table)
        return
    _print_plan(**options)


def _print_plan(
    steps: int,
    shift: float,
    noise_level: float,
    threshold: float,
    active: int,
    measure: str,
    dynamics: str,
    on_unreachable: str,
    as_json: bool,
) -> None:
    from egrpo.core.entropy import MEASURES, step_entropy
    from egrpo.core.noise import STD
    from egrpo.core.plan import make_plan
    from egrpo.core.schedule import shifted_sigmas

    if measure not in MEASURES:
        raise UserError(f"--measure: {measure!r}; choose {', '.join(MEASURES)}")
    if dynamics not in STD or dynamics == "ode":
        raise UserError(f"--dynamics: {dynamics!r}; choose flow_sde, dance_sde or cps")
    if active < 1:
        raise UserError(f"--active: at least 1 step must branch, got {active}")
    if not 0 < noise_level <= (1 if dynamics == "cps" else 5):
        raise UserError(
            f"--noise-level: must be positive and at most 5 (cps: 1), got {noise_level}"
        )
    if not math.isfinite(threshold):
        raise UserError(f"--threshold: must be a finite number, got {threshold}")
    if dynamics == "cps" and threshold != 0:
        raise UserError(
            "--threshold: must be 0 with cps, whose entropy falls as a step gets longer"
        )
    if not 1e-3 <= shift <= 1e3:
        raise UserError(f"--shift: must lie between 0.001 and 1000, got {shift}")
    try:
        made = make_plan(
            shifted_sigmas(steps, shift),
            range(active),
            threshold=threshold,
            noise_level=noise_level,
            dynamics=dynamics,
            measure=measure,
            on_unreachable=on_unreachable,
        )
    except ValueError as error:
        raise UserError(f"egrpo plan: {error}") from None
    for warning in made.warnings:
        click.echo(f"egrpo: warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(made.to_dict()))
        return
    click.echo(f"{'step':>4} {'span':>4} {'sigma':>14} {'alone':>8} {'merged':>8}  [{measure}]")
    for i, span in zip(made.active, made.spans, strict=True):
        merged = step_entropy(
            made.sigmas, i, span, noise_level=noise_level, dynamics=dynamics, measure=measure
        )
        sigma = f"{made.sigmas[i]:.3f}->{made.sigmas[i + span]:.3f}"
        click.echo(f"{i:>4} {span:>4} {sigma:>14} {made.entropy[i]:>8.4f} {merged:>8.4f}")
    click.echo(" ".join(f"{name}: {count}" for name, count in made.nfe().items()))


@main.command("cost")
@click.argument("config", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def cost_command(config: Path, as_json: bool) -> None:
    """Network evaluations per prompt and per run of each run in CONFIG. Needs no torch."""
    from dataclasses import asdict

    from egrpo.config.load import load_study
    from egrpo.config.trees import cost_of, needs_plan, plan_of, training_sigmas, tree_of

    costs = {}
    for name, run in load_study(config).runs.items():
        made = plan_of(run, training_sigmas(run)) if needs_plan(run) else None
        costs[name] = asdict(cost_of(run, tree_of(run, made))) | {"method": run.method.name}
    if as_json:
        click.echo(json.dumps(costs, indent=1))
        return
    width = max(len("run"), *map(len, costs))
    click.echo(
        f"{'run':<{width}}  {'method':<10} {'forward/prompt':>14} {'train/prompt':>12} "
        f"{'forward/run':>12} {'train/run':>10} {'reference/run':>13}"
    )
    for name, c in costs.items():
        click.echo(
            f"{name:<{width}}  {c['method']:<10} {c['forward_per_prompt']:>14,} "
            f"{c['train_per_prompt']:>12,} {c['forward']:>12,} {c['train']:>10,} "
            f"{c['reference']:>13,}"
        )
    click.echo(
        "forward: evaluations while sampling; train: forward+backward passes; "
        "reference: forwards of the base model for the KL term"
    )


def _threads(count: int | None) -> None:
    """Keep torch to the threads that the workflow gave this job."""
    if count:
        import torch

        torch.set_num_threads(count)


@main.command("embed")
@click.option("--run-config", type=EXISTING, required=True, help="Resolved settings of a run.")
@click.option("--output", type=FILE, required=True, help="Safetensors file to write.")
def embed_command(run_config: Path, output: Path) -> None:
    """Encode the prompt files, so that no later job loads a text encoder."""
    from egrpo.config.load import load_run
    from egrpo.stages.embed import embed

    embed(load_run(run_config), output)


@main.command("profile")
@click.option("--run-config", type=EXISTING, required=True, help="Resolved settings of a run.")
@click.option("--embeddings", type=EXISTING, required=True, help="Prompt embeddings.")
@click.option("--output", type=FILE, required=True, help="Parquet file to write.")
@click.option("--threads", type=int, help="CPU threads.")
def profile_command(run_config: Path, embeddings: Path, output: Path, threads: int | None) -> None:
    """Measure the entropy profile of the base model."""
    from egrpo.config.load import load_run
    from egrpo.stages.profile import profile

    _threads(threads)
    profile(load_run(run_config), embeddings, output)


@main.command("train")
@click.option("--run-config", type=EXISTING, required=True, help="Resolved settings of a run.")
@click.option("--embeddings", type=EXISTING, required=True, help="Prompt embeddings.")
@click.option("--plan", "plan_path", type=EXISTING, help="Merge plan, for methods that merge.")
@click.option("--state", type=FILE, required=True, help="Folder of checkpoints; rerun to resume.")
@click.option("--output", type=FILE, required=True, help="Folder of the outputs.")
@click.option("--store", type=EXISTING, help="Tracking store made by `egrpo prepare`.")
@click.option("--threads", type=int, help="CPU threads.")
def train_command(
    run_config: Path,
    embeddings: Path,
    plan_path: Path | None,
    state: Path,
    output: Path,
    store: Path | None,
    threads: int | None,
) -> None:
    """Train one run, from wherever its state is."""
    from egrpo.config.load import load_run
    from egrpo.config.trees import needs_plan
    from egrpo.stages.plan import load_plan

    run = load_run(run_config)
    if needs_plan(run) and plan_path is None:
        raise UserError(f"run {run.run}: method {run.method.name} needs --plan")
    plan = load_plan(plan_path) if plan_path else None
    _threads(threads)
    from egrpo.stages.train_run import train

    train(run, plan, embeddings, state=state, output=output, store=store)


@main.command("evaluate")
@click.option("--run-config", type=EXISTING, required=True, help="Resolved settings of a run.")
@click.option("--embeddings", type=EXISTING, required=True, help="Prompt embeddings.")
@click.option("--adapter", type=FILE, help="What training wrote; left out: the base model.")
@click.option("--scores", type=FILE, required=True, help="Parquet file of scores to write.")
@click.option("--images", type=FILE, required=True, help="Parquet file of images to write.")
@click.option("--threads", type=int, help="CPU threads.")
def evaluate_command(
    run_config: Path,
    embeddings: Path,
    adapter: Path | None,
    scores: Path,
    images: Path,
    threads: int | None,
) -> None:
    """Sample the held-out prompts and score them under all rewards."""
    from egrpo.config.load import load_run
    from egrpo.stages.evaluate import evaluate

    _threads(threads)
    evaluate(load_run(run_config), embeddings, adapter, scores, images)


RUN_CONFIGS = click.argument("run_configs", type=EXISTING, nargs=-1, required=True)
RESULTS = click.option("--results", default="results", show_default=True, help="Results folder.")


def _study(results: str, run_configs: tuple[Path, ...]) -> Study:
    """The study that these resolved runs belong to."""
    from egrpo.config.load import Study, load_run

    runs = [load_run(path) for path in run_configs]
    return Study(runs[0].study, results, {run.run: run for run in runs})


@main.command("prepare")
@RESULTS
@click.option("--output", type=FILE, required=True, help="JSON file to write.")
@RUN_CONFIGS
def prepare_command(results: str, output: Path, run_configs: tuple[Path, ...]) -> None:
    """Prepare the MLflow store before any run uses it."""
    from egrpo.stages.prepare import prepare

    prepare(_study(results, run_configs), output)


@main.command("tables")
@RESULTS
@RUN_CONFIGS
def tables_command(results: str, run_configs: tuple[Path, ...]) -> None:
    """Compare every run with its base model: Parquet, CSV and Markdown."""
    from egrpo.config.layout import Layout
    from egrpo.stages.tables import RunFiles, make_comparison

    at = Layout(_study(results, run_configs))
    files = {run: RunFiles.at(at.run(run), at.base(run)) for run in at.study.runs}
    make_comparison(files, at.comparison.parent)


@main.command("figures")
@RESULTS
@RUN_CONFIGS
def figures_command(results: str, run_configs: tuple[Path, ...]) -> None:
    """Draw entropy, spread, reward curves and the before/after grid."""
    from egrpo.config.layout import Layout
    from egrpo.stages.draw import draw

    draw(Layout(_study(results, run_configs)))


@main.command("publish")
@RESULTS
@click.option("--store", type=EXISTING, required=True, help="Written by `egrpo prepare`.")
@click.option("--output", type=FILE, required=True, help="JSON file to write.")
@RUN_CONFIGS
def publish_command(results: str, store: Path, output: Path, run_configs: tuple[Path, ...]) -> None:
    """Deliver to MLflow whatever it does not have yet; running it again adds nothing."""
    from egrpo.stages.publish import publish

    publish(_study(results, run_configs), store, output)


CONFIG = click.option(
    "--config", type=FILE, default="config/config.yaml", show_default=True, help="Study."
)


@main.command("report")
@CONFIG
def report_command(config: Path) -> None:
    """Print the comparison of all runs with their base model."""
    from egrpo.config.layout import Layout
    from egrpo.config.load import load_study
    from egrpo.stages.report import print_report

    print_report(Layout(load_study(config)).comparison)


@main.command("ui")
@CONFIG
@click.option("--port", type=int, default=5000, show_default=True, help="Wanted port.")
def ui_command(config: Path, port: int) -> None:
    """Browse the study's runs in MLflow, on 127.0.0.1."""
    from egrpo.config.layout import Layout
    from egrpo.config.load import load_study
    from egrpo.stages.ui import serve

    serve(Layout(load_study(config)).store, port)
