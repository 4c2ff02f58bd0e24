"""When requests are due."""

import math

import numpy as np
import pytest

from maxlike.bench.load import Load, parse_loads


def gaps(rate: float, burstiness: float, n: int = 20_000) -> np.ndarray:
    arrivals = Load(rate, burstiness=burstiness).arrivals(n, np.random.default_rng(3))
    assert arrivals.shape == (n,)
    assert arrivals[0] == 0
    return np.diff(arrivals)


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 8.0])
@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_gaps_have_the_rate_and_the_spread(rate: float, burstiness: float) -> None:
    between = gaps(rate, burstiness)
    assert (between >= 0).all()
    assert between.mean() == pytest.approx(1 / rate, rel=0.01)
    # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
    assert between.std() / between.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_poisson_by_its_counts() -> None:
    arrivals = np.cumsum(gaps(10.0, 1.0))
    counts = np.bincount(arrivals.astype(int))[:-1]  # in each second; the last one is cut off
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.15)  # as nothing but a Poisson process has it
    assert np.mean(gaps(10.0, 1.0) > 0.1) == pytest.approx(math.exp(-1), abs=0.02)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_few_requests_come_at_the_rate_too(n: int) -> None:
    lasts = [Load(2.0).arrivals(n, np.random.default_rng(seed))[-1] for seed in range(4000)]
    assert max(lasts) < n / 2  # all within n / rate seconds
    # The last of n - 1 points that are uniform in n / rate seconds.
    assert np.mean(lasts) == pytest.approx(n / 2 * (n - 1) / n, abs=0.05)


def test_all_at_once() -> None:
    assert Load(math.inf).arrivals(3, np.random.default_rng(0)).tolist() == [0, 0, 0]


def test_tiny_shapes_are_one_burst() -> None:
    arrivals = Load(1.0, burstiness=1e-9).arrivals(5, np.random.default_rng(0))
    assert np.isfinite(arrivals).all()


def test_seeded() -> None:
    first, again, other = (Load(5.0).arrivals(50, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_parsed() -> None:
    assert parse_loads("1,2.5,inf", None, 0.5) == [Load(rate, burstiness=0.5) for rate in (1, 2.5, math.inf)]
    assert parse_loads(None, "1,64") == [Load(concurrency=1), Load(concurrency=64)]
    assert parse_loads(None, None) == [Load(math.inf)]
    assert [load.label for load in parse_loads("0.5,inf", None)] == ["0.5 req/s", "all at once"]
    assert parse_loads(None, "8")[0].label == "8 at a time"


@pytest.mark.parametrize(
    ("rates", "concurrencies", "burstiness", "told"),
    [
        ("1", "2", 1.0, "exclude each other"),
        ("", None, 1.0, "--request-rate : numbers with commas"),
        ("1,,2", None, 1.0, "numbers with commas"),
        ("0", None, 1.0, "above 0"),
        ("-1", None, 1.0, "above 0"),
        ("nan", None, 1.0, "above 0"),
        (None, "0", 1.0, "at least 1"),
        (None, "1.5", 1.0, "--concurrency 1.5: numbers"),
        (None, "inf", 1.0, "numbers with commas"),
        ("1", None, 0.0, "burstiness must be above 0"),
        ("1", None, math.nan, "burstiness must be above 0"),
        (None, "2", 0.5, "Burstiness is of arrivals at a rate"),
    ],
)
def test_refused(rates: str | None, concurrencies: str | None, burstiness: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_loads(rates, concurrencies, burstiness)
