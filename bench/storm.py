"""Many clients, some of which hang up: errors, memory and free pages of the server; a JSON row.

    python bench/storm.py [--clients 200] [--seconds 120] [--record]

Serves SmolLM2 in int4 and lets `--clients` clients ask one after another, without a pause, for
`--seconds`. A third hang up: before the response, or after a few tokens of its stream. In the last
ten seconds some clients begin a body that they never finish, and the server gets SIGTERM. Checked:
every client that stayed gets a complete answer with status 200; afterwards no page of the KV cache
is in use and greedy answers are those of before; memory grows by less than 5% from a quarter of the
time on; the server exits within its drain timeout plus three seconds.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import machine

from serve import free_port, healthy

DRAIN_S, EXIT_MARGIN_S, MAX_GROWTH = 5, 3, 1.05
CACHE_GB = 0.2
"""Small, so that all of its memory has been touched after a quarter of the time."""
QUESTIONS = ("What is the capital of France?", "Name three colours.", "用一句话介绍北京。")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    with serving() as (address, process):
        before = greedy(address)
        storm = Storm(address, process.pid, options)
        asyncio.run(storm.run())
        after, gauges = greedy(address), idle_gauges(address)
        exit_s = seconds_to_exit(address, process)
    quarter = storm.memory_mb[len(storm.memory_mb) // 4]
    results = {
        "outcomes": dict(sorted(storm.outcomes.items())),
        "tokens": storm.tokens,
        "memory_mb": [quarter, max(storm.memory_mb), storm.memory_mb[-1]],
        "greedy_unchanged": before == after,
        "idle_gauges": gauges,
        "exit_s_with_stalled_bodies": round(exit_s, 2),
    }
    row = machine.row(
        "storm",
        model="smollm2",
        clients=options.clients,
        seconds=options.seconds,
        results=results,
    )
    machine.finish(row, "storm", record=options.record)
    assert set(storm.outcomes) <= {"answered", "hung up"}, storm.outcomes
    assert before == after, (before, after)
    assert not any(gauges.values()), gauges
    assert max(storm.memory_mb) < MAX_GROWTH * quarter, storm.memory_mb
    assert exit_s < DRAIN_S + EXIT_MARGIN_S, exit_s


class Storm:
    """The clients, and what became of their requests."""

    def __init__(self, address: str, pid: int, options: argparse.Namespace) -> None:
        self.address, self.pid, self.clients = address, pid, options.clients
        self.until = time.monotonic() + options.seconds
        self.outcomes: Counter[str] = Counter()
        self.tokens = 0
        self.memory_mb: list[int] = []

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.address, timeout=300, limits=limits) as http:
            clients = [self.client(http, number) for number in range(self.clients)]
            await asyncio.gather(self.watch(), *clients)

    async def watch(self) -> None:
        while time.monotonic() < self.until:
            self.memory_mb.append(rss_mb(self.pid))
            await asyncio.sleep(1)

    async def client(self, http: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.until:
            try:
                outcome = await self.ask(http, chance, hangs_up=number % 3 == 0)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            self.outcomes[outcome] += 1

    async def ask(self, http: httpx.AsyncClient, chance: random.Random, *, hangs_up: bool) -> str:
        words = " ".join(chance.choice(("sea", "tree", "stone", "bird")) for _ in range(40))
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": f"Write about: {words}"}],
            "max_tokens": chance.randint(4, 32),
            "stream": chance.random() < 0.7 or hangs_up,
        }
        events = chance.randint(0, 4) if hangs_up else -1
        if events == 0:  # gone before the response begins
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(chance.random()):
                    await http.post("/v1/chat/completions", json=body)
            return "hung up"
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return f"{response.status_code} {(await response.aread()).decode()[:200]}"
            if not body["stream"]:
                answer = json.loads(await response.aread())
                self.tokens += answer["usage"]["completion_tokens"]
                return "answered"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return "answered"
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return f"error event {line[:200]}"
                    self.tokens += 1
                    events -= 1
                    if events == 0:
                        return "hung up"
        return "ended early"


def greedy(address: str) -> list[str]:
    """Returns greedy answers to some questions."""
    found = []
    for question in QUESTIONS:
        body = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 24,
        }
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        found.append(answer["choices"][0]["message"]["content"])
    return found


def idle_gauges(address: str) -> dict[str, float]:
    """Returns how many requests and pages are in use once nothing runs."""
    for _ in range(100):
        text = httpx.get(f"{address}/metrics").text
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        found = {
            name: sum(map(float, re.findall(rf"^easyllm_{name}\S* (\S+)$", text, re.M)))
            for name in names
        }
        if not any(found.values()):
            break
        time.sleep(0.1)
    return found


def seconds_to_exit(address: str, process: "subprocess.Popen[bytes]") -> float:
    """Returns how long the server takes to exit while clients have begun bodies."""
    port = int(address.rpartition(":")[2])
    stalled = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for each in stalled:
        each.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
    time.sleep(0.5)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    for each in stalled:
        each.close()
    return time.monotonic() - began


def rss_mb(pid: int) -> int:
    """Returns the resident memory of a process in megabytes."""
    with open(f"/proc/{pid}/status") as status:
        line = next(x for x in status if x.startswith("VmRSS"))
    return round(int(line.split()[1]) / 1024)


@contextlib.contextmanager
def serving() -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Runs a server."""
    port = free_port()
    words = ["serve", "smollm2", "--quantize", "int4", "--port", str(port)]
    words += ["--drain-timeout", str(DRAIN_S), "--cache-gb", str(CACHE_GB)]
    process = subprocess.Popen(
        [sys.executable, "-m", "easyllm", *words],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert healthy(f"http://127.0.0.1:{port}", process), "the server did not start"
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
