#!/usr/bin/env bash
# lm-eval: with the remote tokenizer, a BOS token whose id is 0 counts as no BOS token, and the log-likelihood of a text is
# computed after EOS instead.
#
# Rolling log-likelihoods (perplexity tasks such as wikitext) put one token in front of a text. With `tokenizer_backend=remote`
# it is `bos_token_id or eos_token_id`, so id 0 falls through to EOS; the backend for Hugging Face tokenizers asks for None and
# takes 0. DeepSeek's tokenizers have BOS 0 and EOS 1, so a perplexity through a server differs from that of the `hf` backend on
# the same weights. Nothing is logged.
#
# Seen on 30 November 2026 with lm_eval 0.4.13, Python 3.11 on Linux: the text's tokens are 5 6 7, EOS is 1; the server is sent
#   BOS 0: [1, 5, 6, 7]; BOS 2: [2, 5, 6, 7]
#
# What to do: prefix_token_id=0 in model_args, or the tokenizer's name instead of the remote one. `easyllm eval --task
# lm-eval:...` asks whether there is a BOS token, not whether its id is true (docs/evaluation.md).
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


model().loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("some text",), 0)])
print("RESULT", seen[0]["prompt"][0], flush=True)
PYTHON
zero=$("$work/venv/bin/python" ask.py 0 2>/dev/null | grep -ao 'RESULT .*' | cut -c8-) || true
two=$("$work/venv/bin/python" ask.py 2 2>/dev/null | grep -ao 'RESULT .*' | cut -c8-) || true
echo "lm_eval 0.4.13: tokens that are sent with BOS 0: ${zero:-no result}; with BOS 2: ${two:-no result}"
[[ $zero == "[1, 5, 6, 7]" && $two == "[2, 5, 6, 7]" ]]
