"""Debian's Chromium, controlled by the DevTools protocol: pages, keys, screenshots, requests."""

import base64
import gzip
import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import websocket

AXE = Path(__file__).with_name("axe.min.js.gz")  # axe-core 4.14.1, see axe.LICENSE
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    *("--remote-debugging-port=0", "--remote-allow-origins=*", "--hide-scrollbars"),
)
KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "ArrowUp": (38, ""),
    "ArrowLeft": (37, ""),
    "ArrowRight": (39, ""),
}


class Browser:
    """A running browser; each page has storage of its own."""

    def __init__(self, port, path):
        self.port = port
        self._socket = _Socket(f"ws://127.0.0.1:{port}{path}")

    @contextmanager
    def page(self, url, *, width=1200, height=800, dark=False, context=None, settings=None):
        """Opens a page in a new browser context (or in one that `context` names) and yields it.

        `settings` are the page's, as it keeps them.
        """
        made = context or self.new_context()
        target = self._socket.call("Target.createTarget", url="about:blank", browserContextId=made)[
            "targetId"
        ]
        page = Page(f"ws://127.0.0.1:{self.port}/devtools/page/{target}")
        try:
            page.resize(width, height, dark=dark)
            if settings is not None:
                kept = json.dumps(json.dumps(settings))
                source = f"localStorage['easyllm-settings'] ??= {kept}"
                page.call("Page.addScriptToEvaluateOnNewDocument", source=source)
            page.open(url)
            yield page
        finally:
            page.close()
            self._socket.call("Target.closeTarget", targetId=target)
            if context is None:
                self.remove_context(made)

    def new_context(self):
        """Creates an empty profile, as of a private window; returns its name."""
        return self._socket.call("Target.createBrowserContext")["browserContextId"]

    def remove_context(self, context):
        """Removes a profile."""
        self._socket.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self):
        """Closes the connection."""
        self._socket.close()


class Page:
    """A browser tab.

    Attributes:
        errors: messages of the console that are errors, and exceptions that nobody caught.
        requests: addresses that the page asked for.
    """

    def __init__(self, url):
        self.errors, self.requests = [], []
        self._listeners, self._seen = {}, set()
        self._socket = _Socket(url, self._take)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._socket.call(f"{domain}.enable")
        self.call = self._socket.call

    def _take(self, event):
        found = event["params"]
        self._seen.add(event["method"])
        if listener := self._listeners.get(event["method"]):
            listener(found)
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
            case "Runtime.exceptionThrown":
                details = found["exceptionDetails"]
                self.errors.append(details.get("exception", details).get("description", details))
            case "Runtime.consoleAPICalled" if found["type"] == "error":
                self.errors.append(str(found["args"]))
            case "Log.entryAdded" if found["entry"]["level"] == "error":
                self.errors.append(found["entry"]["text"] + found["entry"].get("url", ""))

    def listen(self, method, take):
        """Calls `take` with the parameters of each event of a method."""
        self._listeners[method] = take

    def wait_for_event(self, method):
        """Waits until an event of a method has come."""
        while method not in self._seen:
            self.evaluate("1")
            time.sleep(0.05)

    def resize(self, width, height, *, dark=False, scale=1):
        """Sets the size of the view in CSS pixels, and the system's theme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url):
        """Opens an address and waits until the page has started."""
        self.call("Page.navigate", url=url)
        address = json.dumps(url.split("?")[0])
        ready = "document.documentElement.dataset.ready"  # set by our own page
        if url.startswith("file:"):
            ready = "document.readyState === 'complete'"
        self.wait_for(f"location.href.startsWith({address}) && {ready}")

    def evaluate(self, expression):
        """Returns the value of an expression; a promise is awaited."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    def wait_for(self, expression, seconds=120):
        """Waits until an expression is true, and returns its value (of an element, True)."""
        deadline = time.monotonic() + seconds
        asked = f"(async v => (v = await v) instanceof Node || v)({expression})"
        while time.monotonic() < deadline:
            try:
                if found := self.evaluate(asked):
                    return found
            except AssertionError:  # the page is not complete yet
                pass
            time.sleep(0.02)
        text = self.evaluate("document.body.innerText")
        raise AssertionError(f"never true: {expression}\n{text}\n{self.errors}")

    def click(self, selector):
        """Clicks the first element that a selector finds, once it can be seen."""
        found = json.dumps(selector)
        self.wait_for(f"document.querySelector({found})?.checkVisibility()")
        self.evaluate(f"document.querySelector({found}).click()")

    def focus(self, selector):
        """Moves the keyboard's focus to the first element that a selector finds."""
        self.wait_for(f"document.querySelector({json.dumps(selector)})")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")

    def type(self, selector, text):
        """Writes a text in place of that of a field, as typing or pasting would."""
        found = json.dumps(selector)
        self.evaluate(f"(e => {{ e.focus(); e.select() }})(document.querySelector({found}))")
        self.call("Input.insertText", text=text)

    def press(self, key, *, ctrl=False, shift=False):
        """Presses a key."""
        code, text = KEYS[key] if key in KEYS else (ord(key.upper()), key)
        held = {"modifiers": 2 * ctrl + 8 * shift, "key": key, "windowsVirtualKeyCode": code}
        if text and not ctrl:
            held["text"] = text
        self.call("Input.dispatchKeyEvent", type="keyDown", **held)
        self.call("Input.dispatchKeyEvent", type="keyUp", **held)

    def text(self, selector):
        """Returns the text of the first element that a selector finds."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText")

    def count(self, selector):
        """Returns how many elements a selector finds."""
        return self.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")

    def attach(self, selector, path):
        """Chooses a file in an `<input type=file>`."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def hosts(self):
        """Returns the hosts that the page asked for anything."""
        return {urlsplit(url).netloc for url in self.requests if url.startswith("http")}

    def serious_faults(self):
        """Returns the faults of accessibility that axe-core calls serious or critical."""
        self.evaluate(gzip.decompress(AXE.read_bytes()).decode() + "; true")
        found = self.evaluate("axe.run().then(found => found.violations)")
        return [
            (each["id"], [node["html"][:200] for node in each["nodes"]])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

    def screenshot(self, path):
        """Writes a PNG of what is visible."""
        data = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        """Closes the connection."""
        self._socket.close()


class _Socket:
    """A connection to the browser, or to one of its pages."""

    def __init__(self, url, take=lambda event: None):
        self._socket = websocket.create_connection(url, timeout=120)
        self._number, self._take = 0, take

    def call(self, method, **params):
        """Calls a method of the protocol and returns its result; events go to `take`."""
        self._number += 1
        call = {"id": self._number, "method": method, "params": params}
        self._socket.send(json.dumps(call))
        while True:
            answer = json.loads(self._socket.recv())
            if "method" in answer:
                self._take(answer)
            elif answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]

    def close(self):
        self._socket.close()


@contextmanager
def running_browser(profile):
    """Starts Chromium with an empty profile in a folder, and yields it."""
    process = subprocess.Popen(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"LANGUAGE": "en"},
    )
    try:
        port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + 120
        while not (port_file.exists() and port_file.read_text().strip()):
            assert time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.05)
        port, path = port_file.read_text().split()
        deadline = time.monotonic() + 60
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}/json/version")
                break
            except httpx.HTTPError:
                assert time.monotonic() < deadline, "Chromium does not answer"
        browser = Browser(port, path)
        yield browser
        browser.close()
    finally:
        process.terminate()
        process.wait(timeout=60)
