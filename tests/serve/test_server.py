"""The process: where it listens, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from maxlike.serve.config import ServeConfig
from maxlike.serve.server import bind
from tests.serve.serving import until

ROOT = Path(__file__).resolve().parents[2]
_PROGRAM = """
import sys
from maxlike.serve.config import ServeConfig
from maxlike.serve.server import bind, run_server
from maxlike.serve.service import Service
from tests.serve.fake_engine import FakeEngine

class Slow(FakeEngine):
    '''Goes on once the file is there.'''
    async def generate(self, *args, **kwargs):
        import asyncio, os
        async for step in super().generate(*args, **kwargs):
            yield step
            while not os.path.exists(sys.argv[1]):
                await asyncio.sleep(0.01)

config = ServeConfig(port=0, served_model_name="tiny", drain_timeout=float(sys.argv[2]))
sys.exit(run_server(Service(Slow(), config), bind(config)))
"""


@contextmanager
def started(go_on: Path, drain_timeout: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process and URL."""
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(go_on), str(drain_timeout)], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"maxlike: tiny is served at (http://127\.0\.0\.1:\d+)\n", line)
        assert found, (line, process.communicate(timeout=20))
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class Asking(threading.Thread):
    """A client in a thread of its own."""

    def __init__(self, url: str, stream: bool):
        super().__init__()
        self.url, self.stream, self.text, self.status, self.begun = url, stream, "", 0, threading.Event()
        self.start()

    def run(self) -> None:
        body = {"prompt": "x", "stream": self.stream}
        with httpx2.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as reply:
            self.status = reply.status_code
            for chunk in reply.iter_text():
                self.begun.set()
                self.text += chunk


def running(url: str, n: int) -> bool:
    # Nothing says from outside how many are at work: that the second one is there shows in the figures.
    text = httpx2.get(f"{url}/metrics").text
    found = re.search(r"maxlike_time_to_first_token_seconds_count (\d+)", text)
    return found is not None and int(found[1]) == n


def test_the_first_signal_lets_running_requests_finish(tmp_path: Path) -> None:
    go_on = tmp_path / "go_on"
    with started(go_on, 60) as (process, url), httpx2.Client(base_url=url) as client:
        assert client.get("/ready").status_code == 200
        clients = [Asking(url, stream=True), Asking(url, stream=False)]
        until(lambda: running(url, 2))
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)
        assert client.get("/ready").json() == {"status": "draining"}
        assert client.get("/health").status_code == 200
        reply = client.post("/v1/completions", json={"prompt": "x"})
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "draining"
        assert reply.headers["retry-after"] == "1" and reply.headers["connection"] == "close"
        assert process.poll() is None
        go_on.touch()
        for asking in clients:
            asking.join(20)
        assert process.wait(20) == 0
        assert [asking.status for asking in clients] == [200, 200]
        assert clients[0].text.endswith("data: [DONE]\n\n") and '"finish_reason":"stop"' in clients[0].text
        assert " hello world" in clients[1].text


def test_time_to_finish_is_limited(tmp_path: Path) -> None:
    with started(tmp_path / "never", 0.3) as (process, url):
        clients = [Asking(url, stream=True), Asking(url, stream=False)]
        until(lambda: running(url, 2))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        for asking in clients:
            asking.join(20)
        assert clients[0].status == 200 and '"code":"draining"' in clients[0].text
        assert clients[1].status == 503 and '"code":"draining"' in clients[1].text
        assert process.stderr is not None and "2 requests were cut off" in process.stderr.read()


def test_a_signal_ends_it_when_nobody_reads_its_messages(tmp_path: Path) -> None:
    with started(tmp_path / "never", 0.3) as (process, url):
        asking = Asking(url, stream=True)
        until(asking.begun.is_set)
        assert process.stderr is not None
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        asking.join(20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_it_at_once(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path / "never", 60) as (process, url):
        asking = Asking(url, stream=True)
        until(asking.begun.is_set)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{url}/ready").status_code == 503)
        start = time.monotonic()
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert time.monotonic() - start < 10  # of the sixty that it would have
        asking.join(20)


def test_an_address_that_is_taken_is_told_at_once() -> None:
    with bind(ServeConfig(port=0)) as taken:
        taken.listen()
        with pytest.raises(ValueError, match=r"cannot have 127\.0\.0\.1:\d+: .*in use"):
            bind(ServeConfig(port=taken.getsockname()[1]))
    with pytest.raises(ValueError, match="cannot have no such host"):
        bind(ServeConfig(host="no such host"))


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        bound = bind(ServeConfig(host="::1", port=0))
    except ValueError as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with bound:
        assert bound.family == socket.AF_INET6
