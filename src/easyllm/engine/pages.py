"""Pages of the cache as numbers: who holds them, which are free, which hold a prefix seen before.

A page is room for `page_size` tokens in every layer (Kwon et al. 2023, arXiv 2309.06180, section 4). It is free, or referenced by
one sequence or more, or idle: full, no longer referenced, but found again by what it holds until its room is needed.

    free + idle + referenced = total
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = bytes(32)
"""The parent digest of a sequence's first page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """Whose prefixes are shared: sequences of another adapter or salt never see one another's pages."""

    adapter: str = ""
    salt: str = ""


@dataclass(frozen=True, slots=True)
class PageKey:
    """What a full page holds, and behind what."""

    parent: bytes
    tokens: tuple[int, ...]
    namespace: Namespace

    def digest(self) -> bytes:
        """SHA-256 of all of it; lengths stand before texts, so that no two keys are written alike."""
        adapter, salt = self.namespace.adapter.encode(), self.namespace.salt.encode()
        sizes = array("q", (len(adapter), len(salt), len(self.tokens)))
        parts = (self.parent, sizes.tobytes(), adapter, salt, array("q", self.tokens).tobytes())
        return hashlib.sha256(b"".join(parts)).digest()


class PagePool:
    """A fixed number of pages, counted by reference.

    Args:
        num_pages: all there are.
        page_size: tokens a page holds.
        prefix_caching: whether full pages are found again by what they hold.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = True) -> None:
        assert num_pages > 0, "a pool has a page"
        assert page_size > 0, "a page holds a token"
        self.num_pages, self.page_size, self.prefix_caching = num_pages, page_size, prefix_caching
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the same few pages stay warm
        self._references = [0] * num_pages
        self._keys: list[PageKey | None] = [None] * num_pages
        self._index: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Pages that can be taken now: free ones, and idle ones that would be forgotten."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Pages nobody holds whose content can still be found."""
        return len(self._idle)

    def references(self, page: int) -> int:
        """How many sequences hold `page`."""
        return self._references[page]

    def is_indexed(self, page: int) -> bool:
        """Whether `page` can be found by what it holds; such a page is full and never written again."""
        return self._keys[page] is not None

    def allocate(self) -> int:
        """An unshared page; the least recently used idle one is forgotten where none is free."""
        if self._free:
            page = self._free.pop()
        else:
            assert self._idle, "callers ask for `available` first"
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def share(self, page: int) -> int:
        """Counts another holder of a page somebody holds."""
        assert self._references[page] > 0, "only a held page is shared"
        self._references[page] += 1
        return page

    def release(self, page: int) -> None:
        """Gives a reference back; the last one makes the page idle where it can be found, else free."""
        assert self._references[page] > 0, f"page {page} is given back twice"
        self._references[page] -= 1
        if self._references[page]:
            return
        if self._keys[page] is None:
            self._free.append(page)
        else:
            self._idle[page] = None

    def find(self, key: PageKey) -> int | None:
        """The page that holds `key`, with a reference taken; tokens and parent are compared, not the digest alone."""
        page = self._index.get(key.digest())
        if page is None or self._keys[page] != key:
            return None
        self._idle.pop(page, None)
        self._references[page] += 1
        return page

    def register(self, page: int, key: PageKey) -> bytes:
        """Makes a full page known by what it holds; returns its digest, the parent of the next page.

        Where another page already holds the same, that one stays known and this one is freed in its time.
        """
        digest = key.digest()
        if self.prefix_caching and digest not in self._index:
            self._index[digest] = page
            self._keys[page] = key
        return digest

    def forget_prefixes(self) -> None:
        """Forgets what pages hold (the weights behind them have changed)."""
        for page in tuple(self._index.values()):
            self._forget(page)
        self._free.extend(self._idle)
        self._idle.clear()

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Asserts the pool's invariants, given the pages each sequence holds."""
        counts = [0] * self.num_pages
        for pages in held:
            for page in pages:
                counts[page] += 1
        assert counts == self._references, "references are counted as they are held"
        referenced = sum(count > 0 for count in counts)
        assert len(self._free) + len(self._idle) + referenced == self.num_pages, "no page leaks"
        lying = {*self._free, *self._idle}
        assert len(lying) == len(self._free) + len(self._idle), "no page lies in two places"
        assert not any(counts[page] for page in lying), "no held page is free"
        for digest, page in self._index.items():
            key = self._keys[page]
            assert key is not None, "an indexed page has a key"
            assert key.digest() == digest, "a page is indexed by what it holds"
        assert len(self._index) == sum(key is not None for key in self._keys), "one page a key"
        assert all(self._keys[page] is not None for page in self._idle), "idle pages can be found"

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None, "only an indexed page is forgotten"
        del self._index[key.digest()]
        self._keys[page] = None
