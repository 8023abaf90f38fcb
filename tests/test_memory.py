"""The estimate of a GPU's memory against what was measured, and its terms against a count."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_models
import torch
from conftest import ROOT, small_run
from full_size import FLUX_DEV, SD35_MEDIUM, Architecture
from safetensors.torch import save_file

from egrpo.config.models import Model, RunConfig
from egrpo.models import load_model
from egrpo.models.families import FAMILIES
from egrpo.ops import memory as memory_module
from egrpo.ops.memory import Memory, advice, memory
from egrpo.ops.reward_sizes import reward_bytes
from egrpo.ops.weights import lora_parameters, stored_bytes, twin_bytes
from egrpo.store.weights import Part, read_part
from egrpo.study.resolve import load_study

META = torch.device("meta")


def part_of(network: Any) -> Part:
    return Part(dict(network.config), {k: tuple(v.shape) for k, v in network.state_dict().items()})


def parts(a: Architecture) -> tuple[Part, Part]:
    with META:
        network = getattr(diffusers, a.family.transformer_class).from_config(a.config)
        return part_of(network), part_of(diffusers.AutoencoderKL(**a.vae))


def need(a: Architecture, stage: memory_module.Stage = "train", **settings: Any) -> Memory:
    """The estimate for a network of full size, with the settings that its measurement had."""
    family = next(name for name, known in FAMILIES.items() if known is a.family)
    model = {"family": family, "dtype": "bfloat16", "device": "cuda", "max_sequence_length": None}
    model |= {"vae_slicing": True, "merge_lora_for_sampling": False, "compile": False}
    train = {"micro_batch": 12, "train_micro_batch": 1, "decode_batch": 4, "monitor_every": 0}
    given = {f"model.{k}": v for k, v in model.items()} | {
        f"train.{k}": v for k, v in train.items()
    }
    return memory(small_run("egrpo", **given | settings), *parts(a), stage)


# -- against what was measured --------------------------------------------------------------------

VIT_H = 986_109_441
"""Parameters of HPSv2.1's network, open_clip's ViT-H-14."""

CHECKPOINTING = {"train.gradient_checkpointing": True}
STEP = {"train.micro_batch": 1}
"""A training step alone; what was measured had no optimizer yet."""
PRESET = {**CHECKPOINTING, "model.lora.rank": 128, "model.vae_slicing": False}
PROFILE = {"profile.micro_batch": 12, "profile.decode_batch": 4, "profile.samples": 2}
PROFILE |= {"profile.spans": [1, 2], "profile.shown": [], "method.steps": 16}
"""Branches as in smoke.yaml, whose 466 evaluations are what took the 63 s that were noted."""

MEASURED: dict[str, tuple[Architecture, int, dict[str, Any], float]] = {
    "FLUX.1-dev 720, training step, checkpointing": (FLUX_DEV, 720, STEP | CHECKPOINTING, 24.0),
    "FLUX.1-dev 720, training step": (FLUX_DEV, 720, STEP, 40.8),
    "SD3.5-medium 512, iteration": (SD35_MEDIUM, 512, {}, 8.0),
    "SD3.5-medium 512, iteration, checkpointing": (SD35_MEDIUM, 512, CHECKPOINTING, 6.0),
    "SD3.5-medium 1024, iteration": (SD35_MEDIUM, 1024, {}, 14.2),
    "SD3.5-medium 1024, iteration, checkpointing": (SD35_MEDIUM, 1024, CHECKPOINTING, 7.5),
    "FLUX.1-dev 720, whole training, on the card": (FLUX_DEV, 720, PRESET, 37.6),
    "FLUX.1-dev 720, profile, on the card": (FLUX_DEV, 720, PRESET | PROFILE, 39.8),
}
"""NVIDIA H200, torch 2.11, commit b2cbb1a: GiB. "On the card" is what the card showed, others are
the peak of torch's tensors."""


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def there(size: float) -> None:
        monkeypatch.setattr(memory_module, "reward_bytes", lambda run: {"hps": size})

    return there


@pytest.mark.parametrize("case", MEASURED)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(case, rewards):
    a, side, settings, measured = MEASURED[case]
    card = case.endswith("on the card")
    rewards(4.0 * VIT_H if card else 0.0)
    stage: memory_module.Stage = "profile" if "profile" in case else "train"
    found = need(a, stage, **{"model.height": side, "model.width": side}, **settings)
    estimate = found.on_card if card else found.peak
    if "step" in case:
        estimate -= found.fixed["optimizer"]
    assert estimate == pytest.approx(measured, rel=0.1)
    page = (ROOT / "docs/models.md").read_text()
    assert f"| {case} | {estimate:.1f} | {measured} |" in page


# -- presets ---------------------------------------------------------------------------------------

SIZES = {"hps": VIT_H, "clip": 987e6, "pickscore": 986e6, "imagereward": 447e6, "aesthetic": 428e6}
"""Parameters of published networks."""
PRESETS = {  # the card, GB, and the GiB of it that are usable at least
    "flux_dev_hps": (FLUX_DEV, [], 79.0),
    "flux_dev_48gb": (FLUX_DEV, ["flux_dev_hps"], 44.9),  # an L40S; others have 47.5
    "flux_dev_24gb": (FLUX_DEV, ["flux_dev_hps"], 23.5),
    "sd35_medium_pickscore": (SD35_MEDIUM, [], 44.9),
    "sd35_medium_24gb": (SD35_MEDIUM, ["sd35_medium_pickscore"], 23.5),
}


def published(run: RunConfig) -> dict[str, float]:
    there = {name: r for name, r in run.rewards.items() if getattr(r, "device", "") is None}
    sizes = {name: 428e6 if r.kind == "clip" else SIZES[name] for name, r in there.items()}
    return {name: 4.0 * size for name, size in sizes.items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_their_cards_and_say_the_estimate(preset, monkeypatch):
    a, below, room = PRESETS[preset]
    files = [ROOT / "config/presets" / f"{name}.yaml" for name in (*below, preset)]
    study = load_study(ROOT / "config/config.yaml", *files)
    run = study.runs[study.default_runs[0]]
    run = run.model_copy(update={"model": run.model.model_copy(update={"device": "cuda"})})
    monkeypatch.setattr(memory_module, "reward_bytes", published)
    needs = {
        stage: memory(run, *parts(a), stage).peak for stage in ("train", "profile", "evaluate")
    }
    assert max(needs.values()) + memory_module.CONTEXT < room
    words = " ".join(files[-1].read_text().replace("\n#", "").split())
    said = re.search(r"Estimate: (\d+) GiB for training", words)
    assert said
    assert float(said[1]) == round(needs["train"])
    other = re.search(r"(\d+) GiB for evaluation", words)
    assert other is None or float(other[1]) == round(needs["evaluate"])


# -- weights, counted ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_weights_and_the_twin_are_those_that_are_made(family, tmp_path):
    folder = tiny_models.save(family, tmp_path / family)
    part = read_part(folder, "transformer")
    given: dict[str, Any] = {"family": family, "path": str(folder), "device": "cpu"}
    given |= {"dtype": "bfloat16", "compile": False}
    model = load_model(Model.model_validate({**given, "fp8_weights": True}))
    stored = sum(t.nbytes for t in model.transformer.state_dict().values())
    assert stored_bytes(model.settings, part) == pytest.approx(stored, rel=0.01)
    model = load_model(Model.model_validate({**given, "lora": {"rank": 4, "alpha": 8}}))
    model.prepare_training(0)
    shared = {id(p) for p in model.transformer.parameters()}
    with model.sampling() as network:
        own = sum(p.nbytes for p in network.parameters() if id(p) not in shared)
    assert twin_bytes(model.settings, part, adapted=True)[0] == own > 0
    assert twin_bytes(model.settings, part, adapted=False)[0] == 0


def test_what_the_sampler_holds_of_full_networks():
    part = parts(FLUX_DEV)[0]

    def held(**settings: Any) -> float:
        given = {"family": "flux", "path": "x", "dtype": "bfloat16", **settings}
        return twin_bytes(Model.model_validate(given), part, adapted=True)[0]

    d = 3072
    assert held() == 2 * 570 * d * d
    assert held(merge_lora_for_sampling=False) == 0
    merged_too = held(fp8_sampling=True)
    assert merged_too == held(fp8_sampling=True, merge_lora_for_sampling=False)
    assert merged_too == (19 * 24 + 38 * 12) * d * d  # no layer is there in both forms
    full = held(tuning="full", dtype="float32")
    assert full == 0


def test_float8_weights_without_checkpointing_are_kept_in_16_bit_too():
    fp8 = {"model.fp8_weights": True}
    plain, cast = need(FLUX_DEV), need(FLUX_DEV, **fp8)
    less = plain.fixed["transformer"] - cast.fixed["transformer"]
    assert less > 8
    assert cast.phases["training"] - plain.phases["training"] == pytest.approx(2 * less, rel=0.01)
    again = [need(FLUX_DEV, **CHECKPOINTING, **more).phases["training"] for more in (fp8, {})]
    assert again[0] - again[1] < 0.5


def test_a_batch_that_takes_what_fits_needs_the_least():
    auto, three = (need(FLUX_DEV, **{"train.micro_batch": size}) for size in ("auto", 3))
    assert auto.phases == three.phases
    assert auto.on_card > three.on_card


def test_where_auto_took_too_much_the_advice_is_half_of_what_it_may_take(tmp_path):
    folder = tiny_models.save("flux", tmp_path / "flux")
    given = {"model.family": "flux", "model.path": str(folder), "model.device": "cuda"}
    size = {"model.height": 720, "model.width": 720, "train.micro_batch": "auto"}
    told = advice(small_run("egrpo", **given, **size), "train", "sampling")
    assert "train.micro_batch: 16 (now auto; about" in told


def test_rewards_on_the_card_are_counted_by_their_files(tmp_path):
    state = {"a": torch.zeros(10, 5, dtype=torch.float16), "b": torch.zeros(3)}
    torch.save({"state_dict": state}, tmp_path / "hps.pt")
    (tmp_path / "pick").mkdir()
    save_file(state, tmp_path / "pick/model.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    of = {
        "hps": {"kind": "hpsv2", "path": str(tmp_path / "hps.pt")},
        "pick": {"kind": "pickscore", "path": str(tmp_path / "pick")},
        "away": {"kind": "hpsv2", "path": str(tmp_path / "hps.pt"), "device": "cpu"},
        "damaged": {"kind": "hpsv2", "path": str(tmp_path / "damaged.safetensors")},
        "clip": {"kind": "clip", "path": str(tmp_path / "scripted.pt")},
    }
    torch.jit.save(torch.jit.script(torch.nn.Linear(100, 100)), str(tmp_path / "scripted.pt"))
    run = small_run("egrpo", rewards=of, **{"train.rewards": {"hps": 1.0}})
    found = reward_bytes(run)
    assert found["hps"] == found["pick"] == 4 * 53
    assert "away" not in found
    assert found["damaged"] == 0
    assert found["clip"] > 0
    assert lora_parameters(run, read_part(Path(run.model.path), "transformer")) > 0
