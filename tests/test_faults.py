"""A full disk, preemption, two workflows on one folder: nothing is lost, nothing half is used."""

from __future__ import annotations

import gc
import json
import os
import shutil
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
from click.testing import Result
from conftest import (
    ROOT,
    called,
    embedded,
    job_words,
    modes_by,
    overflowing,
    result_of,
    run_in_process,
    small_run,
    trainer_for,
    wait_for,
)
from small_study import study
from test_processes import same

from egrpo.errors import UserError
from egrpo.figures.curves import curves_figure
from egrpo.measure.evaluate import evaluate
from egrpo.models import load_model
from egrpo.report.evaluations import is_image
from egrpo.sampling.processes import Processes
from egrpo.store import files, journal
from egrpo.store.files import write_json, write_once, write_text
from egrpo.study.layout import Layout
from egrpo.study.orders import order_of_target
from egrpo.study.resolve import Study
from egrpo.train import job as train_job
from egrpo.train import state as train_state
from egrpo.train.state import only_one


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
    gc.collect()  # a writer that failed keeps its file in a cycle with its traceback
    subprocess.run(["umount", str(found.folder)], check=True)


def test_what_was_there_stays_when_the_disk_is_full(disk):
    disk.resize("700k")
    target = disk.folder / "kept.json"
    write_json(target, "old")
    with pytest.raises(UserError, match=r"kept\.json: no space left on the disk"):
        write_json(target, "new" * 300_000)
    assert json.loads(target.read_text()) == "old"
    assert list(disk.folder.iterdir()) == [target]


def test_a_journal_on_a_full_disk_keeps_its_whole_lines(disk):
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
def test_files_and_folders_have_the_mode_of_new_ones(mask, tmp_path):
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


def line_of(done: Result) -> str:
    """What a job that ended with a user's error said, in one line."""
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("egrpo: ")]
    return line


@pytest.mark.parametrize(
    ("stage", "step", "kinds"),
    [
        ("train", 52, {".safetensors", ".parquet", ".png"}),
        ("base", 12, {".parquet"}),
        ("profile", 52, {".parquet"}),
    ],
)
def test_a_job_goes_on_when_there_is_space_again(stage, step, kinds, disk, embeddings, tmp_path):
    """The disk grows by little each time: it is full in the middle of every kind of file."""
    few = {"profile.prompts": 1, "profile.samples": 2, "profile.spans": [1]}
    run = small_run("full", **few, **{"train.snapshots": [800], "train.iterations": 3})
    straight = tmp_path / "straight"
    assert called(job_words(stage, run, embeddings, straight)).exit_code == 0
    whole = sum(path.stat().st_size // 1024 for path in straight.rglob("*") if path.is_file())
    disk.resize("1m")
    words = job_words(stage, run, embeddings, disk.folder)
    kilobytes = shutil.disk_usage(disk.folder).used // 1024
    disk.resize(f"{kilobytes}k")
    places = set()
    while (done := called(words)).exit_code != 0:
        line = line_of(done)
        assert "no space left on the disk" in line
        places.add(Path(line.removeprefix("egrpo: ").split(": ")[0]).suffix)
        for path in disk.folder.rglob("*.parquet"):
            pq.read_table(path)  # whole files, or none under their names
        if ".png" in kinds - places:
            kilobytes += 4  # a grid takes a page or two
        else:  # tables come last
            kilobytes += min(step, 8) if kilobytes > whole - 150 else step
        assert kilobytes < 8000
        disk.resize(f"{kilobytes}k")
    assert kinds <= places, places
    tables = ({path.name for path in at.rglob("*.parquet")} for at in (straight, disk.folder))
    assert next(tables) == next(tables)
    if stage == "train":
        same(result_of(straight), result_of(disk.folder))


def test_a_read_only_file_system_is_one_line(disk, embeddings):
    disk.resize("1m")
    run = small_run("kept")
    train, base = (job_words(stage, run, embeddings, disk.folder) for stage in ("train", "base"))
    at = Layout(Study("kept", str(disk.folder), {"kept": run}))
    prepare = ["", "", "make", "prepare", str(order_of_target(at, "prepare", ["kept"], {}))]
    disk.remount("ro")
    for words in (train, base, [*prepare, "--name", "store"]):
        line = line_of(called(words))
        assert str(disk.folder) in line
        assert "Read-only file system; give this user the right to it, or use a folder" in line
    for write in (write_once, write_text):
        with pytest.raises(UserError, match=r"disk/a: Read-only file system"):
            write(disk.folder / "a/b", (lambda: "x") if write is write_once else "x")  # type: ignore[operator]
    disk.remount("rw")
    assert called(base).exit_code == 0


def test_a_workflow_on_a_read_only_results_folder_is_one_line(disk, tmp_path):
    config = study(tmp_path, results=str(disk.folder))
    disk.remount("ro")
    command = [sys.executable, "-m", "snakemake", "-n", "--nolock", "--configfile", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"\n{disk.folder}/small: Read-only file system; give this user" in done.stdout
    assert "OSError" not in done.stdout + done.stderr


@pytest.mark.parametrize("number", files.NO_LOCKS)
def test_without_flock_another_lock_is_taken_or_it_is_said(number, tmp_path, monkeypatch):
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


SMALL_PROFILE: dict[str, Any] = yaml.safe_load("""
{profile.prompts: 1, profile.samples: 3, profile.spans: [1], profile.shown: [[3, 1]],
  profile.decode_batch: 9, profile.strides: [1], profile.solvers: [ode], profile.features: [],
  profile.fp8: false, method.steps: 8}
""")


@pytest.mark.parametrize(
    ("stage", "more", "what"),
    [
        ("base", {}, "evaluate base: 8 of 8"),
        ("profile", {}, "profile: prompt 0: 21 of 21"),
        ("suffixes", {}, "suffixes: prompt 0, stride 1, solver ode, network exact: 9 of 9"),
        ("train", {}, "run black: monitor of iteration 0: 4 of 4"),
        ("train", {"train.monitor_every": 0}, "run black: iteration 1: 18 of 18"),
    ],
)
def test_a_job_without_any_image_is_no_success(stage, more, what, embeddings, tmp_path):
    run = small_run("black", **overflowing(tmp_path / "model"), **SMALL_PROFILE, **more)
    assert line_of(called(job_words(stage, run, embeddings, tmp_path))) == (
        f"egrpo: {what} images are NaN or infinite: their latents are finite, but not what the VAE "
        "makes of them: the VAE overflows in model.dtype float16; set it to bfloat16 or float32"
    )
    assert not list(tmp_path.rglob("*.parquet"))


def test_an_evaluation_of_destroyed_weights_is_no_success(embeddings, tmp_path):
    trainer = trainer_for(embeddings, "far", **{"train.iterations": 1})
    with torch.no_grad():
        trainer.parameters[-1].fill_(torch.nan)
    trainer.save(tmp_path / "adapter")
    said = rf"evaluate far \({tmp_path}/adapter\): 8 of 8 images are NaN or infinite.* the weights "
    with pytest.raises(
        UserError, match=said + r"have diverged; train with a lower train\.learning"
    ):
        evaluate(trainer.run, embeddings, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("spoilt")
@pytest.mark.parametrize("stage", ["base", "profile", "suffixes"])
def test_single_images_that_are_none_are_said_and_stored_as_none(stage, embeddings, tmp_path):
    run = small_run("some", **{**SMALL_PROFILE, "evaluate.micro_batch": 4})
    done = called(job_words(stage, run, embeddings, tmp_path))
    assert done.exit_code == 0, done.output
    assert "images are NaN or infinite" in done.stderr
    assert "they have no score" in done.stderr
    paths = {path.stem: path for path in tmp_path.rglob("*.parquet")}
    found = {name: pq.read_table(path).to_pylist() for name, path in paths.items()}

    def lost(table: str, *keys: str) -> set[tuple[Any, ...]]:
        rows = [row for row in found[table] if not is_image(row["png"], paths[table])]
        return {tuple(row[key] for key in keys) for row in rows}

    if stage == "suffixes":
        ranks = {row["reward"]: row["rank_correlation"] for row in found["suffixes"]}
        assert ranks["clip"] == pytest.approx(1.0), "over the samples that are left"
    elif stage == "profile":
        assert lost("branches", "step", "sample") == {(3, 0)}, "9 and 18 of 21, and the first"
        rows = found["entropy_profile"]
        assert 0 < max(r["spread"] for r in rows if r["quantity"] == "image_distance") < 0.5
        assert all(row["spread"] is not None for row in rows), "two samples are left"
    else:
        none = lost("images", "prompt_id", "sample")
        assert none == {(0, 0), (2, 0)}, "the first of each batch of 4"
        for row in found["scores"]:
            assert (row["value"] is None) == ((row["prompt_id"], row["sample"]) in none)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_next_start_goes_on(number, embeddings, tmp_path):
    """As SLURM, Snakemake and the keyboard do; of itself it would save after 100 iterations."""
    run = small_run("stopped", **{"train.iterations": 12, "train.checkpoint_every": 100})
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert called(job_words("train", run, embeddings, straight)).exit_code == 0
    words = [sys.executable, *job_words("train", run, embeddings, stopped)]
    job = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: list(stopped.rglob("checkpoint-000000.safetensors")))
    time.sleep(0.5)
    job.send_signal(number)
    job.send_signal(number)  # a second one does no harm
    # the queue starts it again while the first still saves
    again = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 128 + number
    assert said.count(f"{number.name}: saving at the end of this iteration") == 1
    assert "saved after iteration" in said
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0
    assert "going on after iteration" in said
    same(result_of(straight), result_of(stopped))


def test_who_presses_again_does_not_wait(monkeypatch):
    monkeypatch.setattr(train_job.time, "monotonic", iter([10.0, 10.5, 11.5]).__next__)
    with train_job.preemption() as wanted:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert wanted() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_two_processes_never_train_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_state, "LEASE_WAIT", 0.2)
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


def test_a_second_workflow_on_one_results_folder_is_refused(tmp_path):
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
