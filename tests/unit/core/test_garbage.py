"""The collector of cyclic garbage is paused for a block only, whatever happens in it."""

import gc

import pytest

from easyllm.core.garbage import collector_paused, importing


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("block", [collector_paused, importing])
def test_the_collector_is_off_in_the_block_and_on_after_it(block):
    with block():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), block():
        raise KeyError
    assert gc.isenabled()


@pytest.mark.parametrize("block", [collector_paused, importing])
def test_a_collector_that_is_off_stays_off(block):
    gc.disable()
    with block():
        pass
    assert not gc.isenabled()


def test_objects_of_new_modules_are_not_examined_again(monkeypatch):
    before = gc.get_freeze_count()
    with collector_paused():
        pass
    with importing():
        import sys
    assert gc.get_freeze_count() == before
    with importing():
        monkeypatch.setitem(sys.modules, "imported_just_now", sys)
        kept = [[] for _ in range(100)]
    assert gc.get_freeze_count() >= before + len(kept)
