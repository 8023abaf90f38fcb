"""What the benchmark scripts share: small studies, Markdown, and the page that each writes."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # from a checkout, not installed


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A command line with the option that all have."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--write", type=Path, help="Markdown file to write")
    return made


def tell(text: str, path: Path | None) -> None:
    """Show a page, and write it where that is asked for."""
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Markdown; columns after the first ``left`` are numbers."""
    ruler = ["---"] * left + ["--:"] * (len(head) - left)
    lines = ["|" + "|".join(ruler) + "|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join([f"| {' | '.join(head)} |", *lines])


def versions(device: str) -> str:
    """A device and what runs on it, in words."""
    import torch

    return f"{device}; Python {platform.python_version()}, torch {torch.__version__}"


def study(folder: Path, settings: dict[str, Any], runs: str) -> Path:
    """The default study made small, with its table of runs, and all results in ``folder``.

    Each run once, and all of them where ``settings`` name no default runs; no table or figure.
    """
    import yaml

    from egrpo.config.load import overlay, read_yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.tsv").write_text(runs)
    places = {"results": str(folder / "results"), "runs": str(folder / "runs.tsv")}
    path = folder / "config.yaml"
    bare = dict.fromkeys(("seeds", "default_runs", "paper", "tables", "figures"))
    made = overlay(read_yaml(ROOT / "config/config.yaml"), bare | settings) | places
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return path


def snakemake(config: Path, *words: str) -> list[str]:
    """Command line of the workflow."""
    return [sys.executable, "-m", "snakemake", "--nolock", "--configfile", str(config), *words]
