"""Bundles for sharing: real trained runs, loaded again by stock diffusers and huggingface_hub."""

from __future__ import annotations

import contextlib
import html
import io
import itertools
import json
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, embedded, modes_by
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import egrpo, refused
from test_data import snippets
from tracked import HARMLESS_OPTIONS, SECRET_OPTIONS, SECRETS, SERVICE, TRACKING, found_in

from egrpo.bundle.export import INDEX, export
from egrpo.bundle.loading import loading
from egrpo.bundle.model_card import Sample, base_on_hub, model_card
from egrpo.cli import main
from egrpo.config.keys import run_key
from egrpo.config.load import load_run, overlay, read_yaml
from egrpo.config.models import RunConfig
from egrpo.config.rewards import Remote
from egrpo.core.seeds import normal
from egrpo.errors import UserError, command
from egrpo.figures.draw import draw
from egrpo.measure.evaluate import evaluate
from egrpo.models.adapter import ADAPTER_FILE, CONFIG, read_adapter
from egrpo.page.page import make_page
from egrpo.planning.grids import training_sigmas
from egrpo.planning.trees import needs_plan, plan_of
from egrpo.report.evaluations import read_images
from egrpo.report.provenance import versions, write_about
from egrpo.report.render import escaped
from egrpo.report.report import short_table
from egrpo.report.results import make_comparison
from egrpo.report.text import read_rows, readable
from egrpo.store.files import write_json
from egrpo.store.tables import TRAIN_METRICS, write_table
from egrpo.study.layout import Layout
from egrpo.study.resolve import load_study
from egrpo.study.sharing import NO_ADDRESS, shareable, without_folder, without_secrets
from egrpo.study.standing import write_receipt
from egrpo.train.job import train

ELSEWHERE = ("planted-user", "planted-word", "planted-query")
"""Secrets of a service: no run here may ask one."""
NASTY = 'a |pipe|, <b>bold</b> *stars* `ticks` [link](x) $m$ & _under_ ``` ü \\ "quoted"'


def brightness(images: Any, prompts: list[str], **options: Any) -> Any:
    """A reward of one's own, whose options hold what is nobody's business."""
    return np.asarray(images, dtype=np.float64).mean(axis=(1, 2, 3)) / 255.0


BOTH = pytest.mark.parametrize("run", ["merged", "whole"])


@dataclass(frozen=True)
class Made:
    """A study of three trained and evaluated runs, and the bundle of each.

    Of `least` there is no more than settings allow: one image, no monitor, no plan.
    """

    configs: tuple[str, ...]
    at: Layout

    def bundle(self, run: str) -> Path:
        return self.at.bundle(run)

    def export(self, run: str, folder: Path, **more: Any) -> Path:
        return export(self.at, run, folder, configs=self.configs, **more)

    def page(self, run: str) -> str:
        return (self.bundle(run) / "README.md").read_text(encoding="utf-8")

    def with_rewards(self, **rewards: dict[str, Any]) -> RunConfig:
        given = self.at.study.runs["merged"].model_dump()
        return RunConfig.model_validate(given | {"rewards": given["rewards"] | rewards})

    def copy(self, run: str, folder: Path) -> Path:
        """A bundle beside the base model."""
        shutil.copytree(self.bundle(run), folder)
        (folder / "pipeline").symlink_to(ROOT / "assets/toy/pipeline")
        return folder


def settings_in(root: Path) -> tuple[str, str]:
    """The default study made small, with absolute paths and secrets, and what is laid over it."""
    study = read_yaml(ROOT / "config/config.yaml")
    for key in ("seeds", "default_runs", "paper", "tables", "figures", "methods"):
        study.pop(key)
    prompts = (ROOT / "assets/toy/prompts/heldout.txt").read_text().splitlines()[:4]
    (root / "mine.txt").write_text("\n".join([NASTY, *prompts]), encoding="utf-8")
    (root / "runs.tsv").write_text(
        "run\tmethod.name\tmodel.tuning\ttrain.iterations"
        "\ttrain.monitor_every\tevaluate.prompts\tevaluate.samples\n"
        "merged\tegrpo\tlora\t2\t\t\t\n"
        "whole\tflow_grpo\tfull\t1\t\t\t\n"
        "least\tflow_grpo\tlora\t1\t0\t1\t1\n"
    )
    small = {
        "results": str(root / "results"),
        "runs": str(root / "runs.tsv"),
        "model": {"path": str(ROOT / "assets/toy/pipeline")},
        "prompts": {"heldout": str(root / "mine.txt"), "limit": 4},
        "train": {"learning_rate_scale": 1000.0, "ema_decay": None, "ema_ramp": None},
        "tracking": {"uri": TRACKING, "enabled": False},
        "methods": {
            "egrpo": {"group_size": 3, "active": 3},
            "flow_grpo": {"group_size": 4, "steps": 5},
        },
    }
    study = overlay(overlay(study, SMALL), small)
    own = {"kind": "custom", "function": "test_export:brightness", "options": SECRET_OPTIONS}
    (root / "study.yaml").write_text(yaml.safe_dump(study))
    toys = dict.fromkeys(("verifier", "verifier_exact", "preference"))  # know the toy's words only
    trained = {"verifier": None, "jpeg": 1.0}
    more = {"rewards": {**toys, "own *bright*": own}, "train": {"rewards": trained}}
    (root / "more.yaml").write_text(yaml.safe_dump(more))
    return str(root / "study.yaml"), str(root / "more.yaml")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("shared")
    with contextlib.chdir(ROOT):
        configs = settings_in(root)
        at = Layout(load_study(*configs))
        for name, run in at.study.runs.items():
            folder = at.run(name)
            folder.mkdir(parents=True)
            at.config(name).write_text(yaml.safe_dump(run.model_dump(), sort_keys=False))
            embeddings = embedded(run, root)
            plan = plan_of(run, training_sigmas(run)) if needs_plan(run) else None
            if plan is not None:
                write_json(folder / "plan.json", plan.to_dict())
            state = at.state(name) / at.identity("trajectory", name)
            train(run, plan, embeddings, state=state, output=folder)
            evaluate(run, embeddings, folder / "adapter", folder, training=folder)
            for stage in ("train", "evaluate"):
                record, outputs = at.identities.record(stage, run), at.outputs(stage, name)
                write_receipt(at, stage, name, record, outputs, weights="w")
            if not at.base(name).exists():
                evaluate(run, embeddings, None, at.base(name))
            export(at, name, configs=configs)
    return Made(configs, at)


@contextmanager
def spoilt(path: Path, content: bytes | None = None) -> Iterator[None]:
    """Meanwhile a file is lost, or holds something else."""
    kept = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(kept)


def card(folder: Path) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard.load(folder / "README.md")


def test_the_weights_are_the_trained_ones(made: Made) -> None:
    trained = made.at.run("merged") / "adapter" / ADAPTER_FILE
    assert (made.bundle("merged") / ADAPTER_FILE).read_bytes() == trained.read_bytes()
    whole, trained = made.bundle("whole") / "transformer", made.at.run("whole") / "adapter"
    weights, config = "diffusion_pytorch_model.safetensors", "config.json"
    assert {path.name for path in whole.iterdir()} == {weights, config}
    assert (whole / weights).read_bytes() == (trained / weights).read_bytes()
    found, known = (json.loads((folder / config).read_text()) for folder in (whole, trained))
    assert found == {**known, "_name_or_path": "pipeline"}  # diffusers notes the base's folder


def test_weights_whose_scale_stood_in_the_metadata_are_shared_at_full_strength(
    made: Made, tmp_path: Path
) -> None:
    path = made.at.run("merged") / "adapter" / ADAPTER_FILE
    tensors, config = read_adapter(path)
    with spoilt(path):
        old = {k: v / 2 if "lora_B" in k else v for k, v in tensors.items()}
        config["transformer.lora_alpha"] = 2 * config["transformer.r"]
        save_file(old, path, metadata={CONFIG: json.dumps(config)})
        made.export("merged", tmp_path / "b")
    assert (tmp_path / "b" / ADAPTER_FILE).read_bytes() == path.read_bytes()


@BOTH
def test_the_cards_snippet_draws_the_evaluations_image(
    made: Made, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, in a copy of the bundle beside the base model, without this project's code."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
    monkeypatch.chdir(made.copy(run, tmp_path / "bundle"))
    (code,) = [text for _, language, text in snippets(Path("README.md")) if language == "python"]
    assert "egrpo" not in code
    space: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert Image.open("image.png").size == (32, 32)

    if run == "merged":
        stored = load_file(ADAPTER_FILE)
        loaded = dict(space["pipe"].transformer.named_parameters())
        for name, tensor in stored.items():
            own = name.removeprefix("transformer.").replace(".weight", ".default_0.weight")
            assert torch.equal(loaded[own], tensor), name
        assert len(stored) > 10

    pipe = space["pipe"]
    side = 32 // pipe.vae_scale_factor
    noise = normal((pipe.transformer.config.in_channels, side, side), "evaluate", 0, -1, 0)[None]
    again = code.replace("generator=torch.Generator().manual_seed(0)", "latents=noise")
    exec(compile(again, "README.md", "exec"), {"noise": noise})
    drawn = np.asarray(Image.open("image.png"), dtype=np.int64)
    evaluated, untrained = (
        np.asarray(Image.open(io.BytesIO(read_images(folder / "images.parquet")[0, 0, NASTY])), int)
        for folder in (made.at.run(run), made.at.base(run))
    )
    assert np.abs(drawn - evaluated).max() <= 1  # rounding to 8 bits
    assert np.abs(untrained - evaluated).max() > 8, "training must have changed the image"


def test_the_bundle_alone_makes_the_same_weights_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the card, as they stand, beside base model, prompts and rewards."""
    bundle = made.copy("merged", tmp_path / "bundle")
    (bundle / "assets").symlink_to(ROOT / "assets")
    shutil.copy(Path(made.configs[0]).with_name("mine.txt"), bundle)
    blocks = [text for _, language, text in snippets(bundle / "README.md") if language == "sh"]
    (commands,) = [text for text in blocks if text.startswith("egrpo repeat")]
    monkeypatch.chdir(bundle)
    before = signal.getsignal(signal.SIGTERM)
    try:
        for line in commands.replace("\\\n", "").splitlines():
            program, *words = shlex.split(line)
            assert program == "egrpo"
            main(words, standalone_mode=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    again, first = (load_file(bundle / part / ADAPTER_FILE) for part in ("again/adapter", ""))
    assert all(torch.equal(again[name], first[name]) for name in first)
    scores = [pq.read_table(bundle / name) for name in ("again/scores.parquet", "scores.parquet")]
    assert scores[0].equals(scores[1])


@BOTH
def test_huggingface_hub_reads_the_cards_numbers(made: Made, run: str) -> None:
    folder = made.bundle(run)
    data = card(folder).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"egrpo", "grpo", "flow-matching", "diffusers"} <= set(data.tags)
    assert ("lora" in data.tags) == (run == "merged")
    assert data.base_model is None  # a folder is no hub id
    assert data.license is None
    rows = {row["reward"]: row for row in read_rows(made.bundle(run) / "comparison.parquet")}
    assert {"jpeg", "own *bright*", "diversity", "distance_to_base"} <= set(rows)
    found = {result.metric_type: result for result in data.eval_results}
    assert set(found) == set(rows)
    for reward, row in rows.items():
        assert found[reward].metric_value == row["mean"]
        known = {key: row[key] for key in ("base", "difference", "low", "high")}
        assert known.items() <= found[reward].metric_args.items()
        shown = readable(row)
        cells = " | ".join(shown[key] for key in ("base", "mean", "difference", "interval"))
        assert cells in made.page(run)
    assert data.widget[0]["text"] == " ".join(NASTY.split())
    for sample in data.widget:
        assert (folder / sample["output"]["url"]).is_file()


def test_a_study_of_one_image_is_told_and_shared(made: Made) -> None:
    runs = {"least": made.at.study.runs["least"]}
    at = Layout(replace(made.at.study, runs=runs, default_runs=("least",)))
    make_comparison(at, at.comparison)
    draw(at)
    make_page("index", at, {}, {})
    assert "No run was monitored" in at.page("index").read_text(encoding="utf-8")
    assert "has no interval (fewer than two prompts" in short_table(at.comparison)

    body = card(at.bundle("least")).text
    assert "1 held-out prompt, 1 sample each." in body
    assert "diversity" not in body, "it is no number of one image"
    (row,) = [row for row in read_rows(at.comparison) if row["reward"] == "distance_to_base"]
    assert f"the images lie\n  {readable(row)['mean']} from the base model's.\n" in body
    metrics = {result.metric_type for result in card(at.bundle("least")).data.eval_results}
    assert {"jpeg", "own *bright*", "distance_to_base"} <= metrics
    assert "diversity went from" in card(made.bundle("merged")).text


def test_the_comparison_can_be_made_again_from_the_scores(made: Made) -> None:
    folder = made.bundle("merged")
    rows = {row["reward"]: row for row in read_rows(folder / "comparison.parquet")}
    for name, key in (("scores", "mean"), ("base_scores", "base")):
        scores = pq.read_table(folder / f"{name}.parquet").to_pandas()
        for reward, mean in scores.groupby("reward")["value"].mean().items():
            assert mean == pytest.approx(rows[reward][key])


def test_plan_and_costs_are_told(made: Made) -> None:
    page = made.page("merged")
    plan = json.loads((made.bundle("merged") / "plan.json").read_text())
    assert "3 of the 16 sampling steps explore" in page
    for step, span in zip(plan["active"], plan["spans"], strict=True):
        assert f"| {step} | {span} | {plan['sigmas'][step]:.4f} |" in page
    spent = json.loads((made.bundle("merged") / "train.json").read_text())
    assert f"| network evaluations, sampling | {spent['nfe_forward']:,} |" in page
    assert spent["key"] in page
    made_by = "results/laptop/runs/merged/scores.parquet --configfile study.yaml more.yaml"
    assert f"snakemake --cores all {made_by}\n" in page
    assert "The method has no merge plan." in made.page("whole")
    assert not (made.bundle("whole") / "plan.json").exists()


def cells_of(markdown: str) -> list[str]:
    """Texts of a page's table cells, as a reader sees them."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)
    out = []
    for before, token in itertools.pairwise(tokens):
        if before.type in ("td_open", "th_open"):
            out.append("".join(child.content for child in token.children or []))
    return out


@pytest.mark.parametrize("text", [NASTY, "own *bright*", "# no heading", "a_b_c", "&amp; <!-- x"])
def test_texts_of_users_are_shown_as_they_are(text: str) -> None:
    table = f"| a | b |\n|---|---|\n| {escaped(text)} | **{escaped(text)}** |\n"
    assert cells_of(table) == ["a", "b", text, text]


@pytest.mark.parametrize("run", ["merged", "least"])
def test_every_table_of_the_card_is_one(made: Made, run: str) -> None:
    body = card(made.bundle(run)).text
    assert {"own *bright*", "distance_to_base", "images/"} <= set(cells_of(body))
    assert "{{" not in body
    assert "None" not in body.replace("=None", "").replace("None is stated", "")


@BOTH
def test_the_card_and_the_docs_list_every_file(made: Made, run: str) -> None:
    for text in (card(made.bundle(run)).text, (ROOT / "docs/data.md").read_text()):
        rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
        listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
        listed |= {f"comparison{ending}" for ending in (".csv", ".md") if ending in listed}
        for path in made.bundle(run).iterdir():
            name = path.name + "/" if path.is_dir() else path.name
            assert name in listed | {"README.md"}


@pytest.mark.parametrize("commit", ["abc123", "abc123+dirty"])
def test_a_commit_with_edits_may_not_repeat(made: Made, tmp_path: Path, commit: str) -> None:
    folder = tmp_path / "b"
    shutil.copytree(made.bundle("merged"), folder)
    rows = pq.read_table(folder / "train_metrics.parquet").to_pylist()
    head = {"git_commit": commit}
    write_table(folder / "train_metrics.parquet", TRAIN_METRICS, rows, metadata=head)
    run = load_run(made.at.config("merged"))
    page = model_card(run, folder, [Sample("a fox", "images/sample-1.png")], "make", None, None)
    told = " ".join(page.split())
    assert "commit `abc123`" in told
    assert ("training from the commit may give other results" in told) == ("+" in commit)


def test_license_and_base_model_as_the_user_says(made: Made, tmp_path: Path) -> None:
    said = {"license": "apache-2.0", "base_model": "owner/base-model"}
    folder = made.export("merged", tmp_path / "b", **said)
    data = card(folder).data
    assert (data.license, data.base_model) == ("apache-2.0", "owner/base-model")
    assert data.base_model_relation == "adapter"
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert 'base = "owner/base-model"' in page
    assert "`apache-2.0`, as whoever exported it states." in page
    with pytest.raises(UserError, match="--base-model: 'base' is no hub id"):
        made.export("merged", folder, base_model="base")
    assert card(folder).data.base_model == "owner/base-model"  # what was there is there


def test_a_pinned_hub_id_is_the_base_model(made: Made) -> None:
    given = made.at.study.runs["merged"].model_dump()
    given["model"] |= {"path": "owner/name", "revision": "abc123"}
    run = RunConfig.model_validate(given)
    assert base_on_hub(run) == "owner/name"
    assert 'revision="abc123"' in loading(run, base_on_hub(run), "a fox")
    assert base_on_hub(made.at.study.runs["merged"]) is None
    unpinned = RunConfig.model_validate({**given, "model": {**given["model"], "revision": None}})
    assert base_on_hub(unpinned) is None  # a folder that is not here


# -- what may not leave this machine -------------------------------------------------------------


@BOTH
def test_no_secret_and_no_path_of_this_machine(made: Made, run: str) -> None:
    bundle, home = made.bundle(run), str(Path(made.configs[0]).parent)
    hidden = (*SECRETS, home, str(ROOT), str(Path.home()) + "/")
    assert (bundle / "README.md").is_file()
    told = repr(load_run(made.at.config(run)))
    assert [word for word in (*SECRETS, home) if word not in told] == [*ELSEWHERE]
    assert found_in(bundle, hidden) == []
    settings, page = ((bundle / name).read_text() for name in ("config.yaml", "README.md"))
    for note in ("tracking.uri: left out", "model.path: pipeline, without its folder"):
        assert note in settings
        assert note in page.replace("\\", "")
    shared, own = load_run(bundle / "config.yaml"), load_run(made.at.config(run))
    assert shared.tracking.uri is None
    assert shared.model.path == "pipeline"
    options = shared.rewards["own *bright*"].options  # type: ignore[union-attr]
    assert options == HARMLESS_OPTIONS
    for section in ("method", "schedule", "train", "evaluate", "profile", "advantage"):
        assert getattr(shared, section) == getattr(own, section)


def test_the_page_of_versions_and_settings(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "about.html"
    far = Remote(kind="remote", url=SERVICE, reward="clip", token_file="~/token")
    runs = {
        name: run.model_copy(update={"rewards": {**run.rewards, "far": far}})
        for name, run in made.at.study.runs.items()
    }
    write_about(Layout(replace(made.at.study, runs=runs)), file)
    home = str(Path(made.configs[0]).parent)
    assert found_in(file, (*SECRETS, "gpu7.example", "~/", home, str(ROOT))) == []
    page = html.unescape(file.read_text(encoding="utf-8"))
    for name, number in versions().items():
        assert f'<th scope="row">{name}</th><td>{number}</td>' in page
    table = re.sub(r"\s+", " ", page.split("<h2>Runs</h2>")[1].split("<h2>")[0])
    for name, run in runs.items():
        train = json.loads((made.at.run(name) / "train.json").read_text())
        spent = sum(train[f"nfe_{part}"] for part in ("forward", "train", "reference"))
        assert f"<td>{name}</td><td>{run.method.name}</td>" in table
        assert f"<td>{spent:,}</td>" in table
        assert f"<td>{run_key(run)}</td>" in table
    texts = dict(re.findall(r"<summary>(.*?)</summary><pre>(.*?)</pre>", page, re.DOTALL))
    assert list(texts) == list(made.at.study.runs)  # one seed of each arm here
    for name, text in texts.items():
        shown = RunConfig.model_validate(yaml.safe_load(text))
        assert shown.method == made.at.study.runs[name].method
        assert shown.rewards["own *bright*"].options == HARMLESS_OPTIONS  # type: ignore[union-attr]


KEPT = ("assets/toy/x.txt", "./x..y/a", "owner/name", "cuda:1", "module:function")
LEFT_OUT = ("~me", "..", "/", "C:\\")
LAST_PART = (
    *("/home/me/x", "/home/me/x/", "~/x", "../../home/me/x", "a/../../me/x", "file:///home/me/x"),
    *("C:\\Users\\me\\x", "C:/Users/me/x", "\\\\server\\me\\x", "..\\me\\x"),
)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        *((path, path) for path in KEPT),
        *((path, "left-out") for path in LEFT_OUT),
        *((path, "x") for path in LAST_PART),
    ],
)
def test_paths_without_their_folder(path: str, shown: str) -> None:
    assert without_folder(path) == shown


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://10.1.2.3:8800", "http://10.1.2.3:8800"),
        ("https://host/v1", "https://host/v1"),
        ("https://u:p@host:1/v1?sig=s#t", "https://host:1/v1"),
        ("http://u:p@[::1]:8800/", "http://[::1]:8800/"),
        ("http://u:p@q@host/", "http://host/"),
        ("http://u:p/w@host/", NO_ADDRESS),  # no browser reads this as its user means it
        ("http://u:p?w@host/", "http://u:p"),
        ("http://[bad", NO_ADDRESS),
        ("http://u:p@", NO_ADDRESS),
    ],
)
def test_addresses_without_users_and_queries(made: Made, url: str, shown: str) -> None:
    far = {"kind": "remote", "url": url, "reward": "clip", "token_file": "/etc/token"}
    run = made.with_rewards(far=far)
    settings = RunConfig.model_validate(without_secrets(run)[0])
    assert settings.rewards["far"].url == shown  # type: ignore[union-attr]
    assert settings.rewards["far"].token_file == "/etc/token"  # type: ignore[union-attr]
    assert settings.model == run.model


def test_addresses_and_tokens_of_services_are_left_out_and_words_are_no_paths(made: Made) -> None:
    far = {"kind": "remote", "url": "http://bob:pw@10.1.2.3:8800", "reward": "clip"}
    judge = {"kind": "unifiedreward", "url": "https://gpu7.internal/v1", "pattern": r"\d (\d)"}
    judge["question"] = "/imagine {prompt} / well"
    run = made.with_rewards(far=far | {"token_file": "~/token"}, question=judge)
    before = run.model_dump()
    settings, notes = shareable(run)
    shown: Any = RunConfig.model_validate(settings).rewards["question"]
    assert (shown.pattern, shown.question) == (judge["pattern"], judge["question"])
    assert shown.url == NO_ADDRESS
    for word in ("bob", "10.1.2.3", 'token"', "gpu7", "~/"):
        assert word not in json.dumps(settings)
    assert {"rewards.far.url: left out", "rewards.far.token_file: left out"} <= set(notes)
    assert run.model_dump() == before  # the run itself is untouched


@BOTH
def test_files_are_named_as_hubs_want_them(made: Made, run: str) -> None:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.repocard import metadata_load

    folder = made.bundle(run)
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    for name in names:
        assert CommitOperationAdd(name, folder / name).path_in_repo == name
    assert {"README.md", "config.yaml", "train.json", "scores.parquet"} <= set(names)
    assert not [name for name in names if name.startswith(".") or " " in name]
    assert metadata_load(folder / "README.md")["model-index"][0]["name"]
    index = json.loads((folder / INDEX).read_text())
    assert sorted(index["files"]) == sorted({*names} - {INDEX})


@pytest.mark.parametrize(("run", "mask"), [("merged", 0o022), ("whole", 0o027)])
def test_a_bundle_has_the_mode_of_new_files(
    made: Made, run: str, mask: int, tmp_path: Path
) -> None:
    with modes_by(mask, tmp_path):
        made.export(run, tmp_path / "b")


def test_an_earlier_bundle_is_replaced_and_nothing_else_is(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    again = partial(made.export, "whole", folder)
    again()  # an empty folder
    first = set(folder.iterdir())
    again()
    assert set(folder.iterdir()) == first
    (folder / "mine.txt").write_text("x")
    with pytest.raises(UserError, match=r"b: mine\.txt is no file of a bundle.*--output"):
        again()
    (folder / "mine.txt").unlink()
    page = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(page + "edited", encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md has changed since it was exported"):
        again()
    assert (folder / "README.md").read_text(encoding="utf-8").endswith("edited")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.tex is no file of a bundle"):
        made.export("whole", tmp_path / "other")
    with pytest.raises(UserError, match=r"thesis\.tex: is a file"):
        made.export("whole", tmp_path / "other/thesis.tex")
    assert {path.name for path in tmp_path.iterdir()} == {"b", "other"}


@pytest.mark.parametrize(
    "file",
    ["config.yaml", "scores.parquet", "plan.json", f"adapter/{ADAPTER_FILE}", "images.parquet"],
)
def test_a_missing_result_is_named_with_the_command_that_makes_it(
    made: Made, tmp_path: Path, file: str
) -> None:
    of_base = file == "images.parquet"
    path = (made.at.base("merged") if of_base else made.at.run("merged")) / file
    wanted = path.parent if path.name == ADAPTER_FILE else path
    how = command(made.configs, wanted)
    assert how.endswith(f"--configfile {' '.join(made.configs)}")
    if wanted != path:
        how = f"rm -r {wanted}; {how}"
    message = re.escape(f"{path}: no such file; `{how}` makes it")
    with spoilt(path), pytest.raises(UserError, match=message):
        made.export("merged", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_damaged_results_and_weights_of_others_leave_nothing_behind(
    made: Made, tmp_path: Path
) -> None:
    save_file({"transformer.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "foreign")
    foreign, scores = (tmp_path / "foreign").read_bytes(), made.at.run("merged") / "scores.parquet"
    weights = made.at.run("merged") / "adapter" / ADAPTER_FILE
    for path, content, match in (
        (weights, foreign, r"holds 4 weights, but .* were trained"),
        (weights, foreign[:-3], r"not a whole safetensors file|bytes, .* expected"),
        (scores, scores.read_bytes()[:200], r"scores\.parquet: damaged Parquet"),
    ):
        with spoilt(path, content), pytest.raises(UserError, match=match):
            made.export("merged", tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["foreign"]


def test_a_study_that_was_edited_since(made: Made, tmp_path: Path) -> None:
    (tmp_path / "edit.yaml").write_text("train: {iterations: 9, learning_rate_scale: 1.0}\n")
    configs = (*made.configs, str(tmp_path / "edit.yaml"))
    with pytest.raises(UserError, match="not the settings that the study has now") as refusal:
        export(Layout(load_study(*configs)), "whole", configs=configs)
    assert f"{made.at.run('whole') / 'scores.parquet'}" in str(refusal.value)
    assert f"--configfile {' '.join(configs)}` makes anew" in str(refusal.value)


def test_the_command_and_an_unknown_run(made: Made) -> None:
    words = [part for path in made.configs for part in ("--config", path)]
    refused(egrpo("export", "mergd", *words), "no run 'mergd'; did you mean merged?")
    refused(egrpo("export", "x", *words), "no run 'x'; there are merged, whole, least")
    done = egrpo("export", "merged", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{made.bundle('merged')}: ready to share")


def test_snippets_of_the_page_about_bundles_run(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {head: code for head, lang, code in snippets(ROOT / "docs/data.md") if lang == "python"}
    monkeypatch.chdir(made.bundle("merged").parent)
    Path("egrpo-s0").symlink_to("merged")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(found["A run for others"], "docs/data.md", "exec"), {"__name__": "snippet"})
    assert all(words in printed.getvalue() for words in ("text-to-image", "jpeg"))
