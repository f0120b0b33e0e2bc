"""`easyllm bench serve` against a fake server."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from easyllm_command import easyllm
from fake_openai import FakeServer, serving

SMALL = ("--requests", 4, "--concurrency", 2, "--prompt-tokens", 20, "--max-tokens", 3)


def test_the_report_has_latencies_rates_and_errors():
    fake = FakeServer(faults={2: 503}, long_words={"time"})
    with serving(fake) as url:
        done = easyllm("bench", "serve", url, *SMALL)
    assert done.returncode == 0, done.stderr
    for words in (
        f"fake at {url}, chat",
        "2 clients",
        "first token",
        "between tokens",
        "whole answer",
        "3 in ",
        "after 2 of warm-up",
        "20 of prompt, 3 of output",
        "1 × HTTP 503: at fault",
    ):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_several_loads_are_compared_in_one_table():
    with serving(FakeServer()) as url:
        done = easyllm("bench", "serve", url, *SMALL, "--concurrency", 1)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.partition("All loads")[2].splitlines()
    assert [row.split()[1] for row in rows if row.startswith("│")] == ["2", "1"]
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_json_is_one_object():
    with serving(FakeServer()) as url:
        done = easyllm("bench", "serve", url, "--rate", 100, "--requests", 5, "--json")
    found = json.loads(done.stdout)
    assert found["model"] == "fake"
    assert found["runs"][0]["rate"] == 100
    assert set(found["runs"][0]["latency_s"]) == {"mean", "p50", "p95", "p99"}


def test_prompts_come_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    fake = FakeServer()
    with serving(fake) as url:
        done = easyllm("bench", "serve", url, *SMALL, "--data", tmp_path / "prompts.txt")
    assert done.returncode == 0, done.stderr
    assert {body["messages"][0]["content"] for body in fake.bodies} == {"one", "two"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nonsense://x"], "is not the URL of an HTTP server"),
        (["127.0.0.1:1"], "no usable server at http://127.0.0.1:1"),
        (["x", "--rate", "1", "--concurrency", "2"], "two kinds of load; give one of them"),
        (["x", "--rate", "0"], "rate.0"),
        (["x", "--dialect", "poetry"], "dialect"),
        (["x", "--data", "missing.txt"], "cannot read missing.txt"),
        (["x", "--api-key", "a b"], "the API key"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(words, message):
    done = easyllm("bench", "serve", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_test_without_any_answer_fails():
    with serving(FakeServer(faults=dict.fromkeys(range(99), 500))) as url:
        done = easyllm("bench", "serve", url, *SMALL)
    assert done.returncode == 1
    assert "4 × HTTP 500" in done.stdout


def test_ctrl_c_prints_what_has_been_measured():
    fake = FakeServer(token_s=0.01)
    with serving(fake) as url:
        words = ["bench", "serve", url, "--max-tokens", "5", "--requests", "100000", "--json"]
        command = [sys.executable, "-m", "easyllm", *words, "--concurrency", "4"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ},
            text=True,
            # a background job, in which tests may run, hands down that it ignores Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 30
        while len(fake.bodies) < 30 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert json.loads(out)["runs"][0]["answered"] > 10
    assert "interrupted" in err
    assert "Traceback" not in err
