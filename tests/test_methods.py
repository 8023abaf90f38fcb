"""The methods by their settings: which edges train and when, what it costs, what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, small_run, write_run

from egrpo.config.models import RunConfig
from egrpo.core.noise import NOISING
from egrpo.core.schedule import shifted_sigmas, stock_end
from egrpo.core.tree import Cost, Tree
from egrpo.errors import UserError
from egrpo.methods.settings import METHOD_MODELS
from egrpo.planning.trees import (
    evaluation_sigmas,
    iteration_cost,
    monitor_sigmas,
    needs_plan,
    plan_of,
    training_sigmas,
    tree_of,
)

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


def chi_square(counts: Iterable[int], options: int) -> float:
    """Pearson's statistic against the uniform distribution over ``options``."""
    values = list(counts)
    expected = sum(values) / options
    values += [0] * (options - len(values))
    return sum((n - expected) ** 2 / expected for n in values)


# --- recipes --------------------------------------------------------------------------------------

RECIPES = {  # T, G, dynamics, level, clip range, KL weight, LoRA rate, optimizer steps, std of
    "egrpo": (16, 12, "flow_sde", 0.7, 1e-4, 0.0, 6e-5, 1, "group"),
    "egrpo_efficient": (16, 12, "flow_sde", 0.7, 1e-4, 0.0, 6e-5, 1, "group"),
    "g2rpo": (16, 12, "flow_sde", 0.7, 1e-4, 0.0, 6e-5, 1, "group"),
    "tempflow_grpo": (10, 6, "flow_sde", 0.7, 1e-4, 0.004, 3e-4, 2, "group"),
    "flow_grpo": (10, 24, "flow_sde", 0.7, 1e-4, 0.04, 3e-4, 2, "batch"),
    "flow_grpo_fast": (10, 24, "cps", 0.8, 1e-5, 0.0, 3e-4, 2, "batch"),
    "dancegrpo": (16, 12, "dance_sde", 0.3, 1e-4, 0.0, 3e-4, 3, "group"),
    "mixgrpo": (25, 12, "flow_sde", 0.7, 1e-4, 0.0, 3e-4, 4, "group"),
    "mixgrpo_flash": (25, 12, "flow_sde", 0.7, 1e-4, 0.0, 3e-4, 4, "group"),
    "branchgrpo": (20, 16, "dance_sde", 0.3, 1e-3, 0.0, 3e-4, 16, "group"),
    "diffusion_nft": (10, 24, None, None, None, 1e-4, 3e-4, 1, "batch"),
    "awm": (14, 24, None, None, 1.0, 1e-4, 3e-4, 1, "batch"),
}


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_those_of_the_methods_papers_and_codes(name):
    run = paper(name)
    m, t = run.method, run.train
    got = (m.steps, m.group_size, m.dynamics, m.noise_level, t.clip_range, t.kl_weight)
    got += (t.learning_rate_lora, t.updates, run.advantage.std)
    for value, wanted in zip(got, RECIPES[name], strict=True):
        assert wanted is None or value == wanted
    unbiased = name in ("g2rpo", "dancegrpo", "branchgrpo") or name.startswith(("egrpo", "mixgrpo"))
    assert (run.advantage.ddof, run.advantage.eps) == ((1, 1e-8) if unbiased else (0, 1e-4))


# --- which edges train ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "every"), [("mixgrpo", 25), ("mixgrpo_flash", 20)], ids=["mixgrpo", "flash"]
)
def test_window_of_mixgrpo_slides_to_the_last_place_and_returns(name, every):
    run = paper(name)
    windows = [starts(tree(run, n)) for n in range(1, 21 * every + 1)]
    for n, window in enumerate(windows):
        first = n // every % 20
        assert window == list(range(first, first + 4)), f"iteration {n + 1}"
    assert windows[20 * every - 1][-1] == 22  # T - 3
    assert windows[20 * every] == [0, 1, 2, 3]


def test_window_of_mixgrpo_by_other_strides():
    jumping = paper("mixgrpo", steps=12, window_size=3, window_stride=3, window_every=2)
    seen = [starts(tree(jumping, n))[0] for n in range(1, 10)]
    assert seen == [0, 0, 3, 3, 6, 6, 0, 0, 3]  # 12 - 2 - 3 = 7 is the last place
    still = paper("mixgrpo_flash", window_stride=0)
    assert {tuple(starts(tree(still, n))) for n in (1, 20, 21, 400)} == {(0, 1, 2, 3)}


def test_window_of_flow_grpo_fast_is_uniform_over_its_places():
    run = paper("flow_grpo_fast")
    drawn = [tuple(starts(tree(run, n, prompt))) for n in range(1, 61) for prompt in range(8)]
    counts = Counter(drawn)
    assert set(counts) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}
    assert chi_square(counts.values(), 3) < 18  # 1e-4 of the chi-square with 2 degrees
    assert len(set(drawn[:8])) > 1  # prompts of one iteration
    assert len(set(drawn[::8])) > 1  # iterations of one prompt


@pytest.mark.parametrize(
    ("steps", "size", "part", "places"),
    [(10, 2, 0.5, 4), (10, 3, 1.0, 6), (20, 5, 0.5, 6), (5, 3, 1.0, 1)],
)
def test_window_of_flow_grpo_fast_lies_in_its_part(steps, size, part, places):
    run = paper("flow_grpo_fast", steps=steps, window_size=size, window_part=part, group_size=2)
    drawn = {starts(tree(run, n))[0] for n in range(1, 120)}
    assert drawn == set(range(places))


@pytest.mark.parametrize(
    ("name", "count", "eligible"),
    [("dancegrpo", 9, 15), ("diffusion_nft", 9, 10), ("awm", 6, 12)],
)
def test_steps_drawn_per_sample_are_uniform_and_differ(name, count, eligible):
    run = paper(name)
    occasions = [(n, prompt) for n in range(1, 9) for prompt in range(6)]
    drawn = [trained_steps(tree(run, n, prompt)) for n, prompt in occasions]
    chosen = [steps for samples in drawn for steps in samples.values()]
    assert all(len(samples) == run.method.group_size for samples in drawn)
    assert {len(steps) for steps in chosen} == {count}
    each = Counter(step for steps in chosen for step in steps)
    assert set(each) == set(range(eligible))  # never the last step of DanceGRPO
    # without replacement the statistic shrinks by (1 - count/eligible)
    kept = (1 - count / eligible) * eligible / (eligible - 1)
    assert chi_square(each.values(), eligible) / kept < 50
    for samples in drawn:
        sets = Counter(map(frozenset, samples.values()))
        assert max(sets.values()) < len(samples) / 2  # samples differ
    assert len({str(sorted(samples.items())) for samples in drawn}) == len(occasions)


@pytest.mark.parametrize("name", ["egrpo", "g2rpo", "tempflow_grpo"])
def test_active_per_iteration_is_a_uniform_subset_of_the_plan(name):
    whole = tree(paper(name))
    ends = {start_of(whole, k): whole.nodes[k].index for k in whole.trained}
    run = paper(name, active_per_iteration=3)
    drawn = []
    for n in range(1, 41):
        for prompt in range(10):
            grown = tree(run, n, prompt)
            some = {start_of(grown, k): grown.nodes[k].index for k in grown.trained}
            assert some.items() <= ends.items()  # spans are the plan's
            drawn.append(frozenset(some))
    assert {len(steps) for steps in drawn} == {3}
    each = Counter(step for steps in drawn for step in steps)
    assert set(each) == set(ends)
    kept = (1 - 3 / len(ends)) * len(ends) / (len(ends) - 1)
    assert chi_square(each.values(), len(ends)) / kept < 40
    assert len(set(drawn)) > 0.8 * math.comb(len(ends), 3)


def test_all_active_steps_branch_where_no_number_is_given():
    plan = [1, 1, 2, 2, 2, 3, 3, 3]
    grown = tree(paper("egrpo"), 7, 3)
    spans = {start_of(grown, k): grown.nodes[k].index - start_of(grown, k) for k in grown.trained}
    assert spans == dict(enumerate(plan))


def test_branchgrpo_splits_and_trains_every_edge_but_the_last():
    grown = tree(paper("branchgrpo"))
    per_depth = Counter(node.index for node in grown.nodes)
    expected = {
        0: 1,
        **dict.fromkeys((1, 2, 3), 2),
        **dict.fromkeys((4, 5, 6), 4),
        **dict.fromkeys((7, 8, 9), 8),
        **dict.fromkeys(range(10, 21), 16),
    }
    assert per_depth == expected
    assert len(grown.trained) == sum(expected.values()) - 1 - 16 == 202
    assert Counter(start_of(grown, k) for k in grown.trained) == {
        depth - 1: n for depth, n in expected.items() if 0 < depth < 20
    }
    assert {grown.nodes[leaf].dynamics for leaf in grown.leaves} == {"ode"}
    assert len(grown.leaves) == 16


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
    assert pruned(29) == [15, 16, 17, 18]
    assert pruned(30) == [14, 15, 16, 17]
    assert pruned(180) == [9, 10, 11, 12]
    assert tree(run, 1).cost.forward == 203  # sampling is not pruned


def test_flow_grpo_leaves_out_what_its_fraction_leaves_out():
    assert starts(tree(paper("flow_grpo"))) == list(range(9))
    assert starts(tree(paper("flow_grpo", trained_fraction=0.5))) == list(range(5))
    assert starts(tree(paper("flow_grpo", trained_fraction=1.0))) == list(range(10))


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

DRAWN = {
    "egrpo": {"active_per_iteration": 3},
    "g2rpo": {"active_per_iteration": 3},
    "tempflow_grpo": {"active_per_iteration": 3},
}
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


def test_trees_are_the_same_in_another_process_and_order(tmp_path: Path) -> None:
    import hashlib

    paths, expected = [], set()
    for name in METHODS:
        run = paper(name, **DRAWN.get(name, {}))
        folder = tmp_path / name
        folder.mkdir()
        paths.append(str(write_run(run, folder / "config.yaml")))
        for n, prompt in OCCASIONS:
            grown = hashlib.sha256(repr(tree(run, n, prompt)).encode()).hexdigest()
            expected.add(f"{name} {n} {prompt} {grown}")
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, *reversed(paths)],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    lines = out.stdout.split("\n")[:-1]
    assert len(lines) == len(METHODS) * len(OCCASIONS)
    assert set(lines) == expected


@pytest.mark.parametrize("name", METHODS)
def test_seed_iteration_and_prompt_matter_where_something_is_drawn(name):
    settings = DRAWN.get(name, {})
    fixed = name in ("flow_grpo", "branchgrpo", "mixgrpo", "mixgrpo_flash")

    def drawn(seed: int, iterations: range, prompts: range) -> list[Tree]:
        run = paper(name, **settings).model_copy(update={"seed": seed})
        return [tree(run, n, prompt) for n in iterations for prompt in prompts]

    some = drawn(0, range(1, 9), range(1))
    assert some == drawn(0, range(1, 9), range(1))
    assert (some == drawn(1, range(1, 9), range(1))) is fixed
    assert (some[:1] * 8 == some) is fixed
    prompts = drawn(0, range(1, 2), range(8))
    assert (prompts[:1] * 8 == prompts) is fixed


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


@pytest.mark.parametrize("name", COSTS)
def test_cost_at_the_papers_settings(name):
    run = paper(name)
    assert {tree(run, n, n).cost for n in (1, 2, 40)} == {Cost(*COSTS[name])}


def test_efficient_is_the_arm_that_was_measured():
    """The arm of docs/results.md, and its evaluations: 241,869 for 598 x 4 trees."""
    measured = paper("egrpo", active_per_iteration=2, granularities=[4], suffix="dpm2")
    efficient = paper("egrpo_efficient")
    costs = []
    for n in range(1, 61):
        for prompt in range(4):
            grown = tree(efficient, n, prompt)
            assert grown == tree(measured, n, prompt)
            costs.append(grown.cost.forward + grown.cost.train)
    assert sum(costs) / len(costs) == pytest.approx(241_869 / (598 * 4), rel=0.03)


@pytest.mark.parametrize(
    "granularities", [[1], [2], [1, 2], [2, 1], [1, 2, 3], [4, 2]], ids=lambda g: str(g)
)
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


def test_cost_of_g2rpo_at_its_own_settings():
    both = 8 + 12 * sum((16 - 1 - k) + len(range(k + 4, 16, 2)) for k in range(8))
    assert tree(paper("g2rpo")).cost == Cost(both, 8)


def test_cost_of_flow_grpo_fast_shares_what_comes_before_the_window():
    run = paper("flow_grpo_fast")
    seen = set()
    for n in range(1, 30):
        grown = tree(run, n)
        start = starts(grown)[0]
        shared = start + 1  # the first stochastic step leaves from one latent
        assert grown.cost == Cost(shared + 24 * (10 - shared), 1 + 24 * 2)
        seen.add(start)
        apart = paper("flow_grpo_fast", initial_noise="same")
        assert tree(apart, n).cost == Cost(240, 72)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.75, 1.0])
def test_cost_of_mixgrpo_flash(ratio):
    """Its code: int((T + 1 - 1 - last) * ratio) points from the last stochastic step to T."""
    run = paper("mixgrpo_flash", suffix_ratio=ratio)
    for n in range(1, 20 * 20, 20):
        grown = tree(run, n)
        start = starts(grown)[0]
        points = int((25 - (start + 3)) * ratio)
        after = max(points - 1, 1)  # of one point its code never reached sigma 0
        assert grown.cost == Cost(12 * (start + 4 + after), 48)


@pytest.mark.parametrize("name", METHODS)
def test_cost_of_an_iteration_sums_its_prompts_and_guidance_doubles_it(name):
    run = paper(name)
    plan = plan_of(run, training_sigmas(run)) if needs_plan(run) else None
    one = tree(run).cost
    if name != "flow_grpo_fast":  # the same for every prompt
        cost = iteration_cost(run, plan, 1, 16)
        penalties = 2 if name == "awm" else int(run.train.kl_weight > 0)
        assert (cost.forward, cost.train) == (2 * one.forward, 2 * one.train)
        assert cost.reference == penalties * 2 * one.train
        assert cost.total == cost.forward + cost.train + cost.reference
    guided = run.model_copy(update={"model": run.model.model_copy(update={"guidance_scale": 4.5})})
    cost, twice = iteration_cost(run, plan, 1, 16), iteration_cost(guided, plan, 1, 16)
    assert (twice.forward, twice.train) == (2 * cost.forward, 2 * cost.train)


# --- optimizer steps ------------------------------------------------------------------------------

UPDATES = {  # optimizer steps of an iteration
    "egrpo": 8,
    "egrpo_efficient": 2,
    "g2rpo": 8,
    "tempflow_grpo": 2,
    "flow_grpo": 2,
    "flow_grpo_fast": 2,
    "dancegrpo": 3,
    "mixgrpo": 4,
    "mixgrpo_flash": 4,
    "branchgrpo": 16,
    "diffusion_nft": 6,
    "awm": 3,
}


@pytest.mark.parametrize("name", METHODS)
def test_parts_cover_every_edge_and_none_is_empty(name):
    grown, count = tree(paper(name)), UPDATES[name]
    parts = grown.parts(count)
    assert set(parts) == set(grown.trained)
    assert sorted(set(parts.values())) == list(range(count))
    assert set(grown.parts(1).values()) == {0}
    assert grown.passes(1) == grown.cost.train
    if name != "flow_grpo_fast":  # edges out of one latent stay together
        assert len({(grown.source(k), part) for k, part in parts.items()}) == grown.cost.train
        assert grown.passes(count) == grown.cost.train


@pytest.mark.parametrize("name", ["egrpo", "g2rpo"])
def test_eight_parts_are_the_eight_active_steps(name):
    grown = tree(paper(name))
    parts = grown.parts(8)
    assert {parts[k]: start_of(grown, k) for k in grown.trained} == dict(
        zip(range(8), range(8), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("flow_grpo", 2),
        ("flow_grpo_fast", 2),
        ("flow_grpo_fast", 5),
        ("dancegrpo", 3),
        ("mixgrpo", 4),
        ("diffusion_nft", 6),
        ("awm", 5),
    ],
)
def test_chains_are_cut_by_sample(name, count):
    run = paper(name)
    grown, size = tree(run), run.method.group_size
    parts = grown.parts(count)
    for k in grown.trained:
        assert parts[k] == grown.nodes[k].sample * count // size


def test_both_updates_of_flow_grpo_fast_train_the_whole_window():
    """Its code: 24 samples x 3 steps in two optimizer steps, 36 + 36, whatever they share."""
    run = paper("flow_grpo_fast")
    for prompt in range(4):
        grown = tree(run, 1, prompt)
        parts = grown.parts(2)
        steps = Counter((parts[k], start_of(grown, k)) for k in grown.trained)
        window = starts(grown)
        assert steps == {(part, i): 12 for part in (0, 1) for i in window}
        assert grown.passes(2) == 1 + 1 + 24 * 2  # the shared latent once in each
    plan = None
    assert iteration_cost(run, plan, 1, 16).train == 2 * 50


def test_anchors_are_cut_whole():
    grown = tree(paper("tempflow_grpo"))
    parts = grown.parts(2)
    anchor = {k: grown.nodes[k].group // 9 for k in grown.trained}
    assert {(a, parts[k]) for k, a in anchor.items()} == {
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
    }


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


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"tempflow_grpo"}))
def test_other_methods_weigh_all_edges_alike(name):
    weights = {node.weight for node in tree(paper(name)).nodes if node.trained}
    assert weights == {0.2 if name == "awm" else 1.0}  # AWM's advantages count within 1, not 5


# --- what is refused ------------------------------------------------------------------------------

REFUSED = [
    ("mixgrpo", {"method.window_size": 24}, "method.window_size: 24 steps do not fit a sched"),
    (
        "mixgrpo_flash",
        {"method.steps": 5},
        "method.window_size: 4 steps do not fit a schedule of 5",
    ),
    ("flow_grpo_fast", {"method.window_size": 9}, "method.window_size: 9 steps do not fit"),
    ("flow_grpo_fast", {"method.window_part": 0.2}, "method.window_part: 0.2 of 10 steps has no"),
    (
        "branchgrpo",
        {"method.splits": [0, 3, 6, 19]},
        "method.splits: 19 lies beyond the last stochastic step; steps: 20 allows 0..18",
    ),
    ("branchgrpo", {"method.splits": [0, 3, 3, 6]}, "method.splits: grid indices must be dist"),
    ("branchgrpo", {"method.splits": []}, "method.splits: grid indices must be distinct"),
    ("branchgrpo", {"method.group_size": 12}, "method.group_size: 4 splits make 16 leaves, not 12"),
    ("branchgrpo", {"method.depth_pruning": [19, 21]}, "method.depth_pruning: distinct, ascending"),
    ("branchgrpo", {"method.depth_pruning": [0, 1]}, "method.depth_pruning: distinct, ascending"),
    (
        "g2rpo",
        {"method.granularities": [1, 8]},
        "method.granularities: stride 8 skips sigma 0: after step 7 of 16 it may be 7 at most",
    ),
    ("g2rpo", {"method.granularities": [0, 1]}, "method.granularities: strides of at least 1"),
    ("g2rpo", {"method.granularities": [2, 2]}, "method.granularities: a stride is named twice"),
    (
        "flow_grpo",
        {"method.dynamics": "cps", "method.noise_level": 1.01},
        "method.noise_level: cps needs a value in (0, 1]",
    ),
    ("flow_grpo_fast", {"method.noise_level": 1.5}, "method.noise_level: cps needs a value"),
    (
        "flow_grpo",
        {"train.loss": "negative_aware"},
        "train.loss: negative_aware is not for method flow_grpo, whose trained edges allow clipped",
    ),
    ("diffusion_nft", {"train.loss": "clipped"}, "train.loss: clipped is not for method diff"),
    ("awm", {"train.loss": "guarded"}, "train.loss: guarded is not for method awm"),
    ("flow_grpo_fast", {"train.loss": "guarded"}, "train.loss: guarded needs a Gaussian log-prob"),
    (
        "egrpo",
        {"method.active": 8, "method.active_per_iteration": 9},
        "method.active_per_iteration: 9 of 8 active steps",
    ),
    ("tempflow_grpo", {"method.active": 10}, "method.active: step 9 lies beyond the schedule"),
    (
        "diffusion_nft",
        {"method.times_per_sample": 11},
        "method.times_per_sample: 11, but times_part leaves 10 of 10 grid indices",
    ),
    ("awm", {"method.times_per_sample": 13}, "method.times_per_sample: 13, but times_part leaves"),
    ("awm", {"train.kl": "transition"}, "train.kl: transition compares stochastic transitions"),
    ("diffusion_nft", {"train.kl": "divergence"}, "train.kl: divergence compares stochastic"),
    ("egrpo", {"train.sample_average": True}, "train.sample_average: needs train.ema_decay"),
    ("egrpo", {"train.ema_ramp": 0.1}, "train.ema_ramp: needs train.ema_decay"),
    ("egrpo", {"train.ema_ramp": "warm_up"}, "train.ema_ramp: needs train.ema_decay"),
    ("egrpo", {"train.ema_weight": 1.0}, "train.ema_weight: needs train.ema_decay"),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED)
def test_settings_that_cannot_be_are_refused_in_one_line(name, settings, message):
    with pytest.raises(UserError) as caught:
        small_run("bad", **{"method.name": name, **settings})
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"runs.tsv, run 'bad': {message}")


def test_bounds_of_what_is_refused_are_allowed():
    """The nearest settings that can be: one step less, and a tree grows from each."""
    allowed = [
        ("mixgrpo", {"window_size": 23}),
        ("branchgrpo", {"splits": [0, 3, 6, 18]}),
        ("branchgrpo", {"depth_pruning": [1, 20]}),
        ("g2rpo", {"granularities": [1, 7]}),
        ("flow_grpo", {"dynamics": "cps", "noise_level": 1.0}),
        ("egrpo", {"active_per_iteration": 8}),
        ("diffusion_nft", {"times_per_sample": 10}),
        ("awm", {"times_per_sample": 12}),
    ]
    for name, settings in allowed:
        grown = tree(paper(name, **settings))
        assert grown.leaves
        assert grown.trained
