"""An engine that costs nothing: it says what the test tells it to, when the test tells it to."""

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace

from maxlike.cli import EMBEDDED_MODEL
from maxlike.engine.async_engine import QueueFullError
from maxlike.engine.config import EngineConfig
from maxlike.engine.metrics import EngineMetrics
from maxlike.engine.output import Delta, EmbeddingOutput, Logprob
from maxlike.engine.sampling_params import SamplingParams
from maxlike.models.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Call:
    """A request that reached the engine."""

    prompt: list[int]
    params: SamplingParams | None
    request_id: str
    priority: int = 0
    ended: str = "running"


class FakeEngine:
    """Follows the contract of `AsyncEngine`; every continuation is `reply`, whose index stands before it if n > 1."""

    max_model_len = 128
    max_queue = 2048

    def __init__(self) -> None:
        self.tokenizer: Tokenizer | None = Tokenizer.from_folder(EMBEDDED_MODEL)
        self.model_config = SimpleNamespace(vocab_size=4096)
        self.metrics = EngineMetrics(pages_total=10)
        self.may_go_on = threading.Event()  # cleared: every request stops after its first token
        self.reset()

    def reset(self) -> None:
        """As at the start."""
        self.reply = " hello world"
        self.calls: list[Call] = []
        self.full = False
        self.fails_after: int | None = None
        self.error: BaseException | None = None
        self.is_ready = True
        self.fault: BaseException | None = None
        self.may_go_on.set()

    n_compiled, compile_s = 0, 0.0

    @property
    def config(self) -> EngineConfig:
        return EngineConfig(page_size=16)

    def start(self) -> None:
        self.is_ready = True

    def close(self) -> None:
        self.is_ready = False

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        if self.fault is not None:
            raise self.fault
        if params.structured_output is not None and params.structured_output.regex == "(":
            raise ValueError("the regex '(' has an open parenthesis")

    async def generate(
        self, prompt: list[int], params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[list[Delta]]:
        if self.full:
            raise QueueFullError(7)
        if any(id >= 4096 for id in prompt):
            raise ValueError("Token id 5000 is beyond the vocabulary: ids are 0 to 4095.")
        call = Call(prompt, params, request_id, priority)
        self.calls.append(call)
        try:
            scripts = [self._script(index, params) for index in range(params.n)]
            for place in range(max(map(len, scripts))):
                if self.fails_after == place:
                    raise ValueError("the engine failed")
                yield [self._delta(index, script, place, prompt, params) for index, script in enumerate(scripts)
                       if place < len(script)]
                while not self.may_go_on.is_set():
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0)
            call.ended = "finished"
        finally:
            if call.ended == "running":
                call.ended = "cancelled"

    def _script(self, index: int, params: SamplingParams) -> list[tuple[int | None, str]]:
        assert self.tokenizer is not None
        reply = f" {index}:{self.reply}" if params.n > 1 else self.reply
        ids = self.tokenizer.encode(reply, add_special_tokens=False)
        if params.max_tokens is not None:
            ids = ids[: params.max_tokens]
        stream = self.tokenizer.stream()
        return [(id, stream.push(id)) for id in ids] or [(None, "")]

    def _delta(
        self, index: int, script: list[tuple[int | None, str]], place: int, prompt: list[int], params: SamplingParams
    ) -> Delta:
        id, text = script[place]
        delta = Delta(index, text, [] if id is None else [id], cached_tokens=min(2, len(prompt)))
        if params.logprobs is not None:
            delta.logprobs = [logprobs(i, params.logprobs) for i in delta.token_ids]
        if params.prompt_logprobs is not None and index == 0 and place == 0:
            delta.prompt_logprobs = [None, *(logprobs(i, params.prompt_logprobs) for i in prompt[1:])]
        if place == len(script) - 1:
            whole = self._script(index, SamplingParams(n=params.n, max_tokens=None))
            delta.finish_reason = "stop" if len(script) == len(whole) else "length"
        return delta

    async def embed(self, prompt: list[int], request_id: str) -> EmbeddingOutput:
        call = Call(prompt, None, request_id)
        self.calls.append(call)
        try:
            while not self.may_go_on.is_set():
                await asyncio.sleep(0.005)
            call.ended = "finished"
            return EmbeddingOutput(request_id, prompt, [float(len(prompt)), 0.25])
        finally:
            if call.ended == "running":
                call.ended = "cancelled"


def logprobs(id: int, n_top: int) -> dict[int, Logprob]:
    """The token itself is second, ids from 300 on are the others."""
    entries = {id: Logprob(-1.5, 2)}
    others = [(300, Logprob(-0.5, 1)), *((300 + i, Logprob(-1.5 - i, 2 + i)) for i in range(1, 20))]
    if n_top:
        entries |= dict(others[:1]) | dict(others[1 : n_top - 1] if n_top > 1 else [])
    return entries
