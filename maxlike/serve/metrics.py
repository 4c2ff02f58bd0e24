"""What Prometheus reads: the engine's counts, and how long clients wait. Names are vLLM's, with our prefix."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from maxlike.engine.metrics import EngineMetrics
from maxlike.engine.output import Delta

_SHORT = (.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 10)
_LONG = (.01, .025, .05, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)


class ServeMetrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, engine: EngineMetrics):
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.first_token = Histogram("maxlike_time_to_first_token_seconds", "From when a request has been read to its "
                                     "first token.", buckets=_LONG, registry=self._registry)
        self.inter_token = Histogram("maxlike_inter_token_latency_seconds", "Between two tokens of a continuation.",
                                     buckets=_SHORT, registry=self._registry)
        self.end_to_end = Histogram("maxlike_e2e_request_latency_seconds", "From when a request has been read to its "
                                    "end.", buckets=_LONG, registry=self._registry)
        self.in_flight = Gauge("maxlike_http_requests_in_flight", "Requests with a body that are not answered yet.",
                               registry=self._registry)
        self.responses = Counter("maxlike_http_responses", "Answers by status code; 499: the client hung up.",
                                 ["status"], registry=self._registry)

    def exposition(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class Stopwatch:
    """Times one request, from its making on."""

    def __init__(self, metrics: ServeMetrics):
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[tuple[int, int], float] = {}

    def step(self, deltas: Sequence[tuple[int, Delta]]) -> None:
        """Takes note of what has just come, by prompt."""
        now = time.perf_counter()
        for prompt, delta in deltas:
            n = len(delta.token_ids)
            if not n:
                continue
            last = self._last.get((prompt, delta.index))
            if last is None:
                if not self._last:
                    self._metrics.first_token.observe(now - self._start)
            else:
                for _ in range(n):
                    self._metrics.inter_token.observe((now - last) / n)
            self._last[prompt, delta.index] = now

    def stop(self) -> None:
        """The request is through."""
        self._metrics.end_to_end.observe(time.perf_counter() - self._start)


class _EngineCollector(Collector):
    def __init__(self, engine: EngineMetrics):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        for name, text, value in (
            ("num_requests_running", "Requests that are being worked on.", engine.running),
            ("num_requests_waiting", "Requests that wait for a slot and pages.", engine.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache's pages that requests hold, 0 to 1.",
             engine.pages_used / max(engine.pages_total, 1)),
            ("kv_cache_pages_used", "Pages of the KV cache that requests hold.", engine.pages_used),
            ("kv_cache_pages", "Pages of the KV cache.", engine.pages_total),
        ):
            yield GaugeMetricFamily(f"maxlike_{name}", text, value)
        for name, text, value in (
            ("prompt_tokens", "Tokens of prompts, those found in the cache included.",
             engine.prompt_tokens + engine.cached_tokens),
            ("generation_tokens", "Tokens drawn.", engine.generation_tokens),
            ("prefix_cache_queries", "Tokens of prompts that were looked for in the cache.", engine.queried_tokens),
            ("prefix_cache_hits", "Tokens of prompts that were found in the cache.", engine.cached_tokens),
            ("num_preemptions", "Times that a request gave up its pages to others.", engine.preemptions),
            ("engine_steps", "Steps of the engine.", engine.steps),
        ):
            yield CounterMetricFamily(f"maxlike_{name}", text, value)
        finished = CounterMetricFamily("maxlike_request_success", "Continuations by what ended them.",
                                       labels=["finished_reason"])
        for reason in ("stop", "length", "abort"):
            finished.add_metric([reason], engine.finished[reason])
        yield finished
