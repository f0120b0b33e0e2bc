"""A server with OpenAI's API that generates no text of a model, for tests of its clients."""

import json
import threading
import time

from threaded_server import JsonHandler, threaded


class FakeServer:
    """Answers chat and completion requests with a fixed text, a word a token.

    Attributes:
        models: names that it lists.
        usage: whether it reports usage, in the last chunk.
        tokenize: the key of a text in `/tokenize`: `prompt` (vLLM), `content` (llama.cpp), or None.
        template: number of tokens that the chat template adds.
        long_words: words of one more token than the others.
        tokens_per_word: tokens of the other words.
        longest: the largest number of tokens of a prompt so far.
        token_s: time between two chunks.
        per_chunk: words in a chunk.
        probe: the answer to requests for a single token, in the form of `faults`.
        faults: maps the number of a request for several tokens to its answer: a status, or the
            bytes that follow the head of a stream.
        open_at_once: the largest number of requests open at once.
        bodies: the requests for several tokens so far.
    """

    def __init__(self, **changes):
        self.models, self.usage, self.tokenize, self.template = ["fake"], True, "prompt", 9
        self.long_words, self.token_s, self.per_chunk = set(), 0.0, 1
        self.tokens_per_word, self.longest = 1, 0
        self.probe, self.faults, self.bodies = None, {}, []
        self.open, self.open_at_once, self.lock = 0, 0, threading.Lock()
        self.arrivals = []
        vars(self).update(changes)

    def count(self, text):
        return sum(self.tokens_per_word + (word in self.long_words) for word in text.split())

    def enter(self, body):
        """Registers a completion request; returns its number."""
        with self.lock:
            self.bodies.append(body)
            self.arrivals.append(time.monotonic())
            self.open += 1
            self.open_at_once = max(self.open_at_once, self.open)
            return len(self.bodies) - 1


class _Handler(JsonHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    fake: FakeServer

    def do_GET(self):
        if self.path == "/v1/models":
            self.send_object(200, {"data": [{"id": name} for name in self.fake.models]})
        else:
            self.send_object(404, {"error": {"message": "no such route"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize" and self.fake.tokenize:
            count = self.fake.count(body.get(self.fake.tokenize, ""))
            self.send_object(200, {"tokens": list(range(count))})
        elif self.path in ("/v1/chat/completions", "/v1/completions"):
            self.complete(body)
        else:
            self.send_object(404, {"error": {"message": "no such route"}})

    def complete(self, body):
        if body["max_tokens"] == 1:
            self.answer(body, self.fake.probe)
            return
        number = self.fake.enter(body)
        try:
            self.answer(body, self.fake.faults.get(number))
        except BrokenPipeError:
            self.close_connection = True
        finally:
            with self.fake.lock:
                self.fake.open -= 1

    def answer(self, body, fault):
        if isinstance(fault, int):
            self.send_object(fault, {"error": {"message": "at fault"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault is not None:
            self.send_chunk(fault)
            self.send_chunk(b"")
            return
        chat = "messages" in body
        words = ["word "] * body["max_tokens"]
        if chat:
            self.send_event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        step = self.fake.per_chunk
        for place in range(0, len(words), step):
            time.sleep(self.fake.token_s)
            text = "".join(words[place : place + step])
            self.send_event({"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
        self.send_event({"choices": [{"delta": {}, "text": "", "finish_reason": "length"}]})
        if self.fake.usage and body.get("stream_options"):
            self.send_event({"choices": [], "usage": self.count_tokens(body)})
        self.send_chunk(b"data: [DONE]\n\n")
        self.send_chunk(b"")

    def count_tokens(self, body):
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        number = self.fake.count(prompt) + (0 if "prompt" in body else self.fake.template)
        self.fake.longest = max(self.fake.longest, number)
        return {
            "prompt_tokens": number,
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": 2},
        }

    def send_event(self, value):
        self.send_chunk(f"data: {json.dumps(value)}\n\n".encode())

    def send_chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


def serving(fake):
    """Runs a fake server in threads and yields its address."""
    return threaded(_Handler, fake)
