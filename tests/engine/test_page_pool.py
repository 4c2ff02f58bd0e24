"""The page pool against a naive one: lists instead of counts, and every rule spelled out."""

from __future__ import annotations

import hashlib
import struct
from itertools import chain

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from maxlike.engine.page_pool import NO_PARENT, PagePool, chain_hash, extend_hashes


def hashes_of(n: int) -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, list(range(n)), 1)
    return hashes


def filled(pool: PagePool, hashes: list[bytes]) -> list[int]:
    pages = pool.allocate(len(hashes))
    assert pages is not None
    for page, hash in zip(pages, hashes, strict=True):
        pool.register(page, hash)
    return pages


def test_hash_is_of_all_that_comes_before() -> None:
    first = chain_hash(NO_PARENT, [1, 2])
    assert first == hashlib.sha256(struct.pack("=2i", 1, 2)).digest()
    assert chain_hash(first, [3, 2**31 - 1]) == hashlib.sha256(first + struct.pack("=2i", 3, 2**31 - 1)).digest()
    hashes = [first]
    extend_hashes(hashes, [1, 2, 3, 4, 5], 2)  # the fifth token fills no page
    assert hashes == [first, chain_hash(first, [3, 4])]
    other: list[bytes] = []
    extend_hashes(other, [9, 2, 3, 4], 2)
    assert other[1] != hashes[1], "the same page behind another beginning"


def test_too_many_pages_are_refused_and_nothing_is_taken() -> None:
    pool = PagePool(3, 4)
    assert sorted(pool.allocate(2) or []) == [0, 1]
    assert pool.allocate(2) is None and (pool.n_free, pool.n_used) == (1, 2)
    assert pool.allocate(0) == [] and pool.allocate(1) == [2] and pool.allocate(1) is None


def test_shared_page_is_free_when_its_last_owner_goes() -> None:
    pool = PagePool(2, 4)
    pages = filled(pool, hashes_of(1))
    pool.share(pages)
    pool.release(pages)
    assert pool.n_used == 1 and pool.owners(pages[0]) == 1
    pool.release(pages)
    assert pool.n_used == 0 and pool.lookup(hashes_of(1)) == pages
    with pytest.raises(AssertionError, match="no owner"):
        pool.release(pages)


def test_blank_pages_go_first_then_the_least_recently_used_and_ends_before_beginnings() -> None:
    pool = PagePool(5, 1)
    old, new = hashes_of(2), [chain_hash(b"new", [i]) for i in range(2)]
    old_pages, new_pages = filled(pool, old), filled(pool, new)
    pool.release(old_pages)
    pool.release(new_pages)
    assert pool.n_free == 5
    pool.share(old_pages)  # used again: now the newer one
    pool.release(old_pages)
    blank = pool.allocate(1)
    assert blank is not None and blank[0] not in old_pages + new_pages and pool.evictions == 0
    assert pool.allocate(1) == new_pages[1:] and pool.evictions == 1
    assert pool.lookup(new) == new_pages[:1]
    assert pool.allocate(2) == [new_pages[0], old_pages[1]]
    assert pool.lookup(old) == old_pages[:1] and pool.lookup(new) == []


def test_lookup_ends_at_the_first_page_that_is_not_there() -> None:
    pool = PagePool(4, 1)
    hashes = hashes_of(4)
    pages = filled(pool, [hashes[0], hashes[1], hashes[3]])
    assert pool.lookup(hashes) == pages[:2] and pool.lookup(hashes[1:]) == pages[1:2] and pool.lookup([]) == []


def test_first_page_of_a_hash_stays() -> None:
    pool = PagePool(2, 1)
    (first,), (second,) = filled(pool, hashes_of(1)), filled(pool, hashes_of(1))
    assert pool.lookup(hashes_of(1)) == [first] and not pool.is_registered(second)
    pool.release([first])
    assert pool.lookup(hashes_of(1)) == [first]


def test_cleared_cache_finds_nothing_and_takes_nothing_away() -> None:
    pool = PagePool(3, 1)
    hashes = hashes_of(3)
    used, idle = filled(pool, hashes[:1]), filled(pool, hashes[1:])
    pool.release(idle)
    pool.clear_cache()
    assert pool.lookup(hashes) == [] and (pool.n_used, pool.n_free, pool.epoch) == (1, 2, 1)
    pool.register(used[0], hashes[2])
    assert pool.lookup(hashes[2:]) == used and len(pool.allocate(2) or []) == 2 and pool.evictions == 0


def test_without_caching_nothing_is_found() -> None:
    pool = PagePool(2, 1, enable_prefix_caching=False)
    pages = filled(pool, hashes_of(2))
    pool.release(pages)
    assert pool.lookup(hashes_of(2)) == [] and pool.n_free == 2


@pytest.mark.parametrize(("name", "sizes"), [("n_pages", (0, 4)), ("page_size", (4, 0))])
def test_sizes_are_checked(name: str, sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"PagePool.{name} must be at least 1; got 0"):
        PagePool(*sizes)


class AgainstLists(RuleBasedStateMachine):
    """Sequences own pages; registered pages without an owner queue up by when they were last owned."""

    @initialize(n_pages=st.integers(1, 8))
    def start(self, n_pages: int) -> None:
        self.pool = PagePool(n_pages, 1)
        self.sequences: list[list[int]] = []
        self.registered: dict[int, bytes] = {}
        self.idle: list[int] = []  # registered and free, the next to be evicted first
        self.n_blank = n_pages

    @rule(n=st.integers(0, 4))
    def allocate(self, n: int) -> None:
        pages = self.pool.allocate(n)
        if n > self.n_blank + len(self.idle):
            assert pages is None
            return
        evicted = max(n - self.n_blank, 0)
        assert pages is not None and len(set(pages)) == n and not {*pages} & {*chain(*self.sequences)}
        assert pages[n - evicted:] == self.idle[:evicted] and not {*pages[:n - evicted]} & {*self.idle}
        for page in self.idle[:evicted]:
            del self.registered[page]
        del self.idle[:evicted]
        self.n_blank -= n - evicted
        self.sequences.append(pages)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.pool.release(pages)
        for page in reversed(pages):
            if any(page in sequence for sequence in self.sequences):
                continue
            if page in self.registered:
                self.idle.append(page)
            else:
                self.n_blank += 1

    @precondition(lambda self: any(self.sequences))
    @rule(data=st.data(), number=st.integers(0, 9))
    def register(self, data: st.DataObject, number: int) -> None:
        owned = sorted({*chain(*self.sequences)} - self.registered.keys())
        if not owned:
            return
        page, hash = data.draw(st.sampled_from(owned)), hashes_of(number + 1)[-1]
        self.pool.register(page, hash)
        if hash not in self.registered.values():
            self.registered[page] = hash

    @rule(n=st.integers(0, 6))
    def share(self, n: int) -> None:
        where = {hash: page for page, hash in self.registered.items()}
        expected = []
        for hash in hashes_of(n):
            if hash not in where:
                break
            expected.append(where[hash])
        pages = self.pool.lookup(hashes_of(n))
        assert pages == expected
        idle = [page for page in pages if page in self.idle]
        assert self.pool.n_free_beside(pages) == self.n_blank + len(self.idle) - len(idle)
        self.pool.share(pages)
        self.idle = [page for page in self.idle if page not in idle]
        self.sequences.append(pages)

    @rule()
    def clear_cache(self) -> None:
        self.pool.clear_cache()
        self.n_blank += len(self.idle)
        self.registered, self.idle = {}, []

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        owned = list(chain(*self.sequences))
        assert [self.pool.owners(page) for page in range(self.pool.n_pages)] == [
            owned.count(page) for page in range(self.pool.n_pages)]
        assert self.pool.n_used == len({*owned}) and self.pool.n_free == self.n_blank + len(self.idle)
        assert all(self.pool.is_registered(page) == (page in self.registered) for page in range(self.pool.n_pages))


AgainstLists.TestCase.settings = settings(max_examples=100, stateful_step_count=50)
TestAgainstLists = AgainstLists.TestCase
