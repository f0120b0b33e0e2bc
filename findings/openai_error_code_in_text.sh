#!/usr/bin/env bash
# openai (Python) 3.38.0: the text of an API error no longer contains the server's error code, and langchain-openai, which looks
# for "context_length_exceeded" in that text, no longer recognises a prompt that is too long.
#
# Up to 3.37.0, str(error) was "Error code: 400 - {...the whole body...}"; since then it is the body's message alone (the code is
# in error.code, as before). langchain-openai 1.7.4 turns an error into its ContextOverflowError, which callers catch in order to
# shorten their prompt, by the code's name in str(error).
#
# Seen on 30 November 2026 with langchain-openai 1.7.4 and a server that answers 400 with code "context_length_exceeded":
#   openai 3.37.0: ContextOverflowError
#   openai 3.38.0: plain BadRequestError, although error.code is "context_length_exceeded" in both
#
# What to do: read error.code. This project's server repeats the code at the end of the message, so that both versions find it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/look.py" <<'PYTHON'
import http.server
import json
import threading

import openai
from langchain_openai import ChatOpenAI

ERROR = {
    "message": "the prompt has 9000 tokens and the model's context is 4096; shorten the prompt",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"error": ERROR}).encode()
        self.send_response(400)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = f"http://127.0.0.1:{server.server_port}/v1"
try:
    ChatOpenAI(model="m", base_url=base, api_key="k", max_retries=0).invoke("hello")
except openai.BadRequestError as error:
    names = [kind.__name__ for kind in type(error).__mro__]
    overflow = any("ContextOverflow" in name for name in names)
    print(json.dumps({"overflow": overflow, "in_text": ERROR["code"] in str(error), "code": error.code}))
PYTHON
{
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet langchain-openai==1.7.4 openai==3.37.0
} >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
cd "$work"
before=$("$work/venv/bin/python" look.py 2>"$work/log") || { tail -3 "$work/log"; exit 2; }
"$work/venv/bin/pip" install --quiet openai==3.38.0 >"$work/log" 2>&1 || { tail -3 "$work/log"; exit 2; }
after=$("$work/venv/bin/python" look.py 2>"$work/log") || { tail -3 "$work/log"; exit 2; }
echo "openai 3.37.0 with langchain-openai 1.7.4: $before"
echo "openai 3.38.0 with langchain-openai 1.7.4: $after"
[ "$before" = '{"overflow": true, "in_text": true, "code": "context_length_exceeded"}' ] &&
  [ "$after" = '{"overflow": false, "in_text": false, "code": "context_length_exceeded"}' ] ||
  { echo "CHANGED"; exit 1; }
