"""The engine: requests in, tokens out, a step at a time.

A step is scheduled and sent to the devices before the tokens of the step before it are looked at: the host works while
the devices do. What a request turns out to have ended with is then one token too many in flight, which is dropped.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from maxlike.engine.batch import SlotParams, pack_drawing, pack_rows
from maxlike.engine.config import EngineConfig
from maxlike.engine.detokenizer import Detokenizer
from maxlike.engine.grammar import GrammarCompiler
from maxlike.engine.logprobs import logprob_entries
from maxlike.engine.memory import n_pages_for
from maxlike.engine.metrics import EngineMetrics
from maxlike.engine.output import FinishReason
from maxlike.engine.page_pool import PagePool
from maxlike.engine.request import Request, RequestState, check_prompt
from maxlike.engine.runner import SCORED_ROWS, ModelRunner
from maxlike.engine.sampling import Sampled, seed_words
from maxlike.engine.sampling_params import MAX_EDITS, SamplingParams
from maxlike.engine.scheduler import Scheduler, Step
from maxlike.engine.weights import exchange_weights
from maxlike.models.config import TransformerConfig
from maxlike.models.family import hf_name
from maxlike.models.registry import family_of
from maxlike.models.tokenizer import Tokenizer
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import named_parameters

_FOREVER = 2**31 - 1


@dataclass
class _Launched:
    """A step on its way through the devices."""

    step: Step
    last: jax.Array
    requests: list[Request] = field(default_factory=list)
    """Those that get a token, in the order of `tokens`."""
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Where they stand in the step."""
    tokens: jax.Array | None = None
    sampled: Sampled | None = None
    """What there is beside the tokens, where somebody asked for it."""
    scores: list[tuple[Request, int, Sampled]] = field(default_factory=list)
    read: list[tuple[Request, int]] = field(default_factory=list)
    """Requests that this step has read to their end and that want no token, and their rows."""
    awaits_mask: bool = False
    """Whether tokens can be drawn only when the step before has been looked at."""


class Engine:
    """Runs requests over one model.

    Not thread-safe: one thread calls it (`AsyncEngine` has one).

    Args:
        model: the weights; the engine has the only use of it.
        config: the model's, for its limits and the tokens that end a text.
        engine_config: how large the engine is.
        tokenizer: for text, stop texts and grammars; without it there are only ids.

    Raises:
        ValueError: the memory does not hold what was asked for.
    """

    def __init__(self, model: DistributedTransformer, config: TransformerConfig,
                 engine_config: EngineConfig | None = None, tokenizer: Tokenizer | None = None):
        platform = model.mesh.devices.flat[0].platform
        asked = engine_config or EngineConfig()
        resolved = replace(asked.for_model(config, platform), page_size=model.kv_params.page_size)
        self.model, self.model_config, self.tokenizer = model, config, tokenizer
        self.runner = ModelRunner(model, resolved)
        n_pages = n_pages_for(self.runner, resolved)
        room = n_pages * model.kv_params.page_size
        if asked.max_model_len is not None and room < asked.max_model_len:
            raise ValueError(f"max_model_len={asked.max_model_len} was asked for; the KV cache has {n_pages} pages of "
                             f"{model.kv_params.page_size} tokens, {room} tokens together. Lower it, or give the cache "
                             "more: num_pages, kv_cache_memory, memory_share.")
        assert resolved.max_model_len is not None and resolved.max_num_seqs is not None
        assert resolved.max_num_batched_tokens is not None
        self.config = replace(resolved, num_pages=n_pages, max_model_len=min(resolved.max_model_len, room))
        self.max_model_len = min(resolved.max_model_len, room)
        self.runner.allocate(n_pages)
        if self.config.warm_up:
            self.runner.warm_up()
        self.scheduler = Scheduler(
            PagePool(n_pages, model.kv_params.page_size, asked.enable_prefix_caching),
            max_num_seqs=resolved.max_num_seqs, max_num_batched_tokens=resolved.max_num_batched_tokens,
            pages_per_sequence=self.runner.pages_per_sequence)
        self.metrics = EngineMetrics(pages_total=n_pages)
        self.grammars, self._no_grammars = None, ""
        if tokenizer is not None:
            try:
                self.grammars = GrammarCompiler(tokenizer, self.runner.vocab_size, config.eos_token_ids)
            except ValueError as error:  # the engine is of use for other requests all the same
                self._no_grammars = str(error)
        self._slot_params = SlotParams(resolved.max_num_seqs)
        self._eos = frozenset(config.eos_token_ids)
        self._page_size = model.kv_params.page_size
        self._seeds = random.Random(resolved.seed)
        self._requests: dict[str, list[Request]] = {}
        self._n_constrained = 0  # running or waiting requests with a grammar
        self._pending: _Launched | None = None
        self._moved: list[Request] = []

    # -- requests

    def check(self, prompt: Sequence[int], params: SamplingParams, *, embed: bool = False) -> None:
        """Sees to it that a request can be run. From any thread.

        Args:
            prompt: token ids.
            params: what is asked of the continuations.
            embed: the prompt is read for its embedding; nothing is drawn.

        Raises:
            ValueError: the prompt is empty, too long, or holds an id beyond the vocabulary; or what the parameters ask
                for needs a tokenizer that is not there, or names tokens beyond the vocabulary.
        """
        vocab_size = self.runner.vocab_size
        check_prompt(prompt, vocab_size, self.max_model_len + (embed or params.max_tokens == 0))
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if outside := [id for id in ids if id >= vocab_size]:
                raise ValueError(f"{name} names token {outside[0]}, which is beyond the vocabulary: ids are 0 to "
                                 f"{vocab_size - 1}.")
        n_edits = len(params.logit_bias) + (len(params.stop_token_ids) + len(self._eos) if params.min_tokens else 0)
        if n_edits > MAX_EDITS:
            raise ValueError(f"logit_bias, and with min_tokens the tokens that end the output, come to {n_edits} token "
                             f"ids; there may be {MAX_EDITS}.")
        if self.tokenizer is None and (params.stop or params.structured_output):
            raise ValueError("stop and structured_output are about text, and the checkpoint has no tokenizer.")
        if params.structured_output is not None:
            if self.grammars is None:
                raise ValueError(self._no_grammars)
            self.grammars.compile(params.structured_output)

    def add(self, request_id: str, prompt: Sequence[int], params: SamplingParams, *, priority: int = 0,
            embed: bool = False, client: Any = None) -> list[Request]:
        """A new request; returns its `params.n` continuations, which `step` will move.

        Args:
            request_id: a name, of which no other request that is still running has the same.
            prompt: token ids.
            params: what is asked of the continuations.
            priority: lower ones go first.
            embed: read the prompt for its embedding; nothing is drawn.
            client: anything; it stands in `Request.client`.

        Raises:
            ValueError: as `check`, or the name is taken.
        """
        self.check(prompt, params, embed=embed)
        if request_id in self._requests:
            raise ValueError(f"There is a request {request_id!r} already: give each a name of its own.")
        now = time.perf_counter()
        prompt = list(map(int, prompt))
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        longest = self.max_model_len
        if params.max_tokens is not None:
            longest = min(longest, len(prompt) + params.max_tokens)
        siblings = []
        for index in range(1 if embed else params.n):
            request = Request(request_id, index, prompt, params, longest, priority,
                              reuse_prefix=params.prompt_logprobs is None or index > 0)
            request.wants_embedding, request.client, request.seed = embed, client, seed + index
            request.metrics.arrival = now
            if params.prompt_logprobs is not None and index == 0:
                request.prompt_logprobs = [None]
            if params.logprobs is not None:
                request.logprobs = []
            if self.tokenizer is not None and request.generates:
                request.detokenizer = Detokenizer(self.tokenizer, params, after=prompt)
            if params.structured_output is not None:
                assert self.grammars is not None
                request.grammar = self.grammars.compile(params.structured_output)
                self._n_constrained += 1
            request.ending = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
            request.plain = not (request.grammar or params.stop)
            siblings.append(request)
        for i, request in enumerate(siblings):
            try:
                self.scheduler.add(request)
            except ValueError:
                for added in siblings[:i]:
                    self.scheduler.finish(added)
                self._n_constrained -= sum(request.grammar is not None for request in siblings)
                raise
        self._requests[request_id] = siblings
        return siblings

    def cancel(self, request_id: str) -> None:
        """Ends what is left of a request at once, its pages are free; a name that is not there is passed over."""
        for request in self._requests.get(request_id, ()):
            if request.state is not RequestState.FINISHED:
                self._finish(request, "abort")

    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._pending is not None or bool(self._requests) or bool(self._moved)

    def compile_for(self, n_prompt: int, params: SamplingParams) -> None:
        """Compiles what a request alone needs, so that its own time holds no compiling.

        Args:
            n_prompt: tokens of its prompt.
            params: its own.
        """
        runner, budget = self.runner, self.scheduler.max_num_batched_tokens
        steps = {min(n_prompt, budget), n_prompt % budget or budget} | ({1} if params.max_tokens != 1 else set())
        for n in sorted(steps):
            runner.compile("forward", runner.token_bucket(n))
        runner.compile("greedy" if params.is_plainly_greedy else "full", runner.row_bucket(1))

    # -- steps

    def step(self) -> list[Request]:
        """Sends the next step to the devices and looks at the one before: the requests that have moved.

        `Request.take_delta` says what is new.
        """
        step = self.scheduler.schedule()
        launched = None if step is None else self._launch(step)
        pending, self._pending = self._pending, launched
        if pending is not None:
            self._collect(pending)
        if launched is not None and launched.awaits_mask:
            self._draw(launched)
        moved, self._moved = self._moved, []
        self._count()
        return moved

    def update_weights(self, params: DistributedTransformer | nnx.State | Mapping[str, Any]) -> None:
        """Goes on with other weights; nothing is compiled.

        Requests that run go on from the text they have, read again with the new weights, and no page that was computed
        with the old ones is used again.

        Args:
            params: a model of the same structure, its `nnx.state`, or `{name: array}` for all parameters or some, by
                their names here (`norm.weight`, `layers.0.mlp.up_proj.weight`) or in Hugging Face checkpoints; arrays
                are copied, and cast to the engine's dtypes.

        Raises:
            ValueError: structures, names or shapes differ; nothing has changed then.
        """
        if self._pending is not None:
            self._collect(self._pending)
            self._pending = None
        family = family_of({"model_type": self.model_config.model_type})
        aliases = {hf_name(family, name): name for names, _, _ in named_parameters(self.model) for name in names}
        self.runner.let_go_of_weights()
        try:
            exchange_weights(self.model, params, aliases)
        finally:
            self.runner.set_weights(self.model)
        for request in (request for siblings in self._requests.values() for request in siblings):
            if request.prompt_logprobs is not None and not request.n_output:  # all of them by one model
                request.prompt_logprobs, request.n_scored = [None], 0
        self.scheduler.preempt_all()
        self.scheduler.pool.clear_cache()

    # -- to the devices

    def _launch(self, step: Step) -> _Launched:
        runner, requests = self.runner, step.requests
        n_new = int(step.n_new.sum())
        for request in step.admitted:
            self._enter(request)
        layout = runner.layout(runner.token_bucket(n_new))
        last, hidden = runner.forward(layout, layout.pack(step, self.scheduler.page_table))
        launched = _Launched(step, last)
        self.metrics.steps += 1
        if step.n_decode < len(requests):
            self.metrics.prompt_tokens += n_new - step.n_decode
            self._read_prompts(launched, hidden)
        launched.rows = np.flatnonzero(step.samples)
        launched.requests = requests if len(launched.rows) == len(requests) else [requests[i] for i in launched.rows]
        if launched.requests:
            launched.awaits_mask = self._n_constrained > 0 and any(r.grammar for r in launched.requests)
            if not launched.awaits_mask:
                self._draw(launched)
        return launched

    def _enter(self, request: Request) -> None:
        """A request has been given a slot."""
        params = request.params
        edits: list[tuple[int, float, int]] = [(id, bias, _FOREVER) for id, bias in params.logit_bias.items()]
        if params.min_tokens and request.grammar is None:  # a grammar's mask sees to it
            ending = {*params.stop_token_ids, *(() if params.ignore_eos else self._eos)}
            edits += [(id, -np.inf, min(params.min_tokens, _FOREVER)) for id in sorted(ending)]
        penalised = params.is_penalised
        self._slot_params.set(
            request.slot, n_prompt=request.n_prompt, full=not params.is_plainly_greedy,
            integers=(max(params.top_k, 0), *seed_words(request.seed), bool(edits or penalised),
                      request.grammar is not None, request.logprobs is not None),
            floats=(params.temperature, params.top_p, params.min_p, params.repetition_penalty,
                    params.frequency_penalty, params.presence_penalty))
        if edits or penalised:
            self.runner.enter_slot(request.slot, request.token_ids[:request.n_prompt] if penalised else [],
                                   request.output_token_ids if penalised else [], edits)

    def _read_prompts(self, launched: _Launched, hidden: jax.Array) -> None:
        """Looks for prompts of which something is wanted beside the next token."""
        step, now = launched.step, time.perf_counter()
        first = int(step.n_new[:step.n_decode].sum())
        for row in range(step.n_decode, len(step.requests)):
            request, start, n = step.requests[row], int(step.starts[row]), int(step.n_new[row])
            if request.metrics.first_scheduled is None:
                request.metrics.first_scheduled = now
            if request.prompt_logprobs is not None:
                # Position p says how likely token p + 1 is. What a preempted request had is not asked again.
                for position in range(max(start, request.n_scored), min(start + n, request.n_prompt - 1), SCORED_ROWS):
                    end = min(position + SCORED_ROWS, start + n, request.n_prompt - 1)
                    sampled = self.runner.score(hidden, first + np.arange(position - start, end - start),
                                                np.array(request.token_ids[position + 1:end + 1]))
                    launched.scores.append((request, end - position, sampled))
                    request.n_scored = end
            if not request.generates and start + n == request.n_prompt:
                launched.read.append((request, row))
            first += n

    def _draw(self, launched: _Launched) -> None:
        """Sends the tail of a step, and asks for its tokens."""
        runner, step, rows = self.runner, launched.step, launched.rows
        slots = step.slots[rows]
        bucket = runner.row_bucket(len(rows))
        where = pack_rows(rows, slots, bucket, runner.n_slots)
        if not self._slot_params.full[slots].any():
            launched.tokens = runner.draw_greedily(launched.last, where)
        else:
            draws = step.starts[rows] + step.n_new[rows] - self._slot_params.n_prompt[slots]
            drawing = pack_drawing(self._slot_params, slots, draws, bucket)
            mask = None
            if launched.awaits_mask:
                mask = np.full((bucket, runner.mask_words), 2**32 - 1, np.uint32)
                for i, request in enumerate(launched.requests):
                    if request.grammar is not None and request.state is not RequestState.FINISHED:
                        its = request.params
                        early = request.n_output < its.min_tokens
                        request.grammar.fill_mask(mask[i], not (its.ignore_eos or early),
                                                  its.stop_token_ids if early else ())
                        if (error := request.grammar.error) is not None:  # rather this than text that is cut short
                            self._finish(request, "abort", error)
            sampled = runner.draw(launched.last, where, drawing, mask)
            launched.tokens = sampled.tokens
            if any(request.logprobs is not None for request in launched.requests):
                launched.sampled = sampled
                for array in sampled:
                    array.copy_to_host_async()
        launched.tokens.copy_to_host_async()

    # -- from the devices

    def _collect(self, launched: _Launched) -> None:
        """Looks at a step's results, which may mean to wait for them."""
        for request, n, sampled in launched.scores:
            entries = request.prompt_logprobs
            if request.state is not RequestState.FINISHED and entries is not None:
                entries += logprob_entries(sampled, range(n), request.token_ids[len(entries):],
                                            request.params.prompt_logprobs)
        for request, row in launched.read:
            if request.state is not RequestState.FINISHED:
                if request.wants_embedding:
                    request.embedding = np.asarray(launched.last)[row].astype(np.float32)
                self._finish(request, "length")
        if launched.tokens is None:
            return
        tokens = np.asarray(launched.tokens)[:len(launched.requests)].tolist()
        if launched.sampled is not None:
            for i, request in enumerate(launched.requests):
                if request.logprobs is not None and request.state is not RequestState.FINISHED:
                    request.logprobs += logprob_entries(launched.sampled, [i], [tokens[i]], request.params.logprobs)
        now, page_size, moved = time.perf_counter(), self._page_size, self._moved
        n_dropped = 0
        for request, token in zip(launched.requests, tokens, strict=True):
            request.in_flight -= 1
            if request.state is RequestState.FINISHED:  # ended or cancelled while this was being drawn
                n_dropped += 1
                continue
            ids = request.token_ids
            ids.append(token)
            n_known = len(ids)
            if not n_known % page_size:
                self.scheduler.on_token(request)
            if n_known == request.n_prompt + 1:
                request.metrics.first_token = now
            # With a grammar that went wrong, only those tokens are allowed: `_ends_in` tells.
            if token in request.ending and (request.grammar is None or request.grammar.error is None):
                self._finish(request, "stop", token if token in request.params.stop_token_ids else None)
                continue
            if request.detokenizer is not None:
                request.pieces.append(request.detokenizer.push(token))
            if not request.plain and self._ends_in(request, token):
                continue
            if n_known >= request.max_total_tokens:
                self._finish(request, "length")
                continue
            moved.append(request)
        self.metrics.generation_tokens += len(tokens) - n_dropped

    def _ends_in(self, request: Request, token: int) -> bool:
        """Whether a token has ended the request by what its text has come to."""
        if request.params.stop and request.detokenizer.stopped_by is not None:
            self._finish(request, "stop", request.detokenizer.stopped_by)
            return True
        if request.grammar is not None:
            followed = request.grammar.accept(token)
            if request.grammar.error is not None or not followed:  # it is too large, or no token was allowed
                self._finish(request, "abort", request.grammar.error or f"token {token} is not in the grammar")
                return True
            if request.grammar.is_finished:
                self._finish(request, "stop")
                return True
        return False

    def _finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.metrics.finished = time.perf_counter()
        if request.detokenizer is not None:
            request.pieces.append(request.detokenizer.flush())
            if reason == "length" and request.detokenizer.stopped_by is not None:  # by what had been held back
                reason, stop_reason = "stop", request.detokenizer.stopped_by
                request.finish_reason, request.stop_reason = reason, stop_reason
        self.scheduler.finish(request)
        self._n_constrained -= request.grammar is not None
        self.metrics.finished[reason] += 1
        siblings = self._requests[request.request_id]
        if all(sibling.state is RequestState.FINISHED for sibling in siblings):
            del self._requests[request.request_id]
        self._moved.append(request)

    def _count(self) -> None:
        scheduler, metrics = self.scheduler, self.metrics
        metrics.running, metrics.waiting = scheduler.n_running, scheduler.n_waiting
        metrics.preemptions, metrics.pages_used = scheduler.n_preemptions, scheduler.pool.n_used
        metrics.queried_tokens, metrics.cached_tokens = scheduler.pool.queried_tokens, scheduler.pool.hit_tokens
