"""The page of the methods: what each explores, what its tree costs, and a drawing of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from docs.generate.settings import scalar
from docs.generate.text import paragraph, rows
from egrpo.core.plan import make_plan
from egrpo.core.schedule import shifted_sigmas, stock_end
from egrpo.core.tree import Tree
from egrpo.methods import shapes as core
from egrpo.methods.settings import METHOD_MODELS, Merging, Method
from egrpo.planning.trees import TREES, Occasion, draw

STEPS, SAMPLES, SHIFT = 10, 3, 3.0
"""T and G of the drawings, and the timestep shift of drawings and costs."""


@dataclass(frozen=True)
class Entry:
    """A method on the page.

    Attributes:
        title: its name in the literature.
        short: what it explores, a few words.
        text: the same with its why, some sentences.
        grows: the function that returns its tree; what departs from public code is said there.
        part: word that introduces this method's part of what departs, where several share one.
        settings: of the drawing, beside T and G.
        iteration: that is drawn.
    """

    title: str
    short: str
    text: str
    grows: Callable[..., Tree]
    part: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    iteration: int = 1


ENTRIES = {
    "egrpo": Entry(
        "E-GRPO",
        "the first half of the steps, one at a time; steps of low entropy merged",
        "One trajectory without noise, the anchor, runs from the initial noise. At each active "
        "step G samples leave it by one stochastic step, and go on without noise: what differs "
        "between their images is the work of that one step, so the reward is credited where it "
        "arose. Where one step has too little entropy to make a difference, several are merged "
        "into one, as many as the threshold asks for (the bands). The samples of a step share the "
        "network's input, so each active step costs one forward+backward; almost all of the cost "
        "is the suffixes.",
        core.egrpo,
        settings={"active": 5, "threshold": 2.4},
    ),
    "egrpo_efficient": Entry(
        "E-GRPO, efficient",
        "the same, on a random 2 of the active steps, with coarse second-order suffixes",
        "The same tree with a tenth of the evaluations: an iteration takes a random 2 of the 8 "
        "active steps, and suffixes take every fourth index by second-order DPM-Solver++. So the "
        "same budget buys ten times as many updates. The highest mean of eleven arms at equal "
        "evaluations [here](results.md#at-equal-cost), shown ahead of all but one; not in the "
        "paper.",
        core.egrpo,
        settings={"active": 5, "threshold": 2.4},
    ),
    "g2rpo": Entry(
        "Granular-GRPO",
        "the first half of the steps, one at a time; images at several granularities",
        "E-GRPO's tree without merging. Each branch is finished at several granularities (every "
        "step, every second step), which share their beginning; each gives an image of its own "
        "shape here. Rewards are normalised within images of one granularity, and a branch's "
        "advantages are summed.",
        core.g2rpo,
        settings={"active": 3, "group_size": 2},
    ),
    "tempflow_grpo": Entry(
        "TempFlow-GRPO",
        "every step but the last, one at a time; the loss weighted by a step's noise",
        "Branches from an anchor at every step but the last; four anchors a prompt, of which one "
        "is drawn. A step's loss is weighted by the standard deviation of its noise (the thickness "
        "of its line), so that early steps count more.",
        core.tempflow_grpo,
        settings={"group_size": 2, "anchors": 1},
    ),
    "flow_grpo": Entry(
        "Flow-GRPO",
        "all steps of every sample at once",
        "Independent samples, each from its own noise, stochastic at every step. The reward of the "
        "image is credited to all trained steps of its sample alike; the last step is stochastic "
        "too and does not train. Every evaluation of a trained step is repeated with a backward "
        "pass, so an iteration has few evaluations, most of which train.",
        core.flow_grpo,
    ),
    "flow_grpo_fast": Entry(
        "Flow-GRPO-Fast",
        "a random window of steps in the first half",
        "The samples of a prompt share their beginning, which is evaluated once; then come some "
        "stochastic steps, in a window drawn for each iteration and prompt, and the rest is "
        "deterministic.",
        core.windowed,
        "Fast",
    ),
    "dancegrpo": Entry(
        "DanceGRPO",
        "all steps but the last; a random 60% of each sample's steps trains",
        "Stochastic at every step but the last, with noise of constant strength (Dance-SDE). All "
        "samples start from the same noise, evaluated apart as in the public code. Of each sample "
        "a random part of the steps trains.",
        core.dancegrpo,
    ),
    "mixgrpo": Entry(
        "MixGRPO",
        "a window of steps that slides from noise to image over the iterations",
        "Stochastic and trained within a window, deterministic before and after it. The window "
        "moves on by one step every 25 iterations; iteration 51 is drawn.",
        core.windowed,
        "MixGRPO",
        iteration=51,
    ),
    "mixgrpo_flash": Entry(
        "MixGRPO-Flash",
        "the same window, with fewer second-order steps after it",
        "MixGRPO whose suffix keeps a part of the steps and takes them by second-order "
        "DPM-Solver++. Iteration 41 is drawn.",
        core.windowed,
        "Flash",
        {"steps": 16},
        41,
    ),
    "branchgrpo": Entry(
        "BranchGRPO",
        "all steps of a tree that splits in two at some of them",
        "One noise; at the splits every latent has two successors. An edge gets the mean reward of "
        "the images below it and is compared with the edges of the same depth (one colour a "
        "column), so early edges are judged by many images. Pruning takes edges out of the loss, "
        "not out of the rollout.",
        core.branchgrpo,
        settings={"splits": [0, 2, 4], "group_size": 8},
    ),
    "diffusion_nft": Entry(
        "DiffusionNFT",
        "nothing: deterministic samples, noised again to train",
        "Samples come from an ODE; initial noise alone makes them differ. Each is noised again to "
        "some grid indices, where the network learns from good samples and against bad ones.",
        core.forward_process,
        "NFT",
        {"times_per_sample": 3},
    ),
    "awm": Entry(
        "AWM",
        "nothing: deterministic samples, noised again to train",
        "As DiffusionNFT, with a clipped policy gradient whose log-probability is a power of the "
        "matching error at the noised latent, times its flow time. A penalty keeps the velocity "
        "near that of a short average of the weights.",
        core.forward_process,
        "AWM",
        {"times_per_sample": 3},
    ),
}
"""In the order of the page."""

INTRODUCTION = """\
# Methods as trees

Generated by `python -m docs.generate` from the settings, the trees and the code's docstrings.

A method is a function that returns a *rollout tree*, and nothing else: which steps are stochastic,
which of them train, what is compared with what. One executor samples all trees, one loss trains
them ([architecture](architecture.md)). So the drawings below are not sketches; each is the tree
that the code grows, with settings small enough to be drawn.

![What the signs mean](images/trees/legend.svg)

A line leads from noise (left) to an image (right); numbers are indices of the sigma grid. Samples
with the same number of noise start from the same one.

![E-GRPO beside Flow-GRPO, MixGRPO and BranchGRPO](images/trees/overview.svg)

In one view: Flow-GRPO explores everywhere at once and cannot tell which step made an image good.
MixGRPO explores in a window. BranchGRPO splits, and judges an edge by all images below it. E-GRPO
explores one step at a time from a common anchor, and makes a step longer where it would explore too
little. That costs many forward evaluations, and few backward ones.

## All methods

Network evaluations of one prompt in one iteration, at each method's default settings and timestep
shift 3, in the first iteration of a run: where steps are drawn at random or a window moves, the
number may differ between iterations. `egrpo cost` adds up all iterations of a study.

On SD3 the methods of Flow-GRPO's lineage sample on the grid of the stock pipeline, as their code
does; the others on E-GRPO's (`schedule.end`, [concepts](concepts.md#flow-time-and-schedule)).
FLUX.1 gets the flow time itself, where the public codes of DanceGRPO and of those built on it round
it down to a thousandth.
"""


def grown(method: Method, iteration: int = 1) -> Tree:
    """The tree of a method's settings, for the first prompt of a run of seed 0."""
    end = stock_end(SHIFT, dynamic=False) if method.stock_grid else None
    sigmas = shifted_sigmas(method.steps, SHIFT, end=end)
    plan = None
    if isinstance(method, Merging):
        plan = make_plan(
            sigmas,
            method.active_steps,
            threshold=float(method.threshold),
            noise_level=method.noise_level,
            dynamics=method.dynamics,
            measure=method.measure,
        )
    occasion = Occasion(plan, sigmas, iteration, draw(0, "tree", iteration, 0))
    return TREES[type(method)](method, occasion)


def cost(model: type[Method]) -> tuple[int, int]:
    """Forward and forward+backward evaluations of a prompt at a method's defaults."""
    tree = grown(model())
    return tree.cost.forward, tree.passes(model.recipe.get("train.updates", 1))


def drawn(name: str) -> dict[str, Any]:
    """Settings of a method's drawing that are not its defaults."""
    return {"steps": STEPS, "group_size": SAMPLES, **ENTRIES[name].settings}


def example(name: str) -> Tree:
    """The tree that is drawn of a method."""
    return grown(METHOD_MODELS[name](**drawn(name)), ENTRIES[name].iteration)


def departures(entry: Entry) -> str:
    """What the docstring of a method's function says that departs from public code."""
    paragraphs = (" ".join(p.split()) for p in (entry.grows.__doc__ or "").split("\n\n"))
    found = next((p for p in paragraphs if p.startswith("Departs from")), "").replace("``", "`")
    if not entry.part:
        return found
    words = "|".join(sorted({e.part for e in ENTRIES.values() if e.part}))
    parts = dict(re.findall(rf"\b({words}): (.*?)(?=\b(?:{words}): |$)", found))
    return f"Departs from the public code: {parts[entry.part].strip()}"


def _section(name: str) -> Iterator[str]:
    entry, model = ENTRIES[name], METHOD_MODELS[name]
    forward, train = cost(model)
    small = ", ".join(f"`{key}: {scalar(value)}`" for key, value in drawn(name).items())
    at = f", iteration {entry.iteration}" if entry.iteration > 1 else ""
    updates = model.recipe.get("train.updates", 1)
    loss = model.recipe.get("train.loss", "clipped")
    yield from (f"## {entry.title}", "", *paragraph(f"`method.name: {name}`. {entry.text}"), "")
    yield from (f"![The rollout tree of {entry.title}](images/trees/{name}.svg)", "")
    yield from (*paragraph(f"Drawn with {small}{at}; all else is the default."), "")
    yield from paragraph(
        f"By default {forward:,} forward and {train} forward+backward evaluations a prompt; "
        f"optimizer steps of an iteration: {updates}; loss: `{loss}`. "
        f"[Every setting](settings.md#{name}). Source: {model.source}."
    )
    yield ""
    if departures(entry):
        yield from (*paragraph(departures(entry)), "")


def methods_page() -> str:
    """Markdown page of every method."""
    body = []
    for name, entry in ENTRIES.items():
        method = METHOD_MODELS[name]()
        forward, train = cost(METHOD_MODELS[name])
        anchor = entry.title.lower().replace(", ", "-")
        body.append(
            (
                f"[{entry.title}](#{anchor})",
                f"`{name}`",
                entry.short,
                str(method.steps),
                str(method.group_size),
                f"{forward:,}",
                str(train),
            )
        )
    head = ("method", "`method.name`", "explores", "T", "G", "forward", "forward+backward")
    out = [INTRODUCTION, *rows(head, body), ""]
    for name in ENTRIES:
        out += _section(name)
    return "\n".join(out).rstrip() + "\n"


OVERVIEW = ("egrpo", "flow_grpo", "mixgrpo", "branchgrpo")
"""Shown one above the other in one drawing."""


def drawings() -> dict[str, Callable[[], str]]:
    """SVG of every drawing, by path."""
    from docs.generate.legend import draw_legend
    from docs.generate.svg import svg_text
    from docs.generate.trees import draw_tree, draw_trees

    def of(name: str) -> Callable[[], str]:
        return lambda: svg_text(draw_tree(example(name)))

    def overview() -> str:
        return svg_text(draw_trees([(ENTRIES[name].title, example(name)) for name in OVERVIEW]))

    made = {name: of(name) for name in ENTRIES}
    made |= {"legend": lambda: svg_text(draw_legend()), "overview": overview}
    return {f"docs/images/trees/{name}.svg": make for name, make in made.items()}
