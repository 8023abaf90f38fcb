"""A full disk, preemption, two workflows on one folder: nothing is lost, nothing half is used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from conftest import (
    ROOT,
    STAGES,
    embedded,
    modes_by,
    overflowing,
    run_in_process,
    small_run,
    stage_words,
    train_words,
    trainer_for,
    wait_for,
)
from stages import main as stages
from test_processes import same
from test_workflow import study

from egrpo.cli import main
from egrpo.errors import UserError
from egrpo.figures.curves import curves_figure
from egrpo.models import load_model
from egrpo.models.conditioning import Embeddings
from egrpo.report.evaluations import is_image
from egrpo.sampling.processes import Processes
from egrpo.store import files, journal
from egrpo.store.files import read_json, write_json, write_once, write_text
from egrpo.study.layout import Layout
from egrpo.study.orders import order_of_target
from egrpo.study.resolve import Study
from egrpo.train import job as train_run
from egrpo.train.job import only_one


class Disk:
    """A real file system with little space."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small tmpfs needs root")

    def resize(self, size: str) -> None:
        self.remount(f"size={size}")

    def remount(self, how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    found = Disk(tmp_path / "disk")
    yield found
    subprocess.run(["umount", str(found.folder)], check=True)


def test_what_was_there_stays_when_the_disk_is_full(disk: Disk) -> None:
    disk.resize("700k")
    target = disk.folder / "kept.json"
    write_json(target, "old")
    with pytest.raises(UserError, match=r"kept\.json: no space left on the disk"):
        write_json(target, "new" * 300_000)
    assert json.loads(target.read_text()) == "old"
    assert list(disk.folder.iterdir()) == [target]


def test_a_journal_on_a_full_disk_keeps_its_whole_lines(disk: Disk) -> None:
    disk.resize("16k")
    log = disk.folder / "journal.jsonl"
    written = []

    def fill() -> None:
        while True:
            journal.append(log, {"iteration": len(written), "x": "y" * 700})
            written.append(len(written))

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert len(written) > 10
    assert log.read_text()[-1] != "\n", "the last line is torn"
    disk.resize("1m")
    journal.rewind(log, len(written))
    journal.append(log, {"iteration": len(written)})
    assert [line["iteration"] for line in journal.read(log)] == [*written, len(written)]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_and_folders_have_the_mode_of_new_ones(mask: int, tmp_path: Path) -> None:
    texts = tmp_path.with_suffix(".txt")
    texts.write_text("a large red circle in the center\na small blue square at the top\n")
    changes = {"prompts.train": str(texts), "prompts.heldout": str(texts), "train.snapshots": [1]}
    run = small_run("modes", **changes, **{"train.iterations": 1, "train.rewards": {"jpeg": 1.0}})
    full = small_run("full", **{"model.tuning": "full"})
    out = tmp_path / "out"
    with modes_by(mask, tmp_path):
        run_in_process(run, embedded(run, tmp_path / "shared"), tmp_path)
        load_model(full.model).save(tmp_path / "full")
        curves_figure([out / "train_metrics.parquet"], ["jpeg"], tmp_path / "figures/curves")
        write_once(tmp_path / "settings/x.yaml", lambda: "x")


def refused(done: Result) -> None:
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if "no space left on the disk" in line]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.output


def test_training_goes_on_when_there_is_space_again(
    disk: Disk, embeddings: Embeddings, tmp_path: Path
) -> None:
    """The disk grows by little each time: it is full in the middle of every kind of file."""
    run = small_run("full", **{"train.snapshots": [800], "train.iterations": 3})
    straight = train_words(run, embeddings, tmp_path / "straight")
    assert CliRunner().invoke(stages, straight).exit_code == 0
    words = train_words(run, embeddings, tmp_path / "full")
    for flag, name in (("--state", "state"), ("--output", "out")):
        words[words.index(flag) + 1] = str(disk.folder / name)
    places, kilobytes = set(), 4
    while (done := CliRunner().invoke(stages, words)).exit_code != 0:
        refused(done)
        (line,) = [x for x in done.stderr.splitlines() if "no space left" in x]
        places.add(Path(line.removeprefix("egrpo: ").split(": ")[0]).suffix)
        kilobytes += 52
        assert kilobytes < 8000
        disk.resize(f"{kilobytes}k")
    assert {".safetensors", ".parquet", ".png"} <= places, places
    same(tmp_path / "straight/out", disk.folder / "out")


def test_no_table_or_image_is_cut_short(disk: Disk, embeddings: Embeddings, tmp_path: Path) -> None:
    """Profile and evaluation: whole files, or none under their names."""
    run = small_run("full", **{"profile.prompts": 1, "profile.samples": 2, "profile.spans": [1]})
    for stage, size in (("evaluate", "8k"), ("profile", "40k")):
        folder, names = disk.folder / stage, OUTPUTS[stage]
        words = stage_words(stage, run, embeddings, tmp_path, folder)
        disk.resize(size)
        refused(CliRunner().invoke(stages, words))
        for path in folder.glob("*"):
            assert path.name in names
            pq.read_table(path)
        disk.resize("64m")
        assert CliRunner().invoke(stages, words).exit_code == 0
        assert {path.name for path in folder.iterdir()} == names


def test_a_read_only_file_system_is_one_line(
    disk: Disk, embeddings: Embeddings, tmp_path: Path
) -> None:
    """Whatever is to be written there: a state, tables, a tracking store, settings."""
    disk.resize("1m")
    words = train_words(small_run("kept"), embeddings, tmp_path / "kept")
    words[words.index("--state") + 1] = str(disk.folder / "state")
    new = disk.folder / "new"
    evaluate = stage_words("evaluate", small_run("kept"), embeddings, tmp_path / "kept", new)
    at = Layout(Study("kept", str(tmp_path), {"kept": small_run("kept")}))
    order = read_json(order_of_target(at, "prepare", ["kept"], {}))
    (runs,) = order["runs"]
    told = read_json(at.root / "settings" / runs) | {"results": str(disk.folder)}
    write_json(at.root / "settings" / runs, told)
    prepare = ["make", "prepare", str(next(at.root.glob("settings/prepare-*"))), "--name", "store"]
    disk.remount("ro")
    for command, of in ((words, stages), (evaluate, stages), (prepare, main)):
        done = CliRunner().invoke(of, command)
        (line,) = [text for text in done.stderr.splitlines() if text.startswith("egrpo: ")]
        assert done.exit_code == 2, done.output
        assert str(disk.folder) in line
        assert "Read-only file system; give this user the right to it, or use a folder" in line
        assert "Traceback" not in done.output
    for write in (write_once, write_text):
        with pytest.raises(UserError, match=r"disk/a: Read-only file system"):
            write(disk.folder / "a/b", (lambda: "x") if write is write_once else "x")  # type: ignore[operator]
    disk.remount("rw")
    assert CliRunner().invoke(stages, evaluate).exit_code == 0


def test_a_workflow_on_a_read_only_results_folder_is_one_line(disk: Disk, tmp_path: Path) -> None:
    config = study(tmp_path, results=str(disk.folder))
    disk.remount("ro")
    command = [sys.executable, "-m", "snakemake", "-n", "--nolock", "--configfile", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"\n{disk.folder}/small: Read-only file system; give this user" in done.stdout
    assert "OSError" not in done.stdout + done.stderr


@pytest.mark.parametrize("number", files.NO_LOCKS)
def test_without_flock_another_lock_is_taken_or_it_is_said(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.fcntl, "flock", none)
    path = tmp_path / "lock"
    held = files.lock(path)
    assert held is not None
    code = (
        "import fcntl, sys; from egrpo.store import files\n"
        f"def none(handle, how): raise OSError({number}, 'x')\n"
        "files.fcntl.flock = none\n"
        "print(files.lock(sys.argv[1]) is None)"
    )
    other = [sys.executable, "-c", code, str(path)]
    assert subprocess.run(other, capture_output=True, text=True).stdout == "True\n"
    os.close(held)
    assert subprocess.run(other, capture_output=True, text=True).stdout == "False\n"
    monkeypatch.setattr(files.fcntl, "lockf", none)
    for taking in (lambda: files.lock(path), lambda: files.alone(path).__enter__()):
        with pytest.raises(UserError, match=r"lock: its file system has no locks \(.*-o flock"):
            taking()


# -- a model that makes no images --------------------------------------------------------------


OUTPUTS = {
    "evaluate": {"scores.parquet", "images.parquet"},
    "profile": {"profile.parquet", "branches.parquet"},
}


SMALL_PROFILE: dict[str, Any] = yaml.safe_load("""
{profile.prompts: 1, profile.samples: 3, profile.spans: [1], profile.shown: [[3, 1]],
  profile.decode_batch: 9, profile.strides: [1], profile.solvers: [ode], profile.features: [],
  profile.fp8: false, method.steps: 8}
""")


@pytest.mark.parametrize(
    ("stage", "more", "what"),
    [
        ("evaluate", {}, "evaluate base: 8 of 8"),
        ("profile", {}, "profile: prompt 0: 21 of 21"),
        ("suffixes", {}, "suffixes: prompt 0, stride 1, solver ode, network exact: 9 of 9"),
        ("train", {}, "run black: monitor of iteration 0: 4 of 4"),
        ("train", {"train.monitor_every": 0}, "run black: iteration 1: 18 of 18"),
    ],
)
def test_a_job_without_any_image_is_no_success(
    stage: str, more: dict[str, Any], what: str, embeddings: Embeddings, tmp_path: Path
) -> None:
    run = small_run("black", **overflowing(tmp_path / "model"), **SMALL_PROFILE, **more)
    done = CliRunner().invoke(stages, stage_words(stage, run, embeddings, tmp_path))
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("egrpo: ")]
    assert line == (
        f"egrpo: {what} images are NaN or infinite: their latents are finite, but not what the VAE "
        "makes of them: the VAE overflows in model.dtype float16; set it to bfloat16 or float32"
    )
    assert not list(tmp_path.glob("*.parquet")) + list(tmp_path.glob("out"))


def test_an_evaluation_of_destroyed_weights_is_no_success(
    embeddings: Embeddings, tmp_path: Path
) -> None:
    trainer = trainer_for(embeddings, "far", **{"train.iterations": 1})
    with torch.no_grad():
        trainer.parameters[-1].fill_(torch.nan)
    trainer.save(tmp_path / "adapter")
    words = stage_words("evaluate", trainer.run, embeddings, tmp_path)
    done = CliRunner().invoke(stages, [*words, "--adapter", str(tmp_path / "adapter")])
    assert done.exit_code == 2
    assert f"evaluate far ({tmp_path}/adapter): 8 of 8 images are NaN or infinite" in done.stderr
    assert "the weights have diverged; train with a lower train.learning_rate_scale" in done.stderr
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("stage", ["evaluate", "profile", "suffixes"])
def test_single_images_that_are_none_are_said_and_stored_as_none(
    stage: str, embeddings: Embeddings, tmp_path: Path
) -> None:
    run = small_run("some", **{**SMALL_PROFILE, "evaluate.micro_batch": 4})
    words = stage_words(stage, run, embeddings, tmp_path, tmp_path)
    done = CliRunner().invoke(stages, words)
    assert done.exit_code == 0, done.output
    assert "images are NaN or infinite" in done.stderr
    assert "they have no score" in done.stderr
    if stage == "suffixes":
        rows = pq.read_table(tmp_path / "suffixes.parquet").to_pylist()
        ranks = {row["reward"]: row["rank_correlation"] for row in rows}
        assert ranks["clip"] == pytest.approx(1.0), "over the samples that are left"
        return
    if stage == "profile":
        path = tmp_path / "branches.parquet"
        found = [(r["step"], r["sample"], r["png"]) for r in pq.read_table(path).to_pylist()]
        lost = {(step, sample) for step, sample, png in found if not is_image(png, path)}
        assert lost == {(3, 0)}, "samples 9 and 18 of 21, and the first"
        rows = pq.read_table(tmp_path / "profile.parquet").to_pylist()
        assert 0 < max(r["spread"] for r in rows if r["quantity"] == "image_distance") < 0.5
        assert all(row["spread"] is not None for row in rows), "two samples are left"
        return
    path = tmp_path / "images.parquet"
    pictures = {(r["prompt_id"], r["sample"]): r["png"] for r in pq.read_table(path).to_pylist()}
    lost = {key for key, png in pictures.items() if not is_image(png, path)}
    assert lost == {(0, 0), (2, 0)}, "the first of each batch of 4"
    for row in pq.read_table(tmp_path / "scores.parquet").to_pylist():
        assert (row["value"] is None) == ((row["prompt_id"], row["sample"]) in lost)


def test_sigterm_saves_and_the_next_start_goes_on(embeddings: Embeddings, tmp_path: Path) -> None:
    """As SLURM and Snakemake send it; of itself the job would save after 100 iterations."""
    run = small_run("stopped", **{"train.iterations": 12, "train.checkpoint_every": 100})
    straight = train_words(run, embeddings, tmp_path / "straight")
    assert CliRunner().invoke(stages, straight).exit_code == 0
    words = [sys.executable, STAGES, *train_words(run, embeddings, tmp_path / "stopped")]
    job = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    state = tmp_path / "stopped/state"
    wait_for(lambda: list(state.glob("*/checkpoint-000000.safetensors")))
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGTERM)  # a second one does no harm
    # the queue starts it again while the first still saves
    again = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM
    assert said.count("SIGTERM: saving at the end of this iteration") == 1
    assert "saved after iteration" in said
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0
    assert "going on after iteration" in said
    same(tmp_path / "straight/out", tmp_path / "stopped/out")


def test_two_processes_never_train_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_run, "LEASE_WAIT", 0.2)
    taken = tmp_path, "a", Processes(torch.device("cpu"))
    with (
        only_one(*taken),
        pytest.raises(UserError, match="another process is training it"),
        only_one(*taken),
    ):
        pass
    assert capsys.readouterr().err.count("waiting for another process to leave") == 1
    with only_one(*taken):
        pass


def test_a_second_workflow_on_one_results_folder_is_refused(tmp_path: Path) -> None:
    """Started in another folder, where Snakemake's own lock does not reach; and after a kill."""
    config = study(tmp_path, default_runs=["one-s0"])
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--configfile", str(config)]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("Snakefile", "workflow", "config", "assets", "egrpo", "profiles"):
        (elsewhere / name).symlink_to(ROOT / name)

    def again(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=ROOT, env=env, capture_output=True, text=True)

    first = subprocess.Popen(
        command, cwd=elsewhere, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: list(tmp_path.glob("results/*/settings/*")))
        second = again("--nolock")
        assert second.returncode == 1
        assert "another snakemake works on it" in second.stderr
        dry = again("--nolock", "--dry-run")
        assert dry.returncode == 0, dry.stderr
    finally:
        first.kill()
        first.wait()
    third = again("--nolock", "--", str(tmp_path / "results/small/store.json"))
    assert third.returncode == 0, third.stderr
