"""schemathesis against `/openapi.json`: requests made from the schemas, valid and invalid ones.

All its checks run except `positive_data_acceptance`, which `hooks.py` replaces by a check with a
list of the refusals that no schema can express.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

from figures import Figures
from local_server import KEY, post, save_tiny, serving

HERE = Path(__file__).parent
SEED = 20
EXAMPLES = 60
READ_TIMEOUT_S = 10
CHAT = "/v1/chat/completions"
ASK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
    "max_tokens": 24,
}
ALLOWED = {"405", "499"}
"""Statuses that are not described: of methods that a path does not have, and of clients that left
(so are counted those that stalled too)."""


def main() -> int:
    figures = Figures("schemathesis", "hypothesis", "jsonschema-rs")
    with tempfile.TemporaryDirectory() as name:
        model = save_tiny(Path(name) / "tiny", context=512)
        options = "--read-timeout", str(READ_TIMEOUT_S)
        with serving(f"tiny={model}", *options) as address:
            before = post(address + CHAT, ASK)[1]["choices"]
            figures.run("schemathesis", lambda: fuzz(figures, address, Path(name)))
            figures.run("other statuses", lambda: other_statuses(figures, address))
            figures.run("statuses", lambda: statuses(figures, address))
            after = post(address + CHAT, ASK)[1]["choices"]
            figures.equal("the answer after all requests", after, before)
    return figures.end()


def fuzz(figures: Figures, address: str, folder: Path) -> None:
    """Runs the command; its report is printed if a check fails."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {KEY}", "--seed", str(SEED)]
    command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance"]
    command += ["--max-examples", str(EXAMPLES), "--continue-on-failure", "--no-color"]
    command += ["--request-timeout", "60", "--warnings", "off"]
    paths = os.pathsep.join((str(HERE), os.environ["PYTHONPATH"]))
    environ = os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    figures.true("no check failed", done.returncode == 0, found.group(0) if found else "")
    if done.returncode != 0:
        print(done.stdout[-12_000:], done.stderr[-2_000:])
    tested = re.search(r"Tested: (\d+)", done.stdout)
    count = sum(len(operations) for operations in get(f"{address}/openapi.json")["paths"].values())
    figures.equal("operations tested", int(tested.group(1)) if tested else 0, count)


def other_statuses(figures: Figures, address: str) -> None:
    """Provokes statuses that no generated body leads to."""
    figures.equal("an unknown model", post(address + CHAT, ASK | {"model": "x"})[0], 404)
    figures.equal("a body that is too large", status_of(address, 9 * 2**20), "413")
    figures.equal("a body that stalls", status_of(address, 9), "408")


def status_of(address: str, length: int) -> str:
    """Returns the status of a request that sends one byte of a body of this length."""
    host, port = address.removeprefix("http://").split(":")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{{"
    with socket.create_connection((host, int(port)), timeout=3 * READ_TIMEOUT_S) as raw:
        raw.sendall(head.encode())
        return raw.recv(2000).split()[1].decode()


def statuses(figures: Figures, address: str) -> None:
    """Compares the statuses that were sent with the documented ones."""
    paths = get(f"{address}/openapi.json")["paths"]
    sent = defaultdict[tuple[str, str], set[str]](set)
    text = fetch(f"{address}/metrics")
    pattern = r'easyllm_http_requests_total{method="(\w+)",route="([^"]+)",status="(\d+)"}'
    for method, route, status in re.findall(pattern, text):
        sent[method, route].add(status)
    total: dict[str, set[str]] = defaultdict(set)
    for path, operations in paths.items():
        for method, operation in operations.items():
            seen = sent[method.upper(), path]
            unknown = seen - operation["responses"].keys() - ALLOWED
            figures.equal(f"undocumented, {method} {path}", unknown, set())
            total[method] |= seen
    for method, expected in {
        "get": {"200", "401", "404"},
        "post": {"200", "400", "401", "404", "413", "415"},
        "delete": {"404"},
    }.items():
        figures.true(f"statuses, {method}", expected <= total[method], str(sorted(total[method])))
    figures.true("no server error", not re.search(r'status="5\d\d"', text))


def get(url: str) -> Any:
    return json.loads(fetch(url))


def fetch(url: str) -> str:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


if __name__ == "__main__":
    sys.exit(main())
