"""What a new user tries first: the version, the help, a pull, a benchmark, Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import easyllm
from easyllm.engine.rates import Rates
from easyllm_command import easyllm as command


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version_is_told_without_importing_torch(word):
    program = f"""
import sys
from easyllm.cli.main import main
sys.argv = ["easyllm", "{word}"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version = re.escape(easyllm.__version__)
    assert re.fullmatch(rf"easyllm {version} \(python 3\.\d+\.\d+, torch \d\S+\)\n", done.stdout)


def test_debug_is_documented_and_shows_the_traceback_wherever_it_is(tmp_path):
    assert "--debug" in command("--help").stdout
    missing = str(tmp_path / "model")
    for words in (("--debug", "chat", missing), ("chat", missing, "--debug")):
        done = command(*words)
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert "SourceError" in done.stderr
    done = command("chat", missing)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


def test_a_word_after_two_dashes_is_text(tiny_folder):
    words = ("generate", "--max-tokens", 2, "--json", tiny_folder, "--", "--debug")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] > 1


def test_a_pull_of_a_model_that_is_here_downloads_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EASYLLM_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    for name in (tiny_folder, gguf):
        done = command("pull", name)
        assert (done.returncode, done.stdout) == (0, f"{name}\n")
        assert done.stderr == f"{name} is already on this machine; nothing to download\n"
    assert not (tmp_path / "cache").exists()


def test_the_engine_benchmark_is_readable_in_80_columns(tiny_folder, monkeypatch):
    rates = Rates(
        sequences=32, prompt=1024, new=256, prefill_tokens_per_s=98765.4, prefill_share=0.99,
        decode_tokens_per_s=12345.6, read_share=0.99, matmul_share=0.99, first_token_s=123.45,
    )  # fmt: skip
    machine = {"matmul_flops_per_s": 1e12, "read_bytes_per_s": 1e11}
    monkeypatch.setattr("easyllm.engine.rates.measure_rates", lambda *_, **__: ([rates], machine))
    done = command("bench", "engine", tiny_folder, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    (row,) = (line for line in done.stdout.splitlines() if "98765" in line)
    assert len(row) <= 80
    assert [c.strip() for c in row.strip("│").split("│")] == [
        *("32", "1024", "256", "98765", "99%", "12345.6", "99%", "99%", "123.45")
    ]


def test_ctrl_c_is_reported_as_an_interruption(tiny_folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "easyllm", "chat", str(tiny_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("memory:")  # now it waits for input
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")
