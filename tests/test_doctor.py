"""`egrpo doctor`, the sizes behind it, and the presets that it is asked about."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny_models
import torch
import yaml
from conftest import ROOT, called, job_words, small_run
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import egrpo

from egrpo.config.models import Model
from egrpo.errors import UserError
from egrpo.models import load_model
from egrpo.models.conditioning import Embeddings
from egrpo.models.families import SD3
from egrpo.ops.disk import disk, monitor_bytes, record_bytes, trained_bytes
from egrpo.ops.doctor import Finding, doctor
from egrpo.ops.doctor_model import attention, model_findings
from egrpo.ops.memory import GIB, memory
from egrpo.ops.weights import lora_parameters
from egrpo.planning.trees import check_trees
from egrpo.store.weights import read_header, read_part
from egrpo.study.resolve import load_study
from egrpo.train.job import train
from egrpo.train.trainer import Trainer

PRESETS = {path.stem: path for path in sorted((ROOT / "config/presets").glob("*.yaml"))}
LAID_OVER = {
    "flux_dev_hps_clip": ["flux_dev_hps"],
    "flux_dev_24gb": ["flux_dev_hps"],
    "flux_dev_48gb": ["flux_dev_hps"],
    "sd35_medium_ocr": ["sd35_medium_pickscore"],
    "sd35_medium_24gb": ["sd35_medium_pickscore"],
    "smoke": ["flux_dev_hps"],
}


def files_of(preset: str) -> list[Path]:
    names = [*LAID_OVER.get(preset, []), preset]
    return [ROOT / "config/config.yaml", *(PRESETS[name] for name in names)]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve_with_all_their_trees(preset: str) -> None:
    study = load_study(*files_of(preset))
    check_trees(study.runs)
    assert set(study.default_runs) <= set(study.runs)
    run = study.runs[study.default_runs[0]]
    assert run.model.path.startswith("models/")
    assert not any(r.kind in ("verifier", "preference") for r in run.rewards.values())
    assert set(run.train.rewards) <= set(run.rewards)
    if preset == "flux_dev_hps":  # the paper's settings
        assert run.train.rewards == {"hps": 1.0}
        assert (run.train.iterations, run.train.prompts_per_iteration) == (300, 8)
        assert (run.method.steps, run.method.group_size) == (16, 12)
        assert (run.evaluate.steps, run.evaluation_model.height) == (50, 1024)
        assert study.tables["table1"].rewards == ["hps", "clip", "pickscore", "imagereward"]
    if preset == "flux_dev_hps_clip":
        assert run.train.rewards == {"hps": 1.0, "clip": 1.0}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("doctor")
    return {name: tiny_models.save(name, root / name) for name in ("flux", "z_image")}


@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_sizes_are_those_of_the_loaded_model(folders: dict[str, Path], family: str) -> None:
    part = read_part(folders[family], "transformer")
    lora = {"rank": 4, "alpha": 8}
    given = {"family": family, "path": str(folders[family]), "max_sequence_length": None}
    settings = Model.model_validate({**given, "device": "cpu", "dtype": "float32", "lora": lora})
    model = load_model(settings)
    loaded = sum(p.numel() for p in model.transformer.parameters())
    assert part.parameters == loaded
    trained = sum(p.numel() for p in model.prepare_training(0))
    given["lora.rank"] = lora["rank"]
    run = small_run("egrpo", **{f"model.{key}": value for key, value in given.items()})
    assert lora_parameters(run, part) == trained
    assert "FAIL" not in [level for level, *_ in model_findings(run)]
    need = memory(run, part, read_part(folders[family], "vae"))
    assert need.fixed["transformer"] == pytest.approx(4 * loaded / GIB)
    assert need.during(need.worst) == need.peak
    assert need.peak < sum(need.fixed.values()) + sum(need.phases.values())


def test_memory_falls_with_the_settings_that_the_advice_names(folders: dict[str, Path]) -> None:
    parts = [read_part(folders["flux"], name) for name in ("transformer", "vae")]
    base = {"model.family": "flux", "model.path": "x", "model.merge_lora_for_sampling": False}

    def need(**more: Any) -> dict[str, float]:
        found = memory(small_run("egrpo", **base, **more), *parts)
        return {**found.fixed, **found.phases}

    plain = need()
    for setting, value, part in (
        ("train.gradient_checkpointing", True, "training"),
        ("train.train_micro_batch", 1, "training"),
        ("train.micro_batch", 1, "sampling"),
        ("model.vae_slicing", True, "decoding"),
        ("model.fp8_weights", True, "transformer"),
    ):
        assert need(**{setting: value})[part] < plain[part], setting


def test_a_healthy_study(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(f"results: {tmp_path / 'results'}\n")
    done = egrpo("doctor", "config/config.yaml", tmp_path / "top.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.startswith(("ok ", "warn ")) for line in lines)
    for what in ("versions", "config", "prompts", "device", "model", "memory", "reward", "disk"):
        assert any(line.split()[1] == what for line in lines), what
    (arm,) = (line for line in lines if "egrpo: 4 prompts an iteration, 4016 forward" in line)
    assert arm.endswith("; trained on verifier 1")
    (arm,) = (line for line in lines if " egrpo_clip: " in line)
    assert arm.endswith("; trained on verifier 1 + clip 1")
    assert any("heldout.txt: 48 prompts, the first is 'a large purple" in line for line in lines)
    assert not (tmp_path / "results").exists()  # it looks, and touches nothing


ALONE = dict.fromkeys(("tables", "figures", "paper", "default_runs"))
"""Laid over a study whose runs table is another."""


def told(folder: Path, top: str) -> list[Finding]:
    """Findings on the toy's study with one arm and some settings changed; FOLDER is ``folder``."""
    (folder / "runs.tsv").write_text("run\tmethod.name\none\tegrpo\n")
    (folder / "alone.yaml").write_text(
        yaml.safe_dump({"results": str(folder / "r"), "runs": str(folder / "runs.tsv"), **ALONE})
    )
    (folder / "top.yaml").write_text(top.replace("FOLDER", str(folder)) or "{}")
    files = (ROOT / "config/config.yaml", folder / "alone.yaml", folder / "top.yaml")
    return list(doctor(files, rewards="rewards" in top))


@pytest.mark.parametrize(
    ("top", "what", "parts"),
    [
        ("rewards: {}", "", []),
        ("model: {family: flux}", "model", ["set model.family to the family"]),
        ("model: {path: assets}", "model", ["assets/transformer/config.json"]),
        ("model: {device: 'cuda:9'}", "device", ["cuda:9: cannot be used"]),
        ("rewards: {clip: {path: FOLDER/gone.pt}}", "files", ["gone.pt: no such file"]),
        ("rewards: {clip: {path: FOLDER/free.txt}}", "reward", ["cannot be read as weights"]),
        ("prompts: {heldout: none.txt}", "files", ["none.txt: no such file"]),
        ("train: {updates: 99}", "config", ["train.updates"]),
        ("train: {micro_batch: 10000000}", "memory", ["train.micro_batch: 5000000 (now 10000000"]),
        ("model: {lora: {rank: 100000000}}", "disk", ["lower model.lora.rank"]),
        (
            "evaluate: {height: 64, width: 64}",
            "size",
            ["evaluate.height, evaluate.width: 64 x 64", "rewards verifier, verifier_exact"],
        ),
        (
            "prompts: {heldout: FOLDER/free.txt}",
            "prompts",
            ["prompts.heldout: ", "free.txt, prompt 49: ", "'a large dog' is outside the toy"],
        ),
        ("{evaluate: {prompts: 48}, prompts: {heldout: FOLDER/free.txt}}", "", []),  # never drawn
    ],
)
def test_each_fault_is_one_line(top: str, what: str, parts: list[str], tmp_path: Path) -> None:
    heldout = (ROOT / "assets/toy/prompts/heldout.txt").read_text()
    (tmp_path / "free.txt").write_text(f"{heldout}a large dog\n")
    found = told(tmp_path, top)
    assert all("\n" not in str(f) for f in found)
    failed = [f for f in found if f.level == "FAIL" and (f.what == what or "rank" not in top)]
    assert [f.what for f in failed] == [what] * bool(what)
    assert all(part in failed[0].text for part in parts)


def without_a_bias(file: Path) -> None:
    state = load_file(file)
    del state["proj_out.bias"]
    save_file(state, file)


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("transformer", without_a_bias, "1 weights missing, 0 unknown: proj_out.bias is missing"),
        ("transformer", Path.unlink, "holds no .safetensors weights"),
        ("vae", lambda file: file.write_bytes(file.read_bytes()[:-100]), "download it again"),
    ],
)
def test_weights_that_are_not_whole_are_one_line(
    part: str, spoil: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "assets/toy/pipeline", tmp_path / "model")
    spoil(tmp_path / "model" / part / "diffusion_pytorch_model.safetensors")
    found = told(tmp_path, "model: {path: FOLDER/model}")
    (failed,) = [f for f in found if f.level == "FAIL"]
    assert failed.what == "model"
    assert message in failed.text


def test_all_missing_files_are_listed_at_once_the_model_first() -> None:
    files = (Path("config/config.yaml"), Path("config/presets/flux_dev_hps.yaml"))
    failed = [f for f in doctor(files) if f.level == "FAIL"]
    assert {f.what for f in failed} == {"files"}
    keys = [re.search(r": ([a-z_.]+): (?:models|data)/", f.text)[1] for f in failed]
    assert keys[:3] == ["model.path", "prompts.train", "prompts.heldout"]
    assert {"rewards.hps.path", "rewards.clip.path", "rewards.pickscore.processor"} <= set(keys)
    assert len(keys) == len(set(keys)), "each once, however many runs ask for it"
    assert all("no such" in f.text and "(run egrpo-s0)" in f.text for f in failed)


def test_negative_prompts_without_guidance_are_said(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a small red circle on the left", "negative_prompt": "a dog"})
    (tmp_path / "n.jsonl").write_text(f"{line}\n" * 4)
    found = told(tmp_path, "prompts: {heldout: FOLDER/n.jsonl}")
    of_train, of_heldout = (f for f in found if f.what == "prompts")
    assert (of_train.level, of_heldout.level) == ("ok", "warn")
    assert "4 negative prompts are ignored" in of_heldout.text


@pytest.mark.parametrize(
    ("body", "level", "part"),
    [
        ("return [0.5] * len(images)", "ok", "custom, 0.5 for a gray image"),
        ("return [float('nan')] * len(images)", "warn", "nan for a gray image and prompt 'a "),
        ("open('no/such/program')", "FAIL", "cannot score a gray image: FileNotFoundError"),
    ],
)
def test_a_reward_of_ones_own_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, level: str, part: str
) -> None:
    name = f"tried_{level.lower()}"
    (tmp_path / f"{name}.py").write_text(f"def score(images, prompts):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = told(tmp_path, f"rewards: {{mine: {{kind: custom, function: '{name}:score'}}}}")
    (line,) = [f for f in found if f.what == "reward" and f.text.startswith("mine")]
    assert line.level == level
    assert part in line.text


@pytest.mark.parametrize(
    "settings",
    [
        {"model.lora.rank": 256, "train.snapshots": [150, 250], "train.ema_decay": 0.9},
        {"model.tuning": "full", "train.snapshots": [200]},
    ],
)
def test_disk_of_a_run_is_what_it_takes(
    settings: dict[str, Any], tmp_path: Path, embeddings: Embeddings
) -> None:
    method = {"method.name": "flow_grpo", "train.iterations": 3, "train.prompts_per_iteration": 4}
    run = small_run("flow", **method, **settings)
    train(run, None, embeddings, state=tmp_path / "state/key", output=tmp_path / "out")
    part = read_part(Path(run.model.path), "transformer")
    told = trained_bytes(run, part, copies=False)
    found = {
        "checkpoints": sum(p.stat().st_size for p in tmp_path.glob("state/*/checkpoint-*")),
        "trained weights": sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")),
    }
    found["trained weights"] -= found["checkpoints"]
    assert told == pytest.approx(found, rel=0.1)
    records = [*tmp_path.glob("state/*/journal.jsonl"), tmp_path / "out/rollouts.parquet"]
    size = sum(path.stat().st_size for path in records)
    assert 0.4 < record_bytes(run) / size < 2.5
    images = sum(p.stat().st_size for p in tmp_path.rglob("iteration-*.png"))
    assert 0.4 < 2 * monitor_bytes(run) / images < 2.5


def test_disk_counts_every_run_and_shared_files_once(tmp_path: Path) -> None:
    (tmp_path / "runs.tsv").write_text("run\tmethod.name\none\tegrpo\n")

    def needed(seeds: list[int]) -> dict[str, float]:
        top = {"seeds": seeds, "runs": str(tmp_path / "runs.tsv"), **ALONE}
        (tmp_path / "seeds.yaml").write_text(yaml.safe_dump(top))
        return disk(load_study("config/config.yaml", tmp_path / "seeds.yaml"), copies=True)

    one, ten = needed([0]), needed(list(range(10)))
    assert ten["checkpoints"] == pytest.approx(10 * one["checkpoints"])
    assert ten["records"] == pytest.approx(10 * one["records"])
    assert ten["prompt embeddings"] == one["prompt embeddings"]
    assert ten["images"] < 10 * one["images"]


def test_half_a_header(tmp_path: Path) -> None:
    for content in (b"", b"\x08", b"\xff" * 100, b"\x02\x00\x00\x00\x00\x00\x00\x00no"):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_header(tmp_path / "x.safetensors")


# -- memory that ends during a run ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "setting"),
    [
        ("sampling", "train.micro_batch: 48 (now auto; about"),
        ("training", "train.train_micro_batch: 8 (now 16; about"),
        ("decoding", "train.decode_batch: 48 (now 96; about"),
    ],
)
def test_memory_that_ends_is_one_line_and_loses_nothing(
    phase: str, setting: str, tmp_path: Path, embeddings: Embeddings, monkeypatch: Any
) -> None:
    """The second iteration does not fit; with the setting that the line names the run goes on."""
    run = small_run("flow", **{"method.name": "flow_grpo"})
    command = job_words("train", run, embeddings, tmp_path)
    iteration = 0
    network, to_vae, trees = SD3.network, SD3.to_vae, Trainer.trees

    def counted(self: Trainer, number: int) -> Any:
        nonlocal iteration
        iteration = number
        return trees(self, number)

    def fits(now: bool) -> None:
        if now and iteration == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def small_network(self: SD3, *args: Any) -> Any:
        fits(phase == ("training" if torch.is_grad_enabled() else "sampling"))
        return network(self, *args)

    def small_vae(self: SD3, z: torch.Tensor) -> Any:
        fits(phase == "decoding")
        return to_vae(self, z)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "trees", counted)
        patch.setattr(SD3, "network", small_network)
        patch.setattr(SD3, "to_vae", small_vae)
        failed = called(command)
    assert failed.exit_code == 2, failed.output
    (line,) = [x for x in failed.stderr.splitlines() if x.startswith("egrpo: ")]
    assert f"memory ran out while {phase}" in line
    assert setting in line
    assert not list(tmp_path.rglob("train.json"))
    key, value = setting.split(" ")[:2]
    mended = small_run("flow", **{"method.name": "flow_grpo", key[:-1]: int(value)})
    again = called(job_words("train", mended, embeddings, tmp_path))
    assert again.exit_code == 0, again.output
    assert f"going on after iteration {iteration - 1}" in again.stderr


# -- the same workflow on another family -----------------------------------------------------------


def test_a_preset_runs_with_the_paths_of_model_and_rewards(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """flux_dev_hps, made short by smoke, on a tiny FLUX and a tiny HPS file: the whole workflow."""
    import open_clip

    architecture = tmp_path / "tiny-clip.json"
    architecture.write_text(json.dumps(tiny_models.TINY_OPEN_CLIP))
    open_clip.add_model_config(architecture)
    torch.manual_seed(0)
    weights = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": open_clip.create_model("tiny-clip").state_dict()}, weights)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    size = {"height": 32, "width": 48}
    mine = {
        "results": str(tmp_path / "results"),
        "model": {"path": str(folders["flux"]), "device": "cpu", "dtype": "float32", **size}
        | {"lora": {"rank": 4}},
        "prompts": dict.fromkeys(("train", "heldout"), str(tmp_path / "prompts.txt")),
        "rewards": {"hps": {"path": str(weights), "architecture": str(architecture)}}
        | dict.fromkeys(("clip", "pickscore", "imagereward")),
        "evaluate": {"height": 64, "width": 64},
        **dict.fromkeys(("tables", "figures", "paper")),
        "runs": str(tmp_path / "runs.tsv"),
    }
    (tmp_path / "runs.tsv").write_text("run\tmethod.name\negrpo\tegrpo\n")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    words = ["snakemake", "--cores", "2", "--quiet", "all", "--configfile"]
    command = [sys.executable, "-m", *words, *files_of("smoke"), tmp_path / "mine.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "results/smoke/runs/egrpo-s0"
    scores = pq.read_table(run / "scores.parquet").to_pylist()
    assert {row["reward"] for row in scores} == {"hps"}
    assert all(-1 <= row["value"] <= 1 for row in scores)
    image = pq.read_table(run / "images.parquet").to_pylist()[0]["png"]
    assert Image.open(io.BytesIO(image)).size == (64, 64)


@pytest.mark.parametrize(
    ("dtype", "said"), [("bfloat16", "flash; efficient where"), ("float32", "efficient; efficient")]
)
def test_kernel_of_attention_is_said(dtype: str, said: str) -> None:
    model = small_run("egrpo").model.model_copy(update={"dtype": dtype})
    found = attention(model, read_part(Path(model.path), "transformer"), (9, 0))
    assert said in found[2]
    here = small_run("egrpo", **{"model.device": "cpu", "model.dtype": dtype})
    assert [what for _, what, _ in model_findings(here)] == ["model", "memory"]
