"""Jobs that begin with their libraries loaded are the jobs that they would be without."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, wait_for

from egrpo.warm import VARIABLE

SERVER = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"  # ignored behind &
    "import egrpo.warm as w; w.LIBRARIES = ('tabnanny',); w._start = lambda *a: None; w.main()"
)


class Warm:
    """A server, and jobs that ask it."""

    def __init__(self, folder: Path) -> None:
        self.parent = subprocess.Popen(["sleep", "600"])
        self.folder = folder
        (folder / "sockets").mkdir()
        self.variables = os.environ | {VARIABLE: f"{self.parent.pid}:{folder / 'sockets'}"}
        self.fifo = folder / "order"
        os.mkfifo(self.fifo)
        self.server = psutil.Process(self._serve())

    def _serve(self) -> int:
        """As the first job starts it, but with one small library."""
        ask = "import egrpo.warm as w; w._start = lambda path, parent: print(path); w.run([])"
        path = subprocess.check_output([sys.executable, "-c", ask], env=self.variables, cwd=ROOT)
        path = path.decode().strip()
        words = [sys.executable, "-c", SERVER, path, str(self.parent.pid)]
        number = subprocess.Popen(words, cwd=ROOT, env=self.variables).pid
        wait_for(lambda: os.path.exists(path))
        return number

    def job(self, order: Path, **options: int) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "egrpo", "make", "train", str(order)]
        pipe = subprocess.PIPE
        of = {"stdout": pipe, "stderr": pipe, "text": True, "cwd": ROOT, "env": self.variables}
        return subprocess.Popen(words, **of, **options)  # type: ignore[call-overload,no-any-return]

    def waiting(self) -> list[psutil.Process]:
        """The job that reads an order which does not come, and what watches it."""
        wait_for(self._reads)
        return self.server.children(recursive=True)

    def _reads(self) -> bool:
        try:  # refused until somebody reads
            self.writer = os.open(self.fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        return True


@pytest.fixture
def warm(tmp_path: Path) -> Iterator[Warm]:
    made = Warm(tmp_path)
    yield made
    made.parent.kill()
    made.parent.wait()
    made.server.wait(10)  # it ends with the process that it belongs to


def test_status_and_words_are_those_of_a_cold_job(warm: Warm, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    for order in (bad, tmp_path / "missing.json"):
        told = warm.job(order).communicate()
        del warm.variables[VARIABLE]
        cold = warm.job(order)
        assert told == cold.communicate()
        assert cold.returncode == 2
        warm.variables[VARIABLE] = f"{warm.parent.pid}:{warm.folder / 'sockets'}"
    assert not list(warm.folder.rglob("*.started")), "all found the server"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_job(warm: Warm, number: signal.Signals) -> None:
    job = warm.job(warm.fifo)
    warm.waiting()
    job.send_signal(number)
    _, said = job.communicate(timeout=30)
    assert job.returncode == (143 if number == signal.SIGTERM else 1)
    assert ("Aborted!" in said) == (number == signal.SIGINT)


def test_a_job_dies_with_who_asked_for_it(warm: Warm) -> None:
    job = warm.job(warm.fifo)
    watch, worker = warm.waiting()
    job.kill()
    assert psutil.wait_procs([watch, worker], timeout=30)[1] == []
    job.communicate()


def test_a_job_that_is_killed_is_told_so(warm: Warm) -> None:
    job = warm.job(warm.fifo)
    _, worker = warm.waiting()
    worker.kill()
    job.communicate(timeout=30)
    assert job.returncode == 128 + signal.SIGKILL


def test_libraries_are_loaded_and_ours_are_not(warm: Warm) -> None:
    """An edit of the package counts for the jobs to come."""
    maps = subprocess.check_output(
        [sys.executable, "-c", "import egrpo.warm, sys; print(*sys.modules)"], cwd=ROOT, text=True
    )
    assert {n for n in maps.split() if n.startswith("egrpo")} == {"egrpo", "egrpo.warm"}


def test_another_environment_is_not_served(warm: Warm) -> None:
    warm.variables["OMP_NUM_THREADS"] = "7"
    job = warm.job(warm.folder / "missing.json")
    job.communicate()
    assert job.returncode == 2
    wait_for(lambda: len(list(warm.folder.rglob("*.started"))) == 1)
