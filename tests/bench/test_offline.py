"""Throughput, on a clock of our own and an engine that does as it is told."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from maxlike.bench.lengths import Lengths
from maxlike.bench.offline import run_offline
from maxlike.bench.prompt_file import Content
from maxlike.bench.workload import Prompt, Workload, WorkloadConfig
from maxlike.engine.output import CompletionOutput, RequestMetrics, RequestOutput
from maxlike.engine.sampling_params import SamplingParams


class FakeLLM:
    """Takes so many seconds a call, as listed; making it takes 30."""

    def __init__(self, seconds: Sequence[float] = ()):
        self.now = 0.0
        self._seconds = iter(seconds)
        self.calls: list[tuple[list[Any], list[SamplingParams]]] = []

    def clock(self) -> float:
        return self.now

    def make(self) -> "FakeLLM":
        self.now += 30
        return self

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[RequestOutput]:
        self.calls.append((prompts, sampling_params))
        self.now += next(self._seconds)
        return [RequestOutput(str(i), None, list(prompt), [CompletionOutput(0, token_ids=[1] * params.max_tokens)],
                              metrics=RequestMetrics(cached_tokens=2))
                for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True))]


def workload(**fields: Any) -> Workload:
    config = WorkloadConfig(**{"num_prompts": 10, "input_len": Lengths.parse("6"), "output_len": Lengths.parse("4"),
                               **fields})
    return Workload(config, "ids", vocabulary=np.arange(500))


def test_throughput() -> None:
    llm = FakeLLM([9.0, 5.0, 2.0, 4.0])
    figures = run_offline(llm.make, workload(), rounds=3, warm_up=2, clock=llm.clock)
    assert [round.duration_s for round in figures.rounds] == [5, 2, 4]
    assert figures.start_s == 30
    assert {(round.requests, round.prompt_tokens, round.cached_prompt_tokens, round.output_tokens)
            for round in figures.rounds} == {(10, 60, 20, 40)}
    assert (figures.requests_per_s, figures.prompt_tokens_per_s, figures.output_tokens_per_s) == (2.5, 15, 10)
    assert [len(prompts) for prompts, _ in llm.calls] == [2, 10, 10, 10]
    prompts = [tuple(prompt) for prompts, _ in llm.calls for prompt in prompts]
    assert len(set(prompts)) == 32
    assert all(params == SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
               for _, all_params in llm.calls for params in all_params)
    assert "requests       2.50/s" in str(figures)
    report = json.loads(json.dumps(figures.as_json()))
    assert report["rounds"][1]["output_tokens_per_s"] == 20
    assert set(report) == {"start_s", "rounds", "requests_per_s", "prompt_tokens_per_s", "output_tokens_per_s"}


def test_without_a_warm_up() -> None:
    llm = FakeLLM([2.0])
    assert run_offline(llm.make, workload(), rounds=1, warm_up=0, clock=llm.clock).requests_per_s == 5


def test_texts_go_as_text_and_messages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = FakeLLM([1.0])
    some = workload(num_prompts=1)

    def give(content: Content) -> None:
        monkeypatch.setattr(some, "prompts", lambda stage, n=None: [Prompt(content, None, 3)])

    give("hello")
    run_offline(llm.make, some, rounds=1, warm_up=0, clock=llm.clock)
    assert llm.calls[0][0] == ["hello"]
    give(({"role": "user", "content": "x"},))
    with pytest.raises(ValueError, match="takes text or token ids"):
        run_offline(llm.make, some, rounds=1, warm_up=0, clock=llm.clock)
