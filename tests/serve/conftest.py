"""Fixtures of the page's tests: one browser, and one server of tiny models."""

import time

import pytest

from browser import CHROMIUM, running_browser
from easyllm.engine import LLM
from running_server import running


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Debian's Chromium, headless."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with running_browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="session")
def page_models(tiny_model, tiny_tokenizer):
    """Models of the page's tests: `slow` takes 30 ms for each token, so that it can be stopped."""
    found = {
        name: LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
        for name in ("base", "tuned", "slow")
    }
    engine = found["slow"].engine
    step = engine.step

    def slowly():
        time.sleep(0.03)
        return step()

    engine.step = slowly
    return found


@pytest.fixture(scope="session")
def page_address(page_models):
    """Address of a server of these models."""
    with running(page_models) as address:
        yield address
