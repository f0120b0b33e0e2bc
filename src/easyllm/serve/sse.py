"""Server-sent events (WHATWG HTML, 9.2)."""

import json

from easyllm.core.json_types import Json

MEDIA_TYPE = "text/event-stream"
DONE = "data: [DONE]\n\n"
"""The end of OpenAI's streams of completions."""


def sse(value: Json, event: str | None = None) -> str:
    """Returns an event whose data is a JSON value.

    Args:
        value: the value; `json.dumps` escapes line breaks, so it is one line.
        event: type of the event, if it has one.
    """
    data = f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"
    return data if event is None else f"event: {event}\n{data}"
