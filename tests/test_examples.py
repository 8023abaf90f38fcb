"""The examples of `examples/`: a reward, a method, a model family, each as its page says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_in_process, small_run

from egrpo.models.conditioning import Embeddings
from egrpo.rewards import load_rewards, score_all
from egrpo.store.tables import ROLLOUTS, read_table
from egrpo.study.resolve import load_study

COPIED = "egrpo tests config assets docs workflow Snakefile Makefile pyproject.toml"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project that may be changed; git applies patches in any folder."""
    copy = tmp_path / "project"
    copy.mkdir()
    left_out = shutil.ignore_patterns("__pycache__", "_build", "*.png")
    for path in map(ROOT.joinpath, COPIED.split()):
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=left_out)
        else:
            shutil.copy(path, copy)
    return copy


def run(*words: str | Path, folder: Path) -> str:
    """What a command said that has to succeed, with the project of ``folder``."""
    env = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"}
    env |= {"PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    env["OMP_NUM_THREADS"] = "1"  # tests run side by side
    done = subprocess.run(map(str, words), cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def commands(heading: str) -> list[list[str]]:
    """Commands of a section of the examples' page."""
    text = (ROOT / "examples/README.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    return [line.split("#")[0].split() for line in blocks.splitlines()]


def follow(heading: str, patch: str, checkout: Path) -> int:
    """Apply, make the documents again and test, as the page says; how many tests passed."""
    apply, documents, tests = commands(heading)
    assert apply == ["git", "apply", f"examples/{patch}"]
    run("git", "apply", ROOT / apply[-1], folder=checkout)
    for words in (documents, tests):
        assert words[0] == "python"
        said = run(sys.executable, *words[1:], folder=checkout)
    return int(re.search(r"(\d+) passed", said)[1])


def test_colorfulness_is_that_of_the_paper() -> None:
    """Against Hasler and Süsstrunk's formula, written with numpy, and on colors known by hand."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 3, 8, 10), dtype=np.uint8)
    pixels[1] = pixels[1, :1]  # gray
    pixels[2] = np.array([255, 0, 0])[:, None, None]
    study = load_study(Path("config/config.yaml"), Path("examples/colorfulness.yaml"))
    settings = study.runs["egrpo-s0"]
    assert dict(settings.train.rewards) == {"color": 1.0}
    model = load_rewards({"color": settings.rewards["color"]}, "cpu")
    got = score_all(model, torch.from_numpy(pixels), ["", "", ""])["color"]
    for image, value in zip(pixels.astype(float), got, strict=True):
        red, green, blue = image
        rg, yb = red - green, 0.5 * (red + green) - blue
        spread, shift = np.hypot(rg.std(), yb.std()), np.hypot(rg.mean(), yb.mean())
        assert value == pytest.approx((spread + 0.3 * shift) / 100, rel=1e-5)
    assert got[1] == 0
    assert got[2] == pytest.approx(0.3 * 255 * 1.25**0.5 / 100, rel=1e-5)


def test_a_run_trains_on_colorfulness(embeddings: Embeddings, tmp_path: Path) -> None:
    words = {"kind": "custom", "function": "examples.colorfulness:colorfulness"}
    change = {"rewards.color": words, "train.rewards": {"verifier": None, "color": 1.0}}
    made = small_run("x", **change, **{"train.iterations": 2})
    table = read_table(run_in_process(made, embeddings, tmp_path) / "rollouts.parquet", ROLLOUTS)
    assert set(table["reward"].to_pylist()) == {"color"}
    assert len(set(table["value"].to_pylist())) > 10
    assert any(table["advantage"].to_pylist())


def test_a_method_is_added_as_the_page_says(checkout: Path) -> None:
    passed = follow("A method", "add_method.patch", checkout)
    assert passed >= 9, "recipe, walks, edges, parts, cost"
    assert "| `stochastic_steps` | `4` | steps |" in (checkout / "docs/settings.md").read_text()
    assert "images/trees/scattered.svg" in (checkout / "docs/methods.md").read_text()
    assert (checkout / "docs/images/trees/scattered.svg").stat().st_size > 3000
    (checkout / "mine.tsv").write_text("run\tmethod.name\nscattered\tscattered\n")
    none = ("tables", "figures", "paper", "default_runs", "seeds")
    (checkout / "mine.yaml").write_text(
        "runs: mine.tsv\n" + "".join(f"{key}: null\n" for key in none)
    )
    files = ("config/config.yaml", "mine.yaml")
    told = run(sys.executable, "-m", "egrpo", "cost", *files, folder=checkout)
    line = next(ln for ln in told.splitlines() if ln.startswith("scattered"))
    assert line.split()[2:4] == [str(12 * 16), str(12 * 4)], "forward, forward and backward"


def test_a_model_family_is_added_as_the_page_says(checkout: Path) -> None:
    passed = follow("A model family", "add_family.patch", checkout)
    assert passed >= 11, "images, guidance, adapters, 16 bits, the model card"
    assert "aura_flow" in (checkout / "workflow/schemas/run.schema.json").read_text()


def test_the_text_of_an_image_may_hold_what_is_no_text(tmp_path: Path) -> None:
    from examples.ocr_reward import similarity

    program = tmp_path / "reads"
    program.write_text("#!/bin/sh\ncat > /dev/null\nprintf 'OP\\377N'\n")
    program.chmod(0o755)
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    found = similarity(images, ['a door that says "OPEN"', "a door"], program=str(program))
    assert found[0] == 0.75  # one letter of four could not be read
    assert np.isnan(found[1])
