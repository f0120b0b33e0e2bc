"""Reads the streamed answer to one request of a load test."""

import json

from easyllm.core.json_types import Json, JsonObject
from easyllm.serve.http_response import HTTPFailure, ResponseParser
from easyllm.serve.load_stats import Answer

MAX_DETAIL_CHARS = 200
MAX_EVENT_BYTES = 2**24
_TEXTS = ("content", "reasoning_content", "reasoning", "tool_calls")
"""Keys of a chat chunk's `delta` that contain what the model generates."""


class AnswerStream:
    """Takes the body of a response: server-sent events, or an error in one object.

    Args:
        answer: records times and counts.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self._rest, self._body = b"", b""
        self._ended = False

    def take(self, part: bytes, now_s: float) -> None:
        """Takes a part of the body that arrived at `now_s`."""
        lines = (self._rest + part).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise HTTPFailure("an event is too long")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now_s)
            elif not self.answer.chunks and len(self._body) < MAX_EVENT_BYTES:
                self._body += line + b"\n"  # not a stream: an error, as a rule

    def finish(self, response: ResponseParser) -> None:
        """Takes the end of the response, and decides whether it is an answer."""
        answer = self.answer
        if response.status != 200:
            answer.error = f"HTTP {response.status}"
            answer.detail = message_of(self._body + self._rest)
        elif answer.error is None and not self._ended:
            streamed = "event-stream" in response.headers.get("content-type", "")
            answer.error = "the stream ended early" if streamed else "the answer is not streamed"
            answer.detail = message_of(self._body + self._rest)

    def _event(self, data: bytes, now_s: float) -> None:
        answer = self.answer
        if data == b"[DONE]":
            self._ended = True
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            self._fail("an event is not a JSON object", data.decode("utf-8", "replace"))
            return
        if chunk.get("error"):
            self._fail("error in the stream", message_of(data))
            return
        self._ended |= _finishes(chunk)
        if _has_text(chunk):
            if answer.first_s is None:
                answer.first_s = now_s
            else:
                answer.gaps_s.append(now_s - answer.last_s)
            answer.last_s = now_s
            answer.chunks += 1
        if isinstance(chunk.get("usage"), dict):
            self._count(chunk["usage"])

    def _count(self, usage: JsonObject) -> None:
        answer = self.answer
        answer.prompt_tokens = _whole(usage.get("prompt_tokens"))
        answer.completion_tokens = _whole(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            answer.cached_tokens = _whole(details.get("cached_tokens"))

    def _fail(self, kind: str, detail: str) -> None:
        self.answer.error, self.answer.detail = kind, _shortened(detail)


def message_of(body: bytes) -> str:
    """Returns the message of an error response, whatever its form, on one line."""
    text = body.decode("utf-8", "replace").strip()
    try:
        value: Json = json.loads(text)
    except (ValueError, RecursionError):
        return _shortened(text)
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return _shortened(value if isinstance(value, str) else json.dumps(value))


def _has_text(chunk: JsonObject) -> bool:
    """Whether a chunk contains a part of a completion."""
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        return False
    for choice in choices:
        if isinstance(choice, dict):
            delta = choice.get("delta")
            if choice.get("text"):
                return True
            if isinstance(delta, dict) and any(delta.get(key) for key in _TEXTS):
                return True
    return False


def _finishes(chunk: JsonObject) -> bool:
    choices = chunk.get("choices")
    return isinstance(choices, list) and any(
        isinstance(choice, dict) and choice.get("finish_reason") for choice in choices
    )


def _whole(value: Json) -> int | None:
    return value if isinstance(value, int) else None


def _shortened(text: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= MAX_DETAIL_CHARS else line[:MAX_DETAIL_CHARS] + "…"
