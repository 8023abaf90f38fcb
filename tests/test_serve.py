"""`egrpo serve-rewards` as a real process, and the remote reward as its client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import requests
import torch
from click.testing import CliRunner
from conftest import ROOT, small_run

from egrpo.cli import main
from egrpo.config.rewards import Remote as Settings
from egrpo.errors import UserError
from egrpo.rewards import load_rewards
from egrpo.rewards.http import text_of
from egrpo.rewards.network import png_of
from egrpo.rewards.remote import Remote
from egrpo.stages import serve

PROMPTS = ["two red circles", "", "a blue square — ünïcode"]


def images(count: int, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(port: int, *words: str) -> subprocess.Popen[str]:
    serve = [sys.executable, "-m", "egrpo", "serve-rewards", "config/config.yaml"]
    job = subprocess.Popen(
        [*serve, "--port", str(port), "--device", "cpu", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        try:
            httpx2.get(f"http://127.0.0.1:{port}/health", timeout=5)
            return job
        except httpx2.TransportError:
            assert job.poll() is None, job.stderr.read() if job.stderr else ""
            time.sleep(0.1)
    raise AssertionError("the service did not start")


def stop(job: subprocess.Popen[str]) -> None:
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=30)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Address and token file of a running service."""
    token = tmp_path_factory.mktemp("serve") / "token"
    token.write_text("secret\n")
    port = free_port()
    before = os.getcwd()
    os.chdir(ROOT)
    job = start(port, "--token-file", str(token))
    os.chdir(before)
    yield f"http://127.0.0.1:{port}", str(token)
    stop(job)


def client(service: tuple[str, str], reward: str, **more: Any) -> Remote:
    given = {"kind": "remote", "url": service[0], "token_file": service[1], "reward": reward}
    return Remote(Settings.model_validate({**given, "patience": 5.0, **more}))


@pytest.mark.parametrize("encoding", ["png", "raw"])
@pytest.mark.parametrize("reward", ["clip", "preference", "jpeg"])
def test_remote_scores_are_the_local_ones(
    service: tuple[str, str], reward: str, encoding: str
) -> None:
    local = load_rewards({reward: small_run().rewards[reward]}, "cpu")[reward]
    x, prompts = images(9), PROMPTS * 3
    found = client(service, reward, encoding=encoding, batch=4, concurrency=3).score(x, prompts)
    np.testing.assert_allclose(found, local.score(x, prompts), rtol=1e-5, atol=1e-6)


def test_health_and_refusals(service: tuple[str, str]) -> None:
    url, _ = service
    assert "clip" in httpx2.get(f"{url}/health").json()["rewards"]
    assert httpx2.post(f"{url}/score", json={}).status_code == 401
    header = {"Authorization": "Bearer secret"}
    png, raw = text_of(png_of(images(1)[0])), text_of(bytes(12))
    bad: list[tuple[dict[str, Any], str]] = [
        ({"reward": "nothing", "png": [png]}, "no reward"),
        ({"reward": "clip"}, "either"),
        ({"reward": "clip", "png": [png, png]}, "2 images for 1 prompts"),
        ({"reward": "clip", "png": ["not base64!"]}, "base64"),
        ({"reward": "clip", "png": [text_of(b"\x89PNG no")]}, "png"),
        ({"reward": "clip", "raw": raw, "shape": [1, 3, 2, 3]}, "12 bytes"),
        ({"reward": "clip", "raw": raw, "shape": [1, 4, 1, 3]}, "shape"),
        ({"reward": "clip", "raw": raw, "shape": [1, 3, 2, 10**9]}, "shape"),
        ({"reward": "clip", "png": [png], "prompts": "one"}, "prompts"),
    ]
    for request, reason in bad:
        given = {"prompts": ["a"], **request}
        answer = httpx2.post(f"{url}/score", json=given, headers=header)
        assert answer.status_code in (404, 422), (request, answer.text)
        assert reason in answer.text
    with pytest.raises(UserError, match=r"HTTP 404: .*no reward 'nothing'"):
        client(service, "nothing").score(images(1), ["a"])


def test_wrong_token_is_one_line(service: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("guess")
    with pytest.raises(UserError, match="HTTP 401"):
        client((service[0], str(tmp_path / "token")), "clip").score(images(1), ["a"])


def test_a_dead_service_pauses_and_goes_on(capsys: Any) -> None:
    """Down at first, up after some seconds: the scores come, and the wait was said."""
    port = free_port()
    address = (f"http://127.0.0.1:{port}", None)
    found: list[Any] = []
    waiting = client(address, "jpeg", patience=60.0)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: found.append(waiting.score(images(3), PROMPTS)))
    thread.start()
    time.sleep(1)
    assert not found
    job = start(port, "--reward", "jpeg")
    thread.join(timeout=60)
    stop(job)
    assert np.isfinite(found[0]).all()
    assert "waiting, up to 60 s" in capsys.readouterr().err


def test_patience_ends_in_one_line() -> None:
    with pytest.raises(UserError, match=r"away for more than 0\.5 s: ConnectError"):
        client((f"http://127.0.0.1:{free_port()}", None), "jpeg", patience=0.5).score(  # type: ignore[arg-type]
            images(1), ["a"]
        )


class Slow:
    """A reward that takes its time, counts its calls, and fails for black images."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def score(self, x: torch.Tensor, prompts: Any) -> Any:
        self.sizes.append(len(x))
        time.sleep(0.2)
        scores = x.float().mean((1, 2, 3)).numpy()
        return np.where(scores == 0, np.nan, scores)


def test_waiting_requests_are_scored_together_and_too_many_are_refused() -> None:
    from fastapi.testclient import TestClient

    model = Slow()
    app = serve.make_app({"slow": model}, token=None, batch=8, limit=6)
    answers: list[Any] = []
    x = images(2, 16)
    x[1] = 0
    request = {
        "reward": "slow",
        "prompts": ["a", "b"],
        "raw": text_of(x.numpy().tobytes()),
        "shape": [2, 3, 16, 16],
    }
    with TestClient(app) as http:

        def ask() -> None:
            answers.append(http.post("/score", json=request))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
    codes = sorted(a.status_code for a in answers)
    assert codes == [200, 200, 200, 503, 503]
    assert max(model.sizes) == 4  # the second and third request together
    for answer in answers:
        if answer.status_code == 200:
            first, second = answer.json()["scores"]
            assert first == pytest.approx(float(x[0].float().mean()), rel=1e-6)
            assert second is None


def test_an_open_address_needs_a_token() -> None:
    command = [sys.executable, "-m", "egrpo", "serve-rewards", "config/config.yaml"]
    done = subprocess.run(
        [*command, "--host", "0.0.0.0"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "--host 0.0.0.0: others can reach it; give --token-file" in done.stderr


def test_this_machine_is_asked_without_the_proxy(
    service: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
