"""The page table of one sequence: its pages in token order."""

from collections.abc import Sequence

from easyllm.engine.pages import ROOT, Namespace, PageKey, PagePool

Copies = dict[int, int]
"""Page copies to execute before a pass writes to the cache: destination → source."""


class PageTable:
    """Maps the tokens of a sequence to pages: token i is stored in page `pages[i // page_size]`.

    Args:
        pool: the pool that pages are allocated from and released to.
        namespace: full pages are shared only with sequences of the same namespace.
        num_sinks: number of first tokens (attention sinks) whose pages are retained when the
            attention window moves on.

    Attributes:
        pages: page numbers in token order.
        first: index of the first page still in use. Earlier pages, except those of the sinks, have
            been released because the window has passed them; their entries are meaningless.
    """

    def __init__(self, pool: PagePool, namespace: Namespace, *, num_sinks: int = 0) -> None:
        self.pool, self.namespace, self.num_sinks = pool, namespace, num_sinks
        self._stay = -(-num_sinks // pool.page_size)
        self.pages: list[int] = []
        self.first = 0
        self._digests: list[bytes] = []  # digests of the full pages registered so far

    @property
    def held(self) -> list[int]:
        """The pages to which this table has a reference."""
        return [*self.pages[: min(self._stay, self.first)], *self.pages[self.first :]]

    def adopt(self, tokens: Sequence[int]) -> int:
        """Reuses cached full pages that store a prefix of `tokens` (prefix caching).

        The last token is never reused, because its logits must be computed.

        Returns:
            The number of tokens stored in these pages.
        """
        assert not self.pages, "a prefix can only be adopted by an empty table"
        size = self.pool.page_size
        for start in range(0, len(tokens) - size, size):
            key = self._key(tokens, start)
            page = self.pool.find(key)
            if page is None:
                break
            self.pages.append(page)
            self._digests.append(key.digest())
        return len(self.pages) * size

    def missing(self, start: int, end: int) -> int:
        """Returns how many pages must be allocated before tokens `start` to `end` are written."""
        size = self.pool.page_size
        fresh = -(-end // size) - len(self.pages)
        return max(fresh, 0) + len(self._shared(start))

    def reserve(self, start: int, end: int, copies: Copies) -> bool:
        """Allocates pages for tokens `start` to `end`.

        A page shared with other sequences must be copied before it is written (copy-on-write); the
        copy is added to `copies`.

        Returns:
            False if there are not enough pages; nothing is changed then.
        """
        if self.missing(start, end) > self.pool.available:
            return False
        size = self.pool.page_size
        for index in self._shared(start):
            old, self.pages[index] = self.pages[index], self.pool.allocate()
            if index * size < start:
                copies[self.pages[index]] = old
            self.pool.release(old)
        while len(self.pages) * size < end:
            self.pages.append(self.pool.allocate())
        return True

    def commit(self, tokens: Sequence[int], computed: int) -> None:
        """Records that the first `computed` tokens are in the cache.

        Registers full pages for prefix caching, and releases pages after the last computed token.
        """
        size = self.pool.page_size
        while len(self.pages) > -(-computed // size):
            self.pool.release(self.pages.pop())
        if not self.pool.prefix_caching:
            return
        for index in range(len(self._digests), computed // size):
            key = self._key(tokens, index * size)
            self._digests.append(self.pool.register(self.pages[index], key))

    def roll(self, position: int) -> None:
        """Releases the pages with only tokens before `position`, except those of the sinks."""
        last = min(position // self.pool.page_size, len(self.pages))
        for page in self.pages[max(self.first, self._stay) : last]:
            self.pool.release(page)
        self.first = max(self.first, last)

    def fork(self) -> "PageTable":
        """Returns a table of the same tokens that shares all pages."""
        twin = PageTable(self.pool, self.namespace, num_sinks=self.num_sinks)
        twin.pages, twin.first, twin._digests = list(self.pages), self.first, list(self._digests)
        for page in self.held:
            self.pool.share(page)
        return twin

    def release(self) -> None:
        """Releases all pages, last first, so that a prefix is evicted after its continuation."""
        for page in reversed(self.held):
            self.pool.release(page)
        self.pages, self.first, self._digests = [], 0, []

    def _shared(self, start: int) -> list[int]:
        """Returns the indices of pages written from token `start` on that others reference too."""
        first = start // self.pool.page_size
        places = range(first, len(self.pages))
        shared = [i for i in places if self.pool.references(self.pages[i]) > 1]
        assert not any(self.pool.is_indexed(self.pages[i]) for i in places if i not in shared), (
            "an indexed page is never written"
        )
        return shared

    def _key(self, tokens: Sequence[int], start: int) -> PageKey:
        index = start // self.pool.page_size
        parent = self._digests[index - 1] if index else ROOT
        piece = tuple(tokens[start : start + self.pool.page_size])
        return PageKey(parent, piece, self.namespace)
