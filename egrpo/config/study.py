"""Settings of a study beside those of its runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from egrpo.settings import PAPER, Count, Settings, setting


class TableSpec(Settings):
    """One table of results: arms by rewards, at the end of training and at equal evaluations."""

    caption: str = setting(...)
    """What the table shows, one sentence."""
    sections: dict[str, list[str]] = setting(...)
    """Heading -> arms (rows of the runs table) below it; best and second are marked within. One
    choice: a file laid over another replaces all of them."""
    rewards: list[str] = setting(...)
    """Columns: names of rewards."""
    evaluations: PositiveInt | Literal["cheapest"] | None = setting(
        None, unit="network evaluations"
    )
    """Network evaluations of training at which the arms are also compared; cheapest: what the
    cheapest of them spends in all, if that is an iteration of each; null: only at the end."""

    @property
    def arms(self) -> list[str]:
        """All arms of the table, each once."""
        return list(dict.fromkeys(arm for arms in self.sections.values() for arm in arms))


RESULT_FIGURES = ("curves", "images")
"""Kinds of figures that need trained runs; the others show profiles and plans."""


class FigureSpec(Settings):
    """One figure."""

    kind: Literal["branches", "entropy", "spread", "threshold", "curves", "images"] = setting(...)
    """branches: images and reward spread of branches (`pairs`); entropy: by step for `spans`;
    spread: measured spread by step; threshold: the automatic choice and its plan; curves: reward
    during training; images: prompts by arms."""
    caption: str = setting(...)
    """What the figure shows, one sentence."""
    arms: list[str] = setting(...)
    """Arms that it shows, or whose profile it shows."""
    rewards: list[str] = setting([])
    """Rewards of curves; empty: the trained ones."""
    pairs: list[list[int]] = setting(
        [[2, 1], [6, 1], [6, 4]], source=f"{PAPER}, Fig. 1a", unit="grid index, grid intervals"
    )
    """Branches shown, of those that profile.shown keeps: [step, span]."""
    spans: list[int] = setting([1, 2, 4, 6], source=f"{PAPER}, Fig. 1b", unit="grid intervals")
    """Spans whose entropy is drawn, of profile.spans."""
    prompts: Count = setting(6, unit="prompts")
    """Prompts of an image grid, or of branches."""


class StudyConfig(Settings):
    """What a study's YAML holds beside the settings of :class:`RunConfig`."""

    sources = ("results",)

    results: str = setting("results")
    """Folder of all results."""
    runs: str = setting(...)
    """Runs table (.tsv): an arm's name and overrides by dotted key."""
    sweep: dict[str, list[Any]] = setting({})
    """A grid in the place of the runs table: dotted key -> values; each combination is an arm, and
    `seed`, if given, is `seeds`. All its runs are default runs, with a table `sweep` and a figure
    `sweep_curves`. One choice: a file laid over another replaces it."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = setting(None)
    """Each arm is trained once per seed, as run `<arm>-s<seed>`; null: once, as run `<arm>`."""
    default_runs: list[str] | None = setting(None)
    """Runs that `snakemake` makes without a target; null: all."""
    paper: list[str] | None = setting(None)
    """Tables and figures that the target `paper` makes; null: all."""
    tables: dict[str, TableSpec] = setting({})
    """Tables by name; the name is the target. null takes one of a file below away."""
    figures: dict[str, FigureSpec] = setting({})
    """Figures by name; the name is the target. null takes one of a file below away; another `kind`
    starts anew."""
    notify: str | None = setting(None)
    """Command of the shell that runs when snakemake has finished or failed, with a summary on its
    standard input: `mail -s egrpo me@example.org`, or curl to a chat; null: none. EGRPO_STUDY and
    EGRPO_OUTCOME (finished, failed) are in its environment."""
    libraries: Literal["warn", "remake"] = setting("warn")
    """Results made with other versions of torch, diffusers, transformers, peft, accelerate, numpy,
    open_clip or CLIP: said in one line, or made again."""
    methods: dict[str, dict[str, Any]] = setting({})
    """Settings of `method` by method name, for every run of that method."""

    @model_validator(mode="after")
    def _results_folder(self) -> Self:
        if not self.results or self.results.startswith("-"):
            raise ValueError("results: is no folder that a command can name; `.` is this one")
        if "?" in self.results:  # SQLAlchemy reads options behind it, and has no escape
            raise ValueError(f"results: {self.results!r:.100} holds '?', which MLflow cannot read")
        return self

    @model_validator(mode="after")
    def _grid(self) -> Self:
        for key, values in self.sweep.items():
            if not values or any(values.count(value) > 1 for value in values):
                raise ValueError(f"sweep.{key}: expected a list of different values")
        return self
