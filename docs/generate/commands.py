"""The page of all commands: `egrpo`, `make`, and the targets of the workflow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from docs.generate.text import cell, rows
from egrpo.cli import main
from egrpo.study.resolve import load_study

TARGETS = {
    "all": "What `snakemake` makes without a target: the default runs (`default_runs`), their "
    "comparison with the base model, figures, and delivery to MLflow.",
    "paper": "The tables and figures that the study names under `paper`, on a page, and in MLflow.",
    "everything": "All tables and figures of the study, on a page, and in MLflow.",
    "plans": "Profiles and merge plans of all runs, without training anything.",
    "suffixes": "How cheaper suffixes, kept features and float8 weights rank the samples of a "
    "group, on the base model.",
    "toy_world": "The toy world's weights again, by `config/toy_world.yaml`; half an hour.",
}
"""Targets of the workflow that every study has."""

INTRODUCTION = """\
# Commands

Generated from `egrpo/cli.py`, the `Makefile` and the workflow by `python -m docs.generate`.

`make` puts `.venv/bin` into the path of what it runs; for the other commands `. .venv/bin/activate`
first. A wrong setting, a missing or a damaged file ends every command in one line, with status 2.
"""


def make_targets() -> Iterator[tuple[str, str]]:
    """Targets of the Makefile with what they say of themselves."""
    text = Path("Makefile").read_text(encoding="utf-8")
    yield from re.findall(r"^([a-z-]+):.*?## (.*)$", text, re.MULTILINE)


def _option(option: click.Option) -> tuple[str, str, str]:
    """An option's name, default and sentence."""
    kind = "" if option.is_flag else f" {option.type.name.upper()}"
    plain = not option.is_flag and isinstance(option.default, (str, int, float))
    shown = f"`{option.default}`" if plain and option.default != "" else ""
    if option.required or option.multiple:
        shown = "required" if option.required else "may be repeated"
    return f"`{'`, `'.join(option.opts)}{kind}`", shown, cell(option.help or "")


def described(name: str, command: click.Command) -> list[str]:
    """Lines of one command's section."""
    options = [p for p in command.params if isinstance(p, click.Option)]
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = ["egrpo", name]
    usage += [f"{o.opts[0]} {o.type.name.upper()}" for o in options if o.required]
    usage += ["[OPTIONS]"] if any(not o.required for o in options) else []
    names = ((a.nargs, (a.human_readable_name or "").upper()) for a in arguments)
    usage += [f"{shown}..." if count == -1 else shown for count, shown in names]
    first, *more = [" ".join(part.split()) for part in (command.help or "").split("\n\n")]
    out = [f"### `egrpo {name}`", "", first, "", "```", " ".join(usage), "```", ""]
    for part in more:
        out += [part, ""]
    body = [_option(option) for option in options]
    return [*out, *(rows(("option", "default", "what it is"), body) if body else []), ""]


def commands_page() -> str:
    """Markdown page of every command; the repository's root is the working directory."""
    study = load_study("config/config.yaml")
    out = [INTRODUCTION, "## make", ""]
    out += rows(("target", "what it does"), ((f"`make {t}`", cell(s)) for t, s in make_targets()))
    out += [
        "",
        "## snakemake",
        "",
        "`snakemake --cores all TARGET... --configfile A.yaml B.yaml`: makes the targets and what "
        "they need; without `--configfile` the study is `config/config.yaml`; of several files "
        "each is laid over those before it. `-n` shows what would run.",
        "",
        *rows(("target", "what it makes"), ((f"`{t}`", cell(s)) for t, s in TARGETS.items())),
        "",
        "A file is a target too, such as `results/laptop/runs/egrpo_g2-s1/scores.parquet`. So is "
        "each table and figure that a study names; those of `config/config.yaml`:",
        "",
    ]
    captions = {name: table.caption for name, table in study.tables.items()}
    captions |= {name: figure.caption for name, figure in study.figures.items()}
    shown = ((f"`{name}`", cell(caption)) for name, caption in captions.items())
    out += rows(("target", "what it shows"), shown)
    out += ["", "## egrpo", ""]
    for name, command in sorted(main.commands.items()):
        out += [] if command.hidden else described(name, command)
    out += [
        "Rules of the workflow call one more, `egrpo make STAGE ORDER`, which `--help` leaves "
        "out: an order is a file in `results/<study>/settings` that says what was planned. The "
        "line in a log that failed can be repeated by hand."
    ]
    return "\n".join(out).rstrip() + "\n"
