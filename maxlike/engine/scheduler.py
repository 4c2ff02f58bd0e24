"""What runs in the next step: continuous batching, chunked prefill, preemption. No jax here.

Every step takes one token of each sequence that decodes, and fills the rest of its token budget with prompts, in
chunks. A sequence decodes one step ahead of the host: its next token is scheduled before the last one has been seen,
so here is counted what a step will do, not what it has done. Whatever depends on a step already scheduled is right all
the same, because the device runs steps in the order of scheduling.

Nothing here looks at a clock or draws a number: the same calls give the same schedule, on every host.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from maxlike.engine.page_pool import PagePool, extend_hashes
from maxlike.engine.request import Request, RequestState

_KEY = attrgetter("arrival_key")
_INT32 = np.iinfo(np.int32)


@dataclass(slots=True)
class Step:
    """One step's rows, a sequence each, in the order of the ragged batch.

    Args:
        requests: of the rows.
        slots: `int32[n]`, where each row's last drawn token lies on the device, and the one that it draws goes.
        starts: `int32[n]`, tokens of the row in the cache before.
        n_new: `int32[n]`, tokens of the row in this step.
        n_decode: the first so many rows read one token each, the last drawn, which only the device may know; the
            others read `request.token_ids[start:start + n_new]`.
        samples: `bool[n]`, whether the row gets to the end of its sequence and draws a token.
        admitted: requests that got their slot in this step.
        preempted: requests that lost theirs since the step before. Who stands in both lost it first.
    """

    requests: list[Request]
    slots: np.ndarray
    starts: np.ndarray
    n_new: np.ndarray
    n_decode: int
    samples: np.ndarray
    admitted: list[Request]
    preempted: list[Request]


class Scheduler:
    """Decides step by step who runs, and keeps the books on slots and pages.

    Requests stand in the order of a key: the step of their arrival plus `aging_steps` for each level of `priority`,
    then the order of arrival. So lower priority values go first, but nobody is overtaken by those who come more than
    `aging_steps` steps a level later. A request that lacks pages to go on takes them from the running one with the
    largest key. It is recomputed later, and goes on as if nothing had been: the first of all is never disturbed,
    hence every one finishes in the end.

    `lengths`, `limit`, `capacity`, `page_table` and `decoding` are numpy arrays over the slots, to be read but not
    written by others: a step of decodes alone loops over no sequence except to list its requests.

    Args:
        pool: the pages.
        max_num_seqs: slots, the most that run at once.
        max_num_batched_tokens: the most tokens in a step.
        pages_per_sequence: M, the width of the page table.
        aging_steps: what a level of priority is worth, in steps.
        headroom: a request is admitted only where it and those that run could all go on for so many tokens. With 0
            an engine that lacks pages lets many in only to preempt and recompute them.

    Raises:
        ValueError: `headroom` is below 0, or another of the numbers below 1.
    """

    def __init__(self, pool: PagePool, *, max_num_seqs: int, max_num_batched_tokens: int, pages_per_sequence: int,
                 aging_steps: int = 1000, headroom: int = 16):
        for name, value, least in (("max_num_seqs", max_num_seqs, 1), ("aging_steps", aging_steps, 1),
                                   ("max_num_batched_tokens", max_num_batched_tokens, 1),
                                   ("pages_per_sequence", pages_per_sequence, 1), ("headroom", headroom, 0)):
            if value < least:
                raise ValueError(f"Scheduler.{name} must be at least {least}; got {value}.")
        self.pool = pool
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.pages_per_sequence, self.aging_steps, self.headroom = pages_per_sequence, aging_steps, headroom
        self.n_preemptions = 0
        """In all."""
        self.lengths = np.zeros(max_num_seqs, np.int32)
        """Tokens whose keys and values are in the cache once all steps scheduled so far have run."""
        self.limit = np.zeros(max_num_seqs, np.int32)
        """The length at which the last token has been drawn. It is never read, so its keys and values need no place."""
        self.capacity = np.zeros(max_num_seqs, np.int32)
        """Tokens that the pages take."""
        self.page_table = np.zeros((max_num_seqs, pages_per_sequence), np.int32)
        """Entries beyond a sequence's pages mean nothing."""
        self.decoding = np.zeros(max_num_seqs, bool)
        """Whether the sequence has been read to its end, and tokens are drawn."""
        self.slot_requests: list[Request | None] = [None] * max_num_seqs
        self._known = np.zeros(max_num_seqs, np.int32)  # tokens at admission
        self._priorities = np.full(max_num_seqs, _INT32.min, np.int64)  # of an empty slot: nobody's victim
        self._free_slots = list(reversed(range(max_num_seqs)))
        self._waiting: list[Request] = []  # by key
        self._prefilling: list[Request] = []  # those running that are not read to their end, by key
        self._computing: dict[bytes, Request] = {}  # hash of a page that is not registered yet -> who computes it
        self._preempted: list[Request] = []  # since the last step
        self._n_arrived = self._n_steps = self._next_decode = 0

    @property
    def n_running(self) -> int:
        """Requests with a slot."""
        return self.max_num_seqs - len(self._free_slots)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for one."""
        return len(self._waiting)

    @property
    def has_requests(self) -> bool:
        """Whether anyone runs or waits."""
        return self.n_running > 0 or bool(self._waiting)

    def add(self, request: Request) -> None:
        """The new request waits from now on.

        Raises:
            ValueError: it could never be finished, even alone; or its priority is not within int32.
        """
        assert request.state is RequestState.WAITING and not request.output_token_ids, "only new requests are added"
        self._check_fits(request)
        if not _INT32.min < request.priority <= _INT32.max:
            raise ValueError(f"priority must be between {_INT32.min + 1} and {_INT32.max}; got {request.priority}.")
        request.arrival_key = (self._n_steps + request.priority * self.aging_steps, self._n_arrived)
        self._n_arrived += 1
        insort(self._waiting, request, key=_KEY)

    def schedule(self) -> Step | None:
        """The next step, which must be run: the books already say that it was. `None` if nothing can be done now.

        That is so when nobody is there, or when tokens in flight have to be delivered (or requests finished) first.
        """
        n_before = len(self._preempted)
        decodes = self._decodes()
        budget = self.max_num_batched_tokens - len(decodes)
        chunks: list[tuple[Request, int]] = []
        for request in self._prefilling:
            if budget == 0:
                break
            chunks.append((request, min(budget, len(request.token_ids) - int(self.lengths[request.slot]))))
            budget -= chunks[-1][1]
        requests = [self._at(slot) for slot in decodes.tolist()]
        admitted = self._admit(budget, chunks, n_before)
        if len(self._preempted) > n_before:  # room was made for an admission
            kept = [request.state is RequestState.RUNNING for request in requests]
            decodes = decodes[kept]
            requests = [request for request in requests if request.state is RequestState.RUNNING]
            chunks = [chunk for chunk in chunks if chunk[0].state is RequestState.RUNNING]
        if not requests and not chunks:
            return None
        return self._commit(decodes, requests, chunks, admitted)

    def on_token(self, request: Request) -> None:
        """To be called when tokens were appended to `request.token_ids`: full pages may be found by others now."""
        if (self.pool.enable_prefix_caching and request.state is RequestState.RUNNING
                and len(request.token_ids) // self.pool.page_size > request.n_registered):
            self._register(request)

    def finish(self, request: Request) -> None:
        """The request ends here, whatever its state, and gives back slot and pages at once. Twice is as good as once.

        A step in flight may still write to those pages. That harms nobody: the device runs steps in order, so the
        next owner writes later, and before it reads; and a registered page is full, written for the last time by a
        step already scheduled, with what its hash says.
        """
        if request.state is RequestState.RUNNING:
            self._give_up_slot(request)
        elif request.state is RequestState.WAITING:
            place = bisect_left(self._waiting, request.arrival_key, key=_KEY)
            if self._waiting[place:place + 1] == [request]:  # else it was never added
                del self._waiting[place]
        request.state = RequestState.FINISHED

    def preempt_all(self) -> None:
        """All that run wait again, to be recomputed. With `pool.clear_cache()` for new weights."""
        for request in self.slot_requests:
            if request is not None:
                self._preempt(request)

    def check(self) -> None:
        """Raises `AssertionError` where the books do not balance; for tests, as it looks at everything."""
        self.pool.check()
        owners: Counter[int] = Counter()
        contents: dict[int, bytes] = {}
        for slot, request in enumerate(self.slot_requests):
            if request is None:
                assert not (self.decoding[slot] or self.lengths[slot] or self.capacity[slot]), f"slot {slot} is in use"
                assert slot in self._free_slots, f"slot {slot} is lost"
                continue
            length, known, pages = int(self.lengths[slot]), len(request.token_ids), request.pages
            assert request.state is RequestState.RUNNING and request.slot == slot, f"slot {slot} has another's request"
            assert self.page_table[slot, :len(pages)].tolist() == pages, f"slot {slot} has another page table"
            assert length <= self.capacity[slot] == len(pages) * self.pool.page_size, f"slot {slot} outgrew its pages"
            assert request.n_registered * self.pool.page_size <= length, "a page is registered before it is written"
            owners.update(pages)
            for page, hash in zip(pages[:request.n_registered], request.page_hashes, strict=False):
                assert contents.setdefault(page, hash) == hash, f"page {page} is shared by different texts"
            if self.decoding[slot]:
                assert length == known + request.in_flight - 1 <= self.limit[slot], "lengths and tokens disagree"
            else:
                assert not request.in_flight, "a token is in flight before the prompt is read"
                assert (length < known) == (request in self._prefilling), "who reads a prompt is not on the list"
                assert length < known or not request.generates, "nothing is drawn at the end of a prompt"
            assert self.pool.enable_prefix_caching or not request.page_hashes, "pages are hashed for nothing"
        assert all(self.pool.owners(page) == owners[page] for page in range(self.pool.n_pages)), "owners are miscounted"
        for request in filter(None, self.slot_requests):
            assert all(owners[page] == 1 for page in request.pages[request.n_registered:]), "a page is shared too early"
        assert len(self._free_slots) == self.max_num_seqs - sum(map(bool, self.slot_requests)), "a slot is free twice"
        for line in (self._waiting, self._prefilling):
            assert [*map(_KEY, line)] == sorted({*map(_KEY, line)}), "who waits is out of order"
        assert all(r.state is RequestState.WAITING and not r.pages for r in self._waiting), "who waits has a page"
        assert all(r.state is RequestState.RUNNING for r in self._prefilling), "a prompt is read without a slot"
        assert all(request in self._prefilling for request in self._computing.values()), "a page is computed by nobody"

    def _check_fits(self, request: Request) -> None:
        most = min(self.pool.n_pages, self.pages_per_sequence)
        room = f"{most} pages of {self.pool.page_size}, {most * self.pool.page_size} tokens, "
        room += "which is all the cache has" if most == self.pool.n_pages else "the longest sequence allowed"
        needed = request.n_prompt + request.generates
        if self.pool.pages_for(needed) > most:
            new = ", and one more is to be drawn" if request.generates else ""
            raise ValueError(f"The prompt has {request.n_prompt} tokens{new}; there is room for {room}. Shorten the "
                             "prompt, or give the engine a larger cache.")
        if request.generates and not needed <= request.max_total_tokens <= most * self.pool.page_size:
            raise ValueError(f"max_total_tokens must be above the prompt's {request.n_prompt} and fit {room}; got "
                             f"{request.max_total_tokens}.")

    def _at(self, slot: int) -> Request:
        request = self.slot_requests[slot]
        assert request is not None, f"slot {slot} is empty"
        return request

    def _decodes(self) -> np.ndarray:
        """The slots that decode in this step, each with a page for it. Preempts where pages are wanting."""
        ready = np.flatnonzero(self.decoding & (self.lengths < self.limit))
        if len(ready) > self.max_num_batched_tokens:  # in turns
            first = np.searchsorted(ready, self._next_decode)
            ready = np.roll(ready, -first)[:self.max_num_batched_tokens]
            self._next_decode = int(ready[-1]) + 1
        full = ready[self.lengths[ready] == self.capacity[ready]]
        if len(full) == 0:
            return ready
        for request in sorted(map(self._at, full.tolist()), key=_KEY):
            while request.state is RequestState.RUNNING:
                page = self.pool.allocate(1)
                if page is not None:
                    self._append_pages(request, page)
                    break
                self._preempt(max(filter(None, self.slot_requests), key=_KEY))
        return ready[self.decoding[ready]]

    def _admit(self, budget: int, chunks: list[tuple[Request, int]], n_before: int) -> list[Request]:
        """Gives slots and pages to those who wait, appends their chunks, and returns them."""
        admitted: list[Request] = []
        place = 0
        while budget > 0 and place < min(len(self._waiting), self.max_num_seqs):
            request = self._waiting[place]
            # Recomputing begins when all tokens are known. Who was preempted just now stays so for this step: its
            # row has been taken out of it.
            if request.in_flight or request in self._preempted[n_before:]:
                break
            if not self._free_slots and not (self._priorities > request.priority).any():
                break
            cached = self._cached_prefix(request)
            if cached is None:  # there will be more in the cache after this step or a later one, so others may pass
                place += 1
                continue
            if not self._make_room(request, cached):
                break  # nobody passes one that wants pages, or large ones might never get theirs
            del self._waiting[place]
            self._start(request, cached)
            admitted.append(request)
            chunks.append((request, min(budget, len(request.token_ids) - int(self.lengths[request.slot]))))
            budget -= chunks[-1][1]
        return admitted

    def _cached_prefix(self, request: Request) -> list[int] | None:
        """Pages in the cache that the sequence begins with; `None` if a running request is computing the next one."""
        if not self.pool.enable_prefix_caching:
            return []
        extend_hashes(request.page_hashes, request.token_ids, self.pool.page_size)
        if not request.reuse_prefix:
            return []
        # The last token has to be read, whether or not it is in the cache: what follows it is not.
        hashes = request.page_hashes[:(len(request.token_ids) - 1) // self.pool.page_size]
        pages = self.pool.lookup(hashes)
        return None if len(pages) < len(hashes) and hashes[len(pages)] in self._computing else pages

    def _make_room(self, request: Request, cached: list[int]) -> bool:
        """Whether a slot and pages are there; running requests of higher priority values make way where that helps.

        Pages for the sequence, and for the headroom of it and of all that go on.
        """
        n_tokens = len(request.token_ids)
        goal = min(n_tokens + self.headroom, request.max_total_tokens - 1) if request.generates else n_tokens
        wanted = self.pool.pages_for(goal) - len(cached)
        goals = np.minimum(np.maximum(self.lengths, self._known) + self.headroom, self.limit)
        growth = np.maximum(-(-(goals - self.capacity) // self.pool.page_size), 0)
        free = self.pool.n_free_beside(cached) - int(growth.sum())
        if self._free_slots and free >= wanted:
            return True
        candidates = [self._at(slot) for slot in np.flatnonzero(self._priorities > request.priority).tolist()]
        victims: list[Request] = []
        owned: Counter[int] = Counter()
        for victim in sorted(candidates, key=_KEY, reverse=True):
            if victim.arrival_key < request.arrival_key:
                break
            victims.append(victim)
            owned.update(victim.pages)
            free += sum(owned[page] == self.pool.owners(page) and page not in cached for page in victim.pages)
            free += int(growth[victim.slot])
            if free >= wanted:
                for loser in victims:
                    self._preempt(loser)
                return True
        return False

    def _start(self, request: Request, cached: list[int]) -> None:
        page_size, n_tokens = self.pool.page_size, len(request.token_ids)
        self.pool.share(cached)
        fresh = self.pool.allocate(self.pool.pages_for(n_tokens) - len(cached))
        assert fresh is not None, "room was made"
        slot = request.slot = self._free_slots.pop()
        request.state = RequestState.RUNNING
        request.cache_epoch = self.pool.epoch
        request.n_registered = len(cached)
        self.slot_requests[slot] = request
        self.lengths[slot] = len(cached) * page_size
        self._known[slot] = n_tokens
        self.limit[slot] = request.max_total_tokens - 1 if request.generates else 0
        self._priorities[slot] = request.priority
        self._append_pages(request, cached + fresh)
        insort(self._prefilling, request, key=_KEY)
        for hash in request.page_hashes[len(cached):]:
            self._computing.setdefault(hash, request)
        if request.reuse_prefix and self.pool.enable_prefix_caching and not request.n_preemptions:
            request.metrics.cached_tokens = len(cached) * page_size
            self.pool.queried_tokens += n_tokens
            self.pool.hit_tokens += len(cached) * page_size

    def _append_pages(self, request: Request, pages: list[int]) -> None:
        n_before = len(request.pages)
        request.pages += pages
        self.page_table[request.slot, n_before:len(request.pages)] = pages
        self.capacity[request.slot] = len(request.pages) * self.pool.page_size

    def _commit(self, decodes: np.ndarray, requests: list[Request], chunks: list[tuple[Request, int]],
                admitted: list[Request]) -> Step:
        """Writes the step into the books."""
        n_decode = len(requests)
        slots = np.concatenate([decodes, np.array([request.slot for request, _ in chunks], int)]).astype(np.int32)
        n_new = np.ones(len(slots), np.int32)
        n_new[n_decode:] = [n for _, n in chunks]
        starts = self.lengths[slots]
        self.lengths[slots] += n_new
        samples = np.ones(len(slots), bool)
        for request in requests:
            request.in_flight += 1
        for row, (request, _) in enumerate(chunks, n_decode):
            ends = self.lengths[request.slot] == len(request.token_ids)
            samples[row] = ends and request.generates
            if ends:
                self._prefilling.remove(request)
            if samples[row]:
                self.decoding[request.slot] = True
                request.in_flight += 1
            # Now, after all have been admitted: none of them reads what this same step writes.
            self._register(request)
            requests.append(request)
        self._n_steps += 1
        preempted, self._preempted = self._preempted, []
        return Step(requests, slots, starts, n_new, n_decode, samples, admitted, preempted)

    def _register(self, request: Request) -> None:
        """Makes pages known that are full of known tokens, written in steps scheduled so far."""
        if not self.pool.enable_prefix_caching:
            return
        extend_hashes(request.page_hashes, request.token_ids, self.pool.page_size)
        n_full = min(len(request.page_hashes), int(self.lengths[request.slot]) // self.pool.page_size)
        for i in range(request.n_registered, n_full):
            hash = request.page_hashes[i]
            if request.cache_epoch == self.pool.epoch:
                self.pool.register(request.pages[i], hash)
            self._computing.pop(hash, None)
        request.n_registered = n_full

    def _preempt(self, request: Request) -> None:
        self._give_up_slot(request)
        request.state = RequestState.WAITING
        request.n_preemptions += 1
        self.n_preemptions += 1
        self._preempted.append(request)
        insort(self._waiting, request, key=_KEY)

    def _give_up_slot(self, request: Request) -> None:
        slot = request.slot
        self.pool.release(request.pages)
        for hash in request.page_hashes[request.n_registered:]:
            if self._computing.get(hash) is request:
                del self._computing[hash]
        if request in self._prefilling:
            self._prefilling.remove(request)
        self.decoding[slot] = False
        self.lengths[slot] = self.limit[slot] = self.capacity[slot] = 0
        self._priorities[slot] = _INT32.min
        self.slot_requests[slot] = None
        self._free_slots.append(slot)
        request.slot, request.pages = -1, []
