"""Where everything lies in the results folder. The workflow and the stages both ask here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from egrpo.study.keys import KEYS, digest, embedding_key, evaluation_key, profile_key
from egrpo.study.resolve import Study

PAGES = {"index": "comparison", "paper": "paper_runs", "everything": "all_runs"}
"""Pages of a study, by file name, and the comparison that each tells of."""


DEFAULT = Path("config/config.yaml")
"""The study of whoever names none."""


def command(configs: Sequence[str | Path], *targets: str | Path) -> str:
    """What makes results of the study in these files, to be shown as a remedy.

    ``configs`` is empty where the caller does not know them.
    """
    words = ["snakemake", "--cores", "all", *map(str, targets)]
    if configs and list(map(Path, configs)) != [DEFAULT]:
        words += ["--configfile", *map(str, configs)]
    return shlex.join(words)


@dataclass(frozen=True)
class Layout:
    """Paths of one study's results, relative to the working directory as the study gives them."""

    study: Study

    @property
    def root(self) -> Path:
        """Folder of the study."""
        return Path(self.study.results) / self.study.name

    @property
    def store(self) -> Path:
        """Where runs are tracked; studies of one results folder share the database."""
        return self.root / "store.json"

    def run(self, run: str) -> Path:
        """Folder of one run's settings and results."""
        return self.root / "runs" / run

    def config(self, run: str) -> Path:
        """Resolved settings of one run."""
        return self.run(run) / "config.yaml"

    def settings(self, stage: str, run: str) -> Path:
        """Settings that a stage reads, named by all of them that matter to it."""
        return self.root / "settings" / f"{stage}-{KEYS[stage](self.study.runs[run])}.yaml"

    def embeddings(self, run: str) -> Path:
        """Prompt embeddings that a run needs."""
        return self.root / "embeddings" / f"{embedding_key(self.study.runs[run])}.safetensors"

    def profile(self, run: str) -> Path:
        """Entropy profile that a run's plan is made from."""
        key = profile_key(self.study.runs[run])
        return self.root / "profiles" / key / "entropy_profile.parquet"

    def base(self, run: str) -> Path:
        """Folder of the base model's evaluation that a run is compared with."""
        return self.root / "base" / evaluation_key(self.study.runs[run])

    @property
    def comparison(self) -> Path:
        """The table of the default runs against their base."""
        return self.root / "tables" / "comparison.parquet"

    def about(self, runs: str) -> Path:
        """Versions and settings of a set of runs, as a page."""
        return self.root / f"about-{runs}.html"

    def target_settings(self, name: str) -> Path:
        """What a table or figure is made by, named by its digest."""
        spec = self.study.tables.get(name) or self.study.figures[name]
        return self.root / "settings" / f"{name}-{digest(spec.model_dump())}.yaml"

    @property
    def figures(self) -> Path:
        """Folder of the pictures."""
        return self.root / "figures"

    def page(self, name: str) -> Path:
        """One of :data:`PAGES`; the first page of all studies lies one folder above."""
        return self.root / f"{name}.html"

    def branches(self, run: str) -> Path:
        """Images of some groups of that profile."""
        return self.profile(run).with_name("branches.parquet")

    def table(self, name: str) -> Path:
        """One table of results; ``.csv`` and ``.md`` lie beside it."""
        return self.root / "tables" / f"{name}.parquet"

    def figure(self, name: str) -> Path:
        """One figure; the ``.svg`` lies beside it."""
        return self.figures / f"{name}.png"

    def bundle(self, run: str) -> Path:
        """Folder that ``egrpo export`` makes for sharing a run."""
        return self.root / "export" / run

    def arm(self, arm: str) -> list[str]:
        """Runs of one arm, by seed."""
        return [name for name, run in self.study.runs.items() if run.arm == arm]
