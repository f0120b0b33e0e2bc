"""Takes the screenshots of the chat page in docs/figures.

python tools/page_figures.py ADAPTER [--folder docs/figures]

Serves SmolLM2 as `base` and an adapter for it as `tuned`, asks both in headless Chromium, and
writes page-light.png, page-dark.png, page-phone.png, page-inspector.png and page-engine.png.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from browser import Browser, Page, running_browser  # noqa: E402
from chat_page import DONE, send  # noqa: E402

CODE = "Write a Python function that reverses a string, and explain it in two sentences."
TIPS = "Give three tips for clear writing."
SETTINGS = {"values": {"temperature": 0, "max_tokens": 160}}
PORT = 8499


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", help="folder of an adapter for smollm2")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args()
    models = ["base=smollm2", f"tuned={options.adapter}"]
    command = [sys.executable, "-m", "easyllm", "serve", *models, "--port", str(PORT)]
    server = subprocess.Popen(command)
    try:
        address = f"http://127.0.0.1:{PORT}"
        wait_for(f"{address}/health")
        ask(address, TIPS)  # compiles and warms up
        with tempfile.TemporaryDirectory() as profile, running_browser(Path(profile)) as browser:
            take(browser, address, options.folder)
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str) -> None:
    """Waits until the server answers."""
    while True:
        try:
            httpx.get(url).raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.2)


def ask(address: str, question: str, max_tokens: int = 8) -> None:
    """Asks the server directly, so that the engine view has something to show."""
    message = {"role": "user", "content": question}
    body = {"model": "base", "messages": [message], "max_tokens": max_tokens, "ignore_eos": True}
    httpx.post(f"{address}/v1/chat/completions", json=body, timeout=300).raise_for_status()


def take(browser: Browser, address: str, folder: Path) -> None:
    """Writes the five screenshots."""
    context = browser.new_context()
    with browser.page(
        f"{address}/?models=base&lang=en", height=780, context=context, settings=SETTINGS
    ) as page:
        answered(page, CODE, 1)
        shot(page, folder / "page-light.png")
        page.resize(390, 780)
        shot(page, folder / "page-phone.png")
        page.resize(1200, 780)
        page.click(".assistant .inspect")
        page.wait_for("document.querySelectorAll('.token').length > 20")
        # the least certain token, in the middle of the view
        page.click(".uncertain button")
        shot(page, folder / "page-inspector.png")
        page.click(".assistant .inspect")
        page.click("#engine-button")
        work = [
            threading.Thread(target=ask, args=(address, f"{CODE} Number {n}.", 150))
            for n in range(7)
        ]
        for each in work:
            each.start()
            time.sleep(0.4)
        time.sleep(4)
        shot(page, folder / "page-engine.png")
        for each in work:
            each.join()
    compared = f"{address}/?models=base,tuned&lang=en"
    with browser.page(compared, height=780, dark=True, context=context, settings=SETTINGS) as page:
        answered(page, TIPS, 2)
        shot(page, folder / "page-dark.png")


def answered(page: Page, question: str, count: int) -> None:
    """Sends a question and waits for all its answers."""
    send(page, question)
    page.wait_for(f"document.querySelectorAll('{DONE}').length === {count}")


def shot(page: Page, path: Path) -> None:
    time.sleep(1)  # fonts, highlighting, transitions
    page.screenshot(path)


if __name__ == "__main__":
    main()
