"""What loaders open is in the identity of what they are for: models by family, rewards by kind."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import ROOT
from opened import opened
from test_reward_models import (  # fixtures
    architecture,  # noqa: F401
    head_file,  # noqa: F401
    hps_file,  # noqa: F401
    imagereward,  # noqa: F401
    open_clip_model,  # noqa: F401
    pickscore,  # noqa: F401
)

from egrpo.config.models import Model
from egrpo.config.prompts import Prompt
from egrpo.config.rewards import REWARD_MODELS, Custom
from egrpo.models import load_model
from egrpo.rewards import load_reward
from egrpo.study.digests import Digests
from egrpo.study.identity import Identities

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is opened")


@pytest.fixture
def identities(tmp_path: Path) -> Identities:
    return Identities(Digests(tmp_path / "digests.json"))


@pytest.mark.parametrize("family", [*tiny_models.FAMILIES, "sd3 without T5"])
def test_what_a_model_opens_is_in_its_identity(
    family: str, tmp_path: Path, identities: Identities
) -> None:
    if family in tiny_models.FAMILIES:
        folder = tiny_models.save(family, tmp_path / family)
    else:
        folder = shutil.copytree("assets/toy/pipeline", tmp_path / "toy")
    size = {"height": 16, "width": 16, "device": "cpu"}
    settings = Model.model_validate({"family": family.split()[0], "path": str(folder), **size})

    def recorded(*, text: bool) -> set[str]:
        found = identities.model_files(settings, text=text)
        return {key.removeprefix("model.path ") for key in found}

    def encode() -> None:
        load_model(settings, text=True).encode([Prompt("a", "")], negative=True)

    images, texts = opened(folder, lambda: load_model(settings)), opened(folder, encode)
    assert {"transformer/config.json", "vae/config.json"} <= images
    assert any(name.endswith(".safetensors") for name in images)
    assert images <= recorded(text=False)
    assert any(name.startswith("tokenizer/") for name in texts)
    assert texts <= recorded(text=True)


REWARDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "clip": lambda of: {"path": of("toy") + "/clip.pt"},
    "preference": lambda of: {"path": of("toy") + "/preference.safetensors"},
    "open_clip": lambda of: REWARDS["hpsv2"](of) | {"tag": None},
    "hpsv2": lambda of: {"path": of("hps_file"), "architecture": of("architecture")},
    "aesthetic": lambda of: {"path": of("head_file")[0], "clip": of("toy") + "/clip.pt"},
    "pickscore": lambda of: {"path": of("pickscore")[0]},
    "imagereward": lambda of: of("imagereward")[0],
    "custom": lambda of: {"function": "reads_files:Reward", "options": {"file": of("own")}},
}
WITHOUT_FILES = {"verifier", "verifier_exact", "jpeg_compressibility", "unifiedreward", "remote"}
OWN = """
import reads_more
class Reward:
    def __init__(self, file):
        self.scale = float(open(file).read()) * reads_more.K
    def __call__(self, images, prompts):
        return [self.scale] * len(images)
"""


@pytest.fixture
def toy(tmp_path: Path) -> str:
    """A copy of the toy's rewards: the kernel tells of everyone who opens a file."""
    folder = tmp_path / "toy"
    folder.mkdir()
    for name in ("clip.pt", "preference.safetensors"):
        shutil.copyfile(ROOT / "assets/toy" / name, folder / name)
    return str(folder)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A reward of one's own with a module and a file."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "reads_files.py").write_text(OWN)
    (folder / "reads_more.py").write_text("K = 2.0\n")
    (folder / "scale.txt").write_text("0.5")
    monkeypatch.syspath_prepend(folder)
    return str(folder / "scale.txt")


@pytest.mark.parametrize("kind", REWARDS)
def test_what_a_reward_opens_is_in_its_identity(
    kind: str, request: Any, identities: Identities, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = REWARDS[kind](request.getfixturevalue)
    settings = REWARD_MODELS[kind].model_validate({"kind": kind, **given})
    read: dict[str, str] = {}
    file = identities.digests.file

    def noted(path: Path, reader: Any = None) -> str:
        read[os.path.realpath(path)] = ""
        return file(path, reader)

    monkeypatch.setattr(identities.digests, "file", noted)
    assert identities.reward(settings)
    folders = {Path(path).parent for path in read if ROOT / "egrpo" not in Path(path).parents}
    assert folders, kind
    for folder in sorted(folders):
        found = opened(folder, lambda: load_reward(settings, "cpu"))
        found = {name for name in found if "__pycache__" not in name}
        assert found, folder
        assert {os.path.realpath(folder / name) for name in found} <= read.keys()


def test_every_kind_of_reward_is_asked() -> None:
    assert {*REWARDS, *WITHOUT_FILES} == set(REWARD_MODELS)


def test_files_of_one_name_and_commits_of_one_model_all_count(tmp_path: Path) -> None:
    options = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        options[name] = str(tmp_path / name / "table.json")
    found = []
    for texts in ("xx", "yx", "xy"):
        for path, text in zip(options.values(), texts, strict=True):
            Path(path).write_text(text)
        settings = Custom(kind="custom", function="own:Reward", options=options)
        found.append(Identities(Digests(tmp_path / "digests.json")).reward(settings))
    assert found[0] != found[1] != found[2] != found[0]
    identities = Identities(Digests(tmp_path / "digests.json"))
    models = [Model(path="owner/name", revision=commit * 40) for commit in "ab"]
    files = [identities.model_files(model, text=True) for model in models]
    assert files[0] != files[1]
