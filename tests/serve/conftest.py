"""Servers and clients that several files use."""

from collections.abc import Iterator

import httpx2
import pytest

from maxlike.serve.service import Service
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import serving


@pytest.fixture
def engine() -> FakeEngine:
    """An engine that says " hello world"."""
    return FakeEngine()


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[tuple[httpx2.Client, Service]]:
    """A server over it."""
    with serving(engine) as started:
        yield started


@pytest.fixture
def client(server: tuple[httpx2.Client, Service]) -> httpx2.Client:
    """A client of that."""
    return server[0]
