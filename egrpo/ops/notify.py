"""A command of the user's when snakemake has ended: mail, a chat, a pager."""

from __future__ import annotations

import os
import subprocess

from egrpo.errors import UserError
from egrpo.report.report import short_table
from egrpo.study.layout import Layout

PATIENCE = 60.0
"""Seconds that the command may take."""


def notify(at: Layout, outcome: str, log: str) -> str | None:
    """Run ``notify`` of the study with a summary on its standard input; what went wrong, or None.

    Args:
        at: the study.
        outcome: finished, or failed.
        log: of snakemake, where a failure is told.
    """
    command = at.study.notify
    if command is None:
        return None
    more = {"EGRPO_STUDY": at.study.name, "EGRPO_OUTCOME": outcome}
    try:
        done = subprocess.run(
            command,
            shell=True,  # the user's own line
            input=summary(at, outcome, log),
            env=os.environ | more,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"notify: {error}"
    if done.returncode:
        said = " ".join(done.stderr.split())
        return f"notify: {command!r:.200} ended with status {done.returncode}: {said:.200}"
    return None


def summary(at: Layout, outcome: str, log: str) -> str:
    """What is told: outcome and place, then the comparison with the base model, or the log."""
    head = f"egrpo: study {at.study.name} {outcome}: {at.root.absolute()}\n"
    if outcome != "finished":
        return f"{head}What happened: {log}\nWhat is done and what is to do: `egrpo status`\n"
    try:
        return f"{head}\n{short_table(at.comparison)}"
    except (UserError, OSError):  # another target, which compares nothing
        return head
