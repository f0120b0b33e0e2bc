#!/usr/bin/env bash
# openai 3.57.0: chat.completions.stream() raises at its end when plain text was cut by max_tokens.
#
# `client.chat.completions.stream(...)` is the helper that collects a streamed answer. If the answer ends with finish_reason
# "length", get_final_completion() raises LengthFinishReasonError ("Could not parse response content"), although no
# response_format and no tools were given and there is nothing to parse; create(stream=True) gives the same text as it is, and
# so does create(). The text is not lost: it is in the error's `completion`.
#
# Seen on 29 November 2026 with openai 3.57.0, Python 3.11 on Linux, against a server of the standard library's that sends
# a valid stream of three chunks:
#   create(stream=True): 'Once upon' (length); stream(): LengthFinishReasonError, with 'Once upon' in its completion
#
# What to do: catch openai.LengthFinishReasonError, or use create(stream=True). In this project: docs/serve.md.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet openai==3.57.0
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
"$work/venv/bin/python" - 2>"$work/log" <<'PYTHON' || { status=$?; tail -3 "$work/log"; exit $status; }
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

STEPS = [({"role": "assistant", "content": "Once"}, None), ({"content": " upon"}, None), ({}, "length")]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for delta, reason in STEPS:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
            self.wfile.write(f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}", api_key="none", max_retries=0)
request = {"model": "m", "messages": [{"role": "user", "content": "Tell a tale."}], "max_tokens": 2}
chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**request, stream=True)]
plain = "".join(choice.delta.content or "" for choice in chunks)
try:
    with client.chat.completions.stream(**request) as stream:
        helper, seen = stream.get_final_completion(), False
except openai.LengthFinishReasonError as error:
    helper, seen = error.completion, True
text = helper.choices[0].message.content
ending = "LengthFinishReasonError, with" if seen else "returns"
where = " in its completion" if seen else ""
print(
    f"openai {openai.__version__}: create(stream=True): {plain!r} ({chunks[-1].finish_reason}); "
    f"stream(): {ending} {text!r}{where}"
)
sys.exit(0 if seen and text == plain == "Once upon" else 1)
PYTHON
