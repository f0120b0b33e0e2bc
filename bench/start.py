"""Time from the start of a command to its first token, in this checkout and another; one JSON row.

    python bench/start.py --base CHECKOUT [--verbs generate serve] [--rounds 9] [--record]

`generate` is the whole process of `easyllm generate smollm2 --quantize int4 "Hi" --max-tokens 1`.
`serve` ends with the answer to the first chat request of one token, which is sent again every few
milliseconds from the start on; the server is then stopped.

The sides are measured in turn, and a ratio is taken per round, so that other load on the machine
slows both down. The first round fills caches (weights, kernels, bytecode) and does not count.
Reported are the median of the ratios and the interval between the order statistics that contain the
true median with at least 95% probability. `--no-cache` measures without the weight cache.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import machine
from paired import median_ratio

ROOT = Path(__file__).parents[1]
MODEL = ("smollm2", "--quantize", "int4")
PROMPT = "Hi"
RETRY_S = 0.005
LONGEST_S = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--here", type=Path, default=ROOT)
    parser.add_argument("--verbs", nargs="+", default=["generate", "serve"], choices=VERBS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-cache", action="store_true")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    results = [compare(verb, options) for verb in options.verbs]
    row = machine.row("start", weight_cache=not options.no_cache, results=results)
    machine.finish(row, "start", record=options.record)


def compare(verb: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of both sides, and the ratio of each round."""
    sides = {"base": options.base, "here": options.here}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):  # the first round fills caches
        order = list(sides) if number % 2 else list(sides)[::-1]
        for name in order:
            seconds = VERBS[verb](environment(sides[name], no_cache=options.no_cache))
            if number:
                found[name].append(seconds)
                print(verb, name, round(seconds, 3), file=sys.stderr, flush=True)
    ratios = [here / base for here, base in zip(found["here"], found["base"], strict=True)]
    return {
        "verb": verb,
        "rounds": options.rounds,
        "base_s": round(statistics.median(found["base"]), 3),
        "here_s": round(statistics.median(found["here"]), 3),
        "ratio_to_base": median_ratio(ratios),
    }


def environment(checkout: Path, *, no_cache: bool) -> dict[str, str]:
    """Returns the environment in which a checkout's own code runs, from compiled bytecode."""
    changes = {
        "PYTHONPATH": str(checkout.resolve() / "src"),
        "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "easyllm-bench-start"),
        "HF_HUB_OFFLINE": "1",
    }
    changes |= {"EASYLLM_WEIGHT_CACHE_GB": "0"} if no_cache else {}
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **changes}


def command(*words: str) -> list[str]:
    """Returns the command line of `easyllm`; `PYTHONPATH` says of which checkout."""
    return [sys.executable, "-c", "from easyllm.cli.main import main; main()", *words]


def generate(env: dict[str, str]) -> float:
    """Returns the seconds that a process needs to print one token."""
    start = time.perf_counter()
    words = command("generate", *MODEL, PROMPT, "--max-tokens", "1")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=LONGEST_S)
    seconds = time.perf_counter() - start
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"generate failed: {done.stderr}")
    return seconds


def serve(env: dict[str, str]) -> float:
    """Returns the seconds from the start of a server to the answer to its first request."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    with running(command("serve", *MODEL, "--port", str(port)), env) as process:
        while True:
            try:
                answer = ask(port)
                break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError("the server ended before it answered") from None
                time.sleep(RETRY_S)
        seconds = time.perf_counter() - start
    if not answer["choices"][0]["message"]["content"]:
        raise RuntimeError(f"the server answered nothing: {answer}")
    return seconds


def ask(port: int) -> Any:
    """Returns the answer to a chat request of one token.

    Raises:
        OSError: no server listens yet.
    """
    connection = HTTPConnection("127.0.0.1", port, timeout=LONGEST_S)
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": MODEL[0], "messages": messages, "max_tokens": 1, "temperature": 0}
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"the server answered {answer.status}: {answer.read()!r}")
        return json.loads(answer.read())
    finally:
        connection.close()


@contextmanager
def running(words: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a server for the duration of the block."""
    process = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


VERBS = {"generate": generate, "serve": serve}

if __name__ == "__main__":
    main()
