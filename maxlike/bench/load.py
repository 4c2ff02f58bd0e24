"""How requests arrive: at a rate, whatever the server does, or a fixed number under way at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Load:
    """One level of load; exactly one of `request_rate` and `concurrency` is given.

    Args:
        request_rate: requests a second, sent when they are due whether or not earlier ones are answered; infinite: all
            at once.
        concurrency: so many requests under way; the next is sent when one ends.
        burstiness: the shape of the gamma distribution of the times between arrivals: 1 is a Poisson process, less
            comes in bursts, more comes evenly.

    Raises:
        ValueError: neither or both are given, or one is not above 0.
    """

    request_rate: float | None = None
    concurrency: int | None = None
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        if (self.request_rate is None) == (self.concurrency is None):
            raise ValueError(f"A load is a request rate or a concurrency; got {self.request_rate} and "
                             f"{self.concurrency}.")
        if self.request_rate is not None and not self.request_rate > 0:
            raise ValueError(f"A request rate must be above 0 requests a second; got {self.request_rate}.")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"A concurrency must be at least 1; got {self.concurrency}.")
        if not (math.isfinite(self.burstiness) and self.burstiness > 0):
            raise ValueError(f"burstiness must be above 0, and finite; got {self.burstiness}.")

    @property
    def value(self) -> float:
        """The rate in requests a second, or the concurrency."""
        return self.request_rate if self.concurrency is None else self.concurrency  # type: ignore[return-value]

    @property
    def label(self) -> str:
        """The load in words, as `4 req/s`, `all at once` or `16 at a time`."""
        if self.concurrency is not None:
            return f"{self.concurrency} at a time"
        return f"{self.request_rate:g} req/s" if math.isfinite(self.value) else "all at once"

    def arrivals(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """When `n` requests of a rate are due, in seconds from the first, ascending, float64[n].

        The n times between arrivals are scaled to n / rate together, so that the rate is the one asked for however few
        requests there are. A Poisson process of which the number of arrivals is known is just so distributed.
        """
        assert self.request_rate is not None
        if math.isinf(self.request_rate):
            return np.zeros(n)
        gaps = rng.gamma(self.burstiness, size=n)
        total = gaps.sum()
        if total == 0:  # a tiny shape underflows: one burst
            return np.zeros(n)
        gaps *= n / self.request_rate / total
        return np.concatenate([[0.0], np.cumsum(gaps[:-1])])


def parse_loads(rates: str | None, concurrencies: str | None, burstiness: float = 1.0) -> list[Load]:
    """The loads that comma-separated `rates` or `concurrencies` list, in the order given; all at once without either.

    Raises:
        ValueError: both are given, or an item is not a load.
    """
    if rates is not None and concurrencies is not None:
        raise ValueError("A request rate and a concurrency exclude each other: give one of --request-rate and "
                         "--concurrency.")
    if concurrencies is not None and burstiness != 1.0:
        raise ValueError("Burstiness is of arrivals at a rate; with --concurrency a request is sent when one ends.")
    Load(1.0, burstiness=burstiness)  # which is told apart from a bad list
    try:
        if concurrencies is not None:
            return [Load(concurrency=int(item)) for item in concurrencies.split(",")]
        rates = "inf" if rates is None else rates
        return [Load(request_rate=float(item), burstiness=burstiness) for item in rates.split(",")]
    except ValueError as error:
        given = f"--concurrency {concurrencies}" if concurrencies is not None else f"--request-rate {rates}"
        raise ValueError(f"{given}: numbers with commas between them are expected, as 1,2,4"
                         f"{'' if concurrencies is not None else ',inf'} ({error})") from error
