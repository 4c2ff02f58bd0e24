"""One server for all tests of a file that need nothing special of it."""

from collections.abc import Iterator

import httpx2
import pytest

from maxlike.serve.service import Service
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import serving


@pytest.fixture(scope="module")
def _shared() -> Iterator[tuple[FakeEngine, httpx2.Client, Service]]:
    engine = FakeEngine()
    with serving(engine) as (client, service):
        yield engine, client, service


@pytest.fixture
def engine(_shared: tuple[FakeEngine, httpx2.Client, Service]) -> Iterator[FakeEngine]:
    """The engine of the server, as new."""
    engine = _shared[0]
    engine.reset()
    yield engine
    engine.reset()


@pytest.fixture
def client(_shared: tuple[FakeEngine, httpx2.Client, Service], engine: FakeEngine) -> httpx2.Client:
    """A client of the server."""
    return _shared[1]


@pytest.fixture
def service(_shared: tuple[FakeEngine, httpx2.Client, Service], engine: FakeEngine) -> Service:
    """The server's own side."""
    return _shared[2]
