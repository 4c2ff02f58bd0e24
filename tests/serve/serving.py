"""A server in a thread of the test's process, at a port of its own."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn

from maxlike.serve.app import make_app
from maxlike.serve.config import ServeConfig
from maxlike.serve.server import bind
from maxlike.serve.service import Service
from tests.serve.fake_engine import CHATML, FakeEngine


@contextmanager
def serving(
    engine: FakeEngine, *, chat_template: str | None = CHATML, tool_format: str | None = "hermes", **config: Any
) -> Iterator[tuple[httpx2.Client, Service]]:
    """A client of a server over `engine`, and the server's own side."""
    if chat_template is not None and engine.tokenizer is not None:
        engine.tokenizer.chat_templates["default"] = chat_template
    settings = ServeConfig(port=0, **({"served_model_name": "tiny"} | config))
    service = Service(engine, settings, tool_format)  # type: ignore[arg-type]
    bound = bind(settings)
    server = uvicorn.Server(uvicorn.Config(make_app(service), lifespan="off", ws="none", log_level="warning",
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        until(lambda: server.started)
        with httpx2.Client(base_url=f"http://127.0.0.1:{bound.getsockname()[1]}", timeout=20) as client:
            yield client, service
    finally:
        engine.may_go_on.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def until(condition: Any, seconds: float = 20) -> None:
    """Waits for `condition()`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)
