"""Drawings of rollout trees: from noise (left) to image (right), one line a branch.

Straight and gray: deterministic. Wavy and colored by group: stochastic; bold where it trains, in a
band where it merges several steps. A dot is a network evaluation, a ringed dot one with a backward
pass too, a circle an image that is rewarded.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from egrpo.core.noise import DETERMINISTIC, NOISING
from egrpo.core.tree import ROOT, Tree
from egrpo.figures.style import FREE_STYLE, INK, PALETTE

Point = tuple[float, float]

WIDTH, ROW, GAP = 5.6, 0.19, 0.8
"""Inches of the grid and of a row; rows between two groups."""
LEFT, RIGHT, TOP, BOTTOM, HEAD = 0.55, 1.3, 0.5, 0.34, 0.3
"""Inches around the tree: initial noises, groups, grid indices, cost; a heading."""
CORNER = 0.09
"""Inches: radius of the corner where a branch leaves its anchor."""
GRAY, FAINT = "#8A8A8A", "#E4E4E4"
RING = {
    "markersize": 7.5,
    "markerfacecolor": "white",
    "markeredgecolor": INK,
    "markeredgewidth": 1.2,
}
MARKERS = "oDsv"
"""Of leaves, by label."""
WAVE, HEIGHT = 0.14, 0.028
"""Inches: length of half a wave of a stochastic edge, and its amplitude."""


@dataclass
class Places:
    """Where a tree's nodes are drawn: rows from the top, and how many there are."""

    row: dict[int, float] = field(default_factory=dict)
    rows: float = 0.0

    def take(self, height: float = 1.0) -> float:
        """The next free row."""
        row = self.rows
        self.rows += height
        return row


def _forward(tree: Tree, k: int) -> list[int]:
    """Children along the grid, deterministic ones first."""
    onward = [c for c in tree.children[k] if tree.nodes[c].dynamics != NOISING]
    return sorted(onward, key=lambda c: (tree.nodes[c].dynamics not in DETERMINISTIC, c))


def _anchored(tree: Tree) -> bool:
    """Whether stochastic branches leave a trajectory that goes on."""
    kinds = (
        {tree.nodes[c].dynamics in DETERMINISTIC for c in _forward(tree, k)}
        for k in range(len(tree.nodes))
    )
    return any(len(found) == 2 for found in kinds)


def places(tree: Tree) -> Places:
    """Rows of all nodes: a leaf and an anchor have their own, a split the middle of its leaves."""
    at, anchored = Places(), _anchored(tree)

    def place(k: int, on_anchor: bool) -> float:
        below = _forward(tree, k)
        if not below:
            at.row[k] = at.take()
            for c in tree.children[k]:
                at.row[c] = at.take(0.85)
            return at.row[k]
        straight = [c for c in below if tree.nodes[c].dynamics in DETERMINISTIC]
        own = at.take(1.0 + GAP) if on_anchor and not straight else None
        rows: list[float] = []
        for c in below:
            if rows and own is None and on_anchor and c == below[len(straight)]:
                at.take(GAP)
            rows.append(place(c, on_anchor and c in straight))
        if own is None:
            own = rows[0] if straight and on_anchor else sum(rows) / len(rows)
        at.row[k] = own
        return own

    for k, node in enumerate(tree.nodes):
        if node.parent == ROOT:
            if at.rows:
                at.take(GAP if anchored else 0.25)
            place(k, anchored)
    return at


# -- curves ------------------------------------------------------------------------------------


def straight(start: Point, stop: Point) -> Curve:
    """A straight line."""
    return Curve([start, stop], [Curve.MOVETO, Curve.LINETO])


def wave(start: Point, stop: Point) -> Curve:
    """A wavy line, of quadratic curves: half a wave each."""
    (x, y), (dx, dy) = start, (stop[0] - start[0], stop[1] - start[1])
    length = math.hypot(dx, dy)
    halves = max(2, 2 * round(length / WAVE / 2))
    across = (-dy / length, dx / length)
    points, codes = [start], [Curve.MOVETO]
    for n in range(halves):
        swing = 2 * HEIGHT * (-1) ** n
        for part, off in ((n + 0.5, swing), (n + 1.0, 0.0)):
            t = part / halves
            points.append((x + t * dx + off * across[0], y + t * dy + off * across[1]))
        codes += [Curve.CURVE3, Curve.CURVE3]
    return Curve(points, codes)


def _corner(start: Point, stop: Point, side: int) -> Curve:
    """Down from ``start``, and round a corner to the right (1) or left (-1) into ``stop``'s row."""
    x, row = start[0], stop[1]
    points = [start, (x, row + CORNER), (x, row), (x + side * CORNER, row)]
    return Curve(points, [Curve.MOVETO, Curve.LINETO, Curve.CURVE3, Curve.CURVE3])


def add_curves(axes: Axes, curves: Sequence[Curve], gid: str, **look: Any) -> None:
    """All curves of one look as one element, so that files stay small."""
    if curves:
        whole = Curve.make_compound_path(*curves)
        axes.add_patch(PathPatch(whole, fill=False, gid=gid, capstyle="round", **look))


def add_dots(axes: Axes, points: Iterable[Point], gid: str, marker: str, **look: Any) -> None:
    """All dots of one look as one element."""
    shown = list(points)
    if shown:
        x, y = zip(*shown, strict=True)
        axes.plot(x, y, linestyle="none", marker=marker, gid=gid, clip_on=False, **look)


# -- the drawing -------------------------------------------------------------------------------


def color(group: int) -> str:
    """Color of a group."""
    return PALETTE[group % len(PALETTE)]


def look_of(kind: str, shade: str, weight: float = 1.0) -> dict[str, Any]:
    """How an edge is drawn; ``shade`` is its group's color."""
    looks: dict[str, dict[str, Any]] = {
        "ode": {"color": GRAY, "linewidth": 0.9},
        "dpm2": {"color": GRAY, "linewidth": 1.3, "linestyle": (0, (5, 2))},
        "noising": {"color": shade, "linewidth": 1.3, "linestyle": (0, (2, 1.6))},
        "untrained": {"color": shade, "linewidth": 0.8, "alpha": 0.75},
        "trained": {"color": shade, "linewidth": 2.1 * weight, "zorder": 2.5},
        "merged": {"color": shade, "linewidth": 9, "alpha": 0.22},
    }
    return looks[kind]


def _edges(axes: Axes, tree: Tree, at: dict[int, Point]) -> None:
    """All edges, those of one look together."""
    looks: dict[tuple[str, int, float], list[Curve]] = defaultdict(list)
    bands: dict[int, list[Curve]] = defaultdict(list)
    anchored = _anchored(tree)
    for k, node in enumerate(tree.nodes):
        if node.parent == ROOT:
            continue
        start, stop = at[node.parent], at[k]
        if node.dynamics == NOISING:
            corner = (start[0] - CORNER, stop[1])
            looks["noising", node.group, 1.0] += [_corner(start, stop, -1), straight(corner, stop)]
        elif node.dynamics in DETERMINISTIC:
            looks[node.dynamics, 0, 1.0].append(straight(start, stop))
        else:
            kind = "trained" if node.trained else "untrained"
            curves = looks[kind, node.group, round(node.weight, 2)]
            if anchored:
                curves.append(_corner(start, stop, 1))
                start = (start[0] + CORNER, stop[1])
            curves.append(wave(start, stop))
            if node.index - tree.nodes[node.parent].index > 1:
                bands[node.group].append(straight(start, stop))
    for group, curves in bands.items():
        add_curves(axes, curves, f"merged-{group}", **look_of("merged", color(group)))
    for (kind, group, weight), curves in looks.items():
        gid = kind if kind in DETERMINISTIC else f"{kind}-{group}-{weight:g}"
        add_curves(axes, curves, gid, **look_of(kind, color(group), weight))


def _nodes(axes: Axes, tree: Tree, at: dict[int, Point]) -> None:
    """Evaluations, images and initial noises."""
    noised = [k for k, node in enumerate(tree.nodes) if node.dynamics == NOISING]
    evaluated = [k for k, n in enumerate(tree.nodes) if tree.children[k] and n.index < tree.steps]
    add_dots(axes, (at[k] for k in sorted(tree.sources)), "train", "o", zorder=4, **RING)
    dot = {"color": INK, "markeredgewidth": 0, "zorder": 5}
    add_dots(axes, (at[k] for k in [*evaluated, *noised]), "forward", "o", markersize=3.2, **dot)
    group = dict.fromkeys(range(len(tree.leaves)), 0)
    for k, below in tree.leaves_below.items():
        group.update(dict.fromkeys(below, tree.nodes[k].group))
    shared = _by_depth(tree)
    leaves: dict[tuple[int, int], list[Point]] = defaultdict(list)
    for rank, k in enumerate(tree.leaves):
        leaves[-1 if shared else group[rank], tree.nodes[k].label].append(at[k])
    for (number, label), points in leaves.items():
        face = INK if number < 0 else color(number)
        look = {"markerfacecolor": face, "markeredgecolor": "white", "markersize": 7.5, "zorder": 6}
        add_dots(axes, points, f"images-{number}-{label}", MARKERS[label], **look)
    for k, node in enumerate(tree.nodes):
        if node.parent == ROOT:
            x, y = at[k]
            text = f"noise {node.sample + 1}"
            axes.text(x - 0.12, y, text, ha="right", va="center", fontsize=7, color=INK)


def _by_depth(tree: Tree) -> bool:
    """Whether an image counts in several groups, as in a splitting tree."""
    below = tree.leaves_below.items()
    groups = {(leaf, tree.nodes[k].group) for k, leaves in below for leaf in leaves}
    return len(groups) > len({leaf for leaf, _ in groups})


def _groups(axes: Axes, tree: Tree, at: dict[int, Point]) -> None:
    """What is compared with what: brackets beside the images, or bars below the columns."""
    edges: dict[int, list[int]] = defaultdict(list)
    for k in tree.trained:
        edges[tree.nodes[k].group].append(k)
    step, right = WIDTH / tree.steps, WIDTH + 0.16
    bottom = min(y for _, y in at.values()) - 0.2
    for group, members in edges.items():
        first = tree.nodes[members[0]]
        start = tree.nodes[first.parent].index
        span = first.index - start
        if _by_depth(tree):
            x = [(start + 0.12) * step, (first.index - 0.12) * step]
            axes.plot(x, [bottom] * 2, color=color(group), linewidth=4, solid_capstyle="butt")
            continue
        rows = [at[tree.leaves[leaf]][1] for k in members for leaf in tree.leaves_below[k]]
        low, high = min(rows) - 0.06, max(rows) + 0.06
        axes.plot([right] * 2, [low, high], color=color(group), linewidth=2.2)
        text = f"step {start}" + (f", {span} merged" if span > 1 else "")
        text = text if len(edges) > 1 else "all samples"
        axes.text(right + 0.08, (low + high) / 2, text, fontsize=8, color=INK, va="center")
    if _by_depth(tree):
        text = "compared by depth"
        axes.text(right - 0.08, bottom, text, fontsize=8, color=INK, va="center")


def _depth(tree: Tree) -> float:
    """Inches from the first row to the last."""
    return (places(tree).rows - 1) * ROW + (0.22 if _by_depth(tree) else 0.0)


def _draw_into(axes: Axes, tree: Tree) -> None:
    """One tree; the unit of the axes is an inch, their origin the first row at the noise."""
    depth, step = _depth(tree), WIDTH / tree.steps
    axes.set_axis_off()
    axes.set_xlim(-LEFT, WIDTH + RIGHT)
    axes.set_ylim(-depth - BOTTOM, TOP)
    rows = places(tree).row
    at = {k: (node.index * step, -rows[k] * ROW) for k, node in enumerate(tree.nodes)}
    stops = range(tree.steps + 1)
    grid = [straight((i * step, 0.2), (i * step, -depth - 0.06)) for i in stops]
    add_curves(axes, grid, "grid", color=FAINT, linewidth=0.8, zorder=0)
    for i in stops:
        axes.text(i * step, 0.27, str(i), ha="center", fontsize=7.5, color=INK)
    axes.text(-0.12, 0.27, "noise", ha="right", fontsize=8)
    axes.text(WIDTH + 0.14, 0.27, "image", ha="left", fontsize=8)
    _edges(axes, tree, at)
    _nodes(axes, tree, at)
    _groups(axes, tree, at)
    forward, train = tree.cost
    text = f"network evaluations: {forward} forward, {train} forward+backward"
    axes.text(0, -depth - 0.27, text, fontsize=8, color=INK)


def draw_trees(trees: Sequence[tuple[str, Tree]]) -> Figure:
    """A figure of several trees, each below its heading."""
    with matplotlib.rc_context(FREE_STYLE):
        sizes = [TOP + _depth(tree) + BOTTOM for _, tree in trees]
        heads = [HEAD if head else 0.0 for head, _ in trees]
        wide, y = LEFT + WIDTH + RIGHT, sum(sizes) + sum(heads)
        tall = y
        figure = Figure(figsize=(wide, tall))
        for (head, tree), size, above in zip(trees, sizes, heads, strict=True):
            y -= size + above
            _draw_into(figure.add_axes((0, y / tall, 1, size / tall)), tree)
            place = (LEFT / wide, (y + size + 0.02) / tall)
            figure.text(*place, head, fontsize=10, weight="bold", color=INK)
    return figure
