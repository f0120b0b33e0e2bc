"""KV cache pages: reference counts, prefix caching, and eviction."""

import pytest

from easyllm.engine import pages as pages_module
from easyllm.engine.page_table import PageTable
from easyllm.engine.pages import ROOT, Namespace, PageKey, PagePool

NOBODY = Namespace()


def computed(pool, tokens, namespace=NOBODY):
    """Returns a block table whose tokens are all cached, and how many were found in the cache."""
    table = PageTable(pool, namespace)
    found = table.adopt(tokens) if pool.prefix_caching else 0
    assert table.reserve(found, len(tokens), {})
    table.commit(tokens, len(tokens))
    return table, found


def test_every_page_is_free_idle_or_referenced():
    pool = PagePool(6, 2)
    first, _ = computed(pool, [1, 2, 3, 4, 5])
    pool.check([first.held])
    assert pool.available == 3
    first.release()
    pool.check([])
    assert pool.available == 6
    assert pool.idle == 2  # the full pages can still be found


def test_full_pages_are_shared_but_the_last_token_is_recomputed():
    pool = PagePool(9, 2)
    first, _ = computed(pool, [1, 2, 3, 4, 5])
    second, found = computed(pool, [1, 2, 3, 4, 9, 9])
    assert found == 4
    assert second.pages[:2] == first.pages[:2]
    same = PageTable(pool, NOBODY)
    assert same.adopt([1, 2, 3, 4]) == 2  # not 4: the last token must be computed for its logits
    pool.check([first.held, second.held, same.held])


@pytest.mark.parametrize(
    "other", [Namespace(adapter="a"), Namespace(salt="s"), Namespace(adapter="a", salt="s")]
)
def test_another_adapter_or_salt_finds_nothing(other):
    pool = PagePool(9, 2)
    computed(pool, [1, 2, 3])
    assert computed(pool, [1, 2, 3], other)[1] == 0
    assert computed(pool, [1, 2, 3])[1] == 2


def test_keys_differ_if_any_of_their_parts_differs():
    parts = [
        PageKey(ROOT, (1, 2), NOBODY),
        PageKey(b"x" * 32, (1, 2), NOBODY),
        PageKey(ROOT, (1, 3), NOBODY),
        PageKey(ROOT, (1,), NOBODY),
        PageKey(ROOT, (1, 2), Namespace(adapter="ab")),
        PageKey(ROOT, (1, 2), Namespace(salt="ab")),
        PageKey(ROOT, (1, 2), Namespace(adapter="a", salt="b")),
    ]
    assert len({key.digest() for key in parts}) == len(parts)
    assert all(len(key.digest()) == 32 for key in parts)


def test_tokens_are_compared_in_addition_to_the_digest(monkeypatch):
    """All pages have the same digest here."""
    monkeypatch.setattr(PageKey, "digest", lambda self: b"collision")
    pool = PagePool(9, 2)
    first, _ = computed(pool, [1, 2, 3])
    second, found = computed(pool, [7, 8, 9])
    assert found == 0
    assert not set(first.held) & set(second.held)
    assert bytes(32) == pages_module.ROOT


def test_the_least_recently_used_page_is_evicted_first():
    pool = PagePool(4, 1)
    for token in (1, 2, 3):
        computed(pool, [token])[0].release()
    assert computed(pool, [1, 5])[1] == 1  # used again: 2 is now the least recently used
    computed(pool, [6])
    assert pool.find(PageKey(ROOT, (2,), NOBODY)) is None
    assert pool.find(PageKey(ROOT, (3,), NOBODY)) is not None


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    pool = PagePool(3, 1)
    computed(pool, [1, 2, 3])[0].release()
    pool.allocate()
    table = PageTable(pool, NOBODY)
    assert table.adopt([1, 2, 3, 4]) == 2


def test_a_shared_partly_filled_page_is_copied_before_it_is_written():
    pool = PagePool(6, 4)
    first, _ = computed(pool, [1, 2, 3, 4, 5, 6])
    twin = first.fork()
    assert pool.available == 4
    copies = {}
    assert twin.reserve(6, 7, copies)
    assert copies == {twin.pages[1]: first.pages[1]}
    assert twin.pages[0] == first.pages[0]
    assert first.reserve(6, 7, copies)  # the page has a single owner now: nothing to copy
    assert len(copies) == 1
    pool.check([first.held, twin.held])


def test_without_enough_pages_nothing_changes():
    pool = PagePool(3, 2)
    first, _ = computed(pool, [1, 2, 3])
    twin = first.fork()
    assert not twin.reserve(3, 7, {})
    pool.check([first.held, twin.held])
    assert twin.pages == first.pages
    assert twin.reserve(3, 4, {})


def test_pages_freed_twice_are_detected():
    pool = PagePool(2, 2)
    page = pool.allocate()
    pool.release(page)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(page)


def test_changed_weights_invalidate_cached_prefixes():
    pool = PagePool(9, 2)
    held, _ = computed(pool, [1, 2, 3])
    computed(pool, [4, 5, 6])[0].release()
    pool.clear_prefix_cache()
    pool.check([held.held])
    assert pool.idle == 0
    assert computed(pool, [1, 2, 3])[1] == 0
    assert computed(pool, [4, 5, 6])[1] == 0
    held.release()
