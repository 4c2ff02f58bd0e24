"""How long prompts and outputs are: a distribution, as the command line states it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

_FORMS = "N, uniform:LOW:HIGH, normal:MEAN:STD or lognormal:MEAN:STD"


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, none below 1.

    Args:
        kind: `fixed`: all `first`; `uniform`: from `first` to `second`, both included; `normal` and `lognormal`: with
            mean `first` and standard deviation `second`, before lengths below 1 become 1.
        first, second: the parameters.

    Raises:
        ValueError: the parameters make no such distribution.
    """

    kind: Literal["fixed", "uniform", "normal", "lognormal"]
    first: float
    second: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.first) and math.isfinite(self.second)) or self.first < 1:
            raise ValueError(f"a length must be at least 1 token; got {self}.")
        if max(self.first, self.second) >= 2**31:
            raise ValueError(f"a length must be below 2**31 tokens; got {self}.")
        if self.kind in ("fixed", "uniform") and (self.first % 1 or self.second % 1):
            raise ValueError(f"a length is a whole number of tokens; got {self}.")
        if self.kind == "uniform" and self.second < self.first:
            raise ValueError(f"uniform lengths go from LOW to HIGH; got {self}.")
        if self.second < 0:
            raise ValueError(f"a standard deviation must be 0 or above; got {self}.")

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """The distribution that `text` states: `N`, `uniform:LOW:HIGH`, `normal:MEAN:STD` or `lognormal:MEAN:STD`.

        Raises:
            ValueError: it states none.
        """
        kind, *rest = text.split(":")
        try:
            if not rest:
                return cls("fixed", float(kind))
            if kind in ("uniform", "normal", "lognormal") and len(rest) == 2:
                return cls(kind, float(rest[0]), float(rest[1]))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"Lengths are given as {_FORMS}, in tokens; got {text!r}: {error}") from error
        raise ValueError(f"Lengths are given as {_FORMS}, in tokens; got {text!r}.")

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """`n` lengths, int64[n]."""
        if self.kind == "uniform":
            return rng.integers(int(self.first), int(self.second), size=n, endpoint=True)
        if self.kind == "normal":
            drawn = rng.normal(self.first, self.second, n)
        elif self.kind == "lognormal":
            # Of exp(N(mu, sigma)): mean = exp(mu + sigma^2 / 2), variance = (exp(sigma^2) - 1) mean^2.
            variance = math.log1p((self.second / self.first) ** 2)
            drawn = rng.lognormal(math.log(self.first) - variance / 2, math.sqrt(variance), n)
        else:
            drawn = np.full(n, self.first)
        return np.maximum(np.rint(drawn).astype(np.int64), 1)

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.first:.10g}"
        return f"{self.kind}:{self.first:.10g}:{self.second:.10g}"
