"""From what became of each request to figures: latencies, throughput, goodput, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from maxlike.bench.client import RequestRecord
from maxlike.bench.load import Load

_PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99}
_OBJECTIVES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Distribution:
    """Of latencies, in milliseconds; percentiles are interpolated linearly between the two nearest."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Distribution | None:
        """The distribution of times that are given in seconds; `None` of none."""
        values = np.asarray(list(seconds), np.float64) * 1e3
        if values.size == 0:
            return None
        percentiles = dict(zip(_PERCENTILES, np.percentile(values, list(_PERCENTILES.values())).tolist(), strict=True))
        return cls(mean=float(values.mean()), max=float(values.max()), **percentiles)


@dataclass(frozen=True)
class Objectives:
    """What a request must keep to count as good, in milliseconds; `None`: no matter (Zhong et al. 2024,
    https://arxiv.org/abs/2401.09670, whose word goodput is)."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objectives:
        """The objectives in `text`, as `ttft:500,tpot:50`.

        Raises:
            ValueError: one is not known, given twice, or not a time above 0.
        """
        limits: dict[str, float] = {}
        for item in text.split(","):
            name, _, limit = item.strip().partition(":")
            try:
                milliseconds = float(limit)
            except ValueError:
                milliseconds = math.nan
            if name not in _OBJECTIVES or name in limits or not 0 < milliseconds < math.inf:
                raise ValueError("Objectives are given once each, in milliseconds, as ttft:500,tpot:50,e2e:10000; got "
                                 f"{text!r}.")
            limits[name] = milliseconds
        return cls(**limits)

    def kept_by(self, record: RequestRecord) -> bool:
        """Whether a request that succeeded keeps them all; an output of one token has no time a token to keep."""
        for name in _OBJECTIVES:
            limit, took = getattr(self, name), getattr(record, name)
            if limit is not None and took is not None and took * 1e3 > limit:
                return False
        return True

    def __str__(self) -> str:
        return ", ".join(f"{name} {limit:g} ms" for name in _OBJECTIVES if (limit := getattr(self, name)) is not None)


@dataclass(frozen=True)
class ErrorCount:
    """How many requests failed in one way, and what one of them said."""

    kind: str
    count: int
    example: str


@dataclass(frozen=True)
class LevelFigures:
    """What one load gave. Tokens and latencies are of the requests that succeeded.

    Args:
        load: how requests came.
        duration_s: from the first request to the end of the last.
        sent, completed, failed: requests; `rejected` are those of the failed that the server turned away (HTTP 429).
        errors: of the failed, the most frequent kind first.
        prompt_tokens, cached_prompt_tokens, output_tokens: in all; the second are those of the first that came from
            the server's prefix cache, as far as it says.
        without_usage: completed requests of which the server did not count the tokens; their pieces are counted
            instead.
        tokens_per_piece: output tokens over pieces of text; `None` without any piece.
        requests_per_s, prompt_tokens_per_s, output_tokens_per_s: over `duration_s`.
        goodput_requests_per_s: of requests that keep the objectives; `None` without any.
        good_share: of the requests sent; `None` likewise.
        ttft_ms: to the first piece of text.
        tpot_ms: a token after the first, a figure a request.
        itl_ms: between two pieces, of all requests together.
        e2e_ms: to the end of the output.
        send_delay_ms: by which requests were sent late: the load generator's own.
        client_cpu_share: of `duration_s`, in which the load generator computed. It has one thread: near 1, it is what
            was measured.
    """

    load: Load
    duration_s: float
    sent: int
    completed: int
    failed: int
    rejected: int
    errors: tuple[ErrorCount, ...]
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int
    without_usage: int
    tokens_per_piece: float | None
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    goodput_requests_per_s: float | None
    good_share: float | None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    send_delay_ms: Distribution | None
    client_cpu_share: float

    @classmethod
    def of(cls, load: Load, records: Sequence[RequestRecord], objectives: Objectives | None = None,
           client_cpu_s: float = 0.0) -> LevelFigures:
        """The figures of `records`, one at least, for which the load generator computed `client_cpu_s` seconds."""
        good = [record for record in records if record.error is None]
        start, end = min(record.sent for record in records), max(record.finished for record in records)
        duration = end - start
        pieces, output = sum(len(record.chunks) for record in good), sum(record.output_tokens for record in good)
        prompt = sum(record.prompt_tokens for record in good)
        kept = None if objectives is None else sum(map(objectives.kept_by, good))

        def rate(n: float) -> float:
            return n / duration if duration > 0 else 0.0

        return cls(
            load=load,
            duration_s=duration,
            sent=len(records),
            completed=len(good),
            failed=len(records) - len(good),
            rejected=sum(record.error == "HTTP 429" for record in records),
            errors=_errors(records),
            prompt_tokens=prompt,
            cached_prompt_tokens=sum(record.cached_tokens for record in good),
            output_tokens=output,
            without_usage=sum(not record.has_usage for record in good),
            tokens_per_piece=output / pieces if pieces else None,
            requests_per_s=rate(len(good)),
            prompt_tokens_per_s=rate(prompt),
            output_tokens_per_s=rate(output),
            goodput_requests_per_s=None if kept is None else rate(kept),
            good_share=None if kept is None else kept / len(records),
            ttft_ms=Distribution.of(record.ttft for record in good),
            tpot_ms=Distribution.of(record.tpot for record in good if record.tpot is not None),
            itl_ms=Distribution.of(later - earlier for record in good
                                   for earlier, later in itertools.pairwise(record.chunks)),
            e2e_ms=Distribution.of(record.e2e for record in good),
            send_delay_ms=Distribution.of(record.sent - record.due for record in records),
            client_cpu_share=rate(client_cpu_s),
        )

    def as_json(self) -> dict[str, Any]:
        """The figures for JSON, which knows no infinity: an infinite rate is the text `inf`."""
        values = asdict(self)
        load = values.pop("load")
        if load["request_rate"] is not None and math.isinf(load["request_rate"]):
            load["request_rate"] = "inf"
        return {**load, **values}


def _errors(records: Sequence[RequestRecord]) -> tuple[ErrorCount, ...]:
    first: dict[str, RequestRecord] = {}
    counts: dict[str, int] = {}
    for record in records:
        if record.error is not None:
            first.setdefault(record.error, record)
            counts[record.error] = counts.get(record.error, 0) + 1
    return tuple(ErrorCount(kind, counts[kind], first[kind].message)
                 for kind in sorted(counts, key=lambda kind: (-counts[kind], kind)))
