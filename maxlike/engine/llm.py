"""Offline use: many prompts in, all outputs back; the names are vLLM's."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from maxlike.engine.config import EngineConfig
from maxlike.engine.engine import Engine
from maxlike.engine.loading import load_engine
from maxlike.engine.output import CompletionOutput, EmbeddingOutput, RequestOutput, ScoreOutput
from maxlike.engine.request import Request
from maxlike.engine.sampling_params import SamplingParams
from maxlike.models.tokenizer import Tokenizer
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer

Prompt = str | Sequence[int]
"""Text, or token ids."""


class LLM:
    """A model and an engine, for programs that have all their prompts at hand.

    Args:
        model: a local folder, or a hub id such as `"Qwen/Qwen3-0.6B"`.
        config: how large the engine is; or its fields one by one, as in `LLM(model, max_num_seqs=8)`.
        options: fields of `EngineConfig`, or what `load_engine` takes: `devices`, `dtype`, `kv_cache_dtype`,
            `kv_scales`, `implementation`, `use_subgraphs`, `chat_template`, `adapter`, `adapter_mode`.

    Raises:
        ValueError: an option is unknown or out of range, the model cannot be loaded, or the memory does not hold what
            was asked for.
    """

    def __init__(self, model: str | os.PathLike[str], config: EngineConfig | None = None, **options: Any):
        config, load_options = EngineConfig.from_options(config, options)
        self.engine: Engine = load_engine(model, config, **load_options)
        self._names = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's, `None` where it has none."""
        return self.engine.tokenizer

    def generate(self, prompts: Prompt | Sequence[Prompt],
                 sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
                 priority: Sequence[int] | None = None, use_tqdm: bool = True) -> list[RequestOutput]:
        """Continues prompts, all at once; outputs come in the order of the prompts.

        Args:
            prompts: text or token ids, one or many.
            sampling_params: for all, or one for each; `None`: `SamplingParams()`.
            priority: of each; lower ones go first.
            use_tqdm: show progress, on a terminal.

        Raises:
            ValueError: a prompt or its parameters are refused, as `Engine.check`; then nothing has been run.
        """
        given = self._prompts(prompts)
        params = _one_each(SamplingParams() if sampling_params is None else sampling_params, len(given),
                           "sampling_params")
        levels = _one_each(0 if priority is None else priority, len(given), "priority")
        for (_, ids), its in zip(given, params, strict=True):
            self.engine.check(ids, its)
        requests: list[list[Request]] = []
        try:
            for (_, ids), its, level in zip(given, params, levels, strict=True):
                requests.append(self.engine.add(f"llm-{next(self._names)}", ids, its, priority=level))
        except ValueError:
            for siblings in requests:
                self.engine.cancel(siblings[0].request_id)
            raise
        self._run([request for siblings in requests for request in siblings], use_tqdm)
        return [_output(text, siblings) for (text, _), siblings in zip(given, requests, strict=True)]

    def chat(self, messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
             sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *,
             tools: Sequence[Mapping[str, Any]] | None = None, chat_template: str | None = None,
             add_generation_prompt: bool = True, use_tqdm: bool = True,
             **template_variables: Any) -> list[RequestOutput]:
        """As `generate`, for one conversation or many, through the checkpoint's chat template.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            sampling_params, use_tqdm: as `generate` has them.
            tools: JSON schemas of functions, for the template.
            chat_template: Jinja source, in place of the checkpoint's.
            add_generation_prompt: end with what the template writes before an answer; without, the last message is
                continued.
            template_variables: go to the template as they are.

        Raises:
            ValueError: there is no tokenizer or template, or it refuses the messages; or as `generate`.
        """
        tokenizer = self._tokenizer_for("chat")
        if chat_template is not None:
            tokenizer = tokenizer.with_chat_template(chat_template)
        conversations: Any = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        prompts = [tokenizer.encode_chat(conversation, tools=tools, add_generation_prompt=add_generation_prompt,
                                         **template_variables) for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def score(self, texts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[ScoreOutput]:
        """How likely each text is: its tokens' log-probabilities (natural), each given those before it.

        Args:
            texts: text or token ids, one or many.
            use_tqdm: show progress, on a terminal.

        Raises:
            ValueError: as `generate`.
        """
        outputs = self.generate(texts, SamplingParams(max_tokens=0, prompt_logprobs=0), use_tqdm=use_tqdm)
        scores = []
        for output in outputs:
            assert output.prompt_logprobs is not None
            logprobs = [None if entry is None else entry[token].logprob
                        for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)]
            scores.append(ScoreOutput(output.request_id, output.prompt_token_ids, logprobs))
        return scores

    def embed(self, texts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[EmbeddingOutput]:
        """Each text's last hidden state behind the final norm, D floats, scaled to length 1.

        Args:
            texts: text or token ids, one or many.
            use_tqdm: show progress, on a terminal.

        Raises:
            ValueError: as `generate`.
        """
        params = SamplingParams(max_tokens=0)
        given = self._prompts(texts)
        for _, ids in given:
            self.engine.check(ids, params, embed=True)
        requests = [self.engine.add(f"llm-{next(self._names)}", ids, params, embed=True)[0] for _, ids in given]
        self._run(requests, use_tqdm)
        return [EmbeddingOutput(request.request_id, request.token_ids, unit_length(request)) for request in requests]

    def update_weights(self, params: DistributedTransformer | nnx.State | Mapping[str, Any]) -> None:
        """Goes on with other weights, without compiling anything.

        Args:
            params: all or some by name, a whole state, or a model; see `Engine.update_weights`, which says what it
                raises.
        """
        self.engine.update_weights(params)

    def _run(self, requests: list[Request], use_tqdm: bool) -> None:
        with tqdm(total=len(requests), desc="requests", disable=None if use_tqdm else True, leave=False) as bar:
            try:
                while self.engine.has_work():
                    bar.update(len({id(r) for r in self.engine.step() if r.finish_reason is not None}))
            except BaseException:  # such as Ctrl-C: the engine is to be of use afterwards
                for request in requests:
                    self.engine.cancel(request.request_id)
                raise

    def _prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[tuple[str | None, list[int]]]:
        """Text, where it was given, and token ids of each."""
        if not isinstance(prompts, str | Sequence | np.ndarray):
            raise ValueError(f"Prompts are text, a list of token ids, or a list of such; got {type(prompts).__name__}.")
        many: Any = [prompts] if isinstance(prompts, str) or (len(prompts) and _are_ids(prompts)) else prompts
        given: list[tuple[str | None, list[int]]] = []
        for prompt in many:
            if isinstance(prompt, str):
                given.append((prompt, self._tokenizer_for("text").encode(prompt)))
            elif _are_ids(prompt):
                if wrong := [id for id in prompt if isinstance(id, bool) or not isinstance(id, int | np.integer)]:
                    raise ValueError(f"A prompt of token ids holds whole numbers; got {wrong[0]!r}.")
                given.append((None, [int(id) for id in prompt]))
            else:
                raise ValueError(f"A prompt is text or a list of token ids; got {type(prompt).__name__}.")
        return given

    def _tokenizer_for(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"The checkpoint has no tokenizer, which {what} needs: give token ids to generate.")
        return self.tokenizer


def unit_length(request: Request) -> list[float]:
    """The embedding of a request that has been read, scaled to length 1."""
    assert request.embedding is not None
    norm = float(np.linalg.norm(request.embedding))
    return (request.embedding / norm if norm else request.embedding).tolist()


def _are_ids(prompt: Any) -> bool:
    if isinstance(prompt, np.ndarray):
        return prompt.ndim == 1 and np.issubdtype(prompt.dtype, np.integer)
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and (
        len(prompt) == 0 or isinstance(prompt[0], int | np.integer))


def _one_each(given: Any, n: int, name: str) -> list[Any]:
    if not isinstance(given, Sequence):
        return [given] * n
    if len(given) != n:
        raise ValueError(f"{name} has {len(given)} entries for {n} prompts: give one for all, or one for each.")
    return list(given)


def _output(text: str | None, siblings: list[Request]) -> RequestOutput:
    outputs = []
    for request in siblings:
        delta = request.take_delta()
        outputs.append(CompletionOutput(request.index, delta.text, delta.token_ids, delta.logprobs,
                                        delta.finish_reason, delta.stop_reason))
    first = siblings[0]
    return RequestOutput(first.request_id, text, first.token_ids[:first.n_prompt], outputs, first.prompt_logprobs,
                         first.metrics)
