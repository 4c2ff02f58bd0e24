"""The scheduler's rules one by one, run on a device that checks every page that is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from maxlike.engine.page_pool import PagePool
from maxlike.engine.request import Request, RequestState
from maxlike.engine.sampling_params import SamplingParams
from maxlike.engine.scheduler import Scheduler, Step
from tests.engine.simulated_device import STOP, SimulatedEngine, alone


def never_stops(n_prompt: int, n_output: int, skip: int = 0) -> list[int]:
    """A prompt of which the simulated model makes at least `n_output` tokens; another `skip`, another first token."""
    for number in range(200):
        prompt = [number, *(20 + i % 11 for i in range(n_prompt - 1))]
        if STOP not in alone(prompt, n_output):
            skip -= 1
            if skip < 0:
                return prompt
    raise AssertionError("no such prompt")


def rows(step: Step | None) -> list[tuple[str, int, int, bool]]:
    """(request, start, new tokens, samples) of each row."""
    assert step is not None
    return [(request.request_id, int(start), int(n), bool(samples)) for request, start, n, samples in
            zip(step.requests, step.starts, step.n_new, step.samples, strict=True)]


def test_decodes_go_first_and_prompts_fill_the_budget_in_chunks() -> None:
    engine = SimulatedEngine(n_pages=20, budget=8)
    first = engine.add(never_stops(3, 6), 6)
    step = engine.step()
    assert rows(step) == [("r0", 0, 3, True)] and step.n_decode == 0 and step.admitted == [first]
    engine.add(never_stops(12, 4), 4)
    engine.add(never_stops(5, 4), 4)
    step = engine.step()  # the first token of r0 is not known yet
    assert rows(step) == [("r0", 3, 1, True), ("r1", 0, 7, False)] and step.n_decode == 1
    step = engine.step()
    assert rows(step) == [("r0", 4, 1, True), ("r1", 7, 5, True), ("r2", 0, 2, False)] and step.n_decode == 1
    step = engine.step()
    assert rows(step) == [("r0", 5, 1, True), ("r1", 12, 1, True), ("r2", 2, 3, True)] and step.n_decode == 2
    assert [a.dtype for a in (step.slots, step.starts, step.n_new, step.samples)] == [np.int32] * 3 + [np.bool_]
    engine.finish_all()


def test_a_request_decodes_ahead_of_the_host_and_no_further_than_its_limit() -> None:
    engine = SimulatedEngine(n_pages=4, ahead=9)  # the host sees nothing until the end
    request = engine.add(never_stops(3, 4), 4)
    assert [rows(engine.step())[0][1:] for _ in range(4)] == [(0, 3, True), (3, 1, True), (4, 1, True), (5, 1, True)]
    assert request.in_flight == 4 and engine.scheduler.lengths[request.slot] == 6  # the seventh token is never read
    assert engine.scheduler.schedule() is None
    engine.finish_all()
    assert request.n_output == 4 and request.in_flight == 0


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": 4, "wants_embedding": True}])
def test_a_prompt_that_is_only_read_draws_nothing_and_runs_until_it_is_finished(options: dict[str, Any]) -> None:
    engine = SimulatedEngine(budget=4, ahead=9)
    request = engine.add([0, 1, 2, 0, 1], **options)
    request.max_total_tokens = 2**40  # of no interest where nothing is drawn
    assert rows(engine.step()) == [("r0", 0, 4, False)] and rows(engine.step()) == [("r0", 4, 1, False)]
    assert engine.scheduler.schedule() is None and request.state is RequestState.RUNNING and not request.in_flight
    engine.finish_all()
    assert request.state is RequestState.FINISHED


def test_slots_bound_what_runs_at_once() -> None:
    engine = SimulatedEngine(n_pages=20, max_num_seqs=2)
    for _ in range(5):
        engine.add(never_stops(2, 3), 3)
    step = engine.step()
    assert len(step.admitted) == 2 and engine.scheduler.n_running == 2 and engine.scheduler.n_waiting == 3
    engine.finish_all()


def test_decodes_take_turns_when_the_budget_is_smaller_than_their_number() -> None:
    engine = SimulatedEngine(n_pages=20, max_num_seqs=5, budget=2)
    for i in range(5):
        engine.add(never_stops(1 + i % 2, 40, skip=i // 2), 40)
    engine.scheduler.max_num_batched_tokens = 20
    engine.step()
    engine.scheduler.max_num_batched_tokens = 2
    turns = [request.request_id for _ in range(10) for request in engine.step().requests]
    assert {name: turns.count(name) for name in turns} == {f"r{i}": 4 for i in range(5)}


def test_beginnings_are_shared_by_whole_pages_and_the_last_token_is_read_again() -> None:
    engine = SimulatedEngine(n_pages=20, page_size=4)
    prompt = never_stops(12, 5)
    first = engine.add(prompt, 5)
    engine.step()
    same, longer, other = engine.add(prompt, 5), engine.add([*prompt, 1, 2], 3), engine.add([2, *prompt[1:]], 3)
    step = engine.step()
    assert rows(step)[1:] == [("r1", 8, 4, True), ("r2", 12, 2, True), ("r3", 0, 9, False)]
    assert same.pages[:2] == first.pages[:2] and same.pages[2] != first.pages[2] and longer.pages[:3] == first.pages[:3]
    assert not {*other.pages} & {*first.pages}
    assert [r.metrics.cached_tokens for r in engine.requests] == [0, 8, 12, 0]
    assert (engine.pool.queried_tokens, engine.pool.hit_tokens) == (12 + 12 + 14 + 12, 8 + 12)
    engine.finish_all()


def test_output_is_found_by_the_next_turn() -> None:
    engine = SimulatedEngine(n_pages=20, page_size=4, budget=32)
    prompt = never_stops(6, 9)
    engine.add(prompt, 9)
    engine.finish_all()
    again = engine.add([*prompt, *alone(prompt, 9), 0, 1], 2)
    engine.step()
    assert again.metrics.cached_tokens == 12  # of 15; the last token was drawn but never read
    engine.finish_all()


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_full_pages_of_output_are_registered_however_far_the_host_is_behind(ahead: int) -> None:
    engine = SimulatedEngine(n_pages=20, page_size=2, ahead=ahead)
    request = engine.add(never_stops(3, 20), 20)
    for _ in range(12):
        engine.step()
        full = min(len(request.token_ids), int(engine.scheduler.lengths[0])) // 2
        # Without running ahead a page is written a step after its last token is known, and is registered the next time.
        assert full - (ahead == 0) <= request.n_registered <= full
    engine.finish_all()


def test_one_beginning_is_computed_once_however_many_come_at_a_time() -> None:
    engine = SimulatedEngine(n_pages=60, page_size=4, max_num_seqs=16, budget=64)
    stem = never_stops(40, 1)
    for i in range(12):
        engine.add([*stem, i % 3, i // 3], 2)
    other = engine.add(never_stops(5, 2, skip=1), 2)
    step = engine.step()
    assert step.admitted == [engine.requests[0], other], "who waits for the pages of another is passed"
    assert len(engine.step().admitted) == 11
    engine.finish_all()
    assert sum(request.n_prompt - request.metrics.cached_tokens for request in engine.requests[:12]) == 40 + 12 * 2


@pytest.mark.parametrize("way", ["cancel", "preempt", "clear"])
def test_nobody_waits_for_pages_that_will_not_come(way: str) -> None:
    engine = SimulatedEngine(n_pages=20, page_size=4, budget=6)
    prompt = never_stops(16, 2)
    first, second = engine.add(prompt, 2), engine.add(prompt, 2)
    engine.step()
    assert engine.scheduler.n_waiting == 1
    if way == "cancel":
        engine.cancel(first)
    elif way == "preempt":
        engine.scheduler.preempt_all()
    else:
        engine.pool.clear_cache()
    engine.finish_all()
    assert second.n_output == 2 and second.metrics.cached_tokens == {"cancel": 4, "preempt": 12, "clear": 0}[way]


def test_who_asks_for_all_of_the_prompt_reads_all_of_it() -> None:
    engine = SimulatedEngine(n_pages=20, budget=64)
    prompt = never_stops(12, 2)
    engine.add(prompt, 2)
    engine.add(prompt, 2, reuse_prefix=False)
    assert rows(engine.step()) == [("r0", 0, 12, True), ("r1", 0, 12, True)]
    engine.finish_all()
    engine.add(prompt, 2, reuse_prefix=False)
    assert rows(engine.step()) == [("r2", 0, 12, True)] and engine.pool.queried_tokens == 12


def test_without_caching_nothing_is_shared_or_waited_for() -> None:
    engine = SimulatedEngine(n_pages=20, budget=64, caching=False)
    for _ in range(3):
        engine.add(never_stops(12, 5), 5)
    assert len(engine.step().admitted) == 3
    engine.finish_all()
    assert all(not request.page_hashes for request in engine.requests) and engine.pool.queried_tokens == 0


def test_what_was_computed_before_the_cache_was_cleared_is_never_found() -> None:
    engine = SimulatedEngine(n_pages=30, page_size=2, budget=64)
    prompt = never_stops(8, 30)
    text = prompt + alone(prompt, 30)
    engine.add(prompt, 30)
    for _ in range(4):
        engine.step()
    engine.pool.clear_cache()
    fresh = engine.add(text[:12], 1)  # registers the beginning anew, as far as r0 had got
    for _ in range(8):
        engine.step()  # and here r0 fills the pages behind it
    late = engine.add([*text[:17], 0], 1)
    engine.step()
    assert fresh.metrics.cached_tokens == 0 and late.metrics.cached_tokens == 12
    engine.finish_all()


def test_the_last_comer_makes_way_and_goes_on_as_if_nothing_had_been() -> None:
    engine = SimulatedEngine(n_pages=6, page_size=2, budget=32, caching=False)
    first, second, third = (engine.add(never_stops(3, 8, skip=i), 8) for i in range(3))
    preempted = []
    while first.state is not RequestState.FINISHED:
        step = engine.step()
        preempted += step.preempted if step else []
    assert preempted[:2] == [third, second] and first.n_preemptions == 0
    engine.finish_all()
    assert engine.scheduler.n_preemptions == second.n_preemptions + third.n_preemptions
    assert [r.request_id for r in sorted(engine.requests, key=lambda r: r.arrival_key)] == ["r0", "r1", "r2"]


def test_recomputing_waits_until_all_tokens_are_known() -> None:
    engine = SimulatedEngine(n_pages=9, page_size=2, budget=32, ahead=9)
    request = engine.add(never_stops(3, 8), 8)
    engine.step()
    engine.step()
    engine.scheduler.preempt_all()
    assert request.in_flight == 2 and request.state is RequestState.WAITING and engine.pool.n_used == 0
    assert engine.scheduler.schedule() is None
    engine.deliver()
    assert engine.scheduler.schedule() is None
    engine.deliver()
    step = engine.step()
    assert step.preempted == step.admitted == [request] and request.n_output == 2
    assert (request.metrics.cached_tokens, engine.pool.queried_tokens, engine.pool.hit_tokens) == (0, 3, 0), "only once"
    assert rows(step) == [("r0", 2, 3, True)]  # the first page is in the cache, the second was not known to be full
    engine.finish_all()


def test_requests_wait_for_pages_in_order_and_none_is_lost() -> None:
    engine = SimulatedEngine(n_pages=8, page_size=2, max_num_seqs=8, budget=64)
    engine.add(never_stops(9, 3), 3)
    large, small = engine.add(never_stops(8, 2, skip=1), 2), engine.add(never_stops(2, 2), 2)
    step = engine.step()
    assert len(step.admitted) == 1 and engine.pool.n_free == 3, "the small one does not pass the large one"
    admitted = []
    while engine.scheduler.has_requests:
        step = engine.step()
        admitted += step.admitted if step else []
    assert admitted == [large, small]
    for i in range(60):
        engine.add(never_stops(1 + i % 11, 1 + i % 5, skip=i % 7), 1 + i % 5)
    engine.finish_all()


def test_admission_leaves_room_to_go_on() -> None:
    engine = SimulatedEngine(n_pages=10, page_size=2, budget=64, headroom=4)
    first, second = engine.add(never_stops(5, 12), 12), engine.add(never_stops(7, 2, skip=1), 2)
    third, fourth = (engine.add(never_stops(1, 2, skip=i), 2) for i in (2, 3))
    # To go on they want pages for 9, 8 and 2 tokens (their last one is never read): all 10, of which they have 8.
    assert engine.step().admitted == [first, second, third] and engine.pool.n_free == 2
    assert engine.step().admitted == [] and engine.pool.n_free > 0
    engine.finish_all()
    assert fourth.n_output == 2 and engine.scheduler.n_preemptions == 0


def test_who_is_admitted_has_room_to_go_on() -> None:
    engine = SimulatedEngine(n_pages=10, page_size=2, budget=64, headroom=4)
    first = engine.add(never_stops(5, 12), 12)
    engine.add(never_stops(7, 12, skip=1), 12)  # has 4 pages and will want 6; 7 are free, 2 of them for `first`
    assert engine.step().admitted == [first]
    engine.finish_all()


def test_who_makes_way_needs_no_room_to_go_on() -> None:
    engine = SimulatedEngine(n_pages=8, page_size=2, budget=64, headroom=4)
    low = engine.add(never_stops(3, 12), 12, priority=5)
    engine.step()
    high = engine.add(never_stops(15, 1, skip=1), 1)  # all pages
    step = engine.step()
    assert step.admitted == [high] and step.preempted == [low]
    engine.finish_all()


def test_headroom_spares_recomputing() -> None:
    computed = []
    for headroom in (0, 16):
        engine = SimulatedEngine(n_pages=100, page_size=4, max_num_seqs=64, budget=128, headroom=headroom)
        for i in range(150):
            engine.add([i % 7, i, *range(4 + i % 13)], 40)
        engine.finish_all()
        computed.append(sum(engine.computed.values()))
    needed = sum(len(request.token_ids) - 1 for request in engine.requests)
    assert computed[1] - needed < (computed[0] - needed) / 4, (computed, needed)


def test_lower_values_make_higher_ones_wait_and_give_way() -> None:
    engine = SimulatedEngine(n_pages=40, page_size=2, max_num_seqs=2, budget=32)
    low = [engine.add(never_stops(4, 9, skip=i), 9, priority=5) for i in range(3)]
    assert engine.step().admitted == low[:2]
    equal, high = engine.add(never_stops(3, 2), 2, priority=5), engine.add(never_stops(5, 2), 2)
    step = engine.step()
    assert step.admitted == [high] and step.preempted == [low[1]] and low[1] not in step.requests
    assert step.requests == [low[0], high]
    assert engine.scheduler.n_waiting == 3 and equal.n_preemptions == 0
    engine.finish_all()
    assert low[0].n_preemptions == 0


def test_who_makes_way_leaves_the_step_with_all_it_was_to_do() -> None:
    engine = SimulatedEngine(n_pages=40, page_size=2, max_num_seqs=1, budget=6)
    low = engine.add(never_stops(8, 2), 2, priority=5)
    engine.step()
    high = engine.add(never_stops(3, 2, skip=1), 2)
    step = engine.step()  # in which the prompt of `low` would have come to its end
    assert rows(step) == [("r1", 0, 3, True)] and step.preempted == [low] and step.admitted == [high]
    engine.finish_all()


def test_who_makes_way_does_not_come_back_in_the_same_step() -> None:
    engine = SimulatedEngine(n_pages=10, page_size=2, budget=64, ahead=0)
    prompt = never_stops(7, 4)
    low = [engine.add(prompt, 4, priority=5), engine.add(never_stops(3, 4, skip=1), 4, priority=5)]
    engine.step()
    engine.pool.clear_cache()
    high = engine.add([*prompt, 1, 1, 1, 1, 1, 1], 1)  # 7 pages: both have to go, though 3 are left over
    step = engine.step()  # low[0] waits for the pages that `high` computes, and low[1] could pass it
    assert step.admitted == step.requests == [high] and step.preempted == low[::-1]
    engine.finish_all()


def test_equals_do_not_make_way() -> None:
    engine = SimulatedEngine(n_pages=20, max_num_seqs=2, budget=64)
    prompt = never_stops(9, 6)
    first, same, other = engine.add(prompt, 6), engine.add(prompt, 6), engine.add(never_stops(4, 6, skip=1), 6)
    assert engine.step().admitted == [first, other], "`same` waits for pages of `first`, and is passed"
    step = engine.step()
    assert step.preempted == [] and same.state is RequestState.WAITING
    engine.finish_all()


def test_nobody_gives_way_in_vain() -> None:
    engine = SimulatedEngine(n_pages=10, page_size=2, budget=32)
    first = engine.add(never_stops(10, 4), 4)
    low = engine.add(never_stops(5, 5), 5, priority=5)
    engine.step()
    engine.add(never_stops(15, 2), 2)  # wants 8 pages: 2 are free, `low` has 3, `first` is its equal
    assert engine.step().preempted == []
    assert first.state is low.state is RequestState.RUNNING
    engine.finish_all()


def test_pages_that_others_share_are_no_gain() -> None:
    engine = SimulatedEngine(n_pages=10, page_size=2, budget=64)
    prompt = never_stops(9, 3)
    engine.add(prompt, 3)
    engine.step()
    low = engine.add(prompt, 3, priority=5)
    engine.step()  # 5 or 6 pages of the first, 1 or 2 more of the second
    assert engine.pool.n_free == 4
    engine.add(never_stops(11, 1, skip=1), 1)  # wants 6
    assert engine.step().preempted == [] and low.state is RequestState.RUNNING
    engine.finish_all()


def test_pages_that_the_request_itself_will_share_are_no_gain() -> None:
    engine = SimulatedEngine(n_pages=6, page_size=2, budget=64)
    engine.add(never_stops(3, 1), 1)
    prompt = never_stops(5, 1, skip=1)
    low = engine.add(prompt, 1, priority=5)
    engine.dispatch(engine.scheduler.schedule())
    engine.add([*prompt[:4], 1, 1, 1, 1, 1], 1)  # 5 pages, of which `low` has 2; 1 is free
    assert engine.scheduler.schedule() is None and low.state is RequestState.RUNNING
    engine.finish_all()


def test_nobody_starves() -> None:
    engine = SimulatedEngine(n_pages=6, page_size=2, max_num_seqs=2, budget=8, aging_steps=10)
    engine.add(never_stops(3, 4), 4)
    patient = engine.add(never_stops(3, 4), 4, priority=5)
    for i in range(400):  # one comes at each step; two can be served in five
        engine.add(never_stops(2 + i % 3, 4, skip=i % 50), 4)
        engine.step()
        engine.check()
        if patient.state is RequestState.FINISHED:
            break
    assert patient.state is RequestState.FINISHED and 50 <= i < 400
    assert engine.scheduler.n_waiting > 50, "there was no crowd"


def test_a_level_of_priority_is_worth_so_many_steps() -> None:
    engine = SimulatedEngine(n_pages=30, max_num_seqs=1, aging_steps=3, budget=4)
    engine.add(never_stops(2, 20), 20)
    engine.step()
    one = engine.add([0, 1], 1, priority=1)
    for _ in range(2):
        engine.step()
    two = engine.add([1, 1], 1)  # two steps later, a level lower: still before
    for _ in range(2):
        engine.step()
    three = engine.add([2, 1], 1)  # four steps later: behind
    assert two.arrival_key < one.arrival_key < three.arrival_key


def test_finish_in_any_state_and_twice() -> None:
    engine = SimulatedEngine(n_pages=8, page_size=2, max_num_seqs=2, budget=3, ahead=9)
    stranger = Request("stranger", 0, [1, 2], SamplingParams(), 8)
    decoding, reading, waiting = (engine.add(never_stops(n, 4), 4) for n in (2, 5, 3))
    engine.step()
    engine.step()
    assert decoding.in_flight == 2 and reading.state is RequestState.RUNNING and waiting.state is RequestState.WAITING
    for request in (stranger, waiting, reading, decoding):
        for _ in range(2):
            engine.scheduler.finish(request)
            engine.scheduler.check()
        assert request.state is RequestState.FINISHED and request.slot == -1 and not request.pages
    assert engine.pool.n_used == 0 and not engine.scheduler.has_requests and engine.scheduler.schedule() is None
    while engine.in_flight:
        engine.deliver()
    assert decoding.n_output == 0 and decoding.in_flight == 0


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    def add(n_pages: int, pages_per_sequence: int, n_prompt: int, max_tokens: int, total: int) -> None:
        scheduler = Scheduler(PagePool(n_pages, 4), max_num_seqs=2, max_num_batched_tokens=8,
                              pages_per_sequence=pages_per_sequence)
        scheduler.add(Request("r", 0, [1] * n_prompt, SamplingParams(max_tokens=max_tokens), total))

    add(3, 9, 11, 1, 12)
    add(3, 9, 12, 0, 12)
    with pytest.raises(ValueError, match=r"12 tokens, and one more is to be drawn; there is room for 3 pages of 4, 12 "
                                         r"tokens, which is all the cache has\. Shorten"):
        add(3, 9, 12, 1, 13)
    with pytest.raises(ValueError, match=r"13 tokens; there is room for 3 pages of 4, 12 tokens, the longest sequence"):
        add(9, 3, 13, 0, 13)
    with pytest.raises(ValueError, match=r"max_total_tokens must be above the prompt's 4 and fit 3 pages.*; got 13"):
        add(3, 9, 4, 9, 13)
    with pytest.raises(ValueError, match=r"max_total_tokens must be above the prompt's 4 .*; got 4"):
        add(3, 9, 4, 9, 4)


def test_priorities_are_within_int32() -> None:
    engine = SimulatedEngine()
    for priority in (2**31, -(2**31)):
        with pytest.raises(ValueError, match=f"priority must be between -2147483647 and 2147483647; got {priority}"):
            engine.scheduler.add(Request("r", 0, [1], SamplingParams(), 17, priority=priority))
    assert not engine.scheduler.has_requests


@pytest.mark.parametrize(("name", "least"), [("max_num_seqs", 1), ("max_num_batched_tokens", 1), ("headroom", 0),
                                             ("pages_per_sequence", 1), ("aging_steps", 1)])
def test_numbers_are_checked(name: str, least: int) -> None:
    numbers = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "pages_per_sequence": 1, name: least - 1}
    with pytest.raises(ValueError, match=f"Scheduler.{name} must be at least {least}; got {least - 1}"):
        Scheduler(PagePool(1, 1), **numbers)


def test_the_same_calls_give_the_same_schedule() -> None:
    def run() -> list[Any]:
        engine = SimulatedEngine(n_pages=9, page_size=2, max_num_seqs=4, budget=9)
        seen: list[Any] = []
        for i in range(80):
            if i < 40:
                engine.add(never_stops(1 + i % 7, 1 + i % 6, skip=i % 3), 1 + i % 6, priority=i % 3)
            step = engine.step()
            seen.append(step and (rows(step), step.slots.tolist(), [r.pages[:] for r in step.requests],
                                  [r.request_id for r in step.preempted]))
        return seen

    assert run() == run()
