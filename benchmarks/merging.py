"""What a merged adapter loses in bfloat16, by how its weights are rounded, on the toy.

``python benchmarks/merging.py [--write docs/benchmarks/merging.md]``

Adapters of several sizes, as training makes them: second factors leave zero. From the same branches
with the same noise, samples are finished by the transformer with its adapter beside the weights and
by twins that have it merged; their rewards are compared within groups.
"""

from __future__ import annotations

import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, parser, table, tell, versions

from egrpo.config.models import RunConfig
from egrpo.measure.embed import embed_files
from egrpo.measure.suffixes import rank_correlation
from egrpo.models import twin
from egrpo.planning.trees import closed_form_plan
from egrpo.rewards import score_all
from egrpo.study.resolve import load_study
from egrpo.train.trainer import Trainer

SIZES = [1e-4, 1e-3, 1e-2, 5e-2]
REWARD = "preference"
HEAD = [
    "std of the second factors",
    "update / weights",
    "merged weights",
    "change of the velocity that is kept",
    "rank correlation",
]


def nearest(value: torch.Tensor, dtype: torch.dtype, generator: Any) -> torch.Tensor:
    """Rounding as a plain copy does it."""
    return value.to(dtype)


ROUNDINGS = {"rounded at random": twin.rounded, "rounded to the nearest": nearest}


def moved(trainer: Trainer, size: float) -> float:
    """Set all adapters; returns the norm of the update over that of the weights."""
    generator, updates, weights = torch.Generator().manual_seed(1), 0.0, 0.0
    for _, layer in trainer.model.lora_layers():
        second = layer.lora_B["default"].weight
        second.data.copy_(size * torch.randn(second.shape, generator=generator))
        updates += float(layer.get_delta_weight("default").detach().square().sum())
        weights += float(layer.get_base_layer().weight.float().square().sum())
    return float((updates / weights) ** 0.5)


@torch.no_grad()
def velocity(trainer: Trainer) -> torch.Tensor:
    """Float64 velocities of 64 latents by what samples."""
    model = trainer.model
    x = torch.randn(64, *model.image_shape, generator=torch.manual_seed(3))
    ids = [n % len(trainer.texts) for n in range(len(x))]
    with model.sampling(batch=64) as network:
        of = x, 0.7, trainer.conditioning.batch(ids, model.device), network
        return model.velocity(*of).double()


def rewards(trainer: Trainer) -> np.ndarray:
    """[groups, samples] of one iteration."""
    ids, trees = trainer.trees(1)
    rollout = trainer.rollout(1, ids, trees)
    images = trainer.model.decode(rollout.leaves, 96)
    texts = [trainer.texts[ids[t]] for t in rollout.leaf_tree]
    scores = score_all({REWARD: trainer.rewards[REWARD]}, images, texts)[REWARD]
    return scores.reshape(-1, trainer.run.method.group_size)


def run_of(dtype: str, *, merge: bool) -> RunConfig:
    """The default run of the toy."""
    run = load_study(ROOT / "config/config.yaml").runs["egrpo-s0"]
    model = {"dtype": dtype, "merge_lora_for_sampling": merge, "compile": False}
    return run.model_copy(update={"model": run.model.model_copy(update=model)})


def main() -> None:
    """Measure and print, or write."""
    given = parser(__doc__).parse_args()
    with chdir(ROOT), tempfile.TemporaryDirectory() as folder:
        embeddings = embed_files(run_of("float32", merge=True), Path(folder))
        made = {
            (dtype, merge): Trainer(run, closed_form_plan(run), embeddings)
            for dtype, merge in (("float32", False), ("bfloat16", False), ("bfloat16", True))
            for run in [run_of(dtype, merge=merge)]
        }
        whole, beside, merged = made.values()
        start = {n: velocity(t) for n, t in enumerate(made.values())}
        rows = []
        for size in SIZES:
            ratio, *_ = [moved(trainer, size) for trainer in made.values()]
            change, exact = velocity(whole) - start[0], rewards(beside)

            def kept(n: int, trainer: Trainer, change: torch.Tensor = change) -> str:
                mine = velocity(trainer) - start[n]
                return f"{float((mine * change).sum() / change.square().sum()):.2f}"

            rows.append([f"{size:g}", f"{ratio:.1e}", "none: beside them", kept(1, beside), "1"])
            for name, rounding in ROUNDINGS.items():
                twin.rounded = rounding
                pairs = zip(rewards(merged), exact, strict=True)
                ranks = [rank_correlation(*pair) for pair in pairs]
                rows.append(["", "", name, kept(2, merged), f"{np.nanmean(ranks):.3f}"])
    tell(
        "# A merged adapter in bfloat16\n\n"
        f"Written by `python benchmarks/merging.py`. {versions('CPU')}. The toy's network, "
        f"reward {REWARD}; {len(exact)} groups of {exact.shape[1]} samples. Kept: the change of "
        "the velocity by the adapter, projected on that in float32; 1 is all of it. Rank "
        "correlation (Spearman) with the rewards of the adapter beside the weights, mean over "
        f"groups.\n\n{table(HEAD, rows, 3)}\n",
        given.write,
    )


if __name__ == "__main__":
    main()
