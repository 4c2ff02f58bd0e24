"""The engine against each request alone, and against a recomputation of the whole sequence without a cache."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from maxlike.engine.engine import Engine
from maxlike.engine.request import Request
from maxlike.engine.sampling_params import SamplingParams, StructuredOutput
from tests.compilation_cache import compiling_once
from tests.engine.engines import (
    alone,
    engine_of,
    finished,
    logits_after,
    near_ties,
    run,
    source_tokens,
    tokenizer,
)

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def cached(programs: Path) -> Iterator[None]:
    """Engines of one size compile the same programs."""
    with compiling_once(programs):
        yield


@pytest.fixture(scope="module")
def small() -> Engine:
    """Eight sequences, chunks of 32 tokens, and pages enough."""
    return engine_of(max_num_seqs=8, max_num_batched_tokens=32, page_size=16, max_model_len=256, num_pages=80)


def mixed_prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 120 tokens, half of them with one beginning."""
    rng = np.random.default_rng(seed)
    shared = source_tokens(50)
    prompts = []
    for i in range(n):
        own = source_tokens(int(rng.integers(1, 70)), start=int(rng.integers(0, 1000)))
        prompts.append([*shared, *own] if i % 2 else own)
    return prompts


# -- what runs beside a request changes nothing


@pytest.mark.slow
def test_64_greedy_requests_under_load_are_each_what_they_are_alone() -> None:
    """A pool that holds a third of what they need: prefix hits, preemptions and chunked prompts, all in one run."""
    prompts = mixed_prompts(64)
    engine = engine_of(max_num_seqs=64, max_num_batched_tokens=96, page_size=16, max_model_len=256, num_pages=180)
    long = replace(GREEDY, max_tokens=60)
    requests = [engine.add(str(i), prompt, long)[0] for i, prompt in enumerate(prompts)]
    run(engine)
    scheduler = engine.scheduler
    assert scheduler.n_preemptions > 5 and engine.metrics.cached_tokens > 500, "the load was too light"
    assert max(len(p) for p in prompts) > 96, "no prompt was chunked"
    lonely = engine_of(max_num_seqs=1, max_num_batched_tokens=96, page_size=16, max_model_len=256,
                       enable_prefix_caching=False)
    ties: list[tuple[int, list[int]]] = []
    differing = []
    for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        expected = alone(lonely, prompt, long)
        near = near_ties(prompt, request.output_token_ids)
        ties += [(i, near)] if near else []
        if request.output_token_ids != expected:
            first = next(k for k, (a, b) in enumerate(zip(request.output_token_ids, expected, strict=True)) if a != b)
            assert first in near, f"request {i} differs at token {first}, where there is no tie"
            differing.append(i)
    print(f"near ties in {len(ties)} of 64 requests: {ties}; of those differ from alone: {differing}")
    assert scheduler.pool.n_used == 0


def test_greedy_requests_under_load_are_each_what_they_are_alone() -> None:
    """As above, smaller."""
    prompts = mixed_prompts(12, seed=3)
    engine = engine_of(max_num_seqs=8, max_num_batched_tokens=32, page_size=16, max_model_len=256, num_pages=24)
    requests = [engine.add(str(i), prompt, GREEDY)[0] for i, prompt in enumerate(prompts)]
    run(engine)
    assert engine.scheduler.n_preemptions and engine.metrics.cached_tokens
    for prompt, request in zip(prompts, requests, strict=True):
        assert request.n_output == 24 and request.finish_reason == "length"
        near_ties(prompt, request.output_token_ids)


def test_draws_with_a_seed_are_the_same_whatever_runs_beside_them(small: Engine) -> None:
    params = [SamplingParams(temperature=0.9, seed=7, max_tokens=16),
              SamplingParams(temperature=1.3, top_k=20, seed=-5, max_tokens=16),
              SamplingParams(temperature=0.7, top_p=0.8, min_p=0.01, seed=2**40, max_tokens=16),
              SamplingParams(temperature=1.0, frequency_penalty=0.7, repetition_penalty=1.2, seed=1, max_tokens=16)]
    prompts = mixed_prompts(4, seed=1)
    expected = [alone(small, prompt, its) for prompt, its in zip(prompts, params, strict=True)]
    assert len({tuple(tokens) for tokens in expected}) == 4
    pressed = engine_of(max_num_seqs=8, max_num_batched_tokens=32, page_size=16, max_model_len=256, num_pages=24)
    others = [pressed.add(f"other {i}", prompt, SamplingParams(max_tokens=60 + i, temperature=i % 2))[0]
              for i, prompt in enumerate(mixed_prompts(6, seed=9))]
    run(pressed, until=5)
    requests = [pressed.add(f"mine {its.seed}", prompt, its)[0] for prompt, its in zip(prompts, params, strict=True)]
    run(pressed)
    assert all(other.finish_reason for other in others) and pressed.scheduler.n_preemptions
    assert [request.output_token_ids for request in requests] == expected


def test_n_continuations_share_the_prompt_and_differ(small: Engine) -> None:
    prompt = source_tokens(60)
    before = small.scheduler.pool.hit_tokens
    requests = small.add("n", prompt, SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=12))
    run(small)
    texts = [finished(request).text for request in requests]
    assert [request.index for request in requests] == [0, 1, 2, 3, 4] and len(set(texts)) == 5
    assert small.scheduler.pool.hit_tokens - before >= 4 * 48  # three full pages each
    again = small.add("again", prompt, SamplingParams(n=5, temperature=1.0, seed=3, max_tokens=12))
    run(small)
    assert [request.output_token_ids for request in again] == [request.output_token_ids for request in requests]
    assert alone(small, prompt, SamplingParams(temperature=1.0, seed=4, max_tokens=12)) == again[1].output_token_ids


def test_without_a_seed_draws_differ_from_request_to_request_and_not_from_run_to_run() -> None:
    def texts() -> list[list[int]]:
        engine = engine_of(max_num_seqs=8, max_num_batched_tokens=32, page_size=16, max_model_len=256, num_pages=80)
        return [alone(engine, source_tokens(9), SamplingParams(max_tokens=12)) for _ in range(2)]

    first = texts()
    assert first[0] != first[1] and texts() == first


# -- how requests end


def test_the_model_s_own_end_and_the_request_s(small: Engine) -> None:
    prompt = source_tokens(20)
    free = alone(small, prompt, GREEDY)
    text = tokenizer().decode(free)
    for params, n, reason, stop in (
            (dict(max_tokens=5), 5, "length", None),
            (dict(stop_token_ids=[free[6]]), free.index(free[6]) + 1, "stop", free[6]),
            (dict(stop=[text[8:11]]), None, "stop", text[8:11]),
            (dict(max_tokens=1), 1, "length", None)):
        (request,) = small.add("end", prompt, SamplingParams(**{**dict(temperature=0, max_tokens=24, ignore_eos=True),
                                                                **params}))
        run(small)
        output = finished(request)
        assert (output.finish_reason, output.stop_reason) == (reason, stop)
        assert output.token_ids == free[:len(output.token_ids)]
        if n is not None:
            assert len(output.token_ids) == n
            assert output.text == tokenizer().decode(free[:n - (reason == "stop")])
        else:
            assert output.text == text[:text.index(stop)]
    small._eos = frozenset({free[3]})
    try:
        (request,) = small.add("eos", prompt, SamplingParams(temperature=0, max_tokens=24))
        run(small)
        assert request.output_token_ids == free[:free.index(free[3]) + 1]
        assert (request.finish_reason, request.stop_reason) == ("stop", None)
        (request,) = small.add("later", prompt, SamplingParams(temperature=0, max_tokens=24, min_tokens=12))
        run(small)
        assert free[3] not in request.output_token_ids[:12] and request.n_output >= 12
    finally:
        small._eos = frozenset(small.model_config.eos_token_ids)


def test_the_longest_sequence_is_a_limit() -> None:
    engine = engine_of(max_num_seqs=2, max_num_batched_tokens=32, page_size=16, max_model_len=32, num_pages=6)
    (request,) = engine.add("a", source_tokens(20), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    run(engine)
    assert len(request.token_ids) == 32 and request.finish_reason == "length"
    with pytest.raises(ValueError, match=r"The prompt has 32 tokens; the model takes at most 32.*Shorten it to 31"):
        engine.add("b", source_tokens(32), SamplingParams())
    engine.add("c", source_tokens(32), SamplingParams(max_tokens=0, prompt_logprobs=1))  # only read, it fits
    run(engine)
    (endless,) = engine.add("d", source_tokens(20), SamplingParams(max_tokens=None, min_tokens=2**40))
    run(engine)
    assert endless.finish_reason == "length" and len(endless.token_ids) == 32
    assert engine.scheduler.pool.n_used == 0


def test_text_comes_in_pieces_that_add_up(small: Engine) -> None:
    (request,) = small.add("pieces", source_tokens(20), GREEDY)
    pieces, tokens = [], []
    while small.has_work():
        small.step()
        delta = request.take_delta()
        pieces.append(delta.text)
        tokens += delta.token_ids
    assert tokens == request.output_token_ids and "".join(pieces) == tokenizer().decode(tokens)
    assert sum(map(bool, pieces)) > 10


# -- what is reported


@pytest.mark.parametrize("n_prompt", [1, 5, 32, 33, 90])
def test_logprobs_are_those_of_a_recomputation(n_prompt: int, small: Engine) -> None:
    prompt = source_tokens(n_prompt, start=200)
    (request,) = small.add("logprobs", prompt, SamplingParams(temperature=1.0, seed=1, max_tokens=8, logprobs=3,
                                                              prompt_logprobs=2, repetition_penalty=1.3))
    run(small)
    output = finished(request)
    logits = logits_after(request.token_ids[:-1]).astype(np.float64)
    expected = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - (
        logits.max(-1, keepdims=True))
    assert request.prompt_logprobs is not None and output.logprobs is not None
    assert request.prompt_logprobs[0] is None and len(request.prompt_logprobs) == n_prompt
    for n_top, entries, first in ((2, request.prompt_logprobs[1:], 0), (3, output.logprobs, n_prompt - 1)):
        for place, entry in enumerate(entries, first):
            token = request.token_ids[place + 1]
            assert entry is not None and next(iter(entry)) == token
            order = np.argsort(-expected[place], kind="stable")
            assert set(entry) - {token} == set(order[:n_top].tolist()) - {token}
            for id, logprob in entry.items():
                assert abs(logprob.logprob - expected[place, id]) < 2e-4
                assert logprob.rank == 1 + (logits[place] > logits[place, id]).sum()
    assert output.cumulative_logprob == pytest.approx(
        sum(expected[n_prompt - 1 + i, token] for i, token in enumerate(output.token_ids)), abs=1e-3)


def test_logprobs_survive_preemption() -> None:
    engine = engine_of(max_num_seqs=4, max_num_batched_tokens=32, page_size=16, max_model_len=128, num_pages=9)
    params = SamplingParams(temperature=0, max_tokens=60, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    requests = [engine.add(str(i), source_tokens(34 + i, start=7 * i), params)[0] for i in range(3)]
    run(engine)
    assert engine.scheduler.n_preemptions
    for request in requests:
        assert request.prompt_logprobs is not None and request.logprobs is not None
        assert len(request.prompt_logprobs) == request.n_prompt and len(request.logprobs) == 60
        logits = logits_after(request.token_ids[:-1]).astype(np.float64)
        for place, entry in enumerate([*request.prompt_logprobs[1:], *request.logprobs]):
            assert entry is not None
            ((token, logprob),) = entry.items()
            expected = logits[place, token] - np.log(np.exp(logits[place]).sum())
            assert token == request.token_ids[place + 1] and abs(logprob.logprob - expected) < 2e-4


def test_bias_forces_and_forbids(small: Engine) -> None:
    prompt = source_tokens(20)
    free = alone(small, prompt, GREEDY)
    forced = alone(small, prompt, SamplingParams(temperature=0, max_tokens=6, logit_bias={77: 100}))
    assert forced == [77] * 6
    without = alone(small, prompt, SamplingParams(temperature=0, max_tokens=24, logit_bias={free[0]: -100}))
    assert free[0] not in without


@pytest.mark.parametrize("asked, pattern", [
    (dict(regex=r"[a-c]{3}-[0-9]{2}"), r"[a-c]{3}-[0-9]{2}"), (dict(choice=["yes", "no, never"]), r"yes|no, never")])
def test_structured_output_beside_free_text(asked: dict[str, Any], pattern: str, small: Engine) -> None:
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=40, structured_output=StructuredOutput(**asked))
    free = alone(small, source_tokens(11), GREEDY)
    constrained = [small.add(f"s{i}", source_tokens(10 + i), params)[0] for i in range(3)]
    (other,) = small.add("free", source_tokens(11), GREEDY)
    run(small)
    for request in constrained:
        output = finished(request)
        assert output.finish_reason == "stop"
        assert re.fullmatch(pattern, output.text), output.text
    assert other.output_token_ids == free


def test_a_grammar_keeps_to_min_tokens_and_what_ends_the_text(small: Engine) -> None:
    def text_of(pattern: str, **params: Any) -> tuple[str, Request]:
        asked = StructuredOutput(regex=pattern)
        (request,) = small.add("g", source_tokens(10), SamplingParams(seed=3, structured_output=asked, **params))
        run(small)
        return finished(request).text, request

    tokens = {chr(97 + i): tokenizer().encode(chr(97 + i), add_special_tokens=False)[-1] for i in range(2)}
    eos = small.model_config.eos_token_ids[0]
    text, request = text_of("a*", logit_bias={eos: 100}, min_tokens=9, max_tokens=20)
    assert request.n_output == 10 and request.output_token_ids[-1] == eos and set(text) == {"a"}
    text, request = text_of("[ab]{1,12}", logit_bias={tokens["b"]: 100}, stop_token_ids=[tokens["b"]], min_tokens=3)
    assert request.n_output == 4 and request.stop_reason == tokens["b"] and set(text) == {"a"}
    text, request = text_of("a{3}", logit_bias={eos: 100}, ignore_eos=True, min_tokens=9)  # no more can follow
    assert (text, request.finish_reason, request.stop_reason) == ("aaa", "stop", None)


def test_a_grammar_that_fails_on_the_way_aborts_its_request_alone(small: Engine) -> None:
    (other,) = small.add("free", source_tokens(11), GREEDY)
    asked = StructuredOutput(regex="((a{1,300}){1,300}){1,300}")
    (request,) = small.add("fails", source_tokens(10), SamplingParams(
        max_tokens=200, structured_output=asked, logit_bias={
            id: -100 for id in range(4096) if len(tokenizer().token_bytes(id)) > 1 and set(
                tokenizer().token_bytes(id)) == {97}}))
    run(small)
    output = finished(request)
    assert output.finish_reason == "abort" and "too many expressions" in str(output.stop_reason)
    assert set(output.text) == {"a"} and 1 < len(output.token_ids) < 200
    assert other.finish_reason == "length" and small.scheduler.pool.n_used == 0
    near_ties(source_tokens(11), other.output_token_ids)


def test_embedding_is_the_last_hidden_state(small: Engine) -> None:
    for n in (1, 20, 70):
        prompt = source_tokens(n, start=300)
        (request,) = small.add("e", prompt, SamplingParams(max_tokens=0), embed=True)
        run(small)
        tokens, offsets = np.array(prompt, np.int32), np.array([0, n], np.int32)
        hidden, _ = small.model.hidden_states(tokens, None, offsets)
        assert request.embedding is not None
        np.testing.assert_allclose(request.embedding, np.asarray(hidden[-1]), rtol=2e-3, atol=2e-4)


# -- faults


def test_a_request_that_is_cancelled_frees_its_pages_at_once(small: Engine) -> None:
    for steps in range(6):
        requests = small.add("gone", source_tokens(100), SamplingParams(n=2, max_tokens=50))
        (stays,) = small.add("stays", source_tokens(8), GREEDY)
        run(small, until=steps)
        small.cancel("gone")
        small.cancel("never there")
        assert small.scheduler.n_running + small.scheduler.n_waiting == 1
        run(small)
        assert [r.finish_reason for r in requests] == ["abort"] * 2 and stays.finish_reason == "length"
        near_ties(source_tokens(8), stays.output_token_ids)
        assert small.scheduler.pool.n_used == 0


@pytest.mark.parametrize("prompt, params, says", [
    ([], {}, "prompt is empty"),
    ([3, 4096], {}, r"Token id 4096 is beyond the vocabulary: ids are 0 to 4095\."),
    ([-1], {}, r"Token id -1 is beyond"),
    ([1] * 256, {}, "prompt has 256 tokens; the model takes at most 256.* Shorten it to 255 or fewer"),
    ([1], dict(logit_bias={5000: 1.0}), "logit_bias names token 5000, which is beyond the vocabulary"),
    ([1], dict(stop_token_ids=[4096]), "stop_token_ids names token 4096"),
    ([1], dict(structured_output=StructuredOutput(regex="(")), "regex"),
])
def test_bad_requests_are_refused_and_leave_nothing(prompt: list[int], params: dict[str, Any], says: str,
                                                     small: Engine) -> None:
    with pytest.raises(ValueError, match=says):
        small.add("bad", prompt, SamplingParams(**params))
    assert not small.has_work()


def test_names_are_taken_once(small: Engine) -> None:
    small.add("twin", [1], GREEDY)
    with pytest.raises(ValueError, match="request 'twin' already"):
        small.add("twin", [1], GREEDY)
    small.cancel("twin")
    run(small)


def test_more_than_the_pool_holds_waits_and_none_is_lost() -> None:
    engine = engine_of(max_num_seqs=8, max_num_batched_tokens=32, page_size=16, max_model_len=64, num_pages=4)
    requests = [engine.add(str(i), source_tokens(30 + i), GREEDY)[0] for i in range(10)]
    run(engine)
    assert all(request.n_output == 24 for request in requests)
    for request in requests:
        near_ties(request.token_ids[:request.n_prompt], request.output_token_ids)
    with pytest.raises(ValueError, match=r"max_model_len=128 was asked for; the KV cache has 4 pages of 16 tokens, 64"):
        engine_of(max_num_seqs=8, max_num_batched_tokens=32, page_size=16, max_model_len=128, num_pages=4)


def test_priority_goes_first() -> None:
    engine = engine_of(max_num_seqs=1, max_num_batched_tokens=32, page_size=16, max_model_len=64, num_pages=4)
    low = [engine.add(f"low {i}", source_tokens(20), GREEDY, priority=1)[0] for i in range(3)]
    run(engine, until=6)
    (high,) = engine.add("high", source_tokens(20), GREEDY, priority=0)
    order: list[Request] = []
    while engine.has_work():
        order += [request for request in engine.step() if request.finish_reason]
    assert order[0] is high and order[1:] == low and all(r.output_token_ids == high.output_token_ids for r in low)


# -- weights and compilation


def test_other_weights_without_compiling() -> None:
    engine = engine_of(max_num_seqs=4, max_num_batched_tokens=32, page_size=16, max_model_len=128, num_pages=9)
    prompt = source_tokens(40)
    before = alone(engine, prompt, GREEDY)
    compiled = engine.runner.n_compiled
    own = {".".join(map(str, path)): np.asarray(param.get_value())
           for path, param in nnx.to_flat_state(nnx.state(engine.model, nnx.Param))}
    (running,) = engine.add("running", prompt, GREEDY)
    run(engine, until=10)
    engine.update_weights({"norm.weight": -own["norm.weight"]})
    run(engine)
    other = alone(engine, prompt, GREEDY)
    assert other != before, "the weights or the pages of old were used again"
    known = running.n_output
    assert known == 24 and running.output_token_ids[:5] == before[:5]
    engine.update_weights({"model.norm.weight": own["norm.weight"]})  # as in Hugging Face checkpoints
    assert alone(engine, prompt, GREEDY) == before
    assert engine.runner.n_compiled == compiled
    for wrong, says in (({"nonsense": own["norm.weight"]}, "nonsense is unknown"),
                        ({"norm.weight": own["norm.weight"][:5]}, r"norm.weight has shape \(5,\)"),
                        ([1], "Weights are a DistributedTransformer")):
        with pytest.raises(ValueError, match=says):
            engine.update_weights(wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up() -> None:
    """500 requests of all kinds, and jax itself counts."""
    engine = engine_of(max_num_seqs=16, max_num_batched_tokens=64, page_size=16, max_model_len=192, num_pages=60,
                       warm_up=True)
    compiled = engine.runner.n_compiled
    rng = np.random.default_rng(0)
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *args, **kwargs: events.append(name) if "backend_compile" in name else None)
    try:
        n_added = n_cancelled = 0
        while n_added < 500 or engine.has_work():
            for _ in range(int(rng.integers(0, 8)) if n_added < 500 else 0):
                prompt = source_tokens(int(rng.integers(1, 120)), start=int(rng.integers(0, 900)))
                params = SamplingParams(
                    n=int(rng.integers(1, 3)), temperature=float(rng.choice([0.0, 1.0])),
                    max_tokens=int(rng.integers(0, 20)),
                    logprobs=[None, 2][rng.integers(2)], prompt_logprobs=[None, None, 1][rng.integers(3)],
                    presence_penalty=float(rng.choice([0.0, 1.0])), logit_bias={5: 1.0} if rng.integers(2) else {},
                    structured_output=StructuredOutput(regex="[a-z ]+") if rng.integers(8) == 0 else None)
                engine.add(str(n_added), prompt, params, embed=bool(rng.integers(10) == 0))
                n_added += 1
            if rng.integers(10) == 0:
                engine.cancel(str(rng.integers(n_added + 1)))
                n_cancelled += 1
            engine.step()
    finally:
        jax.monitoring.clear_event_listeners()
    assert n_cancelled and engine.scheduler.pool.n_used == 0
    assert engine.runner.n_compiled == compiled and not events


def test_a_second_start_finds_every_program_in_the_compilation_cache(tmp_path: Path) -> None:
    events: Counter[str] = Counter()
    with compiling_once(tmp_path):
        for start in range(2):
            jax.clear_caches()
            events.clear()
            jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
            try:
                engine = engine_of(max_num_seqs=1, max_num_batched_tokens=8, page_size=16, max_model_len=32,
                                   num_pages=2, warm_up=True)
            finally:
                jax.monitoring.clear_event_listeners()
            n_programs = engine.runner.n_compiled
            assert n_programs == 2 * 2 + 2 + 2  # forward and score, greedy and full, clear and fill
            if start:
                assert events["cache_hits"] >= n_programs and not events["cache_misses"]
            else:
                assert events["cache_misses"] >= n_programs


def test_the_longest_sequence_is_what_the_cache_holds_unless_one_was_asked_for() -> None:
    assert engine_of(max_num_seqs=2, page_size=16, num_pages=4).max_model_len == 64


def test_a_grammar_that_went_wrong_does_not_end_as_if_it_were_complete(small: Engine) -> None:
    [a] = tokenizer().encode("a", add_special_tokens=False)
    (request,) = small.add("g", source_tokens(5), SamplingParams(
        temperature=0, max_tokens=100, logit_bias={a: 100},
        structured_output=StructuredOutput(regex="((a{1,9999}){1,9999}){1,9999}")))
    run(small)
    assert request.finish_reason == "abort" and "too many expressions" in str(request.stop_reason)


def test_a_grammar_keeps_min_tokens_from_stop_token_ids(small: Engine) -> None:
    asked = dict(temperature=0, max_tokens=30, structured_output=StructuredOutput(regex="[a-z ]*"))
    (free,) = small.add("free", source_tokens(20), SamplingParams(**asked))
    run(small)
    stop = free.output_token_ids[:2]
    (held,) = small.add("held", source_tokens(20), SamplingParams(**asked, min_tokens=10, stop_token_ids=stop))
    run(small)
    assert held.n_output >= 10 and not set(stop) & set(held.output_token_ids[:10])


def test_a_model_without_an_end_generates_without_grammars(small: Engine) -> None:
    endless = copy.copy(tokenizer())
    endless.eos_token_id = None
    engine = Engine(small.model, replace(small.model_config, eos_token_ids=()), small.config, endless)
    (request,) = engine.add("free", source_tokens(5), GREEDY)
    run(engine)
    assert request.n_output == 24
    with pytest.raises(ValueError, match="Structured output needs a token that ends it"):
        engine.check([1], SamplingParams(structured_output=StructuredOutput(regex="a")))
