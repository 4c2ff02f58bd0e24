"""Any order of operations keeps the books, the pages' contents and every request's text."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from maxlike.engine.request import RequestState
from tests.engine.simulated_device import VOCABULARY, SimulatedEngine

OPERATIONS: Counter[str] = Counter()
STEMS = ([0] * 9, [0, 1, 2] * 4, [0, 1, 2, 0, 2])  # prompts begin alike


class Operations(RuleBasedStateMachine):
    @initialize(n_pages=st.integers(5, 12), page_size=st.sampled_from([1, 2, 4]), seqs=st.integers(1, 5),
                budget=st.integers(1, 20), caching=st.sampled_from([True, True, True, False]), ahead=st.integers(0, 2),
                aging_steps=st.sampled_from([1, 5, 1000]), headroom=st.sampled_from([0, 0, 1, 3, 16]))
    def start(self, n_pages: int, page_size: int, seqs: int, budget: int, caching: bool, ahead: int,
              aging_steps: int, headroom: int) -> None:
        self.engine = SimulatedEngine(n_pages, page_size, seqs, budget, None, caching, ahead, aging_steps,
                                      headroom)

    @rule(stem=st.sampled_from(STEMS), length=st.integers(0, 12), max_tokens=st.sampled_from([0, 1, 2, 5, 12]),
          tail=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
          priority=st.sampled_from([0, 0, 0, -1, 2]), reuse=st.sampled_from([True, True, True, False]),
          embedding=st.sampled_from([False] * 5 + [True]), n=st.sampled_from([1, 1, 3]))
    def add(self, stem: list[int], length: int, max_tokens: int, tail: list[int], priority: int, reuse: bool,
            embedding: bool, n: int) -> None:
        room = self.engine.pool.n_pages * self.engine.pool.page_size
        prompt = (stem[:length] + tail)[:room - 1]
        for _ in range(n):
            self.engine.add(prompt, min(max_tokens, room - len(prompt)), priority=priority, reuse_prefix=reuse,
                            wants_embedding=embedding)

    @rule(steps=st.integers(1, 3))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.step()

    @precondition(lambda self: self.engine.in_flight)
    @rule()
    def deliver(self) -> None:
        self.engine.deliver()

    @precondition(lambda self: self.open_requests())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from(self.open_requests())))

    @rule()
    def preempt_all(self) -> None:
        self.engine.scheduler.preempt_all()

    @rule()
    def clear_cache(self) -> None:
        self.engine.pool.clear_cache()

    @rule()
    def new_weights(self) -> None:
        self.engine.scheduler.preempt_all()
        self.engine.pool.clear_cache()

    @invariant()
    def books_balance(self) -> None:
        OPERATIONS["checked"] += 1
        self.engine.check()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.finish_all()
            OPERATIONS.update(preempted=self.engine.scheduler.n_preemptions, evicted=self.engine.pool.evictions,
                              cancelled=len(self.engine.cancelled), hits=self.engine.pool.hit_tokens)

    def open_requests(self) -> list:
        return [request for request in self.engine.requests if request.state is not RequestState.FINISHED]


def test_any_order_of_ten_thousand_operations() -> None:
    OPERATIONS.clear()
    run_state_machine_as_test(Operations, settings=settings(max_examples=200, stateful_step_count=100))
    assert OPERATIONS["checked"] >= 10_000, OPERATIONS
    # Otherwise the machine has become tame, and shows nothing.
    assert all(OPERATIONS[name] >= 100 for name in ("preempted", "evicted", "cancelled", "hits")), OPERATIONS
