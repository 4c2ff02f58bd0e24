"""A device and an engine in plain Python, for tests of the scheduler: every page holds the tokens written to it.

Steps run in the order of scheduling, later than they were scheduled. Each row's whole context is read back from the
pages and compared with what it should be, so a page that is shared, evicted or given away wrongly is seen where it
does harm.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maxlike.engine.page_pool import PagePool
from maxlike.engine.request import Request, RequestState
from maxlike.engine.sampling_params import SamplingParams
from maxlike.engine.scheduler import Scheduler, Step

VOCABULARY = 3  # few, so that texts meet again
STOP = 7  # drawn now and then, and never part of a prompt


def next_token(context: Sequence[int]) -> int:
    """The model."""
    draw = zlib.crc32(bytes(context))
    return STOP if draw % 23 == 0 else draw % VOCABULARY


def alone(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """What a request yields with nobody else there."""
    sequence = list(prompt)
    while len(sequence) < len(prompt) + max_tokens:
        sequence.append(next_token(sequence))
        if sequence[-1] == STOP:
            break
    return sequence[len(prompt):]


@dataclass
class Row:
    request: Request
    slot: int
    start: int
    tokens: list[int] | None  # None: the slot's last token
    samples: bool
    pages: list[int]
    epoch: int
    ends: bool


class SimulatedEngine:
    """Adds, steps and delivers; `ahead` steps are in flight when the oldest one's tokens are looked at."""

    def __init__(self, n_pages: int = 8, page_size: int = 4, max_num_seqs: int = 4, budget: int = 16,
                 pages_per_sequence: int | None = None, caching: bool = True, ahead: int = 1, aging_steps: int = 1000,
                 headroom: int = 0):
        self.pool = PagePool(n_pages, page_size, caching)
        self.scheduler = Scheduler(self.pool, max_num_seqs=max_num_seqs, max_num_batched_tokens=budget,
                                   pages_per_sequence=pages_per_sequence or n_pages, aging_steps=aging_steps,
                                   headroom=headroom)
        self.ahead = ahead
        self.requests: list[Request] = []
        self.cancelled: set[str] = set()
        self.taken: dict[Request, int] = {}  # tokens known when it got its pages
        self.computed: dict[Request, int] = {}  # tokens run for it, all in all
        self.in_flight: deque[list[Row]] = deque()
        self.cells: dict[tuple[int, int], tuple[int, int]] = {}  # (page, offset) -> (token, epoch of the writer)
        self.last_tokens: dict[int, int] = {}
        self.sequences: dict[Request, list[int]] = {}  # as far as the device knows

    def add(self, prompt: Sequence[int], max_tokens: int = 4, **options: Any) -> Request:
        embedding = options.pop("wants_embedding", False)
        request = Request(f"r{len(self.requests)}", 0, list(prompt), SamplingParams(max_tokens=max_tokens),
                          len(prompt) + max_tokens, **options)
        request.wants_embedding = embedding
        self.scheduler.add(request)
        self.requests.append(request)
        self.sequences[request], self.computed[request] = list(prompt), 0
        return request

    def cancel(self, request: Request) -> None:
        self.cancelled.add(request.request_id)
        self.scheduler.finish(request)

    def step(self) -> Step | None:
        """Schedules and dispatches, then looks at the oldest tokens."""
        open_requests = [r for r in self.requests if r.state is not RequestState.FINISHED]
        first = min(open_requests, key=lambda r: r.arrival_key, default=None)
        preempted = {r: r.n_preemptions for r in open_requests}
        step = self.scheduler.schedule()
        if first is not None:
            assert first.n_preemptions == preempted[first], "the first of all was preempted"
        if step is not None:
            self.dispatch(step)
        if self.in_flight and (step is None or len(self.in_flight) > self.ahead):
            self.deliver()
        return step

    def dispatch(self, step: Step) -> None:
        n = len(step.requests)
        assert n and len(step.slots) == len(step.starts) == len(step.n_new) == len(step.samples) == n
        assert step.n_new.min() >= 1 and step.n_new.sum() <= self.scheduler.max_num_batched_tokens
        assert len(set(step.slots.tolist())) == n
        assert step.n_new[:step.n_decode].tolist() == [1] * step.n_decode and step.samples[:step.n_decode].all()
        for request in step.admitted:
            assert request in step.requests[step.n_decode:] and not (request.in_flight - 1 > 0)
            self.taken[request] = len(request.token_ids)
        rows = []
        columns = zip(step.requests, step.slots.tolist(), step.starts.tolist(), step.n_new.tolist(),
                      step.samples.tolist(), strict=True)
        for i, (request, slot, start, n_new, samples) in enumerate(columns):
            assert self.scheduler.slot_requests[slot] is request and self.scheduler.lengths[slot] == start + n_new
            tokens = None if i < step.n_decode else request.token_ids[start:start + n_new]
            assert tokens is None or len(tokens) == n_new
            ends = start + n_new == len(request.token_ids)
            assert tokens is None or samples == (ends and request.generates)
            pages = self.scheduler.page_table[slot, :len(request.pages)].tolist()
            rows.append(Row(request, slot, start, tokens, samples, pages, request.cache_epoch, ends))
            self.computed[request] += n_new
        self.in_flight.append(rows)

    def deliver(self) -> None:
        """Runs the oldest step and hands its tokens out."""
        rows = self.in_flight.popleft()
        size = self.pool.page_size
        written: set[tuple[int, int]] = set()
        for row in rows:
            if row.tokens is None:
                row.tokens = [self.last_tokens[row.slot]]
            for position, token in enumerate(row.tokens, row.start):
                cell = row.pages[position // size], position % size
                assert cell not in written, "two rows write to one place"
                written.add(cell)
                self.cells[cell] = token, row.epoch
        for row in rows:
            end = row.start + len(row.tokens)
            context = [self.cells[row.pages[position // size], position % size] for position in range(end)]
            sequence = self.sequences[row.request]
            assert context == [(token, row.epoch) for token in sequence[:end]], "the cache holds something else"
            if row.samples:
                assert end == len(sequence), "a token is drawn elsewhere than at the end"
                sequence.append(next_token(sequence))
                self.last_tokens[row.slot] = sequence[-1]
        for row in rows:
            if row.samples:
                self.take(row.request, self.sequences[row.request])
            elif row.ends:
                self.scheduler.finish(row.request)

    def take(self, request: Request, sequence: list[int]) -> None:
        request.in_flight -= 1
        if request.state is RequestState.FINISHED:
            return
        token = sequence[len(request.token_ids)]
        request.token_ids.append(token)
        self.scheduler.on_token(request)
        if token == STOP or len(request.token_ids) == request.max_total_tokens:
            self.scheduler.finish(request)

    def check(self) -> None:
        """Everyone owns what a simple count says, and nobody else anything."""
        self.scheduler.check()
        owned = set()
        for request in self.requests:
            if request.state is RequestState.RUNNING:
                tokens = max(self.taken[request], int(self.scheduler.lengths[request.slot]))
                assert len(request.pages) == self.pool.pages_for(tokens)
                owned.update(request.pages)
            else:
                assert not request.pages and request.slot == -1
        assert self.pool.n_used == len(owned)
        states = [request.state for request in self.requests]
        assert self.scheduler.n_waiting == states.count(RequestState.WAITING)
        assert self.scheduler.n_running == states.count(RequestState.RUNNING)

    def finish_all(self, most: int = 5000) -> None:
        """Runs until nobody is left, and looks at what everyone got."""
        for _ in range(most):
            if not (self.scheduler.has_requests or self.in_flight):
                break
            self.step()
        self.check()
        assert self.pool.n_used == 0 and not self.scheduler.has_requests, "someone never finishes"
        for request in self.requests:
            expected = alone(request.token_ids[:request.n_prompt], request.params.max_tokens or 0)
            if request.request_id in self.cancelled:
                expected = expected[:request.n_output]
            elif request.wants_embedding:
                expected = []
            assert request.output_token_ids == expected, f"{request.request_id} is not what it is alone"
