"""Settings as they lie in files, and laid over each other."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from egrpo.config.explain import explain, shown
from egrpo.config.models import RunConfig
from egrpo.errors import UserError

Tree = dict[str, Any]


_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}")

_ANCIENT = re.compile(r"[+-]?0[0-7_]+|.*:.*")
"""Numbers that YAML 1.1 reads as others: 010 as 8, 1:30 as 90."""


def _at(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


class Loader(yaml.SafeLoader):
    """Plain YAML of which nothing is lost, and no number read as another than it looks like."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses a key that is given twice, of which YAML would take the last."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:
                    raise _at(key, f"{key.value!r} is given twice")
                seen.add((key.tag, key.value))
        return node

    def number(self, node: yaml.ScalarNode) -> float:
        """A number; refused where its digits say another to people."""
        if _ANCIENT.fullmatch(node.value):
            raise _at(node, f"{node.value} would be read as another number; write it plainly")
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for _kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", Loader.number)


def parse(text: str) -> Any:
    """What YAML text says.

    Raises:
        ValueError: if it is not plain YAML, in one line.
    """
    try:
        data = yaml.load(text, Loader)
        numbers(data)  # comes to no end in what holds itself
    except yaml.YAMLError as error:
        where = str(error).replace('in "<unicode string>", ', "at ")
        raise ValueError(" ".join(where.split())) from None
    except RecursionError:
        raise ValueError("nested too deeply, or within itself") from None
    return data


def numbers(value: Any) -> Any:
    """``1e-4`` is a number to people and a string to YAML 1.1: make it a number, at any depth."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [numbers(v) for v in value]
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


def yaml_of(settings: Tree) -> str:
    """Settings as YAML, by libyaml where it is there: four times faster."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(settings, Dumper=dumper, sort_keys=False))


def read_yaml(path: str | Path) -> Tree:
    """A YAML file as a dictionary.

    Raises:
        UserError: if the file is missing, is not YAML, or is not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        away = "" if os.path.isdir("egrpo") else f"; {os.getcwd()} is not the project's folder"
        raise UserError(f"{path}: no such file{away}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        data = parse(text)
    except ValueError as error:  # also a date that does not exist
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected settings as `key: value` lines")
    return data


def without_nulls(data: Tree) -> Tree:
    """``null`` takes away what a file below has set: a reward, a table, a figure, a bound.

    Elsewhere null is a value like others (``train.ema_decay: null``).
    """
    out = dict(data)
    for key in ("rewards", "tables", "figures", "train.rewards", "train.bounds"):
        named = at(out, key)
        if isinstance(named, dict):
            section, dot, last = key.rpartition(".")
            there = {name: value for name, value in named.items() if value is not None}
            out |= {section: {**out[section], last: there}} if dot else {key: there}
    return out


def at(tree: Any, dotted: str) -> Any:
    """``tree[a][b][c]`` for the key ``a.b.c``; None where it is not there."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def options_of(given: Mapping[str, Any]) -> Tree:
    """Snakemake's ``--config`` with its values as the same words in a file mean them.

    Snakemake makes numbers at the top only, and texts below: ``{"train": {"iterations": "5"}}``.

    Raises:
        UserError: if a text would be refused in a file.
    """
    # jobs are given `--config key=` as `key=None`
    return {key: None if v == "None" else _option(v, key) for key, v in given.items()}


def _option(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _option(below, f"{key}.{name}") for name, below in value.items()}
    if isinstance(value, list):
        return [_option(below, f"{key}.{n}") for n, below in enumerate(value)]
    if not isinstance(value, str):
        return value
    loader = Loader("")
    try:
        tag = loader.resolve(yaml.ScalarNode, value, (True, False))
        return numbers(loader.construct_object(yaml.ScalarNode(tag, value)))
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or error
        raise UserError(f"--config {key}: cannot read {shown(value)}: {reason}") from None


def put(tree: Tree, dotted: str, value: Any) -> None:
    """Set ``tree[a][b][c]`` for the key ``a.b.c``, in place.

    Raises:
        KeyError: if a part of the key is not a section.
    """
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise KeyError(section)
    tree[last] = value


BELONGS = {
    "function": "options",
    "path": "revision",
    **{key: f"{key}_revision" for key in ("processor", "tokenizer", "clip")},
}
"""Settings of a model or reward -> what belongs to their value and goes with it."""


def overlay(base: Tree, top: Mapping[str, Any], where: tuple[str, ...] = ()) -> Tree:
    """``base`` with ``top`` laid over it, section by section; neither is changed.

    Args:
        base, top: settings; what is defined by name (rewards, tables, bounds ...) is merged, one
            choice or another definition replaces what is below (:func:`kept`).
        where: the section that they are.
    """
    out = dict(base)
    for key, value in top.items():
        below, here = out.get(key), (*where, str(key))
        if isinstance(value, Mapping) and isinstance(below, dict):
            out[key] = overlay(kept(below, value, here), value, here)
        else:
            out[key] = value
    return out


def kept(below: Tree, top: Mapping[str, Any], where: tuple[str, ...]) -> Tree:
    """What of a section stays where ``top`` is laid over it."""
    others = {key for key, value in below.items() if top.get(key, value) != value}
    match where:
        case ("train", "rewards") | ("tables", _, "sections") | ("sweep",):  # one choice
            return {}
        case ("rewards" | "figures", _) if "kind" in others:
            return {}
        case ("model",) | ("rewards", _):
            gone = {BELONGS[key] for key in others if key in BELONGS}
            return {key: value for key, value in below.items() if key not in gone}
    return below


def load_run(path: str | Path) -> RunConfig:
    """Read the resolved settings of one run, as the workflow wrote them."""
    data = read_yaml(path)
    named = {key: data[key] for key in ("run", "arm") if key in data}  # may be called 1e-4
    return load_run_settings(numbers(data) | named, path)


def load_run_settings(settings: Tree, path: str | Path) -> RunConfig:
    """A run's settings as they lie in a file.

    Raises:
        UserError: naming the file and the key.
    """
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, RunConfig)}") from None
