"""BranchGRPO (arXiv 2509.06040): a binary tree of SDE steps; an edge gets its leaves' mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from egrpo.core.advantage import Array, best_leaves
from egrpo.core.tree import Tree
from egrpo.methods.base import COMMON, Changed, Context, Entry, Stochastic, rates
from egrpo.methods.shapes import split_tree
from egrpo.settings import setting

BRANCH = "BranchGRPO, arXiv 2509.06040 and its public code"


class BranchGrpo(Stochastic):
    """BranchGRPO: a binary tree of SDE steps; an edge is worth the mean of its leaves."""

    source = BRANCH
    recipe = {
        **rates(full=1e-5),
        **COMMON,
        "train.clip_range": 1e-3,
        "train.updates": 16,  # its code: one step every 12 edges, 37 of two trees
    }
    defaults = {
        "steps": 20,
        "dynamics": "dance_sde",
        "noise_level": 0.3,
        "group_size": Changed(16, "Leaves: 2 to the number of splits."),
    }
    shape = "tree"
    entry = Entry(
        "BranchGRPO",
        "all steps of a tree that splits in two at some of them",
        "One noise; at the splits every latent has two successors. An edge gets the mean reward of "
        "the images below it and is compared with the edges of the same depth (one color a "
        "column), so early edges are judged by many images. Pruning takes edges out of the loss, "
        "not out of the rollout.",
        "Departs from the public code: noise at a split is not scaled (the code's log-probability "
        "does not know of its factor 4); the last step is Euler's and does not train (the code "
        "trains it, but decodes the prediction of the data, so that its noise reaches no reward); "
        "edges are cut into optimizer steps by leaf, 16 at most, not shuffled by twelves; width "
        "pruning keeps the best leaves of the whole tree.",
        {"splits": [0, 2, 4], "group_size": 8},
    )

    name: Literal["branchgrpo"] = setting("branchgrpo")
    """Name of the method."""
    splits: list[int] = setting([0, 3, 6, 9], source=BRANCH, unit="grid index")
    """Grid indices at which latents split."""
    width_share: float = setting(1.0, source=BRANCH, unit="1", gt=0.0, le=1.0)
    """Width pruning: after the last split only this best part of the leaves trains; 1 prunes
    nothing."""
    depth_pruning: list[int] = setting([], source=BRANCH, unit="grid index")
    """Depth pruning: consecutive grid indices; edges that arrive there do not train."""
    depth_every: int = setting(30, source=BRANCH, unit="iterations", ge=1)
    """Iterations until those indices move forward by one."""
    depth_stop: int = setting(9, source=BRANCH, unit="grid index", ge=1)
    """Index at which the first of them stops."""

    def untrained(self, iteration: int) -> tuple[int, ...]:
        """Starts of the edges that depth pruning takes out, in an iteration counted from 1.

        The first move is in iteration ``depth_every``: its code has ``step // 30``, from step 1.
        """
        if not self.depth_pruning:
            return ()
        moves = iteration // self.depth_every
        shift = min(moves, max(0, self.depth_pruning[0] - self.depth_stop))
        return tuple(depth - 1 - shift for depth in self.depth_pruning)

    def tree(self, context: Context) -> Tree:
        """A tree that splits in two; depth pruning takes edges out of the loss."""
        out = self.untrained(context.iteration)
        trained = tuple(i for i in range(self.steps) if i not in out)
        return split_tree(self.steps, tuple(self.splits), self.dynamics, trained)

    @property
    def prunes(self) -> bool:
        """Width pruning is by reward."""
        return self.width_share < 1.0

    def keep(
        self,
        scores: Mapping[str, Array],
        weights: Mapping[str, float],
        trees: Sequence[Tree],
        edges: Sequence[tuple[int, int]],
    ) -> set[int] | None:
        """Width pruning: all edges to the last split, and later ones above the best leaves."""
        if not self.prunes:
            return None
        best = best_leaves(scores, weights, trees, self.width_share)

        def stays(tree: Tree, k: int, best: set[int]) -> bool:
            early = tree.nodes[tree.nodes[k].parent].index <= self.splits[-1]
            return early or not best.isdisjoint(tree.leaves_below[k])

        return {e for e, (t, k) in enumerate(edges) if stays(trees[t], k, best[t])}

    def _faults(self) -> Iterator[str]:
        yield from super()._faults()
        splits, depths = self.splits, self.depth_pruning
        if not splits or splits != sorted(set(splits)) or splits[0] < 0:
            yield "splits: grid indices must be distinct, ascending and not negative"
        if splits[-1] > self.steps - 2:
            allowed = f"steps: {self.steps} allows 0..{self.steps - 2}"
            yield f"splits: {splits[-1]} lies beyond the last stochastic step; {allowed}"
        if self.group_size != 2 ** len(splits):
            leaves = f"{len(splits)} splits make {2 ** len(splits)} leaves"
            yield f"group_size: {leaves}, not {self.group_size}"
        ascending = depths == sorted(set(depths))
        if depths and not (ascending and depths[0] >= 1 and depths[-1] <= self.steps):
            yield f"depth_pruning: distinct, ascending indices of 1..{self.steps} are needed"
        if len(depths) >= self.steps:
            yield "depth_pruning: no depth is left to train"
