"""The chat page in a real browser: a question is sent, and completions of both models arrive."""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager

import httpx
import pytest
import websocket

from easyllm.engine import LLM
from running_server import running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    *("--remote-debugging-port=0", "--remote-allow-origins=*"),
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


class Page:
    """A browser tab, controlled by the DevTools protocol."""

    def __init__(self, url):
        self._socket = websocket.create_connection(url, timeout=30)
        self._number = 0

    def evaluate(self, expression):
        self._number += 1
        call = {
            "id": self._number,
            "method": "Runtime.evaluate",
            "params": {"expression": expression, "returnByValue": True},
        }
        self._socket.send(json.dumps(call))
        while True:
            answer = json.loads(self._socket.recv())
            if answer.get("id") == self._number:
                return answer["result"]["result"].get("value")

    def wait_for(self, expression, seconds=30):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.evaluate(expression):
                return
            time.sleep(0.05)
        raise AssertionError(
            f"never true: {expression}\n{self.evaluate('document.body.innerText')}"
        )

    def close(self):
        self._socket.close()


@contextmanager
def opened(address, profile):
    """A headless browser with one page open."""
    browser = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"LANGUAGE": "en"},
    )
    try:
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 30
        while not port_file.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        port = port_file.read_text().split()[0]
        targets = []
        while not targets and time.monotonic() < deadline:
            found = httpx.get(f"http://127.0.0.1:{port}/json").json()
            targets = [t for t in found if t["type"] == "page" and t["url"].startswith("http")]
        page = Page(targets[0]["webSocketDebuggerUrl"])
        yield page
        page.close()
    finally:
        browser.terminate()
        browser.wait(timeout=20)


@pytest.fixture(scope="module")
def address(tiny_model, tiny_tokenizer):
    llms = {
        name: LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
        for name in ("base", "tuned")
    }
    with running(llms) as address:
        yield address


PRESS_ENTER = (
    "document.querySelector('#question').dispatchEvent("
    "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true}))"
)


def test_a_question_in_the_url_fills_the_box_and_is_sent_only_by_the_user(address, tmp_path):
    with opened(f"{address}/?q=hello&models=base,tuned&lang=en", tmp_path) as page:
        page.wait_for("document.querySelector('#model-0')?.value === 'base'")
        assert page.evaluate("document.querySelector('#question').value") == "hello"
        time.sleep(0.5)
        assert page.evaluate("document.querySelectorAll('.question, .reply').length") == 0
        asked = "performance.getEntriesByType('resource').map(e => new URL(e.name).pathname)"
        assert "/v1/chat/completions" not in page.evaluate(asked)
        page.evaluate(PRESS_ENTER)
        page.wait_for("document.querySelectorAll('.reply[data-state=done]').length === 2")
        texts = page.evaluate("[...document.querySelectorAll('.reply')].map(r => r.dataset.model)")
        assert texts == ["base", "tuned"]
        answers = page.evaluate(
            "[...document.querySelectorAll('.reply-text')].map(t => t.textContent)"
        )
        assert all(answers)
        assert page.evaluate("document.querySelector('.question').textContent") == "hello"
        assert "tok" in page.evaluate("document.querySelector('.reply-stats').textContent")


def test_a_typed_question_is_sent_by_enter_and_markup_stays_text(address, tmp_path):
    with opened(f"{address}/?models=tuned&lang=zh", tmp_path) as page:
        page.wait_for("document.querySelector('#model-0')?.value === 'tuned'")
        assert page.evaluate("document.documentElement.lang").startswith("zh")
        page.evaluate(
            "(() => { const q = document.querySelector('#question'); q.value = '<b>hi</b>';"
            "q.dispatchEvent(new Event('input', {bubbles: true})) })()"
        )
        page.evaluate(PRESS_ENTER)
        page.wait_for("document.querySelectorAll('.reply[data-state=done]').length === 1")
        assert page.evaluate("document.querySelector('.question').textContent") == "<b>hi</b>"
        assert page.evaluate("document.querySelector('.question b')") is None
