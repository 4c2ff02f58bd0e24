"""/metrics: what Prometheus reads."""

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.fake_engine import FakeEngine


def samples(client: httpx2.Client) -> dict[str, float]:
    reply = client.get("/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {sample.name + "".join(f"{{{key}={value}}}" for key, value in sample.labels.items()): sample.value
            for family in text_string_to_metric_families(reply.text) for sample in family.samples}


def test_the_engines_counts(client: httpx2.Client, engine: FakeEngine) -> None:
    metrics = engine.metrics
    metrics.running, metrics.waiting, metrics.pages_used, metrics.preemptions = 3, 2, 5, 4
    metrics.prompt_tokens, metrics.queried_tokens, metrics.cached_tokens, metrics.generation_tokens = 60, 90, 30, 70
    metrics.finished.update(stop=7, length=8, abort=9)
    found = samples(client)
    expected = {
        "num_requests_running": 3, "num_requests_waiting": 2, "kv_cache_usage_perc": 0.5, "kv_cache_pages_used": 5,
        "kv_cache_pages": 10, "prompt_tokens_total": 90, "generation_tokens_total": 70,
        "prefix_cache_queries_total": 90, "prefix_cache_hits_total": 30, "num_preemptions_total": 4,
        "request_success_total{finished_reason=stop}": 7, "request_success_total{finished_reason=length}": 8,
        "request_success_total{finished_reason=abort}": 9}
    assert {key: found[f"maxlike_{key}"] for key in expected} == expected


def test_latencies_are_of_tokens_and_requests(client: httpx2.Client, engine: FakeEngine) -> None:
    names = ["time_to_first_token", "inter_token_latency", "e2e_request_latency"]

    def counts() -> list[float]:
        found = samples(client)
        return [found[f"maxlike_{name}_seconds_count"] for name in names]

    before = counts()
    assert engine.tokenizer is not None
    n = len(engine.tokenizer.encode(engine.reply, add_special_tokens=False))
    assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200
    assert [after - was for after, was in zip(counts(), before, strict=True)] == [1, n - 1, 1]
    before = counts()
    body = {"prompt": ["x", "y"], "n": 2, "max_tokens": 3, "stream": True}
    assert client.post("/v1/completions", json=body).status_code == 200
    # Of a request there is one first token, though each of its four continuations has one.
    assert [after - was for after, was in zip(counts(), before, strict=True)] == [1, 4 * 2, 1]


def test_answers_are_counted_by_status(client: httpx2.Client) -> None:
    before = samples(client)
    client.post("/v1/completions", json={"prompt": "x"})
    client.post("/v1/completions", json={})
    client.get("/nowhere")
    after = samples(client)
    for status, n in (("200", 2), ("400", 1), ("404", 1)):  # one of the 200s is the first look
        key = f"maxlike_http_responses_total{{status={status}}}"
        assert after[key] - before.get(key, 0) == n


def test_two_servers_in_a_process_do_not_share() -> None:
    from maxlike.serve.metrics import ServeMetrics

    first, second = ServeMetrics(FakeEngine().metrics), ServeMetrics(FakeEngine().metrics)
    first.end_to_end.observe(1)
    assert b"maxlike_e2e_request_latency_seconds_count 1.0" in first.exposition()
    assert b"maxlike_e2e_request_latency_seconds_count 0.0" in second.exposition()
