"""Settings that others may see: no secret for MLflow, and nothing of the machine in what is shared.

Nothing is recognized by its name or its look: of what a user may have put a secret into, only
what cannot hold one stays.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from egrpo.config.load import yaml_of
from egrpo.config.models import RunConfig

NO_ADDRESS = "http://left-out.invalid"
NO_PATH = "left-out"
TEXTS = ("question", "pattern")
"""Settings of rewards that are texts, whatever they look like; all others may be paths."""
_OUTSIDE = re.compile(r"(file:|[A-Za-z]:)?[/\\]|~")


def without_secrets(run: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """All settings of a run without what may be secret, and a line for each that was changed.

    They are valid settings still.
    """
    settings, notes = run.model_dump(), []
    if settings["tracking"]["uri"] is not None:
        settings["tracking"]["uri"] = None
        notes.append("tracking.uri: left out")
    for name, reward in settings["rewards"].items():
        if "url" in reward and (address := _plain_address(reward["url"])) != reward["url"]:
            reward["url"] = address
            notes.append(f"rewards.{name}.url: without user, password and query")
        if reward["kind"] == "custom":
            reward["options"] = _numbers(reward["options"], f"rewards.{name}.options", notes)
    return settings, notes


def shareable(run: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """The same, also without addresses of services, token files, and folders of this machine."""
    settings, notes = without_secrets(run)
    for name, reward in settings["rewards"].items():
        notes = [note for note in notes if not note.startswith(f"rewards.{name}.url: ")]
        for key, instead in (("url", NO_ADDRESS), ("token_file", None)):
            if reward.get(key) is not None:
                reward[key] = instead
                notes.append(f"rewards.{name}.{key}: left out")
    return _without_folders(settings, "", notes), notes


def shown_yaml(run: RunConfig, settings: dict[str, Any], notes: list[str]) -> str:
    """A file of settings that says first what it lacks."""
    head = [f"Run {run.run}: all its settings, resolved.", *notes]
    return "".join(f"# {' '.join(line.split())}\n" for line in head) + yaml_of(settings)


def without_folder(path: str) -> str:
    """A path that says nothing of this machine: one inside the working folder as it is, else its
    last part alone; of POSIX and of Windows."""
    parts = re.split(r"[/\\]", path)
    if not _OUTSIDE.match(path) and ".." not in parts:
        return path
    names = [part for part in parts if part.strip(".") and not re.match(r"~|file:|.:$", part)]
    return names[-1] if names else NO_PATH


def _plain_address(url: str) -> str:
    """An address without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return NO_ADDRESS
    host = parts.netloc.rpartition("@")[2]
    # an @ behind the host: the password held a slash
    if not host or "@" in parts.path:
        return NO_ADDRESS
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def _numbers(value: Any, key: str, notes: list[str]) -> Any:
    """Options of a reward of one's own: names, numbers, yes and no stay, at any depth."""
    if isinstance(value, dict):
        return {name: _numbers(below, f"{key}.{name}", notes) for name, below in value.items()}
    if isinstance(value, list):
        return [_numbers(below, f"{key}.{number}", notes) for number, below in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    notes.append(f"{key}: left out")
    return None


def _without_folders(value: Any, key: str, notes: list[str]) -> Any:
    if isinstance(value, dict):
        at = f"{key}." if key else ""
        return {
            k: v if k in TEXTS and isinstance(v, str) else _without_folders(v, f"{at}{k}", notes)
            for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_without_folders(v, key, notes) for v in value]
    if not isinstance(value, str) or (kept := without_folder(value)) == value:
        return value
    notes.append(f"{key}: {kept}, without its folder")
    return kept
