"""The ``egrpo`` command: one sub-command per stage; each imports its stage when it is called."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from egrpo import __version__
from egrpo.errors import DEFAULT, UserError, command

if TYPE_CHECKING:
    from collections.abc import Callable

    from egrpo.study.layout import Layout

FILE = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True, dir_okay=False)


class OneLineErrors(click.Group):
    """Prints a :class:`UserError` as one line and exits with status 2, without a traceback.

    On a terminal the line stands in a box, and other errors are shown with their source.
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            from egrpo.store.files import refused

            told = error if isinstance(error, UserError) else refused(error)
            if told is not None:
                _say(str(told))
                sys.exit(2)
            if not sys.stderr.isatty():
                raise
            from rich.console import Console

            Console(stderr=True).print_exception(suppress=[click])
            sys.exit(1)


def _say(message: str) -> None:
    if not sys.stderr.isatty():
        click.echo(f"egrpo: {message}", err=True)
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    panel = Panel(Text(message), title="egrpo", title_align="left", border_style="red")
    Console(stderr=True).print(panel)


def _reach_this_machine_directly() -> None:
    """Rewards and tracking servers on this machine are asked without the proxy of the network."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in hosts:
        hosts += [host for host in ("localhost", "127.0.0.1", "::1") if host not in hosts]
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Which denoising steps should reinforcement learning explore?"""
    _reach_this_machine_directly()
    # preempted jobs end like interrupted ones: files closed, tracking told
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@main.command("plan")
@click.option("--steps", type=int, default=16, show_default=True, help="Sampling steps T.")
@click.option("--shift", type=float, default=3.0, show_default=True, help="Timestep shift s.")
@click.option(
    "--end",
    type=click.Choice(["uniform", "stock"]),
    default="uniform",
    show_default=True,
    help="End of the grid: the paper's, or that of SD3's stock pipeline.",
)
@click.option("--noise-level", type=float, default=0.7, show_default=True, help="a, or eta.")
@click.option("--threshold", default="2.2", show_default=True, help="tau; 0: no merging; or auto.")
@click.option("--active", type=int, default=8, show_default=True, help="First steps that branch.")
@click.option("--measure", default="exp_per_dim", show_default=True, help="Unit of the threshold.")
@click.option("--dynamics", default="flow_sde", show_default=True, help="SDE of the branches.")
@click.option("--on-unreachable", default="cap", show_default=True, help="cap, drop or error.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@click.option("--profile", type=EXISTING, help="Profile of a model: its grid, and auto's spread.")
@click.option("--rewards", default="", help="auto: rewards of the profile, a,b,…; default all.")
@click.option("--factor", type=float, default=1.0, show_default=True, help="auto: enough spread.")
def plan_command(**options: Any) -> None:
    """Choose, by an entropy threshold, how many steps each SDE step merges. Needs no torch."""
    from egrpo.planning.plan_text import plan_text

    click.echo(plan_text(**options))


CONFIGS_HELP = """

    CONFIGS: the study's YAML (left out: config/config.yaml); further files are laid over it, as
    `snakemake --configfile` does.
    """


def _of_study(name: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command about the study in the files CONFIGS."""
    given = click.argument(
        "configs", type=FILE, nargs=-1, callback=lambda ctx, param, given: given or (DEFAULT,)
    )

    def made(function: Callable[..., None]) -> click.Command:
        function.__doc__ = f"{(function.__doc__ or '').rstrip()}{CONFIGS_HELP}"
        return main.command(name)(given(function))

    return made


def _layout(configs: tuple[Path, ...]) -> Layout:
    from egrpo.study.layout import Layout
    from egrpo.study.resolve import load_study

    return Layout(load_study(*configs))


RUNS = click.option(
    "--run", "runs", multiple=True, help="Run; given again, several; left out: all."
)


@_of_study("cost")
@RUNS
@click.option("--target", help="The runs that this target of snakemake needs; all: default runs.")
@click.option("--card", help="Hours on this card: its name, or a part of it, such as H200.")
@click.option("--price", type=click.FloatRange(0.0), help="Of an hour of the card: sums up money.")
@click.option("--profile", type=FILE, help="SLURM profile: is its time enough for each run?")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def cost_command(
    configs: tuple[Path, ...],
    runs: tuple[str, ...],
    target: str | None,
    card: str | None,
    price: float | None,
    profile: Path | None,
    as_json: bool,
) -> None:
    """Network evaluations of each run of a study, before it runs, and hours. Needs no torch.

    Neither weights nor prompts need to be there. Hours are shown with --card, or where `egrpo
    measure` measured the study's models; the last line sums them up over all seeds.
    """
    from egrpo.ops.cost import asked_for, cost_table, study_cost

    study = _layout(configs).study
    names = asked_for(study, runs, target) if runs or target else ()
    if as_json:
        click.echo(json.dumps(study_cost(study, names, card), indent=1))
    else:
        click.echo(cost_table(study, names, card, price=price, profile=profile))


@_of_study("measure")
@RUNS
def measure_command(configs: tuple[Path, ...], runs: tuple[str, ...]) -> None:
    """Time a study's models on this machine, a minute each, so that `egrpo cost` says hours.

    Each model and size of the runs once: sampling, training and decoding in the batches that the
    first run with it sets. The rows are kept in `rates.tsv` of the study's results.
    """
    from egrpo.ops.rates import table_of
    from egrpo.ops.timing import measure

    at = _layout(configs)
    rates = measure(at, runs, click.echo)
    click.echo(table_of(rates))
    click.echo(f"{at.rates}: `{shlex.join(['egrpo', 'cost', *map(str, configs)])}` reads it")


@_of_study("doctor")
@click.option("--skip-rewards", is_flag=True, help="Do not load the reward models.")
@click.option("--fetch-plan", is_flag=True, help="Print commands that fetch what is not there.")
def doctor_command(configs: tuple[Path, ...], skip_rewards: bool, fetch_plan: bool) -> None:
    """Check a study before a long run: one line each, exit status 1 if one of them fails.

    With --fetch-plan it prints a shell script in its stead, which brings the weights, rewards and
    prompts that are not there, with sizes and licenses; nothing is fetched.
    """
    from egrpo.ops import published
    from egrpo.ops.doctor import doctor

    if fetch_plan:
        click.echo("\n".join(published.fetch_plan(_layout(configs).study)))
        return
    failed = False
    for finding in doctor(configs, rewards=not skip_rewards):
        click.echo(str(finding))
        failed |= finding.level == "FAIL"
    sys.exit(1 if failed else 0)


@main.command("prompts")
@click.argument("name", required=False)
@click.argument("files", type=EXISTING, nargs=-1)
@click.option("--to", type=FILE, help="The prompt file; left out: where presets look for it.")
def prompts_command(name: str | None, files: tuple[Path, ...], to: Path | None) -> None:
    """Make a prompt file of the FILES of the published set NAME, and check their count.

    Without NAME the sets are listed. `egrpo doctor --fetch-plan` prints the commands that fetch
    those of a study.
    """
    from egrpo.ops import published

    if name is None:
        click.echo(published.table())
    elif not files:
        raise click.UsageError("Missing argument 'FILES...'.")
    else:
        click.echo(published.convert(name, files, to))


@_of_study("clean")
@click.option("--yes", is_flag=True, help="Remove what is listed.")
def clean_command(configs: tuple[Path, ...], yes: bool) -> None:
    """List what earlier settings of a study left in its folder; with --yes, remove it.

    Settings, embeddings, profiles, evaluations of the base model, runs with their results, and
    states of training that no run of today's settings wants. Two studies that share a folder have
    different `study` names; files of one that has the same name count as earlier ones.
    """
    from egrpo.ops.clean import leftovers, remove, summary

    at = _layout(configs)
    found = leftovers(at)
    if yes:
        remove(at, found)
    for one in found:
        click.echo(f"{one.size / 2**20:>10.1f} MiB  {one.path}")
    again = shlex.join(["egrpo", "clean", *map(str, configs), "--yes"])
    said = "removed" if yes else f"`{again}` removes them"
    click.echo(f"{at.root}: {summary(found)}{f': {said}' if found else ''}")


@_of_study("status")
def status_command(configs: tuple[Path, ...]) -> None:
    """Say of each run what is done, what is to do, and what of it a change has made stale."""
    from egrpo.ops.status import status

    for line in status(_layout(configs)):
        click.echo(line)


@_of_study("keep")
@RUNS
def keep_command(configs: tuple[Path, ...], runs: tuple[str, ...]) -> None:
    """Keep results that other code made, as if today's had: you say that they are the same.

    Also takes over results of versions that did not record what they were computed from, if their
    settings are today's. Settings and files that changed are never passed over.
    """
    from egrpo.ops.status import keep

    for line in keep(_layout(configs), runs):
        click.echo(line)


@main.command("make", hidden=True)
@click.argument("stage")
@click.argument("order", type=EXISTING)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--name", default="", help="Of what is shared or told.")
def make_command(stage: str, order: Path, threads: int | None, name: str) -> None:
    """Do a job of the workflow."""
    from egrpo.jobs import make

    make(stage, order, threads=threads, name=name)


@main.command("repeat")
@click.argument("config", type=EXISTING)
@click.option("--plan", type=EXISTING, help="Merge plan, for methods that merge.")
@click.option("--output", type=FILE, required=True, help="Folder of the results; rerun to resume.")
def repeat_command(config: Path, plan: Path | None, output: Path) -> None:
    """Train and evaluate one run again from its resolved settings CONFIG, without a study."""
    from egrpo.bundle.repeat import repeat

    repeat(config, plan, output)


@main.command("lease", context_settings={"ignore_unknown_options": True})
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--ids", default="", help="GPUs to choose from, 0,1,…; left out: all.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def lease_command(gpus: int, ids: str, command: tuple[str, ...]) -> None:
    """Run COMMAND with GPUs that no other lease holds (profiles/gpu)."""
    from egrpo.ops.lease import lease

    lease(gpus, command, [name for name in ids.split(",") if name])


def _whole(name: str, default: int, text: str) -> Callable[[Any], Any]:
    """An option that is a whole number, 1 or more."""
    return click.option(name, default=default, show_default=True, type=click.IntRange(1), help=text)


@main.command("serve-rewards")
@click.option("--reward", "names", multiple=True, help="Name in the study; left out: all.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8800, show_default=True, help="Port.")
@click.option("--token-file", type=EXISTING, help="File with the token that clients must send.")
@click.option("--device", default="auto", show_default=True, help="Of rewards that name none.")
@_whole("--batch", 64, "Most images scored together.")
@_whole("--limit", 4096, "Most images that wait for a reward.")
@_whole("--request-mib", 256, "Most MiB of a request, and of its images once decoded.")
@_whole("--waiting-mib", 2048, "Most MiB of all requests that are read, decoded or waiting.")
@_whole("--side", 4096, "Most pixels of an image's side.")
@click.argument("configs", type=EXISTING, nargs=-1, required=True)
def serve_command(configs: tuple[Path, ...], names: tuple[str, ...], **options: Any) -> None:
    """Serve the rewards of a study to training jobs (`kind: remote`)."""
    from egrpo.ops.serve import serve

    serve(configs, names, **options)


CONFIGS = click.option(
    "--config",
    "configs",
    type=FILE,
    multiple=True,
    default=[DEFAULT],
    show_default=True,
    help="Study; given again, a file is laid over those before.",
)


@main.command("report")
@CONFIGS
def report_command(configs: tuple[Path, ...]) -> None:
    """Print the comparison of all runs with their base model."""
    from egrpo.report.report import print_report

    at = _layout(configs)
    if not at.comparison.exists():
        raise UserError(f"{at.comparison}: no such file; `{command(configs)}` makes it")
    print_report(at.comparison)
    if at.page("index").exists():
        click.echo(f"The story on one page: {at.page('index')}")


def _runs_of_study(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Run ids for the shell; whatever is wrong with the settings, it says nothing."""
    try:
        runs = _layout(ctx.params.get("configs") or (DEFAULT,)).study.runs
    except Exception:
        return []
    return [CompletionItem(run) for run in runs if run.startswith(incomplete)]


@main.command("export")
@click.argument("run", shell_complete=_runs_of_study)
@CONFIGS
@click.option("--output", type=FILE, help="Folder to make; left out: export/RUN of the study.")
@click.option("--license", "license", help="Of the weights, as hubs name it: apache-2.0, other, …")
@click.option("--base-model", help="The base model's hub id, where the study names a folder.")
def export_command(run: str, configs: tuple[Path, ...], output: Path | None, **says: Any) -> None:
    """Bundle the trained RUN for others: weights, settings, plan, scores, model card."""
    from egrpo.bundle.export import export

    folder = export(_layout(configs), run, output, configs=configs, **says)
    upload = shlex.join(["hf", "upload", "OWNER/NAME", str(folder)])
    click.echo(f"{folder}: ready to share, for example by `{upload}`")


@main.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print what makes SHELL complete commands, options and run ids of `egrpo`."""
    found = get_completion_class(shell)
    assert found is not None  # click has all three
    click.echo(found(main, {}, "egrpo", "_EGRPO_COMPLETE").source())


@main.command("ui")
@CONFIGS
@click.option("--port", type=int, default=5000, show_default=True, help="Wanted port; 0 for any.")
def ui_command(configs: tuple[Path, ...], port: int) -> None:
    """Browse the study's runs in MLflow, on 127.0.0.1."""
    from egrpo.tracking.ui import serve

    at = _layout(configs)
    serve(at.store, port, made_by=command(configs), study=at.study)
