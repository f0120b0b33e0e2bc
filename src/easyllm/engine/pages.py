"""The page allocator of the paged KV cache, with reference counts and prefix caching.

It handles page numbers only, no tensors. A page has space for `page_size` tokens in every layer
(Kwon et al. 2023, arXiv 2309.06180, section 4). It is in one of three states: free; referenced by
one or more sequences; or idle, that is full and no longer referenced, but still indexed by its
content until it is evicted.

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
    """Scope of prefix sharing: sequences share pages only if adapter and salt are equal."""

    adapter: str = ""
    salt: str = ""


@dataclass(frozen=True, slots=True)
class PageKey:
    """Content of a full page: its tokens and the digest of all pages before it."""

    parent: bytes
    tokens: tuple[int, ...]
    namespace: Namespace

    def digest(self) -> bytes:
        """Returns the SHA-256 of the key; strings are length-prefixed to make it unambiguous."""
        adapter, salt = self.namespace.adapter.encode(), self.namespace.salt.encode()
        sizes = array("q", (len(adapter), len(salt), len(self.tokens)))
        parts = (self.parent, sizes.tobytes(), adapter, salt, array("q", self.tokens).tobytes())
        return hashlib.sha256(b"".join(parts)).digest()


class PagePool:
    """A pool of a fixed number of reference-counted pages.

    Args:
        num_pages: total number of pages.
        page_size: tokens per page.
        prefix_caching: whether full pages are indexed by their content for reuse.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = True) -> None:
        assert num_pages > 0, "a pool has at least one page"
        assert page_size > 0, "a page has space for at least one token"
        self.num_pages, self.page_size, self.prefix_caching = num_pages, page_size, prefix_caching
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: reuses pages still in CPU cache
        self._references = [0] * num_pages
        self._keys: list[PageKey | None] = [None] * num_pages
        self._index: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Number of pages that can be allocated now: free pages, and idle pages to evict."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Number of unreferenced pages that are still indexed by their content."""
        return len(self._idle)

    def references(self, page: int) -> int:
        """Returns the reference count of `page`."""
        return self._references[page]

    def states(self) -> bytes:
        """Returns a byte for each page: 0 free, 1 idle, 2 referenced once, 3 by several."""
        found = bytearray(2 + (count > 1) if count else 0 for count in self._references)
        for page in self._idle:
            found[page] = 1
        return bytes(found)

    def is_indexed(self, page: int) -> bool:
        """Whether `page` is indexed by its content; such a page is full and never written again."""
        return self._keys[page] is not None

    def allocate(self) -> int:
        """Allocates a page; evicts the least recently used idle page if none is free."""
        if self._free:
            page = self._free.pop()
        else:
            assert self._idle, "callers check `available` first"
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._references[page] = 1
        return page

    def share(self, page: int) -> int:
        """Adds a reference to a page that is already referenced."""
        assert self._references[page] > 0, "only a referenced page can be shared"
        self._references[page] += 1
        return page

    def release(self, page: int) -> None:
        """Drops a reference; after the last, the page becomes idle if it is indexed, else free."""
        assert self._references[page] > 0, f"page {page} is released twice"
        self._references[page] -= 1
        if self._references[page]:
            return
        if self._keys[page] is None:
            self._free.append(page)
        else:
            self._idle[page] = None

    def find(self, key: PageKey) -> int | None:
        """Returns the page with the content `key` and adds a reference; None if there is none.

        Compares tokens and parent, not only the digest.
        """
        page = self._index.get(key.digest())
        if page is None or self._keys[page] != key:
            return None
        self._idle.pop(page, None)
        self._references[page] += 1
        return page

    def register(self, page: int, key: PageKey) -> bytes:
        """Indexes a full page by its content; returns its digest, the parent of the next page.

        If a page with the same content is already indexed, that page remains indexed, and this one
        becomes free when its last reference is released.
        """
        digest = key.digest()
        if self.prefix_caching and digest not in self._index:
            self._index[digest] = page
            self._keys[page] = key
        return digest

    def clear_prefix_cache(self, adapter: str | None = None) -> None:
        """Clears the index of page contents, for use when the model's weights have changed.

        Args:
            adapter: clears only the pages of sequences that use the adapter with this name.
        """
        for page in tuple(self._index.values()):
            key = self._keys[page]
            assert key is not None, "an indexed page has a key"
            if adapter is not None and key.namespace.adapter != adapter:
                continue
            self._forget(page)
            if page in self._idle:
                del self._idle[page]
                self._free.append(page)

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Asserts the pool's invariants, given the pages that each sequence references."""
        counts = [0] * self.num_pages
        for pages in held:
            for page in pages:
                counts[page] += 1
        assert counts == self._references, "the reference counts match the references"
        referenced = sum(count > 0 for count in counts)
        assert len(self._free) + len(self._idle) + referenced == self.num_pages, "no page leaks"
        unused = {*self._free, *self._idle}
        assert len(unused) == len(self._free) + len(self._idle), "no page is in two lists"
        assert not any(counts[page] for page in unused), "no referenced page is free or idle"
        for digest, page in self._index.items():
            key = self._keys[page]
            assert key is not None, "an indexed page has a key"
            assert key.digest() == digest, "a page is indexed by its content"
        assert len(self._index) == sum(key is not None for key in self._keys), "one page per key"
        assert all(self._keys[page] is not None for page in self._idle), "idle pages are indexed"

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        assert key is not None, "only an indexed page can be removed from the index"
        del self._index[key.digest()]
        self._keys[page] = None
