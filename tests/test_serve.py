"""`egrpo serve-rewards` as a real process, and the remote reward as its client."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import numpy as np
import pytest
import requests
import torch
import uvicorn
from click.testing import CliRunner
from conftest import ROOT, small_run, wait_for
from fastapi.testclient import TestClient
from PIL import Image
from test_reward_models import service as answering

from egrpo.cli import main
from egrpo.config.rewards import Remote as Settings
from egrpo.errors import UserError
from egrpo.ops import serve
from egrpo.ops.batcher import Batcher, RewardFailedError
from egrpo.rewards import load_rewards
from egrpo.rewards.http import text_of
from egrpo.rewards.network import png_of
from egrpo.rewards.remote import TRIES, Remote

SERVE = [sys.executable, "-m", "egrpo", "serve-rewards", "config/config.yaml"]
PROMPTS = ["two red circles", "", "a blue square — ünïcode"]


def images(count: int, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and token file of a running service."""
    token = tmp_path_factory.mktemp("serve") / "token"
    token.write_text("secret\n")
    port = free_port()
    more = ["--port", str(port), "--device", "cpu", "--token-file", str(token)]
    job = subprocess.Popen([*SERVE, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, job)
    yield f"http://127.0.0.1:{port}", str(token)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)


def client(at: tuple[str, str | None] | int, reward: str = "mine", **more: Any) -> Remote:
    """What asks a service by its address and token file, or by its port alone."""
    url, token = (f"http://127.0.0.1:{at}", None) if isinstance(at, int) else at
    given = {"kind": "remote", "url": url, "token_file": token, "reward": reward, "patience": 5.0}
    return Remote(Settings.model_validate({**given, **more}))


@pytest.mark.parametrize("encoding", ["png", "raw"])
@pytest.mark.parametrize("reward", ["clip", "preference", "jpeg"])
def test_remote_scores_are_the_local_ones(service, reward, encoding):
    local = load_rewards({reward: small_run().rewards[reward]}, "cpu")[reward]
    x, prompts = images(9), PROMPTS * 3
    found = client(service, reward, encoding=encoding, batch=4, concurrency=3).score(x, prompts)
    np.testing.assert_allclose(found, local.score(x, prompts), rtol=1e-5, atol=1e-6)


def test_health_and_refusals(service, tmp_path):
    url, _ = service
    assert "clip" in httpx2.get(f"{url}/health").json()["rewards"]
    assert httpx2.post(f"{url}/score", json={}).status_code == 401
    with pytest.raises(UserError, match=r"HTTP 404: .*no reward 'nothing'"):
        client(service, "nothing").score(images(1), ["a"])
    (tmp_path / "token").write_text("guess")
    with pytest.raises(UserError, match="HTTP 401"):
        client((url, str(tmp_path / "token")), "clip").score(images(1), ["a"])


def test_a_dead_service_pauses_and_goes_on(capsys):
    port, x = free_port(), images(3)
    found: list[Any] = []
    waiting = client(port, patience=60.0)
    thread = threading.Thread(target=lambda: found.append(waiting.score(x, PROMPTS)))
    thread.start()
    time.sleep(1)
    assert not found
    with served(app_of(Mine(means)), port):
        thread.join(timeout=60)
    assert found[0] == pytest.approx(means(x, []))
    assert "waiting, up to 60 s" in capsys.readouterr().err


def test_patience_ends_in_one_line():
    with pytest.raises(UserError, match=r"away for more than 0\.5 s: ConnectError"):
        client(free_port(), patience=0.5).score(images(1), ["a"])


# -- one app in this process, around a reward that is a function ---------------------------------

SCORE = "/score"


class Mine:
    """A reward that is a function; it waits at a gate, and keeps the prompts of each call."""

    def __init__(self, function: Callable[[torch.Tensor, list[str]], Any]) -> None:
        self.function = function
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[list[str]] = []

    def score(self, x: torch.Tensor, prompts: Any) -> Any:
        self.calls.append(list(prompts))
        self.gate.wait(30)
        return self.function(x, list(prompts))


def means(x: torch.Tensor, prompts: list[str]) -> Any:
    return x.float().mean((1, 2, 3)).numpy()


def app_of(model: Any, **bounds: Any) -> Any:
    usual = {"batch": 8, "limit": 64, "request_mib": 1, "waiting_mib": 8, "side": 256}
    return serve.make_app({"mine": model}, **{"token": None, **usual, **bounds})


def asked(x: torch.Tensor, **more: Any) -> dict[str, Any]:
    raw = text_of(x.numpy().tobytes())
    request = {"reward": "mine", "prompts": ["a"] * len(x), "raw": raw, "shape": list(x.shape)}
    return {**request, **more}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, bits: int = 8) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))


def png(*chunks: bytes) -> str:
    return text_of(b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b""))


@contextmanager
def served(app: Any, port: int | None = None) -> Iterator[int]:
    port = port or free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def exchange(port: int, head: str, body: bytes = b"", *, wait: float = 10.0) -> bytes:
    """What the server sends back before the time is over or it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as line:
        line.sendall(f"POST {SCORE} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
        return line.recv(65536)


def refuse(error: BaseException) -> Any:
    def function(x: torch.Tensor, prompts: list[str]) -> Any:
        if "bad" in prompts:
            raise error
        return means(x, prompts)

    return function


@pytest.mark.parametrize(
    ("function", "told", "reason"),
    [
        (refuse(UserError("no such word")), UserError, "no such word"),
        (refuse(ValueError("odd")), RewardFailedError, "ValueError: odd"),
        (refuse(SystemExit("license")), RewardFailedError, "SystemExit: license"),
        (refuse(KeyboardInterrupt()), RewardFailedError, "KeyboardInterrupt"),
        (refuse(MemoryError("all")), RewardFailedError, "MemoryError: all"),
        (refuse(torch.OutOfMemoryError("gpu")), RewardFailedError, "OutOfMemoryError: gpu"),
        (lambda x, p: means(x, p)[: 1 if "bad" in p else None], UserError, "returned 1 numbers"),
    ],
)
def test_only_the_request_that_fails_alone_fails(function, told, reason):
    model = Mine(function)
    batcher = Batcher("mine", model, 8, 64)
    x = images(2, 8)
    right = means(x, []).tolist()
    model.gate.clear()
    first = batcher.submit(x[:1], ["first"])
    wait_for(lambda: bool(model.calls))
    waiting = [batcher.submit(x, ["a", name]) for name in ("b", "bad", "c")]
    model.gate.set()
    for request in (waiting[0], waiting[2]):
        assert request.result(30) == pytest.approx(right)
    with pytest.raises(told, match=reason):
        waiting[1].result(30)
    assert ["a", "b", "a", "bad", "a", "c"] in model.calls  # they were together
    assert first.result(30) == pytest.approx(right[:1])
    assert batcher.submit(x, ["d", "e"]).result(30) == pytest.approx(right)  # the thread lives
    assert batcher.count == 0


def test_where_memory_ends_halves_are_scored(capsys):
    def small(x: torch.Tensor, prompts: list[str]) -> Any:
        if len(x) > 3:
            raise torch.OutOfMemoryError("too much")
        return means(x, prompts)

    batcher = Batcher("mine", Mine(small), 64, 64)
    x = images(13, 8)
    for _ in range(2):
        found = batcher.submit(x, [str(n) for n in range(13)]).result(30)
        assert found == pytest.approx(means(x, []).tolist())
    said = capsys.readouterr().err
    assert said == "serve-rewards: mine: no memory for 13 images at once, so by halves; " + (
        "lower --batch, or `batch` of the reward\n"
    )


def test_a_batch_is_not_exceeded_and_sizes_stay_apart():
    model = Mine(means)
    batcher = Batcher("mine", model, 4, 64)
    model.gate.clear()
    sizes = [(1, 8), (3, 8), (1, 8), (1, 8), (1, 16), (9, 16)]
    waiting = []
    for count, side in sizes:
        waiting.append(batcher.submit(images(count, side), [f"{side}"] * count))
        wait_for(lambda: bool(model.calls))
    model.gate.set()
    for request, (count, side) in zip(waiting, sizes, strict=True):
        assert request.result(30) == pytest.approx(means(images(count, side), []).tolist())
    assert [len(call) for call in model.calls] == [1, 4, 1, 1, 9]


TWO_SIZES = png(header(8, 8), header(200, 200), chunk(b"IDAT", zlib.compress(bytes(200 * 601))))
PNG = text_of(png_of(images(1)[0]))
CUT = text_of(png_of(images(1, 16)[0])[:-40])
MALFORMED: list[tuple[bytes | dict[str, Any], int, str]] = [
    (b"", 422, "JSON"),
    (b"[" * 100_000, 422, "JSON"),
    (b'{"a":' * 100_000, 422, "JSON"),
    (b'{"reward": "mine", "prompts": ["\\ud800"]}', 422, "JSON"),
    (b'{"reward": "mine\xff"}', 422, "JSON"),
    (b"[" + b"," * 2**20, 422, "parts"),
    ({"png": [PNG]}, 422, "either"),
    ({"prompts": ["a", "b"]}, 422, "1 images for 2 prompts"),
    ({"raw": "A" * 255 + "!"}, 422, "base64"),
    ({"raw": "", "png": ["not base64!"]}, 422, "base64"),
    ({"shape": [1, 4, 8, 6]}, 422, "shape"),
    ({"shape": [1, 3, 8, 10**9]}, 422, "shape"),
    ({"prompts": 3}, 422, "prompts: Input should be a valid array"),
    ({"prompts": [1] * 1000}, 422, "prompts.0: Input should be a valid string"),
    ({"prompts": []}, 422, "prompts"),
    ({"prompts": ["a" * 70_000]}, 422, "prompts.0"),
    ({"reward": ["x"]}, 422, "reward"),
    ({"reward": "x" * 1000}, 404, "no reward"),
    ({"shape": [1, 3, True, 8]}, 422, "shape.2"),
    ({"shape": [1, 3, 8.0, 8]}, 422, "shape.2"),
    ({"shape": ["1", 3, 8, 8]}, 422, "shape.0"),
    ({"shape": [1, 3, 0, 8]}, 422, "shape.2"),
    ({"shape": [1, 3, 8]}, 422, "shape"),
    ({"shape": [1, 3, 8, float("nan")]}, 422, "shape"),
    ({"shape": [1, 3, 8, 9]}, 422, "raw: 192 bytes for shape"),
    ({"raw": "\u00e9" * 256}, 422, "ASCII"),
    ({"raw": 7}, 422, "raw"),
    ({"raw": "", "png": [png(header(0, 8))]}, 422, "without pixels"),
    ({"raw": "", "png": [png(header(8, 8, bits=16))]}, 422, "16 bits"),
    ({"raw": "", "png": [png(header(8, 8))]}, 422, "damaged"),
    ({"raw": "", "png": [TWO_SIZES]}, 422, "damaged"),
    ({"raw": "", "png": [CUT]}, 422, "damaged"),
    ({"raw": "", "png": ["AAAA"]}, 422, "no PNG"),
    ({"raw": "", "png": [None]}, 422, "png.0"),
    (
        {"raw": "", "png": [png(header(8, 8)), png(header(9, 8))], "prompts": ["a", "b"]},
        422,
        "different sizes",
    ),
    # too large, said before anything is decoded: none of these can be
    ({"raw": "", "png": [png(header(4096, 8))]}, 413, "--side"),
    ({"raw": "", "png": [png(header(256, 256))] * 11, "prompts": ["a"] * 11}, 413, "--request-mib"),
    ({"raw": "", "png": ["?"] * 65, "prompts": ["a"] * 65}, 413, "--limit"),
    (b"a" * (2**21 + 1), 413, "--request-mib"),
]


def test_malformed_requests_are_refused_in_few_words():
    """Nothing is echoed, and the client of these tests raises what the app does not catch."""
    x = images(1, 8)
    with TestClient(app_of(Mine(means), request_mib=2)) as http:
        for given, status, reason in MALFORMED:
            body = given if isinstance(given, bytes) else json.dumps(asked(x, **given)).encode()
            answer = http.post(SCORE, content=body)
            assert (answer.status_code, reason in answer.text) == (status, True), (
                body[:200],
                answer.status_code,
                answer.text,
            )
            assert len(answer.text) < 300
        assert http.post(SCORE, json=asked(x)).json()["scores"] == pytest.approx(means(x, []))
        assert http.get("/health").json()["waiting"] == 0


def test_png_of_other_modes_are_taken_as_rgb_and_no_number_is_null():
    pngs, wanted = [], []
    for mode in ("L", "LA", "P", "RGBA", "1", "RGB"):
        picture = Image.fromarray(images(1, 16)[0].permute(1, 2, 0).numpy()).convert(mode)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        pngs.append(text_of(buffer.getvalue()))
        wanted.append(float(np.array(picture.convert("RGB")).mean()))
    prompts = [""] * 6 + ["nan", "inf", "-inf"]
    request = {"reward": "mine", "prompts": prompts, "png": pngs + pngs[:3]}
    model = Mine(lambda x, texts: [float(t or m) for t, m in zip(texts, means(x, []), strict=True)])
    with TestClient(app_of(model, batch=9)) as http:
        found = http.post(SCORE, json=request).json()["scores"]
    assert found[:6] == pytest.approx(wanted)
    assert found[6:] == [None] * 3


def test_waiting_work_is_bounded_by_its_bytes():
    """Bodies and images of all requests; 503 says when to come again, and then they are taken."""
    model = Mine(means)
    x = images(4, 200)  # 0.46 MiB, and while it is read 0.61 MiB of text
    with TestClient(app_of(model, waiting_mib=2)) as http:
        model.gate.clear()
        answers: list[Any] = []
        threads = []
        for _ in range(2):
            ask = threading.Thread(target=lambda: answers.append(http.post(SCORE, json=asked(x))))
            ask.start()
            threads.append(ask)
            wait_for(lambda: http.get("/health").json()["waiting"] == 4 * len(threads))
        refused = http.post(SCORE, json=asked(x))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        model.gate.set()
        for ask in threads:
            ask.join(30)
        assert [a.status_code for a in answers] == [200, 200]
        for _ in range(5):
            assert http.post(SCORE, json=asked(x)).status_code == 200
    with TestClient(app_of(model, request_mib=4, waiting_mib=1)) as http:
        never = http.post(SCORE, json=asked(x))
    assert never.status_code == 413
    assert "--waiting-mib" in never.text


TOO_LONG = f"Content-Length: {10**12}"


def test_no_body_is_read_without_token_or_room():
    """The server answers although the body never comes, or does not end."""
    app = app_of(Mine(means), token="secret")
    allowed = "Authorization: Bearer secret"
    endless = (b"%x\r\n" % 2**16 + bytes(2**16) + b"\r\n") * 20
    with served(app) as port:
        assert b" 401 " in exchange(port, TOO_LONG)
        assert b" 401 " in exchange(port, "Transfer-Encoding: chunked", endless)
        assert b" 401 " in exchange(port, f"Authorization: Bearer s\u00e9cret\r\n{TOO_LONG}")
        assert b" 413 " in exchange(port, f"{allowed}\r\n{TOO_LONG}")
        assert b" 413 " in exchange(port, f"{allowed}\r\nTransfer-Encoding: chunked", endless)
        assert b" 422 " in exchange(port, f"{allowed}\r\nContent-Length: 1", b"{{{{")


def test_a_body_that_does_not_come_is_given_up(monkeypatch, capfd):
    monkeypatch.setattr(serve, "READING", 0.2)
    with served(app_of(Mine(means), waiting_mib=1)) as port:
        for _ in range(3):  # what it had announced is free again
            assert b" 408 " in exchange(port, "Content-Length: 900000", b"{")
        with socket.create_connection(("127.0.0.1", port)) as line:  # and here the client leaves
            line.sendall(f"POST {SCORE} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode())
        x = images(1, 8)
        found = httpx2.post(f"http://127.0.0.1:{port}{SCORE}", json=asked(x))
        assert found.json()["scores"] == pytest.approx(means(x, []))
    assert "Traceback" not in capfd.readouterr().err


def test_abandoned_requests_wait_within_the_limit_and_are_not_scored():
    model = Mine(means)
    x = images(2, 8)
    with served(app_of(model, limit=6)) as port:
        url = f"http://127.0.0.1:{port}"
        model.gate.clear()
        for name in "abc":
            with pytest.raises(httpx2.TimeoutException):
                httpx2.post(f"{url}{SCORE}", json=asked(x, prompts=[name, name]), timeout=0.5)
        assert httpx2.post(f"{url}{SCORE}", json=asked(x)).status_code == 503
        model.gate.set()
        wait_for(lambda: httpx2.get(f"{url}/health").json()["waiting"] == 0)
        assert httpx2.post(f"{url}{SCORE}", json=asked(x)).status_code == 200
    assert model.calls == [["a", "a"], ["a", "a"]]


# -- the client of such an app -------------------------------------------------------------------


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("egrpo.rewards.http.LONGEST_WAIT", 0.01)


@pytest.mark.usefixtures("_no_waiting")
@pytest.mark.parametrize(
    ("failures", "error", "told", "calls"),
    [
        (1, RuntimeError, None, 2),
        (TRIES, RuntimeError, r"HTTP 500: .*cuDNN is in a mood.*in vain", TRIES),
        (1, UserError, r"HTTP 422: .*cuDNN is in a mood", 1),
    ],
)
def test_a_reward_that_fails_is_asked_again_a_few_times_and_one_that_refuses_is_not(
    failures, error, told, calls, capsys
):
    def fails_at_first(x: torch.Tensor, prompts: list[str]) -> Any:
        if len(model.calls) <= failures:
            raise error("cuDNN is in a mood")
        return means(x, prompts)

    model, x = Mine(fails_at_first), images(1, 8)
    with served(app_of(model)) as port:
        if told is None:
            assert client(port).score(x, ["a"]) == pytest.approx(means(x, []))
        else:
            with pytest.raises(UserError, match=told):
                client(port).score(x, ["a"])
    assert len(model.calls) == calls
    said = "serve-rewards: mine: RuntimeError: cuDNN is in a mood (test_serve.py, line "
    assert (said in capsys.readouterr().err) is (error is RuntimeError)


@pytest.mark.parametrize("bounds", [{"limit": 3}, {"request_mib": 1}])
def test_a_batch_too_large_for_the_service_is_split(bounds, capsys):
    x = images(13, 150)
    with served(app_of(Mine(means), **bounds)) as port:
        asks = client(port, concurrency=1, encoding="raw")
        for _ in range(2):
            assert asks.score(x, ["a"] * 13) == pytest.approx(means(x, []))
        said = capsys.readouterr().err
        found = re.findall(r"HTTP 413: .*; from now on at most (\d) images at once", said)
        assert found == (["6", "3"] if "limit" in bounds else ["6"])  # and then never again
        if "request_mib" in bounds:
            match = r"an image of 256x700 pixels is too large for it: HTTP 413: .*--side"
            with pytest.raises(UserError, match=match):
                asks.score(torch.zeros(2, 3, 700, 256, dtype=torch.uint8), ["a"] * 2)


@pytest.mark.parametrize(
    "scores",
    ['["1"]', "[true]", "[[1]]", '{"1": 2}', '"1"', "1", "null", "[1, 2]", "[1" + "0" * 400 + "]",
     "[" * 100_000 + "]" * 100_000],
)  # fmt: skip
def test_an_answer_of_other_things_than_numbers_is_refused(scores):
    told = pytest.raises(UserError, match=r"answered .* scores")
    with answering(lambda *_: (200, f'{{"scores": {scores}}}')) as (url, _), told:
        client((url, None)).score(images(1, 8), ["a"])


@pytest.mark.parametrize("text", ["", " \n", "t\u00f6ken", "one\ntwo"])
def test_a_token_that_no_header_can_hold_is_refused(tmp_path, text):
    (tmp_path / "token").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"token_file: .*: a token of printable ASCII"):
        client(("http://127.0.0.1:9", str(tmp_path / "token")))


def test_an_open_address_needs_a_token():
    done = CliRunner().invoke(main, [*SERVE[3:], "--host", "0.0.0.0"])
    assert done.exit_code == 2
    assert "--host 0.0.0.0: others can reach it; give --token-file" in done.output


def test_this_machine_is_asked_without_the_proxy(service, monkeypatch):
    """Proxy variables of a company's network: rewards and tracking servers here are not there."""
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.com")
    address = f"{service[0]}/health"
    with pytest.raises(httpx2.TransportError):
        httpx2.get(address, timeout=5)
    CliRunner().invoke(main, ["plan"], catch_exceptions=False)
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "example.com,localhost,127.0.0.1,::1"
    assert httpx2.get(address, timeout=5).status_code == 200
    assert requests.get(address, timeout=5).status_code == 200  # as MLflow asks
    assert urllib.request.urlopen(address, timeout=5).status == 200
    assert urllib.request.getproxies()["http"] == "http://127.0.0.1:9", "others still go there"
