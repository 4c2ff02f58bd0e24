"""Throughput of the engine in this process: as many requests as it can take, no server between."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from maxlike.bench.workload import Prompt, Workload
from maxlike.engine.output import RequestOutput
from maxlike.engine.sampling_params import SamplingParams


class Generates(Protocol):
    """What is measured: `LLM`, or what has its `generate`."""

    def generate(self, prompts: Any, sampling_params: Any = None, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Continues all prompts."""
        ...


@dataclass(frozen=True)
class Round:
    """One call of `generate`: its seconds, requests, and tokens; `cached_prompt_tokens` of the prompts' were found in
    the prefix cache."""

    duration_s: float
    requests: int
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int

    @property
    def requests_per_s(self) -> float:
        """Requests a second."""
        return self.requests / self.duration_s

    @property
    def prompt_tokens_per_s(self) -> float:
        """Tokens of prompts a second."""
        return self.prompt_tokens / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens of outputs a second."""
        return self.output_tokens / self.duration_s


_RATES = ("requests_per_s", "prompt_tokens_per_s", "output_tokens_per_s")


@dataclass(frozen=True)
class OfflineFigures:
    """Throughput, the median of all rounds; `start_s` is what loading and compiling took beforehand."""

    start_s: float
    rounds: tuple[Round, ...]
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float

    @classmethod
    def of(cls, start_s: float, rounds: Sequence[Round]) -> OfflineFigures:
        """The figures of `rounds`, one at least."""
        return cls(start_s, tuple(rounds), **{name: statistics.median(getattr(round, name) for round in rounds)
                                              for name in _RATES})

    def as_json(self) -> dict[str, Any]:
        """The figures for JSON."""
        rounds = [asdict(round) | {name: getattr(round, name) for name in _RATES} for round in self.rounds]
        return asdict(self) | {"rounds": rounds}

    def __str__(self) -> str:
        lines = [f"start (weights, programs)  {self.start_s:.2f} s"]
        for number, round in enumerate(self.rounds, 1):
            lines.append(f"round {number}: {round.requests} requests in {round.duration_s:.2f} s, "
                         f"{round.prompt_tokens} tokens of prompts ({round.cached_prompt_tokens} from the prefix "
                         f"cache), {round.output_tokens} of outputs")
        return "\n".join([*lines, f"requests       {self.requests_per_s:.2f}/s",
                          f"prompt tokens  {self.prompt_tokens_per_s:.1f}/s",
                          f"output tokens  {self.output_tokens_per_s:.1f}/s"])


def run_offline(make: Callable[[], Generates], workload: Workload, *, rounds: int, warm_up: int,
                use_tqdm: bool = False, clock: Callable[[], float] = time.perf_counter) -> OfflineFigures:
    """Measures what `make` returns, in `rounds` of `workload.config.num_prompts` requests with prompts of their own.

    `warm_up` requests come first and are not counted. Outputs have exactly the length asked for, unless the model's
    longest sequence ends them.

    Raises:
        ValueError: the prompts are messages, or the engine takes none such.
    """
    start = clock()
    llm = make()
    started = clock() - start
    measured = []
    if warm_up:
        _run(llm, workload.prompts(0, warm_up), use_tqdm=False, clock=clock)
    for stage in range(1, rounds + 1):
        measured.append(_run(llm, workload.prompts(stage), use_tqdm=use_tqdm, clock=clock))
    return OfflineFigures.of(started, measured)


def _run(llm: Generates, prompts: Sequence[Prompt], *, use_tqdm: bool, clock: Callable[[], float]) -> Round:
    contents: list[str | list[int]] = []
    for prompt in prompts:
        if isinstance(prompt.content, str):
            contents.append(prompt.content)
        elif isinstance(prompt.content[0], int):
            contents.append(list(prompt.content))  # type: ignore[arg-type]
        else:
            raise ValueError("The offline benchmark takes text or token ids; the file has messages.")
    params = [SamplingParams(temperature=0, max_tokens=prompt.output_len, ignore_eos=True) for prompt in prompts]
    start = clock()
    outputs = llm.generate(contents, params, use_tqdm=use_tqdm)
    duration = clock() - start
    return Round(
        duration_s=duration,
        requests=len(outputs),
        prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
        cached_prompt_tokens=sum(output.metrics.cached_tokens for output in outputs),
        output_tokens=sum(len(part.token_ids) for output in outputs for part in output.outputs),
    )
