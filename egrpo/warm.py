"""Jobs that begin with their libraries loaded.

Importing torch, diffusers and what they bring takes longer than a short training of the toy. A
server loads them once and forks for each job, which is still a process of its own with a result of
its own. Nothing of this package is loaded before the fork, so that each job runs the code of its
moment. A server belongs to one snakemake, whose number and a folder for sockets stand in
:data:`VARIABLE`, and to one environment; jobs that find none that is ready start as always.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "EGRPO_WARM"
"""Environment: number of the process to live as long as, a colon, and the folder."""

LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torch.distributed.tensor",
    "diffusers.loaders",
    "diffusers.models.transformers",
    "peft",
    "torchvision",
    "clip",
    "scipy.stats",
    "pyarrow.parquet",
    "safetensors.torch",
)
"""What takes longest of what jobs import."""

OF_A_JOB = {"EGRPO_PROGRESS_FD", "OLDPWD", "PWD", "SHLVL", "_"}
"""Variables that differ between jobs, and that no library reads as it is loaded."""

STREAMS = (0, 1, 2)


def run(words: Sequence[str]) -> int | None:
    """Have a server run ``python -m egrpo`` with ``words``; its exit status, as a shell counts.

    None where no server is ready: one is then started, for the jobs to come.
    """
    parent, _, folder = os.environ.get(VARIABLE, "").partition(":")
    if not os.path.isdir(folder):
        return None
    path = Path(folder, _environment(os.environ))
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except OSError:
        _start(path, parent)
        return None
    progress = os.environ.get("EGRPO_PROGRESS_FD")
    streams = [*STREAMS, *([int(progress)] if progress else [])]
    job = {"words": words, "folder": os.getcwd(), "variables": dict(os.environ), "streams": streams}
    text = json.dumps(job).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "big")], streams)
    connection.sendall(text)
    for number in (signal.SIGINT, signal.SIGTERM):  # to the job, behind its text
        signal.signal(number, lambda which, frame: connection.sendall(bytes([which])))
    answer = connection.recv(1)
    if not answer:
        print("egrpo: what watched this job has ended, start the workflow again", file=sys.stderr)
        return 1
    return answer[0]


def _environment(variables: Mapping[str, str]) -> str:
    """Name of the server for an environment, which libraries read as they are loaded."""
    read = sorted((k, v) for k, v in variables.items() if k not in OF_A_JOB)
    return hashlib.sha256(json.dumps([sys.executable, os.getcwd(), read]).encode()).hexdigest()[:16]


def _start(path: Path, parent: str) -> None:
    """Start the server of a socket, once."""
    with contextlib.suppress(OSError):
        path.with_suffix(".started").open("x").close()
        subprocess.Popen(
            [sys.executable, "-m", "egrpo.warm", str(path), parent],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the keyboard's signals are for the jobs
        )


def serve(path: Path, parent: int) -> list[str] | None:
    """Load the libraries, and fork for each job until ``parent`` has ended.

    Returns:
        In the process of a job, which has taken its place, the words of its command; else None.
    """
    gone = os.pidfd_open(parent)
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(64)
    while gone not in select.select([listener.fileno(), gone], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            os.close(gone)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _watch(connection)
        connection.close()
    return None


def _watch(connection: socket.socket) -> list[str] | None:
    """Fork a job, hand signals on to it, and answer with its status."""
    size, files, _, _ = socket.recv_fds(connection, 8, 8)
    text, part = b"", size
    while part and len(text) < int.from_bytes(size, "big"):
        part = connection.recv(1 << 16)
        text += part
    if not part:  # who asked has ended
        return None
    job = json.loads(text)
    number = os.fork()
    if number == 0:
        connection.close()
        return _become(job, files)
    for file in files:  # a pipe ends when the job ends
        os.close(file)
    ended = os.pidfd_open(number)
    waiting = [connection.fileno()]
    while ended not in select.select([ended, *waiting], [], [])[0]:
        which = connection.recv(1)
        waiting = waiting if which else []
        os.kill(number, which[0] if which else signal.SIGKILL)  # as who asked was
    code = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(bytes([code if code >= 0 else 128 - code]))
    return None


def _become(job: dict[str, Any], files: Sequence[int]) -> list[str]:
    """Take the place of who asked: streams, folder, environment."""
    for file, stream in zip(files, job["streams"], strict=True):
        os.dup2(file, stream)
    for file in set(files) - set(job["streams"]):
        os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update({k: v for k, v in job["variables"].items() if k != VARIABLE})
    words: list[str] = job["words"]
    return words


def main() -> None:
    """The server, and each of its jobs."""
    words = serve(Path(sys.argv[1]), int(sys.argv[2]))
    if words is None:
        os._exit(0)
    sys.argv = ["egrpo", *words]
    runpy.run_module("egrpo", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
