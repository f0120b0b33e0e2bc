"""A server with OpenAI's chat completions API that judges answers by a function, for tests."""

import json
import re
import threading

from easyllm.evaluate.prompt_rows import PromptRow
from easyllm.evaluate.sampled_answers import SampledAnswer
from threaded_server import JsonHandler, threaded


def answer(text, question="What?", **row):
    """An answer to a question, of one token per character."""
    messages = [{"role": "user", "content": question}]
    prompt = PromptRow(messages, None, {"prompt": question, **row}, "here:1")
    return SampledAnswer(prompt, text, tuple(range(len(text))))


class FakeJudge:
    """Judges by `decide(a, b)`, which returns a letter, or a whole reply.

    Attributes:
        decide: the judgement of two answers.
        knows_schema: whether `response_format` is supported.
        faults: status (or bytes) of the first requests, by their number.
        location: address of a redirect.
        bodies, headers: the requests so far.
    """

    def __init__(self, decide, **changes):
        self.decide, self.knows_schema, self.faults = decide, True, {}
        self.location, self.bodies, self.headers = "", [], []
        self.lock = threading.Lock()
        vars(self).update(changes)

    def reply(self, body):
        text = body["messages"][1]["content"]
        a, b = (
            re.search(rf"<answer-{x}-(\w+)>\n(.*?)\n</answer-{x}-\1>", text, re.DOTALL)[2]
            for x in "AB"
        )
        letter = self.decide(a, b)
        if letter not in ("A", "B", "tie"):
            return letter
        if "response_format" in body:
            return json.dumps({"reason": f"{a} or {b}", "verdict": letter})
        return f"The answers are {a} and {b}.\nVERDICT: {letter}"


class _Handler(JsonHandler):
    fake: FakeJudge

    def do_GET(self):
        self.send(200, {"data": [{"id": "fake-judge"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.fake.lock:
            number = len(self.fake.bodies)
            self.fake.bodies.append(body)
            self.fake.headers.append(dict(self.headers))
        fault = self.fake.faults.get(number)
        if fault is None and "response_format" in body and not self.fake.knows_schema:
            fault = 400
        if isinstance(fault, int):
            self.send(fault, {"error": {"message": "at fault"}})
        elif fault is not None:
            self.send(200, fault)
        else:
            message = {"role": "assistant", "content": self.fake.reply(body)}
            self.send(200, {"choices": [{"message": message}]})

    def send(self, status, value):
        location = self.fake.location
        self.send_object(status, value, [("Location", location)] if location else [])


def judging(fake):
    """Runs a fake judge in threads and yields its address."""
    return threaded(_Handler, fake)
