"""Who owns which page of the KV cache, and which pages hold what a later prompt may begin with. No jax here.

A page is *used* while it has owners, and free otherwise. A full page whose tokens are known can be registered under a
hash of them and of all that comes before; a free page that is registered stays where it is until its place is needed,
so that a later sequence with the same beginning finds it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

NO_PARENT = b""
"""The parent of a sequence's first page."""


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a page of `token_ids` (int32) behind the page of hash `parent`, hence of the sequence up to its end.

    SHA-256: two texts of one hash would show one user what another wrote, so it must not be possible to make them.
    """
    return hashlib.sha256(parent + array("i", token_ids).tobytes()).digest()


def extend_hashes(hashes: list[bytes], token_ids: Sequence[int], page_size: int) -> None:
    """Appends to `hashes`, those of a sequence's first full pages, the hashes of its other full pages."""
    for end in range((len(hashes) + 1) * page_size, len(token_ids) + 1, page_size):
        hashes.append(chain_hash(hashes[-1] if hashes else NO_PARENT, token_ids[end - page_size:end]))


class PagePool:
    """The pages 0 to `n_pages - 1`, their owners counted, and the prefix cache.

    Args:
        n_pages: pages of a layer, which is how often each page number can be given away.
        page_size: tokens a page.
        enable_prefix_caching: without it nothing is ever registered, and nothing found.

    Raises:
        ValueError: there is no page, or a page takes no token.
    """

    def __init__(self, n_pages: int, page_size: int, enable_prefix_caching: bool = True):
        for name, value in (("n_pages", n_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"PagePool.{name} must be at least 1; got {value}.")
        self.n_pages, self.page_size, self.enable_prefix_caching = n_pages, page_size, enable_prefix_caching
        self.epoch = 0
        """How often the cache was cleared. What was computed in an earlier epoch must not be registered in this one."""
        self.queried_tokens = 0
        """Tokens of the prompts that were looked up."""
        self.hit_tokens = 0
        """Those of them that were found."""
        self.evictions = 0
        """Registered pages given away for other content."""
        self._owners = [0] * n_pages
        self._hashes: list[bytes | None] = [None] * n_pages
        self._pages: dict[bytes, int] = {}
        self._blank = list(reversed(range(n_pages)))
        """Free and not registered, the next one last."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free and registered, the least recently used one first."""

    @property
    def n_free(self) -> int:
        """Pages without an owner, registered ones among them."""
        return len(self._blank) + len(self._cached)

    @property
    def n_used(self) -> int:
        """Pages with an owner."""
        return self.n_pages - self.n_free

    def pages_for(self, n_tokens: int) -> int:
        """Pages that a sequence of `n_tokens` tokens takes."""
        return -(-n_tokens // self.page_size)

    def owners(self, page: int) -> int:
        """How many sequences own the page."""
        return self._owners[page]

    def is_registered(self, page: int) -> bool:
        """Whether the page can be found by its hash."""
        return self._hashes[page] is not None

    def allocate(self, n: int) -> list[int] | None:
        """`n` pages with one owner each, or `None`, and nothing changed, where fewer are free.

        Registered pages go last, the least recently used of them first.
        """
        if n > self.n_free:
            return None
        blank = min(n, len(self._blank))
        pages = self._blank[len(self._blank) - blank:]
        pages.reverse()
        del self._blank[len(self._blank) - blank:]
        while len(pages) < n:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
            self.evictions += 1
            pages.append(page)
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each of `pages`, which are used, or free and registered, as `lookup` finds them."""
        for page in pages:
            if not self._owners[page]:
                del self._cached[page]
            self._owners[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner fewer for each of a sequence's `pages`.

        The last goes first: it will be the first to be given away, as an end is of use only behind its beginning.
        """
        for page in reversed(pages):
            assert self._owners[page] > 0, f"page {page} has no owner to be released by"
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            if self._hashes[page] is None:
                self._blank.append(page)
            else:
                self._cached[page] = None

    def register(self, page: int, hash: bytes) -> None:
        """The page, which is used, is full, and its content is from now on what `hash` says.

        Where another page is registered under the hash, that one stays.
        """
        assert self._owners[page] > 0, f"page {page} is registered without an owner"
        if self.enable_prefix_caching and hash not in self._pages:
            assert self._hashes[page] is None, f"page {page} is registered under another hash"
            self._hashes[page] = hash
            self._pages[hash] = page

    def lookup(self, hashes: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of `hashes` that is registered. They get no owner: see `share`."""
        pages: list[int] = []
        for hash in hashes:
            page = self._pages.get(hash)
            if page is None:
                break
            pages.append(page)
        return pages

    def n_free_beside(self, pages: Sequence[int]) -> int:
        """How many pages could be allocated, were `pages` shared before."""
        return self.n_free - sum(not self._owners[page] for page in pages)

    def clear_cache(self) -> None:
        """Nobody finds what is registered now. Used pages stay used."""
        self._pages.clear()
        self._hashes = [None] * self.n_pages
        self._blank.extend(reversed(self._cached))
        self._cached.clear()
        self.epoch += 1

    def check(self) -> None:
        """Raises `AssertionError` where the books do not balance; for tests, as it looks at every page."""
        assert min(self._owners) >= 0, "a page has fewer than no owners"
        free = [*self._blank, *self._cached]
        assert len(free) == len(set(free)), "a page is free twice"
        assert set(free) == {page for page, owners in enumerate(self._owners) if not owners}, "free is not ownerless"
        registered = {page: hash for page, hash in enumerate(self._hashes) if hash is not None}
        assert {page: hash for hash, page in self._pages.items()} == registered, "pages and hashes disagree"
        assert len(self._pages) == len(registered), "two hashes name one page"
        assert set(self._cached) == registered.keys() & set(free), "a free page is cached otherwise than registered"
        assert self.enable_prefix_caching or not registered, "a page is registered although caching is off"

    def _forget(self, page: int) -> None:
        hash = self._hashes[page]
        assert hash is not None
        del self._pages[hash]
        self._hashes[page] = None
