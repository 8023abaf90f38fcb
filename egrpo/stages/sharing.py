"""Settings that may leave this machine: no secret, no address, no absolute path."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from egrpo.config.models import RunConfig

SECRET = re.compile(r"token|secret|passw|credential|auth|(^|_)key$", re.IGNORECASE)
"""Names of the options of a reward of one's own whose values nobody else may see."""
NO_ADDRESS = "http://left-out.invalid"
_PATH_IN_TEXT = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/:\"',;]+/)*([^\s/:\"',;]+)")
_USER_OF_URL = re.compile(r"(?<=://)[^/@\s]*@")


def shareable(run: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """All settings of a run as they may be given away; they are valid settings still.

    Returns:
        The settings, and one line for each that was changed.
    """
    settings, notes = run.model_dump(), []
    if settings["tracking"]["uri"] is not None:
        settings["tracking"]["uri"] = None
        notes.append("tracking.uri: left out")
    for name, reward in settings["rewards"].items():
        for key, instead in (("url", NO_ADDRESS), ("token_file", None)):
            if reward.get(key) is not None:
                reward[key] = instead
                notes.append(f"rewards.{name}.{key}: left out")
        if reward["kind"] == "custom":
            reward["options"] = _options(reward["options"], f"rewards.{name}.options", notes)
    return _without_folders(settings, "", notes), notes


def without_folder(path: str) -> str:
    """A path that says nothing of this machine: relative ones as they are, else the name alone."""
    return PurePath(path).name if path.startswith(("/", "~")) else path


def _without_folders(value: Any, key: str, notes: list[str]) -> Any:
    if isinstance(value, dict):
        at = f"{key}." if key else ""
        return {k: _without_folders(v, f"{at}{k}", notes) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_folders(v, key, notes) for v in value]
    if not isinstance(value, str) or (kept := without_folder(value)) == value:
        return value
    notes.append(f"{key}: {kept}, without its folder")
    return kept


def _options(value: Any, key: str, notes: list[str]) -> Any:
    """Options of a reward of one's own: they may be anything, at any depth."""
    if isinstance(value, dict):
        out: dict[str, Any] = {}
        for name, below in value.items():
            if SECRET.search(str(name)):
                out[name] = None
                notes.append(f"{key}.{name}: left out")
            else:
                out[name] = _options(below, f"{key}.{name}", notes)
        return out
    if isinstance(value, list):
        return [_options(below, key, notes) for below in value]
    if not isinstance(value, str):
        return value
    kept = _PATH_IN_TEXT.sub(r"\1", _USER_OF_URL.sub("", value))
    if kept != value:
        notes.append(f"{key}: without folders and names of users")
    return kept
