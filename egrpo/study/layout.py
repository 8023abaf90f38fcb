"""Where everything lies in the results folder. The workflow, its jobs and the commands ask here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from egrpo.config.study import RESULT_FIGURES
from egrpo.study.digests import Digests
from egrpo.study.identity import Identities
from egrpo.study.resolve import Study

PAGES = {"index": "comparison", "paper": "paper_runs", "everything": "all_runs"}
"""Pages of every study, by file name, and the set of runs that each tells of."""

OUTPUTS: dict[str, tuple[str, ...]] = {
    "embed": ("{name}.safetensors",),
    "profile": ("entropy_profile.parquet", "branches.parquet"),
    "base": ("scores.parquet", "images.parquet"),
    "plan": ("plan.json", "merge_plan.parquet"),
    "train": (
        *("adapter", "monitor", "snapshots"),
        *("train.json", "train_metrics.parquet", "rollouts.parquet"),
    ),
    "evaluate": (
        *("scores.parquet", "images.parquet", "snapshots.parquet", "snapshot_images.parquet"),
        *("metrics.parquet", "config.yaml"),
    ),
    "suffixes": ("suffixes.parquet", "suffixes.csv", "suffixes.md", "suffixes.html"),
}
"""What each stage makes, in the folder of a run or of a shared artifact."""

SHARED = {"embed": "embeddings", "profile": "profiles", "base": "base"}
"""Folders of what runs share, by stage; there each artifact is named by its identity."""


@dataclass(frozen=True)
class Layout:
    """Paths of one study's results, relative to the working directory as the study gives them.

    ``known``: identity of a stage's result of a run, where they were found before; None: each is
    found when it is asked for.
    """

    study: Study
    known: Callable[[str, str], str] | None = None

    @property
    def root(self) -> Path:
        """Folder of the study."""
        return Path(self.study.results) / self.study.name

    @cached_property
    def identities(self) -> Identities:
        """Of the study's runs, by what their files hold now."""
        digests = Digests(Path(self.study.results) / ".digests.json")
        return Identities(digests, libraries=self.study.libraries == "remake")

    def identity(self, stage: str, run: str) -> str:
        """The identity of a stage's result of a run."""
        if self.known is not None:
            return self.known(stage, run)
        return self.identities.of(stage, self.study.runs[run])

    @cached_property
    def pages(self) -> dict[str, str]:
        """:data:`PAGES`, and one of each table and figure that shows results, with its runs."""
        study = self.study
        shown = [name for name, spec in study.figures.items() if spec.kind in RESULT_FIGURES]
        return PAGES | {name: f"{name}_runs" for name in (*study.tables, *shown)}

    @property
    def rates(self) -> Path:
        """What ``egrpo measure`` found on the user's cards."""
        return self.root / "rates.tsv"

    @property
    def store(self) -> Path:
        """Where runs are tracked; studies of one results folder share the database."""
        return self.root / "store.json"

    @property
    def wanted(self) -> Path:
        """Identities that the newest settings want, by stage and run."""
        return self.root / "identity" / "wanted.json"

    def receipt(self, stage: str, name: str) -> Path:
        """What a stage's result was computed from."""
        return self.root / "identity" / stage / f"{name}.json"

    def folder(self, stage: str, name: str) -> Path:
        """Where a stage's result of a run lies, or the shared one of an identity."""
        if stage == "embed":
            return self.root / SHARED[stage]
        return self.root / SHARED[stage] / name if stage in SHARED else self.run(name)

    def outputs(self, stage: str, name: str) -> list[Path]:
        """Files and folders of that result."""
        folder = self.folder(stage, name)
        return [folder / file.format(name=name) for file in OUTPUTS[stage]]

    def run(self, run: str) -> Path:
        """Folder of one run's settings and results."""
        return self.root / "runs" / run

    def state(self, run: str) -> Path:
        """Folder of what a run's training goes on from, a folder below for each trajectory."""
        return self.root / "state" / run

    def config(self, run: str) -> Path:
        """Settings that a run was evaluated with, all of them."""
        return self.run(run) / "config.yaml"

    def embeddings(self, run: str, which: str) -> Path:
        """Embeddings of one set of a run's prompts."""
        return self.root / "embeddings" / f"{self.identity(f'embed-{which}', run)}.safetensors"

    def profile(self, run: str) -> Path:
        """Entropy profile of a run's base model on its grid."""
        return self.root / "profiles" / self.identity("profile", run) / "entropy_profile.parquet"

    def base(self, run: str) -> Path:
        """Folder of the base model's evaluation that a run is compared with."""
        return self.root / "base" / self.identity("base", run)

    @property
    def comparison(self) -> Path:
        """The table of the default runs against their base."""
        return self.root / "tables" / "comparison.parquet"

    def about(self, runs: str) -> Path:
        """Versions and settings of a set of runs, as a page."""
        return self.root / f"about-{runs}.html"

    @property
    def figures(self) -> Path:
        """Folder of the pictures."""
        return self.root / "figures"

    def page(self, name: str) -> Path:
        """One of :attr:`pages`; the first page of all studies lies one folder above."""
        return self.root / f"{name}.html"

    def table(self, name: str) -> Path:
        """One table of results; ``.csv`` and ``.md`` lie beside it."""
        return self.root / "tables" / f"{name}.parquet"

    def figure(self, name: str) -> Path:
        """One figure; the ``.svg`` lies beside it."""
        return self.figures / f"{name}.png"

    def published(self, runs: str) -> Path:
        """What was delivered to MLflow of a set of runs."""
        return self.root / f"published-{runs}.json"

    def bundle(self, run: str) -> Path:
        """Folder that ``egrpo export`` makes for sharing a run."""
        return self.root / "export" / run

    def arm(self, arm: str) -> list[str]:
        """Runs of one arm, by seed."""
        return [name for name, run in self.study.runs.items() if run.arm == arm]
