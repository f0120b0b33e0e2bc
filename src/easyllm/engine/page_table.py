"""The pages of one sequence, in the order of its tokens."""

from collections.abc import Sequence

from easyllm.engine.pages import ROOT, Namespace, PageKey, PagePool

Copies = dict[int, int]
"""Page copies to make before a pass writes: destination → source."""


class PageTable:
    """Which page holds which tokens of a sequence: token i lies in page `pages[i // page_size]`.

    Args:
        pool: where pages come from and go to.
        namespace: with whom full pages are shared.
        num_sinks: first tokens whose pages stay when a window moves on.

    Attributes:
        first: pages before this one, but for those of the sinks, have been given back (a window has passed them); their
            numbers mean nothing.
    """

    def __init__(self, pool: PagePool, namespace: Namespace, *, num_sinks: int = 0) -> None:
        self.pool, self.namespace, self.num_sinks = pool, namespace, num_sinks
        self._stay = -(-num_sinks // pool.page_size)
        self.pages: list[int] = []
        self.first = 0
        self._digests: list[bytes] = []  # of the full pages registered so far

    @property
    def held(self) -> list[int]:
        """The pages this table has a reference to."""
        return [*self.pages[: min(self._stay, self.first)], *self.pages[self.first :]]

    def adopt(self, tokens: Sequence[int]) -> int:
        """Takes the full pages that hold a beginning of `tokens`, and says how many tokens they hold.

        The last token is never among them: somebody must ask for its logits.
        """
        assert not self.pages, "a prefix is taken before anything else"
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
        """Pages that must be taken before tokens `start` to `end` can be written."""
        size = self.pool.page_size
        fresh = -(-end // size) - len(self.pages)
        return max(fresh, 0) + len(self._shared(start))

    def reserve(self, start: int, end: int, copies: Copies) -> bool:
        """Makes room for tokens `start` to `end`; False, and nothing changed, where pages are short.

        A page that others hold, too, is copied before it is written; the copy is added to `copies`.
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
        """Takes note that the first `computed` tokens are in the cache: full pages can be found, pages beyond are
        given back."""
        size = self.pool.page_size
        while len(self.pages) > -(-computed // size):
            self.pool.release(self.pages.pop())
        if not self.pool.prefix_caching:
            return
        for index in range(len(self._digests), computed // size):
            key = self._key(tokens, index * size)
            self._digests.append(self.pool.register(self.pages[index], key))

    def roll(self, position: int) -> None:
        """Gives back the pages that hold only tokens before `position`, but for the sinks'."""
        last = min(position // self.pool.page_size, len(self.pages))
        for page in self.pages[max(self.first, self._stay) : last]:
            self.pool.release(page)
        self.first = max(self.first, last)

    def fork(self) -> "PageTable":
        """A table of the same tokens, all pages shared."""
        twin = PageTable(self.pool, self.namespace, num_sinks=self.num_sinks)
        twin.pages, twin.first, twin._digests = list(self.pages), self.first, list(self._digests)
        for page in self.held:
            self.pool.share(page)
        return twin

    def release(self) -> None:
        """Gives every page back, the last first, so that a prefix outlives what lies behind it."""
        for page in reversed(self.held):
            self.pool.release(page)
        self.pages, self.first, self._digests = [], 0, []

    def _shared(self, start: int) -> list[int]:
        """Places of pages that would be written from token `start` on and that others hold, too."""
        first = start // self.pool.page_size
        places = range(first, len(self.pages))
        shared = [i for i in places if self.pool.references(self.pages[i]) > 1]
        assert not any(self.pool.is_indexed(self.pages[i]) for i in places if i not in shared), (
            "a page that can be found is never written"
        )
        return shared

    def _key(self, tokens: Sequence[int], start: int) -> PageKey:
        index = start // self.pool.page_size
        parent = self._digests[index - 1] if index else ROOT
        piece = tuple(tokens[start : start + self.pool.page_size])
        return PageKey(parent, piece, self.namespace)
