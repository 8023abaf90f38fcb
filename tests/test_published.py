"""Commands that fetch what presets read, and published sets of prompts made ours."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from egrpo.config.prompts import read_prompts
from egrpo.errors import UserError
from egrpo.ops.published import convert, fetch_plan, published
from egrpo.study.resolve import load_study

PRESETS = {
    "flux_dev_hps": ["flux_dev_hps"],
    "sd35_medium_pickscore": ["sd35_medium_pickscore"],
    "sd35_medium_ocr": ["sd35_medium_pickscore", "sd35_medium_ocr"],
}


def plan(*presets: str) -> list[str]:
    files = (str(ROOT / f"config/presets/{name}.yaml") for name in presets)
    return list(fetch_plan(load_study(str(ROOT / "config/config.yaml"), *files)))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_file_of_a_preset_is_fetched_to_where_it_is_read(preset: str) -> None:
    from huggingface_hub.cli.hf import app

    lines = plan(*PRESETS[preset])
    assert not [line for line in lines if "yours to bring" in line]
    download = app.commands["download"].materialize()  # type: ignore[attr-defined]
    written = set()
    for words in (shlex.split(line) for line in lines if not line.startswith("#")):
        if words[0] == "hf":
            asked = download.make_context("download", words[2:]).params
            names = asked["filenames"] or [""]
            written |= {str(Path(asked["local_dir"], name)) for name in names}
        else:
            assert words[0] in ("curl", "egrpo")
            written.add(words[words.index("-o" if words[0] == "curl" else "--to") + 1])
            assert words[0] == "curl" or set(words[3 : words.index("--to")]) <= written
    wanted = {item.path for item in published() if any(item.is_at(path) for path in written)}
    assert wanted <= written
    assert len(wanted) == sum(line.startswith("# ") for line in lines) - 1


def test_below_another_folder_it_is_fetched_to_there(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "model: {path: /data/FLUX.1-dev, lora: {start: /data/a.safetensors}}\n"
        "rewards: {hps: {path: /data/other.pt}}\nprompts: {train: '/a b/hpd_train.txt'}\n"
    )
    preset = str(ROOT / "config/presets/flux_dev_hps.yaml")
    lines = list(fetch_plan(load_study(str(ROOT / "config/config.yaml"), preset, str(mine))))
    assert any(line.endswith("--local-dir /data/FLUX.1-dev") for line in lines)
    assert "# rewards.hps.path: /data/other.pt: yours to bring" in lines
    assert "# model.lora.start: /data/a.safetensors: yours to bring" in lines
    words = next(shlex.split(line) for line in lines if "egrpo prompts hpd_train" in line)
    assert words[3:] == ["/a b/HPDv2/train.json", "--to", "/a b/hpd_train.txt"]


def test_what_is_there_is_not_fetched() -> None:
    assert plan() == ["# nothing is missing"]


def numbered(count: int) -> list[str]:
    return [f"thing {i}" for i in range(count)]


def test_sets_are_read_as_they_are_published(tmp_path: Path) -> None:
    """Each prompt once, in the order of the files, and as many as were published."""
    to = tmp_path / "out.txt"
    repeated = [{"prompt": text, "image_path": "x"} for text in numbered(400) for _ in range(2)]
    (tmp_path / "test.json").write_text(json.dumps(repeated))
    assert convert("hpd_test", [tmp_path / "test.json"], to) == f"{to}: 400 prompts, as published"
    assert [prompt.text for prompt in read_prompts(to)] == numbered(400)
    styles = [
        tmp_path / f"{style}.json" for style in ("anime", "concept-art", "paintings", "photo")
    ]
    for i, path in enumerate(styles):
        path.write_text(json.dumps(numbered(3200)[800 * i : 800 * (i + 1)]))
    convert("hpd_benchmark", styles, to)
    assert [prompt.text for prompt in read_prompts(to)] == numbered(3200)
    rows = "".join(f'"{text}"\tAbstract\n' for text in numbered(1632))
    (tmp_path / "PartiPrompts.tsv").write_text(f"Prompt\tCategory\n{rows}")
    convert("partiprompts", [tmp_path / "PartiPrompts.tsv"], to)
    table = pa.table({"caption": numbered(500), "jpg_0": [b""] * 500})
    pq.write_table(table, tmp_path / "test_unique.parquet")
    convert("pickapic_test", [tmp_path / "test_unique.parquet"], to)
    assert [prompt.text for prompt in read_prompts(to)] == numbered(500)


def test_other_counts_and_names_are_refused_and_write_nothing(tmp_path: Path) -> None:
    file, to = tmp_path / "prompts.csv", tmp_path / "out.txt"
    file.write_text("Prompt\n" + "\n".join(numbered(199)))
    with pytest.raises(UserError, match="199 different prompts, but partiprompts has 1632"):
        convert("partiprompts", [file], to)
    with pytest.raises(UserError, match="no set of prompts 'draw'; there are hpd_train"):
        convert("draw", [file], to)
    file.write_text("Prompts\n" + "\n".join([*numbered(198), '"two\nlines"']))
    with pytest.raises(UserError, match=r"prompt 199 has several lines; write --to .*out\.jsonl"):
        convert("drawbench", [file], to)
    assert not to.exists()
    said = convert("drawbench", [file], tmp_path / "out.jsonl")
    assert read_prompts(tmp_path / "out.jsonl")[-1].text == "two\nlines"
    assert "199 prompts, but 200 by its publication" in said, "a number that nobody counted"
