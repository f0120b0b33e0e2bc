"""Server-sent events (WHATWG HTML, 9.2)."""

from easyllm.core.json_types import Json
from easyllm.serve.json_text import json_text

MEDIA_TYPE = "text/event-stream"
DONE = "data: [DONE]\n\n"
"""The end of OpenAI's streams of completions."""


def sse(value: Json, event: str | None = None) -> str:
    """Returns an event whose data is a JSON value.

    Args:
        value: the value; JSON escapes line breaks, so it is one line.
        event: type of the event, if it has one.
    """
    data = f"data: {json_text(value)}\n\n"
    return data if event is None else f"event: {event}\n{data}"
