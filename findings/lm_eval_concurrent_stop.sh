#!/usr/bin/env bash
# lm-eval: with num_concurrent above 1, requests for text no longer name the end-of-sequence token as a stop string.
#
# `local-completions` and `local-chat-completions` add the tokenizer's EOS (or `eos_string`) to the task's own stop strings.
# The path for a single request at a time passes it on; the one for concurrent requests does not, so `stop` in the request
# depends on an option about speed. A model whose generation does not end at that token by itself (another EOS in its
# configuration, `ignore_eos`) answers longer texts, and its scores change with num_concurrent. Nothing is logged.
#
# Seen on 30 November 2026 with lm_eval 0.4.13, Python 3.11 on Linux: the server receives
#   num_concurrent=1: stop ["\n", "</s>"]; num_concurrent=2: stop ["\n"]
#
# What to do: name EOS in the task's `until`. `easyllm eval --task lm-eval:...` in process stops at the model's own
# end-of-sequence tokens whatever the batch; a server of this project ends there as well, without being told
# (docs/evaluation.md).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet 'lm_eval[api]==0.4.13'
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
cat >ask.py <<'PYTHON'
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BOS, EOS, TEXT = int(sys.argv[1]), 1, [5, 6, 7]
seen = []


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does: its tokenizer's routes, and completions."""

    def log_message(self, *_):
        pass

    def send(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send({"bos_token": "<s>", "eos_token": "</s>"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            self.send({"tokens": {"<s>": [BOS], "</s>": [EOS]}.get(body["prompt"], TEXT)})
            return
        seen.append(body)
        values = [-1.0] * len(TEXT) + [-1.0]
        top = [{"x": value} for value in values]
        logprobs = {"tokens": ["x"] * 5, "token_logprobs": [None, *values], "top_logprobs": [None, *top]}
        self.send({"choices": [{"index": 0, "text": "x", "logprobs": logprobs}]})


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


def model(**options):
    address = f"http://127.0.0.1:{server.server_port}/v1/completions"
    return LocalCompletionsAPI(base_url=address, model="m", tokenizer_backend="remote", **options)


for number in (1, 2):
    seen.clear()
    request = Instance("generate_until", {}, ("some text", {"until": ["\n"], "max_gen_toks": 4}), 0)
    model(num_concurrent=number).generate_until([request])
    print("RESULT", json.dumps(seen[0]["stop"]), flush=True)
PYTHON
found=$("$work/venv/bin/python" ask.py 2 2>/dev/null | grep -ao 'RESULT .*' | cut -c8- | paste -sd';') || true
echo "lm_eval 0.4.13: stop strings with num_concurrent 1 and 2: ${found:-no result}"
[[ $found == '["\n", "</s>"];["\n"]' ]]
