"""The methods by their settings: which edges train and when, what it costs, what is refused."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from conftest import ROOT, small_run, write_run

from egrpo.config.models import RunConfig
from egrpo.core.noise import NOISING
from egrpo.core.schedule import shifted_sigmas, stock_end
from egrpo.core.tree import Cost, Tree
from egrpo.errors import UserError
from egrpo.methods import METHOD_MODELS
from egrpo.methods.base import Stochastic
from egrpo.planning.grids import evaluation_sigmas, monitor_sigmas, training_sigmas
from egrpo.planning.trees import iteration_cost, needs_plan, plan_of, tree_of

METHODS = sorted(METHOD_MODELS)


def paper(name: str, **settings: Any) -> RunConfig:
    """A run at the method's own defaults, recipe included; ``settings`` are of the method."""
    own = {**METHOD_MODELS[name]().model_dump(exclude={"name"}), **settings}
    return small_run(
        "x", **{"method.name": name, **{f"method.{key}": value for key, value in own.items()}}
    )


def tree(run: RunConfig, iteration: int = 1, prompt: int = 0) -> Tree:
    """The tree that the trainer grows for a prompt."""
    plan = plan_of(run, training_sigmas(run)) if needs_plan(run) else None
    return tree_of(run, plan, iteration, prompt)


def start_of(grown: Tree, k: int) -> int:
    """Grid index where the network is evaluated for trained edge ``k``."""
    node = grown.nodes[k]
    return node.index if node.dynamics == NOISING else grown.nodes[node.parent].index


def edges_of(trees: Sequence[Tree]) -> list[tuple[int, int]]:
    """(tree, node) of every trained edge of a forest."""
    return [(t, k) for t, grown in enumerate(trees) for k in grown.trained]


def trained_steps(grown: Tree) -> dict[int, set[int]]:
    """Trained grid indices of each sample."""
    out: dict[int, set[int]] = {}
    for k in grown.trained:
        out.setdefault(grown.nodes[k].sample, set()).add(start_of(grown, k))
    return out


def starts(grown: Tree) -> list[int]:
    """Grid indices that train, of a tree whose samples all train the same."""
    sets = set(map(frozenset, trained_steps(grown).values()))
    assert len(sets) == 1
    return sorted(*sets)


def uniform(drawn: Sequence[Iterable[int]], count: int, eligible: int) -> None:
    """Sets of ``count`` of 0..eligible-1: Pearson's statistic against equal chances of all.

    Drawn without replacement it shrinks by (1 - count/eligible).
    """
    each = Counter(item for some in drawn for item in some)
    assert {len(set(some)) for some in drawn} == {count}
    assert set(each) == set(range(eligible))
    expected = len(drawn) * count / eligible
    statistic = sum((n - expected) ** 2 / expected for n in each.values())
    assert statistic / (1 - count / eligible) * (eligible - 1) / eligible < 12 + 2 * eligible


# --- recipes --------------------------------------------------------------------------------------

RECIPES = {  # T, G, dynamics, level, clip range, KL, LoRA rate, updates, std of, ddof; parts
    "egrpo": (16, 12, "flow_sde", 0.7, 1e-4, 0.0, 6e-5, 1, "group", 1, 8),
    "egrpo_efficient": (16, 12, "flow_sde", 0.7, 1e-4, 0.0, 6e-5, 1, "group", 1, 2),
    "g2rpo": (16, 12, "flow_sde", 0.7, 1e-4, 0.0, 6e-5, 1, "group", 1, 8),
    "tempflow_grpo": (10, 6, "flow_sde", 0.7, 1e-4, 0.004, 3e-4, 2, "group", 0, 2),
    "flow_grpo": (10, 24, "flow_sde", 0.7, 1e-4, 0.04, 3e-4, 2, "batch", 0, 2),
    "flow_grpo_fast": (10, 24, "cps", 0.8, 1e-5, 0.0, 3e-4, 2, "batch", 0, 2),
    "dancegrpo": (16, 12, "dance_sde", 0.3, 1e-4, 0.0, 3e-4, 3, "group", 1, 3),
    "mixgrpo": (25, 12, "flow_sde", 0.7, 1e-4, 0.0, 3e-4, 4, "group", 1, 4),
    "mixgrpo_flash": (25, 12, "flow_sde", 0.7, 1e-4, 0.0, 3e-4, 4, "group", 1, 4),
    "branchgrpo": (20, 16, "dance_sde", 0.3, 1e-3, 0.0, 3e-4, 16, "group", 1, 16),
    "diffusion_nft": (10, 24, "ode", 0.0, 1e-4, 1e-4, 3e-4, 1, "batch", 0, 6),
    "awm": (14, 24, "ode", 0.0, 1.0, 1e-4, 3e-4, 1, "batch", 0, 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_methods_papers_and_codes(name):
    run = paper(name)
    m, t, a = run.method, run.train, run.advantage
    got = (m.steps, m.group_size, m.dynamics, m.noise_level, t.clip_range, t.kl_weight)
    got += (t.learning_rate_lora, t.updates, a.std, a.ddof)
    assert got == RECIPES[name][:-1]
    assert a.eps == (1e-8 if a.ddof else 1e-4)
    if name != "tempflow_grpo":
        weights = {node.weight for node in tree(run).nodes if node.trained}
        assert weights == {0.2 if name == "awm" else 1.0}  # AWM's advantages count within 1, not 5


@pytest.mark.parametrize("model", METHOD_MODELS.values())
def test_a_changed_default_keeps_its_type_unit_and_bounds(model):
    """Of what a class inherits it changes what it names, and nothing else of that."""
    changed = {key for base in model.__mro__ for key in vars(base).get("defaults", {})}
    for key in Stochastic.model_fields.keys() & model.model_fields.keys():
        new, old = model.model_fields[key], Stochastic.model_fields[key]
        assert (new.annotation, new.metadata) == (old.annotation, old.metadata)
        assert new.json_schema_extra.get("unit") == old.json_schema_extra.get("unit")
        assert key in changed or new.default == old.default
        assert new.description
    with pytest.raises(UserError, match=r"method\.steps: .* less than or equal to 1000"):
        small_run("x", **{"method.name": model().name, "method.steps": 1001})


# --- which edges train ----------------------------------------------------------------------------

JUMPS = {"steps": 12, "window_size": 3, "window_stride": 3, "window_every": 2}
"""12 - 2 - 3 = 7 is the last place."""


@pytest.mark.parametrize(
    ("name", "settings", "every", "places"),
    [
        ("mixgrpo", {}, 25, range(20)),  # to T - 3 - 3, then 0
        ("mixgrpo_flash", {}, 20, range(20)),
        ("mixgrpo", JUMPS, 2, (0, 3, 6)),
        ("mixgrpo_flash", {"window_stride": 0}, 20, (0,)),
    ],
)
def test_window_of_mixgrpo_slides_to_the_last_place_and_returns(name, settings, every, places):
    run = paper(name, **settings)
    for n in range(20 * every + 1):
        first = places[n // every % len(places)]
        window = range(first, first + run.method.window_size)
        assert starts(tree(run, n + 1)) == list(window), f"iteration {n + 1}"


PLACES = [(10, 3, 0.5, 3), (10, 2, 0.5, 4), (10, 3, 1.0, 6), (20, 5, 0.5, 6), (5, 3, 1.0, 1)]


@pytest.mark.parametrize(("steps", "size", "part", "places"), PLACES)
def test_window_of_flow_grpo_fast_is_uniform_over_its_places(steps, size, part, places):
    run = paper("flow_grpo_fast", steps=steps, window_size=size, window_part=part, group_size=2)
    drawn = [starts(tree(run, n, prompt)) for n in range(1, 61) for prompt in range(8)]
    assert all(window == list(range(window[0], window[0] + size)) for window in drawn)
    assert {window[0] for window in drawn} == set(range(places))
    if places > 1:
        uniform([window[:1] for window in drawn], 1, places)
        assert drawn[:8].count(drawn[0]) < 8  # prompts of one iteration
        assert drawn[::8].count(drawn[0]) < 60  # iterations of one prompt


PER_SAMPLE = [("dancegrpo", 9, 15), ("diffusion_nft", 9, 10), ("awm", 6, 12)]


@pytest.mark.parametrize(("name", "count", "eligible"), PER_SAMPLE)
def test_steps_drawn_per_sample_are_uniform_and_differ(name, count, eligible):
    run = paper(name)
    occasions = [(n, prompt) for n in range(1, 9) for prompt in range(6)]
    drawn = [trained_steps(tree(run, n, prompt)) for n, prompt in occasions]
    assert all(len(samples) == run.method.group_size for samples in drawn)
    # never the last step of DanceGRPO
    uniform([steps for samples in drawn for steps in samples.values()], count, eligible)
    for samples in drawn:
        sets = Counter(map(frozenset, samples.values()))
        assert max(sets.values()) < len(samples) / 2  # samples differ
    assert len({str(sorted(samples.items())) for samples in drawn}) == len(occasions)


@pytest.mark.parametrize("name", ["egrpo", "g2rpo", "tempflow_grpo"])
def test_active_per_iteration_is_a_uniform_subset_of_the_plan(name):
    whole = tree(paper(name))
    ends = {start_of(whole, k): whole.nodes[k].index for k in whole.trained}
    spans = {"egrpo": (1, 1, 2, 2, 2, 3, 3, 3), "g2rpo": (1,) * 8, "tempflow_grpo": (1,) * 9}[name]
    assert ends == {i: i + span for i, span in enumerate(spans)}  # all, where no number is given
    run = paper(name, active_per_iteration=3)
    drawn = []
    for n, prompt in ((n, prompt) for n in range(1, 41) for prompt in range(10)):
        grown = tree(run, n, prompt)
        some = {start_of(grown, k): grown.nodes[k].index for k in grown.trained}
        assert some.items() <= ends.items()  # spans are the plan's
        drawn.append(frozenset(some))
    uniform(drawn, 3, len(ends))
    assert len(set(drawn)) > 0.8 * math.comb(len(ends), 3)


def test_branchgrpo_splits_and_trains_every_edge_but_the_last():
    grown = tree(paper("branchgrpo"))
    widths = dict(enumerate([1, *[2] * 3, *[4] * 3, *[8] * 3, *[16] * 11]))
    assert Counter(node.index for node in grown.nodes) == widths
    trained = Counter(start_of(grown, k) for k in grown.trained)
    assert trained == {depth - 1: n for depth, n in widths.items() if 0 < depth < 20}
    assert trained.total() == 202
    assert [grown.nodes[leaf].dynamics for leaf in grown.leaves] == ["ode"] * 16


def test_depth_pruning_of_branchgrpo_moves_forward_and_stops():
    run = paper("branchgrpo", depth_pruning=[15, 16, 17, 18])

    def pruned(iteration: int) -> list[int]:
        """Indices where untrained edges arrive."""
        grown = tree(run, iteration)
        trained = set(grown.trained)
        arrived = {n.index for k, n in enumerate(grown.nodes) if k and k not in trained} - {20}
        assert {grown.nodes[k].index for k in trained}.isdisjoint(arrived)
        return sorted(arrived)

    for iteration in (1, 29, 30, 59, 60, 149, 150, 179, 180, 210, 1000):
        first = max(15 - iteration // 30, 9)  # its code: shift = step // 30, from step 1
        assert pruned(iteration) == list(range(first, first + 4)), iteration
    assert tree(run, 1).cost.forward == 203  # sampling is not pruned


@pytest.mark.parametrize(("fraction", "count"), [(0.99, 9), (0.5, 5), (1.0, 10)])
def test_flow_grpo_leaves_out_what_its_fraction_leaves_out(fraction, count):
    assert starts(tree(paper("flow_grpo", trained_fraction=fraction))) == list(range(count))


# --- the grid -------------------------------------------------------------------------------------

LINEAGE = ("flow_grpo", "flow_grpo_fast", "tempflow_grpo", "diffusion_nft", "awm")
"""Methods whose public code samples on the stock SD3 pipeline's grid."""


@pytest.mark.parametrize("family", ["sd3", "flux", "qwen_image", "z_image"])
@pytest.mark.parametrize("name", METHODS)
def test_the_grid_is_the_lineages_in_training_and_the_pipelines_in_evaluation(name, family):
    steps = METHOD_MODELS[name]().steps

    def grids(**more: Any) -> list[tuple[float, ...]]:
        of = {"method.name": name, "method.steps": steps, "model.family": family, **more}
        run = small_run("x", **of)
        return [training_sigmas(run), monitor_sigmas(run), evaluation_sigmas(run)]

    uniform = [shifted_sigmas(n, 3.0) for n in (steps, 4, 4)]
    end = stock_end(3.0, dynamic=False) if family == "sd3" else None
    stock = [shifted_sigmas(n, 3.0, end=end) for n in (steps, 4, 4)]
    assert (stock == uniform) is (family != "sd3")
    assert grids() == [stock[0] if name in LINEAGE else uniform[0], *stock[1:]]
    assert grids(**{"schedule.end": "stock"}) == stock
    assert grids(**{"schedule.end": "uniform"}) == uniform


# --- a function of (seed, iteration, prompt) ------------------------------------------------------

DRAWN = {name: {"active_per_iteration": 3} for name in ("egrpo", "g2rpo", "tempflow_grpo")}
OCCASIONS = [(1, 0), (1, 1), (2, 0), (30, 7), (31, 7)]
SCRIPT = """
import hashlib, sys
from egrpo.config.load import load_run
from egrpo.planning.trees import needs_plan, plan_of, training_sigmas, tree_of
for path in sys.argv[1:]:
    run = load_run(path)
    plan = plan_of(run, training_sigmas(run)) if needs_plan(run) else None
    for n, prompt in [(31, 7), (2, 0), (30, 7), (1, 1), (1, 0)]:
        tree = tree_of(run, plan, n, prompt)
        print(run.method.name, n, prompt, hashlib.sha256(repr(tree).encode()).hexdigest())
assert "torch" not in sys.modules
"""


def test_trees_are_the_same_in_another_process_and_order(tmp_path):
    paths, expected = [], set()
    for name in METHODS:
        run = paper(name, **DRAWN.get(name, {}))
        paths.append(str(write_run(run, tmp_path / f"{name}.yaml")))
        for n, prompt in OCCASIONS:
            grown = hashlib.sha256(repr(tree(run, n, prompt)).encode()).hexdigest()
            expected.add(f"{name} {n} {prompt} {grown}")
    words, env = [sys.executable, "-c", SCRIPT, *reversed(paths)], {"PYTHONHASHSEED": "77"}
    out = subprocess.run(
        words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stderr
    lines = out.stdout.split("\n")[:-1]
    assert len(lines) == len(METHODS) * len(OCCASIONS)
    assert set(lines) == expected


@pytest.mark.parametrize("name", METHODS)
def test_seed_iteration_and_prompt_matter_where_something_is_drawn(name):
    run = paper(name, **DRAWN.get(name, {}))
    other = run.model_copy(update={"seed": 1})
    first = [tree(run, n) for n in range(1, 9)]
    assert first == [tree(run, n) for n in range(1, 9)]
    drawn = [[tree(other, n) for n in range(1, 9)], first[:1] * 8]
    drawn += [[tree(run, 1, prompt) for prompt in range(8)]]
    fixed = name in ("flow_grpo", "branchgrpo", "mixgrpo", "mixgrpo_flash")
    alike = [trees == (first if n < 2 else first[:1] * 8) for n, trees in enumerate(drawn)]
    assert alike == [fixed] * 3


# --- cost -----------------------------------------------------------------------------------------

COSTS = {  # forward, train, per prompt
    "egrpo": (1004, 8),  # 8 + 12 * 83, see the plan
    "dancegrpo": (192, 108),  # 12 * 16, 12 * 9
    "mixgrpo": (300, 48),  # 12 * 25, 12 * 4
    "flow_grpo": (240, 216),  # 24 * 10, 24 * 9
    "branchgrpo": (203, 187),  # 1 + 3 * (2 + 4 + 8) + 10 * 16; the last 16 do not train
    "tempflow_grpo": (1116, 36),  # 4 * (9 + 6 * 45), 4 * 9
    "diffusion_nft": (456, 216),  # 24 * 10 + 24 * 9, 24 * 9
    "awm": (480, 144),  # 24 * 14 + 24 * 6, 24 * 6
}


def test_efficient_is_the_arm_that_was_measured():
    """The arm of docs/results.md, and its evaluations: 241,869 for 598 x 4 trees."""
    measured = paper("egrpo", active_per_iteration=2, granularities=[4], suffix="dpm2")
    efficient = paper("egrpo_efficient")
    costs = []
    for n, prompt in ((n, prompt) for n in range(1, 61) for prompt in range(4)):
        grown = tree(efficient, n, prompt)
        assert grown == tree(measured, n, prompt)
        costs.append(sum(grown.cost))
    assert sum(costs) / len(costs) == pytest.approx(241_869 / (598 * 4), rel=0.03)


@pytest.mark.parametrize("granularities", [[1], [2], [1, 2], [2, 1], [1, 2, 3], [4, 2]], ids=str)
def test_cost_of_g2rpo_counts_what_its_granularities_share_once(granularities):
    steps, samples, active = 16, 12, 8
    total = active  # of the anchor, 0..7, shared with the branch points
    for k in range(active):
        paths = set()
        for g in granularities:
            grid = [*range(k + 2), *range(k + 2, steps + 1, g)]
            ends = [i for i in grid if k < i < steps]
            paths |= {tuple(ends[: n + 1]) for n in range(len(ends))}  # equal beginnings once
        total += samples * len(paths)
    assert tree(paper("g2rpo", granularities=granularities)).cost == Cost(total, 8)
    if granularities == [1, 2]:  # its own
        both = 8 + 12 * sum((16 - 1 - k) + len(range(k + 4, 16, 2)) for k in range(8))
        assert tree(paper("g2rpo")).cost == Cost(both, 8)


def test_cost_of_flow_grpo_fast_shares_what_comes_before_the_window():
    run, apart = paper("flow_grpo_fast"), paper("flow_grpo_fast", initial_noise="same")
    for n in range(1, 30):
        grown = tree(run, n)
        shared = starts(grown)[0] + 1  # the first stochastic step leaves from one latent
        assert grown.cost == Cost(shared + 24 * (10 - shared), 1 + 24 * 2)
        assert tree(apart, n).cost == Cost(240, 72)


@pytest.mark.parametrize("name", METHODS)
def test_cost_of_an_iteration_sums_its_prompts_and_guidance_doubles_it(name):
    run = paper(name)
    plan = plan_of(run, training_sigmas(run)) if needs_plan(run) else None
    each = {tree(run, n, n).cost for n in (1, 2, 40)}
    if name in COSTS:
        assert each == {Cost(*COSTS[name])}
    cost = iteration_cost(run, plan, 1, 16)
    if len(each) == 1:  # the same for every prompt, of which an iteration has two
        assert cost[:2] == tuple(2 * n for n in each.pop())
    penalties = 2 if name == "awm" else int(run.train.kl_weight > 0)
    assert cost.reference == penalties * cost.train
    assert cost.total == cost.forward + cost.train + cost.reference
    guided = run.model_copy(update={"model": run.model.model_copy(update={"guidance_scale": 4.5})})
    assert iteration_cost(guided, plan, 1, 16) == tuple(2 * n for n in cost)


# --- optimizer steps ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_parts_cover_every_edge_and_none_is_empty(name):
    grown, count = tree(paper(name)), RECIPES[name][-1]
    parts = grown.parts(count)
    assert set(parts) == set(grown.trained)
    assert sorted(set(parts.values())) == list(range(count))
    assert set(grown.parts(1).values()) == {0}
    assert grown.passes(1) == grown.cost.train
    if name != "flow_grpo_fast":  # edges out of one latent stay together
        assert len({(grown.source(k), part) for k, part in parts.items()}) == grown.cost.train
        assert grown.passes(count) == grown.cost.train


CUT = [("egrpo", 8), ("g2rpo", 8), ("tempflow_grpo", 2), ("flow_grpo", 2), ("flow_grpo_fast", 2)]
CUT += [("flow_grpo_fast", 5), ("dancegrpo", 3), ("mixgrpo", 4), ("awm", 5), ("diffusion_nft", 6)]


@pytest.mark.parametrize(("name", "count"), CUT)
def test_branches_are_cut_by_step_chains_by_sample_and_anchors_whole(name, count):
    run = paper(name)
    grown = tree(run)
    for k, part in grown.parts(count).items():
        node, samples = grown.nodes[k], run.method.group_size
        by_sample, by_anchor = node.sample * count // samples, node.group // 9 * count // 4
        special = {"egrpo": start_of(grown, k), "g2rpo": start_of(grown, k)}
        assert part == (special | {"tempflow_grpo": by_anchor}).get(name, by_sample)


def test_both_updates_of_flow_grpo_fast_train_the_whole_window():
    """Its code: 24 samples x 3 steps in two optimizer steps, 36 + 36, whatever they share."""
    run = paper("flow_grpo_fast")
    for prompt in range(4):
        grown = tree(run, 1, prompt)
        parts = grown.parts(2)
        steps = Counter((parts[k], start_of(grown, k)) for k in grown.trained)
        assert steps == {(part, i): 12 for part in (0, 1) for i in starts(grown)}
        assert grown.passes(2) == 1 + 1 + 24 * 2  # the shared latent once in each
    assert iteration_cost(run, None, 1, 16).train == 2 * 50


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("active_per_iteration", [None, 4])
def test_tempflow_weighs_a_step_by_its_share_of_the_noise(active_per_iteration):
    run = paper("tempflow_grpo", active_per_iteration=active_per_iteration)
    sigmas = training_sigmas(run)

    def std(i: int) -> float:
        t = sigmas[i]
        return 0.7 * math.sqrt(t / (1 - (sigmas[1] if i == 0 else t)) * (t - sigmas[i + 1]))

    for n in (1, 2):
        grown = tree(run, n)
        weight = {start_of(grown, k): grown.nodes[k].weight for k in grown.trained}
        assert len(weight) == (active_per_iteration or 9)
        mean = sum(map(std, weight)) / len(weight)
        assert weight == pytest.approx({i: std(i) / mean for i in weight})
        assert sum(weight.values()) / len(weight) == pytest.approx(1)


# --- what is refused ------------------------------------------------------------------------------

REFUSED = [  # method, key, value, what is said after the key
    ("mixgrpo", "method.window_size", 24, "24 steps do not fit a sched"),
    ("mixgrpo_flash", "method.steps", 5, "4 steps do not fit a schedule of 5"),
    ("flow_grpo_fast", "method.window_size", 9, "9 steps do not fit"),
    ("flow_grpo_fast", "method.window_part", 0.2, "0.2 of 10 steps has no"),
    ("branchgrpo", "method.splits", [0, 3, 6, 19], "19 lies beyond the last stochastic step; st"),
    ("branchgrpo", "method.splits", [0, 3, 3, 6], "grid indices must be dist"),
    ("branchgrpo", "method.splits", [], "grid indices must be distinct"),
    ("branchgrpo", "method.group_size", 12, "4 splits make 16 leaves, not 12"),
    ("branchgrpo", "method.depth_pruning", [19, 21], "distinct, ascending indices of 1..20"),
    ("branchgrpo", "method.depth_pruning", [0, 1], "distinct, ascending"),
    ("g2rpo", "method.granularities", [1, 8], "stride 8 skips sigma 0: after step 7 of 16 it may"),
    ("g2rpo", "method.granularities", [0, 1], "strides of at least 1"),
    ("g2rpo", "method.granularities", [2, 2], "a stride is named twice"),
    ("flow_grpo_fast", "method.noise_level", 1.01, "cps needs a value in (0, 1]"),
    ("flow_grpo", "train.loss", "negative_aware", "negative_aware is not for method flow_grpo, w"),
    ("diffusion_nft", "train.loss", "clipped", "clipped is not for method diff"),
    ("awm", "train.loss", "guarded", "guarded is not for method awm"),
    ("flow_grpo_fast", "train.loss", "guarded", "guarded needs a Gaussian log-prob"),
    ("egrpo", "method.active_per_iteration", 9, "9 of 3 active steps"),
    ("tempflow_grpo", "method.active", 10, "step 9 lies beyond the schedule"),
    ("diffusion_nft", "method.times_per_sample", 11, "11, but times_part leaves 10 of 10 grid ind"),
    ("awm", "method.times_per_sample", 13, "13, but times_part leaves"),
    ("awm", "train.kl", "transition", "transition compares stochastic transitions"),
    ("diffusion_nft", "train.kl", "divergence", "divergence compares stochastic"),
    ("egrpo", "train.sample_average", True, "needs train.ema_decay"),
    ("egrpo", "train.ema_ramp", 0.1, "needs train.ema_decay"),
    ("egrpo", "train.ema_ramp", "warm_up", "needs train.ema_decay"),
    ("egrpo", "train.ema_weight", 1.0, "needs train.ema_decay"),
]
NAMED = {"method.steps": "method.window_size"}
"""Keys that are told by the one which they make impossible."""


@pytest.mark.parametrize(("name", "key", "value", "message"), REFUSED)
def test_settings_that_cannot_be_are_refused_in_one_line(name, key, value, message):
    with pytest.raises(UserError) as caught:
        small_run("bad", **{"method.name": name, key: value})
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"runs.tsv, run 'bad': {NAMED.get(key, key)}: {message}")


ALLOWED = [  # the nearest settings that can be
    *(("mixgrpo", "window_size", 23), ("branchgrpo", "splits", [0, 3, 6, 18])),
    *(("branchgrpo", "depth_pruning", [1, 20]), ("g2rpo", "granularities", [1, 7])),
    *(("flow_grpo_fast", "noise_level", 1.0), ("egrpo", "active_per_iteration", 8)),
    *(("diffusion_nft", "times_per_sample", 10), ("awm", "times_per_sample", 12)),
]


@pytest.mark.parametrize(("name", "key", "value"), ALLOWED)
def test_bounds_of_what_is_refused_are_allowed(name, key, value):
    grown = tree(paper(name, **{key: value}))
    assert grown.leaves
    assert grown.trained
