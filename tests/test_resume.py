"""A run's state: killed, damaged or stopped on the way, it ends with the same bits or says so."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    ADAPTER,
    ROOT,
    called,
    job_words,
    result_of,
    run_in_process,
    small_run,
    trainer_for,
    wait_for,
)

from egrpo.config.models import RunConfig
from egrpo.errors import UserError
from egrpo.models.conditioning import Embeddings
from egrpo.planning.trees import closed_form_plan, iteration_cost
from egrpo.store import checkpoint as checkpoints
from egrpo.store import journal
from egrpo.store.tables import ROLLOUTS, TRAIN_METRICS, read_table
from egrpo.train.job import Job
from egrpo.train.state import State
from egrpo.train.trainer import Trainer

COUNTS = {f"nfe_{name}" for name in ("forward", "train", "reference", "monitor")}


def record(out: Path) -> Any:
    return json.loads((out / "train.json").read_text())


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A table's rows without those of time."""
    rows = read_table(path, TRAIN_METRICS if "metrics" in path.name else ROLLOUTS).to_pylist()
    return [r for r in rows if not str(r.get("metric", "")).startswith("time/")]


def same_bits(
    one: Path, other: Path, lost: Collection[int] = (), but: Collection[str] = ()
) -> list[str]:
    """All weights, images and tables agree but for ``lost`` iterations; returns the files."""
    names = [p.relative_to(one) for p in one.rglob("*") if p.suffix in (".png", ".safetensors")]
    for name in names:
        assert (other / name).read_bytes() == (one / name).read_bytes(), name
    for table in ("train_metrics.parquet", "rollouts.parquet"):
        kept = [r for r in rows_of(one / table) if r["iteration"] not in lost]
        assert rows_of(other / table) == kept
    a, b = record(one), record(other)
    for key in {*COUNTS, "iterations", "key"}.difference(but, ["nfe_monitor"] if lost else []):
        assert a[key] == b[key], key
    return sorted(map(str, names))


def kill_after_checkpoint(words: list[str], folder: Path, count: int, delay: float) -> int:
    """Start, wait for the ``count``-th checkpoint, wait ``delay`` seconds, SIGKILL."""
    job = subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.DEVNULL)

    def reached() -> bool:
        names = [path.stem for path in folder.rglob("checkpoint-*.safetensors")]
        return max((int(n.split("-")[1]) for n in names), default=-1) >= count

    try:
        wait_for(lambda: job.poll() is not None or reached())
        time.sleep(delay)
    finally:
        job.kill()
    return job.wait()


@pytest.mark.parametrize("method", ["egrpo", "flow_grpo", "diffusion_nft"])
def test_killed_and_started_again_ends_bit_identical(method, embeddings, tmp_path):
    limits = [1, 800, 10**9]
    of = {"ema_decay": 0.9, "iterations": 7, "checkpoint_every": 2, "snapshots": limits}
    run = small_run("victim", **{"method.name": method}, **{f"train.{k}": v for k, v in of.items()})
    folders = tmp_path / "straight", tmp_path / "killed"
    straight, killed = (job_words("train", run, embeddings, folder) for folder in folders)
    assert called(straight).exit_code == 0
    rng = random.Random(f"{method} kills")
    waits = ((count, rng.uniform(0, 0.4)) for count in (0, 2, 4))
    assert -signal.SIGKILL in [kill_after_checkpoint(killed, folders[1], *each) for each in waits]
    assert called(killed).exit_code == 0
    one, other = map(result_of, folders)
    assert len(same_bits(one, other)) == 1 + 5 + 3
    for limit in limits:
        a, b = (
            json.loads((o / f"snapshots/{limit}/snapshot.json").read_text()) for o in (one, other)
        )
        assert {**a, "seconds": 0} == {**b, "seconds": 0}


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("egrpo", {}),
        ("flow_grpo", {}),
        ("branchgrpo", {"splits": [0, 2]}),
        ("awm", {"times_per_sample": 3}),
    ],
)
def test_a_run_continued_to_twice_its_length_is_one_of_that_length(
    method, own, embeddings, tmp_path
):
    """To the last bit, also where iterations end between monitors and checkpoints."""
    tiny = {"name": method, "steps": 5, "group_size": 4, **own}
    of = {f"method.{key}": value for key, value in tiny.items()}
    of |= {"train.ema_decay": 0.5, "train.checkpoint_every": 2, "train.monitor_every": 2}

    def trained(iterations: int, folder: Path) -> str:
        run = small_run("longer", **of, **{"train.iterations": iterations})
        done = called(job_words("train", run, embeddings, folder))
        assert done.exit_code == 0, done.output
        return done.stderr

    once, twice = tmp_path / "once", tmp_path / "twice"
    trained(6, once)
    trained(3, twice)
    assert record(result_of(twice))["iterations"] == 3
    assert "going on after iteration 3" in trained(6, twice)
    # the first training's last monitor is no part of the longer one, but was paid for
    found = same_bits(result_of(once), result_of(twice), but=["nfe_monitor"])
    assert found == [ADAPTER, *(f"monitor/iteration-00000{n}.png" for n in (0, 2, 4, 6))]
    assert rows_of(result_of(once) / "train_metrics.parquet")[-1]["iteration"] == 6


def test_a_run_made_shorter_ends_with_a_monitor(jobs):
    """Also where the longer training, ended by a signal there, would not have looked."""

    def short(name: str, iterations: int) -> RunConfig:
        of = {"iterations": iterations, "monitor_every": 4, "checkpoint_every": 1}
        return small_run(name, **{f"train.{key}": value for key, value in of.items()})

    straight = jobs(short("once", 2)).rename(jobs.folder / "straight")
    shutil.rmtree(jobs.folder / "state")
    run = short("once", 5)
    trainer = Trainer(run, closed_form_plan(run), jobs.embeddings)
    state = jobs.folder / "state/key"
    state.mkdir(parents=True)
    with pytest.raises(SystemExit):
        Job(trainer, State(run, state), lambda: trainer.iteration == 2).finish(None, fresh=True)
    same_bits(straight, jobs(short("once", 2)))
    jobs(short("once", 2))
    assert "damaged" not in jobs.said()  # the journal has one line of each iteration


# -- the journal -----------------------------------------------------------------------------


def zeros(text: bytes) -> bytes:
    third = len(text) // 3
    return text[:third] + bytes(9) + text[third + 9 :]


def swapped(text: bytes) -> bytes:
    """The third line is not what it was, and still JSON of the right kind."""
    lines = text.splitlines(keepends=True)
    return b"".join([*lines[:2], lines[2].replace(b"0.25", b"0.75"), *lines[3:]])


ALL = [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("harm", "left", "said"),
    [
        (zeros, [0, 1, 3, 4, 5], "1 lines cannot be read, 0 are there twice"),
        (swapped, [0, 1, 3, 4, 5], "1 lines cannot be read, 0 are there twice"),
        (lambda text: text + text, ALL, "0 lines cannot be read, 6 are there twice"),
        (lambda text: text.replace(b"}\n{", b"}?{", 1), ALL, ""),  # an end lost
        (lambda text: b"".join(reversed(text.splitlines(keepends=True))), ALL, ""),
        (lambda text: text[: len(text) // 6 * 2 + 9] + text, ALL, "2 are there twice"),
        (lambda text: text[:-1], ALL, ""),
        (lambda text: text + b'{"iteration": 6, "met', ALL, ""),  # a kill is no damage
    ],
)
def test_a_damaged_journal_is_mended_from_its_whole_lines(harm, left, said, tmp_path, capsys):
    path = tmp_path / "journal.jsonl"
    for n in range(6):
        journal.append(path, {"iteration": n, "metrics": {"x": 0.25}})
    found = harm(path.read_bytes())
    path.write_bytes(found)
    journal.rewind(path, 5)
    assert [line["iteration"] for line in journal.read(path)] == left
    assert all(line["metrics"] == {"x": 0.25} for line in journal.read(path))
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == bool(said)
    assert not said or path.with_suffix(".damaged").read_bytes() == found
    journal.rewind(path, 5)
    assert capsys.readouterr().err == ""


def test_a_journal_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "journal.jsonl"
    rest = {"time": 1.5, "metrics": {"x": None}, "rollouts": {"step": [1]}}
    lines = [{"iteration": n, "nfe": n, **rest} for n in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(journal.read(path)) == lines
    journal.rewind(path, 1)
    journal.append(path, {**lines[2], "metrics": {"x": float("nan")}})
    assert list(journal.read(path)) == lines
    assert path.read_text().count('"crc32"') == 3


# -- damaged state ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(
    request: pytest.FixtureRequest, embeddings: Embeddings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Path]:
    """A finished run with its state: 5 iterations, checkpoints of 4 and 5, a snapshot of 2."""
    tuning = getattr(request, "param", "lora")
    more = {"train.iterations": 5, "train.ema_decay": 0.5, "model.tuning": tuning}
    run, folder = small_run("egrpo", **more), tmp_path_factory.mktemp(tuning)
    each = iteration_cost(run, closed_form_plan(run), 1, 100).total
    run = small_run("egrpo", **more, **{"train.snapshots": [2 * each]})
    with chdir(ROOT):
        run_in_process(run, embeddings, folder)
    return run, folder


@pytest.fixture
def state(trained: tuple[RunConfig, Path], tmp_path: Path) -> Path:
    """A copy of that run's state, to be damaged."""
    shutil.copytree(trained[1] / "state", tmp_path / "state")
    (found,) = (tmp_path / "state").iterdir()
    return found


Harm = Callable[[Path], None]


def without(*lost: int) -> Harm:
    def harm(state: Path) -> None:
        log = state / "journal.jsonl"
        kept = [line for line in journal.read(log) if line["iteration"] not in lost]
        log.unlink()
        for line in kept:
            journal.append(log, line)

    return harm


def spoiling(name: str, how: Callable[[bytes], bytes]) -> Harm:
    def harm(state: Path) -> None:
        (path,) = state.glob(name)
        path.write_bytes(how(path.read_bytes()))

    return harm


def cut(name: str) -> Harm:
    return spoiling(name, lambda content: content[: len(content) // 2])


def flipped(name: str) -> Harm:
    return spoiling(name, lambda c: c[: (n := len(c) // 2)] + bytes([c[n] ^ 1]) + c[n + 1 :])


def gone(name: str) -> Harm:
    return lambda state: (state / name).unlink()


FIRST, LAST = "monitor/iteration-000000.png", "monitor/iteration-000005.png"
BACK, AGAIN, OVER = "going back from iteration 5 to 4", "is measured again", "starting over for a"
WEIGHTS = flipped("snapshots/*/*.safetensors")
LACKS = "tables lack {} iterations ({});"
DAMAGES: dict[str, tuple[Harm, list[str], list[int]]] = {
    "line of the untrained model": (without(0), [AGAIN], []),
    "line after the checkpoint before": (without(5), [BACK], []),
    "line before both checkpoints": (without(2), [LACKS.format(1, 2)], [2]),
    "all lines": (
        gone("journal.jsonl"),
        [AGAIN, BACK, LACKS.format(4, "1, 2, 3, 4")],
        [1, 2, 3, 4],
    ),
    "first grid cut": (cut(FIRST), [AGAIN], []),
    "first grid gone": (gone(FIRST), [AGAIN], []),
    "first grid, one bit": (flipped(FIRST), [AGAIN], []),
    "last grid cut": (cut(LAST), [BACK], []),
    "snapshot's weights, one bit": (WEIGHTS, ["damaged snapshot", f"{OVER} snapshot that it"], []),
    "snapshot's record cut": (cut("snapshots/*/snapshot.json"), [OVER], []),
}


@pytest.mark.parametrize(
    ("trained", "damage"),
    [
        *(("lora", damage) for damage in DAMAGES),
        *(("full", d) for d in ("first grid gone", "snapshot's weights, one bit")),
    ],
    indirect=["trained"],
)
def test_damaged_state_is_said_and_made_again(damage, trained, state, jobs):
    """The same results bit for bit, but for what no checkpoint reaches back to; that is said."""
    run, whole = trained
    harm, says, lost = DAMAGES[damage]
    harm(state)
    out = jobs(run)
    said = jobs.said()
    assert all(text in said for text in says), said
    same_bits(whole / "out", out, lost)
    assert record(out)["iterations_lost"] == len(lost)


def test_a_grid_that_no_checkpoint_reaches_is_left_out(trained, state, jobs):
    run, whole = trained
    cut("monitor/iteration-000002.png")(state)
    out = jobs(run)
    assert "images of the monitor lack 1 iterations (2);" in jobs.said()
    before, after = ({p.name for p in (o / "monitor").iterdir()} for o in (whole / "out", out))
    assert after == before - {"iteration-000002.png"}


def test_a_snapshot_damaged_in_the_end_becomes_no_result(trained, state, embeddings, tmp_path):
    WEIGHTS(state)  # after it was looked at when the job began
    trainer = trainer_for(embeddings)
    trainer.run = trained[0]
    job, out = Job(trainer, State(trained[0], state), lambda: False), tmp_path / "out"
    with pytest.raises(UserError, match=r"safetensors: damaged snapshot, .*; delete the folder"):
        job.write_outputs("key", out)
    assert not (out / "train.json").exists()


def test_damaged_checkpoint_is_passed_over(trained, state, jobs):
    run, whole = trained
    files = sorted(state.glob("checkpoint-*.safetensors"))
    assert len(files) == checkpoints.KEEP
    flipped(files[-1].name)(state)
    same_bits(whole / "out", jobs(run))
    said = jobs.said()
    assert "damaged checkpoint passed over (checksum" in said
    assert "going on after iteration 4" in said
    assert [p.name for p in state.glob("*.damaged")] == ["checkpoint-000005.damaged"]
    for file in sorted(state.glob("checkpoint-*.safetensors")):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="none of its 2 checkpoints can be read"):
        jobs(run)
    assert len(list(journal.read(state / "journal.jsonl"))) == 6, "nothing may be lost"


# -- snapshots and bounds --------------------------------------------------------------------


def test_snapshot_is_the_last_iteration_within_its_evaluations(jobs):
    shorter = small_run("snap", **{"train.iterations": 2})
    each = iteration_cost(shorter, closed_form_plan(shorter), 1, 100).total
    limits = [1, 2 * each, 2 * each + 1]
    run = small_run("snap", **{"train.iterations": 3, "train.snapshots": limits})
    kept = jobs(run) / "snapshots"
    found = [json.loads((kept / str(n) / "snapshot.json").read_text()) for n in limits]
    wanted = [(0, 0), (2, 2 * each), (2, 2 * each)]
    assert [(r["iteration"], r["nfe"]) for r in found] == wanted
    straight = jobs(shorter, "two") / ADAPTER
    assert (kept / str(2 * each) / straight.name).read_bytes() == straight.read_bytes()


def test_a_snapshot_asked_for_later_is_made_by_starting_over(jobs):
    first = (jobs("snap") / ADAPTER).read_bytes()
    # the last weights are the snapshot beyond
    for limits, passed in (([1], True), ([1, 10**9], False)):
        out = jobs("snap", **{"train.snapshots": limits})
        assert (f"{OVER} snapshot that it passed" in jobs.said()) is passed
        assert (out / ADAPTER).read_bytes() == first
        kept = [json.loads(p.read_text()) for p in out.glob("snapshots/*/snapshot.json")]
        assert sorted(r["iteration"] for r in kept) == [0, 4][: len(limits)]


def test_a_bound_stops_the_run_and_keeps_what_it_made(jobs):
    """Monitored every second iteration; started again it does not go on."""
    bounds = {"reward/verifier": {"least": 2.0, "action": "stop"}, "diversity": {"least": 2.0}}
    run = small_run("bound", **{"train.bounds": bounds, "train.snapshots": [10**9]})
    out = jobs(run)
    said = jobs.said()
    assert "iteration 2: monitor reward/verifier:" in said
    assert "below 2 (train.bounds.reward/verifier.least); training stops" in said
    assert "diversity.least); training goes on" in said
    first = record(out)
    assert first["iterations"] == 2
    assert list(first["stopped"]) == ["reward/verifier"]
    assert json.loads((out / f"snapshots/{10**9}/snapshot.json").read_text())["iteration"] == 2
    assert record(jobs(run)) == first
    trainer = Trainer(run, closed_form_plan(run), jobs.embeddings)  # and a signal in it
    job = Job(trainer, State(run, jobs.folder), lambda: trainer.iteration == 2)
    job.finish(None, fresh=True)
    job.write_outputs("key", jobs.folder / "signal")
    assert record(jobs.folder / "signal")["stopped"] == first["stopped"]
    assert (jobs.folder / f"signal/snapshots/{10**9}/snapshot.json").exists()


def test_a_bound_does_not_stop_the_untrained_model(jobs):
    """Started again from the checkpoint of iteration 0, a run goes on as if never stopped."""
    bounds = {"reward/verifier": {"least": 2.0, "action": "stop"}}
    run = small_run("zero", **{"train.bounds": bounds, "train.checkpoint_every": 3})
    first = rows_of(jobs(run) / "train_metrics.parquet")
    (jobs.folder / "state/key/checkpoint-000002.safetensors").unlink()
    again = jobs(run)
    assert rows_of(again / "train_metrics.parquet") == first
    assert record(again)["iterations"] == 2
